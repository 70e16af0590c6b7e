//! Who may restore next: as many at one time as there are processors, and projects take turns.
//!
//! ```text
//! project a: ── 1 ── 2 ── 3 ─┐
//! project b: ── 1 ───────────┼─> next: a1, b1, c1, a2, c2, a3        in order within a project
//! project c: ── 1 ── 2 ──────┘
//! ```
//!
//! A [`Turn`] is for what a restore asks of a processor. Whoever waits for a guest after that gives it back
//! ([`TURN`]): a guest may be silent for as long as it likes. Bounded: [`WAITING`] for each project. Nothing is
//! written; a crash leaves nothing.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kelvin_api::account::Project;
use tokio::sync::oneshot;

use crate::error::Error;

/// How long a restore is bound to a processor at the most: a guest that is alive answers well within it, and one that
/// is not costs others no more than this.
pub const TURN: Duration = Duration::from_millis(50);
/// How many creates of one project may wait for a turn.
const WAITING: usize = 1024;

#[derive(Debug)]
struct State {
    free: usize,
    /// Those that wait, by project; none is empty.
    waiting: BTreeMap<Project, VecDeque<oneshot::Sender<Turn>>>,
    /// Whose turn was last: the next is that of the project after it, around.
    last: Option<Project>,
}

/// The turns of one node. A cheap handle.
#[derive(Debug, Clone)]
pub struct Turns(Arc<Mutex<State>>);

/// The right to restore; dropping it lets the next one go.
#[derive(Debug)]
pub struct Turn(Option<Turns>);

impl Turns {
    /// `count` at one time; at least one.
    pub fn new(count: usize) -> Self {
        let state = State { free: count.max(1), waiting: BTreeMap::new(), last: None };
        Self(Arc::new(Mutex::new(state)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a turn of `project`. Cancel-safe: who does not wait any more is passed over.
    ///
    /// # Errors
    /// `QueueFull` when too many of that project wait already.
    pub async fn take(&self, project: &Project) -> Result<Turn, Error> {
        let receiver = {
            let mut state = self.state();
            if state.free > 0 {
                // Nobody waits while one is free.
                state.free -= 1;
                state.last = Some(project.clone());
                return Ok(Turn(Some(self.clone())));
            }
            let waiting = state.waiting.entry(project.clone()).or_default();
            waiting.retain(|sender| !sender.is_closed());
            if waiting.len() >= WAITING {
                return Err(Error::QueueFull { project: project.to_string(), limit: WAITING });
            }
            let (sender, receiver) = oneshot::channel();
            waiting.push_back(sender);
            receiver
        };
        receiver.await.map_err(|_| Error::Stopping)
    }

    /// Hands a turn on, or keeps it free.
    fn give_back(&self) {
        loop {
            let next = self.state().next();
            let Some(sender) = next else { return };
            match sender.send(Turn(Some(self.clone()))) {
                Ok(()) => return,
                // It waits no more: the turn goes to the one behind it, from here and not from its drop.
                Err(mut turn) => drop(turn.0.take()),
            }
        }
    }
}

impl State {
    /// Who is next; without one the turn is free.
    fn next(&mut self) -> Option<oneshot::Sender<Turn>> {
        use std::ops::Bound::{Excluded, Unbounded};
        let after = self.last.as_ref().and_then(|last| {
            self.waiting.range::<Project, _>((Excluded(last), Unbounded)).map(|(project, _)| project).next()
        });
        let Some(project) = after.or_else(|| self.waiting.keys().next()).cloned() else {
            self.free += 1;
            return None;
        };
        let waiting = self.waiting.get_mut(&project)?;
        let next = waiting.pop_front();
        if waiting.is_empty() {
            self.waiting.remove(&project);
        }
        self.last = Some(project);
        next
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(turns) = self.0.take() {
            turns.give_back();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures::FutureExt as _;

    use super::*;

    type Waiting<'a> = std::pin::Pin<Box<dyn Future<Output = Result<Turn, Error>> + 'a>>;

    fn project(name: &str) -> Project {
        name.parse().unwrap()
    }

    #[tokio::test]
    async fn projects_take_turns() {
        let turns = Turns::new(1);
        let (a, b, c) = (project("a"), project("b"), project("c"));
        let mut held = Some(turns.take(&a).await.unwrap());
        let mut waiting: Vec<(String, Waiting<'_>)> = Vec::new();
        // A hundred of one project came first.
        for at in 0..100 {
            waiting.push((format!("a{at}"), Box::pin(turns.take(&a))));
        }
        for (name, project) in [("b0", &b), ("c0", &c), ("b1", &b)] {
            waiting.push((name.to_owned(), Box::pin(turns.take(project))));
        }
        for (_, future) in &mut waiting {
            assert!(future.as_mut().now_or_never().is_none());
        }
        let mut order = Vec::new();
        for _ in 0..6 {
            drop(held.take());
            let at = waiting.iter_mut().position(|(_, future)| match future.as_mut().now_or_never() {
                Some(turn) => {
                    held = Some(turn.unwrap());
                    true
                }
                None => false,
            });
            order.push(waiting.remove(at.expect("one goes on")).0);
        }
        assert_eq!(order, ["b0", "c0", "a0", "b1", "a1", "a2"]);
    }

    #[tokio::test]
    async fn who_leaves_takes_no_turn_along() {
        let turns = Turns::new(2);
        let (a, b) = (project("a"), project("b"));
        let held = (turns.take(&a).await.unwrap(), turns.take(&a).await.unwrap());
        {
            let mut leaving = pin!(turns.take(&a));
            assert!(leaving.as_mut().now_or_never().is_none());
            let mut sent = pin!(turns.take(&b));
            assert!(sent.as_mut().now_or_never().is_none());
            drop(held.0);
            // One has a turn that it never sees, the other leaves while it waits.
        }
        drop(held.1);
        let state = turns.state();
        assert_eq!((state.free, state.waiting.len()), (2, 0));
    }

    #[tokio::test]
    async fn a_project_that_floods_the_queue_is_refused_and_nobody_else() {
        let turns = Turns::new(1);
        let (a, b) = (project("a"), project("b"));
        let held = turns.take(&a).await.unwrap();
        let mut waiting: Vec<_> = (0..WAITING).map(|_| Box::pin(turns.take(&a))).collect();
        assert!(waiting.iter_mut().all(|future| future.now_or_never().is_none()));
        assert!(matches!(turns.take(&a).await, Err(Error::QueueFull { .. })));
        let mut other = pin!(turns.take(&b));
        assert!(other.as_mut().now_or_never().is_none());
        drop(held);
        assert!(other.now_or_never().expect("its turn").is_ok());
    }
}
