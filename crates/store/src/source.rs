//! Files from outside that are copied into the store: opened once, and refused when somebody writes to them meanwhile.
//!
//! What is copied is what was looked at and hashed. Who writes: [`Source::copy`], what it is told to.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, openat};

use crate::disk::clone_of;
use crate::hash::{FileDigest, digest_open};
use crate::{Error, io_error};

/// Whether a file to import may be named by a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// It may: who imports has typed the name.
    Follow,
    /// It may not: the file that is named is the file that is meant.
    Refuse,
}

/// A file to import, open.
pub(crate) struct Source {
    path: PathBuf,
    pub(crate) file: File,
    /// How long it is.
    pub(crate) bytes: u64,
    written: Written,
}

/// When a file was changed last: it is another after each write.
type Written = (i64, i64, i64, i64);

fn written(found: &fs::Metadata) -> Written {
    (found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec())
}

impl Source {
    /// Opens `path` when it is a regular file of at most `most` bytes. What is something else is never opened: a device may
    /// do what an open tells it.
    pub(crate) fn open(path: &Path, links: Links, most: u64) -> Result<Self, Error> {
        let refused = |reason: &str| Error::Unimportable { path: path.to_owned(), reason: reason.to_owned() };
        let flags = match links {
            Links::Follow => OFlags::PATH | OFlags::CLOEXEC,
            Links::Refuse => OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        };
        let place = openat(CWD, path, flags, Mode::empty()).map_err(|error| match error {
            rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR => refused("there is no such file"),
            _ => io_error("opening", path)(error.into()),
        })?;
        let found = rustix::fs::fstat(&place).map_err(|error| io_error("reading", path)(error.into()))?;
        if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
            return Err(refused("it is not a regular file"));
        }
        // The one that was looked at, whatever its name means by now.
        let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&place));
        let file = File::open(again).map_err(io_error("opening", path))?;
        let found = file.metadata().map_err(io_error("reading", path))?;
        let bytes = found.len();
        if bytes > most {
            return Err(refused(&format!("it has {bytes} bytes, {most} is the most")));
        }
        Ok(Self { path: path.to_owned(), file, bytes, written: written(&found) })
    }

    pub(crate) fn digest(&self, told: &mut dyn FnMut(u64)) -> Result<FileDigest, Error> {
        let file = self.file.try_clone().map_err(io_error("reading", &self.path))?;
        digest_open(file, told).map_err(io_error("reading", &self.path))
    }

    /// Clones it to `staged`; after that it must still be what was hashed.
    pub(crate) fn copy(&self, staged: &Path, told: &mut dyn FnMut(u64)) -> Result<(), Error> {
        use std::os::unix::fs::PermissionsExt;
        clone_of(&self.file, staged, told).map_err(io_error("copying", &self.path))?;
        let found = self.file.metadata().map_err(io_error("reading", &self.path))?;
        if (found.len(), written(&found)) != (self.bytes, self.written) {
            let reason = "it was changed meanwhile".to_owned();
            return Err(Error::Unimportable { path: self.path.to_owned(), reason });
        }
        // VMMs of any user read it; nobody writes it again.
        fs::set_permissions(staged, fs::Permissions::from_mode(0o444)).map_err(io_error("sealing", staged))
    }
}
