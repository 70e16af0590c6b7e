//! Opening a node, what it does from then on by itself, and stopping it.
//!
//! Who writes: the ledger, through `recovery`. A start that fails or crashes is made again by the next one.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kelvin_api::units::{DiskMib, Shape};
use kelvin_host::cgroup::Cgroups;
use kelvin_host::clock::{BootInstant, Clock};
use kelvin_host::ledger::{Entry, Ledger};
use kelvin_store::Store;
use kelvin_store::layers::Layers;
use kelvin_store::snapshot::{Origin, Snapshot};
use kelvin_store::uploads::Uploads;
use kelvin_vmm::Driver;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::Node;
use crate::activity::Activity;
use crate::build::image::BaseImages;
use crate::build::oci::OciImages;
use crate::build::registry::Builds;
use crate::capacity::Capacity;
use crate::error::Error;
use crate::identities::Identities;
use crate::machine::resources::{Groups, MachineAllocator};
use crate::networks::{EgressOptions, Networks};
use crate::options::{self, Options};
use crate::pool::filler;
use crate::pool::pools::{Pools, read_rules};
use crate::pool::shelf::Pool;
use crate::recovery;
use crate::sandbox::handle::SET;
use crate::sandbox::registry::Sandboxes;
use crate::snapshots::Snapshots;
use crate::start::turns::Turns;
use crate::state::Inner;
use crate::templates::Templates;

/// How many VMMs are taken over at one time: each exchange with one asks for a processor.
const ADOPTIONS: usize = 16;
/// How long requests that are under way may take when the node stops, before no guest is waited for any more; and how
/// long after that, before what is left is left to the next start.
const PATIENCE: Duration = Duration::from_secs(5);
const LEAVE: Duration = Duration::from_secs(60);
/// How often a release that failed is tried again.
const REAP: Duration = Duration::from_secs(30);

/// Control groups, when the driver has limits. A host that cannot have them is told so, once.
fn groups(driver: &Arc<dyn Driver>, data_dir: &Path) -> Option<Groups> {
    let any = Shape { vcpus: 1, memory_mib: options::MIN_MEMORY, disk_mib: DiskMib(1) };
    driver.limits(any)?;
    match Cgroups::open(data_dir) {
        Ok(cgroups) => Some(Groups { cgroups, driver: Arc::clone(driver) }),
        Err(reason) => {
            tracing::warn!(
                reason,
                "machines have no limits of the host's memory, processors and disk; `kelvin doctor` says what it needs"
            );
            None
        }
    }
}

impl Node {
    /// Opens the node: templates and snapshots are read, the ledger is reconciled, pools begin to fill.
    ///
    /// # Errors
    /// When the data directory, the ledger or the VMM cannot be used.
    pub async fn open(options: Options, driver: Arc<dyn Driver>) -> Result<Self, Error> {
        let (directory, settings) = (options.data_dir.join("image-cache"), options.clone());
        let opened = kelvin_host::blocking::spawn(move || OciImages::open(directory, &settings)).await;
        let images = opened.map_err(|error| Error::Io {
            what: "opening the cache of images",
            source: std::io::Error::other(error),
        })?;
        let images = images.map_err(|failure| Error::Build(Box::new(failure)))?;
        Self::open_with(options, driver, Arc::new(images)).await
    }

    /// The same with other images for builds.
    ///
    /// # Errors
    /// As [`Node::open`].
    pub async fn open_with(
        options: Options,
        driver: Arc<dyn Driver>,
        images: Arc<dyn BaseImages>,
    ) -> Result<Self, Error> {
        let root = options.data_dir.clone();
        let opened = kelvin_host::blocking::spawn(move || {
            let store = Store::open(&root, true)?;
            let (templates, snapshots) = (store.templates()?, store.snapshots()?);
            Ok::<_, Error>((store, templates, snapshots))
        });
        let (store, templates, snapshots) = opened.await.map_err(|error| Error::Io {
            what: "opening the store",
            source: std::io::Error::other(error),
        })??;
        let ledger = Ledger::open(&store.root().join("ledger.db"))?;
        let reflink = kelvin_host::datadir::can_reflink(store.root())
            .map_err(|source| Error::Io { what: "trying the data directory's file system", source })?;
        let (entries, records) = ledger.read().await?;
        recovery::check_vmm(driver.kind(), &entries, &records, &snapshots)?;
        let pools = Pools::new(read_rules(store.root())?, options.warm);
        let (networks, attached, no_network) = open_networks(&options, &ledger, &entries).await?;
        let allocator = MachineAllocator {
            ledger,
            store: store.clone(),
            users: Arc::default(),
            first_user: options.first_user,
            networks: networks.clone(),
            groups: groups(&driver, store.root()),
            unreleased: Arc::default(),
            unremoved: Arc::default(),
        };
        let clock = match options.clock.clone() {
            Some(clock) => clock,
            None => Clock::system()
                .map_err(|source| Error::Io { what: "asking the kernel which boot this is", source })?,
        };
        // Caches of builds never take what machines need: they stop well above the floor.
        let spare = options.disk_floor_mib.saturating_mul(2 << 20);
        let inner = Arc::new(Inner {
            capacity: Capacity::new(&options),
            clock,
            turns: Turns::new(options.concurrent_restores),
            adoptions: Semaphore::new(ADOPTIONS),
            builds: Builds::default(),
            images,
            layers: Layers::new(store.clone(), options.layer_cache_bytes, spare),
            uploads: Uploads::new(store.clone(), options.upload_bytes, options.upload_cache_bytes, spare),
            options,
            templates: Templates::new(store.clone()),
            store,
            identities: Identities::new(Arc::clone(&driver)),
            driver,
            allocator,
            sandboxes: Sandboxes::default(),
            snapshots: Snapshots::default(),
            pools,
            bakes: tokio::sync::Mutex::default(),
            verifying: tokio::sync::Mutex::default(),
            activity: Activity::default(),
            changes: Arc::default(),
            no_network,
            reflink,
            tasks: TaskTracker::new(),
            hurry: CancellationToken::new(),
            stop: CancellationToken::new(),
        });
        inner.templates.know(&templates);
        let snapshots: Vec<_> = snapshots.into_iter().map(Arc::new).collect();
        for snapshot in &snapshots {
            inner.snapshots.add(Arc::clone(snapshot));
        }
        let found = inner.reconcile(entries, records, &attached).await?;
        let paused = inner.sandboxes.paused().len();
        tracing::info!(adopting = found.adopting, paused, removed = found.removed, "reconciled");
        if found.unreadable == 0 {
            inner.snapshots.sweep();
        }
        inner.spawn_own(snapshots, networks);
        Ok(Self { inner })
    }

    /// Stops the node: creates that are under way end, waiting VMMs are released, sandboxes keep running.
    pub async fn stop(&self) {
        let inner = &self.inner;
        if tokio::time::timeout(PATIENCE, inner.activity.no_request()).await.is_err() {
            tracing::warn!(requests = inner.activity.requests(), "stopping: no guest is waited for any more");
        }
        inner.hurry.cancel();
        let _ = tokio::time::timeout(LEAVE, inner.activity.no_request()).await;
        // Machines run on, and what they were restored from has to outlive the tasks that end now.
        inner.snapshots.close();
        inner.stop.cancel();
        inner.tasks.close();
        if tokio::time::timeout(LEAVE, inner.tasks.wait()).await.is_err() {
            tracing::error!("stopping: what is still under way is left to the next start");
        }
        let pools: Vec<Arc<Pool>> = self.inner.pools.all();
        for pool in pools {
            for ready in pool.drain() {
                self.inner.discard(ready).await;
            }
            for parked in pool.drain_warm() {
                self.inner.discard_parked(parked).await;
            }
        }
        if let Some(networks) = &self.inner.allocator.networks
            && let Err(error) = networks.close().await
        {
            tracing::error!(
                error = kelvin_api::error::chain(&error),
                "networks are left, the next start removes them"
            );
        }
    }
}

impl Inner {
    /// Begins what a node does by itself: pools fill, what is pending deletion is removed, what failed is tried again.
    fn spawn_own(self: &Arc<Self>, snapshots: Vec<Arc<Snapshot>>, networks: Option<Arc<Networks>>) {
        let removing = {
            let (store, activity) = (self.store.clone(), self.activity.clone());
            self.snapshots.clone().run(store, move || activity.changed(), self.stop.clone())
        };
        self.tasks.spawn(removing);
        self.tasks.spawn(Arc::clone(self).govern());
        let digesting = Arc::clone(self);
        self.tasks.spawn(async move {
            let stop = digesting.stop.clone();
            stop.run_until_cancelled(digesting.digest_kept()).await;
        });
        for snapshot in snapshots {
            if snapshot.manifest.origin == Origin::Bake {
                self.add_pool(snapshot);
            }
        }
        if let Some(networks) = networks {
            self.tasks.spawn(filler::fill_slots(Arc::clone(self), Arc::clone(&networks)));
            self.tasks.spawn(networks.watch(self.stop.clone()));
        }
        self.tasks.spawn(Arc::clone(self).reap());
    }

    /// Tries again what failed before, and looks after what no event tells of, until the node stops.
    async fn reap(self: Arc<Self>) {
        let mut last = (self.clock.now(), self.clock.wall());
        while self.stop.run_until_cancelled(tokio::time::sleep(REAP)).await.is_some() {
            last = self.look_at_wall_clock(last);
            self.allocator.reap().await;
            self.reap_unreadable().await;
            self.snapshots.reap(&self.store).await;
            for dead in self.pools.all().iter().flat_map(|pool| pool.take_dead()) {
                self.discard(dead).await;
            }
            let sandboxes: Vec<_> = self.sandboxes.running().values().cloned().collect();
            for sandbox in sandboxes {
                // Not waited for: one VMM that does not answer is nobody else's business.
                sandbox.go_on();
            }
            if let Some(networks) = &self.allocator.networks {
                networks.slots.retry().await;
            }
            kelvin_host::memory::give_back().await;
        }
    }

    /// Tells the control plane anew when sandboxes end, when the wall clock was set since `last`: they end when they would
    /// have, which is another time for people. The same moment on both clocks, for the next look.
    fn look_at_wall_clock(&self, last: (BootInstant, jiff::Timestamp)) -> (BootInstant, jiff::Timestamp) {
        if self.clock.shown(last.0).duration_since(last.1).abs() > SET {
            tracing::warn!(wall = %self.clock.wall(), "the wall clock was set; lifetimes go on");
            let live: Vec<_> = self.sandboxes.running().values().map(|sandbox| sandbox.live()).collect();
            for live in live {
                self.changes.is(live);
            }
        }
        (self.clock.now(), self.clock.wall())
    }
}

/// What tells one build of a program from another without reading it.
fn build_of(program: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::metadata(program);
    let file = found.map(|found| format!("{} {} {}", found.len(), found.mtime(), found.mtime_nsec()));
    format!("{} {}", env!("CARGO_PKG_VERSION"), file.unwrap_or_default())
}

/// Networks as the options say: with the slots that the egress process answers already, or with the reason
/// why there are none. A host that cannot have networks still runs sandboxes without.
async fn open_networks(
    options: &Options,
    ledger: &Ledger,
    entries: &[Entry],
) -> Result<(Option<Arc<Networks>>, Vec<u16>, Option<String>), Error> {
    let Some(wanted) = &options.network else {
        return Ok((None, Vec::new(), Some("it was turned off when the server was started".to_owned())));
    };
    let run = options.data_dir.join("run");
    let slots = kelvin_host::net::Options {
        range: wanted.range,
        uplink: wanted.uplink.clone(),
        ready: wanted.slots,
        bandwidth_mbit: wanted.bandwidth_mbit,
        max_connections: wanted.max_connections,
        range_file: run.join("slot-range"),
    };
    let slots = match kelvin_host::net::Slots::open(slots, ledger.clone()).await {
        Ok(slots) => slots,
        Err(kelvin_host::net::Error::Unavailable(reason)) => return Ok((None, Vec::new(), Some(reason))),
        Err(error) => return Err(error.into()),
    };
    let egress = EgressOptions {
        options: kelvin_egress::Options {
            uplink: wanted.uplink.clone(),
            resolver: wanted.resolver.or_else(kelvin_egress::system_resolver),
            max_connections: wanted.max_connections,
            build: build_of(&wanted.program),
        },
        program: wanted.program.clone(),
        user: wanted.user,
    };
    let (networks, attached) = Networks::open(slots, ledger.clone(), run, egress, entries).await?;
    Ok((Some(networks), attached, None))
}
