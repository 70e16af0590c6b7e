//! What the end-to-end tests stand on: a file system that can clone files, made before a run and looked through after it.
//!
//! ```text
//! .cache/e2e.xfs          mounted on .cache/e2e while tests run
//! .cache/e2e/guest/       the guest's files
//!            golden/      what all servers of a run adopt: crates/e2e/src/golden.rs
//!            NAME/        a server's data directory; gone with its test
//!            failures     what the run's panics have said
//! ```
//!
//! Who writes: one run at a time; the kernel unlocks `.cache/e2e.lock` when it dies. What a run that was killed has left
//! is removed by the next one.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::server::{Built, kelvin};
use crate::{Result, cache, files as fs, run as run_command, say};

/// Directories that are nobody's left behind.
const KEPT: [&str; 2] = ["guest", "golden"];

/// A file system that can clone files, with the guest on it, for the servers of the tests.
pub struct Ground {
    binary: PathBuf,
    pub directory: PathBuf,
}

impl Ground {
    /// Makes it as a run begins with it: only the guest is there.
    pub fn make(built: &Built) -> Result<Self> {
        let directory = cache().join("e2e");
        let ground = Self { binary: built.binary.clone(), directory };
        run_command(
            kelvin(&ground.binary)
                .args(["setup", "--size-gib", "48", "--data-dir"])
                .arg(&ground.directory)
                .stdout(Stdio::null()),
        )?;
        kill_leftovers(&ground.directory)?;
        // The last mount first: a disk of a test is on another.
        for mounted in mounts_below(&ground.directory)?.into_iter().rev() {
            run_command(Command::new("umount").arg(mounted))?;
        }
        for path in fs::list(&ground.directory)? {
            if path.is_dir() {
                fs::remove_dir_all(&path)?;
            }
        }
        // Once onto the same file system: every server's import is a reflink then.
        let guest = ground.directory.join("guest");
        fs::create_dir_all(&guest)?;
        crate::guest::ensure_interpreter()?;
        for (name, from) in crate::guest::files() {
            // What is there already and no older: the emulated KVM host begins with them.
            run_command(
                Command::new("cp")
                    .args(["--update", "--preserve=timestamps", "--sparse=always", "--reflink=auto"])
                    .arg(from)
                    .arg(guest.join(name)),
            )?;
        }
        Ok(ground)
    }

    /// Unmounts it.
    ///
    /// # Errors
    /// With what the tests have left behind.
    pub fn clear(&self) -> Result<()> {
        let left = leftovers(&self.directory);
        run_command(
            kelvin(&self.binary)
                .args(["setup", "--unmount", "--data-dir"])
                .arg(&self.directory)
                .stdout(Stdio::null()),
        )?;
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("the tests have left behind: {}", left.join(", ")).into())
        }
    }
}

/// Ends what a run that was killed has left running: servers, and machines of theirs.
pub fn kill_leftovers(directory: &Path) -> Result<()> {
    for left in leftovers(directory) {
        if let Some(pid) = left.strip_prefix("process ") {
            crate::packages::signal("KILL", pid)?;
        }
    }
    Ok(())
}

/// What is mounted below `directory`, in the order of the mounts.
fn mounts_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    Ok(places.filter(|place| place.starts_with(directory) && place != directory).collect())
}

/// Processes that work in `directory`, and directories of servers.
fn leftovers(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let place = |path: &Path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    let entries = |path: &Path| fs::list(path).unwrap_or_default().into_iter();
    let jails: Vec<_> = entries(directory)
        // A server's data directory, or the golden snapshot's.
        .flat_map(|server| [server.join("sandboxes"), server.join("data/sandboxes")])
        .flat_map(|machines| entries(&machines).collect::<Vec<_>>())
        .filter_map(|machine| place(&machine))
        .collect();
    for entry in entries(Path::new("/proc")) {
        let name = fs::name(&entry).unwrap_or_default();
        let is_process = name.bytes().all(|byte| byte.is_ascii_digit());
        // A jailed VMM works in another root: a machine's directory.
        let is_jailed = || place(&entry.join("root")).is_some_and(|root| jails.contains(&root));
        let works = || fs::read_link(entry.join("cwd")).is_ok_and(|cwd| cwd.starts_with(directory));
        if is_process && (works() || is_jailed()) {
            found.push(format!("process {name}"));
        }
    }
    for path in entries(directory) {
        if path.is_dir() && !KEPT.iter().any(|kept| path.ends_with(kept)) {
            found.push(path.display().to_string());
        }
    }
    found
}

/// One run at a time: it counts what its servers leave behind, and measures. The kernel unlocks it when a run dies.
pub fn alone() -> Result<fs::File> {
    fs::create_dir_all(cache())?;
    let lock = fs::create(cache().join("e2e.lock"))?;
    if let Err(error) = lock.try_lock() {
        let fs::TryLockError::WouldBlock = error else { return Err(error.into()) };
        say("waiting: another run of the tests is on its way in this tree");
        lock.lock()?;
    }
    Ok(lock)
}
