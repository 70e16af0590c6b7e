//! Kelvin: what runs on a node and what is left.

use serde::{Deserialize, Serialize};

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
