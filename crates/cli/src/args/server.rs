//! The server and its machine: `kelvin serve`, `kelvin setup`, `kelvin doctor`.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use kelvin_host::accel::Accelerator;
use kelvin_host::net::Range;
use kelvin_vmm::firecracker::config::HugePages;

#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1:7400")]
    pub listen: SocketAddr,
    /// Data directory [default: /var/lib/kelvin for root, ~/.local/share/kelvin otherwise].
    #[arg(long, env = "KELVIN_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// Force an accelerator: kvm or tcg.
    #[arg(long)]
    pub accel: Option<Accelerator>,
    #[command(flatten)]
    pub vmm: VmmArgs,
    /// Memory for machines in MiB [default: 85 % of this host's].
    #[arg(long)]
    pub memory_mib: Option<u32>,
    /// vCPUs to give out [default: 64 for each processor].
    #[arg(long)]
    pub vcpus: Option<u32>,
    /// VMMs to keep waiting for each baked shape.
    #[arg(long, default_value_t = 8)]
    pub waiting_vmms: u32,
    /// Warm machines of each template that are always there.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub warm_min: u32,
    /// The most warm machines of each template; between the two, demand decides. 0 makes none.
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub warm_max: u32,
    /// Seconds after which a warm machine that nobody claimed is replaced.
    #[arg(long, default_value_t = 1800, value_parser = clap::value_parser!(u64).range(1..), value_name = "S")]
    pub warm_max_age: u64,
    /// Memory for warm machines of all templates in MiB [default: 20 % of this host's].
    #[arg(long)]
    pub warm_memory_mib: Option<u32>,
    /// Restores at one time [default: one for each processor].
    #[arg(long)]
    pub concurrent_restores: Option<usize>,
    /// How long a machine may take to boot, in seconds, with what its image starts.
    #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u64).range(1..=3600), value_name = "S")]
    pub boot_deadline: u64,
    /// Link that sandboxes reach the internet over: `auto` (that of the default route), `none`, or a name.
    #[arg(long, default_value = "auto")]
    pub uplink: String,
    /// Network slots to keep ready.
    #[arg(long, default_value_t = 32)]
    pub slots: usize,
    /// Addresses of the slots, a private /16 [default: the first free from 10.213.0.0/16 on].
    #[arg(long, value_name = "CIDR")]
    pub slot_range: Option<Range>,
    /// Resolver that answers the sandboxes' questions [default: the first in /etc/resolv.conf].
    #[arg(long, value_name = "ADDRESS")]
    pub resolver: Option<SocketAddr>,
    /// The most megabits per second of one sandbox, each way [default: no limit].
    #[arg(long, value_name = "MBIT")]
    pub sandbox_bandwidth: Option<u32>,
    /// The most connections out of one sandbox.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub sandbox_connections: u32,
    /// Give no sandbox a network.
    #[arg(long)]
    pub no_network: bool,
    /// Domain of the sandboxes' ports, `<port>-<id>.<domain>`, as clients have to use it (may have a port). Needs a
    /// wildcard name. Without it `localhost` is understood and none is told to clients.
    #[arg(long)]
    pub domain: Option<String>,
    /// Address to listen on with TLS, for HTTP/2 and HTTP/1.1.
    #[arg(long, requires = "tls_cert", requires = "tls_key", value_name = "ADDRESS")]
    pub tls_listen: Option<SocketAddr>,
    /// Certificate chain for --tls-listen, PEM.
    #[arg(long, requires = "tls_listen", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key, PEM.
    #[arg(long, requires = "tls_listen", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Free MiB on the data directory's file system below which nothing is created, paused or forked.
    #[arg(long, default_value_t = 1024)]
    pub disk_floor_mib: u64,
    /// Builds of templates that run at one time; others wait for their turn.
    #[arg(long, default_value_t = 2, value_parser = at_least_one(), value_name = "N")]
    pub max_builds: usize,
    /// The largest upload for a build, in bytes.
    #[arg(long, default_value_t = 4 << 30, value_parser = clap::value_parser!(u64).range(1..), value_name = "BYTES")]
    pub max_upload_bytes: u64,
    /// Where images of a registry are asked for first: `docker.io=https://mirror.example`; without TLS on loopback alone. May be
    /// given again for another registry.
    #[arg(long, value_name = "HOST=URL", value_parser = mirror)]
    pub registry_mirror: Vec<String>,
    /// Docker's configuration, whose credentials and credential helpers pull images, for every project that names none of its own
    /// [default: none is read].
    #[arg(long, value_name = "FILE")]
    pub docker_config: Option<PathBuf>,
    /// Bytes of the cache of images' layers [default: the node's].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..), value_name = "BYTES")]
    pub image_cache: Option<u64>,
    /// Do not bake what a cold create found missing.
    #[arg(long)]
    pub no_auto_bake: bool,
    /// For tests: kill the server when a create enters this phase.
    #[arg(long, hide = true)]
    pub crash_at: Option<String>,
}

/// What connections to the server may take, on both listeners.
#[derive(Debug, Args)]
pub struct LimitArgs {
    /// The most connections at one time, of both listeners; never more than half of the file descriptors. One more gets
    /// 503 `too_many_connections`.
    #[arg(long, default_value_t = 10_000, value_parser = at_least_one(), value_name = "N")]
    pub max_connections: usize,
    /// The most connections of one address, or of one IPv6 /64; loopback has no limit of its own. One more gets 429
    /// `too_many_connections_of_address`. Raise it for a proxy on another host.
    #[arg(long, default_value_t = 2048, value_parser = at_least_one(), value_name = "N")]
    pub max_connections_per_address: usize,
    /// Seconds in which a request's head has to come.
    #[arg(long, default_value_t = 30, value_parser = seconds(), value_name = "S")]
    pub header_timeout: u64,
    /// Seconds in which the next bytes of a request's body have to come; then 408 `request_timeout`. Streams are exempt.
    #[arg(long, default_value_t = 60, value_parser = seconds(), value_name = "S")]
    pub body_timeout: u64,
    /// Seconds after which a connection without a request is closed. Open streams and upgraded connections have one.
    #[arg(long, default_value_t = 75, value_parser = seconds(), value_name = "S")]
    pub idle_timeout: u64,
    /// Seconds after which a connection is closed whose reply is not read. Streams are exempt.
    #[arg(long, default_value_t = 300, value_parser = seconds(), value_name = "S")]
    pub unread_timeout: u64,
}

/// A kind of VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum VmmArg {
    /// Firecracker where there is KVM, root and a binary of it, else QEMU.
    Auto,
    /// QEMU, emulated where there is no KVM.
    Qemu,
    /// Firecracker.
    Firecracker,
}

/// What runs the machines.
#[derive(Debug, Args)]
pub struct VmmArgs {
    /// What runs the machines.
    #[arg(long, value_enum, default_value = "auto", env = "KELVIN_VMM")]
    pub vmm: VmmArg,
    /// Firecracker's binary [default: the first in PATH].
    #[arg(long, env = "KELVIN_FIRECRACKER", value_name = "FILE")]
    pub firecracker: Option<PathBuf>,
    /// Huge pages behind the machines' memory, Firecracker 1.17 and newer: none or transparent.
    #[arg(long, default_value = "none", value_parser = str::parse::<HugePages>)]
    pub huge_pages: HugePages,
    /// Firecracker's static CPU template, which hides what processors of one family differ in: T2, T2S, T2CL, T2A or
    /// C3. Snapshots are restored on their own kind of processor alone, whichever it is.
    #[arg(long, value_name = "NAME")]
    pub cpu_template: Option<String>,
    /// The most MiB per second to and from the disk of one sandbox, Firecracker alone [default: no limit].
    #[arg(long, value_name = "MIB")]
    pub sandbox_disk_bandwidth: Option<NonZeroU32>,
    /// The same in operations.
    #[arg(long, value_name = "N")]
    pub sandbox_disk_iops: Option<NonZeroU32>,
    /// The monotonic clock of a restored sandbox has gone on while it was frozen, Firecracker alone; otherwise it stood
    /// still, and timers go on where they were.
    #[arg(long)]
    pub clock_goes_on: bool,
}

#[derive(Debug, Args)]
pub struct SetupArgs {
    /// Data directory to make.
    #[arg(long, env = "KELVIN_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// Size of the file system, when one has to be made; it takes only what is written.
    #[arg(long, default_value_t = 64)]
    pub size_gib: u64,
    /// Unmount it instead. Files stay.
    #[arg(long)]
    pub unmount: bool,
    /// Change the kernel's settings that cost every start of a machine under KVM something, until the next boot,
    /// instead of making a directory. `kelvin doctor` shows them.
    #[arg(long, conflicts_with = "unmount")]
    pub tune: bool,
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Data directory to look at.
    #[arg(long, env = "KELVIN_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// Firecracker's binary [default: the first in PATH].
    #[arg(long, env = "KELVIN_FIRECRACKER", value_name = "FILE")]
    pub firecracker: Option<PathBuf>,
}

/// A registry and its mirror. What they have to be beyond that, the node says.
fn mirror(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((host, url)) if !host.is_empty() && url.contains("://") => Ok(text.to_owned()),
        _ => Err("it is no HOST=URL, for example docker.io=https://mirror.example".to_owned()),
    }
}

fn seconds() -> clap::builder::RangedU64ValueParser<u64> {
    clap::value_parser!(u64).range(1..=86_400)
}

fn at_least_one() -> clap::builder::RangedU64ValueParser<usize> {
    clap::builder::RangedU64ValueParser::new().range(1..)
}
