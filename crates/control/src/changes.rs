//! One change of a sandbox at a time.
//!
//! Whoever comes while another change is under way waits for it, for a while, and is then told which one it is. A kill
//! waits for nobody: the node decides between it and what is under way, once. What the node does by itself (a deadline, a
//! wake by traffic) is not known here, and is decided there.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::SandboxId;
use tokio::sync::OwnedMutexGuard;

/// How long a request waits for a change that is under way.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
struct Gate {
    turn: Arc<tokio::sync::Mutex<()>>,
    what: Mutex<&'static str>,
}

/// The changes that are under way.
#[derive(Debug, Default)]
pub(crate) struct Changes(Mutex<HashMap<SandboxId, Arc<Gate>>>);

/// A change that is under way, until it is dropped.
#[derive(Debug)]
pub(crate) struct Change {
    all: Arc<Changes>,
    id: SandboxId,
    gate: Option<Arc<Gate>>,
    turn: Option<OwnedMutexGuard<()>>,
}

impl Changes {
    fn all(&self) -> MutexGuard<'_, HashMap<SandboxId, Arc<Gate>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a change of `id`, called `what`, when no other is under way any more.
    ///
    /// # Errors
    /// `Conflict` with the name of the other, which took too long to be waited for.
    pub async fn begin(self: &Arc<Self>, id: &SandboxId, what: &'static str) -> Result<Change, Failure> {
        self.begin_within(id, what, PATIENCE).await
    }

    async fn begin_within(
        self: &Arc<Self>,
        id: &SandboxId,
        what: &'static str,
        patience: Duration,
    ) -> Result<Change, Failure> {
        let gate = Arc::clone(self.all().entry(id.clone()).or_default());
        let mut change =
            Change { all: Arc::clone(self), id: id.clone(), gate: Some(Arc::clone(&gate)), turn: None };
        let Ok(turn) = tokio::time::timeout(patience, Arc::clone(&gate.turn).lock_owned()).await else {
            let other = *gate.what.lock().unwrap_or_else(PoisonError::into_inner);
            return Err(Failure::new(
                ErrorCode::SandboxChanging,
                format!("sandbox {id} cannot be changed now: a {other} is under way"),
                "try again when it is done; a kill is done at once",
            ));
        };
        *gate.what.lock().unwrap_or_else(PoisonError::into_inner) = what;
        change.turn = Some(turn);
        Ok(change)
    }

    /// How many sandboxes are known here.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.all().len()
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        drop(self.turn.take());
        let mut all = self.all.all();
        drop(self.gate.take());
        // Nobody waits: the one that is left is the map's.
        if all.get(&self.id).is_some_and(|gate| Arc::strong_count(gate) == 1) {
            all.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn changes_take_turns_and_leave_nothing() {
        let changes = Arc::new(Changes::default());
        let (one, other) = (SandboxId::random(), SandboxId::random());
        let first = changes.begin(&one, "fork").await.unwrap();
        drop(changes.begin(&other, "pause").await.unwrap());
        let short = Duration::from_millis(20);
        let late = changes.begin_within(&one, "pause", short).await.unwrap_err();
        assert_eq!(late.error_code, ErrorCode::SandboxChanging);
        assert!(late.message.contains("a fork is under way"), "{}", late.message);
        let waiting = tokio::spawn({
            let (changes, one) = (Arc::clone(&changes), one.clone());
            async move { changes.begin(&one, "resume").await.map(drop) }
        });
        tokio::task::yield_now().await;
        // One that leaves while it waits.
        let left = changes.begin(&one, "snapshot");
        assert!(tokio::time::timeout(short, left).await.is_err());
        drop(first);
        waiting.await.unwrap().unwrap();
        assert_eq!(changes.len(), 0);
    }
}
