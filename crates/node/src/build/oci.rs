//! Images of containers, by `kelvin-image`.
//!
//! Who writes: that crate, below `image-cache/` of the data directory; a crash leaves parts of blobs, which go on or are removed
//! when it is opened.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_image::{Config, Credentials, Images, Mirror, Reach, Resolved, Source};
use kelvin_node_api::RegistryReach;

use crate::build::image::{BaseImage, BaseImages, DiskSize, ImageConfig, ImageSource, Told};
use crate::build::plan::ImageFacts;
use crate::options::Options;

/// What is free on the disk of an image that is larger than the usual disk, in bytes, when nobody asks for more.
const ROOM: u64 = 1 << 30;

fn failed(error: kelvin_image::Error) -> Failure {
    error.failure()
}

/// Finds them in registries, layouts and archives.
pub struct OciImages(Images);

struct OciImage {
    images: Images,
    found: Resolved,
}

impl OciImages {
    /// As the options of a node say, with a cache in `directory`. Blocks.
    ///
    /// # Errors
    /// A mirror that is none, and as the cache gives them.
    pub fn open(directory: PathBuf, options: &Options) -> Result<Self, Failure> {
        let mirrors = options.registry_mirrors.iter().map(|text| text.parse::<Mirror>());
        let settings = kelvin_image::Options {
            mirrors: mirrors.collect::<Result<_, _>>().map_err(failed)?,
            docker_config: options.docker_config.clone(),
            cap_bytes: options.image_cache_bytes,
            ..kelvin_image::Options::default()
        };
        Images::open(directory, settings).map(Self).map_err(failed)
    }
}

#[async_trait]
impl BaseImages for OciImages {
    async fn resolve(&self, source: ImageSource<'_>, told: &Told) -> Result<Arc<dyn BaseImage>, Failure> {
        let source = match source {
            ImageSource::Registry { reference, credentials, reach } => Source::Registry {
                reference: reference.to_owned(),
                credentials: credentials.map(|known| Credentials {
                    username: known.username.clone(),
                    password: known.password.clone(),
                }),
                reach: match reach {
                    RegistryReach::Public => Reach::Public,
                    RegistryReach::Any => Reach::Any,
                },
            },
            ImageSource::Layout(path) => Source::Layout(path.to_owned()),
            ImageSource::Archive(path) => Source::Archive(path.to_owned()),
            ImageSource::Scratch => Source::Scratch,
        };
        let found = self.0.resolve(&source, told).await.map_err(failed)?;
        Ok(Arc::new(OciImage { images: self.0.clone(), found }))
    }
}

#[async_trait]
impl BaseImage for OciImage {
    fn key(&self) -> String {
        self.found.key()
    }

    fn config(&self) -> ImageConfig {
        let Config { env, workdir, user, entrypoint, cmd, exposed_ports, stop_signal, labels, .. } =
            self.found.config().clone();
        let digest = Some(self.found.digest().to_owned()).filter(|digest| !digest.is_empty());
        let facts = ImageFacts { digest, labels, entrypoint, cmd, exposed_ports, stop_signal };
        ImageConfig { env, workdir, user, facts }
    }

    async fn make(&self, target: &Path, size: DiskSize, told: &Told) -> Result<(), Failure> {
        let make = |bytes| self.images.make(&self.found, target, bytes, told);
        let (least, free) = match size {
            DiskSize::Exactly(bytes) => return make(Some(bytes)).await.map(drop).map_err(failed),
            DiskSize::Room { least, free } => (least, free),
        };
        // What is used is known when it is made; what is made twice is small in most cases: its blobs are here.
        let needed = match make(Some(least)).await {
            Ok(made) if made.bytes.saturating_sub(made.used_bytes) >= free => return Ok(()),
            Ok(made) => {
                let again = || tokio::fs::remove_file(target);
                again().await.map_err(|error| {
                    let text = format!("a disk that was too small cannot be removed: {error}");
                    Failure::new(ErrorCode::StoreIo, text, "look at the data directory's disk")
                })?;
                made.used_bytes
            }
            Err(kelvin_image::Error::TooSmall { needed_bytes, .. }) => needed_bytes,
            Err(error) => return Err(failed(error)),
        };
        // Journal and inodes grow with the disk: a tenth, and whole MiB.
        let bytes = (needed + needed / 10 + free.max(ROOM)).max(least).next_multiple_of(1 << 20);
        make(Some(bytes)).await.map(drop).map_err(failed)
    }
}
