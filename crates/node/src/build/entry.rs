//! A build from its request to its version of the template: its stages are planned (`base`, `plan`) and done (`steps`), then come
//! the bake, and the one rename that makes the version count.
//!
//! Whatever fails or gives it up, the machine is ended and released, and what was staged is removed; layers of the steps before
//! stay, and so does every other version of the template.

use std::path::PathBuf;
use std::sync::Arc;

use kelvin_api::error::ErrorCode;
use kelvin_api::units::{DiskMib, MemoryMib, Shape};
use kelvin_node_api::{Build, Instruction};
use kelvin_store::built::Built;
use kelvin_store::hash::FileDigest;
use kelvin_store::image::{BuiltFrom, Guest, Service, Template};
use kelvin_store::layers::Layer;
use kelvin_store::snapshot::Snapshot;

use crate::build::base::Disk;
use crate::build::building::{Building, DISK_MIB, StepError, at, bad_step, blocking, refused};
use crate::build::plan::{BuildState, ImageFacts};
use crate::build::stages::{Stage, needed, stages, unforced};
use crate::build::steps::StagePlan;
use crate::capacity::Amount;
use crate::error::Error;
use crate::start::bake::Baking;
use crate::state::Inner;

/// Memory of machines when nobody has said any.
const MEMORY: MemoryMib = MemoryMib(512);
/// Bytes of a start or a ready command.
const MOST_COMMAND: usize = 64 << 10;

/// What was made.
pub struct Made {
    /// It.
    pub template: Template,
    /// The digest of the image that it began with.
    pub from_digest: Option<String>,
    /// Steps that were not done again.
    pub cached_steps: u32,
}

impl Building<'_> {
    /// Makes the template. Not cancel-safe: it is given up by its [`Stop`].
    ///
    /// # Errors
    /// Of the step that failed; then nothing is left but layers.
    pub async fn run(mut self) -> Result<Made, StepError> {
        let made = Box::pin(self.make()).await;
        self.end_machines().await;
        let step = self.log.step();
        made.map_err(|failed| StepError {
            step: failed.step.or(step),
            error: self.stop.instead_of(failed.error),
        })
    }

    async fn make(&mut self) -> Result<Made, StepError> {
        let shape = self.check().await?;
        let (request, stop) = (self.request, self.stop);
        let stages = stages(request).map_err(|(step, why)| bad_step(step, why))?;
        let needed = needed(&stages);
        stop.unless(self.find_uploads(&stages, &needed)).await?;
        let unforced = unforced(&stages, request.force);
        let mut plans: Vec<Option<StagePlan>> = Vec::with_capacity(stages.len());
        for at in 0..stages.len() {
            let plan = match needed[at] {
                true => Some(self.plan_stage(&stages, at, &plans, unforced[at]).await?),
                false => None,
            };
            plans.push(plan);
        }
        let Some((last, guest)) = plans.last().and_then(Option::as_ref).map(StagePlan::end) else {
            return Err(bad_step(None, "the build has no stage".to_owned()));
        };
        let from_digest = last.image.digest.clone();
        let (disk, cached_steps) = Box::pin(self.do_stages(&stages, plans, &last, shape)).await?;
        self.log.begin(None);
        // Its memory is the bake's now.
        self.end_machines().await;
        self.stop.check()?;
        let template = self.publish(disk, guest, last, shape).await?;
        Ok(Made { template, from_digest, cached_steps })
    }

    /// Refuses what can never be, and says in which shape it is made.
    async fn check(&self) -> Result<Shape, Error> {
        let request = self.request;
        let shape = Shape {
            vcpus: request.vcpus.unwrap_or(1),
            memory_mib: request.memory_mib.unwrap_or(MEMORY),
            disk_mib: request.disk_mib.unwrap_or(DiskMib(DISK_MIB)),
        };
        self.inner.capacity.check(shape)?;
        self.inner.ensure_disk().await?;
        for (what, text) in [("start", &request.start), ("ready", &request.ready)] {
            let Some(text) = text else { continue };
            if text.trim().is_empty() || text.contains('\0') || text.len() > MOST_COMMAND {
                let why = format!("the {what} command is empty, has a NUL or more than {MOST_COMMAND} bytes");
                return Err(refused(ErrorCode::InvalidStep, why, "leave it out, or name a command"));
            }
        }
        Ok(shape)
    }

    /// Takes what steps copy: it stays until the build has ended.
    async fn find_uploads(&mut self, stages: &[Stage<'_>], needed: &[bool]) -> Result<(), Error> {
        let mut steps = Vec::new();
        for (stage, _) in stages.iter().zip(needed).filter(|(_, needed)| **needed) {
            steps.extend(stage.steps.iter().enumerate().map(|(at, step)| (stage.first + at, step)));
        }
        for (index, step) in steps {
            let Instruction::Copy { files: hash, .. } = &step.instruction else { continue };
            let (uploads, project) = (self.inner.uploads.clone(), self.request.project.clone());
            let wanted = hash.clone();
            let found = blocking("looking for an upload", move || uploads.find(&project, &wanted)).await?;
            let Some(files) = found else {
                self.log.begin(at(index));
                let text = format!("the files {hash} are not here");
                return Err(refused(ErrorCode::FilesMissing, text, "upload them, and build again"));
            };
            self.uploads.insert(index, files);
        }
        Ok(())
    }

    /// Bakes the template that is to be, and publishes image, snapshot and template.
    async fn publish(
        &mut self,
        disk: Disk,
        guest: Guest,
        state: BuildState,
        shape: Shape,
    ) -> Result<Template, Error> {
        let (inner, stop, request) = (Arc::clone(self.inner), self.stop, self.request);
        let (image, layer, bytes) = match disk {
            Disk::Image(image) => {
                let path = inner.store.rootfs(&image);
                let found = std::fs::metadata(&path);
                let bytes = found.map_err(|source| Error::Io { what: "reading an image", source })?.len();
                (image, None, bytes)
            }
            Disk::Layer(mut layer) => {
                let hashed = blocking("hashing the disk", move || {
                    let (bytes, digest) = (layer.disk_bytes()?, layer.digest()?);
                    Ok((bytes, digest, layer))
                });
                let (bytes, digest, layer) = stop.unless(hashed).await?;
                (digest.digest.clone(), Some((layer, digest)), bytes)
            }
        };
        let shape = Shape { disk_mib: DiskMib(u32::try_from(bytes >> 20).unwrap_or(u32::MAX)), ..shape };
        let template = template_of(request, guest, image, shape, state, inner.clock.wall());
        let network = inner.allocator.networks.is_some();
        // One bake at a time, see there.
        let turn = stop.unless(async { Ok(inner.bakes.lock().await) }).await?;
        let baked = match inner.pool_for(&template, shape, network) {
            Ok(_) => None,
            Err(_) => {
                self.log.note("the machine is saved").await;
                let disk = match &layer {
                    Some((layer, _)) => layer.disk(),
                    None => inner.store.rootfs(&template.image),
                };
                let hold = inner.make_room(Amount::machine(shape))?;
                let baking = Baking { template: &template, shape, network, disk, stop: stop.token() };
                Some(Box::pin(inner.bake_staged(&baking, hold)).await?)
            }
        };
        let staged = baked.as_ref().map(|(staged, _)| staged.clone());
        let alone = inner.templates.begin_import(&template.version());
        let published = match alone.and_then(|one| stop.check().map(|()| one)) {
            Ok(_alone) => inner.publish_template(template.clone(), layer, baked).await,
            Err(error) => Err(error),
        };
        drop(turn);
        if let (Err(_), Some(staged)) = (&published, staged) {
            inner.allocator.remove_staged(staged).await;
        }
        let snapshot = published?;
        // From here on it is there, whatever happens.
        inner.use_template(&template, shape, network, snapshot).await;
        Ok(template)
    }
}

fn template_of(
    request: &Build,
    guest: Guest,
    image: String,
    shape: Shape,
    state: BuildState,
    at: jiff::Timestamp,
) -> Template {
    let BuildState { env, workdir, user, image: facts } = state;
    let ImageFacts { digest: from_digest, labels, entrypoint, cmd, exposed_ports, stop_signal } = facts;
    let built = BuiltFrom { from_digest, at, labels, entrypoint, cmd, exposed_ports, stop_signal };
    Template {
        env,
        workdir,
        user,
        service: Service::of(request.start.clone(), request.ready.clone()),
        built: Some(built),
        build: Some(request.build.clone()),
        ..Template::plain(request.template.clone(), image, guest, shape)
    }
}

impl Inner {
    /// The guest of templates that are made of images: that of the template that the options name, or of any.
    pub(super) async fn build_guest(&self) -> Result<Guest, Error> {
        if let Ok(template) = self.templates.get(&self.options.build_guest_from.clone().into()).await {
            return Ok(template.guest());
        }
        let store = self.store.clone();
        let all = blocking("reading templates", move || store.templates()).await?;
        let none = || {
            let text = "this node has no template yet, and so no kernel for another";
            refused(ErrorCode::BuildUnsupported, text, "import one first: `kelvin template import`")
        };
        all.first().map(Template::guest).ok_or_else(none)
    }

    /// Publishes. Goes on to its end.
    async fn publish_template(
        &self,
        template: Template,
        layer: Option<(Layer, FileDigest)>,
        baked: Option<(PathBuf, kelvin_store::snapshot::Draft)>,
    ) -> Result<Option<Snapshot>, Error> {
        let store = self.store.clone();
        blocking("publishing a template", move || {
            let path = layer.as_ref().map(|(layer, _)| layer.disk());
            let disk = path.as_deref().zip(layer.as_ref().map(|(_, digest)| digest.clone()));
            store.publish_built(Built { template: &template, disk, baked })
        })
        .await
    }

    /// Has creates find a version that was published, and machines wait for it, unless they are to wait for another one.
    async fn use_template(
        self: &Arc<Self>,
        template: &Template,
        shape: Shape,
        network: bool,
        snapshot: Option<Snapshot>,
    ) {
        self.templates.know_one(template);
        match snapshot {
            Some(snapshot) => self.add_pool(Arc::new(snapshot)),
            // One that was there may have been of no template for a while.
            None => {
                if let Ok(pool) = self.pool_for(template, shape, network)
                    && self.is_waited_for(&pool.snapshot.manifest.identity)
                {
                    pool.set_target(self.options.waiting_vmms);
                }
            }
        }
        self.settle_pools(&template.name).await;
        tracing::info!(template = %template.name, image = template.image, "built");
    }
}
