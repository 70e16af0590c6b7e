//! What becomes of a sandbox that is paused: it is resumed, or kept as a snapshot of its own.
//!
//! One gate for each sandbox: whoever comes while it is being resumed waits for that and joins it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use kelvin_api::id::{SandboxId, SnapshotId};
use kelvin_api::network::Wanted;
use kelvin_api::phase::{Phase, Timings};
use kelvin_api::sandbox::PauseMode;
use kelvin_node_api::{Base, Create, Created};
use kelvin_store::snapshot::{Draft, Durability, Origin, Snapshot};

use crate::error::Error;
use crate::sandbox::paused::Paused;
use crate::snapshots::Lease;
use crate::start::source::StartSource;
use crate::state::Inner;

impl Inner {
    /// The sandbox called `id`, when it is paused.
    pub fn paused(&self, id: &SandboxId) -> Option<Arc<Paused>> {
        self.sandboxes.paused().get(id).cloned()
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
            None if self.sandboxes.running().contains_key(id) => return Ok(None),
            None if self.is_unreadable(id) => return Err(Error::Unreadable(id.to_string())),
            None => return Err(unknown()),
        };
        let _gate = paused.gate.lock().await;
        if paused.over.load(Ordering::Acquire) {
            return if self.sandboxes.running().contains_key(id) { Ok(None) } else { Err(unknown()) };
        }
        let record = &paused.record;
        let for_as_long = || self.clock.wall() + std::time::Duration::from_secs(record.timeout_s);
        let image = record.snapshot.clone().ok_or_else(unknown)?;
        let request = Create {
            sandbox: id.clone(),
            project: record.project.clone(),
            base: Base::Snapshot(image.clone()),
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
        let resumed = async {
            let image = self.find_snapshot(&image)?;
            self.create(request, StartSource::resume(Arc::clone(&paused), image, mode)).await
        };
        let created = match resumed.await {
            // It was killed meanwhile, whatever else went wrong.
            Err(_) if paused.over.load(Ordering::Acquire) => return Err(unknown()),
            other => other?,
        };
        paused.over.store(true, Ordering::Release);
        self.sandboxes.paused().remove(id);
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
        self.ensure_disk().await?;
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
}
