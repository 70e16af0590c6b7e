//! The repositories on one SQLite database, `kelvin.db`, behind one thread ([`kelvin_host::db`]).
//!
//! Each call is one transaction. What does not say that it survives a power failure may be lost by one within its last
//! seconds, never the older without the newer, and by nothing else.

mod answers;
mod audit;
mod builds;
mod catalog;
mod events;
mod keys;
mod quota;
mod sandboxes;
mod schema;
mod usage;

use std::path::Path;

use async_trait::async_trait;
use kelvin_host::clock::Clock;
use kelvin_host::db::{self, Db};
use rusqlite::Connection;
use rusqlite::types::Type;

use super::{Error, Repository};

pub(super) struct Sqlite {
    db: Thread,
    clock: Clock,
}

impl Sqlite {
    pub fn open(path: &Path, clock: Clock) -> Result<Self, Error> {
        Ok(Self { db: Thread(Db::open(path, schema::MIGRATIONS)?), clock })
    }
}

#[async_trait]
impl Repository for Sqlite {
    async fn flush(&self) -> Result<(), Error> {
        Ok(self.db.0.flush().await?)
    }
}

/// The database's thread, whose errors are those of the interface.
struct Thread(Db);

impl Thread {
    async fn call<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, Error> {
        Ok(self.0.call(job).await?)
    }

    async fn call_durable<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, Error> {
        Ok(self.0.call_durable(job).await?)
    }
}

impl From<db::Error> for Error {
    fn from(error: db::Error) -> Self {
        if error.is_full() { Self::Full(error.into()) } else { Self::Failed(error.into()) }
    }
}

fn time(ms: i64) -> Result<jiff::Timestamp, rusqlite::Error> {
    jiff::Timestamp::from_millisecond(ms).map_err(|error| bad(error.into()))
}

fn bad(error: Box<dyn std::error::Error + Send + Sync>) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(0, Type::Text, error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::database::Database;
    use crate::database::suite::{Subject, keeps_its_promises};

    /// A directory with a database.
    struct Directory(tempfile::TempDir);

    impl Subject for Directory {
        fn open(&self, clock: Clock) -> Database {
            Database::open(&self.0.path().join("kelvin.db"), clock).unwrap()
        }
    }

    keeps_its_promises!(Directory(tempfile::tempdir().unwrap()));
}
