//! Settings of a node, checked before it starts.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use kelvin_api::id::TemplateName;
use kelvin_api::network::Attachment;
use kelvin_api::phase::Phase;
use kelvin_api::units::MemoryMib;
use kelvin_host::accel::Accelerator;
use kelvin_host::clock::Clock;
use kelvin_host::net::Range;

pub use crate::pool::policy::Rule;

/// Everything a node can be told.
#[derive(Debug, Clone)]
pub struct Options {
    /// The data directory.
    pub data_dir: PathBuf,
    /// How guest instructions are run.
    pub accelerator: Accelerator,
    /// Memory for machines, overhead included.
    pub memory: MemoryMib,
    /// vCPUs that may be given out, more than there are processors: most machines wait most of the time.
    pub vcpus: u32,
    /// The most vCPUs of one machine.
    pub max_vcpus_each: u32,
    /// Free space on the data directory's file system below which nothing is created.
    pub disk_floor_mib: u64,
    /// VMMs that wait for each baked shape.
    pub waiting_vmms: u32,
    /// Restores that run at one time: each is bound to a processor, so more of them only finish later.
    pub concurrent_restores: usize,
    /// From the start of a kernel to the agent's first answer.
    pub boot_deadline: Duration,
    /// For the agent's reply to an activation.
    pub activate_deadline: Duration,
    /// The first of the user ids that VMMs drop to; `None` keeps the daemon's user.
    pub first_user: Option<u32>,
    /// Networks; `None` for a node that gives none.
    pub network: Option<NetworkOptions>,
    /// What is wanted of warm machines of templates for which nothing else was said.
    pub warm: Rule,
    /// Memory for warm machines of all templates.
    pub warm_memory: MemoryMib,
    /// Whether a cold create is followed by a bake of what was missing.
    pub auto_bake: bool,
    /// Other places of registries, as `docker.io=https://mirror`; `http` for loopback alone.
    pub registry_mirrors: Vec<String>,
    /// Docker's `config.json`, whose credentials and helpers are asked for registries; `None` asks nobody.
    pub docker_config: Option<PathBuf>,
    /// What is kept of images that were pulled, in bytes.
    pub image_cache_bytes: u64,
    /// What is kept of disks after steps of builds, in bytes; what several of them share counts for each. Less is kept when less
    /// than twice `disk_floor_mib` is free beside it, and of uploads, too.
    pub layer_cache_bytes: u64,
    /// The largest upload for a build, in bytes.
    pub upload_bytes: u64,
    /// What is kept of uploads, in bytes.
    pub upload_cache_bytes: u64,
    /// The template whose kernel and agent are those of templates that are made of images; when there is none of that name, any
    /// is asked.
    pub build_guest_from: TemplateName,
    /// What commands of builds may reach, where the node has networks; `None` for nothing at all.
    pub build_network: Option<Attachment>,
    /// What lifetimes count on; `None` is the host's own clocks.
    pub clock: Option<Clock>,
    /// For tests: the daemon kills itself when a create enters this phase.
    pub crash_at: Option<Phase>,
}

/// Settings of the node's networks.
#[derive(Debug, Clone)]
pub struct NetworkOptions {
    /// The link that leads out; `None` leads nowhere.
    pub uplink: Option<String>,
    /// Addresses of the slots; `None` finds a free range.
    pub range: Option<Range>,
    /// Slots that are kept ready.
    pub slots: usize,
    /// Megabits per second of one sandbox, each way.
    pub bandwidth_mbit: Option<u32>,
    /// Connections out of one sandbox.
    pub max_connections: u32,
    /// Where the guests' questions are sent; `None` is the host's own resolver.
    pub resolver: Option<SocketAddr>,
    /// The program that has the subcommand `egress`: this one.
    pub program: PathBuf,
    /// The user of the egress process.
    pub user: Option<u32>,
}

/// Memory that a VMM needs beside its guest's.
pub const OVERHEAD: MemoryMib = MemoryMib(48);
/// The least memory of a machine: below it the kernel does not boot with its modules.
pub const MIN_MEMORY: MemoryMib = MemoryMib(128);

/// The template that a node is set up with.
fn base_template() -> TemplateName {
    // It is a name.
    "base".parse().unwrap_or_else(|_| unreachable!())
}

impl Options {
    /// Defaults for this host: 85 % of its memory, 64 vCPUs for each processor.
    pub fn for_host(data_dir: PathBuf) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let count = u32::try_from(processors).unwrap_or(u32::MAX);
        let total_mib = rustix::system::sysinfo().totalram >> 20;
        Self {
            data_dir,
            accelerator: kelvin_host::accel::detect().accelerator,
            memory: MemoryMib(u32::try_from(total_mib * 85 / 100).unwrap_or(u32::MAX)),
            vcpus: count.saturating_mul(64),
            max_vcpus_each: count,
            disk_floor_mib: 1024,
            waiting_vmms: 8,
            concurrent_restores: processors,
            boot_deadline: Duration::from_secs(90),
            activate_deadline: Duration::from_secs(15),
            first_user: rustix::process::geteuid().is_root().then_some(1_795_162_112),
            network: None,
            warm: Rule { min: 0, max: 8, max_age_s: 1800 },
            warm_memory: MemoryMib(u32::try_from(total_mib * 20 / 100).unwrap_or(u32::MAX)),
            auto_bake: true,
            registry_mirrors: Vec::new(),
            docker_config: None,
            image_cache_bytes: 20 << 30,
            layer_cache_bytes: 100 << 30,
            upload_bytes: 4 << 30,
            upload_cache_bytes: 20 << 30,
            build_guest_from: base_template(),
            build_network: Some(Attachment::default()),
            clock: None,
            crash_at: None,
        }
    }
}
