//! A build from its request to its template: what it begins with, what is cached, the rest of its steps, the bake, and the one
//! rename that makes the template count.
//!
//! Whatever fails or gives it up, the machine is ended and released, and what was staged is removed; layers of the steps before
//! stay, and so does the template that was there.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::TemplateName;
use kelvin_api::units::{DiskMib, MemoryMib, Shape};
use kelvin_node_api::{Build, BuildFrom, Instruction};
use kelvin_store::built::Built;
use kelvin_store::hash::FileDigest;
use kelvin_store::image::{BuiltFrom, Guest, Service, Template};
use kelvin_store::layers::{DISK, Layer};
use kelvin_store::snapshot::Snapshot;
use kelvin_store::uploads::Files;

use crate::build::image::{DiskSize, ImageSource, state_of};
use crate::build::log::Log;
use crate::build::machine::{BuildMachine, Ground};
use crate::build::plan::{BuildState, ImageFacts, Planned, base_key, last_key, plan, unforced};
use crate::build::registry::{Stop, Underway};
use crate::build::run::{Doing, write_defaults};
use crate::capacity::Amount;
use crate::error::Error;
use crate::start::bake::Baking;
use crate::state::Inner;

/// Size of a disk when nobody has said one: it is sparse, and an image that needs more says so.
const DISK_MIB: u32 = 4096;
/// Memory of machines when nobody has said any.
const MEMORY: MemoryMib = MemoryMib(512);
/// Bytes of a start or a ready command.
const MOST_COMMAND: usize = 64 << 10;

/// A build that fails: of which step, and why.
#[derive(Debug)]
pub struct StepError {
    /// Counted from 0.
    pub step: Option<u32>,
    /// Why.
    pub error: Error,
}

impl From<Error> for StepError {
    fn from(error: Error) -> Self {
        Self { step: None, error }
    }
}

/// What was made.
pub struct Made {
    /// It.
    pub template: Template,
    /// The digest of the image that it began with.
    pub from_digest: Option<String>,
    /// Steps that were not done again.
    pub cached_steps: u32,
}

/// A state of the disk.
enum Disk {
    /// An image of the store.
    Image(String),
    /// A layer.
    Layer(Layer),
}

/// What a build begins with.
struct Base {
    key: String,
    state: BuildState,
    guest: Guest,
    disk: Disk,
    /// What the disk has been told of defaults already.
    told: BuildState,
}

/// One build on its way.
pub struct Building<'a> {
    inner: &'a Arc<Inner>,
    request: &'a Build,
    underway: &'a Underway,
    stop: &'a Stop,
    log: Log,
    /// What each step copies.
    uploads: BTreeMap<usize, Files>,
    machine: Option<BuildMachine>,
}

fn refused(code: ErrorCode, text: impl Into<String>, remediation: &str) -> Error {
    Error::Build(Box::new(Failure::new(code, text, remediation)))
}

/// Does what blocks. It goes on when nobody waits for it any more.
async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, kelvin_store::Error> + Send + 'static,
) -> Result<T, Error> {
    let done = kelvin_host::blocking::spawn(work).await;
    Ok(done.map_err(|error| Error::Io { what, source: std::io::Error::other(error) })??)
}

fn at(step: usize) -> Option<u32> {
    u32::try_from(step).ok()
}

impl<'a> Building<'a> {
    /// Nothing is done yet.
    pub fn new(inner: &'a Arc<Inner>, request: &'a Build, underway: &'a Underway, log: Log) -> Self {
        let stop = &*underway.stop;
        Self { inner, request, underway, stop, log, uploads: BTreeMap::new(), machine: None }
    }

    /// Makes the template. Not cancel-safe: it is given up by its [`Stop`].
    ///
    /// # Errors
    /// Of the step that failed; then nothing is left but layers.
    pub async fn run(mut self) -> Result<Made, StepError> {
        let made = Box::pin(self.make()).await;
        if let Some(machine) = self.machine.take() {
            machine.end().await;
        }
        let step = self.log.step();
        made.map_err(|failed| StepError {
            step: failed.step.or(step),
            error: self.stop.instead_of(failed.error),
        })
    }

    async fn make(&mut self) -> Result<Made, StepError> {
        let shape = self.check()?;
        let stop = self.stop;
        stop.unless(self.find_uploads()).await?;
        let base = self.base().await?;
        let digests = self.uploads.iter().map(|(at, files)| (*at, files.digest().to_owned())).collect();
        let planned = plan(&base.key, &base.state, &self.request.steps, &digests)
            .map_err(|(step, why)| self.bad_step(step, why))?;
        let last = planned.last().map_or(&base.state, |planned| &planned.state).clone();
        let from_digest = base.state.image.digest.clone();
        let guest = base.guest.clone();
        self.underway.needs(&guest.digest);
        if let Disk::Image(image) = &base.disk {
            self.underway.needs(image);
        }
        let (disk, cached_steps) = Box::pin(self.steps(base, &planned, &last, shape)).await?;
        self.log.begin(None);
        // Its memory is the bake's now.
        if let Some(machine) = self.machine.take() {
            machine.end().await;
        }
        self.stop.check()?;
        let template = self.publish(disk, guest, last, shape).await?;
        Ok(Made { template, from_digest, cached_steps })
    }

    /// Refuses what can never be, and says in which shape it is made.
    fn check(&self) -> Result<Shape, Error> {
        let request = self.request;
        let shape = Shape {
            vcpus: request.vcpus.unwrap_or(1),
            memory_mib: request.memory_mib.unwrap_or(MEMORY),
            disk_mib: request.disk_mib.unwrap_or(DiskMib(DISK_MIB)),
        };
        self.inner.capacity.check(shape)?;
        self.inner.check_disk()?;
        for (what, text) in [("start", &request.start), ("ready", &request.ready)] {
            let Some(text) = text else { continue };
            if text.trim().is_empty() || text.contains('\0') || text.len() > MOST_COMMAND {
                let why = format!("the {what} command is empty, has a NUL or more than {MOST_COMMAND} bytes");
                return Err(refused(ErrorCode::InvalidStep, why, "leave it out, or name a command"));
            }
        }
        Ok(shape)
    }

    fn bad_step(&self, step: Option<usize>, why: String) -> StepError {
        let error = refused(ErrorCode::InvalidStep, why, "change the step");
        StepError { step: step.and_then(at), error }
    }

    /// Takes what steps copy: it stays until the build has ended.
    async fn find_uploads(&mut self) -> Result<(), Error> {
        for (index, step) in self.request.steps.iter().enumerate() {
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

    async fn base(&mut self) -> Result<Base, Error> {
        let source = match &self.request.from {
            BuildFrom::Template(name) => return self.base_template(name).await,
            BuildFrom::Image { reference, credentials } => {
                ImageSource::Registry { reference, credentials: credentials.as_ref() }
            }
            BuildFrom::Layout(path) => ImageSource::Layout(path),
            BuildFrom::Archive(path) => ImageSource::Archive(path),
        };
        let guest = self.inner.build_guest().await?;
        // What a library tells comes without waiting: more than there is room for is left out.
        let (told, mut lines) = tokio::sync::mpsc::channel::<String>(256);
        let tell = move |line: &str| drop(told.try_send(line.to_owned()));
        let (inner, stop, log) = (self.inner, self.stop, &self.log);
        let bytes = |mib: DiskMib| u64::from(mib.0) << 20;
        let size = match self.request.disk_mib {
            Some(disk) => DiskSize::Exactly(bytes(disk)),
            None => {
                let free = self.request.min_free_mib.map_or(0, bytes);
                DiskSize::Room { least: bytes(DiskMib(DISK_MIB)), free }
            }
        };
        let guest_digest = guest.digest.clone();
        let work = async {
            let found = async {
                let found = inner.images.resolve(source, &tell).await;
                found.map_err(|failure| Error::Build(Box::new(failure)))
            };
            let image = stop.unless(found).await?;
            let state = state_of(image.config());
            let disk = size.key();
            let key = base_key(&["image", &image.key(), &disk], &guest_digest, &state);
            let (layers, wanted) = (inner.layers.clone(), key.clone());
            if let Some(layer) = blocking("looking for a layer", move || layers.find(&wanted)).await? {
                tell("the image's file system is here");
                return Ok((key, state, layer));
            }
            let store = inner.store.clone();
            let staged = blocking("making a staging directory", move || store.stage()).await?;
            let target = staged.join(DISK);
            let made = stop.unless(async {
                let made = image.make(&target, size, &tell).await;
                made.map_err(|failure| Error::Build(Box::new(failure)))
            });
            if let Err(error) = made.await {
                inner.allocator.remove_staged(staged).await;
                return Err(error);
            }
            let (layers, kept_state) = (inner.layers.clone(), state.clone());
            let layer = blocking("keeping a layer", {
                let key = key.clone();
                move || layers.put_staged(&key, &staged, &kept_state)
            });
            Ok((key, state, layer.await?))
        };
        tokio::pin!(work);
        let done = loop {
            tokio::select! {
                biased;
                Some(line) = lines.recv() => log.note(&line).await,
                done = &mut work => break done,
            }
        };
        let (key, state, layer) = done?;
        while let Ok(line) = lines.try_recv() {
            self.log.note(&line).await;
        }
        Ok(Base { key, state, guest, disk: Disk::Layer(layer), told: BuildState::default() })
    }

    async fn base_template(&mut self, name: &TemplateName) -> Result<Base, Error> {
        let template = self.inner.templates.get(name).await.map_err(|error| match error {
            Error::Store(kelvin_store::Error::Missing { .. }) => Error::NoTemplate(name.to_string()),
            other => other,
        })?;
        let has = template.shape.disk_mib;
        if self.request.disk_mib.is_some_and(|wanted| wanted != has) {
            let text = format!("the disk of template {name} has {} MiB", has.0);
            return Err(refused(ErrorCode::InvalidShape, text, "leave out the disk's size"));
        }
        let built = template.built.clone().unwrap_or_default();
        let state = BuildState {
            env: template.env.clone(),
            workdir: template.workdir.clone(),
            user: template.user.clone(),
            image: ImageFacts {
                digest: built.from_digest,
                labels: built.labels,
                entrypoint: built.entrypoint,
                cmd: built.cmd,
                exposed_ports: built.exposed_ports,
                stop_signal: built.stop_signal,
            },
        };
        let key = base_key(&["template", &template.image], &template.guest, &state);
        let (guest, disk) = (template.guest(), Disk::Image(template.image.clone()));
        Ok(Base { key, told: state.clone(), state, guest, disk })
    }

    /// Takes the last state that is cached and does what comes after it. The disk in the end, and how many steps were cached.
    async fn steps(
        &mut self,
        base: Base,
        planned: &[Planned],
        last: &BuildState,
        shape: Shape,
    ) -> Result<(Disk, u32), StepError> {
        let (request, inner, stop) = (self.request, self.inner, self.stop);
        let steps = &request.steps;
        let may_be_cached = unforced(steps, request.force);
        let last_of_steps = planned.last().map_or(&base.key, |planned| &planned.key);
        // What the disk has been told of is what it has to be told.
        let (final_key, tells) = (last_key(last_of_steps, last), base.told.defaults() != last.defaults());
        if may_be_cached == steps.len()
            && tells
            && let Some(layer) = self.find_layer(&final_key).await?
        {
            self.log.note(&format!("{} steps are cached", steps.len())).await;
            return Ok((Disk::Layer(layer), at(steps.len()).unwrap_or(u32::MAX)));
        }
        let (mut disk, mut done) = (base.disk, 0);
        for (index, planned) in planned.iter().enumerate().take(may_be_cached).rev() {
            if planned.needs_machine
                && let Some(layer) = self.find_layer(&planned.key).await?
            {
                (disk, done) = (Disk::Layer(layer), index + 1);
                break;
            }
        }
        let cached = planned.iter().enumerate().take(may_be_cached);
        let cached =
            cached.skip(done).find(|(_, planned)| planned.needs_machine).map_or(may_be_cached, |(at, _)| at);
        let ground = |disk: &Disk, inner: &Inner| Ground {
            template: request.template.clone(),
            guest: base.guest.digest.clone(),
            disk: path_of(disk, inner),
            shape,
        };
        let mut before = if done == 0 { base.state.clone() } else { planned[done - 1].state.clone() };
        for (index, planned) in planned.iter().enumerate() {
            let step = &steps[index];
            self.log.begin(at(index));
            let kept = if index < cached { "cached: " } else { "" };
            self.log.note(&format!("{kept}{}", step.shown)).await;
            if index < done {
                continue;
            }
            if planned.needs_machine {
                if self.machine.is_none() {
                    let place = ground(&disk, inner);
                    self.machine = Some(Box::pin(BuildMachine::start(inner, place, stop)).await?);
                }
                let files = self.uploads.get(&index);
                let doing = Doing { step, before: &before, after: &planned.state, files };
                let Some(machine) = &mut self.machine else { continue };
                let ran =
                    Box::pin(stop.unless(in_machine(machine, doing.run(&machine.processes, &mut self.log))));
                ran.await?;
                let kept =
                    Box::pin(stop.unless(machine.keep(&inner.layers, &planned.key, planned.state.clone())));
                disk = Disk::Layer(kept.await?);
            }
            before = planned.state.clone();
        }
        self.log.begin(None);
        if tells {
            if self.machine.is_none() {
                let place = ground(&disk, inner);
                self.machine = Some(Box::pin(BuildMachine::start(inner, place, stop)).await?);
            }
            if let Some(machine) = &mut self.machine {
                Box::pin(stop.unless(in_machine(machine, write_defaults(&machine.processes, last)))).await?;
                let kept = Box::pin(stop.unless(machine.keep(&inner.layers, &final_key, last.clone())));
                disk = Disk::Layer(kept.await?);
            }
        }
        Ok((disk, at(cached).unwrap_or(u32::MAX)))
    }

    async fn find_layer(&self, key: &str) -> Result<Option<Layer>, Error> {
        let (layers, key) = (self.inner.layers.clone(), key.to_owned());
        blocking("looking for a layer", move || layers.find(&key)).await
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
        let published =
            match inner.templates.begin_import(&template.name).and_then(|one| stop.check().map(|()| one)) {
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

/// Does `work` in a machine, unless that ends by itself meanwhile.
async fn in_machine<T>(
    machine: &BuildMachine,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::select! {
        biased;
        done = work => done,
        error = machine.ended() => Err(error),
    }
}

fn path_of(disk: &Disk, inner: &Inner) -> PathBuf {
    match disk {
        Disk::Image(image) => inner.store.rootfs(image),
        Disk::Layer(layer) => layer.disk(),
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
        ..Template::plain(request.template.clone(), image, guest, shape)
    }
}

impl Inner {
    /// The guest of templates that are made of images: that of the template that the options name, or of any.
    async fn build_guest(&self) -> Result<Guest, Error> {
        if let Ok(template) = self.templates.get(&self.options.build_guest_from).await {
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

    /// Has creates find a template that was published, and machines wait for it instead of for what had its name before.
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
                if let Ok(pool) = self.pool_for(template, shape, network) {
                    pool.set_target(self.options.waiting_vmms);
                }
            }
        }
        self.retire_pools(&template.name).await;
        tracing::info!(template = %template.name, image = template.image, "built");
    }
}
