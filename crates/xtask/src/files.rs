//! `std::fs` for this program: what fails says what was being done to which file.
//!
//! Used as `use crate::files as fs`. An [`io::Error`] alone is "No such file or directory (os error 2)", which helps nobody
//! who has just waited for minutes; a test in `main.rs` keeps every other module away from `std::fs`'s functions.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

pub use std::fs::{File, Metadata, Permissions, TryLockError};

/// Adds what was being done to an error.
pub trait Context<T> {
    /// `what` is what was being done, as in "reading the kernel's modules"; called only for an error.
    fn context<W: std::fmt::Display>(self, what: impl FnOnce() -> W) -> io::Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context<W: std::fmt::Display>(self, what: impl FnOnce() -> W) -> io::Result<T> {
        self.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", what())))
    }
}

/// As in `std`.
pub fn read(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    let path = path.as_ref();
    std::fs::read(path).context(|| format!("reading {}", path.display()))
}

/// As in `std`.
pub fn read_to_string(path: impl AsRef<Path>) -> io::Result<String> {
    let path = path.as_ref();
    std::fs::read_to_string(path).context(|| format!("reading {}", path.display()))
}

/// As in `std`.
pub fn write(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> io::Result<()> {
    let path = path.as_ref();
    std::fs::write(path, bytes).context(|| format!("writing {}", path.display()))
}

/// As `File::create`.
pub fn create(path: impl AsRef<Path>) -> io::Result<File> {
    let path = path.as_ref();
    File::create(path).context(|| format!("creating {}", path.display()))
}

/// Creates the file `path`, `bytes` long and all of it a hole.
pub fn create_sparse(path: impl AsRef<Path>, bytes: u64) -> io::Result<()> {
    let path = path.as_ref();
    create(path)?.set_len(bytes).context(|| format!("making {} {bytes} bytes long", path.display()))
}

/// As in `std`.
pub fn create_dir(path: impl AsRef<Path>) -> io::Result<()> {
    let path = path.as_ref();
    std::fs::create_dir(path).context(|| format!("making the directory {}", path.display()))
}

/// As in `std`.
pub fn create_dir_all(path: impl AsRef<Path>) -> io::Result<()> {
    let path = path.as_ref();
    std::fs::create_dir_all(path).context(|| format!("making the directory {}", path.display()))
}

/// As in `std`.
pub fn metadata(path: impl AsRef<Path>) -> io::Result<Metadata> {
    let path = path.as_ref();
    std::fs::metadata(path).context(|| format!("looking at {}", path.display()))
}

/// The paths in the directory `path`, in order.
pub fn list(path: impl AsRef<Path>) -> io::Result<Vec<PathBuf>> {
    let path = path.as_ref();
    let entries =
        std::fs::read_dir(path).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    let mut entries: Vec<PathBuf> = entries.context(|| format!("listing {}", path.display()))?;
    entries.sort();
    Ok(entries)
}

/// As in `std`.
pub fn read_link(path: impl AsRef<Path>) -> io::Result<PathBuf> {
    let path = path.as_ref();
    std::fs::read_link(path).context(|| format!("reading the link {}", path.display()))
}

/// As in `std::os::unix::fs`.
pub fn symlink(target: impl AsRef<Path>, path: impl AsRef<Path>) -> io::Result<()> {
    let (target, path) = (target.as_ref(), path.as_ref());
    std::os::unix::fs::symlink(target, path)
        .context(|| format!("making {} a link to {}", path.display(), target.display()))
}

/// As in `std`.
pub fn copy(from: impl AsRef<Path>, to: impl AsRef<Path>) -> io::Result<u64> {
    let (from, to) = (from.as_ref(), to.as_ref());
    std::fs::copy(from, to).context(|| format!("copying {} to {}", from.display(), to.display()))
}

/// As in `std`.
pub fn hard_link(from: impl AsRef<Path>, to: impl AsRef<Path>) -> io::Result<()> {
    let (from, to) = (from.as_ref(), to.as_ref());
    std::fs::hard_link(from, to)
        .context(|| format!("making {} another name of {}", to.display(), from.display()))
}

/// As in `std`.
pub fn rename(from: impl AsRef<Path>, to: impl AsRef<Path>) -> io::Result<()> {
    let (from, to) = (from.as_ref(), to.as_ref());
    std::fs::rename(from, to).context(|| format!("renaming {} to {}", from.display(), to.display()))
}

/// As in `std`.
pub fn remove_file(path: impl AsRef<Path>) -> io::Result<()> {
    let path = path.as_ref();
    std::fs::remove_file(path).context(|| format!("removing {}", path.display()))
}

/// As in `std`.
pub fn remove_dir_all(path: impl AsRef<Path>) -> io::Result<()> {
    let path = path.as_ref();
    std::fs::remove_dir_all(path).context(|| format!("removing {}", path.display()))
}

/// As in `std`.
pub fn set_permissions(path: impl AsRef<Path>, permissions: Permissions) -> io::Result<()> {
    let path = path.as_ref();
    std::fs::set_permissions(path, permissions)
        .context(|| format!("changing the permissions of {}", path.display()))
}

/// Sets when the file `path` was changed last.
pub fn set_modified(path: impl AsRef<Path>, time: std::time::SystemTime) -> io::Result<()> {
    let path = path.as_ref();
    File::open(path)
        .and_then(|file| file.set_modified(time))
        .context(|| format!("setting the time of {}", path.display()))
}

/// The last part of `path`, as text.
pub fn name(path: &Path) -> io::Result<&str> {
    path.file_name()
        .and_then(OsStr::to_str)
        .ok_or_else(|| io::Error::other(format!("{} has no name that is text", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_file_and_what_was_done_to_it() {
        let missing = Path::new("/proc/self/no-such-directory/file");
        for (error, verb) in [
            (read(missing).unwrap_err(), "reading"),
            (create_dir_all(missing).unwrap_err(), "making"),
            (list(missing).unwrap_err(), "listing"),
            (metadata(missing).unwrap_err(), "looking at"),
            (rename(missing, "/x").unwrap_err(), "renaming"),
        ] {
            let text = error.to_string();
            assert!(text.contains(verb) && text.contains("no-such-directory"), "{text}");
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "callers still tell kinds apart");
        }
    }

    /// One file that a module reads with `std::fs` is one message without a path.
    #[test]
    fn no_other_module_uses_std_fs() {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        for source in list(sources).unwrap() {
            if name(&source).unwrap() == "files.rs" {
                continue;
            }
            for (number, line) in read_to_string(&source).unwrap().lines().enumerate() {
                let line = line.replace("std::os::unix::fs", "");
                assert!(!line.contains("std::fs"), "{}:{}: {line}", source.display(), number + 1);
            }
        }
    }
}
