//! Why there is no network.

use std::io;

use super::addresses::SLOTS;

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This host cannot have slots.
    #[error("no network for sandboxes: {0}")]
    Unavailable(String),
    /// What was asked for is not there.
    #[error("{0}")]
    Options(String),
    /// All numbers are used.
    #[error("all {SLOTS} network slots are used")]
    Full,
    /// A slot could not be made or removed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The ledger.
    #[error("the ledger cannot be written")]
    Ledger(#[from] crate::db::Error),
}
