//! A sandbox that runs: one task owns its machine, everybody else sends it commands.
//!
//! The task ends with the machine: by command, at its deadline (the node enforces it alone), or because the VMM
//! ended. It tears down in its own time, off every request's path. Snapshots are taken here too (`capture`), one at
//! a time.

use std::sync::Arc;

use http::{Request, Response};
use hyper::body::Incoming;
use kelvin_api::error::chain;
use kelvin_api::id::{SandboxId, SnapshotId, Token, VmId};
use kelvin_api::network::{Attachment, Policy};
use kelvin_api::node::{ConsoleLine, Live};
use kelvin_api::phase::Phase;
use kelvin_api::sandbox::{OnTimeout, PauseMode};
use kelvin_host::process::ProcessKey;
use kelvin_store::identity::Identity;
use kelvin_store::snapshot::{Care, Origin};
use kelvin_vmm::control::{Asked, Control, Dial};
use kelvin_vmm::{MachineEnd, MachineSpec, Paused, Running};
use tokio::sync::{mpsc, oneshot, watch};

use crate::Inner;
use crate::agent::{Agent, Body, SendError};
use crate::capacity::Amount;
use crate::capture::{Captured, Then};
use crate::console::Console;
use crate::error::Error;
use crate::link::Network;
use crate::record::{Event, Record, SandboxRecord, next};
use crate::snapshots::Lease;

/// Commands that may wait for one sandbox.
const QUEUE: usize = 64;

/// What can be asked of the task.
pub enum Command {
    /// End it; answered when the VMM has been told.
    Kill(oneshot::Sender<()>),
    /// End it at another time.
    SetDeadline(jiff::Timestamp, oneshot::Sender<()>),
    /// Replace its egress policy.
    SetPolicy(Policy, oneshot::Sender<Result<(), Error>>),
    /// Freeze it; answered when it can be resumed. What is kept, and whether its agent has to have flushed and frozen
    /// its disk.
    Pause(PauseMode, bool, oneshot::Sender<Result<Captured, Error>>),
    /// Take a snapshot; it goes on. With what is known of it, for its children.
    Snapshot(SnapshotId, Origin, PauseMode, Care, oneshot::Sender<Result<(Captured, SandboxRecord), Error>>),
    /// Let its vCPUs go on when the VMM stopped them, for want of disk space.
    GoOn(oneshot::Sender<()>),
    /// Its agent does not answer: end it when its guest never will.
    IsSilent,
    /// The console's text.
    Console(oneshot::Sender<Result<Vec<ConsoleLine>, kelvin_vmm::Error>>),
}

/// The handle of a running sandbox.
pub struct Sandbox {
    commands: mpsc::Sender<Command>,
    live: watch::Receiver<Live>,
    /// The way to its agent.
    pub agent: Agent,
    /// Makes it. Not the task's work: a hostile guest may take its time.
    pub dialer: Arc<dyn Dial>,
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

    /// What it is.
    pub fn live(&self) -> Live {
        self.live.borrow().clone()
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    /// `Unknown` when the sandbox has ended meanwhile.
    pub async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Error> {
        let (sender, receiver) = oneshot::channel();
        let gone = || Error::Unknown(self.live.borrow().sandbox.to_string());
        self.commands.send(command(sender)).await.map_err(|_| gone())?;
        receiver.await.map_err(|_| gone())
    }
}

impl Sandbox {
    /// Sends a request to its agent.
    ///
    /// # Errors
    /// When the guest does not answer, or its connection breaks.
    pub async fn request(&self, request: Request<Body>) -> Result<Response<Incoming>, SendError> {
        let dialer = Arc::clone(&self.dialer);
        let reconnect = move || {
            let dialer = Arc::clone(&dialer);
            async move { Ok(dialer.connect().await?) }
        };
        self.agent.send(request, reconnect).await
    }
}

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
    /// Whether another server had it before.
    pub adopted: bool,
    /// What was seen of its console before it was paused.
    pub console: Console,
}

impl Inner {
    /// Makes `machine` a sandbox: visible, owned by a task. Its capacity is held already.
    pub fn own(self: &Arc<Self>, machine: Machine) {
        let (commands, queue) = mpsc::channel(QUEUE);
        let (live, watched) = watch::channel(machine.record.live());
        let id = machine.record.sandbox.clone();
        let agent = Agent::new(machine.adopted, self.tasks.clone(), self.stop.clone());
        let network = machine.spec.network.clone().zip(machine.record.network.clone());
        let network = network.map(|(slot, attachment)| Arc::new(Network::new(slot, attachment)));
        if let Some(network) = &network {
            self.tasks.spawn({
                let (network, stop, id) = (Arc::clone(network), self.stop.clone(), id.to_string());
                async move {
                    stop.run_until_cancelled(network.follow(id)).await;
                }
            });
        }
        let access_token = machine.record.access_token.clone();
        let snapshot = machine.record.snapshot.clone();
        let sandbox = Sandbox {
            commands,
            live: watched,
            agent,
            dialer: machine.running.dialer(),
            network: network.clone(),
            access_token,
            snapshot,
        };
        self.sandboxes().insert(id, Arc::new(sandbox));
        let keeping = Keeping {
            inner: Arc::clone(self),
            spec: machine.spec,
            key: machine.running.key(),
            running: Some(machine.running),
            held: None,
            posted: None,
            control: machine.control,
            record: machine.record,
            identity: machine.identity,
            lease: machine.lease,
            network,
            console: machine.console,
        };
        self.tasks.spawn(keeping.run(queue, live));
    }

    /// Writes a sandbox's record.
    pub async fn remember(&self, spec: &MachineSpec, record: &SandboxRecord) -> Result<(), Error> {
        Ok(self.keeper.ledger.put_record(&spec.vm, body(record)?).await?)
    }
}

/// A record as the ledger keeps it.
pub fn body(record: &SandboxRecord) -> Result<String, Error> {
    serde_json::to_string(&Record::Sandbox(record.clone()))
        .map_err(|error| Error::Io { what: "writing a record", source: error.into() })
}

/// What the task of a sandbox owns.
pub struct Keeping {
    pub inner: Arc<Inner>,
    pub spec: MachineSpec,
    key: ProcessKey,
    /// The machine while its vCPUs run.
    pub running: Option<Running>,
    /// The machine while they are stopped.
    pub held: Option<Paused>,
    /// A wake-up that was not answered yet.
    pub posted: Option<Asked>,
    pub control: Control,
    pub record: SandboxRecord,
    pub identity: Option<Identity>,
    lease: Option<Lease>,
    network: Option<Arc<Network>>,
    console: Console,
}

/// How long to wait before a pause at a deadline that failed is tried again.
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
enum Over {
    /// The sandbox ends.
    End(String, Option<oneshot::Sender<()>>),
    /// The sandbox is paused: its machine ends.
    Paused,
}

impl Keeping {
    async fn run(mut self, mut queue: mpsc::Receiver<Command>, live: watch::Sender<Live>) {
        let stop = self.inner.stop.clone();
        let over = loop {
            let Some(running) = &self.running else {
                break Over::End("its VMM did not go on".to_owned(), None);
            };
            let deadline = self.record.ends_at.duration_since(jiff::Timestamp::now());
            let left = std::time::Duration::try_from(deadline).unwrap_or_default();
            tokio::select! {
                // What has ended is not asked or paused any more.
                biased;
                // A daemon that stops leaves its machines running.
                () = stop.cancelled() => return,
                end = running.ended() => break Over::End(why(running, end).await, None),
                () = tokio::time::sleep(left) => match self.time_is_over().await {
                    Some(over) => break over,
                    None => { live.send_replace(self.record.live()); }
                },
                command = queue.recv() => match command {
                    Some(Command::Kill(done)) => break Over::End("it was killed".to_owned(), Some(done)),
                    Some(Command::SetDeadline(ends_at, done)) => {
                        self.set_deadline(ends_at).await;
                        live.send_replace(self.record.live());
                        let _ = done.send(());
                    }
                    Some(Command::SetPolicy(policy, done)) => { let _ = done.send(self.set_policy(policy).await); }
                    Some(Command::Pause(mode, healthy, done)) => {
                        let paused = self.pause(mode, healthy).await;
                        let over = paused.is_ok();
                        let _ = done.send(paused);
                        if over {
                            break Over::Paused;
                        }
                    }
                    Some(Command::Snapshot(id, origin, mode, care, done)) => {
                        let taken = self.capture(id, origin, care, Then { mode, ..Then::default() }).await;
                        let _ = done.send(taken.map(|captured| (captured, self.record.clone())));
                    }
                    Some(Command::Console(reply)) => {
                        let read = running.console().await;
                        let _ = reply.send(read.map(|text| self.console.read(text, jiff::Timestamp::now())));
                    }
                    Some(Command::IsSilent) => {
                        let console = read_console(running).await;
                        if kelvin_vmm::guest_end::is_halted(&console) {
                            break Over::End("the guest halted".to_owned(), None);
                        }
                    }
                    Some(Command::GoOn(done)) => {
                        if let Err(error) = running.go_on().await {
                            tracing::warn!(sandbox = %self.record.sandbox, error = chain(&error), "its VMM does not answer");
                        }
                        let _ = done.send(());
                    }
                    None => break Over::End("nobody holds it any more".to_owned(), None),
                },
            }
        };
        match over {
            Over::End(reason, waiting) => self.end(&reason, waiting).await,
            Over::Paused => self.release().await,
        }
    }

    async fn set_deadline(&mut self, ends_at: jiff::Timestamp) {
        self.record.ends_at = ends_at;
        if let Err(error) = self.inner.remember(&self.spec, &self.record).await {
            tracing::error!(sandbox = %self.record.sandbox, error = chain(&error), "deadline not recorded");
        }
    }

    /// Ends or pauses it, as its owner wanted. What cannot be paused is not ended instead: it is tried again.
    async fn time_is_over(&mut self) -> Option<Over> {
        if self.record.lifecycle.on_timeout == OnTimeout::Kill {
            return Some(Over::End("its time to live was over".to_owned(), None));
        }
        match self.pause(self.record.lifecycle.pause_mode, false).await {
            Ok(_) => Some(Over::Paused),
            Err(error) => {
                tracing::error!(sandbox = %self.record.sandbox, error = chain(&error), "not paused at its deadline, tried again");
                self.set_deadline(jiff::Timestamp::now() + AGAIN).await;
                None
            }
        }
    }

    /// Freezes it: from the transaction in here on, its record is in no machine's name.
    async fn pause(&mut self, mode: PauseMode, healthy: bool) -> Result<Captured, Error> {
        let (sandbox, generation) = (self.record.sandbox.clone(), self.record.generation + 1);
        let origin = Origin::Pause { sandbox: sandbox.clone(), generation };
        let then = Then { stay: true, healthy, mode };
        // Asked before the machine stands still: nothing but the ledger can fail after it.
        let Some(state) = next(self.record.state, Event::Pause) else {
            return Err(Error::Unknown(sandbox.to_string()));
        };
        if let Some(running) = &self.running
            && let Ok(text) = running.console().await
        {
            // Its VMM takes the console along.
            self.console.read(text, jiff::Timestamp::now());
        }
        let captured = self.capture(SnapshotId::random(), origin, Care::Durable, then).await?;
        let snapshot = Some(captured.snapshot.manifest.id.clone());
        let record = SandboxRecord { state, generation, snapshot, ..self.record.clone() };
        let owner = VmId::random();
        self.inner.crash_point(Phase::Commit);
        let moved = match body(&record) {
            Ok(body) => match self.inner.keeper.ledger.move_record(&self.spec.vm, &owner, body).await {
                Ok(true) => Ok(()),
                Ok(false) => Err(Error::Unknown(sandbox.to_string())),
                Err(error) => Err(error.into()),
            },
            Err(error) => Err(error),
        };
        if let Err(error) = moved {
            self.go_on().await?;
            self.awake().await;
            return Err(error);
        }
        let lease = self.inner.snapshots.lease(&captured.snapshot.manifest.id);
        let console = std::mem::take(&mut self.console);
        let live = record.live();
        self.inner.begin_teardown();
        // Visible as paused before it is invisible as running: it is never unknown.
        self.inner
            .paused_sandboxes()
            .insert(sandbox.clone(), Arc::new(crate::paused::Paused::new(owner, record, lease, console)));
        self.inner.sandboxes().remove(&sandbox);
        self.inner.changes.is(live);
        tracing::info!(sandbox = %sandbox, generation, "sandbox paused");
        Ok(captured)
    }

    async fn set_policy(&mut self, policy: Policy) -> Result<(), Error> {
        let (Some(network), Some(networks)) = (&self.network, &self.inner.keeper.networks) else {
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

    async fn end(mut self, reason: &str, waiting: Option<oneshot::Sender<()>>) {
        let id: SandboxId = self.record.sandbox.clone();
        tracing::info!(sandbox = %id, reason, "sandbox ends");
        self.inner.begin_teardown();
        self.inner.sandboxes().remove(&id);
        if let Some(state) = next(self.record.state, Event::End) {
            self.record.state = state;
        }
        // Recorded before the VMM is gone: a restart in between goes on with the end, not with the life.
        if let Err(error) = self.inner.remember(&self.spec, &self.record).await {
            tracing::error!(sandbox = %id, error = chain(&error), "end not recorded");
        }
        self.inner.changes.add(id, reason);
        if let Some(done) = waiting {
            let _ = done.send(());
        }
        self.release().await;
    }

    /// Ends the machine and gives back what it had.
    async fn release(mut self) {
        if let Some(network) = self.network.take() {
            network.close().await;
        }
        self.inner.keeper.release_or_log(&self.spec, Some(self.key)).await;
        self.inner.capacity().release(Amount::machine(self.record.shape));
        // Its memory is mapped by nobody any more.
        drop(self.lease.take());
        self.inner.end_teardown();
    }
}
