//! Kernels of guests: what can be one, and a guest with another kernel than its own.
//!
//! Looked at is the beginning of the file, of a fixed length: that it is a kernel of 64 bits for this processor. Whether it has
//! the drivers of its machine only a boot tells. Who writes: this module, below `staging/`, by one rename; a guest that no
//! template comes to need goes with the next collection. Absent on purpose: who may name the file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::hash::FileDigest;
use crate::image::{Guest, GuestManifest, INITRD, KERNEL};
use crate::source::{Links, Source};
use crate::{Error, Store, io_error, publish, read_json, write_json};

/// The largest kernel, in bytes: an ELF program with everything built in has less than a tenth.
pub const MAX_KERNEL: u64 = 512 << 20;
/// What is read of it, in bytes: the header of both formats.
const HEADER: usize = 0x260;

/// The smallest file that is taken for a kernel: for tests, whose machines run nothing.
#[doc(hidden)]
pub const SMALLEST: &[u8] = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0";

/// Why `header`, the beginning of a file, is not that of a kernel that a VMM boots.
///
/// Source: ELF-64 Object File Format; Linux, Documentation/arch/x86/boot.rst.
fn refusal(header: &[u8]) -> Option<&'static str> {
    let word = |at: usize| header.get(at..at + 2).map(|field| u16::from_le_bytes([field[0], field[1]]));
    if header.starts_with(b"\x7fELF") {
        // 64 bits, little endian; a program, not a library or a part of one; x86-64.
        let is_wide = header.get(4..6) == Some(&[2, 1]);
        return match (is_wide, word(0x10), word(0x12)) {
            (true, Some(2 | 3), Some(62)) => None,
            (true, Some(2 | 3), _) => Some("it is an ELF program for another processor than x86-64"),
            (true, ..) => Some("it is an ELF file and no program"),
            (false, ..) => Some("it is an ELF file, not of 64 bits"),
        };
    }
    if header.get(0x202..0x206) != Some(b"HdrS") {
        return Some("it is neither an ELF program nor a bzImage");
    }
    // The flags of 2.12 say whether it can be entered with 64 bits.
    match (word(0x206), word(0x236)) {
        (Some(version), Some(flags)) if version >= 0x020c && flags & 1 == 1 => None,
        _ => Some("it is a bzImage, not of 64 bits"),
    }
}

/// Whether `file`, which is called `path`, can be a guest's kernel.
pub(crate) fn check(file: &File, path: &Path) -> Result<(), Error> {
    let mut header = vec![0; HEADER];
    let mut filled = 0;
    while filled < HEADER {
        match file.read_at(&mut header[filled..], filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io_error("reading", path)(error)),
        }
    }
    match refusal(&header[..filled]) {
        None => Ok(()),
        Some(reason) => {
            Err(Error::Unimportable { path: path.to_owned(), reason: format!("as a kernel: {reason}") })
        }
    }
}

/// A guest with a kernel of somebody's own, that is not in the store yet.
pub struct OwnKernel {
    source: Source,
    kernel: FileDigest,
    /// Whose initial RAM disk it has.
    of: Guest,
    guest: Guest,
}

impl OwnKernel {
    /// The guest that it will be.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }
}

impl Store {
    /// Looks at the kernel in the file `path`, which no link may be, for a guest that has the initial RAM disk of `of`.
    ///
    /// # Errors
    /// `Unimportable` for what is no kernel, or too large; `Io` when it cannot be read.
    pub fn own_kernel(&self, path: &Path, of: &Guest) -> Result<OwnKernel, Error> {
        let source = Source::open(path, Links::Refuse, MAX_KERNEL)?;
        check(&source.file, path)?;
        let kernel = source.digest(&mut |_| ())?;
        let guest = Guest::of(kernel.digest.clone(), of.initrd.clone());
        Ok(OwnKernel { source, kernel, of: of.clone(), guest })
    }

    /// Puts the guest `own` into the store, unless it is there; its digest must be known to who collects before.
    ///
    /// # Errors
    /// `Unimportable` when the file was written to since it was looked at; `Missing` when the guest whose initial RAM disk it
    /// has is gone; `Io`. Then there is nothing new.
    pub fn put_own_kernel(&self, own: &OwnKernel) -> Result<(), Error> {
        let _uncollected = self.lock(FlockOperation::LockShared)?;
        let directory = self.guest(&own.guest.digest);
        if directory.exists() {
            return Ok(());
        }
        let staged = self.stage()?;
        let published = self.stage_own_kernel(own, &staged).and_then(|()| publish(&staged, &directory, true));
        if published.is_err() {
            let _ = std::fs::remove_dir_all(&staged);
        }
        published
    }

    fn stage_own_kernel(&self, own: &OwnKernel, staged: &Path) -> Result<(), Error> {
        let from = self.guest(&own.of.digest);
        let manifest: GuestManifest = match read_json(&from.join("manifest.json")) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(Error::Missing { kind: "guest", name: own.of.digest.clone() });
            }
            read => read?,
        };
        own.source.copy(&staged.join(KERNEL), &mut |_| ())?;
        let initrd: PathBuf = from.join(INITRD);
        Source::open(&initrd, Links::Refuse, u64::MAX)?.copy(&staged.join(INITRD), &mut |_| ())?;
        let manifest = GuestManifest { kernel: own.kernel.clone(), initrd: manifest.initrd };
        write_json(&staged.join("manifest.json"), &manifest)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use kelvin_api::units::MemoryMib;

    use super::*;
    use crate::import::Import;

    fn bz_image(version: u16, flags: u16) -> Vec<u8> {
        let mut image = vec![0; HEADER];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&version.to_le_bytes());
        image[0x236..0x238].copy_from_slice(&flags.to_le_bytes());
        image
    }

    #[test]
    fn only_kernels_of_this_processor_are_taken() {
        let elf = |at: usize, byte: u8| {
            let mut elf = SMALLEST.to_vec();
            elf[at] = byte;
            elf
        };
        for (bytes, why) in [
            (SMALLEST.to_vec(), None),
            // One that can lie anywhere.
            (elf(0x10, 3), None),
            (bz_image(0x020f, 0x3f), None),
            (Vec::new(), Some("neither")),
            (b"\x7fEL".to_vec(), Some("neither")),
            (b"#!/bin/sh\n".repeat(200), Some("neither")),
            (vec![0; HEADER], Some("neither")),
            (elf(4, 1), Some("not of 64 bits")),
            (elf(5, 2), Some("not of 64 bits")),
            (elf(0x10, 1), Some("no program")),
            (elf(0x12, 183), Some("another processor")),
            (SMALLEST[..0x12].to_vec(), Some("another processor")),
            (SMALLEST[..5].to_vec(), Some("not of 64 bits")),
            (bz_image(0x0209, 1), Some("bzImage, not of 64 bits")),
            (bz_image(0x020f, 0x3e), Some("bzImage, not of 64 bits")),
            (bz_image(0x020f, 1)[..0x210].to_vec(), Some("bzImage, not of 64 bits")),
        ] {
            let found = refusal(&bytes);
            assert_eq!(found.is_some(), why.is_some(), "{found:?}");
            assert!(found.is_none_or(|found| found.contains(why.unwrap())), "{found:?} {why:?}");
        }
    }

    struct Ground {
        directory: tempfile::TempDir,
        store: Store,
        guest: Guest,
    }

    fn ground() -> Ground {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("data"), true).unwrap();
        let file = |name: &str, bytes: &[u8]| {
            let path = directory.path().join(name);
            fs::write(&path, bytes).unwrap();
            path
        };
        let import = Import {
            name: "base".parse().unwrap(),
            rootfs: &file("rootfs", b"rootfs"),
            kernel: &file("kernel", SMALLEST),
            initrd: &file("initrd", b"initrd"),
            links: Links::Follow,
            vcpus: 1,
            memory_mib: MemoryMib(128),
        };
        let guest = store.import(&import, &mut |_| ()).unwrap().guest();
        Ground { directory, store, guest }
    }

    #[test]
    fn a_guest_gets_another_kernel_and_keeps_its_agent() {
        let Ground { directory, store, guest } = ground();
        let path = directory.path().join("own");
        let bytes = [SMALLEST, b" of somebody's own"].concat();
        fs::write(&path, &bytes).unwrap();
        for _ in 0..2 {
            let own = store.own_kernel(&path, &guest).unwrap();
            assert_eq!(own.guest().initrd, guest.initrd);
            assert!(own.guest().kernel != guest.kernel && own.guest().digest != guest.digest);
            store.put_own_kernel(&own).unwrap();
            let made = store.guest(&own.guest().digest);
            assert_eq!(fs::read(made.join(KERNEL)).unwrap(), bytes);
            assert_eq!(fs::read(made.join(INITRD)).unwrap(), b"initrd");
        }
        // The kernel that it has is no other.
        let same = directory.path().join("kernel");
        assert_eq!(*store.own_kernel(&same, &guest).unwrap().guest(), guest);
        assert_eq!(fs::read_dir(store.root().join("guests")).unwrap().count(), 2);
        assert_eq!(fs::read_dir(store.root().join("staging")).unwrap().count(), 0);
    }

    #[test]
    fn what_is_no_kernel_or_changes_or_has_no_guest_leaves_nothing() {
        let Ground { directory, store, guest } = ground();
        let path = directory.path().join("own");
        let unimportable = |error: Error, word: &str| {
            assert!(
                matches!(&error, Error::Unimportable { reason, .. } if reason.contains(word)),
                "{error:?}"
            );
        };
        fs::write(&path, "text").unwrap();
        unimportable(store.own_kernel(&path, &guest).err().unwrap(), "neither");
        File::create(&path).unwrap().set_len(MAX_KERNEL + 1).unwrap();
        unimportable(store.own_kernel(&path, &guest).err().unwrap(), "is the most");
        unimportable(
            store.own_kernel(&directory.path().join("absent"), &guest).err().unwrap(),
            "no such file",
        );
        std::os::unix::fs::symlink("kernel", directory.path().join("link")).unwrap();
        unimportable(store.own_kernel(&directory.path().join("link"), &guest).err().unwrap(), "regular");
        fs::write(&path, [SMALLEST, b"1"].concat()).unwrap();
        let own = store.own_kernel(&path, &guest).unwrap();
        fs::write(&path, [SMALLEST, b"more"].concat()).unwrap();
        unimportable(store.put_own_kernel(&own).unwrap_err(), "changed");
        let own = store.own_kernel(&path, &guest).unwrap();
        fs::remove_dir_all(store.guest(&guest.digest)).unwrap();
        assert!(matches!(store.put_own_kernel(&own), Err(Error::Missing { kind: "guest", .. })));
        assert_eq!(fs::read_dir(store.root().join("guests")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(store.root().join("staging")).unwrap().count(), 0);
    }

    #[test]
    fn an_import_with_something_else_as_its_kernel_is_refused() {
        let Ground { directory, store, .. } = ground();
        let at = |name: &str| directory.path().join(name);
        let import = Import {
            name: "other".parse().unwrap(),
            rootfs: &at("rootfs"),
            kernel: &at("initrd"),
            initrd: &at("initrd"),
            links: Links::Refuse,
            vcpus: 1,
            memory_mib: MemoryMib(128),
        };
        let refused = store.import(&import, &mut |_| panic!("nothing is hashed")).unwrap_err();
        assert!(refused.to_string().contains("neither an ELF program nor a bzImage"), "{refused}");
        assert_eq!(fs::read_dir(store.root().join("templates")).unwrap().count(), 1);
    }
}
