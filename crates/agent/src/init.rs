//! PID 1. Every step may fail; none may end it.
//!
//! States: initial RAM disk -> root disk mounted -> agent running, restarted whenever it ends. What a
//! failed step means is written to the console and handed to the agent, which then refuses activation
//! with the reason: a half-made machine is never called ready.

use std::ffi::{CStr, CString};
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use kelvin_api::boot::BootStages;

use crate::activation::{self, Kept};
use crate::{furnish, groups, network};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{WaitOptions, wait};

/// Environment variable through which the agent learns what went wrong.
pub const PROBLEMS: &str = "KELVIN_INIT_PROBLEMS";
/// The one through which the first agent learns how long the boot took until it was started: see [`Stages`].
pub const STAGES: &str = "KELVIN_INIT_STAGES";

/// In the initial RAM disk.
const BUSYBOX: &str = "/busybox";
const ROOT_DEVICE: &str = "/dev/vda";
const ROOT_DEADLINE: Duration = Duration::from_secs(20);

/// Runs the machine. Never returns.
pub fn run() -> ! {
    let mut stages = Stages::begin();
    let mut problems = Vec::new();
    let mut step = |name: &str, result: io::Result<()>| {
        if let Err(error) = result {
            let text = format!("{name}: {error}");
            eprintln!("init: {text}");
            problems.push(text);
        }
    };
    for (source, target, kind) in
        [("proc", "/proc", "proc"), ("sysfs", "/sys", "sysfs"), ("devtmpfs", "/dev", "devtmpfs")]
    {
        step(target, mount_at(source, target, kind, MountFlags::empty()));
    }
    step("modules", load_modules());
    // Open: its name goes with the initial RAM disk, and its memory when it is not needed.
    let busybox = std::fs::File::open(BUSYBOX).ok();
    step("root disk", enter_root());
    stages.root_disk = since_start().saturating_sub(stages.kernel);
    let quiet = MountFlags::NOSUID | MountFlags::NODEV;
    // Programs that make terminals themselves are not root, and cannot give them away.
    step(
        "/dev/pts",
        mount_with("devpts", "/dev/pts", "devpts", MountFlags::NOSUID, c"gid=5,mode=620,ptmxmode=666"),
    );
    step("/dev/shm", mount_with("tmpfs", "/dev/shm", "tmpfs", quiet, c"mode=1777"));
    step("/dev/mqueue", optional(mount_at("mqueue", "/dev/mqueue", "mqueue", quiet | MountFlags::NOEXEC)));
    step("/run", mount_with("tmpfs", "/run", "tmpfs", quiet, c"mode=755,size=20%"));
    step("/sys/fs/cgroup", mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", quiet | MountFlags::NOEXEC));
    step("/run/lock", make_shared_dir("/run/lock"));
    step("control groups", groups::make());
    for (name, value) in SYSCTLS {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        step(name, optional(std::fs::write(path, value)));
    }
    let before = since_start();
    step("loopback", network::loopback_up());
    step("network", network::configure());
    stages.network = since_start().saturating_sub(before);
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]
    {
        let _ = std::os::unix::fs::symlink(target, format!("/dev/{link}"));
    }
    // Whatever it cannot do is no reason to refuse a machine.
    furnish::furnish(Path::new("/"), busybox);
    let kept = Kept::create();
    step(
        "activation",
        kept.as_ref().map(drop).map_err(|error| io::Error::new(error.kind(), error.to_string())),
    );
    let problems = problems.join("; ");
    let mut agent = None;
    let mut stages = Some(stages);
    loop {
        if agent.is_none() {
            let started = Command::new("/proc/self/exe")
                .arg("agent")
                .env_clear()
                .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
                .env(PROBLEMS, &problems)
                .env(STAGES, stages.take().map(|stages| stages.until(since_start())).unwrap_or_default())
                .env(activation::VARIABLE, kept.as_ref().map_or(-1, |fd| *fd).to_string())
                .spawn();
            match started {
                Ok(child) => agent = Some(child.id()),
                Err(error) => {
                    eprintln!("init: starting the agent: {error}");
                    // Nothing can be awaited here: what is missing is memory or the binary itself.
                    std::thread::sleep(Duration::from_millis(500));
                    continue;
                }
            }
        }
        // One loop reaps the agent and every orphan of the machine.
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) => {
                if agent == u32::try_from(pid.as_raw_nonzero().get()).ok() {
                    eprintln!("init: the agent ended ({status:?}), starting it again");
                    agent = None;
                }
            }
            Ok(None) => {}
            Err(_) => agent = None,
        }
    }
}

/// How long the guest has run: its kernel's clock, which nobody sets.
fn since_start() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// When parts of the boot ended, for [`BootStages`].
struct Stages {
    kernel: Duration,
    root_disk: Duration,
    network: Duration,
}

impl Stages {
    fn begin() -> Self {
        Self { kernel: since_start(), root_disk: Duration::ZERO, network: Duration::ZERO }
    }

    /// As the agent is told that is started `now`: microseconds of kernel, root disk and network, and until now.
    fn until(&self, now: Duration) -> String {
        [self.kernel, self.root_disk, self.network, now].map(|stage| stage.as_micros().to_string()).join(" ")
    }
}

/// What init told the agent in [`STAGES`], with the agent's own part until `now`.
fn stages_of(told: &str, now: Duration) -> Option<BootStages> {
    let mut parts = told.split(' ').map(|part| part.parse().map(Duration::from_micros).ok());
    let [kernel, root_disk, network, started] = std::array::from_fn(|_| parts.next().flatten());
    let (kernel, root_disk, network, started) = (kernel?, root_disk?, network?, started?);
    let init = started.saturating_sub(kernel + root_disk + network);
    Some(BootStages { kernel, root_disk, init, network, agent: now.saturating_sub(started) })
}

/// Says on the console how long each stage of the boot took, once: an agent that was started again has no part in it.
pub fn tell_stages() {
    let told = std::env::var(STAGES).unwrap_or_default();
    if let Some(stages) = stages_of(&told, since_start()) {
        eprintln!("{}", stages.line());
    }
}

/// What developers' tools expect of a kernel and its own defaults do not give.
const SYSCTLS: [(&str, &str); 5] = [
    // Each watch of a directory is an instance; the kernel allows 128 of a user, and watches by its memory.
    ("fs.inotify.max_user_instances", "4096"),
    // What editors and bundlers ask for: a kernel of 256 MiB allows 8,192 else. Paid for by who watches.
    ("fs.inotify.max_user_watches", "524288"),
    // Search engines and databases map many files and refuse to start with 65,530.
    ("vm.max_map_count", "262144"),
    // Who may ping: everybody, as on a desktop.
    ("net.ipv4.ping_group_range", "0 2147483647"),
    // Sandboxes inside of the sandbox: browsers, rootless containers.
    ("kernel.unprivileged_userns_clone", "1"),
];

/// A kernel may not have it.
fn optional(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error)
            if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// A directory that everybody may write to, and where nobody may remove what is another's.
fn make_shared_dir(path: &str) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o1777))
}

fn mount_at(source: &str, target: &str, kind: &str, flags: MountFlags) -> io::Result<()> {
    mount_with(source, target, kind, flags, c"")
}

fn mount_with(source: &str, target: &str, kind: &str, flags: MountFlags, options: &CStr) -> io::Result<()> {
    std::fs::create_dir_all(target)?;
    match mount(source, target, kind, flags, options) {
        Ok(()) | Err(rustix::io::Errno::BUSY) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Whether the modules here are those of the kernel that runs, of release `running`: `made_for` is what `/modules/release`
/// says. A template may have a kernel of its owner's, who builds in what the machine needs. Old RAM disks say nothing.
fn fit(made_for: Option<&str>, running: &str) -> bool {
    made_for.is_none_or(|release| release.trim() == running)
}

/// Loads what `/modules/order` names, in that order: the image builder resolved the dependencies. Then the nodes of
/// devices whose drivers the kernel loads when somebody opens them.
fn load_modules() -> io::Result<()> {
    let made_for = std::fs::read_to_string("/modules/release").ok();
    let running = rustix::system::uname();
    let running = running.release().to_string_lossy();
    if !fit(made_for.as_deref(), &running) {
        let release = made_for.unwrap_or_default();
        eprintln!("init: no module is loaded: they are of {release}, and this is {running}");
        return make_devices("");
    }
    let order = std::fs::read_to_string("/modules/order")?;
    let mut first_error = Ok(());
    for name in order.lines() {
        let file = std::fs::File::open(Path::new("/modules").join(name))?;
        let error = match rustix::system::finit_module(&file, &CString::default(), 0) {
            // It is there, or it drives a processor that this is not.
            Ok(()) | Err(rustix::io::Errno::EXIST | rustix::io::Errno::NODEV) => continue,
            Err(error) => error,
        };
        if first_error.is_ok() {
            first_error = Err(io::Error::new(io::Error::from(error).kind(), format!("{name}: {error}")));
        }
    }
    first_error.and(make_devices(&std::fs::read_to_string("/modules/devname").unwrap_or_default()))
}

/// Devices that everybody may open, as udev's rules have them.
const EVERYBODYS: [&str; 2] = ["fuse", "net/tun"];

/// A device node that is there before its driver.
#[derive(Debug, PartialEq, Eq)]
struct StaticDevice<'a> {
    /// Below `/dev`.
    name: &'a str,
    kind: FileType,
    major: u32,
    minor: u32,
}

/// The lines of `modules.devname`: `MODULE NAME c10:200`. Source: kmod, `depmod.c`.
fn static_devices(text: &str) -> Vec<StaticDevice<'_>> {
    text.lines().filter(|line| !line.starts_with('#')).filter_map(static_device).collect()
}

fn static_device(line: &str) -> Option<StaticDevice<'_>> {
    let mut words = line.split_whitespace().skip(1);
    let (name, number) = (words.next()?, words.next()?);
    let kind = match number.as_bytes().first()? {
        b'c' => FileType::CharacterDevice,
        b'b' => FileType::BlockDevice,
        _ => return None,
    };
    let (major, minor) = number.get(1..)?.split_once(':')?;
    Some(StaticDevice { name, kind, major: major.parse().ok()?, minor: minor.parse().ok()? })
}

/// Makes the nodes that the text of `modules.devname` names. A kernel that has such a driver built in has made its node
/// already, for root alone.
fn make_devices(text: &str) -> io::Result<()> {
    let named = |name: &str, error: io::Error| io::Error::new(error.kind(), format!("/dev/{name}: {error}"));
    for device in static_devices(text) {
        make_device(&device).map_err(|error| named(device.name, error))?;
    }
    for name in EVERYBODYS {
        let path = Path::new("/dev").join(name);
        if path.exists() {
            rustix::fs::chmod(&path, Mode::from_raw_mode(0o666))
                .map_err(|error| named(name, error.into()))?;
        }
    }
    Ok(())
}

fn make_device(device: &StaticDevice<'_>) -> io::Result<()> {
    let path = Path::new("/dev").join(device.name);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let mode = if EVERYBODYS.contains(&device.name) { 0o666 } else { 0o660 };
    let number = rustix::fs::makedev(device.major, device.minor);
    match rustix::fs::mknodat(rustix::fs::CWD, &path, device.kind, Mode::from_raw_mode(mode), number) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    // Whatever the mask says.
    Ok(rustix::fs::chmod(&path, Mode::from_raw_mode(mode))?)
}

/// Mounts the root disk and makes it the root directory.
fn enter_root() -> io::Result<()> {
    let deadline = Instant::now() + ROOT_DEADLINE;
    while !Path::new(ROOT_DEVICE).exists() {
        if Instant::now() > deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("{ROOT_DEVICE} did not appear")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    std::fs::create_dir_all("/newroot")?;
    mount(ROOT_DEVICE, "/newroot", "ext4", MountFlags::NOATIME, None)?;
    for directory in ["dev", "proc", "sys"] {
        let target = format!("/newroot/{directory}");
        std::fs::create_dir_all(&target)?;
        mount_move(format!("/{directory}"), &target)?;
    }
    // Free the memory of what the initial RAM disk held; the agent's own file stays open.
    let _ = std::fs::remove_dir_all("/modules");
    let _ = std::fs::remove_file(BUSYBOX);
    rustix::process::chdir("/newroot")?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    // The console, now that the old one's directory is gone.
    let console = rustix::fs::open("/dev/console", OFlags::RDWR | OFlags::NOCTTY, Mode::empty())?;
    rustix::stdio::dup2_stdin(&console)?;
    rustix::stdio::dup2_stdout(&console)?;
    rustix::stdio::dup2_stderr(&console)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What init measures is what the console says; an agent that came later says nothing.
    #[test]
    fn stages_of_the_boot_add_up() {
        let us = Duration::from_micros;
        let told =
            Stages { kernel: us(800_000), root_disk: us(30_000), network: us(2_000) }.until(us(842_000));
        let line = stages_of(&told, us(880_000)).unwrap().line();
        assert_eq!(
            line,
            "init: boot in ms: kernel 800.0, root disk 30.0, init 10.0, network 2.0, agent 38.0"
        );
        for odd in ["", "1 2 3", "1 2 x 4"] {
            assert!(stages_of(odd, us(5)).is_none(), "{odd}");
        }
    }

    #[test]
    fn modules_of_another_kernel_are_not_loaded() {
        assert!(fit(None, "6.1.0-56-cloud-amd64"));
        assert!(fit(Some("6.1.0-56-cloud-amd64\n"), "6.1.0-56-cloud-amd64"));
        assert!(!fit(Some("6.1.0-56-cloud-amd64"), "6.1.192-kelvin"));
    }

    #[test]
    fn devices_that_load_their_driver_are_read() {
        let text = "# Device nodes to trigger on-demand module loading.\nfuse fuse c10:229\ntun net/tun c10:200\n\
                    odd\nodd odd x1:2\nodd odd c1\n";
        let device = |name, minor| StaticDevice { name, kind: FileType::CharacterDevice, major: 10, minor };
        assert_eq!(static_devices(text), [device("fuse", 229), device("net/tun", 200)]);
    }
}
