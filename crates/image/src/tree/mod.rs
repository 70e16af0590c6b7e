//! The files of an image while its layers are laid over each other: names and attributes in memory, contents in a spool.
//!
//! Every path is resolved here and nowhere in the host's file system: a link of an earlier layer leads through this tree and
//! cannot leave it. What the tree costs is estimated as it grows, that which writing it will take included, and refused
//! above [`Limits::memory_bytes`]; so is work that grows faster than the archive (links through links, whiteouts of large
//! directories again and again).

mod apply;
mod xattr;

use std::collections::BTreeMap;

use xattr::BLOCK_COST;
pub(crate) use xattr::Xattr;

use crate::error::{Fault, Refusal, shown};
use crate::limits::Limits;
use crate::spool::Content;

/// A node's place in [`Tree::nodes`].
pub(crate) type NodeId = u32;

pub(crate) const ROOT: NodeId = 0;
/// Names that one file may have. Source: ext4's `EXT4_LINK_MAX`.
const MAX_LINKS: u32 = 65_000;
/// Links through links in one path, as the kernel has it.
const MAX_FOLLOWED: u32 = 40;
/// Steps through directories for all layers, for each entry that there may be.
const STEPS_PER_ENTRY: u64 = 64;
/// Bytes of a name. Source: ext4's `EXT4_NAME_LEN`.
const MAX_NAME: usize = 255;

/// What an entry takes, in bytes, until the file system is written: its node here (about 200), and there its inode, its
/// declaration and the plans of its extents. Measured with `tests/memory.rs`.
const ENTRY_COST: u64 = 1100;
/// What a directory takes beyond that: a block of its own.
const DIRECTORY_COST: u64 = 4096 + 700;
/// Bytes of a link's target that fit into an inode.
const INLINE_LINK: usize = 59;

/// Owner, mode and time of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Meta {
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
}

impl Meta {
    /// Of a directory that no layer describes.
    pub(crate) const DIRECTORY: Self = Self { mode: 0o755, uid: 0, gid: 0, mtime: (0, 0) };
}

/// A name in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Child {
    pub(crate) node: NodeId,
    /// The layer that has the name; whiteouts hide those of lower layers alone.
    layer: u16,
}

#[derive(Debug)]
pub(crate) enum NodeKind {
    Directory(BTreeMap<Box<str>, Child>),
    File(Content),
    Symlink(Box<str>),
    Char {
        major: u32,
        minor: u32,
    },
    Block {
        major: u32,
        minor: u32,
    },
    Fifo,
    /// A place that the next node takes.
    Free,
}

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) meta: Meta,
    pub(crate) kind: NodeKind,
    /// Names of a file; of a directory always one.
    pub(crate) links: u32,
    pub(crate) xattrs: Box<[Xattr]>,
}

/// The tree.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) nodes: Vec<Node>,
    free: Vec<NodeId>,
    limits: Limits,
    cost: u64,
    steps: u64,
}

/// Where a path ends.
enum Found {
    Nothing,
    Node(Child),
}

impl Tree {
    /// An empty root.
    pub(crate) fn new(limits: &Limits) -> Self {
        let root = Node {
            meta: Meta::DIRECTORY,
            kind: NodeKind::Directory(BTreeMap::new()),
            links: 1,
            xattrs: Box::default(),
        };
        let cost = ENTRY_COST + DIRECTORY_COST;
        Self { nodes: vec![root], free: Vec::new(), limits: limits.clone(), cost, steps: 0 }
    }

    /// Nodes that are in use.
    pub(crate) fn len(&self) -> u64 {
        (self.nodes.len() - self.free.len()) as u64
    }

    /// Whether there is room for `more` bytes beside the tree.
    pub(crate) fn spend(&mut self, more: u64) -> Result<(), Refusal> {
        self.cost = self.cost.saturating_add(more);
        if self.cost > self.limits.memory_bytes {
            let limit = self.limits.memory_bytes;
            return Err(Refusal::Limit { what: "bytes of memory for files and directories", limit });
        }
        Ok(())
    }

    fn step(&mut self, steps: u64) -> Result<(), Refusal> {
        self.steps = self.steps.saturating_add(steps);
        let limit = self.limits.entries.saturating_mul(STEPS_PER_ENTRY);
        if self.steps > limit {
            return Err(Refusal::Limit { what: "steps through links and directories", limit });
        }
        Ok(())
    }

    fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    fn children(&mut self, id: NodeId) -> Option<&mut BTreeMap<Box<str>, Child>> {
        match &mut self.nodes[id as usize].kind {
            NodeKind::Directory(children) => Some(children),
            _ => None,
        }
    }

    fn look(&self, directory: NodeId, name: &str) -> Found {
        match &self.node(directory).kind {
            NodeKind::Directory(children) => children.get(name).map_or(Found::Nothing, |it| Found::Node(*it)),
            _ => Found::Nothing,
        }
    }

    fn cost_of(node: &Node) -> u64 {
        let kind = match &node.kind {
            NodeKind::Directory(_) => DIRECTORY_COST,
            NodeKind::File(content) => content.cost(),
            NodeKind::Symlink(target) if target.len() > INLINE_LINK => BLOCK_COST + target.len() as u64,
            _ => 0,
        };
        ENTRY_COST + kind + xattr::cost(&node.xattrs)
    }

    /// What a name costs: here, in the directory's block, and in its index.
    fn cost_of_name(name: &str) -> u64 {
        100 + 4 * name.len() as u64
    }

    fn add(&mut self, node: Node) -> Result<NodeId, Refusal> {
        self.spend(Self::cost_of(&node))?;
        if let Some(id) = self.free.pop() {
            self.nodes[id as usize] = node;
            return Ok(id);
        }
        let id = NodeId::try_from(self.nodes.len())
            .map_err(|_| Refusal::Limit { what: "nodes", limit: u64::from(NodeId::MAX) })?;
        self.nodes.push(node);
        Ok(id)
    }

    /// Gives `directory` the name, which it does not have.
    fn bind(&mut self, directory: NodeId, name: &str, child: Child) -> Result<(), Refusal> {
        self.spend(Self::cost_of_name(name))?;
        if let Some(children) = self.children(directory) {
            children.insert(name.into(), child);
        }
        Ok(())
    }

    /// Takes the name from `directory`, and with it everything that has no other name.
    fn unbind(&mut self, directory: NodeId, name: &str) -> Result<(), Refusal> {
        let Some(children) = self.children(directory) else { return Ok(()) };
        let Some(child) = children.remove(name) else { return Ok(()) };
        self.cost = self.cost.saturating_sub(Self::cost_of_name(name));
        self.release(child.node)
    }

    /// One name less for `node`; with the last it goes, and all below it.
    fn release(&mut self, node: NodeId) -> Result<(), Refusal> {
        let mut left = vec![node];
        while let Some(id) = left.pop() {
            self.step(1)?;
            let node = &mut self.nodes[id as usize];
            node.links -= 1;
            if node.links > 0 {
                continue;
            }
            self.cost = self.cost.saturating_sub(Self::cost_of(node));
            node.xattrs = Box::default();
            if let NodeKind::Directory(children) = std::mem::replace(&mut node.kind, NodeKind::Free) {
                for (name, child) in children {
                    self.cost = self.cost.saturating_sub(Self::cost_of_name(&name));
                    left.push(child.node);
                }
            }
            self.free.push(id);
        }
        Ok(())
    }

    /// Takes from `directory` what lower layers than `layer` have put below it. A directory of theirs stays while something
    /// newer is in it.
    fn prune(&mut self, directory: NodeId, layer: u16) -> Result<(), Refusal> {
        let Some(children) = self.children(directory).map(std::mem::take) else { return Ok(()) };
        let mut kept = BTreeMap::new();
        self.step(1 + children.len() as u64)?;
        for (name, child) in children {
            let mut is_kept = child.layer == layer;
            if matches!(self.node(child.node).kind, NodeKind::Directory(_)) {
                self.prune(child.node, layer)?;
                is_kept |= self.children(child.node).is_some_and(|children| !children.is_empty());
            }
            if is_kept {
                kept.insert(name, child);
            } else {
                self.cost = self.cost.saturating_sub(Self::cost_of_name(&name));
                self.release(child.node)?;
            }
        }
        if let Some(children) = self.children(directory) {
            *children = kept;
        }
        Ok(())
    }

    /// The directory in which the last of `parts` is, or would be, and that part. Links on the way are followed inside the
    /// root; directories that are missing are made when `layer` says for which layer.
    fn parent<'a>(
        &mut self,
        parts: &[&'a str],
        layer: Option<u16>,
    ) -> Result<Option<(NodeId, &'a str)>, Fault> {
        let Some((last, way)) = parts.split_last() else { return Ok(None) };
        let shown_path = || shown(parts.join("/").as_bytes());
        let mut stack = vec![ROOT];
        // What is still to go, the next at the end.
        let mut left: Vec<Box<str>> = way.iter().rev().map(|part| Box::from(*part)).collect();
        let mut followed = 0;
        while let Some(part) = left.pop() {
            self.step(1)?;
            if part.is_empty() || &*part == "." {
                continue;
            }
            if &*part == ".." {
                // Only of a link: the root's parent is the root.
                if stack.len() > 1 {
                    stack.pop();
                }
                continue;
            }
            let here = stack.last().copied().unwrap_or(ROOT);
            let next = match self.look(here, &part) {
                Found::Nothing => match layer {
                    Some(layer) => self.make_directory(here, &part, layer)?,
                    None => return Ok(None),
                },
                Found::Node(child) => child.node,
            };
            match &self.node(next).kind {
                NodeKind::Directory(_) => stack.push(next),
                NodeKind::Symlink(target) => {
                    let target = target.clone();
                    followed += 1;
                    if followed > MAX_FOLLOWED {
                        let reason = "there are links behind links without an end";
                        let target = shown(target.as_bytes());
                        return Err(Refusal::Link { name: shown_path(), target, reason }.into());
                    }
                    if target.starts_with('/') {
                        stack.truncate(1);
                    }
                    left.extend(target.rsplit('/').map(Box::from));
                }
                _ => {
                    let reason = "a part of its path is no directory";
                    return Err(Refusal::Entry { name: shown_path(), reason }.into());
                }
            }
            if stack.len() > self.limits.depth || left.len() > self.limits.path_bytes {
                return Err(too_deep(&self.limits).into());
            }
        }
        Ok(stack.last().map(|directory| (*directory, *last)))
    }

    fn make_directory(&mut self, parent: NodeId, name: &str, layer: u16) -> Result<NodeId, Fault> {
        if name.len() > MAX_NAME {
            let reason = "a part of it has more than 255 bytes";
            return Err(Refusal::Name { name: shown(name.as_bytes()), reason }.into());
        }
        let kind = NodeKind::Directory(BTreeMap::new());
        let node = self.add(Node { meta: Meta::DIRECTORY, kind, links: 1, xattrs: Box::default() })?;
        self.bind(parent, name, Child { node, layer })?;
        Ok(node)
    }

    /// Whether the root has a name that ext4 has for itself; it is taken away.
    pub(crate) fn take_lost_and_found(&mut self) -> Result<bool, Refusal> {
        let is_there = matches!(self.look(ROOT, "lost+found"), Found::Node(_));
        self.unbind(ROOT, "lost+found")?;
        Ok(is_there)
    }
}

fn too_deep(limits: &Limits) -> Refusal {
    Refusal::Limit { what: "directories below each other", limit: limits.depth as u64 }
}
