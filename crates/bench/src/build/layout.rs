//! Images of containers as manifests and blobs: read from an OCI layout or made of archives, and set apart by a label.
//!
//! A label changes the digest of an image and nothing of its layers: what is keyed by the image is new, and the bytes that are
//! pulled are the same. Who writes: nobody; blobs stay in the files that they are in.
//!
//! Source: OCI image specification, `image-layout.md`, `manifest.md`, `config.md`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kelvin_api::digest::{hex, sha256};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// Bytes of an index, a manifest or a configuration.
const MOST_JSON: u64 = 4 << 20;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// The label that sets images apart.
const LABEL: &str = "kelvin.bench";

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("reading {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is not what the specification says.
    #[error("{} is no OCI image layout with one image for linux/amd64: {why}", path.display())]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What of it.
        why: String,
    },
}

/// Where the bytes of a blob are.
#[derive(Debug, Clone)]
pub(crate) enum Blob {
    Bytes(Arc<Vec<u8>>),
    File(PathBuf),
}

/// An image.
#[derive(Debug, Clone)]
pub struct Image {
    /// Its manifest, JSON.
    pub(crate) manifest: Arc<Vec<u8>>,
    /// Configuration and layers by their digests, which begin with `sha256:`.
    pub(crate) blobs: BTreeMap<String, Blob>,
    layers: usize,
    compressed: u64,
}

fn malformed(path: &Path, why: impl Into<String>) -> Error {
    Error::Malformed { path: path.to_owned(), why: why.into() }
}

fn json(path: &Path) -> Result<Value, Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MOST_JSON + 1).read_to_end(&mut bytes)).map_err(io)?;
    if bytes.len() as u64 > MOST_JSON {
        return Err(malformed(path, "more than 4 MiB of JSON"));
    }
    serde_json::from_slice(&bytes).map_err(|error| malformed(path, error.to_string()))
}

/// The file of the blob that `descriptor` names. Nothing but a digest becomes a path.
fn blob_path(layout: &Path, descriptor: &Value) -> Result<(String, PathBuf), Error> {
    let digest = descriptor["digest"].as_str().unwrap_or_default();
    let hex = digest.strip_prefix("sha256:").unwrap_or_default();
    if hex.len() != 64 || !hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(malformed(layout, format!("{digest:?} is no SHA-256 digest")));
    }
    Ok((digest.to_owned(), layout.join("blobs/sha256").join(hex)))
}

fn digest_of(path: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut file = File::open(path)?;
    let mut piece = vec![0; 1 << 20];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(format!("sha256:{}", hex(&hasher.finalize()))),
            count => hasher.update(&piece[..count]),
        }
    }
}

impl Image {
    /// The image of the layout in the directory `layout`: its only one, or the one for linux/amd64.
    ///
    /// # Errors
    /// `Io`, `Malformed`.
    pub fn of_layout(layout: &Path) -> Result<Self, Error> {
        let index_path = layout.join("index.json");
        let index = json(&index_path)?;
        let manifests = index["manifests"].as_array().map(Vec::as_slice).unwrap_or_default();
        let is_ours = |entry: &&Value| {
            entry["platform"]["os"] == "linux" && entry["platform"]["architecture"] == "amd64"
        };
        let descriptor = match manifests {
            [only] => only,
            several => several
                .iter()
                .find(is_ours)
                .ok_or_else(|| malformed(&index_path, "none of its images is the one"))?,
        };
        let (_, path) = blob_path(layout, descriptor)?;
        let manifest = json(&path)?;
        let layers = manifest["layers"].as_array().ok_or_else(|| malformed(&path, "it has no layers"))?;
        let (config, at) = blob_path(layout, &manifest["config"])?;
        let mut blobs = BTreeMap::from([(config, Blob::File(at))]);
        let mut compressed = 0_u64;
        for layer in layers {
            let (digest, at) = blob_path(layout, layer)?;
            let about = at.metadata().map_err(|source| Error::Io { path: at.clone(), source })?;
            compressed = compressed.saturating_add(about.len());
            blobs.insert(digest, Blob::File(at));
        }
        let layers = layers.len();
        Ok(Self { manifest: Arc::new(manifest.to_string().into_bytes()), blobs, layers, compressed })
    }

    /// An image with the content of `archives`, uncompressed tar files, the lowest layer first, and with `config` of its processes.
    ///
    /// # Errors
    /// `Io`.
    pub fn of_archives(archives: &[PathBuf], config: &Value) -> Result<Self, Error> {
        let (mut blobs, mut layers, mut digests, mut bytes) = (BTreeMap::new(), Vec::new(), Vec::new(), 0);
        for path in archives {
            let io = |source| Error::Io { path: path.clone(), source };
            let (digest, size) = (digest_of(path).map_err(io)?, path.metadata().map_err(io)?.len());
            layers.push(json!({ "mediaType": LAYER, "digest": digest, "size": size }));
            digests.push(digest.clone());
            bytes += size;
            blobs.insert(digest, Blob::File(path.clone()));
        }
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": config,
            "rootfs": { "type": "layers", "diff_ids": digests },
        });
        let manifest = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "layers": layers });
        let count = archives.len();
        let image = Self { manifest: Arc::default(), blobs, layers: count, compressed: bytes };
        Ok(image.with(manifest, &config))
    }

    /// The image with that manifest and that configuration.
    fn with(mut self, mut manifest: Value, config: &Value) -> Self {
        let config = config.to_string().into_bytes();
        let digest = format!("sha256:{}", sha256(&config));
        manifest["config"] = json!({ "mediaType": CONFIG, "digest": digest, "size": config.len() });
        self.blobs.insert(digest, Blob::Bytes(Arc::new(config)));
        self.manifest = Arc::new(manifest.to_string().into_bytes());
        self
    }

    /// The same layers as another image: its configuration has a label of that value.
    ///
    /// # Errors
    /// `Io`, `Malformed`.
    pub fn labelled(&self, value: &str) -> Result<Self, Error> {
        let here = Path::new("the image");
        let of_json = |error: serde_json::Error| malformed(here, error.to_string());
        let manifest: Value = serde_json::from_slice(&self.manifest).map_err(of_json)?;
        let digest = manifest["config"]["digest"].as_str().unwrap_or_default();
        let mut config: Value = match self.blobs.get(digest) {
            Some(Blob::Bytes(bytes)) => serde_json::from_slice(bytes).map_err(of_json)?,
            Some(Blob::File(path)) => json(path)?,
            None => return Err(malformed(here, "its configuration is missing")),
        };
        let object =
            config.as_object_mut().ok_or_else(|| malformed(here, "its configuration is no object"))?;
        let settings = object.entry("config").or_insert_with(|| json!({}));
        if !settings.is_object() {
            *settings = json!({});
        }
        if !settings["Labels"].is_object() {
            settings["Labels"] = json!({});
        }
        settings["Labels"][LABEL] = json!(value);
        Ok(self.clone().with(manifest, &config))
    }

    /// Reads all of its files, so that who pulls it first is not the one who waits for a disk.
    ///
    /// # Errors
    /// `Io`.
    pub fn read_all(&self) -> Result<(), Error> {
        for blob in self.blobs.values() {
            if let Blob::File(path) = blob {
                let read = File::open(path).and_then(|mut file| io::copy(&mut file, &mut io::sink()));
                read.map_err(|source| Error::Io { path: path.clone(), source })?;
            }
        }
        Ok(())
    }

    /// Its layers.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Bytes of its layers as they are pulled.
    pub fn compressed_bytes(&self) -> u64 {
        self.compressed
    }

    /// The media type of its manifest.
    pub(crate) fn media_type(&self) -> &'static str {
        MANIFEST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(image: &Image) -> Value {
        serde_json::from_slice(&image.manifest).unwrap()
    }

    /// Writes `image` as a layout.
    fn write(image: &Image, directory: &Path) {
        std::fs::create_dir_all(directory.join("blobs/sha256")).unwrap();
        let put = |digest: &str, bytes: &[u8]| {
            std::fs::write(directory.join("blobs/sha256").join(&digest[7..]), bytes).unwrap();
        };
        for (digest, blob) in &image.blobs {
            match blob {
                Blob::Bytes(bytes) => put(digest, bytes),
                Blob::File(path) => put(digest, &std::fs::read(path).unwrap()),
            }
        }
        let digest = format!("sha256:{}", sha256(&image.manifest));
        put(&digest, &image.manifest);
        let index = json!({ "manifests": [{ "digest": digest }] });
        std::fs::write(directory.join("index.json"), index.to_string()).unwrap();
    }

    #[test]
    fn a_label_makes_another_image_of_the_same_layers() {
        let directory = tempfile::tempdir().unwrap();
        let archive = directory.path().join("layer.tar");
        std::fs::write(&archive, vec![0; 1024]).unwrap();
        let image = Image::of_archives(&[archive], &json!({ "User": "app" })).unwrap();
        let (one, two) = (image.labelled("1").unwrap(), image.labelled("2").unwrap());
        assert_ne!(one.manifest, two.manifest);
        assert_eq!(manifest(&one)["layers"], manifest(&two)["layers"]);
        assert_eq!(one.manifest, image.labelled("1").unwrap().manifest);
        let digest = manifest(&two)["config"]["digest"].as_str().unwrap().to_owned();
        let Some(Blob::Bytes(config)) = two.blobs.get(&digest) else { panic!("no configuration") };
        let config: Value = serde_json::from_slice(config).unwrap();
        assert_eq!(config["config"], json!({ "User": "app", "Labels": { LABEL: "2" } }));
        // From a layout it is the same.
        write(&two, &directory.path().join("layout"));
        let read = Image::of_layout(&directory.path().join("layout")).unwrap();
        assert_eq!((read.layers(), read.compressed_bytes()), (1, 1024));
        assert_eq!(manifest(&read), manifest(&two));
        assert_eq!(read.labelled("3").unwrap().manifest, image.labelled("3").unwrap().manifest);
    }

    #[test]
    fn what_is_no_layout_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let index = directory.path().join("index.json");
        let shown = |error: Error| kelvin_api::error::chain(&error);
        let read = || Image::of_layout(directory.path()).map_err(shown).unwrap_err();
        assert!(read().contains("reading"));
        for (text, why) in [
            ("{", "EOF"),
            (r#"{"manifests":[]}"#, "none of its images"),
            (r#"{"manifests":[{"digest":"sha256:../../etc/passwd"}]}"#, "no SHA-256 digest"),
            (r#"{"manifests":[{"digest":"a"},{"digest":"b"}]}"#, "none of its images"),
        ] {
            std::fs::write(&index, text).unwrap();
            assert!(read().contains(why), "{text}: {}", read());
        }
        std::fs::write(&index, vec![b' '; usize::try_from(MOST_JSON).unwrap() + 1]).unwrap();
        assert!(read().contains("4 MiB"));
    }
}
