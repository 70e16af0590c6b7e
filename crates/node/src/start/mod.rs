//! The create path: reserve, then claim a warm machine, or a waiting VMM and load (clone), or boot (cold), activate,
//! commit. Resumes and the children of forks take the same path, from another [`StartSource`].
//!
//! ```text
//! reserve ──────────> vmm ────────> resume ─> activate ─> commit        warm
//! reserve ─> queue ─> vmm ─> load ─> resume ─> activate ─> commit        clone
//!       └──── slot ∥ disk ∥ vmm ─> boot ──────> activate ─> commit        cold
//! ```
//!
//! Whatever fails after `reserve` is released in reverse order before the error is returned. A crash at
//! any point leaves a record that is not `running`, and the next start reaps its machine.

pub mod bake;
pub mod probe;
pub mod turns;

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use kelvin_api::error::chain;
use kelvin_api::guest::{Activation, Request, Wake};
use kelvin_api::id::{SandboxId, SnapshotId, TemplateName};
use kelvin_api::network::{Attachment, Policy, Wanted};
use kelvin_api::phase::{Phase, Timings};
use kelvin_api::sandbox::{PauseMode, StartPath};
use kelvin_api::units::{MemoryMib, Shape};
use kelvin_host::clock::{Clock, Stamp};
use kelvin_host::descriptors::{Budget, MACHINE};
use kelvin_host::net::Slot;
use kelvin_node_api::{Create, Created};
use kelvin_store::identity::Identity;
use kelvin_store::image::Template;
use kelvin_store::snapshot::Snapshot;
use kelvin_vmm::control::{Asked, Control};
use kelvin_vmm::{MachineEnd, MachineSpec, Running};
use tracing::Instrument;

use crate::capacity::Amount;
use crate::error::Error;
use crate::machine::clock::sync_clock;
use crate::machine::console::Console;
use crate::pool::warm::Parked;
use crate::pool::{Pool, Ready, manifest_shape};
use crate::sandbox::actor::{Machine, body};
use crate::sandbox::paused::Paused;
use crate::sandbox::record::{Event, SandboxRecord, State, next};
use crate::snapshots::Lease;
use crate::start::probe::Probe;
use crate::start::turns::TURN;
use crate::{Inner, Working};

/// How long a claim of a warm machine may take before the next way is tried.
const CLAIM: Duration = Duration::from_secs(3);
/// How long a machine that boots counts as work: one that takes longer waits for something else than a processor.
const BOOTING: Duration = Duration::from_secs(5);

/// What a machine is made of.
#[derive(Clone)]
pub enum StartSource {
    /// A template: a pool's snapshot, or its kernel.
    Template(Arc<Template>),
    /// What a sandbox was; it becomes another. With the sandbox it is forked from.
    Snapshot(Arc<Snapshot>, Option<SandboxId>),
    /// What a sandbox was; it goes on as who it is. Or boots as that, when the disk alone is wanted.
    Resume(Arc<Paused>, PauseMode),
}

/// A machine that answered, and how it came to be.
struct Started {
    spec: MachineSpec,
    running: Running,
    control: Control,
    record: SandboxRecord,
    identity: Identity,
    lease: Option<Lease>,
}

/// One create on its way.
struct Attempt<'a> {
    inner: &'a Arc<Inner>,
    request: &'a Create,
    source: &'a StartSource,
    /// What is restored, when it is no template's.
    snapshot: Option<Arc<Snapshot>>,
    template: TemplateName,
    guest: String,
    shape: Shape,
    network: Option<Attachment>,
    machine_id: [u8; 16],
    /// When it ends, on boot time and as it was said.
    deadline: Stamp,
    /// Counts it, for as long as it asks for a processor.
    working: Option<Working>,
    timings: Timings,
    since: Instant,
}

impl Inner {
    /// Creates a sandbox. When it returns, the agent has answered its activation.
    ///
    /// Not cancel-safe: callers run it on a task of its own.
    pub async fn create(self: &Arc<Self>, request: Create, source: StartSource) -> Result<Created, Error> {
        let _request = self.enter();
        let (since, deadline) = (Instant::now(), self.clock.stamp(self.clock.at(request.ends_at)));
        self.crash_point(Phase::Reserve);
        let mut network = self.attachment(&request.network)?;
        let snapshot = match &source {
            StartSource::Template(_) => None,
            StartSource::Snapshot(snapshot, _) => Some(Arc::clone(snapshot)),
            StartSource::Resume(paused, _) => {
                let image = paused.record.snapshot.clone();
                let image = image.ok_or_else(|| Error::Unknown(request.sandbox.to_string()))?;
                Some(self.find_snapshot(&image)?)
            }
        };
        let (template, guest, shape) = match (&source, &snapshot) {
            (_, Some(snapshot)) => {
                let manifest = &snapshot.manifest;
                let mut shape = manifest_shape(manifest);
                if boots(&source, snapshot) {
                    // A disk fits any machine.
                    shape.vcpus = request.vcpus.unwrap_or(shape.vcpus);
                    shape.memory_mib = request.memory_mib.unwrap_or(shape.memory_mib);
                } else {
                    network = self.fits(snapshot, &request, network)?;
                }
                (manifest.template.clone(), manifest.guest.clone(), shape)
            }
            (StartSource::Template(template), None) => {
                let shape = Shape {
                    vcpus: request.vcpus.unwrap_or(template.shape.vcpus),
                    memory_mib: request.memory_mib.unwrap_or(template.shape.memory_mib),
                    disk_mib: template.shape.disk_mib,
                };
                (template.name.clone(), template.guest.clone(), shape)
            }
            _ => return Err(Error::Unknown(request.sandbox.to_string())),
        };
        let machine_id = match &source {
            StartSource::Resume(paused, _) => paused.record.machine_id,
            StartSource::Template(_) | StartSource::Snapshot(..) => None,
        };
        let machine_id = machine_id.map_or_else(random_bytes, Ok)?;
        let amount = Amount::machine(shape);
        let _descriptors = Budget::of_process().take(MACHINE)?;
        self.reserve(&request, shape, amount)?;
        let mut attempt = Attempt {
            inner: self,
            request: &request,
            source: &source,
            snapshot,
            template,
            guest,
            shape,
            network,
            machine_id,
            deadline,
            working: Some(self.work()),
            timings: Timings::default(),
            since,
        };
        attempt.lap(Phase::Reserve);
        let span = tracing::info_span!("create", sandbox = %request.sandbox);
        let result = attempt.run().instrument(span).await;
        self.creating().remove(&request.sandbox);
        match result {
            Ok((record, reason)) => {
                let created = Created {
                    start_path: record.start_path,
                    reason,
                    timings: attempt.timings,
                    shape,
                    started_at: record.started_at,
                };
                tracing::info!(sandbox = %request.sandbox, path = created.start_path.name(), reason = created.reason,
                    timing = created.timings.server_timing(since.elapsed()), "created");
                Ok(created)
            }
            Err(error) => {
                self.capacity().release(amount);
                Err(error)
            }
        }
    }

    /// What a create's wish for a network comes to on this node.
    fn attachment(&self, wanted: &Wanted) -> Result<Option<Attachment>, Error> {
        match (wanted, &self.allocator.networks) {
            (Wanted::None, _) | (Wanted::Usual(_), None) => Ok(None),
            (Wanted::Usual(attachment) | Wanted::Required(attachment), Some(_)) => {
                Ok(Some(attachment.clone()))
            }
            (Wanted::Required(_), None) => {
                Err(Error::NoNetwork { what: "the node".to_owned(), reason: self.no_network.clone() })
            }
        }
    }

    /// Whether a snapshot can be restored here as `request` wants it; with its network.
    fn fits(
        &self,
        snapshot: &Snapshot,
        request: &Create,
        network: Option<Attachment>,
    ) -> Result<Option<Attachment>, Error> {
        let manifest = &snapshot.manifest;
        let differences = manifest.identity.differences(&self.identity_here(&manifest.identity));
        if !differences.is_empty() {
            return Err(Error::Incompatible {
                snapshot: manifest.id.to_string(),
                fields: differences.join(", "),
            });
        }
        let fixed = |field, asked: u64, has: u64| {
            Err(Error::Fixed { field, asked: asked.to_string(), has: has.to_string() })
        };
        if let Some(asked) = request.vcpus.filter(|asked| *asked != manifest.identity.vcpus) {
            return fixed("cpuCount", asked.into(), manifest.identity.vcpus.into());
        }
        if let Some(MemoryMib(asked)) = request.memory_mib
            && asked != manifest.identity.memory_mib
        {
            return fixed("memoryMB", asked.into(), manifest.identity.memory_mib.into());
        }
        match (self.has_network(&manifest.identity), network) {
            (true, None) => Err(Error::Fixed {
                field: "network",
                asked: "none".to_owned(),
                has: "a network, which can be denied everything".to_owned(),
            }),
            (true, network) => Ok(network),
            (false, _) if matches!(request.network, Wanted::Required(_)) => Err(Error::NoNetwork {
                what: format!("snapshot {}", manifest.id),
                reason: Some("it was taken of a sandbox without one".to_owned()),
            }),
            (false, _) => Ok(None),
        }
    }

    fn reserve(self: &Arc<Self>, request: &Create, shape: Shape, amount: Amount) -> Result<(), Error> {
        if self.hurry.is_cancelled() {
            return Err(Error::Stopping);
        }
        self.check_disk()?;
        let mut creating = self.creating();
        if creating.contains(&request.sandbox) || self.sandboxes().contains_key(&request.sandbox) {
            return Err(Error::Exists(request.sandbox.to_string()));
        }
        self.capacity().check(shape)?;
        loop {
            let held = self.capacity().hold(amount);
            match held {
                Ok(()) => break,
                // Machines that nobody has asked for make room for one that somebody does.
                Err(_) if self.evict() => {}
                Err(error) => return Err(error),
            }
        }
        creating.insert(request.sandbox.clone());
        Ok(())
    }
}

impl Attempt<'_> {
    fn lap(&mut self, phase: Phase) {
        self.timings.lap(phase, &mut self.since);
    }

    fn begin(&self, phase: Phase) -> tracing::Span {
        self.inner.crash_point(phase);
        tracing::info_span!("phase", name = phase.name())
    }

    async fn run(&mut self) -> Result<(SandboxRecord, String), Error> {
        let (started, reason) = self.start().await?;
        let span = self.begin(Phase::Commit);
        let committed = self.commit(started).instrument(span).await?;
        self.lap(Phase::Commit);
        Ok((committed, reason))
    }

    async fn start(&mut self) -> Result<(Started, String), Error> {
        let insisted = self.request.start_path;
        let template = match (self.source, self.snapshot.clone()) {
            (StartSource::Template(template), _) => template,
            (source, Some(snapshot)) if boots(source, &snapshot) => {
                if let Some(path @ (StartPath::Clone | StartPath::Warm)) = insisted {
                    let reason = "a snapshot without memory is booted from its disk".to_owned();
                    return Err(Error::Path { path: path.name(), reason });
                }
                let reason = match source {
                    StartSource::Resume(paused, _) => {
                        format!("cold: resumed from its disk, generation {}", paused.record.generation)
                    }
                    _ => format!("cold: the disk of snapshot {}", snapshot.manifest.id),
                };
                return Ok((self.boot_disk(&snapshot).await?, reason));
            }
            (source, Some(snapshot)) => {
                if let Some(path @ (StartPath::Cold | StartPath::Warm)) = insisted {
                    let reason = "a snapshot of a sandbox is restored into a fresh VMM".to_owned();
                    return Err(Error::Path { path: path.name(), reason });
                }
                let pool = Arc::new(Pool::new(Arc::clone(&snapshot), 0));
                let (started, _) = self.clone(&pool).await?;
                let reason = match source {
                    StartSource::Resume(paused, _) => {
                        format!("clone: resumed, generation {}", paused.record.generation)
                    }
                    _ => format!("clone: snapshot {}", snapshot.manifest.id),
                };
                return Ok((started, reason));
            }
            (_, None) => return Err(Error::Unknown(self.request.sandbox.to_string())),
        };
        if insisted == Some(StartPath::Cold) {
            return Ok((self.boot_template(template).await?, "cold: asked for".to_owned()));
        }
        let reason = match self.inner.pool_for(template, self.shape, self.network.is_some()) {
            Ok(pool) => {
                let mut reason = "clone: asked for".to_owned();
                if insisted != Some(StartPath::Clone) {
                    if let Some(started) = self.warm(&pool).await {
                        return Ok((started, "warm".to_owned()));
                    }
                    reason = "clone: no warm slot".to_owned();
                }
                if insisted == Some(StartPath::Warm) {
                    let reason = pool.refusal().unwrap_or_else(|| "no warm slot".to_owned());
                    return Err(Error::Path { path: "warm", reason });
                }
                match self.clone(&pool).await {
                    Ok((started, true)) => return Ok((started, reason)),
                    Ok((started, false)) => return Ok((started, format!("{reason}; no VMM waited"))),
                    Err(error) => chain(&error),
                }
            }
            Err(reason) => reason,
        };
        if let Some(path @ (StartPath::Clone | StartPath::Warm)) = insisted {
            return Err(Error::Path { path: path.name(), reason });
        }
        if self.inner.hurry.is_cancelled() {
            return Err(Error::Stopping);
        }
        tracing::warn!(sandbox = %self.request.sandbox, reason, "no clone");
        let started = self.boot_template(template).await?;
        if self.inner.options.auto_bake {
            self.inner.bake_later(Template::clone(template), self.shape, self.network.is_some());
        }
        Ok((started, format!("cold: {reason}")))
    }

    /// Claims a machine that is parked for exactly this snapshot. One that does not answer is ended, and the next tried.
    async fn warm(&mut self, pool: &Arc<Pool>) -> Option<Started> {
        let claimed = loop {
            let (taken, dead) = pool.take_warm();
            for corpse in dead {
                tracing::warn!(vm = %corpse.home.spec.vm, "a warm machine had died");
                self.inner.discard_parked_later(corpse);
            }
            let Some(parked) = taken else { break None };
            match self.claim_parked(pool, parked).await {
                Ok(started) => break Some(started),
                Err(error) => {
                    pool.spoilt();
                    tracing::warn!(snapshot = %pool.snapshot_id(), error = chain(&error), "a warm machine did not answer");
                }
            }
        };
        pool.wanted(claimed.is_some());
        self.inner.look_at_pools();
        claimed
    }

    async fn claim_parked(&mut self, pool: &Arc<Pool>, parked: Parked) -> Result<Started, Error> {
        let Parked { home, paused, mut control, lease, mac, .. } = parked;
        // What it held as a parked machine; the sandbox holds the same already.
        self.inner.capacity().release(Amount::machine(self.shape));
        let key = paused.key();
        let mut record = self.record(StartPath::Warm);
        record.mac = mac;
        record.snapshot = Some(pool.snapshot_id());
        record.lineage = record.snapshot.clone();
        self.lap(Phase::Vmm);
        let work = async {
            // Pages that it has not touched yet are still read from the snapshot.
            pool.snapshot.check_seal()?;
            self.rule(&home.spec, true).await?;
            let span = self.begin(Phase::Resume);
            let resumed = async {
                let asked = control.post(&self.activation_request(&record)?).await?;
                let running = paused.resume().await.map_err(|(_, error)| error)?;
                Ok::<_, Error>((asked, running))
            };
            let (asked, running) = resumed.instrument(span).await?;
            self.lap(Phase::Resume);
            self.activated(&running, &mut control, asked).await?;
            Ok::<_, Error>((running, control))
        };
        // The claim is also the probe: a VMM that is stuck must not hold up a create that could be a clone.
        let claimed = tokio::time::timeout(CLAIM, work).await.unwrap_or_else(|_| {
            let detail = "the machine did not answer".to_owned();
            Err(kelvin_vmm::Error::Deadline { what: "claiming a warm machine", after: CLAIM, detail }.into())
        });
        match claimed {
            Ok((running, control)) => {
                let identity = pool.snapshot.manifest.identity.clone();
                Ok(Started { spec: home.spec, running, control, record, identity, lease })
            }
            Err(error) => {
                if let Error::Store(kelvin_store::Error::Seal { .. }) = &error {
                    pool.refuse(error.to_string());
                }
                self.inner.allocator.release_or_log(&home.spec, Some(key)).await;
                Err(error)
            }
        }
    }

    /// Waits until this create is to be given up, whatever its guest does: the node stops, or what is resumed is killed.
    async fn given_up(&self) -> Error {
        let killed = async {
            match self.source {
                StartSource::Resume(paused, _) => paused.killed().await,
                StartSource::Template(_) | StartSource::Snapshot(..) => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.inner.hurry.cancelled() => Error::Stopping,
            () = killed => Error::Unknown(self.request.sandbox.to_string()),
        }
    }

    /// Restores the pool's snapshot; whether a VMM waited for it. A failure is the reason why it has to be a boot.
    async fn clone(&mut self, pool: &Arc<Pool>) -> Result<(Started, bool), Error> {
        let span = self.begin(Phase::Queue);
        let turn = async {
            tokio::select! {
                biased;
                turn = self.inner.turns.take(&self.request.project) => turn,
                error = self.given_up() => Err(error),
            }
        };
        let turn = turn.instrument(span).await?;
        self.lap(Phase::Queue);
        let span = self.begin(Phase::Vmm);
        let (ready, waited) = self.claim(pool).instrument(span).await?;
        self.lap(Phase::Vmm);
        let held = (turn, self.working.take());
        let started = held_for(TURN, held, self.restore(pool, ready)).await;
        match started {
            Ok(started) => Ok((started, waited)),
            Err(Error::Store(error @ kelvin_store::Error::Seal { .. })) => {
                pool.refuse(error.to_string());
                Err(error.into())
            }
            Err(error) => Err(error),
        }
    }

    async fn claim(&self, pool: &Arc<Pool>) -> Result<(Ready, bool), Error> {
        let (taken, dead) = pool.take();
        for corpse in dead {
            tracing::warn!(vm = %corpse.home.spec.vm, stderr = corpse.waiting.stderr(), "a waiting VMM had died");
            self.inner.discard(corpse).await;
        }
        match taken {
            Some(ready) => {
                self.inner.capacity().release(Amount::waiting());
                Ok((ready, true))
            }
            None => Ok((self.inner.prepare(pool).await?, false)),
        }
    }

    async fn restore(&mut self, pool: &Arc<Pool>, ready: Ready) -> Result<Started, Error> {
        let Ready { home, waiting, mut control } = ready;
        let key = waiting.key();
        let mut record = self.record(StartPath::Clone);
        let (id, manifest) = (pool.snapshot_id(), &pool.snapshot.manifest);
        if record.lineage.is_none() {
            record.lineage = lineage(&pool.snapshot);
        }
        record.snapshot = Some(id.clone());
        let lease = self.inner.snapshots.lease(&id);
        if lease.is_none() {
            // Deleted since it was looked up.
            self.inner.allocator.release_or_log(&home.spec, Some(key)).await;
            return Err(kelvin_store::Error::Missing { kind: "snapshot", name: id.to_string() }.into());
        }
        let work = async {
            let span = self.begin(Phase::Load);
            let paused = async {
                // Memory over another disk, or a file that was touched, must not get further than this.
                pool.snapshot.check_seal()?;
                let state = pool.snapshot.file("state");
                let loading = async { waiting.load(&state).await.map_err(|(_, error)| Error::from(error)) };
                // Beside each other: the machine is in the ledger already, and nothing runs in it yet.
                let (paused, ()) = tokio::try_join!(loading, self.declare(&home.spec, &record))?;
                Ok::<_, Error>(paused)
            };
            let paused = paused.instrument(span).await?;
            if self.snapshot.is_some() {
                self.hardware(&home.spec, &mut record).await?;
            }
            self.lap(Phase::Load);
            self.rule(&home.spec, false).await?;
            let span = self.begin(Phase::Resume);
            let resumed = async {
                // Posted while the vCPUs stand still: the guest wakes up once, with its identity at hand.
                let asked = control.post(&self.activation_request(&record)?).await?;
                let running = paused.resume().await.map_err(|(_, error)| error)?;
                Ok::<_, Error>((asked, running))
            };
            let (asked, running) = resumed.instrument(span).await?;
            self.lap(Phase::Resume);
            self.activated(&running, &mut control, asked).await?;
            // A paused sandbox's snapshot is restored once.
            if !matches!(self.source, StartSource::Resume(..)) {
                running.learn();
            }
            Ok::<_, Error>((running, control))
        };
        match work.await {
            Ok((running, control)) => {
                let identity = manifest.identity.clone();
                Ok(Started { spec: home.spec, running, control, record, identity, lease })
            }
            Err(error) => {
                self.inner.allocator.release_or_log(&home.spec, Some(key)).await;
                Err(error)
            }
        }
    }

    async fn boot_template(&mut self, template: &Template) -> Result<Started, Error> {
        let identity = self.inner.identity(template, self.shape, self.network.is_some());
        self.cold(self.inner.store.rootfs(&template.image), identity).await
    }

    /// Boots from the disk of a snapshot, with the guest that wrote it.
    async fn boot_disk(&mut self, snapshot: &Snapshot) -> Result<Started, Error> {
        let id = &snapshot.manifest.id;
        let missing = || kelvin_store::Error::Missing { kind: "snapshot", name: id.to_string() };
        // Until its disk is cloned.
        let lease = self.inner.snapshots.lease(id).ok_or_else(missing)?;
        snapshot.check_seal()?;
        let identity = Identity {
            vcpus: self.shape.vcpus,
            memory_mib: self.shape.memory_mib.0,
            devices: self.inner.devices[usize::from(self.network.is_some())].clone(),
            ..self.inner.identity_here(&snapshot.manifest.identity)
        };
        let started = self.cold(snapshot.file("disk"), identity).await;
        drop(lease);
        started
    }

    async fn cold(&mut self, disk: PathBuf, identity: Identity) -> Result<Started, Error> {
        let span = self.begin(Phase::Disk);
        let network = self.network.is_some();
        let begun = self.inner.allocator.begin(self.shape, &self.guest, disk, network);
        let (home, making) = begun.instrument(span.clone()).await?;
        // Beside the start of the VMM, where that can wait for it.
        let (since, took) = (self.since, Arc::new(OnceLock::new()));
        let told = Arc::clone(&took);
        let making = async move {
            let made = making.await;
            let _ = told.set(since.elapsed());
            made
        };
        let making: kelvin_vmm::Disk = Box::pin(making.instrument(span));
        let mut record = SandboxRecord {
            identity: Some(identity.clone()),
            shape: self.shape,
            snapshot: None,
            start_path: StartPath::Cold,
            ..self.record(StartPath::Cold)
        };
        if let (None, Some(snapshot)) = (&record.lineage, &self.snapshot) {
            record.lineage = lineage(snapshot);
        }
        let work = async {
            self.hardware(&home.spec, &mut record).await?;
            self.rule(&home.spec, false).await?;
            let span = self.begin(Phase::Vmm);
            // The disk is measured from its own begin: the two overlap.
            self.since = Instant::now();
            let running = async {
                self.declare(&home.spec, &record).await?;
                let running = self.inner.driver.boot(&home.spec, making).await?;
                home.started(&self.inner.allocator, running.key()).await?;
                Ok::<_, Error>(running)
            };
            let running = running.instrument(span).await?;
            self.timings.add(Phase::Disk, took.get().copied().unwrap_or_default());
            self.lap(Phase::Vmm);
            let span = self.begin(Phase::Boot);
            let slot = home.spec.network.as_ref().filter(|_| self.request.probe_tcp);
            let probe = slot.map(|slot| Probe::begin(slot.address()));
            let working = self.working.take();
            let booted = async {
                tokio::select! {
                    biased;
                    control = held_for(BOOTING, working, self.inner.boot_guest(&running)) => control,
                    error = self.given_up() => Err(error),
                }
            };
            let mut control = booted.instrument(span).await?;
            self.lap(Phase::Boot);
            let asked = control.post(&self.activation_request(&record)?).await?;
            self.activated(&running, &mut control, asked).await?;
            // Not before: the guest has its hardware address only now, and the slot knows no other.
            if let Some(probe) = probe {
                if let Some(took) = probe.answer().await {
                    self.timings.add(Phase::Tcp, took);
                }
                self.since = Instant::now();
            }
            Ok::<_, Error>((running, control))
        };
        match work.await {
            Ok((running, control)) => {
                Ok(Started { spec: home.spec, running, control, record, identity, lease: None })
            }
            Err(error) => {
                self.inner.allocator.release_or_log(&home.spec, None).await;
                Err(error)
            }
        }
    }

    /// Records what the machine at `spec` is to be. Never as paused: until a resume is committed, only the image's own
    /// record says what can be resumed.
    async fn declare(&self, spec: &MachineSpec, record: &SandboxRecord) -> Result<(), Error> {
        let declared = SandboxRecord { state: State::Starting, ..record.clone() };
        self.inner.remember(spec, &declared).await
    }

    /// Puts the sandbox's own rules in force before its machine runs. The slot's defaults are in force already.
    /// `has_run`: whether the machine has been running under those.
    async fn rule(&mut self, spec: &MachineSpec, has_run: bool) -> Result<(), Error> {
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

    async fn activated(
        &mut self,
        running: &Running,
        control: &mut Control,
        asked: Asked,
    ) -> Result<(), Error> {
        let span = self.begin(Phase::Activate);
        let (limit, clock) = (self.inner.options.activate_deadline, self.inner.clock.clone());
        let answered = async {
            let done = control.wait("activation", asked, limit).await?;
            sync_clock(&clock, control, done, limit).await?;
            Ok::<_, Error>(done)
        };
        let answered = async {
            tokio::select! {
                biased;
                done = answered => done,
                end = running.ended() => Err(ended("activating", running, end).await),
                error = self.given_up() => Err(error),
            }
        };
        let done = answered.instrument(span).await?;
        self.lap(Phase::Activate);
        tracing::debug!(worked = ?done.worked, "the agent was activated");
        Ok(())
    }

    async fn commit(&self, started: Started) -> Result<SandboxRecord, Error> {
        let Started { spec, running, control, mut record, identity, lease } = started;
        let event = if matches!(self.source, StartSource::Resume(..)) { Event::Resume } else { Event::Ready };
        if let Some(state) = next(record.state, event) {
            record.state = state;
        }
        let remembered = match self.source {
            // From here on its image is used up.
            StartSource::Resume(paused, _) => match body(&record) {
                Ok(body) => {
                    match self.inner.allocator.ledger.move_record(&paused.owner, &spec.vm, body).await {
                        Ok(true) => Ok(()),
                        // It was killed meanwhile.
                        Ok(false) => Err(Error::Unknown(record.sandbox.to_string())),
                        Err(error) => Err(error.into()),
                    }
                }
                Err(error) => Err(error),
            },
            _ => {
                record.started_at = self.inner.clock.wall();
                self.inner.remember(&spec, &record).await
            }
        };
        if let Err(error) = remembered {
            self.inner.allocator.release_or_log(&spec, Some(running.key())).await;
            return Err(error);
        }
        self.inner.own(Machine {
            spec,
            running,
            control,
            record: record.clone(),
            identity: Some(identity),
            lease,
            console: match self.source {
                StartSource::Resume(paused, _) => paused.console.on_another_machine(),
                StartSource::Template(_) | StartSource::Snapshot(..) => Console::default(),
            },
        });
        if matches!(self.source, StartSource::Resume(..)) {
            self.inner.changes.is(record.live());
        }
        Ok(record)
    }

    /// What the machine of `record` is told when it wakes up.
    fn activation_request(&self, record: &SandboxRecord) -> Result<Request, Error> {
        match (self.source, &self.snapshot) {
            (source @ StartSource::Resume(..), Some(snapshot)) if !boots(source, snapshot) => {
                Ok(Request::Wake(wake(&self.inner.clock, true)?))
            }
            _ => Ok(Request::Activate(self.activation(record.mac)?)),
        }
    }

    /// What makes a machine the sandbox that is asked for. The clock is read last: the frame leaves at once.
    fn activation(&self, mac: Option<[u8; 6]>) -> Result<Activation, Error> {
        let request = self.request;
        let token = request.access_token.as_ref().map(|token| token.expose().to_owned());
        Ok(Activation {
            sandbox_id: request.sandbox.to_string(),
            template: self.template.to_string(),
            hostname: request.sandbox.to_string(),
            machine_id: self.machine_id,
            boot_id: random_bytes()?,
            mac: mac.unwrap_or_default(),
            entropy: random_bytes()?,
            access_token: token.unwrap_or_default(),
            env_vars: request.env_vars.clone(),
            wall_clock_ns: wall_clock_ns(&self.inner.clock),
        })
    }

    /// The hardware address of the machine at `spec`: its own, unless it is a template's clone. To set one costs a
    /// restored guest 5 ms under emulation, a quarter of the whole create.
    async fn hardware(&self, spec: &MachineSpec, record: &mut SandboxRecord) -> Result<(), Error> {
        let Some(slot) = &spec.network else {
            return Ok(());
        };
        if !matches!(self.source, StartSource::Resume(..)) {
            record.mac = Some(Slot::random_mac()?);
        }
        match record.mac {
            Some(mac) => Ok(slot.set_guest_mac(mac).await?),
            None => Ok(()),
        }
    }

    fn record(&self, start_path: StartPath) -> SandboxRecord {
        let parent = match self.source {
            StartSource::Resume(paused, _) => {
                return SandboxRecord {
                    ends_at: self.request.ends_at,
                    deadline: Some(self.deadline.clone()),
                    project: self.request.project.clone(),
                    machine_id: Some(self.machine_id),
                    ..paused.record.clone()
                };
            }
            StartSource::Snapshot(_, parent) => parent.clone(),
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
async fn held_for<T, H>(limit: Duration, held: H, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        biased;
        done = &mut work => return done,
        () = tokio::time::sleep(limit) => drop(held),
    }
    work.await
}

/// Whether a machine of `snapshot` boots: it has no memory, or the disk alone is wanted.
fn boots(source: &StartSource, snapshot: &Snapshot) -> bool {
    !snapshot.manifest.mode.is_full() || matches!(source, StartSource::Resume(_, PauseMode::Filesystem))
}

/// The last snapshot in the past of a machine of `snapshot` that was baked or kept.
fn lineage(snapshot: &Snapshot) -> Option<SnapshotId> {
    let manifest = &snapshot.manifest;
    if manifest.origin.is_passing() { manifest.parent.clone() } else { Some(manifest.id.clone()) }
}

pub fn random_bytes<const N: usize>() -> Result<[u8; N], Error> {
    let mut random = [0; N];
    getrandom::fill(&mut random).map_err(|error| Error::Io {
        what: "reading random bytes",
        source: std::io::Error::other(error.to_string()),
    })?;
    Ok(random)
}

pub fn wall_clock_ns(clock: &Clock) -> u64 {
    u64::try_from(clock.wall().as_nanosecond()).unwrap_or(0)
}

/// What a machine that goes on as who it is is told. The clock is read last: the frame leaves at once.
pub fn wake(clock: &Clock, restored: bool) -> Result<Wake, Error> {
    let entropy = random_bytes()?;
    Ok(Wake { entropy, restored, wall_clock_ns: wall_clock_ns(clock) })
}

/// That a machine does not run any more, and why.
async fn ended(what: &'static str, running: &Running, end: MachineEnd) -> Error {
    let console = running.console().await.unwrap_or_default();
    let stderr = kelvin_vmm::guest_end::reason(end, &console, &running.stderr());
    kelvin_vmm::Error::Ended { what, stderr }.into()
}

impl Inner {
    /// Waits for a booting guest's agent. The console tells why, when it does not come.
    pub async fn boot_guest(&self, running: &Running) -> Result<Control, Error> {
        let mut control = running.control().await?;
        let limit = self.options.boot_deadline;
        tokio::select! {
            biased;
            answer = control.call("booting", &Request::Ping, limit) => match answer {
                Ok(_) => Ok(control),
                Err(kelvin_vmm::Error::Deadline { what, after, .. }) => {
                    let console = running.console().await.unwrap_or_default();
                    let tail: Vec<&str> = console.lines().rev().take(15).collect();
                    let detail = tail.into_iter().rev().collect::<Vec<_>>().join(" | ");
                    Err(kelvin_vmm::Error::Deadline { what, after, detail }.into())
                }
                Err(error) => Err(error.into()),
            },
            end = running.ended() => Err(ended("booting", running, end).await),
        }
    }
}
