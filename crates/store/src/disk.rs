//! A disk per machine: a reflink of its parent, or a sparse copy where the file system cannot.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{SeekFrom, ioctl_ficlone, seek};

/// How a file was cloned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cloned {
    /// Shared blocks; constant time.
    Reflink,
    /// Every written block was copied.
    Copy,
}

static WARNED: AtomicBool = AtomicBool::new(false);

/// Makes `to` a copy of `from`, writable by its owner alone. `to` must not exist. `from` may lie where a VMM can write:
/// it is not followed when it is a link.
///
/// # Errors
/// As [`kelvin_host::file::open_plain`]; a half-made `to` is removed.
pub fn clone_file(from: &Path, to: &Path) -> io::Result<Cloned> {
    clone_of(&kelvin_host::file::read_plain(from)?, to, &mut |_| ())
}

/// The same of a file that an operator names: it may be a link, and have other names.
///
/// # Errors
/// As the file system gives them; a half-made `to` is removed.
pub fn import_file(from: &Path, to: &Path) -> io::Result<Cloned> {
    clone_of(&File::open(from)?, to, &mut |_| ())
}

/// The same of a file that is open. `told` hears how many bytes are copied, when it has to be copied.
///
/// # Errors
/// As the file system gives them; a half-made `to` is removed.
pub(crate) fn clone_of(source: &File, to: &Path, told: &mut dyn FnMut(u64)) -> io::Result<Cloned> {
    use std::os::unix::fs::OpenOptionsExt;
    let target = File::options().write(true).create_new(true).mode(0o600).open(to)?;
    let result = match ioctl_ficlone(&target, source) {
        Ok(()) => Ok(Cloned::Reflink),
        Err(
            rustix::io::Errno::OPNOTSUPP
            | rustix::io::Errno::XDEV
            | rustix::io::Errno::INVAL
            | rustix::io::Errno::NOTTY
            | rustix::io::Errno::NOSYS,
        ) => {
            if !WARNED.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    path = %to.display(),
                    "the data directory's file system cannot clone files: every disk is COPIED, which is slow and \
                     takes space; `kelvin setup` makes one that can"
                );
            }
            copy_sparse(source, &target, told).map(|()| Cloned::Copy)
        }
        Err(error) => Err(error.into()),
    };
    if result.is_err() {
        let _ = std::fs::remove_file(to);
    }
    result
}

/// Copies data and leaves holes.
fn copy_sparse(source: &File, target: &File, told: &mut dyn FnMut(u64)) -> io::Result<()> {
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut buffer = vec![0; usize::try_from(length.min(1 << 20)).unwrap_or(0)];
    let mut offset = 0;
    while offset < length {
        let start = match seek(source, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(source, SeekFrom::Hole(start))?;
        offset = start;
        while offset < end {
            let part = buffer.len().min(usize::try_from(end - offset).unwrap_or(usize::MAX));
            source.read_exact_at(&mut buffer[..part], offset)?;
            target.write_all_at(&buffer[..part], offset)?;
            offset += part as u64;
            told(offset);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_sparse_copy_keeps_content_and_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(b"end", (64 << 20) - 3).unwrap();
        copy_sparse(&File::open(&from).unwrap(), &File::create(&to).unwrap(), &mut |_| ()).unwrap();
        assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(&to).unwrap());
        assert!(std::fs::metadata(&to).unwrap().blocks() * 512 < 4 << 20);
    }

    #[test]
    fn a_disk_that_was_replaced_by_a_link_is_not_cloned() {
        let dir = tempfile::tempdir().unwrap();
        let (secret, disk, to) = (dir.path().join("api-key"), dir.path().join("disk"), dir.path().join("to"));
        std::fs::write(&secret, "secret").unwrap();
        std::os::unix::fs::symlink(&secret, &disk).unwrap();
        assert_eq!(clone_file(&disk, &to).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert!(!to.exists());
        // What an operator imports may be one.
        import_file(&disk, &to).unwrap();
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "secret");
    }

    #[test]
    fn a_clone_never_overwrites() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std::fs::write(&from, "new").unwrap();
        std::fs::write(&to, "old").unwrap();
        assert_eq!(clone_file(&from, &to).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "old");
    }
}
