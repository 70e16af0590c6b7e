//! What the control plane remembers: one interface, and what is behind it.
//!
//! ```text
//! use cases ──> Database ──> dyn Repository: Sandboxes, Keys, Catalog, Builds, Usage, Answers, AuditLog, Events
//!                                  └─ sqlite: kelvin.db
//! ```
//!
//! Each call is one transaction: whole or not at all, and seen by every call that begins after it has returned. A call that
//! is dropped may have been done. `suite` is what every implementation keeps to.
//!
//! Who writes: the use cases. What a crash leaves is for [`crate::Control::open`] to compare with the node.

mod answers;
mod audit;
mod builds;
mod catalog;
mod error;
mod events;
mod keys;
mod limits;
#[cfg(test)]
mod power;
mod repository;
mod sandboxes;
mod sqlite;
#[cfg(test)]
pub(crate) mod suite;
mod usage;

pub use answers::{Answers, KeyRow, NewKey};
pub use audit::{AuditLog, Ended};
pub use builds::{
    BuildEnd, BuildError, BuildLine, BuildRow, BuildState, Builds, Caps, Lines, NewBuild, Requested, Started,
    TemplateOwner, Wanted,
};
pub use catalog::{Catalog, DEFAULT_TAG, NewSnapshot, Owner, TagRow};
pub use error::Error;
pub use events::{Events, Which};
pub use keys::{Keys, Known};
pub use limits::{Exceeded, Limited, Quota};
pub use repository::Repository;
pub use sandboxes::{Begun, Claim, Filter, SandboxRow, Sandboxes};
pub use usage::Usage;

use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use kelvin_host::clock::Clock;

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
