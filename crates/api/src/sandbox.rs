//! Bodies of the control API: E2B's names on the wire, Kelvin's additions in the same style.
//!
//! Source: E2B's `openapi.yml`; additions are marked.

mod measured;
mod node;
mod snapshot;
mod template;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use self::measured::{
    GuestMetrics, LogLevel, ProjectMetric, SandboxLog, SandboxLogEntry, SandboxLogs, SandboxMetric,
};
pub use self::node::{NodeInfo, NodeNetwork, UnreadableRecord};
pub use self::snapshot::{
    CAPTURE_HEADER, Capture, FileState, FileVerification, SnapshotInfo, SnapshotSandbox, SnapshotVerification,
};
pub use self::template::{BakeTemplate, PoolInfo, SetPool, Template, TemplateSnapshot, VersionInfo};

use crate::id::{SandboxId, Token};
use crate::network::NewNetwork;
use crate::phase::Phase;

/// Free-form labels of a sandbox.
pub type Metadata = BTreeMap<String, String>;
/// Environment variables.
pub type EnvVars = BTreeMap<String, String>;

/// The longest time to live, in seconds: 24 hours.
pub const MAX_TIMEOUT_S: u64 = 24 * 60 * 60;

/// `POST /sandboxes` and `POST /v2/sandboxes`.
///
/// Fields that are known but not built yet are here so that they can be refused by name.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NewSandbox {
    /// Name of a template, or id or name of a snapshot, each with an optional `:tag`.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// Time to live in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
    /// Labels, which lists can be filtered by; at most 64 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Metadata>,
    /// Environment of its processes; at most 256 KiB.
    #[serde(rename = "envVars", default, skip_serializing_if = "Option::is_none")]
    pub env_vars: Option<EnvVars>,
    /// Whether the agent asks for an access token; true unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secure: Option<bool>,
    /// False denies everything that `network` does not allow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_internet_access: Option<bool>,
    /// True pauses it at the end of its time; else it is killed.
    #[serde(rename = "autoPause", default, skip_serializing_if = "Option::is_none")]
    pub auto_pause: Option<bool>,
    /// False keeps the disk alone when it is paused at the end of its time.
    #[serde(rename = "autoPauseMemory", default, skip_serializing_if = "Option::is_none")]
    pub auto_pause_memory: Option<bool>,
    /// Whether traffic resumes it when it is paused.
    #[serde(rename = "autoResume", default, skip_serializing_if = "Option::is_none")]
    pub auto_resume: Option<AutoResume>,
    /// What it may reach, or `none` for no network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NewNetwork>,
    /// Read and not used: E2B's clients start the gateway that it configures themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mcp: Option<serde_json::Value>,
    /// Not supported: refused when it says something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iam: Option<serde_json::Value>,
    /// Not supported: refused when it names one.
    #[serde(rename = "volumeMounts", default, skip_serializing_if = "Option::is_none")]
    pub volume_mounts: Option<Vec<serde_json::Value>>,
    /// Kelvin: vCPUs, instead of the template's.
    #[serde(rename = "cpuCount", default, skip_serializing_if = "Option::is_none")]
    pub cpu_count: Option<u32>,
    /// Kelvin: memory in MiB, instead of the template's.
    #[serde(rename = "memoryMB", default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u64>,
    /// Kelvin: insist on a start path instead of taking the fastest.
    #[serde(rename = "startPath", default, skip_serializing_if = "Option::is_none")]
    pub start_path: Option<StartPath>,
    /// Kelvin: measure when a cold machine answers over TCP too, to compare; it costs up to 5 seconds.
    #[serde(rename = "probeTcp", default, skip_serializing_if = "Option::is_none")]
    pub probe_tcp: Option<bool>,
}

/// How a machine came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum StartPath {
    /// Booted.
    Cold,
    /// Restored from a snapshot into a VMM that was started ahead of time.
    Clone,
    /// Claimed: restored before, and it had answered.
    Warm,
}

impl StartPath {
    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Clone => "clone",
            Self::Warm => "warm",
        }
    }
}

/// What a create or a connect replies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Sandbox {
    /// Name of the template, or id or name of the snapshot, that it was made from.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// Id of the sandbox.
    #[serde(rename = "sandboxID")]
    pub sandbox_id: SandboxId,
    /// The same as `templateID`, as E2B's clients show it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
    /// Deprecated by E2B, still required by its clients.
    #[serde(rename = "clientID")]
    pub client_id: String,
    /// Version of envd's API that the guest's agent speaks.
    #[serde(rename = "envdVersion")]
    pub envd_version: String,
    /// What callers of the guest's agent must show in `X-Access-Token`; absent when it was made with `secure: false`.
    #[serde(rename = "envdAccessToken", default, skip_serializing_if = "Option::is_none")]
    pub envd_access_token: Option<Token>,
    /// What callers of its ports must show; only when they are private.
    #[serde(rename = "trafficAccessToken", default, skip_serializing_if = "Option::is_none")]
    pub traffic_access_token: Option<Token>,
    /// Domain under whose subdomains its ports are reached; absent when the server has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Kelvin: which path the create took.
    #[serde(rename = "startPath", default, skip_serializing_if = "Option::is_none")]
    pub start_path: Option<StartPath>,
    /// Kelvin: why it took that one.
    #[serde(rename = "startReason", default, skip_serializing_if = "Option::is_none")]
    pub start_reason: Option<String>,
    /// Kelvin: milliseconds per phase.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub phases: BTreeMap<Phase, f64>,
}

/// What happens at the end of a sandbox's time. Source: E2B's `SandboxOnTimeout`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum OnTimeout {
    /// It ends.
    #[default]
    Kill,
    /// It is paused.
    Pause,
}

/// What happens without being asked for. Source: E2B's `SandboxLifecycle`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Lifecycle {
    /// At the end of its time.
    #[serde(default)]
    pub on_timeout: OnTimeout,
    /// Whether traffic resumes it when it is paused.
    #[serde(default)]
    pub auto_resume: bool,
    /// What the pause at the end of its time keeps.
    #[serde(default, skip_serializing_if = "PauseMode::is_full")]
    pub pause_mode: PauseMode,
}

/// What of a machine is kept. Source: E2B's `SandboxPauseMode`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum PauseMode {
    /// Memory, device state and disk: it goes on.
    #[default]
    Full,
    /// The disk alone: it boots again.
    Filesystem,
}

impl PauseMode {
    /// What a field `memory` asks for.
    pub fn of(memory: Option<bool>) -> Self {
        if memory == Some(false) { Self::Filesystem } else { Self::Full }
    }

    /// Whether memory is kept too.
    pub fn is_full(&self) -> bool {
        *self == Self::Full
    }
}

/// `autoResume` of a create. Source: E2B's `SandboxAutoResumeConfig`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct AutoResume {
    /// Whether traffic resumes it when it is paused.
    pub enabled: bool,
}

/// `POST /sandboxes/{id}/pause`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct PauseSandbox {
    /// False keeps the disk alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<bool>,
    /// True refuses to pause a guest whose agent does not answer.
    #[serde(rename = "requireHealthyGuest", default, skip_serializing_if = "Option::is_none")]
    pub require_healthy_guest: Option<bool>,
}

/// `POST /sandboxes/{id}/resume`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ResumeSandbox {
    /// Time to live, in seconds from now; 15 when it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
    /// Refused: it is set when a sandbox is created.
    #[serde(rename = "autoPause", default, skip_serializing_if = "Option::is_none")]
    pub auto_pause: Option<bool>,
    /// False boots it from its disk alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<bool>,
}

/// `POST /sandboxes/{id}/fork`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ForkSandbox {
    /// Seconds that each child lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
    /// How many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
    /// Kelvin: labels of the children, instead of the source's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Metadata>,
    /// Kelvin: environment of processes that the children start, over the source's.
    #[serde(rename = "envVars", default, skip_serializing_if = "Option::is_none")]
    pub env_vars: Option<EnvVars>,
}

/// One element of the reply to a fork: a child, or why there is none.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ForkResult {
    /// The child.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<Sandbox>,
    /// Why there is no child.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<crate::error::ApiError>,
}

/// The states a client can see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum SandboxState {
    /// It runs.
    Running,
    /// Frozen to a snapshot.
    Paused,
}

/// One row of a list, and with the optional fields what `GET /sandboxes/{id}` replies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SandboxDetail {
    /// Name of the template, or id or name of the snapshot, that it was made from.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// The same as `templateID`, as E2B's clients show it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
    /// Id of the sandbox.
    #[serde(rename = "sandboxID")]
    pub sandbox_id: SandboxId,
    /// Deprecated by E2B, still required by its clients.
    #[serde(rename = "clientID")]
    pub client_id: String,
    /// When it was created.
    #[serde(rename = "startedAt")]
    pub started_at: jiff::Timestamp,
    /// When its time is over; it is killed or paused then (`lifecycle`).
    #[serde(rename = "endAt")]
    pub end_at: jiff::Timestamp,
    /// Version of envd's API that the guest's agent speaks.
    #[serde(rename = "envdVersion")]
    pub envd_version: String,
    /// Number of vCPUs.
    #[serde(rename = "cpuCount")]
    pub cpu_count: u32,
    /// Memory, in MiB.
    #[serde(rename = "memoryMB")]
    pub memory_mb: u32,
    /// Size of its root disk, in MiB.
    #[serde(rename = "diskSizeMB")]
    pub disk_size_mb: u32,
    /// Whether it runs or is paused.
    pub state: SandboxState,
    /// Labels that it was made with.
    #[serde(default)]
    pub metadata: Metadata,
    /// Kelvin: which path the create took.
    #[serde(rename = "startPath")]
    pub start_path: StartPath,
    /// In a detail, not in a list.
    #[serde(rename = "envdAccessToken", default, skip_serializing_if = "Option::is_none")]
    pub envd_access_token: Option<Token>,
    /// Whether it may reach the internet, when a request said so.
    #[serde(rename = "allowInternetAccess", default, skip_serializing_if = "Option::is_none")]
    pub allow_internet_access: Option<bool>,
    /// In a detail, not in a list; only when its ports are private.
    #[serde(rename = "trafficAccessToken", default, skip_serializing_if = "Option::is_none")]
    pub traffic_access_token: Option<Token>,
    /// Domain under whose subdomains its ports are reached; absent when the server has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// What happens without being asked for.
    #[serde(default)]
    pub lifecycle: Lifecycle,
    /// Kelvin: the sandbox it was forked from.
    #[serde(rename = "parentID", default, skip_serializing_if = "Option::is_none")]
    pub parent_id: Option<SandboxId>,
}

/// `POST /sandboxes/{id}/timeout`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct SetTimeout {
    /// Seconds from now.
    pub timeout: u64,
}

/// `POST /sandboxes/{id}/connect`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ConnectSandbox {
    /// Seconds from now; never shortens a time to live.
    #[serde(default)]
    pub timeout: Option<u64>,
    /// False is refused: what is paused goes on.
    #[serde(default)]
    pub memory: Option<bool>,
}
