//! What is on the disk, twice: as programs see it, and as it is after a power failure.
//!
//! The model is as strict as POSIX allows. Of a file the content of its last `fsync` survives; of a directory the entries
//! that it had at its last `fsync`. An `fsync` of a file says nothing of its name. A rename is one step: it survives in both
//! directories or in neither.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use fuser::{Errno, FileAttr, FileType, INodeNo};

/// The number of the root.
pub const ROOT: u64 = 1;

/// What a power failure takes beside the content that was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Every change of a directory that was not synced.
    Everything,
    /// No change of a directory: names are there whose content is not, as after delayed allocation.
    ContentAlone,
}

/// Everything that `stat` says beside size and kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: SystemTime,
    pub ctime: SystemTime,
}

#[derive(Debug, Clone)]
struct Synced {
    content: Vec<u8>,
    meta: Meta,
}

#[derive(Debug, Clone)]
enum Body {
    File {
        content: Vec<u8>,
        /// None when it was never synced.
        synced: Option<Synced>,
    },
    Directory {
        entries: BTreeMap<OsString, u64>,
        synced: BTreeMap<OsString, u64>,
    },
}

#[derive(Debug, Clone)]
struct Node {
    meta: Meta,
    body: Body,
    /// Where it is, for whoever picks syncs by path.
    parent: u64,
    name: OsString,
}

/// Entries that one call has changed, together.
#[derive(Debug, Clone)]
struct Change(Vec<(u64, OsString, Option<u64>)>);

/// The disk.
#[derive(Debug, Clone)]
pub struct Tree {
    nodes: BTreeMap<u64, Node>,
    /// Changes of directories that were not synced, oldest first.
    pending: Vec<Change>,
    next: u64,
}

impl Default for Tree {
    fn default() -> Self {
        let now = SystemTime::now();
        let meta = Meta { mode: 0o755, uid: 0, gid: 0, mtime: now, ctime: now };
        let body = Body::Directory { entries: BTreeMap::new(), synced: BTreeMap::new() };
        let root = Node { meta, body, parent: ROOT, name: OsString::new() };
        Self { nodes: BTreeMap::from([(ROOT, root)]), pending: Vec::new(), next: ROOT + 1 }
    }
}

impl Tree {
    fn node(&self, number: u64) -> Result<&Node, Errno> {
        self.nodes.get(&number).ok_or(Errno::ENOENT)
    }

    fn node_mut(&mut self, number: u64) -> Result<&mut Node, Errno> {
        self.nodes.get_mut(&number).ok_or(Errno::ENOENT)
    }

    fn entries_mut(&mut self, number: u64) -> Result<&mut BTreeMap<OsString, u64>, Errno> {
        let node = self.node_mut(number)?;
        let now = SystemTime::now();
        (node.meta.mtime, node.meta.ctime) = (now, now);
        match &mut node.body {
            Body::Directory { entries, .. } => Ok(entries),
            Body::File { .. } => Err(Errno::ENOTDIR),
        }
    }

    fn content_mut(&mut self, number: u64) -> Result<&mut Vec<u8>, Errno> {
        match &mut self.node_mut(number)?.body {
            Body::File { content, .. } => Ok(content),
            Body::Directory { .. } => Err(Errno::EISDIR),
        }
    }

    /// What is in a directory, with whether it is a directory.
    pub fn list(&self, number: u64) -> Result<Vec<(OsString, u64, FileType)>, Errno> {
        let Body::Directory { entries, .. } = &self.node(number)?.body else { return Err(Errno::ENOTDIR) };
        let mut all =
            vec![(".".into(), number, FileType::Directory), ("..".into(), ROOT, FileType::Directory)];
        for (name, child) in entries {
            all.push((name.clone(), *child, self.attr(*child)?.kind));
        }
        Ok(all)
    }

    /// The number of `name` in a directory.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> Result<u64, Errno> {
        match &self.node(parent)?.body {
            Body::Directory { entries, .. } => entries.get(name).copied().ok_or(Errno::ENOENT),
            Body::File { .. } => Err(Errno::ENOTDIR),
        }
    }

    /// What `stat` says.
    pub fn attr(&self, number: u64) -> Result<FileAttr, Errno> {
        let node = self.node(number)?;
        let (kind, size, links) = match &node.body {
            Body::File { content, .. } => (FileType::RegularFile, content.len() as u64, 1),
            Body::Directory { .. } => (FileType::Directory, 4096, 2),
        };
        Ok(FileAttr {
            ino: INodeNo(number),
            size,
            blocks: size.div_ceil(512),
            atime: node.meta.mtime,
            mtime: node.meta.mtime,
            ctime: node.meta.ctime,
            crtime: UNIX_EPOCH,
            kind,
            perm: node.meta.mode,
            nlink: links,
            uid: node.meta.uid,
            gid: node.meta.gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    /// The path of a file or directory, from the root.
    pub fn path(&self, mut number: u64) -> PathBuf {
        let mut names = Vec::new();
        while number != ROOT {
            let Ok(node) = self.node(number) else { break };
            names.push(node.name.clone());
            number = node.parent;
        }
        names.iter().rev().collect()
    }

    /// Makes a file or a directory.
    pub fn make(
        &mut self,
        parent: u64,
        name: &OsStr,
        is_directory: bool,
        (mode, uid, gid): (u16, u32, u32),
    ) -> Result<u64, Errno> {
        if self.lookup(parent, name).is_ok() {
            return Err(Errno::EEXIST);
        }
        let number = self.next;
        let now = SystemTime::now();
        let body = match is_directory {
            true => Body::Directory { entries: BTreeMap::new(), synced: BTreeMap::new() },
            false => Body::File { content: Vec::new(), synced: None },
        };
        self.entries_mut(parent)?.insert(name.to_owned(), number);
        self.next += 1;
        let meta = Meta { mode, uid, gid, mtime: now, ctime: now };
        self.nodes.insert(number, Node { meta, body, parent, name: name.to_owned() });
        self.pending.push(Change(vec![(parent, name.to_owned(), Some(number))]));
        Ok(number)
    }

    /// Removes a name. What it was of stays for whoever has it open.
    pub fn remove(&mut self, parent: u64, name: &OsStr, is_directory: bool) -> Result<(), Errno> {
        let number = self.lookup(parent, name)?;
        match &self.node(number)?.body {
            Body::Directory { .. } if !is_directory => return Err(Errno::EISDIR),
            Body::Directory { entries, .. } if !entries.is_empty() => return Err(Errno::ENOTEMPTY),
            Body::File { .. } if is_directory => return Err(Errno::ENOTDIR),
            _ => {}
        }
        self.entries_mut(parent)?.remove(name);
        self.pending.push(Change(vec![(parent, name.to_owned(), None)]));
        Ok(())
    }

    /// Renames, and replaces what had the new name.
    pub fn rename(&mut self, from: (u64, &OsStr), to: (u64, &OsStr)) -> Result<(), Errno> {
        let number = self.lookup(from.0, from.1)?;
        if let Ok(other) = self.lookup(to.0, to.1)
            && let Body::Directory { entries, .. } = &self.node(other)?.body
            && !entries.is_empty()
        {
            return Err(Errno::ENOTEMPTY);
        }
        self.entries_mut(from.0)?.remove(from.1);
        self.entries_mut(to.0)?.insert(to.1.to_owned(), number);
        let node = self.node_mut(number)?;
        (node.parent, node.name) = (to.0, to.1.to_owned());
        self.pending
            .push(Change(vec![(from.0, from.1.to_owned(), None), (to.0, to.1.to_owned(), Some(number))]));
        Ok(())
    }

    /// Reads from a file.
    pub fn read(&self, number: u64, offset: u64, size: u32) -> Result<&[u8], Errno> {
        let Body::File { content, .. } = &self.node(number)?.body else { return Err(Errno::EISDIR) };
        let begin = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
        let end = begin.saturating_add(size as usize).min(content.len());
        Ok(&content[begin..end])
    }

    /// Writes to a file.
    pub fn write(&mut self, number: u64, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let content = self.content_mut(number)?;
        let begin = usize::try_from(offset).map_err(|_| Errno::EFBIG)?;
        let end = begin + data.len();
        if content.len() < end {
            content.resize(end, 0);
        }
        content[begin..end].copy_from_slice(data);
        let now = SystemTime::now();
        let meta = &mut self.node_mut(number)?.meta;
        (meta.mtime, meta.ctime) = (now, now);
        Ok(())
    }

    /// Changes what `stat` says.
    pub fn change(
        &mut self,
        number: u64,
        size: Option<u64>,
        change: impl FnOnce(&mut Meta),
    ) -> Result<(), Errno> {
        let now = SystemTime::now();
        if let Some(size) = size {
            let size = usize::try_from(size).map_err(|_| Errno::EFBIG)?;
            self.content_mut(number)?.resize(size, 0);
            self.node_mut(number)?.meta.mtime = now;
        }
        let meta = &mut self.node_mut(number)?.meta;
        change(meta);
        meta.ctime = now;
        Ok(())
    }

    /// `fsync` of a file or a directory.
    pub fn sync(&mut self, number: u64) -> Result<(), Errno> {
        let node = self.node_mut(number)?;
        let now = node.meta.clone();
        match &mut node.body {
            Body::File { content, synced } => {
                *synced = Some(Synced { content: content.clone(), meta: now });
            }
            Body::Directory { .. } => self.sync_directory(number),
        }
        Ok(())
    }

    /// Applies the changes of a directory, and what has to come before them.
    fn sync_directory(&mut self, number: u64) {
        let mut directories = BTreeSet::from([number]);
        let mut applied = vec![false; self.pending.len()];
        for (index, Change(change)) in self.pending.iter().enumerate().rev() {
            if change.iter().any(|(directory, ..)| directories.contains(directory)) {
                applied[index] = true;
                directories.extend(change.iter().map(|(directory, ..)| *directory));
            }
        }
        let mut left = Vec::new();
        for (change, is_applied) in std::mem::take(&mut self.pending).into_iter().zip(applied) {
            if is_applied { self.apply(change) } else { left.push(change) }
        }
        self.pending = left;
    }

    fn apply(&mut self, Change(change): Change) {
        for (directory, name, number) in change {
            let Some(Node { body: Body::Directory { synced, .. }, .. }) = self.nodes.get_mut(&directory)
            else {
                continue;
            };
            match number {
                Some(number) => drop(synced.insert(name, number)),
                None => drop(synced.remove(&name)),
            }
        }
    }

    /// The disk after a power failure at this moment, as the next boot finds it.
    pub fn after_power_failure(&self, loss: Loss) -> Self {
        let mut after = self.clone();
        let pending = std::mem::take(&mut after.pending);
        if loss == Loss::ContentAlone {
            pending.into_iter().for_each(|change| after.apply(change));
        }
        for node in after.nodes.values_mut() {
            match &mut node.body {
                Body::Directory { entries, synced } => *entries = synced.clone(),
                Body::File { content, synced } => {
                    let kept = synced.get_or_insert(Synced { content: Vec::new(), meta: node.meta.clone() });
                    *content = kept.content.clone();
                    node.meta = kept.meta.clone();
                }
            }
        }
        after
    }
}
