//! What the control plane remembers: one interface, and what is behind it.
//!
//! ```text
//! use cases ──> Database ──> dyn Repository: Sandboxes, Keys, Catalog, Usage, Answers, AuditLog
//!                                  └─ sqlite: kelvin.db
//! ```
//!
//! Each call is one transaction: whole or not at all, and seen by every call that begins after it has returned. A call that
//! is dropped may have been done. `suite` is what every implementation keeps to.
//!
//! Who writes: the use cases. What a crash leaves is for [`crate::Control::open`] to compare with the node.

mod answers;
mod audit;
mod catalog;
mod keys;
mod limits;
#[cfg(test)]
mod power;
mod sandboxes;
mod sqlite;
#[cfg(test)]
pub(crate) mod suite;
mod usage;

pub use answers::{Answers, KeyRow, NewKey};
pub use audit::{AuditLog, Ended};
pub use catalog::{Catalog, NewSnapshot, Owner, TagRow};
pub use keys::{Keys, Known};
pub use limits::{Exceeded, Limited, Quota};
pub use sandboxes::{Begun, Claim, Filter, SandboxRow, Sandboxes};
pub use usage::Usage;

use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use kelvin_host::clock::Clock;

/// What is below an error of the database.
type Source = Box<dyn std::error::Error + Send + Sync>;

/// Why a call failed. But for `Failed` and `Full` of a call that survives a power failure, nothing of it was done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no space left to write to.
    #[error(transparent)]
    Full(Source),
    /// The row is another node's, or of a later epoch of the node.
    #[error("the sandbox was given to another node")]
    Fenced,
    /// The database does not answer, or refused.
    #[error(transparent)]
    Failed(Source),
}

/// All that is remembered.
#[async_trait]
pub trait Repository: Sandboxes + Keys + Catalog + Usage + Answers + AuditLog {
    /// Returns when everything that was written before survives a power failure.
    async fn flush(&self) -> Result<(), Error>;
}

/// A cheap handle.
#[derive(Clone)]
pub struct Database {
    repository: Arc<dyn Repository>,
    /// Of this host: lives are counted on it.
    pub clock: Clock,
}

impl Database {
    /// Opens the embedded database at `path`.
    pub fn open(path: &Path, clock: Clock) -> Result<Self, Error> {
        let repository = Arc::new(sqlite::Sqlite::open(path, clock.clone())?);
        Ok(Self { repository, clock })
    }
}

impl Deref for Database {
    type Target = dyn Repository;

    fn deref(&self) -> &Self::Target {
        &*self.repository
    }
}
