//! Snapshots that are kept, and how it went to take one.

use serde::{Deserialize, Serialize};

use crate::id::SandboxId;

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
