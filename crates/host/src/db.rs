//! One SQLite database behind one thread: callers await, the database never blocks their reactor.
//!
//! WAL with `synchronous=NORMAL`: a transaction survives the death of the daemon; a power cut may lose
//! the last ones, and with them every machine they speak of. Checkpoints run only while nothing waits.

use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use rusqlite::Connection;
use tokio::sync::oneshot;

/// Calls that may wait for the database at one time.
const QUEUE: usize = 4096;
/// Statements that stay compiled: more than either database has, so that none is compiled on the create path.
const STATEMENTS: usize = 128;

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// SQLite said no.
    #[error("the database refused")]
    Sqlite(#[from] rusqlite::Error),
    /// The thread is gone, or its queue is full.
    #[error("the database does not answer")]
    Gone,
    /// The file is of a newer version of the program.
    #[error("the database has schema version {found}, this program knows {known}")]
    Version {
        /// In the file.
        found: i64,
        /// In the program.
        known: i64,
    },
}

impl Error {
    /// Whether the file system is full.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Sqlite(rusqlite::Error::SqliteFailure(error, _))
            if error.code == rusqlite::ErrorCode::DiskFull)
    }
}

/// A cheap handle.
#[derive(Clone)]
pub struct Db {
    jobs: Jobs,
}

/// The way to whoever has the connection.
#[derive(Clone)]
enum Jobs {
    Thread(mpsc::SyncSender<Job>),
    /// A task of the reactor, which waits before each.
    #[cfg(feature = "testing")]
    Task(tokio::sync::mpsc::UnboundedSender<(Duration, Job)>),
}

impl Jobs {
    fn send(&self, job: Job) -> Result<(), Error> {
        match self {
            Self::Thread(jobs) => jobs.try_send(job).map_err(|_| Error::Gone),
            #[cfg(feature = "testing")]
            Self::Task(jobs) => match crate::testing::database() {
                Some(crate::testing::Step::After(delay)) => jobs.send((delay, job)).map_err(|_| Error::Gone),
                Some(crate::testing::Step::Fail) | None => Err(Error::Gone),
            },
        }
    }
}

impl Db {
    /// Opens or makes the database at `path`, mode 0600, and brings it to the last of `migrations`:
    /// element n is the SQL that leads from version n to n + 1.
    ///
    /// # Errors
    /// As SQLite gives them; `Version` when the file is newer.
    pub fn open(path: &Path, migrations: &'static [&'static str]) -> Result<Self, Error> {
        let mut connection = Connection::open(path)?;
        if let Err(error) =
            std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))
        {
            tracing::warn!(%error, path = %path.display(), "cannot restrict the database's mode");
        }
        connection.set_prepared_statement_cache_capacity(STATEMENTS);
        connection.busy_timeout(Duration::from_secs(5))?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.pragma_update(None, "wal_autocheckpoint", 0)?;
        let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        let known = i64::try_from(migrations.len()).unwrap_or(i64::MAX);
        let done = usize::try_from(version).unwrap_or(usize::MAX);
        let Some(missing) = migrations.get(done..) else {
            return Err(Error::Version { found: version, known });
        };
        let transaction = connection.transaction()?;
        for sql in missing {
            transaction.execute_batch(sql)?;
        }
        transaction.pragma_update(None, "user_version", known)?;
        transaction.commit()?;
        #[cfg(feature = "testing")]
        if crate::testing::is_virtual() {
            let (jobs, mut queue) = tokio::sync::mpsc::unbounded_channel::<(Duration, Job)>();
            tokio::spawn(async move {
                while let Some((delay, job)) = queue.recv().await {
                    if !delay.is_zero() {
                        tokio::time::sleep(delay).await;
                    }
                    job(&mut connection);
                }
            });
            return Ok(Self { jobs: Jobs::Task(jobs) });
        }
        let (jobs, queue) = mpsc::sync_channel::<Job>(QUEUE);
        std::thread::Builder::new()
            .name("db".to_owned())
            .spawn(move || work(&mut connection, &queue))
            .map_err(|_| Error::Gone)?;
        Ok(Self { jobs: Jobs::Thread(jobs) })
    }

    /// Runs `job` on the database's thread.
    ///
    /// # Errors
    /// What `job` returns; `Gone` when the queue is full or the thread has ended.
    pub async fn call<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (sender, receiver) = oneshot::channel();
        self.jobs.send(Box::new(move |connection| {
            let _ = sender.send(job(connection));
        }))?;
        Ok(receiver.await.map_err(|_| Error::Gone)??)
    }
}

fn work(connection: &mut Connection, queue: &mpsc::Receiver<Job>) {
    let mut dirty = false;
    loop {
        match queue.recv_timeout(Duration::from_secs(if dirty { 1 } else { 3600 })) {
            Ok(job) => {
                job(connection);
                dirty = true;
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                if dirty && let Err(error) = checkpoint(connection) {
                    tracing::warn!(%error, "checkpoint failed");
                }
                dirty = false;
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let _ = checkpoint(connection);
                return;
            }
        }
    }
}

fn checkpoint(connection: &Connection) -> Result<(), rusqlite::Error> {
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn migrations_run_once_and_newer_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = Db::open(&path, &["CREATE TABLE t (x INTEGER)"]).unwrap();
        db.call(|c| c.execute("INSERT INTO t VALUES (1)", [])).await.unwrap();
        drop(db);
        let db = Db::open(&path, &["CREATE TABLE t (x INTEGER)", "ALTER TABLE t ADD y INTEGER"]).unwrap();
        let count: i64 =
            db.call(|c| c.query_row("SELECT count(y IS NULL) FROM t", [], |r| r.get(0))).await.unwrap();
        assert_eq!(count, 1);
        assert!(matches!(Db::open(&path, &[]), Err(Error::Version { found: 2, known: 0 })));
        assert!(db.call(|c| c.execute("INSERT INTO nothing VALUES (1)", [])).await.is_err());
    }
}
