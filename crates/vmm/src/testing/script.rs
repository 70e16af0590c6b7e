//! What is asked for, and what becomes of it.

use std::time::Duration;

use kelvin_api::id::VmId;

/// What a driver, its machines and their guests are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // each is the function or the request of that name
pub enum Call {
    Boot,
    Prepare,
    Adopt,
    Load,
    Resume,
    Pause,
    Park,
    GoOn,
    BeginSave,
    Save,
    Control,
    Connect,
    Console,
    Ping,
    Activate,
    Quiesce,
    Freeze,
    Wake,
    Http,
}

impl Call {
    /// Its name, for errors.
    pub fn name(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Prepare => "prepare",
            Self::Adopt => "adopt",
            Self::Load => "load",
            Self::Resume => "resume",
            Self::Pause => "pause",
            Self::Park => "park",
            Self::GoOn => "go_on",
            Self::BeginSave => "begin_save",
            Self::Save => "save",
            Self::Control => "control",
            Self::Connect => "connect",
            Self::Console => "console",
            Self::Ping => "ping",
            Self::Activate => "activate",
            Self::Quiesce => "quiesce",
            Self::Freeze => "freeze",
            Self::Wake => "wake",
            Self::Http => "http",
        }
    }

    /// Whether the guest does it, and not the VMM.
    pub fn is_guests(self) -> bool {
        matches!(self, Self::Ping | Self::Activate | Self::Quiesce | Self::Freeze | Self::Wake | Self::Http)
    }
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It is done at once.
    Go,
    /// It is done after this long.
    After(Duration),
    /// It is refused, with an error.
    Fail,
    /// The VMM ends instead.
    Crash,
    /// The guest says nothing any more, from here on; what the VMM does by itself is done.
    Silence,
    /// The guest powers its machine off instead.
    PowerOff,
}

/// Decides what becomes of each call.
pub trait Script: Send + Sync + 'static {
    /// Asked before `call` is done for the machine `vm`.
    fn step(&self, call: Call, vm: &VmId) -> Step;
}

/// Everything goes well.
impl Script for () {
    fn step(&self, _: Call, _: &VmId) -> Step {
        Step::Go
    }
}
