//! Why the node could not do something.

use kelvin_api::error::{ErrorCode, Failure};

/// An error of the node.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The shape can never be had here.
    #[error("{field} of {asked} is outside {min} to {max}")]
    Shape {
        /// `cpuCount` or `memoryMB`.
        field: &'static str,
        /// What was asked for.
        asked: u64,
        /// The least.
        min: u64,
        /// The most.
        max: u64,
    },
    /// The node has no room now.
    #[error("the node has no room: {asked} {resource} asked, {free} free")]
    Exhausted {
        /// `MiB of memory`, `vCPUs` or `MiB of disk`.
        resource: &'static str,
        /// How much was asked for.
        asked: u64,
        /// How much is free.
        free: u64,
    },
    /// This process has too few descriptors left for something new.
    #[error("{0}")]
    Descriptors(kelvin_host::descriptors::Exhausted),
    /// A sandbox with that id exists.
    #[error("sandbox {0} exists already")]
    Exists(String),
    /// No such sandbox runs here.
    #[error("sandbox {0} was not found")]
    Unknown(String),
    /// Others pause and resume it all the time.
    #[error("sandbox {0} is changed by others all the time")]
    Changing(String),
    /// The path that was insisted on is not possible.
    #[error("the start path {path} is not possible: {reason}")]
    Path {
        /// Which one.
        path: &'static str,
        /// Why not.
        reason: String,
    },
    /// The server has started anew, and the sandbox's VMM does not answer it yet.
    #[error("sandbox {0} is being adopted: its VMM does not answer yet")]
    BeingAdopted(String),
    /// Its record is of another release, or damaged.
    #[error("sandbox {0} is kept as it is: this release cannot read its record")]
    Unreadable(String),
    /// The sandbox is paused.
    #[error("sandbox {0} is paused")]
    Paused(String),
    /// The sandbox is paused, and resumes for who comes.
    #[error("sandbox {0} is paused, and resumes by traffic")]
    Asleep(String),
    /// The guest's agent did not flush and freeze its file system.
    #[error("the agent of sandbox {0} does not answer, and a healthy guest was asked for")]
    Unhealthy(String),
    /// The sandbox runs.
    #[error("sandbox {0} is running")]
    Running(String),
    /// A snapshot cannot be restored on this node.
    #[error("snapshot {snapshot} cannot be restored here: {fields} differ")]
    Incompatible {
        /// Which one.
        snapshot: String,
        /// Fields of its identity.
        fields: String,
    },
    /// A snapshot has what it has.
    #[error("{field} of a snapshot is what it was: {has}, not {asked}")]
    Fixed {
        /// Which field.
        field: &'static str,
        /// What was asked for.
        asked: String,
        /// What it has.
        has: String,
    },
    /// Numbers that contradict each other.
    #[error("a pool has min ≤ max ≤ {most} and a maximum age, not min {min} and max {max}")]
    Rule {
        /// As it would be.
        min: u32,
        /// As it would be.
        max: u32,
        /// The most.
        most: u32,
    },
    /// One at a time.
    #[error("another import of template {0} is under way")]
    Importing(String),
    /// A name that is taken.
    #[error("{0} is the name of a template")]
    NameTaken(String),
    /// The agent does not answer HTTP.
    #[error("the agent of sandbox {sandbox} does not answer")]
    Agent {
        /// Which one.
        sandbox: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The service of a template fails, or is never ready.
    #[error("{what}{}", said.as_ref().map(|said| format!("; its last lines: {said}")).unwrap_or_default())]
    Service {
        /// What went wrong.
        what: String,
        /// The last that it has said.
        said: Option<String>,
    },
    /// A build cannot go on, in its own words.
    #[error("{}", .0.message)]
    Build(Box<Failure>),
    /// No template has that name.
    #[error("no template {0}")]
    NoTemplate(String),
    /// The sandbox, or the node, has no network.
    #[error("{what} has no network{}", reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default())]
    NoNetwork {
        /// `the node` or which sandbox.
        what: String,
        /// Why not.
        reason: Option<String>,
    },
    /// Too many connections into one sandbox.
    #[error("sandbox {sandbox} has {limit} connections already")]
    Busy {
        /// Which one.
        sandbox: String,
        /// The most.
        limit: usize,
    },
    /// Too many creates of one project wait for their turn.
    #[error("{limit} creates of project {project} wait for their turn already")]
    QueueFull {
        /// Whose.
        project: String,
        /// The most.
        limit: usize,
    },
    /// Nobody listens.
    #[error("sandbox {sandbox} is running but port {port} is not open")]
    PortClosed {
        /// Which one.
        sandbox: String,
        /// Where.
        port: u16,
        /// What the connection said.
        source: std::io::Error,
    },
    /// The guest does not answer.
    #[error("port {port} of sandbox {sandbox} did not accept within {after:?}")]
    PortSilent {
        /// Which one.
        sandbox: String,
        /// Where.
        port: u16,
        /// The limit.
        after: std::time::Duration,
    },
    /// A slot could not be made, changed or removed.
    #[error(transparent)]
    Network(#[from] kelvin_host::net::Error),
    /// Sandboxes run in VMMs of another kind.
    #[error("{count} sandboxes run in {theirs} here, and this server would use {ours}")]
    OtherVmm {
        /// How many.
        count: usize,
        /// The kind of their VMMs.
        theirs: String,
        /// The kind that was chosen.
        ours: &'static str,
    },
    /// The node is shutting down.
    #[error("the node is shutting down")]
    Stopping,
    /// A file could not be handled.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The ledger does not answer: without it nothing may be made.
    #[error("the ledger cannot be used")]
    Ledger(#[from] kelvin_host::db::Error),
    /// The store said no.
    #[error(transparent)]
    Store(#[from] kelvin_store::Error),
    /// The VMM said no.
    #[error(transparent)]
    Vmm(#[from] kelvin_vmm::Error),
}

/// The refusal of whatever would need descriptors that are not there.
pub fn no_descriptors(exhausted: &kelvin_host::descriptors::Exhausted) -> Failure {
    Failure::new(
        ErrorCode::DescriptorsExhausted,
        exhausted.to_string(),
        "try again later; the operator raises the limit of the server (LimitNOFILE= of its unit, or ulimit -Hn)",
    )
}

impl From<kelvin_host::descriptors::Exhausted> for Error {
    fn from(exhausted: kelvin_host::descriptors::Exhausted) -> Self {
        Self::Descriptors(exhausted)
    }
}

fn service_failed(what: String, said: Option<String>) -> Failure {
    let advice = "try the commands in a sandbox of the template without them";
    Failure { cause: said, ..Failure::new(ErrorCode::BuildStepFailed, what, advice) }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        let with = |code, remediation: &str| Self::new(code, text.clone(), remediation).with_sources(&error);
        match error {
            Error::Shape { .. } => with(ErrorCode::InvalidShape, "ask for a value inside the range"),
            Error::Exhausted { .. } => with(
                ErrorCode::CapacityExhausted,
                "kill sandboxes that are not needed, ask for less, or try again later",
            ),
            Error::Descriptors(ref exhausted) => no_descriptors(exhausted),
            Error::Exists(_) => with(ErrorCode::SandboxExists, "use another id"),
            Error::Changing(_) => with(ErrorCode::SandboxChanging, "try again"),
            Error::Unknown(_) => with(ErrorCode::SandboxNotFound, "`kelvin sandbox list` shows what runs"),
            Error::Asleep(_) => {
                with(ErrorCode::SandboxAsleep, "resume it first: `kelvin sandbox resume`, or connect to it")
            }
            Error::Paused(_) => {
                with(ErrorCode::SandboxPaused, "resume it first: `kelvin sandbox resume`, or connect to it")
            }
            Error::Unreadable(_) => with(
                ErrorCode::RecordUnreadable,
                "kill it, or start the release that wrote it; `kelvin node` says why it cannot be read",
            ),
            Error::BeingAdopted(_) => with(
                ErrorCode::SandboxBeingAdopted,
                "try again; a sandbox whose VMM never answers can be killed",
            ),
            Error::Unhealthy(_) => {
                with(ErrorCode::GuestUnhealthy, "leave out requireHealthyGuest to pause it as it is")
            }
            Error::Running(_) => with(ErrorCode::SandboxRunning, "pause it first"),
            Error::Incompatible { .. } => with(
                ErrorCode::SnapshotIncompatible,
                "restore it where VMM, host and guest are those it was taken on",
            ),
            Error::Fixed { .. } => with(ErrorCode::SnapshotFixed, "leave the field out"),
            Error::Rule { .. } => with(ErrorCode::InvalidPool, "max 0 turns warm machines off"),
            Error::Importing(_) => with(ErrorCode::TemplateImporting, "import it again when that is done"),
            Error::Service { what, said } => service_failed(what, said),
            Error::Build(failure) => *failure,
            Error::NoTemplate(_) => with(ErrorCode::TemplateNotFound, "`kelvin template list` shows them"),
            Error::NameTaken(_) => with(ErrorCode::NameTaken, "choose another name"),
            Error::Path { .. } => with(
                ErrorCode::StartPathImpossible,
                "leave out startPath, or bake the template: `kelvin template bake`",
            ),
            Error::Agent { .. } => {
                with(ErrorCode::AgentUnreachable, "kill the sandbox; `kelvin sandbox logs` shows its console")
            }
            Error::NoNetwork { .. } => with(
                ErrorCode::NoNetwork,
                "`kelvin doctor` says what a network needs; create the sandbox without network rules to have none",
            ),
            Error::Busy { .. } => with(ErrorCode::TooManyConnections, "close some, or try again later"),
            Error::QueueFull { .. } => {
                with(ErrorCode::TooManyCreates, "wait for some to end, or ask for fewer at one time")
            }
            Error::PortClosed { .. } => {
                with(ErrorCode::PortClosed, "start a server that listens on that port in the sandbox")
            }
            Error::PortSilent { .. } => {
                with(ErrorCode::PortSilent, "the sandbox may be busy: look at its processes, try again")
            }
            Error::Network(kelvin_host::net::Error::Full) => {
                with(ErrorCode::CapacityExhausted, "kill sandboxes that are not needed")
            }
            Error::Network(_) => with(ErrorCode::Network, "`kelvin doctor` checks the network"),
            Error::OtherVmm { ref theirs, .. } => with(
                ErrorCode::OtherVmm,
                &format!("serve with --vmm {theirs} until they have ended, or pause them there first"),
            ),
            Error::Stopping => with(ErrorCode::NodeStopping, "try again when the server is back"),
            Error::Io { ref source, .. } if source.kind() == std::io::ErrorKind::StorageFull => with(
                ErrorCode::DiskFull,
                "free space on the data directory's file system, `kelvin gc` removes what nothing needs",
            ),
            Error::Io { .. } => with(ErrorCode::NodeIo, "the server's log has the details"),
            Error::Ledger(ref error) if error.is_full() => with(
                ErrorCode::DiskFull,
                "free space on the data directory's file system, `kelvin gc` removes what nothing needs",
            ),
            Error::Ledger(_) => with(ErrorCode::Ledger, "check the disk of the data directory"),
            Error::Store(error) => error.into(),
            Error::Vmm(error) => error.into(),
        }
    }
}
