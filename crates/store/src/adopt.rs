//! Adoption: a snapshot that was made elsewhere is brought into this store from its files.
//!
//! ```text
//! DIR/{manifest.json,memory,state,disk} ──clone──> staged ──hash──> verified ──seal──> published (one rename)
//!                                                     └─ crash, or refused: nothing of it is in the store
//! ```
//!
//! What is hashed is the clone, which nobody else can write: what happens to the source meanwhile is seen or does not
//! matter. The seal is this file system's, made anew; a seal of the source means nothing here and is not read. Adopted
//! is what lives for long, a bake or a kept snapshot: a pause or the instant of a fork belongs to a sandbox of the node
//! that took it. The manifest is taken as it is, the id with it: whoever noted the id finds it here.
//!
//! Who writes: this module, below `staging/` and by one rename. Absent on purpose: where the files come from, and
//! whether this node's VMM can restore them, which the node asks of the identity when it opens the store.

use std::path::Path;

use rustix::fs::FlockOperation;

use crate::disk::import_file;
use crate::identity::SNAPSHOT_FORMAT;
use crate::image::Service;
use crate::snapshot::{Durability, Manifest, Origin, Snapshot, files};
use crate::verify::compare;
use crate::{Error, Store, io_error, read_json};

impl Store {
    /// Brings the snapshot whose `manifest.json` and files lie in `from` into this store: verified, sealed anew, and as
    /// durable as a bake. Its guest has to be here; of a bake also its template, with the same image. A failure leaves
    /// nothing.
    ///
    /// # Errors
    /// `Exists` when there is a snapshot of its id, `Unadoptable` when its manifest does not fit or is not of this
    /// format, `Missing` when its template or guest is not here, `Seal` when a file is not what its digest says,
    /// `Manifest` and `Io`.
    pub fn adopt_snapshot(&self, from: &Path) -> Result<Snapshot, Error> {
        // A collection would take its guest or image before it is there to need them.
        let _uncollected = self.lock(FlockOperation::LockShared)?;
        let manifest: Manifest = read_json(&from.join("manifest.json"))?;
        self.admit(&manifest)?;
        let staged = self.stage()?;
        let adopted = stage_verified(&manifest, from, &staged)
            .and_then(|()| self.seal_and_publish(&staged, manifest, Durability::Verified));
        if adopted.is_err() {
            // Already gone when it was published.
            let _ = std::fs::remove_dir_all(&staged);
        }
        adopted
    }

    /// Whether a snapshot with this manifest belongs here, before anything is copied.
    fn admit(&self, manifest: &Manifest) -> Result<(), Error> {
        let refused = |reason: String| Error::Unadoptable { snapshot: manifest.id.to_string(), reason };
        if self.snapshot_path(&manifest.id).exists() {
            return Err(Error::Exists { kind: "snapshot", name: manifest.id.to_string() });
        }
        if manifest.origin.is_passing() {
            return Err(refused("it belongs to a sandbox of the node that took it".to_owned()));
        }
        if manifest.identity.snapshot_format != SNAPSHOT_FORMAT {
            let found = manifest.identity.snapshot_format;
            return Err(refused(format!("its format is {found}, this program's is {SNAPSHOT_FORMAT}")));
        }
        if manifest.identity_digest != manifest.identity.digest() {
            return Err(refused("its identity is not the one of its digest".to_owned()));
        }
        for (name, digest) in manifest.digests() {
            match (files(manifest.mode).contains(&name), digest.is_some()) {
                (true, false) => return Err(refused(format!("its manifest has no digest of {name}"))),
                (false, true) => return Err(refused(format!("without memory it has no {name}"))),
                _ => {}
            }
        }
        if !self.guest(&manifest.guest).is_dir() {
            return Err(Error::Missing { kind: "guest", name: manifest.guest.clone() });
        }
        if manifest.origin == Origin::Bake {
            self.admit_bake(manifest)?;
        }
        Ok(())
    }
}

impl Store {
    /// Whether what was baked elsewhere is of a version of its template that is here, too.
    fn admit_bake(&self, manifest: &Manifest) -> Result<(), Error> {
        let (identity, name) = (&manifest.identity, &manifest.template);
        let mut differs = None;
        for template in self.templates()?.iter().filter(|template| template.name == *name) {
            let service = template.service.as_ref().map(Service::digest);
            let fields = [
                ("image", Some(&identity.image), Some(&template.image)),
                ("guest_kernel", Some(&identity.guest_kernel), Some(&template.kernel)),
                ("agent", Some(&identity.agent), Some(&template.initrd)),
                ("service", identity.service.as_ref(), service.as_ref()),
            ];
            match fields.into_iter().find(|(_, is, has)| is != has) {
                None => return Ok(()),
                Some((field, ..)) => differs = differs.or(Some(field)),
            }
        }
        Err(match differs {
            None => Error::Missing { kind: "template", name: name.to_string() },
            Some(field) => {
                let reason = format!("template {name} is another one here: {field} differs");
                Error::Unadoptable { snapshot: manifest.id.to_string(), reason }
            }
        })
    }
}

/// Clones the files of `manifest` into `staged` and hashes what is there then.
fn stage_verified(manifest: &Manifest, from: &Path, staged: &Path) -> Result<(), Error> {
    for (name, digest) in manifest.digests() {
        let Some(digest) = digest else { continue };
        let (source, target) = (from.join(name), staged.join(name));
        let differs =
            |difference: String| Error::Seal { snapshot: manifest.id.to_string(), file: name, difference };
        import_file(&source, &target).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => differs("it is not there".to_owned()),
            _ => io_error("copying", &source)(error),
        })?;
        // Synced first: a clone of a file with dirty pages flushes it, each time.
        std::fs::File::open(&target)
            .and_then(|file| file.sync_all())
            .map_err(io_error("syncing", &target))?;
        let found = compare(&target, digest).map_err(io_error("reading", &target))?;
        if let Some(difference) = found.difference() {
            return Err(differs(difference));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use kelvin_api::units::MemoryMib;

    use super::*;
    use crate::import::{Import, Links};
    use crate::snapshot::{Draft, FILES};

    /// Gives a manifest whose identity was changed the digest of what it is now.
    fn digest_anew(manifest: &mut serde_json::Value) {
        let identity: crate::identity::Identity =
            serde_json::from_value(manifest["identity"].clone()).unwrap();
        manifest["identity_digest"] = identity.digest().into();
    }

    /// Where a snapshot comes from, and where it is to be.
    struct Ground {
        _directory: tempfile::TempDir,
        from: PathBuf,
        store: Store,
    }

    impl Ground {
        /// Two stores with one template; the first has a bake of it.
        fn make() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let files = directory.path().join("files");
            fs::create_dir(&files).unwrap();
            for name in ["rootfs", "kernel", "initrd"] {
                fs::write(files.join(name), name.repeat(5000)).unwrap();
            }
            fs::write(files.join("kernel"), crate::kernel::SMALLEST).unwrap();
            let store = |name: &str| {
                let store = Store::open(&directory.path().join(name), true).unwrap();
                let (rootfs, kernel, initrd) =
                    (files.join("rootfs"), files.join("kernel"), files.join("initrd"));
                let import = Import {
                    name: "base".parse().unwrap(),
                    rootfs: &rootfs,
                    kernel: &kernel,
                    initrd: &initrd,
                    links: Links::Follow,
                    vcpus: 1,
                    memory_mib: MemoryMib(256),
                };
                let template = store.import(&import, &mut |_| ()).unwrap();
                (store, template)
            };
            let ((source, template), (store, _)) = (store("source"), store("target"));
            let staged = source.stage().unwrap();
            for name in FILES {
                fs::write(staged.join(name), format!("{name} {}", "x".repeat(10_000))).unwrap();
            }
            let identity = serde_json::from_value(serde_json::json!({
                "image": template.image, "guest_kernel": template.kernel, "agent": template.initrd, "vmm": "qemu",
                "vmm_build": "b", "accelerator": "tcg", "host_cpu": "c", "host_kernel": "h", "vcpus": 1,
                "memory_mib": 256, "disk_mib": 1, "devices": "d", "snapshot_format": SNAPSHOT_FORMAT,
            }));
            let draft = Draft {
                id: kelvin_api::id::SnapshotId::random(),
                template: template.name,
                guest: template.guest,
                parent: None,
                origin: Origin::Bake,
                mode: kelvin_api::sandbox::PauseMode::Full,
                identity: identity.unwrap(),
                arguments: Vec::new(),
            };
            let made = source.publish_snapshot(&staged, draft, Durability::Verified).unwrap();
            Self { _directory: directory, from: made.directory, store }
        }

        fn adopt(&self) -> Result<Snapshot, Error> {
            self.store.adopt_snapshot(&self.from)
        }

        /// Has `change` made to the manifest of the source.
        fn change(&self, change: impl FnOnce(&mut serde_json::Value)) {
            let path = self.from.join("manifest.json");
            let mut manifest = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            change(&mut manifest);
            fs::write(path, manifest.to_string()).unwrap();
        }

        fn is_staging_empty(&self) {
            assert_eq!(fs::read_dir(self.store.root().join("staging")).unwrap().count(), 0);
        }

        /// Nothing of a refused snapshot is there.
        fn is_untouched(&self) {
            assert!(self.store.snapshots().unwrap().is_empty());
            self.is_staging_empty();
        }
    }

    #[test]
    fn a_snapshot_is_adopted_under_its_id_with_a_seal_of_its_own() {
        let ground = Ground::make();
        let adopted = ground.adopt().unwrap();
        adopted.check_seal().unwrap();
        adopted.verify().unwrap();
        let found = ground.store.snapshots().unwrap();
        assert_eq!(found.len(), 1);
        found[0].check_seal().unwrap();
        assert_eq!(found[0].manifest, adopted.manifest);
        let seal = |directory: &Path| fs::read_to_string(directory.join("seal.json")).unwrap();
        assert_ne!(seal(&ground.from), seal(&adopted.directory));
        for name in FILES {
            assert_eq!(fs::read(adopted.file(name)).unwrap(), fs::read(ground.from.join(name)).unwrap());
            assert_eq!(fs::metadata(adopted.file(name)).unwrap().permissions().mode() & 0o337, 0, "{name}");
        }
        // What becomes of the source is nothing to it.
        fs::remove_dir_all(&ground.from).unwrap();
        adopted.check_seal().unwrap();
        adopted.verify().unwrap();
        ground.is_staging_empty();
    }

    #[test]
    fn a_file_that_is_damaged_cut_or_missing_is_refused_by_its_name() {
        for name in FILES {
            for damage in ["bit", "cut", "gone"] {
                let ground = Ground::make();
                let path = ground.from.join(name);
                fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
                let mut content = fs::read(&path).unwrap();
                match damage {
                    "bit" => {
                        content[5000] ^= 1;
                        fs::write(&path, content).unwrap();
                    }
                    "cut" => fs::write(&path, &content[..4096]).unwrap(),
                    _ => fs::remove_file(&path).unwrap(),
                }
                let error = ground.adopt().unwrap_err();
                assert!(matches!(&error, Error::Seal { file, .. } if *file == name), "{damage}: {error}");
                ground.is_untouched();
            }
        }
    }

    #[test]
    fn what_does_not_belong_here_is_refused_with_the_reason() {
        type Change = fn(&mut serde_json::Value);
        let cases: [(&str, Change); 8] = [
            ("without memory it has no memory", |manifest| manifest["mode"] = "filesystem".into()),
            ("its format is 9, this program's is 1", |manifest| {
                manifest["identity"]["snapshot_format"] = 9.into()
            }),
            ("its identity is not the one of its digest", |manifest| {
                manifest["identity"]["vmm_build"] = "other".into();
            }),
            ("template base is another one here: service differs", |manifest| {
                manifest["identity"]["service"] = "other".into();
                digest_anew(manifest);
            }),
            ("template base is another one here: image differs", |manifest| {
                manifest["identity"]["image"] = "other".into();
                digest_anew(manifest);
            }),
            ("its manifest has no digest of memory", |manifest| manifest["memory"] = serde_json::Value::Null),
            ("it belongs to a sandbox of the node that took it", |manifest| {
                let sandbox = kelvin_api::id::SandboxId::random().to_string();
                manifest["origin"] = serde_json::json!({ "fork": { "sandbox": sandbox } });
            }),
            ("no guest nowhere", |manifest| manifest["guest"] = "nowhere".into()),
        ];
        for (reason, change) in cases {
            let ground = Ground::make();
            ground.change(change);
            let error = ground.adopt().unwrap_err();
            assert!(error.to_string().contains(reason), "{reason}: {error}");
            assert!(matches!(error, Error::Unadoptable { .. } | Error::Missing { .. }), "{reason}: {error}");
            ground.is_untouched();
        }
    }

    #[test]
    fn an_id_that_is_there_is_refused_and_stays_what_it_was() {
        let ground = Ground::make();
        let first = ground.adopt().unwrap();
        let error = ground.adopt().unwrap_err();
        assert!(
            matches!(&error, Error::Exists { name, .. } if *name == first.manifest.id.to_string()),
            "{error}"
        );
        assert_eq!(kelvin_api::error::Failure::from(error).kind, kelvin_api::error::Kind::Conflict);
        first.check_seal().unwrap();
        assert_eq!(ground.store.snapshots().unwrap().len(), 1);
        ground.is_staging_empty();
    }

    #[test]
    fn a_crash_between_staging_and_publishing_leaves_nothing_that_is_seen() {
        let ground = Ground::make();
        let manifest: Manifest = read_json(&ground.from.join("manifest.json")).unwrap();
        let staged = ground.store.stage().unwrap();
        stage_verified(&manifest, &ground.from, &staged).unwrap();
        assert!(ground.store.snapshots().unwrap().is_empty());
        // The next life of the daemon.
        let store = Store::open(ground.store.root(), true).unwrap();
        assert!(!staged.exists());
        assert!(store.snapshots().unwrap().is_empty());
        store.adopt_snapshot(&ground.from).unwrap().check_seal().unwrap();
    }
}
