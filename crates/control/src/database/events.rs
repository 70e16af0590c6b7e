//! The log of what became of sandboxes, in the order in which it was recorded.

use async_trait::async_trait;
use kelvin_api::account::Project;
use kelvin_api::event::Event;
use kelvin_api::id::SandboxId;

use super::Error;

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
