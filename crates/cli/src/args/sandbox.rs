//! Sandboxes and what is kept of them: `kelvin run`, `kelvin sandbox`, `kelvin snapshot`.

use clap::{Args, Subcommand, ValueEnum};

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

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not NAME=VALUE")),
    }
}
