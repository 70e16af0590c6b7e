//! What the control plane asks of a node, and what it gets back.
//!
//! One process calls these directly; between processes they become a protobuf service with the same
//! names (see `docs/decisions/0003-one-process-and-its-seams.md`).

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::account::Project;
use crate::error::Failure;
use crate::id::{SandboxId, SnapshotId, TemplateName, Token};
use crate::network::Wanted;
use crate::phase::Timings;
use crate::sandbox::{Capture, EnvVars, Lifecycle, SandboxState, StartPath};
use crate::units::{MemoryMib, Shape};

/// Make one sandbox. The id is the idempotency key between control and node.
#[derive(Debug, Clone)]
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
    /// Measure [`crate::phase::Phase::Tcp`] too.
    pub probe_tcp: bool,
    /// Its network.
    pub network: Wanted,
    /// What happens without being asked for.
    pub lifecycle: Lifecycle,
    /// How long it lives when traffic resumes it.
    pub timeout: Duration,
}

/// What a sandbox starts as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Base {
    /// A machine of a template.
    Template(TemplateName),
    /// What a sandbox was when a snapshot was taken.
    Snapshot(SnapshotId),
}

/// What a create starts from, and what it would take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// What it is.
    pub base: Base,
    /// Of a machine of it, unless the request says another.
    pub shape: Shape,
}

/// One child of a fork.
#[derive(Debug, Clone)]
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
#[derive(Debug)]
pub struct Forked {
    /// For the source.
    pub capture: Capture,
    /// How long each phase lasted, up to the children's own.
    pub timings: Timings,
    /// For each child.
    pub children: Vec<Result<Created, Failure>>,
}

/// What a gateway has to know of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// What callers of its agent, and of its ports as raw streams, must show.
    pub access_token: Option<Token>,
    /// What callers of its ports must show.
    pub traffic_token: Option<Token>,
    /// The `Host` that its servers see.
    pub mask_request_host: Option<String>,
}

/// A line of a sandbox's console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleLine {
    /// When it was first read: a console has no clock.
    pub at: jiff::Timestamp,
    /// Its text, without its end and without control characters.
    pub text: String,
}

/// Inside the I/O error of a connection that was cut because its sandbox went away: it was paused, or it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the sandbox was paused or has ended")]
pub struct Cut;

/// A sandbox that is ready: its agent answered after activation.
#[derive(Debug, Clone)]
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
#[derive(Debug, Clone, Default, PartialEq, Eq)]
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
