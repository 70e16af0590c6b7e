//! A sandbox that runs: one task owns its machine, everybody else sends it commands.
//!
//! The task ends with the sandbox: by command, at its deadline (the node enforces it alone), or because
//! the VMM ended. It tears down in its own time, off every request's path.

use std::sync::Arc;

use kelvin_api::id::{SandboxId, Token};
use kelvin_api::network::{Attachment, Policy};
use kelvin_api::node::Live;
use kelvin_vmm::control::Control;
use kelvin_vmm::{MachineSpec, Port, Running};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use crate::Inner;
use crate::agent::Agent;
use crate::capacity::Amount;
use crate::error::Error;
use crate::link::Network;
use crate::record::{Event, Record, SandboxRecord, next};

/// Commands that may wait for one sandbox.
const QUEUE: usize = 64;

/// What can be asked of the task.
pub enum Command {
    /// End it; answered when the VMM has been told.
    Kill(oneshot::Sender<()>),
    /// End it at another time.
    SetDeadline(jiff::Timestamp, oneshot::Sender<()>),
    /// Connect to the guest.
    Connect(Port, oneshot::Sender<Result<UnixStream, kelvin_vmm::Error>>),
    /// Replace its egress policy.
    SetPolicy(Policy, oneshot::Sender<Result<(), Error>>),
    /// The console's text.
    Console(oneshot::Sender<Result<String, kelvin_vmm::Error>>),
}

/// The handle of a running sandbox.
pub struct Sandbox {
    commands: mpsc::Sender<Command>,
    live: watch::Receiver<Live>,
    /// The way to its agent.
    pub agent: Agent,
    /// The way to its ports, when it has a network.
    pub network: Option<Arc<Network>>,
    /// What callers of its agent must show.
    pub access_token: Option<Token>,
}

impl Sandbox {
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
}

fn live_of(record: &SandboxRecord) -> Live {
    Live {
        sandbox: record.sandbox.clone(),
        ends_at: record.ends_at,
        shape: record.shape,
        start_path: record.start_path,
        started_at: record.started_at,
    }
}

impl Inner {
    /// Makes `machine` a sandbox: visible, owned by a task. Its capacity is held already.
    pub fn own(self: &Arc<Self>, machine: Machine) {
        let (commands, queue) = mpsc::channel(QUEUE);
        let (live, watched) = watch::channel(live_of(&machine.record));
        let id = machine.record.sandbox.clone();
        let agent = Agent::new(self.tasks.clone(), self.stop.clone());
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
        let sandbox =
            Arc::new(Sandbox { commands, live: watched, agent, network: network.clone(), access_token });
        self.sandboxes().insert(id, sandbox);
        let keeping = Keeping {
            inner: Arc::clone(self),
            spec: machine.spec,
            running: machine.running,
            _control: machine.control,
            record: machine.record,
            network,
        };
        self.tasks.spawn(keeping.run(queue, live));
    }

    /// Writes a sandbox's record.
    pub async fn remember(&self, spec: &MachineSpec, record: &SandboxRecord) -> Result<(), Error> {
        let body = serde_json::to_string(&Record::Sandbox(record.clone()))
            .map_err(|error| Error::Io { what: "writing a record", source: error.into() })?;
        Ok(self.keeper.ledger.put_record(&spec.vm, body).await?)
    }
}

struct Keeping {
    inner: Arc<Inner>,
    spec: MachineSpec,
    running: Running,
    _control: Control,
    record: SandboxRecord,
    network: Option<Arc<Network>>,
}

impl Keeping {
    async fn run(mut self, mut queue: mpsc::Receiver<Command>, live: watch::Sender<Live>) {
        let stop = self.inner.stop.clone();
        let (reason, waiting) = loop {
            let deadline = self.record.ends_at.duration_since(jiff::Timestamp::now());
            let left = std::time::Duration::try_from(deadline).unwrap_or_default();
            tokio::select! {
                // A daemon that stops leaves its machines running.
                () = stop.cancelled() => return,
                () = self.running.ended() => break (format!("the VMM ended: {}", self.running.stderr()), None),
                () = tokio::time::sleep(left) => break ("its time to live was over".to_owned(), None),
                command = queue.recv() => match command {
                    Some(Command::Kill(done)) => break ("it was killed".to_owned(), Some(done)),
                    Some(Command::SetDeadline(ends_at, done)) => {
                        self.record.ends_at = ends_at;
                        if let Err(error) = self.inner.remember(&self.spec, &self.record).await {
                            tracing::error!(sandbox = %self.record.sandbox, error = kelvin_api::error::chain(&error), "deadline not recorded");
                        }
                        live.send_replace(live_of(&self.record));
                        let _ = done.send(());
                    }
                    Some(Command::SetPolicy(policy, done)) => { let _ = done.send(self.set_policy(policy).await); }
                    Some(Command::Connect(port, reply)) => { let _ = reply.send(self.running.connect(port).await); }
                    Some(Command::Console(reply)) => { let _ = reply.send(self.running.console().await); }
                    None => break ("nobody holds it any more".to_owned(), None),
                },
            }
        };
        self.end(&reason, waiting).await;
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
        self.inner.sandboxes().remove(&id);
        self.inner.begin_teardown();
        if let Some(state) = next(self.record.state, Event::End) {
            self.record.state = state;
        }
        // Recorded before the VMM is gone: a restart in between goes on with the end, not with the life.
        if let Err(error) = self.inner.remember(&self.spec, &self.record).await {
            tracing::error!(sandbox = %id, error = kelvin_api::error::chain(&error), "end not recorded");
        }
        self.inner.changes.add(id, reason);
        if let Some(done) = waiting {
            let _ = done.send(());
        }
        if let Some(network) = self.network.take() {
            network.close().await;
        }
        self.inner.keeper.release_or_log(&self.spec, Some(self.running.key())).await;
        self.inner.capacity().release(Amount::machine(self.record.shape));
        self.inner.end_teardown();
    }
}
