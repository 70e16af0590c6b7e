//! Idempotency keys: what was asked for with one, and what was answered. They live on boot time: a wall clock that is set
//! ends none of them early or late.

use kelvin_host::clock::Stamp;
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

/// Milliseconds since the boot.
fn boot_ms(stamp: &Stamp) -> i64 {
    i64::try_from(stamp.boot_ms).unwrap_or(i64::MAX)
}

/// Remembers a key, and forgets those that are too old. `sandbox`: what a create makes.
pub(super) fn remember(
    connection: &Connection,
    key: &NewKey,
    sandbox: &str,
    now: &Stamp,
) -> Result<(), rusqlite::Error> {
    connection
        .prepare_cached("DELETE FROM idempotency WHERE boot_ms < ?1")?
        .execute([boot_ms(now) - KEY_LIFE_MS])?;
    connection
        .prepare_cached(
            "INSERT OR REPLACE INTO idempotency (key, fingerprint, sandbox, created_ms, subjects, boot_ms) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?
        .execute((
            &key.key,
            &key.fingerprint,
            sandbox,
            now.wall.as_millisecond(),
            serde_json::to_string(&key.subjects).unwrap_or_default(),
            boot_ms(now),
        ))
        .map(drop)
}

impl Database {
    /// Counts the ages of keys from this boot of the host on. Of another boot, what the wall clock says is all that is
    /// known of them, but they are older than this boot; of those that were written before there was boot time, not even
    /// that. For start-up.
    pub async fn count_from_this_boot(&self) -> Result<(), Error> {
        let now = self.clock.stamp(self.clock.now());
        self.db
            .call(move |connection| {
                let transaction = connection.transaction()?;
                transaction.execute(
                    "UPDATE idempotency SET boot_ms = ?1 - \
                     MAX(?2 - created_ms, CASE WHEN boot_ms IS NULL THEN 0 ELSE ?1 END) \
                     WHERE boot_ms IS NULL OR NOT EXISTS (SELECT 1 FROM boot WHERE id = ?3)",
                    (boot_ms(&now), now.wall.as_millisecond(), now.boot.to_string()),
                )?;
                transaction.execute("DELETE FROM boot WHERE id != ?1", [now.boot.to_string()])?;
                transaction.execute("INSERT OR IGNORE INTO boot (id) VALUES (?1)", [now.boot.to_string()])?;
                transaction.commit()
            })
            .await
    }

    /// What is known of an idempotency key.
    pub async fn key(&self, key: String) -> Result<Option<KeyRow>, Error> {
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

    /// Remembers what a key is used for, before anything of it is done.
    pub async fn add_key_of(&self, key: NewKey) -> Result<(), Error> {
        let now = self.clock.stamp(self.clock.now());
        self.db.call(move |connection| remember(connection, &key, "", &now)).await
    }

    /// Remembers what a key's request makes, before it is made.
    pub async fn note_subjects(&self, key: String, subjects: Vec<String>) -> Result<(), Error> {
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

    /// Remembers what was answered.
    pub async fn answer(&self, key: String, reply: String) -> Result<(), Error> {
        self.db
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
        self.db
            .call(move |connection| {
                connection.prepare_cached("DELETE FROM idempotency WHERE key = ?1")?.execute([key]).map(drop)
            })
            .await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use jiff::SignedDuration;
    use kelvin_host::clock::Simulated;

    use super::*;

    const HOUR: SignedDuration = SignedDuration::from_hours(1);
    const LIFE: Duration = Duration::from_millis(KEY_LIFE_MS as u64);

    fn new(key: &str) -> NewKey {
        NewKey { key: key.into(), fingerprint: "f".into(), subjects: Vec::new() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_wall_clock_that_jumps_and_a_restart_end_no_key_early_or_late() {
        for jump in [HOUR, -HOUR] {
            let dir = tempfile::tempdir().unwrap();
            let (path, time) = (dir.path().join("kelvin.db"), Simulated::start());
            let open = || Database::open(&path, time.clock()).unwrap();
            let database = open();
            database.count_from_this_boot().await.unwrap();
            database.add_key_of(new("old")).await.unwrap();
            time.jump_wall(jump);
            drop(database);
            let database = open();
            database.count_from_this_boot().await.unwrap();
            tokio::time::advance(LIFE - Duration::from_secs(1)).await;
            // To remember one forgets those that are too old.
            database.add_key_of(new("young")).await.unwrap();
            assert!(database.key("old".into()).await.unwrap().is_some(), "early after {jump}");
            tokio::time::advance(Duration::from_secs(2)).await;
            assert!(database.key("old".into()).await.unwrap().is_none(), "late after {jump}");
            assert!(database.key("young".into()).await.unwrap().is_some());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_reboot_keys_are_as_old_as_the_wall_clock_and_the_boot_say() {
        let dir = tempfile::tempdir().unwrap();
        let time = Simulated::start();
        let database = Database::open(&dir.path().join("kelvin.db"), time.clock()).unwrap();
        database.count_from_this_boot().await.unwrap();
        database.add_key_of(new("a")).await.unwrap();
        tokio::time::advance(LIFE / 2).await;
        time.reboot();
        database.count_from_this_boot().await.unwrap();
        assert!(database.key("a".into()).await.unwrap().is_some());
        // The wall clock is set back: the key is older than this boot all the same.
        time.jump_wall(-HOUR * 48);
        tokio::time::advance(LIFE / 2 + Duration::from_secs(1)).await;
        assert!(database.key("a".into()).await.unwrap().is_none());
        database.add_key_of(new("b")).await.unwrap();
        time.reboot();
        tokio::time::advance(LIFE + Duration::from_secs(1)).await;
        time.jump_wall(-HOUR * 48);
        database.count_from_this_boot().await.unwrap();
        assert!(database.key("b".into()).await.unwrap().is_none());
    }
}
