//! What every implementation keeps to: one function for each promise, run against each of them by [`keeps_its_promises`].

mod catalog;
mod keys;
mod sandboxes;

pub(crate) use catalog::*;
pub(crate) use keys::*;
pub(crate) use sandboxes::*;

use std::collections::BTreeMap;

use jiff::SignedDuration;
use kelvin_api::account::{AuditEntry, Limits, Project};
use kelvin_api::id::SandboxId;
use kelvin_api::sandbox::{Lifecycle, SandboxState, StartPath};
use kelvin_api::units::{DiskMib, MemoryMib, Shape};
use kelvin_host::clock::{Clock, Simulated};
use kelvin_node_api::Live;

use super::{Begun, Database, Filter, NewKey, Quota, SandboxRow};
use crate::placement::Placement;

/// An implementation, with data of its own that is empty at first.
pub(crate) trait Subject {
    /// Opens what is there; after all that opened it before is dropped.
    fn open(&self, clock: Clock) -> Database;
}

/// A test for each promise. `$subject`: makes a [`Subject`].
macro_rules! keeps_its_promises {
    ($subject:expr => $($promise:ident)*) => {
        $(
            #[tokio::test(start_paused = true)]
            async fn $promise() {
                crate::database::suite::$promise(&$subject).await;
            }
        )*
    };
    ($subject:expr) => {
        keeps_its_promises! { $subject =>
            what_is_begun_is_seen_once_it_is_committed
            what_is_undone_leaves_no_key_and_what_has_ended_does
            what_exceeds_a_limit_is_not_written
            the_newer_state_of_a_sandbox_stays
            a_row_is_changed_by_its_own_node_alone
            lists_are_narrowed_ordered_and_continued
            what_is_resumed_or_paused_counts_as_both
            a_key_gives_its_answer_until_it_is_forgotten
            a_key_is_one_requests_whoever_asks_first
            what_is_cached_of_keys_and_limits_learns_of_each_change
            a_wall_clock_that_jumps_and_a_restart_end_no_key_early_or_late
            after_a_reboot_keys_are_as_old_as_the_wall_clock_and_the_boot_say
            api_keys_and_limits_are_there_until_they_are_removed
            a_name_is_the_newest_snapshots
            snapshots_are_their_nodes
            tags_move_and_go_together
            measurements_are_of_sandboxes_that_are_there
            the_audit_log_is_read_backwards
            what_was_written_is_there_for_the_next_server
        }
    };
}
pub(crate) use keeps_its_promises;

const HOUR: SignedDuration = SignedDuration::from_hours(1);

fn blue() -> Project {
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

async fn make(database: &Database, row: &SandboxRow, state: SandboxState) {
    begin(database, row).await;
    let live = Live { started_at: row.started_at, ..live(&row.id, state, 0) };
    database.commit(&row.placement, &live, None, None).await.unwrap();
}

fn entry(action: &str) -> AuditEntry {
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

fn open(subject: &impl Subject) -> Database {
    subject.open(Simulated::start().clock())
}

async fn all(database: &Database) -> Vec<SandboxRow> {
    database.list(Filter { limit: 1000, ascending: true, ..Filter::default() }).await.unwrap()
}

fn new(key: &str) -> NewKey {
    NewKey { key: key.into(), fingerprint: "f".into(), subjects: Vec::new() }
}
