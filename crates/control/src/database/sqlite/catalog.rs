//! Owners, tags and how often templates were used in SQLite.

use std::collections::HashMap;

use async_trait::async_trait;
use rusqlite::{OptionalExtension, Row};

use super::builds::{note_untagged, tag};
use super::{Sqlite, time};
use crate::database::limits::More;
use crate::database::{Catalog, Error, Exceeded, NewSnapshot, Owner, Quota, TagRow};
use crate::placement::NodeName;

fn tag_row(row: &Row<'_>) -> Result<TagRow, rusqlite::Error> {
    Ok(TagRow { tag: row.get(0)?, build: row.get(1)?, created_at: time(row.get(2)?)? })
}

#[async_trait]
impl Catalog for Sqlite {
    async fn begin_snapshot(
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

    async fn finish_snapshot(&self, id: String) -> Result<(), Error> {
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

    async fn unfinished_snapshots(&self, node: &NodeName) -> Result<Vec<String>, Error> {
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

    async fn adopt_snapshots(
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

    async fn forget_snapshot(&self, node: &NodeName, id: String) -> Result<(), Error> {
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

    async fn snapshot(&self, project: &str, text: &str) -> Result<Option<String>, Error> {
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

    async fn snapshot_owners(&self) -> Result<HashMap<String, Owner>, Error> {
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

    async fn add_tags(
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
                tag(&transaction, [&project, &template, &build], &tags, now)?;
                transaction.commit()
            })
            .await
    }

    async fn remove_tags(
        &self,
        project: String,
        template: String,
        tags: Vec<String>,
    ) -> Result<Option<String>, Error> {
        let now = self.clock.wall().as_millisecond();
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
                note_untagged(&transaction, &template, now)?;
                transaction.commit().map(|()| None)
            })
            .await
    }

    async fn tags(&self, project: &str, template: &str) -> Result<Vec<TagRow>, Error> {
        let (project, template) = (project.to_owned(), template.to_owned());
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached(
                        "SELECT tag, build, created_ms FROM tags WHERE project = ?1 AND template = ?2 \
                         ORDER BY created_ms DESC, tag",
                    )?
                    .query_map((project, template), tag_row)?
                    .collect()
            })
            .await
    }

    async fn all_tags(&self) -> Result<Vec<(String, String, TagRow)>, Error> {
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached(
                        "SELECT tag, build, created_ms, project, template FROM tags \
                         ORDER BY project, template, created_ms DESC, tag",
                    )?
                    .query_map([], |row| Ok((row.get(3)?, row.get(4)?, tag_row(row)?)))?
                    .collect()
            })
            .await
    }

    async fn spawns(&self) -> Result<HashMap<String, (i64, jiff::Timestamp)>, Error> {
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
