//! Keeping and ending sandboxes that have no task: those that are paused, and those whose record cannot be read.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kelvin_api::id::{SandboxId, VmId};
use kelvin_api::sandbox::UnreadableRecord;
use kelvin_host::ledger::Body;
use kelvin_host::process::{Process, ProcessKey};
use kelvin_node_api::Live;
use kelvin_vmm::MachineSpec;

use crate::capacity::Amount;
use crate::error::Error;
use crate::sandbox::unreadable::{Unreadable, read_some};
use crate::state::Inner;

impl Inner {
    /// Ends a sandbox that is paused, also one that is being resumed. Nothing is waited for but who ends it already: whether it ended or was
    /// resumed is decided by who takes its record out of the ledger. A resume that comes too late finds none, and one that
    /// waits for a silent guest gives up: its machine is released.
    ///
    /// # Errors
    /// `Unknown` when it was resumed or ended meanwhile, `Ledger`.
    pub async fn end_paused(&self, id: &SandboxId) -> Result<(), Error> {
        let unknown = || Error::Unknown(id.to_string());
        let paused = self.paused(id).ok_or_else(unknown)?;
        let _ending = paused.ending.lock().await;
        if paused.over.load(Ordering::Acquire) || !self.allocator.ledger.strike_record(&paused.owner).await? {
            // A resume that has taken the record is about to be seen.
            drop(paused.gate.lock().await);
            return Err(unknown());
        }
        paused.over.store(true, Ordering::Release);
        paused.killed.send_replace(true);
        self.sandboxes.paused().remove(id);
        self.changes.add(id.clone(), "it was killed while it was paused");
        Ok(())
    }

    /// Keeps what cannot be read, and says so. `machine`: what runs.
    pub fn keep_unreadable(
        &self,
        owner: VmId,
        body: &Body,
        why: String,
        machine: Option<(MachineSpec, ProcessKey)>,
    ) {
        let (live, snapshot) = read_some(body, machine.is_some()).unzip();
        let lease = snapshot.flatten().and_then(|id| self.snapshots.lease(&id));
        let sandbox = live.as_ref().map(|live| live.sandbox.to_string()).unwrap_or_default();
        tracing::error!(machine = %owner, sandbox, why, "a record cannot be read: what it names is kept as it is");
        let running = live.as_ref().filter(|_| machine.is_some());
        let hold = running.map(|live| self.capacity.take(Amount::machine(live.shape)));
        let unreadable = Unreadable { owner: owner.clone(), machine, live, hold, why, lease };
        self.sandboxes.unreadable().insert(owner, unreadable);
    }

    /// Whether `id` is one of them.
    pub fn is_unreadable(&self, id: &SandboxId) -> bool {
        self.sandboxes.unreadable().values().any(|unreadable| unreadable.is(id))
    }

    /// Those that say which sandbox they are.
    pub fn unreadable_live(&self) -> Vec<Live> {
        self.sandboxes.unreadable().values().filter_map(|unreadable| unreadable.live.clone()).collect()
    }

    /// All of them, for people.
    pub fn unreadable_records(&self) -> Vec<UnreadableRecord> {
        let record = |unreadable: &Unreadable| UnreadableRecord {
            machine: unreadable.owner.to_string(),
            sandbox_id: unreadable.live.as_ref().map(|live| live.sandbox.to_string()),
            pid: unreadable.machine.as_ref().map(|(_, key)| key.pid),
            reason: unreadable.why.clone(),
        };
        self.sandboxes.unreadable().values().map(record).collect()
    }

    /// Ends the one called `id`. It is not visible any more when this returns; its machine is released after that.
    ///
    /// # Errors
    /// `Unknown` when somebody else has ended it, `Ledger` when what is paused is still recorded; then it is still there.
    pub async fn end_unreadable(self: &Arc<Self>, id: &SandboxId) -> Result<(), Error> {
        let unknown = || Error::Unknown(id.to_string());
        let taken = {
            let mut all = self.sandboxes.unreadable();
            let owner = all.values().find(|unreadable| unreadable.is(id)).map(|found| found.owner.clone());
            owner.and_then(|owner| all.remove(&owner)).ok_or_else(unknown)?
        };
        self.end_taken(taken, "it was killed").await
    }

    /// Ends those whose VMM has ended.
    pub async fn reap_unreadable(self: &Arc<Self>) {
        let is_gone = |key: ProcessKey| {
            Process::adopt(key).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
        };
        let gone = {
            let mut all = self.sandboxes.unreadable();
            let has_ended = |one: &Unreadable| one.machine.as_ref().is_some_and(|(_, key)| is_gone(*key));
            let (gone, rest): (BTreeMap<_, _>, _) =
                std::mem::take(&mut *all).into_iter().partition(|(_, one)| has_ended(one));
            *all = rest;
            gone
        };
        for taken in gone.into_values() {
            // Only what is paused can fail.
            let _ = self.end_taken(taken, "its VMM ended").await;
        }
    }

    async fn end_taken(self: &Arc<Self>, taken: Unreadable, reason: &str) -> Result<(), Error> {
        if taken.machine.is_none() {
            match self.allocator.ledger.strike_record(&taken.owner).await {
                Ok(_) => {}
                Err(error) => {
                    self.sandboxes.unreadable().insert(taken.owner.clone(), taken);
                    return Err(error.into());
                }
            }
        }
        if let Some(live) = &taken.live {
            self.changes.add(live.sandbox.clone(), reason);
        }
        let hold = taken.hold;
        if let Some((spec, key)) = taken.machine {
            let teardown = self.activity.teardown();
            let (inner, lease) = (Arc::clone(self), taken.lease);
            self.tasks.spawn(async move {
                inner.allocator.release_or_log(&spec, Some(key)).await;
                // Its machine has mapped it until now.
                drop(lease);
                drop(hold);
                drop(teardown);
            });
        }
        if self.sandboxes.unreadable().is_empty() {
            // Nothing may need what nobody names any more.
            self.snapshots.sweep();
        }
        Ok(())
    }
}
