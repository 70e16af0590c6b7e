//! Publishing what a build has made: its disk as an image, the snapshot of its machines, and the template, which is what makes the
//! other two count.
//!
//! ```text
//! disk ──clone──> images/<digest> ──> snapshots/<id> ──> templates/<name>@<build>.json (one rename)
//!                    └─ crash, or refused: no other version has changed; what nothing needs the next collection takes
//! ```
//!
//! What a tag names is not decided here: it moves when this is done.
//! No collection runs meanwhile, as with an import. Who writes: this module.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::disk::clone_file;
use crate::hash::FileDigest;
use crate::image::{ImageManifest, ROOTFS, Template};
use crate::snapshot::{Draft, Durability, Snapshot};
use crate::{Error, Store, io_error, publish, write_json};

/// A template that is to be.
#[derive(Debug)]
pub struct Built<'a> {
    /// It. Its image is that of `disk`.
    pub template: &'a Template,
    /// Its root file system, which nobody writes any more, and its digest; none when its image is there already.
    pub disk: Option<(&'a Path, FileDigest)>,
    /// What was saved of its machine, in a directory of `staging/`, and what it is; none when there is a snapshot already.
    pub baked: Option<(PathBuf, Draft)>,
}

impl Store {
    /// Publishes image, snapshot and template, in this order. Whatever fails, the template is what it was, the snapshot is not
    /// there, and what is staged of it is the caller's.
    ///
    /// # Errors
    /// `Missing` when its guest is gone, or an image that should be there; `Io`.
    pub fn publish_built(&self, built: Built<'_>) -> Result<Option<Snapshot>, Error> {
        // Image and snapshot are needed by nothing until the template is written.
        let _uncollected = self.lock(FlockOperation::LockShared)?;
        let template = built.template;
        if !self.guest(&template.guest).is_dir() {
            return Err(Error::Missing { kind: "guest", name: template.guest.clone() });
        }
        match built.disk {
            Some((disk, digest)) => self.publish_image(disk, digest)?,
            None if self.rootfs(&template.image).exists() => {}
            None => return Err(Error::Missing { kind: "image", name: template.image.clone() }),
        }
        let snapshot = match built.baked {
            Some((staged, draft)) => Some(self.publish_snapshot(&staged, draft, Durability::Verified)?),
            None => None,
        };
        let written = write_json(&self.template_path(&template.version()), template);
        match (written, snapshot) {
            (Ok(()), snapshot) => Ok(snapshot),
            (Err(error), None) => Err(error),
            (Err(error), Some(snapshot)) => {
                self.discard_snapshot(&snapshot.manifest.id)?;
                Err(error)
            }
        }
    }

    /// Makes an image of `disk`, unless it is there. It is never taken back: others may have found it since.
    fn publish_image(&self, disk: &Path, digest: FileDigest) -> Result<(), Error> {
        let directory = self.root().join("images").join(&digest.digest);
        if directory.exists() {
            return Ok(());
        }
        let staged = self.stage()?;
        let published = (|| {
            let rootfs = staged.join(ROOTFS);
            clone_file(disk, &rootfs).map_err(io_error("cloning", disk))?;
            // VMMs of any user read it; nobody writes it again.
            fs::set_permissions(&rootfs, fs::Permissions::from_mode(0o444))
                .map_err(io_error("sealing", &rootfs))?;
            write_json(&staged.join("manifest.json"), &ImageManifest { rootfs: digest })?;
            publish(&staged, &directory, true)
        })();
        if published.is_err() {
            let _ = fs::remove_dir_all(&staged);
        }
        published
    }
}

#[cfg(test)]
mod tests {
    use kelvin_api::id::SnapshotId;
    use kelvin_api::units::MemoryMib;

    use super::*;
    use crate::gc::{Garbage, References};
    use crate::hash::digest_file;
    use crate::image::Service;
    use crate::import::{Import, Links};
    use crate::snapshot::{FILES, Origin};

    struct Ground {
        directory: tempfile::TempDir,
        store: Store,
        base: Template,
        disk: PathBuf,
        digest: FileDigest,
    }

    impl Ground {
        /// A store with `base`, and a disk that was built on it.
        fn make() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let store = Store::open(&directory.path().join("data"), true).unwrap();
            let file = |name: &str| {
                let path = directory.path().join(name);
                fs::write(&path, name).unwrap();
                path
            };
            let (rootfs, kernel, initrd) = (file("rootfs"), file("kernel"), file("initrd"));
            fs::write(&kernel, crate::kernel::SMALLEST).unwrap();
            let import = Import {
                name: "base".parse().unwrap(),
                rootfs: &rootfs,
                kernel: &kernel,
                initrd: &initrd,
                links: Links::Follow,
                vcpus: 1,
                memory_mib: MemoryMib(128),
            };
            let base = store.import(&import, &mut |_| ()).unwrap();
            let disk = file("built");
            let digest = digest_file(&disk).unwrap();
            Self { directory, store, base, disk, digest }
        }

        fn template(&self, service: Option<Service>) -> Template {
            let (name, image) = ("web".parse().unwrap(), self.digest.digest.clone());
            Template { service, ..Template::plain(name, image, self.base.guest(), self.base.shape) }
        }

        fn baked(&self, template: &Template) -> (PathBuf, Draft) {
            let staged = self.store.stage().unwrap();
            for name in FILES {
                fs::write(staged.join(name), name).unwrap();
            }
            let service = template.service.as_ref().map(Service::digest);
            let identity = serde_json::from_value(serde_json::json!({
                "service": service, "image": template.image, "guest_kernel": template.kernel, "agent": template.initrd, "vmm": "qemu",
                "vmm_build": "b", "accelerator": "tcg", "host_cpu": "c", "host_kernel": "h", "vcpus": 1,
                "memory_mib": 128, "disk_mib": 1, "devices": "d", "snapshot_format": 1,
            }));
            let draft = Draft {
                id: SnapshotId::random(),
                template: template.name.clone(),
                guest: template.guest.clone(),
                parent: None,
                origin: Origin::Bake,
                mode: kelvin_api::sandbox::PauseMode::Full,
                identity: identity.unwrap(),
                arguments: Vec::new(),
            };
            (staged, draft)
        }

        fn publish(&self, template: &Template, baked: (PathBuf, Draft)) -> Result<Option<Snapshot>, Error> {
            let disk = Some((&*self.disk, self.digest.clone()));
            self.store.publish_built(Built { template, disk, baked: Some(baked) })
        }

        fn count(&self, place: &str) -> usize {
            fs::read_dir(self.store.root().join(place)).unwrap().count()
        }
    }

    #[test]
    fn what_was_built_is_needed_until_its_template_is_removed() {
        let ground = Ground::make();
        let template = ground.template(Service::of(Some("serve".to_owned()), None));
        let snapshot = ground.publish(&template, ground.baked(&template)).unwrap().unwrap();
        assert_eq!(ground.store.template(&template.version()).unwrap(), template);
        assert_eq!(fs::read_to_string(ground.store.rootfs(&template.image)).unwrap(), "built");
        let collect = || ground.store.collect(References::default, false).unwrap();
        assert_eq!(collect(), Garbage::default());
        assert_eq!(ground.count("staging"), 0);
        ground.store.remove_template(&template.version()).unwrap();
        assert!(matches!(ground.store.remove_template(&template.version()), Err(Error::Missing { .. })));
        let garbage = collect();
        assert_eq!(
            (garbage.snapshots, garbage.images),
            (vec![snapshot.manifest.id.to_string()], vec![template.image])
        );
        assert!(garbage.guests.is_empty(), "the base's is the same");
    }

    #[test]
    fn versions_of_a_name_stand_beside_each_other() {
        let ground = Ground::make();
        let version = |service: &str| Template {
            build: Some(kelvin_api::id::BuildId::random()),
            ..ground.template(Service::of(Some(service.to_owned()), None))
        };
        // One that was built when there was one version of a name, and two later ones.
        let (plain, first, second) = (ground.template(None), version("first"), version("second"));
        let mut bakes = Vec::new();
        for template in [&plain, &first, &second] {
            bakes.push(ground.publish(template, ground.baked(template)).unwrap().unwrap().manifest.id);
        }
        for template in [&plain, &first, &second] {
            assert_eq!(ground.store.template(&template.version()).unwrap(), *template);
        }
        let found = ground.store.templates().unwrap();
        assert_eq!((found.len(), &found[0], &found[1]), (4, &ground.base, &plain));
        // Whichever goes, the others keep what they need: they share an image, and each has its memory.
        ground.store.remove_template(&second.version()).unwrap();
        assert!(matches!(ground.store.template(&second.version()), Err(Error::Missing { .. })));
        let its = Garbage { snapshots: vec![bakes[2].to_string()], ..Garbage::default() };
        assert_eq!(ground.store.collect(References::default, false).unwrap(), its);
        ground.store.remove_template(&plain.version()).unwrap();
        assert!(ground.store.has_template(&first.name).unwrap());
        assert_eq!(ground.store.template(&first.version()).unwrap(), first);
        ground.store.remove_template(&first.version()).unwrap();
        assert!(!ground.store.has_template(&first.name).unwrap());
        // What a snapshot that is kept descends from stays, though no version is left.
        let used = References { snapshots: [bakes[0].clone()].into(), ..References::default() };
        let garbage = ground.store.collect(|| used.clone(), false).unwrap();
        assert_eq!((garbage.snapshots.len(), garbage.images.len()), (1, 0));
        assert!(ground.store.rootfs(&first.image).exists() && ground.store.snapshot_path(&bakes[0]).exists());
    }

    #[test]
    fn one_that_cannot_be_published_leaves_the_template_that_was_there() {
        let ground = Ground::make();
        let before = ground.template(None);
        ground.publish(&before, ground.baked(&before)).unwrap();
        let after = Template { user: Some("app".to_owned()), ..before.clone() };
        // A file in the way of the template's new text.
        let fresh = ground.store.root().join("templates/web.json.new");
        fs::create_dir(&fresh).unwrap();
        let (staged, draft) = ground.baked(&after);
        let id = draft.id.clone();
        ground.publish(&after, (staged, draft)).unwrap_err();
        fs::remove_dir(&fresh).unwrap();
        assert_eq!(ground.store.template(&before.version()).unwrap(), before);
        assert!(!ground.store.snapshot_path(&id).exists());
        // A guest that was collected.
        let gone = Template { guest: "gone".to_owned(), ..after };
        let refused = ground.publish(&gone, ground.baked(&gone));
        assert!(matches!(refused, Err(Error::Missing { kind: "guest", .. })));
        assert_eq!(ground.store.template(&before.version()).unwrap(), before);
        assert_eq!(ground.count("snapshots"), 1);
        // An image that is there already, and one that is not.
        let other = ground.template(Service::of(Some("other".to_owned()), None));
        ground.store.publish_built(Built { template: &other, disk: None, baked: None }).unwrap();
        assert_eq!(ground.store.template(&other.version()).unwrap(), other);
        let gone = Template { image: "gone".to_owned(), ..other };
        let refused = ground.store.publish_built(Built { template: &gone, disk: None, baked: None });
        assert!(matches!(refused, Err(Error::Missing { kind: "image", .. })));
        drop(ground.directory);
    }
}
