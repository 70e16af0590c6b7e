//! The log of what became of sandboxes, in the order in which it was recorded.

use async_trait::async_trait;
use kelvin_api::account::Project;
use kelvin_api::id::SandboxId;
use kelvin_api::sandbox::StartPath;

use super::Error;

/// What became of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happened {
    /// It can be used.
    Created {
        /// How it started.
        start_path: StartPath,
        /// What it was forked from.
        parent: Option<SandboxId>,
    },
    /// It was paused.
    Paused,
    /// It runs again.
    Resumed,
    /// It was given another deadline.
    DeadlineSet {
        /// Which one.
        ends_at: jiff::Timestamp,
    },
    /// What it may reach was changed.
    NetworkSet,
    /// It is no more.
    Ended {
        /// Why, in words of the node or of who ended it.
        reason: String,
    },
}

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Grows; never given twice.
    pub id: i64,
    /// When it was recorded.
    pub at: jiff::Timestamp,
    /// Of which sandbox.
    pub sandbox: SandboxId,
    /// Whose it was.
    pub project: Project,
    /// What it was made of.
    pub template: String,
    /// What became of it.
    pub what: Happened,
}

/// Which events.
#[derive(Debug, Clone, Default)]
pub struct Which {
    /// Later than this one.
    pub after: i64,
    /// Of this project alone.
    pub project: Option<Project>,
    /// Of this sandbox alone.
    pub sandbox: Option<SandboxId>,
    /// So many at the most.
    pub limit: usize,
}

/// Events are written by the calls that change sandboxes ([`super::Sandboxes`]), in their transactions: there is none of what
/// was not recorded, and nothing is recorded without one.
#[async_trait]
pub trait Events: Send + Sync {
    /// The oldest events that are asked for, in their order. The oldest of all are forgotten when there are too many.
    async fn events(&self, which: Which) -> Result<Vec<Event>, Error>;
}
