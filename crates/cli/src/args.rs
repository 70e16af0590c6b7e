//! The command line.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use kelvin_host::accel::Accelerator;
use kelvin_host::net::Range;
use kelvin_vmm::firecracker::config::HugePages;

/// Ready Linux machines in milliseconds: microVMs that are restored, not booted.
#[derive(Debug, Parser)]
#[command(name = "kelvin", version, propagate_version = true)]
pub struct Cli {
    #[command(flatten)]
    pub connection: Connection,
    /// How to print results.
    #[arg(long, short, global = true, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    #[command(subcommand)]
    pub command: Command,
}

/// Where the server is. Flags first, then the environment (KELVIN_API_URL, KELVIN_API_KEY, E2B_API_URL,
/// E2B_API_KEY), then ~/.config/kelvin/config.toml.
#[derive(Debug, Args)]
pub struct Connection {
    /// URL of the server [default: http://127.0.0.1:7400].
    #[arg(long, global = true, value_name = "URL")]
    pub api_url: Option<String>,
    /// API key. Other users of this machine can see it: prefer the environment or --api-key-file.
    #[arg(long, global = true, value_name = "KEY")]
    pub api_key: Option<String>,
    /// File that holds the API key.
    #[arg(long, global = true, value_name = "FILE", conflicts_with = "api_key")]
    pub api_key_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs; stable.
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command in a fresh sandbox, which is gone afterwards.
    Run(RunArgs),
    /// Create, list and use sandboxes.
    #[command(alias = "sb")]
    Sandbox {
        #[command(subcommand)]
        command: SandboxCommand,
    },
    /// List and delete the snapshots of sandboxes that are kept; `sandbox create --template` takes one.
    Snapshot {
        #[command(subcommand)]
        command: SnapshotCommand,
    },
    /// Show the machines that wait for creates, and say how many there should be.
    Pool {
        #[command(subcommand)]
        command: PoolCommand,
    },
    /// Make, list and revoke API keys; needs the server's own.
    Key {
        #[command(subcommand)]
        command: KeyCommand,
    },
    /// Show projects and what they use, and set what they may have; needs the server's own key.
    Project {
        #[command(subcommand)]
        command: ProjectCommand,
    },
    /// Show who changed what, newest first; needs the server's own key.
    Audit {
        /// How many entries.
        #[arg(long, short = 'n', default_value_t = 100)]
        limit: usize,
    },
    /// List, import and bake templates.
    Template {
        #[command(subcommand)]
        command: TemplateCommand,
    },
    /// Run the server.
    Serve(Box<ServeArgs>),
    /// The process that answers guests by name; started by the server.
    #[command(hide = true)]
    Egress {
        /// Settings, JSON.
        #[arg(long)]
        options: String,
        /// How a server of a former version, which may still run when this is installed, finds its process again.
        #[arg(long, hide = true)]
        marker: Option<String>,
    },
    /// Starts a VMM in its jail; used by the server.
    #[command(hide = true)]
    Jail,
    /// Show what runs on the node and what is left.
    Node,
    /// Remove snapshots, images and guests that nothing needs.
    Gc {
        /// Only say what would be removed.
        #[arg(long)]
        dry_run: bool,
    },
    /// Check every prerequisite and say how to get what is missing.
    Doctor(DoctorArgs),
    /// Make a data directory whose file system can clone files.
    Setup(SetupArgs),
    /// Measure.
    Bench {
        #[command(subcommand)]
        command: BenchCommand,
    },
    /// Print a completion script.
    Completion {
        /// For which shell.
        shell: clap_complete::Shell,
    },
    /// Write the manual pages; for packages.
    #[command(hide = true)]
    Man {
        /// Where.
        directory: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct MachineArgs {
    /// Template of the sandbox; or a snapshot, by id or name.
    #[arg(long, short, default_value = "base")]
    pub template: String,
    /// Memory in MiB, instead of the template's.
    #[arg(long)]
    pub memory_mib: Option<u64>,
    /// vCPUs, instead of the template's.
    #[arg(long)]
    pub cpus: Option<u32>,
    /// Insist on a start path.
    #[arg(long, value_enum)]
    pub path: Option<PathArg>,
    /// No network at all.
    #[arg(long, conflicts_with_all = ["allow_out", "deny_out", "no_internet", "private_ports", "mask_host"])]
    pub no_network: bool,
    #[command(flatten)]
    pub egress: EgressArgs,
    /// Ports can be reached with the sandbox's traffic token only.
    #[arg(long)]
    pub private_ports: bool,
    /// The `Host` that servers in the sandbox see; `${PORT}` stands for the port.
    #[arg(long, value_name = "HOST")]
    pub mask_host: Option<String>,
}

/// What happens without being asked for.
#[derive(Debug, Args)]
pub struct LifecycleArgs {
    /// Pause it at the end of its time instead of killing it.
    #[arg(long)]
    pub auto_pause: bool,
    /// Resume it when somebody connects to it while it is paused.
    #[arg(long)]
    pub auto_resume: bool,
}

#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// Show every pool.
    #[command(alias = "ls")]
    List,
    /// Set what is wanted of the warm machines of a template; what is left out stays.
    Set {
        /// Its name.
        template: String,
        /// Machines that are always there.
        #[arg(long)]
        min: Option<u32>,
        /// The most; 0 makes none, the same as --min a fixed number.
        #[arg(long)]
        max: Option<u32>,
        /// Seconds after which one that nobody claimed is replaced.
        #[arg(long, value_name = "S")]
        max_age: Option<u64>,
    },
}

#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// List them.
    #[command(alias = "ls")]
    List,
    /// Read all of them and compare it with what was taken: exit code 1 when one is damaged.
    Verify {
        /// Their ids, or names, of which the newest is meant.
        #[arg(required_unless_present = "all")]
        names: Vec<String>,
        /// Every snapshot that is kept.
        #[arg(long, conflicts_with = "names")]
        all: bool,
    },
    /// Delete one, by id or name.
    #[command(alias = "rm")]
    Delete {
        /// Its id, or a name, of which the newest is meant.
        name: String,
        /// And those that descend from it. Sandboxes are never ended for it.
        #[arg(long)]
        cascade: bool,
    },
}

/// What a sandbox may reach.
#[derive(Debug, Args)]
pub struct EgressArgs {
    /// Address, CIDR block or domain that the sandbox may reach, before anything is denied; may be repeated.
    #[arg(long, value_name = "TARGET")]
    pub allow_out: Vec<String>,
    /// Address or CIDR block that the sandbox may not reach; may be repeated.
    #[arg(long, value_name = "BLOCK")]
    pub deny_out: Vec<String>,
    /// Deny everything that is not allowed.
    #[arg(long)]
    pub no_internet: bool,
    /// Megabits per second, each way.
    #[arg(long, value_name = "MBIT")]
    pub bandwidth: Option<u32>,
    /// Connections out of the sandbox at one time.
    #[arg(long, value_name = "N")]
    pub max_connections: Option<u32>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum PathArg {
    /// Boot.
    Cold,
    /// Restore a snapshot.
    Clone,
    /// Claim a machine that waits, restored and answering.
    Warm,
}

impl From<PathArg> for kelvin_api::sandbox::StartPath {
    fn from(path: PathArg) -> Self {
        match path {
            PathArg::Cold => Self::Cold,
            PathArg::Clone => Self::Clone,
            PathArg::Warm => Self::Warm,
        }
    }
}

#[derive(Debug, Args)]
pub struct ProcessArgs {
    /// User to run as [default: user].
    #[arg(long, short)]
    pub user: Option<String>,
    /// Working directory, instead of the user's home.
    #[arg(long, short = 'w')]
    pub cwd: Option<String>,
    /// Environment variable; may be repeated.
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = pair)]
    pub env: Vec<(String, String)>,
    /// Feed standard input to the command.
    #[arg(long, short)]
    pub interactive: bool,
}

#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a key and print it: it is told this once.
    Create {
        /// What it is called.
        name: String,
        /// Whose it is; a project that is not there yet is made. Projects do not see each other's sandboxes.
        #[arg(long, default_value = "default")]
        project: String,
        /// Sandboxes of it that may run at one time.
        #[arg(long)]
        max_sandboxes: Option<u32>,
        #[command(flatten)]
        limits: MoreLimits,
        /// Requests per second of it.
        #[arg(long)]
        requests_per_second: Option<u32>,
    },
    /// List them; none is shown.
    List,
    /// Revoke a key: its next request is refused. Sandboxes stay.
    Revoke {
        /// Its id.
        id: String,
    },
}

/// Limits beside that of sandboxes.
#[derive(Debug, Args)]
pub struct MoreLimits {
    /// Sandboxes that may be made at one time: creates and children of forks under way.
    #[arg(long)]
    pub max_creating: Option<u32>,
    /// Sandboxes that may be paused.
    #[arg(long)]
    pub max_paused: Option<u32>,
    /// Snapshots that may be kept.
    #[arg(long)]
    pub max_snapshots: Option<u32>,
    /// MiB of disk: of sandboxes, and memory and disk of what is paused or kept.
    #[arg(long, value_name = "MIB")]
    pub max_disk_mib: Option<u64>,
}

#[derive(Debug, Subcommand)]
pub enum ProjectCommand {
    /// List them, with what they may have and what they use.
    List,
    /// Set what all keys of a project may have together. What is left out has no limit.
    Limit {
        /// Which project.
        name: String,
        /// Sandboxes that may run.
        #[arg(long)]
        max_sandboxes: Option<u32>,
        #[command(flatten)]
        limits: MoreLimits,
    },
}

#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
    #[command(flatten)]
    pub process: ProcessArgs,
    /// Seconds until the command is ended and the exit code is 124.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_000))]
    pub timeout: u64,
    /// Print how long each phase of the create took, on standard error.
    #[arg(long)]
    pub timing: bool,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum SandboxCommand {
    /// Create a sandbox and print its id.
    Create {
        #[command(flatten)]
        machine: MachineArgs,
        /// Seconds until it is killed, or paused with --auto-pause.
        #[arg(long, default_value_t = 300)]
        timeout: u64,
        #[command(flatten)]
        lifecycle: LifecycleArgs,
        /// Label; may be repeated.
        #[arg(long, short, value_name = "KEY=VALUE", value_parser = pair)]
        metadata: Vec<(String, String)>,
        /// Environment variable of all its processes; may be repeated.
        #[arg(long, short, value_name = "NAME=VALUE", value_parser = pair)]
        env: Vec<(String, String)>,
        /// Repeating a create with the same key gives the same sandbox.
        #[arg(long, value_name = "KEY")]
        idempotency_key: Option<String>,
    },
    /// List the sandboxes.
    #[command(alias = "ls")]
    List {
        /// Only those with this label; may be repeated.
        #[arg(long, short, value_name = "KEY=VALUE", value_parser = pair)]
        metadata: Vec<(String, String)>,
        /// Those of another project, or * for all; needs the server's own key.
        #[arg(long)]
        project: Option<String>,
    },
    /// Show one sandbox.
    Info {
        /// Its id.
        id: String,
    },
    /// Run a command in a sandbox, or attach to one that runs.
    Exec {
        /// Its id.
        id: String,
        #[command(flatten)]
        process: ProcessArgs,
        /// Seconds until the command is ended and the exit code is 124.
        #[arg(long)]
        timeout: Option<u64>,
        /// Start it, print its process id and leave it running.
        #[arg(long, short)]
        detach: bool,
        /// Attach to the process with this id instead of starting one.
        #[arg(long, value_name = "PID", conflicts_with_all = ["detach", "command"])]
        attach: Option<u32>,
        /// The command and its arguments.
        #[arg(last = true, value_name = "CMD", required_unless_present = "attach")]
        command: Vec<String>,
    },
    /// List the processes that were started in a sandbox.
    Ps {
        /// Its id.
        id: String,
    },
    /// Kill sandboxes.
    #[command(alias = "rm")]
    Kill {
        /// Their ids.
        #[arg(required_unless_present = "all", conflicts_with = "all")]
        ids: Vec<String>,
        /// All of them.
        #[arg(long)]
        all: bool,
        /// Only those that run: what is paused is kept.
        #[arg(long, requires = "all")]
        running: bool,
        /// Those of another project, or * for all; needs the server's own key.
        #[arg(long, requires = "all")]
        project: Option<String>,
    },
    /// Freeze sandboxes, with memory, processes and files: they cost disk space and nothing else.
    Pause {
        /// Their ids.
        #[arg(required = true)]
        ids: Vec<String>,
        /// Keep the disk alone: they boot again when they are resumed.
        #[arg(long)]
        disk_only: bool,
    },
    /// Let paused sandboxes go on.
    Resume {
        /// Their ids.
        #[arg(required = true)]
        ids: Vec<String>,
        /// Seconds until they end, or are paused again.
        #[arg(long, default_value_t = 300)]
        timeout: u64,
    },
    /// Make copies of a running sandbox, with memory, processes and files, and print their ids.
    Fork {
        /// Its id.
        id: String,
        /// How many.
        #[arg(long, short = 'n', default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
        count: u32,
        /// Seconds that each lives.
        #[arg(long, default_value_t = 300)]
        timeout: u64,
        /// Label, instead of the source's; may be repeated.
        #[arg(long, short, value_name = "KEY=VALUE", value_parser = pair)]
        metadata: Vec<(String, String)>,
        /// Environment variable of processes that the copies start; may be repeated.
        #[arg(long, short, value_name = "NAME=VALUE", value_parser = pair)]
        env: Vec<(String, String)>,
    },
    /// Show which sandbox was forked from which.
    Tree,
    /// Keep one of the copies of a sandbox and end its siblings.
    Promote {
        /// Its id.
        id: String,
    },
    /// Keep what a running sandbox is now, as something to create others from; print its id.
    Snapshot {
        /// Its id.
        id: String,
        /// Create from it by this name too; the newest of a name counts.
        #[arg(long)]
        name: Option<String>,
    },
    /// Set how long a sandbox may live, from now.
    Timeout {
        /// Its id.
        id: String,
        /// Seconds.
        seconds: u64,
    },
    /// Show what a sandbox may reach and what it was refused; with rules, replace them.
    Network {
        /// Its id.
        id: String,
        #[command(flatten)]
        egress: EgressArgs,
        /// Replace the rules by none: the internet is open.
        #[arg(long, conflicts_with_all = ["allow_out", "deny_out", "no_internet", "bandwidth", "max_connections"])]
        open: bool,
    },
    /// Listen on this machine and forward to ports of a sandbox, until interrupted.
    Forward {
        /// Its id.
        id: String,
        /// Port here, and in the sandbox when it is another: `8080` or `8080:80`; 0 takes a free one.
        #[arg(required = true, value_name = "LOCAL[:REMOTE]")]
        ports: Vec<String>,
        /// Address to listen on.
        #[arg(long, default_value = "127.0.0.1")]
        listen: std::net::IpAddr,
    },
    /// Connect standard input and output to a port of a sandbox, as ssh's ProxyCommand.
    Proxy {
        /// Its id.
        id: String,
        /// Port in the sandbox.
        port: u16,
    },
    /// Print the end of a sandbox's console.
    Logs {
        /// Its id.
        id: String,
    },
    /// Copy a file into or out of a sandbox: `cp FILE ID:PATH` or `cp ID:PATH FILE` (`-` is the standard
    /// input or output).
    Cp {
        /// From.
        source: String,
        /// To.
        target: String,
        /// User whom paths and files belong to [default: user].
        #[arg(long, short)]
        user: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// List the templates.
    #[command(alias = "ls")]
    List,
    /// Make sure that a template has a snapshot, so that its sandboxes are cloned.
    Bake {
        /// Its name.
        name: String,
        /// Memory in MiB, instead of the template's.
        #[arg(long)]
        memory_mib: Option<u64>,
        /// vCPUs, instead of the template's.
        #[arg(long)]
        cpus: Option<u32>,
        /// VMMs to keep waiting for this shape.
        #[arg(long)]
        waiting: Option<u32>,
        /// For sandboxes without a network.
        #[arg(long)]
        no_network: bool,
    },
    /// Make a template of a root file system, a kernel and an initial RAM disk, in a data directory.
    Import {
        /// Its name.
        name: String,
        /// Root file system, ext4.
        #[arg(long)]
        rootfs: PathBuf,
        /// Kernel.
        #[arg(long)]
        kernel: PathBuf,
        /// Initial RAM disk with the agent.
        #[arg(long)]
        initrd: PathBuf,
        /// vCPUs of its machines.
        #[arg(long, default_value_t = 1)]
        cpus: u32,
        /// Memory of its machines, in MiB.
        #[arg(long, default_value_t = 512)]
        memory_mib: u32,
        /// Data directory of the server.
        #[arg(long, env = "KELVIN_DATA_DIR")]
        data_dir: Option<PathBuf>,
    },
    /// Bring the snapshot of a template that is there into a data directory without a server, from the directory of
    /// another: what it is, is verified.
    #[command(hide = true)]
    Adopt {
        /// Its directory, with `manifest.json`.
        snapshot: PathBuf,
        /// Data directory of the server.
        #[arg(long, env = "KELVIN_DATA_DIR")]
        data_dir: Option<PathBuf>,
    },
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

fn seconds() -> clap::builder::RangedU64ValueParser<u64> {
    clap::value_parser!(u64).range(1..=86_400)
}

fn at_least_one() -> clap::builder::RangedU64ValueParser<usize> {
    clap::builder::RangedU64ValueParser::new().range(1..)
}

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
    /// Do not bake what a cold create found missing.
    #[arg(long)]
    pub no_auto_bake: bool,
    /// For tests: kill the server when a create enters this phase.
    #[arg(long, hide = true)]
    pub crash_at: Option<String>,
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

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Create to ready, and create to the end of the first command.
    Create(kelvin_bench::create::Args),
    /// Fork: how long the source stands still, how soon the children answer, what they cost.
    Fork(kelvin_bench::fork::Args),
    /// Pause and resume one sandbox again and again.
    Pause(kelvin_bench::pause::Args),
    /// A bursty load against pools that are off, of a fixed size, and led by demand.
    Pool(kelvin_bench::load::Args),
    /// Create to the end of the first command, with the official Python SDK and with Kelvin's client.
    Sdk(kelvin_bench::sdk::Args),
    /// Network slots: claims from the pool, builds on demand, and that nothing is left of many. Needs root; runs in
    /// a network namespace of its own.
    Slots(kelvin_bench::slots::Args),
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not NAME=VALUE")),
    }
}

/// The data directory of `given`, or the default one.
pub fn data_dir(given: Option<&PathBuf>) -> PathBuf {
    match (given, std::env::var_os("HOME")) {
        (Some(given), _) => given.clone(),
        (None, Some(home)) if !rustix::process::geteuid().is_root() => {
            PathBuf::from(home).join(".local/share/kelvin")
        }
        (None, _) => PathBuf::from("/var/lib/kelvin"),
    }
}
