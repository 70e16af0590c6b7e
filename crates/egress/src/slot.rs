//! One slot as this process sees it: its policy, what it refused, and the connections to cut.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use kelvin_api::network::{Policy, Refusal};
use tokio::sync::Semaphore;
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

/// A slot that is attached.
#[derive(Debug)]
pub struct Slot {
    number: u16,
    policy: RwLock<Arc<Policy>>,
    refusals: Mutex<Refusals>,
    open: Mutex<Open>,
    /// For proxied connections.
    pub connections: Arc<Semaphore>,
    /// For questions under way.
    pub questions: Arc<Semaphore>,
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
    pub fn new(number: u16, policy: Policy, max_connections: u32) -> Self {
        let most = policy.max_connections.unwrap_or(u32::MAX).min(max_connections);
        Self {
            number,
            policy: RwLock::new(Arc::new(policy)),
            refusals: Mutex::default(),
            open: Mutex::default(),
            connections: Arc::new(Semaphore::new(usize::try_from(most).unwrap_or(usize::MAX).min(1 << 20))),
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
