//! The audit log.

use async_trait::async_trait;
use kelvin_api::account::AuditEntry;

use super::Error;

/// How a request ended, for the audit log.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Of which entry.
    pub entry: i64,
    /// Status of the reply.
    pub status: u16,
    /// What it was about.
    pub target: String,
}

/// Entries of creates are written with their rows: [`super::Sandboxes::begin`].
#[async_trait]
pub trait AuditLog: Send + Sync {
    /// Writes an entry of the audit log, and returns its number.
    async fn note(&self, entry: AuditEntry) -> Result<i64, Error>;
    /// Writes how a request ended.
    async fn note_end(&self, ended: Ended) -> Result<(), Error>;
    /// The newest entries of the audit log below `before`, newest first.
    async fn audit(&self, before: Option<i64>, limit: usize) -> Result<Vec<AuditEntry>, Error>;
}
