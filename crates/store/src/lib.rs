//! Images, guests, templates, disks and snapshots on one node's data directory.
//!
//! ```text
//! <data-dir>/images/<digest>/{manifest.json,rootfs.ext4}
//!            guests/<digest>/{manifest.json,vmlinuz,initrd}
//!            templates/<name>.json
//!            snapshots/<id>/{manifest.json,seal.json,digests.json,memory,state,disk}
//!            layers/<key>-<time>/{layer.json,disk}
//!            uploads/<project>.<hash>-<time>/{files.json,archive}
//!            staging/<random>/        whatever is not published yet
//! ```
//!
//! Who writes: this crate alone, by staging and one rename, so that what has its name is whole. A crash
//! leaves something in `staging/`, which the next start removes. Files of a snapshot are never written
//! again; [`snapshot::Snapshot::check_seal`] finds out when somebody else did.
//!
//! All calls block; callers on a reactor use `spawn_blocking`. Absent on purpose: which snapshot to use
//! (`kelvin-node` decides) and the network.

pub mod adopt;
pub mod built;
mod cache;
pub mod disk;
pub mod gc;
pub mod hash;
pub mod identity;
pub mod image;
pub mod import;
pub mod kernel;
pub mod layers;
pub mod snapshot;
mod source;
pub mod uploads;
pub mod verify;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use kelvin_api::error::{ErrorCode, Failure};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why the store could not do something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{what} {path}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A manifest does not parse.
    #[error("{path} is not a valid manifest")]
    Manifest {
        /// Which one.
        path: PathBuf,
        /// Where.
        source: serde_json::Error,
    },
    /// Something with that name does not exist.
    #[error("no {kind} {name}")]
    Missing {
        /// Template, image, guest or snapshot.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// A file of a snapshot is not what was sealed.
    #[error("{file} of snapshot {snapshot} is not what was sealed: {difference}")]
    Seal {
        /// The snapshot.
        snapshot: String,
        /// `memory`, `state` or `disk`.
        file: &'static str,
        /// What differs.
        difference: String,
    },
    /// A file is none that can be imported.
    #[error("{path} cannot be imported: {reason}")]
    Unimportable {
        /// Which one.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Somebody sends more than one may have.
    #[error("{what} has more than {most_bytes} bytes")]
    Oversized {
        /// What.
        what: &'static str,
        /// The most.
        most_bytes: u64,
    },
    /// A snapshot with that id is there already.
    #[error("{kind} {name} is there already")]
    Exists {
        /// Snapshot.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// A snapshot that was made elsewhere does not belong here.
    #[error("snapshot {snapshot} cannot be adopted: {reason}")]
    Unadoptable {
        /// Its id.
        snapshot: String,
        /// What does not fit.
        reason: String,
    },
    /// What something needs is not known, so nothing is removed.
    #[error("nothing is removed: {path} cannot be read, and what it needs is not known")]
    Unreadable {
        /// What cannot be read.
        path: PathBuf,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Others descend from it.
    #[error("{kind} {name} is needed by {}", dependents.join(", "))]
    InUse {
        /// Image, guest or snapshot.
        kind: &'static str,
        /// Its name.
        name: String,
        /// Who needs it.
        dependents: Vec<String>,
    },
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let (code, remediation) = match &error {
            Error::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => (
                ErrorCode::DiskFull,
                "free space on the data directory's file system, `kelvin gc` removes what nothing needs",
            ),
            Error::Io { .. } => {
                (ErrorCode::StoreIo, "see the cause; `kelvin doctor` checks the data directory")
            }
            Error::Manifest { .. } => (
                ErrorCode::ManifestInvalid,
                "remove the directory that the message names and import or bake again",
            ),
            Error::Missing { .. } => (ErrorCode::NotFound, "`kelvin template list` shows what there is"),
            Error::Seal { .. } => {
                (ErrorCode::SnapshotCorrupt, "bake the template again: `kelvin template bake`")
            }
            Error::Unreadable { .. } => (
                ErrorCode::MetadataUnreadable,
                "repair what the message names, or remove it if nothing needs it, and try again",
            ),
            Error::Unimportable { .. } => (
                ErrorCode::InvalidFile,
                "name a regular file that the server sees: the package's sees nothing below /home, /root and /tmp",
            ),
            Error::Oversized { .. } => {
                (ErrorCode::FilesRefused, "leave out what the build does not need, as a .dockerignore says")
            }
            Error::Exists { .. } => (ErrorCode::AlreadyThere, "use it, or delete it first"),
            Error::Unadoptable { .. } => {
                (ErrorCode::SnapshotUnadoptable, "import the template that it is of, or bake one here")
            }
            Error::InUse { .. } => (ErrorCode::InUse, "remove what depends on it first"),
        };
        Self::new(code, error.to_string(), remediation).with_sources(&error)
    }
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

/// The store of one data directory; cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// Opens the store at `root`, making its directories. With `exclusive`, what a crash left in
    /// `staging/` is removed: only the daemon that owns the data directory may ask for it.
    ///
    /// # Errors
    /// `Io` when the directory cannot be used.
    pub fn open(root: &Path, exclusive: bool) -> Result<Self, Error> {
        use std::os::unix::fs::PermissionsExt;
        fs::create_dir_all(root).map_err(io_error("making", root))?;
        let root = root.canonicalize().map_err(io_error("resolving", root))?;
        let staging = root.join("staging");
        if exclusive && staging.exists() {
            fs::remove_dir_all(&staging).map_err(io_error("emptying", &staging))?;
        }
        // Nobody else comes in here: VMMs get what they need as descriptors and mounts of their own.
        for name in [
            "",
            "images",
            "guests",
            "templates",
            "snapshots",
            "layers",
            "uploads",
            "staging",
            "sandboxes",
            "run",
        ] {
            let path = root.join(name);
            fs::create_dir_all(&path).map_err(io_error("making", &path))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o700))
                .map_err(io_error("closing", &path))?;
        }
        // What is published below survives a power failure only if its way from the root does.
        File::open(&root).and_then(|root| root.sync_all()).map_err(io_error("syncing", &root))?;
        if let Some(parent) = root.parent()
            && let Err(error) = File::open(parent).and_then(|parent| parent.sync_all())
        {
            // Not ours, perhaps, and there before.
            tracing::debug!(%error, path = %parent.display(), "not synced");
        }
        Ok(Self { root })
    }

    /// The data directory, absolute.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Holds imports and collections apart, across processes: shared for imports, exclusive for a collection. The
    /// kernel lets go with the file or the process.
    fn lock(&self, operation: rustix::fs::FlockOperation) -> Result<fs::File, Error> {
        let path = self.root.join("store.lock");
        let file = fs::File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(io_error("opening", &path))?;
        rustix::fs::flock(&file, operation).map_err(|error| io_error("locking", &path)(error.into()))?;
        Ok(file)
    }

    fn staging_path(&self) -> PathBuf {
        self.root.join("staging").join(kelvin_api::id::SnapshotId::random().as_str())
    }

    /// A fresh directory on the same file system, to be published by a rename.
    ///
    /// # Errors
    /// `Io` when it cannot be made.
    pub fn stage(&self) -> Result<PathBuf, Error> {
        let path = self.staging_path();
        self.make_staged(&path)?;
        Ok(path)
    }

    fn make_staged(&self, path: &Path) -> Result<(), Error> {
        use std::os::unix::fs::PermissionsExt;
        fs::create_dir(path).map_err(io_error("making", path))?;
        // What is published from it is mounted in jails, whose users pass through it.
        fs::set_permissions(path, fs::Permissions::from_mode(0o711)).map_err(io_error("opening", path))
    }
}

/// Reads what [`write_json`] wrote.
///
/// # Errors
/// `Io` when it cannot be read, `Manifest` when it is not what is expected.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let bytes = fs::read(path).map_err(io_error("reading", path))?;
    serde_json::from_slice(&bytes).map_err(|source| Error::Manifest { path: path.to_owned(), source })
}

/// Writes `value` so that `path` has the old content or the new one, whatever happens. One writer at a time.
///
/// # Errors
/// `Io` when it cannot be written.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), Error> {
    let fresh = path.with_extension("json.new");
    let mut bytes = serde_json::to_vec_pretty(value)
        .map_err(|source| Error::Manifest { path: path.to_owned(), source })?;
    bytes.push(b'\n');
    let write = || -> io::Result<()> {
        let mut file = File::create(&fresh)?;
        io::Write::write_all(&mut file, &bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, path)?;
        sync_parent(path)
    };
    write().map_err(io_error("writing", path))
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// Publishes a staged directory: everything in it is synced (when it is to be durable), then one rename gives it its name. When
/// that name exists already, the staged one is dropped: names say what is inside.
fn publish(staged: &Path, target: &Path, durably: bool) -> Result<(), Error> {
    let sync = || -> io::Result<()> {
        for entry in fs::read_dir(staged)? {
            File::open(entry?.path())?.sync_all()?;
        }
        File::open(staged)?.sync_all()
    };
    if durably {
        sync().map_err(io_error("syncing", staged))?;
    }
    if target.exists() {
        return fs::remove_dir_all(staged).map_err(io_error("removing", staged));
    }
    match fs::rename(staged, target) {
        // Somebody else was faster with the same.
        Err(_) if target.exists() => fs::remove_dir_all(staged).map_err(io_error("removing", staged))?,
        renamed => renamed.map_err(io_error("publishing", target))?,
    }
    if !durably {
        return Ok(());
    }
    sync_parent(target).map_err(io_error("syncing", target))
}

/// Removes a published directory as one step: what a crash leaves lies in `staging/`. Gone already is fine. `durably`, no
/// power failure brings it back.
fn unpublish(store: &Store, target: &Path, durably: bool) -> Result<(), Error> {
    let staged = withdraw(store, target)?;
    // A removal that failed half-way may have been told of and not be durable.
    if durably {
        sync_parent(target).map_err(io_error("syncing", target))?;
    }
    remove_withdrawn(&staged)
}

/// The first half of that: nobody finds it any more. Where it lies in `staging/`, if it was there.
fn withdraw(store: &Store, target: &Path) -> Result<PathBuf, Error> {
    let staged = store.staging_path();
    match fs::rename(target, &staged) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("removing", target)(error)),
        _ => Ok(staged),
    }
}

/// The second.
fn remove_withdrawn(staged: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(staged) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("removing", staged)(error)),
        _ => Ok(()),
    }
}

/// Names of the entries of a directory that parse as `T`.
fn names<T: std::str::FromStr>(directory: &Path) -> Result<Vec<T>, Error> {
    let entries = fs::read_dir(directory).map_err(io_error("listing", directory))?;
    let entries: Vec<_> = entries.collect::<io::Result<_>>().map_err(io_error("listing", directory))?;
    Ok(entries.into_iter().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}
