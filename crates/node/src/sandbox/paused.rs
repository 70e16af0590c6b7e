//! A sandbox that is paused: a record and a snapshot, no machine.
//!
//! Only the record says that a snapshot may be resumed. A resume takes the record to the new machine in one
//! transaction, so each image is resumed once: what it was is never met by what its disk became. One gate for each
//! sandbox: whoever comes while it is being resumed waits for that and joins it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use kelvin_api::id::{SandboxId, SnapshotId, VmId};
use kelvin_api::network::Wanted;
use kelvin_api::phase::{Phase, Timings};
use kelvin_api::sandbox::PauseMode;
use kelvin_node_api::{Base, Create, Created};
use kelvin_store::snapshot::{Draft, Durability, Origin, Snapshot};
use tokio::sync::watch;

use crate::Inner;
use crate::error::Error;
use crate::machine::console::Console;
use crate::sandbox::record::SandboxRecord;
use crate::snapshots::Lease;
use crate::start::StartSource;

/// A sandbox that is paused.
pub struct Paused {
    /// Under which the ledger has its record.
    pub owner: VmId,
    /// What is known of it; `snapshot` is what it is frozen in.
    pub record: SandboxRecord,
    /// Keeps that snapshot; none when its files are not there, which a resume then says.
    _lease: Option<Lease>,
    /// What was seen of its console.
    pub console: Console,
    gate: tokio::sync::Mutex<()>,
    /// Held by who ends it until that is on the disk: whoever wants the same meanwhile finds it done, or not.
    ending: tokio::sync::Mutex<()>,
    over: AtomicBool,
    /// Whether somebody wants it ended: a resume that is under way gives up.
    killed: watch::Sender<bool>,
}

impl Paused {
    /// The sandbox of `record`, which is in the ledger already.
    pub fn new(owner: VmId, record: SandboxRecord, lease: Option<Lease>, console: Console) -> Self {
        Self {
            owner,
            record,
            _lease: lease,
            console,
            gate: tokio::sync::Mutex::default(),
            ending: tokio::sync::Mutex::default(),
            over: AtomicBool::new(false),
            killed: watch::Sender::new(false),
        }
    }

    /// Waits until somebody wants it ended.
    pub async fn killed(&self) {
        let mut killed = self.killed.subscribe();
        // The sender is this one's.
        let _ = killed.wait_for(|killed| *killed).await;
    }
}

impl Inner {
    /// The sandbox called `id`, when it is paused.
    pub fn paused(&self, id: &SandboxId) -> Option<Arc<Paused>> {
        self.paused_sandboxes().get(id).cloned()
    }

    /// Whether what `paused` is frozen in can go on.
    pub fn has_memory(&self, paused: &Paused) -> bool {
        let image = paused.record.snapshot.as_ref().and_then(|id| self.snapshots.get(id));
        image.is_none_or(|image| image.manifest.mode.is_full())
    }

    /// Resumes a sandbox until `ends_at`, or for as long as its owner asked for at last. `None` when somebody else
    /// has just resumed it.
    ///
    /// # Errors
    /// `Unknown`; `Exhausted`, `Store` and `Vmm` as a create; then it is still paused.
    pub async fn resume(
        self: &Arc<Self>,
        id: &SandboxId,
        ends_at: Option<jiff::Timestamp>,
        mode: PauseMode,
    ) -> Result<Option<Created>, Error> {
        let unknown = || Error::Unknown(id.to_string());
        let paused = match self.paused(id) {
            Some(paused) => paused,
            None if self.sandboxes().contains_key(id) => return Ok(None),
            None if self.is_unreadable(id) => return Err(Error::Unreadable(id.to_string())),
            None => return Err(unknown()),
        };
        let _gate = paused.gate.lock().await;
        if paused.over.load(Ordering::Acquire) {
            return if self.sandboxes().contains_key(id) { Ok(None) } else { Err(unknown()) };
        }
        let record = &paused.record;
        let for_as_long = || self.clock.wall() + std::time::Duration::from_secs(record.timeout_s);
        let image = record.snapshot.clone().ok_or_else(unknown)?;
        let request = Create {
            sandbox: id.clone(),
            project: record.project.clone(),
            base: Base::Snapshot(image),
            vcpus: None,
            memory_mib: None,
            env_vars: record.env_vars.clone(),
            access_token: record.access_token.clone(),
            ends_at: ends_at.unwrap_or_else(for_as_long),
            start_path: None,
            probe_tcp: false,
            network: record.network.clone().map_or(Wanted::None, Wanted::Required),
            lifecycle: record.lifecycle,
            timeout: std::time::Duration::from_secs(record.timeout_s),
        };
        let created = match self.create(request, StartSource::Resume(Arc::clone(&paused), mode)).await {
            // It was killed meanwhile, whatever else went wrong.
            Err(_) if paused.over.load(Ordering::Acquire) => return Err(unknown()),
            other => other?,
        };
        paused.over.store(true, Ordering::Release);
        self.paused_sandboxes().remove(id);
        Ok(Some(created))
    }

    /// What `paused` is frozen in, kept for as long as the lease lives.
    ///
    /// # Errors
    /// `Store` with `Missing` when its files are not there, `Seal` when one was touched.
    pub fn image_of(&self, paused: &Paused) -> Result<(Arc<Snapshot>, Lease), Error> {
        let id = paused.record.snapshot.as_ref();
        let missing = || kelvin_store::Error::Missing {
            kind: "snapshot",
            name: id.map(ToString::to_string).unwrap_or_default(),
        };
        let snapshot = id.and_then(|id| self.snapshots.get(id)).ok_or_else(missing)?;
        let lease = self.snapshots.lease(&snapshot.manifest.id).ok_or_else(missing)?;
        snapshot.check_seal()?;
        Ok((snapshot, lease))
    }

    /// Makes a snapshot of its own, called `id`, of what `paused` is frozen in: its files are cloned, nothing is started.
    ///
    /// # Errors
    /// As [`Inner::image_of`]; `Io` and `Store` when the files cannot be cloned, and then nothing is left.
    pub async fn keep_paused(
        &self,
        paused: &Paused,
        id: SnapshotId,
        origin: Origin,
        mode: PauseMode,
    ) -> Result<(Arc<Snapshot>, Timings), Error> {
        self.check_disk()?;
        let (image, _lease) = self.image_of(paused)?;
        let (mut timings, mut since) = (Timings::default(), Instant::now());
        let store = self.store.clone();
        let copied = kelvin_host::blocking::spawn(move || {
            let manifest = &image.manifest;
            let mode = if manifest.mode.is_full() { mode } else { PauseMode::Filesystem };
            let staged = store.stage().map_err(|error| (None, Error::from(error)))?;
            let cloned = || -> std::io::Result<()> {
                for name in kelvin_store::snapshot::files(mode) {
                    kelvin_store::disk::clone_file(&image.file(name), &staged.join(name))?;
                }
                Ok(())
            };
            let draft = Draft {
                id,
                template: manifest.template.clone(),
                guest: manifest.guest.clone(),
                parent: manifest.parent.clone(),
                origin,
                mode,
                identity: manifest.identity.clone(),
                arguments: manifest.arguments.clone(),
            };
            let kept = cloned()
                .map_err(|source| Error::Io { what: "cloning a paused sandbox's snapshot", source })
                .and_then(|()| Ok(store.publish_snapshot(&staged, draft, Durability::Durable)?));
            kept.map_err(|error| (Some(staged), error))
        });
        let kept = copied.await.map_err(|error| Error::Io {
            what: "cloning a paused sandbox's snapshot",
            source: std::io::Error::other(error),
        })?;
        let kept = match kept {
            Ok(kept) => kept,
            Err((staged, error)) => {
                if let Some(staged) = staged {
                    self.allocator.remove_staged(staged).await;
                }
                return Err(error);
            }
        };
        timings.lap(Phase::Publish, &mut since);
        let kept = Arc::new(kept);
        drop(self.snapshots.add_leased(Arc::clone(&kept)));
        Ok((kept, timings))
    }

    /// Ends a sandbox that is paused, also one that is being resumed. Nothing is waited for but who ends it already: whether it ended or was
    /// resumed is decided by who takes its record out of the ledger. A resume that comes too late finds none, and one that
    /// waits for a silent guest gives up: its machine is released.
    ///
    /// # Errors
    /// `Unknown` when it was resumed or ended meanwhile, `Ledger`.
    pub async fn end_paused(&self, id: &SandboxId) -> Result<(), Error> {
        let unknown = || Error::Unknown(id.to_string());
        let paused = self.paused(id).ok_or_else(unknown)?;
        let _ending = paused.ending.lock().await;
        if paused.over.load(Ordering::Acquire) || !self.allocator.ledger.strike_record(&paused.owner).await? {
            // A resume that has taken the record is about to be seen.
            drop(paused.gate.lock().await);
            return Err(unknown());
        }
        paused.over.store(true, Ordering::Release);
        paused.killed.send_replace(true);
        self.paused_sandboxes().remove(id);
        self.changes.add(id.clone(), "it was killed while it was paused");
        Ok(())
    }
}
