//! The control plane: the public API and the database of intent.
//!
//! Read in this order: [`Control`], `api` (the routes), `service` (what they do), `database` (what is
//! remembered). It never links a node: [`Node`] is what it needs of one, and the binary joins the two.
//!
//! What changes something runs on a task of its own to its end, whoever leaves: its owner and its entry in the audit log are
//! written before its effect is there (`audit`, `once`, `changes`).
//!
//! Who writes: `kelvin.db` alone. A crash leaves rows in state `creating`; the next start asks the node
//! which of them exist, keeps those and forgets the others, so that a retry with the same idempotency key
//! gives exactly one sandbox.

mod accounts;
mod api;
mod audit;
mod auth;
mod catalog;
mod changes;
mod database;
mod lifecycle;
mod list;
mod logs;
mod meter;
mod metrics;
mod network;
mod once;
mod openapi;
mod people;
mod reply;
mod service;

use async_trait::async_trait;
use kelvin_api::error::Failure;
use kelvin_api::id::{SandboxId, SnapshotId, TemplateName};
use kelvin_api::network::{NetworkState, Policy};
use kelvin_api::node::{Changes, Child, ConsoleLine, Create, Created, Forked, Live, Source};
use kelvin_api::phase::Timings;
use kelvin_api::sandbox::{
    BakeTemplate, Capture, GuestMetrics, NodeInfo, PauseMode, PoolInfo, SetPool, SnapshotInfo,
    SnapshotVerification, Template,
};

pub use auth::ApiKey;
pub use reply::reply;
pub use service::{Control, Permit, WeakControl, unknown_template};

/// What the control plane asks of a node.
#[async_trait]
pub trait Node: Send + Sync + 'static {
    /// Makes a sandbox; when it returns, the agent has answered.
    async fn create(&self, request: Create) -> Result<Created, Failure>;
    /// Ends a sandbox.
    async fn kill(&self, id: &SandboxId) -> Result<(), Failure>;
    /// Sets when the node ends a sandbox.
    async fn set_deadline(&self, id: &SandboxId, ends_at: jiff::Timestamp) -> Result<(), Failure>;
    /// Replaces what a sandbox may reach.
    async fn set_policy(&self, id: &SandboxId, policy: Policy) -> Result<(), Failure>;
    /// What a sandbox may reach and what it was refused.
    async fn network(&self, id: &SandboxId) -> Result<NetworkState, Failure>;
    /// What a running sandbox's guest says that it uses.
    async fn metrics(&self, id: &SandboxId) -> Result<GuestMetrics, Failure>;
    /// The last of a sandbox's console.
    async fn console(&self, id: &SandboxId) -> Result<Vec<ConsoleLine>, Failure>;
    /// What a `templateID` names: a template, or a snapshot that is kept, by id.
    async fn source(&self, text: &str) -> Result<Source, Failure>;
    /// Freezes a sandbox; with `healthy`, only when its agent answers.
    async fn pause(
        &self,
        id: &SandboxId,
        mode: PauseMode,
        healthy: bool,
    ) -> Result<(Capture, Timings), Failure>;
    /// Lets a paused sandbox go on, or boot from its disk.
    async fn resume(
        &self,
        id: &SandboxId,
        ends_at: Option<jiff::Timestamp>,
        mode: PauseMode,
    ) -> Result<Created, Failure>;
    /// Takes a snapshot that is kept, with the id `snapshot`.
    async fn snapshot(
        &self,
        id: &SandboxId,
        snapshot: SnapshotId,
        name: Option<TemplateName>,
        mode: PauseMode,
    ) -> Result<(SnapshotInfo, Capture, Timings), Failure>;
    /// Makes children of one instant of a sandbox.
    async fn fork(&self, source: &SandboxId, children: Vec<Child>) -> Result<Forked, Failure>;
    /// The snapshots that are kept, newest first.
    async fn snapshots(&self) -> Result<Vec<SnapshotInfo>, Failure>;
    /// Deletes the kept snapshot with this id, and with `cascade` those that descend from it.
    async fn remove_snapshot(&self, text: &str, cascade: bool) -> Result<(), Failure>;
    /// Reads all of a kept snapshot and says of each file whether it is what it was.
    async fn verify_snapshot(&self, text: &str) -> Result<SnapshotVerification, Failure>;
    /// Every pool of machines that wait.
    async fn pools(&self) -> Result<Vec<PoolInfo>, Failure>;
    /// Sets what is wanted of the warm machines of a template.
    async fn set_pool(&self, template: &TemplateName, wanted: SetPool) -> Result<(), Failure>;
    /// One sandbox as it is now.
    async fn one(&self, id: &SandboxId) -> Result<Option<Live>, Failure>;
    /// Every sandbox, running or paused.
    async fn live(&self) -> Result<Vec<Live>, Failure>;
    /// What ended after a generation; waits until something did.
    async fn changes(&self, generation: u64) -> Result<Changes, Failure>;
    /// Every template.
    async fn templates(&self) -> Result<Vec<Template>, Failure>;
    /// Makes sure that a snapshot exists; returns its id.
    async fn bake(&self, template: &TemplateName, request: BakeTemplate) -> Result<String, Failure>;
    /// What runs and what is left.
    async fn info(&self) -> Result<NodeInfo, Failure>;
    /// Removes what nothing needs, or says what that would be.
    async fn collect(&self, dry_run: bool) -> Result<serde_json::Value, Failure>;
}
