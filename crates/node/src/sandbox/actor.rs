//! A sandbox that runs: one task owns its machine, everybody else sends it commands.
//!
//! ```text
//! own ──────────────> commands, one after the other ─> paused: its record has moved, its machine is released
//! adopt ─> its VMM ─────────^        │
//!          and its guest             └> ended: by a command, at its deadline, because its VMM did
//!
//! kill, deadline, a new deadline: heard while anything else is under way
//! ```
//!
//! Nothing that a guest, its VMM or a disk delays can delay an end. A kill that comes while a command is under way ends
//! the machine and is answered; that command then fails by itself, removes what it has staged, and the rest is released
//! after it. Only a pause that is being recorded comes first: what is killed then is what is paused.
//!
//! Deadlines count on boot time and are enforced here alone. The machine is torn down off every request's path. When the
//! daemon stops the task ends and the machine runs on. A crash leaves a machine that the next start adopts (`recovery`).

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kelvin_api::error::chain;
use kelvin_api::id::{SnapshotId, VmId};
use kelvin_api::network::{Attachment, Policy};
use kelvin_api::phase::Phase;
use kelvin_api::sandbox::{OnTimeout, PauseMode};
use kelvin_host::process::ProcessKey;
use kelvin_store::identity::Identity;
use kelvin_store::snapshot::{Durability, Origin};
use kelvin_vmm::control::{Control, Dial};
use kelvin_vmm::{MachineEnd, MachineSpec, Running};
use tokio::sync::{mpsc, watch};

use crate::activity::Underway;
use crate::capacity::Hold;
use crate::error::Error;
use crate::link::Network;
use crate::machine::agent::Agent;
use crate::machine::capture::Capturing;
use crate::machine::console::Console;
use crate::machine::live::{Guest, LiveMachine};
use crate::sandbox::handle::{Command, Sandbox, Urgent, body, deadline_of};
use crate::sandbox::mail::{Decided, Fate, Mail, TIME_IS_OVER};
use crate::sandbox::paused::Paused;
use crate::sandbox::record::{Event, SandboxRecord, next};
use crate::snapshots::{CaptureOptions, Captured, Lease};
use crate::state::Inner;

/// Commands that may wait for one sandbox.
const QUEUE: usize = 64;

/// A machine that is ready, on its way to be owned by its task.
pub struct Machine {
    /// Its place.
    pub spec: MachineSpec,
    /// The VMM.
    pub running: Running,
    /// Its guest's control port: held open, because a guest without its host end has to poll.
    pub control: Control,
    /// What the ledger says of it.
    pub record: SandboxRecord,
    /// What a snapshot of it must be restored as; none when what it was restored from cannot be read any more.
    pub identity: Option<Identity>,
    /// Keeps what it was restored from.
    pub lease: Option<Lease>,
    /// What was seen of its console before it was paused.
    pub console: Console,
    /// What it holds of the node.
    pub hold: Option<Hold>,
}

/// A machine that a former daemon started and that runs on.
pub struct Orphan {
    /// Its place; its network is this daemon's already.
    pub spec: MachineSpec,
    /// Its VMM.
    pub key: ProcessKey,
    /// What the ledger says of it.
    pub record: SandboxRecord,
    /// As of a [`Machine`].
    pub identity: Option<Identity>,
    /// Keeps what it was restored from.
    pub lease: Option<Lease>,
    /// What it holds of the node.
    pub hold: Option<Hold>,
}

/// What a task begins with.
type Begun = (SandboxActor, Mail, watch::Sender<Option<Arc<dyn Dial>>>);

impl Inner {
    /// Makes `machine` a sandbox: visible, owned by a task. Its capacity is held already.
    pub fn own(self: &Arc<Self>, machine: Machine) {
        let Machine { spec, running, control, record, identity, lease, console, hold } = machine;
        let (key, dialer) = (running.key(), running.dialer());
        let (mut actor, mail, _) =
            self.begin(Orphan { spec, key, record, identity, lease, hold }, Some(dialer));
        actor.machine = LiveMachine::Running(running, Guest::new(control));
        actor.console = console;
        self.tasks.spawn(actor.run(mail));
    }

    /// The same for a machine that may take its time to answer: it is visible and can be ended at once.
    pub fn adopt(self: &Arc<Self>, orphan: Orphan) {
        let (actor, mail, dialer) = self.begin(orphan, None);
        self.tasks.spawn(actor.adopt(mail, dialer));
    }

    fn begin(self: &Arc<Self>, orphan: Orphan, dialer: Option<Arc<dyn Dial>>) -> Begun {
        let Orphan { spec, key, record, identity, lease, hold } = orphan;
        let (commands, queue) = mpsc::channel(QUEUE);
        let (urgent, urgent_queue) = mpsc::channel(QUEUE);
        let deadline = deadline_of(&self.clock, &record);
        let (shown, watched) = watch::channel((record.live(), deadline));
        let id = record.sandbox.clone();
        let agent = Agent::new(dialer.is_none(), self.tasks.clone(), self.stop.clone());
        let network = spec.network.clone().zip(record.network.clone());
        let network = network.map(|(slot, attachment)| Arc::new(Network::new(slot, attachment)));
        if let Some(network) = &network {
            self.tasks.spawn({
                let (network, stop, id) = (Arc::clone(network), self.stop.clone(), id.to_string());
                async move {
                    stop.run_until_cancelled(network.follow(id)).await;
                }
            });
        }
        let (made, dialer) = watch::channel(dialer);
        let is_silent = Arc::new(AtomicBool::new(false));
        let sandbox = Sandbox {
            commands,
            urgent,
            shown: watched,
            clock: self.clock.clone(),
            agent,
            dialer,
            guest_is_silent: Arc::clone(&is_silent),
            network: network.clone(),
            access_token: record.access_token.clone(),
            snapshot: record.snapshot.clone(),
        };
        self.sandboxes.running().insert(id.clone(), Arc::new(sandbox));
        let fate = Arc::<Fate>::default();
        let mail = Mail {
            commands: queue,
            urgent: urgent_queue,
            shown,
            deadline,
            unrecorded: None,
            killed: None,
            ended: false,
            ends_at_deadline: record.lifecycle.on_timeout == OnTimeout::Kill,
            teardown: None,
            clock: self.clock.clone(),
            sandboxes: self.sandboxes.clone(),
            changes: Arc::clone(&self.changes),
            activity: self.activity.clone(),
            sandbox: id,
            key,
            fate: Arc::clone(&fate),
        };
        let actor = SandboxActor {
            inner: Arc::clone(self),
            spec,
            key,
            machine: LiveMachine::Away,
            teardown: None,
            record,
            identity,
            lease,
            hold,
            network,
            console: Console::default(),
            fate,
            is_silent,
        };
        (actor, mail, made)
    }

    /// Writes a sandbox's record.
    pub async fn remember(&self, spec: &MachineSpec, record: &SandboxRecord) -> Result<(), Error> {
        Ok(self.allocator.ledger.put_record(&spec.vm, body(record)?).await?)
    }
}

/// What the task of a sandbox owns.
struct SandboxActor {
    inner: Arc<Inner>,
    spec: MachineSpec,
    key: ProcessKey,
    machine: LiveMachine,
    /// What is counted from its end until all of it is released.
    teardown: Option<Underway>,
    record: SandboxRecord,
    identity: Option<Identity>,
    lease: Option<Lease>,
    hold: Option<Hold>,
    network: Option<Arc<Network>>,
    console: Console,
    fate: Arc<Fate>,
    /// Whether its guest did not say that it goes on when it was asked last.
    is_silent: Arc<AtomicBool>,
}

/// How long to wait before a pause at a deadline that failed is tried again, or a VMM that does not answer.
const AGAIN: std::time::Duration = std::time::Duration::from_secs(30);

/// How long a VMM may take to show a console whose machine has ended.
const CONSOLE: std::time::Duration = std::time::Duration::from_secs(10);

async fn read_console(running: &Running) -> String {
    let read = tokio::time::timeout(CONSOLE, running.console()).await;
    read.ok().and_then(Result::ok).unwrap_or_default()
}

/// Why a machine does not run any more, for its owner.
async fn why(running: &Running, end: MachineEnd) -> String {
    let console = read_console(running).await;
    kelvin_vmm::guest_end::reason(end, &console, &running.stderr())
}

/// Why the task goes no further.
enum ExitReason {
    /// The sandbox ends, for this reason unless it has ended already.
    End(String),
    /// The sandbox is paused: its machine ends.
    Paused,
}

/// What the task does next.
enum Step {
    Hear(Urgent),
    Ended(MachineEnd),
    TimeIsOver,
    Do(Command),
}

impl SandboxActor {
    fn capturing(&mut self) -> Capturing<'_> {
        Capturing {
            inner: &self.inner,
            spec: &self.spec,
            machine: &mut self.machine,
            record: &self.record,
            identity: self.identity.as_ref(),
            is_silent: &self.is_silent,
        }
    }

    /// Takes over a machine of a former daemon, and owns it.
    async fn adopt(mut self, mut mail: Mail, dialer: watch::Sender<Option<Arc<dyn Dial>>>) {
        let stop = self.inner.stop.clone();
        let adopted = {
            let work = Box::pin(self.take_over(dialer));
            // A daemon that stops leaves it to the next one.
            let Some(adopted) = stop.run_until_cancelled(mail.beside(work)).await else { return };
            adopted
        };
        if let Err(error) = adopted
            && mail.end("it did not survive the restart")
        {
            tracing::warn!(sandbox = %self.record.sandbox, error = chain(&error), "not adopted");
        }
        self.run(mail).await;
    }

    /// Takes over its VMM, however long that is silent, and tells its guest to go on. A guest that does not answer is
    /// reported and goes on as it is.
    async fn take_over(&mut self, dialer: watch::Sender<Option<Arc<dyn Dial>>>) -> Result<(), Error> {
        let inner = Arc::clone(&self.inner);
        let running = loop {
            let turn = inner.adoptions.acquire().await.map_err(|_| Error::Stopping)?;
            let adopted = inner.driver.adopt(&self.spec, self.key).await;
            drop(turn);
            match adopted {
                Ok(running) => break running,
                Err(error) => self.wait_for_vmm(error).await?,
            }
        };
        let control = loop {
            match running.control().await {
                Ok(control) => break control,
                Err(error) => self.wait_for_vmm(error).await?,
            }
        };
        dialer.send_replace(Some(running.dialer()));
        self.machine = LiveMachine::Running(running, Guest::new(control));
        tracing::info!(sandbox = %self.record.sandbox, pid = self.key.pid, "adopted");
        // It may have been stopped for a snapshot, and its file system frozen.
        self.capturing().await_wake_ack().await;
        Ok(())
    }

    /// Waits before a VMM that did not answer in time is asked again: a busy host is no reason to end a sandbox. Every
    /// other error is its caller's.
    async fn wait_for_vmm(&self, error: kelvin_vmm::Error) -> Result<(), Error> {
        if !matches!(error, kelvin_vmm::Error::Deadline { .. }) {
            return Err(error.into());
        }
        tracing::error!(sandbox = %self.record.sandbox, error = chain(&error), "its VMM does not answer, tried again");
        tokio::time::sleep(AGAIN).await;
        Ok(())
    }

    async fn run(mut self, mut mail: Mail) {
        let (stop, clock) = (self.inner.stop.clone(), self.inner.clock.clone());
        let over = loop {
            if mail.ended {
                break ExitReason::End(String::new());
            }
            if let Some(done) = mail.killed.take() {
                mail.hear(Urgent::Kill(done));
                continue;
            }
            self.record_deadline(&mut mail).await;
            let Some(running) = self.machine.running() else {
                break ExitReason::End("its VMM did not go on".to_owned());
            };
            let step = tokio::select! {
                // What has ended is not asked or paused any more.
                biased;
                // A daemon that stops leaves its machines running.
                () = stop.cancelled() => return,
                urgent = mail.urgent.recv() => urgent.map(Step::Hear),
                end = running.ended() => Some(Step::Ended(end)),
                () = clock.sleep_until(mail.deadline) => Some(Step::TimeIsOver),
                command = mail.commands.recv() => command.map(Step::Do),
            };
            let over = match step {
                None => Some(ExitReason::End("nobody holds it any more".to_owned())),
                Some(Step::Hear(urgent)) => {
                    mail.hear(urgent);
                    None
                }
                Some(Step::Ended(end)) => Some(ExitReason::End(mail.beside(why(running, end)).await)),
                Some(Step::TimeIsOver) if mail.ends_at_deadline => {
                    Some(ExitReason::End(TIME_IS_OVER.to_owned()))
                }
                Some(Step::TimeIsOver) => self.pause_at_deadline(&mut mail).await,
                Some(Step::Do(command)) => {
                    let work = Box::pin(self.perform(command));
                    mail.beside(work).await
                }
            };
            if let Some(over) = over {
                break over;
            }
        };
        match over {
            ExitReason::End(reason) => {
                mail.end(&reason);
                self.teardown = mail.teardown.take();
                // Who asks for something now is told that it is gone; the rest is not their business.
                drop(mail);
                self.end().await;
            }
            ExitReason::Paused => {
                drop(mail);
                self.release().await;
            }
        }
    }

    /// Does what was asked.
    async fn perform(&mut self, command: Command) -> Option<ExitReason> {
        match command {
            Command::SetPolicy(policy, done) => drop(done.send(self.set_policy(policy).await)),
            Command::Pause(mode, healthy, done) => {
                let paused = self.pause(mode, healthy).await.map_err(|error| self.unless_ended(error));
                let over = paused.is_ok();
                let _ = done.send(paused);
                return over.then_some(ExitReason::Paused);
            }
            Command::Snapshot(id, origin, mode, durability, done) => {
                let taken = self
                    .capturing()
                    .capture(id, origin, durability, CaptureOptions { mode, ..CaptureOptions::default() })
                    .await;
                let taken = taken.map_err(|error| self.unless_ended(error));
                let _ = done.send(taken.map(|captured| (captured, self.record.clone())));
            }
            Command::Console(reply) => {
                let running = self.machine.running()?;
                let read = running.console().await;
                let _ = reply.send(read.map(|text| self.console.read(text, self.inner.clock.wall())));
            }
            Command::IsSilent => {
                let console = read_console(self.machine.running()?).await;
                if kelvin_vmm::guest_end::is_halted(&console) {
                    return Some(ExitReason::End("the guest halted".to_owned()));
                }
            }
            Command::GoOn => {
                if let Err(error) = self.machine.running()?.go_on().await {
                    tracing::warn!(sandbox = %self.record.sandbox, error = chain(&error), "its VMM does not answer");
                }
            }
        }
        None
    }

    /// What fails because the sandbox was ended meanwhile says that, not how.
    fn unless_ended(&self, error: Error) -> Error {
        if self.fate.is_over() { Error::Unknown(self.record.sandbox.to_string()) } else { error }
    }

    /// Records a deadline that was set, and answers whoever set it.
    async fn record_deadline(&mut self, mail: &mut Mail) {
        while let Some((ends_at, waiting)) = mail.unrecorded.take() {
            self.record.ends_at = ends_at;
            self.record.deadline = Some(self.inner.clock.stamp(mail.deadline));
            let recorded = mail.beside(self.inner.remember(&self.spec, &self.record)).await;
            if let Err(error) = recorded {
                tracing::error!(sandbox = %self.record.sandbox, error = chain(&error), "deadline not recorded");
            }
            mail.shown.send_replace((self.record.live(), mail.deadline));
            for done in waiting {
                let _ = done.send(());
            }
        }
    }

    /// What cannot be paused is not ended instead: it is tried again.
    async fn pause_at_deadline(&mut self, mail: &mut Mail) -> Option<ExitReason> {
        let work = Box::pin(self.pause(self.record.lifecycle.pause_mode, false));
        match mail.beside(work).await {
            Ok(_) => Some(ExitReason::Paused),
            Err(_) if mail.ended => None,
            Err(error) => {
                tracing::error!(sandbox = %self.record.sandbox, error = chain(&error), "not paused at its deadline, tried again");
                // Unless its owner has set another meanwhile.
                if mail.unrecorded.is_none() {
                    let clock = &self.inner.clock;
                    mail.deadline = clock.now() + AGAIN;
                    mail.unrecorded = Some((clock.shown(mail.deadline), Vec::new()));
                }
                None
            }
        }
    }

    /// Freezes it: from the transaction in here on, its record is in no machine's name.
    async fn pause(&mut self, mode: PauseMode, healthy: bool) -> Result<Captured, Error> {
        let (sandbox, generation) = (self.record.sandbox.clone(), self.record.generation + 1);
        let origin = Origin::Pause { sandbox: sandbox.clone(), generation };
        let then = CaptureOptions { stay: true, healthy, mode };
        // Asked before the machine stands still: nothing but the ledger can fail after it.
        let Some(state) = next(self.record.state, Event::Pause) else {
            return Err(Error::Unknown(sandbox.to_string()));
        };
        if let Some(running) = self.machine.running()
            && let Ok(text) = running.console().await
        {
            // Its VMM takes the console along.
            self.console.read(text, self.inner.clock.wall());
        }
        let captured =
            self.capturing().capture(SnapshotId::random(), origin, Durability::Durable, then).await?;
        let snapshot = Some(captured.snapshot.manifest.id.clone());
        let record = SandboxRecord { state, generation, snapshot, deadline: None, ..self.record.clone() };
        let owner = VmId::random();
        self.inner.crash_point(Phase::Commit);
        if !self.fate.turn(Decided::Open, Decided::Pausing) {
            // Killed: its image goes with what keeps it.
            return Err(Error::Unknown(sandbox.to_string()));
        }
        let moved = match body(&record) {
            Ok(body) => match self.inner.allocator.ledger.move_record(&self.spec.vm, &owner, body).await {
                Ok(true) => Ok(()),
                Ok(false) => Err(Error::Unknown(sandbox.to_string())),
                Err(error) => Err(error.into()),
            },
            Err(error) => Err(error),
        };
        if let Err(error) = moved {
            self.fate.turn(Decided::Pausing, Decided::Open);
            self.capturing().go_on().await?;
            self.capturing().await_wake_ack().await;
            return Err(error);
        }
        let lease = self.inner.snapshots.lease(&captured.snapshot.manifest.id);
        let console = std::mem::take(&mut self.console);
        let live = record.live();
        self.teardown = Some(self.inner.activity.teardown());
        // Visible as paused before it is invisible as running: it is never unknown.
        self.inner
            .sandboxes
            .paused()
            .insert(sandbox.clone(), Arc::new(Paused::new(owner, record, lease, console)));
        self.inner.sandboxes.running().remove(&sandbox);
        self.fate.turn(Decided::Pausing, Decided::Over);
        self.inner.changes.is(live);
        tracing::info!(sandbox = %sandbox, generation, "sandbox paused");
        Ok(captured)
    }

    async fn set_policy(&mut self, policy: Policy) -> Result<(), Error> {
        let (Some(network), Some(networks)) = (&self.network, &self.inner.allocator.networks) else {
            return Err(Error::NoNetwork { what: format!("sandbox {}", self.record.sandbox), reason: None });
        };
        // Recorded first: whatever happens next, a restart comes to the policy that was asked for last.
        let attachment = Attachment { policy: policy.clone(), ..network.attachment() };
        self.record.network = Some(attachment.clone());
        self.inner.remember(&self.spec, &self.record).await?;
        networks.apply(&network.slot, &policy).await?;
        network.set_attachment(attachment);
        Ok(())
    }

    /// Goes on with an end that everybody has been told.
    async fn end(mut self) {
        if let Some(state) = next(self.record.state, Event::End) {
            self.record.state = state;
        }
        // A restart that comes before its VMM is gone goes on with the end, not with the life.
        if let Err(error) = self.inner.remember(&self.spec, &self.record).await {
            tracing::error!(sandbox = %self.record.sandbox, error = chain(&error), "end not recorded");
        }
        self.release().await;
    }

    /// Ends the machine and gives back what it had.
    async fn release(mut self) {
        if let Some(network) = self.network.take() {
            network.close().await;
        }
        self.inner.allocator.release_or_log(&self.spec, Some(self.key)).await;
        drop(self.hold.take());
        // Its memory is mapped by nobody any more.
        drop(self.lease.take());
        drop(self.teardown.take());
    }
}
