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

/// What something that a guest is asked to do comes to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exec {
    /// A command's exit code; what is no command is refused with another one than 0.
    pub code: i32,
    /// What it writes, or answers.
    pub output: String,
    /// Whether it is written to the disk, in a line of its own.
    pub writes: bool,
    /// Whether it never comes to an end; the guest itself goes on.
    pub hangs: bool,
}

/// Decides what becomes of each call.
pub trait Script: Send + Sync + 'static {
    /// Asked before `call` is done for the machine `vm`.
    fn step(&self, call: Call, vm: &VmId) -> Step;

    /// Asked what comes of what the guest of `vm` is told to do: `run COMMAND`, `files QUERY BODY`, `read QUERY`, `mkdir BODY`,
    /// `unpack QUERY LENGTH`.
    fn exec(&self, what: &str, vm: &VmId) -> Exec {
        let _ = (what, vm);
        Exec::default()
    }
}

/// Everything goes well.
impl Script for () {
    fn step(&self, _: Call, _: &VmId) -> Step {
        Step::Go
    }
}
