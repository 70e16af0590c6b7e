//! Files of the guest that the agent reads for itself: any of them may have become anything since.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// The content of the regular file at `path`, of `most` bytes at the most.
///
/// # Errors
/// As the file system gives them; `InvalidInput` for what is no regular file (a FIFO would be waited for), `FileTooLarge`.
pub fn read(path: &Path, most: usize) -> io::Result<Vec<u8>> {
    let file = open(path, 0)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    content(file, most)
}

/// The same of a file that nobody but `owner` can have written: no link, owned by that user id, writable by nobody else.
///
/// # Errors
/// As [`read`]; `PermissionDenied` when others may have written it.
pub fn read_owned(path: &Path, most: usize, owner: u32) -> io::Result<Vec<u8>> {
    let file = open(path, libc::O_NOFOLLOW)?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    if found.uid() != owner || found.mode() & 0o022 != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "it is not root's alone: others own it or may write it",
        ));
    }
    content(file, most)
}

fn open(path: &Path, flags: libc::c_int) -> io::Result<File> {
    File::options().read(true).custom_flags(flags | libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

fn content(file: File, most: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // Its length may be a lie: what is there counts.
    file.take(most as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > most {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_within_bounds_are_read() {
        let directory = std::env::temp_dir().join(format!("kelvin-guest-file-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("file");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read(&path, 5).unwrap(), b"12345");
        assert_eq!(read(&path, 4).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        let fifo = directory.join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert_eq!(read(&fifo, 5).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(read(&directory, 5).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_file_that_others_may_have_written_is_not_trusted() {
        use std::os::unix::fs::PermissionsExt;
        let directory = std::env::temp_dir().join(format!("kelvin-guest-owned-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (path, link) = (directory.join("file"), directory.join("link"));
        let me = rustix::process::geteuid().as_raw();
        std::fs::write(&path, "1").unwrap();
        let set = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        set(0o644);
        assert_eq!(read_owned(&path, 5, me).unwrap(), b"1");
        let kind = |result: io::Result<Vec<u8>>| result.unwrap_err().kind();
        assert_eq!(kind(read_owned(&path, 5, me + 1)), io::ErrorKind::PermissionDenied);
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(read_owned(&link, 5, me).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        for mode in [0o664, 0o646] {
            set(mode);
            assert_eq!(kind(read_owned(&path, 5, me)), io::ErrorKind::PermissionDenied);
        }
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
