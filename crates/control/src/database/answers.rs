//! Idempotency keys: what was asked for with one, and what was answered.

use kelvin_host::db::Error;
use rusqlite::{Connection, OptionalExtension};

use super::Database;

/// How long a key is remembered, in milliseconds: 24 hours.
const KEY_LIFE_MS: i64 = 24 * 60 * 60 * 1000;

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

/// Remembers a key, and forgets those that are too old. `sandbox`: what a create makes.
pub(super) fn remember(
    connection: &Connection,
    key: &NewKey,
    sandbox: &str,
    now_ms: i64,
) -> Result<(), rusqlite::Error> {
    connection
        .prepare_cached("DELETE FROM idempotency WHERE created_ms < ?1")?
        .execute([now_ms - KEY_LIFE_MS])?;
    connection
        .prepare_cached(
            "INSERT OR REPLACE INTO idempotency (key, fingerprint, sandbox, created_ms, subjects) \
             VALUES (?1, ?2, ?3, ?4, ?5)",
        )?
        .execute((
            &key.key,
            &key.fingerprint,
            sandbox,
            now_ms,
            serde_json::to_string(&key.subjects).unwrap_or_default(),
        ))
        .map(drop)
}

impl Database {
    /// What is known of an idempotency key.
    pub async fn key(&self, key: String) -> Result<Option<KeyRow>, Error> {
        let oldest = jiff::Timestamp::now().as_millisecond() - KEY_LIFE_MS;
        self.0
            .call(move |connection| {
                connection
                    .prepare_cached(
                        "SELECT fingerprint, reply, subjects FROM idempotency WHERE key = ?1 AND created_ms >= ?2",
                    )?
                    .query_row((key, oldest), |row| {
                        let subjects: String = row.get(2)?;
                        Ok(KeyRow {
                            fingerprint: row.get(0)?,
                            reply: row.get(1)?,
                            subjects: serde_json::from_str(&subjects).unwrap_or_default(),
                        })
                    })
                    .optional()
            })
            .await
    }

    /// Remembers what a key is used for, before anything of it is done.
    pub async fn add_key_of(&self, key: NewKey) -> Result<(), Error> {
        let now = jiff::Timestamp::now().as_millisecond();
        self.0.call(move |connection| remember(connection, &key, "", now)).await
    }

    /// Remembers what a key's request makes, before it is made.
    pub async fn note_subjects(&self, key: String, subjects: Vec<String>) -> Result<(), Error> {
        let subjects = serde_json::to_string(&subjects).unwrap_or_default();
        self.0
            .call(move |connection| {
                connection
                    .prepare_cached("UPDATE idempotency SET subjects = ?2 WHERE key = ?1")?
                    .execute((key, subjects))
                    .map(drop)
            })
            .await
    }

    /// Remembers what was answered.
    pub async fn answer(&self, key: String, reply: String) -> Result<(), Error> {
        self.0
            .call(move |connection| {
                connection
                    .prepare_cached("UPDATE idempotency SET reply = ?2 WHERE key = ?1")?
                    .execute((key, reply))
                    .map(drop)
            })
            .await
    }

    /// Forgets a key whose request has failed: a retry starts afresh.
    pub async fn forget_key(&self, key: String) -> Result<(), Error> {
        self.0
            .call(move |connection| {
                connection.prepare_cached("DELETE FROM idempotency WHERE key = ?1")?.execute([key]).map(drop)
            })
            .await
    }
}
