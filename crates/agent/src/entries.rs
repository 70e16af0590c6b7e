//! Entries of the file system: how they are shown, what is told of an error at one, and directories that are missing.
//!
//! Writes: directories, each owned by the user that it is made for; a crash leaves those that were made.

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use connectrpc::ConnectError;
use kelvin_api::envd::filesystem::{EntryInfo, FileType};

use crate::fault::{Fault, typed};
use crate::users::{User, group_name, user_name};

/// What the caller is told of an error at `path`.
pub fn failed(path: &Path, error: &io::Error) -> ConnectError {
    let path = path.display();
    typed(
        error,
        match Fault::of(error) {
            Fault::NotFound => format!("path '{path}' does not exist"),
            Fault::Exists => format!("path '{path}' exists already"),
            _ if error.kind() == io::ErrorKind::NotADirectory => format!("path '{path}' is not a directory"),
            _ => format!("path '{path}': {error}"),
        },
    )
}

/// `path` without `.` and `..`, as text: it is shown, not opened.
pub fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => {
                cleaned.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    cleaned
}

/// What clients see of the entry at `path`.
pub fn entry(path: &Path) -> io::Result<EntryInfo> {
    let own = std::fs::symlink_metadata(path)?;
    let link = own.is_symlink();
    let target = if link { std::fs::canonicalize(path).ok() } else { None };
    // A link shows its target's type; a dangling one shows itself.
    let seen = if link { std::fs::metadata(path).unwrap_or(own) } else { own };
    let kind = if seen.is_dir() {
        FileType::FILE_TYPE_DIRECTORY
    } else if seen.is_file() {
        FileType::FILE_TYPE_FILE
    } else if seen.is_symlink() {
        FileType::FILE_TYPE_SYMLINK
    } else {
        FileType::FILE_TYPE_UNSPECIFIED
    };
    let mode = seen.permissions().mode() & 0o7777;
    Ok(EntryInfo {
        name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        r#type: kind.into(),
        path: path.to_string_lossy().into_owned(),
        size: i64::try_from(seen.len()).unwrap_or(i64::MAX),
        mode,
        permissions: permissions(seen.is_dir(), link, mode),
        owner: user_name(seen.uid()),
        group: group_name(seen.gid()),
        modified_time: buffa_types::google::protobuf::Timestamp {
            seconds: seen.mtime(),
            nanos: i32::try_from(seen.mtime_nsec()).unwrap_or(0),
            ..Default::default()
        }
        .into(),
        symlink_target: target.map(|target| target.to_string_lossy().into_owned()),
        metadata: crate::metadata::read(path).into_iter().collect(),
        is_symlink: link,
        ..Default::default()
    })
}

fn permissions(directory: bool, link: bool, mode: u32) -> String {
    let kind = if link {
        'L'
    } else if directory {
        'd'
    } else {
        '-'
    };
    let bits =
        (0..9).rev().map(|bit| if mode >> bit & 1 == 1 { ['x', 'w', 'r'][(bit % 3) as usize] } else { '-' });
    std::iter::once(kind).chain(bits).collect()
}

/// Makes `path` and its missing parents, owned by `user`.
///
/// # Errors
/// As the file system gives them; `NotADirectory` when a parent is a file.
pub fn make_dirs(path: &Path, user: &User) -> io::Result<()> {
    let mut missing = Vec::new();
    let mut current = path;
    loop {
        match std::fs::metadata(current) {
            Ok(found) if found.is_dir() => break,
            Ok(_) => return Err(io::ErrorKind::NotADirectory.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(current),
            Err(error) => return Err(error),
        }
        match current.parent() {
            Some(parent) => current = parent,
            None => break,
        }
    }
    for directory in missing.into_iter().rev() {
        match std::fs::create_dir(directory) {
            Ok(()) => std::os::unix::fs::chown(directory, Some(user.uid), Some(user.gid))?,
            // Somebody else has made it since.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && directory.is_dir() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_shown_without_dots() {
        assert_eq!(clean(Path::new("/home/user/../x/./y")), Path::new("/home/x/y"));
        assert_eq!(clean(Path::new("/../..")), Path::new("/"));
    }

    #[test]
    fn permissions_read_like_ls() {
        assert_eq!(permissions(false, false, 0o644), "-rw-r--r--");
        assert_eq!(permissions(true, false, 0o755), "drwxr-xr-x");
    }
}
