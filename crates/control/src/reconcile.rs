//! The database is brought to what the node says: at a start, and whenever the node tells a change.
//!
//! Who writes: one task, which follows the node. A crash leaves rows that are older than the node; the next start compares all.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kelvin_api::error::{Failure, chain};
use kelvin_api::id::SandboxId;
use kelvin_api::phase::Timings;
use kelvin_host::clock::Clock;
use kelvin_node_api::{Live, NodeService};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::accounts::Accounts;
use crate::auth::ApiKey;
use crate::builds::turns::Uploading;
use crate::builds::{BuildOptions, Owners, UnderWay};
use crate::control::{Control, Inner, Wakes};
use crate::database::{self, Database};
use crate::failures::database_failed;
use crate::metrics::Metrics;
use crate::placement::Placement;

/// How long to wait before a node that failed is asked again for its changes.
const RETRY: Duration = Duration::from_secs(1);

impl Control {
    /// Brings the database in `data_dir` to what this build knows, or refuses it. Asked before the node is opened: that takes over
    /// machines and acts on them, which nobody shall do for a server that does not come to start.
    ///
    /// # Errors
    /// When the database is of a later version, or cannot be written.
    pub fn prepare(data_dir: &Path, clock: Clock) -> Result<(), Failure> {
        Database::open(&data_dir.join("kelvin.db"), clock).map(drop).map_err(database_failed)
    }

    /// Opens the control plane over `node`, with its database in `data_dir`, and brings the database to what
    /// the node says.
    ///
    /// # Errors
    /// When the database or the node cannot be used.
    ///
    /// `domain` is told to clients, which reach ports as its hosts. `clock` is the node's. `options`: what builds may take.
    pub async fn open(
        data_dir: &Path,
        node: Arc<dyn NodeService>,
        key: ApiKey,
        domain: Option<String>,
        clock: Clock,
        options: BuildOptions,
    ) -> Result<Self, Failure> {
        let path = data_dir.join("kelvin.db");
        let database = Database::open(&path, clock.clone()).map_err(database_failed)?;
        database.count_from_this_boot().await.map_err(database_failed)?;
        let accounts = Accounts::open(key, &database).await?;
        let owners = Owners::new(database.template_owners().await.map_err(database_failed)?);
        let upload_secret = accounts.secret_for("uploads");
        let inner = Arc::new(Inner {
            clock,
            database,
            node,
            placement: Placement::local(),
            accounts,
            started: Mutex::default(),
            domain,
            keys: Mutex::default(),
            changes: Arc::default(),
            wakes: Wakes::default(),
            build_options: options,
            builds: UnderWay::new(options),
            uploading: Uploading::default(),
            owners,
            upload_secret,
            metrics: Metrics::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        inner.compare(true).await?;
        let follower = Arc::clone(&inner);
        inner.tasks.spawn(async move {
            let stop = follower.stop.clone();
            stop.run_until_cancelled(follower.follow()).await;
        });
        let cache = Arc::clone(&inner);
        inner.tasks.spawn(async move {
            let stop = cache.stop.clone();
            stop.run_until_cancelled(cache.accounts.follow(&cache.database)).await;
        });
        let keeper = Arc::clone(&inner);
        inner.tasks.spawn(async move {
            let stop = keeper.stop.clone();
            stop.run_until_cancelled(keeper.keep_versions()).await;
        });
        let meter = Arc::clone(&inner);
        inner.tasks.spawn(async move {
            let stop = meter.stop.clone();
            stop.run_until_cancelled(meter.measure()).await;
        });
        Ok(Self { inner })
    }

    /// Ends what runs in the background; creates that are under way end first.
    pub async fn stop(&self) {
        self.inner.stop.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }
}

impl Inner {
    /// Brings the database to what the node has: after a start, or when the node's log was too short. Only
    /// at a start are rows that are being made somebody's who died.
    async fn compare(&self, at_start: bool) -> Result<(), Failure> {
        let by = &self.placement;
        if at_start {
            self.database.forget_claims(by).await.map_err(database_failed)?;
            self.compare_snapshots().await?;
            self.interrupt_builds().await?;
            self.prefer_all().await?;
        }
        let live: BTreeMap<SandboxId, Live> =
            self.node.live().await?.into_iter().map(|live| (live.sandbox.clone(), live)).collect();
        for (id, creating) in self.database.all(by).await.map_err(database_failed)? {
            if creating && !at_start {
                continue;
            }
            match (live.get(&id), creating) {
                (Some(live), true) => self.finish(live).await.map_err(database_failed)?,
                (Some(live), false) => self.database.set_live(by, live).await.map_err(database_failed)?,
                (None, true) => self.database.undo(by, &id).await.map_err(database_failed)?,
                (None, false) => {
                    let reason = "the node has it no more";
                    self.database.end(by, &id, reason).await.map_err(database_failed)?;
                }
            }
        }
        Ok(())
    }

    /// Commits a sandbox whose create the last daemon did not live to see the end of.
    async fn finish(&self, live: &Live) -> Result<(), database::Error> {
        self.database.commit(&self.placement, live, None, None).await?;
        let Some(row) = self.database.get(&live.sandbox).await? else {
            return Ok(());
        };
        let reason = format!("{}: the server was restarted meanwhile", live.start_path.name());
        let sandbox = self.reply_of(&row, live.start_path, reason, &Timings::default());
        self.database.commit(&self.placement, live, serde_json::to_string(&sandbox).ok(), None).await
    }

    /// Follows what ends on the node.
    async fn follow(&self) {
        let by = &self.placement;
        let mut generation = 0;
        loop {
            match self.node.changes(generation).await {
                Ok(changes) => {
                    generation = changes.generation;
                    let mut result = Ok(());
                    for live in changes.changed.values() {
                        result = result.and(self.database.set_live(by, live).await.map_err(database_failed));
                    }
                    for (id, reason) in &changes.ended {
                        result = result.and(self.database.end(by, id, reason).await.map_err(database_failed));
                    }
                    if changes.resync {
                        result = result.and(self.compare(false).await);
                    }
                    if let Err(error) = result {
                        tracing::error!(error = chain(&error), "the end of a sandbox was not recorded");
                        generation = u64::MAX;
                        tokio::time::sleep(RETRY).await;
                    }
                }
                Err(error) => {
                    tracing::warn!(error = chain(&error), "the node does not tell its changes");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }
}
