//! What is known of templates and snapshots beside what the node says: owners, tags, how often they were used.

use std::collections::HashMap;

use kelvin_host::db::Error;
use rusqlite::OptionalExtension;

use super::{Database, Exceeded, More, Quota, time};
use crate::placement::NodeName;

/// A snapshot that is to be taken.
#[derive(Debug)]
pub struct NewSnapshot {
    /// Its id.
    pub id: String,
    /// MiB of disk that it may come to.
    pub mib: u64,
    /// What it is to be called.
    pub name: Option<String>,
    /// Where it is to be.
    pub node: NodeName,
}

/// Whose a snapshot is.
#[derive(Debug, Clone)]
pub struct Owner {
    pub project: String,
    pub name: Option<String>,
}

/// One tag of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagRow {
    pub tag: String,
    pub build: String,
    pub created_at: jiff::Timestamp,
}

impl Database {
    /// Notes whose a snapshot is to be, when `quota` has room for it, and what its idempotency key is about: before it is
    /// there. Until it is, its name means what it meant. The limit that it would exceed.
    pub async fn begin_snapshot(
        &self,
        snapshot: NewSnapshot,
        quota: Quota,
        key: Option<String>,
    ) -> Result<Option<Exceeded>, Error> {
        let now = self.clock.wall().as_millisecond();
        self.db
            .call_durable(move |connection| {
                let transaction = connection.transaction()?;
                let more = More { snapshots: 1, disk_mib: snapshot.mib, ..More::default() };
                if let Some(exceeded) = quota.check(&transaction, more)? {
                    return Ok(Some(exceeded));
                }
                transaction
                    .prepare_cached(
                        "INSERT INTO snapshots (id, project, created_ms, key, mib, wanted, node, state) \
                         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 'taking')",
                    )?
                    .execute((
                        &snapshot.id,
                        quota.project.as_str(),
                        now,
                        &quota.key,
                        i64::try_from(snapshot.mib).unwrap_or(i64::MAX),
                        &snapshot.name,
                        snapshot.node.as_str(),
                    ))?;
                if let Some(key) = key {
                    transaction
                        .prepare_cached("UPDATE idempotency SET subjects = ?2 WHERE key = ?1")?
                        .execute((key, serde_json::to_string(&[&snapshot.id]).unwrap_or_default()))?;
                }
                transaction.commit().map(|()| None)
            })
            .await
    }

    /// Notes that a snapshot is there now, and gives it its name. A name is one snapshot's: who had it before keeps its id
    /// alone, so that a name which is deleted means nothing and never an older snapshot.
    pub async fn finish_snapshot(&self, id: String) -> Result<(), Error> {
        self.db
            .call_durable(move |connection| {
                let transaction = connection.transaction()?;
                transaction
                    .prepare_cached(
                        "UPDATE snapshots SET name = NULL WHERE (project, name) IN \
                         (SELECT project, wanted FROM snapshots WHERE id = ?1 AND wanted IS NOT NULL)",
                    )?
                    .execute([&id])?;
                transaction
                    .prepare_cached(
                        "UPDATE snapshots SET name = COALESCE(wanted, name), wanted = NULL, state = 'kept' WHERE id = ?1",
                    )?
                    .execute([&id])?;
                transaction.commit()
            })
            .await
    }

    /// Snapshots that are being taken on `node`: after a start, those whose end the last server did not live to see.
    pub async fn unfinished_snapshots(&self, node: &NodeName) -> Result<Vec<String>, Error> {
        let node = node.clone();
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached("SELECT id FROM snapshots WHERE state = 'taking' AND node = ?1")?
                    .query_map([node.as_str()], |row| row.get(0))?
                    .collect()
            })
            .await
    }

    /// Gives what has no owner on `node` to the default project: once, for a database from before there were projects. Since then
    /// every snapshot has had an owner before it was there, and what has none is nobody's.
    pub async fn adopt_snapshots(
        &self,
        node: &NodeName,
        there: Vec<(String, Option<String>, i64)>,
    ) -> Result<(), Error> {
        let node = node.clone();
        self.db
            .call(move |connection| {
                let transaction = connection.transaction()?;
                let first = transaction
                    .prepare_cached("INSERT OR IGNORE INTO facts (name) VALUES ('snapshots have owners')")?
                    .execute([])?;
                if first == 1 {
                    for (id, name, created_ms) in there {
                        transaction
                            .prepare_cached(
                                "INSERT OR IGNORE INTO snapshots (id, project, name, created_ms, node) \
                                 VALUES (?1, 'default', ?2, ?3, ?4)",
                            )?
                            .execute((id, name, created_ms, node.as_str()))?;
                    }
                }
                transaction.commit()
            })
            .await
    }

    /// Forgets whose a snapshot of `node` was, and its name with it: a database of an older build may have others of that
    /// name. Nothing when it is another node's.
    pub async fn forget_snapshot(&self, node: &NodeName, id: String) -> Result<(), Error> {
        let node = node.clone();
        self.db
            .call_durable(move |connection| {
                let transaction = connection.transaction()?;
                transaction
                    .prepare_cached(
                        "UPDATE snapshots SET name = NULL WHERE (project, name) IN \
                         (SELECT project, name FROM snapshots WHERE id = ?1 AND node = ?2)",
                    )?
                    .execute((&id, node.as_str()))?;
                transaction
                    .prepare_cached("DELETE FROM snapshots WHERE id = ?1 AND node = ?2")?
                    .execute((&id, node.as_str()))?;
                transaction.commit()
            })
            .await
    }

    /// The snapshot of a project that `text` names: its id, or its name.
    pub async fn snapshot(&self, project: &str, text: &str) -> Result<Option<String>, Error> {
        let (project, text) = (project.to_owned(), text.to_owned());
        self.db
            .call(move |connection| {
                let by_id: Option<String> = connection
                    .prepare_cached("SELECT id FROM snapshots WHERE id = ?2 AND project = ?1")?
                    .query_row((&project, &text), |row| row.get(0))
                    .optional()?;
                match by_id {
                    Some(id) => Ok(Some(id)),
                    None => connection
                        .prepare_cached(
                            "SELECT id FROM snapshots WHERE project = ?1 AND name = ?2 \
                             ORDER BY created_ms DESC, id LIMIT 1",
                        )?
                        .query_row((&project, &text), |row| row.get(0))
                        .optional(),
                }
            })
            .await
    }

    /// The owner of each snapshot, and its name.
    pub async fn snapshot_owners(&self) -> Result<HashMap<String, Owner>, Error> {
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached("SELECT id, project, name FROM snapshots")?
                    .query_map([], |row| {
                        Ok((row.get(0)?, Owner { project: row.get(1)?, name: row.get(2)? }))
                    })?
                    .collect()
            })
            .await
    }

    /// Gives a template tags; one that it has already moves to this build.
    pub async fn add_tags(
        &self,
        project: String,
        template: String,
        build: String,
        tags: Vec<String>,
    ) -> Result<(), Error> {
        let now = self.clock.wall().as_millisecond();
        self.db
            .call_durable(move |connection| {
                let transaction = connection.transaction()?;
                for tag in &tags {
                    transaction
                        .prepare_cached(
                            "INSERT OR REPLACE INTO tags (project, template, tag, build, created_ms) \
                             VALUES (?1, ?2, ?3, ?4, ?5)",
                        )?
                        .execute((&project, &template, tag, &build, now))?;
                }
                transaction.commit()
            })
            .await
    }

    /// Takes tags from a template; the first that it does not have, and then none is taken.
    pub async fn remove_tags(
        &self,
        project: String,
        template: String,
        tags: Vec<String>,
    ) -> Result<Option<String>, Error> {
        self.db
            .call_durable(move |connection| {
                let transaction = connection.transaction()?;
                for tag in tags {
                    let removed = transaction
                        .prepare_cached("DELETE FROM tags WHERE project = ?1 AND template = ?2 AND tag = ?3")?
                        .execute((&project, &template, &tag))?;
                    if removed == 0 {
                        return Ok(Some(tag));
                    }
                }
                transaction.commit().map(|()| None)
            })
            .await
    }

    /// The tags of a template, newest first.
    pub async fn tags(&self, project: &str, template: &str) -> Result<Vec<TagRow>, Error> {
        let (project, template) = (project.to_owned(), template.to_owned());
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached(
                        "SELECT tag, build, created_ms FROM tags WHERE project = ?1 AND template = ?2 \
                         ORDER BY created_ms DESC, tag",
                    )?
                    .query_map((project, template), |row| {
                        Ok(TagRow { tag: row.get(0)?, build: row.get(1)?, created_at: time(row.get(2)?)? })
                    })?
                    .collect()
            })
            .await
    }

    /// How often each template was started, and when last.
    pub async fn spawns(&self) -> Result<HashMap<String, (i64, jiff::Timestamp)>, Error> {
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached("SELECT template, count, last_ms FROM spawns")?
                    .query_map([], |row| Ok((row.get(0)?, (row.get(1)?, time(row.get(2)?)?))))?
                    .collect()
            })
            .await
    }
}
