//! What the parts of a node share: books, each behind a lock of its own, and the handles of what they use.
//!
//! A room's own types live in the room and know nothing of this; what a room does with the node is in its other files.

use std::sync::Arc;

use kelvin_api::id::SnapshotId;
use kelvin_api::phase::Phase;
use kelvin_api::units::{DiskMib, MemoryMib, Shape};
use kelvin_host::clock::Clock;
use kelvin_store::Store;
use kelvin_store::identity::Identity;
use kelvin_store::image::Template;
use kelvin_store::layers::Layers;
use kelvin_store::snapshot::Snapshot;
use kelvin_store::uploads::Uploads;
use kelvin_vmm::Driver;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::activity::Activity;
use crate::build::image::BaseImages;
use crate::build::registry::Builds;
use crate::capacity::Capacity;
use crate::changes;
use crate::error::Error;
use crate::identities::Identities;
use crate::machine::resources::MachineAllocator;
use crate::options::Options;
use crate::pool::pools::Pools;
use crate::pool::shelf::Pool;
use crate::sandbox::registry::Sandboxes;
use crate::snapshots::Snapshots;
use crate::start::turns::Turns;
use crate::templates::Templates;

/// The shared state of a node. Locks are held for a few instructions, never across a wait.
pub struct Inner {
    pub options: Options,
    pub store: Store,
    pub driver: Arc<dyn Driver>,
    pub allocator: MachineAllocator,
    pub capacity: Capacity,
    pub sandboxes: Sandboxes,
    pub snapshots: Snapshots,
    pub pools: Pools,
    pub templates: Templates,
    /// Builds that are under way.
    pub builds: Builds,
    /// Where they find images.
    pub images: Arc<dyn BaseImages>,
    /// Disks after each of their steps.
    pub layers: Layers,
    /// Files that they copy.
    pub uploads: Uploads,
    /// What lifetimes count on.
    pub clock: Clock,
    pub turns: Turns,
    /// VMMs that are taken over from a former daemon at one time.
    pub adoptions: Semaphore,
    pub bakes: tokio::sync::Mutex<()>,
    /// One snapshot is read whole at one time.
    pub verifying: tokio::sync::Mutex<()>,
    pub activity: Activity,
    pub changes: Arc<changes::Log>,
    pub identities: Identities,
    /// Why there are no networks.
    pub no_network: Option<String>,
    pub reflink: bool,
    pub tasks: TaskTracker,
    /// The node stops, and waits for no guest any more.
    pub hurry: CancellationToken,
    pub stop: CancellationToken,
}

impl Inner {
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

    /// The same of what waits anyway: caches of builds go first.
    pub async fn ensure_disk(&self) -> Result<(), Error> {
        if self.check_disk().is_ok() {
            return Ok(());
        }
        let (layers, uploads) = (self.layers.clone(), self.uploads.clone());
        let trimmed = kelvin_host::blocking::spawn(move || layers.trim().and_then(|()| uploads.trim())).await;
        trimmed
            .map_err(|error| Error::Io { what: "making room", source: std::io::Error::other(error) })??;
        self.check_disk()
    }

    pub fn find_snapshot(&self, id: &SnapshotId) -> Result<Arc<Snapshot>, Error> {
        let missing = || kelvin_store::Error::Missing { kind: "snapshot", name: id.to_string() };
        Ok(self.snapshots.get(id).ok_or_else(missing)?)
    }

    /// The pool whose snapshot is exactly right, or why there is none.
    pub fn pool_for(&self, template: &Template, shape: Shape, network: bool) -> Result<Arc<Pool>, String> {
        let identity = self.identities.of_template(template, shape, network);
        self.pools.find(&identity, &template.name)
    }

    /// Whether this node could restore a snapshot of `identity` for a version of one of its templates.
    pub fn is_usable(&self, identity: &Identity) -> bool {
        self.is_one_of(&self.templates.all(), identity)
    }

    /// Whether machines of `identity` are to wait: it is that of the version of a template that most creates ask for.
    pub fn is_waited_for(&self, identity: &Identity) -> bool {
        self.is_one_of(&self.templates.waited_for(), identity)
    }

    /// Whether `identity` is that of one of `templates`, and this node could restore it.
    pub fn is_one_of(&self, templates: &[Arc<Template>], identity: &Identity) -> bool {
        let shape = Shape {
            vcpus: identity.vcpus,
            memory_mib: MemoryMib(identity.memory_mib),
            disk_mib: DiskMib(identity.disk_mib),
        };
        let network = self.identities.has_network(identity);
        if network && self.allocator.networks.is_none() {
            return false;
        }
        let is_of = |template: &Arc<Template>| {
            template.image == identity.image
                && self.identities.of_template(template, shape, network) == *identity
        };
        templates.iter().any(is_of)
    }
}
