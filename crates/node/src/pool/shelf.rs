//! What is ready for one snapshot: VMMs that wait, and machines that are further.
//!
//! Who puts something there is `filler` and `warm`; who takes it, `start`. Locks are held for a few instructions.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kelvin_api::id::SnapshotId;
use kelvin_store::snapshot::Snapshot;
use kelvin_vmm::control::Control;
use kelvin_vmm::{Paused, Waiting};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::capacity::Hold;
use crate::machine::resources::MachineResources;
use crate::pool::policy::{Demand, Rule};
use crate::snapshots::Lease;

/// A VMM that waits, with everything a clone needs.
pub struct Ready {
    /// Its resources.
    pub home: MachineResources,
    /// The VMM.
    pub waiting: Waiting,
    /// Its guest's control port.
    pub control: Control,
    /// What it holds; none of one that is made for a machine that holds it already.
    pub hold: Option<Hold>,
}

/// The VMMs that wait for one snapshot.
pub struct Pool {
    /// What they will load.
    pub snapshot: Arc<Snapshot>,
    target: AtomicU32,
    ready: Mutex<VecDeque<Ready>>,
    /// Why the snapshot is not used any more.
    refused: Mutex<Option<String>>,
    pub wake: Notify,
    /// Machines that are further: see [`Warm`].
    warm: Mutex<Warm>,
}

impl Pool {
    /// An empty pool; `filler` keeps it full.
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

    pub fn ready(&self) -> MutexGuard<'_, VecDeque<Ready>> {
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

    /// Takes those that died while they waited, to be released; others are prepared for them.
    pub fn take_dead(&self) -> VecDeque<Ready> {
        let mut ready = self.ready();
        let (dead, alive) = std::mem::take(&mut *ready).into_iter().partition(|one| one.waiting.is_over());
        *ready = alive;
        drop(ready);
        let dead: VecDeque<Ready> = dead;
        if !dead.is_empty() {
            self.wake.notify_one();
        }
        dead
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

    /// Sets how many should wait where none should.
    pub fn set_target_if_none(&self, target: u32) {
        if self.target.compare_exchange(0, target, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.wake.notify_one();
        }
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

    /// What waits beyond the target, or for a snapshot that is not used any more, to be released.
    pub fn excess(&self) -> Vec<Ready> {
        let target = if self.refusal().is_some() { 0 } else { self.target.load(Ordering::Relaxed) };
        let mut ready = self.ready();
        let kept = usize::try_from(target).unwrap_or(usize::MAX).min(ready.len());
        ready.drain(kept..).collect()
    }

    /// The snapshot's id.
    pub fn snapshot_id(&self) -> SnapshotId {
        self.snapshot.manifest.id.clone()
    }
}

/// A machine that waits for a claim.
pub struct Parked {
    /// Its resources.
    pub home: MachineResources,
    /// Its VMM, vCPUs stopped.
    pub paused: Paused,
    /// Its guest's control port.
    pub control: Control,
    /// Keeps its snapshot.
    pub lease: Option<Lease>,
    /// The hardware address of its link.
    pub mac: Option<[u8; 6]>,
    /// What it holds.
    pub hold: Hold,
    /// Since when it has waited.
    pub since: Instant,
}

/// What a pool knows of its warm machines.
pub struct Warm {
    pub parked: VecDeque<Parked>,
    pub demand: Demand,
    /// How many there should be; `None` until that was looked at, and nobody knows what a new pool lacks.
    pub target: Option<u32>,
    pub filling: bool,
    pub hits: u64,
    pub misses: u64,
    pub wasted: u64,
    /// When the next try is worth it, after one that failed.
    pub not_before: Option<Instant>,
}

impl Default for Warm {
    fn default() -> Self {
        Self {
            parked: VecDeque::new(),
            demand: Demand::new(Instant::now()),
            target: None,
            filling: false,
            hits: 0,
            misses: 0,
            wasted: 0,
            not_before: None,
        }
    }
}

impl Pool {
    pub fn warm(&self) -> MutexGuard<'_, Warm> {
        self.warm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the newest machine that is alive: it is the likeliest to be in the host's caches. Those that died are
    /// returned to be released.
    pub fn take_warm(&self) -> (Option<Parked>, Vec<Parked>) {
        let mut dead = Vec::new();
        let mut warm = self.warm();
        loop {
            match warm.parked.pop_back() {
                Some(candidate) if candidate.paused.is_over() => {
                    warm.wasted += 1;
                    dead.push(candidate);
                }
                taken => return (taken, dead),
            }
        }
    }

    /// Notes that somebody wanted a machine, and whether one was there.
    pub fn wanted(&self, hit: bool) {
        let mut warm = self.warm();
        warm.demand.arrive(Instant::now());
        if hit { warm.hits += 1 } else { warm.misses += 1 }
    }

    /// Notes that a machine was taken that did not answer.
    pub fn spoilt(&self) {
        self.warm().wasted += 1;
    }

    /// How many are parked.
    pub fn parked(&self) -> u32 {
        u32::try_from(self.warm().parked.len()).unwrap_or(u32::MAX)
    }

    /// Whether it is known how many there should be, there are as many, and none is on its way.
    pub fn is_warm(&self) -> bool {
        let warm = self.warm();
        !warm.filling
            && warm
                .target
                .is_some_and(|target| u32::try_from(warm.parked.len()).is_ok_and(|parked| parked >= target))
    }

    /// Everything that is parked, to be released.
    pub fn drain_warm(&self) -> Vec<Parked> {
        let mut warm = self.warm();
        warm.target = Some(0);
        warm.parked.drain(..).collect()
    }

    /// Takes out what is too old, dead or too much.
    pub fn surplus(&self, rule: Rule) -> Vec<Parked> {
        let mut warm = self.warm();
        let oldest = Duration::from_secs(rule.max_age_s);
        let (mut gone, mut kept) = (Vec::new(), VecDeque::new());
        for parked in std::mem::take(&mut warm.parked) {
            if parked.paused.is_over() || parked.since.elapsed() > oldest {
                gone.push(parked);
            } else {
                kept.push_back(parked);
            }
        }
        while u32::try_from(kept.len()).is_ok_and(|count| count > warm.target.unwrap_or(0)) {
            gone.extend(kept.pop_front());
        }
        warm.parked = kept;
        warm.wasted += gone.len() as u64;
        gone
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
