//! `kelvin.db`: sandboxes; idempotency keys (`answers`), API keys and the audit log (`accounts`), what they may have
//! (`quota`), what is known of templates and snapshots (`catalog`), measurements (`meter`).

mod accounts;
mod answers;
mod catalog;
mod meter;
#[cfg(test)]
mod power;
mod quota;

pub use answers::NewKey;
pub use catalog::{NewSnapshot, TagRow};
pub use quota::{Claim, Exceeded, Limited, More, Quota};

use std::path::Path;

use kelvin_api::account::{AuditEntry, Project};
use kelvin_api::id::{SandboxId, Token};
use kelvin_api::sandbox::{Lifecycle, Metadata, OnTimeout, PauseMode, SandboxState, StartPath};
use kelvin_host::clock::Clock;
use kelvin_host::db::{Db, Error};
use kelvin_node_api::Live;
use rusqlite::types::{Type, Value};
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params_from_iter};

use crate::placement::{Epoch, Placement};

const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE sandboxes (
        id TEXT PRIMARY KEY,
        state TEXT NOT NULL CHECK (state IN ('creating', 'running')),
        template TEXT NOT NULL,
        metadata TEXT NOT NULL,
        access_token TEXT,
        allow_internet INTEGER,
        vcpus INTEGER NOT NULL DEFAULT 0,
        memory_mib INTEGER NOT NULL DEFAULT 0,
        disk_mib INTEGER NOT NULL DEFAULT 0,
        start_path TEXT NOT NULL DEFAULT 'cold',
        started_ms INTEGER NOT NULL,
        ends_ms INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX sandboxes_by_start ON sandboxes (started_ms, id);
    CREATE TABLE idempotency (
        key TEXT PRIMARY KEY,
        fingerprint TEXT NOT NULL,
        sandbox TEXT NOT NULL,
        reply TEXT,
        created_ms INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX idempotency_by_sandbox ON idempotency (sandbox);
    CREATE INDEX idempotency_by_age ON idempotency (created_ms);
",
    "
    ALTER TABLE sandboxes ADD COLUMN traffic_token TEXT;
",
    // A constraint cannot be changed in place.
    "
    CREATE TABLE sandboxes_3 (
        id TEXT PRIMARY KEY,
        state TEXT NOT NULL CHECK (state IN ('creating', 'running', 'paused')),
        template TEXT NOT NULL,
        metadata TEXT NOT NULL,
        access_token TEXT,
        allow_internet INTEGER,
        vcpus INTEGER NOT NULL DEFAULT 0,
        memory_mib INTEGER NOT NULL DEFAULT 0,
        disk_mib INTEGER NOT NULL DEFAULT 0,
        start_path TEXT NOT NULL DEFAULT 'cold',
        started_ms INTEGER NOT NULL,
        ends_ms INTEGER NOT NULL,
        traffic_token TEXT,
        rank INTEGER NOT NULL DEFAULT 0,
        on_timeout TEXT NOT NULL DEFAULT 'kill' CHECK (on_timeout IN ('kill', 'pause')),
        auto_resume INTEGER NOT NULL DEFAULT 0,
        parent TEXT
    ) WITHOUT ROWID;
    INSERT INTO sandboxes_3 (id, state, template, metadata, access_token, allow_internet, vcpus, memory_mib, disk_mib,
        start_path, started_ms, ends_ms, traffic_token)
        SELECT id, state, template, metadata, access_token, allow_internet, vcpus, memory_mib, disk_mib, start_path,
        started_ms, ends_ms, traffic_token FROM sandboxes;
    DROP TABLE sandboxes;
    ALTER TABLE sandboxes_3 RENAME TO sandboxes;
    CREATE INDEX sandboxes_by_start ON sandboxes (started_ms, id);
",
    "
    ALTER TABLE sandboxes ADD COLUMN pause_memory INTEGER NOT NULL DEFAULT 1;
",
    // What was there before there were projects is of the default one. A snapshot without a row is too.
    "
    ALTER TABLE sandboxes ADD COLUMN project TEXT NOT NULL DEFAULT 'default';
    ALTER TABLE sandboxes ADD COLUMN key TEXT NOT NULL DEFAULT '';
    CREATE INDEX sandboxes_by_project ON sandboxes (project, started_ms, id);
    CREATE INDEX sandboxes_by_key ON sandboxes (key, state);
    CREATE TABLE keys (
        id TEXT PRIMARY KEY,
        hash TEXT NOT NULL UNIQUE,
        project TEXT NOT NULL,
        name TEXT NOT NULL,
        mask TEXT NOT NULL,
        created_ms INTEGER NOT NULL,
        used_ms INTEGER,
        max_sandboxes INTEGER,
        requests_per_s INTEGER
    ) WITHOUT ROWID;
    CREATE TABLE audit (
        id INTEGER PRIMARY KEY,
        at_ms INTEGER NOT NULL,
        project TEXT NOT NULL,
        key TEXT NOT NULL,
        action TEXT NOT NULL,
        target TEXT NOT NULL,
        status INTEGER NOT NULL
    );
    CREATE TABLE snapshots (
        id TEXT PRIMARY KEY,
        project TEXT NOT NULL,
        name TEXT,
        created_ms INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX snapshots_by_name ON snapshots (project, name, created_ms);
    CREATE TABLE tags (
        project TEXT NOT NULL,
        template TEXT NOT NULL,
        tag TEXT NOT NULL,
        build TEXT NOT NULL,
        created_ms INTEGER NOT NULL,
        PRIMARY KEY (project, template, tag)
    ) WITHOUT ROWID;
    CREATE TABLE spawns (
        template TEXT PRIMARY KEY,
        count INTEGER NOT NULL,
        last_ms INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE metrics (
        sandbox TEXT NOT NULL,
        at_s INTEGER NOT NULL,
        cpu_count INTEGER NOT NULL,
        cpu_pct REAL NOT NULL,
        mem_used INTEGER NOT NULL,
        mem_total INTEGER NOT NULL,
        mem_cache INTEGER NOT NULL,
        disk_used INTEGER NOT NULL,
        disk_total INTEGER NOT NULL,
        PRIMARY KEY (sandbox, at_s)
    ) WITHOUT ROWID;
    CREATE TABLE project_metrics (
        project TEXT NOT NULL,
        at_s INTEGER NOT NULL,
        running INTEGER NOT NULL,
        started INTEGER NOT NULL,
        span_s INTEGER NOT NULL,
        PRIMARY KEY (project, at_s)
    ) WITHOUT ROWID;
",
    // Limits of keys and projects; idempotency of every change; whose a snapshot is before it is there.
    "
    ALTER TABLE sandboxes ADD COLUMN claims INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE sandboxes ADD COLUMN pausing INTEGER NOT NULL DEFAULT 0;
    DROP INDEX sandboxes_by_key;
    CREATE INDEX sandboxes_by_key ON sandboxes (key, state, claims, pausing);
    CREATE INDEX sandboxes_by_project_state ON sandboxes (project, state, claims, pausing);
    ALTER TABLE snapshots ADD COLUMN key TEXT NOT NULL DEFAULT '';
    ALTER TABLE snapshots ADD COLUMN mib INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE snapshots ADD COLUMN state TEXT NOT NULL DEFAULT 'kept';
    ALTER TABLE snapshots ADD COLUMN wanted TEXT;
    CREATE INDEX snapshots_by_key ON snapshots (key);
    ALTER TABLE keys ADD COLUMN max_creating INTEGER;
    ALTER TABLE keys ADD COLUMN max_paused INTEGER;
    ALTER TABLE keys ADD COLUMN max_snapshots INTEGER;
    ALTER TABLE keys ADD COLUMN max_disk_mib INTEGER;
    CREATE TABLE projects (
        name TEXT PRIMARY KEY,
        limits TEXT NOT NULL
    ) WITHOUT ROWID;
    ALTER TABLE idempotency ADD COLUMN subjects TEXT NOT NULL DEFAULT '[]';
    CREATE TABLE facts (
        name TEXT PRIMARY KEY
    ) WITHOUT ROWID;
",
    // Idempotency keys age on boot time, in milliseconds since the one boot in `boot`.
    "
    CREATE TABLE boot (
        id TEXT PRIMARY KEY
    ) WITHOUT ROWID;
    ALTER TABLE idempotency ADD COLUMN boot_ms INTEGER;
    DROP INDEX idempotency_by_age;
    CREATE INDEX idempotency_by_age ON idempotency (boot_ms);
",
    // What was there before there were nodes is on the one that there was.
    "
    ALTER TABLE sandboxes ADD COLUMN node TEXT NOT NULL DEFAULT 'local';
    ALTER TABLE sandboxes ADD COLUMN epoch INTEGER NOT NULL DEFAULT 1;
    ALTER TABLE snapshots ADD COLUMN node TEXT NOT NULL DEFAULT 'local';
",
];

/// One sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxRow {
    pub id: SandboxId,
    pub template: String,
    pub metadata: Metadata,
    pub access_token: Option<Token>,
    pub allow_internet: Option<bool>,
    pub traffic_token: Option<Token>,
    pub vcpus: u32,
    pub memory_mib: u32,
    pub disk_mib: u32,
    pub start_path: StartPath,
    pub started_at: jiff::Timestamp,
    pub ends_at: jiff::Timestamp,
    pub state: SandboxState,
    pub lifecycle: Lifecycle,
    pub parent: Option<SandboxId>,
    /// Whose it is.
    pub project: Project,
    /// Id of the key that made it.
    pub key: String,
    /// Who alone can change it, or say that it is gone.
    pub placement: Placement,
}

/// How a create, or a fork, began.
#[derive(Debug)]
pub enum Begun {
    /// Its rows are there; the audit log has this entry.
    Done(Option<i64>),
    /// There is no room, and nothing was written.
    Exceeded(Exceeded),
}

/// How a request ended, for the audit log.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Of which entry.
    pub entry: i64,
    /// Status of the reply.
    pub status: u16,
    /// What it was about.
    pub target: String,
}

/// What a list is narrowed by.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// None means all.
    pub project: Option<Project>,
    pub metadata: Metadata,
    pub template: Option<String>,
    /// None means all.
    pub state: Option<SandboxState>,
    pub started_after: Option<jiff::Timestamp>,
    pub ascending: bool,
    /// Begin behind this sandbox.
    pub after: Option<(i64, String)>,
    pub limit: usize,
}

/// A cheap handle.
#[derive(Clone)]
pub struct Database {
    db: Db,
    /// Of this host: lives are counted on it.
    pub clock: Clock,
}

fn time(ms: i64) -> Result<jiff::Timestamp, rusqlite::Error> {
    jiff::Timestamp::from_millisecond(ms).map_err(|error| bad(error.into()))
}

fn word(state: SandboxState) -> &'static str {
    match state {
        SandboxState::Running => "running",
        SandboxState::Paused => "paused",
    }
}

fn bad(error: Box<dyn std::error::Error + Send + Sync>) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(0, Type::Text, error)
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

impl Database {
    /// Opens the database at `path`.
    pub fn open(path: &Path, clock: Clock) -> Result<Self, Error> {
        Ok(Self { db: Db::open(path, MIGRATIONS)?, clock })
    }

    /// Records the intent to make sandboxes, when `quota` has room for all of them, their idempotency key and the entry of
    /// the audit log, in one transaction.
    pub async fn begin(
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
                    answers::remember(&transaction, &key, first.id.as_str(), &now)?;
                }
                let entry = audit.map(|entry| accounts::note(&transaction, &entry)).transpose()?;
                transaction.commit().map(|()| Begun::Done(entry))
            })
            .await
    }

    /// Makes a sandbox visible that `by` has, with the reply that its key gives from now on, and notes in the audit log that
    /// it was made. Fails when its row is another's by now.
    pub async fn commit(
        &self,
        by: &Placement,
        live: &Live,
        reply: Option<String>,
        ended: Option<Ended>,
    ) -> Result<(), Error> {
        let (by, live) = (by.clone(), live.clone());
        self.db
            .call(move |connection| {
                let transaction = connection.transaction()?;
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
                    return Err(rusqlite::Error::StatementChangedRows(changed));
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
                    accounts::note_end(&transaction, &ended)?;
                }
                transaction.commit()
            })
            .await
    }

    /// Returns when everything that was written before survives a power failure.
    pub async fn flush(&self) -> Result<(), Error> {
        self.db.flush().await
    }

    /// Notes that a sandbox of `by` was paused or resumed, unless something newer is known. That it was paused, and whose it
    /// is, survives a power failure.
    pub async fn set_live(&self, by: &Placement, live: &Live) -> Result<(), Error> {
        let (by, live) = (by.clone(), live.clone());
        // What is known already costs no write, and no sync: a start tells everything again.
        let outlives_a_boot = live.state == SandboxState::Paused;
        let job = move |connection: &mut Connection| {
            connection
                .prepare_cached(
                    "UPDATE sandboxes SET state = ?2, ends_ms = ?3, rank = ?4 \
                     WHERE id = ?1 AND state != 'creating' AND rank <= ?4 \
                     AND (state, ends_ms, rank) IS NOT (?2, ?3, ?4) AND node = ?5 AND epoch <= ?6",
                )?
                .execute((
                    live.sandbox.as_str(),
                    word(live.state),
                    live.ends_at.as_millisecond(),
                    i64::try_from(live.rank()).unwrap_or(i64::MAX),
                    by.node.as_str(),
                    by.epoch.0,
                ))
                .map(drop)
        };
        if outlives_a_boot { self.db.call_durable(job).await } else { self.db.call(job).await }
    }

    /// Forgets a sandbox that `by` has not made, and its key: a retry starts afresh. Nothing when it is another's.
    pub async fn undo(&self, by: &Placement, id: &SandboxId) -> Result<(), Error> {
        self.forget(by, id, "DELETE FROM idempotency WHERE sandbox = ?1").await
    }

    /// Forgets a sandbox that has ended at `by`; its key stays, and with it the reply. Nothing when it is another's.
    pub async fn end(&self, by: &Placement, id: &SandboxId) -> Result<(), Error> {
        self.forget(by, id, "DELETE FROM metrics WHERE sandbox = ?1").await
    }

    async fn forget(&self, by: &Placement, id: &SandboxId, with_it: &'static str) -> Result<(), Error> {
        let (by, id) = (by.clone(), id.to_string());
        self.db
            .call(move |connection| {
                let transaction = connection.transaction()?;
                if is_anothers(&transaction, &id, &by)? {
                    return Ok(());
                }
                transaction.prepare_cached(with_it)?.execute([&id])?;
                transaction.prepare_cached("DELETE FROM sandboxes WHERE id = ?1")?.execute([&id])?;
                transaction.commit()
            })
            .await
    }

    /// A sandbox that runs or is paused.
    pub async fn get(&self, id: &SandboxId) -> Result<Option<SandboxRow>, Error> {
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

    /// Sets when a sandbox ends.
    pub async fn set_deadline(&self, id: &SandboxId, ends_at: jiff::Timestamp) -> Result<(), Error> {
        let id = id.to_string();
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached("UPDATE sandboxes SET ends_ms = ?2 WHERE id = ?1")?
                    .execute((id, ends_at.as_millisecond()))
                    .map(drop)
            })
            .await
    }

    /// Notes whether a sandbox may reach the internet.
    pub async fn set_internet(&self, id: &SandboxId, allowed: Option<bool>) -> Result<(), Error> {
        let id = id.to_string();
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached("UPDATE sandboxes SET allow_internet = ?2 WHERE id = ?1")?
                    .execute((id, allowed))
                    .map(drop)
            })
            .await
    }

    /// Sandboxes that run or are paused, by start time.
    pub async fn list(&self, filter: Filter) -> Result<Vec<SandboxRow>, Error> {
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

    /// When the first of the sandboxes ends that run with an API key.
    pub async fn first_end(&self, key: &str) -> Result<Option<jiff::Timestamp>, Error> {
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

    /// Ids of the sandboxes that were forked from `parent`.
    pub async fn children(&self, parent: &SandboxId) -> Result<Vec<SandboxId>, Error> {
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

    /// Forgets what of the sandboxes of `by` was claimed by a server before this one.
    pub async fn forget_claims(&self, by: &Placement) -> Result<(), Error> {
        let by = by.clone();
        self.db
            .call(move |connection| {
                connection
                    .execute(
                        "UPDATE sandboxes SET claims = 0, pausing = 0 \
                         WHERE (claims > 0 OR pausing > 0) AND node = ?1 AND epoch <= ?2",
                        (by.node.as_str(), by.epoch.0),
                    )
                    .map(drop)
            })
            .await
    }

    /// Ids of all rows of `by`, with whether they are still being made. For start-up.
    pub async fn all(&self, by: &Placement) -> Result<Vec<(SandboxId, bool)>, Error> {
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
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The schema of before there were nodes, with something in it.
    fn before_nodes(path: &Path) {
        let connection = Connection::open(path).unwrap();
        for sql in &MIGRATIONS[..7] {
            connection.execute_batch(sql).unwrap();
        }
        connection.pragma_update(None, "user_version", 7).unwrap();
        connection
            .execute_batch(
                "INSERT INTO sandboxes (id, state, template, metadata, started_ms, ends_ms, project, key, rank) VALUES \
                 ('sbx0000000000000000r', 'running', 'base', '{\"a\":\"b\"}', 1000, 2000, 'blue', 'ci', 3), \
                 ('sbx0000000000000000c', 'creating', 'base', '{}', 1000, 2000, 'blue', 'ci', 0), \
                 ('sbx0000000000000000p', 'paused', 'base', '{}', 1000, 2000, 'blue', 'ci', 2); \
                 INSERT INTO snapshots (id, project, name, created_ms, state) VALUES \
                 ('s1', 'blue', 'ready', 1, 'kept'), ('s2', 'blue', NULL, 1, 'taking');",
            )
            .unwrap();
    }

    #[tokio::test]
    async fn what_was_there_before_there_were_nodes_is_on_the_one_that_there_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kelvin.db");
        before_nodes(&path);
        let here = Placement::local();
        // Twice: it is migrated once.
        for _ in 0..2 {
            let database = Database::open(&path, Clock::system().unwrap()).unwrap();
            assert_eq!(database.all(&here).await.unwrap().len(), 3);
            let rows = database.list(Filter { limit: 10, ..Filter::default() }).await.unwrap();
            assert_eq!(rows.len(), 2);
            assert!(rows.iter().all(|row| row.placement == here && row.project.as_str() == "blue"));
            assert!(rows.iter().any(|row| row.metadata.get("a").is_some_and(|value| value == "b")));
            assert_eq!(database.unfinished_snapshots(&here.node).await.unwrap(), ["s2"]);
            let owners = database.snapshot_owners().await.unwrap();
            assert_eq!(owners["s1"].name.as_deref(), Some("ready"));
        }
        let database = Database::open(&path, Clock::system().unwrap()).unwrap();
        let rows = database.list(Filter { limit: 10, ..Filter::default() }).await.unwrap();
        for row in rows {
            database.end(&here, &row.id).await.unwrap();
        }
        assert_eq!(database.all(&here).await.unwrap().len(), 1);
    }
}
