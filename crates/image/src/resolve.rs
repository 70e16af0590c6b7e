//! From a source to an image that is pinned: its digest, its configuration, and where its layers are.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use crate::cache::Cache;
use crate::config::{self, Config};
use crate::digest::Digest;
use crate::error::Error;
use crate::limits::Limits;
use crate::local::{Local, step};
use crate::manifest::{self, Descriptor, Document, Manifest};
use crate::reference::Reference;
use crate::registry::credentials::Credentials;
use crate::registry::reach::Reach;
use crate::registry::{Registries, Session};
use crate::told::Told;

/// What decides, beside the layers, about the file that is made of them. It changes with everything that changes that file.
const MAKER: &str = "kelvin-image 1, mkext4 0.0.3";

/// Where an image is.
#[derive(Debug, Clone)]
pub enum Source {
    /// In a registry.
    Registry {
        /// As for `docker pull`.
        reference: String,
        /// Of this request; without them those of Docker's configuration.
        credentials: Option<Credentials>,
        /// Where the registry, and what it sends a pull to, may be. Mirrors are the operator's, and may be anywhere.
        reach: Reach,
    },
    /// In an OCI image layout, a directory.
    Layout(PathBuf),
    /// In an archive that `docker save` or `skopeo copy` has written.
    Archive(PathBuf),
    /// Nowhere: the image without a layer and without a setting.
    Scratch,
}

/// Who has the layers.
#[derive(Debug, Clone)]
pub(crate) enum Origin {
    Registry(Arc<Session>),
    Local(Arc<Local>),
    /// There are none.
    Nobody,
}

/// A layer, lowest first.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    /// What the manifest says; `docker save` says nothing.
    pub(crate) descriptor: Option<Descriptor>,
    /// In a local source: its file.
    pub(crate) name: String,
    /// Of its tar archive.
    pub(crate) diff_id: Digest,
}

/// An image that is found and pinned: what a tag means later changes nothing. It holds the credentials that it was found with
/// and does not show them.
#[derive(Debug, Clone)]
pub struct Resolved {
    shown: String,
    digest: String,
    key: Digest,
    config: Config,
    pub(crate) layers: Vec<Layer>,
    pub(crate) origin: Origin,
}

impl Resolved {
    fn new(
        shown: String,
        digest: &Digest,
        read: config::Read,
        layers: Vec<(String, Option<Descriptor>)>,
        origin: Origin,
    ) -> Self {
        let mut key = Sha256::new();
        key.update(MAKER);
        if let Origin::Registry(session) = &origin {
            key.update(session.reference.full_repository());
            key.update("\n");
        }
        for id in &read.diff_ids {
            key.update(id.to_string());
        }
        let layers = layers
            .into_iter()
            .zip(read.diff_ids)
            .map(|((name, descriptor), diff_id)| Layer { descriptor, name, diff_id })
            .collect();
        let (digest, key) = (digest.to_string(), Digest::finish(key));
        Self { shown, digest, key, config: read.config, layers, origin }
    }

    /// `sha256:…` of the manifest for linux/amd64; of the configuration where there is no manifest, as in what `docker save`
    /// writes. Empty of the image without a layer.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// What the image says about processes in it.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Over everything that decides about the ext4 file's content, apart from the disk's size: the layers' archives and the
    /// version of what lays them over each other; and over the repository of a registry's image. What the configuration says of
    /// layers is not proven before they are read, so that a file that is kept under this key is of use to who may pull from the
    /// same repository, and to nobody else. 64 hexadecimal digits.
    pub fn key(&self) -> String {
        self.key.hex().to_owned()
    }

    /// The image without a layer.
    pub(crate) fn scratch() -> Self {
        let read = config::Read { config: Config::default(), diff_ids: Vec::new() };
        let image = Self::new("scratch".to_owned(), &Digest::of(b""), read, Vec::new(), Origin::Nobody);
        Self { digest: String::new(), ..image }
    }

    /// As people know it.
    pub(crate) fn shown(&self) -> &str {
        &self.shown
    }
}

/// Finds the image that `reference` means now.
pub(crate) async fn of_registry(
    registries: &Arc<Registries>,
    cache: &Arc<Cache>,
    limits: &Limits,
    reference: &str,
    credentials: Option<Credentials>,
    reach: Reach,
    told: &Told,
) -> Result<Resolved, Error> {
    let reference = Reference::parse(reference)?;
    let shown = reference.to_string();
    let session = Arc::new(registries.session(reference, credentials, reach).await?);
    let refused = |part: &str, why| Error::refused(format!("the {part} of {shown}"), why);
    let (mut wanted, mut expected) = (session.reference.wanted(), session.reference.digest.clone());
    let mut size = None;
    let mut seen = BTreeSet::new();
    let (manifest, digest): (Manifest, Digest) = loop {
        let fetched = session.document(&wanted, expected.as_ref(), told).await?;
        if let Some(expected) = size
            && expected != fetched.bytes.len() as u64
        {
            let found = fetched.bytes.len() as u64;
            return Err(refused("manifest", crate::error::Refusal::Size { expected, found }));
        }
        let document = manifest::read(&fetched.bytes, fetched.content_type.as_deref(), limits)
            .map_err(|why| refused("manifest", why))?;
        match document {
            Document::Manifest(manifest) => break (manifest, fetched.digest),
            Document::Next(next) => {
                // The index itself may come again no more than any other.
                seen.insert(fetched.digest);
                step(&mut seen, &next.digest).map_err(|why| refused("index", why))?;
                wanted = next.digest.to_string();
                (expected, size) = (Some(next.digest), Some(next.size));
            }
        }
    };
    told(&format!("{shown} is {digest}"));
    let pinned = session.blob(cache, &manifest.config, "configuration", told).await?;
    let expected = manifest.config.digest.clone();
    let limit = limits.config_bytes;
    let bytes = tokio::task::spawn_blocking(move || {
        use std::io::Read as _;
        let mut bytes = Vec::new();
        let file = pinned.open()?;
        file.take(limit)
            .read_to_end(&mut bytes)
            .map_err(|error| Error::io("reading a configuration", error))?;
        if Digest::of(&bytes) != expected {
            // A crash, or the disk: the next try pulls it anew.
            pinned.forget();
            return Err(Error::io("reading a configuration", std::io::ErrorKind::InvalidData.into()));
        }
        Ok(bytes)
    })
    .await
    .map_err(|error| Error::ended(&error))??;
    let read =
        config::read(&bytes, manifest.layers.len(), limits).map_err(|why| refused("configuration", why))?;
    let layers = manifest.layers.into_iter().map(|layer| (String::new(), Some(layer))).collect();
    Ok(Resolved::new(shown, &digest, read, layers, Origin::Registry(session)))
}

/// Finds the image in `local`, which is called `shown`. Blocks.
pub(crate) fn of_local(local: Local, shown: String, limits: &Limits) -> Result<Resolved, Error> {
    let found = local.find(limits).map_err(|fault| fault.of(&shown))?;
    let read = config::read(&found.config, found.layers.len(), limits)
        .map_err(|why| Error::refused(format!("the configuration of {shown}"), why))?;
    Ok(Resolved::new(shown, &found.digest, read, found.layers, Origin::Local(Arc::new(local))))
}
