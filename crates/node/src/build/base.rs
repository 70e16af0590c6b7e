//! What a stage begins with: found and named by a key first, and made only when something has to be done on it.

use std::path::PathBuf;
use std::sync::Arc;

use kelvin_api::error::ErrorCode;
use kelvin_api::id::TemplateVersion;
use kelvin_api::units::DiskMib;
use kelvin_node_api::BuildFrom;
use kelvin_store::image::Guest;
use kelvin_store::layers::{DISK, Layer};
use tokio::sync::mpsc;

use crate::build::building::{Building, DISK_MIB, blocking, refused};
use crate::build::image::{BaseImage, DiskSize, ImageSource, state_of};
use crate::build::log::Log;
use crate::build::plan::{BuildState, ImageFacts, base_key};
use crate::error::Error;
use crate::state::Inner;

/// A state of the disk.
pub enum Disk {
    /// An image of the store.
    Image(String),
    /// A layer.
    Layer(Layer),
}

impl Disk {
    /// Its file.
    pub fn path(&self, inner: &Inner) -> PathBuf {
        match self {
            Self::Image(image) => inner.store.rootfs(image),
            Self::Layer(layer) => layer.disk(),
        }
    }
}

/// Where a base's disk comes from.
enum Origin {
    /// It is there.
    Image(String),
    /// It is made, of that size.
    Made(Arc<dyn BaseImage>, DiskSize),
}

/// What a stage begins with.
pub struct Base {
    /// Of its disk.
    pub key: String,
    /// What is set.
    pub state: BuildState,
    /// The guest of its machines.
    pub guest: Guest,
    /// What the disk has been told of defaults already.
    pub told: BuildState,
    origin: Origin,
}

/// Who tells lines without waiting, and where they come: more than there is room for is left out.
fn lines() -> (impl Fn(&str) + Send + Sync, mpsc::Receiver<String>) {
    let (told, lines) = mpsc::channel::<String>(256);
    (move |line: &str| drop(told.try_send(line.to_owned())), lines)
}

/// Does `work` and logs the lines that it tells meanwhile.
async fn logged<T>(
    log: &Log,
    mut lines: mpsc::Receiver<String>,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::pin!(work);
    let done = loop {
        tokio::select! {
            biased;
            Some(line) = lines.recv() => log.note(&line).await,
            done = &mut work => break done?,
        }
    };
    while let Ok(line) = lines.try_recv() {
        log.note(&line).await;
    }
    Ok(done)
}

impl Building<'_> {
    /// Finds what a stage begins with that begins with no other one. `decides`: the disk is the template's in the end.
    pub(super) async fn find_base(&self, from: &BuildFrom, decides: bool) -> Result<Base, Error> {
        let source = match from {
            BuildFrom::Template(version) => return self.base_template(version, decides).await,
            BuildFrom::Image { reference, credentials, reach } => {
                ImageSource::Registry { reference, credentials: credentials.as_ref(), reach: *reach }
            }
            BuildFrom::Layout(path) => ImageSource::Layout(path),
            BuildFrom::Archive(path) => ImageSource::Archive(path),
            BuildFrom::Scratch => ImageSource::Scratch,
            BuildFrom::Stage(stage) => {
                let text = format!("stage {stage} is no earlier one");
                return Err(refused(ErrorCode::InvalidStep, text, "name an earlier stage"));
            }
        };
        let guest = self.inner.build_guest().await?;
        // Before a registry is asked, which may take minutes: its template may be made anew meanwhile.
        self.underway.needs(&guest.digest);
        let guest = self.with_kernel(guest).await?;
        let bytes = |mib: DiskMib| u64::from(mib.0) << 20;
        let size = match self.request.disk_mib {
            Some(disk) => DiskSize::Exactly(bytes(disk)),
            None => {
                let free = self.request.min_free_mib.map_or(0, bytes);
                DiskSize::Room { least: bytes(DiskMib(DISK_MIB)), free }
            }
        };
        let (inner, stop) = (self.inner, self.stop);
        let (tell, lines) = lines();
        let found = stop.unless(async {
            let found = inner.images.resolve(source, &tell).await;
            found.map_err(|failure| Error::Build(Box::new(failure)))
        });
        let image = logged(&self.log, lines, found).await?;
        let state = state_of(image.config());
        let key =
            base_key(&self.request.project, &["image", &image.key(), &size.key()], &guest.digest, &state);
        Ok(Base { key, state, guest, told: BuildState::default(), origin: Origin::Made(image, size) })
    }

    /// The disk of a base: it is there, or is made now.
    pub(super) async fn make_base(&self, base: &Base) -> Result<Disk, Error> {
        let (image, size) = match &base.origin {
            Origin::Image(image) => return Ok(Disk::Image(image.clone())),
            Origin::Made(image, size) => (image, *size),
        };
        if let Some(layer) = self.find_layer(&base.key).await? {
            self.log.note("the image's file system is here").await;
            return Ok(Disk::Layer(layer));
        }
        let (inner, stop) = (self.inner, self.stop);
        let store = inner.store.clone();
        let staged = blocking("making a staging directory", move || store.stage()).await?;
        let target = staged.join(DISK);
        let (tell, lines) = lines();
        let made = stop.unless(async {
            let made = image.make(&target, size, &tell).await;
            made.map_err(|failure| Error::Build(Box::new(failure)))
        });
        if let Err(error) = logged(&self.log, lines, made).await {
            inner.allocator.remove_staged(staged).await;
            return Err(error);
        }
        let (layers, key) = (inner.layers.clone(), base.key.clone());
        let layer = blocking("keeping a layer", move || layers.put_staged(&key, &staged));
        Ok(Disk::Layer(layer.await?))
    }

    async fn base_template(&self, version: &TemplateVersion, decides: bool) -> Result<Base, Error> {
        let template = self.inner.templates.get(version).await.map_err(|error| match error {
            Error::Store(kelvin_store::Error::Missing { .. }) => Error::NoTemplate(version.to_string()),
            other => other,
        })?;
        self.underway.needs(&template.image);
        self.underway.needs(&template.guest);
        let has = template.shape.disk_mib;
        if decides && self.request.disk_mib.is_some_and(|wanted| wanted != has) {
            let text = format!("the disk of template {} has {} MiB", version.name, has.0);
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
        let guest = self.with_kernel(template.guest()).await?;
        let key = base_key(&self.request.project, &["template", &template.image], &guest.digest, &state);
        let origin = Origin::Image(template.image.clone());
        Ok(Base { key, told: state.clone(), state, guest, origin })
    }

    /// `guest`, which nobody collects, with the kernel that the build asks for.
    async fn with_kernel(&self, guest: Guest) -> Result<Guest, Error> {
        let Some(path) = self.request.kernel.clone() else { return Ok(guest) };
        let (store, of) = (self.inner.store.clone(), guest);
        let own = blocking("reading a kernel", move || store.own_kernel(&path, &of)).await?;
        // Before it is there: a collection may begin as soon as it is.
        self.underway.needs(&own.guest().digest);
        let store = self.inner.store.clone();
        blocking("importing a kernel", move || {
            store.put_own_kernel(&own)?;
            Ok::<_, kelvin_store::Error>(own.guest().clone())
        })
        .await
    }

    pub(super) async fn find_layer(&self, key: &str) -> Result<Option<Layer>, Error> {
        let (layers, key) = (self.inner.layers.clone(), key.to_owned());
        blocking("looking for a layer", move || layers.find(&key)).await
    }
}
