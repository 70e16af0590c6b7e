//! What is known of templates and snapshots beside what the node says: owners, tags, how often they were used.

use std::collections::HashMap;

use kelvin_host::db::Error;
use rusqlite::OptionalExtension;

use super::{Database, time};

/// One tag of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagRow {
    pub tag: String,
    pub build: String,
    pub created_at: jiff::Timestamp,
}

impl Database {
    /// Notes whose a snapshot is. A name is one snapshot's: who had it before keeps its id alone, so that a name which
    /// is deleted means nothing and never an older snapshot.
    pub async fn add_snapshot(&self, id: String, project: String, name: Option<String>) -> Result<(), Error> {
        let now = jiff::Timestamp::now().as_millisecond();
        self.0
            .call(move |connection| {
                let transaction = connection.transaction()?;
                if let Some(name) = &name {
                    transaction
                        .prepare_cached("UPDATE snapshots SET name = NULL WHERE project = ?1 AND name = ?2")?
                        .execute((&project, name))?;
                }
                transaction
                    .prepare_cached(
                        "INSERT OR REPLACE INTO snapshots (id, project, name, created_ms) VALUES (?1, ?2, ?3, ?4)",
                    )?
                    .execute((id, project, name, now))?;
                transaction.commit()
            })
            .await
    }

    /// Forgets whose a snapshot was, and its name with it: a database of an older build may have others of that name.
    pub async fn forget_snapshot(&self, id: String) -> Result<(), Error> {
        self.0
            .call(move |connection| {
                let transaction = connection.transaction()?;
                transaction
                    .prepare_cached(
                        "UPDATE snapshots SET name = NULL WHERE (project, name) IN \
                         (SELECT project, name FROM snapshots WHERE id = ?1)",
                    )?
                    .execute([&id])?;
                transaction.prepare_cached("DELETE FROM snapshots WHERE id = ?1")?.execute([&id])?;
                transaction.commit()
            })
            .await
    }

    /// The snapshot of a project that `text` names: its id, or its name.
    pub async fn snapshot(&self, project: &str, text: &str) -> Result<Option<String>, Error> {
        let (project, text) = (project.to_owned(), text.to_owned());
        self.0
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

    /// The owner of each snapshot that has one of its own, and its name.
    pub async fn snapshot_owners(&self) -> Result<HashMap<String, (String, Option<String>)>, Error> {
        self.0
            .call(move |connection| {
                connection
                    .prepare("SELECT id, project, name FROM snapshots")?
                    .query_map([], |row| Ok((row.get(0)?, (row.get(1)?, row.get(2)?))))?
                    .collect()
            })
            .await
    }

    /// The owner of one snapshot, when it has one of its own.
    pub async fn snapshot_owner(&self, id: &str) -> Result<Option<String>, Error> {
        let id = id.to_owned();
        self.0
            .call(move |connection| {
                connection
                    .prepare_cached("SELECT project FROM snapshots WHERE id = ?1")?
                    .query_row([id], |row| row.get(0))
                    .optional()
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
        let now = jiff::Timestamp::now().as_millisecond();
        self.0
            .call(move |connection| {
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
        self.0
            .call(move |connection| {
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
        self.0
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
        self.0
            .call(move |connection| {
                connection
                    .prepare("SELECT template, count, last_ms FROM spawns")?
                    .query_map([], |row| Ok((row.get(0)?, (row.get(1)?, time(row.get(2)?)?))))?
                    .collect()
            })
            .await
    }
}
