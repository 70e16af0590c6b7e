//! PID 1. Every step may fail; none may end it.
//!
//! States: initial RAM disk -> root disk mounted -> agent running, restarted whenever it ends. What a
//! failed step means is written to the console and handed to the agent, which then refuses activation
//! with the reason: a half-made machine is never called ready.

use std::ffi::CString;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::network;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{WaitOptions, wait};

/// Environment variable through which the agent learns what went wrong.
pub const PROBLEMS: &str = "KELVIN_INIT_PROBLEMS";

const ROOT_DEVICE: &str = "/dev/vda";
const ROOT_DEADLINE: Duration = Duration::from_secs(20);

/// Runs the machine. Never returns.
pub fn run() -> ! {
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
    step("root disk", enter_root());
    let quiet = MountFlags::NOSUID | MountFlags::NODEV;
    step("/dev/pts", mount_at("devpts", "/dev/pts", "devpts", MountFlags::NOSUID));
    step("/dev/shm", mount_at("tmpfs", "/dev/shm", "tmpfs", quiet));
    step("/run", mount_at("tmpfs", "/run", "tmpfs", quiet));
    step("/sys/fs/cgroup", mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", quiet));
    step("/run/lock", std::fs::create_dir_all("/run/lock"));
    // Each watch of a directory is an instance; the kernel allows 128 of a user.
    step("inotify", std::fs::write("/proc/sys/fs/inotify/max_user_instances", "4096"));
    step("loopback", network::loopback_up());
    step("network", network::configure());
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]
    {
        let _ = std::os::unix::fs::symlink(target, format!("/dev/{link}"));
    }
    let problems = problems.join("; ");
    let mut agent = None;
    loop {
        if agent.is_none() {
            let started = Command::new("/proc/self/exe")
                .arg("agent")
                .env_clear()
                .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
                .env(PROBLEMS, &problems)
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

fn mount_at(source: &str, target: &str, kind: &str, flags: MountFlags) -> io::Result<()> {
    std::fs::create_dir_all(target)?;
    match mount(source, target, kind, flags, None) {
        Ok(()) | Err(rustix::io::Errno::BUSY) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Loads what `/modules/order` names, in that order: the image builder resolved the dependencies.
fn load_modules() -> io::Result<()> {
    let order = std::fs::read_to_string("/modules/order")?;
    let mut first_error = Ok(());
    for name in order.lines() {
        let file = std::fs::File::open(Path::new("/modules").join(name))?;
        if let Err(error) = rustix::system::finit_module(&file, &CString::default(), 0)
            && error != rustix::io::Errno::EXIST
            && first_error.is_ok()
        {
            first_error = Err(io::Error::new(io::Error::from(error).kind(), format!("{name}: {error}")));
        }
    }
    first_error
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
