//! The codes of failures: one list for all parts, so that no text is compared with another.
//!
//! The spelling is part of the public API and never changes; a code that is not used any more stays, for readers of what
//! older builds wrote.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::kind::Kind;

/// A text that is none of the codes of this build.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no error code of this version: {0:?}")]
pub struct UnknownCode(pub String);

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $kind:ident;)*) => {
        /// What failed, as programs read it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "&'static str")]
        pub enum ErrorCode {
            $($(#[$doc])* $name,)*
        }

        impl ErrorCode {
            /// Every code.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// As it is written: in snake_case.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }

            /// The kind of a failure with this code, unless [`crate::error::Failure::of_kind`] says another.
            pub const fn kind(self) -> Kind {
                match self {
                    $(Self::$name => Kind::$kind,)*
                }
            }
        }

        impl FromStr for ErrorCode {
            type Err = UnknownCode;

            fn from_str(text: &str) -> Result<Self, UnknownCode> {
                match text {
                    $($text => Ok(Self::$name),)*
                    _ => Err(UnknownCode(text.to_owned())),
                }
            }
        }
    };
}

codes! {
    // Requests.
    /// The body has a field that is not there, or of another type.
    InvalidRequest = "invalid_request", Invalid;
    /// The body is no JSON.
    MalformedJson = "malformed_json", Invalid;
    /// The body ended before its length.
    BodyCut = "body_cut", Invalid;
    /// The body is larger than a request may be.
    BodyTooLarge = "body_too_large", TooLarge;
    /// A map of texts is larger than it may be.
    TooLarge = "too_large", Invalid;
    /// A header that would change what is asked, and that is not supported.
    UnsupportedHeader = "unsupported_header", Invalid;
    /// A field of E2B's API that this version does not honour.
    UnsupportedField = "unsupported_field", Invalid;
    /// A parameter of the query.
    InvalidQuery = "invalid_query", Invalid;
    /// A segment of the path, or a path to forward.
    InvalidPath = "invalid_path", Invalid;
    /// A page's `nextToken`.
    InvalidToken = "invalid_token", Invalid;
    /// How many children a fork has.
    InvalidCount = "invalid_count", Invalid;
    /// A name or value that no environment can have.
    InvalidEnvVar = "invalid_env_var", Invalid;
    /// A file of an import: it is none, or too large.
    InvalidFile = "invalid_file", Invalid;
    /// An interval of measurements.
    InvalidInterval = "invalid_interval", Invalid;
    /// Wishes of one lifecycle that contradict each other.
    InvalidLifecycle = "invalid_lifecycle", Invalid;
    /// A limit of a key or a project.
    InvalidLimit = "invalid_limit", Invalid;
    /// A name of a key or a snapshot.
    InvalidName = "invalid_name", Invalid;
    /// Rules of a network.
    InvalidNetwork = "invalid_network", Invalid;
    /// Numbers of a pool that contradict each other.
    InvalidPool = "invalid_pool", Invalid;
    /// A project's name.
    InvalidProject = "invalid_project", Invalid;
    /// vCPUs or memory outside every range.
    InvalidShape = "invalid_shape", Invalid;
    /// A tag.
    InvalidTag = "invalid_tag", Invalid;
    /// A list of tags.
    InvalidTags = "invalid_tags", Invalid;
    /// What tags are given to.
    InvalidTarget = "invalid_target", Invalid;
    /// A time to live.
    InvalidTimeout = "invalid_timeout", Invalid;
    /// An idempotency key.
    InvalidIdempotencyKey = "invalid_idempotency_key", Invalid;
    /// A shape that is not the snapshot's own.
    SnapshotFixed = "snapshot_fixed", Invalid;
    /// No such route.
    NoRoute = "no_route", NotFound;
    /// The route has other methods.
    MethodNotAllowed = "method_not_allowed", NotAllowed;
    /// The body came too slowly.
    RequestTimeout = "request_timeout", Timeout;
    // Callers.
    /// No key was shown.
    NoApiKey = "no_api_key", Unauthenticated;
    /// The key is not known, or was revoked.
    WrongApiKey = "wrong_api_key", Unauthenticated;
    /// Only the server's own key may.
    NotAnAdmin = "not_an_admin", Forbidden;
    /// More requests at one time than a key may have.
    TooManyRequests = "too_many_requests", Busy;
    /// A limit of a key or a project.
    TooManySandboxes = "too_many_sandboxes", Busy;
    /// A limit of a key or a project, or of the node's queue.
    TooManyCreates = "too_many_creates", Busy;
    /// A limit of a key or a project.
    TooManyPaused = "too_many_paused", Busy;
    /// A limit of a key or a project.
    TooManySnapshots = "too_many_snapshots", Busy;
    /// A limit of a key or a project.
    TooMuchDisk = "too_much_disk", Busy;
    /// The request with this key is under way.
    IdempotencyKeyInUse = "idempotency_key_in_use", Conflict;
    /// The key was another request's.
    IdempotencyKeyReused = "idempotency_key_reused", Conflict;
    /// No such API key.
    KeyNotFound = "key_not_found", NotFound;
    /// No such project.
    TeamNotFound = "team_not_found", NotFound;
    // What is asked for.
    /// A template, image, guest or snapshot that the store does not have.
    NotFound = "not_found", NotFound;
    /// It never was, has ended, or is another project's.
    SandboxNotFound = "sandbox_not_found", NotFound;
    /// No such snapshot, or another project's.
    SnapshotNotFound = "snapshot_not_found", NotFound;
    /// A `templateID` that names nothing.
    TemplateNotFound = "template_not_found", NotFound;
    /// No such tag.
    TagNotFound = "tag_not_found", NotFound;
    /// The tag names what was imported, or built when one version of a name was kept, and is another by now.
    TagOutdated = "tag_outdated", Conflict;
    /// Another import of the template is under way.
    TemplateImporting = "template_importing", Conflict;
    /// The name is a template's.
    NameTaken = "name_taken", Conflict;
    /// A snapshot with that id is there.
    AlreadyThere = "already_there", Conflict;
    /// A snapshot whose template is not here, or is of another form.
    SnapshotUnadoptable = "snapshot_unadoptable", Invalid;
    /// Something needs it.
    InUse = "in_use", Conflict;
    /// The id is taken.
    SandboxExists = "sandbox_exists", Conflict;
    /// It has to be paused for that.
    SandboxRunning = "sandbox_running", Conflict;
    /// It has to run for that.
    SandboxPaused = "sandbox_paused", Conflict;
    /// The same of one that resumes by traffic: who shows what a running one would ask for may have it woken up.
    SandboxAsleep = "sandbox_asleep", Conflict;
    /// Others change it all the time, or for too long.
    SandboxChanging = "sandbox_changing", Conflict;
    /// The server has started anew, and the sandbox's VMM does not answer it yet.
    SandboxBeingAdopted = "sandbox_being_adopted", Conflict;
    /// This build cannot read its record.
    RecordUnreadable = "record_unreadable", Conflict;
    /// A healthy guest was asked for, and its agent does not answer.
    GuestUnhealthy = "guest_unhealthy", Conflict;
    /// The sandbox has no siblings.
    NotForked = "not_forked", Conflict;
    /// It cannot be restored on this host.
    SnapshotIncompatible = "snapshot_incompatible", Conflict;
    /// The path that was insisted on is not possible.
    StartPathImpossible = "start_path_impossible", Conflict;
    /// The node, or the sandbox, has none.
    NoNetwork = "no_network", Conflict;
    // Builds.
    /// A reference of an image, its registry's name, a path or a platform.
    InvalidImage = "invalid_image", Invalid;
    /// A step of a build, a start or a ready command.
    InvalidStep = "invalid_step", Invalid;
    /// Files of a build that their hash does not have here.
    FilesMissing = "files_missing", Invalid;
    /// An upload that is no archive, or has what none may have.
    FilesRefused = "files_refused", Invalid;
    /// No such image, tag or digest; or the registry hides it.
    ImageNotFound = "image_not_found", NotFound;
    /// An image that is not what it says, or larger or stranger than one may be.
    ImageRefused = "image_refused", Invalid;
    /// The registry does not let these credentials in, or none.
    RegistryDenied = "registry_denied", Forbidden;
    /// The registry does not answer, answers nonsense or wants to be asked later.
    RegistryUnavailable = "registry_unavailable", Unavailable;
    /// No such build, or another project's.
    BuildNotFound = "build_not_found", NotFound;
    /// It is not in a state for that.
    BuildState = "build_state", Conflict;
    /// A step, the start command or the ready command failed.
    BuildStepFailed = "build_step_failed", Invalid;
    /// It has taken longer than it may.
    BuildDeadline = "build_deadline", Timeout;
    /// Somebody has given it up.
    BuildCancelled = "build_cancelled", Conflict;
    /// A later build of the same name goes on instead.
    BuildSuperseded = "build_superseded", Conflict;
    /// The server has started anew while it ran.
    BuildInterrupted = "build_interrupted", Unavailable;
    /// A limit of a project.
    TooManyBuilds = "too_many_builds", Busy;
    /// The node makes no builds.
    BuildUnsupported = "build_unsupported", Conflict;
    // Traffic.
    /// The guest's agent does not answer.
    AgentUnreachable = "agent_unreachable", Unavailable;
    /// Nobody listens.
    PortClosed = "port_closed", Unavailable;
    /// The guest does not accept, or fell silent.
    PortSilent = "port_silent", Timeout;
    /// The connection ended without an answer.
    PortBroken = "port_broken", Unavailable;
    /// Of a sandbox; of the server itself it is [`Kind::Exhausted`].
    TooManyConnections = "too_many_connections", Busy;
    /// One address has as many as it may have.
    TooManyConnectionsOfAddress = "too_many_connections_of_address", Busy;
    /// As many requests as may wait for paused sandboxes do.
    TooManyWaiting = "too_many_waiting", Busy;
    /// A paused sandbox was not resumed while its visitor waited.
    WakeTooSlow = "wake_too_slow", Timeout;
    /// The gateway has lost whom a request is for.
    NoTarget = "no_target", Internal;
    // The host.
    /// The node has no memory, vCPUs, slots or disk left.
    CapacityExhausted = "capacity_exhausted", Exhausted;
    /// The process has no file descriptors left.
    DescriptorsExhausted = "descriptors_exhausted", Exhausted;
    /// The file system of the data directory is full.
    DiskFull = "disk_full", Exhausted;
    /// Sandboxes run in VMMs of another kind.
    OtherVmm = "other_vmm", Conflict;
    /// The server is shutting down.
    NodeStopping = "node_stopping", Unavailable;
    /// A file of the node.
    NodeIo = "node_io", Internal;
    /// A slot could not be made, changed or removed.
    Network = "network", Internal;
    /// The ledger does not answer.
    Ledger = "ledger", Internal;
    /// The database does not answer.
    Database = "database", Internal;
    /// A file of the store.
    StoreIo = "store_io", Internal;
    /// A manifest does not parse.
    ManifestInvalid = "manifest_invalid", Corrupt;
    /// What is needed is not known, so nothing is removed.
    MetadataUnreadable = "metadata_unreadable", Corrupt;
    /// A file of a snapshot is not what was sealed.
    SnapshotCorrupt = "snapshot_corrupt", Corrupt;
    /// The VMM's program is missing or too old.
    VmmUnusable = "vmm_unusable", Unavailable;
    /// A file or socket of the VMM.
    VmmIo = "vmm_io", Internal;
    /// The VMM refused a command.
    VmmRefused = "vmm_refused", Internal;
    /// The VMM ended.
    VmmEnded = "vmm_ended", Internal;
    /// The VMM took too long.
    VmmDeadline = "vmm_deadline", Timeout;
    /// The agent did not do what a start or a pause needs of it.
    AgentFailed = "agent_failed", Internal;
    /// A reply could not be written.
    Encoding = "encoding", Internal;
    /// A route asked who calls without having looked.
    NoAccount = "no_account", Internal;
    /// The kernel gave no random bytes.
    NoEntropy = "no_entropy", Internal;
    /// The task of the request ended without an answer.
    Aborted = "aborted", Internal;
    // Between the parts.
    /// The node did not answer: what it was asked for may have been done.
    NodeUnreachable = "node_unreachable", Unavailable;
    /// A message between the parts lacks something, or has what is not known here.
    UnreadableMessage = "unreadable_message", Internal;
    /// A part was asked in a version that it does not know.
    UnknownVersion = "unknown_version", Conflict;
    /// A part of another build failed with a code that this one does not know. Made when a failure is read, nowhere else:
    /// kind, message and advice are the other's, and its code is in the cause.
    CodeOfAnotherVersion = "code_of_another_version", Internal;
}

impl TryFrom<String> for ErrorCode {
    type Error = UnknownCode;

    fn try_from(text: String) -> Result<Self, UnknownCode> {
        text.parse()
    }
}

impl From<ErrorCode> for &'static str {
    fn from(code: ErrorCode) -> Self {
        code.as_str()
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_code_comes_back_from_its_text() {
        for code in ErrorCode::ALL {
            let text = code.as_str();
            assert_eq!(text.parse(), Ok(*code));
            assert_eq!(serde_json::to_value(code).unwrap(), text);
            assert_eq!(serde_json::from_value::<ErrorCode>(text.into()).unwrap(), *code);
            // The variant's own name, so that both are found by one search.
            let snake = format!("{code:?}").char_indices().fold(String::new(), |mut snake, (at, letter)| {
                if letter.is_ascii_uppercase() && at > 0 {
                    snake.push('_');
                }
                snake.push(letter.to_ascii_lowercase());
                snake
            });
            assert_eq!(snake, text);
        }
        let texts: BTreeSet<_> = ErrorCode::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(texts.len(), ErrorCode::ALL.len());
        assert!("no_such_code".parse::<ErrorCode>().is_err());
    }
}
