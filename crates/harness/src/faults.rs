//! What goes wrong, and when: each call of the driver, of the database and of the disk is a step, and is counted.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use kelvin_api::id::VmId;
use kelvin_host::clock::{BootId, Source};
use kelvin_host::testing::{Host, Step as HostStep};
use kelvin_vmm::testing::{Call, FakeDriver, Script, Step};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::Random;

/// What happens at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum What {
    Nothing,
    /// It fails.
    Fail,
    /// It takes so long.
    Slow(u64),
    /// The VMM ends.
    Crash,
    /// The guest falls silent.
    Silence,
    /// The guest powers off.
    PowerOff,
    /// The client hangs up.
    HangUp,
    /// The daemon is killed.
    Kill,
    /// The daemon is told to stop.
    Stop,
}

impl What {
    /// All of them, with the most of the weight on what changes most.
    pub const ALL: [Self; 10] = [
        Self::Fail,
        Self::HangUp,
        Self::Kill,
        Self::Crash,
        Self::Silence,
        Self::Slow(5),
        Self::Stop,
        Self::PowerOff,
        Self::Slow(70),
        Self::Nothing,
    ];
}

/// Where a step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Place {
    Driver(Call),
    Disk,
    Database,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Driver(call) => f.write_str(call.name()),
            Self::Disk => f.write_str("disk"),
            Self::Database => f.write_str("database"),
        }
    }
}

/// The step at which it happened.
#[derive(Debug, Clone)]
pub struct Hit {
    /// Which.
    pub place: Place,
    /// Of which machine.
    pub vm: Option<VmId>,
    /// Who it was by then.
    pub name: Option<String>,
}

/// What is to happen.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// What.
    pub what: What,
    /// At which step; none is zero.
    pub at: u32,
    /// At which step the request beside it is sent.
    pub beside_at: u32,
    /// Whether every step takes a moment of its own length.
    pub jitter: bool,
    /// Of the lengths.
    pub seed: u64,
    /// By how many hours the wall clock is set at that step.
    pub jump: i64,
}

struct State {
    plan: Plan,
    armed: bool,
    count: u32,
    hit: Option<Hit>,
    /// By how much the wall clock was set.
    jumped: jiff::SignedDuration,
    random: Random,
    trace: DefaultHasher,
    log: Option<Vec<String>>,
    /// Time until the present life began, and when that was.
    before: Duration,
    began: Option<Instant>,
}

/// The faults of one case.
pub struct Faults {
    state: Mutex<State>,
    driver: OnceLock<Weak<FakeDriver>>,
    /// The request beside is to be sent.
    pub beside: Notify,
    /// The client is to hang up.
    pub hang_up: Notify,
    /// The daemon is to be killed.
    pub dead: Notify,
    /// The daemon is to be stopped.
    pub stop: Notify,
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults").finish_non_exhaustive()
    }
}

/// Longer than any case: what waits so long is never done.
const NEVER: Duration = Duration::from_secs(1_000_000);

impl Faults {
    /// Faults of `plan`, which are not armed. `log`: whether each step is written down.
    pub fn new(plan: Plan, log: bool) -> Arc<Self> {
        let state = State {
            plan,
            armed: false,
            count: 0,
            hit: None,
            jumped: jiff::SignedDuration::ZERO,
            random: Random::new(plan.seed),
            trace: DefaultHasher::new(),
            log: log.then(Vec::new),
            before: Duration::ZERO,
            began: None,
        };
        Arc::new(Self {
            state: Mutex::new(state),
            driver: OnceLock::new(),
            beside: Notify::new(),
            hang_up: Notify::new(),
            dead: Notify::new(),
            stop: Notify::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose machines they are about.
    pub fn of(&self, driver: &Arc<FakeDriver>) {
        let _ = self.driver.set(Arc::downgrade(driver));
    }

    /// From now on steps are counted.
    pub fn arm(&self) {
        self.state().armed = true;
        // A request that is to be sent at the first step does not wait for one.
        if self.state().plan.beside_at == 0 {
            self.beside.notify_one();
        }
    }

    /// From now on everything goes well.
    pub fn disarm(&self) {
        self.state().armed = false;
    }

    /// Steps until now.
    pub fn count(&self) -> u32 {
        self.state().count
    }

    /// Where it happened, when it did.
    pub fn hit(&self) -> Option<Hit> {
        let mut hit = self.state().hit.clone()?;
        if hit.name.is_none() {
            hit.name = hit.vm.as_ref().and_then(|vm| self.driver()?.name_of(vm));
        }
        Some(hit)
    }

    /// What tells one run of a case from another that differs.
    pub fn trace(&self) -> u64 {
        self.state().trace.clone().finish()
    }

    /// The steps, when they are written down.
    pub fn log(&self) -> Vec<String> {
        self.state().log.clone().unwrap_or_default()
    }

    /// Writes a line among the steps.
    pub fn note(&self, line: impl FnOnce() -> String) {
        let now = self.now();
        if let Some(log) = &mut self.state().log {
            log.push(format!("{:>9.3} s  {}", now.as_secs_f64(), line()));
        }
    }

    /// A life begins: its clock goes on where the last one's ended.
    pub fn begin_life(&self) {
        let mut state = self.state();
        state.began = Some(Instant::now());
    }

    /// It ends.
    pub fn end_life(&self, lasted: Duration) {
        let mut state = self.state();
        state.before += lasted;
        state.began = None;
    }

    /// Time since the case began.
    pub fn now(&self) -> Duration {
        let state = self.state();
        state.before + state.began.map(|began| began.elapsed()).unwrap_or_default()
    }

    fn driver(&self) -> Option<Arc<FakeDriver>> {
        self.driver.get().and_then(Weak::upgrade)
    }

    /// What becomes of the next step, at `place`.
    fn step(&self, place: Place, vm: Option<&VmId>) -> Step {
        let now = self.now();
        let mut state = self.state();
        if !state.armed {
            return Step::Go;
        }
        state.count += 1;
        (place, now.as_millis()).hash(&mut state.trace);
        let (count, plan) = (state.count, state.plan);
        if let Some(log) = &mut state.log {
            let of = vm.map(|vm| format!(" of {vm}")).unwrap_or_default();
            log.push(format!("{:>9.3} s  step {count}: {place}{of}", now.as_secs_f64()));
        }
        if count == plan.beside_at {
            self.beside.notify_one();
        }
        if count != plan.at {
            let jitter = if plan.jitter { state.random.below(4) } else { 0 };
            return if jitter == 0 { Step::Go } else { Step::After(Duration::from_millis(jitter)) };
        }
        drop(state);
        let name = vm.and_then(|vm| self.driver()?.name_of(vm));
        {
            let mut state = self.state();
            state.hit = Some(Hit { place, vm: vm.cloned(), name });
            state.jumped = jiff::SignedDuration::from_hours(plan.jump);
        }
        self.note(|| format!("{:?} here, and the wall clock is set by {} h", plan.what, plan.jump));
        match plan.what {
            What::Nothing => Step::Go,
            What::Fail => Step::Fail,
            What::Slow(seconds) => Step::After(Duration::from_secs(seconds)),
            What::Crash => Step::Crash,
            What::Silence => Step::Silence,
            What::PowerOff => Step::PowerOff,
            What::HangUp => {
                self.hang_up.notify_one();
                Step::After(Duration::from_millis(1))
            }
            What::Kill => {
                self.dead.notify_one();
                Step::After(NEVER)
            }
            What::Stop => {
                self.stop.notify_one();
                Step::After(Duration::from_millis(1))
            }
        }
    }
}

/// The faults of a case, as the driver asks for them.
pub struct Scripted(pub Arc<Faults>);

impl Script for Scripted {
    fn step(&self, call: Call, vm: &VmId) -> Step {
        self.0.step(Place::Driver(call), Some(vm))
    }
}

impl Scripted {
    fn host(&self, place: Place) -> HostStep {
        match self.0.step(place, None) {
            Step::Go => HostStep::After(Duration::ZERO),
            Step::After(delay) => HostStep::After(delay),
            // A disk or a database has no VMM and no guest: it fails, or takes its time.
            Step::Fail | Step::Crash => HostStep::Fail,
            Step::Silence | Step::PowerOff => HostStep::After(Duration::from_secs(2)),
        }
    }
}

impl Host for Scripted {
    fn blocking(&self) -> HostStep {
        self.host(Place::Disk)
    }

    fn database(&self) -> HostStep {
        self.host(Place::Database)
    }
}

/// How long the host has been up when a case begins.
const UP: Duration = Duration::from_secs(3600);
/// What its wall clock shows then: 2025-01-01 00:00 UTC.
const BEGAN: jiff::Timestamp = jiff::Timestamp::constant(1_735_689_600, 0);

/// The clocks of the host that a case happens on: it goes on from one life of a daemon to the next.
pub struct Time {
    faults: Arc<Faults>,
    boot: BootId,
}

impl Time {
    /// That of the case of `faults`.
    ///
    /// # Errors
    /// None but for a change of how the name of a boot is written.
    pub fn of(faults: &Arc<Faults>) -> serde_json::Result<Self> {
        Ok(Self { faults: Arc::clone(faults), boot: serde_json::from_value("harness".into())? })
    }
}

impl Source for Time {
    fn since_boot(&self) -> Duration {
        UP + self.faults.now()
    }

    fn wall(&self) -> jiff::Timestamp {
        BEGAN + self.faults.now() + self.faults.state().jumped
    }

    fn boot(&self) -> BootId {
        self.boot.clone()
    }
}
