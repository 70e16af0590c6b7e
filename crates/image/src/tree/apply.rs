//! A layer's entries, laid over the tree.
//!
//! Source: OCI image specification, `layer.md`; where it is silent, what Docker does.

use std::io::Read;

use super::{
    Child, Fault, Found, MAX_LINKS, MAX_NAME, Meta, Node, NodeKind, ROOT, Refusal, Tree, shown, too_deep,
    xattr,
};
use crate::spool::{Content, Spool};
use crate::tar::{Archive, Entry, EntryKind};

const WHITEOUT: &str = ".wh.";
/// Hides what lower layers have in the directory.
const OPAQUE: &str = ".wh..wh..opq";
/// AUFS's own files, which mean nothing to others.
const AUFS: &str = ".wh..wh.";
/// Seconds that an inode of ext4 can have. Source: Linux `Documentation/filesystems/ext4/inodes.rst`.
const SECONDS: (i64, i64) = (-(1 << 31), (1 << 34) - (1 << 31) - 1);

/// The parts of a path of an archive; `/` before it means nothing.
fn parts<'a>(path: &'a [u8], limits: &crate::limits::Limits) -> Result<Vec<&'a str>, Fault> {
    let wrong = |reason| Refusal::Name { name: shown(path), reason };
    let text = std::str::from_utf8(path).map_err(|_| wrong("it is not UTF-8"))?;
    let parts: Vec<&str> = text.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.contains(&"..") {
        return Err(wrong("it leaves its directory").into());
    }
    if parts.iter().any(|part| part.len() > MAX_NAME) {
        return Err(wrong("a part of it has more than 255 bytes").into());
    }
    if parts.len() > limits.depth {
        return Err(too_deep(limits).into());
    }
    Ok(parts)
}

impl Tree {
    /// Lays all entries of `archive` over the tree, as the layer `layer`; contents go to `spool`. `stopped` says whether
    /// anybody still waits.
    ///
    /// # Errors
    /// [`Fault`]; the tree is then of no use.
    pub(crate) fn apply<R: Read>(
        &mut self,
        archive: &mut Archive<'_, R>,
        layer: u16,
        spool: &mut Spool,
        stopped: &dyn Fn() -> bool,
    ) -> Result<(), Fault> {
        while let Some(entry) = archive.next()? {
            if stopped() {
                return Err(Fault::Stopped);
            }
            self.entry(entry, archive, layer, spool)?;
        }
        Ok(())
    }

    fn entry<R: Read>(
        &mut self,
        entry: Entry,
        archive: &mut Archive<'_, R>,
        layer: u16,
        spool: &mut Spool,
    ) -> Result<(), Fault> {
        let parts = parts(&entry.path, &self.limits)?;
        let Some((last, way)) = parts.split_last() else { return self.root(&entry) };
        if parts.iter().any(|part| part.starts_with(AUFS) && *part != OPAQUE) {
            return Ok(());
        }
        if way.iter().any(|part| part.starts_with(WHITEOUT)) {
            let reason = "a whiteout is no directory";
            return Err(Refusal::Name { name: shown(&entry.path), reason }.into());
        }
        if last.starts_with(WHITEOUT) {
            return self.whiteout(&parts, layer);
        }
        let Some((directory, name)) = self.parent(&parts, Some(layer))? else { return Ok(()) };
        let there = self.look(directory, name);
        if entry.kind == EntryKind::HardLink {
            return self.hard_link(&entry, directory, name, there, layer);
        }
        let meta = meta_of(&entry);
        let xattrs = xattr::read(&entry.xattrs)?;
        if let (EntryKind::Directory, Found::Node(child)) = (entry.kind, &there)
            && matches!(self.node(child.node).kind, NodeKind::Directory(_))
        {
            // The directory stays, and what is in it.
            let node = child.node;
            self.describe(node, meta, xattrs)?;
            if let Some(children) = self.children(directory) {
                children.insert(name.into(), Child { node, layer });
            }
            return Ok(());
        }
        let kind = match entry.kind {
            EntryKind::Directory => NodeKind::Directory(std::collections::BTreeMap::new()),
            EntryKind::File => NodeKind::File(content(&entry, archive, spool)?),
            EntryKind::Symlink => NodeKind::Symlink(target(&entry)?),
            EntryKind::Char { major, minor } => NodeKind::Char { major, minor },
            EntryKind::Block { major, minor } => NodeKind::Block { major, minor },
            EntryKind::Fifo | EntryKind::HardLink => NodeKind::Fifo,
        };
        self.unbind(directory, name)?;
        let node = self.add(Node { meta, kind, links: 1, xattrs })?;
        Ok(self.bind(directory, name, Child { node, layer })?)
    }

    fn root(&mut self, entry: &Entry) -> Result<(), Fault> {
        if entry.kind != EntryKind::Directory {
            let reason = "the root can only be a directory";
            return Err(Refusal::Entry { name: shown(&entry.path), reason }.into());
        }
        self.describe(ROOT, meta_of(entry), xattr::read(&entry.xattrs)?)
    }

    fn describe(
        &mut self,
        node: super::NodeId,
        meta: Meta,
        xattrs: Box<[xattr::Xattr]>,
    ) -> Result<(), Fault> {
        let (old, new) = (xattr::cost(&self.node(node).xattrs), xattr::cost(&xattrs));
        self.cost = self.cost.saturating_sub(old);
        self.spend(new)?;
        let node = &mut self.nodes[node as usize];
        (node.meta, node.xattrs) = (meta, xattrs);
        Ok(())
    }

    fn whiteout(&mut self, parts: &[&str], layer: u16) -> Result<(), Fault> {
        let hidden = parts.last().and_then(|name| name.strip_prefix(WHITEOUT)).unwrap_or_default();
        if matches!(hidden, "" | "." | "..") {
            let reason = "it hides no name";
            return Err(Refusal::Name { name: shown(parts.join("/").as_bytes()), reason }.into());
        }
        let Some((directory, name)) = self.parent(parts, None)? else { return Ok(()) };
        if name == OPAQUE {
            return Ok(self.prune(directory, layer)?);
        }
        let Found::Node(child) = self.look(directory, hidden) else { return Ok(()) };
        let mut is_kept = child.layer == layer;
        if matches!(self.node(child.node).kind, NodeKind::Directory(_)) {
            self.prune(child.node, layer)?;
            is_kept |= self.children(child.node).is_some_and(|children| !children.is_empty());
        }
        if !is_kept {
            self.unbind(directory, hidden)?;
        }
        Ok(())
    }

    fn hard_link(
        &mut self,
        entry: &Entry,
        directory: super::NodeId,
        name: &str,
        there: Found,
        layer: u16,
    ) -> Result<(), Fault> {
        let wrong = |reason| {
            Fault::from(Refusal::Link { name: shown(&entry.path), target: shown(&entry.link), reason })
        };
        let way = parts(&entry.link, &self.limits)?;
        let found = match self.parent(&way, None)? {
            Some((parent, last)) => self.look(parent, last),
            None => Found::Nothing,
        };
        let Found::Node(target) = found else { return Err(wrong("there is nothing that it could lead to")) };
        if matches!(self.node(target.node).kind, NodeKind::Directory(_)) {
            return Err(wrong("a directory has one name alone"));
        }
        if let Found::Node(old) = there
            && old.node == target.node
        {
            // It is that already.
            if let Some(children) = self.children(directory) {
                children.insert(name.into(), Child { node: target.node, layer });
            }
            return Ok(());
        }
        if self.node(target.node).links >= MAX_LINKS {
            return Err(Refusal::Limit { what: "names of one file", limit: u64::from(MAX_LINKS) }.into());
        }
        // Before the old name goes: it may be that of a directory with the target in it.
        self.nodes[target.node as usize].links += 1;
        self.unbind(directory, name)?;
        Ok(self.bind(directory, name, Child { node: target.node, layer })?)
    }
}

fn meta_of(entry: &Entry) -> Meta {
    let seconds = entry.mtime.0.clamp(SECONDS.0, SECONDS.1);
    Meta { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: (seconds, entry.mtime.1) }
}

/// Where a link leads, as it is there: it is for the guest to follow.
fn target(entry: &Entry) -> Result<Box<str>, Fault> {
    let wrong = |reason| Refusal::Link { name: shown(&entry.path), target: shown(&entry.link), reason };
    let text = std::str::from_utf8(&entry.link).map_err(|_| wrong("it is not UTF-8"))?;
    if text.is_empty() || text.len() > 4095 {
        return Err(wrong("a link has 1 to 4095 bytes").into());
    }
    Ok(text.into())
}

fn content<R: Read>(
    entry: &Entry,
    archive: &mut Archive<'_, R>,
    spool: &mut Spool,
) -> Result<Content, Fault> {
    let mut writer = spool.begin();
    let mut at = 0;
    let whole = [(0, entry.size)];
    for &(offset, length) in entry.sparse.as_deref().unwrap_or(&whole) {
        writer.zeros(offset - at)?;
        writer.copy(archive, length)?;
        at = offset + length;
    }
    writer.zeros(entry.size - at)?;
    writer.finish()
}
