//! A driver whose machines are nothing but state, for tests of whoever starts, saves, moves and ends machines.
//!
//! ```text
//! FakeDriver ──> Machine: a fake process, vCPUs that run or stand still, a guest that knows who it is
//!     │ Script: before each call, whether it waits, fails, or the VMM or the guest goes wrong
//!     └ Lives: whatever should never be, noticed as it happens
//! ```
//!
//! It passes the conformance suite, as every driver must. Memory, device state and disk are real files of a few bytes:
//! the guest writes who it is to its disk and keeps a copy in its memory, so that memory over another disk is found
//! out. Machines outlive the reactor, as VMMs outlive a daemon: a driver that is kept can adopt them from another.
//! Absent on purpose: networks, limits, and anything that takes time by itself.

mod guest;
mod machine;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use kelvin_api::id::VmId;
use kelvin_api::units::Shape;
use kelvin_host::accel::Accelerator;
use kelvin_host::process::ProcessKey;

pub use machine::{Machine, Seen};

use crate::{Disk, Driver, Error, MachineSpec, Running, Waiting};

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

/// The machines of a driver, and what went wrong among them.
#[derive(Default)]
struct Lives {
    machines: Mutex<Vec<Arc<Machine>>>,
    /// Who the guest of each machine was last.
    names: Mutex<BTreeMap<VmId, String>>,
    violations: Mutex<Vec<String>>,
}

impl Lives {
    fn violated(&self, what: String) {
        self.violations.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }

    /// Notices when two guests are the same sandbox at one time.
    fn check(&self, vm: &VmId, name: &str) {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).insert(vm.clone(), name.to_owned());
        let machines = self.machines.lock().unwrap_or_else(PoisonError::into_inner);
        let lives = machines.iter().filter(|machine| machine.lives_as(name)).count();
        if lives > 1 {
            self.violated(format!("{lives} machines run as {name} at one time"));
        }
    }
}

/// The driver.
pub struct FakeDriver {
    script: Arc<dyn Script>,
    lives: Arc<Lives>,
}

impl std::fmt::Debug for FakeDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FakeDriver").finish_non_exhaustive()
    }
}

impl FakeDriver {
    /// A driver that does what `script` says.
    pub fn new(script: impl Script) -> Self {
        Self { script: Arc::new(script), lives: Arc::default() }
    }

    /// What can be seen of every machine whose VMM is there.
    pub fn machines(&self) -> Vec<Seen> {
        let mut machines = self.lives.machines.lock().unwrap_or_else(PoisonError::into_inner);
        machines.retain(|machine| !machine.is_over());
        machines.iter().map(|machine| machine.seen()).collect()
    }

    /// Who the guest of a machine was last, also when it has ended.
    pub fn name_of(&self, vm: &VmId) -> Option<String> {
        self.lives.names.lock().unwrap_or_else(PoisonError::into_inner).get(vm).cloned()
    }

    /// What should never have been, in the order in which it was noticed.
    pub fn violations(&self) -> Vec<String> {
        self.lives.violations.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends every VMM.
    pub fn kill_all(&self) {
        for machine in self.lives.machines.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            machine.kill();
        }
    }

    fn start(&self, spec: &MachineSpec) -> Arc<Machine> {
        let machine = Machine::start(spec, Arc::clone(&self.script), Arc::clone(&self.lives));
        let mut machines = self.lives.machines.lock().unwrap_or_else(PoisonError::into_inner);
        machines.retain(|machine| !machine.is_over());
        machines.push(Arc::clone(&machine));
        machine
    }
}

#[async_trait]
impl Driver for FakeDriver {
    fn kind(&self) -> &'static str {
        "fake"
    }

    fn build(&self) -> &str {
        "1"
    }

    fn accelerator(&self) -> Accelerator {
        Accelerator::Tcg
    }

    fn layout(&self, _: Shape, network: bool) -> Vec<String> {
        vec![format!("network={network}")]
    }

    async fn boot(&self, spec: &MachineSpec, disk: Disk) -> Result<Running, Error> {
        let machine = self.start(spec);
        let booted = async {
            machine.step(Call::Boot).await?;
            disk.await.map_err(|source| Error::Io { what: "opening the disk", source })?;
            machine.boot()
        };
        match booted.await {
            Ok(()) => Ok(Running::new(machine.handle())),
            Err(error) => {
                machine.kill();
                Err(error)
            }
        }
    }

    async fn prepare(&self, spec: &MachineSpec, memory: &Path) -> Result<Waiting, Error> {
        let machine = self.start(spec);
        let prepared =
            machine.step(Call::Prepare).await.and_then(|()| machine.map(&spec.data_dir.join(memory)));
        match prepared {
            Ok(()) => Ok(Waiting::new(machine.handle())),
            Err(error) => {
                machine.kill();
                Err(error)
            }
        }
    }

    async fn adopt(&self, _: &MachineSpec, key: ProcessKey) -> Result<Running, Error> {
        let gone = || Error::Io { what: "adopting", source: std::io::ErrorKind::NotFound.into() };
        let machine = {
            let machines = self.lives.machines.lock().unwrap_or_else(PoisonError::into_inner);
            machines.iter().find(|machine| machine.key() == key && !machine.is_over()).cloned()
        };
        let machine = machine.ok_or_else(gone)?;
        machine.step(Call::Adopt).await?;
        machine.resume();
        Ok(Running::new(machine.handle()))
    }
}
