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
            let inode = fields.nth(3)?.parse().ok()?;
            Some(Mapping {
                start: u64::from_str_radix(start, 16).ok()?,
                end: u64::from_str_radix(end, 16).ok()?,
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
    let source = File::open(from)?;
    if !private {
        // Pages that were written through the mapping belong to the file, on their way to the disk.
        source.sync_data()?;
        copy(&source, &File::options().write(true).create_new(true).open(to)?)?;
        return Ok(None);
    }
    let target = match File::options().write(true).open(to) {
        Ok(begun) => begun,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let target = File::options().write(true).create_new(true).open(to)?;
            copy(&source, &target)?;
            target
        }
        Err(error) => return Err(error),
    };
    let found = source.metadata()?;
    let mapping = mappings(pid)?
        .into_iter()
        .find(|mapping| mapping.inode == found.ino() && mapping.end - mapping.start == found.len())
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the VMM does not map its memory"))?;
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let pages = (mapping.end - mapping.start) / PAGE;
    let mut buffer = Vec::new();
    let mut entries = vec![0; usize::try_from(pages * 8).map_err(io::Error::other)?];
    pagemap.read_exact_at(&mut entries, mapping.start / PAGE * 8)?;
    let own = |page: u64| {
        let at = usize::try_from(page * 8).unwrap_or(usize::MAX);
        let Some(bytes) = entries.get(at..at + 8) else {
            return false;
        };
        let entry = u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
        entry & SWAPPED != 0 || (entry & PRESENT != 0 && entry & FILE == 0)
    };
    let (mut page, mut copied) = (0, 0);
    while page < pages {
        if !own(page) {
            page += 1;
            continue;
        }
        let first = page;
        while page < pages && page - first < RUN && own(page) {
            page += 1;
        }
        buffer.resize(usize::try_from((page - first) * PAGE).map_err(io::Error::other)?, 0);
        memory.read_exact_at(&mut buffer, mapping.start + first * PAGE)?;
        target.write_all_at(&buffer, first * PAGE)?;
        copied += page - first;
    }
    Ok(Some(copied))
}
