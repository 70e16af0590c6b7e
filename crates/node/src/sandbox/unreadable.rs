//! Sandboxes whose record this build cannot read: a newer release wrote it, or it is damaged.
//!
//! They cost nobody a machine: what runs, runs on with its network and its limits, holds its capacity as far as its record
//! says what that is, is listed, and can be killed. Nothing else can be done to them, and nobody enforces their deadline,
//! until a build that reads the record is started. One that was paused keeps its snapshot. Written: nothing but the end of
//! one, as of any other machine; a crash leaves the record, which the next start finds.

use kelvin_api::id::{SandboxId, SnapshotId, VmId};
use kelvin_api::sandbox::{SandboxState, StartPath};
use kelvin_api::units::{DiskMib, MemoryMib, Shape};
use kelvin_host::ledger::Body;
use kelvin_host::process::ProcessKey;
use kelvin_node_api::Live;
use kelvin_vmm::MachineSpec;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::capacity::Hold;
use crate::snapshots::Lease;

/// What is known of a shape that cannot be read.
pub const NO_SHAPE: Shape = Shape { vcpus: 0, memory_mib: MemoryMib(0), disk_mib: DiskMib(0) };

/// One of them.
pub struct Unreadable {
    /// Under which the ledger has its record.
    pub owner: VmId,
    /// What runs; none of one that is paused.
    pub machine: Option<(MachineSpec, ProcessKey)>,
    /// What can be told of it, when its record says which sandbox it is.
    pub live: Option<Live>,
    /// What its machine holds, as far as that is known.
    pub hold: Option<Hold>,
    /// Why it cannot be read.
    pub why: String,
    /// Keeps what it runs from or is frozen in, when its record says so much.
    pub lease: Option<Lease>,
}

/// A field of a record, when it is there and is what it is now.
fn field<T: DeserializeOwned>(record: &Value, name: &str) -> Option<T> {
    serde_json::from_value(record.get(name)?.clone()).ok()
}

/// What can be read of `body`, which as a whole cannot: what it is, and its snapshot.
pub fn read_some(body: &Body, runs: bool) -> Option<(Live, Option<SnapshotId>)> {
    let whole: Value = serde_json::from_str(&body.json).ok()?;
    let record = whole.get("sandbox")?;
    let live = Live {
        sandbox: field(record, "sandbox")?,
        ends_at: field(record, "ends_at").unwrap_or(jiff::Timestamp::MAX),
        shape: field(record, "shape").unwrap_or(NO_SHAPE),
        start_path: field(record, "start_path").unwrap_or(StartPath::Cold),
        started_at: field(record, "started_at").unwrap_or(jiff::Timestamp::UNIX_EPOCH),
        state: if runs { SandboxState::Running } else { SandboxState::Paused },
        generation: field(record, "generation").unwrap_or(0),
    };
    Some((live, field(record, "snapshot")))
}

impl Unreadable {
    /// Whether it says that it is `id`.
    pub fn is(&self, id: &SandboxId) -> bool {
        self.live.as_ref().is_some_and(|live| live.sandbox == *id)
    }
}
