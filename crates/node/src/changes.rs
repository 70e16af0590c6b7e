//! What ended, was paused or resumed on this node, for a control plane that asks: a bounded log with generations.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kelvin_api::id::SandboxId;
use kelvin_node_api::{Changes, Live};
use tokio::sync::Notify;

/// Entries that are kept; who is further behind compares with what lives.
const KEPT: usize = 10_000;

#[derive(Debug, Default)]
struct LogState {
    /// Generation of the newest entry.
    newest: u64,
    entries: VecDeque<(u64, SandboxId, What)>,
}

/// Small: ten thousand of them are kept.
#[derive(Debug, Clone)]
enum What {
    Ended(Box<str>),
    Is(Box<Live>),
}

/// The log.
#[derive(Debug, Default)]
pub struct Log {
    state: Mutex<LogState>,
    added: Notify,
}

impl Log {
    fn state(&self) -> MutexGuard<'_, LogState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that `sandbox` ended.
    pub fn add(&self, sandbox: SandboxId, reason: &str) {
        self.push(sandbox, What::Ended(reason.into()));
    }

    /// Notes that a sandbox was paused or resumed.
    pub fn is(&self, live: Live) {
        self.push(live.sandbox.clone(), What::Is(Box::new(live)));
    }

    fn push(&self, sandbox: SandboxId, what: What) {
        let mut state = self.state();
        state.newest += 1;
        let generation = state.newest;
        state.entries.push_back((generation, sandbox, what));
        if state.entries.len() > KEPT {
            state.entries.pop_front();
        }
        drop(state);
        self.added.notify_waiters();
    }

    /// Why `sandbox` ended, when that is still known. Looks at the newest first; only error paths ask.
    pub fn why(&self, sandbox: &SandboxId) -> Option<String> {
        self.state().entries.iter().rev().find_map(|(_, id, what)| match what {
            What::Ended(reason) if id == sandbox => Some(reason.to_string()),
            _ => None,
        })
    }

    fn since(&self, generation: u64) -> Changes {
        let state = self.state();
        let oldest = state.entries.front().map_or(state.newest + 1, |(generation, ..)| *generation);
        let mut changes = Changes {
            generation: state.newest,
            // Nothing was seen yet, or something was dropped that was not seen.
            resync: generation > state.newest || generation + 1 < oldest,
            ..Changes::default()
        };
        for (_, id, what) in state.entries.iter().filter(|(at, ..)| *at > generation) {
            match what {
                What::Ended(reason) => {
                    changes.changed.remove(id);
                    changes.ended.insert(id.clone(), reason.to_string());
                }
                What::Is(live) => {
                    changes.changed.insert(id.clone(), Live::clone(live));
                }
            }
        }
        changes
    }

    /// What happened after `generation`; waits until there is something.
    pub async fn after(&self, generation: u64) -> Changes {
        loop {
            let added = self.added.notified();
            tokio::pin!(added);
            added.as_mut().enable();
            let changes = self.since(generation);
            if changes.generation != generation || changes.resync {
                return changes;
            }
            added.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_reader_that_was_away_too_long_is_told_so() {
        let log = Log::default();
        let id = SandboxId::random();
        log.add(id.clone(), "killed");
        let changes = log.after(0).await;
        assert_eq!((changes.generation, changes.resync), (1, false));
        assert_eq!(changes.ended[&id], "killed");
        for _ in 0..KEPT + 5 {
            log.add(SandboxId::random(), "killed");
        }
        assert!(log.after(1).await.resync);
        // A generation of a former daemon.
        assert!(log.after(u64::MAX).await.resync);
        let waiting = log.after(KEPT as u64 + 6);
        tokio::pin!(waiting);
        assert!(tokio::time::timeout(std::time::Duration::from_millis(20), &mut waiting).await.is_err());
        log.add(id, "again");
        assert_eq!(waiting.await.ended.len(), 1);
    }
}
