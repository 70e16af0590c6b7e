//! The handle of a sandbox that runs: what can be asked of its task, and the ways to its agent and its ports.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use http::{Request, Response};
use hyper::body::Incoming;
use kelvin_api::id::{SnapshotId, Token};
use kelvin_api::network::Policy;
use kelvin_api::sandbox::PauseMode;
use kelvin_host::clock::{BootInstant, Clock};
use kelvin_host::ledger;
use kelvin_node_api::{ConsoleLine, Live};
use kelvin_store::snapshot::{Durability, Origin};
use kelvin_vmm::control::Dial;
use tokio::sync::{mpsc, oneshot, watch};

use crate::error::Error;
use crate::link::Network;
use crate::machine::agent::{Agent, Body, SendError};
use crate::sandbox::record::SandboxRecord;
use crate::snapshots::Captured;

/// How long a request waits for a sandbox whose VMM is being adopted.
const ADOPTION: std::time::Duration = std::time::Duration::from_secs(10);

/// What can be asked of the task.
pub enum Command {
    /// Replace its egress policy.
    SetPolicy(Policy, oneshot::Sender<Result<(), Error>>),
    /// Freeze it; answered when it can be resumed. What is kept, and whether its agent has to have flushed and frozen
    /// its disk.
    Pause(PauseMode, bool, oneshot::Sender<Result<Captured, Error>>),
    /// Take a snapshot; it goes on. With what is known of it, for its children.
    Snapshot(
        SnapshotId,
        Origin,
        PauseMode,
        Durability,
        oneshot::Sender<Result<(Captured, SandboxRecord), Error>>,
    ),
    /// Let its vCPUs go on when the VMM stopped them, for want of disk space.
    GoOn,
    /// Its agent does not answer: end it when its guest never will.
    IsSilent,
    /// The console's text.
    Console(oneshot::Sender<Result<Vec<ConsoleLine>, kelvin_vmm::Error>>),
}

/// A record as the ledger keeps it.
pub fn body(record: &SandboxRecord) -> Result<ledger::Body, Error> {
    record.body().map_err(|error| Error::Io { what: "writing a record", source: error.into() })
}

/// The handle of a running sandbox.
pub struct Sandbox {
    pub commands: mpsc::Sender<Command>,
    pub urgent: mpsc::Sender<Urgent>,
    pub shown: watch::Receiver<Shown>,
    pub clock: Clock,
    /// The way to its agent.
    pub agent: Agent,
    /// Makes it; none while its VMM is adopted. Not the task's work: a hostile guest may take its time.
    pub dialer: watch::Receiver<Option<Arc<dyn Dial>>>,
    pub guest_is_silent: Arc<AtomicBool>,
    /// The way to its ports, when it has a network.
    pub network: Option<Arc<Network>>,
    /// What callers of its agent must show.
    pub access_token: Option<Token>,
    /// Whose memory its machine maps.
    pub snapshot: Option<SnapshotId>,
}

impl Sandbox {
    /// Has its task look whether a guest that does not answer has halted. Not waited for.
    pub fn is_silent(&self) {
        // A full queue is looked through anyway.
        let _ = self.commands.try_send(Command::IsSilent);
    }

    /// Has its task let its vCPUs go on when its VMM stopped them. Not waited for.
    pub fn go_on(&self) {
        let _ = self.commands.try_send(Command::GoOn);
    }

    /// What it is.
    pub fn live(&self) -> Live {
        let (live, deadline) = self.shown.borrow().clone();
        shown(&self.clock, live, deadline)
    }

    /// Whether its VMM is still being adopted.
    pub fn is_being_adopted(&self) -> bool {
        self.dialer.borrow().is_none()
    }

    /// Whether its guest did not answer when it was told last that it goes on.
    pub fn is_guest_silent(&self) -> bool {
        self.guest_is_silent.load(Ordering::Relaxed)
    }

    /// What makes connections to its agent; one whose VMM is being adopted is waited for.
    async fn dialer(&self) -> Result<Arc<dyn Dial>, Error> {
        let mut dialer = self.dialer.clone();
        let being_adopted = || Error::BeingAdopted(self.shown.borrow().0.sandbox.to_string());
        let made = tokio::time::timeout(ADOPTION, dialer.wait_for(Option::is_some)).await;
        let made = made.map_err(|_| being_adopted())?.map_err(|_| self.gone())?;
        made.clone().ok_or_else(being_adopted)
    }

    fn gone(&self) -> Error {
        Error::Unknown(self.shown.borrow().0.sandbox.to_string())
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    /// `Unknown` when the sandbox has ended meanwhile, `BeingAdopted` when its VMM does not answer this daemon yet.
    pub async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Error> {
        self.dialer().await?;
        let (sender, receiver) = oneshot::channel();
        self.commands.send(command(sender)).await.map_err(|_| self.gone())?;
        receiver.await.map_err(|_| self.gone())
    }

    /// The same for what does not wait for commands.
    ///
    /// # Errors
    /// `Unknown` when the sandbox has ended meanwhile.
    pub async fn urge<T>(&self, urgent: impl FnOnce(oneshot::Sender<T>) -> Urgent) -> Result<T, Error> {
        let (sender, receiver) = oneshot::channel();
        self.urgent.send(urgent(sender)).await.map_err(|_| self.gone())?;
        receiver.await.map_err(|_| self.gone())
    }
}

impl Sandbox {
    /// Sends a request to its agent.
    ///
    /// # Errors
    /// When the guest does not answer, or its connection breaks.
    pub async fn request(&self, request: Request<Body>) -> Result<Response<Incoming>, SendError> {
        let reconnect = move || async move { Ok(self.dialer().await?.connect().await?) };
        self.agent.send(request, reconnect).await
    }
}

/// What is heard while a command is under way.
pub enum Urgent {
    /// End it; answered when its VMM has been told.
    Kill(oneshot::Sender<()>),
    /// End it at another time, as it was said and on boot time; answered when that is recorded.
    SetDeadline(jiff::Timestamp, BootInstant, oneshot::Sender<()>),
}

/// What a sandbox is, and when it ends.
pub type Shown = (Live, BootInstant);

/// How far the wall clock may go from boot time before it is said to have been set: it is slewed all the time.
pub const SET: jiff::SignedDuration = jiff::SignedDuration::from_secs(1);

/// When the sandbox of `record` ends. One of another boot has no machine; what was written before there were stamps says it
/// by the wall clock.
pub fn deadline_of(clock: &Clock, record: &SandboxRecord) -> BootInstant {
    let deadline = record.deadline.as_ref().and_then(|stamp| clock.recall(stamp));
    deadline.unwrap_or_else(|| clock.at(record.ends_at))
}

/// `live` with when it ends as the wall clock is now: what was said at first, until somebody set that clock.
pub fn shown(clock: &Clock, live: Live, deadline: BootInstant) -> Live {
    let now = clock.shown(deadline);
    let is_set = now.duration_since(live.ends_at).abs() > SET;
    Live { ends_at: if is_set { now } else { live.ends_at }, ..live }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use jiff::SignedDuration;
    use kelvin_api::id::SandboxId;
    use kelvin_api::sandbox::{Lifecycle, OnTimeout, PauseMode};
    use kelvin_host::clock::Simulated;

    use super::*;

    fn record(clock: &Clock, left: Duration) -> SandboxRecord {
        let deadline = clock.now() + left;
        let mut record = serde_json::json!({
            "sandbox": SandboxId::random(), "state": "running", "shape": { "vcpus": 1, "memory_mib": 256, "disk_mib": 1024 },
            "template": "base", "guest": "g", "snapshot": null, "lineage": null, "parent": null, "generation": 0,
            "identity": null, "start_path": "clone", "started_at": clock.wall(), "ends_at": clock.shown(deadline),
            "access_token": null, "env_vars": {}, "mac": null, "network": null,
            "timeout_s": 60,
        });
        let lifecycle =
            Lifecycle { on_timeout: OnTimeout::Kill, auto_resume: false, pause_mode: PauseMode::Full };
        record["lifecycle"] = serde_json::to_value(lifecycle).unwrap();
        record["deadline"] = serde_json::to_value(clock.stamp(deadline)).unwrap();
        serde_json::from_value(record).unwrap()
    }

    /// A restart between the write and the read: all that the next daemon has is the text.
    fn read_again(record: &SandboxRecord) -> SandboxRecord {
        SandboxRecord::read(&body(record).unwrap()).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_wall_clock_that_jumps_and_a_restart_move_no_end_of_life() {
        for hours in [1, -1] {
            let time = Simulated::start();
            let clock = time.clock();
            let record = record(&clock, Duration::from_secs(600));
            let before = clock.now();
            tokio::time::sleep(Duration::from_secs(100)).await;
            time.jump_wall(SignedDuration::from_hours(hours));
            let again = read_again(&record);
            let deadline = deadline_of(&clock, &again);
            assert_eq!(deadline.saturating_duration_since(clock.now()), Duration::from_secs(500));
            // People see the clock that they have, and a clock that nobody set shows what was said.
            let live = shown(&clock, again.live(), deadline);
            assert_eq!(live.ends_at, record.ends_at + SignedDuration::from_hours(hours));
            time.jump_wall(SignedDuration::from_hours(-hours));
            assert_eq!(shown(&clock, again.live(), deadline).ends_at, record.ends_at);
            clock.sleep_until(deadline).await;
            assert_eq!(clock.now().saturating_duration_since(before), Duration::from_secs(600));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_former_version_wrote_ends_by_the_wall_clock_that_it_knew() {
        let time = Simulated::start();
        let clock = time.clock();
        let mut former = serde_json::to_value(record(&clock, Duration::from_secs(600))).unwrap();
        let fields = former.as_object_mut().unwrap();
        assert!(fields.remove("deadline").is_some() && fields.remove("project").is_some());
        let former: SandboxRecord = serde_json::from_value(former).unwrap();
        let left = deadline_of(&clock, &former).saturating_duration_since(clock.now());
        assert_eq!(left, Duration::from_secs(600));
        // Nothing of the former boot runs; a record of it is no reason to panic.
        let other = record(&clock, Duration::from_secs(600));
        time.reboot();
        assert!(deadline_of(&clock, &other) > clock.now());
    }
}
