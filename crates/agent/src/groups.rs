//! Control groups of the guest: what keeps a reserve of memory, processes and processor time for the agent.
//!
//! ```text
//! /                      init and the agent: no limits, so that `list` and `kill` always answer
//! └─ sandbox             everything that was started for somebody: memory and pids less the agent's reserve
//!    ├─ root             commands of root
//!    └─ user             commands of everybody else, less what a command of root needs
//!       └─ service-NAME  each service of the image, to be looked at and ended as one
//! ```
//!
//! Init makes them at boot; the agent opens them. Root in the guest can change or leave all of this: then it has taken
//! the reserve from itself. Without control groups (a kernel that has none) there are no reserves, and no failure.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";
const SANDBOX: &str = "sandbox";
/// What is limited or shared out. A kernel may lack some.
const CONTROLLERS: [&str; 5] = ["memory", "pids", "cpu", "io", "cpuset"];
/// The reserve of the agent, and the same again for commands of root: one part of this many of the memory, between
/// these bounds, in bytes.
const MEMORY_PART: u64 = 32;
const MEMORY_LEAST: u64 = 8 << 20;
const MEMORY_MOST: u64 = 24 << 20;
/// Processes and threads that are left for the kernel and the agent, and for commands of root.
const PIDS_AGENT: u64 = 256;
const PIDS_ROOT: u64 = 256;

/// A control group that processes are started in; or none.
#[derive(Debug)]
pub struct Place {
    directory: Option<File>,
}

impl Place {
    /// No group of its own: that of the agent.
    #[cfg(test)]
    pub fn none() -> Self {
        Self { directory: None }
    }

    fn open(path: PathBuf) -> Self {
        Self { directory: File::open(path).ok() }
    }

    /// Commands of root.
    pub fn root() -> Self {
        Self::open(Path::new(ROOT).join(SANDBOX).join("root"))
    }

    /// Commands of everybody else.
    pub fn user() -> Self {
        Self::open(Path::new(ROOT).join(SANDBOX).join("user"))
    }

    /// The group of the service called `name`, made when it is not there.
    pub fn service(name: &str) -> Self {
        let path = Path::new(ROOT).join(SANDBOX).join("user").join(format!("service-{name}"));
        let _ = fs::create_dir(&path);
        Self::open(path)
    }

    /// Its directory, for `clone3`.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.directory.as_ref().map(AsFd::as_fd)
    }
}

/// How much memory and how many processes the two inner limits leave.
#[derive(Debug, PartialEq, Eq)]
struct Limits {
    sandbox_memory: u64,
    user_memory: u64,
    sandbox_pids: u64,
    user_pids: u64,
}

/// `total` and `available`: memory in bytes; `pids`: how many the kernel allows.
fn limits(total: u64, available: u64, pids: u64) -> Limits {
    let reserve = (total / MEMORY_PART).clamp(MEMORY_LEAST, MEMORY_MOST);
    // A machine that is too small for reserves is still a machine: half of it is never taken.
    let memory = |reserved: u64| available.saturating_sub(reserved).max(available / 2);
    let count = |reserved: u64| pids.saturating_sub(reserved).max(pids / 2);
    Limits {
        sandbox_memory: memory(reserve),
        user_memory: memory(2 * reserve),
        sandbox_pids: count(PIDS_AGENT),
        user_pids: count(PIDS_AGENT + PIDS_ROOT),
    }
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Makes the groups, by init and before anything else runs.
///
/// # Errors
/// When there are control groups and they cannot be set up.
pub fn make() -> io::Result<()> {
    let root = Path::new(ROOT);
    let Ok(there) = fs::read_to_string(root.join("cgroup.controllers")) else {
        return Ok(());
    };
    let enable = |group: &Path| {
        for controller in
            CONTROLLERS.iter().filter(|name| there.split_whitespace().any(|known| known == **name))
        {
            // One at a time: one that cannot be shared out (real-time tasks) must not take the others along.
            let _ = fs::write(group.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    };
    enable(root);
    let sandbox = root.join(SANDBOX);
    fs::create_dir_all(&sandbox)?;
    enable(&sandbox);
    let (inner_root, user) = (sandbox.join("root"), sandbox.join("user"));
    fs::create_dir_all(&inner_root)?;
    fs::create_dir_all(&user)?;
    let info = fs::read_to_string("/proc/meminfo")?;
    let kib = |name: &str| {
        let rest = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        rest.split_whitespace().next()?.parse::<u64>().ok()
    };
    let (total, available) = (kib("MemTotal").unwrap_or(0) << 10, kib("MemAvailable").unwrap_or(0) << 10);
    let pids =
        number("/proc/sys/kernel/threads-max").into_iter().chain(number("/proc/sys/kernel/pid_max")).min();
    let limits = limits(total, available, pids.unwrap_or(0));
    let set = |group: &Path, file: &str, value: u64| match value {
        0 => Ok(()),
        // A kernel without that controller has no such file.
        value => match fs::write(group.join(file), value.to_string()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        },
    };
    set(&sandbox, "memory.max", limits.sandbox_memory)?;
    set(&user, "memory.max", limits.user_memory)?;
    set(&sandbox, "pids.max", limits.sandbox_pids)?;
    set(&user, "pids.max", limits.user_pids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserves_grow_with_the_machine_within_bounds() {
        let mib = |count: u64| count << 20;
        let small = limits(mib(256), mib(180), 1800);
        assert_eq!((small.sandbox_memory, small.user_memory), (mib(172), mib(164)));
        assert_eq!((small.sandbox_pids, small.user_pids), (1544, 1288));
        let large = limits(mib(8192), mib(8000), 32768);
        assert_eq!((large.sandbox_memory, large.user_memory), (mib(7976), mib(7952)));
        // Too small for reserves: half is left to the sandbox.
        let tiny = limits(mib(32), mib(12), 300);
        assert_eq!((tiny.sandbox_memory, tiny.user_memory), (mib(6), mib(6)));
        assert_eq!((tiny.sandbox_pids, tiny.user_pids), (150, 150));
    }
}
