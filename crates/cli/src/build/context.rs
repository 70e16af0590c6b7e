//! Files of this machine that `--copy` names: what they are called, and the tar that is uploaded.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use kelvin_api::digest::hex;
use sha2::{Digest, Sha256};

use crate::output::Failed;

/// Bytes that are read at once.
const CHUNK: usize = 256 << 10;
/// Files of one copy.
const MOST_FILES: usize = 1_000_000;

/// What is copied: a file or a directory, under its own name.
#[derive(Debug, Clone)]
pub struct Context {
    path: PathBuf,
    /// Its name, which is its path in the tar.
    pub name: String,
    /// What is in it, by the path below it, sorted: the same files make the same tar.
    entries: Vec<PathBuf>,
    /// What it is called: of its destination, and of paths, kinds, modes and contents.
    pub hash: String,
}

fn failed(path: &Path, error: &io::Error) -> Failed {
    Failed::new(format!("{}: {error}", path.display()), "name files that can be read")
}

/// What is `below` a path; it itself has nothing below it, and no `/` after its name, which would say that it is a directory.
fn join(path: &Path, below: &Path) -> PathBuf {
    if below.as_os_str().is_empty() { path.to_owned() } else { path.join(below) }
}

/// Paths below `path`, it first; a directory before what is in it.
fn walk(path: &Path, below: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
    let here = join(path, below);
    let kind = here.symlink_metadata()?.file_type();
    if !(kind.is_dir() || kind.is_file() || kind.is_symlink()) {
        return Err(io::Error::other(format!("{} is no file, directory or link", here.display())));
    }
    if found.len() >= MOST_FILES {
        return Err(io::Error::other(format!("more than {MOST_FILES} files")));
    }
    found.push(below.to_owned());
    if !kind.is_dir() {
        return Ok(());
    }
    let mut names = std::fs::read_dir(&here)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    names.into_iter().try_for_each(|name| walk(path, &below.join(name), found))
}

/// Adds the length of a text and it: where one ends and the next begins is part of the hash.
fn add(digest: &mut Sha256, bytes: &[u8]) {
    digest.update((bytes.len() as u64).to_be_bytes());
    digest.update(bytes);
}

fn hash(path: &Path, entries: &[PathBuf], to: &str) -> io::Result<String> {
    use std::os::unix::fs::PermissionsExt as _;
    let mut digest = Sha256::new();
    add(&mut digest, to.as_bytes());
    let mut buffer = vec![0; CHUNK];
    for below in entries {
        let here = join(path, below);
        let found = here.symlink_metadata()?;
        add(&mut digest, below.as_os_str().as_encoded_bytes());
        digest.update(found.permissions().mode().to_be_bytes());
        if found.is_symlink() {
            add(&mut digest, std::fs::read_link(&here)?.as_os_str().as_encoded_bytes());
        } else if found.is_file() {
            digest.update(found.len().to_be_bytes());
            let mut file = std::fs::File::open(&here)?;
            loop {
                match file.read(&mut buffer)? {
                    0 => break,
                    count => digest.update(&buffer[..count]),
                }
            }
        }
    }
    Ok(hex(&digest.finalize()))
}

impl Context {
    /// Reads what is to be copied from `source` to `to`.
    pub fn read(source: &Path, to: &str) -> Result<Self, Failed> {
        let path = source.canonicalize().map_err(|error| failed(source, &error))?;
        let name = path.file_name().and_then(|name| name.to_str()).map(str::to_owned).ok_or_else(|| {
            Failed::new(
                format!("{} has no name that can be sent", source.display()),
                "name another directory",
            )
        })?;
        let mut entries = Vec::new();
        walk(&path, Path::new(""), &mut entries).map_err(|error| failed(source, &error))?;
        let hash = hash(&path, &entries, &format!("{name}\n{to}")).map_err(|error| failed(source, &error))?;
        Ok(Self { path, name, entries, hash })
    }

    /// Writes the tar.
    ///
    /// # Errors
    /// When a file cannot be read, or `to` fails.
    pub fn write(&self, to: &mut dyn Write) -> io::Result<()> {
        let mut archive = tar::Builder::new(to);
        for below in &self.entries {
            let (here, name) = (join(&self.path, below), join(Path::new(&self.name), below));
            let found = here.symlink_metadata()?;
            let mut header = tar::Header::new_gnu();
            header.set_metadata(&found);
            // Whose they are here means nothing there.
            header.set_uid(0);
            header.set_gid(0);
            if found.is_symlink() {
                archive.append_link(&mut header, name, std::fs::read_link(&here)?)?;
            } else if found.is_dir() {
                archive.append_data(&mut header, name, io::empty())?;
            } else {
                // As long as it was: one that others write to would be taken for the next entry.
                let content = std::fs::File::open(&here)?.take(found.len());
                archive.append_data(&mut header, name, content.chain(io::repeat(0)).take(found.len()))?;
            }
        }
        archive.into_inner()?.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn files() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let app = directory.path().join("app");
        std::fs::create_dir_all(app.join("lib")).unwrap();
        std::fs::write(app.join("lib/one"), "1").unwrap();
        std::fs::write(app.join("run"), "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(app.join("run"), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::symlink("run", app.join("link")).unwrap();
        directory
    }

    #[test]
    fn files_are_called_by_what_they_are_and_where_they_go() {
        let (one, other) = (files(), files());
        let read = |of: &tempfile::TempDir, to: &str| Context::read(&of.path().join("app"), to).unwrap().hash;
        let hash = read(&one, "/srv");
        assert!(hash.parse::<kelvin_api::id::FilesHash>().is_ok());
        assert_eq!(hash, read(&other, "/srv"));
        assert_ne!(hash, read(&one, "/opt"));
        let app = other.path().join("app");
        let mut seen = std::collections::BTreeSet::from([hash]);
        std::fs::write(app.join("lib/one"), "2").unwrap();
        assert!(seen.insert(read(&other, "/srv")));
        std::fs::set_permissions(app.join("run"), std::fs::Permissions::from_mode(0o700)).unwrap();
        assert!(seen.insert(read(&other, "/srv")));
        std::fs::rename(app.join("lib/one"), app.join("lib/two")).unwrap();
        assert!(seen.insert(read(&other, "/srv")));
        std::fs::remove_file(app.join("link")).unwrap();
        std::os::unix::fs::symlink("lib", app.join("link")).unwrap();
        assert!(seen.insert(read(&other, "/srv")));
        assert!(Context::read(Path::new("/"), "/srv").is_err());
        assert!(Context::read(&app.join("nothing"), "/srv").is_err());
    }

    #[test]
    fn a_tar_has_what_was_read_under_its_own_name() {
        let files = files();
        let context = Context::read(&files.path().join("app"), "/srv").unwrap();
        let mut bytes = Vec::new();
        context.write(&mut bytes).unwrap();
        let mut archive = tar::Archive::new(&bytes[..]);
        let mut found = Vec::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            let mode = entry.header().mode().unwrap() & 0o777;
            let link = entry.link_name().unwrap().map(|link| link.display().to_string());
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            found.push(format!(
                "{} {mode:o} {}{text:?}",
                path.trim_end_matches('/'),
                link.unwrap_or_default()
            ));
        }
        assert_eq!(found.len(), 5, "{found:?}");
        assert!(found[0].starts_with("app 7") && found[1].starts_with("app/lib 7"), "{found:?}");
        assert!(found[2].starts_with("app/lib/one 6") && found[2].ends_with("\"1\""), "{found:?}");
        assert!(found[3].starts_with("app/link ") && found[3].ends_with("run\"\""), "{found:?}");
        assert_eq!(found[4], "app/run 755 \"#!/bin/sh\\n\"");
    }
}
