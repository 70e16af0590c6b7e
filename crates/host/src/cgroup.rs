//! Control groups: what one VMM may take of the host, whatever runs in it.
//!
//! ```text
//! /sys/fs/cgroup/kelvin/<vm>    memory, cpu, pids, io limits; the VMM is born in it
//! ```
//!
//! Version 2 alone: a host whose controllers sit in version 1 gets no limits, and is told so once. Who writes: the
//! node, with the group in the ledger before it exists. A crash leaves a group that the ledger names; the next start
//! removes it after its machine. The group of all machines stays, empty: another server may use it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kelvin_api::id::VmId;

/// Where version 2 is mounted.
const MOUNT: &str = "/sys/fs/cgroup";
/// The group that has all machines below it.
const PARENT: &str = "kelvin";
/// What has to be there.
const CONTROLLERS: [&str; 4] = ["cpu", "memory", "pids", "io"];
/// The period of the processor limit, in microseconds.
const PERIOD_US: u64 = 100_000;
/// How long a group may take to be empty after its processes were killed.
const EMPTY: Duration = Duration::from_secs(10);

/// What one machine may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Memory in bytes: the guest's, the VMM's, and the page cache of what it writes.
    pub memory_bytes: u64,
    /// Processor time in thousandths of a processor.
    pub cpu_millis: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Bytes per second to and from the disk, each; `None` has no limit.
    pub disk_bytes_per_s: Option<u64>,
    /// Operations per second, each way.
    pub disk_ops_per_s: Option<u64>,
}

/// The machines' groups of this host.
#[derive(Debug, Clone)]
pub struct Cgroups {
    parent: PathBuf,
    /// `major:minor` of the disk that the data directory is on.
    device: Option<String>,
}

fn enable(group: &Path) -> io::Result<()> {
    let all = CONTROLLERS.map(|name| format!("+{name}")).join(" ");
    fs::write(group.join("cgroup.subtree_control"), all)
}

/// The disk below a file, as the io controller names it; a partition counts to its disk.
fn disk_of(path: &Path) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    let device = fs::metadata(path).ok()?.dev();
    let name = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let block = fs::canonicalize(format!("/sys/dev/block/{name}")).ok()?;
    if !block.join("partition").exists() {
        return Some(name);
    }
    fs::read_to_string(block.parent()?.join("dev")).ok().map(|text| text.trim().to_owned())
}

/// Whether this host has version 2 with all controllers.
///
/// # Errors
/// In words, what is missing.
pub fn check() -> Result<(), String> {
    let mount = Path::new(MOUNT);
    let there = fs::read_to_string(mount.join("cgroup.controllers"))
        .map_err(|_| format!("{MOUNT} is not cgroup version 2"))?;
    let missing: Vec<_> =
        CONTROLLERS.into_iter().filter(|name| !there.split_whitespace().any(|word| word == *name)).collect();
    if !missing.is_empty() {
        return Err(format!("cgroup version 2 lacks {}", missing.join(", ")));
    }
    Ok(())
}

impl Cgroups {
    /// Makes the group of all machines.
    ///
    /// # Errors
    /// In words, when this host has no version 2 with all controllers, or does not let this process make groups.
    pub fn open(data_dir: &Path) -> Result<Self, String> {
        check()?;
        let mount = Path::new(MOUNT);
        let parent = mount.join(PARENT);
        let made = enable(mount).and_then(|()| match fs::create_dir(&parent) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => enable(&parent),
        });
        made.map_err(|error| format!("{}: {error}", parent.display()))?;
        Ok(Self { parent, device: disk_of(data_dir) })
    }

    /// The group of one machine.
    pub fn path(&self, vm: &VmId) -> PathBuf {
        self.parent.join(vm.as_str())
    }

    /// Makes the group of `vm`. One that is there is a machine's that was not released, and an error.
    ///
    /// # Errors
    /// As the kernel gives them; then there is no group.
    pub fn create(&self, vm: &VmId, limits: &Limits) -> io::Result<PathBuf> {
        let path = self.path(vm);
        fs::create_dir(&path)?;
        if let Err(error) = self.limit(&path, limits) {
            let _ = fs::remove_dir(&path);
            return Err(error);
        }
        Ok(path)
    }

    /// Sets the limits of the group at `path`, whichever it has.
    ///
    /// # Errors
    /// As the kernel gives them, by the limit's name.
    pub fn limit(&self, path: &Path, limits: &Limits) -> io::Result<()> {
        let quota = limits.cpu_millis * PERIOD_US / 1000;
        let mut settings = vec![
            ("memory.max", limits.memory_bytes.to_string()),
            // Guests that are swapped out are not ready in milliseconds.
            ("memory.swap.max", "0".to_owned()),
            // One VMM is one thing: it goes as a whole.
            ("memory.oom.group", "1".to_owned()),
            ("cpu.max", format!("{quota} {PERIOD_US}")),
            ("pids.max", limits.pids.to_string()),
        ];
        let word = |value: Option<u64>| value.map_or("max".to_owned(), |value| value.to_string());
        if limits.disk_bytes_per_s.is_some() || limits.disk_ops_per_s.is_some() {
            let device = self.device.as_deref().ok_or_else(|| io::Error::other("no disk to limit"))?;
            let (bytes, ops) = (word(limits.disk_bytes_per_s), word(limits.disk_ops_per_s));
            settings.push(("io.max", format!("{device} rbps={bytes} wbps={bytes} riops={ops} wiops={ops}")));
        } else {
            // A machine of a server that limited it.
            lift(&path.join("io.max"))?;
        }
        for (name, value) in settings {
            match fs::write(path.join(name), &value) {
                // A kernel without swap has no limit of it.
                Err(error)
                    if name == "memory.swap.max" && error.kind() == io::ErrorKind::PermissionDenied => {}
                Err(error) => return Err(io::Error::new(error.kind(), format!("{name}={value}: {error}"))),
                Ok(()) => {}
            }
        }
        Ok(())
    }
}

/// A group without its limits of the disk; they are back when this is dropped.
#[derive(Debug)]
pub struct Lifted {
    file: PathBuf,
    /// One line for each disk.
    former: String,
}

/// Lifts the limits of the disk of the group at `path`: what a VMM writes for its host, while its guest stands still,
/// is not its guest's. A crash leaves them lifted; who adopts the machine sets them again.
///
/// # Errors
/// As the kernel gives them.
pub fn lift_disk(path: &Path) -> io::Result<Lifted> {
    let file = path.join("io.max");
    let former = lift(&file)?;
    Ok(Lifted { file, former })
}

/// Lifts every limit in an `io.max`; what they were, one line for each disk.
fn lift(file: &Path) -> io::Result<String> {
    let former = fs::read_to_string(file)?;
    for disk in former.lines().filter_map(|line| line.split_whitespace().next()) {
        fs::write(file, format!("{disk} rbps=max wbps=max riops=max wiops=max"))?;
    }
    Ok(former)
}

impl Drop for Lifted {
    fn drop(&mut self) {
        for line in self.former.lines() {
            match fs::write(&self.file, line) {
                // Gone with its machine.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::error!(file = %self.file.display(), %error, "a limit of the disk is not back");
                }
                Ok(()) => {}
            }
        }
    }
}

/// Kills what is left in the group at `path` and removes it; gone already is fine.
///
/// # Errors
/// When it does not become empty, or as the kernel gives them.
pub async fn remove(path: &Path) -> io::Result<()> {
    let deadline = tokio::time::Instant::now() + EMPTY;
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if tokio::time::Instant::now() > deadline => return Err(error),
            Err(_) => {}
        }
        // Its VMM has ended before, so this is for what broke out of it: off every path, and bounded.
        let _ = fs::write(path.join("cgroup.kill"), "1");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_group_that_is_gone_is_removed() {
        remove(Path::new("/sys/fs/cgroup/kelvin-is-not-there/vm")).await.unwrap();
    }
}
