//! The snapshots of this node and who needs them.
//!
//! ```text
//! published ──lease──> a machine maps its memory, or a sandbox is paused in it ──last lease dropped──┐
//!     kept, or a template's: stays          passing (a pause's, a fork's): pending deletion ──> removed <┘
//! ```
//!
//! Who writes: removals alone, through `kelvin-store`, by one task. A crash leaves passing snapshots that nobody
//! needs; the next start finds them without a lease and removes them. Leases outlive the daemon: its machines run on, and
//! once it stops ([`Snapshots::close`]) a lease that is dropped deletes nothing.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kelvin_api::error::chain;
use kelvin_api::id::SnapshotId;
use kelvin_api::phase::Timings;
use kelvin_api::sandbox::{Capture, PauseMode};
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
    pending_deletion: BTreeSet<SnapshotId>,
    /// The daemon stops: what is dropped from now on is dropped by the process, not by who held it.
    is_closed: bool,
}

/// A cheap handle.
#[derive(Debug, Clone, Default)]
pub struct Snapshots(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    books: Mutex<Books>,
    wake: Notify,
    /// Told of each snapshot that is made known.
    came: Notify,
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
        if books.is_closed {
            return;
        }
        let Some(known) = books.known.get_mut(&self.id) else { return };
        known.leases = known.leases.saturating_sub(1);
        if known.leases == 0 && known.snapshot.manifest.origin.is_passing() {
            books.known.remove(&self.id);
            books.pending_deletion.insert(self.id.clone());
            self.shared.wake.notify_one();
        }
    }
}

impl Snapshots {
    /// Makes a snapshot known.
    pub fn add(&self, snapshot: Arc<Snapshot>) {
        let id = snapshot.manifest.id.clone();
        self.0.books().known.entry(id).or_insert(Known { snapshot, leases: 0 });
        self.0.came.notify_waiters();
    }

    /// Resolves when the next snapshot is made known.
    pub fn came(&self) -> tokio::sync::futures::Notified<'_> {
        self.0.came.notified()
    }

    /// The same, with a lease.
    pub fn add_leased(&self, snapshot: Arc<Snapshot>) -> Lease {
        let id = snapshot.manifest.id.clone();
        self.0.books().known.entry(id.clone()).or_insert(Known { snapshot, leases: 0 }).leases += 1;
        self.0.came.notify_waiters();
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

    /// Marks passing snapshots for deletion that nobody has leased: after a start, when everybody has taken theirs.
    pub fn sweep(&self) {
        let mut books = self.0.books();
        let stray = |known: &Known| known.leases == 0 && known.snapshot.manifest.origin.is_passing();
        let pending_deletion: Vec<_> =
            books.known.iter().filter(|(_, known)| stray(known)).map(|(id, _)| id.clone()).collect();
        for id in pending_deletion {
            books.known.remove(&id);
            books.pending_deletion.insert(id);
        }
        self.0.wake.notify_one();
    }

    /// The daemon is about to stop: every lease that is held now outlives it. To be called before the tasks that hold
    /// some are told to end. What loses its last lease after this is found without one by the next start.
    pub fn close(&self) {
        self.0.books().is_closed = true;
    }

    /// Whether nothing waits to be removed.
    pub fn is_settled(&self) -> bool {
        self.0.books().pending_deletion.is_empty()
    }

    /// Removes what is pending deletion, each once.
    pub async fn reap(&self, store: &Store) {
        let pending_deletion = self.0.books().pending_deletion.clone();
        for id in pending_deletion {
            let (store, gone) = (store.clone(), id.clone());
            let removed = kelvin_host::blocking::spawn(move || store.discard_snapshot(&gone)).await;
            match removed {
                Ok(Ok(())) => drop(self.0.books().pending_deletion.remove(&id)),
                Ok(Err(error)) => {
                    tracing::error!(snapshot = %id, error = chain(&error), "not removed, the reaper tries again");
                }
                Err(error) => tracing::error!(snapshot = %id, %error, "not removed, the reaper tries again"),
            }
        }
    }

    /// Removes whatever becomes pending deletion, until `stop`; what is so then is still removed.
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

/// A snapshot that was taken.
pub struct Captured {
    /// It.
    pub snapshot: Arc<Snapshot>,
    /// Keeps it.
    pub _lease: Lease,
    /// What it cost its source.
    pub capture: Capture,
    /// The same by phase.
    pub timings: Timings,
}

/// What is wanted beside the snapshot.
#[derive(Debug, Clone, Copy, Default)]
pub struct CaptureOptions {
    /// The machine stays stopped when all went well: it is to be paused.
    pub stay: bool,
    /// Refuse when the guest's agent does not flush and freeze its file system.
    pub healthy: bool,
    /// What is kept.
    pub mode: PauseMode,
}

#[cfg(test)]
mod tests {
    use kelvin_api::id::SandboxId;
    use kelvin_store::identity::{Identity, SNAPSHOT_FORMAT};
    use kelvin_store::snapshot::{Draft, Durability};

    use super::*;

    fn publish(store: &Store, origin: Origin) -> Arc<Snapshot> {
        let staged = store.stage().unwrap();
        for name in kelvin_store::snapshot::files(PauseMode::Full) {
            std::fs::write(staged.join(name), name).unwrap();
        }
        let identity = Identity {
            image: "i".into(),
            guest_kernel: "k".into(),
            agent: "a".into(),
            vmm: "qemu".into(),
            vmm_build: "7.2".into(),
            accelerator: "tcg".into(),
            host_cpu: "c".into(),
            host_kernel: "6".into(),
            vcpus: 1,
            memory_mib: 256,
            disk_mib: 1024,
            devices: "d".into(),
            snapshot_format: SNAPSHOT_FORMAT,
            service: None,
        };
        let draft = Draft {
            id: SnapshotId::random(),
            template: "base".parse().unwrap(),
            guest: "g".into(),
            parent: None,
            origin,
            mode: PauseMode::Full,
            identity,
            arguments: Vec::new(),
        };
        Arc::new(store.publish_snapshot(&staged, draft, Durability::Ephemeral).unwrap())
    }

    #[tokio::test]
    async fn leases_outlive_a_daemon_that_stops() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), true).unwrap();
        let sandbox = SandboxId::random();
        let forked = publish(&store, Origin::Fork { sandbox: sandbox.clone() });
        let paused = publish(&store, Origin::Pause { sandbox: sandbox.clone(), generation: 1 });
        let over = publish(&store, Origin::Fork { sandbox });
        let snapshots = Snapshots::default();
        let held = [snapshots.add_leased(Arc::clone(&forked)), snapshots.add_leased(Arc::clone(&paused))];
        let last = snapshots.add_leased(Arc::clone(&over));
        let stop = CancellationToken::new();
        let removing = tokio::spawn(snapshots.clone().run(store.clone(), || (), stop.clone()));
        // Its sandbox has ended before the stop.
        drop(last);
        snapshots.close();
        stop.cancel();
        // The tasks of machines that run on.
        drop(held);
        tokio::time::timeout(std::time::Duration::from_secs(10), removing).await.unwrap().unwrap();
        assert!(forked.file("memory").exists() && paused.file("memory").exists());
        assert!(!over.directory.exists());
        // The next daemon removes what nobody has by then.
        let next = Snapshots::default();
        next.add(Arc::clone(&forked));
        let _kept = next.add_leased(Arc::clone(&paused));
        next.sweep();
        next.reap(&store).await;
        assert!(!forked.directory.exists() && paused.file("memory").exists());
    }
}
