//! Why a call of the database failed.

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
