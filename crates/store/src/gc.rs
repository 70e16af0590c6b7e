//! Garbage collection: what nothing needs, by lineage.
//!
//! A snapshot is needed by a running machine, by a snapshot that descends from it, by being the one that its template
//! restores now, and by being kept by a user. An image and a guest are needed by templates and snapshots. What is
//! needed is never removed, and a removal that is asked for is refused with the names of the dependents.

use std::collections::BTreeSet;

use kelvin_api::id::SnapshotId;
use rustix::fs::FlockOperation;
use serde::Serialize;

use crate::snapshot::{Origin, Snapshot};
use crate::{Error, Store, names, unpublish};

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

impl Store {
    /// Removes what nothing needs. `in_use` are snapshots that machines were restored from or that pools
    /// hold; with `dry_run` nothing is removed.
    ///
    /// # Errors
    /// `Io` when something cannot be listed or removed; what was removed before stays removed.
    pub fn collect(&self, in_use: &BTreeSet<SnapshotId>, dry_run: bool) -> Result<Garbage, Error> {
        let _alone = self.lock(FlockOperation::LockExclusive)?;
        let templates = self.templates()?;
        let snapshots = self.snapshots()?;
        // A snapshot stays while its template still has its image and guest: it may fit again.
        let mut needed: BTreeSet<SnapshotId> = snapshots
            .iter()
            .filter(|snapshot| {
                let manifest = &snapshot.manifest;
                let kept = match manifest.origin {
                    Origin::Bake => templates.iter().any(|template| {
                        template.name == manifest.template
                            && template.image == manifest.identity.image
                            && template.guest == manifest.guest
                    }),
                    // Theirs to delete who keep them; of the passing ones the node keeps books of its own.
                    Origin::Kept { .. } | Origin::Pause { .. } | Origin::Fork { .. } => true,
                };
                kept || in_use.contains(&manifest.id)
            })
            .map(|snapshot| snapshot.manifest.id.clone())
            .collect();
        // Parents of what is needed are needed, all the way up.
        loop {
            let parents: Vec<SnapshotId> = snapshots
                .iter()
                .filter(|snapshot| needed.contains(&snapshot.manifest.id))
                .filter_map(|snapshot| snapshot.manifest.parent.clone())
                .filter(|parent| !needed.contains(parent))
                .collect();
            if parents.is_empty() {
                break;
            }
            needed.extend(parents);
        }
        let (kept, garbage): (Vec<_>, Vec<_>) =
            snapshots.iter().partition(|snapshot| needed.contains(&snapshot.manifest.id));
        let images: BTreeSet<&str> = templates
            .iter()
            .map(|template| template.image.as_str())
            .chain(kept.iter().map(|snapshot| snapshot.manifest.identity.image.as_str()))
            .collect();
        let guests: BTreeSet<&str> = templates
            .iter()
            .map(|template| template.guest.as_str())
            .chain(kept.iter().map(|snapshot| snapshot.manifest.guest.as_str()))
            .collect();
        let unneeded = |directory: &str, needed: &BTreeSet<&str>| -> Result<Vec<String>, Error> {
            Ok(names::<String>(&self.root.join(directory))?
                .into_iter()
                .filter(|name| !needed.contains(name.as_str()))
                .collect())
        };
        let found = Garbage {
            snapshots: garbage.iter().map(|snapshot| snapshot.manifest.id.to_string()).collect(),
            images: unneeded("images", &images)?,
            guests: unneeded("guests", &guests)?,
        };
        if !dry_run {
            for (kind, list) in
                [("snapshots", &found.snapshots), ("images", &found.images), ("guests", &found.guests)]
            {
                for name in list {
                    unpublish(self, &self.root.join(kind).join(name))?;
                }
            }
        }
        Ok(found)
    }

    /// Removes one snapshot, unless something needs it. One that is gone is fine.
    ///
    /// # Errors
    /// `InUse` with the dependents' names; `Io`.
    pub fn remove_snapshot(&self, id: &SnapshotId, users: &[String]) -> Result<(), Error> {
        let mut dependents = users.to_vec();
        dependents.extend(
            self.snapshots()?
                .iter()
                .filter(|snapshot| descends(snapshot, id))
                .map(|snapshot| format!("snapshot {}", snapshot.manifest.id)),
        );
        if !dependents.is_empty() {
            return Err(Error::InUse { kind: "snapshot", name: id.to_string(), dependents });
        }
        unpublish(self, &self.root.join("snapshots").join(id.as_str()))
    }
}

impl Store {
    /// Removes one snapshot that the caller knows nothing needs. One that is gone is fine.
    ///
    /// # Errors
    /// `Io`.
    pub fn discard_snapshot(&self, id: &SnapshotId) -> Result<(), Error> {
        unpublish(self, &self.root.join("snapshots").join(id.as_str()))
    }
}

fn descends(snapshot: &Snapshot, id: &SnapshotId) -> bool {
    snapshot.manifest.parent.as_ref() == Some(id)
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
        let in_use = BTreeSet::from([child.clone()]);
        let plan = store.collect(&in_use, true).unwrap();
        assert_eq!(plan.snapshots, [stray.to_string()]);
        assert_eq!(store.snapshots().unwrap().len(), 3, "a dry run removes nothing");
        assert_eq!(store.collect(&in_use, false).unwrap(), plan);
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
        store.collect(&BTreeSet::new(), false).unwrap();
    }
}
