//! Snapshots: memory, device state and disk of one frozen instant, under one manifest.
//!
//! A template's golden snapshot, a paused sandbox, a fork point and a snapshot that a user keeps are all made here;
//! [`Origin`] says which it is, [`Durability`] how much is done for it.
//!
//! ```text
//! staged ──sync──> hashed ──chmod──> sealed ──rename──> published ──check_seal──> restored from
//!    └─ crash: removed at the next start            └─ touched: refused, by the file's name
//! ```
//!
//! The seal is what the file system says of each file (device, inode, size, times): a restore compares
//! it in microseconds, because hashing gigabytes is not for that path. When only the device number has
//! changed (a loop device after a reboot), the content is hashed once and sealed anew.
//!
//! What a seal shows: whoever wrote, replaced, cut, touched or restored a file through the file system. What it does not:
//! bits that the disk returns otherwise than they were written, and root, who can set every time but the change time and
//! that one with the clock. Digests show those (`verify`): a bake has them from the start, a kept snapshot gets them later.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use kelvin_api::id::{SandboxId, SnapshotId, TemplateName};
use kelvin_api::sandbox::PauseMode;
use serde::{Deserialize, Serialize};

use crate::hash::{FileDigest, digest_file};
use crate::identity::Identity;
use crate::{Error, Store, io_error, names, publish, read_json, write_json};

/// The files of a snapshot.
pub const FILES: [&str; 3] = ["memory", "state", "disk"];

/// Those of them that a snapshot of `mode` has.
pub fn files(mode: PauseMode) -> &'static [&'static str] {
    match mode {
        PauseMode::Full => &FILES,
        PauseMode::Filesystem => &FILES[2..],
    }
}

/// Why a snapshot was taken.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// A template's machine that nobody has used.
    #[default]
    Bake,
    /// A sandbox that is paused: consumed by its resume.
    Pause {
        /// Whose memory it is.
        sandbox: SandboxId,
        /// How often it had been paused with this one.
        generation: u64,
    },
    /// The instant of a fork: needed while a child runs from it.
    Fork {
        /// Whose memory it is.
        sandbox: SandboxId,
    },
    /// Kept until somebody deletes it.
    Kept {
        /// Whose memory it is.
        sandbox: SandboxId,
        /// As which it can be created from, beside its id; the newest of a name counts.
        name: Option<TemplateName>,
    },
}

impl Origin {
    /// Whether it goes when no machine needs it.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Pause { .. } | Self::Fork { .. })
    }
}

/// How much is done for a snapshot when it is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// It survives a power failure and has digests of its content: what is restored from for long, or elsewhere.
    Verified,
    /// It survives a power failure.
    Durable,
    /// It survives the daemon: no machine that needs it would survive more.
    Ephemeral,
}

/// What a snapshot is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Its id.
    pub id: SnapshotId,
    /// When it was taken.
    pub created: jiff::Timestamp,
    /// The template it was baked from.
    pub template: TemplateName,
    /// Digest of the guest it runs.
    pub guest: String,
    /// The snapshot it descends from: the last that was baked or kept.
    pub parent: Option<SnapshotId>,
    /// Why it was taken.
    #[serde(default)]
    pub origin: Origin,
    /// What it keeps: without memory there are no files `memory` and `state`, and it is booted from its disk.
    #[serde(default)]
    pub mode: PauseMode,
    /// Digest of `identity`.
    pub identity_digest: String,
    /// Its fields.
    pub identity: Identity,
    /// Guest memory; digests are there when they were asked for, see [`Durability`].
    #[serde(default)]
    pub memory: Option<FileDigest>,
    /// Device state.
    #[serde(default)]
    pub state: Option<FileDigest>,
    /// Disk.
    #[serde(default)]
    pub disk: Option<FileDigest>,
    /// The VMM's arguments at the bake, for a person and for the bench: paths are relative to the data
    /// directory, `{vm}` stands for the machine's directory, `{memory}` for the memory file.
    pub arguments: Vec<String>,
}

/// What the file system said of one file when it was sealed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileSeal {
    device: u64,
    inode: u64,
    bytes: u64,
    mtime_ns: i128,
    ctime_ns: i128,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Seal {
    #[serde(default)]
    memory: Option<FileSeal>,
    #[serde(default)]
    state: Option<FileSeal>,
    disk: FileSeal,
}

impl FileSeal {
    fn of(path: &Path) -> io::Result<Self> {
        let found = fs::symlink_metadata(path)?;
        let ns = |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
        Ok(Self {
            device: found.dev(),
            inode: found.ino(),
            bytes: found.len(),
            mtime_ns: ns(found.mtime(), found.mtime_nsec()),
            ctime_ns: ns(found.ctime(), found.ctime_nsec()),
        })
    }

    fn difference(&self, now: &Self) -> Option<&'static str> {
        if self.bytes != now.bytes {
            Some("its size changed")
        } else if self.inode != now.inode {
            Some("it is another file")
        } else if self.mtime_ns != now.mtime_ns {
            Some("it was written")
        } else if self.ctime_ns != now.ctime_ns {
            Some("it was touched")
        } else if self.device != now.device {
            Some("it is on another device")
        } else {
            None
        }
    }
}

impl Seal {
    fn of(directory: &Path, mode: PauseMode) -> Result<Self, Error> {
        let one = |name: &str| {
            let path = directory.join(name);
            FileSeal::of(&path).map_err(io_error("reading", &path))
        };
        let (memory, state) = match mode {
            PauseMode::Full => (Some(one("memory")?), Some(one("state")?)),
            PauseMode::Filesystem => (None, None),
        };
        Ok(Self { memory, state, disk: one("disk")? })
    }

    fn file(&self, name: &str) -> Option<&FileSeal> {
        match name {
            "memory" => self.memory.as_ref(),
            "state" => self.state.as_ref(),
            _ => Some(&self.disk),
        }
    }
}

/// Who may read a snapshot's memory and device state: root, and a group of its own that the VMMs are in that are restored
/// from it. A daemon that is not root has VMMs of its own user.
struct Readers {
    owner: u32,
    group: Option<u32>,
}

/// The first of the groups; none of systemd's ranges reaches up to it.
/// Source: systemd, docs/UIDS-GIDS.md.
const FIRST_GROUP: u32 = 0x7000_0000;

impl Readers {
    fn new() -> io::Result<Self> {
        let owner = rustix::process::geteuid();
        let mut random = [0; 4];
        getrandom::fill(&mut random).map_err(|error| io::Error::other(error.to_string()))?;
        // One of 2^28: that two snapshots have the same lets nobody in, their directories are closed.
        let group = owner.is_root().then_some(FIRST_GROUP | u32::from_ne_bytes(random) >> 4);
        Ok(Self { owner: owner.as_raw(), group })
    }

    /// Takes `path`, a file that is never written again or a directory, from everybody but root and, when it is `shared`,
    /// the group.
    fn close(&self, path: &Path, shared: bool) -> io::Result<()> {
        let group = self.group.filter(|_| shared);
        std::os::unix::fs::lchown(path, Some(self.owner), group)?;
        let found = fs::symlink_metadata(path)?;
        let mode = match (found.is_dir(), group.is_some()) {
            (true, true) => 0o710,
            (true, false) => 0o700,
            (false, true) => 0o440,
            (false, false) => 0o400,
        };
        if found.is_symlink() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is a link"));
        }
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
    }
}

/// What is known before a snapshot has its digests.
#[derive(Debug, Clone)]
pub struct Draft {
    /// What it is called: whoever wants it may have noted that before.
    pub id: SnapshotId,
    /// The template it was baked from.
    pub template: TemplateName,
    /// Digest of the guest it runs.
    pub guest: String,
    /// Its parent.
    pub parent: Option<SnapshotId>,
    /// Why it is taken.
    pub origin: Origin,
    /// What it keeps.
    pub mode: PauseMode,
    /// Its identity.
    pub identity: Identity,
    /// See [`Manifest::arguments`].
    pub arguments: Vec<String>,
}

/// A published snapshot; cheap to check, never changed.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// What it is.
    pub manifest: Manifest,
    /// Where it is.
    pub directory: PathBuf,
    seal: Seal,
}

impl Snapshot {
    /// The path of one of [`FILES`], whether it has it or not.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Bytes that its memory has on the disk: what is a hole is not counted. None without memory, or when it cannot be read.
    pub fn memory_on_disk(&self) -> Option<u64> {
        let memory = self.manifest.mode.is_full().then(|| self.file("memory"))?;
        fs::metadata(memory).ok().map(|found| crate::image::on_disk(&found))
    }

    /// Compares every file with its seal. A `stat` of each: made for the create path.
    ///
    /// # Errors
    /// `Seal` with the file's name and what differs.
    pub fn check_seal(&self) -> Result<(), Error> {
        for name in files(self.manifest.mode).iter().copied() {
            if let Some(difference) = self.seal_difference(name) {
                return Err(Error::Seal { snapshot: self.manifest.id.to_string(), file: name, difference });
            }
        }
        Ok(())
    }

    /// What differs between one file and its seal.
    pub(crate) fn seal_difference(&self, name: &str) -> Option<String> {
        match (FileSeal::of(&self.file(name)), self.seal.file(name)) {
            (Err(error), _) => Some(format!("it cannot be read: {error}")),
            (Ok(_), None) => Some("it was never sealed".to_owned()),
            (Ok(now), Some(seal)) => seal.difference(&now).map(str::to_owned),
        }
    }

    /// For tests: seals what is there now.
    #[cfg(test)]
    pub(crate) fn seal_anew(&mut self) {
        self.seal = Seal::of(&self.directory, self.manifest.mode).unwrap();
    }
}

impl Manifest {
    /// Each file and the digest that it was published with.
    pub(crate) fn digests(&self) -> [(&'static str, Option<&FileDigest>); 3] {
        [("memory", self.memory.as_ref()), ("state", self.state.as_ref()), ("disk", self.disk.as_ref())]
    }
}

impl Store {
    pub(crate) fn snapshot_path(&self, id: &SnapshotId) -> PathBuf {
        self.root.join("snapshots").join(id.as_str())
    }

    /// Publishes what lies in `staged` as `memory`, `state` and `disk`. Afterwards `staged` is gone.
    ///
    /// # Errors
    /// `Io` when a file is missing or the disk is full; then nothing is published and the caller removes
    /// `staged`.
    pub fn publish_snapshot(
        &self,
        staged: &Path,
        draft: Draft,
        durability: Durability,
    ) -> Result<Snapshot, Error> {
        let there = files(draft.mode);
        let digest = |name: &str| {
            if !there.contains(&name) {
                return Ok(None);
            }
            let path = staged.join(name);
            if durability != Durability::Ephemeral {
                // Synced first: reflinking a file with dirty pages flushes it, once for each clone.
                fs::File::open(&path).and_then(|file| file.sync_all()).map_err(io_error("syncing", &path))?;
            }
            match durability {
                Durability::Verified => digest_file(&path).map(Some).map_err(io_error("hashing", &path)),
                // There, and a file.
                _ => fs::metadata(&path).map(|_| None).map_err(io_error("reading", &path)),
            }
        };
        let manifest = Manifest {
            id: draft.id,
            created: jiff::Timestamp::now(),
            template: draft.template,
            guest: draft.guest,
            parent: draft.parent,
            origin: draft.origin,
            mode: draft.mode,
            identity_digest: draft.identity.digest(),
            identity: draft.identity,
            memory: digest("memory")?,
            state: digest("state")?,
            disk: digest("disk")?,
            arguments: draft.arguments,
        };
        self.seal_and_publish(staged, manifest, durability)
    }

    /// Closes the files in `staged`, seals them, and publishes them with `manifest`.
    pub(crate) fn seal_and_publish(
        &self,
        staged: &Path,
        manifest: Manifest,
        durability: Durability,
    ) -> Result<Snapshot, Error> {
        let readers = Readers::new().map_err(io_error("choosing a group for", staged))?;
        for name in files(manifest.mode) {
            let path = staged.join(name);
            readers.close(&path, *name != "disk").map_err(io_error("sealing", &path))?;
        }
        readers.close(staged, true).map_err(io_error("closing", staged))?;
        let seal = Seal::of(staged, manifest.mode)?;
        write_json(&staged.join("manifest.json"), &manifest)?;
        write_json(&staged.join("seal.json"), &seal)?;
        let directory = self.snapshot_path(&manifest.id);
        publish(staged, &directory, durability != Durability::Ephemeral)?;
        Ok(Snapshot { manifest, directory, seal })
    }

    /// Opens a published snapshot. When its files are on another device than at the sealing and nothing
    /// else differs, those that have a digest are hashed, and all are sealed anew.
    ///
    /// # Errors
    /// `Missing`, `Manifest`, `Io`, and `Seal` when that hashing finds a difference.
    pub fn snapshot(&self, id: &SnapshotId) -> Result<Snapshot, Error> {
        let directory = self.snapshot_path(id);
        if !directory.exists() {
            return Err(Error::Missing { kind: "snapshot", name: id.to_string() });
        }
        let mut snapshot = Snapshot {
            manifest: read_json(&directory.join("manifest.json"))?,
            seal: read_json(&directory.join("seal.json"))?,
            directory,
        };
        let mode = snapshot.manifest.mode;
        let now = Seal::of(&snapshot.directory, mode)?;
        let moved = |name: &&str| match (snapshot.seal.file(name), now.file(name)) {
            (Some(then), Some(now)) => then.difference(now) == Some("it is on another device"),
            _ => false,
        };
        if files(mode).iter().all(moved) {
            snapshot.verify()?;
            write_json(&snapshot.directory.join("seal.json"), &now)?;
            snapshot.seal = now;
        }
        Ok(snapshot)
    }

    /// Every snapshot that can be opened; the others are reported and left where they are.
    ///
    /// # Errors
    /// `Io` when the directory cannot be listed.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>, Error> {
        let mut found: Vec<Snapshot> = names::<SnapshotId>(&self.root.join("snapshots"))?
            .iter()
            .filter_map(|id| match self.snapshot(id) {
                Ok(snapshot) => Some(snapshot),
                Err(error) => {
                    tracing::error!(error = kelvin_api::error::chain(&error), "snapshot left out");
                    None
                }
            })
            .collect();
        found.sort_by_key(|snapshot| snapshot.manifest.created);
        Ok(found)
    }
}

#[cfg(test)]
pub(crate) mod tests_support {
    use super::*;

    pub(crate) fn publish_example(store: &Store, parent: Option<SnapshotId>, image: &str) -> Snapshot {
        publish(store, parent, image, Durability::Verified, |name, path| {
            fs::write(path, format!("{name} {}", "x".repeat(10_000))).unwrap();
        })
    }

    /// A snapshot whose files `write` makes.
    pub(crate) fn publish_with(
        store: &Store,
        durability: Durability,
        write: impl Fn(&str, &Path),
    ) -> Snapshot {
        publish(store, None, "i", durability, write)
    }

    fn publish(
        store: &Store,
        parent: Option<SnapshotId>,
        image: &str,
        durability: Durability,
        write: impl Fn(&str, &Path),
    ) -> Snapshot {
        let staged = store.stage().unwrap();
        for name in FILES {
            write(name, &staged.join(name));
        }
        let identity: Identity = serde_json::from_value(serde_json::json!({
            "image": image, "guest_kernel": "k", "agent": "a", "vmm": "qemu", "vmm_build": "b",
            "accelerator": "tcg", "host_cpu": "c", "host_kernel": "h", "vcpus": 1, "memory_mib": 1,
            "disk_mib": 1, "devices": "d", "snapshot_format": 1,
        }))
        .unwrap();
        let draft = Draft {
            id: SnapshotId::random(),
            template: "base".parse().unwrap(),
            guest: "g".into(),
            parent,
            origin: Origin::default(),
            mode: PauseMode::Full,
            identity,
            arguments: Vec::new(),
        };
        store.publish_snapshot(&staged, draft, durability).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::tests_support::publish_example;
    use super::*;

    #[test]
    fn one_bit_or_one_page_or_one_touch_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), true).unwrap();
        for name in FILES {
            for damage in ["bit", "cut", "touch", "gone"] {
                let snapshot = publish_example(&store, None, "i");
                snapshot.check_seal().unwrap();
                snapshot.verify().unwrap();
                let path = snapshot.file(name);
                fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
                let mut content = fs::read(&path).unwrap();
                match damage {
                    "bit" => {
                        content[5000] ^= 1;
                        fs::write(&path, &content).unwrap();
                    }
                    "cut" => fs::write(&path, &content[..4096]).unwrap(),
                    "gone" => fs::remove_file(&path).unwrap(),
                    _ => {}
                }
                let error = snapshot.check_seal().unwrap_err();
                assert!(matches!(&error, Error::Seal { file, .. } if *file == name), "{damage}: {error}");
                if damage == "bit" || damage == "cut" {
                    let error = snapshot.verify().unwrap_err();
                    assert!(matches!(&error, Error::Seal { file, .. } if *file == name), "{damage}: {error}");
                }
            }
        }
    }

    #[test]
    fn another_device_alone_is_verified_and_sealed_anew() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), true).unwrap();
        let snapshot = publish_example(&store, None, "i");
        let path = snapshot.directory.join("seal.json");
        let mut seal: Seal = read_json(&path).unwrap();
        for file in [seal.memory.as_mut(), seal.state.as_mut(), Some(&mut seal.disk)].into_iter().flatten() {
            file.device += 1;
        }
        write_json(&path, &seal).unwrap();
        store.snapshot(&snapshot.manifest.id).unwrap().check_seal().unwrap();
        // The same with one byte changed is not.
        write_json(&path, &seal).unwrap();
        let memory = snapshot.file("memory");
        fs::set_permissions(&memory, fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(&memory, "other").unwrap();
        assert!(store.snapshot(&snapshot.manifest.id).unwrap().check_seal().is_err());
    }

    #[test]
    fn a_torn_snapshot_is_never_seen() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), true).unwrap();
        let staged = store.stage().unwrap();
        fs::write(staged.join("memory"), "half").unwrap();
        let store = Store::open(dir.path(), true).unwrap();
        assert!(!staged.exists());
        assert!(store.snapshots().unwrap().is_empty());
    }
}
