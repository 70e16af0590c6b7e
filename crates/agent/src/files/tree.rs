//! Directories and files below a directory that is open: whatever links there are, nothing outside it is reached.
//!
//! A link in the middle of a path leads to where it would if that directory were the root. Source: openat2(2),
//! `RESOLVE_IN_ROOT`. Writes what it is told to; a crash leaves what was made.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat2, statat, unlinkat};
use rustix::io::Errno;

/// Which file it is: device and inode.
pub(super) type Place = (u64, u64);

/// How often a path is walked again when somebody moves directories meanwhile, and how many names are tried.
const ATTEMPTS: usize = 32;

/// Opens the directory `path` below `base`; `base` itself for an empty one.
///
/// # Errors
/// As the file system gives them.
pub(super) fn open_dir(base: impl AsFd, path: &[u8]) -> io::Result<OwnedFd> {
    open_as(base, path, ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
}

/// Makes the directory `name` in `directory`, for everybody to enter, and opens it: it, and no link that somebody puts in
/// its place meanwhile.
///
/// # Errors
/// As the file system gives them; `EEXIST` when something is called so.
pub(super) fn make_dir(directory: impl AsFd, name: &[u8]) -> io::Result<OwnedFd> {
    mkdirat(&directory, name, Mode::from_raw_mode(0o755))?;
    open_as(directory, name, ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS)
}

/// The same, under a name that nothing has: that name, and the directory.
///
/// # Errors
/// As the file system gives them; `EEXIST` when all [`ATTEMPTS`] names are taken.
pub(super) fn make_dir_aside(directory: impl AsFd) -> io::Result<(Vec<u8>, OwnedFd)> {
    let mut number = 0;
    loop {
        let name = format!(".kelvin-copy-{number}").into_bytes();
        match make_dir(&directory, &name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < ATTEMPTS => number += 1,
            made => return Ok((name, made?)),
        }
    }
}

fn open_as(base: impl AsFd, path: &[u8], resolve: ResolveFlags) -> io::Result<OwnedFd> {
    let path: &[u8] = if path.is_empty() { b"." } else { path };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut attempts = 0;
    loop {
        match openat2(&base, path, flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) if attempts < ATTEMPTS => attempts += 1,
            opened => return Ok(opened?),
        }
    }
}

/// The same; what is missing of it is made, for everybody to enter. `made` is told of each that was.
///
/// # Errors
/// As the file system gives them; `NotADirectory` when there is something else, or a link that leads nowhere.
pub(super) fn make_dirs(
    base: impl AsFd,
    path: &[u8],
    mut made: impl FnMut(&OwnedFd) -> io::Result<()>,
) -> io::Result<OwnedFd> {
    match open_dir(&base, path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        opened => return opened,
    }
    let mut current = open_dir(&base, b"")?;
    let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
    let mut begin = 0;
    for end in ends.chain([path.len()]) {
        let (whole, name) = (&path[..end], &path[begin..end]);
        begin = end + 1;
        current = match open_dir(&base, whole) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let fresh = make_dir(&current, name).map_err(|error| match error.kind() {
                    io::ErrorKind::AlreadyExists => io::ErrorKind::NotADirectory.into(),
                    _ => error,
                })?;
                made(&fresh)?;
                fresh
            }
            opened => opened?,
        };
    }
    Ok(current)
}

/// Takes away what is called `name` in `directory`, for a file or a link in its place.
///
/// # Errors
/// As the file system gives them; `IsADirectory` when it is one.
pub(super) fn clear(directory: &OwnedFd, name: &[u8]) -> io::Result<()> {
    match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::Directory => {
            Err(io::ErrorKind::IsADirectory.into())
        }
        Ok(_) => Ok(unlinkat(directory, name, AtFlags::empty())?),
    }
}

/// Which file is open.
pub(super) fn place_of(file: impl AsFd) -> io::Result<Place> {
    let found = fstat(file)?;
    Ok((found.st_dev, found.st_ino))
}

/// Which regular file is called `name` in `directory`, when there is one.
pub(super) fn file_at(directory: &OwnedFd, name: &[u8]) -> Option<Place> {
    let found = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    let is_file = FileType::from_raw_mode(found.st_mode) == FileType::RegularFile;
    is_file.then_some((found.st_dev, found.st_ino))
}
