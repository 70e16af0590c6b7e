//! Images that are on the host already: an OCI image layout in a directory or in an archive, and what `docker save` writes.
//!
//! Nothing is unpacked: an archive is read through once for where its members are. No link is followed out of the directory
//! or the archive, and nothing but a regular file is opened.
//!
//! Source: OCI image specification, `image-layout.md`; moby `image/tarexport`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use serde::Deserialize;

use crate::digest::Digest;
use crate::error::{Error, Fault, Refusal, shown};
use crate::limits::Limits;
use crate::manifest::{self, Descriptor, Document, MAX_NESTED, Manifest};
use crate::tar::{Archive, EntryKind};

/// Members of an archive.
const MAX_MEMBERS: u64 = 16_384;
/// Links behind links between members.
const MAX_FOLLOWED: usize = 8;

/// Where files of an image are.
#[derive(Debug)]
pub(crate) enum Local {
    Directory(OwnedFd),
    Archive { file: Arc<File>, members: BTreeMap<String, Member> },
}

#[derive(Debug)]
pub(crate) enum Member {
    /// Offset and length.
    File(u64, u64),
    /// Another member.
    Link(String),
}

/// A file, and its length.
pub(crate) type Opened = (Box<dyn Read + Send>, u64);

/// What a local source says about an image.
pub(crate) struct Found {
    /// Of its manifest; of its configuration where there is no manifest.
    pub(crate) digest: Digest,
    pub(crate) config: Vec<u8>,
    /// Members with the layers, lowest first, and what the manifest says of them.
    pub(crate) layers: Vec<(String, Option<Descriptor>)>,
}

/// `manifest.json` of `docker save`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    layers: Vec<String>,
}

/// Reads a part of a file.
struct Window {
    file: Arc<File>,
    at: u64,
    left: u64,
}

impl Read for Window {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = self.left.min(buffer.len() as u64) as usize;
        let read = self.file.read_at(&mut buffer[..most], self.at)?;
        self.at += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}

/// The path of a member in the archive, as names are compared: without `.` and empty parts; none when it leaves.
fn normal(path: &str) -> Option<String> {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

fn not_found(path: &Path, reason: impl Into<String>) -> Error {
    Error::NotFound { image: path.display().to_string(), reason: reason.into() }
}

fn opening(path: &Path, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => not_found(path, "there is no such file"),
        _ => Error::io(format!("opening {}", path.display()), error),
    }
}

impl Local {
    /// The layout in the directory at `path`.
    pub(crate) fn layout(path: &Path) -> Result<Self, Error> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, path, flags, Mode::empty());
        Ok(Self::Directory(directory.map_err(|error| opening(path, error.into()))?))
    }

    /// The archive at `path`.
    pub(crate) fn archive(path: &Path, limits: &Limits) -> Result<Self, Error> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::openat(CWD, path, flags, Mode::empty());
        let file = File::from(file.map_err(|error| opening(path, error.into()))?);
        if !file.metadata().map_err(|error| opening(path, error))?.is_file() {
            return Err(not_found(path, "it is no regular file"));
        }
        let file = Arc::new(file);
        let members = members(&file, limits).map_err(|fault| fault.of(&path.display().to_string()))?;
        Ok(Self::Archive { file, members })
    }

    /// Opens the file `name`; none when it is not there.
    pub(crate) fn open(&self, name: &str) -> Result<Option<Opened>, Fault> {
        let reading = |source| Fault::Io { what: "reading a local image", source };
        match self {
            Self::Directory(directory) => {
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
                match rustix::fs::openat2(directory, name, flags, Mode::empty(), resolve) {
                    Ok(file) => {
                        let file = File::from(file);
                        let about = file.metadata().map_err(reading)?;
                        if !about.is_file() {
                            let reason = "it is no regular file";
                            return Err(Refusal::Name { name: shown(name.as_bytes()), reason }.into());
                        }
                        Ok(Some((Box::new(file), about.len())))
                    }
                    Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(None),
                    Err(rustix::io::Errno::LOOP | rustix::io::Errno::XDEV) => {
                        let reason = "it is a link, which is not followed";
                        Err(Refusal::Name { name: shown(name.as_bytes()), reason }.into())
                    }
                    Err(error) => Err(reading(error.into())),
                }
            }
            Self::Archive { file, members } => {
                let mut name = name;
                for _ in 0..MAX_FOLLOWED {
                    match members.get(name) {
                        None => return Ok(None),
                        Some(Member::Link(to)) => name = to,
                        Some(&Member::File(at, left)) => {
                            let window = Window { file: Arc::clone(file), at, left };
                            return Ok(Some((Box::new(window), left)));
                        }
                    }
                }
                let reason = "there are links behind links without an end";
                Err(Refusal::Link { name: shown(name.as_bytes()), target: String::new(), reason }.into())
            }
        }
    }

    fn small(&self, name: &str, what: &'static str, limit: u64) -> Result<Option<Vec<u8>>, Fault> {
        let Some((file, size)) = self.open(name)? else { return Ok(None) };
        if size > limit {
            return Err(Refusal::Limit { what, limit }.into());
        }
        let mut bytes = Vec::new();
        file.take(limit + 1).read_to_end(&mut bytes).map_err(Fault::reading)?;
        if bytes.len() as u64 > limit {
            return Err(Refusal::Limit { what, limit }.into());
        }
        Ok(Some(bytes))
    }

    fn blob(&self, descriptor: &Descriptor, what: &'static str, limit: u64) -> Result<Vec<u8>, Fault> {
        let bytes = self
            .small(&blob_name(&descriptor.digest), what, limit)?
            .ok_or(Refusal::Json(format!("the blob {} is missing", descriptor.digest)))?;
        if bytes.len() as u64 != descriptor.size {
            let (expected, found) = (descriptor.size, bytes.len() as u64);
            return Err(Refusal::Size { expected, found }.into());
        }
        descriptor.digest.check(&Digest::of(&bytes))?;
        Ok(bytes)
    }

    /// The image for our platform.
    pub(crate) fn find(&self, limits: &Limits) -> Result<Found, Fault> {
        if let Some(index) = self.small("index.json", "bytes of a manifest", limits.manifest_bytes)? {
            return self.find_in_layout(&index, limits);
        }
        if let Some(saved) = self.small("manifest.json", "bytes of a manifest", limits.manifest_bytes)? {
            return self.find_saved(&saved, limits);
        }
        Err(Refusal::Json("there is neither an index.json nor a manifest.json".to_owned()).into())
    }

    fn find_in_layout(&self, index: &[u8], limits: &Limits) -> Result<Found, Fault> {
        let mut document = manifest::read(index, None, limits)?;
        let mut digest = Digest::of(index);
        let mut seen = BTreeSet::new();
        let manifest: Manifest = loop {
            match document {
                Document::Manifest(manifest) => break manifest,
                Document::Next(next) => {
                    step(&mut seen, &next.digest)?;
                    let bytes = self.blob(&next, "bytes of a manifest", limits.manifest_bytes)?;
                    document = manifest::read(&bytes, None, limits)?;
                    digest = next.digest;
                }
            }
        };
        let config = self.blob(&manifest.config, "bytes of the configuration", limits.config_bytes)?;
        let layers =
            manifest.layers.into_iter().map(|layer| (blob_name(&layer.digest), Some(layer))).collect();
        Ok(Found { digest, config, layers })
    }

    fn find_saved(&self, saved: &[u8], limits: &Limits) -> Result<Found, Fault> {
        let mut images: Vec<Saved> = manifest::json(saved)?;
        let image = match (images.len(), images.pop()) {
            (1, Some(image)) => image,
            _ => return Err(Refusal::Ambiguous("the archive has not exactly one image").into()),
        };
        if image.layers.len() > limits.layers {
            return Err(Refusal::Limit { what: "layers", limit: limits.layers as u64 }.into());
        }
        let name = |path: &str| {
            normal(path).ok_or_else(|| Refusal::Name {
                name: shown(path.as_bytes()),
                reason: "it leaves the archive",
            })
        };
        let config = self
            .small(&name(&image.config)?, "bytes of the configuration", limits.config_bytes)?
            .ok_or(Refusal::Json("the configuration is missing".to_owned()))?;
        let layers =
            image.layers.iter().map(|layer| Ok((name(layer)?, None))).collect::<Result<_, Refusal>>()?;
        Ok(Found { digest: Digest::of(&config), config, layers })
    }
}

/// One step further into indexes.
pub(crate) fn step(seen: &mut BTreeSet<Digest>, next: &Digest) -> Result<(), Refusal> {
    if !seen.insert(next.clone()) {
        return Err(Refusal::Loop);
    }
    if seen.len() > MAX_NESTED {
        return Err(Refusal::Limit { what: "indexes inside each other", limit: MAX_NESTED as u64 });
    }
    Ok(())
}

pub(crate) fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn members(file: &Arc<File>, limits: &Limits) -> Result<BTreeMap<String, Member>, Fault> {
    let reading = |source| Fault::Io { what: "reading an archive", source };
    let mut magic = [0; 6];
    let read = file.read_at(&mut magic, 0).map_err(reading)?;
    if magic[..read].starts_with(&[0x1f, 0x8b]) || magic[..read].starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let why = "the archive as a whole is compressed; decompress it first";
        return Err(Refusal::Compression(why.to_owned()).into());
    }
    let bytes = file.metadata().map_err(reading)?.len();
    let limits = Limits { entries: MAX_MEMBERS, ..limits.clone() };
    let mut members = BTreeMap::new();
    // Contents are passed over by offset, not read: an archive may have many gigabytes.
    let (mut at, mut entries) = (0, 0);
    loop {
        let window = Window { file: Arc::clone(file), at, left: bytes.saturating_sub(at) };
        let mut archive = Archive::new(window, &limits, entries);
        let Some(entry) = archive.next()? else { return Ok(members) };
        entries = archive.entries();
        let (place, length) = archive.place();
        let start = at + place;
        at = start + length.next_multiple_of(512);
        if at > bytes.next_multiple_of(512) || start + length > bytes {
            return Err(Refusal::Tar("it is cut short").into());
        }
        let text = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(str::to_owned);
        let Some(name) = text(&entry.path).and_then(|path| normal(&path)) else { continue };
        let member = match entry.kind {
            EntryKind::File if entry.sparse.is_none() => Member::File(start, length),
            EntryKind::HardLink => match text(&entry.link).and_then(|link| normal(&link)) {
                Some(link) => Member::Link(link),
                None => continue,
            },
            EntryKind::Symlink => {
                let parent = name.rsplit_once('/').map_or("", |(parent, _)| parent);
                match text(&entry.link).and_then(|link| normal(&format!("{parent}/{link}"))) {
                    Some(link) => Member::Link(link),
                    None => continue,
                }
            }
            _ => continue,
        };
        members.insert(name, member);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_members_stay_in_the_archive() {
        assert_eq!(normal("./a//b/../c").as_deref(), Some("a/c"));
        assert_eq!(normal("/a").as_deref(), Some("a"));
        for bad in ["..", "a/../..", "../a"] {
            assert_eq!(normal(bad), None);
        }
    }
}
