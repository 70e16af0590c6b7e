//! What the promises are tried with.

use std::collections::BTreeMap;

use jiff::SignedDuration;
use kelvin_api::account::{AuditEntry, Limits, Project};
use kelvin_api::id::SandboxId;
use kelvin_api::sandbox::{Lifecycle, SandboxState, StartPath};
use kelvin_api::units::{DiskMib, MemoryMib, Shape};
use kelvin_host::clock::{Clock, Simulated};
use kelvin_node_api::Live;

use crate::database::{Begun, Database, Filter, NewKey, Quota, SandboxRow};
use crate::placement::Placement;

/// An implementation, with data of its own that is empty at first.
pub(crate) trait Subject {
    /// Opens what is there; after all that opened it before is dropped.
    fn open(&self, clock: Clock) -> Database;
}

pub(crate) const HOUR: SignedDuration = SignedDuration::from_hours(1);

pub(crate) fn blue() -> Project {
    "blue".parse().unwrap()
}

/// Of the key `ci` of the project `blue`.
pub(crate) fn quota(of_key: Limits, of_project: Limits) -> Quota {
    Quota { key: "ci".into(), of_key, project: blue(), of_project }
}

/// A row of a sandbox whose time is over by the wall clock: whether it is, its node says.
pub(crate) fn row(placement: &Placement) -> SandboxRow {
    let at = jiff::Timestamp::from_millisecond(jiff::Timestamp::now().as_millisecond()).unwrap();
    SandboxRow {
        id: SandboxId::random(),
        template: "base".into(),
        metadata: BTreeMap::new(),
        access_token: None,
        allow_internet: None,
        traffic_token: None,
        vcpus: 1,
        memory_mib: 128,
        disk_mib: 64,
        start_path: StartPath::Clone,
        started_at: at,
        ends_at: at - HOUR,
        state: SandboxState::Running,
        lifecycle: Lifecycle::default(),
        parent: None,
        project: blue(),
        key: "ci".into(),
        placement: placement.clone(),
    }
}

/// What its node says of the sandbox `id`.
pub(crate) fn live(id: &SandboxId, state: SandboxState, generation: u64) -> Live {
    let at = jiff::Timestamp::from_millisecond(jiff::Timestamp::now().as_millisecond()).unwrap();
    Live {
        sandbox: id.clone(),
        ends_at: at - HOUR,
        shape: Shape { vcpus: 1, memory_mib: MemoryMib(128), disk_mib: DiskMib(64) },
        start_path: StartPath::Clone,
        started_at: at,
        state,
        generation,
    }
}

/// Records the intent to make `row`, with an idempotency key of the same name.
pub(crate) async fn begin(database: &Database, row: &SandboxRow) {
    let subjects = vec![row.id.to_string()];
    let key = NewKey { key: row.id.to_string(), fingerprint: "f".into(), subjects };
    let begun = database.begin(std::slice::from_ref(row), Some(key), None, None).await.unwrap();
    assert!(matches!(begun, Begun::Done(None)));
}

pub(crate) async fn make(database: &Database, row: &SandboxRow, state: SandboxState) {
    begin(database, row).await;
    let live = Live { started_at: row.started_at, ..live(&row.id, state, 0) };
    database.commit(&row.placement, &live, None, None).await.unwrap();
}

pub(crate) fn entry(action: &str) -> AuditEntry {
    AuditEntry {
        id: 0,
        at: jiff::Timestamp::UNIX_EPOCH,
        project: "blue".into(),
        key_id: "ci".into(),
        action: action.into(),
        target: String::new(),
        status: 0,
    }
}

pub(crate) fn open(subject: &impl Subject) -> Database {
    subject.open(Simulated::start().clock())
}

pub(crate) async fn all(database: &Database) -> Vec<SandboxRow> {
    database.list(Filter { limit: 1000, ascending: true, ..Filter::default() }).await.unwrap()
}

pub(crate) fn new(key: &str) -> NewKey {
    NewKey { key: key.into(), fingerprint: "f".into(), subjects: Vec::new() }
}
