//! Sandboxes whose record this build cannot read: a newer release wrote it, or it is damaged.
//!
//! They cost nobody a machine: what runs, runs on with its network and its limits, holds its capacity as far as its record
//! says what that is, is listed, and can be killed. Nothing else can be done to them, and nobody enforces their deadline,
//! until a build that reads the record is started. One that was paused keeps its snapshot. Written: nothing but the end of
//! one, as of any other machine; a crash leaves the record, which the next start finds.

use std::sync::Arc;

use kelvin_api::id::{SandboxId, VmId};
use kelvin_api::sandbox::{SandboxState, StartPath, UnreadableRecord};
use kelvin_api::units::{DiskMib, MemoryMib, Shape};
use kelvin_host::ledger::Body;
use kelvin_host::process::{Process, ProcessKey};
use kelvin_node_api::Live;
use kelvin_vmm::MachineSpec;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::Inner;
use crate::capacity::Amount;
use crate::error::Error;

/// What is known of a shape that cannot be read.
pub const NO_SHAPE: Shape = Shape { vcpus: 0, memory_mib: MemoryMib(0), disk_mib: DiskMib(0) };

/// One of them.
pub struct Unreadable {
    /// Under which the ledger has its record.
    owner: VmId,
    /// What runs; none of one that is paused.
    machine: Option<(MachineSpec, ProcessKey)>,
    /// What can be told of it, when its record says which sandbox it is.
    live: Option<Live>,
    why: String,
}

/// A field of a record, when it is there and is what it is now.
fn field<T: DeserializeOwned>(record: &Value, name: &str) -> Option<T> {
    serde_json::from_value(record.get(name)?.clone()).ok()
}

/// What can be read of `body`, which as a whole cannot.
pub fn read_some(body: &Body, runs: bool) -> Option<Live> {
    let whole: Value = serde_json::from_str(&body.json).ok()?;
    let record = whole.get("sandbox")?;
    Some(Live {
        sandbox: field(record, "sandbox")?,
        ends_at: field(record, "ends_at").unwrap_or(jiff::Timestamp::MAX),
        shape: field(record, "shape").unwrap_or(NO_SHAPE),
        start_path: field(record, "start_path").unwrap_or(StartPath::Cold),
        started_at: field(record, "started_at").unwrap_or(jiff::Timestamp::UNIX_EPOCH),
        state: if runs { SandboxState::Running } else { SandboxState::Paused },
        generation: field(record, "generation").unwrap_or(0),
    })
}

impl Unreadable {
    fn amount(&self) -> Option<Amount> {
        self.machine.as_ref()?;
        self.live.as_ref().map(|live| Amount::machine(live.shape))
    }

    fn is(&self, id: &SandboxId) -> bool {
        self.live.as_ref().is_some_and(|live| live.sandbox == *id)
    }
}

impl Inner {
    /// Keeps what cannot be read, and says so. `machine`: what runs.
    pub fn keep_unreadable(
        &self,
        owner: VmId,
        body: &Body,
        why: String,
        machine: Option<(MachineSpec, ProcessKey)>,
    ) {
        let live = read_some(body, machine.is_some());
        let sandbox = live.as_ref().map(|live| live.sandbox.to_string()).unwrap_or_default();
        tracing::error!(machine = %owner, sandbox, why, "a record cannot be read: what it names is kept as it is");
        let unreadable = Unreadable { owner: owner.clone(), machine, live, why };
        if let Some(amount) = unreadable.amount() {
            self.capacity().take(amount);
        }
        self.unreadable().insert(owner, unreadable);
    }

    /// Whether `id` is one of them.
    pub fn is_unreadable(&self, id: &SandboxId) -> bool {
        self.unreadable().values().any(|unreadable| unreadable.is(id))
    }

    /// Those that say which sandbox they are.
    pub fn unreadable_live(&self) -> Vec<Live> {
        self.unreadable().values().filter_map(|unreadable| unreadable.live.clone()).collect()
    }

    /// All of them, for people.
    pub fn unreadable_records(&self) -> Vec<UnreadableRecord> {
        let record = |unreadable: &Unreadable| UnreadableRecord {
            machine: unreadable.owner.to_string(),
            sandbox_id: unreadable.live.as_ref().map(|live| live.sandbox.to_string()),
            pid: unreadable.machine.as_ref().map(|(_, key)| key.pid),
            reason: unreadable.why.clone(),
        };
        self.unreadable().values().map(record).collect()
    }

    /// Ends the one called `id`. It is not visible any more when this returns; its machine is released after that.
    ///
    /// # Errors
    /// `Unknown` when somebody else has ended it, `Ledger` when what is paused is still recorded; then it is still there.
    pub async fn end_unreadable(self: &Arc<Self>, id: &SandboxId) -> Result<(), Error> {
        let unknown = || Error::Unknown(id.to_string());
        let taken = {
            let mut all = self.unreadable();
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
        let mut gone = Vec::new();
        self.unreadable().retain(|_, unreadable| {
            match unreadable.machine.take_if(|(_, key)| is_gone(*key)) {
                Some(machine) => {
                    gone.push((unreadable.owner.clone(), machine, unreadable.live.take()));
                    false
                }
                None => true,
            }
        });
        for (owner, machine, live) in gone {
            let taken = Unreadable { owner, machine: Some(machine), live, why: String::new() };
            // Only what is paused can fail.
            let _ = self.end_taken(taken, "its VMM ended").await;
        }
    }

    async fn end_taken(self: &Arc<Self>, taken: Unreadable, reason: &str) -> Result<(), Error> {
        if taken.machine.is_none() {
            match self.allocator.ledger.strike_record(&taken.owner).await {
                Ok(_) => {}
                Err(error) => {
                    self.unreadable().insert(taken.owner.clone(), taken);
                    return Err(error.into());
                }
            }
        }
        if let Some(live) = &taken.live {
            self.changes.add(live.sandbox.clone(), reason);
        }
        let amount = taken.amount();
        if let Some((spec, key)) = taken.machine {
            self.begin_teardown();
            let inner = Arc::clone(self);
            self.tasks.spawn(async move {
                inner.allocator.release_or_log(&spec, Some(key)).await;
                if let Some(amount) = amount {
                    inner.capacity().release(amount);
                }
                inner.end_teardown();
            });
        }
        if self.unreadable().is_empty() {
            // Nothing may need what nobody names any more.
            self.snapshots.sweep();
        }
        Ok(())
    }
}
