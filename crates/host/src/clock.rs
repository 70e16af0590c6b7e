//! Time that nobody can set: lifetimes and limits count on the host's boot time.
//!
//! ```text
//! boot time ──> deadlines, ages, limits        CLOCK_BOOTTIME: never set, counts while the host is suspended
//! wall clock ──> what people are shown         CLOCK_REALTIME: an operator or NTP may move it by hours
//! ```
//!
//! A [`Clock`] is a cheap handle that every component is given, so that tests substitute it ([`Simulated`]). A
//! [`Stamp`] is a moment that is written down: boot time means nothing after a reboot, so it names its boot and has
//! the wall clock beside it. Nothing is written here; a crash leaves nothing.

use std::fmt;
use std::io;
use std::ops::Add;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// How long one sleep of [`Clock::sleep_until`] is at the most: timers of the runtime stand still while the host is
/// suspended, so a deadline that passes meanwhile is seen so much later.
const STEP: Duration = Duration::from_secs(10);

/// Where the kernel names the boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A moment since the host booted. Those of another boot must not be compared with it; see [`Stamp`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootInstant(Duration);

impl BootInstant {
    /// How much later this is than `earlier`; zero when it is not.
    pub fn saturating_duration_since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for BootInstant {
    type Output = Self;

    /// So long is never: a sum that cannot be had is the last moment there is.
    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }
}

/// Which boot of the host; another after every reboot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BootId(String);

impl fmt::Display for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A moment as it is written down, to be read by another process or after a reboot. Made by [`Clock::stamp`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stamp {
    /// The boot that `boot_ms` counts from.
    pub boot: BootId,
    /// Milliseconds since that boot.
    pub boot_ms: u64,
    /// What the wall clock was, or will be as far as was known then.
    pub wall: Timestamp,
}

/// Where time comes from.
pub trait Source: Send + Sync + 'static {
    /// Time since the host booted.
    fn since_boot(&self) -> Duration;
    /// The wall clock.
    fn wall(&self) -> Timestamp;
    /// Which boot it is.
    fn boot(&self) -> BootId;
}

/// A cheap handle of a source of time.
#[derive(Clone)]
pub struct Clock(Arc<dyn Source>);

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clock").field("now", &self.now()).field("wall", &self.wall()).finish()
    }
}

/// The host's clocks.
struct System {
    boot: BootId,
}

impl Source for System {
    fn since_boot(&self) -> Duration {
        let now = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
        Duration::new(seconds, u32::try_from(now.tv_nsec).unwrap_or_default())
    }

    fn wall(&self) -> Timestamp {
        Timestamp::now()
    }

    fn boot(&self) -> BootId {
        self.boot.clone()
    }
}

impl Clock {
    /// The host's own clocks.
    ///
    /// # Errors
    /// When the kernel does not say which boot it is.
    pub fn system() -> io::Result<Self> {
        let boot = std::fs::read_to_string(BOOT_ID)?;
        Ok(Self(Arc::new(System { boot: BootId(boot.trim().to_owned()) })))
    }

    /// Another source, for tests.
    pub fn of(source: Arc<dyn Source>) -> Self {
        Self(source)
    }

    /// Now.
    pub fn now(&self) -> BootInstant {
        BootInstant(self.0.since_boot())
    }

    /// The wall clock, for people.
    pub fn wall(&self) -> Timestamp {
        self.0.wall()
    }

    /// What the wall clock shows at `at`, if nobody sets it: for people.
    pub fn shown(&self, at: BootInstant) -> Timestamp {
        let now = self.now();
        let later =
            SignedDuration::try_from(at.saturating_duration_since(now)).unwrap_or(SignedDuration::MAX);
        let ago = SignedDuration::try_from(now.saturating_duration_since(at)).unwrap_or(SignedDuration::MAX);
        let wall = self.wall();
        let shown = if later.is_zero() { wall.checked_sub(ago) } else { wall.checked_add(later) };
        shown.unwrap_or(if later.is_zero() { Timestamp::MIN } else { Timestamp::MAX })
    }

    /// The moment at which the wall clock shows `wall`, if nobody sets it; now for what is past.
    ///
    /// To be called as soon as such a time comes in: from then on it counts on boot time.
    pub fn at(&self, wall: Timestamp) -> BootInstant {
        let left = wall.duration_since(self.wall());
        self.now() + Duration::try_from(left).unwrap_or_default()
    }

    /// `at` as it is written down.
    pub fn stamp(&self, at: BootInstant) -> Stamp {
        let boot_ms = u64::try_from(at.0.as_millis()).unwrap_or(u64::MAX);
        Stamp { boot: self.0.boot(), boot_ms, wall: self.shown(at) }
    }

    /// The moment of `stamp`, when it is of this boot; `None` after a reboot.
    pub fn recall(&self, stamp: &Stamp) -> Option<BootInstant> {
        (stamp.boot == self.0.boot()).then(|| BootInstant(Duration::from_millis(stamp.boot_ms)))
    }

    /// How long ago `stamp` was; zero for what is still to come.
    ///
    /// Exact when it is of this boot. Of another the wall clock is all that is known, but it is older than this boot.
    pub fn age(&self, stamp: &Stamp) -> Duration {
        let now = self.now();
        match self.recall(stamp) {
            Some(at) => now.saturating_duration_since(at),
            None => {
                let by_wall = Duration::try_from(self.wall().duration_since(stamp.wall)).unwrap_or_default();
                by_wall.max(now.0)
            }
        }
    }

    /// Waits until `at`. Cancel-safe.
    pub async fn sleep_until(&self, at: BootInstant) {
        loop {
            let left = at.saturating_duration_since(self.now());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left.min(STEP)).await;
        }
    }
}

/// A substitute for tests: boot time is tokio's, which a test may pause and advance; the wall clock goes along and can
/// be set to whatever a test wants.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap().block_on(async {
/// use std::time::Duration;
/// let time = kelvin_host::clock::Simulated::start();
/// let clock = time.clock();
/// let deadline = clock.now() + Duration::from_secs(60);
/// time.jump_wall(jiff::SignedDuration::from_hours(1));
/// clock.sleep_until(deadline).await; // At once under a paused clock, and a minute later by it.
/// assert_eq!(clock.now(), deadline);
/// # });
/// ```
///
/// Tokio's clock is that of the thread's runtime: on a thread outside of it, such as a database's, time is real. A
/// harness with virtual time calls this on the runtime's own thread.
#[derive(Debug)]
pub struct Simulated {
    start: tokio::time::Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Boots until now.
    boots: u32,
    /// When it booted last, after `start`, less what had gone by then.
    booted: Duration,
    /// The wall clock at `start`, with all that it was moved by.
    wall: Timestamp,
}

impl Simulated {
    /// A host that has been up for an hour, at 2025-01-01 00:00 UTC.
    pub fn start() -> Arc<Self> {
        let wall = Timestamp::constant(1_735_689_600, 0);
        let state = Mutex::new(State { boots: 1, booted: Duration::ZERO, wall });
        Arc::new(Self { start: tokio::time::Instant::now(), state })
    }

    /// A handle for whoever is tested.
    pub fn clock(self: &Arc<Self>) -> Clock {
        Clock::of(Arc::<Self>::clone(self))
    }

    /// Moves the wall clock, forwards or back, as an operator does.
    pub fn jump_wall(&self, by: SignedDuration) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.wall = state.wall.saturating_add(by).unwrap_or(state.wall);
    }

    /// Reboots the host: boot time begins anew, the wall clock goes on. Sleeps that are under way are of the former boot.
    pub fn reboot(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.boots += 1;
        state.booted = self.start.elapsed() + UP;
    }
}

/// How long a simulated host has been up when a test begins.
const UP: Duration = Duration::from_secs(3600);

impl Source for Simulated {
    fn since_boot(&self) -> Duration {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        (self.start.elapsed() + UP).saturating_sub(state.booted)
    }

    fn wall(&self) -> Timestamp {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = SignedDuration::try_from(self.start.elapsed()).unwrap_or(SignedDuration::MAX);
        state.wall.checked_add(gone).unwrap_or(Timestamp::MAX)
    }

    fn boot(&self) -> BootId {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        BootId(format!("simulated-{}", state.boots))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: SignedDuration = SignedDuration::from_hours(1);

    #[tokio::test(start_paused = true)]
    async fn a_wall_clock_that_jumps_moves_no_deadline() {
        for jump in [HOUR, -HOUR] {
            let time = Simulated::start();
            let clock = time.clock();
            let before = clock.now();
            let deadline = clock.at(clock.wall() + Duration::from_secs(90));
            let shown = clock.shown(deadline);
            time.jump_wall(jump);
            assert_eq!(clock.shown(deadline), shown + jump, "people are shown the clock that they have");
            clock.sleep_until(deadline).await;
            assert_eq!(clock.now().saturating_duration_since(before), Duration::from_secs(90));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stamp_is_exact_in_its_boot_and_known_by_the_wall_clock_afterwards() {
        let time = Simulated::start();
        let clock = time.clock();
        let text = serde_json::to_string(&clock.stamp(clock.now())).unwrap();
        let stamp: Stamp = serde_json::from_str(&text).unwrap();
        tokio::time::advance(Duration::from_secs(30)).await;
        time.jump_wall(-HOUR);
        assert_eq!(clock.age(&stamp), Duration::from_secs(30));
        assert_eq!(clock.recall(&stamp).map(|at| at + Duration::from_secs(30)), Some(clock.now()));
        time.jump_wall(HOUR);
        time.reboot();
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(clock.recall(&stamp), None);
        assert_eq!(clock.age(&stamp), Duration::from_secs(40));
        // The wall clock went back: it is older than this boot all the same.
        time.jump_wall(-HOUR);
        assert_eq!(clock.age(&stamp), Duration::from_secs(10));
    }

    #[test]
    fn moments_that_cannot_be_had_do_not_panic() {
        let clock = Clock::system().unwrap();
        let never = clock.now() + Duration::MAX;
        assert_eq!(clock.shown(never), Timestamp::MAX);
        assert_eq!(clock.at(Timestamp::MIN).saturating_duration_since(clock.now()), Duration::ZERO);
        assert!(clock.at(Timestamp::MAX) > clock.now());
        assert_eq!(clock.stamp(never).boot_ms, u64::MAX);
        assert!(clock.recall(&clock.stamp(clock.now())).is_some());
    }

    #[tokio::test]
    async fn the_hosts_clock_sleeps() {
        let clock = Clock::system().unwrap();
        let (before, at) = (std::time::Instant::now(), clock.now() + Duration::from_millis(30));
        clock.sleep_until(at).await;
        assert!(clock.now() >= at && before.elapsed() >= Duration::from_millis(30));
    }
}
