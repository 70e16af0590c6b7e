//! Opening files in directories that a virtual machine monitor can, or once could, write.
//!
//! A VMM may have been taken over by its guest. In such a directory a name can be a link to any file of the host, another
//! name of one, a pipe that nobody writes, or a device: nothing of that is opened. And writing a small file that a power failure
//! must not take.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Opens `path` with `options` when it is a regular file that has no other name; a link is not followed. The parents of
/// `path` must be directories that nobody else can write.
///
/// # Errors
/// `InvalidInput` when it is anything else; as the file system gives them.
pub fn open_plain(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    // Never waits for the other end of a pipe.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let odd = || {
        let what =
            format!("{} is not a regular file with one name: it may have been replaced", path.display());
        io::Error::new(io::ErrorKind::InvalidInput, what)
    };
    let file = options.custom_flags(flags).open(path).map_err(|error| match error.raw_os_error() {
        // A link, a pipe that nobody reads, a socket.
        Some(libc::ELOOP | libc::ENXIO) => odd(),
        _ => error,
    })?;
    let found = file.metadata()?;
    if found.is_file() && found.nlink() == 1 { Ok(file) } else { Err(odd()) }
}

/// [`open_plain`] to read.
///
/// # Errors
/// As [`open_plain`].
pub fn read_plain(path: &Path) -> io::Result<File> {
    open_plain(path, File::options().read(true))
}

/// Writes `bytes` so that `path` has the old content or the new one, whatever happens; the new one is on the disk when this
/// returns. One writer at a time, in a directory that nobody else can write.
///
/// # Errors
/// As the file system gives them; then `path` is as it was.
pub fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension("new");
    let mut file = File::create(&fresh)?;
    io::Write::write_all(&mut file, bytes)?;
    file.sync_all()?;
    std::fs::rename(&fresh, path)?;
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn what_is_not_a_file_of_its_own_is_not_opened() {
        let top = tempfile::tempdir().unwrap();
        let at = |name: &str| top.path().join(name);
        std::fs::write(at("secret"), "secret").unwrap();
        std::fs::hard_link(at("secret"), at("name")).unwrap();
        symlink("secret", at("link")).unwrap();
        symlink("nothing", at("dangling")).unwrap();
        std::fs::create_dir(at("directory")).unwrap();
        let _listener = UnixListener::bind(at("socket")).unwrap();
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), fifo, mode, 0).unwrap();
        for name in ["name", "link", "dangling", "directory", "socket", "fifo"] {
            let error = read_plain(&at(name)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}: {error}");
            open_plain(&at(name), File::options().write(true)).unwrap_err();
        }
        assert_eq!(read_plain(&at("absent")).unwrap_err().kind(), io::ErrorKind::NotFound);
        std::fs::remove_file(at("name")).unwrap();
        assert_eq!(io::read_to_string(read_plain(&at("secret")).unwrap()).unwrap(), "secret");
    }
}
