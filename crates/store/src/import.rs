//! Imports: a template is made of a root file system, a kernel and an initial RAM disk.
//!
//! ```text
//! files ──hash──> digests ──clone──> staged ──rename──> images/, guests/ ──> templates/<name>.json
//!                                      └─ crash, or refused: the template is what it was
//! ```
//!
//! Each file is opened once, and refused when somebody writes to it meanwhile: what is there is what was hashed. Hashed is the
//! file and not its clone, which shares its blocks and none of its pages in memory. An image or a guest that is there already
//! is not made again. Who writes: this module, below `staging/`, by renames, the template last. Absent on purpose: whether the files are what they are said to be, but
//! for the kernel ([`crate::kernel`]), and who may name them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use kelvin_api::id::TemplateName;
use kelvin_api::import::{ImportProgress, ImportStage};
use kelvin_api::units::{DiskMib, MemoryMib, Shape};
use rustix::fs::FlockOperation;

use crate::image::{Guest, GuestManifest, INITRD, ImageManifest, KERNEL, ROOTFS, Template};
use crate::kernel::{self, MAX_KERNEL};
pub use crate::source::Links;
use crate::source::Source;
use crate::{Error, Store, io_error, publish, write_json};

/// The largest root file system, in bytes: its manifest has a digest for each 4 MiB.
const MAX_ROOTFS: u64 = 1 << 40;
/// The largest initial RAM disk, in bytes: a VMM reads it into the guest's memory.
const MAX_INITRD: u64 = 1 << 30;

/// Files and shape to import as a template.
#[derive(Debug)]
pub struct Import<'a> {
    /// The template's name; a template of that name is replaced.
    pub name: TemplateName,
    /// Root file system, ext4.
    pub rootfs: &'a Path,
    /// Guest kernel.
    pub kernel: &'a Path,
    /// Initial RAM disk with the agent.
    pub initrd: &'a Path,
    /// Whether these may be links.
    pub links: Links,
    /// vCPUs of a machine; the disk's size is the root file system's.
    pub vcpus: u32,
    /// Memory of a machine.
    pub memory_mib: MemoryMib,
}

/// Tells how far an import is.
struct Teller<'a> {
    told: &'a mut dyn FnMut(ImportProgress),
    total_bytes: u64,
}

impl Teller<'_> {
    fn tell(&mut self, stage: ImportStage, done_bytes: u64) {
        (self.told)(ImportProgress { stage, done_bytes, total_bytes: self.total_bytes });
    }

    /// Does `work` with each of `sources`, as `stage`.
    fn each<const N: usize, T>(
        &mut self,
        stage: ImportStage,
        sources: [&Source; N],
        mut work: impl FnMut(usize, &Source, &mut dyn FnMut(u64)) -> Result<T, Error>,
    ) -> Result<[T; N], Error> {
        let mut before = 0;
        self.tell(stage, before);
        let mut done = Vec::with_capacity(N);
        for (index, source) in sources.into_iter().enumerate() {
            done.push(work(index, source, &mut |bytes| self.tell(stage, before + bytes.min(source.bytes)))?);
            before += source.bytes;
            self.tell(stage, before);
        }
        done.try_into().map_err(|_| io_error("importing", Path::new("."))(io::ErrorKind::InvalidData.into()))
    }
}

impl Store {
    /// Copies image and guest in, each once whatever its name, and makes the template. `told` hears how far it is, on
    /// this thread. One import of a name at a time: the caller sees to it.
    ///
    /// # Errors
    /// `Unimportable` for what is no regular file, too large, or no kernel; `Io` when a file cannot be read or the store cannot be
    /// written. The template is then what it was.
    pub fn import(
        &self,
        import: &Import<'_>,
        told: &mut dyn FnMut(ImportProgress),
    ) -> Result<Template, Error> {
        // Image and guest are needed by nothing until the template is written.
        let _uncollected = self.lock(FlockOperation::LockShared)?;
        let open = |path, most| Source::open(path, import.links, most);
        let sources = [
            &open(import.rootfs, MAX_ROOTFS)?,
            &open(import.kernel, MAX_KERNEL)?,
            &open(import.initrd, MAX_INITRD)?,
        ];
        kernel::check(&sources[1].file, import.kernel)?;
        let teller = Teller { told, total_bytes: sources.iter().map(|source| source.bytes).sum() };
        let staged = [self.staging_path(), self.staging_path()];
        let imported = self.import_by(&staged, import, sources, teller);
        for staged in staged {
            // Never made, or gone already when it was published.
            let _ = fs::remove_dir_all(staged);
        }
        imported
    }

    fn import_by(
        &self,
        [staged_image, staged_guest]: &[PathBuf; 2],
        import: &Import<'_>,
        sources: [&Source; 3],
        mut teller: Teller<'_>,
    ) -> Result<Template, Error> {
        let digests = teller.each(ImportStage::Hashing, sources, |_, source, told| source.digest(told))?;
        let [rootfs, kernel, initrd] = digests;
        let disk_mib = DiskMib(u32::try_from(rootfs.bytes >> 20).unwrap_or(u32::MAX));
        let image = rootfs.digest.clone();
        let guest = Guest::of(kernel.digest.clone(), initrd.digest.clone());
        let image_dir = self.root.join("images").join(&image);
        let guest_dir = self.guest(&guest.digest);
        let (has_image, has_guest) = (image_dir.exists(), guest_dir.exists());
        for (staged, is_there) in [(staged_image, has_image), (staged_guest, has_guest)] {
            if !is_there {
                self.make_staged(staged)?;
            }
        }
        let targets = [(staged_image, ROOTFS), (staged_guest, KERNEL), (staged_guest, INITRD)];
        let is_there = [has_image, has_guest, has_guest];
        teller.each(ImportStage::Copying, sources, |index, source, told| match is_there[index] {
            true => Ok(()),
            false => source.copy(&targets[index].0.join(targets[index].1), told),
        })?;
        teller.tell(ImportStage::Publishing, 0);
        if !has_image {
            write_json(&staged_image.join("manifest.json"), &ImageManifest { rootfs })?;
            publish(staged_image, &image_dir, true)?;
        }
        let manifest = GuestManifest { kernel, initrd };
        if !has_guest {
            write_json(&staged_guest.join("manifest.json"), &manifest)?;
            publish(staged_guest, &guest_dir, true)?;
        }
        let (vcpus, memory_mib) = (import.vcpus, import.memory_mib);
        let shape = Shape { vcpus, memory_mib, disk_mib };
        let template = Template::plain(import.name.clone(), image, guest, shape);
        write_json(&self.template_path(&template.version()), &template)?;
        teller.tell(ImportStage::Publishing, teller.total_bytes);
        Ok(template)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::{FileExt, symlink};

    use rustix::fs::{CWD, FileType, Mode};

    use super::*;
    use crate::hash::CHUNK_BYTES;

    struct Ground {
        directory: tempfile::TempDir,
        store: Store,
    }

    impl Ground {
        fn make() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let store = Store::open(&directory.path().join("data"), true).unwrap();
            fs::write(directory.path().join("kernel"), kernel::SMALLEST).unwrap();
            fs::write(directory.path().join("initrd"), "initrd").unwrap();
            // Written chunks around a hole.
            let rootfs = File::create(directory.path().join("rootfs")).unwrap();
            rootfs.set_len(CHUNK_BYTES * 3 + 5).unwrap();
            rootfs.write_all_at(&[1; 100], 0).unwrap();
            rootfs.write_all_at(&[2; 100], CHUNK_BYTES * 3 - 95).unwrap();
            Self { directory, store }
        }

        fn at(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn import(&self, rootfs: &str, links: Links) -> (Result<Template, Error>, Vec<ImportProgress>) {
            let mut seen = Vec::new();
            let import = Import {
                name: "base".parse().unwrap(),
                rootfs: &self.at(rootfs),
                kernel: &self.at("kernel"),
                initrd: &self.at("initrd"),
                links,
                vcpus: 1,
                memory_mib: MemoryMib(256),
            };
            let imported = self.store.import(&import, &mut |progress| seen.push(progress));
            assert_eq!(fs::read_dir(self.store.root().join("staging")).unwrap().count(), 0);
            (imported, seen)
        }
    }

    #[test]
    fn each_stage_goes_through_all_bytes() {
        let ground = Ground::make();
        let total = CHUNK_BYTES * 3 + 5 + 6 + kernel::SMALLEST.len() as u64;
        for _ in 0..2 {
            let (imported, seen) = ground.import("rootfs", Links::Refuse);
            let template = imported.unwrap();
            assert_eq!(ground.store.template(&template.version()).unwrap(), template);
            let copied = fs::read(ground.store.rootfs(&template.image)).unwrap();
            assert!(copied == fs::read(ground.at("rootfs")).unwrap());
            assert!(seen.iter().all(|progress| progress.total_bytes == total), "{seen:?}");
            for stage in [ImportStage::Copying, ImportStage::Hashing, ImportStage::Publishing] {
                let done: Vec<u64> =
                    seen.iter().filter(|one| one.stage == stage).map(|one| one.done_bytes).collect();
                assert!(done.is_sorted(), "{seen:?}");
                assert_eq!((done.first(), done.last()), (Some(&0), Some(&total)), "{stage:?}");
            }
            assert!(seen.iter().filter(|one| one.stage == ImportStage::Hashing).count() >= 6, "{seen:?}");
            assert_eq!(seen.last().unwrap().stage, ImportStage::Publishing);
        }
    }

    #[test]
    fn what_is_no_regular_file_is_refused_and_leaves_nothing() {
        let ground = Ground::make();
        symlink("rootfs", ground.at("link")).unwrap();
        symlink("/dev/zero", ground.at("zero")).unwrap();
        let mode = Mode::RUSR | Mode::WUSR;
        // Nobody writes to it: an open that waited would not come back.
        rustix::fs::mknodat(CWD, ground.at("pipe"), FileType::Fifo, mode, 0).unwrap();
        for name in ["link", "zero", "pipe", "data", "absent", "rootfs/below"] {
            let (refused, seen) = ground.import(name, Links::Refuse);
            assert!(matches!(refused, Err(Error::Unimportable { .. })), "{name}: {refused:?}");
            assert!(seen.is_empty());
        }
        for name in ["zero", "pipe", "data"] {
            let (refused, _) = ground.import(name, Links::Follow);
            assert!(matches!(refused, Err(Error::Unimportable { .. })), "{name}: {refused:?}");
        }
        assert!(ground.store.templates().unwrap().is_empty());
        ground.import("link", Links::Follow).0.unwrap();
    }

    #[test]
    fn what_is_written_meanwhile_is_refused() {
        let ground = Ground::make();
        let (rootfs, kernel, initrd) = (ground.at("rootfs"), ground.at("kernel"), ground.at("initrd"));
        let (name, vcpus, memory_mib) = ("base".parse().unwrap(), 1, MemoryMib(256));
        let (rootfs, kernel, initrd) = (&*rootfs, &*kernel, &*initrd);
        let import = Import { name, rootfs, kernel, initrd, links: Links::Refuse, vcpus, memory_mib };
        let imported = ground.store.import(&import, &mut |progress| {
            if progress.stage == ImportStage::Copying && progress.done_bytes == 0 {
                let file = File::options().write(true).open(rootfs).unwrap();
                let written = || file.metadata().unwrap().modified().unwrap();
                let before = written();
                // Until the clock of the file system has ticked.
                while written() == before {
                    file.write_all_at(b"x", 7).unwrap();
                }
            }
        });
        assert!(imported.unwrap_err().to_string().contains("changed meanwhile"));
        assert!(ground.store.templates().unwrap().is_empty());
        assert_eq!(fs::read_dir(ground.store.root().join("images")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(ground.store.root().join("staging")).unwrap().count(), 0);
    }

    #[test]
    fn what_is_too_large_is_refused_before_it_is_read() {
        let ground = Ground::make();
        File::create(ground.at("kernel")).unwrap().set_len(MAX_KERNEL + 1).unwrap();
        let (refused, seen) = ground.import("rootfs", Links::Follow);
        assert!(refused.unwrap_err().to_string().contains("is the most"));
        assert!(seen.is_empty());
    }

    #[test]
    fn an_import_that_fails_leaves_the_template_that_was_there() {
        let ground = Ground::make();
        let before = ground.import("rootfs", Links::Refuse).0.unwrap();
        let guests = ground.store.root().join("guests");
        fs::write(ground.at("kernel"), [kernel::SMALLEST, b"another"].concat()).unwrap();
        // A file in the way of the new guest's directory.
        fs::rename(&guests, ground.at("aside")).unwrap();
        fs::write(&guests, "").unwrap();
        ground.import("rootfs", Links::Refuse).0.unwrap_err();
        fs::remove_file(&guests).unwrap();
        fs::rename(ground.at("aside"), &guests).unwrap();
        assert_eq!(ground.store.template(&before.version()).unwrap(), before);
    }
}
