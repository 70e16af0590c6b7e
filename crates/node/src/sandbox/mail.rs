//! What comes to the task of a sandbox: what waits its turn, what is urgent, and which of a kill and a pause was first.
//!
//! Nothing is written here; a crash leaves nothing.

use std::sync::{Arc, Mutex, PoisonError};

use kelvin_api::id::SandboxId;
use kelvin_host::clock::{BootInstant, Clock};
use kelvin_host::process::{Process, ProcessKey};
use tokio::sync::{mpsc, oneshot, watch};

use crate::activity::{Activity, Underway};
use crate::changes::Log;
use crate::sandbox::handle::{Command, Shown, Urgent};
use crate::sandbox::registry::Sandboxes;

/// Why a sandbox ends at its deadline, for its owner.
pub const TIME_IS_OVER: &str = "its time to live was over";

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
    /// What is counted from its end until all of it is released.
    pub teardown: Option<Underway>,
    pub clock: Clock,
    pub sandboxes: Sandboxes,
    pub changes: Arc<Log>,
    pub activity: Activity,
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
        self.teardown = Some(self.activity.teardown());
        self.sandboxes.running().remove(&self.sandbox);
        let killed = Process::adopt(self.key).and_then(|process| process.kill());
        if let Err(error) = killed
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::error!(sandbox = %self.sandbox, %error, "its VMM could not be told, its release tries again");
        }
        self.changes.add(self.sandbox.clone(), reason);
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
        let clock = self.clock.clone();
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
    use super::*;

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
