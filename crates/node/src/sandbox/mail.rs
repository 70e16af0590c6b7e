//! What comes to the task of a sandbox: what waits its turn, what is urgent, and which of a kill and a pause was first.
//!
//! Nothing is written here; a crash leaves nothing.

use std::sync::{Arc, Mutex, PoisonError};

use kelvin_api::id::SandboxId;
use kelvin_host::clock::{BootInstant, Clock};
use kelvin_host::process::{Process, ProcessKey};
use kelvin_node_api::Live;
use tokio::sync::{mpsc, oneshot, watch};

use crate::Inner;
use crate::sandbox::actor::Command;
use crate::sandbox::record::SandboxRecord;

/// Why a sandbox ends at its deadline, for its owner.
pub const TIME_IS_OVER: &str = "its time to live was over";

/// What is heard while a command is under way.
pub enum Urgent {
    /// End it; answered when its VMM has been told.
    Kill(oneshot::Sender<()>),
    /// End it at another time, as it was said and on boot time; answered when that is recorded.
    SetDeadline(jiff::Timestamp, BootInstant, oneshot::Sender<()>),
}

/// What a sandbox is, and when it ends.
pub type Shown = (Live, BootInstant);

/// How far the wall clock may go from boot time before it is said to have been set: it is slewed all the time.
pub const SET: jiff::SignedDuration = jiff::SignedDuration::from_secs(1);

/// When the sandbox of `record` ends. One of another boot has no machine; what was written before there were stamps says it
/// by the wall clock.
pub fn deadline_of(clock: &Clock, record: &SandboxRecord) -> BootInstant {
    let deadline = record.deadline.as_ref().and_then(|stamp| clock.recall(stamp));
    deadline.unwrap_or_else(|| clock.at(record.ends_at))
}

/// `live` with when it ends as the wall clock is now: what was said at first, until somebody set that clock.
pub fn shown(clock: &Clock, live: Live, deadline: BootInstant) -> Live {
    let now = clock.shown(deadline);
    let is_set = now.duration_since(live.ends_at).abs() > SET;
    Live { ends_at: if is_set { now } else { live.ends_at }, ..live }
}

/// What becomes of a running sandbox, decided once: whoever is second finds it decided.
#[derive(Debug, Default)]
pub struct Fate(Mutex<Decided>);

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Decided {
    /// It runs on.
    #[default]
    Open,
    /// It is being recorded as paused.
    Pausing,
    /// It has ended, or is paused.
    Over,
}

impl Fate {
    /// Goes from one to the next; whether it was in the first.
    pub fn turn(&self, from: Decided, to: Decided) -> bool {
        let mut decided = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_from = *decided == from;
        if is_from {
            *decided = to;
        }
        is_from
    }

    pub fn is_over(&self) -> bool {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) == Decided::Over
    }
}

/// What comes to the task, and what it needs to end the sandbox whatever else it is doing.
pub struct Mail {
    pub commands: mpsc::Receiver<Command>,
    pub urgent: mpsc::Receiver<Urgent>,
    pub shown: watch::Sender<Shown>,
    pub deadline: BootInstant,
    /// The deadline as it was said last, when that is not recorded yet, and who waits for it.
    pub unrecorded: Option<(jiff::Timestamp, Vec<oneshot::Sender<()>>)>,
    /// Who wanted it ended while it was being recorded as paused.
    pub killed: Option<oneshot::Sender<()>>,
    pub ended: bool,
    pub ends_at_deadline: bool,
    pub inner: Arc<Inner>,
    pub sandbox: SandboxId,
    pub key: ProcessKey,
    pub fate: Arc<Fate>,
}

impl Mail {
    /// Ends it for everybody, and its VMM. Releasing what it had is the task's. Whether it is ended by this.
    pub fn end(&mut self, reason: &str) -> bool {
        if !self.fate.turn(Decided::Open, Decided::Over) {
            return false;
        }
        tracing::info!(sandbox = %self.sandbox, reason, "sandbox ends");
        self.ended = true;
        self.inner.begin_teardown();
        self.inner.sandboxes().remove(&self.sandbox);
        let killed = Process::adopt(self.key).and_then(|process| process.kill());
        if let Err(error) = killed
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::error!(sandbox = %self.sandbox, %error, "its VMM could not be told, its release tries again");
        }
        self.inner.changes.add(self.sandbox.clone(), reason);
        true
    }

    pub fn hear(&mut self, urgent: Urgent) {
        match urgent {
            Urgent::Kill(done) => {
                if self.end("it was killed") {
                    let _ = done.send(());
                } else if !self.ended {
                    // Answered when it is known whether it is paused.
                    self.killed = Some(done);
                }
            }
            Urgent::SetDeadline(ends_at, deadline, done) => {
                self.deadline = deadline;
                let unrecorded = self.unrecorded.get_or_insert_default();
                unrecorded.0 = ends_at;
                unrecorded.1.push(done);
            }
        }
    }

    /// Does `work` to its end, and hears what is urgent meanwhile. Whoever ends the sandbox has ended its VMM by that,
    /// so `work` fails soon.
    pub async fn beside<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        let clock = self.inner.clock.clone();
        let (mut is_open, mut ends) = (true, self.ends_at_deadline && !self.ended);
        loop {
            tokio::select! {
                biased;
                urgent = self.urgent.recv(), if is_open => match urgent {
                    Some(urgent) => self.hear(urgent),
                    None => is_open = false,
                },
                done = &mut work => return done,
                () = clock.sleep_until(self.deadline), if ends && !self.ended => {
                    // One that is being recorded as paused has no deadline any more; else it is ended after this.
                    ends = self.end(TIME_IS_OVER);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use jiff::SignedDuration;
    use kelvin_api::sandbox::{Lifecycle, OnTimeout, PauseMode};
    use kelvin_host::clock::Simulated;

    use super::*;
    use crate::sandbox::actor::body;

    fn record(clock: &Clock, left: Duration) -> SandboxRecord {
        let deadline = clock.now() + left;
        let mut record = serde_json::json!({
            "sandbox": SandboxId::random(), "state": "running", "shape": { "vcpus": 1, "memory_mib": 256, "disk_mib": 1024 },
            "template": "base", "guest": "g", "snapshot": null, "lineage": null, "parent": null, "generation": 0,
            "identity": null, "start_path": "clone", "started_at": clock.wall(), "ends_at": clock.shown(deadline),
            "access_token": null, "env_vars": {}, "mac": null, "network": null,
            "timeout_s": 60,
        });
        let lifecycle =
            Lifecycle { on_timeout: OnTimeout::Kill, auto_resume: false, pause_mode: PauseMode::Full };
        record["lifecycle"] = serde_json::to_value(lifecycle).unwrap();
        record["deadline"] = serde_json::to_value(clock.stamp(deadline)).unwrap();
        serde_json::from_value(record).unwrap()
    }

    /// A restart between the write and the read: all that the next daemon has is the text.
    fn read_again(record: &SandboxRecord) -> SandboxRecord {
        SandboxRecord::read(&body(record).unwrap()).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_wall_clock_that_jumps_and_a_restart_move_no_end_of_life() {
        for hours in [1, -1] {
            let time = Simulated::start();
            let clock = time.clock();
            let record = record(&clock, Duration::from_secs(600));
            let before = clock.now();
            tokio::time::sleep(Duration::from_secs(100)).await;
            time.jump_wall(SignedDuration::from_hours(hours));
            let again = read_again(&record);
            let deadline = deadline_of(&clock, &again);
            assert_eq!(deadline.saturating_duration_since(clock.now()), Duration::from_secs(500));
            // People see the clock that they have, and a clock that nobody set shows what was said.
            let live = shown(&clock, again.live(), deadline);
            assert_eq!(live.ends_at, record.ends_at + SignedDuration::from_hours(hours));
            time.jump_wall(SignedDuration::from_hours(-hours));
            assert_eq!(shown(&clock, again.live(), deadline).ends_at, record.ends_at);
            clock.sleep_until(deadline).await;
            assert_eq!(clock.now().saturating_duration_since(before), Duration::from_secs(600));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_former_version_wrote_ends_by_the_wall_clock_that_it_knew() {
        let time = Simulated::start();
        let clock = time.clock();
        let mut former = serde_json::to_value(record(&clock, Duration::from_secs(600))).unwrap();
        let fields = former.as_object_mut().unwrap();
        assert!(fields.remove("deadline").is_some() && fields.remove("project").is_some());
        let former: SandboxRecord = serde_json::from_value(former).unwrap();
        let left = deadline_of(&clock, &former).saturating_duration_since(clock.now());
        assert_eq!(left, Duration::from_secs(600));
        // Nothing of the former boot runs; a record of it is no reason to panic.
        let other = record(&clock, Duration::from_secs(600));
        time.reboot();
        assert!(deadline_of(&clock, &other) > clock.now());
    }

    #[test]
    fn a_kill_and_a_pause_that_is_recorded_do_not_both_come_first() {
        let fate = Fate::default();
        assert!(fate.turn(Decided::Open, Decided::Pausing));
        assert!(!fate.turn(Decided::Open, Decided::Over), "a kill waits for what the record says");
        assert!(fate.turn(Decided::Pausing, Decided::Open), "which could not be written");
        assert!(fate.turn(Decided::Open, Decided::Over));
        assert!(!fate.turn(Decided::Open, Decided::Pausing), "what was killed is not paused");
        assert!(fate.is_over());
    }
}
