//! One slot as this process sees it: its policy, what it refused, and the connections to cut.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use kelvin_api::network::{Policy, Refusal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::wire::State;

/// Refusals that are remembered.
const RECENT: usize = 64;
/// Names of reasons that are counted: ours, so a guest cannot add to them.
const SHOWN: usize = 120;
/// Refusals of one slot are logged at most this often.
const LOG_EVERY: Duration = Duration::from_millis(100);
/// Questions of one slot that may be under way.
const QUESTIONS: usize = 64;

#[derive(Debug, Default)]
struct Refusals {
    denied: BTreeMap<&'static str, u64>,
    recent: VecDeque<Refusal>,
    logged: Option<Instant>,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    connections: HashMap<u64, (String, CancellationToken)>,
}

/// Descriptors of this process for what guests begin: of all slots, so that no guest takes those of the others.
#[derive(Debug, Clone)]
pub struct Shared {
    all: Arc<Semaphore>,
    /// The most of one slot.
    each: usize,
}

impl Shared {
    /// Three quarters of `limit`; the rest is for the slots' own sockets. One slot has at most half of that.
    pub fn new(limit: u64) -> Self {
        let all = usize::try_from(limit / 4 * 3).unwrap_or(usize::MAX).clamp(4, 1 << 24);
        Self { all: Arc::new(Semaphore::new(all)), each: all / 2 }
    }

    /// Takes `count` until the permit is dropped; nothing when there are too few.
    pub fn take(&self, count: u32) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.all).try_acquire_many_owned(count).ok()
    }
}

/// A slot that is attached.
#[derive(Debug)]
pub struct Slot {
    number: u16,
    /// For the descriptors of connections and questions.
    pub shared: Shared,
    policy: RwLock<Arc<Policy>>,
    refusals: Mutex<Refusals>,
    open: Mutex<Open>,
    /// For proxied connections.
    pub connections: Arc<Semaphore>,
    /// For questions under way.
    questions: Arc<Semaphore>,
    /// Ends everything of the slot.
    pub gone: CancellationToken,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection that is cut when its name is no longer allowed.
pub struct Named {
    slot: Arc<Slot>,
    id: u64,
    /// Cut.
    pub cut: CancellationToken,
}

impl Drop for Named {
    fn drop(&mut self) {
        lock(&self.slot.open).connections.remove(&self.id);
    }
}

impl Slot {
    /// A new one.
    pub fn new(number: u16, policy: Policy, max_connections: u32, shared: Shared) -> Self {
        let most = policy.max_connections.unwrap_or(u32::MAX).min(max_connections);
        // Each has two ends.
        let most = usize::try_from(most).unwrap_or(usize::MAX).min(shared.each / 2);
        Self {
            number,
            shared,
            policy: RwLock::new(Arc::new(policy)),
            refusals: Mutex::default(),
            open: Mutex::default(),
            connections: Arc::new(Semaphore::new(most)),
            questions: Arc::new(Semaphore::new(QUESTIONS)),
            gone: CancellationToken::new(),
        }
    }

    /// What it may reach now.
    pub fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.policy.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the policy and cuts connections to names that it does not allow.
    pub fn set_policy(&self, policy: Policy) {
        let policy = Arc::new(policy);
        *self.policy.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&policy);
        for (name, cut) in lock(&self.open).connections.values() {
            if !policy.names().allow(name) {
                cut.cancel();
            }
        }
    }

    /// Registers a connection to `name`.
    pub fn register(self: &Arc<Self>, name: &str) -> Named {
        let mut open = lock(&self.open);
        let (id, cut) = (open.next, self.gone.child_token());
        open.next += 1;
        open.connections.insert(id, (name.to_owned(), cut.clone()));
        drop(open);
        // Between the look at the policy and this line it may have changed.
        if !self.policy().names().allow(name) {
            cut.cancel();
        }
        Named { slot: Arc::clone(self), id, cut }
    }

    /// Counts and remembers a refusal. `target` is a guest's text.
    pub fn refuse(&self, reason: &'static str, target: &str) {
        let target: String = target.chars().filter(|c| !c.is_control()).take(SHOWN).collect();
        let mut refusals = lock(&self.refusals);
        // Counted always, logged at a pace that a guest cannot set.
        if refusals.logged.is_none_or(|logged| logged.elapsed() >= LOG_EVERY) {
            refusals.logged = Some(Instant::now());
            tracing::info!(slot = self.number, reason, target, "refused");
        }
        *refusals.denied.entry(reason).or_default() += 1;
        if refusals.recent.len() == RECENT {
            refusals.recent.pop_front();
        }
        refusals.recent.push_back(Refusal { at: jiff::Timestamp::now(), reason: reason.to_owned(), target });
    }

    /// Leave to ask something, or to be asked over one more connection; until it is dropped.
    pub fn question(&self) -> Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)> {
        let question = Arc::clone(&self.questions).try_acquire_owned().ok()?;
        // What it comes by, and the way to the resolver.
        Some((question, self.shared.take(2)?))
    }

    /// What was refused.
    pub fn state(&self) -> State {
        let refusals = lock(&self.refusals);
        State {
            denied: refusals.denied.iter().map(|(reason, count)| ((*reason).to_owned(), *count)).collect(),
            recent: refusals.recent.iter().cloned().collect(),
        }
    }

    /// Its number.
    pub fn number(&self) -> u16 {
        self.number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_guest_does_not_take_the_descriptors_of_the_others() {
        let shared = Shared::new(1024);
        let slot = Slot::new(0, Policy::default(), 4096, shared.clone());
        let mut held = Vec::new();
        while let Ok(connection) = Arc::clone(&slot.connections).try_acquire_owned() {
            held.push((connection, slot.shared.take(2).expect("it has its share")));
        }
        assert_eq!(held.len(), 192);
        let mut others = Vec::new();
        while let Some(taken) = shared.take(2) {
            others.push(taken);
        }
        assert_eq!(others.len(), 192);
        drop(held);
        assert!(shared.take(2).is_some());
    }
}
