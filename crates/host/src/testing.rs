//! A host without processes and threads, for tests that repeat exactly.
//!
//! Within [`Virtual`], on its thread: work that blocks and calls of databases run as tasks of the reactor, in the
//! order in which they were asked for, as late as the test wants, or not at all. [`FakeProcess`] is a process that is
//! nothing but a name, for everything that finds, watches and kills processes; it lives for as long as the program
//! or until it is killed, whatever happens to the reactor: as a VMM outlives a daemon.
//!
//! Nothing is written. Absent on purpose: the network.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

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
    over: watch::Sender<bool>,
}

impl FakeProcess {
    /// Starts one that is found by the argument `marker`.
    pub fn start(marker: &str) -> Arc<Self> {
        let pid = LAST.fetch_sub(1, Ordering::Relaxed) - 1;
        let key = ProcessKey { pid, start_time: 1 };
        let process = Arc::new(Self { key, marker: marker.to_owned(), over: watch::Sender::new(false) });
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

    /// Those that run and have the argument `marker`.
    pub(crate) fn find_by_marker(marker: &str) -> Vec<ProcessKey> {
        processes().values().filter(|process| process.marker == marker).map(|process| process.key).collect()
    }
}
