//! What a node says of itself. Nothing is changed here.

use std::path::Path;
use std::sync::Arc;

use kelvin_api::id::SandboxId;
use kelvin_api::sandbox::{NodeInfo, NodeNetwork, PoolInfo, TemplateSnapshot};
use kelvin_host::clock::Clock;
use kelvin_node_api::{Changes, Live};
use kelvin_store::image::Template;

use crate::Node;
use crate::error::Error;
use crate::pool::shelf::{Pool, manifest_shape};
use crate::state::Inner;

/// A version of a template, as it is on this node.
#[derive(Debug)]
pub struct Known {
    /// It.
    pub template: Template,
    /// When it was imported or built.
    pub created: jiff::Timestamp,
    /// Its usable snapshots.
    pub snapshots: Vec<TemplateSnapshot>,
    /// Bytes of its image, and those of them that are on the disk.
    pub image_bytes: (u64, u64),
    /// Bytes on the disk of the memory of its snapshot in its own shape.
    pub memory_bytes: Option<u64>,
}

impl Known {
    /// One of which nothing else is known.
    pub fn new(template: Template, created: jiff::Timestamp) -> Self {
        Self { template, created, snapshots: Vec::new(), image_bytes: (0, 0), memory_bytes: None }
    }
}

impl Node {
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

    /// Every sandbox, running or paused.
    pub fn live(&self) -> Vec<Live> {
        let mut all: Vec<Live> =
            self.inner.sandboxes.paused().values().map(|paused| paused.record.live()).collect();
        all.extend(self.inner.sandboxes.running().values().map(|sandbox| sandbox.live()));
        all.extend(self.inner.unreadable_live());
        all
    }

    /// What ended after `generation`; waits until something did.
    pub async fn changes(&self, generation: u64) -> Changes {
        self.inner.changes.after(generation).await
    }

    /// Every version of every template.
    ///
    /// # Errors
    /// `Store` when they cannot be read.
    pub async fn templates(&self) -> Result<Vec<Known>, Error> {
        let store = self.inner.store.clone();
        let templates =
            kelvin_host::blocking::spawn(move || store.templates()).await.map_err(|error| Error::Io {
                what: "reading templates",
                source: std::io::Error::other(error),
            })??;
        self.inner.templates.know(&templates);
        let pools: Vec<Arc<Pool>> = self.inner.pools.all();
        let known = |template| self.inner.known(template, &pools);
        Ok(templates.into_iter().map(known).collect())
    }

    /// Whether nothing is being prepared, torn down or taken over. Asks nobody: it may be asked often.
    pub fn is_settled(&self) -> bool {
        let inner = &self.inner;
        let busy = inner.activity.requests() + inner.activity.teardowns();
        let adopting = inner.sandboxes.running().values().any(|sandbox| sandbox.is_being_adopted());
        let is_full = inner.pools.all().iter().all(|pool| pool.is_full());
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
        let (memory_mb, memory_reserved_mb, vcpus, vcpus_reserved) = inner.capacity.figures();
        let pools: Vec<Arc<Pool>> = inner.pools.all();
        let (mut adopting, mut silent) = (0, 0);
        for sandbox in inner.sandboxes.running().values() {
            adopting += u32::from(sandbox.is_being_adopted());
            silent += u32::from(sandbox.is_guest_silent());
        }
        Ok(NodeInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            vmm: format!("{} {}", inner.driver.kind(), inner.driver.build()),
            accelerator: inner.driver.accelerator().to_string(),
            data_dir: inner.store.root().display().to_string(),
            reflink: inner.reflink,
            sandboxes: u32::try_from(inner.sandboxes.running().len()).unwrap_or(u32::MAX),
            waiting_vmms: pools.iter().map(|pool| pool.count()).sum(),
            warm: pools.iter().map(|pool| pool.parked()).sum(),
            paused: u32::try_from(inner.sandboxes.paused().len()).unwrap_or(u32::MAX),
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

    /// Every pool of machines that wait.
    pub fn pools(&self) -> Vec<PoolInfo> {
        self.inner.pool_infos()
    }

    /// What lifetimes count on.
    pub fn clock(&self) -> &Clock {
        &self.inner.clock
    }

    /// The data directory.
    pub fn data_dir(&self) -> &Path {
        self.inner.store.root()
    }
}

impl Inner {
    /// What is known of `template`, of whose snapshots `pools` may be. A few looks at the file system.
    fn known(&self, template: Template, pools: &[Arc<Pool>]) -> Known {
        let is_of = |pool: &&Arc<Pool>| {
            let (manifest, identities) = (&pool.snapshot.manifest, &self.identities);
            let network = identities.has_network(&manifest.identity);
            pool.refusal().is_none()
                && identities.of_template(&template, manifest_shape(manifest), network) == manifest.identity
        };
        let mut found: Vec<&Arc<Pool>> = pools.iter().filter(is_of).collect();
        found.sort_by_key(|pool| {
            let identity = &pool.snapshot.manifest.identity;
            (identity.vcpus, identity.memory_mib)
        });
        let own = found.iter().find(|pool| manifest_shape(&pool.snapshot.manifest) == template.shape);
        let memory_bytes = own.and_then(|pool| pool.snapshot.memory_on_disk());
        let shown = |pool: &&Arc<Pool>| TemplateSnapshot {
            snapshot_id: pool.snapshot.manifest.id.to_string(),
            cpu_count: pool.snapshot.manifest.identity.vcpus,
            memory_mb: pool.snapshot.manifest.identity.memory_mib,
            waiting_vmms: pool.count(),
            network: self.identities.has_network(&pool.snapshot.manifest.identity),
        };
        let snapshots = found.iter().map(shown).collect();
        let image_bytes = self.store.image_bytes(&template.image).unwrap_or_default();
        let stamp = self.store.template_stamp(&template.version());
        let created = stamp.map(|stamp| stamp.imported()).unwrap_or_default();
        Known { template, created, snapshots, image_bytes, memory_bytes }
    }
}
