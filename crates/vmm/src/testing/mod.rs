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

mod exec;
mod guest;
mod handle;
mod machine;
mod script;

use std::path::Path;
use std::sync::{Arc, PoisonError};

use async_trait::async_trait;
use kelvin_api::id::VmId;
use kelvin_api::units::Shape;
use kelvin_host::accel::Accelerator;
use kelvin_host::process::ProcessKey;

use handle::FakeHandle;
use machine::Lives;
pub use machine::{Machine, Seen};
pub use script::{Call, Exec, Script, Step};

use crate::{Disk, Driver, Error, MachineSpec, Running, Waiting};

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
            Ok(()) => Ok(Running::new(FakeHandle::of(machine))),
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
            Ok(()) => Ok(Waiting::new(FakeHandle::of(machine))),
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
        Ok(Running::new(FakeHandle::of(machine)))
    }
}
