//! The create path: reserve, then claim a waiting VMM and load (clone) or boot (cold), activate, commit.
//!
//! ```text
//! reserve ─> queue ─> vmm ─> load ─> resume ─> activate ─> commit        clone
//!       └──────────── disk ─> vmm ─> boot ────> activate ─> commit        cold
//! ```
//!
//! Whatever fails after `reserve` is released in reverse order before the error is returned. A crash at
//! any point leaves a record that is not `running`, and the next start reaps its machine.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kelvin_api::error::chain;
use kelvin_api::guest::{Activation, Request};
use kelvin_api::network::{Attachment, Policy, Wanted};
use kelvin_api::node::{Create, Created};
use kelvin_api::phase::{Phase, Timings};
use kelvin_api::sandbox::StartPath;
use kelvin_api::units::Shape;
use kelvin_store::image::Template;
use kelvin_vmm::control::{Asked, Control};
use kelvin_vmm::{MachineSpec, Port, Running};
use tracing::Instrument;

use crate::Inner;
use crate::capacity::Amount;
use crate::error::Error;
use crate::pool::{Pool, Ready};
use crate::record::{Event, SandboxRecord, State, next};
use crate::sandbox::Machine;

/// A machine that answered, and how it came to be.
struct Started {
    spec: MachineSpec,
    running: Running,
    control: Control,
    record: SandboxRecord,
}

/// One create on its way.
struct Attempt<'a> {
    inner: &'a Arc<Inner>,
    request: &'a Create,
    template: &'a Template,
    shape: Shape,
    network: Option<Attachment>,
    timings: Timings,
    since: Instant,
}

impl Inner {
    /// Creates a sandbox. When it returns, the agent has answered its activation.
    ///
    /// Not cancel-safe: callers run it on a task of its own.
    pub async fn create(self: &Arc<Self>, request: Create) -> Result<Created, Error> {
        let _request = self.enter();
        let since = Instant::now();
        self.crash_point(Phase::Reserve);
        let template = self.template(&request.template).await?;
        let shape = Shape {
            vcpus: request.vcpus.unwrap_or(template.shape.vcpus),
            memory_mib: request.memory_mib.unwrap_or(template.shape.memory_mib),
            disk_mib: template.shape.disk_mib,
        };
        let network = self.attachment(&request.network)?;
        let amount = Amount::machine(shape);
        self.reserve(&request, shape, amount)?;
        let mut attempt = Attempt {
            inner: self,
            request: &request,
            template: &template,
            shape,
            network,
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
        match (wanted, &self.keeper.networks) {
            (Wanted::None, _) | (Wanted::Usual(_), None) => Ok(None),
            (Wanted::Usual(attachment) | Wanted::Required(attachment), Some(_)) => {
                Ok(Some(attachment.clone()))
            }
            (Wanted::Required(_), None) => {
                Err(Error::NoNetwork { what: "the node".to_owned(), reason: self.no_network.clone() })
            }
        }
    }

    fn reserve(&self, request: &Create, shape: Shape, amount: Amount) -> Result<(), Error> {
        if self.stop.is_cancelled() {
            return Err(Error::Stopping);
        }
        let free = self.disk_free_mib()?;
        if free < self.options.disk_floor_mib {
            return Err(Error::Exhausted {
                resource: "disk",
                asked: self.options.disk_floor_mib,
                free,
                unit: "MiB",
            });
        }
        let mut creating = self.creating();
        if creating.contains(&request.sandbox) || self.sandboxes().contains_key(&request.sandbox) {
            return Err(Error::Exists(request.sandbox.to_string()));
        }
        let mut capacity = self.capacity();
        capacity.check(shape)?;
        capacity.hold(amount)?;
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
        if insisted == Some(StartPath::Cold) {
            return Ok((self.cold().await?, "cold: asked for".to_owned()));
        }
        let reason = match self.inner.pool_for(self.template, self.shape, self.network.is_some()) {
            Ok(pool) => match self.clone(&pool).await {
                Ok((started, reason)) => return Ok((started, reason)),
                Err(reason) => reason,
            },
            Err(reason) => reason,
        };
        if insisted == Some(StartPath::Clone) {
            return Err(Error::Path { path: "clone", reason });
        }
        tracing::warn!(sandbox = %self.request.sandbox, reason, "no clone");
        let started = self.cold().await?;
        if self.inner.options.auto_bake {
            self.inner.bake_later(self.template.clone(), self.shape, self.network.is_some());
        }
        Ok((started, format!("cold: {reason}")))
    }

    /// Restores the pool's snapshot. A failure is the reason why it has to be a boot.
    async fn clone(&mut self, pool: &Arc<Pool>) -> Result<(Started, String), String> {
        let span = self.begin(Phase::Queue);
        let permit = self
            .inner
            .restores
            .acquire()
            .instrument(span)
            .await
            .map_err(|_| "the node is shutting down".to_owned())?;
        self.lap(Phase::Queue);
        let span = self.begin(Phase::Vmm);
        let (ready, reason) = self.claim(pool).instrument(span).await.map_err(|error| chain(&error))?;
        self.lap(Phase::Vmm);
        let started = self.restore(pool, ready).await;
        drop(permit);
        match started {
            Ok(started) => Ok((started, reason)),
            Err(Error::Store(error @ kelvin_store::Error::Seal { .. })) => {
                pool.refuse(error.to_string());
                Err(error.to_string())
            }
            Err(error) => Err(chain(&error)),
        }
    }

    async fn claim(&self, pool: &Arc<Pool>) -> Result<(Ready, String), Error> {
        let (taken, dead) = pool.take();
        for corpse in dead {
            tracing::warn!(vm = %corpse.home.spec.vm, stderr = corpse.waiting.stderr(), "a waiting VMM had died");
            self.inner.discard(corpse).await;
        }
        match taken {
            Some(ready) => {
                self.inner.capacity().release(Amount::waiting());
                Ok((ready, "clone: a VMM waited".to_owned()))
            }
            None => Ok((self.inner.prepare(pool).await?, "clone: no VMM waited, one was started".to_owned())),
        }
    }

    async fn restore(&mut self, pool: &Arc<Pool>, ready: Ready) -> Result<Started, Error> {
        let Ready { home, waiting, mut control } = ready;
        let key = waiting.key();
        let mut record = self.record(StartPath::Clone);
        record.snapshot = Some(pool.snapshot_id());
        let work = async {
            let span = self.begin(Phase::Load);
            let paused = async {
                // Memory over another disk, or a file that was touched, must not get further than this.
                pool.snapshot.check_seal()?;
                self.inner.remember(&home.spec, &record).await?;
                waiting.load(&pool.snapshot.file("state")).await.map_err(|(_, error)| Error::from(error))
            };
            let paused = paused.instrument(span).await?;
            self.lap(Phase::Load);
            self.rule(&home.spec).await?;
            let span = self.begin(Phase::Resume);
            let resumed = async {
                // Posted while the vCPUs stand still: the guest wakes up once, with its identity at hand.
                let asked = control.post(&Request::Activate(activation(self.request)?)).await?;
                let running = paused.resume().await.map_err(|(_, error)| error)?;
                Ok::<_, Error>((asked, running))
            };
            let (asked, running) = resumed.instrument(span).await?;
            self.lap(Phase::Resume);
            self.activated(&mut control, asked).await?;
            Ok::<_, Error>((running, control))
        };
        match work.await {
            Ok((running, control)) => Ok(Started { spec: home.spec, running, control, record }),
            Err(error) => {
                self.inner.keeper.release_or_log(&home.spec, Some(key)).await;
                Err(error)
            }
        }
    }

    async fn cold(&mut self) -> Result<Started, Error> {
        let span = self.begin(Phase::Disk);
        let rootfs = self.inner.store.rootfs(&self.template.image);
        let network = self.network.is_some();
        let build = self.inner.keeper.build(self.shape, &self.template.guest, rootfs, network);
        let home = build.instrument(span).await?;
        self.lap(Phase::Disk);
        let record = self.record(StartPath::Cold);
        let work = async {
            self.rule(&home.spec).await?;
            let span = self.begin(Phase::Vmm);
            let running = async {
                self.inner.remember(&home.spec, &record).await?;
                let running = self.inner.driver.boot(&home.spec).await?;
                home.started(&self.inner.keeper, running.key()).await?;
                Ok::<_, Error>(running)
            };
            let running = running.instrument(span).await?;
            self.lap(Phase::Vmm);
            let span = self.begin(Phase::Boot);
            let mut control = self.inner.boot_guest(&running).instrument(span).await?;
            self.lap(Phase::Boot);
            let asked = control.post(&Request::Activate(activation(self.request)?)).await?;
            self.activated(&mut control, asked).await?;
            Ok::<_, Error>((running, control))
        };
        match work.await {
            Ok((running, control)) => Ok(Started { spec: home.spec, running, control, record }),
            Err(error) => {
                self.inner.keeper.release_or_log(&home.spec, None).await;
                Err(error)
            }
        }
    }

    /// Puts the sandbox's own rules in force before its machine runs. The slot's defaults are in force already.
    async fn rule(&mut self, spec: &MachineSpec) -> Result<(), Error> {
        let policy = self.network.as_ref().map(|network| &network.policy);
        let (Some(policy), Some(slot), Some(networks)) = (policy, &spec.network, &self.inner.keeper.networks)
        else {
            return Ok(());
        };
        if *policy != Policy::default() {
            let span = self.begin(Phase::Network);
            networks.begin(slot, policy).instrument(span).await?;
            self.lap(Phase::Network);
        }
        Ok(())
    }

    async fn activated(&mut self, control: &mut Control, asked: Asked) -> Result<(), Error> {
        let span = self.begin(Phase::Activate);
        let limit = self.inner.options.activate_deadline;
        let done = control.wait("activation", asked, limit).instrument(span).await?;
        self.lap(Phase::Activate);
        tracing::debug!(worked = ?done.worked, "the agent was activated");
        Ok(())
    }

    async fn commit(&self, started: Started) -> Result<SandboxRecord, Error> {
        let Started { spec, running, control, mut record } = started;
        if let Some(state) = next(record.state, Event::Ready) {
            record.state = state;
        }
        record.started_at = jiff::Timestamp::now();
        if let Err(error) = self.inner.remember(&spec, &record).await {
            self.inner.keeper.release_or_log(&spec, Some(running.key())).await;
            return Err(error);
        }
        self.inner.own(Machine { spec, running, control, record: record.clone() });
        Ok(record)
    }

    fn record(&self, start_path: StartPath) -> SandboxRecord {
        SandboxRecord {
            sandbox: self.request.sandbox.clone(),
            state: State::Starting,
            shape: self.shape,
            guest: self.template.guest.clone(),
            snapshot: None,
            start_path,
            started_at: jiff::Timestamp::now(),
            ends_at: self.request.ends_at,
            access_token: self.request.access_token.clone(),
            network: self.network.clone(),
        }
    }
}

/// What makes a machine the sandbox of `request`. The clock is read last: the frame leaves at once.
fn activation(request: &Create) -> Result<Activation, Error> {
    let mut random = [0; 80];
    getrandom::fill(&mut random).map_err(|error| Error::Io {
        what: "reading random bytes",
        source: std::io::Error::other(error.to_string()),
    })?;
    let (machine_id, entropy) = random.split_at(16);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    Ok(Activation {
        sandbox_id: request.sandbox.to_string(),
        template: request.template.to_string(),
        hostname: request.sandbox.to_string(),
        machine_id: machine_id.try_into().unwrap_or_default(),
        entropy: entropy.try_into().unwrap_or([0; 64]),
        wall_clock_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        access_token: request
            .access_token
            .as_ref()
            .map(|token| token.expose().to_owned())
            .unwrap_or_default(),
        env_vars: request.env_vars.clone(),
    })
}

impl Inner {
    /// Waits for a booting guest's agent. The console tells why, when it does not come.
    pub async fn boot_guest(&self, running: &Running) -> Result<Control, Error> {
        let mut control = Control::new(running.connect(Port::Control).await?);
        let limit = self.options.boot_deadline;
        tokio::select! {
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
            () = running.ended() => {
                Err(kelvin_vmm::Error::Ended { what: "booting", stderr: running.stderr() }.into())
            }
        }
    }
}
