//! A reader of tar archives that is asked for one entry after another and holds none of their contents.
//!
//! Of our own because what it reads is hostile and has to be whole: `tar` (the crate) reads a long name of any length into
//! memory, and knows no sparse files in PAX format.
//!
//! Source: POSIX.1-2024 `pax`, "pax Interchange Format" and "ustar Interchange Format"; GNU tar's manual, "Basic Tar Format"
//! and "Storing Sparse Files".

mod header;
mod pax;
mod sparse;

use std::io::{self, Read};

use header::{BLOCK, Header};
use pax::Pax;

use crate::error::{Fault, Refusal, shown};
use crate::limits::Limits;

/// Bytes of the extended headers of one entry.
const MAX_PAX: u64 = 1 << 20;
/// The largest file that ext4 has with blocks of 4 KiB: 2^32 blocks less one.
pub(crate) const MAX_FILE: u64 = ((1 << 32) - 1) * 4096;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File,
    Directory,
    Symlink,
    HardLink,
    Char { major: u32, minor: u32 },
    Block { major: u32, minor: u32 },
    Fifo,
}

/// An entry without its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// As it is there.
    pub(crate) path: Vec<u8>,
    /// Where a link leads.
    pub(crate) link: Vec<u8>,
    pub(crate) kind: EntryKind,
    /// Permission bits, with setuid, setgid and sticky.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since the epoch, and nanoseconds.
    pub(crate) mtime: (i64, u32),
    /// Names with their namespaces.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Length of a file, with its holes.
    pub(crate) size: u64,
    /// Of a sparse file: where its data is, as (offset, length), ascending. The content is their bytes one after another.
    pub(crate) sparse: Option<Vec<(u64, u64)>>,
}

/// The reader.
pub(crate) struct Archive<'a, R> {
    source: R,
    limits: &'a Limits,
    /// Bytes of the current entry's content that are not read, and of what fills its last block.
    left: u64,
    fill: u64,
    /// Where in the archive the next byte is.
    at: u64,
    entries: u64,
}

impl<'a, R: Read> Archive<'a, R> {
    /// A reader of an archive that has `entries` before it: those of the layers below count.
    pub(crate) fn new(source: R, limits: &'a Limits, entries: u64) -> Self {
        Self { source, limits, left: 0, fill: 0, at: 0, entries }
    }

    /// Entries so far, those before included.
    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    /// Where the current entry's content begins, and its length there.
    pub(crate) fn place(&self) -> (u64, u64) {
        (self.at, self.left)
    }

    /// The reader below, behind the last block that was read.
    pub(crate) fn into_source(self) -> R {
        self.source
    }

    fn exact(&mut self, buffer: &mut [u8]) -> Result<(), Fault> {
        self.source.read_exact(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof if error.get_ref().is_none() => cut(),
            _ => Fault::reading(error),
        })?;
        self.at += buffer.len() as u64;
        Ok(())
    }

    /// A block that belongs to the header.
    fn whole_block(&mut self) -> Result<[u8; BLOCK], Fault> {
        let mut block = [0; BLOCK];
        self.exact(&mut block)?;
        Ok(block)
    }

    /// A block of the current entry's content.
    fn content_block(&mut self) -> Result<[u8; BLOCK], Fault> {
        let left = self.left.checked_sub(BLOCK as u64);
        let left = left.ok_or(Refusal::Tar("the map of a sparse file is longer than its content"))?;
        let block = self.whole_block()?;
        self.left = left;
        Ok(block)
    }

    /// A header block; none at the end of the archive, with its blocks of zeros or without.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, Fault> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.source.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(cut()),
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Fault::reading(error)),
            }
        }
        self.at += BLOCK as u64;
        Ok(block.iter().any(|byte| *byte != 0).then_some(block))
    }

    /// Passes over what is left of the current entry.
    fn pass(&mut self) -> Result<(), Fault> {
        let bytes = self.left + self.fill;
        let copied =
            io::copy(&mut (&mut self.source).take(bytes), &mut io::sink()).map_err(Fault::reading)?;
        if copied < bytes {
            return Err(cut());
        }
        self.at += bytes;
        (self.left, self.fill) = (0, 0);
        Ok(())
    }

    fn enter(&mut self, bytes: u64) {
        self.left = bytes;
        self.fill = bytes.next_multiple_of(BLOCK as u64) - bytes;
    }

    /// The content of a small entry, whole.
    fn small(&mut self, bytes: u64, limit: u64) -> Result<Vec<u8>, Fault> {
        if bytes > limit {
            return Err(Refusal::Limit { what: "bytes of an extended header", limit }.into());
        }
        let mut content = vec![0; bytes as usize];
        self.enter(bytes);
        self.exact(&mut content)?;
        self.left = 0;
        self.pass()?;
        Ok(content)
    }

    /// A long name, as GNU tar writes it: with a zero at its end.
    fn long_name(&mut self, bytes: u64) -> Result<Vec<u8>, Fault> {
        let mut name = self.small(bytes, self.limits.path_bytes as u64 + 1)?;
        if name.last() == Some(&0) {
            name.pop();
        }
        Ok(name)
    }

    /// The next entry; none at the end.
    ///
    /// # Errors
    /// A [`Refusal`] that names what is wrong; of the reader.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, Fault> {
        self.pass()?;
        let mut pax = Pax::default();
        let (mut long_path, mut long_link) = (None, None);
        loop {
            let Some(block) = self.block()? else { return Ok(None) };
            // Headers that only extend the next one count, too: an archive may have nothing else.
            self.entries += 1;
            if self.entries > self.limits.entries {
                return Err(Refusal::Limit { what: "entries", limit: self.limits.entries }.into());
            }
            let header = Header::parse(&block)?;
            match header.kind {
                b'x' => {
                    let records = self.small(header.size()?, MAX_PAX)?;
                    pax = Pax::parse(&records)?;
                }
                // What `git archive` writes: a comment. Nothing that decides about a file may be global.
                b'g' => drop(self.small(header.size()?, MAX_PAX)?),
                b'L' => long_path = Some(self.long_name(header.size()?)?),
                b'K' => long_link = Some(self.long_name(header.size()?)?),
                _ => return self.entry(&block, &header, pax, long_path, long_link).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        block: &[u8; BLOCK],
        header: &Header,
        mut pax: Pax,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry, Fault> {
        let path = pax.sparse.name.take().or(pax.path.take()).or(long_path).unwrap_or_else(|| header.path());
        let name = || shown(&path);
        let odd = |reason| Fault::from(Refusal::Entry { name: name(), reason });
        let link = pax.link.take().or(long_link).unwrap_or_else(|| header.link.clone());
        for text in [&path, &link] {
            if text.contains(&0) {
                return Err(Refusal::Name { name: name(), reason: "it has a zero byte" }.into());
            }
            if text.len() > self.limits.path_bytes {
                return Err(
                    Refusal::Limit { what: "bytes of a path", limit: self.limits.path_bytes as u64 }.into()
                );
            }
        }
        let stored = match pax.size {
            Some(size) => size,
            None => header.size()?,
        };
        let id = |pax: Option<u64>, field: &[u8]| {
            let id = match pax {
                Some(id) => id,
                None => header::number(field)?,
            };
            u32::try_from(id).ok().filter(|id| *id != u32::MAX).ok_or_else(|| {
                Fault::from(Refusal::Entry { name: name(), reason: "its owner is no id of 32 bits" })
            })
        };
        let (uid, gid) = (id(pax.uid, &header.uid)?, id(pax.gid, &header.gid)?);
        let device = || -> Result<(u32, u32), Fault> {
            let number = |field: &[u8], most: u64| {
                header::number(field)?
                    .try_into()
                    .ok()
                    .filter(|number: &u32| u64::from(*number) <= most)
                    .ok_or_else(|| odd("its device number is none of Linux"))
            };
            Ok((number(&header.major, 0xfff)?, number(&header.minor, 0xf_ffff)?))
        };
        let kind = match header.kind {
            // Before ustar a directory was a file whose name ends so.
            0 | b'0' if path.ends_with(b"/") => EntryKind::Directory,
            0 | b'0' | b'7' | b'S' => EntryKind::File,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => device().map(|(major, minor)| EntryKind::Char { major, minor })?,
            b'4' => device().map(|(major, minor)| EntryKind::Block { major, minor })?,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            _ => return Err(odd("its type is not supported")),
        };
        let is_file = kind == EntryKind::File;
        self.enter(if is_file { stored } else { 0 });
        let (mut size, mut map) = (if is_file { stored } else { 0 }, None);
        if is_file && (header.kind == b'S' || pax.sparse.is_some()) {
            let (real, segments) = match header.kind {
                b'S' => sparse::old(block, || self.whole_block())?,
                _ => sparse::of_pax(&pax.sparse, || self.content_block())?,
            };
            sparse::check(&segments, real, self.left).map_err(odd)?;
            (size, map) = (real, Some(segments));
        } else if !is_file && stored > 0 && kind != EntryKind::HardLink {
            // Some writers give a directory a size, and no content. One that has content would be out of step from here on,
            // which the next header's checksum tells.
            tracing::trace!(path = %name(), "an entry without content has a size");
        }
        if size > MAX_FILE {
            return Err(Refusal::Limit { what: "bytes of a file", limit: MAX_FILE }.into());
        }
        Ok(Entry {
            link,
            kind,
            mode: (header::number(&header.mode)? & 0o7777) as u16,
            uid,
            gid,
            mtime: pax.mtime.unwrap_or_else(|| header.mtime()),
            xattrs: pax.xattrs,
            size,
            sparse: map,
            path,
        })
    }
}

/// The current entry's content.
impl<R: Read> Read for Archive<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = self.left.min(buffer.len() as u64) as usize;
        if most == 0 {
            return Ok(0);
        }
        let read = self.source.read(&mut buffer[..most])?;
        if read == 0 {
            return Err(io::Error::other(Refusal::Tar(CUT)));
        }
        self.left -= read as u64;
        self.at += read as u64;
        Ok(read)
    }
}

const CUT: &str = "it is cut short";

fn cut() -> Fault {
    Refusal::Tar(CUT).into()
}
