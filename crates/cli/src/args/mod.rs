//! The command line. Arguments of sandboxes and of the server have files of their own.

mod sandbox;
mod server;
mod template;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use sandbox::{EgressArgs, MachineArgs, ProcessArgs, RunArgs, SandboxCommand, SnapshotCommand};
pub use server::{DoctorArgs, ServeArgs, SetupArgs, VmmArg, VmmArgs};
pub use template::{BuildArgs, DockerfileArgs, FromArgs, StepArgs, StepKind};

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
    /// Show what became of sandboxes, also of those that are no more, oldest first.
    Events {
        /// Only of this sandbox.
        #[arg(long, value_name = "ID")]
        sandbox: Option<String>,
        /// Only behind this event: the number of the last one that was seen.
        #[arg(long, value_name = "NUMBER", default_value_t = 0)]
        after: i64,
        /// How many, at most 1000.
        #[arg(long, short = 'n', default_value_t = 1000, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=1000))]
        limit: usize,
    },
    /// Show who changed what, newest first; needs the server's own key.
    Audit {
        /// How many entries.
        #[arg(long, short = 'n', default_value_t = 100)]
        limit: usize,
    },
    /// List, build, import and bake templates.
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

#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// List the templates, their versions and tags.
    #[command(alias = "ls")]
    List,
    /// Show a version of a template: what it is made of, and what it takes on the disk.
    Info {
        /// Its name, with an optional `:tag` or `:BUILD`.
        name: String,
    },
    /// Have tags name a version of a template, all in one step; `default` is what the name alone means. Sandboxes of what they
    /// named before go on.
    Tag {
        /// Name of the template, with an optional `:tag` or `:BUILD`.
        name: String,
        /// The tags.
        #[arg(required = true, value_name = "TAG")]
        tags: Vec<String>,
        /// Take the tags away instead. A version that no tag names is removed after a day.
        #[arg(long)]
        remove: bool,
    },
    /// Build a template of a Dockerfile, or of an image or another template and steps over it. Ctrl-C cancels the build.
    Build(Box<BuildArgs>),
    /// Show the builds of a template, newest first.
    Builds {
        /// Its name.
        name: String,
    },
    /// Show what a build said.
    Logs {
        /// Id of the build.
        build: String,
        /// Go on until it has ended.
        #[arg(long, short)]
        follow: bool,
    },
    /// Give a build up.
    Cancel {
        /// Id of the build.
        build: String,
    },
    /// Delete a template that was built, or a version of it. Sandboxes and snapshots of it stay.
    #[command(alias = "rm")]
    Delete {
        /// Its name; with `:tag` the tag, and the version when no other names it; with `:BUILD` that version.
        name: String,
    },
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
    /// Make a template of a root file system, a kernel and an initial RAM disk. The server does it, with files of its
    /// machine.
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
        /// Data directory, to import into it before there is a server; of one that has a server, that server is asked.
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

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Builds of templates, cold and again; pull and unpack beside skopeo and umoci; clones of what was built. Needs the
    /// server's own key, on its machine.
    Build(kelvin_bench::build::Args),
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
