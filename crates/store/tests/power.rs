//! What the store says is published or removed is so after a power failure, on a disk that loses what was not synced;
//! and each sync that this needs is needed: with any of them lost, something is lost.

// Everything here is a test.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use kelvin_api::id::SnapshotId;
use kelvin_api::sandbox::PauseMode;
use kelvin_powercut::{Disk, Loss};
use kelvin_store::Store;
use kelvin_store::gc::References;
use kelvin_store::import::{Import, Links};
use kelvin_store::snapshot::{Draft, Durability, FILES, Origin};

const LOSSES: [Loss; 2] = [Loss::Everything, Loss::ContentAlone];

/// A disk, and where it is after a power failure.
struct Ground {
    disk: Disk,
    now: tempfile::TempDir,
}

fn ground(lost: impl Fn(&Path) -> bool + Send + 'static) -> Option<Ground> {
    let now = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(now.path()).unwrap() else {
        println!("skipped: no /dev/fuse");
        return None;
    };
    disk.lose_syncs(lost);
    Some(Ground { disk, now })
}

impl Ground {
    fn root(&self) -> PathBuf {
        self.now.path().join("data")
    }

    /// What `look` says of a store that is opened after a power failure at this moment, for each way to fail.
    fn after<T>(&self, look: impl Fn(Result<Store, String>) -> T) -> Vec<T> {
        let look = |loss| {
            let then = tempfile::tempdir().unwrap();
            let _disk = self.disk.after_power_failure(loss, then.path()).unwrap().unwrap();
            let root = then.path().join("data");
            match root.exists() {
                true => look(Store::open(&root, true).map_err(|error| error.to_string())),
                false => look(Err("there is no data directory".to_owned())),
            }
        };
        LOSSES.into_iter().map(look).collect()
    }
}

fn publish(store: &Store, durability: Durability) -> SnapshotId {
    let staged = store.stage().unwrap();
    for name in FILES {
        fs::write(staged.join(name), format!("{name} {}", "x".repeat(10_000))).unwrap();
    }
    let identity = serde_json::from_value(serde_json::json!({
        "image": "i", "guest_kernel": "k", "agent": "a", "vmm": "qemu", "vmm_build": "b", "accelerator": "tcg",
        "host_cpu": "c", "host_kernel": "h", "vcpus": 1, "memory_mib": 1, "disk_mib": 1, "devices": "d",
        "snapshot_format": 1,
    }));
    let draft = Draft {
        id: SnapshotId::random(),
        template: "base".parse().unwrap(),
        guest: "g".into(),
        parent: None,
        origin: Origin::Kept { sandbox: kelvin_api::id::SandboxId::random(), name: None },
        mode: PauseMode::Full,
        identity: identity.unwrap(),
        arguments: Vec::new(),
    };
    store.publish_snapshot(&staged, draft, durability).unwrap().manifest.id
}

/// Whether a snapshot can be restored: it opens, its seal holds, and its files are what was written.
fn is_whole(store: &Result<Store, String>, id: &SnapshotId) -> Result<(), String> {
    let store = store.as_ref().map_err(Clone::clone)?;
    let snapshot = store.snapshot(id).map_err(|error| error.to_string())?;
    snapshot.check_seal().map_err(|error| error.to_string())?;
    for name in FILES {
        let content = fs::read(snapshot.file(name)).map_err(|error| error.to_string())?;
        if content != format!("{name} {}", "x".repeat(10_000)).into_bytes() {
            return Err(format!("{name} has {} bytes", content.len()));
        }
    }
    Ok(())
}

#[test]
fn a_published_snapshot_survives_and_needs_every_sync() {
    for durability in [Durability::Durable, Durability::Verified] {
        let Some(ground) = ground(|_| false) else { return };
        let id = publish(&Store::open(&ground.root(), true).unwrap(), durability);
        for result in ground.after(|store| is_whole(&store, &id)) {
            result.unwrap();
        }
        println!("{durability:?}: {} syncs", ground.disk.syncs().len());
    }
    type Picks = fn(&Path) -> bool;
    fn is_named(path: &Path, name: &str) -> bool {
        path.file_name().is_some_and(|found| found.to_string_lossy().starts_with(name))
    }
    let needed: [(&str, Picks); 9] = [
        ("memory", |path| is_named(path, "memory")),
        ("state", |path| is_named(path, "state")),
        ("disk", |path| is_named(path, "disk")),
        ("the manifest", |path| is_named(path, "manifest.json")),
        ("the seal", |path| is_named(path, "seal.json")),
        ("the staged directory", |path| path.parent() == Some(Path::new("data/staging"))),
        ("the directory of snapshots", |path| path == Path::new("data/snapshots")),
        ("the data directory", |path| path == Path::new("data")),
        ("what the data directory is in", |path| path == Path::new("")),
    ];
    for (what, picks) in needed {
        let Some(ground) = ground(picks) else { return };
        let id = publish(&Store::open(&ground.root(), true).unwrap(), Durability::Durable);
        let results = ground.after(|store| is_whole(&store, &id));
        assert!(
            results.iter().any(Result::is_err),
            "without the sync of {what} nothing is lost: is it needed?"
        );
    }
}

#[test]
fn an_adopted_snapshot_survives_and_needs_every_sync() {
    let elsewhere = tempfile::tempdir().unwrap();
    let source = Store::open(elsewhere.path(), true).unwrap();
    let id = publish(&source, Durability::Verified);
    let from = source.snapshot(&id).unwrap().directory;
    let adopt = |ground: &Ground| {
        let store = Store::open(&ground.root(), true).unwrap();
        fs::create_dir(store.guest("g")).unwrap();
        assert_eq!(store.adopt_snapshot(&from).unwrap().manifest.id, id);
    };
    let Some(whole) = ground(|_| false) else { return };
    adopt(&whole);
    for result in whole.after(|store| is_whole(&store, &id)) {
        result.unwrap();
    }
    for name in ["memory", "state", "disk", "manifest.json", "seal.json"] {
        let lost = move |path: &Path| {
            path.file_name().is_some_and(|found| found.to_string_lossy().starts_with(name))
        };
        let Some(ground) = ground(lost) else { return };
        adopt(&ground);
        let results = ground.after(|store| is_whole(&store, &id));
        assert!(
            results.iter().any(Result::is_err),
            "without the sync of {name} nothing is lost: is it needed?"
        );
    }
}

#[test]
fn a_snapshot_that_was_cut_short_is_not_there_and_one_that_passes_is_whole_or_not_there() {
    let Some(ground) = ground(|_| false) else { return };
    let store = Store::open(&ground.root(), true).unwrap();
    fs::write(store.stage().unwrap().join("memory"), "half").unwrap();
    for left in ground.after(|store| store.unwrap().snapshots().unwrap().len()) {
        assert_eq!(left, 0);
    }
    let id = publish(&store, Durability::Ephemeral);
    // Nobody needs it after a power failure; a collection is not to be stopped by what is left of it.
    let found = ground.after(|store| {
        let store = store.unwrap();
        (is_whole(&Ok(store.clone()), &id), store.collect(References::default, true))
    });
    for (whole, collected) in found {
        println!("of a passing snapshot is left: {whole:?}, {collected:?}");
    }
}

#[test]
fn what_was_deleted_stays_deleted_and_needs_its_sync() {
    let deleted = |lost: fn(&Path) -> bool| {
        let ground = ground(|_| false)?;
        let store = Store::open(&ground.root(), true).unwrap();
        let id = publish(&store, Durability::Durable);
        ground.disk.lose_syncs(lost);
        store.delete_snapshot(&id).unwrap();
        Some(ground.after(|store| store.unwrap().snapshot(&id).is_err()))
    };
    let Some(gone) = deleted(|_| false) else { return };
    assert_eq!(gone, [true, true]);
    assert!(deleted(|path| path == Path::new("data/snapshots")).unwrap().contains(&false));
}

#[test]
fn a_template_that_was_imported_survives() {
    let sources = tempfile::tempdir().unwrap();
    let source = |name: &str| {
        let path = sources.path().join(name);
        fs::write(&path, name.repeat(1000)).unwrap();
        path
    };
    let (rootfs, kernel, initrd) = (source("rootfs"), source("kernel"), source("initrd"));
    let beginning = fs::File::options().write(true).open(&kernel).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&beginning, kelvin_store::kernel::SMALLEST, 0).unwrap();
    let import = |lost: fn(&Path) -> bool| {
        let ground = ground(lost)?;
        let imported = Store::open(&ground.root(), true).unwrap().import(
            &Import {
                name: "base".parse().unwrap(),
                rootfs: &rootfs,
                kernel: &kernel,
                initrd: &initrd,
                links: Links::Follow,
                vcpus: 1,
                memory_mib: kelvin_api::units::MemoryMib(128),
            },
            &mut |_| (),
        );
        let template = imported.unwrap();
        Some(ground.after(|store| {
            let store = store.unwrap();
            let is_whole = |path: PathBuf, from: &Path| fs::read(path).ok() == fs::read(from).ok();
            store.template(&"base".parse().unwrap()).is_ok_and(|found| found == template)
                && is_whole(store.rootfs(&template.image), &rootfs)
                && is_whole(store.guest(&template.guest).join("vmlinuz"), &kernel)
                && is_whole(store.guest(&template.guest).join("initrd"), &initrd)
        }))
    };
    let Some(whole) = import(|_| false) else { return };
    assert_eq!(whole, [true, true]);
    // Not that of `images` alone: the one of `guests` writes every earlier rename out of `staging`, too.
    let lost: [fn(&Path) -> bool; 4] = [
        |path| path.ends_with("rootfs.ext4"),
        |path| path.ends_with("vmlinuz"),
        |path| path == Path::new("data/guests"),
        |path| path == Path::new("data/templates"),
    ];
    for (index, lost) in lost.into_iter().enumerate() {
        assert!(import(lost).unwrap().contains(&false), "sync {index} is not needed?");
    }
}
