//! File descriptors of this process: how many it may have, how many it has, and who may open more.
//!
//! Every connection, VMM and slot takes some. Whoever runs out of them in the middle of something fails there, whatever
//! it was: a database, a log, a machine that is half made. So new work asks first, and is refused by name while there are
//! still enough for all that was begun.
//!
//! ```text
//! take(n) ── counted + taken since + n <= usable ──> go on
//!       └─ else: count again (what was closed is free), at most every 50 ms ──> go on, or refuse
//! ```
//!
//! Nothing is given back by hand: what was closed is found by the next count, so nobody can forget it and a leak is seen.
//! A count lists `/proc/self/fd`, which happens near the limit only. Nothing is written; the kernel's limit is this process's.

use std::io;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What a machine has open here, with its network, the connections to its guest, and what its making needs for a moment:
/// more than any driver opens. Once it runs, what it has is counted.
pub const MACHINE: u64 = 24;
/// A connection of one socket.
pub const CONNECTION: u64 = 1;
/// The least and the most that is kept for what was begun: databases, logs, files that are copied, pipes of helpers.
const RESERVE: (u64, u64) = (64, 2048);
/// Counts are at least this far apart.
const AGAIN: Duration = Duration::from_millis(50);

/// There are too few left to begin something new.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server has {open} of {limit} file descriptors open and keeps {reserve} for what it has begun")]
pub struct Exhausted {
    /// Open, or promised to somebody.
    pub open: u64,
    /// The limit of the process.
    pub limit: u64,
    /// What is kept back.
    pub reserve: u64,
}

/// Lets this process have as many descriptors as it may (the hard limit); the usual soft limit is for programs that use
/// `select`. Returns how many that is.
///
/// # Errors
/// When the kernel refuses.
pub fn raise() -> io::Result<u64> {
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most })?;
    Ok(most.unwrap_or(u64::MAX))
}

/// How many descriptors this process has open, that of the count itself left out.
///
/// # Errors
/// When `/proc` cannot be listed.
pub fn open() -> io::Result<u64> {
    let count = std::fs::read_dir("/proc/self/fd")?.count();
    Ok(u64::try_from(count).unwrap_or(u64::MAX).saturating_sub(1))
}

#[derive(Debug, Default)]
struct State {
    /// As of the last count.
    counted: u64,
    /// Taken since then.
    since: u64,
    /// Taken and perhaps not open yet.
    held: u64,
    at: Option<Instant>,
}

/// Who may open more. One lock, which is held for a count at the most.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    reserve: u64,
    state: Mutex<State>,
    count: fn() -> io::Result<u64>,
    again: Duration,
}

/// Descriptors that are about to be opened. Dropped once they are: from then on they are counted.
#[derive(Debug)]
pub struct Held<'a> {
    budget: &'a Budget,
    count: u64,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut state = self.budget.state();
        state.held = state.held.saturating_sub(self.count);
    }
}

impl Budget {
    /// A budget of `limit` descriptors for this process.
    pub fn new(limit: u64) -> Self {
        Self::counting(limit, open, AGAIN)
    }

    fn counting(limit: u64, count: fn() -> io::Result<u64>, again: Duration) -> Self {
        let reserve = (limit / 8).clamp(RESERVE.0, RESERVE.1);
        Self { limit, reserve, state: Mutex::default(), count, again }
    }

    /// This process's, of the limit that it has when it is first asked for: raise it before, see [`raise`].
    pub fn of_process() -> &'static Self {
        static BUDGET: OnceLock<Budget> = OnceLock::new();
        BUDGET.get_or_init(|| Self::new(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)))
    }

    /// The most that may be open at one time before new work is refused.
    pub fn usable(&self) -> u64 {
        self.limit.saturating_sub(self.reserve)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `count` descriptors for something that somebody has asked for.
    ///
    /// # Errors
    /// `Exhausted`; then nothing is taken.
    pub fn take(&self, count: u64) -> Result<Held<'_>, Exhausted> {
        self.within(count, self.usable())
    }

    /// The same for what nobody waits for, which leaves a quarter to requests.
    ///
    /// # Errors
    /// `Exhausted`; then nothing is taken.
    pub fn take_spare(&self, count: u64) -> Result<Held<'_>, Exhausted> {
        self.within(count, self.usable() / 4 * 3)
    }

    fn within(&self, count: u64, usable: u64) -> Result<Held<'_>, Exhausted> {
        let mut state = self.state();
        let fits = |state: &State| {
            state.at.is_some() && state.counted.saturating_add(state.since).saturating_add(count) <= usable
        };
        if !fits(&state) && state.at.is_none_or(|at| at.elapsed() >= self.again) {
            // Out of descriptors for the count itself: all are open.
            state.counted = (self.count)().unwrap_or(self.limit);
            // Some of these are open already: counted twice, until the next count.
            state.since = state.held;
            state.at = Some(Instant::now());
        }
        if !fits(&state) {
            let open = state.counted.saturating_add(state.since);
            return Err(Exhausted { open, limit: self.limit, reserve: self.limit - usable });
        }
        state.since += count;
        state.held += count;
        Ok(Held { budget: self, count })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    static OPEN: AtomicU64 = AtomicU64::new(0);

    fn counted() -> io::Result<u64> {
        Ok(OPEN.load(Ordering::Relaxed))
    }

    #[test]
    fn new_work_is_refused_while_some_are_left_and_goes_on_when_they_are_closed() {
        let budget = Budget::counting(512, counted, Duration::ZERO);
        assert_eq!(budget.usable(), 448);
        OPEN.store(430, Ordering::Relaxed);
        let first = budget.take(10).unwrap();
        // What was taken counts although nothing of it is open yet.
        assert_eq!(budget.take(10).unwrap_err(), Exhausted { open: 440, limit: 512, reserve: 64 });
        // What nobody waits for is refused first.
        assert!(budget.take_spare(1).is_err());
        OPEN.store(440, Ordering::Relaxed);
        drop(first);
        assert!(budget.take(9).is_err());
        OPEN.store(100, Ordering::Relaxed);
        let many: Vec<_> = (0..34).map(|_| budget.take(10).unwrap()).collect();
        assert!(budget.take(10).is_err());
        drop(many);
    }

    #[test]
    fn open_descriptors_are_counted() {
        let before = open().unwrap();
        let files: Vec<_> = (0..100).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        // Other tests open and close some meanwhile.
        assert!(open().unwrap() + 50 >= before + 100);
        drop(files);
    }
}
