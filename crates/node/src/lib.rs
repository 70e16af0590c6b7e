//! One node: it owns what runs here.
//!
//! Read in this order: [`Node`] (the handle), `start` (the path of a create, a file for each phase), `pool` (what is ready ahead of
//! it), `machine` (the resources of a machine, the conversation with its guest, what is frozen of it), `sandbox` (the task that
//! owns one that runs; those that are paused), `build` (templates of images and steps), `lifecycle` (pause, resume, snapshot, fork), `snapshots` and `verify`, `traffic`,
//! `open` and `recovery` (after a crash). `state` is what they share; `service` is all of it as control plane and gateway see it.
//!
//! Who writes: the ledger, `sandboxes/` and, through `kelvin-store`, snapshots. A crash leaves machines
//! that the ledger names; the next start adopts those that ran and removes the rest. Time limits are
//! enforced here, with or without a control plane.

mod activity;
mod build;
mod capacity;
mod changes;
mod error;
mod identities;
mod import;
mod inspect;
mod lifecycle;
mod link;
mod machine;
mod networks;
mod open;
pub mod options;
mod pool;
mod recovery;
mod sandbox;
mod service;
mod snapshots;
mod start;
mod state;
mod templates;
mod traffic;
mod verify;

use std::path::Path;
use std::sync::Arc;

use kelvin_api::id::{SandboxId, SnapshotId, TemplateName, TemplateVersion};
use kelvin_api::sandbox::SetPool;
use kelvin_api::units::{MemoryMib, Shape};
use kelvin_node_api::{Base, ConsoleLine, Create, Created};
use kelvin_store::gc::Garbage;

pub use build::image::{BaseImage, BaseImages, DiskSize, ImageConfig, ImageSource, NoImages, Told};
pub use build::plan::ImageFacts;
pub use error::{Error, no_descriptors};
pub use link::Stream;
pub use machine::agent::{Body, SendError};
use sandbox::handle::{Command, Sandbox, Urgent};
use sandbox::record::SandboxRecord;
use start::source::StartSource;
use state::Inner;

/// How often what changes a sandbox looks for it anew, before it says that others change it all the time.
pub(crate) const LOOKS: u32 = 16;

/// A cheap handle of a node.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

impl Node {
    /// Creates a sandbox; see `create`.
    ///
    /// # Errors
    /// Any of [`Error`]; then nothing of it is left.
    pub async fn create(&self, request: Create) -> Result<Created, Error> {
        let inner = Arc::clone(&self.inner);
        // A caller that goes away must not leave a machine half-made.
        let start = match &request.base {
            Base::Template(version) => StartSource::Template(inner.templates.get(version).await?),
            Base::Snapshot(id) => StartSource::another(inner.find_snapshot(id)?, None),
        };
        let task = self.inner.tasks.spawn(async move { inner.create(request, start).await });
        task.await.map_err(|error| Error::Io { what: "creating", source: std::io::Error::other(error) })?
    }

    pub(crate) fn find(&self, id: &SandboxId) -> Result<Arc<Sandbox>, Error> {
        // In this order: a pause makes it visible as paused before it is invisible as running; a resume the other way.
        if let Some(sandbox) = self.inner.sandboxes.running().get(id) {
            return Ok(Arc::clone(sandbox));
        }
        if self.inner.paused(id).is_some() {
            return Err(Error::Paused(id.to_string()));
        }
        match self.inner.sandboxes.running().get(id) {
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

    /// Makes sure that a snapshot of `template` exists in the given shape, and sets how many VMMs wait for
    /// it. Returns its id.
    ///
    /// # Errors
    /// `Store` for an unknown template, `Shape`, `Exhausted`, `Vmm`.
    pub async fn bake(
        &self,
        template: &TemplateVersion,
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
        let template = self.inner.templates.get(template).await?;
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

    /// Removes what nothing needs, or says what that would be.
    ///
    /// # Errors
    /// `Store` with `Unreadable` when what something needs is not known, and then nothing is removed; `Store` when
    /// something cannot be removed.
    pub async fn collect(&self, dry_run: bool) -> Result<Garbage, Error> {
        // Twice: what is removed between the two may be what a machine has begun from, whose record came too late to be read.
        let before = self.inner.in_memory();
        let recorded = self.inner.recorded().await?;
        let inner = Arc::clone(&self.inner);
        let collecting = move || {
            let used = || before.with(recorded).with(inner.in_memory());
            inner.store.collect(used, dry_run)
        };
        let garbage = kelvin_host::blocking::spawn(collecting).await.map_err(|error| Error::Io {
            what: "collecting garbage",
            source: std::io::Error::other(error),
        })??;
        if !dry_run {
            for id in garbage.snapshots.iter().filter_map(|id| id.parse().ok()) {
                self.inner.snapshots.forget(&id);
            }
            self.inner.pools.retain(|pool| {
                let gone = garbage.snapshots.contains(&pool.snapshot_id().to_string());
                if gone {
                    pool.refuse("it was collected".to_owned());
                }
                !gone
            });
        }
        Ok(garbage)
    }

    /// Sets what is wanted of the warm machines of a template; what is `None` stays. Remembered across restarts.
    ///
    /// # Errors
    /// `Store` for an unknown template, `Rule` for numbers that contradict each other, `Io`.
    pub async fn set_pool(&self, template: &TemplateName, wanted: SetPool) -> Result<(), Error> {
        let (inner, template) = (Arc::clone(&self.inner), template.clone());
        self.run("setting what is wanted of a pool", async move {
            inner.pools.set_rule(&inner.store, template, wanted).await
        })
        .await
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
        let why = SandboxRecord::read(&record.body).err()?;
        Some(format!("machine {}: {why}", record.owner))
    });
    Ok((records.len(), unreadable.collect()))
}
