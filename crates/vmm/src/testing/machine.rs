//! One machine: its VMM's process, its vCPUs, and what its guest's memory holds; and the record of all of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use kelvin_api::id::VmId;
use kelvin_host::process::ProcessKey;
use kelvin_host::testing::FakeProcess;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::script::{Call, Exec, Script, Step};
use crate::{Error, GuestEnd, MachineSpec, Saved};

/// What a guest's memory holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Memory {
    /// Who it is; nobody before its first activation.
    pub name: Option<String>,
    /// What it has written to its disk.
    pub disk: String,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// Whether the vCPUs run.
    pub running: bool,
    /// Nothing of a guest before a boot or a load.
    pub memory: Option<Memory>,
    /// Whether it has been told who it is since it was booted or restored.
    pub knows: bool,
    pub silent: bool,
    pub frozen: bool,
    pub ended: Option<GuestEnd>,
    /// Connections to the HTTP port.
    pub http: u32,
    /// The control connection that is served.
    pub control: u64,
    /// What is mapped, and loaded with the device state.
    mapped: Option<PathBuf>,
}

impl State {
    /// Whether its guest does anything.
    fn is_awake(&self) -> bool {
        self.running && !self.silent && self.ended.is_none()
    }
}

/// What can be seen of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Which one.
    pub vm: VmId,
    /// Who its guest is, once it has been told.
    pub name: Option<String>,
    /// Whether its vCPUs run.
    pub running: bool,
    /// Whether its guest has fallen silent.
    pub silent: bool,
}

/// A machine.
pub struct Machine {
    pub(super) vm: VmId,
    pub(super) process: Arc<FakeProcess>,
    directory: PathBuf,
    script: Arc<dyn Script>,
    lives: Arc<Lives>,
    pub(super) state: watch::Sender<State>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Machine").field(&self.vm).finish()
    }
}

impl Machine {
    pub(super) fn start(spec: &MachineSpec, script: Arc<dyn Script>, lives: Arc<Lives>) -> Arc<Self> {
        Arc::new(Self {
            vm: spec.vm.clone(),
            process: FakeProcess::start(&spec.marker()),
            directory: spec.absolute(),
            script,
            lives,
            state: watch::Sender::default(),
        })
    }

    /// What can be seen of it.
    pub fn seen(&self) -> Seen {
        let state = self.state.borrow();
        let name = state.memory.as_ref().and_then(|memory| memory.name.clone()).filter(|_| state.knows);
        Seen { vm: self.vm.clone(), name, running: state.running, silent: state.silent }
    }

    pub(super) fn lives_as(&self, name: &str) -> bool {
        let seen = self.seen();
        !self.is_over() && seen.running && seen.name.as_deref() == Some(name)
    }

    pub(super) fn key(&self) -> ProcessKey {
        self.process.key()
    }

    pub(super) fn is_over(&self) -> bool {
        self.process.is_over()
    }

    pub(super) fn kill(&self) {
        self.process.kill();
    }

    /// Does what the script wants of `call`.
    pub(super) async fn step(&self, call: Call) -> Result<(), Error> {
        let over = || Error::Ended { what: call.name(), stderr: "the process was killed".to_owned() };
        if self.is_over() {
            return Err(over());
        }
        match self.script.step(call, &self.vm) {
            Step::Go => {}
            Step::After(delay) => tokio::time::sleep(delay).await,
            Step::Fail => {
                return Err(Error::Refused { command: call.name(), reason: "the script says so".to_owned() });
            }
            Step::Crash => self.kill(),
            Step::Silence => self.state.send_modify(|state| state.silent = true),
            Step::PowerOff => self.state.send_modify(|state| state.ended = Some(GuestEnd::PowerOff)),
        }
        if self.is_over() { Err(over()) } else { Ok(()) }
    }

    /// Waits until the guest does something.
    pub(super) async fn awake(&self) {
        // The sender lives as long as this does.
        let _ = self.state.subscribe().wait_for(State::is_awake).await;
    }

    /// Does what the script says of `what`.
    pub(super) fn exec(&self, what: &str) -> Result<Exec, Error> {
        let exec = self.script.exec(what, &self.vm);
        if exec.writes {
            self.append(what)?;
        }
        Ok(exec)
    }

    /// Writes a line to the disk, and keeps a copy in memory.
    fn append(&self, line: &str) -> Result<(), Error> {
        if self.state.borrow().frozen {
            self.lives.violated(format!("{} has written to a frozen file system: {line}", self.vm));
        }
        let mut written = Ok(());
        self.state.send_modify(|state| {
            if let Some(memory) = &mut state.memory {
                memory.disk.push_str(line);
                memory.disk.push('\n');
                written = std::fs::write(self.disk(), &memory.disk);
            }
        });
        written.map_err(|source| Error::Io { what: "writing the disk", source })
    }

    fn disk(&self) -> PathBuf {
        self.directory.join("disk")
    }

    pub(super) fn boot(&self) -> Result<(), Error> {
        let disk = std::fs::read_to_string(self.disk())
            .map_err(|source| Error::Io { what: "reading the disk", source })?;
        self.state.send_modify(|state| {
            state.memory = Some(Memory { name: None, disk });
            state.running = true;
        });
        Ok(())
    }

    /// Maps `memory`, which is read when the device state is loaded.
    pub(super) fn map(&self, memory: &Path) -> Result<(), Error> {
        std::fs::metadata(memory).map_err(|source| Error::Io { what: "mapping the memory", source })?;
        self.state.send_modify(|state| state.mapped = Some(memory.to_owned()));
        Ok(())
    }

    pub(super) fn load(&self, path: &Path) -> Result<(), Error> {
        let io = |what| move |source| Error::Io { what, source };
        let refused = |reason: &str| Error::Refused { command: "load", reason: reason.to_owned() };
        let mapped = self.state.borrow().mapped.clone().ok_or_else(|| refused("no memory is mapped"))?;
        let (memory, state) = (std::fs::read(&mapped), std::fs::read(path));
        let (memory, state) = (memory.map_err(io("reading the memory"))?, state.map_err(io("reading"))?);
        // Device state is a copy of the memory: no other fits.
        if memory != state {
            return Err(refused("the device state is of another memory"));
        }
        let memory: Memory = serde_json::from_slice(&memory).map_err(|_| refused("the memory is none"))?;
        let disk = std::fs::read_to_string(self.disk()).map_err(io("reading the disk"))?;
        if disk != memory.disk {
            self.lives.violated(format!("memory {:?} was loaded over another disk, {disk:?}", memory.disk));
        }
        self.state.send_modify(|state| state.memory = Some(memory));
        Ok(())
    }

    pub(super) fn resume(&self) {
        self.state.send_modify(|state| state.running = true);
        if let Some(name) = self.seen().name {
            self.lives.check(&self.vm, &name);
        }
    }

    pub(super) fn save(&self, memory: &Path, state: &Path) -> Result<Saved, Error> {
        let (bytes, is_clone) = {
            let state = self.state.borrow();
            if state.running {
                self.lives.violated(format!("{} was saved while it ran", self.vm));
            }
            (serde_json::to_vec(&state.memory), state.mapped.is_some())
        };
        let write = || {
            let bytes = bytes?;
            std::fs::write(memory, &bytes)?;
            std::fs::write(state, &bytes)
        };
        write().map_err(|source| Error::Io { what: "saving", source })?;
        Ok(Saved { dirty_pages: is_clone.then_some(1) })
    }

    /// The guest is `name` from here on, and has it on its disk; `None` goes on as who it was.
    pub(super) fn is_now(&self, name: Option<&str>) -> Result<(), Error> {
        if let Some(name) = name {
            // It may have been frozen when it was saved.
            self.state.send_modify(|state| {
                state.frozen = false;
                if let Some(memory) = &mut state.memory {
                    memory.name = Some(name.to_owned());
                }
            });
            self.append(name)?;
        }
        self.state.send_modify(|state| {
            state.knows = true;
            state.frozen = false;
        });
        if let Some(name) = self.seen().name {
            self.lives.check(&self.vm, &name);
        }
        Ok(())
    }
}

/// The machines of a driver, and what went wrong among them.
#[derive(Default)]
pub(super) struct Lives {
    pub(super) machines: Mutex<Vec<Arc<Machine>>>,
    /// Who the guest of each machine was last.
    pub(super) names: Mutex<BTreeMap<VmId, String>>,
    pub(super) violations: Mutex<Vec<String>>,
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
