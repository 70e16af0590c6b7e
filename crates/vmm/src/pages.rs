//! Which pages of guest RAM a clone has written, and a memory file made of parent and written pages.
//!
//! Source: Linux, Documentation/admin-guide/mm/pagemap. A page of a private file mapping is the
//! machine's own when it is present and not file-backed, or swapped out.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use kelvin_host::file::{open_plain, read_plain};
use kelvin_host::memory::{self, PAGE};
use rustix::fs::ioctl_ficlone;

use crate::hostile::read_file;

const PAGE_BYTES: usize = PAGE as usize;
/// Bytes copied by one read.
const RUN: u64 = 4 << 20;
/// The longest list of mappings that is read: a VMM has some hundred, and may have been taken over.
const MAX_MAPS: u64 = 8 << 20;

/// A part of a file that a process has mapped.
#[derive(Debug)]
pub struct Mapping {
    start: u64,
    end: u64,
    /// Where in the file it begins.
    offset: u64,
    inode: u64,
    path: PathBuf,
}

impl Mapping {
    fn bytes(&self) -> u64 {
        self.end - self.start
    }
}

fn mappings(pid: i32) -> io::Result<Vec<Mapping>> {
    let maps = read_file(format!("/proc/{pid}/maps"), MAX_MAPS)?;
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

/// The snapshot's memory below `data_dir` that `pid`, which is in no jail, has mapped.
pub fn mapped_memory(pid: i32, data_dir: &Path) -> io::Result<PathBuf> {
    let snapshots = data_dir.join("snapshots");
    mappings(pid)?
        .into_iter()
        .find(|mapping| mapping.path.starts_with(&snapshots) && mapping.path.ends_with("memory"))
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

/// What [`begin_memory`] has copied, and found.
#[derive(Debug, Default)]
pub struct Ahead {
    /// Where the machine has mapped its memory: looked up once, its VMM does not move it.
    parts: Option<Vec<Mapping>>,
    /// Places in the file, ascending, and where in `bytes` theirs begin. The machine may have written there since.
    places: Vec<(Range<u64>, usize)>,
    bytes: Vec<u8>,
}

impl Ahead {
    /// What was copied of the page at `place`.
    fn page(&self, place: u64) -> Option<&[u8]> {
        let next = self.places.partition_point(|(range, _)| range.end <= place);
        let (range, start) = self.places.get(next).filter(|(range, _)| range.start <= place)?;
        let start = start + usize::try_from(place - range.start).ok()?;
        self.bytes.get(start..start + PAGE_BYTES)
    }
}

/// A run of pages that are the machine's own.
#[derive(Debug, Clone)]
struct Run {
    address: u64,
    place: u64,
    bytes: u64,
}

/// Reads what the machine has at `runs`, some at a time, and gives each batch with its bytes.
fn read_runs(
    pid: i32,
    runs: &[Run],
    mut take: impl FnMut(&[Run], &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let (mut buffer, mut rest) = (Vec::new(), runs);
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = |run: &&Run| {
            bytes += run.bytes;
            bytes <= RUN
        };
        // None is longer than that.
        let count = rest.iter().take_while(fits).count().max(1);
        let (batch, next) = rest.split_at(count);
        rest = next;
        let addresses: Vec<_> = batch.iter().map(|run| run.address..run.address + run.bytes).collect();
        let bytes: u64 = batch.iter().map(|run| run.bytes).sum();
        buffer.resize(usize::try_from(bytes).map_err(io::Error::other)?, 0);
        memory::read_ranges(pid, &addresses, &mut buffer)?;
        take(batch, &buffer)?;
    }
    Ok(())
}

/// A copy of a snapshot's memory that shares its blocks.
pub fn clone_memory(from: &Path, to: &Path) -> io::Result<()> {
    copy(&read_plain(from)?, &File::options().write(true).create_new(true).open(to)?)
}

/// The most that is copied ahead, in bytes: it is kept in memory, to be compared with.
const AHEAD: u64 = 64 << 20;

/// Does what can be done of [`save_memory`] while the machine still runs: a snapshot's file does not change, so its
/// copy is made, and pages laid over it that `pid` has written until now; pages on their way to a file that is the
/// memory itself are written.
pub fn begin_memory(pid: i32, from: &Path, to: &Path, private: bool) -> io::Result<Ahead> {
    let source = read_plain(from)?;
    if !private {
        return source.sync_data().map(|()| Ahead::default());
    }
    let target = File::options().write(true).create_new(true).open(to)?;
    copy(&source, &target)?;
    let parts = parts(pid, from)?;
    let mut total = 0;
    let fits = |run: &Run| {
        total += run.bytes;
        total <= AHEAD
    };
    let mut runs: Vec<Run> = own_runs(pid, &parts)?.into_iter().take_while(fits).collect();
    runs.sort_by_key(|run| run.place);
    let mut ahead = Ahead { parts: Some(parts), ..Ahead::default() };
    read_runs(pid, &runs, |batch, bytes| {
        let mut at = 0;
        for run in batch {
            let end = at + usize::try_from(run.bytes).map_err(io::Error::other)?;
            target.write_all_at(&bytes[at..end], run.place)?;
            ahead.places.push((run.place..run.place + run.bytes, ahead.bytes.len() + at));
            at = end;
        }
        ahead.bytes.extend_from_slice(bytes);
        Ok(())
    })?;
    Ok(ahead)
}

/// Writes the memory of the stopped machine `pid` to `to`, which [`begin_memory`] may have begun with `ahead`: a reflink
/// of `from` with the pages laid over it that the machine has written. Those that are there as they are now are not
/// written again: to compare a page costs a fraction of writing it. Returns how many pages the machine had written;
/// `None` when the file is the memory itself.
pub fn save_memory(
    pid: i32,
    from: &Path,
    to: &Path,
    private: bool,
    mut ahead: Ahead,
) -> io::Result<Option<u64>> {
    if !private {
        let source = read_plain(from)?;
        // Pages that were written through the mapping belong to the file, on their way to the disk.
        source.sync_data()?;
        copy(&source, &File::options().write(true).create_new(true).open(to)?)?;
        return Ok(None);
    }
    let target = match open_plain(to, File::options().write(true)) {
        Ok(begun) => begun,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let target = File::options().write(true).create_new(true).open(to)?;
            copy(&read_plain(from)?, &target)?;
            target
        }
        Err(error) => return Err(error),
    };
    let parts = ahead.parts.take().map_or_else(|| parts(pid, from), Ok)?;
    let mut runs = own_runs(pid, &parts)?;
    runs.sort_by_key(|run| run.place);
    read_runs(pid, &runs, |batch, bytes| {
        let mut pages = bytes.chunks_exact(PAGE_BYTES);
        for run in batch {
            let places = (run.place..run.place + run.bytes).step_by(PAGE_BYTES);
            for (place, page) in places.zip(pages.by_ref()) {
                if ahead.page(place) != Some(page) {
                    target.write_all_at(page, place)?;
                }
            }
        }
        Ok(())
    })?;
    give_back(&ahead, &runs, from, &target)?;
    Ok(Some(runs.iter().map(|run| run.bytes / PAGE).sum()))
}

/// What was copied ahead and is not the machine's own any more is the snapshot's again.
fn give_back(ahead: &Ahead, runs: &[Run], from: &Path, target: &File) -> io::Result<()> {
    let (mut source, mut page) = (None, [0; PAGE_BYTES]);
    for place in ahead.places.iter().flat_map(|(range, _)| range.clone().step_by(PAGE_BYTES)) {
        let next = runs.partition_point(|run| run.place + run.bytes <= place);
        if runs.get(next).is_some_and(|run| run.place <= place) {
            continue;
        }
        let source = match &mut source {
            Some(source) => source,
            none => none.insert(read_plain(from)?),
        };
        source.read_exact_at(&mut page, place)?;
        target.write_all_at(&page, place)?;
    }
    Ok(())
}

/// How many pages the machine `pid` has written of the memory that it maps from `from`.
pub fn count_own(pid: i32, from: &Path) -> io::Result<u64> {
    Ok(own_runs(pid, &parts(pid, from)?)?.iter().map(|run| run.bytes / PAGE).sum())
}

/// The first pages, `most` at the most, that the machine `pid` has written of the memory that it maps from `from`, by
/// their places in it.
pub fn list_own(pid: i32, from: &Path, most: usize) -> io::Result<Vec<u64>> {
    let runs = own_runs(pid, &parts(pid, from)?)?;
    let pages = runs.iter().flat_map(|run| (run.place..run.place + run.bytes).step_by(PAGE_BYTES));
    Ok(pages.take(most).collect())
}

/// Gives the machine `pid`, which stands still, pages of its own where it has mapped `pages` of a file as `parts`. What
/// its guest writes first costs no fault then, which is the larger part of waking up.
///
/// # Errors
/// As [`kelvin_host::memory::make_own`].
pub fn own_ahead(pid: i32, parts: &[Mapping], pages: &[u64]) -> io::Result<()> {
    let address = |page: &u64| {
        let part = parts.iter().find(|part| (part.offset..part.offset + part.bytes()).contains(page))?;
        usize::try_from(part.start + (page - part.offset)).ok()
    };
    let mut addresses = pages.iter().filter_map(address).peekable();
    while let Some(start) = addresses.next() {
        let mut end = start + PAGE_BYTES;
        while addresses.next_if_eq(&end).is_some() {
            end += PAGE_BYTES;
        }
        memory::make_own(pid, start..end)?;
    }
    Ok(())
}

/// The parts in which `pid` has mapped the file `from`: a VMM may do it in several.
///
/// # Errors
/// `NotFound` when they are not all of it. As the kernel gives them.
pub fn parts(pid: i32, from: &Path) -> io::Result<Vec<Mapping>> {
    let metadata = std::fs::symlink_metadata(from)?;
    // By its name too: files of other file systems can have the same number, and devices are told in two ways.
    let of_it =
        |mapping: &Mapping| mapping.inode == metadata.ino() && mapping.path.file_name() == from.file_name();
    let parts: Vec<Mapping> = mappings(pid)?.into_iter().filter(of_it).collect();
    let (bytes, all) = (parts.iter().map(Mapping::bytes).sum::<u64>(), metadata.len());
    if bytes == all {
        return Ok(parts);
    }
    let what = format!("the VMM has mapped {bytes} of {all} bytes of its snapshot's memory");
    Err(io::Error::new(io::ErrorKind::NotFound, what))
}

/// The runs of pages that are the machine's own, each of 4 MiB at most.
fn own_runs(pid: i32, parts: &[Mapping]) -> io::Result<Vec<Run>> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut runs = Vec::new();
    for part in parts {
        for own in memory::own_ranges(&pagemap, part.start..part.end)? {
            let mut address = own.start;
            while address < own.end {
                let bytes = RUN.min(own.end - address);
                runs.push(Run { address, place: part.offset + (address - part.start), bytes });
                address += bytes;
            }
        }
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};

    use super::*;

    /// Maps a file private, says so, and says what it holds there when it is asked.
    const MAPS: &str = "
import mmap, sys
file = open(sys.argv[1], 'rb')
held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
print('mapped', flush=True)
sys.stdin.readline()
print(held[:].hex(), flush=True)
";

    #[test]
    fn pages_are_owned_ahead_with_what_they_hold() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory");
        let bytes: Vec<u8> = (0..64 * PAGE_BYTES).map(|at| (at / PAGE_BYTES) as u8 + 1).collect();
        std::fs::write(&path, &bytes).unwrap();
        let mut process = Command::new("python3")
            .args(["-c", MAPS])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "mapped");
        let pid = i32::try_from(process.id()).unwrap();
        let mapped = parts(pid, &path).unwrap();
        assert_eq!(count_own(pid, &path).unwrap(), 0);

        let wanted = [0, 7 * PAGE, 8 * PAGE, 63 * PAGE];
        own_ahead(pid, &mapped, &wanted).unwrap();
        assert_eq!(list_own(pid, &path, 100).unwrap(), wanted);
        assert_eq!(list_own(pid, &path, 2).unwrap(), wanted[..2]);
        // What is not in the file is nobody's page, and passed over.
        own_ahead(pid, &mapped, &[64 * PAGE]).unwrap();
        assert_eq!(count_own(pid, &path).unwrap(), 4);

        // Saved with what was copied ahead, some of which is another by now, and some of which is not there any more.
        let saved = directory.path().join("saved");
        let ahead = begin_memory(pid, &path, &saved, true).unwrap();
        assert_eq!(ahead.page(8 * PAGE), Some(&[9; PAGE_BYTES][..]));
        assert_eq!(ahead.page(63 * PAGE), Some(&[64; PAGE_BYTES][..]));
        assert_eq!(ahead.page(9 * PAGE), None);
        let file = File::options().write(true).open(&saved).unwrap();
        // As if the machine had written the page at 7 since it was copied.
        let mut ahead = ahead;
        ahead.bytes[PAGE_BYTES..2 * PAGE_BYTES].fill(0xee);
        file.write_all_at(&[0xee; PAGE_BYTES], 7 * PAGE).unwrap();
        own_ahead(pid, &mapped, &[20 * PAGE]).unwrap();
        assert_eq!(save_memory(pid, &path, &saved, true, ahead).unwrap(), Some(5));
        assert_eq!(std::fs::read(&saved).unwrap(), bytes);
        // What was copied ahead and is not the machine's own any more is the snapshot's.
        file.write_all_at(&[0xee; PAGE_BYTES], 30 * PAGE).unwrap();
        let places = vec![(0..PAGE, 0), (30 * PAGE..31 * PAGE, PAGE_BYTES)];
        let more = Ahead { parts: None, places, bytes: vec![0; 2 * PAGE_BYTES] };
        assert_eq!(save_memory(pid, &path, &saved, true, more).unwrap(), Some(5));
        assert_eq!(std::fs::read(&saved).unwrap(), bytes);
        // What was not copied ahead is written, whatever is there.
        file.write_all_at(&[0xee; PAGE_BYTES], 8 * PAGE).unwrap();
        assert_eq!(save_memory(pid, &path, &saved, true, Ahead::default()).unwrap(), Some(5));
        assert_eq!(std::fs::read(&saved).unwrap(), bytes);

        process.stdin.take().unwrap().write_all(b"\n").unwrap();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(lines.next().unwrap().unwrap(), hex);
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        assert!(process.wait().unwrap().success());
        assert!(own_ahead(pid, &mapped, &wanted).is_err(), "it is not there any more");
    }
}
