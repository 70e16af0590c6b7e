//! Why a VMM could not do something.

use std::time::Duration;

use kelvin_api::error::{ErrorCode, Failure};

/// Why a VMM could not do something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The VMM's binary is missing or too old.
    #[error("{program} cannot be used: {reason}")]
    Unusable {
        /// Which.
        program: String,
        /// Why not.
        reason: String,
    },
    /// A system call failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The VMM refused a command.
    #[error("the VMM refused {command}: {reason}")]
    Refused {
        /// Which.
        command: &'static str,
        /// What it said.
        reason: String,
    },
    /// The VMM ended.
    #[error("the VMM ended while {what}: {stderr}")]
    Ended {
        /// What was being done.
        what: &'static str,
        /// The last it said, bounded.
        stderr: String,
    },
    /// Something did not happen in time.
    #[error("{what} took longer than {after:?}; {detail}")]
    Deadline {
        /// What.
        what: &'static str,
        /// The limit.
        after: Duration,
        /// The last lines of the console, or what else is known.
        detail: String,
    },
    /// The agent in the guest refused.
    #[error("the agent refused {what}: {reason}")]
    Agent {
        /// What was asked.
        what: &'static str,
        /// What it said.
        reason: String,
    },
    /// The agent's bytes make no sense.
    #[error("the agent's reply is malformed")]
    Malformed(#[from] kelvin_api::guest::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Unusable { .. } => ErrorCode::VmmUnusable,
            Error::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                ErrorCode::DiskFull
            }
            Error::Io { .. } => ErrorCode::VmmIo,
            Error::Refused { .. } => ErrorCode::VmmRefused,
            Error::Ended { .. } => ErrorCode::VmmEnded,
            Error::Deadline { .. } => ErrorCode::VmmDeadline,
            Error::Agent { .. } | Error::Malformed(_) => ErrorCode::AgentFailed,
        };
        Self::new(code, error.to_string(), "`kelvin doctor` checks the VMM; the server's log has the details")
            .with_sources(&error)
    }
}
