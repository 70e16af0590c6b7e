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
mod kernel;
pub(crate) mod metrics;
mod streams;
mod touched;
pub mod version;

use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use kelvin_api::guest::CONTROL_VSOCK;
use kelvin_api::units::Shape;
use kelvin_host::accel::Accelerator;
use kelvin_host::cgroup::{self, Limits};
use kelvin_host::jail::{Bind, Jail, is_dynamic};
use kelvin_host::process::{Network, Process, ProcessKey};
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use crate::control::{Control, Dial, Dialed};
use crate::hostile::read_file;
use crate::pages::{self, Mapping};
use crate::process::{Sockets, Tail, close_directory, readers};
use crate::stream::GuestStream;
use crate::{COMMAND_LINE, Disk, Driver, Error, Handle, MachineSpec, Running, Saved, Waiting, made};
use api::Api;
use config::{API_SOCKET, Call, DISK, GUEST, Options, SNAPSHOT, VSOCK};
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
/// How long a guest may take to accept a connection: its agent may just be starting again.
const CONNECT: Duration = Duration::from_secs(10);

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

/// Where the VMM `pid` has mapped the memory `parent`; fails unless its files are that and `disk`, by device and inode.
fn right_files(pid: i32, disk: (u64, u64), parent: Option<&Path>) -> io::Result<Vec<Mapping>> {
    let memory = parent.map(fs::metadata).transpose()?;
    let open = fs::read_dir(format!("/proc/{pid}/fd"))?;
    let files = open.flatten().filter_map(|entry| fs::metadata(entry.path()).ok());
    let found: Vec<_> = files.filter(|file| file.is_file()).map(|file| (file.dev(), file.ino())).collect();
    // A restored VMM holds its memory open and nothing else; one that is about to boot has the guest's kernel.
    let others = memory.as_ref().is_some_and(|memory| {
        found.iter().any(|file| *file != disk && *file != (memory.dev(), memory.ino()))
    });
    if others || !found.contains(&disk) {
        return Err(io::Error::other("the VMM has opened another disk than its machine's"));
    }
    parent.map_or(Ok(Vec::new()), |parent| pages::parts(pid, parent))
}

/// Makes a file that the VMM of `user` writes: it cannot make one itself.
fn make_for(user: &Metadata, path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    File::options().write(true).create_new(true).open(path)?;
    chown(path, Some(user.uid()), Some(user.gid()))
}

/// Takes a file that a VMM has written: it is the file that was made for it, and nobody else has a name for it.
fn take(from: &Path, to: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(from)?;
    if !found.is_file() || found.nlink() != 1 {
        return Err(io::Error::other(format!("{} is not what was made", from.display())));
    }
    chown(from, Some(0), Some(0))?;
    fs::rename(from, to)
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

/// Makes connections to a guest.
#[derive(Debug)]
struct Dialer {
    sockets: Arc<Sockets>,
    process: Arc<Process>,
    generation: AtomicU64,
    /// The host's ends of those that were made in this generation.
    streams: Streams,
    console: Tail,
    log: Tail,
}

impl Dialer {
    /// The last that the VMM has said.
    fn words(&self) -> String {
        [self.log.text(), self.console.text()].join("\n").trim().to_owned()
    }

    /// Asks for a connection to a port of the guest; what is written after it waits for the guest.
    async fn ask(&self, port: u32) -> Result<UnixStream, Error> {
        let io = |source| Error::Io { what: "connecting to the guest", source };
        let mut stream = match self.sockets.connect(VSOCK, &self.process).await {
            Ok(stream) => stream,
            // A VMM that is no more has said why.
            Err(_) if self.process.is_over() => {
                return Err(Error::Ended { what: "connecting to the guest", stderr: self.words() });
            }
            Err(source) => return Err(io(source)),
        };
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).await.map_err(io)?;
        let own = stream.as_fd().try_clone_to_owned().map_err(io)?;
        self.streams.add(own);
        Ok(stream)
    }

    /// Every connection is of no more use: the guest resets its ends when it goes on. Whoever has one is told now.
    fn reset(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
        self.streams.close();
    }
}

/// The ways to one guest, for whoever wants one.
#[derive(Debug)]
struct Guest(Arc<Dialer>);

#[async_trait]
impl Dial for Guest {
    async fn dial(&self) -> Result<Dialed, Error> {
        Ok(Dialed { stream: self.0.ask(CONTROL_VSOCK).await?.into(), greets: true })
    }

    async fn connect(&self) -> Result<GuestStream, Error> {
        let connect = async {
            loop {
                match conversation::begin(&self.0).await {
                    // Nobody listens: an agent that is started again does soon, and nothing tells when.
                    Err(_) if !self.0.process.is_over() => tokio::time::sleep(Duration::from_millis(5)).await,
                    begun => return begun,
                }
            }
        };
        match tokio::time::timeout(CONNECT, connect).await {
            Ok(result) => result.map(GuestStream::from),
            Err(_) => Err(Error::Deadline {
                what: "connecting to the guest",
                after: CONNECT,
                detail: "nobody listens in the guest".to_owned(),
            }),
        }
    }

    fn generation(&self) -> u64 {
        self.0.generation.load(Ordering::Relaxed)
    }
}

/// One VMM.
#[derive(Debug)]
struct Machine {
    process: Arc<Process>,
    api: Api,
    dialer: Arc<Dialer>,
    /// The jail's root, absolute.
    directory: PathBuf,
    bind: Bind,
    /// The snapshot's memory that it maps private, absolute.
    parent: Option<PathBuf>,
    /// Device and inode of its disk.
    disk: (u64, u64),
    has_network: bool,
    cgroup: Option<PathBuf>,
    /// Whether its guest has to be told that connections are gone before it goes on, see [`Version::keeps_vsock_over_a_pause`].
    needs_reset: AtomicBool,
    /// Whether its process is stopped.
    is_stopped: AtomicBool,
    touched: Touched,
    version: Version,
    options: Options,
}

impl Machine {
    /// Does of a resume what can be done while the machine stands still.
    async fn rest(&self) -> Result<(), Error> {
        if self.needs_reset.load(Ordering::Relaxed) && !self.version.keeps_vsock_over_a_pause() {
            self.tell_reset().await?;
        }
        self.needs_reset.store(false, Ordering::Relaxed);
        Ok(())
    }

    async fn call(&self, call: Call) -> Result<serde_json::Value, Error> {
        self.api.call(call).await
    }

    /// A broken connection means that the VMM has ended or is about to: then say so, with its last words.
    async fn explain<T>(&self, what: &'static str, result: Result<T, Error>) -> Result<T, Error> {
        match result {
            Err(Error::Io { .. })
                if tokio::time::timeout(Duration::from_secs(2), self.process.ended()).await.is_ok() =>
            {
                Err(Error::Ended { what, stderr: self.dialer.words() })
            }
            other => other,
        }
    }

    async fn give_up(self, error: Error) -> Error {
        let _ = self.process.kill();
        self.process.ended().await;
        error
    }

    /// The jail's path of a file of the host.
    fn in_jail(&self, path: &Path) -> io::Result<PathBuf> {
        if let Ok(rest) = path.strip_prefix(&self.directory) {
            return Ok(rest.to_owned());
        }
        match path.strip_prefix(&self.bind.from) {
            Ok(rest) => Ok(self.bind.to.join(rest)),
            Err(_) => Err(io::Error::other(format!("{} is not in the jail", path.display()))),
        }
    }

    /// A VMM that opened another disk, or mapped other memory, than its machine's must not run: paths are baked into
    /// device state. One that did not gets the pages ahead that its guest writes first.
    async fn check_files(&self) -> Result<(), Error> {
        let (pid, disk, parent) = (self.process.key().pid, self.disk, self.parent.clone());
        let first = parent.as_ref().map(|parent| self.touched.of(parent)).unwrap_or_default();
        let check = move || {
            let parts = right_files(pid, disk, parent.as_deref())?;
            if let Err(error) = pages::own_ahead(pid, &parts, &first) {
                // Its guest does it then, page by page.
                tracing::debug!(%error, "no page was copied ahead");
            }
            Ok(())
        };
        let checked = tokio::task::spawn_blocking(check).await;
        checked
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(|source| Error::Io { what: "checking the VMM's files", source })
    }

    async fn try_load(&self, state: &Path) -> Result<(), Error> {
        let io = |source| Error::Io { what: "opening the device state", source };
        let state = self.in_jail(state).map_err(io)?;
        self.call(config::load_snapshot(&state, self.has_network, &self.options, self.version)).await?;
        self.check_files().await?;
        // What was baked are the limits of another day, or none.
        if self.options.disk_bytes_per_s.is_some() || self.options.disk_ops_per_s.is_some() {
            self.call(config::patch_drive(&self.options)).await?;
        }
        Ok(())
    }

    /// Tells the guest that its connections are gone, which a snapshot does: one whose memory has nowhere to go.
    async fn tell_reset(&self) -> Result<(), Error> {
        let io = |source| Error::Io { what: "telling the guest of a reset", source };
        let user = fs::metadata(self.directory.join(DISK)).map_err(io)?;
        make_for(&user, &self.directory.join("state.new")).map_err(io)?;
        let nowhere = Path::new("run/none/memory");
        match self.call(config::create_snapshot(nowhere, Path::new("state.new"), false)).await {
            // The device state is whole by then, and the event on its way.
            Err(Error::Refused { .. }) => {}
            Err(error) => return Err(error),
            Ok(_) => return Err(io(io::Error::other("a snapshot went nowhere"))),
        }
        self.dialer.reset();
        Ok(())
    }

    async fn try_save(&self, memory: &Path, state: &Path) -> Result<Saved, Error> {
        let io = |what| move |source| Error::Io { what, source };
        let (own_memory, own_state) = (self.directory.join("memory.new"), self.directory.join("state.new"));
        let user = fs::metadata(self.directory.join(DISK)).map_err(io("saving"))?;
        make_for(&user, &own_state).map_err(io("saving"))?;
        if self.parent.is_none() {
            make_for(&user, &own_memory).map_err(io("saving"))?;
        } else if !own_memory.exists() {
            self.begin_save(memory).await?;
        }
        let marker = self.directory.join("snapshot-taken");
        let again = marker.exists();
        File::create(&marker).map_err(io("saving"))?;
        let relative = |path: &Path| path.file_name().map(PathBuf::from).unwrap_or_default();
        let call =
            config::create_snapshot(&relative(&own_memory), &relative(&own_state), self.parent.is_some());
        let (pid, parent) = (self.process.key().pid, self.parent.clone());
        let counting = tokio::task::spawn_blocking({
            let parent = parent.clone().filter(|_| !again);
            move || parent.map(|parent| pages::count_own(pid, &parent)).transpose()
        });
        // Firecracker has written all of it when it answers.
        let lifted =
            self.cgroup.as_deref().map(cgroup::lift_disk).transpose().map_err(io("lifting limits"))?;
        let saved = self.call(call).await;
        drop(lifted);
        // The reset is on its way to the guest, whatever became of the rest.
        self.needs_reset.store(false, Ordering::Relaxed);
        self.dialer.reset();
        match saved {
            Err(Error::Refused { reason, .. }) if reason.contains("No space left") => {
                return Err(io("writing the snapshot")(io::ErrorKind::StorageFull.into()));
            }
            other => other?,
        };
        let laying = tokio::task::spawn_blocking({
            let (parent, target) = (parent.filter(|_| again), own_memory.clone());
            // What it wrote before the last snapshot is in no log any more.
            move || match parent {
                Some(parent) => pages::save_memory(pid, &parent, &target, true, pages::Ahead::default()),
                None => Ok(None),
            }
        });
        let copied = |done: Result<io::Result<Option<u64>>, tokio::task::JoinError>| {
            done.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(io("copying memory"))
        };
        let dirty_pages = copied(counting.await)?.or(copied(laying.await)?);
        take(&own_memory, memory).map_err(io("moving the memory"))?;
        take(&own_state, state).map_err(io("moving the device state"))?;
        Ok(Saved { dirty_pages })
    }
}

#[async_trait]
impl Handle for Machine {
    fn process(&self) -> &Process {
        &self.process
    }

    async fn load(&self, state: &Path) -> Result<(), Error> {
        self.explain("loading", self.try_load(state).await).await
    }

    async fn resume(&self) -> Result<(), Error> {
        if self.is_stopped.swap(false, Ordering::Relaxed) {
            let going = self.process.go_on();
            return going.map_err(|source| Error::Io { what: "letting the VMM run on", source });
        }
        let resumed = async {
            self.rest().await?;
            self.call(config::resume()).await.map(drop)
        };
        let resumed = resumed.await;
        self.explain("resuming", resumed).await
    }

    async fn park(&self) -> Result<(), Error> {
        let stopped = self.process.stop().await;
        stopped.map_err(|source| Error::Io { what: "stopping the VMM", source })?;
        self.is_stopped.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn learn(&self) {
        if let Some(parent) = &self.parent {
            self.touched.learn(self.process.key().pid, parent);
        }
    }

    async fn pause(&self) -> Result<(), Error> {
        let paused = self.call(config::pause()).await.map(drop);
        if paused.is_ok() {
            self.needs_reset.store(true, Ordering::Relaxed);
        }
        self.explain("pausing", paused).await
    }

    async fn go_on(&self) -> Result<(), Error> {
        let instance = self.call(config::instance()).await?;
        if instance["state"] == "Paused" { self.resume().await } else { Ok(()) }
    }

    async fn begin_save(&self, _memory: &Path) -> Result<(), Error> {
        let Some(parent) = self.parent.clone() else { return Ok(()) };
        let (target, disk) = (self.directory.join("memory.new"), self.directory.join(DISK));
        let begun = tokio::task::spawn_blocking(move || {
            match fs::remove_file(&target) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            pages::clone_memory(&parent, &target)?;
            let user = fs::metadata(disk)?;
            chown(&target, Some(user.uid()), Some(user.gid()))
        });
        begun
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(|source| Error::Io { what: "beginning to copy memory", source })
    }

    async fn save(&self, memory: &Path, state: &Path) -> Result<Saved, Error> {
        let saved = self.try_save(memory, state).await;
        if saved.is_err() {
            for name in ["memory.new", "state.new"] {
                let _ = fs::remove_file(self.directory.join(name));
            }
        }
        self.explain("saving", saved).await
    }

    async fn control(&self) -> Result<Control, Error> {
        // Connected by the first request: before it is loaded there is nobody to connect to.
        Ok(Control::new(self.dialer()))
    }

    fn dialer(&self) -> Arc<dyn Dial> {
        Arc::new(Guest(Arc::clone(&self.dialer)))
    }

    async fn console(&self) -> Result<String, Error> {
        Ok(self.dialer.console.text())
    }

    fn stderr(&self) -> String {
        self.dialer.words()
    }
}
