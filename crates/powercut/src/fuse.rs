//! What every file system of this crate does with FUSE.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::mount::UnmountFlags;

/// Takes a mount away by force: threads that are still in a call (a database that closes) get an error. Without it they would
/// wait for a server in their own process, which then could not end.
pub(crate) fn unmount(directory: &Path) {
    let flags = UnmountFlags::FORCE | UnmountFlags::DETACH;
    if let Err(error) = rustix::mount::unmount(directory, flags) {
        eprintln!("{} stays mounted: {error}", directory.display());
    }
}

pub(crate) fn lock<T>(state: &Mutex<T>) -> MutexGuard<'_, T> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether there is FUSE, and the right to use it.
pub(crate) fn is_there() -> bool {
    std::fs::File::options().read(true).write(true).open("/dev/fuse").is_ok()
}
