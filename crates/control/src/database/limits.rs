//! What API keys and projects may have at one time.

use kelvin_api::account::{Limits, Project};

/// What is asked for beside what is there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct More {
    /// Sandboxes that are to be made.
    pub creating: u32,
    /// Sandboxes that are to run again.
    pub resuming: u32,
    /// Sandboxes that are to be paused.
    pub paused: u32,
    /// Snapshots that are to be kept.
    pub snapshots: u32,
    /// MiB of disk.
    pub disk_mib: u64,
}

/// Whose limits hold for a change.
#[derive(Debug, Clone)]
pub struct Quota {
    /// Id of the key.
    pub key: String,
    /// What the key may have.
    pub of_key: Limits,
    /// Its project.
    pub project: Project,
    /// What all keys of the project may have together.
    pub of_project: Limits,
}

/// The limit that a change would exceed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exceeded {
    /// Of what.
    pub what: Limited,
    /// Of the project instead of the key.
    pub of_project: bool,
    /// How much there may be.
    pub limit: u64,
    /// How much there is.
    pub used: u64,
}

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limited {
    /// Sandboxes that run, are being made or resumed.
    Sandboxes,
    /// Sandboxes that are being made.
    Creating,
    /// Sandboxes that are paused.
    Paused,
    /// Snapshots that are kept.
    Snapshots,
    /// MiB of disk.
    Disk,
}
