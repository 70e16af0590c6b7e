//! The context: which files a COPY or ADD takes from it.
//!
//! A source never leaves the directory: neither by `..` nor by a link. Links that are copied are copied as links, and never
//! followed; one that is named as a source is followed within the context.

use std::fs::{self, FileType, Metadata};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::archive::{self, Kind};
use crate::error::{Error, Fault};
use crate::glob;
use crate::ignore::{self, Ignore};
use crate::plan::{Action, CopyFrom, Source, Step};
use crate::upload::{self, Content, Entry, EntryKind, Payload, Tree, Upload};

/// What one COPY may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Files, directories and links, those that are looked at and left out among them.
    pub entries: u64,
    /// Bytes of the files.
    pub bytes: u64,
    /// How deep directories go.
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 500_000, bytes: 16 << 30, depth: 128 }
    }
}

/// A directory that COPY takes files from.
#[derive(Debug)]
pub struct Context {
    /// Canonical.
    root: PathBuf,
    ignore: Ignore,
    limits: Limits,
}

/// What a source has come to.
struct Found {
    /// As the source has it.
    asked: PathBuf,
    /// Where that is, without links, relative to the root.
    real: PathBuf,
    kind: FileType,
    mode: u32,
}

/// One file or directory of a COPY.
enum Asked<'a> {
    /// Name and content.
    Inline(&'a String, &'a String),
    Found(Found),
}

/// One COPY's files, as they are collected.
struct Collected<'a> {
    context: &'a Context,
    tree: Tree,
    payloads: Vec<Payload>,
    entries: u64,
    bytes: u64,
}

impl Context {
    /// The context at `directory`. What it leaves out is in `<dockerfile>.dockerignore`, beside that, where it is there, and
    /// otherwise in its `.dockerignore`.
    ///
    /// # Errors
    /// When the directory or that file cannot be read, or that file has a pattern that is not valid.
    pub fn open(directory: &Path, dockerfile: Option<&Path>, limits: Limits) -> Result<Self, Error> {
        let root = fs::canonicalize(directory).map_err(|error| Fault::io(directory)(error).at(0, ""))?;
        if !root.is_dir() {
            return Err(Fault::Entry { path: root, why: "it is no directory" }.at(0, ""));
        }
        let own = dockerfile.map(|path| {
            let mut name = path.as_os_str().to_owned();
            name.push(".dockerignore");
            PathBuf::from(name)
        });
        for path in own.into_iter().chain([root.join(".dockerignore")]) {
            if let Some(ignore) = ignore_of(&path)? {
                return Ok(Self { root, ignore, limits });
            }
        }
        Ok(Self { root, ignore: Ignore::default(), limits })
    }

    /// The files that `step` copies from here, hashed: in this order, each goes to the step's destination. One upload, and one
    /// more for every archive that is unpacked. None for a step that copies nothing from here.
    ///
    /// # Errors
    /// With the step's line: a source that matches nothing or leaves the context, a file that is none or cannot be read, more
    /// than the limits.
    pub fn uploads(&self, step: &Step) -> Result<Vec<Upload>, Error> {
        let Action::Copy(copy) = &step.action else { return Ok(Vec::new()) };
        if copy.from != CopyFrom::Context {
            return Ok(Vec::new());
        }
        let fault = |fault: Fault| fault.at(step.line, &step.shown);
        let is_directory = copy.to.ends_with("/");
        let (payloads, single) = self.collect(&copy.sources, copy.unpack, is_directory).map_err(fault)?;
        let uploads = payloads.into_iter().map(|payload| {
            let (entries, bytes) = payload.size();
            let from = match (&payload, &single) {
                (Payload::Tree(_), Some(name)) => name.clone(),
                _ => ".".to_owned(),
            };
            let hash = payload.hash().map_err(fault)?;
            Ok(Upload { hash, from, entries, bytes, payload, line: step.line, shown: step.shown.clone() })
        });
        uploads.collect()
    }

    /// The payloads of `sources`, and the name of the only file when it is to be copied under the destination's name.
    fn collect(
        &self,
        sources: &[Source],
        unpack: bool,
        is_directory: bool,
    ) -> Result<(Vec<Payload>, Option<String>), Fault> {
        let mut asked = Vec::new();
        for source in sources {
            match source {
                Source::Inline { name, content } => asked.push(Asked::Inline(name, content)),
                Source::Path(path) => asked.extend(self.find(path)?.into_iter().map(Asked::Found)),
            }
        }
        let is_one = asked.len() == 1;
        if !is_one && !is_directory {
            return Err(Fault::syntax("the destination of more than one source ends in `/`"));
        }
        let mut collected = Collected::of(self);
        let mut files = Vec::new();
        for one in asked {
            match one {
                Asked::Inline(name, content) => {
                    files.push(name.clone());
                    let kind = EntryKind::Inline(content.clone());
                    collected.add(PathBuf::from(name), Entry { mode: 0o644, kind })?;
                }
                Asked::Found(found) if found.kind.is_dir() => collected.walk(&found.real)?,
                Asked::Found(found) => files.extend(collected.file(&found, unpack)?),
            }
        }
        let single = files.pop().filter(|_| is_one && !is_directory);
        if !collected.tree.is_empty() || collected.payloads.is_empty() {
            collected.flush();
        }
        Ok((collected.payloads, single))
    }

    /// What a source means. Never nothing.
    fn find(&self, source: &str) -> Result<Vec<Found>, Fault> {
        let mut found = Vec::new();
        for asked in glob::find(&self.root, source, self.limits.entries)? {
            let path = self.root.join(&asked);
            let real = match fs::canonicalize(&path) {
                Ok(real) => real,
                Err(error) if glob::is_missing(&error) => continue,
                Err(error) => return Err(Fault::io(path)(error)),
            };
            let Ok(relative) = real.strip_prefix(&self.root) else {
                return Err(Fault::Outside { source_path: asked.display().to_string() });
            };
            let metadata = fs::symlink_metadata(&real).map_err(Fault::io(&real))?;
            let (kind, mode) = (metadata.file_type(), mode(&metadata));
            let one = Found { asked, real: relative.to_owned(), kind, mode };
            // A directory that is left out is there when something in it is not.
            let left_out = self.left_out(&one.asked) || self.left_out(&one.real);
            if !left_out || one.kind.is_dir() && self.has_kept(&one.real)? {
                found.push(one);
            }
        }
        if found.is_empty() {
            return Err(Fault::NoMatch { source_path: source.to_owned() });
        }
        Ok(found)
    }

    fn left_out(&self, path: &Path) -> bool {
        !path.as_os_str().is_empty() && self.ignore.has(&path.to_string_lossy())
    }

    /// Whether a directory that is left out may have something that is not.
    fn may_keep(&self, directory: &Path) -> bool {
        self.ignore.may_keep_in(&directory.to_string_lossy())
    }

    /// Whether a directory that is left out has something that is not.
    fn has_kept(&self, directory: &Path) -> Result<bool, Fault> {
        if !self.may_keep(directory) {
            return Ok(false);
        }
        let mut any = false;
        Collected::of(self).each(directory, &mut |_, _, _| {
            any = true;
            Ok(())
        })?;
        Ok(any)
    }
}

/// The `.dockerignore` at `path`, when there is one.
fn ignore_of(path: &Path) -> Result<Option<Ignore>, Error> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let fault = |fault: Fault| fault.at(0, "");
    let size = match fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if glob::is_missing(&error) => return Ok(None),
        Err(error) => return Err(fault(Fault::io(path)(error))),
    };
    if size > ignore::MOST_BYTES {
        return Err(fault(Fault::TooLarge { what: ".dockerignore in bytes", limit: ignore::MOST_BYTES }));
    }
    let text = fs::read_to_string(path).map_err(|error| fault(Fault::io(path)(error)))?;
    let read = Ignore::read(&text);
    read.map(Some).map_err(|(line, pattern)| Fault::Pattern { pattern }.at(line, &name))
}

impl<'a> Collected<'a> {
    fn of(context: &'a Context) -> Self {
        Self { context, tree: Tree::new(), payloads: Vec::new(), entries: 0, bytes: 0 }
    }

    fn count(&mut self) -> Result<(), Fault> {
        self.entries += 1;
        let limit = self.context.limits.entries;
        if self.entries > limit {
            return Err(Fault::TooLarge { what: "what is copied in files", limit });
        }
        Ok(())
    }

    fn content(&mut self, path: PathBuf) -> Result<Content, Fault> {
        let limit = self.context.limits.bytes;
        let content = Content::of(path, limit - self.bytes)?;
        self.bytes += content.size;
        if self.bytes > limit {
            return Err(Fault::TooLarge { what: "what is copied in bytes", limit });
        }
        Ok(content)
    }

    /// Puts an entry into the tree. A later one of the same path takes its place.
    fn add(&mut self, path: PathBuf, entry: Entry) -> Result<(), Fault> {
        let is_directory = |entry: &Entry| entry.kind == EntryKind::Directory;
        if let Some(old) = self.tree.get(&path)
            && is_directory(old) != is_directory(&entry)
        {
            return Err(Fault::Entry {
                path,
                why: "one source has a directory of this name, another has none",
            });
        }
        self.tree.insert(path, entry);
        Ok(())
    }

    /// What was collected goes before what comes next.
    fn flush(&mut self) {
        let mut tree = std::mem::take(&mut self.tree);
        if tree.is_empty() {
            // An archive without entries would say nothing, not even that the destination is to be there.
            tree.insert(PathBuf::from("."), Entry { mode: 0o755, kind: EntryKind::Directory });
        }
        self.payloads.push(Payload::Tree(tree));
    }

    /// A file that is a source, and its name when it is not unpacked.
    fn file(&mut self, found: &Found, unpack: bool) -> Result<Option<String>, Fault> {
        let path = self.context.root.join(&found.real);
        if !found.kind.is_file() {
            return Err(Fault::Entry { path: found.real.clone(), why: "it is a socket, a pipe or a device" });
        }
        self.count()?;
        if unpack {
            match archive::kind(&upload::open(&path)?).map_err(Fault::io(&path))? {
                Kind::File => {}
                Kind::Other(method) => {
                    let instead =
                        "Compress the archive with gzip, or take it in by COPY and unpack it in a step.";
                    return Err(Fault::unsupported(format!("ADD of a file compressed by {method}"), instead));
                }
                Kind::Archive => {
                    if !self.tree.is_empty() {
                        self.flush();
                    }
                    let content = self.content(path)?;
                    self.payloads.push(Payload::Archive(content));
                    return Ok(None);
                }
            }
        }
        let name = found.asked.file_name().or(found.real.file_name()).unwrap_or_default();
        let Some(shown) = name.to_str() else {
            return Err(Fault::Entry { path: found.real.clone(), why: "its name is not UTF-8" });
        };
        let kind = EntryKind::File(self.content(path)?);
        self.add(PathBuf::from(name), Entry { mode: found.mode, kind })?;
        Ok(Some(shown.to_owned()))
    }

    /// Everything in a directory, under its path in that.
    fn walk(&mut self, directory: &Path) -> Result<(), Fault> {
        let mut list = Vec::new();
        self.each(directory, &mut |below, real, metadata| {
            list.push((below, real, metadata));
            Ok(())
        })?;
        for (below, real, metadata) in list {
            let path = self.context.root.join(&real);
            let kind = if metadata.is_dir() {
                EntryKind::Directory
            } else if metadata.is_symlink() {
                EntryKind::Link(fs::read_link(&path).map_err(Fault::io(&path))?)
            } else if metadata.is_file() {
                EntryKind::File(self.content(path)?)
            } else {
                return Err(Fault::Entry { path: real, why: "it is a socket, a pipe or a device" });
            };
            // Directories above it that are left out themselves.
            for parent in below.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty()) {
                if !self.tree.contains_key(parent) {
                    let real = self.context.root.join(directory).join(parent);
                    let metadata = fs::symlink_metadata(&real).map_err(Fault::io(&real))?;
                    self.add(parent.to_owned(), Entry { mode: mode(&metadata), kind: EntryKind::Directory })?;
                }
            }
            let mode = if metadata.is_symlink() { 0o777 } else { mode(&metadata) };
            self.add(below, Entry { mode, kind })?;
        }
        Ok(())
    }

    /// Calls `each` with everything in a directory that is not left out: its path in the directory, in the context, and what it
    /// is. A directory comes before what is in it.
    fn each(
        &mut self,
        directory: &Path,
        each: &mut dyn FnMut(PathBuf, PathBuf, Metadata) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let mut open = vec![(PathBuf::new(), 0)];
        while let Some((below, depth)) = open.pop() {
            if depth > self.context.limits.depth {
                let limit = self.context.limits.depth as u64;
                return Err(Fault::TooLarge { what: "what is copied in levels of directories", limit });
            }
            let here = directory.join(&below);
            for name in glob::list(&self.context.root.join(&here))? {
                self.count()?;
                let (below, real) = (below.join(&name), here.join(&name));
                let path = self.context.root.join(&real);
                let metadata = match fs::symlink_metadata(&path) {
                    Ok(metadata) => metadata,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        return Err(Fault::Entry { path: real, why: "it has gone while it was looked at" });
                    }
                    Err(error) => return Err(Fault::io(path)(error)),
                };
                let left_out = self.context.left_out(&real);
                if metadata.is_dir() && (!left_out || self.context.may_keep(&real)) {
                    open.push((below.clone(), depth + 1));
                }
                if !left_out {
                    each(below, real, metadata)?;
                }
            }
        }
        Ok(())
    }
}

/// Permissions, without what only the superuser's files have.
fn mode(metadata: &Metadata) -> u32 {
    metadata.permissions().mode() & 0o777
}
