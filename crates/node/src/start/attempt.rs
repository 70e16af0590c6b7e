//! One create on its way, and what all ways share.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kelvin_api::id::{SnapshotId, TemplateName};
use kelvin_api::network::{Attachment, Policy};
use kelvin_api::phase::{Phase, Timings};
use kelvin_api::sandbox::StartPath;
use kelvin_api::units::Shape;
use kelvin_host::clock::Stamp;
use kelvin_host::net::Slot;
use kelvin_node_api::Create;
use kelvin_store::identity::Identity;
use kelvin_store::snapshot::Snapshot;
use kelvin_vmm::control::Control;
use kelvin_vmm::{MachineEnd, MachineSpec, Running};
use tracing::Instrument;

use crate::activity::Underway;
use crate::capacity::Hold;
use crate::error::Error;
use crate::sandbox::record::{SandboxRecord, State};
use crate::snapshots::Lease;
use crate::start::source::{FromSnapshot, StartSource, Who};
use crate::state::Inner;

/// A machine that answered, and how it came to be.
pub struct Started {
    pub spec: MachineSpec,
    pub running: Running,
    pub control: Control,
    pub record: SandboxRecord,
    pub identity: Identity,
    pub lease: Option<Lease>,
}

/// One create on its way.
pub struct Attempt<'a> {
    pub inner: &'a Arc<Inner>,
    pub request: &'a Create,
    pub source: &'a StartSource,
    pub template: TemplateName,
    pub guest: String,
    pub shape: Shape,
    pub network: Option<Attachment>,
    pub machine_id: [u8; 16],
    /// What its machine holds; a sandbox takes it over.
    pub hold: Option<Hold>,
    /// When it ends, on boot time and as it was said.
    pub deadline: Stamp,
    /// Counts it, for as long as it asks for a processor.
    pub working: Option<Underway>,
    pub timings: Timings,
    pub since: Instant,
}

impl Attempt<'_> {
    pub fn lap(&mut self, phase: Phase) {
        self.timings.lap(phase, &mut self.since);
    }

    pub fn begin(&self, phase: Phase) -> tracing::Span {
        self.inner.crash_point(phase);
        tracing::info_span!("phase", name = phase.name())
    }

    /// Waits until this create is to be given up, whatever its guest does: the node stops, or what is resumed is killed.
    pub async fn given_up(&self) -> Error {
        let killed = async {
            match self.source.resumed() {
                Some(paused) => paused.killed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.inner.hurry.cancelled() => Error::Stopping,
            () = killed => Error::Unknown(self.request.sandbox.to_string()),
        }
    }

    /// Records what the machine at `spec` is to be. Never as paused: until a resume is committed, only the image's own
    /// record says what can be resumed.
    pub async fn declare(&self, spec: &MachineSpec, record: &SandboxRecord) -> Result<(), Error> {
        let declared = SandboxRecord { state: State::Starting, ..record.clone() };
        self.inner.remember(spec, &declared).await
    }

    /// Puts the sandbox's own rules in force before its machine runs. The slot's defaults are in force already.
    /// `has_run`: whether the machine has been running under those.
    pub async fn rule(&mut self, spec: &MachineSpec, has_run: bool) -> Result<(), Error> {
        let policy = self.network.as_ref().map(|network| &network.policy);
        let (Some(policy), Some(slot), Some(networks)) =
            (policy, &spec.network, &self.inner.allocator.networks)
        else {
            return Ok(());
        };
        if *policy != Policy::default() {
            let span = self.begin(Phase::Network);
            match has_run {
                true => networks.apply(slot, policy).instrument(span).await?,
                false => networks.begin(slot, policy).instrument(span).await?,
            }
            self.lap(Phase::Network);
        }
        Ok(())
    }

    /// The hardware address of the machine at `spec`: its own, unless it is a template's clone. To set one costs a
    /// restored guest 5 ms under emulation, a quarter of the whole create.
    pub async fn hardware(&self, spec: &MachineSpec, record: &mut SandboxRecord) -> Result<(), Error> {
        let Some(slot) = &spec.network else {
            return Ok(());
        };
        if self.source.resumed().is_none() {
            record.mac = Some(Slot::random_mac()?);
        }
        match record.mac {
            Some(mac) => Ok(slot.set_guest_mac(mac).await?),
            None => Ok(()),
        }
    }

    pub fn record(&self, start_path: StartPath) -> SandboxRecord {
        let parent = match self.source {
            StartSource::Snapshot(FromSnapshot { who: Who::Itself(paused), .. }) => {
                return SandboxRecord {
                    ends_at: self.request.ends_at,
                    deadline: Some(self.deadline.clone()),
                    project: self.request.project.clone(),
                    machine_id: Some(self.machine_id),
                    ..paused.record.clone()
                };
            }
            StartSource::Snapshot(FromSnapshot { who: Who::Another(parent), .. }) => parent.clone(),
            StartSource::Template(_) => None,
        };
        SandboxRecord {
            sandbox: self.request.sandbox.clone(),
            state: State::Starting,
            shape: self.shape,
            template: self.template.clone(),
            guest: self.guest.clone(),
            snapshot: None,
            lineage: None,
            parent,
            generation: 0,
            identity: None,
            start_path,
            started_at: self.inner.clock.wall(),
            ends_at: self.request.ends_at,
            deadline: Some(self.deadline.clone()),
            project: self.request.project.clone(),
            access_token: self.request.access_token.clone(),
            env_vars: self.request.env_vars.clone(),
            mac: None,
            network: self.network.clone(),
            lifecycle: self.request.lifecycle,
            timeout_s: self.request.timeout.as_secs(),
            machine_id: Some(self.machine_id),
        }
    }
}

/// Does `work`, and gives `held` back when it is done or `limit` is over: a guest may be silent for as long as it likes.
pub async fn held_for<T, H>(limit: Duration, held: H, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        biased;
        done = &mut work => return done,
        () = tokio::time::sleep(limit) => drop(held),
    }
    work.await
}

/// The last snapshot in the past of a machine of `snapshot` that was baked or kept.
pub fn lineage(snapshot: &Snapshot) -> Option<SnapshotId> {
    let manifest = &snapshot.manifest;
    if manifest.origin.is_passing() { manifest.parent.clone() } else { Some(manifest.id.clone()) }
}

/// That a machine does not run any more, and why.
pub async fn ended(what: &'static str, running: &Running, end: MachineEnd) -> Error {
    let console = running.console().await.unwrap_or_default();
    let stderr = kelvin_vmm::guest_end::reason(end, &console, &running.stderr());
    kelvin_vmm::Error::Ended { what, stderr }.into()
}
