//! The node's networks: slots from `kelvin-host`, answered by name by the egress process.
//!
//! ```text
//! slot ready ──claim──> attached (egress answers its guest) ──release──> detached, removed
//! egress process: adopted from the last daemon when it was started alike, else replaced; when it ends, it
//! is started again and every slot in use is attached anew
//! ```
//!
//! Who writes: the ledger, through `kelvin-host`. A crash leaves the egress process and the slots of machines
//! that run; the next start adopts both.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kelvin_api::error::chain;
use kelvin_api::id::VmId;
use kelvin_api::network::Policy;
use kelvin_egress::wire::{Client, Reply, Request, State};
use kelvin_host::ledger::{self, Ledger, Resource};
use kelvin_host::net::{Slot, Slots, Sockets};
use kelvin_host::process::{Network, Process, ProcessKey, Spawn};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio_util::sync::CancellationToken;

use crate::error::Error;

/// How long to wait before the egress process is started again after it ended at once.
const RETRY: Duration = Duration::from_secs(1);

/// Settings of the egress process.
#[derive(Debug, Clone)]
pub struct EgressOptions {
    /// What it is told.
    pub options: kelvin_egress::Options,
    /// The program that has the subcommand `egress`.
    pub program: PathBuf,
    /// The user that it drops to.
    pub user: Option<u32>,
}

/// One egress process.
struct Egress {
    client: Client,
    process: Process,
    owner: VmId,
}

/// Networks of this node; shared.
pub struct Networks {
    /// The slots.
    pub slots: Slots,
    ledger: Ledger,
    run: PathBuf,
    egress_options: EgressOptions,
    egress: Mutex<Arc<Egress>>,
    /// What has to be attached again when the egress process is another.
    attached: Mutex<HashMap<u16, (Arc<Slot>, Policy)>>,
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { what, source }
}

fn descriptors(sockets: Sockets) -> Vec<OwnedFd> {
    vec![sockets.dns.into(), sockets.dns_tcp.into(), sockets.proxy.into()]
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    kelvin_host::blocking::spawn(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

impl Egress {
    /// The process of the last daemon, when it was started as this one would be; otherwise it is ended.
    async fn adopt(
        run: &Path,
        options: &EgressOptions,
        ledger: &Ledger,
        entries: &[ledger::Entry],
    ) -> Result<Option<(Self, Vec<u16>)>, Error> {
        for entry in entries {
            let Resource::Helper { marker, key } = &entry.resource else { continue };
            let keys = match key {
                Some(key) => vec![*key],
                None => kelvin_host::process::find_by_marker(marker)
                    .map_err(failed("looking for the former egress process"))?,
            };
            for key in keys {
                let process = match Process::adopt(key) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    process => process.map_err(failed("finding the former egress process"))?,
                };
                let path = run.join("egress.sock");
                let asked = blocking(move || {
                    let client = Client::connect(&path)?;
                    let reply = client.call(&Request::Hello, &[])?;
                    Ok((client, reply))
                });
                if let Ok((client, Reply::Hello { options: found, slots })) = asked.await
                    && found == options.options
                {
                    let owner = entry.owner.clone();
                    return Ok(Some((Self { client, process, owner }, slots)));
                }
                process.kill().map_err(failed("ending the former egress process"))?;
                process.ended().await;
            }
            ledger.strike_all(&entry.owner).await?;
        }
        Ok(None)
    }

    async fn start(run: &Path, options: &EgressOptions, ledger: &Ledger) -> Result<Self, Error> {
        let owner = VmId::random();
        let marker = format!("kelvin-egress-{owner}");
        let declared =
            ledger.declare(&owner, &[Resource::Helper { marker: marker.clone(), key: None }]).await?;
        let started = Self::spawn(run, options, &marker).await;
        match started {
            Ok((client, process)) => {
                if let Some(id) = declared.first() {
                    let key: ProcessKey = process.key();
                    ledger.amend(*id, &Resource::Helper { marker, key: Some(key) }).await?;
                }
                Ok(Self { client, process, owner })
            }
            Err(source) => {
                ledger.strike_all(&owner).await?;
                Err(Error::Io { what: "starting the egress process", source })
            }
        }
    }

    async fn spawn(run: &Path, options: &EgressOptions, marker: &str) -> io::Result<(Client, Process)> {
        let path = run.join("egress.sock");
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // Made here, and given away: only this user may connect, and the process needs no right to listen.
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        let spawn = Spawn {
            program: options.program.clone().into(),
            args: vec!["egress".into(), "--options".into(), serde_json::to_string(&options.options)?.into()],
            marker: marker.to_owned(),
            cwd: run.to_owned(),
            user: options.user,
            network: Network::Shared,
            stdin: Some(listener.into()),
        };
        let (process, stderr) = Process::spawn(spawn).await?;
        let mut lines = BufReader::new(stderr).lines();
        // It ends with the process.
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                tracing::info!(line, "egress");
            }
        });
        let client = blocking(move || {
            let client = Client::connect(&path)?;
            client.call(&Request::Hello, &[])?;
            Ok(client)
        });
        match client.await {
            Ok(client) => Ok((client, process)),
            Err(error) => {
                process.kill()?;
                process.ended().await;
                Err(error)
            }
        }
    }
}

impl Networks {
    /// Takes over or starts the egress process. `entries` is what the ledger had at the start.
    ///
    /// # Errors
    /// `Io` when it cannot be started.
    pub async fn open(
        slots: Slots,
        ledger: Ledger,
        run: PathBuf,
        egress_options: EgressOptions,
        entries: &[ledger::Entry],
    ) -> Result<(Arc<Self>, Vec<u16>), Error> {
        let found = Egress::adopt(&run, &egress_options, &ledger, entries).await?;
        let (egress, known) = match found {
            Some(found) => found,
            None => (Egress::start(&run, &egress_options, &ledger).await?, Vec::new()),
        };
        let networks = Self {
            slots,
            ledger,
            run,
            egress_options,
            egress: Mutex::new(Arc::new(egress)),
            attached: Mutex::default(),
        };
        Ok((Arc::new(networks), known))
    }

    fn egress(&self) -> Arc<Egress> {
        Arc::clone(&self.egress.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn attached(&self) -> std::sync::MutexGuard<'_, HashMap<u16, (Arc<Slot>, Policy)>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn call(&self, request: Request, fds: Vec<OwnedFd>) -> io::Result<Reply> {
        let egress = self.egress();
        blocking(move || egress.client.call(&request, &fds)).await
    }

    async fn attach(&self, slot: &Arc<Slot>, policy: &Policy) -> Result<(), Error> {
        let sockets = match slot.take_sockets() {
            Some(sockets) => sockets,
            None => slot.open_sockets().await?,
        };
        self.attached().insert(slot.number(), (Arc::clone(slot), policy.clone()));
        let request = Request::Attach { slot: slot.number(), policy: policy.clone() };
        self.call(request, descriptors(sockets)).await.map_err(failed("attaching a slot")).map(drop)
    }

    /// A slot with the default policy, answered by the egress process.
    ///
    /// # Errors
    /// As [`Slots::claim`]; `Io` when the egress process does not answer. Then the slot is removed.
    pub async fn claim(&self) -> Result<Arc<Slot>, Error> {
        let slot = self.slots.claim().await?;
        match self.attach(&slot, &Policy::default()).await {
            Ok(()) => Ok(slot),
            Err(error) => {
                self.release(&slot).await?;
                Err(error)
            }
        }
    }

    /// Enforces `policy` in `slot`, both by address and by name.
    ///
    /// # Errors
    /// `Network` or `Io`; the caller must not let the machine run on.
    pub async fn apply(&self, slot: &Arc<Slot>, policy: &Policy) -> Result<(), Error> {
        self.tell(slot, policy).await?;
        Ok(slot.apply(policy).await?)
    }

    /// The same for a machine that has not run yet.
    ///
    /// # Errors
    /// As [`Networks::apply`].
    pub async fn begin(&self, slot: &Arc<Slot>, policy: &Policy) -> Result<(), Error> {
        let (told, ruled) = tokio::join!(self.tell(slot, policy), slot.begin(policy));
        told?;
        Ok(ruled?)
    }

    async fn tell(&self, slot: &Arc<Slot>, policy: &Policy) -> Result<(), Error> {
        if let Some((_, known)) = self.attached().get_mut(&slot.number()) {
            known.clone_from(policy);
        }
        let told = self.call(Request::Policy { slot: slot.number(), policy: policy.clone() }, Vec::new());
        told.await.map_err(failed("telling the egress process a policy")).map(drop)
    }

    /// What the egress process refused in `slot`.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn refused(&self, slot: &Slot) -> Result<State, Error> {
        match self.call(Request::State { slot: slot.number() }, Vec::new()).await {
            Ok(Reply::State(state)) => Ok(state),
            Ok(_) => Ok(State::default()),
            Err(source) => Err(Error::Io { what: "asking the egress process", source }),
        }
    }

    /// Gives a slot back. Its machine has ended.
    ///
    /// # Errors
    /// As [`Slots::release`].
    pub async fn release(&self, slot: &Slot) -> Result<(), Error> {
        self.detach(slot.number(), slot.owner()).await;
        Ok(self.slots.release(slot).await?)
    }

    /// Tells the egress process to answer a slot no more, unless the number is another's by now: releases come twice.
    async fn detach(&self, number: u16, owner: &VmId) {
        match self.attached().entry(number) {
            Entry::Occupied(entry) if entry.get().0.owner() != owner => return,
            Entry::Occupied(entry) => drop(entry.remove()),
            Entry::Vacant(_) => {}
        }
        // A process that is gone has nothing attached.
        if let Err(error) = self.call(Request::Detach { slot: number }, Vec::new()).await {
            tracing::warn!(slot = number, error = chain(&error), "not detached");
        }
    }

    /// Takes over the slot of a machine that runs, and enforces its policy anew: the last daemon may have died
    /// between remembering and enforcing one. `known` is what the egress process has attached already.
    ///
    /// # Errors
    /// As [`Networks::apply`].
    pub async fn adopt(&self, slot: &Arc<Slot>, policy: &Policy, known: &[u16]) -> Result<(), Error> {
        if known.contains(&slot.number()) {
            self.attached().insert(slot.number(), (Arc::clone(slot), policy.clone()));
        } else {
            self.attach(slot, policy).await?;
        }
        if let Err(error) = self.apply(slot, policy).await {
            // The rules that the last daemon wrote are in force; a machine must not end because this one could not
            // write them again.
            tracing::error!(slot = slot.number(), error = chain(&error), "its rules were not enforced anew");
        }
        Ok(())
    }

    /// Removes what a former daemon left of a slot.
    ///
    /// # Errors
    /// As [`Slots::remove`].
    pub async fn discard(&self, number: u16, owner: &VmId) -> Result<(), Error> {
        self.detach(number, owner).await;
        Ok(self.slots.remove(number, owner).await?)
    }

    /// Forgets what the egress process still answers for nobody.
    pub async fn forget(&self, known: &[u16]) {
        for number in known {
            if !self.attached().contains_key(number) {
                let _ = self.call(Request::Detach { slot: *number }, Vec::new()).await;
            }
        }
    }

    /// Starts the egress process again whenever it ends, until `stop`.
    pub async fn watch(self: Arc<Self>, stop: CancellationToken) {
        loop {
            let egress = self.egress();
            if stop.run_until_cancelled(egress.process.ended()).await.is_none() {
                return;
            }
            tracing::error!("the egress process ended, it is started again");
            if let Err(error) = self.ledger.strike_all(&egress.owner).await {
                tracing::error!(error = chain(&error), "the ledger keeps the former egress process");
            }
            loop {
                match Egress::start(&self.run, &self.egress_options, &self.ledger).await {
                    Ok(fresh) => {
                        *self.egress.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
                        break;
                    }
                    Err(error) => tracing::error!(error = chain(&error), "names fail closed meanwhile"),
                }
                if stop.run_until_cancelled(tokio::time::sleep(RETRY)).await.is_none() {
                    return;
                }
            }
            let slots: Vec<_> = self.attached().values().cloned().collect();
            for (slot, policy) in slots {
                if let Err(error) = self.attach(&slot, &policy).await {
                    tracing::error!(slot = slot.number(), error = chain(&error), "not attached again");
                }
            }
        }
    }

    /// Removes what waits; and, when no machine is left, the egress process and the host's rules.
    ///
    /// # Errors
    /// The first step that failed.
    pub async fn close(&self) -> Result<(), Error> {
        self.slots.drain().await?;
        if self.attached().is_empty() {
            let egress = self.egress();
            egress.process.kill().map_err(failed("ending the egress process"))?;
            egress.process.ended().await;
            let _ = std::fs::remove_file(self.run.join("egress.sock"));
            self.ledger.strike_all(&egress.owner).await?;
            self.slots.close().await?;
        }
        Ok(())
    }
}
