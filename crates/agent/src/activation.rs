//! The last activation, in memory that outlives an agent.
//!
//! Root in the guest can end the agent (`kill -9 -1`), not init. Init holds a sealed memory file: an agent writes there
//! who the machine is when it has become that, and the one after it begins with it: the same identity, token and
//! environment. Nobody can shrink the file under the mapping.
//!
//! ```text
//! u32 agents so far | u32 length of the frame, 0 for none | the frame of the activation
//! ```
//!
//! A crash in the middle of a write leaves a length of 0: then nobody is let in until the node activates again.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};

use kelvin_api::guest::{Activation, MAX_FRAME, Request};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};

/// Environment variable through which the agent learns its descriptor.
pub const VARIABLE: &str = "KELVIN_KEPT";
const HEAD: usize = 8;
const SIZE: usize = (HEAD + MAX_FRAME).next_multiple_of(4096);
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// The memory file, mapped.
pub struct Kept {
    bytes: *mut u8,
}

// SAFETY: the mapping is this struct's alone in this process, lives as long as it, and is written by its owner.
#[allow(unsafe_code)]
unsafe impl Send for Kept {}

impl Kept {
    /// Makes the file, for init; inherited by every agent.
    ///
    /// # Errors
    /// When the kernel has no memory files, or no memory.
    pub fn create() -> io::Result<RawFd> {
        let fd = memfd_create("kelvin-activation", MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, SIZE as u64)?;
        fcntl_add_seals(&fd, SEALS | SealFlags::SEAL)?;
        Ok(fd.into_raw_fd())
    }

    /// Opens what init has made, for an agent. What it starts does not inherit it.
    ///
    /// # Errors
    /// When there is no such file.
    #[allow(unsafe_code)]
    pub fn open() -> io::Result<Self> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("{VARIABLE} names no descriptor"));
        let number: RawFd = std::env::var(VARIABLE)
            .ok()
            .and_then(|text| text.parse().ok())
            .filter(|fd| *fd > 2)
            .ok_or_else(missing)?;
        // SAFETY: init has left it open for us, and nothing else in this process knows of it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(number) });
        Self::map(&file)
    }

    #[allow(unsafe_code)]
    fn map(file: &File) -> io::Result<Self> {
        if file.metadata()?.len() != SIZE as u64 || !fcntl_get_seals(file)?.contains(SEALS) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the memory of the activation is not what init made",
            ));
        }
        // SAFETY: a new mapping at an address of the kernel's choice; the seals keep a page behind all of it.
        let bytes = unsafe {
            mmap(std::ptr::null_mut(), SIZE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0)?
        };
        Ok(Self { bytes: bytes.cast() })
    }

    #[allow(unsafe_code)]
    fn word(&self, index: usize) -> &AtomicU32 {
        // SAFETY: both words are inside the mapping, aligned, and only ever used as atomics.
        unsafe { &*self.bytes.cast::<AtomicU32>().add(index) }
    }

    /// Counts one more agent; how many there were before.
    pub fn arrive(&self) -> u32 {
        self.word(0).fetch_add(1, Ordering::Relaxed)
    }

    /// Keeps the frame of an activation: what follows its length field.
    #[allow(unsafe_code)]
    pub fn put(&mut self, frame: &[u8]) {
        let Some(length) = u32::try_from(frame.len()).ok().filter(|_| frame.len() <= MAX_FRAME) else {
            return;
        };
        self.word(1).store(0, Ordering::SeqCst);
        // SAFETY: the frame fits behind the head.
        unsafe { std::ptr::copy_nonoverlapping(frame.as_ptr(), self.bytes.add(HEAD), frame.len()) };
        self.word(1).store(length, Ordering::SeqCst);
    }

    /// What was kept, when that is an activation.
    #[allow(unsafe_code)]
    pub fn get(&self) -> Option<Activation> {
        let length = usize::try_from(self.word(1).load(Ordering::SeqCst))
            .ok()
            .filter(|length| (1..=MAX_FRAME).contains(length))?;
        let mut frame = vec![0; length];
        // SAFETY: the length was checked against the mapping.
        unsafe { std::ptr::copy_nonoverlapping(self.bytes.add(HEAD), frame.as_mut_ptr(), length) };
        match Request::decode(&frame) {
            Ok((_, Request::Activate(activation))) => Some(activation),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_activation_outlives_its_agent() {
        let number = Kept::create().unwrap();
        // SAFETY: made just now.
        #[allow(unsafe_code)]
        let file = File::from(unsafe { OwnedFd::from_raw_fd(number) });
        let mut first = Kept::map(&file).unwrap();
        assert_eq!(first.arrive(), 0);
        assert!(first.get().is_none());
        let activation = Activation {
            sandbox_id: "i1".to_owned(),
            template: "base".to_owned(),
            hostname: "i1".to_owned(),
            machine_id: [1; 16],
            boot_id: [2; 16],
            mac: [0; 6],
            entropy: [3; 64],
            wall_clock_ns: 4,
            access_token: "secret".to_owned(),
            env_vars: [("A".to_owned(), "b".to_owned())].into(),
        };
        let bytes = Request::Activate(activation.clone()).encode(7).unwrap();
        first.put(&bytes[4..]);
        let second = Kept::map(&file).unwrap();
        assert_eq!((second.arrive(), second.get()), (1, Some(activation)));
        // Torn: as nothing.
        second.word(1).store(0, Ordering::SeqCst);
        assert!(second.get().is_none());
        assert!(file.set_len(0).is_err(), "it is sealed");
    }
}
