//! Memory of another process.
//!
//! Who writes: nobody changes what another process holds; its pages become its own. A crash leaves some that have and
//! some that have not, which is the same to it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use libc::{c_ulong, iovec};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Bytes that one `process_vm_writev` makes ready before it looks for what to write: as many pages as two pages hold
/// pointers to. Source: Linux, `mm/process_vm_access.c`, `PVM_MAX_KMALLOC_PAGES`.
const READY: usize = 1024 * PAGE as usize;

/// Gives what this process has freed back to the kernel: an allocator keeps it for each thread that was busy once, which after
/// some captures is more than everything that is used. Takes milliseconds.
pub async fn give_back() {
    // It is no step of anything there.
    #[cfg(feature = "testing")]
    if crate::testing::is_virtual() {
        return;
    }
    let _ = tokio::task::spawn_blocking(trim).await;
}

#[allow(unsafe_code)]
fn trim() {
    // Others give back by themselves.
    #[cfg(target_env = "gnu")]
    // SAFETY: touches nothing that is allocated. Source: malloc_trim(3).
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Gives `pid` pages of its own at `addresses`, whole pages. A private mapping of a file is copied there, page by page, as
/// if the process had written to it. No byte changes, whatever the process does meanwhile: the kernel makes a page ready to
/// be written before it looks for what to write, and finds nothing.
///
/// # Errors
/// `EPERM` for a process that is not this one's to change, `ESRCH` when it is gone. Where nothing is mapped nothing
/// happens.
#[allow(unsafe_code)]
pub fn make_own(pid: i32, addresses: Range<usize>) -> io::Result<()> {
    for start in addresses.clone().step_by(READY) {
        let bytes = READY.min(addresses.end - start);
        let far = iovec { iov_base: std::ptr::without_provenance_mut(start), iov_len: bytes };
        // Nothing is ever mapped at zero. Source: Linux, `vm.mmap_min_addr`.
        let near = iovec { iov_base: std::ptr::null_mut(), iov_len: bytes };
        // SAFETY: the kernel writes to nothing of this process, and checks the other's addresses.
        if unsafe { libc::process_vm_writev(pid, &near, 1, &far, 1, 0) } >= 0 {
            return Err(io::Error::other("the page at zero is mapped"));
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EFAULT) {
            return Err(error);
        }
    }
    Ok(())
}

/// The most ranges of one `process_vm_readv`. Source: Linux, `linux/uio.h`, `UIO_MAXIOV`.
const MOST_RANGES: usize = 1024;

/// Reads memory of `pid` at `addresses`, one range after the other, into `buffer`, which has room for just those.
///
/// # Errors
/// `EPERM` for a process that is not this one's to read, `ESRCH` when it is gone, `UnexpectedEof` where nothing is mapped.
#[allow(unsafe_code)]
pub fn read_ranges(pid: i32, addresses: &[Range<u64>], buffer: &mut [u8]) -> io::Result<()> {
    let mut rest = buffer;
    for ranges in addresses.chunks(MOST_RANGES) {
        let far = ranges
            .iter()
            .map(|range| {
                let start = usize::try_from(range.start).map_err(io::Error::other)?;
                let length = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
                Ok(iovec { iov_base: std::ptr::without_provenance_mut(start), iov_len: length })
            })
            .collect::<io::Result<Vec<iovec>>>()?;
        let length = far.iter().map(|far| far.iov_len).sum();
        let (here, next) = std::mem::take(&mut rest)
            .split_at_mut_checked(length)
            .ok_or_else(|| io::Error::other("the buffer is too small"))?;
        rest = next;
        let near = iovec { iov_base: here.as_mut_ptr().cast(), iov_len: length };
        let count = far.len() as libc::c_ulong;
        // SAFETY: `near` is a slice of this process that nobody else uses; the kernel checks the other's addresses.
        let read = unsafe { libc::process_vm_readv(pid, &near, 1, far.as_ptr(), count, 0) };
        match usize::try_from(read) {
            Ok(read) if read == length => {}
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
    Ok(())
}

/// Of an entry of `/proc/PID/pagemap`. Source: Linux, `Documentation/admin-guide/mm/pagemap.rst`.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE: u64 = 1 << 61;

/// Where in `addresses` the process has pages that are its own and no file's, in order. `pagemap` is its
/// `/proc/PID/pagemap`. Costs what is mapped there, not how large it is; before Linux 6.7, how large it is.
///
/// # Errors
/// As the kernel gives them.
pub fn own_ranges(pagemap: &File, addresses: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    match scan(pagemap, addresses.clone()) {
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => read(pagemap, addresses),
        scanned => scanned,
    }
}

/// Lengthens the last of `ranges` when `next` goes on from there.
fn append(ranges: &mut Vec<Range<u64>>, next: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == next.start => last.end = next.end,
        _ => ranges.push(next),
    }
}

/// [`own_ranges`] from an entry for each page.
fn read(pagemap: &File, addresses: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let bytes = (addresses.end - addresses.start) / PAGE * 8;
    let mut entries = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
    pagemap.read_exact_at(&mut entries, addresses.start / PAGE * 8)?;
    let own = |entry: &[u8; 8]| {
        let entry = u64::from_ne_bytes(*entry);
        entry & FILE == 0 && entry & (PRESENT | SWAPPED) != 0
    };
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let (entries, _) = entries.as_chunks();
    for (at, _) in (addresses.start..).step_by(PAGE as usize).zip(entries).filter(|(_, entry)| own(entry)) {
        append(&mut ranges, at..at + PAGE);
    }
    Ok(ranges)
}

/// Source: Linux, `linux/fs.h`, `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Source: Linux, `linux/fs.h`, `struct page_region`.
#[repr(C)]
#[derive(Clone, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `PAGEMAP_SCAN` and its categories. Source: Linux, `linux/fs.h`.
const SCAN: c_ulong = 0xc060_6610;
const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
/// Of one call.
const REGIONS: usize = 512;

/// [`own_ranges`] from the kernel's own walk of the page tables. `ENOTTY` before Linux 6.7.
#[allow(unsafe_code)]
fn scan(pagemap: &File, addresses: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let mut regions = vec![Region::default(); REGIONS];
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut start = addresses.start;
    while start < addresses.end {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start,
            end: addresses.end,
            vec: regions.as_mut_ptr().expose_provenance() as u64,
            vec_len: REGIONS as u64,
            category_inverted: IS_FILE,
            category_mask: IS_FILE,
            category_anyof_mask: IS_PRESENT | IS_SWAPPED,
            // All the same: neighbours are one region.
            return_mask: 0,
            ..ScanArg::default()
        };
        // SAFETY: `arg` is as the kernel declares it and outlives the call, which writes at most `vec_len` regions to
        // `vec`, all of `regions`.
        let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), SCAN, &raw mut arg) };
        let found = usize::try_from(found).map_err(|_| io::Error::last_os_error())?;
        for region in regions.iter().take(found) {
            append(&mut ranges, region.start..region.end);
        }
        if arg.walk_end <= start {
            return Err(io::Error::other("the kernel does not go on in a process's memory"));
        }
        start = arg.walk_end;
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Maps `pages` of `file` private, reads some and writes `written`; where they are.
    #[allow(unsafe_code)]
    fn map(file: &File, pages: usize, written: impl IntoIterator<Item = usize>) -> u64 {
        let page = PAGE as usize;
        file.set_len((pages * page) as u64).unwrap();
        let (read_write, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        // SAFETY: a fresh mapping that nothing else knows, of a file that is as long; it is kept to the end.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), pages * page, read_write, private, file.as_raw_fd(), 0)
        };
        assert_ne!(start, libc::MAP_FAILED);
        let start: *mut u8 = start.cast();
        for at in (0..pages).step_by(3) {
            // SAFETY: within the mapping.
            unsafe { start.add(at * page).read_volatile() };
        }
        for at in written {
            // SAFETY: within the mapping.
            unsafe { start.add(at * page).write_volatile(1) };
        }
        start.expose_provenance() as u64
    }

    #[test]
    fn both_ways_find_what_a_process_has_written() {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        // Some, and more than one call tells of.
        let (few, many) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let start = map(&few, 64, [0, 7, 8, 9, 33, 62, 63]);
        let page = |page: u64| start + page * PAGE;
        let some = [page(0)..page(1), page(7)..page(10), page(33)..page(34), page(62)..page(64)];
        assert_eq!(own_ranges(&pagemap, page(0)..page(64)).unwrap(), some);
        assert_eq!(own_ranges(&pagemap, page(8)..page(33)).unwrap(), vec![page(8)..page(10); 1]);
        assert_eq!(read(&pagemap, page(0)..page(64)).unwrap(), some);

        let pages = 4 * REGIONS as u64;
        let start = map(&many, 4 * REGIONS, (0..4 * REGIONS).step_by(2));
        let all = start..start + pages * PAGE;
        let every_other = (0..pages).step_by(2).map(|page| start + page * PAGE..start + (page + 1) * PAGE);
        assert_eq!(own_ranges(&pagemap, all.clone()).unwrap(), every_other.collect::<Vec<_>>());
        assert_eq!(own_ranges(&pagemap, all.clone()).unwrap(), read(&pagemap, all).unwrap());
    }

    #[test]
    fn every_page_that_is_asked_for_is_made_its_own() {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let me = i32::try_from(std::process::id()).unwrap();
        let file = tempfile::tempfile().unwrap();
        // Of two calls and a part, and then what is beyond.
        let pages = 2 * READY / PAGE as usize + 3;
        let start = map(&file, pages + 1, []);
        let end = start + pages as u64 * PAGE;
        make_own(me, usize::try_from(start).unwrap()..usize::try_from(end).unwrap()).unwrap();
        assert_eq!(own_ranges(&pagemap, start..end + PAGE).unwrap(), vec![start..end; 1]);
        assert!(make_own(me, 0..PAGE as usize).is_ok(), "nothing is there");
        assert!(make_own(i32::MAX, 0..PAGE as usize).is_err(), "nobody is there");
    }

    #[test]
    #[allow(unsafe_code)]
    fn what_a_process_writes_meanwhile_is_not_lost() {
        use std::sync::atomic::{AtomicU32, Ordering};
        const TIMES: u32 = 10_000_000;
        let file = tempfile::tempfile().unwrap();
        let start = usize::try_from(map(&file, 2, [])).unwrap();
        // SAFETY: the first bytes of the mapping, which is kept to the end and used by nothing else.
        let counter: &'static AtomicU32 = unsafe { &*std::ptr::with_exposed_provenance::<AtomicU32>(start) };
        let me = i32::try_from(std::process::id()).unwrap();
        let counting = std::thread::spawn(|| {
            for _ in 0..TIMES {
                counter.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut beside = 0;
        while !counting.is_finished() {
            make_own(me, start..start + 2 * PAGE as usize).unwrap();
            beside += 1;
        }
        counting.join().unwrap();
        assert!(beside > 10, "{beside} calls beside the counting prove nothing");
        assert_eq!(counter.load(Ordering::Relaxed), TIMES);
    }
}
