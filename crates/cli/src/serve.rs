//! `kelvin serve`: control plane, node and gateway in one process, on one listener.
//!
//! One server owns a data directory, by its lock (`lock`).
//! SIGTERM and SIGINT: requests under way end, waiting VMMs are released, sandboxes keep running and are
//! adopted by the next start.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use http::Request;
use kelvin_api::error::Failure;
use kelvin_api::phase::Phase;
use kelvin_api::units::MemoryMib;
use kelvin_control::{ApiKey, BuildOptions, Control};
use kelvin_gateway::listen::{Door, Limits};
use kelvin_gateway::{Secure, tls};
use kelvin_host::clock::Clock;
use kelvin_host::descriptors::{self, Budget};
use kelvin_host::net;
use kelvin_node::Node;
use kelvin_node::options::{NetworkOptions, Options};
use kelvin_server::Server;
use kelvin_vmm::Driver;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_rustls::TlsAcceptor;
use tower::service_fn;
use tracing_subscriber::EnvFilter;

use crate::args::{ServeArgs, data_dir};
use crate::output::Failed;
use crate::{lock, vmm};

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
    options.registry_mirrors = args.registry_mirror.clone();
    options.docker_config = args.docker_config.clone();
    options.image_cache_bytes = args.image_cache.unwrap_or(options.image_cache_bytes);
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
    if let Err(error) = descriptors::raise() {
        tracing::warn!(%error, "the limit of descriptors stays as it is");
    }
    let options = options(&args).await?;
    let data_dir = options.data_dir.clone();
    let lock = lock::take(&data_dir)?.ok_or_else(|| {
        Failed::new(
            format!("another server uses {}", data_dir.display()),
            "stop it, or name another directory with --data-dir; an import into it ends by itself",
        )
    })?;
    // Bound before anything is made: a port that is taken must cost nothing.
    let listener = TcpListener::bind(args.listen).await.map_err(|error| {
        Failed::new(format!("{}: {error}", args.listen), "name another address with --listen")
    })?;
    let address = listener.local_addr().map_err(|error| Failed::other(&error))?;
    let secure = open_tls(&args).await?;
    let absolute = data_dir.canonicalize().map_err(|error| Failed::other(&error))?;
    let limits = limits(&args);
    let (vmm, accelerator) = (args.vmm, options.accelerator);
    let driver = tokio::task::spawn_blocking(move || vmm::open(&vmm, &absolute, accelerator))
        .await
        .map_err(|error| Failed::other(&error))??;
    let builds = BuildOptions { max_builds: args.max_builds, max_upload_bytes: args.max_upload_bytes };
    let (node, server) = open(options, driver, args.domain.as_deref(), builds).await?;
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
        accelerator = info.accelerator, api_key = %key_path(node.data_dir()).display(), "ready");
    if !address.ip().is_loopback() {
        tracing::warn!(%address, "others can reach this address, and neither keys nor data are encrypted: put TLS in front");
    }
    lock.announce(&address.to_string()).map_err(|error| Failed::other(&error))?;
    crate::notify::ready();
    let service = server.service();
    let door = Door::new(limits, Arc::new(descriptor));
    let stopping = async {
        stop.told().await;
        tracing::info!("stopping; sandboxes keep running");
    };
    let plain = Arc::clone(&door).serve(listener, None, service.clone());
    let encrypted = async {
        let Some((listener, acceptor)) = secure else {
            return std::future::pending().await;
        };
        let service = service_fn(move |mut request: Request<Body>| {
            request.extensions_mut().insert(Secure);
            tower::Service::call(&mut service.clone(), request)
        });
        Arc::clone(&door).serve(listener, Some(acceptor), service).await
    };
    tokio::select! {
        () = plain => {}
        () = encrypted => {}
        () = stopping => {}
    }
    door.close();
    server.stop().await;
    lock.release();
    Ok(())
}

fn key_path(data_dir: &Path) -> PathBuf {
    data_dir.join("api-key")
}

/// The node, and the rest over it.
async fn open(
    options: Options,
    driver: Arc<dyn Driver>,
    domain: Option<&str>,
    builds: BuildOptions,
) -> Result<(Node, Server), Failed> {
    let data_dir = options.data_dir.clone();
    let clock = Clock::system().map_err(|error| Failed::other(&error))?;
    Control::prepare(&data_dir, clock).map_err(|error| Failed::other(&error))?;
    let node = Node::open(options, driver).await.map_err(|error| Failed::from(Failure::from(error)))?;
    let opened = match ApiKey::open(&key_path(node.data_dir())) {
        Ok(key) => {
            Server::open(node.clone(), key, domain, builds).await.map_err(|error| Failed::other(&error))
        }
        Err(error) => Err(Failed::other(&error)),
    };
    match opened {
        Ok(server) => Ok((node, server)),
        Err(failed) => {
            // What it has started for its pools ends with it; sandboxes keep running.
            node.stop().await;
            Err(failed)
        }
    }
}

/// The listener with TLS, when one is wanted.
async fn open_tls(args: &ServeArgs) -> Result<Option<(TcpListener, TlsAcceptor)>, Failed> {
    let (Some(address), Some(certificate), Some(key)) = (args.tls_listen, &args.tls_cert, &args.tls_key)
    else {
        return Ok(None);
    };
    let acceptor = tls::acceptor(certificate, key)
        .map_err(|error| Failed::new(error.to_string(), "name a certificate chain and its key, both PEM"))?;
    let listener = TcpListener::bind(address).await.map_err(|error| {
        Failed::new(format!("{address}: {error}"), "name another address with --tls-listen")
    })?;
    let bound = listener.local_addr().map_err(|error| Failed::other(&error))?;
    tracing::info!(url = %format!("https://{bound}"), "TLS");
    Ok(Some((listener, acceptor)))
}

/// What connections may take. Those of clients get half of the descriptors at the most: the other half is for machines
/// and for the connections into them.
fn limits(args: &ServeArgs) -> Limits {
    let half = usize::try_from(Budget::of_process().usable() / 2).unwrap_or(usize::MAX);
    let connections = args.limits.max_connections.min(half);
    if connections < args.limits.max_connections {
        tracing::warn!(
            connections,
            "fewer connections than --max-connections says: half of the limit of file descriptors (ulimit -n)"
        );
    }
    Limits {
        connections,
        per_address: args.limits.max_connections_per_address,
        header: Duration::from_secs(args.limits.header_timeout),
        body: Duration::from_secs(args.limits.body_timeout),
        idle: Duration::from_secs(args.limits.idle_timeout),
        unread: Duration::from_secs(args.limits.unread_timeout),
    }
}

/// Asks for the descriptor of a connection, which is open already.
fn descriptor() -> Result<(), Failure> {
    match Budget::of_process().take(descriptors::CONNECTION) {
        Ok(_open) => Ok(()),
        Err(error) => Err(kelvin_node::no_descriptors(&error)),
    }
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
