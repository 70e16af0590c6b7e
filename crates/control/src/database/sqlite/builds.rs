//! Builds, what they said and whose templates are in SQLite.

use std::collections::HashMap;

use async_trait::async_trait;
use kelvin_api::id::BuildId;
use kelvin_api::sandbox::LogLevel;
use rusqlite::{Connection, OptionalExtension, Row};

use super::{Sqlite, bad, time};
use crate::database::{
    BuildEnd, BuildError, BuildLine, BuildRow, BuildState, Builds, Caps, DEFAULT_TAG, Error, Lines, NewBuild,
    Requested, Started, TemplateOwner, Wanted,
};
use crate::placement::NodeName;

type Sql<T> = Result<T, rusqlite::Error>;

const COLUMNS: &str = "id, template, project, state, wanted, created_ms, updated_ms, ended_ms, image, error, disk_mib, \
     untagged_ms";

/// What stands in place of what a build said.
const FORGOTTEN: &str =
    "what this build said is not kept any more: later builds of the project have said more";

fn json<T: serde::de::DeserializeOwned>(text: &str) -> Sql<T> {
    serde_json::from_str(text).map_err(|error| bad(error.into()))
}

fn text(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

fn state_of(text: &str) -> Sql<BuildState> {
    Ok(match text {
        "requested" => BuildState::Requested,
        "waiting" => BuildState::Waiting,
        "building" => BuildState::Building,
        "ready" => BuildState::Ready,
        "error" => BuildState::Error,
        _ => return Err(bad(format!("{text:?} is no state of a build").into())),
    })
}

fn row(row: &Row<'_>) -> Sql<BuildRow> {
    let id: String = row.get(0)?;
    let (wanted, error): (String, Option<String>) = (row.get(4)?, row.get(9)?);
    Ok(BuildRow {
        id: id.parse().map_err(|error: kelvin_api::id::ParseIdError| bad(error.into()))?,
        template: row.get(1)?,
        project: row.get(2)?,
        state: state_of(&row.get::<_, String>(3)?)?,
        wanted: json(&wanted)?,
        created_at: time(row.get(5)?)?,
        updated_at: time(row.get(6)?)?,
        ended_at: row.get::<_, Option<i64>>(7)?.map(time).transpose()?,
        image: row.get(8)?,
        error: error.as_deref().map(json).transpose()?,
        disk_mib: row.get(10)?,
        untagged_at: row.get::<_, Option<i64>>(11)?.map(time).transpose()?,
    })
}

fn level_of(number: i64) -> LogLevel {
    match number {
        0 => LogLevel::Debug,
        1 => LogLevel::Info,
        2 => LogLevel::Warn,
        _ => LogLevel::Error,
    }
}

fn line(row: &Row<'_>) -> Sql<BuildLine> {
    Ok(BuildLine {
        at: time(row.get(0)?)?,
        level: level_of(row.get(1)?),
        step: row.get(2)?,
        message: row.get(3)?,
    })
}

/// Whose templates are, and what their default tags name. Its text is the digest of an image where it was given to what was built
/// when one version of a name was kept.
const OWNERS: &str = "SELECT t.project, t.public, t.created_ms, g.build, t.name FROM templates t \
     LEFT JOIN tags g ON g.project = t.project AND g.template = t.name AND g.tag = 'default'";

fn owner(row: &Row<'_>) -> Sql<TemplateOwner> {
    let default: Option<String> = row.get(3)?;
    Ok(TemplateOwner {
        project: row.get(0)?,
        public: row.get(1)?,
        created_at: time(row.get(2)?)?,
        default: default.and_then(|build| build.parse().ok()),
    })
}

fn owner_of(connection: &Connection, template: &str) -> Sql<Option<TemplateOwner>> {
    let sql = format!("{OWNERS} WHERE t.name = ?1");
    connection.prepare_cached(&sql)?.query_row([template], owner).optional()
}

/// Has tags of a template name `build`, and notes since when the versions are unnamed that nothing names now.
pub(super) fn tag(
    connection: &Connection,
    [project, template, build]: [&str; 3],
    tags: &[String],
    now: i64,
) -> Sql<()> {
    let has_default =
        "SELECT 1 FROM tags g JOIN builds b ON b.id = g.build WHERE g.template = ?1 AND g.tag = 'default'";
    if tags.iter().any(|tag| tag == DEFAULT_TAG)
        && !connection.prepare_cached(has_default)?.exists([template])?
    {
        // Until now the name meant the version that has no build, whatever other tags named: its time begins now.
        connection
            .prepare_cached("UPDATE builds SET untagged_ms = NULL WHERE template = ?1 AND state = 'ready'")?
            .execute([template])?;
    }
    for tag in tags {
        connection
            .prepare_cached(
                "INSERT OR REPLACE INTO tags (project, template, tag, build, created_ms) VALUES (?1, ?2, ?3, ?4, ?5)",
            )?
            .execute((project, template, tag, build, now))?;
    }
    note_untagged(connection, template, now)
}

/// Notes since when the versions of a template are unnamed that no tag of its project names now.
pub(super) fn note_untagged(connection: &Connection, template: &str, now: i64) -> Sql<()> {
    connection
        .prepare_cached(
            "WITH named AS (SELECT g.build FROM tags g JOIN templates t ON t.name = g.template AND t.project = g.project \
             WHERE g.template = ?1) \
             UPDATE builds SET untagged_ms = CASE WHEN id IN named OR image IN named THEN NULL \
             ELSE COALESCE(untagged_ms, ?2) END WHERE template = ?1 AND state = 'ready'",
        )?
        .execute((template, now))
        .map(drop)
}

fn count(connection: &Connection, sql: &str, of: &str) -> Sql<u64> {
    let found: i64 = connection.prepare_cached(sql)?.query_row([of], |row| row.get(0))?;
    Ok(u64::try_from(found).unwrap_or(0))
}

/// Forgets the builds that `chosen`, a query of ids with the parameters ?1 and ?2, finds.
fn forget(connection: &Connection, chosen: &str, of: &str, number: i64) -> Sql<()> {
    let lines = format!("DELETE FROM build_lines WHERE build IN ({chosen})");
    connection.prepare_cached(&lines)?.execute((of, number))?;
    let builds = format!("DELETE FROM builds WHERE id IN ({chosen})");
    connection.prepare_cached(&builds)?.execute((of, number)).map(drop)
}

/// What a line takes beside its text.
const LINE_BYTES: u64 = 64;

/// Forgets what the oldest builds of a project said, beyond `most` bytes of those that have ended.
fn forget_lines(connection: &Connection, project: &str, most: u64) -> Sql<()> {
    let most = i64::try_from(most).unwrap_or(i64::MAX);
    let chosen: Vec<String> = connection
        .prepare_cached(
            "SELECT id FROM (SELECT id, SUM(log_bytes) OVER (ORDER BY ended_ms DESC, id DESC) AS up_to FROM builds \
             WHERE project = ?1 AND state IN ('ready', 'error') AND log_bytes > 0) WHERE up_to > ?2",
        )?
        .query_map((project, most), |row| row.get(0))?
        .collect::<Sql<_>>()?;
    for id in chosen {
        connection.prepare_cached("DELETE FROM build_lines WHERE build = ?1")?.execute([&id])?;
        connection
            .prepare_cached(
                "INSERT INTO build_lines (build, n, at_ms, level, step, message) \
                 SELECT id, 0, ended_ms, ?2, NULL, ?3 FROM builds WHERE id = ?1",
            )?
            .execute((&id, LogLevel::Info as i64, FORGOTTEN))?;
        connection.prepare_cached("UPDATE builds SET log_bytes = 0 WHERE id = ?1")?.execute([&id])?;
    }
    Ok(())
}

fn request(connection: &Connection, build: &NewBuild, caps: Caps, now: i64) -> Sql<Requested> {
    let (project, template) = (build.project.as_str(), build.template.as_str());
    forget(
        connection,
        "SELECT id FROM builds WHERE project = ?1 AND state = 'requested' AND created_ms < ?2",
        project,
        now.saturating_sub(caps.life_ms),
    )?;
    let owned = owner_of(connection, template)?;
    let known = match owned {
        Some(owner) if owner.project != project => return Ok(Requested::NameTaken),
        known => known,
    };
    let templates = count(connection, "SELECT COUNT(*) FROM templates WHERE project = ?1", project)?;
    if known.is_none() && templates >= caps.templates {
        return Ok(Requested::TooMany { what: "templates of its own", limit: caps.templates });
    }
    let sql = "SELECT COUNT(*) FROM builds WHERE project = ?1 AND state = 'requested'";
    if count(connection, sql, project)? >= caps.requested {
        return Ok(Requested::TooMany { what: "builds that were not started", limit: caps.requested });
    }
    let mut tags: Vec<String> = connection
        .prepare_cached("SELECT tag FROM tags WHERE project = ?1 AND template = ?2")?
        .query_map((project, template), |row| row.get(0))?
        .collect::<Sql<_>>()?;
    tags.extend(build.wanted.tags.iter().cloned());
    tags.sort();
    tags.dedup();
    if tags.len() as u64 > caps.tags {
        return Ok(Requested::TooMany { what: "tags of this template", limit: caps.tags });
    }
    // Those that tags name are not among them, by id or by image, nor the last ones that tags have named: there is a way back to
    // them; nor the newest that is ready: it may be from before tags named builds.
    forget(
        connection,
        "SELECT id FROM builds WHERE template = ?1 AND state IN ('ready', 'error') AND id NOT IN \
         (SELECT id FROM builds WHERE template = ?1 AND state = 'ready' ORDER BY ended_ms DESC LIMIT 1) \
         AND id NOT IN (SELECT id FROM builds WHERE template = ?1 AND untagged_ms IS NOT NULL \
         ORDER BY untagged_ms DESC LIMIT 5) \
         AND id NOT IN (SELECT build FROM tags WHERE template = ?1) \
         AND COALESCE(image, '') NOT IN (SELECT build FROM tags WHERE template = ?1) \
         ORDER BY created_ms DESC, id DESC LIMIT -1 OFFSET ?2",
        template,
        i64::try_from(caps.kept).unwrap_or(i64::MAX),
    )?;
    connection
        .prepare_cached("INSERT OR IGNORE INTO templates (name, project, created_ms) VALUES (?1, ?2, ?3)")?
        .execute((template, project, now))?;
    connection
        .prepare_cached(
            "INSERT INTO builds (id, template, project, node, state, wanted, created_ms, updated_ms) \
             VALUES (?1, ?2, ?3, ?4, 'requested', ?5, ?6, ?6)",
        )?
        .execute((build.id.as_str(), template, project, build.node.as_str(), text(&build.wanted), now))?;
    if let Some(key) = &build.key {
        connection
            .prepare_cached("UPDATE idempotency SET subjects = ?2 WHERE key = ?1")?
            .execute((key, text(&[build.id.as_str()])))?;
    }
    let owner =
        TemplateOwner { project: project.to_owned(), public: false, created_at: time(now)?, default: None };
    Ok(Requested::Done(known.unwrap_or(owner)))
}

fn end(connection: &Connection, id: &str, end: &BuildEnd, now: i64) -> Sql<bool> {
    const OPEN: &str = "state IN ('requested', 'waiting', 'building')";
    let ended = match end {
        BuildEnd::Ready { image, disk_mib, vcpus, memory_mib } => connection
            .prepare_cached(&format!(
                "UPDATE builds SET state = 'ready', image = ?2, disk_mib = ?3, updated_ms = ?4, ended_ms = ?4, \
                 wanted = json_set(wanted, '$.vcpus', ?5, '$.memory_mib', ?6) WHERE id = ?1 AND {OPEN}"
            ))?
            .execute((id, image, disk_mib, now, vcpus, memory_mib))?,
        BuildEnd::Error(error) => connection
            .prepare_cached(&format!(
                "UPDATE builds SET state = 'error', error = ?2, updated_ms = ?3, ended_ms = ?3 WHERE id = ?1 AND {OPEN}"
            ))?
            .execute((id, text(error), now))?,
    };
    if ended == 0 {
        return Ok(false);
    }
    if let BuildEnd::Ready { .. } = end {
        let (project, template, wanted): (String, String, String) = connection
            .prepare_cached("SELECT project, template, wanted FROM builds WHERE id = ?1")?
            .query_row([id], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        let mut tags = json::<Wanted>(&wanted)?.tags;
        if tags.is_empty() {
            tags.push(DEFAULT_TAG.to_owned());
        }
        tag(connection, [&project, &template, id], &tags, now)?;
    }
    Ok(true)
}

#[async_trait]
impl Builds for Sqlite {
    async fn request_build(&self, build: NewBuild, caps: Caps) -> Result<Requested, Error> {
        let now = self.clock.wall().as_millisecond();
        self.db
            .call_durable(move |connection| {
                let transaction = connection.transaction()?;
                let requested = request(&transaction, &build, caps, now)?;
                if matches!(requested, Requested::Done(_)) {
                    transaction.commit()?;
                }
                Ok(requested)
            })
            .await
    }

    async fn start_build(&self, id: &BuildId, caps: Caps) -> Result<Started, Error> {
        let (id, now) = (id.to_string(), self.clock.wall().as_millisecond());
        self.db
            .call_durable(move |connection| {
                let transaction = connection.transaction()?;
                let project: Option<String> = transaction
                    .prepare_cached("SELECT project FROM builds WHERE id = ?1 AND state = 'requested'")?
                    .query_row([&id], |row| row.get(0))
                    .optional()?;
                let Some(project) = project else { return Ok(Started::NotRequested) };
                let sql =
                    "SELECT COUNT(*) FROM builds WHERE project = ?1 AND state IN ('waiting', 'building')";
                if count(&transaction, sql, &project)? >= caps.under_way {
                    return Ok(Started::TooMany { limit: caps.under_way });
                }
                forget_lines(&transaction, &project, caps.log_bytes)?;
                transaction
                    .prepare_cached("UPDATE builds SET state = 'waiting', updated_ms = ?2 WHERE id = ?1")?
                    .execute((&id, now))?;
                transaction.commit()?;
                Ok(Started::Done)
            })
            .await
    }

    async fn run_build(&self, id: &BuildId) -> Result<(), Error> {
        let (id, now) = (id.to_string(), self.clock.wall().as_millisecond());
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached(
                        "UPDATE builds SET state = 'building', updated_ms = ?2 WHERE id = ?1 AND state = 'waiting'",
                    )?
                    .execute((id, now))
                    .map(drop)
            })
            .await
    }

    async fn end_build(&self, id: &BuildId, how: BuildEnd) -> Result<bool, Error> {
        let (id, now) = (id.to_string(), self.clock.wall().as_millisecond());
        self.db
            .call_durable(move |connection| {
                let transaction = connection.transaction()?;
                let ended = end(&transaction, &id, &how, now)?;
                transaction.commit()?;
                Ok(ended)
            })
            .await
    }

    async fn interrupt_builds(&self, node: &NodeName, error: BuildError) -> Result<Vec<BuildId>, Error> {
        let (node, now) = (node.clone(), self.clock.wall().as_millisecond());
        self.db
            .call_durable(move |connection| {
                let ended: Vec<String> = connection
                    .prepare_cached(
                        "UPDATE builds SET state = 'error', error = ?2, updated_ms = ?3, ended_ms = ?3 \
                         WHERE node = ?1 AND state IN ('waiting', 'building') RETURNING id",
                    )?
                    .query_map((node.as_str(), text(&error), now), |row| row.get(0))?
                    .collect::<Sql<_>>()?;
                Ok(ended.iter().filter_map(|id| id.parse().ok()).collect())
            })
            .await
    }

    async fn build(&self, id: &BuildId) -> Result<Option<BuildRow>, Error> {
        let id = id.to_string();
        self.db
            .call(move |connection| {
                let sql = format!("SELECT {COLUMNS} FROM builds WHERE id = ?1");
                connection.prepare_cached(&sql)?.query_row([id], row).optional()
            })
            .await
    }

    async fn builds_of(
        &self,
        template: &str,
        after: Option<(i64, String)>,
        limit: usize,
    ) -> Result<Vec<BuildRow>, Error> {
        let template = template.to_owned();
        let (ms, id) = after.unwrap_or((i64::MAX, "~".to_owned()));
        self.db
            .call(move |connection| {
                let sql = format!(
                    "SELECT {COLUMNS} FROM builds WHERE template = ?1 AND (created_ms, id) < (?2, ?3) \
                     ORDER BY created_ms DESC, id DESC LIMIT ?4"
                );
                let limit = i64::try_from(limit).unwrap_or(i64::MAX);
                connection.prepare_cached(&sql)?.query_map((template, ms, id, limit), row)?.collect()
            })
            .await
    }

    async fn build_of_image(&self, template: &str, image: &str) -> Result<Option<BuildId>, Error> {
        let (template, image) = (template.to_owned(), image.to_owned());
        self.db
            .call(move |connection| {
                let found: Option<String> = connection
                    .prepare_cached(
                        "SELECT id FROM builds WHERE template = ?1 AND image = ?2 AND state = 'ready' \
                         ORDER BY ended_ms DESC LIMIT 1",
                    )?
                    .query_row((template, image), |row| row.get(0))
                    .optional()?;
                Ok(found.and_then(|id| id.parse().ok()))
            })
            .await
    }

    async fn add_build_lines(&self, id: &BuildId, first: u64, lines: Vec<BuildLine>) -> Result<(), Error> {
        let (id, first) = (id.to_string(), i64::try_from(first).unwrap_or(i64::MAX));
        self.db
            .call(move |connection| {
                let transaction = connection.transaction()?;
                let mut added = 0;
                for (number, line) in (first..).zip(&lines) {
                    let rows = transaction
                        .prepare_cached(
                            "INSERT OR IGNORE INTO build_lines (build, n, at_ms, level, step, message) \
                             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                        )?
                        .execute((
                            &id,
                            number,
                            line.at.as_millisecond(),
                            line.level as i64,
                            line.step,
                            &line.message,
                        ))?;
                    added += rows as u64 * (LINE_BYTES + line.message.len() as u64);
                }
                transaction
                    .prepare_cached("UPDATE builds SET log_bytes = log_bytes + ?2 WHERE id = ?1")?
                    .execute((&id, i64::try_from(added).unwrap_or(i64::MAX)))?;
                transaction.commit()
            })
            .await
    }

    async fn build_lines(
        &self,
        id: &BuildId,
        lines: Lines,
        level: LogLevel,
        limit: usize,
    ) -> Result<Vec<BuildLine>, Error> {
        let id = id.to_string();
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        // ?3 is a place: a number, a time or a step.
        let (place, order, number) = match lines {
            // Without a level the place is a number: nothing is counted for it.
            Lines::Skip(skip) if level == LogLevel::Debug => {
                ("n >= ?3", "n", i64::try_from(skip).unwrap_or(i64::MAX))
            }
            Lines::Skip(skip) => ("?3 >= 0", "n", i64::try_from(skip).unwrap_or(i64::MAX)),
            Lines::From(ms) => ("at_ms >= ?3", "n", ms),
            Lines::Back(ms) => ("at_ms <= ?3", "n DESC", ms.unwrap_or(i64::MAX)),
            Lines::LastOf(step) => ("COALESCE(step, -1) = ?3", "n DESC", step.map_or(-1, i64::from)),
        };
        let offset = match lines {
            Lines::Skip(_) if level != LogLevel::Debug => number,
            _ => 0,
        };
        let is_turned = matches!(lines, Lines::LastOf(_));
        self.db
            .call(move |connection| {
                let sql = format!(
                    "SELECT at_ms, level, step, message FROM build_lines WHERE build = ?1 AND level >= ?2 AND {place} \
                     ORDER BY {order} LIMIT ?4 OFFSET ?5"
                );
                let mut found: Vec<BuildLine> = connection
                    .prepare_cached(&sql)?
                    .query_map((id, level as i64, number, limit, offset), line)?
                    .collect::<Sql<_>>()?;
                if is_turned {
                    found.reverse();
                }
                Ok(found)
            })
            .await
    }

    async fn template_owner(&self, template: &str) -> Result<Option<TemplateOwner>, Error> {
        let template = template.to_owned();
        self.db.call(move |connection| owner_of(connection, &template)).await
    }

    async fn template_owners(&self) -> Result<HashMap<String, TemplateOwner>, Error> {
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached(OWNERS)?
                    .query_map([], |row| Ok((row.get(4)?, owner(row)?)))?
                    .collect()
            })
            .await
    }

    async fn set_template_public(&self, project: &str, template: &str, public: bool) -> Result<bool, Error> {
        let (project, template) = (project.to_owned(), template.to_owned());
        self.db
            .call_durable(move |connection| {
                let changed = connection
                    .prepare_cached("UPDATE templates SET public = ?3 WHERE project = ?1 AND name = ?2")?
                    .execute((project, template, public))?;
                Ok(changed == 1)
            })
            .await
    }

    async fn forget_template(&self, template: &str) -> Result<(), Error> {
        let template = template.to_owned();
        self.db
            .call_durable(move |connection| {
                let transaction = connection.transaction()?;
                forget(&transaction, "SELECT id FROM builds WHERE template = ?1 AND ?2 = 0", &template, 0)?;
                for sql in ["DELETE FROM tags WHERE template = ?1", "DELETE FROM templates WHERE name = ?1"] {
                    transaction.prepare_cached(sql)?.execute([&template])?;
                }
                transaction.commit()
            })
            .await
    }
}
