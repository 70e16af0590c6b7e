//! One node: it owns what runs here.
//!
//! Read in this order: [`Node`] (the handle), `create` (the path of a create, with `turns`, `clock` and `probe`), `pool` (what is ready
//! ahead of it), `home` (the resources of a machine), `sandbox` (a machine that runs, with `mail`), `lifecycle` (pause, resume,
//! snapshot, fork) with `capture`, `paused`, `snapshots` and `verify`, `warm` (machines that wait), `traffic`, `bake`, `reconcile` (after a crash);
//! `service` is all of it as control plane and gateway see it.
//!
//! Who writes: the ledger, `sandboxes/` and, through `kelvin-store`, snapshots. A crash leaves machines
//! that the ledger names; the next start adopts those that ran and removes the rest. Time limits are
//! enforced here, with or without a control plane.

mod capacity;
mod changes;
mod error;
mod lifecycle;
mod link;
mod machine;
mod networks;
pub mod options;
mod pool;
mod recovery;
mod sandbox;
mod service;
mod snapshots;
mod start;
mod traffic;
mod verify;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kelvin_api::id::{SandboxId, SnapshotId, TemplateName, VmId};
use kelvin_api::phase::Phase;
use kelvin_api::sandbox::{NodeInfo, NodeNetwork, TemplateSnapshot};
use kelvin_api::units::{MemoryMib, Shape};
use kelvin_host::cgroup::Cgroups;
use kelvin_host::clock::{BootInstant, Clock};
use kelvin_host::ledger::{Entry, Ledger};
use kelvin_node_api::{Base, Changes, ConsoleLine, Create, Created, Live};
use kelvin_store::Store;
use kelvin_store::gc::Garbage;
use kelvin_store::identity::{Identity, SNAPSHOT_FORMAT};
use kelvin_store::image::{Template, TemplateStamp};
use kelvin_store::snapshot::{Origin, Snapshot};
use kelvin_vmm::Driver;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use capacity::Capacity;
pub use error::{Error, no_descriptors};
pub use link::Stream;
pub use machine::agent::{Body, SendError};
use machine::resources::{Groups, MachineAllocator};
use networks::{EgressOptions, Networks};
use options::{Options, Rule};
use pool::Pool;
use sandbox::actor::{Command, Sandbox};
use sandbox::mail::Urgent;
use sandbox::paused::Paused;
use sandbox::unreadable::Unreadable;
use snapshots::Snapshots;
use start::StartSource;
use start::turns::Turns;

/// How many VMMs are taken over at one time: each exchange with one asks for a processor.
const ADOPTIONS: usize = 16;
/// How long requests that are under way may take when the node stops, before no guest is waited for any more; and how
/// long after that, before what is left is left to the next start.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);
const LEAVE: std::time::Duration = std::time::Duration::from_secs(60);
/// How often what changes a sandbox looks for it anew, before it says that others change it all the time.
pub(crate) const LOOKS: u32 = 16;
/// How often a release that failed is tried again.
const REAP: std::time::Duration = std::time::Duration::from_secs(30);

/// The shared state of a node. Locks are held for a few instructions, never across a wait.
pub(crate) struct Inner {
    options: Options,
    store: Store,
    driver: Arc<dyn Driver>,
    allocator: MachineAllocator,
    capacity: Mutex<Capacity>,
    sandboxes: Mutex<BTreeMap<SandboxId, Arc<Sandbox>>>,
    paused: Mutex<BTreeMap<SandboxId, Arc<Paused>>>,
    /// By the machine that the ledger has their record for.
    unreadable: Mutex<BTreeMap<VmId, Unreadable>>,
    snapshots: Snapshots,
    creating: Mutex<BTreeSet<SandboxId>>,
    /// By identity digest.
    pools: Mutex<BTreeMap<String, Arc<Pool>>>,
    /// What operators want of warm machines, by template.
    rules: Mutex<BTreeMap<TemplateName, Rule>>,
    /// Held while they are changed and written.
    writing_rules: tokio::sync::Mutex<()>,
    /// Told when a target may have changed.
    warm_wanted: Notify,
    /// With what the file system said of the file when it was read.
    templates: Mutex<BTreeMap<TemplateName, (TemplateStamp, Arc<Template>)>>,
    /// What lifetimes count on.
    clock: Clock,
    turns: Turns,
    /// VMMs that are taken over from a former daemon at one time.
    adoptions: Semaphore,
    bakes: tokio::sync::Mutex<()>,
    /// One snapshot is read whole at one time.
    verifying: tokio::sync::Mutex<()>,
    requests: Mutex<u32>,
    /// Requests that ask something of a processor now, of which those that wait for a guest are none.
    work: Mutex<u32>,
    teardowns: Mutex<u32>,
    settled: Notify,
    changes: changes::Log,
    /// Digests of the device layout, without a network and with one; vCPUs and memory are fields of their own.
    devices: [String; 2],
    /// Why there are no networks.
    no_network: Option<String>,
    host_cpu: String,
    host_kernel: String,
    reflink: bool,
    tasks: TaskTracker,
    /// The node stops, and waits for no guest any more.
    hurry: CancellationToken,
    stop: CancellationToken,
}

/// A cheap handle of a node.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts a request for as long as it lives.
pub(crate) struct InRequest(Arc<Inner>);

impl Drop for InRequest {
    fn drop(&mut self) {
        *lock(&self.0.requests) -= 1;
        self.0.settled.notify_waiters();
    }
}

/// Counts work for as long as it lives: what is prepared ahead waits for it.
pub(crate) struct Working(Arc<Inner>);

impl Drop for Working {
    fn drop(&mut self) {
        *lock(&self.0.work) -= 1;
        self.0.settled.notify_waiters();
    }
}

impl Inner {
    fn capacity(&self) -> MutexGuard<'_, Capacity> {
        lock(&self.capacity)
    }

    fn sandboxes(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Arc<Sandbox>>> {
        lock(&self.sandboxes)
    }

    fn paused_sandboxes(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Arc<Paused>>> {
        lock(&self.paused)
    }

    fn unreadable(&self) -> MutexGuard<'_, BTreeMap<VmId, Unreadable>> {
        lock(&self.unreadable)
    }

    fn creating(&self) -> MutexGuard<'_, BTreeSet<SandboxId>> {
        lock(&self.creating)
    }

    fn enter(self: &Arc<Self>) -> InRequest {
        *lock(&self.requests) += 1;
        InRequest(Arc::clone(self))
    }

    fn work(self: &Arc<Self>) -> Working {
        *lock(&self.work) += 1;
        Working(Arc::clone(self))
    }

    fn begin_teardown(&self) {
        *lock(&self.teardowns) += 1;
    }

    fn end_teardown(&self) {
        *lock(&self.teardowns) -= 1;
        self.settled.notify_waiters();
    }

    /// Waits until no create or capture asks for a processor.
    async fn quiet(&self) {
        self.none(&self.work).await;
    }

    /// Waits until nothing is counted by `count`.
    async fn none(&self, count: &Mutex<u32>) {
        loop {
            let changed = self.settled.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if *lock(count) == 0 {
                return;
            }
            changed.await;
        }
    }

    /// For tests: kills the daemon, as the kernel would, when a create enters `phase`.
    fn crash_point(&self, phase: Phase) {
        if self.options.crash_at == Some(phase) {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
    }

    /// Tells the control plane anew when sandboxes end, when the wall clock was set since `last`: they end when they would
    /// have, which is another time for people. The same moment on both clocks, for the next look.
    fn look_at_wall_clock(&self, last: (BootInstant, jiff::Timestamp)) -> (BootInstant, jiff::Timestamp) {
        if self.clock.shown(last.0).duration_since(last.1).abs() > sandbox::mail::SET {
            tracing::warn!(wall = %self.clock.wall(), "the wall clock was set; lifetimes go on");
            let live: Vec<_> = self.sandboxes().values().map(|sandbox| sandbox.live()).collect();
            for live in live {
                self.changes.is(live);
            }
        }
        (self.clock.now(), self.clock.wall())
    }

    fn disk_free_mib(&self) -> Result<u64, Error> {
        let found = rustix::fs::statvfs(self.store.root())
            .map_err(|error| Error::Io { what: "asking for free space", source: error.into() })?;
        Ok((found.f_bavail * found.f_frsize) >> 20)
    }

    /// Refuses what needs space when there is too little.
    fn check_disk(&self) -> Result<(), Error> {
        let (free, floor) = (self.disk_free_mib()?, self.options.disk_floor_mib);
        if free < floor {
            return Err(Error::Exhausted { resource: "MiB of disk", asked: floor, free });
        }
        Ok(())
    }

    fn find_snapshot(&self, id: &SnapshotId) -> Result<Arc<Snapshot>, Error> {
        let missing = || kelvin_store::Error::Missing { kind: "snapshot", name: id.to_string() };
        Ok(self.snapshots.get(id).ok_or_else(missing)?)
    }

    /// What `identity` would be on this node: the fields that are the host's are this host's.
    fn identity_here(&self, identity: &Identity) -> Identity {
        let network = self.has_network(identity);
        Identity {
            vmm: self.driver.kind().to_owned(),
            vmm_build: self.driver.build().to_owned(),
            accelerator: self.driver.accelerator().to_string(),
            host_cpu: self.host_cpu.clone(),
            host_kernel: self.host_kernel.clone(),
            devices: self.devices[usize::from(network)].clone(),
            snapshot_format: SNAPSHOT_FORMAT,
            ..identity.clone()
        }
    }

    /// The template called `name`, from memory; from the disk when its file is another than last time, as
    /// after an import (one `stat`).
    async fn template(&self, name: &TemplateName) -> Result<Arc<Template>, Error> {
        let stamp = self.store.template_stamp(name)?;
        if let Some((known, template)) = lock(&self.templates).get(name)
            && *known == stamp
        {
            return Ok(Arc::clone(template));
        }
        let (store, wanted) = (self.store.clone(), name.clone());
        let template =
            kelvin_host::blocking::spawn(move || store.template(&wanted)).await.map_err(|error| {
                Error::Io { what: "reading a template", source: std::io::Error::other(error) }
            })??;
        let template = Arc::new(template);
        lock(&self.templates).insert(name.clone(), (stamp, Arc::clone(&template)));
        Ok(template)
    }

    /// Takes over templates that were all read anew.
    fn know(&self, templates: &[Template]) {
        let known = templates
            .iter()
            .filter_map(|template| {
                let stamp = self.store.template_stamp(&template.name).ok()?;
                Some((template.name.clone(), (stamp, Arc::new(template.clone()))))
            })
            .collect();
        *lock(&self.templates) = known;
    }

    /// The identity of a machine of `template` in `shape` on this node.
    fn identity(&self, template: &Template, shape: Shape, network: bool) -> Identity {
        Identity {
            image: template.image.clone(),
            guest_kernel: template.kernel.clone(),
            agent: template.initrd.clone(),
            vmm: self.driver.kind().to_owned(),
            vmm_build: self.driver.build().to_owned(),
            accelerator: self.driver.accelerator().to_string(),
            host_cpu: self.host_cpu.clone(),
            host_kernel: self.host_kernel.clone(),
            vcpus: shape.vcpus,
            memory_mib: shape.memory_mib.0,
            disk_mib: shape.disk_mib.0,
            devices: self.devices[usize::from(network)].clone(),
            snapshot_format: SNAPSHOT_FORMAT,
        }
    }

    /// Whether machines of `identity` have a network.
    fn has_network(&self, identity: &Identity) -> bool {
        identity.devices == self.devices[1]
    }

    /// The pool whose snapshot is exactly right, or why there is none.
    fn pool_for(&self, template: &Template, shape: Shape, network: bool) -> Result<Arc<Pool>, String> {
        let identity = self.identity(template, shape, network);
        let pools = lock(&self.pools);
        if let Some(pool) = pools.get(&identity.digest()) {
            return match pool.refusal() {
                None => Ok(Arc::clone(pool)),
                Some(reason) => Err(reason),
            };
        }
        // Say what the nearest one differs in.
        let nearest = pools
            .values()
            .filter(|pool| pool.snapshot.manifest.template == template.name)
            .map(|pool| pool.snapshot.manifest.identity.differences(&identity))
            .min_by_key(Vec::len);
        Err(match nearest {
            Some(fields) => format!("no snapshot for identity ({} differs)", fields.join(", ")),
            None => format!("no snapshot of template {}", template.name),
        })
    }

    /// Makes a snapshot usable. A pool of the same identity that was refused is replaced.
    fn add_pool(self: &Arc<Self>, snapshot: Arc<Snapshot>) {
        self.snapshots.add(Arc::clone(&snapshot));
        let digest = snapshot.manifest.identity_digest.clone();
        let usable = self.is_usable(&snapshot.manifest.identity);
        let pool = Arc::new(Pool::new(snapshot, if usable { self.options.waiting_vmms } else { 0 }));
        lock(&self.pools).insert(digest, Arc::clone(&pool));
        self.tasks.spawn(pool::fill(Arc::clone(self), pool));
        self.look_at_pools();
    }

    /// Whether this node could restore a snapshot of `identity` for one of its templates.
    fn is_usable(&self, identity: &Identity) -> bool {
        let shape = Shape {
            vcpus: identity.vcpus,
            memory_mib: MemoryMib(identity.memory_mib),
            disk_mib: kelvin_api::units::DiskMib(identity.disk_mib),
        };
        let network = self.has_network(identity);
        if network && self.allocator.networks.is_none() {
            return false;
        }
        lock(&self.templates)
            .values()
            .any(|(_, template)| self.identity(template, shape, network) == *identity)
    }
}

/// Control groups, when the driver has limits. A host that cannot have them is told so, once.
fn groups(driver: &Arc<dyn Driver>, data_dir: &Path) -> Option<Groups> {
    let any = Shape { vcpus: 1, memory_mib: options::MIN_MEMORY, disk_mib: kelvin_api::units::DiskMib(1) };
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
        let (host_cpu, host_kernel) = kelvin_host::cpu::here();
        let same = Shape { vcpus: 1, memory_mib: MemoryMib(1), disk_mib: kelvin_api::units::DiskMib(1) };
        let devices = [false, true]
            .map(|network| kelvin_store::hash::sha256(driver.layout(same, network).join("\0").as_bytes()));
        let (entries, records) = ledger.read().await?;
        recovery::check_vmm(driver.kind(), &entries, &records, &snapshots)?;
        let rules = pool::warm::read_rules(store.root())?;
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
        let inner = Arc::new(Inner {
            capacity: Mutex::new(Capacity::new(&options)),
            clock,
            turns: Turns::new(options.concurrent_restores),
            adoptions: Semaphore::new(ADOPTIONS),
            options,
            store,
            driver,
            allocator,
            sandboxes: Mutex::default(),
            paused: Mutex::default(),
            unreadable: Mutex::default(),
            snapshots: Snapshots::default(),
            creating: Mutex::default(),
            pools: Mutex::default(),
            rules: Mutex::new(rules),
            writing_rules: tokio::sync::Mutex::default(),
            warm_wanted: Notify::new(),
            templates: Mutex::default(),
            bakes: tokio::sync::Mutex::default(),
            verifying: tokio::sync::Mutex::default(),
            requests: Mutex::default(),
            work: Mutex::default(),
            teardowns: Mutex::default(),
            settled: Notify::new(),
            changes: changes::Log::default(),
            devices,
            no_network,
            host_cpu,
            host_kernel,
            reflink,
            tasks: TaskTracker::new(),
            hurry: CancellationToken::new(),
            stop: CancellationToken::new(),
        });
        inner.know(&templates);
        let snapshots: Vec<_> = snapshots.into_iter().map(Arc::new).collect();
        for snapshot in &snapshots {
            inner.snapshots.add(Arc::clone(snapshot));
        }
        let found = inner.reconcile(entries, records, &attached).await?;
        let paused = inner.paused_sandboxes().len();
        tracing::info!(adopting = found.adopting, paused, removed = found.removed, "reconciled");
        if found.unreadable == 0 {
            inner.snapshots.sweep();
        }
        let removing = {
            let (store, settled) = (inner.store.clone(), Arc::clone(&inner));
            inner.snapshots.clone().run(store, move || settled.settled.notify_waiters(), inner.stop.clone())
        };
        inner.tasks.spawn(removing);
        inner.tasks.spawn(Arc::clone(&inner).govern());
        let digesting = Arc::clone(&inner);
        inner.tasks.spawn(async move {
            let stop = digesting.stop.clone();
            stop.run_until_cancelled(digesting.digest_kept()).await;
        });
        for snapshot in snapshots {
            if snapshot.manifest.origin == Origin::Bake {
                inner.add_pool(snapshot);
            }
        }
        if let Some(networks) = networks {
            inner.tasks.spawn(pool::fill_slots(Arc::clone(&inner), Arc::clone(&networks)));
            inner.tasks.spawn(networks.watch(inner.stop.clone()));
        }
        let reaper = Arc::clone(&inner);
        inner.tasks.spawn(async move {
            let mut last = (reaper.clock.now(), reaper.clock.wall());
            while reaper.stop.run_until_cancelled(tokio::time::sleep(REAP)).await.is_some() {
                last = reaper.look_at_wall_clock(last);
                reaper.allocator.reap().await;
                reaper.reap_unreadable().await;
                reaper.snapshots.reap(&reaper.store).await;
                let sandboxes: Vec<_> = reaper.sandboxes().values().cloned().collect();
                for sandbox in sandboxes {
                    // Not waited for: one VMM that does not answer is nobody else's business.
                    sandbox.go_on();
                }
                if let Some(networks) = &reaper.allocator.networks {
                    networks.slots.retry().await;
                }
                kelvin_host::memory::give_back().await;
            }
        });
        Ok(Self { inner })
    }

    /// Creates a sandbox; see `create`.
    ///
    /// # Errors
    /// Any of [`Error`]; then nothing of it is left.
    pub async fn create(&self, request: Create) -> Result<Created, Error> {
        let inner = Arc::clone(&self.inner);
        // A caller that goes away must not leave a machine half-made.
        let start = match &request.base {
            Base::Template(name) => StartSource::Template(inner.template(name).await?),
            Base::Snapshot(id) => StartSource::Snapshot(inner.find_snapshot(id)?, None),
        };
        let task = self.inner.tasks.spawn(async move { inner.create(request, start).await });
        task.await.map_err(|error| Error::Io { what: "creating", source: std::io::Error::other(error) })?
    }

    fn find(&self, id: &SandboxId) -> Result<Arc<Sandbox>, Error> {
        // In this order: a pause makes it visible as paused before it is invisible as running; a resume the other way.
        if let Some(sandbox) = self.inner.sandboxes().get(id) {
            return Ok(Arc::clone(sandbox));
        }
        if self.inner.paused(id).is_some() {
            return Err(Error::Paused(id.to_string()));
        }
        match self.inner.sandboxes().get(id) {
            Some(sandbox) => Ok(Arc::clone(sandbox)),
            None if self.inner.is_unreadable(id) => Err(Error::Unreadable(id.to_string())),
            None => Err(Error::Unknown(id.to_string())),
        }
    }

    /// Ends a sandbox, also one that is paused. Returns when it is no longer visible; its resources are released
    /// after that.
    ///
    /// # Errors
    /// `Unknown` when there is none.
    pub async fn kill(&self, id: &SandboxId) -> Result<(), Error> {
        let mut looks = LOOKS;
        loop {
            let killed = match self.find(id) {
                Ok(sandbox) => sandbox.urge(Urgent::Kill).await,
                Err(Error::Paused(_)) => self.inner.end_paused(id).await,
                Err(Error::Unreadable(_)) => self.inner.end_unreadable(id).await,
                Err(error) => Err(error),
            };
            if !self.looks_again(id, &killed, &mut looks).await? {
                return killed;
            }
        }
    }

    /// Whether what was done with the sandbox came to `result` only because it was paused or resumed between the look for
    /// it and the deed: then it is looked for again.
    ///
    /// # Errors
    /// `Changing` when that was so `looks` times.
    pub(crate) async fn looks_again<T>(
        &self,
        id: &SandboxId,
        result: &Result<T, Error>,
        looks: &mut u32,
    ) -> Result<bool, Error> {
        let is_gone = matches!(result, Err(Error::Unknown(_)));
        if !is_gone || matches!(self.find(id), Err(Error::Unknown(_))) {
            return Ok(false);
        }
        *looks = looks.checked_sub(1).ok_or_else(|| Error::Changing(id.to_string()))?;
        tokio::task::yield_now().await;
        Ok(true)
    }

    /// Sets when the node ends a sandbox.
    ///
    /// # Errors
    /// `Unknown` when it does not run.
    pub async fn set_deadline(&self, id: &SandboxId, ends_at: jiff::Timestamp) -> Result<(), Error> {
        let (mut looks, deadline) = (LOOKS, self.inner.clock.at(ends_at));
        loop {
            let set = match self.find(id) {
                Ok(sandbox) => sandbox.urge(|done| Urgent::SetDeadline(ends_at, deadline, done)).await,
                Err(error) => Err(error),
            };
            if !self.looks_again(id, &set, &mut looks).await? {
                return set;
            }
        }
    }

    /// The last of a sandbox's console; of one that is paused what was seen of it until then.
    ///
    /// # Errors
    /// `Unknown` when there is none, `Vmm` when its VMM does not answer.
    pub async fn console(&self, id: &SandboxId) -> Result<Vec<ConsoleLine>, Error> {
        let mut looks = LOOKS;
        loop {
            let read = match self.find(id) {
                Err(Error::Paused(_)) => {
                    let paused = self.inner.paused(id).ok_or_else(|| Error::Unknown(id.to_string()));
                    paused.map(|paused| paused.console.lines())
                }
                Ok(sandbox) => sandbox.ask(Command::Console).await.and_then(|read| Ok(read?)),
                Err(error) => Err(error),
            };
            if !self.looks_again(id, &read, &mut looks).await? {
                return read;
            }
        }
    }

    /// One sandbox as it is now.
    pub fn one(&self, id: &SandboxId) -> Option<Live> {
        match self.find(id) {
            Ok(sandbox) => Some(sandbox.live()),
            Err(Error::Unreadable(_)) => {
                self.inner.unreadable_live().into_iter().find(|live| live.sandbox == *id)
            }
            Err(_) => self.inner.paused(id).map(|paused| paused.record.live()),
        }
    }

    /// Whether there is a template called `name`. One look at the file system.
    pub fn has_template(&self, name: &TemplateName) -> bool {
        self.inner.store.template_stamp(name).is_ok()
    }

    /// Every sandbox, running or paused.
    pub fn live(&self) -> Vec<Live> {
        let mut all: Vec<Live> =
            self.inner.paused_sandboxes().values().map(|paused| paused.record.live()).collect();
        all.extend(self.inner.sandboxes().values().map(|sandbox| sandbox.live()));
        all.extend(self.inner.unreadable_live());
        all
    }

    /// What ended after `generation`; waits until something did.
    pub async fn changes(&self, generation: u64) -> Changes {
        self.inner.changes.after(generation).await
    }

    /// Every template, when it was imported, and its usable snapshots.
    ///
    /// # Errors
    /// `Store` when they cannot be read.
    pub async fn templates(&self) -> Result<Vec<(Template, jiff::Timestamp, Vec<TemplateSnapshot>)>, Error> {
        let store = self.inner.store.clone();
        let templates =
            kelvin_host::blocking::spawn(move || store.templates()).await.map_err(|error| Error::Io {
                what: "reading templates",
                source: std::io::Error::other(error),
            })??;
        self.inner.know(&templates);
        let pools: Vec<Arc<Pool>> = lock(&self.inner.pools).values().cloned().collect();
        Ok(templates
            .into_iter()
            .map(|template| {
                let mut snapshots: Vec<TemplateSnapshot> = pools
                    .iter()
                    .filter(|pool| {
                        let manifest = &pool.snapshot.manifest;
                        let shape = pool::manifest_shape(manifest);
                        pool.refusal().is_none()
                            && self.inner.identity(
                                &template,
                                shape,
                                self.inner.has_network(&manifest.identity),
                            ) == manifest.identity
                    })
                    .map(|pool| TemplateSnapshot {
                        snapshot_id: pool.snapshot.manifest.id.to_string(),
                        cpu_count: pool.snapshot.manifest.identity.vcpus,
                        memory_mb: pool.snapshot.manifest.identity.memory_mib,
                        waiting_vmms: pool.count(),
                        network: self.inner.has_network(&pool.snapshot.manifest.identity),
                    })
                    .collect();
                snapshots.sort_by_key(|snapshot| (snapshot.cpu_count, snapshot.memory_mb));
                let stamp = self.inner.store.template_stamp(&template.name);
                let imported = stamp.map(|stamp| stamp.imported()).unwrap_or_default();
                (template, imported, snapshots)
            })
            .collect())
    }

    /// Makes sure that a snapshot of `template` exists in the given shape, and sets how many VMMs wait for
    /// it. Returns its id.
    ///
    /// # Errors
    /// `Store` for an unknown template, `Shape`, `Exhausted`, `Vmm`.
    pub async fn bake(
        &self,
        template: &TemplateName,
        vcpus: Option<u32>,
        memory_mib: Option<MemoryMib>,
        waiting_vmms: Option<u32>,
        network: Option<bool>,
    ) -> Result<SnapshotId, Error> {
        let network = match (network, &self.inner.allocator.networks) {
            (Some(true), None) => {
                let reason = self.inner.no_network.clone();
                return Err(Error::NoNetwork { what: "the node".to_owned(), reason });
            }
            (wanted, networks) => wanted.unwrap_or(networks.is_some()),
        };
        let template = self.inner.template(template).await?;
        let shape = Shape {
            vcpus: vcpus.unwrap_or(template.shape.vcpus),
            memory_mib: memory_mib.unwrap_or(template.shape.memory_mib),
            disk_mib: template.shape.disk_mib,
        };
        let inner = Arc::clone(&self.inner);
        let task = self.inner.tasks.spawn(async move {
            let snapshot = inner.bake(&template, shape, network).await?;
            if let (Some(target), Ok(pool)) = (waiting_vmms, inner.pool_for(&template, shape, network)) {
                pool.set_target(target);
            }
            Ok(snapshot.manifest.id.clone())
        });
        task.await.map_err(|error| Error::Io { what: "baking", source: std::io::Error::other(error) })?
    }

    /// Whether nothing is being prepared, torn down or taken over. Asks nobody: it may be asked often.
    pub fn is_settled(&self) -> bool {
        let inner = &self.inner;
        // One lock at a time.
        let busy = *lock(&inner.requests) + *lock(&inner.teardowns);
        let adopting = inner.sandboxes().values().any(|sandbox| sandbox.is_being_adopted());
        let is_full = lock(&inner.pools).values().all(|pool| pool.is_full());
        busy == 0
            && !adopting
            && is_full
            && inner.snapshots.is_settled()
            && inner.is_warm()
            && inner.allocator.networks.as_ref().is_none_or(|networks| networks.slots.is_full())
    }

    /// What runs here and what is left.
    ///
    /// # Errors
    /// `Ledger` when it does not answer.
    pub async fn info(&self) -> Result<NodeInfo, Error> {
        let inner = &self.inner;
        let ledger_entries = inner.allocator.ledger.count().await?;
        // Before anything is locked.
        let settled = self.is_settled();
        let (memory_mb, memory_reserved_mb, vcpus, vcpus_reserved) = inner.capacity().figures();
        let pools: Vec<Arc<Pool>> = lock(&inner.pools).values().cloned().collect();
        let (mut adopting, mut silent) = (0, 0);
        for sandbox in inner.sandboxes().values() {
            adopting += u32::from(sandbox.is_being_adopted());
            silent += u32::from(sandbox.is_guest_silent());
        }
        Ok(NodeInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            vmm: format!("{} {}", inner.driver.kind(), inner.driver.build()),
            accelerator: inner.driver.accelerator().to_string(),
            data_dir: inner.store.root().display().to_string(),
            reflink: inner.reflink,
            sandboxes: u32::try_from(inner.sandboxes().len()).unwrap_or(u32::MAX),
            waiting_vmms: pools.iter().map(|pool| pool.count()).sum(),
            warm: pools.iter().map(|pool| pool.parked()).sum(),
            paused: u32::try_from(inner.paused_sandboxes().len()).unwrap_or(u32::MAX),
            adopting,
            silent,
            unreadable: inner.unreadable_records(),
            settled,
            network: inner.allocator.networks.as_ref().map(|networks| {
                let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
                let (used, quarantined) = networks.slots.used();
                NodeNetwork {
                    range: networks.slots.range().to_string(),
                    uplink: networks.slots.uplink().map(str::to_owned),
                    slots_ready: count(networks.slots.ready()),
                    slots_used: count(used),
                    slots_quarantined: count(quarantined),
                }
            }),
            no_network: inner.no_network.clone(),
            memory_mb,
            memory_reserved_mb,
            vcpus,
            vcpus_reserved,
            disk_free_mb: inner.disk_free_mib()?,
            ledger_entries,
        })
    }

    /// Removes what nothing needs, or says what that would be.
    ///
    /// # Errors
    /// `Store` with `Unreadable` when what something needs is not known, and then nothing is removed; `Store` when
    /// something cannot be removed.
    pub async fn collect(&self, dry_run: bool) -> Result<Garbage, Error> {
        let used = self.inner.references().await?;
        let store = self.inner.store.clone();
        let garbage = kelvin_host::blocking::spawn(move || store.collect(&used, dry_run)).await.map_err(
            |error| Error::Io { what: "collecting garbage", source: std::io::Error::other(error) },
        )??;
        if !dry_run {
            for id in garbage.snapshots.iter().filter_map(|id| id.parse().ok()) {
                self.inner.snapshots.forget(&id);
            }
            lock(&self.inner.pools).retain(|_, pool| {
                let gone = garbage.snapshots.contains(&pool.snapshot_id().to_string());
                if gone {
                    pool.refuse("it was collected".to_owned());
                }
                !gone
            });
        }
        Ok(garbage)
    }

    /// What lifetimes count on.
    pub fn clock(&self) -> &Clock {
        &self.inner.clock
    }

    /// The data directory.
    pub fn data_dir(&self) -> &Path {
        self.inner.store.root()
    }

    /// Stops the node: creates that are under way end, waiting VMMs are released, sandboxes keep running.
    pub async fn stop(&self) {
        let inner = &self.inner;
        if tokio::time::timeout(PATIENCE, inner.none(&inner.requests)).await.is_err() {
            tracing::warn!(requests = *lock(&inner.requests), "stopping: no guest is waited for any more");
        }
        inner.hurry.cancel();
        let _ = tokio::time::timeout(LEAVE, inner.none(&inner.requests)).await;
        // Machines run on, and what they were restored from has to outlive the tasks that end now.
        inner.snapshots.close();
        inner.stop.cancel();
        inner.tasks.close();
        if tokio::time::timeout(LEAVE, inner.tasks.wait()).await.is_err() {
            tracing::error!("stopping: what is still under way is left to the next start");
        }
        let pools: Vec<Arc<Pool>> = lock(&self.inner.pools).values().cloned().collect();
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

/// Why records in the ledger of `data_dir` cannot be read by this build, and of how many; for whoever only looks, also beside a
/// server.
///
/// # Errors
/// As [`kelvin_host::ledger::peek`].
pub fn check_records(data_dir: &Path) -> Result<(usize, Vec<String>), Error> {
    let records = kelvin_host::ledger::peek(&data_dir.join("ledger.db"))?;
    let unreadable = records.iter().filter_map(|record| {
        let why = sandbox::record::SandboxRecord::read(&record.body).err()?;
        Some(format!("machine {}: {why}", record.owner))
    });
    Ok((records.len(), unreadable.collect()))
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
