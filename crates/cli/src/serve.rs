//! `kelvin serve`: control plane, node and gateway in one process, on one listener.
//!
//! One server owns a data directory, by a lock on `run/lock` that the kernel drops with the process.
//! SIGTERM and SIGINT: requests under way end, waiting VMMs are released, sandboxes keep running and are
//! adopted by the next start.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use axum::body::Body;
use axum::response::Response;
use axum::serve::ListenerExt;
use http::Request;
use http_body_util::BodyExt;
use kelvin_api::ENVD_VERSION;
use kelvin_api::error::{Failure, Kind};
use kelvin_api::id::{SandboxId, TemplateName};
use kelvin_api::network::{NetworkState, Policy};
use kelvin_api::node::{Base, Changes, Child, ConsoleLine, Create, Created, Forked, Live, Route};
use kelvin_api::phase::{Phase, Timings};
use kelvin_api::sandbox::{
    BakeTemplate, Capture, GuestMetrics, NodeInfo, PauseMode, PoolInfo, SetPool, SnapshotInfo, Template,
};
use kelvin_api::signature::Signature;
use kelvin_api::units::MemoryMib;
use kelvin_control::{ApiKey, Control, unknown_template};
use kelvin_gateway::{Gateway, Inbound, Io, Outbound, Sandboxes, Secure, tls};
use kelvin_host::net;
use kelvin_node::Node;
use kelvin_node::options::{NetworkOptions, Options};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tower::service_fn;
use tracing_subscriber::EnvFilter;

use crate::args::{ServeArgs, data_dir};
use crate::output::Failed;
use crate::vmm;

/// Joins the node to what control plane and gateway ask of one.
struct Local(Node);

#[async_trait]
impl kelvin_control::Node for Local {
    async fn create(&self, request: Create) -> Result<Created, Failure> {
        Ok(self.0.create(request).await?)
    }

    async fn kill(&self, id: &SandboxId) -> Result<(), Failure> {
        Ok(self.0.kill(id).await?)
    }

    async fn set_deadline(&self, id: &SandboxId, ends_at: jiff::Timestamp) -> Result<(), Failure> {
        Ok(self.0.set_deadline(id, ends_at).await?)
    }

    async fn set_policy(&self, id: &SandboxId, policy: Policy) -> Result<(), Failure> {
        Ok(self.0.set_policy(id, policy).await?)
    }

    async fn network(&self, id: &SandboxId) -> Result<NetworkState, Failure> {
        Ok(self.0.network(id).await?)
    }

    async fn metrics(&self, id: &SandboxId) -> Result<GuestMetrics, Failure> {
        Ok(self.0.guest_metrics(id).await?)
    }

    async fn console(&self, id: &SandboxId) -> Result<Vec<ConsoleLine>, Failure> {
        Ok(self.0.console(id).await?)
    }

    async fn base(&self, text: &str) -> Result<Base, Failure> {
        if let Ok(template) = text.parse::<TemplateName>()
            && self.0.has_template(&template)
        {
            return Ok(Base::Template(template));
        }
        self.0.find_kept(text).map(Base::Snapshot).ok_or_else(|| unknown_template(text))
    }

    async fn pause(
        &self,
        id: &SandboxId,
        mode: PauseMode,
        healthy: bool,
    ) -> Result<(Capture, Timings), Failure> {
        Ok(self.0.pause(id, mode, healthy).await?)
    }

    async fn resume(
        &self,
        id: &SandboxId,
        ends_at: Option<jiff::Timestamp>,
        mode: PauseMode,
    ) -> Result<Created, Failure> {
        Ok(self.0.resume(id, ends_at, mode).await?)
    }

    async fn snapshot(
        &self,
        id: &SandboxId,
        name: Option<TemplateName>,
        mode: PauseMode,
    ) -> Result<(SnapshotInfo, Capture, Timings), Failure> {
        Ok(self.0.snapshot(id, name, mode).await?)
    }

    async fn fork(&self, source: &SandboxId, children: Vec<Child>) -> Result<Forked, Failure> {
        Ok(self.0.fork(source, children).await?)
    }

    async fn snapshots(&self) -> Result<Vec<SnapshotInfo>, Failure> {
        Ok(self.0.snapshots().await?)
    }

    async fn remove_snapshot(&self, text: &str, cascade: bool) -> Result<(), Failure> {
        let shown: String = text.chars().take(80).collect();
        let id = self.0.find_kept(text).ok_or_else(|| {
            Failure::new(
                Kind::NotFound,
                "snapshot_not_found",
                format!("no snapshot {shown:?}"),
                "`kelvin snapshot list` shows what there is",
            )
        })?;
        Ok(self.0.remove_snapshot(&id, cascade).await?)
    }

    async fn pools(&self) -> Result<Vec<PoolInfo>, Failure> {
        Ok(self.0.pools())
    }

    async fn set_pool(&self, template: &TemplateName, wanted: SetPool) -> Result<(), Failure> {
        Ok(self.0.set_pool(template, wanted).await?)
    }

    async fn one(&self, id: &SandboxId) -> Result<Option<Live>, Failure> {
        Ok(self.0.one(id))
    }

    async fn live(&self) -> Result<Vec<Live>, Failure> {
        Ok(self.0.live())
    }

    async fn changes(&self, generation: u64) -> Result<Changes, Failure> {
        Ok(self.0.changes(generation).await)
    }

    async fn templates(&self) -> Result<Vec<Template>, Failure> {
        let templates = self.0.templates().await?;
        Ok(templates
            .into_iter()
            .map(|(template, created, snapshots)| Template {
                template_id: template.name.to_string(),
                build_id: template.image.clone(),
                cpu_count: template.shape.vcpus,
                memory_mb: template.shape.memory_mib.0,
                disk_size_mb: template.shape.disk_mib.0,
                public: false,
                aliases: vec![template.name.to_string()],
                names: vec![template.name.to_string()],
                created_at: created,
                updated_at: created,
                created_by: None,
                last_spawned_at: None,
                spawn_count: 0,
                build_count: 1,
                envd_version: ENVD_VERSION.to_owned(),
                build_status: "ready".to_owned(),
                snapshots,
            })
            .collect())
    }

    async fn bake(&self, template: &TemplateName, request: BakeTemplate) -> Result<String, Failure> {
        let memory = match request.memory_mb.map(u32::try_from) {
            None => None,
            Some(Ok(memory)) => Some(MemoryMib(memory)),
            Some(Err(_)) => {
                return Err(Failure::new(
                    Kind::Invalid,
                    "invalid_shape",
                    "memoryMB is outside every range",
                    "ask for less memory",
                ));
            }
        };
        let (vcpus, waiting, network) = (request.cpu_count, request.waiting_vmms, request.network);
        Ok(self.0.bake(template, vcpus, memory, waiting, network).await?.to_string())
    }

    async fn info(&self) -> Result<NodeInfo, Failure> {
        Ok(self.0.info().await?)
    }

    async fn collect(&self, dry_run: bool) -> Result<serde_json::Value, Failure> {
        let garbage = self.0.collect(dry_run).await?;
        serde_json::to_value(garbage).map_err(|error| {
            Failure::new(Kind::Internal, "encoding", "the result cannot be written", "report this")
                .with_cause(&error)
        })
    }
}

#[async_trait]
impl Sandboxes for Local {
    async fn send(
        &self,
        sandbox: &SandboxId,
        request: Request<Inbound>,
    ) -> Result<Response<Outbound>, Failure> {
        let response = self.0.send(sandbox, request).await?;
        Ok(response.map(|body| body.map_err(std::io::Error::other).boxed_unsync()))
    }

    async fn route(&self, sandbox: &SandboxId) -> Result<Route, Failure> {
        Ok(self.0.route(sandbox)?)
    }

    async fn dial(&self, sandbox: &SandboxId, port: u16) -> Result<Box<dyn Io>, Failure> {
        Ok(Box::new(self.0.dial(sandbox, port).await?))
    }

    async fn signer(&self, signature: &Signature) -> Option<SandboxId> {
        self.0.signer(signature)
    }

    async fn holder(&self, token: &str) -> Option<SandboxId> {
        self.0.holder(token)
    }

    async fn ended(&self, sandbox: &SandboxId) -> Option<String> {
        self.0.ended(sandbox)
    }
}

async fn options(args: &ServeArgs) -> Result<Options, Failed> {
    let mut options = Options::for_host(data_dir(args.data_dir.as_ref()));
    if let Some(accelerator) = args.accel {
        options.accelerator = accelerator;
    }
    if let Some(memory) = args.memory_mib {
        options.memory = MemoryMib(memory);
    }
    options.vcpus = args.vcpus.unwrap_or(options.vcpus);
    options.waiting_vmms = args.waiting_vmms;
    options.boot_deadline = Duration::from_secs(args.boot_deadline);
    options.concurrent_restores = args.concurrent_restores.unwrap_or(options.concurrent_restores);
    options.auto_bake = !args.no_auto_bake;
    options.disk_floor_mib = args.disk_floor_mib;
    options.warm.max = args.warm_max;
    options.warm.min = args.warm_min;
    options.warm.max_age_s = args.warm_max_age;
    if args.warm_min > args.warm_max {
        return Err(Failed::new("--warm-min is more than --warm-max".to_owned(), "name a range"));
    }
    if let Some(memory) = args.warm_memory_mib {
        options.warm_memory = MemoryMib(memory);
    }
    if !args.no_network {
        options.network = Some(network(args, options.first_user).await?);
    }
    if let Some(name) = &args.crash_at {
        let phase = Phase::ALL.into_iter().find(|phase| phase.name() == name);
        options.crash_at =
            Some(phase.ok_or_else(|| Failed::new(format!("no phase {name:?}"), "see SPEC.md"))?);
    }
    Ok(options)
}

async fn network(args: &ServeArgs, first_user: Option<u32>) -> Result<NetworkOptions, Failed> {
    let uplink = match args.uplink.as_str() {
        "none" => None,
        // A host without a default route leads nowhere.
        "auto" => net::default_uplink().await.map_err(|error| Failed::other(&error))?,
        name => Some(name.to_owned()),
    };
    Ok(NetworkOptions {
        uplink,
        range: args.slot_range,
        slots: args.slots,
        bandwidth_mbit: args.sandbox_bandwidth,
        max_connections: args.sandbox_connections,
        resolver: args.resolver,
        program: std::env::current_exe().map_err(|error| Failed::other(&error))?,
        // Below the machines' own users.
        user: first_user.map(|first| first - 1),
    })
}

/// Takes the data directory for this process alone.
fn lock(data_dir: &Path) -> Result<std::fs::File, Failed> {
    let failed = |error: std::io::Error| {
        Failed::new(
            format!("{}: {error}", data_dir.display()),
            "name a directory that can be written with --data-dir",
        )
    };
    std::fs::create_dir_all(data_dir.join("run")).map_err(failed)?;
    let file = std::fs::File::create(data_dir.join("run/lock")).map_err(failed)?;
    // A record lock: with `flock`, a child between `fork` and `exec` would hold it for a server that has just died. It
    // ends when any descriptor of the file is closed: nothing else here opens it.
    rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        Failed::new(
            format!("another server uses {}", data_dir.display()),
            "stop it, or name another directory with --data-dir",
        )
    })?;
    Ok(file)
}

/// Logs to standard error.
pub fn start_log() {
    let filter = EnvFilter::try_from_env("KELVIN_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colour = std::io::IsTerminal::is_terminal(&std::io::stderr())
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colour)
        .with_target(false)
        .init();
}

/// Runs the server until a signal.
pub async fn run(args: ServeArgs) -> Result<(), Failed> {
    start_log();
    // Before anything is made: a server that is told to stop while it starts does not leave its helper behind.
    let mut stop = Stop::listen()?;
    kelvin_host::process::allow_descriptors();
    let options = options(&args).await?;
    let data_dir = options.data_dir.clone();
    let lock = lock(&data_dir)?;
    // Bound before anything is made: a port that is taken must cost nothing.
    let listener = tokio::net::TcpListener::bind(args.listen).await.map_err(|error| {
        Failed::new(format!("{}: {error}", args.listen), "name another address with --listen")
    })?;
    let address = listener.local_addr().map_err(|error| Failed::other(&error))?;
    let secure = open_tls(&args).await?;
    let absolute = data_dir.canonicalize().map_err(|error| Failed::other(&error))?;
    let (vmm, accelerator) = (args.vmm, options.accelerator);
    let driver = tokio::task::spawn_blocking(move || vmm::open(&vmm, &absolute, accelerator))
        .await
        .map_err(|error| Failed::other(&error))??;
    let node = Node::open(options, driver).await.map_err(|error| Failed::from(Failure::from(error)))?;
    let key_path = node.data_dir().join("api-key");
    let key = ApiKey::open(&key_path).map_err(|error| Failed::other(&error))?;
    let local = Arc::new(Local(node.clone()));
    let as_node = Arc::clone(&local) as Arc<dyn kelvin_control::Node>;
    let control = Control::open(node.data_dir(), as_node, key, args.domain.clone())
        .await
        .map_err(|error| Failed::other(&error))?;
    let owners = control.clone();
    node.ask_before_waking(Box::new(move |id| {
        let owners = owners.clone();
        Box::pin(async move { owners.may_wake(&id).await })
    }));
    let gateway = Gateway::new(local, args.domain.as_deref().unwrap_or("localhost"));
    let info = node.info().await.map_err(|error| Failed::other(&error))?;
    if !info.reflink {
        tracing::warn!(
            "the data directory cannot clone files: every disk is COPIED; `kelvin setup` makes one that can"
        );
    }
    match (&info.network, &info.no_network) {
        (Some(network), _) => {
            let uplink = network.uplink.as_deref().unwrap_or("none");
            tracing::info!(range = network.range, uplink, "network");
            if let (Some(_), Ok(Some(chain))) = (&network.uplink, net::foreign_drop().await) {
                tracing::warn!(
                    chain,
                    "another firewall drops what is forwarded; `kelvin doctor` says what to do"
                );
            }
        }
        (None, reason) => {
            tracing::warn!(reason, "sandboxes have no network; `kelvin doctor` says what it needs")
        }
    }
    tracing::info!(url = %format!("http://{address}"), data_dir = %data_dir.display(), vmm = info.vmm,
        accelerator = info.accelerator, api_key = %key_path.display(), "ready");
    if !address.ip().is_loopback() {
        tracing::warn!(%address, "others can reach this address, and neither keys nor data are encrypted: put TLS in front");
    }
    announce(&data_dir, &address.to_string())?;
    crate::notify::ready();
    let router = control.router();
    let front = gateway.clone();
    let service = service_fn(move |request: Request<Body>| {
        let (router, gateway) = (router.clone(), front.clone());
        async move {
            match gateway.forward(request).await {
                Ok(reply) => Ok::<Response, Infallible>(reply),
                Err(request) => tower::ServiceExt::oneshot(router, request).await,
            }
        }
    });
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY");
        }
    });
    let stopping = async {
        stop.told().await;
        tracing::info!("stopping; sandboxes keep running");
    };
    let plain = axum::serve(listener, tower::make::Shared::new(service.clone()));
    let encrypted = async {
        let Some(listener) = secure else {
            return std::future::pending().await;
        };
        let service = service_fn(move |mut request: Request<Body>| {
            request.extensions_mut().insert(Secure);
            tower::Service::call(&mut service.clone(), request)
        });
        axum::serve(listener, tower::make::Shared::new(service)).await
    };
    tokio::select! {
        served = async { plain.await } => served.map_err(|error| Failed::other(&error))?,
        served = encrypted => served.map_err(|error| Failed::other(&error))?,
        () = stopping => {}
    }
    gateway.stop().await;
    control.stop().await;
    node.stop().await;
    let _ = std::fs::remove_file(data_dir.join("run/server.json"));
    drop(lock);
    Ok(())
}

/// The listener with TLS, when one is wanted.
async fn open_tls(args: &ServeArgs) -> Result<Option<tls::Tls>, Failed> {
    let (Some(address), Some(certificate), Some(key)) = (args.tls_listen, &args.tls_cert, &args.tls_key)
    else {
        return Ok(None);
    };
    let config = tls::config(certificate, key)
        .map_err(|error| Failed::new(error.to_string(), "name a certificate chain and its key, both PEM"))?;
    let listener = tokio::net::TcpListener::bind(address).await.map_err(|error| {
        Failed::new(format!("{address}: {error}"), "name another address with --tls-listen")
    })?;
    let bound = listener.local_addr().map_err(|error| Failed::other(&error))?;
    tracing::info!(url = %format!("https://{bound}"), "TLS");
    tls::Tls::new(listener, config).map(Some).map_err(|error| Failed::other(&error))
}

/// Tells scripts where the server is, once it answers.
fn announce(data_dir: &Path, address: &str) -> Result<(), Failed> {
    let write = || -> std::io::Result<()> {
        let path = data_dir.join("run/server.json");
        let fresh = path.with_extension("new");
        let body = serde_json::json!({ "pid": std::process::id(), "url": format!("http://{address}") });
        std::fs::write(&fresh, body.to_string())?;
        std::fs::rename(fresh, path)
    };
    write().map_err(|error| Failed::other(&error))
}

/// What tells the server to stop.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    /// From now on a signal is kept until [`Stop::told`], instead of ending the process with what it has made.
    fn listen() -> Result<Self, Failed> {
        let listen = |kind| signal(kind).map_err(|error| Failed::other(&error));
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn told(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
