//! The builder's machine: boots from the disk of a state, does steps, and has its disk kept after each.
//!
//! ```text
//! hold ─> resources (ledger first) ─> rules ─> boot ─> activate ─> steps ──┬─> ended, released
//!                                          freeze ─> stop ─> clone ─> go on ┘ after each that ended well
//! ```
//!
//! It is no sandbox: nobody is shown it, it has a token that nobody knows, and no record. Who writes: the ledger, as for every
//! machine, and `layers`. A crash leaves a machine without a record; the next start removes it.

use std::sync::Arc;
use std::time::Duration;

use kelvin_api::guest::{Activation, Request};
use kelvin_api::id::{TemplateName, Token};
use kelvin_api::network::{Attachment, Policy};
use kelvin_api::sandbox::EnvVars;
use kelvin_api::units::Shape;
use kelvin_host::descriptors::{Budget, Held, MACHINE};
use kelvin_host::net::Slot;
use kelvin_host::process::ProcessKey;
use kelvin_store::layers::{Layer, Layers};
use kelvin_vmm::{MachineSpec, Running};

use crate::build::registry::Stop;
use crate::capacity::{Amount, Hold};
use crate::error::Error;
use crate::machine::capture::{Freeze, flush, freeze_on_disk};
use crate::machine::clock::{random_bytes, sync_clock, wake, wall_clock_ns};
use crate::machine::live::{Guest, LiveMachine};
use crate::machine::processes::Processes;
use crate::machine::resources::MachineResources;
use crate::start::attempt::ended;
use crate::state::Inner;

/// How long a guest may take to write everything back, since a step may have written gigabytes; and then to freeze.
const WRITE_BACK: Duration = Duration::from_secs(120);
const FREEZE: Duration = Duration::from_secs(30);
/// How long the agent may take to say that it goes on.
const AWAKE: Duration = Duration::from_secs(30);

/// What a machine begins with.
pub struct Ground {
    /// The template that is to be, for the guest's environment.
    pub template: TemplateName,
    /// Digest of the guest.
    pub guest: String,
    /// What its disk is cloned from.
    pub disk: std::path::PathBuf,
    /// Its shape.
    pub shape: Shape,
    /// Whether it has a network where the node has one.
    pub network: bool,
}

/// A builder's machine that runs. It has to be ended.
pub struct BuildMachine {
    inner: Arc<Inner>,
    spec: MachineSpec,
    key: ProcessKey,
    live: LiveMachine,
    /// The way to its agent.
    pub processes: Processes,
    _hold: Hold,
    _descriptors: Held<'static>,
}

impl BuildMachine {
    /// Boots one. Not cancel-safe; `stop` ends it.
    ///
    /// # Errors
    /// `Exhausted`, and as ledger, VMM and guest give them; then nothing is left.
    pub async fn start(inner: &Arc<Inner>, ground: Ground, stop: &Stop) -> Result<Self, Error> {
        let descriptors = Budget::of_process().take(MACHINE)?;
        let hold = inner.make_room(Amount::machine(ground.shape))?;
        let network = inner.build_network().filter(|_| ground.network);
        let (shape, guest) = (ground.shape, &ground.guest);
        let home = inner.allocator.build(shape, guest, ground.disk.clone(), network.is_some()).await?;
        let booted = async {
            let mac = prepare_network(inner, &home, network.as_ref()).await?;
            stop.check()?;
            let running = inner.driver.boot(&home.spec, kelvin_vmm::made()).await?;
            let key = running.key();
            home.started(&inner.allocator, key).await?;
            let token = Token::random();
            let activation = || activation(inner, &home, &ground.template, &token, mac);
            let (guest, processes) = stop.unless(meet(inner, &running, &home, activation, &token)).await?;
            Ok::<_, Error>((running, key, guest, processes))
        };
        match booted.await {
            Ok((running, key, guest, processes)) => Ok(Self {
                inner: Arc::clone(inner),
                spec: home.spec,
                key,
                live: LiveMachine::Running(running, guest),
                processes,
                _hold: hold,
                _descriptors: descriptors,
            }),
            Err(error) => {
                inner.allocator.release_or_log(&home.spec, None).await;
                Err(error)
            }
        }
    }

    /// Waits until it does not run any more, by itself.
    pub async fn ended(&self) -> Error {
        match self.live.running() {
            Some(running) => {
                let end = running.ended().await;
                ended("building", running, end).await
            }
            None => std::future::pending().await,
        }
    }

    /// Keeps its disk as it is now, as the layer of `key`; it goes on. Dropped in the middle, the machine can only be ended.
    ///
    /// # Errors
    /// When the guest does not write everything back and freeze, `Io`, `Store`.
    pub async fn keep(&mut self, layers: &Layers, key: &str) -> Result<Layer, Error> {
        self.inner.ensure_disk().await?;
        let disk = self.spec.absolute().join("disk");
        // A slow disk is waited for ahead of the freeze: what is frozen has little left to write.
        if let Some(guest) = self.live.guest() {
            guest.control.call("writing everything back", &Request::Quiesce, WRITE_BACK).await?;
        }
        flush(disk.clone()).await?;
        let (clock, inner) = (self.inner.clock.clone(), Arc::clone(&self.inner));
        let mut freezing = Freezing { live: &mut self.live, inner: &inner, disk: disk.clone(), why: None };
        if !freeze_on_disk(&clock, &mut freezing).await? {
            let silent = || kelvin_vmm::Error::Deadline {
                what: "freezing the file system",
                after: FREEZE,
                detail: "the guest did not keep it still".to_owned(),
            };
            return Err(freezing.why.unwrap_or_else(silent).into());
        }
        match self.live.stop().await {
            Some(stopped) => stopped?,
            None => return Err(Error::Unknown(self.spec.vm.to_string())),
        }
        let (layers, key) = (layers.clone(), key.to_owned());
        let kept = kelvin_host::blocking::spawn(move || layers.put(&key, &disk)).await;
        self.live.go_on(&self.inner.clock).await?;
        let layer = kept
            .map_err(|error| Error::Io { what: "keeping a layer", source: std::io::Error::other(error) })?;
        thaw(&mut self.live, &self.inner).await?;
        Ok(layer?)
    }

    /// Ends it and releases what it has.
    pub async fn end(self) {
        let Self { inner, spec, key, processes, live, .. } = self;
        processes.close().await;
        drop(live);
        inner.allocator.release_or_log(&spec, Some(key)).await;
    }
}

/// Puts the rules of builds in force and gives the guest a hardware address, before it runs.
async fn prepare_network(
    inner: &Inner,
    home: &MachineResources,
    network: Option<&Attachment>,
) -> Result<Option<[u8; 6]>, Error> {
    let (Some(slot), Some(network)) = (&home.spec.network, network) else { return Ok(None) };
    if let Some(networks) = inner.allocator.networks.as_ref().filter(|_| network.policy != Policy::default())
    {
        networks.begin(slot, &network.policy).await?;
    }
    let mac = Slot::random_mac()?;
    slot.set_guest_mac(mac).await?;
    Ok(Some(mac))
}

/// The first words with a guest that boots: it becomes nobody's machine, with a token.
async fn meet(
    inner: &Inner,
    running: &Running,
    home: &MachineResources,
    activation: impl FnOnce() -> Result<Activation, Error>,
    token: &Token,
) -> Result<(Guest, Processes), Error> {
    let mut control = inner.boot_guest(running).await?;
    let limit = inner.options.activate_deadline;
    let answered = async {
        let asked = control.post(&Request::Activate(activation()?)).await?;
        let done = control.wait("activation", asked, limit).await?;
        sync_clock(&inner.clock, &mut control, done, limit).await?;
        Ok::<_, Error>(running.connect().await?)
    };
    let http = tokio::select! {
        biased;
        http = answered => http?,
        end = running.ended() => return Err(ended("activating", running, end).await),
    };
    Ok((Guest::new(control), Processes::over(http, &home.spec.vm, Some(token))))
}

fn activation(
    inner: &Inner,
    home: &MachineResources,
    template: &TemplateName,
    token: &Token,
    mac: Option<[u8; 6]>,
) -> Result<Activation, Error> {
    let (machine_id, boot_id, entropy) = (random_bytes()?, random_bytes()?, random_bytes()?);
    Ok(Activation {
        sandbox_id: home.spec.vm.to_string(),
        template: template.to_string(),
        hostname: home.spec.vm.to_string(),
        machine_id,
        boot_id,
        mac: mac.unwrap_or_default(),
        entropy,
        access_token: token.expose().to_owned(),
        env_vars: EnvVars::new(),
        wall_clock_ns: wall_clock_ns(&inner.clock),
    })
}

/// Waits until the guest says that its file system can be written again.
async fn thaw(live: &mut LiveMachine, inner: &Inner) -> Result<(), Error> {
    let Some(guest) = live.guest() else { return Ok(()) };
    let asked = match guest.posted.take() {
        Some(asked) => asked,
        None => guest.control.post(&Request::Wake(wake(&inner.clock, false)?)).await?,
    };
    let done = guest.control.wait("going on", asked, AWAKE).await?;
    sync_clock(&inner.clock, &mut guest.control, done, AWAKE).await
}

struct Freezing<'a> {
    live: &'a mut LiveMachine,
    inner: &'a Inner,
    disk: std::path::PathBuf,
    why: Option<kelvin_vmm::Error>,
}

impl Freeze for Freezing<'_> {
    async fn freeze(&mut self) -> bool {
        let Some(guest) = self.live.guest() else { return false };
        self.why = guest.control.call("freezing the file system", &Request::Freeze, FREEZE).await.err();
        self.why.is_none()
    }

    async fn flush(&mut self) -> Result<(), Error> {
        flush(self.disk.clone()).await
    }

    async fn thaw(&mut self) {
        if let Err(error) = thaw(self.live, self.inner).await {
            tracing::warn!(error = kelvin_api::error::chain(&error), "a builder's guest did not thaw");
        }
    }
}

impl Inner {
    /// The network of a builder's machine, where there is one.
    fn build_network(&self) -> Option<Attachment> {
        self.allocator.networks.as_ref()?;
        self.options.build_network.clone()
    }
}
