//! Sandboxes: intent before the node is asked, and what became of it.

use async_trait::async_trait;
use kelvin_api::account::{AuditEntry, Project};
use kelvin_api::id::{SandboxId, Token};
use kelvin_api::sandbox::{Lifecycle, Metadata, SandboxState, StartPath};
use kelvin_node_api::Live;

use super::{Ended, Error, Exceeded, NewKey, Quota};
use crate::placement::Placement;

/// One sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxRow {
    pub id: SandboxId,
    pub template: String,
    pub metadata: Metadata,
    pub access_token: Option<Token>,
    pub allow_internet: Option<bool>,
    pub traffic_token: Option<Token>,
    pub vcpus: u32,
    pub memory_mib: u32,
    pub disk_mib: u32,
    pub start_path: StartPath,
    pub started_at: jiff::Timestamp,
    pub ends_at: jiff::Timestamp,
    pub state: SandboxState,
    pub lifecycle: Lifecycle,
    pub parent: Option<SandboxId>,
    /// Whose it is.
    pub project: Project,
    /// Id of the key that made it.
    pub key: String,
    /// Who alone can change it, or say that it is gone.
    pub placement: Placement,
}

/// How a create, or a fork, began.
#[derive(Debug)]
pub enum Begun {
    /// Its rows are there; the audit log has this entry.
    Done(Option<i64>),
    /// There is no room, and nothing was written.
    Exceeded(Exceeded),
    /// Another request has the idempotency key, and nothing was written.
    KeyTaken,
}

/// What a list is narrowed by.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// None means all.
    pub project: Option<Project>,
    pub metadata: Metadata,
    pub template: Option<String>,
    /// None means all.
    pub state: Option<SandboxState>,
    pub started_after: Option<jiff::Timestamp>,
    pub ascending: bool,
    /// Begin behind this sandbox.
    pub after: Option<(i64, String)>,
    pub limit: usize,
}

/// How a sandbox was claimed for a resume.
#[derive(Debug, PartialEq, Eq)]
pub enum Claim {
    /// It counts as one that runs until [`Sandboxes::disclaim`].
    Held,
    /// It is not paused: nothing is held.
    NotPaused,
    /// There is no room.
    Exceeded(Exceeded),
}

/// What is written by a `Placement` leaves alone what is not its own.
#[async_trait]
pub trait Sandboxes: Send + Sync {
    /// Records the intent to make sandboxes, when `quota` has room for all of them, their idempotency key and the entry of
    /// the audit log, in one transaction.
    async fn begin(
        &self,
        rows: &[SandboxRow],
        key: Option<NewKey>,
        quota: Option<Quota>,
        audit: Option<AuditEntry>,
    ) -> Result<Begun, Error>;
    /// Makes a sandbox visible that `by` has, with the reply that its key gives from now on, and notes in the audit log that
    /// it was made. Fails when its row is another's by now.
    async fn commit(
        &self,
        by: &Placement,
        live: &Live,
        reply: Option<String>,
        ended: Option<Ended>,
    ) -> Result<(), Error>;
    /// Notes that a sandbox of `by` was paused or resumed, unless something newer is known. That it was paused, and whose it
    /// is, survives a power failure.
    async fn set_live(&self, by: &Placement, live: &Live) -> Result<(), Error>;
    /// Forgets a sandbox that `by` has not made, and its key: a retry starts afresh. Nothing when it is another's.
    async fn undo(&self, by: &Placement, id: &SandboxId) -> Result<(), Error>;
    /// Forgets a sandbox that has ended at `by`, for `reason`; its key stays, and with it the reply. Nothing when it is
    /// another's.
    async fn end(&self, by: &Placement, id: &SandboxId, reason: &str) -> Result<(), Error>;
    /// A sandbox that runs or is paused.
    async fn get(&self, id: &SandboxId) -> Result<Option<SandboxRow>, Error>;
    /// Sets when a sandbox ends.
    async fn set_deadline(&self, id: &SandboxId, ends_at: jiff::Timestamp) -> Result<(), Error>;
    /// Notes whether a sandbox may reach the internet.
    async fn set_internet(&self, id: &SandboxId, allowed: Option<bool>) -> Result<(), Error>;
    /// Sandboxes that run or are paused, by start time.
    async fn list(&self, filter: Filter) -> Result<Vec<SandboxRow>, Error>;
    /// When the first of the sandboxes ends that run with an API key.
    async fn first_end(&self, key: &str) -> Result<Option<jiff::Timestamp>, Error>;
    /// Ids of the sandboxes that were forked from `parent`.
    async fn children(&self, parent: &SandboxId) -> Result<Vec<SandboxId>, Error>;
    /// Forgets what of the sandboxes of `by` was claimed by a server before this one.
    async fn forget_claims(&self, by: &Placement) -> Result<(), Error>;
    /// Ids of all rows of `by`, with whether they are still being made. For start-up.
    async fn all(&self, by: &Placement) -> Result<Vec<(SandboxId, bool)>, Error>;
    /// Counts a paused sandbox as one that runs, when there is room, for as long as it is being resumed. A start forgets
    /// the claims of the server before it.
    async fn claim(&self, id: &SandboxId, quota: Option<Quota>) -> Result<Claim, Error>;
    /// Gives a claim back.
    async fn disclaim(&self, id: &SandboxId) -> Result<(), Error>;
    /// Counts a sandbox that runs as one that is paused, when there is room, until [`Sandboxes::end_pause`]. The limit that
    /// would be exceeded.
    async fn begin_pause(
        &self,
        id: &SandboxId,
        quota: Quota,
        memory_mib: u32,
    ) -> Result<Option<Exceeded>, Error>;
    /// The pause of a sandbox has ended, one way or the other, and its row says so.
    async fn end_pause(&self, id: &SandboxId) -> Result<(), Error>;
}
