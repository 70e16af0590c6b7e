//! Garbage collection: what nothing needs, by lineage.
//!
//! A snapshot is needed by a running machine, by a snapshot that descends from it, by being one that a version of its template
//! restores, and by being kept by a user. An image and a guest are needed by templates, snapshots and machines. What
//! is needed is never removed, and a removal that is asked for is refused with the names of the dependents.
//!
//! What cannot be read may need anything: a template, a manifest or a record that is unreadable stops a collection, by
//! its name, before anything is removed.

use std::collections::BTreeSet;
use std::fs;

use kelvin_api::id::SnapshotId;
use rustix::fs::FlockOperation;
use serde::Serialize;

use crate::image::{Service, Template, version_of};
use crate::snapshot::{Manifest, Origin};
use crate::{Error, Store, io_error, names, read_json, unpublish};

/// What a collection removed, or would remove.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Garbage {
    /// Snapshot ids.
    pub snapshots: Vec<String>,
    /// Image digests.
    pub images: Vec<String>,
    /// Guest digests.
    pub guests: Vec<String>,
}

/// What is needed by more than the store knows: by machines, records and pools.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct References {
    /// Snapshots that machines were restored from, sandboxes are paused in or descend from, or pools hold.
    pub snapshots: BTreeSet<SnapshotId>,
    /// Digests of images.
    pub images: BTreeSet<String>,
    /// Digests of guests: what a machine that was booted runs, and will be resumed with.
    pub guests: BTreeSet<String>,
}

impl References {
    /// These and those.
    #[must_use]
    pub fn with(mut self, others: Self) -> Self {
        self.snapshots.extend(others.snapshots);
        self.images.extend(others.images);
        self.guests.extend(others.guests);
        self
    }
}

fn is_gone(path: &std::path::Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

impl Store {
    /// Every manifest.
    ///
    /// # Errors
    /// `Unreadable` for the first that cannot be read, or whose directory's name means nothing.
    pub fn manifests(&self) -> Result<Vec<Manifest>, Error> {
        self.each("snapshots", |name| {
            let id: Option<SnapshotId> = name.parse().ok();
            let path = self.root.join("snapshots").join(name);
            match id {
                Some(_) => read_json(&path.join("manifest.json")).map(Some),
                None => {
                    Err(io_error("understanding the name", &path)(std::io::ErrorKind::InvalidInput.into()))
                }
            }
        })
    }

    /// The same of templates.
    fn all_templates(&self) -> Result<Vec<Template>, Error> {
        self.each("templates", |file| {
            // One that was not written to its end when its writer died: the old one, or none, still counts.
            if file.ends_with(".new") {
                return Ok(None);
            }
            let path = self.root.join("templates").join(file);
            match version_of(file) {
                Some(_) => read_json(&path).map(Some),
                None => {
                    Err(io_error("understanding the name", &path)(std::io::ErrorKind::InvalidInput.into()))
                }
            }
        })
    }

    /// What `read` makes of the name of each entry of `directory`.
    fn each<T>(
        &self,
        directory: &str,
        read: impl Fn(&str) -> Result<Option<T>, Error>,
    ) -> Result<Vec<T>, Error> {
        let directory = self.root.join(directory);
        let mut found = Vec::new();
        for entry in fs::read_dir(&directory).map_err(io_error("listing", &directory))? {
            let name = entry.map_err(io_error("listing", &directory))?.file_name();
            let one = name.to_str().map_or_else(
                || {
                    Err(io_error("understanding the name", &directory)(
                        std::io::ErrorKind::InvalidInput.into(),
                    ))
                },
                &read,
            );
            match one {
                Ok(one) => found.extend(one),
                // Removed while it was read: a passing snapshot whose last lease went.
                Err(_) if is_gone(&directory.join(&name)) => {}
                Err(error) => {
                    return Err(Error::Unreadable { path: directory.join(name), source: error.into() });
                }
            }
        }
        Ok(found)
    }

    /// Removes what nothing needs; with `dry_run` nothing is removed. `used` is asked when nobody publishes any more: what
    /// was published and is needed since then waits for the end of the collection.
    ///
    /// # Errors
    /// `Unreadable`, and then nothing is removed; `Io` when something cannot be listed or removed: what was removed
    /// before stays removed.
    pub fn collect(&self, used: impl FnOnce() -> References, dry_run: bool) -> Result<Garbage, Error> {
        let _alone = self.lock(FlockOperation::LockExclusive)?;
        let used = used();
        let templates = self.all_templates()?;
        let mut snapshots = self.manifests()?;
        snapshots.sort_by_key(|manifest| manifest.created);
        // A snapshot stays while a version of its template still has its image, guest and service: it may fit again.
        let mut needed: BTreeSet<SnapshotId> = snapshots
            .iter()
            .filter(|manifest| {
                let kept = match manifest.origin {
                    Origin::Bake => templates.iter().any(|template| {
                        template.name == manifest.template
                            && template.image == manifest.identity.image
                            && template.guest == manifest.guest
                            && template.service.as_ref().map(Service::digest) == manifest.identity.service
                    }),
                    // Theirs to delete who keep them; of the passing ones the node keeps books of its own.
                    Origin::Kept { .. } | Origin::Pause { .. } | Origin::Fork { .. } => true,
                };
                kept || used.snapshots.contains(&manifest.id)
            })
            .map(|manifest| manifest.id.clone())
            .collect();
        // Parents of what is needed are needed, all the way up.
        loop {
            let parents: Vec<SnapshotId> = snapshots
                .iter()
                .filter(|manifest| needed.contains(&manifest.id))
                .filter_map(|manifest| manifest.parent.clone())
                .filter(|parent| !needed.contains(parent))
                .collect();
            if parents.is_empty() {
                break;
            }
            needed.extend(parents);
        }
        let (kept, garbage): (Vec<_>, Vec<_>) =
            snapshots.iter().partition(|manifest| needed.contains(&manifest.id));
        let images: BTreeSet<&str> = templates
            .iter()
            .map(|template| template.image.as_str())
            .chain(kept.iter().map(|manifest| manifest.identity.image.as_str()))
            .chain(used.images.iter().map(String::as_str))
            .collect();
        let guests: BTreeSet<&str> = templates
            .iter()
            .map(|template| template.guest.as_str())
            .chain(kept.iter().map(|manifest| manifest.guest.as_str()))
            .chain(used.guests.iter().map(String::as_str))
            .collect();
        let unneeded = |directory: &str, needed: &BTreeSet<&str>| -> Result<Vec<String>, Error> {
            Ok(names::<String>(&self.root.join(directory))?
                .into_iter()
                .filter(|name| !needed.contains(name.as_str()))
                .collect())
        };
        let found = Garbage {
            snapshots: garbage.iter().map(|manifest| manifest.id.to_string()).collect(),
            images: unneeded("images", &images)?,
            guests: unneeded("guests", &guests)?,
        };
        if !dry_run {
            for (kind, list) in
                [("snapshots", &found.snapshots), ("images", &found.images), ("guests", &found.guests)]
            {
                for name in list {
                    unpublish(self, &self.root.join(kind).join(name), false)?;
                }
            }
        }
        Ok(found)
    }

    /// Removes one snapshot, unless something needs it; no power failure brings it back. One that is gone is fine.
    ///
    /// # Errors
    /// `InUse` with the dependents' names; `Unreadable` when those are not known; `Io`.
    pub fn remove_snapshot(&self, id: &SnapshotId, users: &[String]) -> Result<(), Error> {
        let mut dependents = users.to_vec();
        dependents.extend(
            self.manifests()?
                .iter()
                .filter(|manifest| manifest.parent.as_ref() == Some(id))
                .map(|manifest| format!("snapshot {}", manifest.id)),
        );
        if !dependents.is_empty() {
            return Err(Error::InUse { kind: "snapshot", name: id.to_string(), dependents });
        }
        self.delete_snapshot(id)
    }
}

impl Store {
    /// Removes one snapshot that the caller knows nothing needs. One that is gone is fine.
    ///
    /// # Errors
    /// `Io`.
    pub fn discard_snapshot(&self, id: &SnapshotId) -> Result<(), Error> {
        unpublish(self, &self.root.join("snapshots").join(id.as_str()), false)
    }

    /// The same for one that somebody is told of: no power failure brings it back.
    ///
    /// # Errors
    /// `Io`.
    pub fn delete_snapshot(&self, id: &SnapshotId) -> Result<(), Error> {
        unpublish(self, &self.root.join("snapshots").join(id.as_str()), true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::tests_support::publish_example;

    #[test]
    fn lineage_is_never_broken() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), true).unwrap();
        let parent = publish_example(&store, None, "i").manifest.id;
        let child = publish_example(&store, Some(parent.clone()), "i").manifest.id;
        let stray = publish_example(&store, None, "i").manifest.id;
        let error = store.remove_snapshot(&parent, &[]).unwrap_err();
        assert!(
            matches!(&error, Error::InUse { dependents, .. } if *dependents == [format!("snapshot {child}")])
        );
        let error = store.remove_snapshot(&child, &["sandbox s1".into()]).unwrap_err();
        assert!(error.to_string().contains("sandbox s1"));
        let in_use = References { snapshots: BTreeSet::from([child.clone()]), ..References::default() };
        let plan = store.collect(|| in_use.clone(), true).unwrap();
        assert_eq!(plan.snapshots, [stray.to_string()]);
        assert_eq!(store.snapshots().unwrap().len(), 3, "a dry run removes nothing");
        assert_eq!(store.collect(|| in_use.clone(), false).unwrap(), plan);
        assert_eq!(store.snapshots().unwrap().len(), 2);
        store.remove_snapshot(&child, &[]).unwrap();
        store.remove_snapshot(&parent, &[]).unwrap();
        store.remove_snapshot(&parent, &[]).unwrap();
    }

    #[test]
    fn a_collection_waits_for_an_import() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), true).unwrap();
        let importing = store.lock(FlockOperation::LockShared).unwrap();
        assert!(
            store.lock(FlockOperation::NonBlockingLockShared).is_ok(),
            "imports do not wait for each other"
        );
        assert!(store.lock(FlockOperation::NonBlockingLockExclusive).is_err());
        drop(importing);
        let nobody_imports = || {
            let importing = store.lock(FlockOperation::NonBlockingLockShared);
            assert!(importing.is_err(), "what an import that is over needs is known");
            References::default()
        };
        store.collect(nobody_imports, false).unwrap();
    }

    /// A template, its image and guest, and a snapshot of it.
    fn furnished() -> (tempfile::TempDir, Store, Template) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("data"), true).unwrap();
        let file = |name: &str| {
            let path = dir.path().join(name);
            fs::write(&path, name).unwrap();
            path
        };
        fs::write(dir.path().join("vmlinuz"), crate::kernel::SMALLEST).unwrap();
        let template = store
            .import(
                &crate::import::Import {
                    name: "base".parse().unwrap(),
                    rootfs: &file("rootfs"),
                    kernel: &dir.path().join("vmlinuz"),
                    initrd: &file("initrd"),
                    links: crate::import::Links::Follow,
                    vcpus: 1,
                    memory_mib: kelvin_api::units::MemoryMib(128),
                },
                &mut |_| (),
            )
            .unwrap();
        (dir, store, template)
    }

    #[test]
    fn what_cannot_be_read_stops_the_collection_by_name() {
        type Damage = fn(&Store, &SnapshotId) -> std::path::PathBuf;
        let cases: [(&str, Damage); 6] = [
            ("a template that does not parse", |store, _| {
                let path = store.root().join("templates/base.json");
                fs::write(&path, "{").unwrap();
                path
            }),
            ("a template that is a directory", |store, _| {
                let path = store.root().join("templates/base.json");
                fs::remove_file(&path).unwrap();
                fs::create_dir(&path).unwrap();
                path
            }),
            ("a template with a name of another version", |store, _| {
                let path = store.root().join("templates/base.json.gz");
                fs::rename(store.root().join("templates/base.json"), &path).unwrap();
                path
            }),
            ("a manifest of another version", |store, id| {
                let path = store.root().join("snapshots").join(id.as_str());
                fs::write(path.join("manifest.json"), "{\"later\": 1}").unwrap();
                path
            }),
            ("a snapshot without a manifest", |store, id| {
                let path = store.root().join("snapshots").join(id.as_str());
                fs::remove_file(path.join("manifest.json")).unwrap();
                path
            }),
            ("a snapshot with a name that means nothing", |store, id| {
                let path = store.root().join("snapshots/Old Snapshot");
                fs::rename(store.root().join("snapshots").join(id.as_str()), &path).unwrap();
                path
            }),
        ];
        for (what, damage) in cases {
            let (_dir, store, template) = furnished();
            // What the unreadable one needs: an image and a parent.
            let parent = publish_example(&store, None, &template.image).manifest.id;
            let child = publish_example(&store, Some(parent.clone()), &template.image).manifest.id;
            let path = damage(&store, &child);
            for dry_run in [true, false] {
                let error = store.collect(References::default, dry_run).unwrap_err();
                assert!(
                    matches!(&error, Error::Unreadable { path: found, .. } if *found == path),
                    "{what}: {error}"
                );
            }
            assert!(store.root().join("images").join(&template.image).exists(), "{what}");
            assert!(store.root().join("guests").join(&template.guest).exists(), "{what}");
            assert!(store.snapshot_path(&parent).exists(), "{what}");
            if !what.contains("template") {
                let error = store.remove_snapshot(&parent, &[]).unwrap_err();
                assert!(matches!(error, Error::Unreadable { .. }), "{what}");
            }
        }
        // Not so the rest of a write that was cut short: what it was to replace is whole.
        let (_dir, store, template) = furnished();
        fs::write(store.root().join("templates/base.json.new"), "{").unwrap();
        assert_eq!(store.collect(References::default, false).unwrap(), Garbage::default());
        assert!(store.root().join("images").join(&template.image).exists());
    }

    #[test]
    fn what_machines_need_stays() {
        let (_dir, store, template) = furnished();
        // Imported anew, or deleted, while a machine runs that was booted from it.
        fs::remove_file(store.root().join("templates/base.json")).unwrap();
        let used = References {
            images: BTreeSet::from([template.image.clone()]),
            guests: BTreeSet::from([template.guest.clone()]),
            ..References::default()
        };
        assert_eq!(store.collect(|| used.clone(), false).unwrap(), Garbage::default());
        let garbage = store.collect(References::default, false).unwrap();
        assert_eq!((garbage.images, garbage.guests), (vec![template.image], vec![template.guest]));
    }
}
