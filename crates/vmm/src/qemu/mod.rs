//! QEMU: the driver that works everywhere. Machine `microvm`; KVM where it truly works, else TCG.
//!
//! Guest RAM is a file. A boot maps it shared, so that the file is the memory; a clone maps a snapshot's
//! file private, so that all clones share its page cache and none writes it. Device state travels alone
//! (`xen-save-devices-state` writes no RAM) and loads as an incoming migration into a VMM that was
//! started with `-incoming defer`. Source: `../shared/vmm-notes.md` and `prototypes/qemu_clone.py`.
//!
//! A VMM runs as a user of its own without capabilities, in its own session, under QEMU's seccomp
//! filters, in the data directory with relative paths (so that no parent of it has to be open to that
//! user). Its console is a 64 KiB ring in the VMM, its standard error a pipe of which the last 16 KiB are
//! kept: a guest cannot fill a disk with either.

mod firmware;
pub(crate) mod qmp;

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use kelvin_api::units::Shape;
use kelvin_host::accel::Accelerator;
use kelvin_host::process::{Network, Process, ProcessKey, Spawn};
use serde_json::json;
use tokio::net::UnixStream;
use tokio::sync::{Mutex, watch};

use crate::control::{Control, Dial, Dialed};
use crate::process::{Sockets, Tail};
use crate::{
    COMMAND_LINE, Disk, Driver, Error, GuestEnd, Handle, MachineSpec, Running, Saved, Waiting, pages,
};
use qmp::Qmp;

const PROGRAM: &str = "qemu-system-x86_64";
const STDERR: usize = 16 << 10;
const CONSOLE: u32 = 64 << 10;
const SHIM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ro_ram.so"));
/// Relative to the data directory.
const SHIM_PATH: &str = "run/ro_ram.so";
/// Stand-ins for paths in a layout.
const VM: &str = "{vm}";
const MEMORY: &str = "{memory}";
const GUEST: &str = "{guest}";

/// The driver.
pub struct Qemu {
    build: String,
    accelerator: Accelerator,
    /// Rate of the host's time stamp counter, which an emulated guest cannot find out.
    tsc_khz: u32,
    /// Whether memory can be opened read-only by an option (8.2 and newer) or needs the shim.
    read_only_memory: bool,
    /// What has to be said of the firmware, see [`firmware::arguments`].
    firmware: &'static [&'static str],
}

/// The build of the installed QEMU, as in identities.
///
/// # Errors
/// `Unusable` when it is missing or older than 7.2.
pub fn build() -> Result<String, Error> {
    look().map(|(_, build)| build)
}

/// The firmware that machines of the installed QEMU boot with, for people: its file, and whether QEMU takes it by itself.
///
/// # Errors
/// `Unusable` when it is missing.
pub fn firmware() -> Result<String, Error> {
    let found = firmware::find()?;
    let how = if found.is_default { "this QEMU's own choice" } else { "named to this QEMU" };
    Ok(format!("{}, {how}", found.path.display()))
}

/// The group that may open `/dev/kvm`, which on Debian and Ubuntu is closed to everybody else: a VMM is a user that is in no
/// group. Never root's.
fn kvm_group() -> Option<u32> {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::metadata("/dev/kvm").ok()?;
    (found.gid() != 0 && found.mode() & 0o060 == 0o060).then(|| found.gid())
}

fn unusable(reason: String) -> Error {
    Error::Unusable { program: PROGRAM.to_owned(), reason }
}

fn look() -> Result<((u32, u32), String), Error> {
    let output = std::process::Command::new(PROGRAM)
        .arg("--version")
        .output()
        .map_err(|error| unusable(format!("{error}; install the package qemu-system-x86")))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let (version, package) = version(&text).ok_or_else(|| unusable(format!("no version in {text:?}")))?;
    if version < (7, 2) {
        return Err(unusable(format!("version {}.{} is older than 7.2", version.0, version.1)));
    }
    Ok((version, package))
}

impl Qemu {
    /// Looks at the installed QEMU and prepares `data_dir` for it.
    ///
    /// # Errors
    /// `Unusable` when it is missing, older than 7.2, or without the firmware.
    pub fn open(data_dir: &Path, accelerator: Accelerator) -> Result<Self, Error> {
        let (version, package) = look()?;
        let io = |what| move |source| Error::Io { what, source };
        let tsc_khz =
            kelvin_host::cpu::tsc_khz(&data_dir.join("run/tsc_khz")).map_err(io("measuring the TSC"))?;
        let read_only_memory = version >= (8, 2);
        if !read_only_memory {
            install_shim(&data_dir.join(SHIM_PATH)).map_err(io("installing the memory shim"))?;
        }
        let firmware = firmware::find()?.arguments();
        Ok(Self { build: package, accelerator, tsc_khz, read_only_memory, firmware })
    }

    fn append(&self) -> String {
        let mut line = format!("{COMMAND_LINE} reboot=t");
        if self.accelerator == Accelerator::Tcg {
            // Without these two about half of all boots hang in delay calibration. HZ is 250.
            let lpj = u64::from(self.tsc_khz) * 1000 / 250;
            line.push_str(&format!(" lpj={lpj} tsc_early_khz={} tsc=reliable", self.tsc_khz));
        }
        line
    }

    /// What makes the machine: the same at bake and at every clone, in the same order.
    fn machine(&self, shape: Shape, memory: &str, private: bool, network: bool) -> Vec<String> {
        let (accelerator, cpu) = match self.accelerator {
            Accelerator::Kvm => ("kvm", "host"),
            Accelerator::Tcg => ("tcg,thread=multi,tb-size=64", "max"),
        };
        let mut ram = format!("memory-backend-file,id=ram,size={}M,mem-path={memory}", shape.memory_mib.0);
        ram.push_str(match (private, self.read_only_memory) {
            (false, _) => ",share=on",
            (true, true) => ",share=off,readonly=on,rom=off",
            (true, false) => ",share=off",
        });
        let mut machine = [
            "-nodefaults",
            "-no-user-config",
            "-nographic",
            "-no-reboot",
            "-M",
            "microvm,memory-backend=ram,x-option-roms=off",
            "-accel",
            accelerator,
            "-cpu",
            cpu,
            "-smp",
            &shape.vcpus.to_string(),
            "-m",
            &shape.memory_mib.0.to_string(),
            "-object",
            &ram,
            "-kernel",
            &format!("{GUEST}/vmlinuz"),
            "-initrd",
            &format!("{GUEST}/initrd"),
            "-append",
            &self.append(),
            "-chardev",
            &format!("ringbuf,id=console,size={CONSOLE}"),
            "-serial",
            "chardev:console",
            "-drive",
            &format!("if=none,id=root,format=raw,file={VM}/disk,file.locking=off,discard=unmap"),
            "-device",
            "virtio-blk-device,drive=root",
            "-device",
            "virtio-serial-device,max_ports=4",
            "-chardev",
            &format!("socket,id=control,path={VM}/control.sock,server=on,wait=off"),
            "-device",
            &format!("virtserialport,nr=1,chardev=control,name={}", kelvin_api::guest::CONTROL_PORT),
            "-chardev",
            &format!("socket,id=http,path={VM}/http.sock,server=on,wait=off"),
            "-device",
            &format!("virtserialport,nr=2,chardev=http,name={}", kelvin_api::guest::HTTP_PORT),
            "-qmp",
            &format!("unix:{VM}/qmp.sock,server=on,wait=off"),
            // The stream of device state has no configuration section.
            "-global",
            "migration.send-configuration=off",
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ]
        .map(str::to_owned)
        .to_vec();
        machine.extend(self.firmware.iter().map(|&word| word.to_owned()));
        if network {
            let mac = kelvin_host::net::GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
            machine.extend([
                "-netdev".to_owned(),
                // The tap is the VMM's standard input: opening it anew would take rights that a VMM has not.
                "tap,id=net,fd=0,vhost=off".to_owned(),
                "-device".to_owned(),
                // Nobody has to be told that a clone is there: neighbours are fixed. The announcement would
                // be one more thing for a guest to wake up for.
                format!("virtio-net-device,netdev=net,mac={mac},guest_announce=off"),
            ]);
        }
        machine
    }

    async fn start(
        &self,
        spec: &MachineSpec,
        memory: &str,
        private: bool,
        extra: &[&str],
    ) -> Result<Machine, Error> {
        let directory = spec.directory();
        let fill = |argument: String| {
            argument.replace(VM, &directory.to_string_lossy()).replace(GUEST, &spec.guest.to_string_lossy())
        };
        let mut args: Vec<OsString> = ["-name".to_owned(), spec.marker()].map(OsString::from).to_vec();
        args.extend(
            self.machine(spec.shape, memory, private, spec.network.is_some())
                .into_iter()
                .map(|argument| fill(argument).into()),
        );
        // A guest that ends leaves its VMM with what its console said. No part of the machine: nothing of it is saved.
        args.extend(["-action", "reboot=shutdown,shutdown=pause"].map(OsString::from));
        args.extend(extra.iter().map(OsString::from));
        let env = if private && !self.read_only_memory {
            vec![("LD_PRELOAD".into(), SHIM_PATH.into()), ("KELVIN_RO_RAM".into(), memory.into())]
        } else {
            Vec::new()
        };
        let io = |source| Error::Io { what: "starting the VMM", source };
        let (network, stdin) = match &spec.network {
            Some(slot) => {
                let tap = slot.take_tap().ok_or_else(|| io(io::Error::other("the slot's tap is in use")))?;
                (Network::Of(slot.namespace().try_clone().map_err(io)?), Some(tap))
            }
            // What has no network should not find the daemon's when it breaks out of its guest.
            None if rustix::process::geteuid().is_root() => (Network::Empty, None),
            None => (Network::Shared, None),
        };
        let (program, cwd) = (PROGRAM.into(), spec.data_dir.clone());
        let group = if self.accelerator == Accelerator::Kvm { kvm_group() } else { None };
        let spawn = Spawn { program, args, env, cwd, user: spec.user, group, network, stdin };
        let (process, stderr) = Process::spawn(spawn).await.map_err(io)?;
        let tail = Tail::follow(stderr, STDERR);
        let opened = async {
            let sockets = Sockets::open(&spec.absolute())?;
            let stream = sockets.connect_new("qmp.sock", &process, &tail).await?;
            Ok((sockets, Qmp::open(stream).await?))
        };
        match opened.await {
            Ok((sockets, qmp)) => Ok(Machine {
                process: Arc::new(process),
                guest_end: qmp.guest_end(),
                qmp: Mutex::new(qmp),
                console: StdMutex::default(),
                sockets: Arc::new(sockets),
                tail,
                directory,
                data_dir: spec.data_dir.clone(),
                memory: spec.data_dir.join(memory),
                private,
                ahead: StdMutex::default(),
            }),
            Err(error) => {
                let died = tokio::time::timeout(Duration::from_millis(500), process.ended()).await.is_ok();
                let _ = process.kill();
                process.ended().await;
                Err(if died { Error::Ended { what: "starting", stderr: tail.text() } } else { error })
            }
        }
    }
}

/// `(major, minor)` and the whole version with the package's. Example of the text:
/// `QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)`.
fn version(text: &str) -> Option<((u32, u32), String)> {
    let line = text.lines().next()?;
    let (_, rest) = line.split_once("version ")?;
    let mut numbers = rest.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    Some(((numbers.next()?.ok()?, numbers.next()?.ok()?), rest.trim().to_owned()))
}

/// Whether the file system of `path` has no space to speak of.
fn is_full(path: &Path) -> bool {
    rustix::fs::statvfs(path).is_ok_and(|found| found.f_bavail * found.f_frsize < 1 << 20)
}

fn install_shim(path: &Path) -> io::Result<()> {
    if std::fs::read(path).is_ok_and(|installed| installed == SHIM) {
        return Ok(());
    }
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, SHIM)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o444))?;
    std::fs::rename(fresh, path)
}

#[async_trait]
impl Driver for Qemu {
    fn kind(&self) -> &'static str {
        "qemu"
    }

    fn build(&self) -> &str {
        &self.build
    }

    fn accelerator(&self) -> Accelerator {
        self.accelerator
    }

    fn layout(&self, shape: Shape, network: bool) -> Vec<String> {
        self.machine(shape, MEMORY, true, network)
    }

    async fn boot(&self, spec: &MachineSpec, disk: Disk) -> Result<Running, Error> {
        // It is opened when the process starts.
        disk.await.map_err(|source| Error::Io { what: "making the machine's disk", source })?;
        let memory = spec.directory().join("memory");
        let machine = self.start(spec, &memory.to_string_lossy(), false, &[]).await?;
        Ok(Running::new(Box::new(machine)))
    }

    async fn prepare(&self, spec: &MachineSpec, memory: &Path) -> Result<Waiting, Error> {
        let machine =
            self.start(spec, &memory.to_string_lossy(), true, &["-S", "-incoming", "defer"]).await?;
        let capability = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        let told = async {
            let mut qmp = machine.qmp.lock().await;
            qmp.call("migrate-set-capabilities", capability).await?;
            qmp.call("migrate-set-parameters", json!({ "announce-rounds": 0 })).await
        };
        let told = told.await;
        if let Err(error) = told {
            let _ = machine.process.kill();
            machine.process.ended().await;
            return Err(error);
        }
        Ok(Waiting::new(Box::new(machine)))
    }

    async fn adopt(&self, spec: &MachineSpec, key: ProcessKey) -> Result<Running, Error> {
        let io = |source| Error::Io { what: "adopting the VMM", source };
        let process = Process::adopt(key).map_err(io)?;
        let sockets = Sockets::open(&spec.absolute())?;
        let mut qmp = Qmp::open(sockets.connect("qmp.sock", &process).await.map_err(io)?).await?;
        // It may be of a build that had it end with its guest.
        qmp.call("set-action", json!({ "reboot": "shutdown", "shutdown": "pause" })).await?;
        let own = spec.absolute().join("memory");
        let private = !own.exists();
        let machine = Machine {
            process: Arc::new(process),
            guest_end: qmp.guest_end(),
            qmp: Mutex::new(qmp),
            console: StdMutex::default(),
            sockets: Arc::new(sockets),
            tail: Tail::default(),
            directory: spec.directory(),
            data_dir: spec.data_dir.clone(),
            memory: if private { pages::mapped_memory(key.pid, &spec.data_dir).map_err(io)? } else { own },
            private,
            ahead: StdMutex::default(),
        };
        machine.go_on().await?;
        Ok(Running::new(Box::new(machine)))
    }
}

/// One VMM.
struct Machine {
    process: Arc<Process>,
    qmp: Mutex<Qmp>,
    /// Set when the guest has ended its machine.
    guest_end: watch::Receiver<Option<GuestEnd>>,
    /// The end of the console: QEMU forgets what was read of it.
    console: StdMutex<String>,
    sockets: Arc<Sockets>,
    tail: Tail,
    /// Relative to the data directory.
    directory: PathBuf,
    data_dir: PathBuf,
    /// The file behind guest RAM.
    memory: PathBuf,
    /// Whether that file is a snapshot's, mapped private.
    private: bool,
    /// What the save that has begun has copied already.
    ahead: StdMutex<Option<pages::Ahead>>,
}

impl Machine {
    /// A broken connection means that the VMM has ended or is about to: then say so, with its last words.
    async fn explain<T>(&self, what: &'static str, result: Result<T, Error>) -> Result<T, Error> {
        match result {
            Err(Error::Io { what: _, source: _ }) if self.ends_soon().await => {
                Err(Error::Ended { what, stderr: self.tail.text() })
            }
            other => other,
        }
    }

    /// What has ended cannot go on from a snapshot.
    fn check_guest(&self, what: &'static str) -> Result<(), Error> {
        match *self.guest_end.borrow() {
            None => Ok(()),
            Some(_) => Err(Error::Ended { what, stderr: "its guest has ended".to_owned() }),
        }
    }

    async fn ends_soon(&self) -> bool {
        tokio::time::timeout(Duration::from_secs(2), self.process.ended()).await.is_ok()
    }

    async fn try_load(&self, state: &Path) -> Result<(), Error> {
        let file =
            File::open(state).map_err(|source| Error::Io { what: "opening the device state", source })?;
        let mut qmp = self.qmp.lock().await;
        qmp.call_with("getfd", json!({ "fdname": "state" }), file.as_fd()).await?;
        qmp.call("migrate-incoming", json!({ "uri": "fd:state" })).await?;
        let loaded = qmp
            .event("MIGRATION", |data| match data["status"].as_str() {
                Some("completed") => Some(true),
                Some("failed") => Some(false),
                _ => None,
            })
            .await?;
        if loaded {
            return Ok(());
        }
        let reason = self.tail.text();
        Err(Error::Refused { command: "migrate-incoming", reason })
    }

    async fn try_save(&self, memory: &Path, state: &Path) -> Result<Saved, Error> {
        let io = |what| move |source| Error::Io { what, source };
        // The VMM can write nothing but its own directory.
        let own = self.directory.join("state.new");
        let absolute = self.data_dir.join(&own);
        let _ = std::fs::remove_file(&absolute);
        let (pid, from, to) = (self.process.key().pid, self.memory.clone(), memory.to_owned());
        let private = self.private;
        // Side by side: writing device state touches no page of the guest.
        let ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default();
        let copying =
            tokio::task::spawn_blocking(move || pages::save_memory(pid, &from, &to, private, ahead));
        let saved = self
            .qmp
            .lock()
            .await
            .call("xen-save-devices-state", json!({ "filename": own.to_string_lossy(), "live": false }))
            .await;
        let dirty_pages = copying
            .await
            .map_err(|error| io("copying memory")(io::Error::other(error)))?
            .map_err(io("copying memory"))?;
        match saved {
            // It says no more than that writing failed.
            Err(Error::Refused { .. }) if is_full(&self.data_dir) => {
                return Err(io("writing the device state")(io::ErrorKind::StorageFull.into()));
            }
            other => other?,
        };
        std::fs::rename(&absolute, state).map_err(io("moving the device state"))?;
        Ok(Saved { dirty_pages })
    }

    /// A VMM that opened another disk than its machine's must not run: paths are baked into device state.
    fn check_disk(&self) -> io::Result<()> {
        use std::os::unix::fs::MetadataExt;
        let own = std::fs::metadata(self.data_dir.join(&self.directory).join("disk"))?;
        let open = std::fs::read_dir(format!("/proc/{}/fd", self.process.key().pid))?;
        let mut files = open.flatten().filter_map(|entry| std::fs::metadata(entry.path()).ok());
        match files.any(|file| (file.dev(), file.ino()) == (own.dev(), own.ino())) {
            true => Ok(()),
            false => Err(io::Error::other("the VMM has opened another disk than its machine's")),
        }
    }
}

/// Connects to the guest's ports.
#[derive(Debug)]
struct Dialer {
    sockets: Arc<Sockets>,
    process: Arc<Process>,
}

impl Dialer {
    async fn port(&self, name: &str) -> Result<UnixStream, Error> {
        let connected = self.sockets.connect(name, &self.process).await;
        connected.map_err(|source| Error::Io { what: "connecting to the guest", source })
    }
}

#[async_trait]
impl Dial for Dialer {
    async fn dial(&self) -> Result<Dialed, Error> {
        Ok(Dialed { stream: self.port("control.sock").await?, greets: false })
    }

    async fn connect(&self) -> Result<UnixStream, Error> {
        self.port("http.sock").await
    }
}

#[async_trait]
impl Handle for Machine {
    fn process(&self) -> &Process {
        &self.process
    }

    async fn load(&self, state: &Path) -> Result<(), Error> {
        self.check_disk().map_err(|source| Error::Io { what: "checking the VMM's disk", source })?;
        self.explain("loading", self.try_load(state).await).await
    }

    async fn resume(&self) -> Result<(), Error> {
        let result = self.qmp.lock().await.call("cont", json!({})).await;
        self.explain("resuming", result.map(drop)).await
    }

    async fn pause(&self) -> Result<(), Error> {
        let result = self.qmp.lock().await.call("stop", json!({})).await;
        self.explain("pausing", result.map(drop)).await?;
        self.check_guest("pausing")
    }

    async fn go_on(&self) -> Result<(), Error> {
        let mut qmp = self.qmp.lock().await;
        let status = qmp.call("query-status", json!({})).await?;
        match status["status"].as_str() {
            // One whose guest has ended it while nobody looked: a former daemon had it stay.
            Some("shutdown") => {
                Err(Error::Ended { what: "going on", stderr: "its guest has ended".to_owned() })
            }
            Some("paused" | "io-error" | "postmigrate") => qmp.call("cont", json!({})).await.map(drop),
            _ => Ok(()),
        }
    }

    async fn begin_save(&self, memory: &Path) -> Result<(), Error> {
        let (from, to, private) = (self.memory.clone(), memory.to_owned(), self.private);
        let pid = self.process.key().pid;
        let ahead = tokio::task::spawn_blocking(move || pages::begin_memory(pid, &from, &to, private))
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(|source| Error::Io { what: "beginning to copy memory", source })?;
        *self.ahead.lock().unwrap_or_else(PoisonError::into_inner) = Some(ahead);
        Ok(())
    }

    async fn save(&self, memory: &Path, state: &Path) -> Result<Saved, Error> {
        let saved = self.explain("saving", self.try_save(memory, state).await).await?;
        self.check_guest("saving")?;
        Ok(saved)
    }

    async fn control(&self) -> Result<Control, Error> {
        // Held open: a guest without its host end has to poll.
        Control::open(self.dialer()).await
    }

    fn dialer(&self) -> Arc<dyn Dial> {
        Arc::new(Dialer { sockets: Arc::clone(&self.sockets), process: Arc::clone(&self.process) })
    }

    async fn console(&self) -> Result<String, Error> {
        let arguments = json!({ "device": "console", "size": CONSOLE, "format": "utf8" });
        let fresh = self.qmp.lock().await.call("ringbuf-read", arguments).await?;
        let mut console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        console.push_str(fresh.as_str().unwrap_or_default());
        let excess = console.len().saturating_sub(CONSOLE as usize);
        let cut = (excess..=console.len()).find(|at| console.is_char_boundary(*at)).unwrap_or(excess);
        console.drain(..cut);
        Ok(console.clone())
    }

    async fn guest_ended(&self) -> GuestEnd {
        let mut told = self.guest_end.clone();
        loop {
            let now = *told.borrow_and_update();
            if let Some(end) = now {
                return end;
            }
            if told.changed().await.is_err() {
                // The connection has ended: whoever waits sees that of the process.
                std::future::pending::<()>().await;
            }
        }
    }

    fn stderr(&self) -> String {
        self.tail.text()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_qemu_prints() {
        let (version, build) =
            version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright\n").unwrap();
        assert_eq!(version, (7, 2));
        assert_eq!(build, "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)");
        assert!(super::version("not qemu").is_none());
    }
}
