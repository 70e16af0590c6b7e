//! Idempotency keys in SQLite, aged in milliseconds since the boot.

use async_trait::async_trait;
use kelvin_host::clock::Stamp;
use rusqlite::{Connection, OptionalExtension};

use super::Sqlite;
use crate::database::answers::KEY_LIFE_MS;
use crate::database::{Answers, Error, KeyRow, NewKey};

/// Milliseconds since the boot.
fn boot_ms(stamp: &Stamp) -> i64 {
    i64::try_from(stamp.boot_ms).unwrap_or(i64::MAX)
}

/// Remembers a key that is free, after those that are too old are forgotten. Whether it was. `sandbox`: what a create makes.
pub(super) fn remember(
    connection: &Connection,
    key: &NewKey,
    sandbox: &str,
    now: &Stamp,
) -> Result<bool, rusqlite::Error> {
    connection
        .prepare_cached("DELETE FROM idempotency WHERE boot_ms < ?1")?
        .execute([boot_ms(now) - KEY_LIFE_MS])?;
    let added = connection
        .prepare_cached(
            "INSERT INTO idempotency (key, fingerprint, sandbox, created_ms, subjects, boot_ms) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT (key) DO NOTHING",
        )?
        .execute((
            &key.key,
            &key.fingerprint,
            sandbox,
            now.wall.as_millisecond(),
            serde_json::to_string(&key.subjects).unwrap_or_default(),
            boot_ms(now),
        ))?;
    Ok(added == 1)
}

#[async_trait]
impl Answers for Sqlite {
    async fn count_from_this_boot(&self) -> Result<(), Error> {
        let now = self.clock.stamp(self.clock.now());
        self.db
            .call(move |connection| {
                let transaction = connection.transaction()?;
                transaction
                    .prepare_cached(
                        "UPDATE idempotency SET boot_ms = ?1 - \
                         MAX(?2 - created_ms, CASE WHEN boot_ms IS NULL THEN 0 ELSE ?1 END) \
                         WHERE boot_ms IS NULL OR NOT EXISTS (SELECT 1 FROM boot WHERE id = ?3)",
                    )?
                    .execute((boot_ms(&now), now.wall.as_millisecond(), now.boot.to_string()))?;
                for sql in ["DELETE FROM boot WHERE id != ?1", "INSERT OR IGNORE INTO boot (id) VALUES (?1)"]
                {
                    transaction.prepare_cached(sql)?.execute([now.boot.to_string()])?;
                }
                transaction.commit()
            })
            .await
    }

    async fn key(&self, key: String) -> Result<Option<KeyRow>, Error> {
        let oldest = boot_ms(&self.clock.stamp(self.clock.now())) - KEY_LIFE_MS;
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached(
                        "SELECT fingerprint, reply, subjects FROM idempotency WHERE key = ?1 AND boot_ms >= ?2",
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

    async fn add_key_of(&self, key: NewKey) -> Result<bool, Error> {
        let now = self.clock.stamp(self.clock.now());
        self.db
            .call(move |connection| {
                let transaction = connection.transaction()?;
                let is_new = remember(&transaction, &key, "", &now)?;
                transaction.commit().map(|()| is_new)
            })
            .await
    }

    async fn note_subjects(&self, key: String, subjects: Vec<String>) -> Result<(), Error> {
        let subjects = serde_json::to_string(&subjects).unwrap_or_default();
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached("UPDATE idempotency SET subjects = ?2 WHERE key = ?1")?
                    .execute((key, subjects))
                    .map(drop)
            })
            .await
    }

    async fn answer(&self, key: String, reply: String) -> Result<(), Error> {
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached("UPDATE idempotency SET reply = ?2 WHERE key = ?1")?
                    .execute((key, reply))
                    .map(drop)
            })
            .await
    }

    async fn forget_key(&self, key: String) -> Result<(), Error> {
        self.db
            .call(move |connection| {
                connection.prepare_cached("DELETE FROM idempotency WHERE key = ?1")?.execute([key]).map(drop)
            })
            .await
    }
}
