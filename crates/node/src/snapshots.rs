//! The snapshots of this node and who needs them.
//!
//! ```text
//! published ──lease──> a machine maps its memory, or a sandbox is paused in it ──last lease dropped──┐
//!     kept, or a template's: stays                 passing (a pause's, a fork's): doomed ──> removed <┘
//! ```
//!
//! Who writes: removals alone, through `kelvin-store`, by one task. A crash leaves passing snapshots that nobody
//! needs; the next start finds them without a lease and removes them.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kelvin_api::error::chain;
use kelvin_api::id::SnapshotId;
use kelvin_store::Store;
use kelvin_store::snapshot::{Origin, Snapshot};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

#[derive(Debug)]
struct Known {
    snapshot: Arc<Snapshot>,
    leases: u32,
}

#[derive(Debug, Default)]
struct Books {
    known: HashMap<SnapshotId, Known>,
    doomed: BTreeSet<SnapshotId>,
}

/// A cheap handle.
#[derive(Debug, Clone, Default)]
pub struct Snapshots(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    books: Mutex<Books>,
    wake: Notify,
}

/// Keeps a snapshot's files. Dropping the last one of a passing snapshot tells the task that removes.
#[derive(Debug)]
pub struct Lease {
    shared: Arc<Shared>,
    id: SnapshotId,
}

impl Shared {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut books = self.shared.books();
        let Some(known) = books.known.get_mut(&self.id) else { return };
        known.leases = known.leases.saturating_sub(1);
        if known.leases == 0 && known.snapshot.manifest.origin.is_passing() {
            books.known.remove(&self.id);
            books.doomed.insert(self.id.clone());
            self.shared.wake.notify_one();
        }
    }
}

impl Snapshots {
    /// Makes a snapshot known.
    pub fn add(&self, snapshot: Arc<Snapshot>) {
        let id = snapshot.manifest.id.clone();
        self.0.books().known.entry(id).or_insert(Known { snapshot, leases: 0 });
    }

    /// The same, with a lease.
    pub fn add_leased(&self, snapshot: Arc<Snapshot>) -> Lease {
        let id = snapshot.manifest.id.clone();
        self.0.books().known.entry(id.clone()).or_insert(Known { snapshot, leases: 0 }).leases += 1;
        Lease { shared: Arc::clone(&self.0), id }
    }

    /// A lease, unless the snapshot is gone or about to go.
    pub fn lease(&self, id: &SnapshotId) -> Option<Lease> {
        self.0.books().known.get_mut(id)?.leases += 1;
        Some(Lease { shared: Arc::clone(&self.0), id: id.clone() })
    }

    /// The snapshot called `id`.
    pub fn get(&self, id: &SnapshotId) -> Option<Arc<Snapshot>> {
        self.0.books().known.get(id).map(|known| Arc::clone(&known.snapshot))
    }

    /// Those that users keep, newest first.
    pub fn kept(&self) -> Vec<Arc<Snapshot>> {
        let kept = |snapshot: &&Arc<Snapshot>| matches!(snapshot.manifest.origin, Origin::Kept { .. });
        let books = self.0.books();
        let mut found: Vec<_> =
            books.known.values().map(|known| &known.snapshot).filter(kept).cloned().collect();
        found.sort_by_key(|snapshot| std::cmp::Reverse(snapshot.manifest.created));
        found
    }

    /// Those that descend from `id`.
    pub fn children(&self, id: &SnapshotId) -> Vec<Arc<Snapshot>> {
        let books = self.0.books();
        let all = books.known.values().map(|known| &known.snapshot);
        all.filter(|snapshot| snapshot.manifest.parent.as_ref() == Some(id)).cloned().collect()
    }

    /// Those that something runs from or is paused in.
    pub fn leased(&self) -> BTreeSet<SnapshotId> {
        let books = self.0.books();
        books.known.iter().filter(|(_, known)| known.leases > 0).map(|(id, _)| id.clone()).collect()
    }

    /// Forgets a snapshot, when nothing runs from it; whether it was.
    pub fn forget(&self, id: &SnapshotId) -> bool {
        let mut books = self.0.books();
        match books.known.get(id) {
            Some(known) if known.leases > 0 => false,
            _ => {
                books.known.remove(id);
                true
            }
        }
    }

    /// Dooms passing snapshots that nobody has leased: after a start, when everybody has taken theirs.
    pub fn sweep(&self) {
        let mut books = self.0.books();
        let stray = |known: &Known| known.leases == 0 && known.snapshot.manifest.origin.is_passing();
        let doomed: Vec<_> =
            books.known.iter().filter(|(_, known)| stray(known)).map(|(id, _)| id.clone()).collect();
        for id in doomed {
            books.known.remove(&id);
            books.doomed.insert(id);
        }
        self.0.wake.notify_one();
    }

    /// Whether nothing waits to be removed.
    pub fn is_settled(&self) -> bool {
        self.0.books().doomed.is_empty()
    }

    /// Removes what is doomed, each once.
    pub async fn reap(&self, store: &Store) {
        let doomed = self.0.books().doomed.clone();
        for id in doomed {
            let (store, gone) = (store.clone(), id.clone());
            let removed = kelvin_host::blocking::spawn(move || store.discard_snapshot(&gone)).await;
            match removed {
                Ok(Ok(())) => drop(self.0.books().doomed.remove(&id)),
                Ok(Err(error)) => {
                    tracing::error!(snapshot = %id, error = chain(&error), "not removed, the reaper tries again");
                }
                Err(error) => tracing::error!(snapshot = %id, %error, "not removed, the reaper tries again"),
            }
        }
    }

    /// Removes whatever becomes doomed, until `stop`; what is doomed then is still removed.
    pub async fn run(self, store: Store, settled: impl Fn(), stop: CancellationToken) {
        loop {
            let stopping = stop.run_until_cancelled(self.0.wake.notified()).await.is_none();
            self.reap(&store).await;
            settled();
            if stopping {
                return;
            }
        }
    }
}
