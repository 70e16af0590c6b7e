//! Layers: a disk after each step of a build, by the key of everything that went in.
//!
//! ```text
//! <data-dir>/layers/<key>-<time>/{layer.json,disk}
//! ```
//!
//! Who writes: this module, by staging and one rename; a disk is never written again. What is kept is a cache: a layer may be gone
//! whenever nobody holds it, see `cache`. Keys are made by the node: two disks of one key may differ (a command's output does),
//! and the newer one counts.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cache::{Cache, Held};
use crate::disk::clone_file;
use crate::hash::{FileDigest, digest_file};
use crate::{Error, Store, io_error, read_json, write_json};

/// The disk's name in a layer.
pub const DISK: &str = "disk";
const NOTE: &str = "layer.json";

/// What is known of a layer beside its disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    /// Of the disk, once somebody has asked for it.
    #[serde(default)]
    digest: Option<FileDigest>,
}

/// The layers of a store.
#[derive(Debug, Clone)]
pub struct Layers(Cache);

/// A layer, which stays for as long as this lives.
#[derive(Debug)]
pub struct Layer {
    held: Held,
    note: Note,
}

impl Layers {
    /// Those of `store`: at most `cap_bytes` of disk, and fewer when less than `free_bytes` is free beside them; and what is held.
    pub fn new(store: Store, cap_bytes: u64, free_bytes: u64) -> Self {
        Self(Cache::new(store, "layers", cap_bytes, free_bytes))
    }

    /// Removes what there is no room for any more.
    ///
    /// # Errors
    /// `Io`.
    pub fn trim(&self) -> Result<(), Error> {
        self.0.trim()
    }

    /// The layer of `key`; none when it is not there, or is of a form that this release does not know.
    ///
    /// # Errors
    /// `Io` when that cannot be told.
    pub fn find(&self, key: &str) -> Result<Option<Layer>, Error> {
        let Some(held) = self.0.find(key)? else { return Ok(None) };
        match read_json(&held.directory.join(NOTE)) {
            Ok(note) => Ok(Some(Layer { held, note })),
            Err(error) => {
                tracing::warn!(key, error = kelvin_api::error::chain(&error), "a layer is made anew");
                Ok(None)
            }
        }
    }

    /// Keeps `disk`, cloned, as the layer of `key`; it must not change meanwhile.
    ///
    /// # Errors
    /// `Io`; then nothing is left.
    pub fn put(&self, key: &str, disk: &Path) -> Result<Layer, Error> {
        let staged = self.0.store().stage()?;
        let clone =
            |staged: &Path| clone_file(disk, &staged.join(DISK)).map(drop).map_err(io_error("cloning", disk));
        self.keep(key, &staged, clone)
    }

    /// The same of a file called [`DISK`] that lies in `staged`, which is gone afterwards.
    ///
    /// # Errors
    /// `Io`; then nothing is left.
    pub fn put_staged(&self, key: &str, staged: &Path) -> Result<Layer, Error> {
        self.keep(key, staged, |_| Ok(()))
    }

    fn keep(
        &self,
        key: &str,
        staged: &Path,
        make: impl FnOnce(&Path) -> Result<(), Error>,
    ) -> Result<Layer, Error> {
        let kept = (|| {
            make(staged)?;
            let disk = staged.join(DISK);
            fs::set_permissions(&disk, fs::Permissions::from_mode(0o400))
                .map_err(io_error("sealing", &disk))?;
            let note = Note { digest: None };
            write_json(&staged.join(NOTE), &note)?;
            Ok(Layer { held: self.0.put(key, staged)?, note })
        })();
        if kept.is_err() {
            // Already gone when it was published.
            let _ = fs::remove_dir_all(staged);
        }
        kept
    }
}

impl Layer {
    /// Its disk.
    pub fn disk(&self) -> PathBuf {
        self.held.directory.join(DISK)
    }

    /// Size of its disk, in bytes.
    ///
    /// # Errors
    /// `Io`.
    pub fn disk_bytes(&self) -> Result<u64, Error> {
        let path = self.disk();
        let found = File::open(&path).and_then(|file| file.metadata());
        Ok(found.map_err(io_error("reading", &path))?.len())
    }

    /// The digest of its disk: the one that is known, or taken now, which reads what the disk holds.
    ///
    /// # Errors
    /// `Io` when it cannot be read.
    pub fn digest(&mut self) -> Result<FileDigest, Error> {
        if let Some(digest) = &self.note.digest {
            return Ok(digest.clone());
        }
        let disk = self.disk();
        let digest = digest_file(&disk).map_err(io_error("hashing", &disk))?;
        self.note.digest = Some(digest.clone());
        write_json(&self.held.directory.join(NOTE), &self.note)?;
        Ok(digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_its_disk_and_the_digest_of_that() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("data"), true).unwrap();
        let layers = Layers::new(store.clone(), u64::MAX, 0);
        let disk = dir.path().join("machine's");
        fs::write(&disk, "disk").unwrap();
        let mut layer = layers.put("k", &disk).unwrap();
        fs::write(&disk, "the machine goes on").unwrap();
        assert_eq!(fs::read_to_string(layer.disk()).unwrap(), "disk");
        assert_eq!(layer.disk_bytes().unwrap(), 4);
        let digest = layer.digest().unwrap();
        assert_eq!(digest, digest_file(&layer.disk()).unwrap());
        drop(layer);
        // Another life of the daemon.
        let layers = Layers::new(Store::open(store.root(), true).unwrap(), u64::MAX, 0);
        let mut found = layers.find("k").unwrap().unwrap();
        assert_eq!(found.note.digest, Some(digest.clone()));
        assert_eq!(found.digest().unwrap(), digest);
        // Of a release to come.
        fs::write(found.held.directory.join(NOTE), r#"{"of": "later"}"#).unwrap();
        assert!(layers.find("k").unwrap().is_none());
    }

    #[test]
    fn what_cannot_be_kept_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), true).unwrap();
        let layers = Layers::new(store.clone(), u64::MAX, 0);
        layers.put("k", &dir.path().join("absent")).unwrap_err();
        let staged = store.stage().unwrap();
        layers.put_staged("k", &staged).unwrap_err();
        assert_eq!(fs::read_dir(dir.path().join("staging")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(dir.path().join("layers")).unwrap().count(), 0);
    }
}
