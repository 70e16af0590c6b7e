//! Blobs by digest, on the disk of the host.
//!
//! ```text
//!   blobs/sha256/<hex>   whole, verified when it was written, published by rename
//!   parts/<hex>          the beginning of one; goes on where it ended, and is verified as a whole
//! ```
//!
//! This process alone writes here. A crash leaves parts, and perhaps a blob whose content did not reach the disk: the first go
//! on or are removed at the next start when they are a day old, the second is found by its length, or by the digest of
//! the archive in it, when it is read. More than the cap is removed, least recently used first, and never what is in use.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use crate::digest::Digest;
use crate::error::Error;

/// How long a part waits to be gone on with.
const PART_AGE: Duration = Duration::from_secs(24 * 60 * 60);

/// A blob that is there.
#[derive(Debug)]
struct Blob {
    bytes: u64,
    /// A clock of our own: later is larger.
    used: u64,
    pins: usize,
}

#[derive(Debug, Default)]
struct State {
    blobs: HashMap<Digest, Blob>,
    clock: u64,
    flights: HashMap<Digest, Weak<tokio::sync::Mutex<()>>>,
}

/// The cache.
#[derive(Debug)]
pub(crate) struct Cache {
    blobs: PathBuf,
    parts: PathBuf,
    cap: u64,
    state: Mutex<State>,
}

/// A blob that stays while this is held.
#[derive(Debug)]
pub(crate) struct Pinned {
    cache: Arc<Cache>,
    digest: Digest,
}

impl Pinned {
    pub(crate) fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Opens it.
    pub(crate) fn open(&self) -> Result<File, Error> {
        File::open(self.cache.blob(&self.digest)).map_err(|error| Error::io("opening a cached blob", error))
    }

    /// Takes it out of the cache: it is not what its name says.
    pub(crate) fn forget(&self) {
        let mut state = self.cache.state();
        state.blobs.remove(&self.digest);
        let _ = fs::remove_file(self.cache.blob(&self.digest));
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let mut state = self.cache.state();
        if let Some(blob) = state.blobs.get_mut(&self.digest) {
            blob.pins = blob.pins.saturating_sub(1);
        }
        self.cache.evict(&mut state);
    }
}

/// One process wide turn to fetch a blob.
pub(crate) type Flight = tokio::sync::OwnedMutexGuard<()>;

impl Cache {
    /// Opens the cache in `directory`, which is made when it is missing. More than `cap` bytes of blobs are not kept.
    pub(crate) fn open(directory: &Path, cap: u64) -> io::Result<Arc<Self>> {
        let (blobs, parts) = (directory.join("blobs/sha256"), directory.join("parts"));
        fs::create_dir_all(&blobs)?;
        fs::create_dir_all(&parts)?;
        let mut found = Vec::new();
        for entry in fs::read_dir(&blobs)? {
            let entry = entry?;
            let about = entry.metadata()?;
            match entry.file_name().to_str().and_then(Digest::from_hex) {
                Some(digest) if about.is_file() => found.push((about.modified()?, digest, about.len())),
                _ => remove(&entry.path())?,
            }
        }
        for entry in fs::read_dir(&parts)? {
            let entry = entry?;
            let about = entry.metadata()?;
            let is_one = entry.file_name().to_str().and_then(Digest::from_hex).is_some() && about.is_file();
            let age = SystemTime::now().duration_since(about.modified()?).unwrap_or_default();
            if !is_one || age > PART_AGE {
                remove(&entry.path())?;
            }
        }
        found.sort();
        let mut state = State::default();
        for (_, digest, bytes) in found {
            state.clock += 1;
            state.blobs.insert(digest, Blob { bytes, used: state.clock, pins: 0 });
        }
        let cache = Self { blobs, parts, cap, state: Mutex::new(State::default()) };
        cache.evict(&mut state);
        *cache.state() = state;
        Ok(Arc::new(cache))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        self.blobs.join(digest.hex())
    }

    /// Where the beginning of the blob is written. Only who has its [`Flight`] may.
    pub(crate) fn part(&self, digest: &Digest) -> PathBuf {
        self.parts.join(digest.hex())
    }

    /// The blob, when it is there and has `bytes` bytes.
    pub(crate) fn get(self: &Arc<Self>, digest: &Digest, bytes: u64) -> Option<Pinned> {
        let mut state = self.state();
        state.clock += 1;
        let clock = state.clock;
        let blob = state.blobs.get_mut(digest)?;
        let path = self.blob(digest);
        let length = fs::metadata(&path).map(|about| about.len()).ok();
        if length != Some(bytes) || blob.bytes != bytes {
            // A crash has cut it, or somebody has taken it away.
            if blob.pins == 0 {
                state.blobs.remove(digest);
                let _ = fs::remove_file(&path);
            }
            return None;
        }
        blob.used = clock;
        blob.pins += 1;
        drop(state);
        // For the order at the next start.
        let _ = File::options().write(true).open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        Some(Pinned { cache: Arc::clone(self), digest: digest.clone() })
    }

    /// Waits for the turn to fetch the blob; who comes after finds it there.
    pub(crate) async fn flight(&self, digest: &Digest) -> Flight {
        let turn = {
            let mut state = self.state();
            state.flights.retain(|_, turn| turn.strong_count() > 0);
            match state.flights.get(digest).and_then(Weak::upgrade) {
                Some(turn) => turn,
                None => {
                    let turn = Arc::new(tokio::sync::Mutex::new(()));
                    state.flights.insert(digest.clone(), Arc::downgrade(&turn));
                    turn
                }
            }
        };
        turn.lock_owned().await
    }

    /// Makes the part, which is whole and verified, the blob.
    pub(crate) fn publish(self: &Arc<Self>, digest: &Digest, bytes: u64) -> io::Result<Pinned> {
        let mut state = self.state();
        fs::rename(self.part(digest), self.blob(digest))?;
        state.clock += 1;
        let used = state.clock;
        // One that has been forgotten may be pinned still; its pins are of the old file, and go with it.
        state.blobs.insert(digest.clone(), Blob { bytes, used, pins: 1 });
        self.evict(&mut state);
        Ok(Pinned { cache: Arc::clone(self), digest: digest.clone() })
    }

    fn evict(&self, state: &mut State) {
        let mut sum: u64 = state.blobs.values().map(|blob| blob.bytes).sum();
        while sum > self.cap {
            let oldest = state
                .blobs
                .iter()
                .filter(|(_, blob)| blob.pins == 0)
                .min_by_key(|(_, blob)| blob.used)
                .map(|(digest, blob)| (digest.clone(), blob.bytes));
            let Some((digest, bytes)) = oldest else { return };
            if let Err(error) = fs::remove_file(self.blob(&digest)) {
                tracing::warn!(%digest, %error, "a cached blob cannot be removed");
            }
            state.blobs.remove(&digest);
            sum -= bytes;
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path)?.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(cache: &Arc<Cache>, content: &[u8]) -> (Digest, Pinned) {
        let digest = Digest::of(content);
        fs::write(cache.part(&digest), content).unwrap();
        let pinned = cache.publish(&digest, content.len() as u64).unwrap();
        (digest, pinned)
    }

    #[test]
    fn the_least_recently_used_goes_and_never_what_is_in_use() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path(), 25).unwrap();
        let (a, pin_a) = put(&cache, &[1; 10]);
        let (b, pin_b) = put(&cache, &[2; 10]);
        drop((pin_a, pin_b));
        // `a` is used again, so `b` is the oldest.
        drop(cache.get(&a, 10).unwrap());
        let (c, pin_c) = put(&cache, &[3; 10]);
        assert!(cache.get(&b, 10).is_none() && cache.get(&a, 10).is_some());
        let (d, pin_d) = put(&cache, &[4; 20]);
        // Both are pinned: more than the cap stays for so long.
        assert!(cache.get(&c, 10).is_some() && cache.get(&d, 20).is_some());
        drop((pin_c, pin_d));
        let left = fs::read_dir(directory.path().join("blobs/sha256")).unwrap().count();
        assert_eq!(left, 1, "one of 20 bytes, or one of 10");
    }

    #[test]
    fn a_start_cleans_up_and_a_cut_blob_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path(), 1000).unwrap();
        let (whole, _pin) = put(&cache, b"whole");
        let (cut, _pin) = put(&cache, b"to be cut");
        let young = cache.part(&Digest::of(b"young"));
        let old = cache.part(&Digest::of(b"old"));
        for path in [&young, &old] {
            fs::write(path, b"x").unwrap();
        }
        let long_ago = SystemTime::now() - 2 * PART_AGE;
        File::options().write(true).open(&old).unwrap().set_modified(long_ago).unwrap();
        fs::write(directory.path().join("blobs/sha256/odd"), b"x").unwrap();
        fs::create_dir(directory.path().join("parts/odd")).unwrap();
        File::options().write(true).open(cache.blob(&cut)).unwrap().set_len(3).unwrap();
        let cache = Cache::open(directory.path(), 1000).unwrap();
        assert!(young.exists() && !old.exists());
        assert_eq!(fs::read_dir(directory.path().join("parts")).unwrap().count(), 1);
        assert!(cache.get(&whole, 5).is_some());
        assert!(cache.get(&cut, 9).is_none() && !cache.blob(&cut).exists());
    }
}
