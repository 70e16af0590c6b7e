//! Sandboxes in SQLite.

use async_trait::async_trait;
use kelvin_api::account::AuditEntry;
use kelvin_api::event::Happened;
use kelvin_api::id::{SandboxId, Token};
use kelvin_api::sandbox::{Lifecycle, OnTimeout, PauseMode, SandboxState, StartPath};
use kelvin_node_api::Live;
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params_from_iter};

use super::{Sqlite, answers, audit, bad, events, time};
use crate::database::limits::More;
use crate::database::{Begun, Claim, Ended, Error, Exceeded, Filter, NewKey, Quota, SandboxRow, Sandboxes};
use crate::placement::{Epoch, Placement};

fn word(state: SandboxState) -> &'static str {
    match state {
        SandboxState::Running => "running",
        SandboxState::Paused => "paused",
    }
}

const COLUMNS: &str = "id, template, metadata, access_token, allow_internet, vcpus, memory_mib, disk_mib, \
                       start_path, started_ms, ends_ms, traffic_token, state, on_timeout, auto_resume, parent, pause_memory, \
                       project, key, node, epoch";

fn sandbox(row: &Row<'_>) -> Result<SandboxRow, rusqlite::Error> {
    let (id, metadata, path): (String, String, String) = (row.get(0)?, row.get(2)?, row.get(8)?);
    Ok(SandboxRow {
        id: id.parse().map_err(|error: kelvin_api::id::ParseIdError| bad(error.into()))?,
        template: row.get(1)?,
        metadata: serde_json::from_str(&metadata).map_err(|error| bad(error.into()))?,
        access_token: row.get::<_, Option<String>>(3)?.map(Token::from_secret),
        allow_internet: row.get(4)?,
        vcpus: row.get(5)?,
        memory_mib: row.get(6)?,
        disk_mib: row.get(7)?,
        start_path: match path.as_str() {
            "warm" => StartPath::Warm,
            "clone" => StartPath::Clone,
            _ => StartPath::Cold,
        },
        started_at: time(row.get(9)?)?,
        ends_at: time(row.get(10)?)?,
        traffic_token: row.get::<_, Option<String>>(11)?.map(Token::from_secret),
        state: if row.get::<_, String>(12)? == "paused" {
            SandboxState::Paused
        } else {
            SandboxState::Running
        },
        lifecycle: Lifecycle {
            on_timeout: if row.get::<_, String>(13)? == "pause" { OnTimeout::Pause } else { OnTimeout::Kill },
            auto_resume: row.get(14)?,
            pause_mode: PauseMode::of(Some(row.get(16)?)),
        },
        parent: row
            .get::<_, Option<String>>(15)?
            .map(|id| id.parse())
            .transpose()
            .map_err(|error: kelvin_api::id::ParseIdError| bad(error.into()))?,
        project: row.get::<_, String>(17)?.parse().map_err(|error: &str| bad(error.into()))?,
        key: row.get(18)?,
        placement: Placement { node: row.get::<_, String>(19)?.into(), epoch: Epoch(row.get(20)?) },
    })
}

fn insert(connection: &Connection, row: &SandboxRow, metadata: &str) -> Result<(), rusqlite::Error> {
    connection
        .prepare_cached(
            "INSERT INTO sandboxes (id, state, template, metadata, access_token, allow_internet, \
             started_ms, ends_ms, traffic_token, on_timeout, auto_resume, parent, pause_memory, \
             project, key, disk_mib, memory_mib, node, epoch) VALUES (?1, 'creating', ?2, ?3, ?4, ?5, ?6, ?7, ?8, \
             ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18)",
        )?
        .execute(rusqlite::params![
            row.id.as_str(),
            &row.template,
            metadata,
            row.access_token.as_ref().map(Token::expose),
            row.allow_internet,
            row.started_at.as_millisecond(),
            row.ends_at.as_millisecond(),
            row.traffic_token.as_ref().map(Token::expose),
            if row.lifecycle.on_timeout == OnTimeout::Pause { "pause" } else { "kill" },
            row.lifecycle.auto_resume,
            row.parent.as_ref().map(SandboxId::as_str),
            row.lifecycle.pause_mode.is_full(),
            row.project.as_str(),
            &row.key,
            row.disk_mib,
            row.memory_mib,
            row.placement.node.as_str(),
            row.placement.epoch.0,
        ])
        .map(drop)
}

/// Whether a row is there that is not `by`'s to change.
fn is_anothers(transaction: &Transaction<'_>, id: &str, by: &Placement) -> Result<bool, rusqlite::Error> {
    transaction
        .prepare_cached("SELECT 1 FROM sandboxes WHERE id = ?1 AND NOT (node = ?2 AND epoch <= ?3)")?
        .exists((id, by.node.as_str(), by.epoch.0))
}

impl Sqlite {
    /// Removes the row of `id` and what `with_it` says; `reason`, when it was there for its owner, is why it ended.
    async fn forget(
        &self,
        by: &Placement,
        id: &SandboxId,
        with_it: &'static str,
        reason: Option<&str>,
    ) -> Result<(), Error> {
        let (by, id, now) = (by.clone(), id.to_string(), self.clock.wall());
        let ended = reason.map(|reason| Happened::Ended { reason: reason.to_owned() });
        self.db
            .call(move |connection| {
                let transaction = connection.transaction()?;
                if is_anothers(&transaction, &id, &by)? {
                    return Ok(());
                }
                transaction.prepare_cached(with_it)?.execute([&id])?;
                // What was never there for its owner has no end.
                if let Some(ended) = ended
                    && events::rank(&transaction, &id)?.is_some()
                {
                    events::note(&transaction, &id, now, ended)?;
                }
                transaction.prepare_cached("DELETE FROM sandboxes WHERE id = ?1")?.execute([&id])?;
                transaction.commit()
            })
            .await
    }
}

#[async_trait]
impl Sandboxes for Sqlite {
    async fn begin(
        &self,
        rows: &[SandboxRow],
        key: Option<NewKey>,
        quota: Option<Quota>,
        audit: Option<AuditEntry>,
    ) -> Result<Begun, Error> {
        let rows: Vec<(SandboxRow, String)> = rows
            .iter()
            .map(|row| (row.clone(), serde_json::to_string(&row.metadata).unwrap_or_default()))
            .collect();
        let now = self.clock.stamp(self.clock.now());
        let more = More {
            creating: u32::try_from(rows.len()).unwrap_or(u32::MAX),
            disk_mib: rows.iter().map(|(row, _)| u64::from(row.disk_mib)).sum(),
            ..More::default()
        };
        self.db
            .call(move |connection| {
                let transaction = connection.transaction()?;
                if let Some(exceeded) = quota.map_or(Ok(None), |quota| quota.check(&transaction, more))? {
                    return Ok(Begun::Exceeded(exceeded));
                }
                for (row, metadata) in &rows {
                    insert(&transaction, row, metadata)?;
                }
                if let (Some(key), Some((first, _))) = (key, rows.first()) {
                    let is_new = answers::remember(&transaction, &key, first.id.as_str(), &now)?;
                    if !is_new {
                        return Ok(Begun::KeyTaken);
                    }
                }
                let entry = audit.map(|entry| audit::note(&transaction, &entry)).transpose()?;
                transaction.commit().map(|()| Begun::Done(entry))
            })
            .await
    }

    async fn commit(
        &self,
        by: &Placement,
        live: &Live,
        reply: Option<String>,
        ended: Option<Ended>,
    ) -> Result<(), Error> {
        let (by, live, now) = (by.clone(), live.clone(), self.clock.wall());
        let is_written = self
            .db
            .call(move |connection| {
                let transaction = connection.transaction()?;
                let was_creating = transaction
                    .prepare_cached("SELECT parent FROM sandboxes WHERE id = ?1 AND state = 'creating'")?
                    .query_row([live.sandbox.as_str()], |row| row.get::<_, Option<String>>(0))
                    .optional()?;
                let changed = transaction
                    .prepare_cached(
                        "UPDATE sandboxes SET state = ?7, vcpus = ?2, memory_mib = ?3, disk_mib = ?4, \
                         start_path = ?5, started_ms = ?6, rank = ?8 WHERE id = ?1 AND node = ?9 AND epoch <= ?10",
                    )?
                    .execute((
                        live.sandbox.as_str(),
                        live.shape.vcpus,
                        live.shape.memory_mib.0,
                        live.shape.disk_mib.0,
                        live.start_path.name(),
                        live.started_at.as_millisecond(),
                        word(live.state),
                        i64::try_from(live.rank()).unwrap_or(i64::MAX),
                        by.node.as_str(),
                        by.epoch.0,
                    ))?;
                if changed == 0 && is_anothers(&transaction, live.sandbox.as_str(), &by)? {
                    return Ok(false);
                }
                // Not once more for one that is committed again.
                if let Some(parent) = was_creating {
                    let parent = parent.map(|id| id.parse()).transpose();
                    let parent = parent.map_err(|error: kelvin_api::id::ParseIdError| bad(error.into()))?;
                    let created = Happened::Created { start_path: live.start_path, parent };
                    events::note(&transaction, live.sandbox.as_str(), now, created)?;
                    // One that the server before this one made may have been paused since.
                    let rank = i64::try_from(live.rank()).unwrap_or(i64::MAX);
                    events::note_steps(&transaction, live.sandbox.as_str(), now, (1, rank))?;
                }
                transaction
                    .prepare_cached(
                        "INSERT INTO spawns (template, count, last_ms) SELECT template, 1, ?2 FROM sandboxes \
                         WHERE id = ?1 ON CONFLICT (template) DO UPDATE SET count = count + 1, last_ms = ?2",
                    )?
                    .execute((live.sandbox.as_str(), live.started_at.as_millisecond()))?;
                if let Some(reply) = reply {
                    transaction
                        .prepare_cached("UPDATE idempotency SET reply = ?2 WHERE sandbox = ?1")?
                        .execute((live.sandbox.as_str(), reply))?;
                }
                if let Some(ended) = ended {
                    audit::note_end(&transaction, &ended)?;
                }
                transaction.commit().map(|()| true)
            })
            .await?;
        if is_written { Ok(()) } else { Err(Error::Fenced) }
    }

    async fn set_live(&self, by: &Placement, live: &Live) -> Result<(), Error> {
        let (by, live, now) = (by.clone(), live.clone(), self.clock.wall());
        // What is known already costs no write, and no sync: a start tells everything again.
        let outlives_a_boot = live.state == SandboxState::Paused;
        let job = move |connection: &mut Connection| {
            let id = live.sandbox.as_str();
            let Some(before) = events::rank(connection, id)? else { return Ok(()) };
            let rank = i64::try_from(live.rank()).unwrap_or(i64::MAX);
            let transaction = connection.transaction()?;
            let changed = transaction
                .prepare_cached(
                    "UPDATE sandboxes SET state = ?2, ends_ms = ?3, rank = ?4 \
                     WHERE id = ?1 AND state != 'creating' AND rank <= ?4 \
                     AND (state, ends_ms, rank) IS NOT (?2, ?3, ?4) AND node = ?5 AND epoch <= ?6",
                )?
                .execute((
                    id,
                    word(live.state),
                    live.ends_at.as_millisecond(),
                    rank,
                    by.node.as_str(),
                    by.epoch.0,
                ))?;
            if changed > 0 {
                events::note_steps(&transaction, id, now, (before, rank))?;
            }
            transaction.commit()
        };
        if outlives_a_boot { self.db.call_durable(job).await } else { self.db.call(job).await }
    }

    async fn undo(&self, by: &Placement, id: &SandboxId) -> Result<(), Error> {
        self.forget(by, id, "DELETE FROM idempotency WHERE sandbox = ?1", None).await
    }

    async fn end(&self, by: &Placement, id: &SandboxId, reason: &str) -> Result<(), Error> {
        self.forget(by, id, "DELETE FROM metrics WHERE sandbox = ?1", Some(reason)).await
    }

    async fn get(&self, id: &SandboxId) -> Result<Option<SandboxRow>, Error> {
        let id = id.to_string();
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached(&format!(
                        "SELECT {COLUMNS} FROM sandboxes WHERE id = ?1 AND state != 'creating'"
                    ))?
                    .query_row([id], sandbox)
                    .optional()
            })
            .await
    }

    async fn set_deadline(&self, id: &SandboxId, ends_at: jiff::Timestamp) -> Result<(), Error> {
        let (id, now) = (id.to_string(), self.clock.wall());
        self.db
            .call(move |connection| {
                let transaction = connection.transaction()?;
                transaction
                    .prepare_cached("UPDATE sandboxes SET ends_ms = ?2 WHERE id = ?1")?
                    .execute((&id, ends_at.as_millisecond()))?;
                events::note(&transaction, &id, now, Happened::DeadlineSet { end_at: ends_at })?;
                transaction.commit()
            })
            .await
    }

    async fn set_internet(&self, id: &SandboxId, allowed: Option<bool>) -> Result<(), Error> {
        let (id, now) = (id.to_string(), self.clock.wall());
        self.db
            .call(move |connection| {
                let transaction = connection.transaction()?;
                transaction
                    .prepare_cached("UPDATE sandboxes SET allow_internet = ?2 WHERE id = ?1")?
                    .execute((&id, allowed))?;
                events::note(&transaction, &id, now, Happened::NetworkSet)?;
                transaction.commit()
            })
            .await
    }

    async fn list(&self, filter: Filter) -> Result<Vec<SandboxRow>, Error> {
        self.db
            .call(move |connection| {
                let mut sql = format!("SELECT {COLUMNS} FROM sandboxes WHERE state != 'creating'");
                let mut values: Vec<Value> = Vec::new();
                if let Some(project) = filter.project {
                    sql.push_str(" AND project = ?");
                    values.push(project.to_string().into());
                }
                for (key, value) in filter.metadata {
                    sql.push_str(
                        " AND EXISTS (SELECT 1 FROM json_each(metadata) WHERE key = ? AND value = ?)",
                    );
                    values.extend([Value::from(key), Value::from(value)]);
                }
                if let Some(state) = filter.state {
                    sql.push_str(" AND state = ?");
                    values.push(word(state).to_owned().into());
                }
                if let Some(template) = filter.template {
                    sql.push_str(" AND template = ?");
                    values.push(template.into());
                }
                if let Some(after) = filter.started_after {
                    sql.push_str(" AND started_ms >= ?");
                    values.push(after.as_millisecond().into());
                }
                let (compare, order) = if filter.ascending { (">", "ASC") } else { ("<", "DESC") };
                if let Some((started, id)) = filter.after {
                    sql.push_str(&format!(" AND (started_ms, id) {compare} (?, ?)"));
                    values.extend([Value::from(started), Value::from(id)]);
                }
                sql.push_str(&format!(" ORDER BY started_ms {order}, id {order} LIMIT ?"));
                values.push(Value::from(i64::try_from(filter.limit).unwrap_or(i64::MAX)));
                connection.prepare_cached(&sql)?.query_map(params_from_iter(values), sandbox)?.collect()
            })
            .await
    }

    async fn first_end(&self, key: &str) -> Result<Option<jiff::Timestamp>, Error> {
        let key = key.to_owned();
        self.db
            .call(move |connection| {
                let first: Option<i64> = connection
                    .prepare_cached(
                        "SELECT MIN(ends_ms) FROM sandboxes WHERE key = ?1 AND state = 'running'",
                    )?
                    .query_row([&key], |row| row.get(0))?;
                first.map(time).transpose()
            })
            .await
    }

    async fn children(&self, parent: &SandboxId) -> Result<Vec<SandboxId>, Error> {
        let parent = parent.to_string();
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached("SELECT id FROM sandboxes WHERE parent = ?1 AND state != 'creating'")?
                    .query_map([parent], |row| {
                        row.get::<_, String>(0)?
                            .parse()
                            .map_err(|error: kelvin_api::id::ParseIdError| bad(error.into()))
                    })?
                    .collect()
            })
            .await
    }

    async fn forget_claims(&self, by: &Placement) -> Result<(), Error> {
        let by = by.clone();
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached(
                        "UPDATE sandboxes SET claims = 0, pausing = 0 \
                         WHERE (claims > 0 OR pausing > 0) AND node = ?1 AND epoch <= ?2",
                    )?
                    .execute((by.node.as_str(), by.epoch.0))
                    .map(drop)
            })
            .await
    }

    async fn all(&self, by: &Placement) -> Result<Vec<(SandboxId, bool)>, Error> {
        let by = by.clone();
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached(
                        "SELECT id, state = 'creating' FROM sandboxes WHERE node = ?1 AND epoch <= ?2",
                    )?
                    .query_map((by.node.as_str(), by.epoch.0), |row| {
                        let id: String = row.get(0)?;
                        let id =
                            id.parse().map_err(|error: kelvin_api::id::ParseIdError| bad(error.into()))?;
                        Ok((id, row.get(1)?))
                    })?
                    .collect()
            })
            .await
    }
    async fn claim(&self, id: &SandboxId, quota: Option<Quota>) -> Result<Claim, Error> {
        let id = id.to_string();
        self.db
            .call(move |connection| {
                let transaction = connection.transaction()?;
                let claims: Option<u32> = transaction
                    .prepare_cached("SELECT claims FROM sandboxes WHERE id = ?1 AND state = 'paused'")?
                    .query_row([&id], |row| row.get(0))
                    .optional()?;
                let Some(claims) = claims else { return Ok(Claim::NotPaused) };
                // Whoever joins a resume takes no more than that.
                if claims == 0
                    && let Some(quota) = quota
                    && let Some(exceeded) =
                        quota.check(&transaction, More { resuming: 1, ..More::default() })?
                {
                    return Ok(Claim::Exceeded(exceeded));
                }
                transaction
                    .prepare_cached("UPDATE sandboxes SET claims = claims + 1 WHERE id = ?1")?
                    .execute([&id])?;
                transaction.commit().map(|()| Claim::Held)
            })
            .await
    }

    async fn disclaim(&self, id: &SandboxId) -> Result<(), Error> {
        let id = id.to_string();
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached("UPDATE sandboxes SET claims = MAX(claims - 1, 0) WHERE id = ?1")?
                    .execute([id])
                    .map(drop)
            })
            .await
    }

    async fn begin_pause(
        &self,
        id: &SandboxId,
        quota: Quota,
        memory_mib: u32,
    ) -> Result<Option<Exceeded>, Error> {
        let id = id.to_string();
        let more = More { paused: 1, disk_mib: memory_mib.into(), ..More::default() };
        self.db
            .call(move |connection| {
                let transaction = connection.transaction()?;
                if let Some(exceeded) = quota.check(&transaction, more)? {
                    return Ok(Some(exceeded));
                }
                transaction
                    .prepare_cached("UPDATE sandboxes SET pausing = 1 WHERE id = ?1 AND state = 'running'")?
                    .execute([&id])?;
                transaction.commit().map(|()| None)
            })
            .await
    }

    async fn end_pause(&self, id: &SandboxId) -> Result<(), Error> {
        let id = id.to_string();
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached("UPDATE sandboxes SET pausing = 0 WHERE id = ?1")?
                    .execute([id])
                    .map(drop)
            })
            .await
    }
}
