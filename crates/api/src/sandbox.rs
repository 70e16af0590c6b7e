//! Bodies of the control API: E2B's names on the wire, Kelvin's additions in the same style.
//!
//! Source: `../shared/specs/e2b/openapi.yml`; additions are marked.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

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

/// `POST /sandboxes/{id}/snapshots`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct SnapshotSandbox {
    /// Name of the snapshot: 1 to 64 of a-z, 0-9, '.', '_' and '-'.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// False keeps the disk alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<bool>,
}

/// A snapshot that is kept. The first two fields are E2B's, the others Kelvin's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SnapshotInfo {
    /// Id of the snapshot.
    #[serde(rename = "snapshotID")]
    pub snapshot_id: String,
    /// Names that it was given.
    pub names: Vec<String>,
    /// Whose memory it is.
    #[serde(rename = "sandboxID")]
    pub sandbox_id: SandboxId,
    /// Name of the template that it descends from.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// The snapshot it descends from: kept, or a template's.
    #[serde(rename = "parentID", default, skip_serializing_if = "Option::is_none")]
    pub parent_id: Option<String>,
    /// When it was taken.
    #[serde(rename = "createdAt")]
    pub created_at: jiff::Timestamp,
    /// Number of vCPUs of its machine.
    #[serde(rename = "cpuCount")]
    pub cpu_count: u32,
    /// Memory of its machine, in MiB.
    #[serde(rename = "memoryMB")]
    pub memory_mb: u32,
    /// Whether this node can restore it now; the reason if not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unusable: Option<String>,
}

/// What became of a file of a snapshot since it was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum FileState {
    /// Its content is what it was.
    Intact,
    /// It was not touched; its content has no digest yet.
    NotDigested,
    /// Its content or its length is another.
    Damaged,
    /// It is not there, or the disk does not give it.
    Unreadable,
    /// It was touched: a resume refuses it, whatever its content.
    Unsealed,
}

/// One file of a snapshot that was verified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct FileVerification {
    /// `memory`, `state` or `disk`.
    pub file: String,
    /// What became of the file.
    pub state: FileState,
    /// Its length.
    pub bytes: u64,
    /// Which chunks of 4 MiB are damaged, from 0; the first sixteen.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chunks: Vec<u64>,
    /// What is wrong with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// The reply of `POST /snapshots/{name}/verify`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SnapshotVerification {
    /// Id of the snapshot.
    #[serde(rename = "snapshotID")]
    pub snapshot_id: String,
    /// Whether nothing is known to be wrong with it.
    pub intact: bool,
    /// What became of each of its files.
    pub files: Vec<FileVerification>,
}

/// The header with a [`Capture`] in replies to pauses, snapshots and forks.
pub const CAPTURE_HEADER: &str = "kelvin-capture";

/// How a snapshot, a pause or a fork went for its source.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Capture {
    /// Milliseconds in which the source's vCPUs stood still.
    pub paused_ms: f64,
    /// Pages that it had written since it was restored; none for one that was booted.
    pub dirty_pages: Option<u64>,
    /// Whether its agent had flushed and frozen the file system.
    pub quiesced: bool,
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

/// One line of `GET /sandboxes/{id}/logs`: the machine's console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SandboxLog {
    /// When it was read: the console has no clock.
    pub timestamp: jiff::Timestamp,
    /// The text, without its end of line.
    pub line: String,
}

/// `GET /sandboxes/{id}/logs`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SandboxLogs {
    /// Oldest first, bounded (see SPEC.md).
    pub logs: Vec<SandboxLog>,
    /// The same, structured.
    #[serde(rename = "logEntries")]
    pub log_entries: Vec<SandboxLogEntry>,
}

/// One measurement of a sandbox, from its guest's own counters. Source: E2B's `SandboxMetric`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct SandboxMetric {
    /// When.
    pub timestamp: jiff::Timestamp,
    /// The same, in seconds since 1970.
    pub timestamp_unix: i64,
    /// Its vCPUs.
    pub cpu_count: u32,
    /// Percent of one vCPU, since the measurement before.
    pub cpu_used_pct: f64,
    /// Bytes in use.
    pub mem_used: i64,
    /// Bytes that it has.
    pub mem_total: i64,
    /// Bytes of page cache.
    pub mem_cache: i64,
    /// Bytes of its root disk in use.
    pub disk_used: i64,
    /// Bytes of its root disk.
    pub disk_total: i64,
}

/// One measurement of a project. Source: E2B's `TeamMetric`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ProjectMetric {
    /// When.
    pub timestamp: jiff::Timestamp,
    /// The same, in seconds since 1970.
    pub timestamp_unix: i64,
    /// Sandboxes that ran.
    pub concurrent_sandboxes: u32,
    /// Per second.
    pub sandbox_start_rate: f64,
}

/// What the guest's agent says of itself. Source: `../shared/specs/e2b/envd.yaml`, `Metrics`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct GuestMetrics {
    /// When, in seconds since 1970 by the guest's clock.
    pub ts: i64,
    /// Its vCPUs.
    pub cpu_count: u32,
    /// Percent of one vCPU, since the measurement before.
    pub cpu_used_pct: f64,
    /// Bytes that it has.
    pub mem_total: i64,
    /// Bytes in use.
    pub mem_used: i64,
    /// Bytes of page cache.
    pub mem_cache: i64,
    /// Bytes of its root disk in use.
    pub disk_used: i64,
    /// Bytes of its root disk.
    pub disk_total: i64,
}

/// How much a log entry matters. Source: E2B's `LogLevel`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum LogLevel {
    /// Details.
    Debug,
    /// What happens usually.
    Info,
    /// What may become a problem.
    Warn,
    /// What failed.
    Error,
}

/// One entry of `GET /v2/sandboxes/{id}/logs`. Source: E2B's `SandboxLogEntry`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SandboxLogEntry {
    /// When it was read: the console has no clock.
    pub timestamp: jiff::Timestamp,
    /// The text, without its end of line.
    pub message: String,
    /// How much it matters.
    pub level: LogLevel,
    /// More about it: `source` is where it is from.
    pub fields: BTreeMap<String, String>,
}

/// One row of `GET /templates`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Template {
    /// Name of the template.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// Id of the image that it is now.
    #[serde(rename = "buildID")]
    pub build_id: String,
    /// Number of vCPUs of a sandbox that asks for none.
    #[serde(rename = "cpuCount")]
    pub cpu_count: u32,
    /// Memory of a sandbox that asks for none, in MiB.
    #[serde(rename = "memoryMB")]
    pub memory_mb: u32,
    /// Size of its disk, in MiB.
    #[serde(rename = "diskSizeMB")]
    pub disk_size_mb: u32,
    /// Always false: every project has the same templates, and none is listed as public.
    pub public: bool,
    /// Its names, as E2B's older clients read them.
    pub aliases: Vec<String>,
    /// Its names.
    pub names: Vec<String>,
    /// When it was imported.
    #[serde(rename = "createdAt")]
    pub created_at: jiff::Timestamp,
    /// When it was imported last.
    #[serde(rename = "updatedAt")]
    pub updated_at: jiff::Timestamp,
    /// Nobody: templates are imported by whoever keeps the server.
    #[serde(rename = "createdBy")]
    pub created_by: Option<String>,
    /// When a sandbox of it was started last.
    #[serde(rename = "lastSpawnedAt")]
    pub last_spawned_at: Option<jiff::Timestamp>,
    /// Sandboxes that were started of it.
    #[serde(rename = "spawnCount")]
    pub spawn_count: u64,
    /// How often it was built.
    #[serde(rename = "buildCount")]
    pub build_count: u32,
    /// Version of envd's API that its agent speaks.
    #[serde(rename = "envdVersion")]
    pub envd_version: String,
    /// State of its build: `ready`.
    #[serde(rename = "buildStatus")]
    pub build_status: String,
    /// Kelvin: shapes with a snapshot that this node can restore.
    pub snapshots: Vec<TemplateSnapshot>,
}

/// Kelvin: one snapshot of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TemplateSnapshot {
    /// Id of the snapshot.
    #[serde(rename = "snapshotID")]
    pub snapshot_id: String,
    /// Number of vCPUs of its machine.
    #[serde(rename = "cpuCount")]
    pub cpu_count: u32,
    /// Memory of its machine, in MiB.
    #[serde(rename = "memoryMB")]
    pub memory_mb: u32,
    /// VMMs that wait for it, started and ready to load.
    #[serde(rename = "waitingVMMs")]
    pub waiting_vmms: u32,
    /// Whether its machines have a network.
    pub network: bool,
}

/// Kelvin: `POST /templates/{name}/bake`: make sure that a snapshot of this shape exists.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BakeTemplate {
    /// Number of vCPUs; the template's when it is left out.
    #[serde(rename = "cpuCount", default, skip_serializing_if = "Option::is_none")]
    pub cpu_count: Option<u32>,
    /// Memory, in MiB; the template's when it is left out.
    #[serde(rename = "memoryMB", default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u64>,
    /// VMMs to keep waiting for this shape, instead of the server's default.
    #[serde(rename = "waitingVMMs", default, skip_serializing_if = "Option::is_none")]
    pub waiting_vmms: Option<u32>,
    /// Whether the machine has a network; true where the node has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<bool>,
}

/// Kelvin: one row of `GET /pools`: the machines that wait for one snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct PoolInfo {
    /// Whose pool it is.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// What its machines are restored from.
    #[serde(rename = "snapshotID")]
    pub snapshot_id: String,
    /// vCPUs of each.
    pub cpu_count: u32,
    /// Memory of each, in MiB.
    #[serde(rename = "memoryMB")]
    pub memory_mb: u32,
    /// Whether they have a network.
    pub network: bool,
    /// Warm machines that are always there.
    pub min: u32,
    /// The most.
    pub max: u32,
    /// After how many seconds an unclaimed one is replaced.
    #[serde(rename = "maxAgeS")]
    pub max_age_s: u64,
    /// How many there should be now.
    pub target: u32,
    /// How many there are.
    pub ready: u32,
    /// Creates that got one.
    pub hits: u64,
    /// Creates that would have taken one.
    pub misses: u64,
    /// Hits of both; none before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hit_rate: Option<f64>,
    /// Creates per second that are expected.
    pub arrivals_per_s: f64,
    /// How long one takes to make, decayed, in milliseconds.
    pub refill_ms: f64,
    /// Age of the oldest, in seconds.
    #[serde(rename = "oldestS", default, skip_serializing_if = "Option::is_none")]
    pub oldest_s: Option<u64>,
    /// Machines that were made and ended unclaimed.
    pub wasted: u64,
    /// VMMs that wait to be loaded: for creates that find no warm machine.
    #[serde(rename = "waitingVMMs")]
    pub waiting_vmms: u32,
    /// Why its snapshot is not used any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// Kelvin: `PUT /pools/{template}`: what is left out stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct SetPool {
    /// Warm machines that are always there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<u32>,
    /// The most warm machines; 0 turns them off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<u32>,
    /// After how many seconds an unclaimed one is replaced.
    #[serde(rename = "maxAgeS", default, skip_serializing_if = "Option::is_none")]
    pub max_age_s: Option<u64>,
}

/// Kelvin: `GET /node`: what runs here and what is left.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NodeInfo {
    /// Version of the server.
    pub version: String,
    /// VMM that runs the sandboxes, with its version.
    pub vmm: String,
    /// What runs guest code: `kvm`, or `tcg`, which emulates.
    pub accelerator: String,
    /// Data directory of the server.
    #[serde(rename = "dataDir")]
    pub data_dir: String,
    /// Whether the data directory's file system shares blocks between files.
    pub reflink: bool,
    /// Sandboxes that run.
    pub sandboxes: u32,
    /// VMMs that wait to be loaded.
    #[serde(rename = "waitingVMMs")]
    pub waiting_vmms: u32,
    /// Warm machines that wait for a claim.
    #[serde(default)]
    pub warm: u32,
    /// Sandboxes that are paused.
    #[serde(default)]
    pub paused: u32,
    /// Sandboxes that ran when the server started and whose VMM it is still taking over; they are listed and can be
    /// killed.
    #[serde(default)]
    pub adopting: u32,
    /// Sandboxes whose guest's agent did not answer when it was told last that it goes on: after a restart of the server or
    /// a snapshot. They run on.
    #[serde(default)]
    pub silent: u32,
    /// Sandboxes whose record this build cannot read. They are kept as they are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unreadable: Vec<UnreadableRecord>,
    /// Whether every pool of waiting VMMs and warm machines is at its target and nothing is being prepared or torn down.
    pub settled: bool,
    /// Memory that can be given to sandboxes, in MiB.
    #[serde(rename = "memoryMB")]
    pub memory_mb: u64,
    /// Memory that is given to sandboxes, in MiB.
    #[serde(rename = "memoryReservedMB")]
    pub memory_reserved_mb: u64,
    /// vCPUs that can be given to sandboxes.
    #[serde(rename = "vcpus")]
    pub vcpus: u32,
    /// vCPUs that are given to sandboxes.
    #[serde(rename = "vcpusReserved")]
    pub vcpus_reserved: u32,
    /// Free space of the data directory's file system, in MiB.
    #[serde(rename = "diskFreeMB")]
    pub disk_free_mb: u64,
    /// Where networks lead to; none when there are none, with the reason in `noNetwork`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NodeNetwork>,
    /// Why sandboxes have no network.
    #[serde(rename = "noNetwork", default, skip_serializing_if = "Option::is_none")]
    pub no_network: Option<String>,
    /// Entries in the ledger of host resources.
    #[serde(rename = "ledgerEntries")]
    pub ledger_entries: u32,
}

/// Kelvin: a record that the node's build cannot read, of a newer release or damaged. What it names runs on, or stays
/// paused, until it is killed or a build that reads it is started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct UnreadableRecord {
    /// The machine that the record is of.
    pub machine: String,
    /// Which sandbox it is, when that much can be read.
    #[serde(rename = "sandboxID", default, skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
    /// Of the VMM; none of what is paused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// Why it cannot be read.
    pub reason: String,
}

/// Kelvin: the networks of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct NodeNetwork {
    /// Addresses of the slots.
    pub range: String,
    /// The link that leads out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uplink: Option<String>,
    /// Slots that wait.
    pub slots_ready: u32,
    /// Slots that exist.
    pub slots_used: u32,
    /// Slots that could not be removed.
    pub slots_quarantined: u32,
}
