//! Images of containers, by `kelvin-image`.
//!
//! Who writes: that crate, below `image-cache/` of the data directory; a crash leaves parts of blobs, which go on or are removed
//! when it is opened.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use kelvin_api::error::Failure;
use kelvin_image::{Config, Credentials, Images, Mirror, Resolved, Source};

use crate::build::image::{BaseImage, BaseImages, ImageConfig, ImageSource, Told};
use crate::build::plan::ImageFacts;
use crate::options::Options;

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
            ImageSource::Registry { reference, credentials } => Source::Registry {
                reference: reference.to_owned(),
                credentials: credentials.map(|known| Credentials {
                    username: known.username.clone(),
                    password: known.password.clone(),
                }),
            },
            ImageSource::Layout(path) => Source::Layout(path.to_owned()),
            ImageSource::Archive(path) => Source::Archive(path.to_owned()),
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
        let digest = Some(self.found.digest().to_owned());
        let facts = ImageFacts { digest, labels, entrypoint, cmd, exposed_ports, stop_signal };
        ImageConfig { env, workdir, user, facts }
    }

    async fn make(&self, target: &Path, disk_bytes: u64, told: &Told) -> Result<(), Failure> {
        self.images.make(&self.found, target, Some(disk_bytes), told).await.map(drop).map_err(failed)
    }
}
