//! Digests of kept snapshots, taken in the background, and their comparison when somebody asks; and what a garbage
//! collection must leave.
//!
//! Digesting reads gigabytes beside sandboxes that run: chunk by chunk, at [`RATE`] at the most, each chunk at a moment in
//! which no create is under way (or after [`PATIENCE`]: a node that is never quiet still digests). A crash costs what was
//! not noted, see `kelvin_store::verify`; the next start goes on.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use kelvin_api::error::chain;
use kelvin_api::id::SnapshotId;
use kelvin_api::sandbox::{FileState, FileVerification, SnapshotVerification};
use kelvin_store::gc::References;
use kelvin_store::hash::CHUNK_BYTES;
use kelvin_store::snapshot::{Origin, Snapshot};
use kelvin_store::verify::{Digesting, FileVerdict, Verdict};

use crate::Node;
use crate::error::Error;
use crate::sandbox::record::SandboxRecord;
use crate::state::Inner;

/// Bytes a second that are digested in the background, at the most.
const RATE: u64 = 32 << 20;
/// How long a chunk waits for a moment without a create.
const PATIENCE: Duration = Duration::from_secs(1);

fn file_verification(file: FileVerdict) -> FileVerification {
    let detail = file.verdict.difference();
    let (state, chunks) = match file.verdict {
        Verdict::Intact => (FileState::Intact, Vec::new()),
        Verdict::NotDigested => (FileState::NotDigested, Vec::new()),
        Verdict::Damaged { chunks, .. } => (FileState::Damaged, chunks),
        Verdict::Resized { .. } => (FileState::Damaged, Vec::new()),
        Verdict::Unreadable(_) => (FileState::Unreadable, Vec::new()),
        Verdict::Unsealed(_) => (FileState::Unsealed, Vec::new()),
    };
    FileVerification { file: file.file.to_owned(), state, bytes: file.bytes, chunks, detail }
}

async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, kelvin_store::Error> + Send + 'static,
) -> Result<T, Error> {
    let done = kelvin_host::blocking::spawn(work).await;
    Ok(done.map_err(|error| Error::Io { what, source: std::io::Error::other(error) })??)
}

impl Node {
    /// Reads all of a kept snapshot and says of each file whether it is what it was. One at a time: a second call waits.
    ///
    /// # Errors
    /// `Store` with `Missing`, or when its digests cannot be read.
    pub async fn verify_snapshot(&self, id: &SnapshotId) -> Result<SnapshotVerification, Error> {
        let missing = || kelvin_store::Error::Missing { kind: "snapshot", name: id.to_string() };
        let snapshot = self.inner.find_snapshot(id)?;
        if !matches!(snapshot.manifest.origin, Origin::Kept { .. }) {
            return Err(missing().into());
        }
        let inner = Arc::clone(&self.inner);
        let verdicts = async move {
            let _one = inner.verifying.lock().await;
            blocking("verifying a snapshot", move || snapshot.verify_all()).await
        };
        let verdicts = verdicts.await?;
        // Deleted while it was read: nothing is wrong with it.
        if self.inner.snapshots.get(id).is_none() {
            return Err(missing().into());
        }
        let files: Vec<_> = verdicts.into_iter().map(file_verification).collect();
        let is_fine =
            |file: &FileVerification| matches!(file.state, FileState::Intact | FileState::NotDigested);
        let intact = files.iter().all(is_fine);
        if !intact {
            let wrong: Vec<_> = files.iter().filter_map(|file| file.detail.as_deref()).collect();
            tracing::error!(snapshot = %id, wrong = wrong.join("; "), "a snapshot is not what it was");
        }
        Ok(SnapshotVerification { snapshot_id: id.to_string(), intact, files })
    }
}

impl Inner {
    /// Digests every kept snapshot that has no digests yet, the oldest first, and each that comes, for ever.
    pub(crate) async fn digest_kept(self: Arc<Self>) {
        // Done, or not to be tried again before the next start.
        let mut over: BTreeSet<SnapshotId> = BTreeSet::new();
        loop {
            let came = self.snapshots.came();
            tokio::pin!(came);
            came.as_mut().enable();
            let kept = self.snapshots.kept();
            over.retain(|id| kept.iter().any(|snapshot| snapshot.manifest.id == *id));
            for snapshot in kept.into_iter().rev() {
                let id = snapshot.manifest.id.clone();
                if !over.insert(id.clone()) {
                    continue;
                }
                match self.digest(snapshot).await {
                    Ok(()) => tracing::debug!(snapshot = %id, "digested"),
                    // Deleted meanwhile.
                    Err(_) if self.snapshots.get(&id).is_none() => {}
                    Err(error) => {
                        tracing::error!(snapshot = %id, error = chain(&error), "a kept snapshot has no digests, the next start tries again");
                    }
                }
            }
            came.await;
        }
    }

    async fn digest(&self, snapshot: Arc<Snapshot>) -> Result<(), Error> {
        let begun = blocking("digesting a snapshot", move || Digesting::of(&snapshot)).await?;
        let Some(mut digesting) = begun else { return Ok(()) };
        let pace = Duration::from_millis(CHUNK_BYTES * 1000 / RATE);
        loop {
            let next = tokio::time::Instant::now() + pace;
            let _ = tokio::time::timeout(PATIENCE, self.activity.quiet()).await;
            let (rest, is_over) = blocking("digesting a snapshot", move || {
                let is_over = digesting.step()?;
                Ok((digesting, is_over))
            })
            .await?;
            if is_over {
                return Ok(());
            }
            digesting = rest;
            tokio::time::sleep_until(next).await;
        }
    }

    /// What records need of the store. What has none yet, [`Inner::in_memory`] knows.
    ///
    /// # Errors
    /// `Ledger`; `Store` with `Unreadable` when a record does not parse: what it needs is not known.
    pub(crate) async fn recorded(&self) -> Result<References, Error> {
        let mut used = References::default();
        let (_, records) = self.allocator.ledger.read().await?;
        for record in records {
            let sandbox =
                SandboxRecord::read(&record.body).map_err(|why| kelvin_store::Error::Unreadable {
                    path: self.store.root().join("ledger.db"),
                    source: format!("the record of machine {}: {why}", record.owner).into(),
                })?;
            // A machine that was booted has no snapshot yet, and its pause will run this guest.
            used.guests.insert(sandbox.guest);
            used.images.extend(sandbox.identity.map(|identity| identity.image));
            used.snapshots.extend(sandbox.snapshot);
            used.snapshots.extend(sandbox.lineage);
        }
        Ok(used)
    }

    /// What machines, pools, builds and creates that are under way need of the store.
    pub(crate) fn in_memory(&self) -> References {
        let mut used = References { snapshots: self.snapshots.leased(), ..References::default() };
        used.snapshots.extend(
            self.pools
                .all()
                .iter()
                .filter(|pool| pool.refusal().is_none() && self.is_usable(&pool.snapshot.manifest.identity))
                .map(|pool| pool.snapshot_id()),
        );
        // Creates that are under way begin from these, whatever was imported since.
        for template in self.templates.all() {
            used.images.insert(template.image.clone());
            used.guests.insert(template.guest.clone());
        }
        for digest in self.builds.needed() {
            used.images.insert(digest.clone());
            used.guests.insert(digest);
        }
        used
    }
}
