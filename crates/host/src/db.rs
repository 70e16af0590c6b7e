//! One SQLite database behind one thread: callers await, the database never blocks their reactor.
//!
//! ```text
//! call ──queue──> thread "db" ──commit──> write-ahead log ──thread "checkpoint"──> database file
//!                                              └─ call_durable: fdatasync, on neither of the two
//! ```
//!
//! *What survives.* WAL with `synchronous=NORMAL`: every transaction survives the death of the daemon. A power failure
//! may lose those of the last [`AGE`], never an older one without the newer ones, and never half of one. A call through
//! [`Db::call_durable`] survives a power failure when it returns, and with it every transaction before it.
//!
//! *How long the log gets.* It is copied into the database by a thread of its own, with a connection of its own: once
//! it has grown by [`STEP`] pages, after [`SILENCE`], or after [`AGE`]. SQLite begins it anew with the first transaction
//! that finds it copied whole. Where transactions follow each other so closely that none ever does, the database's thread
//! stands still at [`LIMIT`] pages until the rest, a few pages, is copied: the one case in which a call waits for a checkpoint.
//!
//! Who writes: the thread "db" alone. A crash leaves a log that the next [`Db::open`] recovers.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rusqlite::Connection;
use tokio::sync::oneshot;

/// Calls that may wait for the database at one time.
const QUEUE: usize = 4096;
/// Statements that stay compiled: more than either database has, so that none is compiled on the create path.
const STATEMENTS: usize = 128;
/// Pages by which the write-ahead log grows before it is copied into the database: 4 MiB.
const STEP: u32 = 1024;
/// Pages of the write-ahead log at which the database's thread waits for a checkpoint: 16 MiB.
const LIMIT: u32 = 4096;
/// Without a transaction for this long, the log is copied whatever its size.
const SILENCE: Duration = Duration::from_secs(1);
/// No transaction is in the log alone, and not yet on the disk, for longer.
const AGE: Duration = Duration::from_secs(10);
/// Times that a checkpoint is followed by another at once: what came meanwhile is less each time.
const ROUNDS: u32 = 3;
/// How long the database's thread waits for a checkpoint; then it goes on, and the log grows.
const PATIENCE: Duration = Duration::from_secs(30);

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
    /// It is committed, but the disk did not confirm it: a power failure may take it back.
    #[error("{what} {path}")]
    Sync {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl Error {
    /// Whether the file system is full.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Sqlite(rusqlite::Error::SqliteFailure(error, _)) => {
                error.code == rusqlite::ErrorCode::DiskFull
            }
            Self::Sync { source, .. } => source.kind() == io::ErrorKind::StorageFull,
            _ => false,
        }
    }
}

/// A cheap handle.
#[derive(Clone)]
pub struct Db(Arc<Shared>);

struct Shared {
    jobs: Jobs,
}

/// The write-ahead log. Held open: SQLite keeps it for as long as a connection is open. It has no locks that a close
/// would drop.
#[derive(Clone)]
struct Log {
    file: Arc<File>,
    path: Arc<Path>,
}

impl Log {
    fn sync(&self) -> Result<(), Error> {
        let path = self.path.to_path_buf();
        self.file.sync_data().map_err(|source| Error::Sync { what: "syncing", path, source })
    }
}

/// Where jobs run.
enum Jobs {
    /// On a thread of their own.
    Thread(mpsc::SyncSender<Job>, Log),
    /// Where they are called.
    Caller(Box<Mutex<Writer>>, Log),
    /// On a task of the reactor, which waits before each; in memory, where there is no log.
    #[cfg(feature = "testing")]
    Task(tokio::sync::mpsc::UnboundedSender<(Duration, Job)>),
}

/// The connection that writes.
struct Writer {
    connection: Connection,
    /// Pages in the log after the last commit.
    pages: Arc<AtomicU32>,
}

impl Db {
    /// Opens or makes the database at `path`, mode 0600, and brings it to the last of `migrations`:
    /// element n is the SQL that leads from version n to n + 1. The result survives a power failure.
    ///
    /// # Errors
    /// As SQLite gives them; `Version` when the file is newer; `Sync` when the disk does not confirm.
    pub fn open(path: &Path, migrations: &'static [&'static str]) -> Result<Self, Error> {
        #[cfg(feature = "testing")]
        if crate::testing::is_virtual() {
            return Self::open_on_task(path, migrations);
        }
        let (writer, log) = prepare(path, migrations)?;
        let copier = connect(path)?;
        let progress = Arc::new(Progress::default());
        let (jobs, queue) = mpsc::sync_channel::<Job>(QUEUE);
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.to_owned()).spawn(work).map(drop).map_err(|_| Error::Gone)
        };
        spawn("checkpoint", {
            // Weak: the queue ends with the last handle.
            let (progress, shown) = (Arc::clone(&progress), path.to_owned());
            Box::new(move || copy(&copier, &progress, &shown))
        })?;
        spawn("db", Box::new(move || work(writer, &queue, &progress)))?;
        Ok(Self(Arc::new(Shared { jobs: Jobs::Thread(jobs, log) })))
    }

    /// The same in memory, see [`crate::testing`], and jobs run on a task of the reactor, each when the virtual host says
    /// so.
    #[cfg(feature = "testing")]
    fn open_on_task(path: &Path, migrations: &'static [&'static str]) -> Result<Self, Error> {
        let mut database = crate::testing::Database::open(path)?;
        migrate(&mut database, migrations)?;
        let (jobs, mut queue) = tokio::sync::mpsc::unbounded_channel::<(Duration, Job)>();
        tokio::spawn(async move {
            while let Some((delay, job)) = queue.recv().await {
                if !delay.is_zero() {
                    tokio::time::sleep(delay).await;
                }
                job(&mut database);
            }
        });
        Ok(Self(Arc::new(Shared { jobs: Jobs::Task(jobs) })))
    }

    /// The same, but jobs run on the thread that calls, and so do checkpoints: for tests whose time is virtual. Calls
    /// are ready when they are first polled.
    ///
    /// # Errors
    /// As [`Db::open`].
    pub fn open_on_caller(path: &Path, migrations: &'static [&'static str]) -> Result<Self, Error> {
        let (writer, log) = prepare(path, migrations)?;
        let jobs = Jobs::Caller(Box::new(Mutex::new(writer)), log);
        Ok(Self(Arc::new(Shared { jobs })))
    }

    /// Runs `job` on the database's thread.
    ///
    /// # Errors
    /// What `job` returns; `Gone` when the queue is full or the thread has ended.
    pub async fn call<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, Error> {
        match &self.0.jobs {
            Jobs::Thread(jobs, _) => {
                let (sender, receiver) = oneshot::channel();
                jobs.try_send(Box::new(move |connection| {
                    let _ = sender.send(job(connection));
                }))
                .map_err(|_| Error::Gone)?;
                Ok(receiver.await.map_err(|_| Error::Gone)??)
            }
            #[cfg(feature = "testing")]
            Jobs::Task(jobs) => {
                let Some(crate::testing::Step::After(delay)) = crate::testing::database() else {
                    return Err(Error::Gone);
                };
                let (sender, receiver) = oneshot::channel();
                let job: Job = Box::new(move |connection| {
                    let _ = sender.send(job(connection));
                });
                jobs.send((delay, job)).map_err(|_| Error::Gone)?;
                Ok(receiver.await.map_err(|_| Error::Gone)??)
            }
            Jobs::Caller(writer, _) => {
                let mut writer = lock(writer);
                let result = job(&mut writer.connection);
                if writer.pages.load(Ordering::Relaxed) >= STEP {
                    writer.pages.store(0, Ordering::Relaxed);
                    checkpoint(&writer.connection)?;
                }
                Ok(result?)
            }
        }
    }

    /// Runs `job` on the database's thread, and returns when what it committed, and everything before it, survives a
    /// power failure. The disk is not waited for on the database's thread: other calls go on.
    ///
    /// # Errors
    /// As [`Db::call`]; `Sync` when it is committed but the disk did not confirm it.
    pub async fn call_durable<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let done = self.call(job).await?;
        self.flush().await?;
        Ok(done)
    }

    /// Returns when every transaction that was committed before survives a power failure.
    ///
    /// # Errors
    /// `Sync`.
    pub async fn flush(&self) -> Result<(), Error> {
        // What a checkpoint has taken out of the log is on the disk: it was synced before the log began anew.
        match &self.0.jobs {
            Jobs::Thread(_, log) => {
                let (log, path) = (log.clone(), log.path.to_path_buf());
                let synced = tokio::task::spawn_blocking(move || log.sync()).await;
                synced.unwrap_or_else(|error| {
                    Err(Error::Sync { what: "syncing", path, source: io::Error::other(error) })
                })
            }
            #[cfg(feature = "testing")]
            Jobs::Task(_) => crate::blocking::spawn(|| ()).await.map_err(|error| {
                let path = PathBuf::from("memory");
                Error::Sync { what: "syncing", path, source: io::Error::other(error) }
            }),
            Jobs::Caller(_, log) => log.sync(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where SQLite keeps the write-ahead log of the database at `path`.
fn log_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    name.into()
}

fn connect(path: &Path) -> Result<Connection, Error> {
    let connection = Connection::open(path)?;
    // First of all: the log gets the mode that the database has.
    if let Err(error) = std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600)) {
        tracing::warn!(%error, path = %path.display(), "cannot restrict the database's mode");
    }
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    crate::sqlite::keep_plans(&connection)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    // What a burst has made of the log is given back when it begins anew.
    connection.pragma_update(None, "journal_size_limit", i64::from(STEP) * 4096)?;
    Ok(connection)
}

/// Brings the schema to what it is to be.
fn migrate(connection: &mut Connection, migrations: &[&str]) -> Result<(), Error> {
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let known = i64::try_from(migrations.len()).unwrap_or(i64::MAX);
    let done = usize::try_from(version).unwrap_or(usize::MAX);
    let Some(missing) = migrations.get(done..) else {
        return Err(Error::Version { found: version, known });
    };
    if missing.is_empty() {
        return Ok(());
    }
    let transaction = connection.transaction()?;
    for sql in missing {
        transaction.execute_batch(sql)?;
    }
    transaction.pragma_update(None, "user_version", known)?;
    Ok(transaction.commit()?)
}

/// The connection that writes, with the schema as it is to be, and the log.
fn prepare(path: &Path, migrations: &[&str]) -> Result<(Writer, Log), Error> {
    let mut connection = connect(path)?;
    migrate(&mut connection, migrations)?;
    // The log exists now, and has to be found after a power failure: from here on its content is all that is synced.
    checkpoint(&connection)?;
    let path_of_log = log_path(path);
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |source| Error::Sync { what, path, source }
    };
    let log = File::open(&path_of_log).map_err(failed("opening", &path_of_log))?;
    log.sync_all().map_err(failed("syncing", &path_of_log))?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed("syncing", parent))?;
    let pages = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&pages);
    connection.wal_hook(Some(move |_: &mut _, in_log: i32| {
        counter.store(u32::try_from(in_log).unwrap_or(0), Ordering::Relaxed);
        Ok(())
    }))?;
    let log = Log { file: Arc::new(log), path: path_of_log.into() };
    Ok((Writer { connection, pages }, log))
}

/// How far the log is copied; between the thread that writes and the one that copies.
#[derive(Default)]
struct Progress {
    state: Mutex<State>,
    /// For the thread that copies.
    wanted: Condvar,
    /// For the thread that writes.
    copied: Condvar,
}

#[derive(Default)]
struct State {
    /// Pages in the log.
    pages: u32,
    /// How many of them were there when a checkpoint began last.
    seen: u32,
    /// When the oldest transaction was committed that is in the log alone.
    since: Option<Instant>,
    /// When the newest was.
    newest: Option<Instant>,
    /// Whether the thread that writes waits.
    stands_still: bool,
    /// Whether it has ended.
    is_over: bool,
}

impl State {
    /// How long the thread that copies may still wait; none when nothing is to be copied.
    fn wait(&self, now: Instant) -> Option<Duration> {
        if self.stands_still || self.pages >= self.seen.saturating_add(STEP) {
            return Some(Duration::ZERO);
        }
        let due = (self.newest? + SILENCE).min(self.since? + AGE);
        Some(due.saturating_duration_since(now))
    }
}

fn work(mut writer: Writer, queue: &mpsc::Receiver<Job>, progress: &Progress) {
    let mut is_dirty = false;
    loop {
        let job = match is_dirty {
            false => queue.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
            true => queue.recv_timeout(SILENCE),
        };
        // Never the count of a commit: each has at least one.
        writer.pages.store(0, Ordering::Relaxed);
        match job {
            Ok(job) => {
                job(&mut writer.connection);
                match writer.pages.load(Ordering::Relaxed) {
                    0 => {}
                    pages => {
                        is_dirty = true;
                        committed(progress, pages);
                    }
                }
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                if lock(&progress.state).since.is_none() {
                    is_dirty = false;
                    begin_anew(&writer.connection);
                }
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
    lock(&progress.state).is_over = true;
    progress.wanted.notify_one();
}

/// Begins the log anew, which was copied whole: with a sync of its head, that the next call does not wait for.
fn begin_anew(connection: &Connection) {
    let again = connection
        .pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0))
        .and_then(|version| connection.pragma_update(None, "user_version", version));
    if let Err(error) = again {
        tracing::warn!(%error, "the write-ahead log was not begun anew, the next transaction does");
    }
}

/// Notes what a commit has made of the log; at [`LIMIT`], waits until it is copied.
fn committed(progress: &Progress, pages: u32) {
    let now = Instant::now();
    let mut state = lock(&progress.state);
    if pages < state.pages {
        // It has begun anew.
        state.seen = 0;
    }
    state.pages = pages;
    state.newest = Some(now);
    let is_first = state.since.is_none();
    state.since.get_or_insert(now);
    if is_first || pages >= state.seen.saturating_add(STEP) {
        progress.wanted.notify_one();
    }
    if pages < LIMIT {
        return;
    }
    state.stands_still = true;
    progress.wanted.notify_one();
    let (mut state, waited) = progress
        .copied
        .wait_timeout_while(state, PATIENCE, |state| state.stands_still)
        .unwrap_or_else(PoisonError::into_inner);
    state.stands_still = false;
    if waited.timed_out() {
        tracing::error!(pages, seconds = PATIENCE.as_secs(), "the write-ahead log is not copied, it grows");
    }
}

/// Copies the log into the database until the thread that writes has ended.
fn copy(connection: &Connection, progress: &Progress, path: &Path) {
    let mut state = lock(&progress.state);
    while !state.is_over {
        match state.wait(Instant::now()) {
            None => state = progress.wanted.wait(state).unwrap_or_else(PoisonError::into_inner),
            Some(left) if !left.is_zero() => {
                let waited = progress.wanted.wait_timeout(state, left);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            Some(_) => {
                for round in 1.. {
                    // What is committed after this is what is left.
                    let began = Instant::now();
                    let (before, stood_still) = (state.pages, state.stands_still);
                    state.seen = before;
                    drop(state);
                    let copied = checkpoint(connection);
                    state = lock(&progress.state);
                    let is_all = state.pages == before;
                    state.since = (!is_all).then_some(began);
                    if let Err(error) = &copied {
                        tracing::warn!(%error, path = %path.display(), "checkpoint failed, tried again");
                        // Not at once.
                        (state.since, state.newest) = (Some(began), Some(Instant::now()));
                    }
                    if stood_still {
                        state.stands_still = false;
                        progress.copied.notify_one();
                    }
                    if is_all || copied.is_err() || round == ROUNDS {
                        break;
                    }
                }
            }
        }
    }
}

/// Copies what is in the log into the database, as far as nobody has written meanwhile. Waits for nobody, and nobody
/// waits for it. Source: SQLite, `PRAGMA wal_checkpoint`, PASSIVE.
fn checkpoint(connection: &Connection) -> Result<(), rusqlite::Error> {
    connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()))
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

    const TABLE: &[&str] = &["CREATE TABLE t (k INTEGER PRIMARY KEY, v BLOB)"];

    /// One small transaction: what a create does, about.
    fn write(connection: &mut Connection, number: u32) -> Result<(), rusqlite::Error> {
        let transaction = connection.transaction()?;
        for part in 0..2 {
            transaction
                .prepare_cached("INSERT OR REPLACE INTO t VALUES (?1, randomblob(100))")?
                .execute([(number * 7 + part * 1000) % 50_000])?;
        }
        transaction.commit()
    }

    /// Keeps the queue full, without a gap, and gives the longest that the log became, in bytes.
    async fn storm(db: &Db, path: &Path, transactions: u32) -> u64 {
        let mut longest = 0;
        for first in (0..transactions).step_by(500) {
            let calls = (first..first + 500).map(|number| db.call(move |c| write(c, number)));
            futures::future::try_join_all(calls).await.unwrap();
            longest = longest.max(std::fs::metadata(log_path(path)).unwrap().len());
        }
        longest
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn the_log_stays_short_without_a_pause() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = Db::open(&path, TABLE).unwrap();
        let longest = storm(&db, &path, 20_000).await;
        println!("the log became {} KiB at most", longest >> 10);
        // A page and its head; a transaction is not cut in two.
        assert!(longest < u64::from(LIMIT + 64) * 4120, "{longest} bytes");
        assert!(longest > u64::from(STEP) * 4120, "the storm was none: {longest} bytes");
        // At rest what the burst has taken is given back.
        let deadline = Instant::now() + Duration::from_secs(30);
        while std::fs::metadata(log_path(&path)).unwrap().len() > u64::from(STEP) * 4120 {
            assert!(Instant::now() < deadline, "the log stays long");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let sum: i64 = db.call(|c| c.query_row("SELECT count(*) FROM t", [], |r| r.get(0))).await.unwrap();
        assert!(sum > 10_000);
    }

    #[test]
    fn on_the_callers_thread_calls_are_ready_at_once_and_the_log_stays_short() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = Db::open_on_caller(&path, TABLE).unwrap();
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        for number in 0..4_000 {
            let call = std::pin::pin!(db.call_durable(move |c| write(c, number)));
            assert!(matches!(call.poll(&mut context), std::task::Poll::Ready(Ok(()))));
        }
        assert!(std::fs::metadata(log_path(&path)).unwrap().len() < u64::from(STEP + 64) * 4120);
    }
}
