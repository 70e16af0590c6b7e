//! What the control plane asks of a node, and what it gets back.
//!
//! One process calls these directly; between processes they become a protobuf service with the same
//! names (see `docs/decisions/0003-one-process-and-its-seams.md`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::id::{SandboxId, TemplateName, Token};
use crate::network::Wanted;
use crate::phase::Timings;
use crate::sandbox::{EnvVars, StartPath};
use crate::units::{MemoryMib, Shape};

/// Make one sandbox. The id is the idempotency key between control and node.
#[derive(Debug, Clone)]
pub struct Create {
    /// Chosen by the control plane and recorded there before.
    pub sandbox: SandboxId,
    /// Which template.
    pub template: TemplateName,
    /// Instead of the template's.
    pub vcpus: Option<u32>,
    /// Instead of the template's.
    pub memory_mib: Option<MemoryMib>,
    /// Environment of its processes.
    pub env_vars: EnvVars,
    /// What callers of the agent must show.
    pub access_token: Option<Token>,
    /// When the node ends it, whatever else happens.
    pub ends_at: jiff::Timestamp,
    /// Insist on a path.
    pub start_path: Option<StartPath>,
    /// Its network.
    pub network: Wanted,
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

/// A sandbox that runs on the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Live {
    /// Which one.
    pub sandbox: SandboxId,
    /// When the node ends it.
    pub ends_at: jiff::Timestamp,
    /// What it has.
    pub shape: Shape,
    /// How it started.
    pub start_path: StartPath,
    /// When it was ready.
    pub started_at: jiff::Timestamp,
}

/// What happened on the node since a generation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// To ask with the next time.
    pub generation: u64,
    /// Sandboxes that ended, and why.
    pub ended: BTreeMap<SandboxId, String>,
    /// The generation was too old: compare with [`Live`] instead.
    pub resync: bool,
}
