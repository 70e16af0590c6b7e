//! API keys and the audit log.

use kelvin_api::account::{ApiKeyInfo, AuditEntry};
use kelvin_host::db::Error;
use rusqlite::{Connection, Row};

use super::{Database, Ended, bad, time};

/// Entries of the audit log that are kept.
const AUDIT_ROWS: i64 = 1_000_000;
/// Every how many entries the oldest go.
const AUDIT_TRIM: i64 = 256;

fn key(row: &Row<'_>) -> Result<(String, ApiKeyInfo), rusqlite::Error> {
    let (project, mask): (String, String) = (row.get(2)?, row.get(4)?);
    let info = ApiKeyInfo {
        id: row.get(0)?,
        name: row.get(3)?,
        mask: serde_json::from_str(&mask).map_err(|error| bad(error.into()))?,
        created_at: time(row.get(5)?)?,
        last_used: row.get::<_, Option<i64>>(6)?.map(time).transpose()?,
        project: project.parse().map_err(|error: &str| bad(error.into()))?,
        max_sandboxes: row.get(7)?,
        requests_per_second: row.get(8)?,
        max_creating: row.get(9)?,
        max_paused: row.get(10)?,
        max_snapshots: row.get(11)?,
        max_disk_mib: row.get::<_, Option<i64>>(12)?.and_then(|mib| u64::try_from(mib).ok()),
    };
    Ok((row.get(1)?, info))
}

/// Writes an entry of the audit log, and returns its number.
pub(super) fn note(connection: &Connection, entry: &AuditEntry) -> Result<i64, rusqlite::Error> {
    connection
        .prepare_cached(
            "INSERT INTO audit (at_ms, project, key, action, target, status) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?
        .execute((
            entry.at.as_millisecond(),
            &entry.project,
            &entry.key_id,
            &entry.action,
            &entry.target,
            entry.status,
        ))?;
    let id = connection.last_insert_rowid();
    if id % AUDIT_TRIM == 0 {
        connection.prepare_cached("DELETE FROM audit WHERE id <= ?1")?.execute([id - AUDIT_ROWS])?;
    }
    Ok(id)
}

/// Writes how a request ended.
pub(super) fn note_end(connection: &Connection, ended: &Ended) -> Result<(), rusqlite::Error> {
    connection
        .prepare_cached("UPDATE audit SET status = ?2, target = ?3 WHERE id = ?1")?
        .execute((ended.entry, ended.status, &ended.target))
        .map(drop)
}

impl Database {
    /// The hash of each key and what it is, oldest first; of one project, or of all.
    pub async fn keys(&self, project: Option<String>) -> Result<Vec<(String, ApiKeyInfo)>, Error> {
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached(
                        "SELECT id, hash, project, name, mask, created_ms, used_ms, max_sandboxes, requests_per_s, \
                         max_creating, max_paused, max_snapshots, max_disk_mib FROM keys WHERE ?1 IS NULL OR project = ?1 ORDER BY created_ms, id",
                    )?
                    .query_map([project], key)?
                    .collect()
            })
            .await
    }

    /// Remembers a key by its hash.
    pub async fn add_key(&self, hash: String, info: ApiKeyInfo) -> Result<(), Error> {
        let mask = serde_json::to_string(&info.mask).unwrap_or_default();
        self.db
            .call_durable(move |connection| {
                connection
                    .prepare_cached(
                        "INSERT INTO keys (id, hash, project, name, mask, created_ms, max_sandboxes, requests_per_s, \
                         max_creating, max_paused, max_snapshots, max_disk_mib) \
                         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
                    )?
                    .execute((
                        &info.id,
                        hash,
                        info.project.as_str(),
                        &info.name,
                        mask,
                        info.created_at.as_millisecond(),
                        info.max_sandboxes,
                        info.requests_per_second,
                        info.max_creating,
                        info.max_paused,
                        info.max_snapshots,
                        info.max_disk_mib.map(|mib| i64::try_from(mib).unwrap_or(i64::MAX)),
                    ))
                    .map(drop)
            })
            .await
    }

    /// Gives a key another name; whether there is one of this id.
    pub async fn rename_key(&self, id: String, name: String) -> Result<bool, Error> {
        self.db
            .call_durable(move |connection| {
                let changed = connection
                    .prepare_cached("UPDATE keys SET name = ?2 WHERE id = ?1")?
                    .execute((id, name))?;
                Ok(changed > 0)
            })
            .await
    }

    /// Forgets a key; whether there was one of this id.
    pub async fn remove_key(&self, id: String) -> Result<bool, Error> {
        self.db
            .call_durable(move |connection| {
                Ok(connection.prepare_cached("DELETE FROM keys WHERE id = ?1")?.execute([id])? > 0)
            })
            .await
    }

    /// Writes an entry of the audit log, and returns its number.
    pub async fn note(&self, entry: AuditEntry) -> Result<i64, Error> {
        self.db.call(move |connection| note(connection, &entry)).await
    }

    /// Writes how a request ended.
    pub async fn note_end(&self, ended: Ended) -> Result<(), Error> {
        self.db.call(move |connection| note_end(connection, &ended)).await
    }

    /// Writes down when keys were used last.
    pub async fn note_used(&self, used: Vec<(String, i64)>) -> Result<(), Error> {
        self.db
            .call(move |connection| {
                let transaction = connection.transaction()?;
                for (id, ms) in &used {
                    transaction
                        .prepare_cached("UPDATE keys SET used_ms = ?2 WHERE id = ?1 AND used_ms IS NOT ?2")?
                        .execute((id, ms))?;
                }
                transaction.commit()
            })
            .await
    }

    /// The newest entries of the audit log below `before`, newest first.
    pub async fn audit(&self, before: Option<i64>, limit: usize) -> Result<Vec<AuditEntry>, Error> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached(
                        "SELECT id, at_ms, project, key, action, target, status FROM audit \
                         WHERE id < ?1 ORDER BY id DESC LIMIT ?2",
                    )?
                    .query_map((before.unwrap_or(i64::MAX), limit), |row| {
                        Ok(AuditEntry {
                            id: row.get(0)?,
                            at: time(row.get(1)?)?,
                            project: row.get(2)?,
                            key_id: row.get(3)?,
                            action: row.get(4)?,
                            target: row.get(5)?,
                            status: row.get(6)?,
                        })
                    })?
                    .collect()
            })
            .await
    }
}
