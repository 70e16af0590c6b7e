//! Templates, what is baked of them, and the machines that wait for it.

use serde::{Deserialize, Serialize};

use crate::id::BuildId;

/// One row of `GET /templates`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Template {
    /// Name of the template.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// Id of the build that made the version that it is now; of one that was imported, digest of its image.
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
    /// Whether its project lets every other use it. Of one that was imported it is false, though every project has it.
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
    /// Kelvin: its versions that are there, the newest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub versions: Vec<VersionInfo>,
}

/// Kelvin: one version of a template, and what it takes on its node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct VersionInfo {
    /// The build that made it; absent of what was imported, or built by a release that kept one version of a name.
    #[serde(rename = "buildID", default, skip_serializing_if = "Option::is_none")]
    pub build_id: Option<BuildId>,
    /// The tags that name it.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Digest of its root file system.
    pub image: String,
    /// Size of that, in bytes.
    pub image_bytes: u64,
    /// What of it is on the disk, in bytes; blocks that it shares with others are counted for each.
    pub image_disk_bytes: u64,
    /// What of the memory of its snapshot, in its own shape, is on the disk, in bytes; absent when it has none here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_disk_bytes: Option<u64>,
    /// Digest of the kernel that its machines run.
    pub kernel: String,
    /// When it was built or imported.
    pub created_at: jiff::Timestamp,
    /// Digest of the container image that its build began with, when it began with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_digest: Option<String>,
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
