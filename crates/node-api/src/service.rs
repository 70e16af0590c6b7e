//! What the control plane asks of a node.

use async_trait::async_trait;
use kelvin_api::account::Project;
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::{BuildId, FilesHash, SandboxId, SnapshotId, TemplateName, TemplateVersion};
use kelvin_api::network::{NetworkState, Policy};
use kelvin_api::sandbox::{
    GuestMetrics, NodeInfo, PauseMode, PoolInfo, SetPool, SnapshotInfo, SnapshotVerification, Template,
};

use crate::{
    Bake, Build, BuildFailure, BuildTold, Built, Changes, Child, ConsoleLine, Create, Created, FilesContent,
    Forked, Garbage, Import, ImportTold, Live, Paused, Source, Taken,
};

/// A node, as the control plane sees it. What is begun goes on to its end, also when the caller goes away.
///
/// A failure of a method says why in its code; `SandboxNotFound` when the sandbox is not on this node, `NodeStopping` when the
/// node takes nothing new.
#[async_trait]
pub trait NodeService: Send + Sync + 'static {
    /// Makes a sandbox; when it returns, the agent has answered. On a failure nothing of it is left.
    async fn create(&self, request: Create) -> Result<Created, Failure>;
    /// Ends a sandbox, running or paused.
    async fn kill(&self, id: &SandboxId) -> Result<(), Failure>;
    /// Sets when the node ends a sandbox that runs.
    async fn set_deadline(&self, id: &SandboxId, ends_at: jiff::Timestamp) -> Result<(), Failure>;
    /// Replaces what a sandbox may reach.
    async fn set_policy(&self, id: &SandboxId, policy: Policy) -> Result<(), Failure>;
    /// What a sandbox may reach and what it was refused.
    async fn network(&self, id: &SandboxId) -> Result<NetworkState, Failure>;
    /// What a running sandbox's guest says that it uses.
    async fn metrics(&self, id: &SandboxId) -> Result<GuestMetrics, Failure>;
    /// The last of a sandbox's console.
    async fn console(&self, id: &SandboxId) -> Result<Vec<ConsoleLine>, Failure>;
    /// What `text` names: a version of a template as it is written, or a snapshot that is kept by id. None for neither.
    async fn source(&self, text: &str) -> Result<Option<Source>, Failure>;
    /// Freezes a sandbox; with `healthy`, only when its agent answers.
    async fn pause(&self, id: &SandboxId, mode: PauseMode, healthy: bool) -> Result<Paused, Failure>;
    /// Lets a paused sandbox go on, or boot from its disk, until `ends_at` or for as long as its owner asked for at last.
    /// `SandboxRunning` when somebody else has just resumed it.
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
    ) -> Result<Taken, Failure>;
    /// Makes children of one instant of a sandbox.
    async fn fork(&self, source: &SandboxId, children: Vec<Child>) -> Result<Forked, Failure>;
    /// The snapshots that are kept, newest first.
    async fn snapshots(&self) -> Result<Vec<SnapshotInfo>, Failure>;
    /// Deletes a kept snapshot, and with `cascade` those that descend from it.
    async fn remove_snapshot(&self, id: &SnapshotId, cascade: bool) -> Result<(), Failure>;
    /// Reads all of a kept snapshot and says of each file whether it is what it was.
    async fn verify_snapshot(&self, id: &SnapshotId) -> Result<SnapshotVerification, Failure>;
    /// Every pool of machines that wait.
    async fn pools(&self) -> Result<Vec<PoolInfo>, Failure>;
    /// Sets what is wanted of the warm machines of a template.
    async fn set_pool(&self, template: &TemplateName, wanted: SetPool) -> Result<(), Failure>;
    /// One sandbox as it is now.
    async fn one(&self, id: &SandboxId) -> Result<Option<Live>, Failure>;
    /// Every sandbox, running or paused.
    async fn live(&self) -> Result<Vec<Live>, Failure>;
    /// What happened after `generation`; waits until something did.
    async fn changes(&self, generation: u64) -> Result<Changes, Failure>;
    /// Every version of every template, each as a template that has this one. Tags are not the node's.
    async fn templates(&self) -> Result<Vec<Template>, Failure>;
    /// Makes a template of files on the node's machine, and says in `told` how far it is. `TemplateImporting` when one of that
    /// name is being made. A create finds it as soon as this returns; on a failure the template is what it was.
    async fn import(&self, request: Import, told: ImportTold) -> Result<Template, Failure>;
    /// Makes sure that a snapshot exists; returns its id.
    async fn bake(&self, request: Bake) -> Result<SnapshotId, Failure>;
    /// Makes a version of a template of an image and of steps over it, and says in `told` how that goes. It goes on when nobody
    /// reads that. The later of two builds of a name wins: the former fails with `BuildSuperseded`. Other versions stay what they
    /// are.
    async fn build(&self, request: Build, told: BuildTold) -> Result<Built, BuildFailure> {
        let _ = (request, told);
        Err(no_builds().into())
    }
    /// Gives a build up; returns when nothing of it runs any more. One that is not under way is `BuildNotFound`, and is given up
    /// where it comes later: the two requests may overtake each other.
    async fn cancel_build(&self, build: &BuildId) -> Result<(), Failure> {
        let _ = build;
        Err(no_builds())
    }
    /// Whether `project` has uploaded the files `hash`, and they are still there.
    async fn has_files(&self, project: &Project, hash: &FilesHash) -> Result<bool, Failure> {
        let _ = (project, hash);
        Err(no_builds())
    }
    /// Keeps an upload of `project`, a tar, plain or gzip, under `hash`, once it has come whole. One that is there is
    /// replaced: the hash is of the files and not of the archive, so it is not checked.
    async fn put_files(
        &self,
        project: &Project,
        hash: &FilesHash,
        content: FilesContent,
    ) -> Result<(), Failure> {
        let _ = (project, hash, content);
        Err(no_builds())
    }
    /// Removes a version of a template: no create finds it. What was made of it stays: sandboxes, paused ones and kept
    /// snapshots. `TemplateNotFound` when it is not here.
    async fn remove_template(&self, version: &TemplateVersion) -> Result<(), Failure> {
        let _ = version;
        Err(no_builds())
    }
    /// Says which version of a template most creates will ask for: machines wait for it alone. Until that is said after a start,
    /// they wait for the newest. `TemplateNotFound` when it is not here.
    async fn prefer_template(&self, version: &TemplateVersion) -> Result<(), Failure> {
        let _ = version;
        Err(no_builds())
    }
    /// What runs and what is left.
    async fn info(&self) -> Result<NodeInfo, Failure>;
    /// Removes what nothing needs, or says what that would be.
    async fn collect(&self, dry_run: bool) -> Result<Garbage, Failure>;
}

/// Of a node that was built without builds.
fn no_builds() -> Failure {
    Failure::new(ErrorCode::BuildUnsupported, "this node makes no builds", "ask a node that does")
}
