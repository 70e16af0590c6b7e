//! The log of events in SQLite. Each is written with the change that it tells of.

use async_trait::async_trait;
use kelvin_api::event::{Event, Happened};
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Row, params_from_iter};

use super::{Sqlite, bad, time};
use crate::database::{Error, Events, Which};

/// Events of a project that are kept.
const KEPT: i64 = 100_000;
/// Every how many the oldest go.
const TRIM: i64 = 256;
/// Pauses and resumes that are told one by one when a node tells of several at once.
const STEPS: i64 = 16;
/// The longest reason that is kept, in bytes.
const LONGEST_REASON: usize = 1024;

/// Notes what became of the sandbox `id`, which has a row; nothing when it has none.
pub(super) fn note(
    connection: &Connection,
    id: &str,
    at: jiff::Timestamp,
    mut what: Happened,
) -> Result<(), rusqlite::Error> {
    if let Happened::Ended { reason } = &mut what {
        reason.truncate(reason.floor_char_boundary(LONGEST_REASON));
    }
    let what = serde_json::to_string(&what).map_err(|error| bad(error.into()))?;
    let written = connection
        .prepare_cached(
            "INSERT INTO events (at_ms, sandbox, project, template, what) \
             SELECT ?2, id, project, template, ?3 FROM sandboxes WHERE id = ?1",
        )?
        .execute((id, at.as_millisecond(), what))?;
    if written > 0 && connection.last_insert_rowid() % TRIM == 0 {
        // Of the project that writes: nobody else's go because of what it does.
        connection
            .prepare_cached(
                "WITH mine AS (SELECT project FROM sandboxes WHERE id = ?1) \
                 DELETE FROM events WHERE project IN mine AND id <= \
                 (SELECT id FROM events WHERE project IN mine ORDER BY id DESC LIMIT 1 OFFSET ?2)",
            )?
            .execute((id, KEPT))?;
    }
    Ok(())
}

/// Notes the pauses and resumes by which a sandbox that had the rank `before` has the rank `now`.
pub(super) fn note_steps(
    connection: &Connection,
    id: &str,
    at: jiff::Timestamp,
    (before, now): (i64, i64),
) -> Result<(), rusqlite::Error> {
    for rank in before.max(now.saturating_sub(STEPS)) + 1..=now {
        // See `Live::rank`.
        let what = if rank % 2 == 0 { Happened::Paused } else { Happened::Resumed };
        note(connection, id, at, what)?;
    }
    Ok(())
}

/// The rank of the sandbox `id`, when it is there.
pub(super) fn rank(connection: &Connection, id: &str) -> Result<Option<i64>, rusqlite::Error> {
    connection
        .prepare_cached("SELECT rank FROM sandboxes WHERE id = ?1 AND state != 'creating'")?
        .query_row([id], |row| row.get(0))
        .optional()
}

fn event(row: &Row<'_>) -> Result<Event, rusqlite::Error> {
    let (sandbox, what): (String, String) = (row.get(2)?, row.get(5)?);
    let what = serde_json::from_str(&what).map_err(|error| bad(error.into()))?;
    Ok(Event {
        id: row.get(0)?,
        at: time(row.get(1)?)?,
        sandbox: sandbox.parse().map_err(|error: kelvin_api::id::ParseIdError| bad(error.into()))?,
        project: row.get::<_, String>(3)?.parse().map_err(|error: &str| bad(error.into()))?,
        template: row.get(4)?,
        what,
    })
}

#[async_trait]
impl Events for Sqlite {
    async fn events(&self, which: Which) -> Result<Vec<Event>, Error> {
        self.db
            .call(move |connection| {
                let mut sql =
                    "SELECT id, at_ms, sandbox, project, template, what FROM events WHERE id > ?".to_owned();
                let mut values = vec![Value::from(which.after)];
                if let Some(project) = which.project {
                    sql.push_str(" AND project = ?");
                    values.push(project.to_string().into());
                }
                if let Some(sandbox) = which.sandbox {
                    sql.push_str(" AND sandbox = ?");
                    values.push(sandbox.to_string().into());
                }
                sql.push_str(" ORDER BY id LIMIT ?");
                values.push(Value::from(i64::try_from(which.limit).unwrap_or(i64::MAX)));
                connection.prepare_cached(&sql)?.query_map(params_from_iter(values), event)?.collect()
            })
            .await
    }
}
