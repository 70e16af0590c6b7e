//! Images of containers become ext4 files: found in a registry, a layout or an archive, pulled, verified, and laid over each
//! other without a mount and without a process of the host.
//!
//! ```text
//!   Source ──resolve──> Resolved (digest, configuration, layers) ──make──> one ext4 file
//! ```
//!
//! Everything that comes in is hostile: each part has a limit ([`Limits`]), a digest, and a typed refusal ([`Refusal`]). Paths
//! of an image are resolved in memory and never in the host's file system.
//!
//! Who writes: [`Images`] alone below its directory (`cache`), and the target file that the caller names. What a crash
//! leaves: parts of blobs, which go on or are removed at the next start; of a target nothing, or, on a host's file system
//! without `O_TMPFILE`, a file that the caller removes. The target is not synced: who publishes it does that.
//!
//! Who may use a local source, or a registry that is not on the internet ([`Reach`]), is the caller's to decide.

mod cache;
mod config;
mod decompress;
mod digest;
mod error;
mod ext4;
mod limits;
mod local;
mod make;
mod manifest;
mod reference;
mod registry;
mod resolve;
mod spool;
mod tar;
mod told;
mod tree;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use config::{Config, Healthcheck};
pub use error::{Error, Refusal};
pub use limits::Limits;
pub use registry::Mirror;
pub use registry::credentials::Credentials;
pub use registry::reach::Reach;
pub use resolve::{Resolved, Source};
pub use told::Told;

use cache::Cache;
use local::Local;
use registry::Registries;

/// How images are found and kept.
#[derive(Debug, Clone)]
pub struct Options {
    /// Asked before the registries that they are of, in this order.
    pub mirrors: Vec<Mirror>,
    /// Docker's `config.json`, for credentials; it need not be there.
    pub docker_config: Option<PathBuf>,
    /// Bytes of blobs that are kept when nobody uses them.
    pub cap_bytes: u64,
    /// Of one image.
    pub limits: Limits,
}

impl Default for Options {
    fn default() -> Self {
        let limits = Limits::default();
        Self { mirrors: Vec::new(), docker_config: None, cap_bytes: 20 << 30, limits }
    }
}

/// What an image has become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Made {
    /// Length of the file: the size of the disk.
    pub bytes: u64,
    /// Of them, what the file system uses; the rest is holes.
    pub used_bytes: u64,
}

/// Images; cheap to clone.
#[derive(Debug, Clone)]
pub struct Images {
    cache: Arc<Cache>,
    registries: Arc<Registries>,
    limits: Arc<Limits>,
}

impl Images {
    /// Opens the cache in `dir`, which is made when it is missing, and removes what a crash has left there. One for each
    /// directory. Blocks.
    ///
    /// # Errors
    /// `Io`, `DiskFull`.
    pub fn open(dir: PathBuf, options: Options) -> Result<Self, Error> {
        let Options { mirrors, docker_config, cap_bytes, limits } = options;
        let cache = Cache::open(&dir, cap_bytes)
            .map_err(|error| Error::io(format!("opening the cache of images in {}", dir.display()), error))?;
        let registries = Registries::new(limits.clone(), mirrors, docker_config);
        Ok(Self { cache, registries, limits: Arc::new(limits) })
    }

    /// Finds the image that `source` means now, for linux/amd64. Of a registry its manifests and its configuration are pulled.
    ///
    /// `told` gets lines of progress.
    ///
    /// # Errors
    /// Every [`Error`] but `TooSmall`. It may be dropped.
    pub async fn resolve(&self, source: &Source, told: &Told) -> Result<Resolved, Error> {
        let limits = Arc::clone(&self.limits);
        match source {
            Source::Scratch => Ok(Resolved::scratch()),
            Source::Registry { reference, credentials, reach } => {
                let credentials = credentials.clone();
                let (registries, cache) = (&self.registries, &self.cache);
                resolve::of_registry(registries, cache, &limits, reference, credentials, *reach, told).await
            }
            Source::Layout(path) => {
                local(path, move |path| resolve::of_local(Local::layout(path)?, shown(path), &limits)).await
            }
            Source::Archive(path) => {
                local(path, move |path| {
                    resolve::of_local(Local::archive(path, &limits)?, shown(path), &limits)
                })
                .await
            }
        }
    }

    /// Makes of `image` the ext4 file `target`, which is not there yet. Layers that are missing are pulled first.
    ///
    /// `disk_bytes` is the size of the file, which is sparse; without one there is room for the image, 30 % of it and
    /// 256 MiB. `told` gets lines of progress.
    ///
    /// # Errors
    /// Every [`Error`]; `target` is then not there. It may be dropped: what goes on in another thread ends soon, and leaves
    /// nothing.
    pub async fn make(
        &self,
        image: &Resolved,
        target: &Path,
        disk_bytes: Option<u64>,
        told: &Told,
    ) -> Result<Made, Error> {
        let written = make::make(&self.cache, &self.limits, image, target, disk_bytes, told).await?;
        Ok(Made { bytes: written.bytes, used_bytes: written.used_bytes })
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

async fn local(
    path: &Path,
    find: impl FnOnce(&Path) -> Result<Resolved, Error> + Send + 'static,
) -> Result<Resolved, Error> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || find(&path)).await.map_err(|error| Error::ended(&error))?
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Builds run as tasks.
    #[test]
    fn everything_can_be_sent_to_another_thread() {
        fn is_send<T: Send>(_: T) {}
        let directory = tempfile::tempdir().unwrap();
        let images = Images::open(directory.path().to_owned(), Options::default()).unwrap();
        is_send(images.resolve(&Source::Layout(PathBuf::new()), &|_| ()));
        is_send(async {
            let source =
                Source::Registry { reference: String::new(), credentials: None, reach: Reach::Public };
            let image = images.resolve(&source, &|_| ()).await?;
            images.make(&image, Path::new("x"), None, &|_| ()).await
        });
    }
}
