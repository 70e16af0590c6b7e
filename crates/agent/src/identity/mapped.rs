//! Files in memory that are written without a system call.
//!
//! Writes `/run/kelvin`, which is gone with the boot. A crash of the agent leaves the files; the next one makes them anew.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::guest_file;
use crate::place::make_way;

/// Where they are in memory; `/etc` has links to them, so that activation writes memory and not the disk.
pub(super) const RUN: &str = "/run/kelvin";
/// Room for each file, in bytes: one page.
pub(super) const ROOM: usize = 4096;
/// The most that an edited file may have to be understood, in bytes.
pub(super) const MOST: usize = 256 << 10;

/// Pages whose files may shrink under them, for the handler of SIGBUS.
static PAGES: [AtomicUsize; 4] = [const { AtomicUsize::new(0) }; 4];
/// Whether one did.
static SHRANK: AtomicBool = AtomicBool::new(false);

/// Puts memory in the place of a page whose file has shrunk, so that the write in progress ends.
#[allow(unsafe_code)]
extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid struct; what is called is async-signal-safe.
    unsafe {
        let page = (*info).si_addr() as usize & !(ROOM - 1);
        if PAGES.iter().any(|known| known.load(Ordering::Relaxed) == page) && page != 0 {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            libc::mmap(page as *mut libc::c_void, ROOM, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            SHRANK.store(true, Ordering::Relaxed);
        } else {
            libc::signal(signal, libc::SIG_DFL);
        }
    }
}

#[allow(unsafe_code)]
pub(super) fn catch_sigbus() -> io::Result<()> {
    // SAFETY: all zeros are valid; the handler has the form that SA_SIGINFO asks for.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A file in memory, mapped before the snapshot: to write it is to copy bytes, with no system call and no kernel code
/// that an emulator would have to translate first (6 to 13 ms for one `write`, measured).
pub(super) struct Mapped {
    pub(super) path: PathBuf,
    file: File,
    bytes: *mut u8,
    pub(super) content: Vec<u8>,
    slot: usize,
    /// Which file it is: device and inode.
    place: (u64, u64),
    /// Whether the file has shrunk under the mapping, which is of nothing since.
    lost: bool,
}

// SAFETY: the mapping belongs to this struct alone and lives as long as it.
#[allow(unsafe_code)]
unsafe impl Send for Mapped {}

impl Mapped {
    /// Makes the file anew, with `content` in it. `slot`: its place in [`PAGES`].
    pub(super) fn create(name: &str, slot: usize, content: &[u8]) -> io::Result<Self> {
        Self::create_at(Path::new(RUN).join(name), slot, content)
    }

    #[allow(unsafe_code)]
    fn create_at(path: PathBuf, slot: usize, content: &[u8]) -> io::Result<Self> {
        make_way(&path)?;
        let file = File::options().create_new(true).read(true).write(true).mode(0o644).open(&path)?;
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        file.set_len(content.len() as u64)?;
        // SAFETY: a new mapping at an address of the kernel's choice; a page that its file takes away is dealt with by
        // the handler of SIGBUS.
        let bytes = unsafe {
            mmap(std::ptr::null_mut(), ROOM, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)?
        };
        PAGES[slot].store(bytes as usize, Ordering::Relaxed);
        let place = file.metadata().map(|found| (found.dev(), found.ino()))?;
        let mut made =
            Self { path, file, bytes: bytes.cast(), content: content.to_vec(), slot, place, lost: false };
        // Touched now: the page is there, writable, before the snapshot.
        made.set(content)?;
        Ok(made)
    }

    /// Replaces the content. Only a length that differs from the last one costs a system call.
    #[allow(unsafe_code)]
    pub(super) fn set(&mut self, content: &[u8]) -> io::Result<()> {
        if content.is_empty() || content.len() > ROOM {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "an identity file has 1 to 4096 bytes"));
        }
        if content.len() != self.content.len() {
            self.file.set_len(content.len() as u64)?;
        }
        // SAFETY: the mapping has `ROOM` bytes, which `content` fits into; nobody else in this process uses it.
        unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), self.bytes, content.len()) };
        self.lost |= SHRANK.swap(false, Ordering::Relaxed);
        if self.lost {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file has shrunk"));
        }
        self.content.clear();
        self.content.extend_from_slice(content);
        Ok(())
    }

    /// The same by path, whatever has become of the file: it is made anew.
    pub(super) fn replace(&mut self, content: &[u8]) -> io::Result<()> {
        match Self::create_at(self.path.clone(), self.slot, content) {
            Ok(made) => {
                *self = made;
                Ok(())
            }
            Err(error) => {
                // Its page took the slot while it was made, and the file of this one may shrink as well.
                PAGES[self.slot].store(self.bytes as usize, Ordering::Relaxed);
                Err(error)
            }
        }
    }

    /// [`Mapped::set`], and [`Mapped::replace`] when that does not do.
    pub(super) fn write(&mut self, content: &[u8]) -> io::Result<()> {
        match self.set(content) {
            Err(_) => self.replace(content),
            done => done,
        }
    }

    /// What is at its path, when that is this very file.
    fn here(&self) -> Option<fs::Metadata> {
        fs::symlink_metadata(&self.path).ok().filter(|found| (found.dev(), found.ino()) == self.place)
    }

    /// Whether this very file is at its path, with what was written into it. One system call: its bytes are compared
    /// where they are mapped.
    #[allow(unsafe_code)]
    pub(super) fn is_as_left(&mut self) -> bool {
        if self.lost || self.here().is_none_or(|found| found.len() != self.content.len() as u64) {
            return false;
        }
        let mut held = vec![0; self.content.len()];
        // SAFETY: as in `set`; what others write meanwhile is bytes, whichever.
        unsafe { std::ptr::copy_nonoverlapping(self.bytes, held.as_mut_ptr(), held.len()) };
        self.lost |= SHRANK.swap(false, Ordering::Relaxed);
        !self.lost && held == self.content
    }

    /// What is at its path: whether that is this very file, and its content when it can be read.
    pub(super) fn found(&self) -> (bool, io::Result<Vec<u8>>) {
        (self.here().is_some() && !self.lost, guest_file::read(&self.path, MOST))
    }
}

impl Drop for Mapped {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // The slot may be the next one's already.
        let _ =
            PAGES[self.slot].compare_exchange(self.bytes as usize, 0, Ordering::Relaxed, Ordering::Relaxed);
        // SAFETY: the mapping is ours, and nothing points into it any more.
        let _ = unsafe { munmap(self.bytes.cast(), ROOM) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_its_file_takes_away_is_caught() {
        catch_sigbus().unwrap();
        let path = std::env::temp_dir().join(format!("kelvin-identity-{}", std::process::id()));
        let file = File::options().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
        file.set_len(4).unwrap();
        // SAFETY: as in `create`.
        #[allow(unsafe_code)]
        let bytes = unsafe {
            mmap(std::ptr::null_mut(), ROOM, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)
        };
        let bytes = bytes.unwrap();
        PAGES[0].store(bytes as usize, Ordering::Relaxed);
        let place = file.metadata().map(|found| (found.dev(), found.ino())).unwrap();
        let content = b"abc\n".to_vec();
        let mut mapped =
            Mapped { path: path.clone(), file, bytes: bytes.cast(), content, slot: 0, place, lost: false };
        mapped.set(b"abd\n").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"abd\n");
        assert!(mapped.is_as_left());
        fs::write(&path, "abX\n").unwrap();
        assert!(!mapped.is_as_left(), "others have written");
        mapped.set(b"abd\n").unwrap();
        assert!(mapped.is_as_left());
        File::options().append(true).open(&path).unwrap().set_len(9).unwrap();
        assert!(!mapped.is_as_left(), "it has grown");
        File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
        assert_eq!(mapped.set(b"abe\n").unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        fs::write(&path, "abd\n").unwrap();
        assert!(!mapped.is_as_left() && !mapped.found().0, "it was lost in between");
        mapped.replace(b"abf\n").unwrap();
        assert!(mapped.is_as_left());
        // What cannot be made anew stays, and is caught as before.
        mapped.replace(&[b'x'; ROOM + 1]).unwrap_err();
        mapped.file.set_len(0).unwrap();
        assert_eq!(mapped.set(b"abg\n").unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        fs::remove_file(&path).unwrap();
    }
}
