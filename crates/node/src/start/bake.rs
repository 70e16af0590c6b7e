//! Baking: boot a machine once, warm what every first command needs, freeze it as a snapshot.
//!
//! One bake at a time; a caller that waited for another's finds its snapshot and makes none. A failed bake leaves nothing
//! and takes nothing away from a snapshot that works. No sandbox's data is in it: the machine was never
//! activated.

use std::sync::Arc;

use kelvin_api::error::chain;
use kelvin_api::id::SnapshotId;
use kelvin_api::sandbox::PauseMode;
use kelvin_api::units::Shape;
use kelvin_host::descriptors::{Budget, MACHINE};
use kelvin_store::image::Template;
use kelvin_store::snapshot::{Draft, Durability, Origin, Snapshot};
use kelvin_vmm::{MachineSpec, Running};

use crate::capacity::Amount;
use crate::error::Error;
use crate::machine::capture;
use crate::machine::warm_up::{quiesce, warm_up};
use crate::state::Inner;

/// Run before the freeze, as the default user: their pages are then in memory of every clone.
const WARM_UP: [&str; 2] = ["true", "python3 -c 'import json, os, re, sys' || true"];

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
        let _descriptors = Budget::of_process().take(MACHINE)?;
        let hold = self.capacity.hold(Amount::machine(shape))?;
        let started = std::time::Instant::now();
        tracing::info!(template = %template.name, memory = %shape.memory_mib, "baking");
        let mut baked = self.bake_machine(template, shape, network).await;
        if let Err(error @ Error::Agent { .. }) = &baked {
            // Seen once in some hundred emulated boots, cause unknown: the guest falls silent while it is warmed up.
            tracing::warn!(template = %template.name, error = chain(error), "baking once more");
            baked = self.bake_machine(template, shape, network).await;
        }
        drop(hold);
        let snapshot = Arc::new(baked?);
        tracing::info!(template = %template.name, snapshot = %snapshot.manifest.id, seconds = started.elapsed().as_secs_f32(), "baked");
        self.add_pool(Arc::clone(&snapshot));
        Ok(snapshot)
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

    async fn bake_machine(
        &self,
        template: &Template,
        shape: Shape,
        network: bool,
    ) -> Result<Snapshot, Error> {
        let rootfs = self.store.rootfs(&template.image);
        let home = self.allocator.build(shape, &template.guest, rootfs, network).await?;
        let staged = self.store.stage();
        let work = async {
            let staged = staged.as_ref().map_err(|error| Error::Io {
                what: "making a staging directory",
                source: std::io::Error::other(error.to_string()),
            })?;
            let running = self.driver.boot(&home.spec, kelvin_vmm::made()).await?;
            home.started(&self.allocator, running.key()).await?;
            tokio::select! {
                frozen = self.freeze(running, &home.spec, staged) => frozen?,
                // No guest holds up a node that stops.
                () = self.hurry.cancelled() => return Err(Error::Stopping),
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
            capture::publish(self.store.clone(), staged, draft, Durability::Verified).await
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
        staged: &std::path::Path,
    ) -> Result<(), Error> {
        let mut control = self.boot_guest(&running).await?;
        if let Err(error) = warm_up(running.connect().await?, spec, &WARM_UP, None).await {
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
