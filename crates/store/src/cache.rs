//! Directories that are kept for as long as there is room: the newest of a key counts, the least recently used go first, none
//! that somebody holds.
//!
//! ```text
//! <place>/<key>-<time>/…      staged ──sync──> published (one rename) ──> older ones of its key go ──> trimmed to the cap
//! ```
//!
//! There is room for as much as the cap, and for less when the file system is full of other things: a cache is the first to go.
//!
//! Who writes: `layers` and `uploads`, through this. A crash leaves what is in `staging/`, or an older one of a key beside the
//! newer, which the next of that key removes. When one was used last is its directory's time. All calls block.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use crate::{Error, Store, io_error, names, publish, remove_withdrawn, withdraw};

/// How often each directory is held.
type Holds = Arc<Mutex<BTreeMap<PathBuf, u32>>>;

/// The directories of one place.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    store: Store,
    place: &'static str,
    cap_bytes: u64,
    free_bytes: u64,
    holds: Holds,
}

/// A directory that stays for as long as this lives.
#[derive(Debug)]
pub(crate) struct Held {
    pub directory: PathBuf,
    holds: Holds,
}

fn locked(holds: &Holds) -> MutexGuard<'_, BTreeMap<PathBuf, u32>> {
    holds.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut holds = locked(&self.holds);
        if let Some(count) = holds.get_mut(&self.directory) {
            *count -= 1;
            if *count == 0 {
                holds.remove(&self.directory);
            }
        }
    }
}

/// What a directory takes of the disk, with what other files share of it.
fn bytes_of(directory: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory)? {
        bytes += entry?.metadata()?.blocks() * 512;
    }
    Ok(bytes)
}

impl Cache {
    /// That of `place`, below the data directory: at most `cap_bytes`, and fewer when less than `free_bytes` of the file system
    /// is free beside them; and what is held.
    pub fn new(store: Store, place: &'static str, cap_bytes: u64, free_bytes: u64) -> Self {
        Self { store, place, cap_bytes, free_bytes, holds: Holds::default() }
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    fn root(&self) -> PathBuf {
        self.store.root().join(self.place)
    }

    /// Directories of `key`, the newest last.
    fn of_key(&self, key: &str) -> Result<Vec<PathBuf>, Error> {
        let root = self.root();
        let mut found: Vec<String> = names::<String>(&root)?;
        found.retain(|name| name.rsplit_once('-').is_some_and(|(of, _)| of == key));
        found.sort();
        Ok(found.into_iter().map(|name| root.join(name)).collect())
    }

    fn hold(&self, directory: PathBuf) -> Held {
        *locked(&self.holds).entry(directory.clone()).or_default() += 1;
        Held { directory, holds: Arc::clone(&self.holds) }
    }

    /// The newest of `key`, which counts as used now; none when there is none.
    ///
    /// # Errors
    /// `Io` when that cannot be told.
    pub fn find(&self, key: &str) -> Result<Option<Held>, Error> {
        for directory in self.of_key(key)?.into_iter().rev() {
            let held = self.hold(directory);
            // Removed between the two: held too late.
            match File::open(&held.directory) {
                Ok(open) => {
                    open.set_modified(SystemTime::now()).map_err(io_error("touching", &held.directory))?;
                    return Ok(Some(held));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(io_error("opening", &held.directory)(error)),
            }
        }
        Ok(None)
    }

    /// Publishes the directory `staged` as the newest of `key`, durably, and trims.
    ///
    /// # Errors
    /// `Io`; then `staged` is the caller's.
    pub fn put(&self, key: &str, staged: &Path) -> Result<Held, Error> {
        let older = self.of_key(key)?;
        let mut at = u64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(0);
        // The clock may have been set back.
        if let Some(last) = older.last().and_then(|path| path.file_name()?.to_str()?.rsplit_once('-')) {
            at = at.max(u64::from_str_radix(last.1, 16).unwrap_or(0).saturating_add(1));
        }
        let held = self.hold(self.root().join(format!("{key}-{at:016x}")));
        publish(staged, &held.directory, true)?;
        for directory in older {
            self.remove(&directory)?;
        }
        self.trim()?;
        Ok(held)
    }

    /// Removes a directory that nobody holds; whether it was.
    fn remove(&self, directory: &Path) -> Result<bool, Error> {
        let withdrawn = {
            let holds = locked(&self.holds);
            if holds.contains_key(directory) {
                return Ok(false);
            }
            withdraw(&self.store, directory)?
        };
        // Not under the lock, which tasks take: gigabytes take a while.
        remove_withdrawn(&withdrawn)?;
        Ok(true)
    }

    /// Whether the file system has less left than it should.
    fn is_short(&self) -> Result<bool, Error> {
        let root = self.store.root();
        let found = rustix::fs::statvfs(root)
            .map_err(|error| io_error("asking for free space", root)(error.into()))?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize) < self.free_bytes)
    }

    /// Removes what was used least recently until there is room for the rest.
    ///
    /// # Errors
    /// `Io`.
    pub fn trim(&self) -> Result<(), Error> {
        let root = self.root();
        let mut all = Vec::new();
        for name in names::<String>(&root)? {
            let path = root.join(name);
            let look = || io::Result::Ok((fs::metadata(&path)?.modified()?, bytes_of(&path)?));
            match look() {
                Ok((used, bytes)) => all.push((used, bytes, path)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(io_error("reading", &path)(error)),
            }
        }
        all.sort();
        let mut total: u64 = all.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in all {
            if total <= self.cap_bytes && !self.is_short()? {
                break;
            }
            if self.remove(&path)? {
                total -= bytes;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn cache(root: &Path, cap_bytes: u64) -> Cache {
        Cache::new(Store::open(root, true).unwrap(), "layers", cap_bytes, 0)
    }

    fn put(cache: &Cache, key: &str, content: &str) -> Held {
        let staged = cache.store.stage().unwrap();
        fs::write(staged.join("content"), content).unwrap();
        cache.put(key, &staged).unwrap()
    }

    fn content(held: &Held) -> String {
        fs::read_to_string(held.directory.join("content")).unwrap()
    }

    /// A file of a directory takes a block; so does every other.
    const BLOCK: usize = 4096;

    #[test]
    fn the_newest_of_a_key_counts_and_an_older_one_stays_while_it_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), u64::MAX);
        assert!(cache.find("a").unwrap().is_none());
        let old = put(&cache, "a", "old");
        drop(put(&cache, "a-b", "another key"));
        let new = put(&cache, "a", "new");
        assert_eq!((content(&old), content(&new)), ("old".into(), "new".into()));
        assert_eq!(content(&cache.find("a").unwrap().unwrap()), "new");
        drop((old, new));
        let newest = put(&cache, "a", "newest");
        assert_eq!(cache.of_key("a").unwrap(), std::slice::from_ref(&newest.directory));
        assert!(cache.find("a-b").unwrap().is_some() && cache.find("b").unwrap().is_none());
        assert_eq!(fs::read_dir(dir.path().join("staging")).unwrap().count(), 0);
    }

    #[test]
    fn a_full_file_system_is_no_place_for_what_nobody_holds() {
        let dir = tempfile::tempdir().unwrap();
        let full = Cache { free_bytes: u64::MAX, ..cache(dir.path(), u64::MAX) };
        let held = put(&full, "held", "x");
        drop(put(&full, "other", "x"));
        full.trim().unwrap();
        assert!(full.find("other").unwrap().is_none());
        assert_eq!(content(&held), "x");
        assert_eq!(fs::read_dir(dir.path().join("staging")).unwrap().count(), 0);
    }

    #[test]
    fn what_was_used_least_recently_goes_first_and_nothing_that_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), 3 * BLOCK as u64);
        let block = "x".repeat(BLOCK);
        let ages = |key: &str, seconds: u64| {
            let directory = cache.of_key(key).unwrap().remove(0);
            let then = SystemTime::now() - Duration::from_secs(seconds);
            File::open(directory).unwrap().set_modified(then).unwrap();
        };
        let held = put(&cache, "held", &block);
        drop(put(&cache, "old", &block));
        drop(put(&cache, "older", &block));
        for (key, seconds) in [("held", 300), ("older", 200), ("old", 100)] {
            ages(key, seconds);
        }
        // Used now: the other one is older.
        drop(cache.find("older").unwrap());
        drop(put(&cache, "new", &block));
        let there = |key: &str| !cache.of_key(key).unwrap().is_empty();
        assert_eq!([there("held"), there("older"), there("old"), there("new")], [true, true, false, true]);
        drop(held);
        ages("held", 300);
        drop(put(&cache, "newer", &block));
        assert_eq!([there("held"), there("older"), there("newer")], [false, true, true]);
    }
}
