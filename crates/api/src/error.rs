//! The error that leaves the platform: `{code, message, error_code, cause, remediation}`.
//!
//! `code` (the HTTP status) and `message` are what E2B's clients read; the rest is ours.

use serde::{Deserialize, Serialize};

/// What kind of failure it is. A server maps it to a status; nothing below a server does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The request can never work as it is.
    Invalid,
    /// The route exists, but not with that method.
    NotAllowed,
    /// No credentials, or unknown ones.
    Unauthenticated,
    /// Known, and not allowed to do this.
    Forbidden,
    /// It does not exist, or not for this caller.
    NotFound,
    /// It contradicts the present state.
    Conflict,
    /// The request is larger than a limit.
    TooLarge,
    /// The node has no room; may work later.
    Exhausted,
    /// Too much at one time; may work in a moment.
    Busy,
    /// It took longer than its deadline.
    Timeout,
    /// A part that is needed is not answering.
    Unavailable,
    /// Stored data is not what was written.
    Corrupt,
    /// Our fault.
    Internal,
}

/// The body of every error reply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[error("{message}{}", cause.as_ref().map(|cause| format!(": {cause}")).unwrap_or_default())]
pub struct ApiError {
    /// The HTTP status, as E2B's clients expect it here.
    pub code: u16,
    /// One sentence about what went wrong.
    pub message: String,
    /// A stable name for programs, in snake_case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_code: Option<String>,
    /// What was underneath, outermost first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// What the caller can do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remediation: Option<String>,
}

/// A failure on its way to the caller, before a server gives it a status.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What kind of failure.
    pub kind: Kind,
    /// A stable name for programs, in snake_case.
    pub error_code: &'static str,
    /// One sentence.
    pub message: String,
    /// The chain of sources, printed once.
    pub cause: Option<String>,
    /// What the caller can do.
    pub remediation: String,
}

impl Failure {
    /// A failure without a cause.
    pub fn new(
        kind: Kind,
        error_code: &'static str,
        message: impl Into<String>,
        remediation: impl Into<String>,
    ) -> Self {
        Self { kind, error_code, message: message.into(), cause: None, remediation: remediation.into() }
    }

    /// The same with the sources of `error`, whose own text is the message, as the cause.
    pub fn with_sources(mut self, error: &dyn std::error::Error) -> Self {
        self.cause = error.source().map(chain);
        self
    }

    /// The same with `error` and its sources as the cause.
    pub fn with_cause(mut self, error: &dyn std::error::Error) -> Self {
        self.cause = Some(chain(error));
        self
    }
}

/// `error` and all its sources in one line, outermost first.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.ends_with(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        source = inner.source();
    }
    text
}
