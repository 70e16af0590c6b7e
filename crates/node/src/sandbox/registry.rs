//! The sandboxes of a node, by what is known of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kelvin_api::id::{SandboxId, VmId};

use crate::sandbox::handle::Sandbox;
use crate::sandbox::paused::Paused;
use crate::sandbox::unreadable::Unreadable;

/// A cheap handle. Locks are held for a few instructions, never across a wait.
#[derive(Clone, Default)]
pub struct Sandboxes(Arc<Books>);

#[derive(Default)]
struct Books {
    running: Mutex<BTreeMap<SandboxId, Arc<Sandbox>>>,
    paused: Mutex<BTreeMap<SandboxId, Arc<Paused>>>,
    unreadable: Mutex<BTreeMap<VmId, Unreadable>>,
    creating: Mutex<BTreeSet<SandboxId>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sandboxes {
    /// Those that run.
    pub fn running(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Arc<Sandbox>>> {
        lock(&self.0.running)
    }

    /// Those that are paused.
    pub fn paused(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Arc<Paused>>> {
        lock(&self.0.paused)
    }

    /// Those whose record cannot be read, by the machine that the ledger has it for.
    pub fn unreadable(&self) -> MutexGuard<'_, BTreeMap<VmId, Unreadable>> {
        lock(&self.0.unreadable)
    }

    /// Those that are being created or resumed.
    pub fn creating(&self) -> MutexGuard<'_, BTreeSet<SandboxId>> {
        lock(&self.0.creating)
    }
}
