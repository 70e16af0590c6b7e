//! QEMU: the driver that works everywhere. Machine `microvm`; KVM where it truly works, else TCG.
//!
//! Guest RAM is a file. A boot maps it shared, so that the file is the memory; a clone maps a snapshot's
//! file private, so that all clones share its page cache and none writes it. Device state travels alone
//! (`xen-save-devices-state` writes no RAM) and loads as an incoming migration into a VMM that was
//! started with `-incoming defer`.
//!
//! A VMM runs in a jail ([`kelvin_host::jail`]), under QEMU's own seccomp filters, in a control group where the host has
//! them. The machine's directory is its root:
//!
//! ```text
//! <machine>/             belongs to root; the VMM has it read-only
//!   disk                 3 and 4: descriptors of the VMM
//!   control.sock http.sock qmp.sock    5, 6 and 7: it listens on what the daemon made
//!                        8: its tap
//!   memory               bound: a snapshot's, read-only, or that of a machine that boots, its own
//!   guest/               bound: kernel and initial RAM disk
//!   parent               which snapshot's memory a clone maps, for the next daemon
//!   lib/ usr/ etc/ dev/  bound: libraries, firmware, three devices
//! ```
//!
//! Device state is written to a file in memory that the daemon opened for it and copies. So the VMM makes no file and
//! opens none that matters by a name, and the daemon follows no name that a VMM can write. Who writes: this driver. A
//! crash of the daemon leaves a directory that goes as a whole, and mounts that go with their process. VMMs of former
//! versions, without a jail, are adopted: their directory is taken from them.
//!
//! Its console is a 64 KiB ring in the VMM, its standard error a pipe of which the last 16 KiB are kept: a guest cannot
//! fill a disk with either.

mod firmware;
mod machine;
mod program;
pub(crate) mod qmp;

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex as StdMutex};
use std::time::Duration;

use async_trait::async_trait;
use kelvin_api::units::Shape;
use kelvin_host::accel::Accelerator;
use kelvin_host::cgroup::Limits;
use kelvin_host::file::{open_plain, read_plain};
use kelvin_host::jail::{Access, Bind, FIRST_GIVEN, Jail, is_dynamic};
use kelvin_host::process::{Network, Process, ProcessKey};
use serde_json::json;
use tokio::sync::Mutex;

use crate::process::{Sockets, Tail, close_directory, readers};
use crate::{COMMAND_LINE, Disk, Driver, Error, Handle, MachineSpec, Running, Waiting, pages};
use machine::{CONSOLE, CONTROL_SOCKET, DISK, HTTP_SOCKET, MAX_STATE, Machine};
pub use program::build;
use program::{find_modules, find_program, look, unusable};
use qmp::Qmp;

const STDERR: usize = 16 << 10;
const SHIM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ro_ram.so"));
/// Relative to the data directory.
const SHIM_PATH: &str = "run/ro_ram.so";
/// Names in the machine's directory.
const MEMORY_FILE: &str = "memory";
const SHIM_FILE: &str = "ro_ram.so";
const GUEST_DIRECTORY: &str = "guest";
const PARENT: &str = "parent";
const QMP_SOCKET: &str = "qmp.sock";
/// The disk's set of descriptors; [`machine::STATE_SET`] is another.
const DISK_SET: u32 = 1;
/// The longest name of a snapshot's memory, in bytes.
const MAX_PARENT: u64 = 4096;
/// QEMU's translation cache, in MiB; in the layout.
const TRANSLATIONS: u64 = 64;
/// Memory of a VMM beside its guest's, in bytes: its own, and page cache of what it reads and writes.
const OVERHEAD: u64 = 80 << 20;
/// The same of an emulator: the cache, and what it keeps of each block in it and for each vCPU's memory.
const EMULATION: u64 = (TRANSLATIONS + 48) << 20;
/// Threads of a VMM beside one for each vCPU: those that read and write the disk are up to 64.
const THREADS: u64 = 80;
/// Descriptors of a VMM.
const DESCRIPTORS: u64 = 1024;
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
    /// Where firmware lies.
    firmware_directories: Vec<PathBuf>,
    /// QEMU itself, absolute.
    program: PathBuf,
    is_dynamic: bool,
    /// Where its modules lie, when it has some: a library directory, which the jail sees.
    modules: Option<PathBuf>,
    /// A program that has the subcommand `jail`: Kelvin's own.
    launcher: PathBuf,
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

impl Qemu {
    /// Looks at the installed QEMU and prepares `data_dir` for it. `launcher` is a program that has the subcommand `jail`:
    /// Kelvin's own.
    ///
    /// # Errors
    /// `Unusable` when it is missing, older than 7.2, without the firmware, or no ELF program.
    pub fn open(data_dir: &Path, accelerator: Accelerator, launcher: PathBuf) -> Result<Self, Error> {
        let (version, package) = look()?;
        let io = |what| move |source| Error::Io { what, source };
        let tsc_khz =
            kelvin_host::cpu::tsc_khz(&data_dir.join("run/tsc_khz")).map_err(io("measuring the TSC"))?;
        let read_only_memory = version >= (8, 2);
        if !read_only_memory {
            install_shim(&data_dir.join(SHIM_PATH)).map_err(io("installing the memory shim"))?;
        }
        let firmware = firmware::find()?.arguments();
        let program = find_program().ok_or_else(|| unusable("it is not in PATH".to_owned()))?;
        let is_dynamic =
            is_dynamic(&program).map_err(|error| unusable(format!("{}: {error}", program.display())))?;
        Ok(Self {
            build: package,
            accelerator,
            tsc_khz,
            read_only_memory,
            firmware,
            firmware_directories: firmware::directories()?,
            is_dynamic,
            modules: find_modules(&program),
            program,
            launcher,
        })
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
    fn machine(&self, shape: Shape, memory: &str, network: bool) -> Vec<String> {
        let (accelerator, cpu) = match self.accelerator {
            Accelerator::Kvm => ("kvm", "host"),
            Accelerator::Tcg => (&*format!("tcg,thread=multi,tb-size={TRANSLATIONS}"), "max"),
        };
        let mut ram = format!("memory-backend-file,id=ram,size={}M,mem-path={memory}", shape.memory_mib.0);
        ram.push_str(if self.read_only_memory { ",share=off,readonly=on,rom=off" } else { ",share=off" });
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

    /// The machine's arguments in its jail: those of the layout, with what stands there for files and sockets replaced by
    /// descriptors and names of the jail.
    fn arguments(&self, shape: Shape, network: bool, extra: &[&str]) -> Vec<String> {
        let set = format!("/dev/fdset/{DISK_SET}");
        let [disk, disk_read, control, http, qmp, tap] = [0, 1, 2, 3, 4, 5].map(|place| FIRST_GIVEN + place);
        let mut arguments = Vec::new();
        let mut say = |words: &[&str]| arguments.extend(words.iter().map(|word| (*word).to_owned()));
        for fd in [disk, disk_read] {
            say(&["-add-fd", &format!("fd={fd},set={DISK_SET}")]);
        }
        say(&["-chardev", &format!("socket,id=qmp,fd={qmp},server=on,wait=off")]);
        for directory in &self.firmware_directories {
            say(&["-L", &directory.to_string_lossy()]);
        }
        let told = [
            (format!("{VM}/{DISK}"), set),
            // Nothing of it is in a snapshot. A host that comes before the machine is made is no news to its guest, see
            // `Machine::host`.
            (
                format!("path={VM}/{CONTROL_SOCKET},server=on,wait=off"),
                format!("fd={control},server=on,wait=on"),
            ),
            (format!("path={VM}/{HTTP_SOCKET}"), format!("fd={http}")),
            (format!("unix:{VM}/{QMP_SOCKET},server=on,wait=off"), "chardev:qmp".to_owned()),
            ("id=net,fd=0".to_owned(), format!("id=net,fd={tap}")),
            (GUEST.to_owned(), GUEST_DIRECTORY.to_owned()),
        ];
        arguments.extend(self.machine(shape, MEMORY_FILE, network).into_iter().map(|argument| {
            told.iter().fold(argument, |argument, (layout, own)| argument.replace(layout.as_str(), own))
        }));
        // A guest that ends leaves its VMM with what its console said. No part of the machine: nothing of it is saved.
        arguments.extend(["-action", "reboot=shutdown,shutdown=pause"].map(str::to_owned));
        arguments.extend(extra.iter().map(|&word| word.to_owned()));
        arguments
    }

    /// The memory of a machine that boots: a file of nothing but holes, below the data directory. It is mapped private as
    /// a snapshot's is, so guest memory is the VMM's own and never on its way to the disk.
    fn empty_memory(&self, spec: &MachineSpec) -> io::Result<PathBuf> {
        let path = spec.absolute().join(MEMORY_FILE);
        let file = File::options().write(true).create_new(true).mode(0o440).open(&path)?;
        // Whatever the server's umask is: its VMM reads it as one of its group.
        file.set_permissions(fs::Permissions::from_mode(0o440))?;
        file.set_len(spec.shape.memory_mib.bytes())?;
        chown(&path, None, spec.user)?;
        Ok(spec.directory().join(MEMORY_FILE))
    }

    /// What a machine is started as, and what it is given; its sockets are made.
    fn jail(
        &self,
        spec: &MachineSpec,
        sockets: &Sockets,
        memory: &Path,
        extra: &[&str],
    ) -> io::Result<(Jail, Vec<OwnedFd>)> {
        let directory = spec.absolute();
        close_directory(&directory, spec.user)?;
        fs::write(directory.join(PARENT), memory.as_os_str().as_encoded_bytes())?;
        let memory = spec.data_dir.join(memory);
        let disk = directory.join(DISK);
        let mut given = vec![
            OwnedFd::from(open_plain(&disk, File::options().read(true).write(true))?),
            OwnedFd::from(read_plain(&disk)?),
        ];
        for name in [CONTROL_SOCKET, HTTP_SOCKET, QMP_SOCKET] {
            given.push(sockets.listen(name)?);
        }
        if let Some(slot) = &spec.network {
            // Opening it anew would take rights that a VMM has not.
            given.push(slot.take_tap().ok_or_else(|| io::Error::other("the slot's tap is in use"))?);
        }
        let mut binds = vec![
            Bind::read(&memory, MEMORY_FILE),
            Bind::read(spec.data_dir.join(&spec.guest), GUEST_DIRECTORY),
        ];
        let mut env = Vec::new();
        if let Some(modules) = &self.modules {
            // QEMU finds them from where it lies itself, which cannot be told in the jail.
            env.push(("QEMU_MODULE_DIR".to_owned(), modules.to_string_lossy().into_owned()));
        }
        if !self.read_only_memory {
            let (from, to) = (spec.data_dir.join(SHIM_PATH), SHIM_FILE.into());
            binds.push(Bind { from, to, access: Access::Execute });
            env.push(("LD_PRELOAD".to_owned(), format!("./{SHIM_FILE}")));
            env.push(("KELVIN_RO_RAM".to_owned(), MEMORY_FILE.to_owned()));
        }
        if spec.user.is_some() {
            let inside = |path: &PathBuf| path.strip_prefix("/").unwrap_or(path).to_owned();
            binds.extend(self.firmware_directories.iter().map(|path| Bind::read(path, inside(path))));
        }
        let longest = spec.shape.memory_mib.bytes().max(u64::from(spec.shape.disk_mib.0) << 20);
        let jail = Jail {
            root: directory,
            read_only: true,
            program: self.program.clone(),
            args: self.arguments(spec.shape, spec.network.is_some(), extra),
            env,
            user: spec.user,
            groups: readers(&memory)?.into_iter().collect(),
            binds,
            tun: false,
            kvm: self.accelerator == Accelerator::Kvm,
            cgroup: spec.cgroup.clone(),
            max_file_bytes: longest.max(MAX_STATE),
            max_descriptors: DESCRIPTORS,
            libraries: self.is_dynamic,
        };
        Ok((jail, given))
    }

    async fn start(&self, spec: &MachineSpec, memory: &Path, extra: &[&str]) -> Result<Machine, Error> {
        let io = |source| Error::Io { what: "starting the VMM", source };
        let sockets = Sockets::open(&spec.absolute())?;
        let (jail, given) = self.jail(spec, &sockets, memory, extra).map_err(io)?;
        let network = match &spec.network {
            Some(slot) => Network::Of(slot.namespace().try_clone().map_err(io)?),
            // What has no network should not find the daemon's when it breaks out of its guest.
            None if spec.user.is_some() => Network::Empty,
            None => Network::Shared,
        };
        let started = Process::spawn_jailed(&self.launcher, jail, spec.marker(), network, given);
        let (process, stderr) = started.await.map_err(io)?;
        let tail = Tail::follow(stderr, STDERR);
        let opened = async {
            let host = sockets.connect(CONTROL_SOCKET, &process).await.map_err(io)?;
            let stream = sockets.connect_new(QMP_SOCKET, &process, &tail).await?;
            Ok::<_, Error>((Qmp::open(stream).await?, host))
        };
        match opened.await {
            Ok((qmp, host)) => Ok(Machine {
                process: Arc::new(process),
                guest_end: qmp.guest_end(),
                qmp: Mutex::new(qmp),
                console: StdMutex::default(),
                sockets: Arc::new(sockets),
                host: Arc::new(StdMutex::new(Some(host))),
                tail,
                directory: spec.absolute(),
                memory: spec.data_dir.join(memory),
                private: true,
                ahead: StdMutex::default(),
            }),
            Err(error) => {
                let died = tokio::time::timeout(Duration::from_millis(500), process.ended()).await.is_ok();
                let _ = process.kill();
                process.ended().await;
                Err(if died { Error::Ended { what: "starting", stderr: tail.words() } } else { error })
            }
        }
    }
}

/// Which snapshot's memory the machine in `directory` maps, when the daemon that started it noted it: nobody else can.
fn parent_of(directory: &Path) -> io::Result<Option<PathBuf>> {
    let file = match read_plain(&directory.join(PARENT)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    if file.metadata()?.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::other("the machine's parent was noted by somebody else"));
    }
    Ok(Some(io::read_to_string(io::Read::take(file, MAX_PARENT))?.into()))
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
        self.machine(shape, MEMORY, network)
    }

    fn limits(&self, shape: Shape) -> Option<Limits> {
        let emulation = if self.accelerator == Accelerator::Tcg { EMULATION } else { 0 };
        Some(Limits {
            memory_bytes: shape.memory_mib.bytes() + OVERHEAD + emulation,
            cpu_millis: u64::from(shape.vcpus) * 1000 + 500,
            pids: u64::from(shape.vcpus) + THREADS,
            // Only Firecracker keeps a guest to what the disk's limits are half of.
            disk_bytes_per_s: None,
            disk_ops_per_s: None,
        })
    }

    async fn boot(&self, spec: &MachineSpec, disk: Disk) -> Result<Running, Error> {
        // It is opened when the process starts.
        disk.await.map_err(|source| Error::Io { what: "making the machine's disk", source })?;
        let memory = self
            .empty_memory(spec)
            .map_err(|source| Error::Io { what: "making the machine's memory", source })?;
        let machine = self.start(spec, &memory, &[]).await?;
        Ok(Running::new(Box::new(machine)))
    }

    async fn prepare(&self, spec: &MachineSpec, memory: &Path) -> Result<Waiting, Error> {
        let machine = self.start(spec, memory, &["-S", "-incoming", "defer"]).await?;
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
        let directory = spec.absolute();
        // That of a former version could be written by its VMM.
        close_directory(&directory, spec.user).map_err(io)?;
        let sockets = Sockets::open(&directory)?;
        let mut qmp = Qmp::open(sockets.connect(QMP_SOCKET, &process).await.map_err(io)?).await?;
        // It may be of a build that had it end with its guest.
        qmp.call("set-action", json!({ "reboot": "shutdown", "shutdown": "pause" })).await?;
        let own = directory.join(MEMORY_FILE);
        let parent = parent_of(&directory).map_err(io)?.map(|parent| spec.data_dir.join(parent));
        let (memory, private) = match parent {
            Some(parent) => (parent, true),
            // Of a former version, which had what it booted write to its file.
            None if own.symlink_metadata().is_ok() => (own, false),
            // Of one before that, which noted nothing.
            None => (pages::mapped_memory(key.pid, &spec.data_dir).map_err(io)?, true),
        };
        let machine = Machine {
            process: Arc::new(process),
            guest_end: qmp.guest_end(),
            qmp: Mutex::new(qmp),
            console: StdMutex::default(),
            sockets: Arc::new(sockets),
            host: Arc::default(),
            tail: Tail::default(),
            directory,
            memory,
            private,
            ahead: StdMutex::default(),
        };
        machine.go_on().await?;
        Ok(Running::new(Box::new(machine)))
    }
}
