//! What the parts of a node share: books, each behind a lock of its own, and the handles of what they use.
//!
//! A room's own types live in the room and know nothing of this; what a room does with the node is in its other files.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kelvin_api::id::{SandboxId, SnapshotId, TemplateName, VmId};
use kelvin_api::phase::Phase;
use kelvin_api::units::{DiskMib, MemoryMib, Shape};
use kelvin_host::clock::Clock;
use kelvin_store::Store;
use kelvin_store::identity::{Identity, SNAPSHOT_FORMAT};
use kelvin_store::image::{Template, TemplateStamp};
use kelvin_store::snapshot::Snapshot;
use kelvin_vmm::Driver;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::capacity::Capacity;
use crate::changes;
use crate::error::Error;
use crate::machine::resources::MachineAllocator;
use crate::options::{Options, Rule};
use crate::pool::shelf::Pool;
use crate::sandbox::handle::Sandbox;
use crate::sandbox::paused::Paused;
use crate::sandbox::unreadable::Unreadable;
use crate::snapshots::Snapshots;
use crate::start::turns::Turns;

/// The shared state of a node. Locks are held for a few instructions, never across a wait.
pub struct Inner {
    pub options: Options,
    pub store: Store,
    pub driver: Arc<dyn Driver>,
    pub allocator: MachineAllocator,
    pub capacity: Capacity,
    pub sandboxes: Mutex<BTreeMap<SandboxId, Arc<Sandbox>>>,
    pub paused: Mutex<BTreeMap<SandboxId, Arc<Paused>>>,
    /// By the machine that the ledger has their record for.
    pub unreadable: Mutex<BTreeMap<VmId, Unreadable>>,
    pub snapshots: Snapshots,
    pub creating: Mutex<BTreeSet<SandboxId>>,
    /// By identity digest.
    pub pools: Mutex<BTreeMap<String, Arc<Pool>>>,
    /// What operators want of warm machines, by template.
    pub rules: Mutex<BTreeMap<TemplateName, Rule>>,
    /// Held while they are changed and written.
    pub writing_rules: tokio::sync::Mutex<()>,
    /// Told when a target may have changed.
    pub warm_wanted: Notify,
    /// With what the file system said of the file when it was read.
    pub templates: Mutex<BTreeMap<TemplateName, (TemplateStamp, Arc<Template>)>>,
    /// What lifetimes count on.
    pub clock: Clock,
    pub turns: Turns,
    /// VMMs that are taken over from a former daemon at one time.
    pub adoptions: Semaphore,
    pub bakes: tokio::sync::Mutex<()>,
    /// One snapshot is read whole at one time.
    pub verifying: tokio::sync::Mutex<()>,
    pub requests: Mutex<u32>,
    /// Requests that ask something of a processor now, of which those that wait for a guest are none.
    pub work: Mutex<u32>,
    pub teardowns: Mutex<u32>,
    pub settled: Notify,
    pub changes: changes::Log,
    /// Digests of the device layout, without a network and with one; vCPUs and memory are fields of their own.
    pub devices: [String; 2],
    /// Why there are no networks.
    pub no_network: Option<String>,
    pub host_cpu: String,
    pub host_kernel: String,
    pub reflink: bool,
    pub tasks: TaskTracker,
    /// The node stops, and waits for no guest any more.
    pub hurry: CancellationToken,
    pub stop: CancellationToken,
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts a request for as long as it lives.
pub struct InRequest(Arc<Inner>);

impl Drop for InRequest {
    fn drop(&mut self) {
        *lock(&self.0.requests) -= 1;
        self.0.settled.notify_waiters();
    }
}

/// Counts work for as long as it lives: what is prepared ahead waits for it.
pub struct Working(Arc<Inner>);

impl Drop for Working {
    fn drop(&mut self) {
        *lock(&self.0.work) -= 1;
        self.0.settled.notify_waiters();
    }
}

impl Inner {
    pub fn sandboxes(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Arc<Sandbox>>> {
        lock(&self.sandboxes)
    }

    pub fn paused_sandboxes(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Arc<Paused>>> {
        lock(&self.paused)
    }

    pub fn unreadable(&self) -> MutexGuard<'_, BTreeMap<VmId, Unreadable>> {
        lock(&self.unreadable)
    }

    pub fn creating(&self) -> MutexGuard<'_, BTreeSet<SandboxId>> {
        lock(&self.creating)
    }

    pub fn enter(self: &Arc<Self>) -> InRequest {
        *lock(&self.requests) += 1;
        InRequest(Arc::clone(self))
    }

    pub fn work(self: &Arc<Self>) -> Working {
        *lock(&self.work) += 1;
        Working(Arc::clone(self))
    }

    pub fn begin_teardown(&self) {
        *lock(&self.teardowns) += 1;
    }

    pub fn end_teardown(&self) {
        *lock(&self.teardowns) -= 1;
        self.settled.notify_waiters();
    }

    /// Waits until no create or capture asks for a processor.
    pub async fn quiet(&self) {
        self.none(&self.work).await;
    }

    /// Waits until nothing is counted by `count`.
    pub async fn none(&self, count: &Mutex<u32>) {
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
    pub fn crash_point(&self, phase: Phase) {
        if self.options.crash_at == Some(phase) {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
    }

    pub fn disk_free_mib(&self) -> Result<u64, Error> {
        let found = rustix::fs::statvfs(self.store.root())
            .map_err(|error| Error::Io { what: "asking for free space", source: error.into() })?;
        Ok((found.f_bavail * found.f_frsize) >> 20)
    }

    /// Refuses what needs space when there is too little.
    pub fn check_disk(&self) -> Result<(), Error> {
        let (free, floor) = (self.disk_free_mib()?, self.options.disk_floor_mib);
        if free < floor {
            return Err(Error::Exhausted { resource: "MiB of disk", asked: floor, free });
        }
        Ok(())
    }

    pub fn find_snapshot(&self, id: &SnapshotId) -> Result<Arc<Snapshot>, Error> {
        let missing = || kelvin_store::Error::Missing { kind: "snapshot", name: id.to_string() };
        Ok(self.snapshots.get(id).ok_or_else(missing)?)
    }

    /// What `identity` would be on this node: the fields that are the host's are this host's.
    pub fn identity_here(&self, identity: &Identity) -> Identity {
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
    pub async fn template(&self, name: &TemplateName) -> Result<Arc<Template>, Error> {
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
    pub fn know(&self, templates: &[Template]) {
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
    pub fn identity(&self, template: &Template, shape: Shape, network: bool) -> Identity {
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
    pub fn has_network(&self, identity: &Identity) -> bool {
        identity.devices == self.devices[1]
    }

    /// The pool whose snapshot is exactly right, or why there is none.
    pub fn pool_for(&self, template: &Template, shape: Shape, network: bool) -> Result<Arc<Pool>, String> {
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

    /// Whether this node could restore a snapshot of `identity` for one of its templates.
    pub fn is_usable(&self, identity: &Identity) -> bool {
        let shape = Shape {
            vcpus: identity.vcpus,
            memory_mib: MemoryMib(identity.memory_mib),
            disk_mib: DiskMib(identity.disk_mib),
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
