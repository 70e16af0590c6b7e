//! Baking: boot a machine once, warm what every first command needs, freeze it as a snapshot.
//!
//! One bake at a time; a caller that waited for another's finds its snapshot and makes none. A failed bake leaves nothing
//! and takes nothing away from a snapshot that works. No sandbox's data is in it: the machine was never
//! activated. A template that was built with a service has it running in the snapshot, see `machine::service`; its build bakes
//! it before it is published, from the disk that is to be its image.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kelvin_api::error::chain;
use kelvin_api::id::SnapshotId;
use kelvin_api::sandbox::PauseMode;
use kelvin_api::units::Shape;
use kelvin_host::descriptors::{Budget, MACHINE};
use kelvin_store::image::Template;
use kelvin_store::snapshot::{Draft, Durability, Origin, Snapshot};
use kelvin_vmm::{MachineSpec, Running};
use tokio_util::sync::CancellationToken;

use crate::capacity::{Amount, Hold};
use crate::error::Error;
use crate::machine::processes::Processes;
use crate::machine::warm_up::{quiesce, warm_up};
use crate::machine::{capture, service};
use crate::state::Inner;

/// Run before the freeze, as the default user: their pages are then in memory of every clone.
const WARM_UP: [&str; 2] = ["true", "python3 -c 'import json, os, re, sys' || true"];

/// What is baked.
pub struct Baking<'a> {
    /// Of which template; it may not be published yet.
    pub template: &'a Template,
    /// In which shape.
    pub shape: Shape,
    /// Whether its machines have a network.
    pub network: bool,
    /// What its machine's disk is cloned from.
    pub disk: PathBuf,
    /// Cancelled, it is given up.
    pub stop: &'a CancellationToken,
}

impl Inner {
    /// A snapshot of `template` in `shape`: the one there is, or a new one.
    pub async fn bake(
        self: &Arc<Self>,
        template: &Template,
        shape: Shape,
        network: bool,
    ) -> Result<Arc<Snapshot>, Error> {
        self.capacity.check(shape)?;
        let _one = self.bakes.lock().await;
        if let Ok(pool) = self.pool_for(template, shape, network) {
            return Ok(Arc::clone(&pool.snapshot));
        }
        if self.stop.is_cancelled() {
            return Err(Error::Stopping);
        }
        let hold = self.capacity.hold(Amount::machine(shape))?;
        let disk = self.store.rootfs(&template.image);
        let baking = Baking { template, shape, network, disk, stop: &self.hurry };
        let (staged, draft) = self.bake_staged(&baking, hold).await?;
        let published = capture::publish(self.store.clone(), &staged, draft, Durability::Verified).await;
        if published.is_err() {
            self.allocator.remove_staged(staged).await;
        }
        let snapshot = Arc::new(published?);
        tracing::info!(template = %template.name, snapshot = %snapshot.manifest.id, "baked");
        self.add_pool(Arc::clone(&snapshot));
        Ok(snapshot)
    }

    /// Saves a machine to a directory of `staging/`, which is the caller's then, with what it is. Who calls it has the turn, see
    /// [`Inner::bakes`]. `hold`: what the machine holds meanwhile.
    ///
    /// # Errors
    /// As the VMM and the guest give them, `Service`; `Stopping` when it is given up. Then nothing is left.
    pub async fn bake_staged(&self, baking: &Baking<'_>, hold: Hold) -> Result<(PathBuf, Draft), Error> {
        let _held = (Budget::of_process().take(MACHINE)?, hold);
        let (started, template) = (std::time::Instant::now(), &baking.template.name);
        tracing::info!(%template, memory = %baking.shape.memory_mib, "baking");
        let mut baked = self.bake_machine(baking).await;
        if let Err(error @ Error::Agent { .. }) = &baked {
            // Seen once in some hundred emulated boots, cause unknown: the guest falls silent while it is warmed up.
            tracing::warn!(%template, error = chain(error), "baking once more");
            baked = self.bake_machine(baking).await;
        }
        if baked.is_ok() {
            tracing::info!(%template, seconds = started.elapsed().as_secs_f32(), "a machine is saved");
        }
        baked
    }

    /// Bakes in the background; a failure is logged, because nobody waits for it.
    pub fn bake_later(self: &Arc<Self>, template: Template, shape: Shape, network: bool) {
        let inner = Arc::clone(self);
        self.tasks.spawn(async move {
            let stop = inner.stop.clone();
            // Not cut short: what a bake makes is released by the bake.
            if stop.is_cancelled() {
                return;
            }
            if let Err(error) = inner.bake(&template, shape, network).await {
                tracing::error!(template = %template.name, error = chain(&error), "bake failed");
            }
        });
    }

    async fn bake_machine(&self, baking: &Baking<'_>) -> Result<(PathBuf, Draft), Error> {
        let Baking { template, shape, network, ref disk, stop } = *baking;
        let home = self.allocator.build(shape, &template.guest, disk.clone(), network).await?;
        let staged = self.store.stage();
        let work = async {
            let staged = staged.as_ref().map_err(|error| Error::Io {
                what: "making a staging directory",
                source: std::io::Error::other(error.to_string()),
            })?;
            let running = self.driver.boot(&home.spec, kelvin_vmm::made()).await?;
            home.started(&self.allocator, running.key()).await?;
            tokio::select! {
                frozen = self.freeze(running, &home.spec, staged, template) => frozen?,
                // No guest holds up a node that stops, or a build that is given up.
                () = stop.cancelled() => return Err(Error::Stopping),
            }
            let draft = Draft {
                id: SnapshotId::random(),
                mode: PauseMode::Full,
                template: template.name.clone(),
                guest: template.guest.clone(),
                parent: None,
                origin: Origin::Bake,
                identity: self.identities.of_template(template, shape, network),
                arguments: self.driver.layout(shape, network),
            };
            Ok((staged.clone(), draft))
        };
        let result = work.await;
        if let (Err(_), Ok(staged)) = (&result, &staged) {
            self.allocator.remove_staged(staged.clone()).await;
        }
        self.allocator.release_or_log(&home.spec, None).await;
        result
    }

    /// Brings a booting machine to the instant of its snapshot and saves that to `staged`.
    async fn freeze(
        &self,
        running: Running,
        spec: &MachineSpec,
        staged: &Path,
        template: &Template,
    ) -> Result<(), Error> {
        let mut control = self.boot_guest(&running).await?;
        let processes = Processes::over(running.connect().await?, &spec.vm, None);
        let warmed = async {
            warm_up(&processes, &WARM_UP).await?;
            service::begin(&processes, template).await
        };
        let warmed = warmed.await;
        processes.close().await;
        if let Err(error) = warmed {
            let console = running.console().await.unwrap_or_default();
            let tail: Vec<&str> = console.lines().rev().take(15).collect();
            let tail = tail.into_iter().rev().collect::<Vec<_>>().join(" | ");
            tracing::warn!(vm = %spec.vm, console = tail, "the guest could not be warmed up");
            return Err(error);
        }
        let disk = spec.absolute().join("disk");
        quiesce(&mut control).await?;
        capture::flush(disk.clone()).await?;
        let paused = running.pause().await.map_err(|(_, error)| error)?;
        capture::save(&paused, disk, staged, PauseMode::Full).await?;
        paused.kill().await?;
        Ok(())
    }
}
