//! What goes over the seam. Resources of the public API are those of `kelvin-api`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use kelvin_api::account::Project;
use kelvin_api::error::Failure;
use kelvin_api::id::{SandboxId, SnapshotId, TemplateName, TemplateVersion, Token};
use kelvin_api::import::ImportProgress;
use kelvin_api::network::Wanted;
use kelvin_api::phase::Timings;
use kelvin_api::sandbox::{Capture, EnvVars, Lifecycle, SandboxState, SnapshotInfo, StartPath};
use kelvin_api::units::{MemoryMib, Shape};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// Make one sandbox. The id is the idempotency key between control and node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Create {
    /// Chosen by the control plane and recorded there before.
    pub sandbox: SandboxId,
    /// Whose it is: projects take turns where creates have to wait.
    pub project: Project,
    /// What it starts as.
    pub base: Base,
    /// Instead of the template's.
    pub vcpus: Option<u32>,
    /// Instead of the template's.
    pub memory_mib: Option<MemoryMib>,
    /// Environment of its processes.
    pub env_vars: EnvVars,
    /// What callers of the agent must show.
    pub access_token: Option<Token>,
    /// When the node ends it, whatever else happens. Counts on boot time from when the node is asked: a wall clock that
    /// is set afterwards changes what is shown, not when it ends.
    pub ends_at: jiff::Timestamp,
    /// Insist on a path.
    pub start_path: Option<StartPath>,
    /// Measure [`kelvin_api::phase::Phase::Tcp`] too.
    pub probe_tcp: bool,
    /// Its network.
    pub network: Wanted,
    /// What happens without being asked for.
    pub lifecycle: Lifecycle,
    /// How long it lives when traffic resumes it.
    pub timeout: Duration,
}

/// What a sandbox starts as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Base {
    /// A machine of a version of a template.
    Template(TemplateVersion),
    /// What a sandbox was when a snapshot was taken.
    Snapshot(SnapshotId),
}

/// What a create starts from, and what it would take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// What it is.
    pub base: Base,
    /// Of a machine of it, unless the request says another.
    pub shape: Shape,
}

/// One child of a fork.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Child {
    /// Chosen by the control plane and recorded there before.
    pub sandbox: SandboxId,
    /// Whose it is.
    pub project: Project,
    /// What callers of its agent must show.
    pub access_token: Option<Token>,
    /// What callers of its ports must show, where the source's are private.
    pub traffic_token: Option<Token>,
    /// Over the source's environment.
    pub env_vars: EnvVars,
    /// When the node ends it.
    pub ends_at: jiff::Timestamp,
    /// How long it lives when traffic resumes it.
    pub timeout: Duration,
}

/// How a fork went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Forked {
    /// For the source.
    pub capture: Capture,
    /// How long each phase lasted, up to the children's own.
    pub timings: Timings,
    /// For each child.
    pub children: Vec<Result<Created, Failure>>,
}

/// A line of a sandbox's console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleLine {
    /// When it was first read: a console has no clock.
    pub at: jiff::Timestamp,
    /// Its text, without its end and without control characters.
    pub text: String,
}

/// A sandbox that is ready: its agent answered after activation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Created {
    /// Which path it took.
    pub start_path: StartPath,
    /// Why that one.
    pub reason: String,
    /// How long each phase lasted on the node.
    pub timings: Timings,
    /// What it got.
    pub shape: Shape,
    /// When it was ready.
    pub started_at: jiff::Timestamp,
}

/// A sandbox on the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Live {
    /// Which one.
    pub sandbox: SandboxId,
    /// When the node ends it, by the wall clock as it is now.
    pub ends_at: jiff::Timestamp,
    /// What it has.
    pub shape: Shape,
    /// How it started.
    pub start_path: StartPath,
    /// When it was ready.
    pub started_at: jiff::Timestamp,
    /// Whether it runs.
    pub state: SandboxState,
    /// How often it was paused. With `state`, it tells which of two of these is newer.
    pub generation: u64,
}

impl Live {
    /// Grows with every pause and every resume.
    pub fn rank(&self) -> u64 {
        self.generation * 2 + u64::from(self.state == SandboxState::Running)
    }
}

/// What happened on the node since a generation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// To ask with the next time.
    pub generation: u64,
    /// Sandboxes that ended, and why.
    pub ended: BTreeMap<SandboxId, String>,
    /// Sandboxes that were paused or resumed, as they are now.
    pub changed: BTreeMap<SandboxId, Live>,
    /// The generation was too old: compare with [`Live`] instead.
    pub resync: bool,
}

/// A sandbox that was paused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Paused {
    /// What it cost.
    pub capture: Capture,
    /// How long each phase lasted.
    pub timings: Timings,
}

/// A snapshot that was taken of a sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Taken {
    /// What it is.
    pub snapshot: SnapshotInfo,
    /// What it cost the sandbox.
    pub capture: Capture,
    /// How long each phase lasted.
    pub timings: Timings,
}

/// Make sure that a snapshot of a template exists in a shape.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bake {
    /// Which version of which template.
    pub template: TemplateVersion,
    /// Instead of the template's.
    pub vcpus: Option<u32>,
    /// Instead of the template's.
    pub memory_mib: Option<MemoryMib>,
    /// VMMs to keep waiting for this shape, instead of the node's default.
    pub waiting_vmms: Option<u32>,
    /// Whether the machine has a network; true where the node has one.
    pub network: Option<bool>,
}

/// Make a template of files on the node's machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Import {
    /// Its name; a template of that name is replaced.
    pub template: TemplateName,
    /// Absolute path of the root file system. Regular files all three: no link is followed to one.
    pub rootfs: PathBuf,
    /// Absolute path of the kernel.
    pub kernel: PathBuf,
    /// Absolute path of the initial RAM disk.
    pub initrd: PathBuf,
    /// Of machines that ask for no other.
    pub vcpus: u32,
    /// Of machines that ask for no other.
    pub memory_mib: MemoryMib,
}

/// Where an import says how far it is: none before it begins. Who reads it may be slow, or gone.
pub type ImportTold = watch::Sender<Option<ImportProgress>>;

/// What a collection removed, or would remove.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Garbage {
    /// By id. As texts: what has no id that means something is garbage too.
    pub snapshots: Vec<String>,
    /// By digest.
    pub images: Vec<String>,
    /// By digest.
    pub guests: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_node_is_asked_comes_back_whole() {
        let create = Create {
            sandbox: SandboxId::random(),
            project: Project::default(),
            base: Base::Template("base".parse().unwrap()),
            vcpus: None,
            memory_mib: Some(MemoryMib(128)),
            env_vars: EnvVars::from([("A".to_owned(), "1".to_owned())]),
            access_token: Some(Token::random()),
            ends_at: jiff::Timestamp::UNIX_EPOCH,
            start_path: Some(StartPath::Clone),
            probe_tcp: false,
            network: Wanted::Usual(kelvin_api::network::Attachment::default()),
            lifecycle: Lifecycle::default(),
            timeout: Duration::from_millis(1500),
        };
        let text = serde_json::to_string(&create).unwrap();
        assert_eq!(serde_json::from_str::<Create>(&text).unwrap(), create);
        let failure = Failure::new(kelvin_api::error::ErrorCode::CapacityExhausted, "full", "wait");
        let forked =
            Forked { capture: Capture::default(), timings: Timings::default(), children: vec![Err(failure)] };
        let text = serde_json::to_string(&forked).unwrap();
        assert_eq!(serde_json::from_str::<Forked>(&text).unwrap(), forked);
    }
}
