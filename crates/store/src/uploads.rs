//! Uploads: archives of files that builds copy, by whose they are and by the hash that their client gives them.
//!
//! ```text
//! <data-dir>/uploads/<project>.<hash>-<time>/{files.json,archive}
//! ```
//!
//! An archive is kept as it came: nobody looks into it here, it is unpacked inside a guest. The hash is of the files and not of the
//! archive, so it is not checked; what a build is keyed by is the digest of what came. Who writes: this module, by staging and one
//! rename; a crash leaves `staging/`. Kept as a cache, see `cache`.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use kelvin_api::account::Project;
use kelvin_api::digest::hex;
use kelvin_api::id::FilesHash;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::cache::{Cache, Held};
use crate::{Error, Store, io_error, read_json, write_json};

const ARCHIVE: &str = "archive";
const NOTE: &str = "files.json";

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    bytes: u64,
    /// SHA-256 of the archive, in hexadecimal.
    digest: String,
}

/// The uploads of a store.
#[derive(Debug, Clone)]
pub struct Uploads {
    cache: Cache,
    most_bytes: u64,
}

/// An upload that has come whole; it stays for as long as this lives.
#[derive(Debug)]
pub struct Files {
    held: Held,
    note: Note,
}

/// One that is on its way. Dropped, nothing is left of it.
#[derive(Debug)]
pub struct Upload {
    uploads: Uploads,
    key: String,
    staged: PathBuf,
    file: File,
    hasher: Sha256,
    bytes: u64,
}

fn key(project: &Project, hash: &FilesHash) -> String {
    // No project's name has a point.
    format!("{project}.{hash}")
}

impl Uploads {
    /// Those of `store`: each of at most `most_bytes`, all of at most `cap_bytes`, and fewer when less than `free_bytes` is free
    /// beside them; and what is held.
    pub fn new(store: Store, most_bytes: u64, cap_bytes: u64, free_bytes: u64) -> Self {
        Self { cache: Cache::new(store, "uploads", cap_bytes, free_bytes), most_bytes }
    }

    /// Removes what there is no room for any more.
    ///
    /// # Errors
    /// `Io`.
    pub fn trim(&self) -> Result<(), Error> {
        self.cache.trim()
    }

    /// The upload of `project` under `hash`; none when it is not there.
    ///
    /// # Errors
    /// `Io` when that cannot be told.
    pub fn find(&self, project: &Project, hash: &FilesHash) -> Result<Option<Files>, Error> {
        let Some(held) = self.cache.find(&key(project, hash))? else { return Ok(None) };
        // One of another release is uploaded anew.
        Ok(read_json(&held.directory.join(NOTE)).ok().map(|note| Files { held, note }))
    }

    /// Begins an upload of `project` under `hash`.
    ///
    /// # Errors
    /// `Io`.
    pub fn begin(&self, project: &Project, hash: &FilesHash) -> Result<Upload, Error> {
        let staged = self.cache.store().stage()?;
        let path = staged.join(ARCHIVE);
        let file = File::options().write(true).create_new(true).open(&path);
        let file = file.inspect_err(|_| drop(fs::remove_dir_all(&staged)));
        let file = file.map_err(io_error("making", &path))?;
        let (uploads, key, hasher) = (self.clone(), key(project, hash), Sha256::new());
        Ok(Upload { uploads, key, staged, file, hasher, bytes: 0 })
    }
}

impl Upload {
    /// Takes what came next.
    ///
    /// # Errors
    /// `Oversized` when it is more than one may have, `Io`.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.bytes += bytes.len() as u64;
        if self.bytes > self.uploads.most_bytes {
            return Err(Error::Oversized { what: "an upload", most_bytes: self.uploads.most_bytes });
        }
        self.hasher.update(bytes);
        self.file.write_all(bytes).map_err(io_error("writing", &self.staged))
    }

    /// Publishes it: it has come whole. One that was there before is replaced.
    ///
    /// # Errors
    /// `Io`; then the one that was there before is.
    pub fn finish(self) -> Result<Files, Error> {
        let note = Note { bytes: self.bytes, digest: hex(&self.hasher.clone().finalize()) };
        let archive = self.staged.join(ARCHIVE);
        fs::set_permissions(&archive, fs::Permissions::from_mode(0o400))
            .map_err(io_error("sealing", &archive))?;
        write_json(&self.staged.join(NOTE), &note)?;
        Ok(Files { held: self.uploads.cache.put(&self.key, &self.staged)?, note })
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // Already gone when it was published.
        let _ = fs::remove_dir_all(&self.staged);
    }
}

impl Files {
    /// The archive: a tar, plain or gzip, if it is what it should be.
    pub fn archive(&self) -> PathBuf {
        self.held.directory.join(ARCHIVE)
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.note.bytes
    }

    /// SHA-256 of the archive, in hexadecimal.
    pub fn digest(&self) -> &str {
        &self.note.digest
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::hash::sha256;

    fn uploads(root: &Path) -> (Uploads, Project, FilesHash) {
        let store = Store::open(root, true).unwrap();
        (Uploads::new(store, 10, u64::MAX, 0), Project::default(), "ab".repeat(32).parse().unwrap())
    }

    fn staged(root: &Path) -> usize {
        fs::read_dir(root.join("staging")).unwrap().count()
    }

    #[test]
    fn an_upload_is_there_when_it_has_come_whole_and_for_its_project_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (uploads, project, hash) = uploads(dir.path());
        let mut upload = uploads.begin(&project, &hash).unwrap();
        upload.write(b"12345").unwrap();
        upload.write(b"67890").unwrap();
        assert!(uploads.find(&project, &hash).unwrap().is_none());
        let files = upload.finish().unwrap();
        assert_eq!((files.bytes(), files.digest()), (10, &*sha256(b"1234567890")));
        assert_eq!(fs::read(files.archive()).unwrap(), b"1234567890");
        assert!(uploads.find(&"other".parse().unwrap(), &hash).unwrap().is_none());
        // Another archive under the same name: who reads the former one goes on.
        let mut upload = uploads.begin(&project, &hash).unwrap();
        upload.write(b"new").unwrap();
        drop(upload.finish().unwrap());
        assert_eq!(fs::read(files.archive()).unwrap(), b"1234567890");
        assert_eq!(uploads.find(&project, &hash).unwrap().unwrap().digest(), sha256(b"new"));
        assert_eq!(staged(dir.path()), 0);
    }

    #[test]
    fn one_that_is_torn_or_too_large_leaves_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let (uploads, project, hash) = uploads(dir.path());
        drop(uploads.begin(&project, &hash).unwrap().finish().unwrap());
        let mut torn = uploads.begin(&project, &hash).unwrap();
        torn.write(b"1").unwrap();
        drop(torn);
        let mut large = uploads.begin(&project, &hash).unwrap();
        assert!(matches!(large.write(&[0; 11]), Err(Error::Oversized { most_bytes: 10, .. })));
        drop(large);
        assert_eq!(uploads.find(&project, &hash).unwrap().unwrap().bytes(), 0);
        assert_eq!(staged(dir.path()), 0);
    }
}
