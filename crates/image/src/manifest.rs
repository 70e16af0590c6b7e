//! Manifests and indexes, of OCI and of Docker, as hostile text.
//!
//! What a document is follows from its shape, and its media types have to agree: one that could be read as both is refused.
//! Source: OCI image specification, `manifest.md`, `image-index.md`; Docker's "Image Manifest Version 2, Schema 2".

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::digest::Digest;
use crate::error::{Refusal, shown};
use crate::limits::Limits;

/// Media types that a registry is asked for.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json";
const INDEXES: [&str; 2] =
    ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
const MANIFESTS: [&str; 2] =
    ["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];
const LAYERS: [&str; 6] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];
/// Entries of an index.
const MAX_ENTRIES: usize = 1024;
/// Indexes inside each other.
pub(crate) const MAX_NESTED: usize = 4;

/// What points at a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// An image for one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    /// Lowest first.
    pub(crate) layers: Vec<Descriptor>,
}

/// A manifest, or the way to one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Document {
    Manifest(Manifest),
    /// The entry of an index that is for our platform, or that does not say for which.
    Next(Descriptor),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: Option<String>,
    digest: String,
    size: u64,
    #[serde(default)]
    urls: Option<Vec<String>>,
    #[serde(default)]
    platform: Option<RawPlatform>,
    #[serde(default)]
    annotations: Option<RawAnnotations>,
}

#[derive(Deserialize)]
struct RawPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
}

#[derive(Deserialize)]
struct RawAnnotations {
    /// `attestation-manifest`: BuildKit's statement about the image beside it.
    #[serde(default, rename = "vnd.docker.reference.type")]
    reference: Option<String>,
    /// What the image is called, in a layout that has several.
    #[serde(default, rename = "org.opencontainers.image.ref.name")]
    name: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    manifests: Option<Vec<RawDescriptor>>,
    #[serde(default)]
    config: Option<RawDescriptor>,
    #[serde(default)]
    layers: Option<Vec<RawDescriptor>>,
    #[serde(default)]
    fs_layers: Option<IgnoredAny>,
}

impl RawDescriptor {
    fn read(&self) -> Result<Descriptor, Refusal> {
        Ok(Descriptor { digest: Digest::parse(&self.digest)?, size: self.size })
    }
}

/// Reads JSON; a repeated field is an error.
pub(crate) fn json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Refusal> {
    serde_json::from_slice(bytes).map_err(|error| Refusal::Json(shown(error.to_string().as_bytes())))
}

/// Reads a manifest or an index and chooses of the latter what is for linux/amd64.
///
/// `content_type` is what the source calls it, where it says so.
///
/// # Errors
/// Every [`Refusal`] about documents.
pub(crate) fn read(bytes: &[u8], content_type: Option<&str>, limits: &Limits) -> Result<Document, Refusal> {
    if bytes.len() as u64 > limits.manifest_bytes {
        return Err(Refusal::Limit { what: "bytes of a manifest", limit: limits.manifest_bytes });
    }
    let raw: RawDocument = json(bytes)?;
    if raw.fs_layers.is_some() {
        return Err(Refusal::MediaType("of Docker's schema 1, which is not supported".to_owned()));
    }
    let is_index = raw.manifests.is_some();
    let is_manifest = raw.layers.is_some() || raw.config.is_some();
    if is_index && is_manifest {
        return Err(Refusal::Ambiguous("an index and a manifest at once"));
    }
    // What the document says of itself comes first: some registries send another type, or none.
    let said = raw.media_type.as_deref().or(content_type.filter(|said| said.starts_with("application/vnd.")));
    if let Some(said) = said {
        let fits = if is_index { INDEXES.contains(&said) } else { MANIFESTS.contains(&said) };
        if !fits {
            return Err(Refusal::MediaType(format!("{} of a document", shown(said.as_bytes()))));
        }
    }
    match (raw.manifests, raw.config, raw.layers) {
        (Some(entries), _, _) => choose(&entries).map(Document::Next),
        (None, Some(config), Some(layers)) => manifest(&config, &layers, limits).map(Document::Manifest),
        _ => Err(Refusal::Json("neither a manifest nor an index".to_owned())),
    }
}

fn manifest(config: &RawDescriptor, layers: &[RawDescriptor], limits: &Limits) -> Result<Manifest, Refusal> {
    if layers.len() > limits.layers {
        return Err(Refusal::Limit { what: "layers", limit: limits.layers as u64 });
    }
    if config.size > limits.config_bytes {
        return Err(Refusal::Limit { what: "bytes of the configuration", limit: limits.config_bytes });
    }
    let config = config.read()?;
    let layers = layers
        .iter()
        .map(|layer| {
            layer_type(layer)?;
            if layer.size > limits.layer_bytes {
                return Err(Refusal::Limit { what: "bytes of a layer", limit: limits.layer_bytes });
            }
            layer.read()
        })
        .collect::<Result<_, _>>()?;
    Ok(Manifest { config, layers })
}

/// Refuses layers that are somewhere else, encrypted, or no tar archives. How one is compressed is looked up in its bytes.
fn layer_type(layer: &RawDescriptor) -> Result<(), Refusal> {
    let said = layer.media_type.as_deref().unwrap_or_default();
    let refuse = |why: &str| Err(Refusal::MediaType(format!("{} of a layer: {why}", shown(said.as_bytes()))));
    if said.ends_with("+encrypted") {
        return refuse("encrypted layers are not supported");
    }
    if said.contains(".nondistributable.")
        || said.contains(".foreign.")
        || layer.urls.as_ref().is_some_and(|urls| !urls.is_empty())
    {
        return refuse("foreign layers are not supported");
    }
    if !LAYERS.contains(&said) {
        return refuse("it is no tar archive, plain or compressed with gzip or zstd");
    }
    Ok(())
}

fn choose(entries: &[RawDescriptor]) -> Result<Descriptor, Refusal> {
    if entries.len() > MAX_ENTRIES {
        return Err(Refusal::Limit { what: "entries of an index", limit: MAX_ENTRIES as u64 });
    }
    let is_image = |entry: &&RawDescriptor| {
        let is_statement = entry.annotations.as_ref().is_some_and(|notes| notes.reference.is_some());
        let said = entry.media_type.as_deref().unwrap_or(MANIFESTS[0]);
        !is_statement && (INDEXES.contains(&said) || MANIFESTS.contains(&said))
    };
    let images = || entries.iter().filter(is_image);
    let ours = |entry: &&RawDescriptor| {
        entry.platform.as_ref().is_some_and(|it| it.os == "linux" && it.architecture == "amd64")
    };
    // Level v1 is what every processor has; v2 and later are taken when there is nothing else.
    let level = |entry: &&RawDescriptor| match entry.platform.as_ref().and_then(|it| it.variant.as_deref()) {
        None | Some("" | "v1") => 0,
        Some("v2") => 1,
        Some(_) => 2,
    };
    if let Some(entry) = images().filter(ours).min_by_key(level) {
        let name = |entry: &RawDescriptor| entry.annotations.as_ref().and_then(|notes| notes.name.clone());
        let is_other = |other: &RawDescriptor| other.digest != entry.digest && name(other).is_some();
        if name(entry).is_some() && images().filter(ours).any(is_other) {
            return Err(Refusal::Ambiguous("it has several images by name; keep one"));
        }
        return entry.read();
    }
    let mut unsaid = Vec::new();
    for entry in images().filter(|entry| entry.platform.is_none()) {
        let descriptor = entry.read()?;
        if !unsaid.contains(&descriptor) {
            unsaid.push(descriptor);
        }
    }
    match (unsaid.len(), unsaid.pop()) {
        (1, Some(entry)) => Ok(entry),
        (0, _) | (_, None) => {
            let mut others: Vec<_> = images()
                .filter_map(|entry| entry.platform.as_ref())
                .map(|it| format!("{}/{}", it.os, it.architecture))
                .collect();
            others.dedup();
            let others = if others.is_empty() { "nothing".to_owned() } else { others.join(", ") };
            Err(Refusal::Platform(shown(others.as_bytes())))
        }
        _ => Err(Refusal::Ambiguous("the index has several images and does not say for which platform")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(text: &str) -> String {
        Digest::of(text.as_bytes()).to_string()
    }

    fn entry(of: &str, platform: &str) -> String {
        format!(r#"{{"mediaType":"{}","digest":"{}","size":1{platform}}}"#, MANIFESTS[0], digest(of))
    }

    fn platform(os: &str, architecture: &str, variant: &str) -> String {
        format!(r#","platform":{{"os":"{os}","architecture":"{architecture}","variant":"{variant}"}}"#)
    }

    fn index(entries: &[String]) -> Result<Document, Refusal> {
        let text = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
        read(text.as_bytes(), None, &Limits::default())
    }

    fn layer(media_type: &str, more: &str) -> Result<Document, Refusal> {
        let text = format!(
            r#"{{"config":{{"digest":"{0}","size":1}},"layers":[{{"mediaType":"{media_type}","digest":"{0}","size":1{more}}}]}}"#,
            digest("x")
        );
        read(text.as_bytes(), None, &Limits::default())
    }

    #[test]
    fn our_platform_is_chosen() {
        let chosen = |entries: &[String]| match index(entries) {
            Ok(Document::Next(next)) => next.digest.to_string(),
            other => panic!("{other:?}"),
        };
        let many = [
            entry("arm", &platform("linux", "arm64", "v8")),
            entry("v3", &platform("linux", "amd64", "v3")),
            entry("v1", &platform("linux", "amd64", "")),
            entry("unknown", &platform("unknown", "unknown", "")),
        ];
        assert_eq!(chosen(&many), digest("v1"));
        assert_eq!(chosen(&many[..2]), digest("v3"));
        assert_eq!(chosen(&[entry("only", "")]), digest("only"));
        assert_eq!(chosen(&[entry("only", ""), entry("only", "")]), digest("only"));
        assert!(matches!(index(&many[..1]), Err(Refusal::Platform(others)) if others == "linux/arm64"));
        assert!(matches!(index(&[entry("a", ""), entry("b", "")]), Err(Refusal::Ambiguous(_))));
        assert!(matches!(index(&[]), Err(Refusal::Platform(_))));
        let named = |name: &str| {
            let notes = format!(r#","annotations":{{"org.opencontainers.image.ref.name":"{name}"}}"#);
            entry(name, &format!("{}{notes}", platform("linux", "amd64", "")))
        };
        assert_eq!(chosen(&[named("a"), named("a")]), digest("a"));
        assert!(matches!(index(&[named("a"), named("b")]), Err(Refusal::Ambiguous(_))));
        let notes = r#","annotations":{"vnd.docker.reference.type":"attestation-manifest"}"#;
        assert!(matches!(index(&[entry("statement", notes)]), Err(Refusal::Platform(_))));
    }

    #[test]
    fn layers_that_are_not_ours_are_refused_by_name() {
        for kind in LAYERS {
            assert!(layer(kind, "").is_ok(), "{kind}");
        }
        for (kind, more, why) in [
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "", "foreign"),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "", "foreign"),
            (LAYERS[1], r#","urls":["https://a.example/x"]"#, "foreign"),
            ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "", "encrypted"),
            ("application/vnd.oci.image.layer.v1.tar+xz", "", "no tar"),
            ("", "", "no tar"),
        ] {
            let refused = layer(kind, more).unwrap_err();
            assert!(matches!(&refused, Refusal::MediaType(text) if text.contains(why)), "{kind}: {refused}");
        }
    }

    #[test]
    fn documents_that_lie_are_refused() {
        let limits = Limits { manifest_bytes: 5000, layers: 2, ..Limits::default() };
        let one = format!(r#"{{"mediaType":"{}","digest":"{}","size":1}}"#, LAYERS[0], digest("x"));
        let json = |text: &str| read(text.as_bytes(), None, &limits).unwrap_err();
        let is_json = |why: &Refusal| matches!(why, Refusal::Json(_));
        for bad in [
            "",
            "[]",
            "{}",
            "null",
            r#"{"layers":[]}"#,
            r#"{"config":{"digest":"x","size":-1},"layers":[]}"#,
            r#"{"config":{"digest":"x","size":1.5},"layers":[]}"#,
            &format!(r#"{{"layers":[],"layers":[],"config":{one}}}"#),
            &format!(r#"{{"config":{one},"layers":[{}]}}"#, one.replace("\"size\":1", "\"size\":-1")),
        ] {
            assert!(is_json(&json(bad)), "{bad}");
        }
        let both = format!(r#"{{"manifests":[],"config":{one},"layers":[]}}"#);
        assert!(matches!(json(&both), Refusal::Ambiguous(_)));
        let lies = format!(r#"{{"mediaType":"{}","config":{one},"layers":[]}}"#, INDEXES[0]);
        assert!(matches!(json(&lies), Refusal::MediaType(_)));
        let old = r#"{"schemaVersion":1,"fsLayers":[]}"#;
        assert!(matches!(json(old), Refusal::MediaType(text) if text.contains("schema 1")));
        let sha512 = one.replace("sha256", "sha512");
        let other = format!(r#"{{"config":{sha512},"layers":[]}}"#);
        assert!(matches!(json(&other), Refusal::Algorithm(_)));
        let many = format!(r#"{{"config":{one},"layers":[{one},{one},{one}]}}"#);
        assert!(matches!(json(&many), Refusal::Limit { what: "layers", .. }));
        let long = format!(r#"{{"config":{one},"layers":[]}}{}"#, " ".repeat(5000));
        assert!(matches!(json(&long), Refusal::Limit { what: "bytes of a manifest", .. }));
        let deep = format!(r#"{{"x":{}"#, "[".repeat(4000));
        assert!(is_json(&json(&deep)));
    }
}
