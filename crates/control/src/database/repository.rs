//! All of the interface.

use async_trait::async_trait;

use super::{Answers, AuditLog, Builds, Catalog, Error, Events, Keys, Sandboxes, Usage};

/// All that is remembered.
#[async_trait]
pub trait Repository: Sandboxes + Keys + Catalog + Builds + Usage + Answers + AuditLog + Events {
    /// Returns when everything that was written before survives a power failure.
    async fn flush(&self) -> Result<(), Error>;
}
