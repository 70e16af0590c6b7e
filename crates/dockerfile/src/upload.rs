//! Files of one COPY as one upload: a hash of what they are, and a tar that is the same whenever they are.
//!
//! The hash goes over paths, kinds, permissions, the targets of links and contents, and so does the tar: owners are 0, and every
//! time is the same, so that a fresh clone of a repository hits the caches. It is not the epoch's begin, before which a zip
//! archive (a Python wheel) has no times.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kelvin_api::digest::hex;
use kelvin_api::id::FilesHash;
use rustix::fs::OFlags;
use sha2::{Digest, Sha256};

use crate::error::{Error, Fault};

/// 1980-01-02T00:00:00Z.
const TIME: u64 = 315_619_200;
/// Goes into every hash: another form has other hashes.
const FORM: &str = "kelvin-files-1";
/// Bytes that are read at once.
const PIECE: usize = 128 << 10;

/// What a COPY sends.
#[derive(Debug)]
pub struct Upload {
    /// The hash of its content.
    pub hash: FilesHash,
    /// What of the archive is copied: `.` for the content of its root, or the name of its only file.
    pub from: String,
    /// Files, directories and links; 1 for an archive of the context.
    pub entries: u64,
    /// Bytes of the files.
    pub bytes: u64,
    pub(crate) payload: Payload,
    pub(crate) line: u32,
    pub(crate) shown: String,
}

#[derive(Debug)]
pub(crate) enum Payload {
    Tree(Tree),
    /// A file of the context that is a tar, plain or gzip.
    Archive(Content),
}

/// Entries by their paths in the archive: a directory comes before what is in it.
pub(crate) type Tree = BTreeMap<PathBuf, Entry>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub mode: u32,
    pub kind: EntryKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EntryKind {
    Directory,
    Link(PathBuf),
    File(Content),
    Inline(String),
}

/// A file of the context, as it was when it was hashed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Content {
    pub path: PathBuf,
    pub size: u64,
    pub digest: [u8; 32],
}

/// Opens a file that is none of a pipe, a device and a link.
pub(crate) fn open(path: &Path) -> Result<File, Fault> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC).bits();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.cast_signed())
        .open(path)
        .map_err(Fault::io(path))?;
    if !file.metadata().map_err(Fault::io(path))?.is_file() {
        return Err(Fault::Entry { path: path.to_owned(), why: "it has become something else than a file" });
    }
    Ok(file)
}

impl Content {
    /// Reads a file, of `most` bytes at most.
    pub fn of(path: PathBuf, most: u64) -> Result<Self, Fault> {
        let mut reader =
            Hashed { inner: open(&path)?.take(most.saturating_add(1)), hasher: Sha256::new(), size: 0 };
        io::copy(&mut reader, &mut io::sink()).map_err(Fault::io(&path))?;
        Ok(Self { path, size: reader.size, digest: reader.hasher.finalize().into() })
    }

    /// Writes it by `write`, and sees whether it is what was hashed.
    fn copy(&self, write: impl FnOnce(&mut dyn Read) -> io::Result<()>) -> Result<(), Fault> {
        let mut reader = Hashed { inner: open(&self.path)?.take(self.size), hasher: Sha256::new(), size: 0 };
        write(&mut reader).map_err(Fault::io(&self.path))?;
        if reader.size != self.size || <[u8; 32]>::from(reader.hasher.finalize()) != self.digest {
            return Err(Fault::Entry { path: self.path.clone(), why: "it has changed while it was copied" });
        }
        Ok(())
    }
}

/// A reader that hashes what it has read.
struct Hashed<R> {
    inner: R,
    hasher: Sha256,
    size: u64,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(PIECE);
        let read = self.inner.read(&mut buffer[..most])?;
        self.hasher.update(&buffer[..read]);
        self.size += read as u64;
        Ok(read)
    }
}

impl Payload {
    /// The hash of what it is.
    pub fn hash(&self) -> Result<FilesHash, Fault> {
        let mut hasher = Sha256::new();
        let mut add = |bytes: &[u8]| {
            hasher.update((bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        add(FORM.as_bytes());
        match self {
            Self::Archive(content) => {
                add(b"archive");
                add(&content.digest);
            }
            Self::Tree(tree) => {
                for (path, entry) in tree {
                    add(path.as_os_str().as_bytes());
                    add(&entry.mode.to_le_bytes());
                    match &entry.kind {
                        EntryKind::Directory => add(b"directory"),
                        EntryKind::Link(target) => {
                            add(b"link");
                            add(target.as_os_str().as_bytes());
                        }
                        EntryKind::File(content) => {
                            add(b"file");
                            add(&content.digest);
                        }
                        EntryKind::Inline(content) => {
                            add(b"file");
                            add(&Sha256::digest(content.as_bytes()));
                        }
                    }
                }
            }
        }
        let hash = hex(&hasher.finalize());
        hash.parse().map_err(|_| Fault::syntax(format!("{hash} is no hash of files")))
    }

    /// Files, directories and links, and bytes of the files.
    pub fn size(&self) -> (u64, u64) {
        match self {
            Self::Archive(content) => (1, content.size),
            Self::Tree(tree) => {
                let sizes = tree.values().map(|entry| match &entry.kind {
                    EntryKind::File(content) => content.size,
                    EntryKind::Inline(content) => content.len() as u64,
                    EntryKind::Directory | EntryKind::Link(_) => 0,
                });
                (tree.len() as u64, sizes.sum())
            }
        }
    }
}

impl Upload {
    /// Whether it is an archive of the context as it is, which ADD unpacks: it may be gzip, and its entries have owners.
    pub fn is_archive(&self) -> bool {
        matches!(self.payload, Payload::Archive(_))
    }

    /// Writes the archive: a tar, or what the context has. The bytes are the same whenever the hash is.
    ///
    /// # Errors
    /// When a file cannot be read, or is not any more what was hashed: then what was written is of no use. When `to` fails.
    pub fn write(&self, to: &mut dyn Write) -> Result<(), Error> {
        let written = match &self.payload {
            Payload::Archive(content) => content.copy(|reader| io::copy(reader, to).map(drop)),
            Payload::Tree(tree) => write_tar(tree, to),
        };
        written.map_err(|fault| fault.at(self.line, &self.shown))
    }
}

fn write_tar(tree: &Tree, to: &mut dyn Write) -> Result<(), Fault> {
    let mut builder = tar::Builder::new(to);
    for (path, entry) in tree {
        let mut header = tar::Header::new_gnu();
        header.set_mode(entry.mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(TIME);
        header.set_size(0);
        match &entry.kind {
            EntryKind::Directory => {
                header.set_entry_type(tar::EntryType::Directory);
                builder.append_data(&mut header, path, io::empty()).map_err(Fault::io(path))?;
            }
            EntryKind::Link(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                builder.append_link(&mut header, path, target).map_err(Fault::io(path))?;
            }
            EntryKind::File(content) => {
                header.set_size(content.size);
                content.copy(|reader| builder.append_data(&mut header, path, reader))?;
            }
            EntryKind::Inline(content) => {
                header.set_size(content.len() as u64);
                builder.append_data(&mut header, path, content.as_bytes()).map_err(Fault::io(path))?;
            }
        }
    }
    let to = builder.into_inner().map_err(Fault::io(OsStr::new("the archive")))?;
    to.flush().map_err(Fault::io(OsStr::new("the archive")))
}
