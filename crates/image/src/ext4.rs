//! A tree becomes a file system: ext4 with a journal, written by the crate `mkext4`, without a mount and without a process.
//!
//! The same tree gives the same bytes: identity and times follow from the image. The file has no name until it is whole
//! where the host's file system can do that (`O_TMPFILE`); elsewhere a crash leaves a part of it under its name, which is
//! the caller's to remove.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use mkext4::{FsBuilder, InodeCount, InodeHandle, RegionSink, SparseSeg, SpecialKind};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};

use crate::error::{Error, Fault, Refusal};
use crate::spool::Content;
use crate::tree::{Child, Meta, NodeKind, ROOT, Tree, Xattr};

/// Time of the file system itself, and of directories that no layer describes: a second after the epoch, in every image.
const EPOCH: i64 = 1;
const BLOCK: u64 = 4096;
/// Blocks of a group, and inodes that one can have.
const GROUP_BYTES: u64 = 128 << 20;
const GROUP_INODES: u64 = 32_768;
/// Inodes of the file system's own.
const OWN_INODES: u64 = 16;
/// Free space that is there at least when nobody asks for a size.
const ROOM: u64 = 256 << 20;
/// The largest disk: its bitmaps are held in memory.
pub(crate) const MAX_DISK: u64 = 1 << 40;

/// What an image takes on its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) bytes: u64,
    pub(crate) used_bytes: u64,
}

/// A file that becomes `target` when it is whole.
struct Target<'a> {
    file: File,
    path: &'a Path,
    has_name: bool,
}

impl<'a> Target<'a> {
    fn create(path: &'a Path) -> io::Result<Self> {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mode = Mode::RUSR | Mode::WUSR;
        match rustix::fs::openat(CWD, directory, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode) {
            Ok(file) => Ok(Self { file: file.into(), path, has_name: false }),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
                let file = File::options().read(true).write(true).create_new(true).open(path)?;
                Ok(Self { file, path, has_name: true })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Gives it its name.
    fn publish(mut self) -> io::Result<()> {
        if !self.has_name {
            let descriptor = PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
            rustix::fs::linkat(CWD, &descriptor, CWD, self.path, AtFlags::SYMLINK_FOLLOW)?;
        }
        self.has_name = false;
        Ok(())
    }
}

impl Drop for Target<'_> {
    fn drop(&mut self) {
        if self.has_name {
            let _ = std::fs::remove_file(self.path);
        }
    }
}

/// Writes into a file that is zeros where nothing is written, and keeps the superblock.
struct Sink<'a> {
    file: &'a File,
    superblock: Vec<u8>,
    error: Option<io::Error>,
}

impl RegionSink for Sink<'_> {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if offset == 0 {
            self.superblock = bytes.get(1024..2048).unwrap_or_default().to_vec();
        }
        self.file.write_all_at(bytes, offset).inspect_err(|error| {
            // The crate wraps it, and its number is what tells a full disk.
            self.error = error.raw_os_error().map(io::Error::from_raw_os_error);
        })
    }

    fn zeros(&mut self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

/// The data of a file, as the spool has it.
struct Data<'a> {
    spool: &'a File,
    at: u64,
}

impl Read for Data<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.spool.read_at(buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

fn meta(meta: Meta) -> mkext4::Meta {
    let mtime = if meta == Meta::DIRECTORY { (EPOCH, 0) } else { meta.mtime };
    mkext4::Meta::new(meta.mode, meta.uid, meta.gid, mtime)
}

/// Blocks that the tree takes, with what leads to them, generously.
fn blocks(tree: &Tree) -> u64 {
    let mut blocks = 0;
    for node in &tree.nodes {
        blocks += match &node.kind {
            NodeKind::Directory(children) => {
                let names: u64 = children.keys().map(|name| 8 + name.len().next_multiple_of(4) as u64).sum();
                // Leaves of a hashed directory are full but for a name that did not fit.
                1 + names.div_ceil(3800) + names / (3800 * 300)
            }
            NodeKind::File(content) => {
                let extents =
                    content.segments.as_ref().map_or(1, |it| it.len() as u64) + content.data() / GROUP_BYTES;
                content.data().div_ceil(BLOCK) + if extents > 3 { 2 + extents / 300 } else { 0 }
            }
            NodeKind::Symlink(_) => 1,
            _ => 0,
        } + u64::from(!node.xattrs.is_empty());
    }
    blocks
}

/// What a file system of `disk` bytes takes for itself with `inodes` inodes.
fn overhead(disk: u64, inodes: u64) -> u64 {
    let groups = disk.div_ceil(GROUP_BYTES);
    let journal = match disk / BLOCK {
        0..=32_767 => 1024,
        32_768..=262_143 => 4096,
        262_144..=524_287 => 8192,
        524_288..=4_194_303 => 16_384,
        4_194_304..=8_388_607 => 32_768,
        8_388_608..=16_777_215 => 65_536,
        _ => 262_144,
    };
    (inodes + groups * 32).div_ceil(16) * BLOCK + (journal + groups * 4 + 64) * BLOCK
}

/// Bytes of the disk, and its inodes.
fn size(tree: &Tree, asked: Option<u64>) -> Result<(u64, u64), Error> {
    let nodes = tree.len() + OWN_INODES;
    let content = blocks(tree) * BLOCK;
    let inodes_of = |disk: u64| (disk / 16_384).max(nodes + nodes / 8 + 1024);
    // As much as its own overhead is guessed with: twice the content is more than it becomes.
    let mut least = content + overhead(content * 2, nodes + 1024);
    least = (least + least / 50).max(16 << 20);
    // Inodes are spread over groups, which have room for so many.
    least = least.max(nodes.div_ceil(GROUP_INODES) * GROUP_BYTES * u64::from(nodes > GROUP_INODES));
    let disk = match asked {
        Some(asked) => asked - asked % BLOCK,
        None => (least + least * 3 / 10 + ROOM).next_multiple_of(1 << 20),
    };
    if disk > MAX_DISK {
        let why = Refusal::Limit { what: "bytes of a disk", limit: MAX_DISK };
        return Err(Error::refused("the image", why));
    }
    let groups = disk.div_ceil(GROUP_BYTES);
    let inodes = inodes_of(disk).min(groups * GROUP_INODES);
    if disk < least || inodes < nodes || disk < content + overhead(disk, inodes) {
        let needed_bytes = least.max(content + overhead(disk, inodes));
        return Err(Error::TooSmall { disk_bytes: disk, needed_bytes });
    }
    Ok((disk, inodes))
}

/// What is said when `mkext4` fails: everything it refuses was to be refused before.
fn odd(error: mkext4::Error) -> Error {
    match error {
        mkext4::Error::Io(source) => Error::io("writing the file system", source),
        other => Error::Io {
            what: "laying out the file system".to_owned(),
            source: io::Error::other(other.to_string()),
        },
    }
}

/// Files whose content is still to be written.
struct Declared {
    builder: FsBuilder,
    files: Vec<(InodeHandle, Content)>,
}

impl Declared {
    fn attributes(&mut self, handle: InodeHandle, xattrs: &[Xattr]) -> Result<(), mkext4::Error> {
        xattrs.iter().try_for_each(|it| self.builder.set_xattr(handle, &it.name, &it.value))
    }

    fn file(
        &mut self,
        parent: InodeHandle,
        name: &str,
        of: Meta,
        content: Content,
    ) -> Result<InodeHandle, mkext4::Error> {
        let handle = match &content.segments {
            None => self.builder.file(parent, name, meta(of), content.size)?,
            Some(segments) => {
                let segments: Vec<SparseSeg> = segments
                    .iter()
                    .enumerate()
                    .filter(|(_, length)| **length > 0)
                    .map(|(place, &length)| match place % 2 {
                        0 => SparseSeg::Data(length),
                        _ => SparseSeg::Hole(length),
                    })
                    .collect();
                self.builder.file_sparse(parent, name, meta(of), &segments)?
            }
        };
        if content.data() > 0 {
            self.files.push((handle, content));
        }
        Ok(handle)
    }
}

/// Declares the tree, of which nothing is left then: what is declared takes its place in memory.
fn declare(mut tree: Tree, builder: FsBuilder) -> Result<Declared, mkext4::Error> {
    let mut declared = Declared { builder, files: Vec::new() };
    let root = std::mem::replace(&mut tree.nodes[ROOT as usize].kind, NodeKind::Free);
    let NodeKind::Directory(children) = root else { return Ok(declared) };
    declared.builder.set_meta(mkext4::ROOT, meta(tree.nodes[ROOT as usize].meta))?;
    declared.attributes(mkext4::ROOT, &tree.nodes[ROOT as usize].xattrs)?;
    // Files with several names that have one already.
    let mut linked: HashMap<u32, InodeHandle> = HashMap::new();
    let mut stack: Vec<(InodeHandle, std::collections::btree_map::IntoIter<Box<str>, Child>)> =
        vec![(mkext4::ROOT, BTreeMap::into_iter(children))];
    while let Some((parent, children)) = stack.last_mut() {
        let parent = *parent;
        let Some((name, child)) = children.next() else {
            stack.pop();
            continue;
        };
        if let Some(known) = linked.get(&child.node) {
            declared.builder.hardlink(parent, &name, *known)?;
            continue;
        }
        let node = &mut tree.nodes[child.node as usize];
        let (of, links) = (node.meta, node.links);
        let xattrs = std::mem::take(&mut node.xattrs);
        let builder = &mut declared.builder;
        let handle = match std::mem::replace(&mut node.kind, NodeKind::Free) {
            NodeKind::Directory(children) => {
                let handle = builder.mkdir(parent, &name, meta(of))?;
                stack.push((handle, children.into_iter()));
                handle
            }
            NodeKind::File(content) => declared.file(parent, &name, of, content)?,
            NodeKind::Symlink(target) => builder.symlink(parent, &name, &target, meta(of))?,
            NodeKind::Char { major, minor } => {
                builder.mknod(parent, &name, meta(of), SpecialKind::Char { major, minor })?
            }
            NodeKind::Block { major, minor } => {
                builder.mknod(parent, &name, meta(of), SpecialKind::Block { major, minor })?
            }
            NodeKind::Fifo => builder.mknod(parent, &name, meta(of), SpecialKind::Fifo)?,
            NodeKind::Free => continue,
        };
        declared.attributes(handle, &xattrs)?;
        if links > 1 {
            linked.insert(child.node, handle);
        }
    }
    Ok(declared)
}

/// Writes `tree`, whose contents are in `spool`, as the file `target`, which is not there yet.
///
/// `disk` is its size in bytes; without one it has room for what is there, 30 % of that, and 256 MiB. `identity` makes the
/// file system's UUID. `stopped` says whether anybody still waits.
///
/// # Errors
/// [`Error::TooSmall`]; `Limit` when the plan of so large a disk takes more memory than there may be; of the host's files.
pub(crate) fn write(
    mut tree: Tree,
    spool: &File,
    target: &Path,
    disk: Option<u64>,
    identity: [u8; 16],
    stopped: &dyn Fn() -> bool,
) -> Result<Written, Error> {
    let (bytes, inodes) = size(&tree, disk)?;
    // Two bitmaps for each group, and one of the whole disk.
    let plan = bytes.div_ceil(GROUP_BYTES) * 2 * BLOCK + bytes / BLOCK / 8;
    tree.spend(plan).map_err(|why| Error::refused("the image", why))?;
    let mut options = mkext4::Options::new(bytes, identity, EPOCH);
    let too_many = || Error::refused("the image", Refusal::Limit { what: "files", limit: u32::MAX.into() });
    options.inodes = InodeCount::Exact(u32::try_from(inodes).map_err(|_| too_many())?);
    // It is the root of one machine: nothing is kept back for anybody.
    options.reserved_percent = 0;
    let builder = FsBuilder::new(options).map_err(odd)?;
    let Declared { builder, files } = declare(tree, builder).map_err(odd)?;
    let layout = builder.seal().map_err(odd)?;
    let writing = |error| Error::io("writing the file system", error);
    let target = Target::create(target).map_err(writing)?;
    target.file.set_len(bytes).map_err(writing)?;
    let mut sink = Sink { file: &target.file, superblock: Vec::new(), error: None };
    let filled = (|| {
        let mut writer = layout.writer(&mut sink)?;
        for (handle, content) in &files {
            if stopped() {
                return Ok(false);
            }
            writer.fill(*handle, &mut Data { spool, at: content.at })?;
        }
        writer.finish().map(|_| true)
    })();
    match (filled, sink.error) {
        (Ok(true), _) => {}
        (Ok(false), _) => return Err(Fault::Stopped.of("")),
        (Err(_), Some(source)) => return Err(Error::io("writing the file system", source)),
        (Err(error), None) => return Err(odd(error)),
    }
    let used_bytes = bytes - free(&sink.superblock) * BLOCK;
    target.publish().map_err(|error| Error::io("naming the file system's file", error))?;
    Ok(Written { bytes, used_bytes })
}

/// Free blocks, as the superblock says. Source: Linux `Documentation/filesystems/ext4/super.rst`.
fn free(superblock: &[u8]) -> u64 {
    superblock.get(12..16).and_then(|it| it.try_into().ok()).map_or(0, |it| u64::from(u32::from_le_bytes(it)))
}
