//! The filler of what waits for requests: VMMs, started ahead of time for one snapshot, with their disk, ready to load; and
//! network slots.
//!
//! One task for each pool, and one for the slots, builds one at a time, and only while no create is under way (or for at
//! most [`PATIENCE`]): preparing never takes a processor from a request. A waiting VMM is a machine like
//! any other to the ledger; the next start reaps those of a daemon that died.

use std::sync::Arc;
use std::time::Duration;

use kelvin_api::id::TemplateName;
use kelvin_host::descriptors::{Budget, MACHINE};
use kelvin_store::snapshot::Snapshot;

use crate::capacity::{Amount, Hold};
use crate::error::Error;
use crate::networks::Networks;
use crate::pool::shelf::{Pool, Ready, manifest_shape};
use crate::state::Inner;

/// How long a filler lets requests go first.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// How long a filler waits after a failure: the cause is outside, and there is no event to wait for.
pub const RETRY: Duration = Duration::from_secs(5);

impl Inner {
    /// Starts one VMM for `pool`'s snapshot and connects its guest's control port.
    /// `hold`: what it holds while it waits.
    pub async fn prepare(&self, pool: &Pool, hold: Option<Hold>) -> Result<Ready, Error> {
        let manifest = &pool.snapshot.manifest;
        let network = self.identities.has_network(&manifest.identity);
        let disk = pool.snapshot.file("disk");
        let home = self.allocator.build(manifest_shape(manifest), &manifest.guest, disk, network).await?;
        let memory = std::path::Path::new("snapshots").join(manifest.id.as_str()).join("memory");
        let made = async {
            let waiting = self.driver.prepare(&home.spec, &memory).await?;
            home.started(&self.allocator, waiting.key()).await?;
            let control = waiting.control().await?;
            Ok::<_, Error>((waiting, control))
        };
        match made.await {
            Ok((waiting, control)) => Ok(Ready { home, waiting, control, hold }),
            Err(error) => {
                self.allocator.release_or_log(&home.spec, None).await;
                Err(error)
            }
        }
    }

    /// Nothing waits any more for snapshots of `template` but for those of the version that most creates ask for: there is
    /// another one, or it was removed. Warm machines go by themselves, and snapshots that are no version's with a collection.
    pub async fn settle_pools(&self, template: &TemplateName) {
        let waited_for = self.templates.waited_for();
        let is_of = |pool: &Arc<Pool>| pool.snapshot.manifest.template == *template;
        let pools: Vec<_> = self.pools.all().into_iter().filter(is_of).collect();
        // All targets first, and without a wait: another version may be chosen meanwhile.
        for pool in &pools {
            match self.is_one_of(&waited_for, &pool.snapshot.manifest.identity) {
                true => pool.set_target_if_none(self.options.waiting_vmms),
                false => pool.set_target(0),
            }
        }
        for pool in &pools {
            for ready in pool.excess() {
                self.discard(ready).await;
            }
        }
        self.pools.look();
    }

    /// Makes a snapshot usable. A pool of the same identity that was refused is replaced.
    pub fn add_pool(self: &Arc<Self>, snapshot: Arc<Snapshot>) {
        self.snapshots.add(Arc::clone(&snapshot));
        let digest = snapshot.manifest.identity_digest.clone();
        let waits = self.is_waited_for(&snapshot.manifest.identity);
        let pool = Arc::new(Pool::new(snapshot, if waits { self.options.waiting_vmms } else { 0 }));
        self.pools.insert(digest, Arc::clone(&pool));
        self.tasks.spawn(keep_full(Arc::clone(self), pool));
        self.pools.look();
    }
}

/// What is kept full.
trait Stock: Sync {
    /// One of it, for the log.
    const WHAT: &str;
    /// Whether there are as many as should be.
    fn is_full(&self) -> bool;
    /// Resolves when somebody has taken one.
    fn taken(&self) -> impl Future<Output = ()> + Send;
    /// Removes what is of no use any more.
    fn tidy(&self, _inner: &Inner) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
    /// Makes one more.
    fn add(&self, inner: &Inner) -> impl Future<Output = Result<(), Error>> + Send;
}

impl Stock for Pool {
    const WHAT: &str = "VMM";

    fn is_full(&self) -> bool {
        Pool::is_full(self)
    }

    async fn taken(&self) {
        self.wake.notified().await;
    }

    async fn tidy(&self, inner: &Inner) {
        // Also what was on its way when the target was lowered.
        for ready in self.excess() {
            inner.discard(ready).await;
        }
    }

    async fn add(&self, inner: &Inner) -> Result<(), Error> {
        let _descriptors = Budget::of_process().take_spare(MACHINE)?;
        let hold = inner.capacity.hold(Amount::waiting())?;
        let ready = inner.prepare(self, Some(hold)).await?;
        self.ready().push_back(ready);
        Ok(())
    }
}

impl Stock for Networks {
    const WHAT: &str = "network slot";

    fn is_full(&self) -> bool {
        self.slots.is_full()
    }

    async fn taken(&self) {
        self.slots.taken().await;
    }

    async fn add(&self, _inner: &Inner) -> Result<(), Error> {
        Ok(self.slots.add().await?)
    }
}

/// Keeps `stock` full until the node stops. What is being prepared then is finished first, so that
/// `Node::stop` can release it.
async fn keep_full<S: Stock>(inner: Arc<Inner>, stock: Arc<S>) {
    let stop = inner.stop.clone();
    while !stop.is_cancelled() {
        stock.tidy(&inner).await;
        if stock.is_full() {
            stop.run_until_cancelled(stock.taken()).await;
            continue;
        }
        let _ = stop.run_until_cancelled(tokio::time::timeout(PATIENCE, inner.activity.quiet())).await;
        if stock.is_full() || stop.is_cancelled() {
            continue;
        }
        match stock.add(&inner).await {
            Ok(()) => inner.activity.changed(),
            Err(error) => {
                tracing::warn!(error = kelvin_api::error::chain(&error), "no {} could be prepared", S::WHAT);
                let _ = stop.run_until_cancelled(tokio::time::timeout(RETRY, stock.taken())).await;
            }
        }
    }
}

/// Keeps network slots ready until the node stops.
pub async fn fill_slots(inner: Arc<Inner>, networks: Arc<Networks>) {
    keep_full(inner, networks).await;
}

impl Inner {
    /// Ends a waiting VMM and releases what it has.
    pub async fn discard(&self, ready: Ready) {
        let key = ready.waiting.key();
        self.allocator.release_or_log(&ready.home.spec, Some(key)).await;
        drop(ready.hold);
    }
}
