//! Limits, counted in the transaction that takes more of it.

use rusqlite::Connection;

use crate::database::limits::{Exceeded, Limited, More, Quota};

/// Whose: the column, and its value.
pub(super) type Of<'a> = (&'static str, &'a str);

fn number(row: &rusqlite::Row<'_>) -> Result<u64, rusqlite::Error> {
    Ok(u64::try_from(row.get::<_, i64>(0)?).unwrap_or(0))
}

fn count(connection: &Connection, (column, value): Of<'_>, rows: &str) -> Result<u64, rusqlite::Error> {
    let sql = format!("SELECT COUNT(*) FROM sandboxes WHERE {column} = ?1 AND {rows}");
    connection.prepare_cached(&sql)?.query_row([value], number)
}

pub(super) fn used(connection: &Connection, of: Of<'_>, what: Limited) -> Result<u64, rusqlite::Error> {
    let (column, value) = of;
    match what {
        Limited::Sandboxes => {
            // Two questions, that one index answers.
            Ok(count(connection, of, "state IN ('creating', 'running')")?
                + count(connection, of, "state = 'paused' AND claims > 0")?)
        }
        Limited::Creating => count(connection, of, "state = 'creating'"),
        Limited::Paused => Ok(count(connection, of, "state = 'paused'")?
            + count(connection, of, "state = 'running' AND pausing > 0")?),
        Limited::Snapshots => {
            let sql = format!("SELECT COUNT(*) FROM snapshots WHERE {column} = ?1");
            connection.prepare_cached(&sql)?.query_row([value], number)
        }
        Limited::Disk => {
            let sql = format!(
                "SELECT (SELECT COALESCE(SUM(disk_mib + CASE WHEN state = 'paused' OR pausing > 0 THEN memory_mib ELSE 0 END), 0) \
                 FROM sandboxes WHERE {column} = ?1) + \
                 (SELECT COALESCE(SUM(mib), 0) FROM snapshots WHERE {column} = ?1)"
            );
            connection.prepare_cached(&sql)?.query_row([value], number)
        }
    }
}

impl Quota {
    /// Whether there is room for `more`; inside the transaction that takes it.
    pub(super) fn check(
        &self,
        connection: &Connection,
        more: More,
    ) -> Result<Option<Exceeded>, rusqlite::Error> {
        let scopes = [
            (("key", self.key.as_str()), self.of_key, false),
            (("project", self.project.as_str()), self.of_project, true),
        ];
        for (of, limits, of_project) in scopes {
            let asked = [
                (
                    Limited::Sandboxes,
                    u64::from(more.creating + more.resuming),
                    limits.max_sandboxes.map(u64::from),
                ),
                (Limited::Creating, more.creating.into(), limits.max_creating.map(u64::from)),
                (Limited::Paused, more.paused.into(), limits.max_paused.map(u64::from)),
                (Limited::Snapshots, more.snapshots.into(), limits.max_snapshots.map(u64::from)),
                (Limited::Disk, more.disk_mib, limits.max_disk_mib),
            ];
            for (what, more, limit) in asked {
                let Some(limit) = limit.filter(|_| more > 0) else { continue };
                let used = used(connection, of, what)?;
                if used + more > limit {
                    return Ok(Some(Exceeded { what, of_project, limit, used }));
                }
            }
        }
        Ok(None)
    }
}
