//! A host without processes and threads, for tests that repeat exactly.
//!
//! Within [`Virtual`], on its thread: work that blocks and calls of databases run as tasks of the reactor, in the
//! order in which they were asked for, as late as the test wants, or not at all. [`FakeProcess`] is a process that is
//! nothing but a name, for everything that finds, watches and kills processes; it lives for as long as the program
//! or until it is killed, whatever happens to the reactor: as a VMM outlives a daemon.
//!
//! Its databases are in memory: that a daemon's files survive it and the power is tested on real ones (`db`). [`Database`]s
//! outlive a daemon as files do, and go with their thread; what was committed is there for the next daemon, and a
//! transaction that was under way is not.
//!
//! Nothing is written. Absent on purpose: the network.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::Duration;

use rusqlite::Connection;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::process::ProcessKey;

/// What becomes of one piece of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It is done, after this long.
    After(Duration),
    /// It is not done, and its caller is told.
    Fail,
}

impl Step {
    /// Runs `work` on the reactor; without it, its handle says that it was aborted.
    pub fn run<T: Send + 'static>(self, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        match self {
            Self::After(delay) => tokio::spawn(async move {
                if !delay.is_zero() {
                    tokio::time::sleep(delay).await;
                }
                work()
            }),
            Self::Fail => {
                let never = tokio::spawn(std::future::pending());
                never.abort();
                never
            }
        }
    }
}

/// Decides what becomes of what the host is asked for.
pub trait Host {
    /// The next piece of work that blocks.
    fn blocking(&self) -> Step;
    /// The next call of a database.
    fn database(&self) -> Step;
}

thread_local! {
    static HOST: RefCell<Option<Box<dyn Host>>> = const { RefCell::new(None) };
}

/// For as long as it lives, the host of this thread is a virtual one.
#[derive(Debug)]
pub struct Virtual(std::marker::PhantomData<*const ()>);

impl Virtual {
    /// From now on `host` decides, on this thread.
    pub fn enter(host: impl Host + 'static) -> Self {
        HOST.set(Some(Box::new(host)));
        Self(std::marker::PhantomData)
    }
}

impl Drop for Virtual {
    fn drop(&mut self) {
        HOST.set(None);
    }
}

fn ask(question: impl Fn(&dyn Host) -> Step) -> Option<Step> {
    HOST.with_borrow(|host| host.as_deref().map(question))
}

/// Whether the host of this thread is a virtual one.
pub(crate) fn is_virtual() -> bool {
    HOST.with_borrow(Option::is_some)
}

/// What becomes of the next piece of work that blocks; nothing on a real host.
pub(crate) fn blocking() -> Option<Step> {
    ask(|host| host.blocking())
}

/// The same for a call of a database.
pub(crate) fn database() -> Option<Step> {
    ask(|host| host.database())
}

thread_local! {
    /// Databases that no daemon has open, by path.
    static DATABASES: RefCell<BTreeMap<PathBuf, Connection>> = const { RefCell::new(BTreeMap::new()) };
}

/// A database of the virtual host while a daemon has it open: one at a time.
pub(crate) struct Database {
    path: PathBuf,
    /// None only while it is dropped.
    connection: Option<Connection>,
}

impl Database {
    /// Opens or makes the one at `path`.
    pub fn open(path: &Path) -> Result<Self, rusqlite::Error> {
        let known = DATABASES.with_borrow_mut(|databases| databases.remove(path));
        let connection = match known {
            Some(connection) => connection,
            None => {
                let connection = Connection::open_in_memory()?;
                // All stay compiled, from daemon to daemon: those of the program, and those of a restore.
                connection.set_prepared_statement_cache_capacity(1000);
                crate::sqlite::keep_plans(&connection)?;
                connection.pragma_update(None, "foreign_keys", true)?;
                connection
            }
        };
        Ok(Self { path: path.to_owned(), connection: Some(connection) })
    }
}

impl Deref for Database {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        // Only a drop takes it.
        self.connection.as_ref().unwrap_or_else(|| unreachable!())
    }
}

impl DerefMut for Database {
    fn deref_mut(&mut self) -> &mut Connection {
        self.connection.as_mut().unwrap_or_else(|| unreachable!())
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let Some(connection) = self.connection.take() else { return };
        // The thread may be ending: then it goes with it.
        let _ = DATABASES.try_with(|databases| {
            if let Ok(mut databases) = databases.try_borrow_mut() {
                databases.insert(std::mem::take(&mut self.path), connection);
            }
        });
    }
}

/// Does `work` with each database below `root`, none of which is open.
fn each_database(
    root: &Path,
    work: impl Fn(&Connection) -> Result<(), rusqlite::Error>,
) -> Result<(), rusqlite::Error> {
    DATABASES.with_borrow(|databases| {
        databases.iter().filter(|(path, _)| path.starts_with(root)).try_for_each(|(_, found)| work(found))
    })
}

/// Names of its tables, in the order in which they were made: a table refers to older ones.
fn tables(connection: &Connection) -> Result<Vec<String>, rusqlite::Error> {
    connection
        .prepare_cached(
            "SELECT name FROM main.sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY rowid",
        )?
        .query_map([], |row| row.get(0))?
        .collect()
}

/// Keeps what is in the databases below `root`, on this thread, for [`restore_databases`]. They are not open.
///
/// # Errors
/// As SQLite gives them.
pub fn keep_databases(root: &Path) -> Result<(), rusqlite::Error> {
    each_database(root, |connection| {
        connection.execute_batch("ATTACH ':memory:' AS kept")?;
        for table in tables(connection)? {
            connection.execute_batch(&format!("CREATE TABLE kept.{table} AS SELECT * FROM main.{table}"))?;
        }
        Ok(())
    })
}

/// Brings the databases below `root` back to what was kept. They are not open.
///
/// # Errors
/// As SQLite gives them.
pub fn restore_databases(root: &Path) -> Result<(), rusqlite::Error> {
    each_database(root, |connection| {
        let tables = tables(connection)?;
        let run = |sql: &str| connection.prepare_cached(sql)?.execute([]).map(drop);
        run("BEGIN")?;
        // In an order that keeps every reference whole: to put the check off is a pragma, after which SQLite compiles
        // every statement anew.
        for table in tables.iter().rev() {
            run(&format!("DELETE FROM main.{table}"))?;
        }
        for table in &tables {
            run(&format!("INSERT INTO main.{table} SELECT * FROM kept.{table}"))?;
        }
        run("COMMIT")
    })
}

/// Removes the databases below `root`.
pub fn remove_databases(root: &Path) {
    let _ = DATABASES.try_with(|databases| {
        if let Ok(mut databases) = databases.try_borrow_mut() {
            databases.retain(|path, _| !path.starts_with(root));
        }
    });
}

/// The id of the last fake process: no process of the kernel has a negative one.
static LAST: AtomicI32 = AtomicI32::new(-1);
static PROCESSES: Mutex<BTreeMap<i32, Arc<FakeProcess>>> = Mutex::new(BTreeMap::new());

fn processes() -> MutexGuard<'static, BTreeMap<i32, Arc<FakeProcess>>> {
    PROCESSES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A process that is nothing but a name.
#[derive(Debug)]
pub struct FakeProcess {
    key: ProcessKey,
    marker: String,
    /// The thread is the host, and ids follow from seeds: another host may have a machine of the same name.
    host: ThreadId,
    over: watch::Sender<bool>,
}

impl FakeProcess {
    /// Starts one that is found by the argument `marker`.
    pub fn start(marker: &str) -> Arc<Self> {
        let pid = LAST.fetch_sub(1, Ordering::Relaxed) - 1;
        let key = ProcessKey { pid, start_time: 1 };
        let (marker, host) = (marker.to_owned(), std::thread::current().id());
        let process = Arc::new(Self { key, marker, host, over: watch::Sender::new(false) });
        processes().insert(pid, Arc::clone(&process));
        process
    }

    /// Which process it is.
    pub fn key(&self) -> ProcessKey {
        self.key
    }

    /// Ends it. Safe twice.
    pub fn kill(&self) {
        processes().remove(&self.key.pid);
        self.over.send_replace(true);
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        *self.over.borrow()
    }

    /// Waits until it has ended.
    pub async fn ended(&self) {
        // Its sender lives as long as it does.
        let _ = self.over.subscribe().wait_for(|over| *over).await;
    }

    /// The one called `key` that runs.
    pub(crate) fn find(key: ProcessKey) -> Option<Arc<Self>> {
        processes().get(&key.pid).filter(|process| process.key == key).cloned()
    }

    /// Those that run on this host and have the argument `marker`; on a real one, which has many threads, all.
    pub(crate) fn find_by_marker(marker: &str) -> Vec<ProcessKey> {
        let host = is_virtual().then(|| std::thread::current().id());
        let is_here = |process: &Self| host.is_none_or(|host| process.host == host);
        let found = processes();
        let found = found.values().filter(|process| process.marker == marker && is_here(process));
        found.map(|process| process.key).collect()
    }
}
