//! The audit log in SQLite.

use async_trait::async_trait;
use kelvin_api::account::AuditEntry;
use rusqlite::Connection;

use super::{Sqlite, time};
use crate::database::{AuditLog, Ended, Error};

/// Entries of the audit log that are kept.
const AUDIT_ROWS: i64 = 1_000_000;
/// Every how many entries the oldest go.
const AUDIT_TRIM: i64 = 256;

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

#[async_trait]
impl AuditLog for Sqlite {
    async fn note(&self, entry: AuditEntry) -> Result<i64, Error> {
        self.db.call(move |connection| note(connection, &entry)).await
    }

    async fn note_end(&self, ended: Ended) -> Result<(), Error> {
        self.db.call(move |connection| note_end(connection, &ended)).await
    }

    async fn audit(&self, before: Option<i64>, limit: usize) -> Result<Vec<AuditEntry>, Error> {
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
