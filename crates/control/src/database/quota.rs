//! What API keys and projects may have at one time, counted in the transaction that takes more of it.

use kelvin_api::account::{Limits, Project, ProjectInfo, Used};
use kelvin_api::id::SandboxId;
use kelvin_host::db::Error;
use rusqlite::{Connection, OptionalExtension};

use super::{Database, bad};

/// What is asked for beside what is there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct More {
    /// Sandboxes that are to be made.
    pub creating: u32,
    /// Sandboxes that are to run again.
    pub resuming: u32,
    /// Sandboxes that are to be paused.
    pub paused: u32,
    /// Snapshots that are to be kept.
    pub snapshots: u32,
    /// MiB of disk.
    pub disk_mib: u64,
}

/// Whose limits hold for a change.
#[derive(Debug, Clone)]
pub struct Quota {
    /// Id of the key.
    pub key: String,
    /// What the key may have.
    pub of_key: Limits,
    /// Its project.
    pub project: Project,
    /// What all keys of the project may have together.
    pub of_project: Limits,
}

/// The limit that a change would exceed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exceeded {
    /// Of what.
    pub what: Limited,
    /// Of the project instead of the key.
    pub of_project: bool,
    /// How much there may be.
    pub limit: u64,
    /// How much there is.
    pub used: u64,
}

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limited {
    /// Sandboxes that run, are being made or resumed.
    Sandboxes,
    /// Sandboxes that are being made.
    Creating,
    /// Sandboxes that are paused.
    Paused,
    /// Snapshots that are kept.
    Snapshots,
    /// MiB of disk.
    Disk,
}

/// Whose: the column, and its value.
type Of<'a> = (&'static str, &'a str);

fn number(row: &rusqlite::Row<'_>) -> Result<u64, rusqlite::Error> {
    Ok(u64::try_from(row.get::<_, i64>(0)?).unwrap_or(0))
}

fn count(connection: &Connection, (column, value): Of<'_>, rows: &str) -> Result<u64, rusqlite::Error> {
    let sql = format!("SELECT COUNT(*) FROM sandboxes WHERE {column} = ?1 AND {rows}");
    connection.prepare_cached(&sql)?.query_row([value], number)
}

fn used(connection: &Connection, of: Of<'_>, what: Limited) -> Result<u64, rusqlite::Error> {
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

/// How a sandbox was claimed for a resume.
#[derive(Debug, PartialEq, Eq)]
pub enum Claim {
    /// It counts as one that runs until [`Database::disclaim`].
    Held,
    /// It is not paused: nothing is held.
    NotPaused,
    /// There is no room.
    Exceeded(Exceeded),
}

impl Database {
    /// Counts a paused sandbox as one that runs, when there is room, for as long as it is being resumed. A start forgets
    /// the claims of the server before it.
    pub async fn claim(&self, id: &SandboxId, quota: Option<Quota>) -> Result<Claim, Error> {
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

    /// Gives a claim back.
    pub async fn disclaim(&self, id: &SandboxId) -> Result<(), Error> {
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

    /// Counts a sandbox that runs as one that is paused, when there is room, until [`Database::end_pause`]. The limit that
    /// would be exceeded.
    pub async fn begin_pause(
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

    /// The pause of a sandbox has ended, one way or the other, and its row says so.
    pub async fn end_pause(&self, id: &SandboxId) -> Result<(), Error> {
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

    /// The limits of each project that has some.
    pub async fn project_limits(&self) -> Result<Vec<(Project, Limits)>, Error> {
        self.db
            .call(|connection| {
                connection
                    .prepare_cached("SELECT name, limits FROM projects")?
                    .query_map([], |row| {
                        let (name, limits): (String, String) = (row.get(0)?, row.get(1)?);
                        let name = name.parse().map_err(|error: &str| bad(error.into()))?;
                        Ok((name, serde_json::from_str(&limits).map_err(|error| bad(error.into()))?))
                    })?
                    .collect()
            })
            .await
    }

    /// Sets the limits of a project.
    pub async fn set_project_limits(&self, project: &Project, limits: Limits) -> Result<(), Error> {
        let (name, limits) = (project.to_string(), serde_json::to_string(&limits).unwrap_or_default());
        self.db
            .call_durable(move |connection| {
                connection
                    .prepare_cached("INSERT OR REPLACE INTO projects (name, limits) VALUES (?1, ?2)")?
                    .execute((name, limits))
                    .map(drop)
            })
            .await
    }

    /// Every project that has limits, keys, sandboxes or snapshots, with what it uses.
    pub async fn projects(&self) -> Result<Vec<ProjectInfo>, Error> {
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
