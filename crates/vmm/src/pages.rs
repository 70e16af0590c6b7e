//! Which pages of guest RAM a clone has written, and a memory file made of parent and written pages.
//!
//! Source: Linux, Documentation/admin-guide/mm/pagemap. A page of a private file mapping is the
//! machine's own when it is present and not file-backed, or swapped out.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::ioctl_ficlone;

const PAGE: u64 = 4096;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE: u64 = 1 << 61;
/// Pages copied by one read: 4 MiB.
const RUN: u64 = 1024;

struct Mapping {
    start: u64,
    end: u64,
    /// Where in the file it begins.
    offset: u64,
    inode: u64,
    path: PathBuf,
}

fn mappings(pid: i32) -> io::Result<Vec<Mapping>> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    Ok(maps
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let (start, end) = fields.next()?.split_once('-')?;
            let offset = u64::from_str_radix(fields.nth(1)?, 16).ok()?;
            let inode = fields.nth(1)?.parse().ok()?;
            Some(Mapping {
                start: u64::from_str_radix(start, 16).ok()?,
                end: u64::from_str_radix(end, 16).ok()?,
                offset,
                inode,
                path: fields.next()?.into(),
            })
        })
        .collect())
}

/// The memory file below `data_dir` that `pid` has mapped.
pub fn mapped_memory(pid: i32, data_dir: &Path) -> io::Result<PathBuf> {
    mappings(pid)?
        .into_iter()
        .find(|mapping| mapping.path.starts_with(data_dir) && mapping.path.ends_with("memory"))
        .map(|mapping| mapping.path)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the VMM maps no snapshot's memory"))
}

fn copy(source: &File, target: &File) -> io::Result<()> {
    match ioctl_ficlone(target, source) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::NOSPC) => Err(io::ErrorKind::StorageFull.into()),
        Err(_) => io::copy(&mut &*source, &mut &*target).map(drop),
    }
}

/// Does what can be done of [`save_memory`] while the machine still runs: a snapshot's file does not change, so its
/// copy is made; pages on their way to a file that is the memory itself are written.
pub fn begin_memory(from: &Path, to: &Path, private: bool) -> io::Result<()> {
    let source = File::open(from)?;
    if !private {
        return source.sync_data();
    }
    copy(&source, &File::options().write(true).create_new(true).open(to)?)
}

/// Writes the memory of the stopped machine `pid` to `to`, which [`begin_memory`] may have begun: a reflink of
/// `from` with the pages laid over it that the machine has written. Returns how many those were; `None` when
/// the file is the memory itself.
pub fn save_memory(pid: i32, from: &Path, to: &Path, private: bool) -> io::Result<Option<u64>> {
    if !private {
        let source = File::open(from)?;
        // Pages that were written through the mapping belong to the file, on their way to the disk.
        source.sync_data()?;
        copy(&source, &File::options().write(true).create_new(true).open(to)?)?;
        return Ok(None);
    }
    let target = match File::options().write(true).open(to) {
        Ok(begun) => begun,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let target = File::options().write(true).create_new(true).open(to)?;
            copy(&File::open(from)?, &target)?;
            target
        }
        Err(error) => return Err(error),
    };
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let mut buffer = Vec::new();
    let copied = own_pages(pid, from, |address, at, bytes| {
        buffer.resize(usize::try_from(bytes).map_err(io::Error::other)?, 0);
        memory.read_exact_at(&mut buffer, address)?;
        target.write_all_at(&buffer, at)
    })?;
    Ok(Some(copied))
}

/// How many pages the machine `pid` has written of the memory that it maps from `from`.
pub fn count_own(pid: i32, from: &Path) -> io::Result<u64> {
    own_pages(pid, from, |_, _, _| Ok(()))
}

/// The parts in which `pid` has mapped the file that `metadata` is of; none when that is not all of it.
fn parts(pid: i32, metadata: &std::fs::Metadata) -> io::Result<Option<Vec<Mapping>>> {
    let of_it = |mapping: &Mapping| mapping.inode == metadata.ino();
    let parts: Vec<Mapping> = mappings(pid)?.into_iter().filter(of_it).collect();
    let bytes: u64 = parts.iter().map(|part| part.end - part.start).sum();
    Ok((bytes == metadata.len()).then_some(parts))
}

/// Calls `visit` for each run of pages that are the machine's own: address, place in the file, bytes. Returns how many
/// pages there are. A VMM may map the file in several parts.
fn own_pages(
    pid: i32,
    from: &Path,
    mut visit: impl FnMut(u64, u64, u64) -> io::Result<()>,
) -> io::Result<u64> {
    let parts = parts(pid, &std::fs::metadata(from)?)?
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the VMM does not map its memory"))?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut total = 0;
    for part in parts {
        let pages = (part.end - part.start) / PAGE;
        let mut entries = vec![0; usize::try_from(pages * 8).map_err(io::Error::other)?];
        pagemap.read_exact_at(&mut entries, part.start / PAGE * 8)?;
        let own = |page: u64| {
            let at = usize::try_from(page * 8).unwrap_or(usize::MAX);
            let Some(bytes) = entries.get(at..at + 8) else {
                return false;
            };
            let entry = u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
            entry & SWAPPED != 0 || (entry & PRESENT != 0 && entry & FILE == 0)
        };
        let mut page = 0;
        while page < pages {
            if !own(page) {
                page += 1;
                continue;
            }
            let first = page;
            while page < pages && page - first < RUN && own(page) {
                page += 1;
            }
            visit(part.start + first * PAGE, part.offset + first * PAGE, (page - first) * PAGE)?;
            total += page - first;
        }
    }
    Ok(total)
}

/// Whether `pid` has mapped the whole file that `metadata` is of.
pub fn maps_whole(pid: i32, metadata: &std::fs::Metadata) -> io::Result<bool> {
    parts(pid, metadata).map(|parts| parts.is_some())
}
