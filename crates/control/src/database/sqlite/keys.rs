//! API keys and the limits of projects in SQLite.

use async_trait::async_trait;
use kelvin_api::account::{ApiKeyInfo, Limits, Project, ProjectInfo, Used};
use rusqlite::{Connection, Row, Transaction};

use super::quota::used;
use super::{Sqlite, bad, time};
use crate::database::{Error, Keys, Known, Limited};

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

fn keys(
    connection: &Connection,
    project: Option<&str>,
) -> Result<Vec<(String, ApiKeyInfo)>, rusqlite::Error> {
    connection
        .prepare_cached(
            "SELECT id, hash, project, name, mask, created_ms, used_ms, max_sandboxes, requests_per_s, \
             max_creating, max_paused, max_snapshots, max_disk_mib FROM keys \
             WHERE ?1 IS NULL OR project = ?1 ORDER BY created_ms, id",
        )?
        .query_map([project], key)?
        .collect()
}

/// The limits of each project that has some.
fn limits(connection: &Connection) -> Result<Vec<(Project, Limits)>, rusqlite::Error> {
    connection
        .prepare_cached("SELECT name, limits FROM projects")?
        .query_map([], |row| {
            let (name, limits): (String, String) = (row.get(0)?, row.get(1)?);
            let name = name.parse().map_err(|error: &str| bad(error.into()))?;
            Ok((name, serde_json::from_str(&limits).map_err(|error| bad(error.into()))?))
        })?
        .collect()
}

/// Commits a change of keys or limits, for whoever has cached them.
fn commit(transaction: Transaction<'_>) -> Result<(), rusqlite::Error> {
    transaction
        .prepare_cached("UPDATE revisions SET number = number + 1 WHERE name = 'accounts'")?
        .execute([])?;
    transaction.commit()
}

#[async_trait]
impl Keys for Sqlite {
    async fn keys(&self, project: Option<String>) -> Result<Vec<(String, ApiKeyInfo)>, Error> {
        self.db.call(move |connection| keys(connection, project.as_deref())).await
    }

    async fn known_since(&self, revision: Option<i64>) -> Result<Option<Known>, Error> {
        self.db
            .call(move |connection| {
                let transaction = connection.transaction()?;
                let now: i64 = transaction
                    .prepare_cached("SELECT number FROM revisions WHERE name = 'accounts'")?
                    .query_row([], |row| row.get(0))?;
                if revision == Some(now) {
                    return Ok(None);
                }
                let (keys, limits) = (keys(&transaction, None)?, limits(&transaction)?);
                Ok(Some(Known { revision: now, keys, limits }))
            })
            .await
    }

    async fn add_key(&self, hash: String, info: ApiKeyInfo) -> Result<(), Error> {
        let mask = serde_json::to_string(&info.mask).unwrap_or_default();
        self.db
            .call_durable(move |connection| {
                let transaction = connection.transaction()?;
                transaction
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
                    ))?;
                commit(transaction)
            })
            .await
    }

    async fn rename_key(&self, id: String, name: String) -> Result<bool, Error> {
        self.db
            .call_durable(move |connection| {
                let changed = connection
                    .prepare_cached("UPDATE keys SET name = ?2 WHERE id = ?1")?
                    .execute((id, name))?;
                Ok(changed > 0)
            })
            .await
    }

    async fn remove_key(&self, id: String) -> Result<bool, Error> {
        self.db
            .call_durable(move |connection| {
                let transaction = connection.transaction()?;
                let removed = transaction.prepare_cached("DELETE FROM keys WHERE id = ?1")?.execute([id])?;
                if removed > 0 {
                    commit(transaction)?;
                }
                Ok(removed > 0)
            })
            .await
    }

    async fn note_used(&self, used: Vec<(String, i64)>) -> Result<(), Error> {
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

    async fn set_project_limits(&self, project: &Project, limits: Limits) -> Result<(), Error> {
        let (name, limits) = (project.to_string(), serde_json::to_string(&limits).unwrap_or_default());
        self.db
            .call_durable(move |connection| {
                let transaction = connection.transaction()?;
                transaction
                    .prepare_cached("INSERT OR REPLACE INTO projects (name, limits) VALUES (?1, ?2)")?
                    .execute((name, limits))?;
                commit(transaction)
            })
            .await
    }

    async fn projects(&self) -> Result<Vec<ProjectInfo>, Error> {
        self.db
            .call(|connection| {
                let names: Vec<(String, Option<String>)> = connection
                    .prepare_cached(
                        "SELECT name, (SELECT limits FROM projects WHERE projects.name = all_names.name) FROM \
                         (SELECT name FROM projects UNION SELECT project FROM keys UNION SELECT project FROM sandboxes \
                         UNION SELECT project FROM snapshots) AS all_names ORDER BY name",
                    )?
                    .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
                    .collect::<Result<_, _>>()?;
                names
                    .into_iter()
                    .map(|(name, limits)| {
                        let of = ("project", name.as_str());
                        let narrow = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
                        let used = Used {
                            sandboxes: narrow(used(connection, of, Limited::Sandboxes)?),
                            creating: narrow(used(connection, of, Limited::Creating)?),
                            paused: narrow(used(connection, of, Limited::Paused)?),
                            snapshots: narrow(used(connection, of, Limited::Snapshots)?),
                            disk_mib: used(connection, of, Limited::Disk)?,
                        };
                        let limits = limits.map(|text| serde_json::from_str(&text)).transpose();
                        Ok(ProjectInfo {
                            name: name.parse().map_err(|error: &str| bad(error.into()))?,
                            limits: limits.map_err(|error| bad(error.into()))?.unwrap_or_default(),
                            used,
                        })
                    })
                    .collect()
            })
            .await
    }
}
