//! Idempotency keys: what was asked for with one, and what was answered. They live on boot time: a wall clock that is set
//! ends none of them early or late.

use async_trait::async_trait;

use super::Error;

/// How long a key is remembered, in milliseconds: 24 hours.
pub(super) const KEY_LIFE_MS: i64 = 24 * 60 * 60 * 1000;

/// What a key was used for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewKey {
    /// Project and key.
    pub key: String,
    /// Digest of the request.
    pub fingerprint: String,
    /// The sandboxes or the snapshot that it makes; what a start after a crash looks for.
    pub subjects: Vec<String>,
}

/// An idempotency key that was seen before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRow {
    pub fingerprint: String,
    /// The reply; none while the request is under way, or when the server died meanwhile.
    pub reply: Option<String>,
    pub subjects: Vec<String>,
}

/// Of a create, its key is written with its rows: [`super::Sandboxes::begin`].
#[async_trait]
pub trait Answers: Send + Sync {
    /// Counts the ages of keys from this boot of the host on. Of another boot, what the wall clock says is all that is
    /// known of them, but they are older than this boot; of those that were written before there was boot time, not even
    /// that. For start-up.
    async fn count_from_this_boot(&self) -> Result<(), Error>;
    /// What is known of an idempotency key.
    async fn key(&self, key: String) -> Result<Option<KeyRow>, Error>;
    /// Remembers what a key is used for, before anything of it is done. Whether it was free: else another request has it, of
    /// this server or of another.
    async fn add_key_of(&self, key: NewKey) -> Result<bool, Error>;
    /// Remembers what a key's request makes, before it is made.
    async fn note_subjects(&self, key: String, subjects: Vec<String>) -> Result<(), Error>;
    /// Remembers what was answered.
    async fn answer(&self, key: String, reply: String) -> Result<(), Error>;
    /// Forgets a key whose request has failed: a retry starts afresh.
    async fn forget_key(&self, key: String) -> Result<(), Error>;
}
