//! The ledger: every host resource is written here before it exists and struck out after it is gone.
//!
//! ```text
//! declare ──> (make it) ──> amend (pid known) ──> (remove it) ──> strike
//! ```
//!
//! A crash between two steps leaves an entry whose resource may or may not exist; the next start looks
//! and removes what is there. Nothing that the ledger does not name is ever touched. Written by the node
//! alone, in `ledger.db`.
//!
//! Processes end with the boot that they were started in. After another boot their ids mean nothing, or another process:
//! [`Ledger::read`] strikes them, so that no sandbox comes back as running and no stranger is taken for a VMM. A power failure
//! may take the last seconds of the ledger, which speak of such machines alone; what outlives a boot, the record of a
//! sandbox that is paused, is written durably.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kelvin_api::id::VmId;
use rusqlite::{Connection, OptionalExtension};
use serde::{Deserialize, Serialize};

use crate::db::{Db, Error};
use crate::process::ProcessKey;

/// One host resource.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// A machine's directory with everything in it.
    Directory {
        /// Absolute path.
        path: PathBuf,
    },
    /// A VMM.
    Vmm {
        /// An argument of its command line that nothing else has.
        marker: String,
        /// Known once it was started.
        key: Option<ProcessKey>,
    },
    /// A process that serves all machines.
    Helper {
        /// An argument of its command line that nothing else has.
        marker: String,
        /// Known once it was started.
        key: Option<ProcessKey>,
    },
    /// A user id that a VMM drops to.
    User {
        /// The id.
        uid: u32,
    },
    /// The control group of a machine.
    Cgroup {
        /// Absolute path.
        path: PathBuf,
    },
    /// A network slot: declared by itself, and once more by the machine that has it.
    Slot {
        /// Its number.
        number: u16,
        /// Whose addresses it has.
        range: crate::net::Range,
    },
}

/// One line of the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its number; later resources of one owner have higher ones.
    pub id: i64,
    /// The machine it belongs to.
    pub owner: VmId,
    /// What it is.
    pub resource: Resource,
}

/// What the node remembers of a sandbox, beside the resources: opaque here, owned by `kelvin-node`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The machine.
    pub owner: VmId,
    /// What it says.
    pub body: Body,
}

/// What a record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Body {
    /// Of its form; 0 is what was written before forms had numbers.
    pub version: u32,
    /// It.
    pub json: String,
}

const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE resources (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        owner TEXT NOT NULL,
        resource TEXT NOT NULL
    );
    CREATE INDEX resources_by_owner ON resources (owner);
    CREATE TABLE records (owner TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID;
",
    "
    CREATE TABLE boot (id TEXT NOT NULL);
",
    // Also keeps out releases that remove a machine whose record they cannot read.
    "
    ALTER TABLE records ADD COLUMN version INTEGER NOT NULL DEFAULT 0;
",
    // Keeps out releases that act on the node before they find that they cannot read the database of the control plane.
    "
    SELECT 1;
",
];

/// The schema since which the forms of records have numbers.
const NUMBERED: i64 = 3;

/// The kernel's name of this boot. Source: random(4), /proc/sys/kernel/random/boot_id.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A cheap handle.
#[derive(Clone)]
pub struct Ledger {
    db: Db,
    /// This boot; none when the kernel does not say.
    boot: Option<Arc<str>>,
}

/// The records in the ledger at `path`, for whoever only looks at it, also beside a server: nothing is migrated or written.
///
/// # Errors
/// `Version` for a ledger of a newer release; as SQLite gives them.
pub fn peek(path: &Path) -> Result<Vec<Record>, Error> {
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY | rusqlite::OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let known = i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX);
    if version > known {
        return Err(Error::Version { found: version, known });
    }
    let numbered = if version < NUMBERED { "0" } else { "version" };
    let mut rows = connection.prepare(&format!("SELECT owner, {numbered}, body FROM records"))?;
    let records = rows.query_map([], record_of)?.collect::<Result<_, _>>()?;
    Ok(records)
}

fn encode(resource: &Resource) -> Result<String, Error> {
    serde_json::to_string(resource)
        .map_err(|error| Error::Sqlite(rusqlite::Error::ToSqlConversionFailure(error.into())))
}

impl Ledger {
    /// Opens the ledger at `path`.
    ///
    /// # Errors
    /// As the database gives them.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let boot = std::fs::read_to_string(BOOT_ID).ok();
        Self::open_in_boot(path, boot.as_deref().map(str::trim))
    }

    fn open_in_boot(path: &Path, boot: Option<&str>) -> Result<Self, Error> {
        Ok(Self { db: Db::open(path, MIGRATIONS)?, boot: boot.map(Arc::from) })
    }

    /// Announces resources, in the order in which they will be made; one transaction.
    ///
    /// # Errors
    /// As the database gives them; then none is announced.
    pub async fn declare(&self, owner: &VmId, resources: &[Resource]) -> Result<Vec<i64>, Error> {
        let owner = owner.to_string();
        let texts = resources.iter().map(encode).collect::<Result<Vec<_>, _>>()?;
        self.db
            .call(move |connection| {
                let transaction = connection.transaction()?;
                let mut ids = Vec::new();
                for text in &texts {
                    transaction
                        .prepare_cached("INSERT INTO resources (owner, resource) VALUES (?1, ?2)")?
                        .execute((&owner, text))?;
                    ids.push(transaction.last_insert_rowid());
                }
                transaction.commit()?;
                Ok(ids)
            })
            .await
    }

    /// Replaces what is known of one resource.
    ///
    /// # Errors
    /// As the database gives them.
    pub async fn amend(&self, id: i64, resource: &Resource) -> Result<(), Error> {
        let text = encode(resource)?;
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached("UPDATE resources SET resource = ?2 WHERE id = ?1")?
                    .execute((id, text))
                    .map(drop)
            })
            .await
    }

    /// Strikes out one resource that is gone. Striking twice is fine.
    ///
    /// # Errors
    /// As the database gives them.
    pub async fn strike(&self, id: i64) -> Result<(), Error> {
        self.db
            .call(move |connection| {
                connection.prepare_cached("DELETE FROM resources WHERE id = ?1")?.execute([id]).map(drop)
            })
            .await
    }

    /// Strikes out everything of one machine, its record too.
    ///
    /// # Errors
    /// As the database gives them.
    pub async fn strike_all(&self, owner: &VmId) -> Result<(), Error> {
        let owner = owner.to_string();
        self.db.call(move |connection| strike_all(connection, &owner)).await
    }

    /// Strikes out the record of one machine, or of what is paused; no power failure brings it back. Whether there was
    /// one: of two that want it, one gets it.
    ///
    /// # Errors
    /// As the database gives them; then it is there still.
    pub async fn strike_record(&self, owner: &VmId) -> Result<bool, Error> {
        let (struck, kept) = (owner.clone(), owner);
        let strike = move |connection: &mut Connection| {
            connection
                .prepare_cached("DELETE FROM records WHERE owner = ?1 RETURNING version, body")?
                .query_row([struck.to_string()], |row| body_of(row, 0))
                .optional()
        };
        let Some(body) = self.db.call(strike).await? else { return Ok(false) };
        let Err(error) = self.db.flush().await else { return Ok(true) };
        // The disk does not confirm it: who is told so may try again.
        self.put_record(kept, body).await?;
        Err(error)
    }

    /// Writes `body` as the record of `to` and strikes that of `from`, in one transaction that survives a power
    /// failure: what is remembered goes from one machine to another, or to none. Whether there was one of `from`: when
    /// not, nothing is written.
    ///
    /// # Errors
    /// As the database gives them; then nothing has changed.
    pub async fn move_record(&self, from: &VmId, to: &VmId, body: Body) -> Result<bool, Error> {
        let (from, to) = (from.to_string(), to.to_string());
        let (there, back) = ((from.clone(), to.clone()), (to, from));
        let before = self.db.call(move |connection| replace_record(connection, &there, &body)).await?;
        let Some(before) = before else { return Ok(false) };
        let Err(error) = self.db.flush().await else { return Ok(true) };
        // The disk does not confirm it, so the caller goes on as before: and so does the ledger.
        self.db.call(move |connection| replace_record(connection, &back, &before)).await?;
        Err(error)
    }

    /// Writes or replaces the record of one machine.
    ///
    /// # Errors
    /// As the database gives them.
    pub async fn put_record(&self, owner: &VmId, body: Body) -> Result<(), Error> {
        let owner = owner.to_string();
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached(
                        "INSERT INTO records (owner, version, body) VALUES (?1, ?2, ?3)
                         ON CONFLICT (owner) DO UPDATE SET version = ?2, body = ?3",
                    )?
                    .execute((owner, body.version, body.json))
                    .map(drop)
            })
            .await
    }

    /// The record of one machine.
    ///
    /// # Errors
    /// As the database gives them.
    pub async fn record(&self, owner: &VmId) -> Result<Option<Body>, Error> {
        let owner = owner.to_string();
        self.db
            .call(move |connection| {
                connection
                    .query_row("SELECT version, body FROM records WHERE owner = ?1", [owner], |row| {
                        body_of(row, 0)
                    })
                    .optional()
            })
            .await
    }

    /// Everything the ledger knows: resources oldest first, and records. For start-up: processes of a former boot have
    /// no key any more.
    ///
    /// # Errors
    /// As the database gives them. A line that does not parse is an error: nothing is skipped silently.
    pub async fn read(&self) -> Result<(Vec<Entry>, Vec<Record>), Error> {
        let boot = self.boot.clone();
        self.db
            .call(move |connection| {
                if let Some(boot) = boot {
                    enter_boot(connection, &boot)?;
                }
                let entries = connection
                    .prepare_cached("SELECT id, owner, resource FROM resources ORDER BY id")?
                    .query_map([], |row| {
                        let (owner, resource): (String, String) = (row.get(1)?, row.get(2)?);
                        Ok(Entry {
                            id: row.get(0)?,
                            owner: owner.parse().map_err(|error| bad(format!("{error}")))?,
                            resource: serde_json::from_str(&resource)
                                .map_err(|error| bad(error.to_string()))?,
                        })
                    })?
                    .collect::<Result<_, _>>()?;
                let records = connection
                    .prepare_cached("SELECT owner, version, body FROM records")?
                    .query_map([], record_of)?
                    .collect::<Result<_, _>>()?;
                Ok((entries, records))
            })
            .await
    }

    /// How many resources are declared.
    ///
    /// # Errors
    /// As the database gives them.
    pub async fn count(&self) -> Result<u32, Error> {
        self.db
            .call(|connection| connection.query_row("SELECT count(*) FROM resources", [], |row| row.get(0)))
            .await
    }
}

fn record_of(row: &rusqlite::Row<'_>) -> Result<Record, rusqlite::Error> {
    let owner: String = row.get(0)?;
    Ok(Record { owner: owner.parse().map_err(|error| bad(format!("{error}")))?, body: body_of(row, 1)? })
}

/// The body of a record whose columns begin at `first`.
fn body_of(row: &rusqlite::Row<'_>, first: usize) -> Result<Body, rusqlite::Error> {
    Ok(Body { version: row.get(first)?, json: row.get(first + 1)? })
}

fn bad(error: String) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, error.into())
}

fn strike_all(connection: &mut Connection, owner: &str) -> Result<(), rusqlite::Error> {
    let transaction = connection.transaction()?;
    transaction.prepare_cached("DELETE FROM resources WHERE owner = ?1")?.execute([owner])?;
    transaction.prepare_cached("DELETE FROM records WHERE owner = ?1")?.execute([owner])?;
    transaction.commit()
}

/// Strikes the record of `from` and writes `body` as that of `to`. What `from` had; when it had none, nothing is written.
fn replace_record(
    connection: &mut Connection,
    (from, to): &(String, String),
    body: &Body,
) -> Result<Option<Body>, rusqlite::Error> {
    let transaction = connection.transaction()?;
    let before = transaction
        .prepare_cached("DELETE FROM records WHERE owner = ?1 RETURNING version, body")?
        .query_row([from], |row| body_of(row, 0))
        .optional()?;
    if before.is_some() {
        transaction
            .prepare_cached("INSERT OR REPLACE INTO records (owner, version, body) VALUES (?1, ?2, ?3)")?
            .execute((to, body.version, &body.json))?;
        transaction.commit()?;
    }
    Ok(before)
}

/// Strikes the keys of processes that were started in another boot than `boot`. A ledger of a version that did not note it
/// is believed to be of this one.
fn enter_boot(connection: &mut Connection, boot: &str) -> Result<(), rusqlite::Error> {
    let transaction = connection.transaction()?;
    let last: Option<String> =
        transaction.prepare_cached("SELECT id FROM boot")?.query_row([], |row| row.get(0)).optional()?;
    if last.as_deref() == Some(boot) {
        return Ok(());
    }
    if last.is_some() {
        let all: Vec<(i64, String)> = transaction
            .prepare_cached("SELECT id, resource FROM resources")?
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<Result<_, _>>()?;
        for (id, text) in all {
            let mut resource: Resource =
                serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
            let (Resource::Vmm { key, .. } | Resource::Helper { key, .. }) = &mut resource else { continue };
            *key = None;
            let text = serde_json::to_string(&resource).map_err(|error| bad(error.to_string()))?;
            transaction.execute("UPDATE resources SET resource = ?2 WHERE id = ?1", (id, text))?;
        }
        tracing::info!("the host was booted since: what ran then has ended");
    }
    transaction.execute("DELETE FROM boot", [])?;
    transaction.execute("INSERT INTO boot (id) VALUES (?1)", [boot])?;
    transaction.commit()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a power failure and a boot leave it.
    #[tokio::test]
    async fn what_ran_in_another_boot_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.db");
        let vm = VmId::random();
        let key = ProcessKey { pid: 1, start_time: 9 };
        let vmm = Resource::Vmm { marker: "m".into(), key: Some(key) };
        let body = Body { version: 1, json: "{}".into() };
        let keys = |entries: Vec<Entry>| -> Vec<Option<ProcessKey>> {
            let key = |entry: Entry| match entry.resource {
                Resource::Vmm { key, .. } => key,
                other => panic!("{other:?}"),
            };
            entries.into_iter().map(key).collect()
        };
        for (boot, expected) in [("one", Some(key)), ("one", Some(key)), ("two", None)] {
            let ledger = Ledger::open_in_boot(&path, Some(boot)).unwrap();
            if ledger.count().await.unwrap() == 0 {
                ledger.declare(&vm, std::slice::from_ref(&vmm)).await.unwrap();
                ledger.put_record(&vm, body.clone()).await.unwrap();
            }
            let (entries, records) = ledger.read().await.unwrap();
            assert_eq!(keys(entries), [expected], "{boot}");
            assert_eq!(records.len(), 1, "what is to be released is still known");
        }
        // A ledger of before boots were noted is of this one: an upgrade adopts what runs.
        let old = Ledger::open_in_boot(&dir.path().join("old.db"), None).unwrap();
        old.declare(&vm, &[vmm]).await.unwrap();
        assert_eq!(keys(old.read().await.unwrap().0), [Some(key)]);
        drop(old);
        let new = Ledger::open_in_boot(&dir.path().join("old.db"), Some("one")).unwrap();
        assert_eq!(keys(new.read().await.unwrap().0), [Some(key)]);
    }

    /// A ledger of before records had numbers is looked at without being changed, and is migrated by whoever opens it; one of
    /// a release to come is refused by both.
    #[tokio::test]
    async fn ledgers_of_other_releases_are_looked_at_and_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.db");
        let vm = VmId::random();
        let old = Connection::open(&path).unwrap();
        for migration in &MIGRATIONS[..2] {
            old.execute_batch(migration).unwrap();
        }
        old.pragma_update(None, "user_version", 2).unwrap();
        old.execute("INSERT INTO records (owner, body) VALUES (?1, 'of old')", [vm.as_str()]).unwrap();
        drop(old);
        let record = Record { owner: vm, body: Body { version: 0, json: "of old".into() } };
        for _ in 0..2 {
            assert_eq!(peek(&path).unwrap(), std::slice::from_ref(&record));
        }
        let ledger = Ledger::open(&path).unwrap();
        assert_eq!(ledger.read().await.unwrap().1, std::slice::from_ref(&record));
        assert_eq!(peek(&path).unwrap(), [record], "beside a server");
        drop(ledger);
        let new = Connection::open(&path).unwrap();
        new.pragma_update(None, "user_version", 99).unwrap();
        drop(new);
        assert!(matches!(peek(&path), Err(Error::Version { found: 99, .. })));
        assert!(matches!(Ledger::open(&path).map(drop), Err(Error::Version { found: 99, .. })));
    }

    #[tokio::test]
    async fn what_was_declared_is_there_after_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.db");
        let vm = VmId::random();
        let directory = Resource::Directory { path: "/x".into() };
        let vmm = Resource::Vmm { marker: "m".into(), key: None };
        let body = Body { version: 3, json: "{}".into() };
        {
            let ledger = Ledger::open(&path).unwrap();
            let ids = ledger.declare(&vm, &[directory.clone(), vmm]).await.unwrap();
            let key = Some(ProcessKey { pid: 7, start_time: 9 });
            ledger.amend(ids[1], &Resource::Vmm { marker: "m".into(), key }).await.unwrap();
            ledger.put_record(&vm, body.clone()).await.unwrap();
        }
        let ledger = Ledger::open(&path).unwrap();
        let (entries, records) = ledger.read().await.unwrap();
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].resource, directory);
        assert!(matches!(entries[1].resource, Resource::Vmm { key: Some(_), .. }));
        assert_eq!(records, [Record { owner: vm.clone(), body }]);
        ledger.strike(entries[0].id).await.unwrap();
        ledger.strike(entries[0].id).await.unwrap();
        ledger.strike_all(&vm).await.unwrap();
        ledger.strike_all(&vm).await.unwrap();
        assert_eq!(ledger.count().await.unwrap(), 0);
    }
}
