//! What COPY means: which entries of an archive are copied, and to where.
//!
//! ```text
//! from        entry           to `/d`                     to `/d/`, or `/d` is a directory, or a directory was copied
//! a           a (file)        /d                          /d/a
//! a           a/b/c           /d/b/c                      /d/b/c
//! *.txt       x.txt           /d; a second makes it /d/   /d/x.txt
//! .           a/b             /d/a/b                      /d/a/b
//! ```
//!
//! A directory's content is copied, merged with what is there, not the directory. Files take the place of files and links;
//! a directory is never replaced, and one that was there keeps its owner and mode. Directories above the destination are
//! root's. Source: Dockerfile reference, `COPY`; E2B's builder.
//!
//! Writes what is copied, as `tree.rs` does: nothing outside the root is reached, and within the destination nothing outside
//! it. Times of directories are not kept, nor extended attributes.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use kelvin_api::image::Unpacked;
use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid, chownat, fchmod, fchown, fstatvfs,
    futimens, linkat, openat, renameat_with, symlinkat, utimensat,
};

use super::request::CHUNK;
use super::tree::{Place, clear, file_at, make_dir_aside, make_dirs, open_dir, place_of};

/// Components of one name.
const DEPTH: usize = 256;
/// What of a name is told, in characters.
const SHOWN: usize = 200;

/// Why an archive was not unpacked as a whole.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// It is none, or it breaks off.
    #[error("the archive cannot be read")]
    Torn(#[source] io::Error),
    /// It has what no upload has.
    #[error("entry '{name}' {why}")]
    Refused { name: String, why: &'static str },
    /// The file system refuses it.
    #[error("entry '{name}'")]
    At {
        name: String,
        #[source]
        source: io::Error,
    },
    /// Too many entries.
    #[error("the archive has more than {0} entries")]
    Entries(usize),
    /// The archive has nothing that is meant.
    #[error("nothing in the upload is called or matches '{0}'")]
    Nothing(String),
    /// Several files for one place.
    #[error("'{first}' and '{second}' are both copied, and '{to}' is not a directory: end it with '/'")]
    Several { first: String, second: String, to: String },
}

/// `name` for people.
pub(super) fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).chars().take(SHOWN).flat_map(char::escape_debug).collect()
}

/// The name of an entry: a path below the context, without `.` and without `/` at its ends.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Name {
    bytes: Vec<u8>,
    /// Where each component ends.
    ends: Vec<usize>,
}

impl Name {
    /// # Errors
    /// What is wrong with it.
    pub(super) fn new(raw: &[u8]) -> Result<Self, &'static str> {
        if raw.first() == Some(&b'/') {
            return Err("has an absolute name");
        }
        if raw.contains(&0) {
            return Err("has a NUL byte in its name");
        }
        let (mut bytes, mut ends) = (Vec::with_capacity(raw.len()), Vec::new());
        for part in raw.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".") {
            if part == b".." {
                return Err("has '..' in its name");
            }
            if ends.len() == DEPTH {
                return Err("is in too many directories");
            }
            if !bytes.is_empty() {
                bytes.push(b'/');
            }
            bytes.extend_from_slice(part);
            ends.push(bytes.len());
        }
        Ok(Self { bytes, ends })
    }

    /// The first `count` components.
    fn first(&self, count: usize) -> &[u8] {
        let end = count.checked_sub(1).and_then(|last| self.ends.get(last)).copied();
        &self.bytes[..end.unwrap_or(0)]
    }

    /// What comes after the first `count` components.
    fn after(&self, count: usize) -> &[u8] {
        let rest = &self.bytes[self.first(count).len()..];
        rest.strip_prefix(b"/").unwrap_or(rest)
    }
}

/// A path's directory, and its last component.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

/// What is copied, as the context names it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Source {
    given: String,
    literal: Name,
    pattern: Option<String>,
}

impl Source {
    /// # Errors
    /// A text for the caller.
    pub(super) fn new(given: &str) -> Result<Self, String> {
        // The context is the root of what may be named.
        let literal = Name::new(given.trim_start_matches('/').as_bytes());
        let literal = literal.map_err(|why| format!("from '{}' {why}", shown(given.as_bytes())))?;
        let text = String::from_utf8_lossy(&literal.bytes).into_owned();
        // At its beginning it would mean everything else.
        let pattern = if text.starts_with('!') { format!("\\{text}") } else { text };
        let is_pattern =
            pattern.contains(['*', '?', '[', '{', '\\']) && fast_glob::validate(&pattern).is_ok();
        Ok(Self { given: given.to_owned(), literal, pattern: is_pattern.then_some(pattern) })
    }

    /// How many components of `name` are the source that it belongs to.
    fn matches(&self, name: &Name) -> Option<usize> {
        let depth = self.literal.ends.len();
        if name.ends.len() >= depth && name.first(depth) == self.literal.bytes {
            return Some(depth);
        }
        let pattern = self.pattern.as_ref()?;
        (1..=name.ends.len()).find(|count| fast_glob::glob_match(pattern, name.first(*count)))
    }

    /// Whether it may mean several.
    fn is_pattern(&self) -> bool {
        self.pattern.is_some()
    }

    /// Whether it is the whole context, which is there even when it is empty.
    fn is_context(&self) -> bool {
        self.literal.ends.is_empty()
    }
}

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) from: Source,
    /// Absolute, without `..`.
    pub(super) to: PathBuf,
    /// Whether it is a directory because the request says so.
    pub(super) is_directory: bool,
    /// User and group id of what is copied.
    pub(super) owner: (u32, u32),
    /// The mode of what is copied, when it is not the archive's.
    pub(super) mode: Option<u32>,
}

/// What an entry is.
#[derive(Debug)]
pub(super) enum Kind {
    Directory,
    File,
    /// A symbolic link, and what it says.
    Link(Vec<u8>),
    /// Another name of the entry that is called so.
    HardLink(Vec<u8>),
}

/// An entry of an archive.
pub(super) struct Entry<'a> {
    pub(super) name: Name,
    pub(super) kind: Kind,
    pub(super) mode: u32,
    pub(super) modified: Timespec,
    /// Of a file, in bytes.
    pub(super) size: u64,
    pub(super) content: &'a mut dyn Read,
}

/// Where a file is put: a directory, and its name there.
type Target = (Rc<OwnedFd>, Vec<u8>);

/// Copies entry after entry.
pub(super) struct Copier<'a> {
    wanted: &'a Wanted,
    root: OwnedFd,
    /// The destination, when it is a directory.
    directory: Option<Rc<OwnedFd>>,
    /// The one entry that became the destination itself.
    single: Option<Vec<u8>>,
    /// The directory of the last file, by its path below the destination.
    last: Option<(Vec<u8>, Rc<OwnedFd>)>,
    /// What was made here: hard links lead nowhere else, and nothing else is given to the owner.
    made: HashSet<Place>,
    has_matched: bool,
    buffer: Vec<u8>,
    done: Unpacked,
}

impl<'a> Copier<'a> {
    /// `root`: what `wanted` counts from.
    pub(super) fn new(wanted: &'a Wanted, root: &Path) -> Result<Self, Error> {
        let at_root = |source| Error::At { name: root.display().to_string(), source };
        let root = File::open(root).map_err(at_root)?.into();
        Ok(Self {
            wanted,
            root,
            directory: None,
            single: None,
            last: None,
            made: HashSet::new(),
            has_matched: false,
            buffer: vec![0; CHUNK],
            done: Unpacked::default(),
        })
    }

    /// Copies `entry`, when it is meant. Whether its content was read to its end.
    pub(super) fn take(&mut self, entry: &mut Entry<'_>) -> Result<bool, Error> {
        let Some(depth) = self.wanted.from.matches(&entry.name) else { return Ok(false) };
        self.has_matched = true;
        let name = shown(&entry.name.bytes);
        let at = |source| Error::At { name: name.clone(), source };
        if matches!(entry.kind, Kind::Directory) {
            self.directory(entry, depth, &at)?;
            return Ok(false);
        }
        if entry.name.bytes.is_empty() {
            return Err(Error::Refused { name, why: "has no name" });
        }
        let (parent, leaf) = self.target(&entry.name, depth, &at)?;
        match &entry.kind {
            Kind::Directory => {}
            Kind::File => self.file(&parent, &leaf, entry, &at)?,
            Kind::Link(to) => self.link(&parent, &leaf, to, entry.modified).map_err(at)?,
            Kind::HardLink(to) => {
                let refused = |why| Error::Refused { name: name.clone(), why };
                let from = Name::new(to)
                    .ok()
                    .and_then(|from| self.former(&from))
                    .filter(|(parent, leaf)| file_at(parent, leaf).is_some_and(|is| self.made.contains(&is)))
                    .ok_or_else(|| refused("is a hard link to what is not copied before it"))?;
                self.hard_link(&from, &(parent, leaf)).map_err(at)?;
            }
        }
        self.done.files += 1;
        Ok(matches!(entry.kind, Kind::File))
    }

    /// What was done, at the end of the archive.
    pub(super) fn finish(mut self) -> Result<Unpacked, Error> {
        let from = &self.wanted.from;
        if !self.has_matched && !from.is_context() {
            return Err(Error::Nothing(shown(from.given.as_bytes())));
        }
        if !self.has_matched {
            self.enter(true)?;
        }
        Ok(self.done)
    }

    /// The destination below the root.
    fn to(&self) -> &'a [u8] {
        let path = self.wanted.to.as_os_str().as_bytes();
        path.strip_prefix(b"/").unwrap_or(path)
    }

    /// The destination as a directory, made when it is not there: for what `is_source` with the owner of what is copied.
    fn enter(&mut self, is_source: bool) -> Result<Rc<OwnedFd>, Error> {
        if let Some(directory) = &self.directory {
            return Ok(Rc::clone(directory));
        }
        let at = |source| Error::At { name: self.wanted.to.display().to_string(), source };
        if self.single.is_some() {
            return self.widen(b"a directory");
        }
        let to = self.to();
        make_dirs(&self.root, split(to).0, |_| Ok(())).map_err(at)?;
        let mut fresh = None;
        let directory = make_dirs(&self.root, to, |made| {
            if is_source {
                self.give(made)?;
                fresh = Some(place_of(made)?);
            }
            Ok(())
        })
        .map_err(at)?;
        self.made.extend(fresh);
        Ok(Rc::clone(self.directory.insert(Rc::new(directory))))
    }

    /// Makes the destination, which the first source became, a directory with that in it: a pattern has matched more than
    /// one, which is known with the second. As E2B's builder does, for which `COPY folder/* folder` is usual.
    fn widen(&mut self, second: &[u8]) -> Result<Rc<OwnedFd>, Error> {
        let first = self.single.clone().unwrap_or_default();
        if !self.wanted.from.is_pattern() {
            return Err(self.several(&first, second));
        }
        let at = |source: io::Error| Error::At { name: self.wanted.to.display().to_string(), source };
        let (parent, leaf) = split(self.to());
        let parent = open_dir(&self.root, parent).map_err(at)?;
        let (aside, directory) = make_dir_aside(&parent).map_err(at)?;
        self.give(&directory).map_err(at)?;
        // Nothing is replaced: what is in the way is told.
        renameat_with(&parent, leaf, &directory, split(&first).1, RenameFlags::NOREPLACE)
            .and_then(|()| renameat_with(&parent, &aside, &parent, leaf, RenameFlags::NOREPLACE))
            .map_err(|error| at(error.into()))?;
        self.single = None;
        Ok(Rc::clone(self.directory.insert(Rc::new(directory))))
    }

    fn several(&self, first: &[u8], second: &[u8]) -> Error {
        let to = self.wanted.to.display().to_string();
        Error::Several { first: shown(first), second: shown(second), to }
    }

    fn give(&self, file: &OwnedFd) -> io::Result<()> {
        let (uid, gid) = self.wanted.owner;
        Ok(fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?)
    }

    fn directory(
        &mut self,
        entry: &Entry<'_>,
        depth: usize,
        at: &dyn Fn(io::Error) -> Error,
    ) -> Result<(), Error> {
        let top = self.enter(true)?;
        let rest = entry.name.after(depth);
        let directory = if rest.is_empty() { top } else { self.below(&top, rest).map_err(at)? };
        if self.made.contains(&place_of(&*directory).map_err(at)?) {
            let mode = Mode::from_raw_mode(self.wanted.mode.unwrap_or(entry.mode));
            self.give(&directory).and_then(|()| Ok(fchmod(&*directory, mode)?)).map_err(at)?;
        }
        Ok(())
    }

    /// The directory `path` of what is copied, made when it is not there.
    fn below(&mut self, top: &Rc<OwnedFd>, path: &[u8]) -> io::Result<Rc<OwnedFd>> {
        if path.is_empty() {
            return Ok(Rc::clone(top));
        }
        if let Some((last, directory)) = &self.last
            && last == path
        {
            return Ok(Rc::clone(directory));
        }
        let mut fresh = Vec::new();
        let directory = make_dirs(&**top, path, |made| {
            self.give(made)?;
            fresh.push(place_of(made)?);
            Ok(())
        })?;
        self.made.extend(fresh);
        let directory = Rc::new(directory);
        self.last = Some((path.to_owned(), Rc::clone(&directory)));
        Ok(directory)
    }

    /// Where the file `name` is put, of which the first `depth` components are the source.
    fn target(
        &mut self,
        name: &Name,
        depth: usize,
        at: &dyn Fn(io::Error) -> Error,
    ) -> Result<Target, Error> {
        let rest = name.after(depth);
        if !rest.is_empty() {
            let top = self.enter(true)?;
            let (parent, leaf) = split(rest);
            return Ok((self.below(&top, parent).map_err(at)?, leaf.to_owned()));
        }
        // A file that is a source itself.
        let is_open = self.directory.is_some() || self.single.is_some();
        if !is_open && (self.wanted.is_directory || open_dir(&self.root, self.to()).is_ok()) {
            self.enter(false)?;
        }
        if let Some(directory) = &self.directory {
            return Ok((Rc::clone(directory), split(&name.bytes).1.to_owned()));
        }
        if self.single.as_ref().is_some_and(|first| *first != name.bytes) {
            let top = self.widen(&name.bytes)?;
            return Ok((top, split(&name.bytes).1.to_owned()));
        }
        self.single = Some(name.bytes.clone());
        let (parent, leaf) = split(self.to());
        let parent = make_dirs(&self.root, parent, |_| Ok(())).map_err(at)?;
        Ok((Rc::new(parent), leaf.to_owned()))
    }

    /// Where the file `name` was put, if it was.
    fn former(&self, name: &Name) -> Option<Target> {
        let rest = name.after(self.wanted.from.matches(name)?);
        match (&self.directory, &self.single) {
            (Some(top), _) if rest.is_empty() => Some((Rc::clone(top), split(&name.bytes).1.to_owned())),
            (Some(top), _) => {
                let (parent, leaf) = split(rest);
                Some((Rc::new(open_dir(&**top, parent).ok()?), leaf.to_owned()))
            }
            (None, Some(single)) if *single == name.bytes => {
                let (parent, leaf) = split(self.to());
                Some((Rc::new(open_dir(&self.root, parent).ok()?), leaf.to_owned()))
            }
            (None, _) => None,
        }
    }

    fn file(
        &mut self,
        parent: &OwnedFd,
        leaf: &[u8],
        entry: &mut Entry<'_>,
        at: &dyn Fn(io::Error) -> Error,
    ) -> Result<(), Error> {
        clear(parent, leaf).map_err(at)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file =
            openat(parent, leaf, flags, Mode::from_raw_mode(0o600)).map_err(|error| at(error.into()))?;
        let has = fstatvfs(&file).map_err(|error| at(error.into()))?;
        // Said before the disk is full, where it can be: everybody in the machine writes to it.
        if entry.size > has.f_bfree.saturating_mul(has.f_frsize) {
            return Err(at(rustix::io::Errno::NOSPC.into()));
        }
        let mut file = File::from(file);
        let mut left = entry.size;
        loop {
            let count = match entry.content.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Error::Torn(error)),
            };
            file.write_all(&self.buffer[..count]).map_err(at)?;
            left = left.saturating_sub(count as u64);
            self.done.bytes += count as u64;
        }
        if left > 0 {
            return Err(Error::Torn(io::ErrorKind::UnexpectedEof.into()));
        }
        let file = OwnedFd::from(file);
        self.made.insert(place_of(&file).map_err(at)?);
        let times = Timestamps { last_access: entry.modified, last_modification: entry.modified };
        // The owner first: the kernel takes the bits of set-user-id with it.
        let mode = Mode::from_raw_mode(self.wanted.mode.unwrap_or(entry.mode));
        self.give(&file)
            .and_then(|()| Ok(fchmod(&file, mode)?))
            .and_then(|()| Ok(futimens(&file, &times)?))
            .map_err(at)
    }

    fn link(&mut self, parent: &OwnedFd, leaf: &[u8], to: &[u8], modified: Timespec) -> io::Result<()> {
        clear(parent, leaf)?;
        symlinkat(to, parent, leaf)?;
        // What was a directory's path may be another's now.
        self.last = None;
        let (uid, gid) = self.wanted.owner;
        let itself = AtFlags::SYMLINK_NOFOLLOW;
        chownat(parent, leaf, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), itself)?;
        let times = Timestamps { last_access: modified, last_modification: modified };
        Ok(utimensat(parent, leaf, &times, itself)?)
    }

    fn hard_link(&self, from: &Target, to: &Target) -> io::Result<()> {
        let is_itself = file_at(&from.0, &from.1) == file_at(&to.0, &to.1);
        if is_itself {
            return Ok(());
        }
        clear(&to.0, &to.1)?;
        Ok(linkat(&*from.0, &from.1[..], &*to.0, &to.1[..], AtFlags::empty())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn any_name_is_below_the_context_or_refused(raw in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..60)) {
            if let Ok(name) = Name::new(&raw) {
                for part in name.bytes.split(|byte| *byte == b'/').filter(|_| !name.bytes.is_empty()) {
                    proptest::prop_assert!(!part.is_empty() && part != b"." && part != b"..");
                }
                for count in 0..=name.ends.len() {
                    let joined = [name.first(count), name.after(count)].join(&b'/');
                    let joined = joined.strip_prefix(b"/").unwrap_or(&joined);
                    proptest::prop_assert_eq!(joined.strip_suffix(b"/").unwrap_or(joined), &name.bytes[..]);
                }
            }
        }

        #[test]
        fn any_pattern_ends(pattern in "[a*?{},\\[\\]!/\\\\]{0,30}", name in "[ab/]{0,40}") {
            if let (Ok(source), Ok(name)) = (Source::new(&pattern), Name::new(name.trim_start_matches('/').as_bytes())) {
                let _ = source.matches(&name);
            }
        }
    }

    #[test]
    fn names_that_leave_the_context_are_refused() {
        for raw in ["/etc/passwd", "a/../../b", "..", "a\0b", &"a/".repeat(DEPTH + 1)] {
            assert!(Name::new(raw.as_bytes()).is_err(), "{raw}");
        }
        assert_eq!(Name::new(b"./a//b/./c/").unwrap().bytes, b"a/b/c");
        assert!(Name::new(".".repeat(3).as_bytes()).is_ok());
        assert_eq!(shown(b"a\x1b[2J\n"), "a\\u{1b}[2J\\n");
    }

    #[test]
    fn a_source_is_a_path_or_a_pattern() {
        let of =
            |from: &str, name: &str| Source::new(from).unwrap().matches(&Name::new(name.as_bytes()).unwrap());
        assert_eq!((of("a", "a"), of("a", "a/b"), of("a", "ab")), (Some(1), Some(1), None));
        assert_eq!((of("./a/", "a/b"), of("/a/b", "a/b/c"), of("a/b", "a")), (Some(1), Some(2), None));
        assert_eq!((of(".", "a/b"), of("/", "a"), of("./", ".")), (Some(0), Some(0), Some(0)));
        assert_eq!(
            (of("*.txt", "x.txt"), of("*.txt", "d/x.txt"), of("*.txt", ".x.txt")),
            (Some(1), None, Some(1))
        );
        assert_eq!((of("d/*", "d/x/y"), of("**/*.txt", "d/e/x.txt")), (Some(2), Some(3)));
        assert_eq!((of("[id]", "[id]/x"), of("[id]", "i"), of("a?", "ab")), (Some(1), Some(1), Some(1)));
        assert_eq!((of("!a", "!a"), of("!a", "b"), of("!*", "b")), (Some(1), None, None));
        assert_eq!((of("{a,b}.c", "b.c"), of("a\\*", "a*"), of("a\\*", "ab")), (Some(1), Some(1), None));
        assert!(Source::new("../x").is_err() && Source::new("a/../../x").is_err());
    }
}
