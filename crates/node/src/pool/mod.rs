//! VMMs that wait: started ahead of time for one snapshot, with their disk, ready to load.
//!
//! One filler for each pool builds one VMM at a time, and only while no create is under way (or for at
//! most [`PATIENCE`]): preparing never takes a processor from a request. A waiting VMM is a machine like
//! any other to the ledger; the next start reaps those of a daemon that died.

pub mod policy;
pub mod warm;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kelvin_api::id::SnapshotId;
use kelvin_host::descriptors::{Budget, MACHINE};
use kelvin_store::snapshot::Snapshot;
use kelvin_vmm::Waiting;
use kelvin_vmm::control::Control;
use tokio::sync::Notify;

use crate::Inner;
use crate::capacity::Amount;
use crate::error::Error;
use crate::machine::resources::MachineResources;
use crate::networks::Networks;
use crate::pool::warm::Warm;

/// How long a filler lets requests go first.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// How long a filler waits after a failure: the cause is outside, and there is no event to wait for.
pub const RETRY: Duration = Duration::from_secs(5);

/// A VMM that waits, with everything a clone needs.
pub struct Ready {
    /// Its resources.
    pub home: MachineResources,
    /// The VMM.
    pub waiting: Waiting,
    /// Its guest's control port.
    pub control: Control,
}

/// The VMMs that wait for one snapshot.
pub struct Pool {
    /// What they will load.
    pub snapshot: Arc<Snapshot>,
    target: AtomicU32,
    ready: Mutex<VecDeque<Ready>>,
    /// Why the snapshot is not used any more.
    refused: Mutex<Option<String>>,
    wake: Notify,
    /// Machines that are further: see `warm`.
    pub(crate) warm: Mutex<Warm>,
}

impl Pool {
    /// An empty pool; [`fill`] has to run for it.
    pub fn new(snapshot: Arc<Snapshot>, target: u32) -> Self {
        Self {
            snapshot,
            target: AtomicU32::new(target),
            ready: Mutex::default(),
            refused: Mutex::default(),
            wake: Notify::new(),
            warm: Mutex::default(),
        }
    }

    fn ready(&self) -> std::sync::MutexGuard<'_, VecDeque<Ready>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a VMM that is still alive; those that died meanwhile are returned to be released.
    pub fn take(&self) -> (Option<Ready>, Vec<Ready>) {
        let mut dead = Vec::new();
        let mut ready = self.ready();
        let taken = loop {
            match ready.pop_front() {
                Some(candidate) if candidate.waiting.is_over() => dead.push(candidate),
                other => break other,
            }
        };
        drop(ready);
        self.wake.notify_one();
        (taken, dead)
    }

    /// How many wait.
    pub fn count(&self) -> u32 {
        u32::try_from(self.ready().len()).unwrap_or(u32::MAX)
    }

    /// Whether as many wait as should.
    pub fn is_full(&self) -> bool {
        self.refusal().is_some() || self.count() >= self.target.load(Ordering::Relaxed)
    }

    /// Sets how many should wait.
    pub fn set_target(&self, target: u32) {
        self.target.store(target, Ordering::Relaxed);
        self.wake.notify_one();
    }

    /// Stops using the snapshot; its files are kept for whoever wants to know.
    pub fn refuse(&self, reason: String) {
        tracing::error!(snapshot = %self.snapshot.manifest.id, reason, "snapshot refused");
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
        self.wake.notify_one();
    }

    /// Why the snapshot is not used, if so.
    pub fn refusal(&self) -> Option<String> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Everything that waits, to be released.
    pub fn drain(&self) -> Vec<Ready> {
        self.ready().drain(..).collect()
    }

    /// The snapshot's id.
    pub fn snapshot_id(&self) -> SnapshotId {
        self.snapshot.manifest.id.clone()
    }
}

impl Inner {
    /// Starts one VMM for `pool`'s snapshot and connects its guest's control port.
    pub async fn prepare(&self, pool: &Pool) -> Result<Ready, Error> {
        let manifest = &pool.snapshot.manifest;
        let network = self.has_network(&manifest.identity);
        let disk = pool.snapshot.file("disk");
        let home = self.allocator.build(manifest_shape(manifest), &manifest.guest, disk, network).await?;
        let memory = std::path::Path::new("snapshots").join(manifest.id.as_str()).join("memory");
        let made = async {
            let waiting = self.driver.prepare(&home.spec, &memory).await?;
            home.started(&self.allocator, waiting.key()).await?;
            let control = waiting.control().await?;
            Ok::<_, Error>((waiting, control))
        };
        match made.await {
            Ok((waiting, control)) => Ok(Ready { home, waiting, control }),
            Err(error) => {
                self.allocator.release_or_log(&home.spec, None).await;
                Err(error)
            }
        }
    }
}

/// The shape that a snapshot was taken in.
pub fn manifest_shape(manifest: &kelvin_store::snapshot::Manifest) -> kelvin_api::units::Shape {
    kelvin_api::units::Shape {
        vcpus: manifest.identity.vcpus,
        memory_mib: kelvin_api::units::MemoryMib(manifest.identity.memory_mib),
        disk_mib: kelvin_api::units::DiskMib(manifest.identity.disk_mib),
    }
}

/// Keeps `pool` full until the node stops. What is being prepared then is finished first, so that
/// [`crate::Node::stop`] can release it.
pub async fn fill(inner: Arc<Inner>, pool: Arc<Pool>) {
    let stop = inner.stop.clone();
    while !stop.is_cancelled() {
        if pool.refusal().is_some() {
            for ready in pool.drain() {
                inner.discard(ready).await;
            }
        }
        if pool.is_full() {
            stop.run_until_cancelled(pool.wake.notified()).await;
            continue;
        }
        let _ = stop.run_until_cancelled(tokio::time::timeout(PATIENCE, inner.quiet())).await;
        if pool.is_full() || stop.is_cancelled() {
            continue;
        }
        let descriptors = Budget::of_process().take_spare(MACHINE).map_err(Error::from);
        let held = descriptors.and_then(|held| inner.capacity().hold(Amount::waiting()).map(|()| held));
        let prepared = match held {
            Ok(_descriptors) => inner.prepare(&pool).await,
            Err(error) => Err(error),
        };
        match prepared {
            Ok(ready) => {
                pool.ready().push_back(ready);
                inner.settled.notify_waiters();
            }
            Err(error) => {
                if !matches!(error, Error::Exhausted { .. } | Error::Descriptors(_)) {
                    inner.capacity().release(Amount::waiting());
                }
                tracing::warn!(error = kelvin_api::error::chain(&error), "no VMM could be prepared");
                let _ = stop.run_until_cancelled(tokio::time::timeout(RETRY, pool.wake.notified())).await;
            }
        }
    }
}

/// Keeps network slots ready until the node stops, as [`fill`] does for VMMs.
pub async fn fill_slots(inner: Arc<Inner>, networks: Arc<Networks>) {
    let stop = inner.stop.clone();
    let slots = &networks.slots;
    while !stop.is_cancelled() {
        if slots.is_full() {
            stop.run_until_cancelled(slots.taken()).await;
            continue;
        }
        let _ = stop.run_until_cancelled(tokio::time::timeout(PATIENCE, inner.quiet())).await;
        if slots.is_full() || stop.is_cancelled() {
            continue;
        }
        match slots.add().await {
            Ok(()) => inner.settled.notify_waiters(),
            Err(error) => {
                tracing::warn!(error = kelvin_api::error::chain(&error), "no network slot could be prepared");
                let _ = stop.run_until_cancelled(tokio::time::timeout(RETRY, slots.taken())).await;
            }
        }
    }
}

impl Inner {
    /// Ends a waiting VMM and releases what it has.
    pub async fn discard(&self, ready: Ready) {
        let key = ready.waiting.key();
        self.allocator.release_or_log(&ready.home.spec, Some(key)).await;
        self.capacity().release(Amount::waiting());
    }
}
