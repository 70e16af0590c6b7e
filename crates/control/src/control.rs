//! What the control plane has: the state that its files share, and no more.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::{BoxFuture, Shared};
use kelvin_api::account::Project;
use kelvin_api::error::Failure;
use kelvin_api::id::{SandboxId, Token};
use kelvin_host::clock::Clock;
use kelvin_node_api::NodeService;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::accounts::Accounts;
use crate::builds::turns::Uploading;
use crate::builds::{BuildOptions, Owners, UnderWay};
use crate::changes::Changes;
use crate::database::Database;
use crate::metrics::Metrics;
use crate::placement::Placement;

/// What all visitors of one sandbox wait for.
pub(crate) type Waking = Shared<BoxFuture<'static, Result<(), Failure>>>;

/// Wakes that are under way (`wake`).
#[derive(Default)]
pub(crate) struct Wakes(Mutex<HashMap<SandboxId, Waking>>);

impl Wakes {
    pub(crate) fn lock(&self) -> MutexGuard<'_, HashMap<SandboxId, Waking>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The control plane; cheap to clone.
#[derive(Clone)]
pub struct Control {
    pub(crate) inner: Arc<Inner>,
}

/// What all clones of a [`Control`] share.
pub(crate) struct Inner {
    pub(crate) clock: Clock,
    pub(crate) database: Database,
    pub(crate) node: Arc<dyn NodeService>,
    /// Which node that is.
    pub(crate) placement: Placement,
    pub(crate) accounts: Accounts,
    /// Sandboxes that were started since the last measurement, by project.
    pub(crate) started: Mutex<HashMap<Project, u32>>,
    pub(crate) domain: Option<String>,
    /// One lock for each idempotency key that is in use: a second request waits for the first, and is not told that it is under
    /// way. That there is one is decided by the database.
    pub(crate) keys: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Changes of sandboxes that are under way.
    pub(crate) changes: Arc<Changes>,
    pub(crate) wakes: Wakes,
    /// What builds may take.
    pub(crate) build_options: BuildOptions,
    /// Builds that wait or run.
    pub(crate) builds: UnderWay,
    /// Uploads that are under way.
    pub(crate) uploading: Uploading,
    /// Whose templates are.
    pub(crate) owners: Owners,
    /// What URLs of uploads are signed with.
    pub(crate) upload_secret: Token,
    pub(crate) metrics: Metrics,
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
}

impl Inner {
    /// Does `work` when nobody else does something for the idempotency key `key`.
    pub(crate) async fn alone_with_key<T>(&self, key: &str, work: impl Future<Output = T>) -> T {
        let lock = {
            let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(keys.entry(key.to_owned()).or_default())
        };
        let guard = lock.lock().await;
        let result = work.await;
        drop(guard);
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        // Two are this task's own and the map's.
        if Arc::strong_count(&lock) <= 2 {
            keys.remove(key);
        }
        result
    }

    pub(crate) fn count_start(&self, project: &Project) {
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        *started.entry(project.clone()).or_default() += 1;
    }
}
