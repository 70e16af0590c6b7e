//! Virtual machine monitors behind one trait.
//!
//! ```text
//!             prepare                 load               resume
//! (nothing) ──────────> Waiting ──────────────> Paused <────────> Running
//!      └──────────────────── boot ─────────────────────────────────^
//!                                       Paused ── save ──> memory + state
//! ```
//!
//! Each phase is a type that consumes the one before, so a machine cannot be resumed twice or loaded
//! while it runs. Ownership: a machine's directory, its disk and its user belong to the caller
//! (`kelvin-node`), which has them in the ledger; a driver owns the process and what it opens. Dropping a
//! phase does not end its VMM: VMMs outlive the daemon. Absent on purpose: which snapshot, which disk,
//! whether the result is good enough to hand out.

pub mod conformance;
pub mod control;
mod error;
pub mod firecracker;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod guest_end;
mod hostile;
mod pages;
mod process;
pub mod qemu;
pub mod stream;
#[cfg(feature = "testing")]
pub mod testing;

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use kelvin_api::id::VmId;
use kelvin_api::units::Shape;
use kelvin_host::accel::Accelerator;
use kelvin_host::cgroup::Limits;
use kelvin_host::net::Slot;
use kelvin_host::process::ProcessKey;

use crate::control::{Control, Dial};
pub use crate::error::Error;
use crate::stream::GuestStream;

/// Where a machine lives and what it is.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// Which machine.
    pub vm: VmId,
    /// The data directory: all other paths are relative to it.
    pub data_dir: PathBuf,
    /// The user that the VMM drops to, and the group that may pass through its directory.
    pub user: Option<u32>,
    /// vCPUs, memory, disk.
    pub shape: Shape,
    /// The guest's directory (kernel and initial RAM disk), relative to `data_dir`.
    pub guest: PathBuf,
    /// Its network: the VMM starts inside and takes the tap. `None` for a machine without one, which is
    /// another machine to a snapshot.
    pub network: Option<Arc<Slot>>,
    /// The control group that the VMM is born in, where the driver has limits and the host can keep them.
    pub cgroup: Option<PathBuf>,
}

impl MachineSpec {
    /// The machine's directory, relative to the data directory. It holds `disk`.
    pub fn directory(&self) -> PathBuf {
        Path::new("sandboxes").join(self.vm.as_str())
    }

    /// The same, absolute.
    pub fn absolute(&self) -> PathBuf {
        self.data_dir.join(self.directory())
    }

    /// By which the machine's process is found, see [`kelvin_host::process::MARKER`].
    pub fn marker(&self) -> String {
        format!("kelvin-{}", self.vm)
    }
}

/// What every guest's kernel is told; drivers add what their machine needs.
///
/// Quiet, because every byte of a serial console is an exit; no mitigations, because an emulator does not speculate as
/// the guest's code does and one tenant has the whole guest. Pressure accounting, autogroups and security modules
/// nobody configured are code on every wake-up and every system call; Landlock stays, because programs bring their own
/// rules for it.
const COMMAND_LINE: &str = "console=ttyS0 panic=-1 quiet mitigations=off audit=0 nowatchdog 8250.nr_uarts=1 psi=0 \
                            noautogroup lsm=landlock,yama";

/// The disk of a machine while it is made: a driver waits for it before it opens it, and does what it can meanwhile.
pub type Disk = Pin<Box<dyn Future<Output = std::io::Result<()>> + Send>>;

/// A disk that is there.
pub fn made() -> Disk {
    Box::pin(std::future::ready(Ok(())))
}

/// A kind of VMM.
#[async_trait]
pub trait Driver: Send + Sync + 'static {
    /// `qemu` or `firecracker`.
    fn kind(&self) -> &'static str;

    /// Version and digest of the binary: part of every identity.
    fn build(&self) -> &str;

    /// How guest instructions are run.
    fn accelerator(&self) -> Accelerator;

    /// Everything about the machine that a snapshot has baked in, without names and paths: part of every
    /// identity. `network`: whether the machine has one.
    fn layout(&self, shape: Shape, network: bool) -> Vec<String>;

    /// What a VMM of `shape` may take of the host; `None` for a driver that sets no limits.
    fn limits(&self, shape: Shape) -> Option<Limits> {
        let _ = shape;
        None
    }

    /// Starts a machine from its kernel. Its memory is `memory` in its directory, so that it can be saved.
    /// Returns when the VMM runs, not when the guest answers. The machine's directory is there, its `disk` when that
    /// future ends.
    ///
    /// # Errors
    /// When the VMM cannot be started, or there is no disk; then its process is gone.
    async fn boot(&self, spec: &MachineSpec, disk: Disk) -> Result<Running, Error>;

    /// Starts a VMM that waits to load a snapshot whose memory is the file `memory` (relative to the data
    /// directory). The file is mapped private and never written.
    ///
    /// # Errors
    /// When the VMM cannot be started; then its process is gone.
    async fn prepare(&self, spec: &MachineSpec, memory: &Path) -> Result<Waiting, Error>;

    /// Takes over a machine that a former daemon started. Its vCPUs run afterwards, whatever that daemon was doing.
    ///
    /// # Errors
    /// `Io` with `NotFound` when the process is gone.
    async fn adopt(&self, spec: &MachineSpec, key: ProcessKey) -> Result<Running, Error>;
}

/// What a driver does to one machine; the phases below decide when.
#[async_trait]
pub trait Handle: Send + Sync {
    /// The VMM's process.
    fn process(&self) -> &kelvin_host::process::Process;
    /// Loads device state; vCPUs stay stopped.
    async fn load(&self, state: &Path) -> Result<(), Error>;
    /// Starts the vCPUs.
    async fn resume(&self) -> Result<(), Error>;
    /// Takes what its guest has done until now for what other machines of the same snapshot do first. Returns at once.
    fn learn(&self) {}
    /// Stops the vCPUs; outstanding disk writes are done when it returns.
    async fn pause(&self) -> Result<(), Error>;
    /// Stops the vCPUs for long, in the way that makes the next resume cheapest.
    async fn park(&self) -> Result<(), Error> {
        self.pause().await
    }
    /// Starts the vCPUs again that the VMM stopped by itself, because its disk was full.
    async fn go_on(&self) -> Result<(), Error>;
    /// Does what can be done of a save before the machine is stopped.
    async fn begin_save(&self, memory: &Path) -> Result<(), Error>;
    /// Writes memory and device state of a stopped machine.
    async fn save(&self, memory: &Path, state: &Path) -> Result<Saved, Error>;
    /// The way to the guest's control port. One at a time.
    async fn control(&self) -> Result<Control, Error>;
    /// Makes connections to the guest, for as long as there is one.
    fn dialer(&self) -> Arc<dyn Dial>;
    /// The last of the console, bounded.
    async fn console(&self) -> Result<String, Error>;
    /// The last of the VMM's standard error, bounded.
    fn stderr(&self) -> String;
    /// Waits until the guest has ended its machine; for ever with a VMM that ends with its guest.
    async fn guest_ended(&self) -> GuestEnd {
        std::future::pending().await
    }
}

/// How a guest has ended, as its VMM tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestEnd {
    /// It powered its machine off.
    PowerOff,
    /// It reset its machine: it rebooted, or its kernel panicked.
    Reset,
    /// Its kernel said that it panicked.
    Panic,
}

/// Why a machine does not run any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineEnd {
    /// Its guest ended it; the VMM may still be there and has the console.
    Guest(GuestEnd),
    /// Its VMM has ended.
    Vmm,
}

/// What a save cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saved {
    /// Pages that were copied because the machine had written them; `None` when it shares no parent.
    pub dirty_pages: Option<u64>,
}

macro_rules! phase {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        pub struct $name(Box<dyn Handle>);

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_tuple(stringify!($name)).field(&self.key().pid).finish()
            }
        }

        impl $name {
            /// For drivers: the machine behind `handle` is in this phase.
            pub fn new(handle: Box<dyn Handle>) -> Self {
                Self(handle)
            }

            /// Which process it is.
            pub fn key(&self) -> ProcessKey {
                self.0.process().key()
            }

            /// Whether the VMM has ended.
            pub fn is_over(&self) -> bool {
                self.0.process().is_over()
            }

            /// Kills the VMM and waits until it is gone. Safe twice.
            ///
            /// # Errors
            /// `Io` when the kernel refuses the signal.
            pub async fn kill(&self) -> Result<(), Error> {
                self.0.process().kill().map_err(|source| Error::Io { what: "killing the VMM", source })?;
                self.0.process().ended().await;
                Ok(())
            }

            /// The way to the guest's control port: framed activation and quiesce, see [`kelvin_api::guest`]. One
            /// at a time.
            ///
            /// # Errors
            /// `Io` when the VMM is gone.
            pub async fn control(&self) -> Result<Control, Error> {
                self.0.control().await
            }

            /// The last of the VMM's standard error, bounded.
            pub fn stderr(&self) -> String {
                self.0.stderr()
            }
        }
    };
}

phase!(
    /// A VMM that was started ahead of time and has loaded nothing.
    Waiting
);
phase!(
    /// A machine whose vCPUs are stopped.
    Paused
);
phase!(
    /// A machine whose vCPUs run.
    Running
);

impl Waiting {
    /// Loads the device state in the file `state`; vCPUs stay stopped.
    ///
    /// Not cancel-safe: the caller ends the VMM when it gives up.
    ///
    /// # Errors
    /// `Refused` or `Ended` when the state does not fit the machine; then the VMM is of no more use and
    /// the caller kills it by its process key.
    pub async fn load(self, state: &Path) -> Result<Paused, (Self, Error)> {
        match self.0.load(state).await {
            Ok(()) => Ok(Paused(self.0)),
            Err(error) => Err((self, error)),
        }
    }
}

impl Paused {
    /// Starts the vCPUs.
    ///
    /// # Errors
    /// As [`Waiting::load`].
    pub async fn resume(self) -> Result<Running, (Self, Error)> {
        match self.0.resume().await {
            Ok(()) => Ok(Running(self.0)),
            Err(error) => Err((self, error)),
        }
    }

    /// Writes memory and device state to `memory`, which [`Running::begin_save`] may have begun, and `state`; neither
    /// may exist otherwise. A clone's memory
    /// becomes a reflink of its parent's with the written pages laid over it: the cost follows the pages,
    /// not the size.
    ///
    /// # Errors
    /// `Io` when the disk is full; the machine stays as it was and partial files are the caller's.
    pub async fn save(&self, memory: &Path, state: &Path) -> Result<Saved, Error> {
        self.0.save(memory, state).await
    }
}

impl Running {
    /// Connects to the guest's HTTP port. One connection at a time.
    ///
    /// # Errors
    /// `Io` when the VMM is gone, or nobody listens in the guest.
    pub async fn connect(&self) -> Result<GuestStream, Error> {
        self.0.dialer().connect().await
    }

    /// What makes such connections, for whoever does not own the machine.
    pub fn dialer(&self) -> Arc<dyn Dial> {
        self.0.dialer()
    }

    /// Stops the vCPUs; outstanding disk writes are done when it returns.
    ///
    /// # Errors
    /// As [`Waiting::load`].
    pub async fn pause(self) -> Result<Paused, (Self, Error)> {
        match self.0.pause().await {
            Ok(()) => Ok(Paused(self.0)),
            Err(error) => Err((self, error)),
        }
    }

    /// Stops the vCPUs of a machine that will stand still for long: connections to its guest are kept, and what is
    /// written to them waits. It can be resumed and killed, not saved.
    ///
    /// # Errors
    /// As [`Waiting::load`].
    pub async fn park(self) -> Result<Paused, (Self, Error)> {
        match self.0.park().await {
            Ok(()) => Ok(Paused(self.0)),
            Err(error) => Err((self, error)),
        }
    }

    /// Does what can be done of [`Paused::save`] to `memory` while the machine runs. May be left out.
    ///
    /// # Errors
    /// `Io` when the disk is full; partial files are the caller's.
    pub async fn begin_save(&self, memory: &Path) -> Result<(), Error> {
        self.0.begin_save(memory).await
    }

    /// Starts the vCPUs again when the VMM has stopped them by itself: it does so when a write to its disk finds no
    /// space, and tries that write again then.
    ///
    /// # Errors
    /// When the VMM does not answer.
    pub async fn go_on(&self) -> Result<(), Error> {
        self.0.go_on().await
    }

    /// Takes what its guest has done until now for what other machines of the same snapshot do first: to be called when
    /// it has answered its activation. Returns at once.
    pub fn learn(&self) {
        self.0.learn();
    }

    /// Waits until the machine does not run any more. Its VMM may still be there, and is to be killed.
    pub async fn ended(&self) -> MachineEnd {
        tokio::select! {
            biased;
            end = self.0.guest_ended() => MachineEnd::Guest(end),
            () = self.0.process().ended() => MachineEnd::Vmm,
        }
    }

    /// The last of the console, bounded to 64 KiB by the VMM.
    ///
    /// # Errors
    /// When the VMM does not answer.
    pub async fn console(&self) -> Result<String, Error> {
        self.0.console().await
    }
}
