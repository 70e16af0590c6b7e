//! The one way to a snapshot: of a sandbox, for a pause, for a fork and to be kept. A bake, whose machine is nobody's yet,
//! takes the same steps, [`flush`], [`save`] and [`publish`], from here.
//!
//! ```text
//! quiesce ──> pause ──> save ──> (resume) ──> publish
//! running, frozen fs │ vCPUs stopped        │ running again; a sandbox that is to be paused stays stopped
//! ```
//!
//! Without memory it is the disk alone: to be booted, not to go on. Ahead of the pause is done what can be: the
//! parent's memory is cloned, the disk is flushed, the guest freezes its file system. Memory and disk are of one
//! instant also when the guest does not answer: a hostile agent cannot prevent a pause, it only does without a clean
//! file system. Whatever fails, the machine goes on and what was staged is removed; a crash leaves it to `staging/`,
//! which the next start empties, and a stopped machine, which the next start lets go on.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kelvin_api::error::chain;
use kelvin_api::guest::Request;
use kelvin_api::id::SnapshotId;
use kelvin_api::phase::{Phase, Timings};
use kelvin_api::sandbox::{Capture, PauseMode};
use kelvin_host::clock::Clock;
use kelvin_store::Store;
use kelvin_store::identity::Identity;
use kelvin_store::snapshot::{Draft, Durability, Origin, Snapshot};
use kelvin_vmm::{MachineSpec, Paused, Saved};
use tracing::Instrument;

use crate::error::Error;
use crate::machine::clock::{sync_clock, wake};
use crate::machine::live::LiveMachine;
use crate::sandbox::record::SandboxRecord;
use crate::snapshots::{CaptureOptions, Captured};
use crate::state::Inner;

/// How long a guest may take to write everything back, and how long when its owner wants no snapshot without that: its
/// disk may be slow.
const FREEZE: Duration = Duration::from_secs(10);
const HEALTHY_FREEZE: Duration = Duration::from_secs(60);
/// How long it stays frozen for sure. Source: `crates/agent/src/control.rs`, `FROZEN`: it thaws by itself after 20 s.
const STAYS_FROZEN: Duration = Duration::from_secs(15);
/// How often it is frozen again because the disk took longer than that.
const FREEZES: u32 = 3;
/// How long the agent of a machine that goes on may take to say so.
const AWAKE: Duration = Duration::from_secs(10);

async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, Error> {
    kelvin_host::blocking::spawn(work)
        .await
        .unwrap_or_else(|error| Err(std::io::Error::other(error)))
        .map_err(|source| Error::Io { what, source })
}

/// Writes back what the guest has written, which is in the page cache: a clone of the file would do it with the vCPUs
/// stopped.
pub async fn flush(disk: PathBuf) -> Result<(), Error> {
    blocking("flushing the disk", move || kelvin_host::file::read_plain(&disk)?.sync_data()).await
}

/// Saves a machine that stands still, whose disk is `disk`, to `staged`: memory and disk are of one instant.
pub async fn save(paused: &Paused, disk: PathBuf, staged: &Path, mode: PauseMode) -> Result<Saved, Error> {
    let (memory, state, to) = (staged.join("memory"), staged.join("state"), staged.join("disk"));
    let save = async {
        match mode {
            PauseMode::Full => paused.save(&memory, &state).await,
            PauseMode::Filesystem => Ok(Saved { dirty_pages: None }),
        }
    };
    let (saved, cloned) = tokio::join!(
        save,
        blocking("saving the disk", move || kelvin_store::disk::clone_file(&disk, &to).map(drop)),
    );
    cloned?;
    Ok(saved?)
}

/// Makes a snapshot of what was saved to `staged`.
pub async fn publish(
    store: Store,
    staged: &Path,
    draft: Draft,
    durability: Durability,
) -> Result<Snapshot, Error> {
    let staged = staged.to_owned();
    kelvin_host::blocking::spawn(move || store.publish_snapshot(&staged, draft, durability))
        .await
        .map_err(|error| Error::Io { what: "publishing", source: std::io::Error::other(error) })?
        .map_err(Error::from)
}

/// A machine that snapshots are taken of, as its task lends it.
pub struct Capturing<'a> {
    /// The node.
    pub inner: &'a Arc<Inner>,
    /// Its place.
    pub spec: &'a MachineSpec,
    /// It.
    pub machine: &'a mut LiveMachine,
    /// What is known of its sandbox.
    pub record: &'a SandboxRecord,
    /// What a snapshot of it must be restored as; none when that is not known any more.
    pub identity: Option<&'a Identity>,
    /// Whether its guest did not say that it goes on when it was asked last.
    pub is_silent: &'a AtomicBool,
}

/// What freezing a file system on its disk takes.
pub trait Freeze {
    /// Freezes it; whether the guest says so.
    fn freeze(&mut self) -> impl Future<Output = bool> + Send;
    /// Writes back what is left.
    fn flush(&mut self) -> impl Future<Output = Result<(), Error>> + Send;
    /// Thaws it.
    fn thaw(&mut self) -> impl Future<Output = ()> + Send;
}

/// Freezes a file system and writes it back. Whether it is still frozen then: a disk may take longer than a guest stays
/// frozen by itself, so it is done again with the little that was written since.
pub async fn freeze_on_disk(clock: &Clock, of: &mut impl Freeze) -> Result<bool, Error> {
    for _ in 0..FREEZES {
        let since = clock.now();
        let is_frozen = of.freeze().await;
        of.flush().await?;
        if !is_frozen {
            return Ok(false);
        }
        if clock.now().saturating_duration_since(since) < STAYS_FROZEN {
            return Ok(true);
        }
        of.thaw().await;
    }
    Ok(false)
}

struct Freezing<'a, 'b> {
    of: &'a mut Capturing<'b>,
    disk: PathBuf,
    limit: Duration,
}

impl Freeze for Freezing<'_, '_> {
    async fn freeze(&mut self) -> bool {
        self.of.freeze(self.limit).await
    }

    async fn flush(&mut self) -> Result<(), Error> {
        flush(self.disk.clone()).await
    }

    async fn thaw(&mut self) {
        self.of.await_wake_ack().await;
    }
}

impl Capturing<'_> {
    /// Takes a snapshot called `id`. With `then.stay`, the machine stays stopped when that succeeds, in `self.machine`.
    ///
    /// # Errors
    /// Of the step that failed; then the machine runs and nothing is left of the snapshot. When it cannot go on,
    /// its task ends it.
    pub async fn capture(
        &mut self,
        id: SnapshotId,
        origin: Origin,
        durability: Durability,
        then: CaptureOptions,
    ) -> Result<Captured, Error> {
        self.inner.ensure_disk().await?;
        let store = self.inner.store.clone();
        let staged = kelvin_host::blocking::spawn(move || store.stage()).await;
        let staged = staged.map_err(|error| Error::Io {
            what: "making a staging directory",
            source: std::io::Error::other(error),
        })??;
        let result = self.capture_to(&staged, id, origin, durability, then).await;
        if result.is_err() {
            self.inner.allocator.remove_staged(staged).await;
        }
        result
    }

    async fn capture_to(
        &mut self,
        staged: &Path,
        id: SnapshotId,
        origin: Origin,
        durability: Durability,
        CaptureOptions { stay, healthy, mode }: CaptureOptions,
    ) -> Result<Captured, Error> {
        let (mut timings, mut since) = (Timings::default(), Instant::now());
        let inner = Arc::clone(self.inner);
        let begin = |phase: Phase| {
            inner.crash_point(phase);
            tracing::info_span!("phase", name = phase.name())
        };
        let span = begin(Phase::Quiesce);
        let quiesced = self.quiesce(staged, mode, healthy).instrument(span).await?;
        timings.lap(Phase::Quiesce, &mut since);
        if healthy && !quiesced {
            // It may still come to it.
            self.await_wake_ack().await;
            return Err(Error::Unhealthy(self.record.sandbox.to_string()));
        }

        // Not before: a guest that does not answer asks for no processor.
        let _work = inner.activity.work();
        let span = begin(Phase::Pause);
        let stopped = Instant::now();
        match self.machine.stop().instrument(span).await {
            Some(Ok(())) => {}
            Some(Err(error)) => {
                self.await_wake_ack().await;
                return Err(error.into());
            }
            None => return Err(Error::Unknown(self.record.sandbox.to_string())),
        }
        timings.lap(Phase::Pause, &mut since);

        let span = begin(Phase::Save);
        let saved = self.save(staged, mode).instrument(span).await;
        timings.lap(Phase::Save, &mut since);
        if !stay || saved.is_err() {
            let span = begin(Phase::Resume);
            self.go_on().instrument(span).await?;
            timings.lap(Phase::Resume, &mut since);
        }
        let paused_ms = stopped.elapsed().as_secs_f64() * 1e3;
        let saved = saved?;
        if !stay {
            self.await_wake_ack().await;
        }

        let span = begin(Phase::Publish);
        since = Instant::now();
        let published = self.publish(staged, id, origin, mode, durability).instrument(span).await;
        timings.lap(Phase::Publish, &mut since);
        let snapshot = match published {
            Ok(snapshot) => Arc::new(snapshot),
            Err(error) => {
                if stay {
                    self.go_on().await?;
                    self.await_wake_ack().await;
                }
                return Err(error);
            }
        };
        let capture = Capture { paused_ms, dirty_pages: saved.dirty_pages, quiesced };
        tracing::info!(sandbox = %self.record.sandbox, snapshot = %snapshot.manifest.id, paused_ms,
            dirty_pages = saved.dirty_pages, quiesced, timing = timings.server_timing(stopped.elapsed()), "captured");
        let lease = self.inner.snapshots.add_leased(Arc::clone(&snapshot));
        Ok(Captured { snapshot, _lease: lease, capture, timings })
    }

    /// What can be done while the machine runs. Whether its file system is frozen, and on the disk.
    async fn quiesce(&mut self, staged: &Path, mode: PauseMode, healthy: bool) -> Result<bool, Error> {
        let Some(running) = self.machine.running() else {
            return Err(Error::Unknown(self.record.sandbox.to_string()));
        };
        // A slow disk is waited for ahead of the freeze: what is frozen has little left to write.
        let disk = self.spec.absolute().join("disk");
        let begin = async {
            match mode {
                PauseMode::Full => running.begin_save(&staged.join("memory")).await.map_err(Error::from),
                PauseMode::Filesystem => Ok(()),
            }
        };
        let (begun, flushed) = tokio::join!(begin, flush(disk.clone()));
        begun?;
        flushed?;
        let (clock, limit) = (self.inner.clock.clone(), if healthy { HEALTHY_FREEZE } else { FREEZE });
        freeze_on_disk(&clock, &mut Freezing { of: self, disk, limit }).await
    }

    async fn freeze(&mut self, limit: Duration) -> bool {
        // What was posted before and not waited for is answered first, and passed over.
        let Some(guest) = self.machine.guest() else { return false };
        guest.posted = None;
        let freezing = guest.control.call("freezing the file system", &Request::Freeze, limit);
        match self.inner.hurry.run_until_cancelled(freezing).await {
            Some(Ok(_)) => true,
            Some(Err(error)) => {
                tracing::warn!(sandbox = %self.record.sandbox, error = chain(&error), "its file system is not frozen");
                false
            }
            // The node stops.
            None => false,
        }
    }

    async fn save(&self, staged: &Path, mode: PauseMode) -> Result<Saved, Error> {
        let Some(paused) = self.machine.stopped() else {
            return Err(Error::Unknown(self.record.sandbox.to_string()));
        };
        save(paused, self.spec.absolute().join("disk"), staged, mode).await
    }

    async fn publish(
        &self,
        staged: &Path,
        id: SnapshotId,
        origin: Origin,
        mode: PauseMode,
        durability: Durability,
    ) -> Result<Snapshot, Error> {
        let record = self.record;
        let missing = || kelvin_store::Error::Missing {
            kind: "snapshot",
            name: record.snapshot.as_ref().map(ToString::to_string).unwrap_or_default(),
        };
        let identity = self.identity.cloned().ok_or_else(missing)?;
        let draft = Draft {
            id,
            template: record.template.clone(),
            guest: record.guest.clone(),
            parent: record.lineage.clone(),
            origin,
            mode,
            identity,
            arguments: self.inner.driver.layout(record.shape, self.spec.network.is_some()),
        };
        publish(self.inner.store.clone(), staged, draft, durability).await
    }

    /// Lets a machine that stands still go on as who it is.
    pub async fn go_on(&mut self) -> Result<(), Error> {
        self.machine.go_on(&self.inner.clock).await
    }

    /// Waits until the agent of a machine that went on has stepped its clock and thawed its file system. One that does
    /// not answer is reported, and runs on; a node that stops does not wait for it.
    pub async fn await_wake_ack(&mut self) {
        let (clock, hurry) = (self.inner.clock.clone(), self.inner.hurry.clone());
        let Some(guest) = self.machine.guest() else { return };
        let (posted, control) = (guest.posted.take(), &mut guest.control);
        let told = async {
            let asked = match posted {
                Some(asked) => asked,
                None => control.post(&Request::Wake(wake(&clock, false)?)).await?,
            };
            let done = control.wait("going on", asked, AWAKE).await?;
            sync_clock(&clock, control, done, AWAKE).await
        };
        match hurry.run_until_cancelled(told).await {
            None => {}
            Some(Ok(())) => self.is_silent.store(false, Ordering::Relaxed),
            // It answers: one of a former version does not know the word.
            Some(Err(Error::Vmm(kelvin_vmm::Error::Agent { .. }))) => {
                self.is_silent.store(false, Ordering::Relaxed);
            }
            Some(Err(error)) => {
                self.is_silent.store(true, Ordering::Relaxed);
                tracing::warn!(sandbox = %self.record.sandbox, error = chain(&error), "its agent did not say that it goes on");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use kelvin_host::clock::Simulated;

    use super::*;

    /// A guest that thaws by itself, on a disk of which each flush takes so long.
    struct Guest {
        clock: Clock,
        flushes: Vec<Duration>,
        frozen_at: Option<kelvin_host::clock::BootInstant>,
        answers: bool,
    }

    impl Guest {
        fn is_frozen(&self) -> bool {
            let alone = Duration::from_secs(20);
            self.frozen_at.is_some_and(|at| self.clock.now().saturating_duration_since(at) < alone)
        }
    }

    impl Freeze for Guest {
        async fn freeze(&mut self) -> bool {
            if self.answers && !self.is_frozen() {
                self.frozen_at = Some(self.clock.now());
            }
            self.answers
        }

        async fn flush(&mut self) -> Result<(), Error> {
            tokio::time::sleep(self.flushes.pop().unwrap_or_default()).await;
            Ok(())
        }

        async fn thaw(&mut self) {
            self.frozen_at = None;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_disk_does_not_pass_a_thawed_file_system_off_as_frozen() {
        for (answers, seconds, quiesced) in [
            (true, vec![], true),
            (true, vec![14], true),
            // Written back for longer than it stays frozen: once, and always.
            (true, vec![1, 60], true),
            (true, vec![17, 18, 19], false),
            (true, vec![60, 60, 60], false),
            (false, vec![60], false),
        ] {
            let clock = Simulated::start().clock();
            let flushes = seconds.iter().copied().map(Duration::from_secs).collect();
            let mut guest = Guest { clock: clock.clone(), flushes, frozen_at: None, answers };
            let said = freeze_on_disk(&clock, &mut guest).await.unwrap();
            assert_eq!(said, quiesced, "{seconds:?}");
            assert_eq!(said, guest.is_frozen(), "what is said of it is so: {seconds:?}");
        }
    }
}
