//! Firecracker: the driver for hosts with KVM.
//!
//! ```text
//! <machine>/            the jail's root; belongs to root, so that the VMM can replace nothing in it
//!   disk                the VMM's
//!   run/                the VMM's: its sockets
//!   log, metrics        pipes; the kernel bounds what nobody reads
//!   parent              which snapshot's memory a clone maps, for the next daemon
//!   snapshot-taken      there since the first snapshot was asked for
//!   memory.new state.new   a snapshot on its way
//!   guest/ | snapshot/  what it boots or maps, bound read-only inside the jail alone
//! ```
//!
//! A clone maps a snapshot's memory private. Its own snapshots are diffs that Firecracker lays over a reflink of that
//! memory, from KVM's dirty log; the log begins anew with each, so from the second on the pages are those that
//! `/proc/<pid>/pagemap` shows to be the machine's own. Never `mincore`, which takes every cached page for a written
//! one. Source: Firecracker, `docs/snapshotting/snapshot-support.md`.
//!
//! A machine that is parked is stopped as a process: a pause resets its guest's connections, and a resume is an exchange
//! with the VMM where this is one signal. (Its control group could do it, but has a thread of KVM that never freezes, so
//! that nothing tells when it is done. Source: Linux, `cgroup_update_frozen`.)
//!
//! A snapshot resets the connections of its source too, so there is a generation of them. Who writes: this driver in
//! the machine's directory, the VMM where it says so above. A crash of the daemon leaves VMMs that are found by
//! their id and adopted; a directory goes as a whole, mounts go with their process.

pub(crate) mod api;
pub mod config;
mod conversation;
mod dialer;
mod guest;
mod kernel;
mod machine;
pub(crate) mod metrics;
mod streams;
mod touched;
pub mod version;

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use kelvin_api::units::Shape;
use kelvin_host::accel::Accelerator;
use kelvin_host::cgroup::Limits;
use kelvin_host::jail::{Bind, Jail, is_dynamic};
use kelvin_host::process::{Network, Process, ProcessKey};
use sha2::{Digest, Sha256};

use crate::hostile::read_file;
use crate::process::{Sockets, Tail, close_directory, readers};
use crate::{COMMAND_LINE, Disk, Driver, Error, Handle, MachineSpec, Running, Waiting, made};
use api::Api;
use config::{API_SOCKET, DISK, GUEST, Options, SNAPSHOT};
use dialer::Dialer;
use machine::Machine;
use streams::Streams;
use touched::Touched;
use version::Version;

/// What is kept of the serial console and of standard error, in bytes.
const CONSOLE: usize = 64 << 10;
/// What is kept of the log, in bytes.
const LOG: usize = 16 << 10;
/// Memory of a VMM beside its guest's: its own, and page cache of what it reads and writes, in bytes.
const OVERHEAD: u64 = 64 << 20;
/// Threads of a VMM beside one for each vCPU.
const THREADS: u64 = 32;
/// The longest name of a memory file, in bytes.
const MAX_PARENT: u64 = 4 << 10;
/// Descriptors of a VMM: each connection to its guest is one.
const DESCRIPTORS: u64 = 4096;

/// Where things come from.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Firecracker's binary.
    pub binary: PathBuf,
    /// A program that has the subcommand `jail`: Kelvin's own.
    pub launcher: PathBuf,
    /// What the operator chose.
    pub options: Options,
}

/// The driver.
#[derive(Debug)]
pub struct Firecracker {
    version: Version,
    build: String,
    /// A copy that nobody replaces while this runs.
    binary: PathBuf,
    is_dynamic: bool,
    launcher: PathBuf,
    options: Options,
    touched: Touched,
}

/// The version of the Firecracker at `binary`.
///
/// # Errors
/// `Unusable` when it does not run, or is too old.
pub fn look_at(binary: &Path) -> Result<Version, Error> {
    let unusable = |reason: String| Error::Unusable { program: binary.display().to_string(), reason };
    let output = std::process::Command::new(binary).arg("--version").env_clear().output();
    let output = output.map_err(|error| unusable(error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version =
        Version::parse(&text).ok_or_else(|| unusable(format!("no version in {:?}", text.trim())))?;
    version.check().map_err(unusable)?;
    Ok(version)
}

/// The build of the Firecracker at `binary`, as in identities.
///
/// # Errors
/// As [`look_at`]; `Io` when it cannot be read.
pub fn build_at(binary: &Path) -> Result<String, Error> {
    let io = |source| Error::Io { what: "reading Firecracker", source };
    Ok(build(look_at(binary)?, &digest(&fs::read(binary).map_err(io)?)))
}

fn build(version: Version, digest: &str) -> String {
    format!("{version} {digest}")
}

/// The beginning of a binary's SHA-256.
fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

impl Firecracker {
    /// Looks at the binary and copies it to where only root can replace it.
    ///
    /// # Errors
    /// `Unusable` when it is too old, cannot do what is wanted, or this process is not root: each VMM gets a user, a
    /// root directory and namespaces of its own, which only root can give.
    pub fn open(data_dir: &Path, setup: Setup) -> Result<Self, Error> {
        let Setup { binary, launcher, options } = setup;
        let unusable = |reason: String| Error::Unusable { program: binary.display().to_string(), reason };
        if !rustix::process::geteuid().is_root() {
            return Err(unusable(
                "it is started in a jail, which only root can make; run the server as root".to_owned(),
            ));
        }
        let version = look_at(&binary)?;
        options.check(version).map_err(unusable)?;
        let io = |source| Error::Io { what: "installing Firecracker", source };
        let bytes = fs::read(&binary).map_err(io)?;
        let digest = digest(&bytes);
        let own = data_dir.join(format!("run/firecracker-{digest}"));
        if !own.exists() {
            let fresh = own.with_extension("new");
            fs::write(&fresh, &bytes).map_err(io)?;
            fs::set_permissions(&fresh, fs::Permissions::from_mode(0o555)).map_err(io)?;
            fs::rename(&fresh, &own).map_err(io)?;
        }
        forget_others(&own).map_err(io)?;
        let is_dynamic = is_dynamic(&own).map_err(|error| unusable(error.to_string()))?;
        if is_dynamic {
            tracing::warn!(
                "Firecracker is not a static program: its jails see the host's libraries, read-only"
            );
        }
        let (build, touched) = (build(version, &digest), Touched::default());
        Ok(Self { version, build, binary: own, is_dynamic, launcher, options, touched })
    }

    /// The guest's kernel command line.
    fn append() -> String {
        // None of the probing for devices that are not there.
        format!("{COMMAND_LINE} reboot=k pci=off i8042.noaux i8042.nomux i8042.dumbkbd")
    }

    /// Starts a jailed VMM. Its disk may be made meanwhile.
    async fn start(
        &self,
        spec: &MachineSpec,
        bind: Bind,
        parent: Option<PathBuf>,
        disk: Disk,
    ) -> Result<Machine, Error> {
        let io = |source| Error::Io { what: "starting the VMM", source };
        let directory = spec.absolute();
        let user = spec.user.ok_or_else(|| io(io::Error::other("a jail needs a user of its own")))?;
        lay_out(&directory, user, parent.as_deref(), &spec.data_dir).map_err(io)?;
        let network = match &spec.network {
            Some(slot) => {
                slot.lend_tap(user).map_err(io)?;
                Network::Of(slot.namespace().try_clone().map_err(io)?)
            }
            None => Network::Empty,
        };
        let longest = spec.shape.memory_mib.bytes().max(u64::from(spec.shape.disk_mib.0) << 20);
        let readers = parent.as_deref().map(readers).transpose().map_err(io)?.flatten();
        let jail = Jail {
            root: directory.clone(),
            program: self.binary.clone(),
            args: [
                "--api-sock",
                API_SOCKET,
                "--log-path",
                "log",
                "--level",
                "Warn",
                "--metrics-path",
                "metrics",
            ]
            .map(str::to_owned)
            .to_vec(),
            env: Vec::new(),
            // What it writes are files of its own in a directory of root's.
            read_only: false,
            user: Some(user),
            groups: readers.into_iter().collect(),
            binds: vec![bind.clone()],
            tun: spec.network.is_some(),
            kvm: true,
            cgroup: spec.cgroup.clone(),
            max_file_bytes: longest + OVERHEAD,
            max_descriptors: DESCRIPTORS,
            libraries: self.is_dynamic,
        };
        let started = Process::spawn_jailed(&self.launcher, jail, spec.marker(), network, Vec::new());
        let (process, output) = started.await.map_err(io)?;
        let console = Tail::follow(output, CONSOLE);
        let opening = async {
            let sockets = Sockets::open(&directory)?;
            let api = Api::open(sockets.connect_new(API_SOCKET, &process, &console).await?).await?;
            Ok((sockets, api))
        };
        let (opened, disk) = tokio::join!(opening, disk);
        let made = disk.and_then(|()| fs::metadata(directory.join(DISK)));
        let made = made.map_err(|source| Error::Io { what: "making the machine's disk", source });
        match opened.and_then(|opened| Ok((opened, made?))) {
            Ok(((sockets, api), disk)) => {
                Ok(self.machine(process, api, sockets, console, directory, bind, parent, &disk, spec))
            }
            Err(error) => {
                let died = tokio::time::timeout(Duration::from_millis(500), process.ended()).await.is_ok();
                let _ = process.kill();
                process.ended().await;
                Err(if died { Error::Ended { what: "starting", stderr: console.text() } } else { error })
            }
        }
    }

    #[allow(clippy::too_many_arguments, reason = "what a machine has, from its two ways of coming to be")]
    fn machine(
        &self,
        process: Process,
        api: Api,
        sockets: Sockets,
        console: Tail,
        directory: PathBuf,
        bind: Bind,
        parent: Option<PathBuf>,
        disk: &Metadata,
        spec: &MachineSpec,
    ) -> Machine {
        let log = Tail::of_pipe(&directory.join("log"), LOG);
        metrics::follow(&directory.join("metrics"), directory.clone());
        let process = Arc::new(process);
        let dialer = Dialer {
            sockets: Arc::new(sockets),
            process: Arc::clone(&process),
            generation: AtomicU64::new(0),
            streams: Streams::default(),
            console,
            log,
        };
        Machine {
            process,
            api,
            dialer: Arc::new(dialer),
            directory,
            bind,
            parent,
            disk: (disk.dev(), disk.ino()),
            has_network: spec.network.is_some(),
            cgroup: spec.cgroup.clone(),
            needs_reset: AtomicBool::new(false),
            is_stopped: AtomicBool::new(false),
            touched: self.touched.clone(),
            version: self.version,
            options: self.options.clone(),
        }
    }
}

/// Removes the copies of other binaries. Who runs one keeps it.
fn forget_others(own: &Path) -> io::Result<()> {
    for entry in fs::read_dir(own.parent().unwrap_or(Path::new("/")))? {
        let path = entry?.path();
        let is_copy =
            path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"firecracker-"));
        if is_copy && path != own {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Makes what a VMM finds in its root directory, beside its disk.
fn lay_out(directory: &Path, user: u32, parent: Option<&Path>, data_dir: &Path) -> io::Result<()> {
    close_directory(directory, Some(user))?;
    let run = directory.join("run");
    fs::DirBuilder::new().mode(0o700).create(&run)?;
    chown(&run, Some(user), Some(user))?;
    for name in ["log", "metrics"] {
        let path = directory.join(name);
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0)?;
        chown(&path, Some(user), Some(user))?;
    }
    if let Some(parent) = parent {
        let relative = parent.strip_prefix(data_dir).map_err(io::Error::other)?;
        fs::write(directory.join("parent"), relative.as_os_str().as_encoded_bytes())?;
    }
    Ok(())
}

#[async_trait]
impl Driver for Firecracker {
    fn kind(&self) -> &'static str {
        "firecracker"
    }

    fn build(&self) -> &str {
        &self.build
    }

    fn accelerator(&self) -> Accelerator {
        Accelerator::Kvm
    }

    fn layout(&self, shape: Shape, network: bool) -> Vec<String> {
        // Limits are this host's: they are set anew in every machine that is restored.
        let options = Options { disk_bytes_per_s: None, disk_ops_per_s: None, ..self.options.clone() };
        let calls = config::boot(shape, network, &Self::append(), &options);
        calls.into_iter().map(|call| format!("{} {}", call.name, call.body)).collect()
    }

    fn limits(&self, shape: Shape) -> Option<Limits> {
        // The VMM keeps its guest to the disk's limits; what has broken out of it gets twice that.
        Some(Limits {
            memory_bytes: shape.memory_mib.bytes() + OVERHEAD,
            cpu_millis: u64::from(shape.vcpus) * 1000 + 500,
            pids: u64::from(shape.vcpus) + THREADS,
            disk_bytes_per_s: self.options.disk_bytes_per_s.map(|limit| limit.saturating_mul(2)),
            disk_ops_per_s: self.options.disk_ops_per_s.map(|limit| u64::from(limit.get()) * 2),
        })
    }

    async fn boot(&self, spec: &MachineSpec, disk: Disk) -> Result<Running, Error> {
        let guest = spec.data_dir.join(&spec.guest);
        let (directory, io) =
            (guest.clone(), |source| Error::Io { what: "unpacking the guest's kernel", source });
        let staging = spec.data_dir.join("staging");
        let unpacked = tokio::task::spawn_blocking(move || kernel::ensure(&directory, &staging)).await;
        unpacked.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(io)?;
        let machine = self.start(spec, Bind::read(guest, GUEST), None, disk).await?;
        let told = async {
            for call in config::boot(spec.shape, spec.network.is_some(), &Self::append(), &self.options) {
                machine.call(call).await?;
            }
            machine.check_files().await?;
            machine.call(config::start()).await
        };
        let told = told.await;
        match machine.explain("booting", told).await {
            Ok(_) => Ok(Running::new(Box::new(machine))),
            Err(error) => Err(machine.give_up(error).await),
        }
    }

    async fn prepare(&self, spec: &MachineSpec, memory: &Path) -> Result<Waiting, Error> {
        let memory = spec.data_dir.join(memory);
        let no_name = || Error::Io { what: "starting the VMM", source: io::ErrorKind::InvalidInput.into() };
        let from = memory.parent().ok_or_else(no_name)?.to_owned();
        let machine = self.start(spec, Bind::read(from, SNAPSHOT), Some(memory), made()).await?;
        Ok(Waiting::new(Box::new(machine)))
    }

    async fn adopt(&self, spec: &MachineSpec, key: ProcessKey) -> Result<Running, Error> {
        let io = |source| Error::Io { what: "adopting the VMM", source };
        let directory = spec.absolute();
        let process = Process::adopt(key).map_err(io)?;
        // A daemon may have died before its machine ran on.
        process.go_on().map_err(io)?;
        let sockets = Sockets::open(&directory)?;
        let api = Api::open(sockets.connect(API_SOCKET, &process).await.map_err(io)?).await?;
        let parent = match read_file(directory.join("parent"), MAX_PARENT) {
            Ok(relative) => Some(spec.data_dir.join(relative)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(io(error)),
        };
        let from = parent.as_deref().and_then(Path::parent).map(Path::to_owned);
        let bind = match from {
            Some(from) => Bind::read(from, SNAPSHOT),
            None => Bind::read(spec.data_dir.join(&spec.guest), GUEST),
        };
        let disk = fs::metadata(directory.join(DISK)).map_err(io)?;
        let machine =
            self.machine(process, api, sockets, Tail::default(), directory, bind, parent, &disk, spec);
        // What that daemon was doing with it is not known.
        machine.needs_reset.store(true, Ordering::Relaxed);
        machine.go_on().await?;
        Ok(Running::new(Box::new(machine)))
    }
}
