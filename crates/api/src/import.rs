//! Imports of templates, as they are asked for and told of.

use serde::{Deserialize, Serialize};

use crate::error::ApiError;
use crate::sandbox::Template;

/// The media type of a reply that tells of an import while it runs: one [`ImportEvent`] a line.
pub const IMPORT_EVENTS: &str = "application/x-ndjson";

/// Kelvin: `POST /templates/{name}/import`: make a template of files on the server's machine. A template of that name is
/// replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ImportTemplate {
    /// Absolute path of the root file system, ext4. A regular file on the server's machine, as the other two; a link is
    /// refused.
    pub rootfs: String,
    /// Absolute path of the guest's kernel.
    pub kernel: String,
    /// Absolute path of the initial RAM disk, with the agent.
    pub initrd: String,
    /// vCPUs of machines that ask for no other; one when it is left out.
    #[serde(rename = "cpuCount", default, skip_serializing_if = "Option::is_none")]
    pub cpu_count: Option<u32>,
    /// Memory of machines that ask for no other, in MiB; 512 when it is left out.
    #[serde(rename = "memoryMB", default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u64>,
}

/// What an import is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ImportStage {
    /// The files are read and hashed.
    Hashing,
    /// They are cloned into the store, or copied where the file system cannot clone; what is there already is not.
    Copying,
    /// It is written to the disk and given its name.
    Publishing,
}

/// How far an import is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ImportProgress {
    /// What is being done.
    pub stage: ImportStage,
    /// Bytes that this stage is through with. Each stage goes through all of them.
    pub done_bytes: u64,
    /// Bytes of all files.
    pub total_bytes: u64,
}

/// Kelvin: one line of a reply that tells of an import while it runs. The last is the template or the error; a reply that
/// ends without either was cut, and the import goes on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ImportEvent {
    /// How far it is.
    Progress(ImportProgress),
    /// It is done: the template.
    Template(Box<Template>),
    /// It has failed: why.
    Error(ApiError),
}
