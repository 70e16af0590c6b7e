//! Blobs by their digest and the repository that they were pulled from, on the disk of the host.
//!
//! ```text
//!   blobs/<key>   whole, verified when it was written, published by rename
//!   parts/<key>   the beginning of one; goes on where it ended, and is verified as a whole
//! ```
//!
//! A digest is no secret, and a manifest may name any: were the digest alone the key, a registry of a tenant could have layers
//! of another's private image taken out of the cache, put a false beginning into `parts` of an image that all use, or hold the
//! turn to pull it. Who was given a manifest by a repository may have that repository's blobs, and no others: [`key`].
//!
//! This process alone writes here. A crash leaves parts, and perhaps a blob whose content did not reach the disk: the first go
//! on or are removed at the next start when they are a day old, the second is found by its length, or by the digest of
//! the archive in it, when it is read. More than the cap is removed, least recently used first, and never what is in use. Of
//! parts that nobody writes a fourth of the cap is kept, the youngest, for a day.

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
    /// Held by each [`Pinned`] of this file, and by none of one that was here before.
    pins: Arc<()>,
}

impl Blob {
    fn is_pinned(&self) -> bool {
        Arc::strong_count(&self.pins) > 1
    }
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
    key: Digest,
    /// Until it is dropped.
    pin: Option<Arc<()>>,
}

impl Pinned {
    /// Opens it.
    pub(crate) fn open(&self) -> Result<File, Error> {
        File::open(self.cache.blob(&self.key)).map_err(|error| Error::io("opening a cached blob", error))
    }

    /// Takes it out of the cache: it is not what its name says.
    pub(crate) fn forget(&self) {
        let mut state = self.cache.state();
        let is_this = |blob: &Blob| self.pin.as_ref().is_some_and(|pin| Arc::ptr_eq(pin, &blob.pins));
        // Another pull may have replaced it already.
        if state.blobs.get(&self.key).is_some_and(is_this) {
            state.blobs.remove(&self.key);
            let _ = fs::remove_file(self.cache.blob(&self.key));
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let mut state = self.cache.state();
        self.pin = None;
        self.cache.evict(&mut state);
    }
}

/// One process wide turn to fetch a blob.
pub(crate) type Flight = tokio::sync::OwnedMutexGuard<()>;

/// What the cache calls the blob `digest` of `repository`, which is named with its registry.
pub(crate) fn key(repository: &str, digest: &Digest) -> Digest {
    Digest::of(format!("{repository}\n{digest}").as_bytes())
}

impl Cache {
    /// Opens the cache in `directory`, which is made when it is missing. More than `cap` bytes of blobs are not kept.
    pub(crate) fn open(directory: &Path, cap: u64) -> io::Result<Arc<Self>> {
        let (blobs, parts) = (directory.join("blobs"), directory.join("parts"));
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
            if entry.file_name().to_str().and_then(Digest::from_hex).is_none() || !entry.metadata()?.is_file()
            {
                remove(&entry.path())?;
            }
        }
        found.sort();
        let mut state = State::default();
        for (_, digest, bytes) in found {
            state.clock += 1;
            state.blobs.insert(digest, Blob { bytes, used: state.clock, pins: Arc::default() });
        }
        let cache = Self { blobs, parts, cap, state: Mutex::new(State::default()) };
        cache.evict(&mut state);
        *cache.state() = state;
        cache.trim_parts()?;
        Ok(Arc::new(cache))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn blob(&self, key: &Digest) -> PathBuf {
        self.blobs.join(key.hex())
    }

    /// Where the beginning of the blob is written. Only who has its [`Flight`] may.
    pub(crate) fn part(&self, key: &Digest) -> PathBuf {
        self.parts.join(key.hex())
    }

    /// The blob, when it is there and has `bytes` bytes.
    pub(crate) fn get(self: &Arc<Self>, key: &Digest, bytes: u64) -> Option<Pinned> {
        let mut state = self.state();
        state.clock += 1;
        let clock = state.clock;
        let blob = state.blobs.get_mut(key)?;
        let path = self.blob(key);
        let length = fs::metadata(&path).map(|about| about.len()).ok();
        if length != Some(bytes) || blob.bytes != bytes {
            // A crash has cut it, or somebody has taken it away.
            if !blob.is_pinned() {
                state.blobs.remove(key);
                let _ = fs::remove_file(&path);
            }
            return None;
        }
        blob.used = clock;
        let pin = Some(Arc::clone(&blob.pins));
        drop(state);
        // For the order at the next start.
        let _ = File::options().write(true).open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        Some(Pinned { cache: Arc::clone(self), key: key.clone(), pin })
    }

    /// Waits for the turn to fetch the blob; who comes after finds it there.
    pub(crate) async fn flight(&self, key: &Digest) -> Flight {
        let turn = {
            let mut state = self.state();
            state.flights.retain(|_, turn| turn.strong_count() > 0);
            match state.flights.get(key).and_then(Weak::upgrade) {
                Some(turn) => turn,
                None => {
                    let turn = Arc::new(tokio::sync::Mutex::new(()));
                    state.flights.insert(key.clone(), Arc::downgrade(&turn));
                    turn
                }
            }
        };
        turn.lock_owned().await
    }

    /// Makes the part, which is whole and verified, the blob.
    pub(crate) fn publish(self: &Arc<Self>, key: &Digest, bytes: u64) -> io::Result<Pinned> {
        let mut state = self.state();
        fs::rename(self.part(key), self.blob(key))?;
        state.clock += 1;
        let used = state.clock;
        // One that has been forgotten may be pinned still: those pins are of the old file.
        let pins = Arc::new(());
        let pin = Some(Arc::clone(&pins));
        state.blobs.insert(key.clone(), Blob { bytes, used, pins });
        self.evict(&mut state);
        Ok(Pinned { cache: Arc::clone(self), key: key.clone(), pin })
    }

    /// Removes parts that nobody writes: those of a day ago, and the oldest of more than there may be. Blocks.
    pub(crate) fn trim_parts(&self) -> io::Result<()> {
        // Under the lock nobody begins to write one.
        let state = self.state();
        let mut idle = Vec::new();
        for entry in fs::read_dir(&self.parts)? {
            let entry = entry?;
            let key = entry.file_name().to_str().and_then(Digest::from_hex);
            let is_written =
                |key: Digest| state.flights.get(&key).is_some_and(|turn| turn.strong_count() > 0);
            if !key.is_some_and(is_written) {
                let about = entry.metadata()?;
                idle.push((about.modified()?, about.len(), entry.path()));
            }
        }
        idle.sort();
        let (now, mut kept) = (SystemTime::now(), 0_u64);
        for (modified, bytes, path) in idle.into_iter().rev() {
            kept = kept.saturating_add(bytes);
            if kept > self.cap / 4 || now.duration_since(modified).unwrap_or_default() > PART_AGE {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    fn evict(&self, state: &mut State) {
        let mut sum: u64 = state.blobs.values().map(|blob| blob.bytes).sum();
        while sum > self.cap {
            let oldest = state
                .blobs
                .iter()
                .filter(|(_, blob)| !blob.is_pinned())
                .min_by_key(|(_, blob)| blob.used)
                .map(|(key, blob)| (key.clone(), blob.bytes));
            let Some((key, bytes)) = oldest else { return };
            if let Err(error) = fs::remove_file(self.blob(&key)) {
                tracing::warn!(%key, %error, "a cached blob cannot be removed");
            }
            state.blobs.remove(&key);
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
        let left = fs::read_dir(directory.path().join("blobs")).unwrap().count();
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
        fs::write(directory.path().join("blobs/odd"), b"x").unwrap();
        fs::create_dir(directory.path().join("parts/odd")).unwrap();
        File::options().write(true).open(cache.blob(&cut)).unwrap().set_len(3).unwrap();
        let cache = Cache::open(directory.path(), 1000).unwrap();
        assert!(young.exists() && !old.exists());
        assert_eq!(fs::read_dir(directory.path().join("parts")).unwrap().count(), 1);
        assert!(cache.get(&whole, 5).is_some());
        assert!(cache.get(&cut, 9).is_none() && !cache.blob(&cut).exists());
    }

    #[test]
    fn a_blob_that_came_anew_is_not_the_one_that_was_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path(), 5).unwrap();
        let (key, old) = put(&cache, &[1; 10]);
        let late = cache.get(&key, 10).unwrap();
        old.forget();
        let (_, fresh) = put(&cache, &[1; 10]);
        // Who still holds the old one neither lets the new one go nor removes it.
        drop(old);
        late.forget();
        drop(late);
        assert!(fresh.open().is_ok() && cache.get(&key, 10).is_some());
        drop(fresh);
        assert!(!cache.blob(&key).exists(), "more than the cap, and of no use to anybody");
    }

    #[tokio::test]
    async fn parts_that_nobody_writes_are_limited() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path(), 100).unwrap();
        let now = SystemTime::now();
        let part = |name: &str, age: u64| {
            let key = Digest::of(name.as_bytes());
            let path = cache.part(&key);
            fs::write(&path, [0; 10]).unwrap();
            let modified = now - Duration::from_secs(age);
            File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
            (key, path)
        };
        let (young, middle, old) = (part("young", 1).1, part("middle", 2).1, part("old", 3).1);
        let (key, written) = part("written", 4);
        let turn = cache.flight(&key).await;
        cache.trim_parts().unwrap();
        assert_eq!([&young, &middle, &old, &written].map(|path| path.exists()), [true, true, false, true]);
        drop(turn);
        cache.trim_parts().unwrap();
        assert_eq!([&young, &middle, &written].map(|path| path.exists()), [true, true, false]);
    }

    #[test]
    fn the_same_digest_of_another_repository_is_another_blob() {
        let digest = Digest::of(b"x");
        assert_eq!(key("a.example/b", &digest), key("a.example/b", &digest));
        assert_ne!(key("a.example/b", &digest), key("evil.example/b", &digest));
    }
}
