//! What is seen of a sandbox from outside: its console and its measurements.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

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

/// What the guest's agent says of itself. Source: E2B's `envd.yaml`, `Metrics`.
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
