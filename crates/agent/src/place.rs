//! Files in the place of whatever is there.
//!
//! A crash leaves the former file, and beside it one that ends in `.kelvin-new`; the next write takes it away.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

/// Clears `path` for a file of ours: nothing is there, and its directory is one.
pub fn make_way(path: &Path) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        let is_one = fs::symlink_metadata(directory).is_ok_and(|found| found.is_dir());
        if !is_one {
            let _ = fs::remove_file(directory);
            fs::create_dir_all(directory)?;
            fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
        }
    }
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Replaces the file at `path` by one with `content`; whose it was and who may do what stays.
pub fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    write_as(path, content, 0o644)
}

/// The same; one that was not there gets `mode`.
pub fn write_as(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let former = fs::symlink_metadata(path).ok().filter(fs::Metadata::is_file);
    let fresh = path.with_extension("kelvin-new");
    make_way(&fresh)?;
    let written = (|| {
        fs::write(&fresh, content)?;
        let mode = former.as_ref().map_or(mode, |found| found.mode() & 0o7777);
        if let Some(found) = &former {
            std::os::unix::fs::chown(&fresh, Some(found.uid()), Some(found.gid()))?;
        }
        fs::set_permissions(&fresh, fs::Permissions::from_mode(mode))?;
        fs::rename(&fresh, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&fresh);
    }
    written
}
