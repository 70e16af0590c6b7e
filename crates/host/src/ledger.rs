//! The ledger: every host resource is written here before it exists and struck out after it is gone.
//!
//! ```text
//! declare ──> (make it) ──> amend (pid known) ──> (remove it) ──> strike
//! ```
//!
//! A crash between two steps leaves an entry whose resource may or may not exist; the next start looks
//! and removes what is there. Nothing that the ledger does not name is ever touched. Written by the node
//! alone, in `ledger.db`.

use std::path::{Path, PathBuf};

use kelvin_api::id::VmId;
use rusqlite::OptionalExtension;
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
    /// JSON.
    pub body: String,
}

const MIGRATIONS: &[&str] = &["
    CREATE TABLE resources (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        owner TEXT NOT NULL,
        resource TEXT NOT NULL
    );
    CREATE INDEX resources_by_owner ON resources (owner);
    CREATE TABLE records (owner TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID;
"];

/// A cheap handle.
#[derive(Clone)]
pub struct Ledger {
    db: Db,
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
        Ok(Self { db: Db::open(path, MIGRATIONS)? })
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
        self.db
            .call(move |connection| {
                let transaction = connection.transaction()?;
                transaction.prepare_cached("DELETE FROM resources WHERE owner = ?1")?.execute([&owner])?;
                transaction.prepare_cached("DELETE FROM records WHERE owner = ?1")?.execute([&owner])?;
                transaction.commit()
            })
            .await
    }

    /// Strikes out the record of one machine, or of what is paused. Whether there was one: of two that want it, one gets it.
    ///
    /// # Errors
    /// As the database gives them.
    pub async fn strike_record(&self, owner: &VmId) -> Result<bool, Error> {
        let owner = owner.to_string();
        self.db
            .call(move |connection| {
                Ok(connection.prepare_cached("DELETE FROM records WHERE owner = ?1")?.execute([&owner])? > 0)
            })
            .await
    }

    /// Writes `body` as the record of `to` and strikes that of `from`, in one transaction that survives a power
    /// failure: what is remembered goes from one machine to another, or to none. Whether there was one of `from`: when
    /// not, nothing is written.
    ///
    /// # Errors
    /// As the database gives them; then nothing has changed.
    pub async fn move_record(&self, from: &VmId, to: &VmId, body: String) -> Result<bool, Error> {
        let (from, to) = (from.to_string(), to.to_string());
        self.db
            .call(move |connection| {
                connection.pragma_update(None, "synchronous", "FULL")?;
                let moved = (|| {
                    let transaction = connection.transaction()?;
                    let struck = transaction
                        .prepare_cached("DELETE FROM records WHERE owner = ?1")?
                        .execute([&from])?;
                    if struck == 0 {
                        return Ok(false);
                    }
                    transaction
                        .prepare_cached("INSERT OR REPLACE INTO records (owner, body) VALUES (?1, ?2)")?
                        .execute((to, body))?;
                    transaction.commit().map(|()| true)
                })();
                // Not an error of the move, which is on the disk or is not: FULL only costs the next writes more.
                if let Err(error) = connection.pragma_update(None, "synchronous", "NORMAL") {
                    tracing::warn!(%error, "the ledger stays at synchronous=FULL");
                }
                moved
            })
            .await
    }

    /// Writes or replaces the record of one machine.
    ///
    /// # Errors
    /// As the database gives them.
    pub async fn put_record(&self, owner: &VmId, body: String) -> Result<(), Error> {
        let owner = owner.to_string();
        self.db
            .call(move |connection| {
                connection
                    .prepare_cached(
                        "INSERT INTO records VALUES (?1, ?2) ON CONFLICT (owner) DO UPDATE SET body = ?2",
                    )?
                    .execute((owner, body))
                    .map(drop)
            })
            .await
    }

    /// The record of one machine.
    ///
    /// # Errors
    /// As the database gives them.
    pub async fn record(&self, owner: &VmId) -> Result<Option<String>, Error> {
        let owner = owner.to_string();
        self.db
            .call(move |connection| {
                connection
                    .query_row("SELECT body FROM records WHERE owner = ?1", [owner], |row| row.get(0))
                    .optional()
            })
            .await
    }

    /// Everything the ledger knows: resources oldest first, and records. For start-up.
    ///
    /// # Errors
    /// As the database gives them. A line that does not parse is an error: nothing is skipped silently.
    pub async fn read(&self) -> Result<(Vec<Entry>, Vec<Record>), Error> {
        self.db
            .call(|connection| {
                let bad = |error: String| {
                    rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, error.into())
                };
                let entries = connection
                    .prepare("SELECT id, owner, resource FROM resources ORDER BY id")?
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
                    .prepare("SELECT owner, body FROM records")?
                    .query_map([], |row| {
                        let owner: String = row.get(0)?;
                        Ok(Record {
                            owner: owner.parse().map_err(|error| bad(format!("{error}")))?,
                            body: row.get(1)?,
                        })
                    })?
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_declared_is_there_after_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.db");
        let vm = VmId::random();
        let directory = Resource::Directory { path: "/x".into() };
        let vmm = Resource::Vmm { marker: "m".into(), key: None };
        {
            let ledger = Ledger::open(&path).unwrap();
            let ids = ledger.declare(&vm, &[directory.clone(), vmm]).await.unwrap();
            let key = Some(ProcessKey { pid: 7, start_time: 9 });
            ledger.amend(ids[1], &Resource::Vmm { marker: "m".into(), key }).await.unwrap();
            ledger.put_record(&vm, "{}".into()).await.unwrap();
        }
        let ledger = Ledger::open(&path).unwrap();
        let (entries, records) = ledger.read().await.unwrap();
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].resource, directory);
        assert!(matches!(entries[1].resource, Resource::Vmm { key: Some(_), .. }));
        assert_eq!(records, [Record { owner: vm.clone(), body: "{}".into() }]);
        ledger.strike(entries[0].id).await.unwrap();
        ledger.strike(entries[0].id).await.unwrap();
        ledger.strike_all(&vm).await.unwrap();
        ledger.strike_all(&vm).await.unwrap();
        assert_eq!(ledger.count().await.unwrap(), 0);
    }
}
