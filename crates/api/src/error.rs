//! The error that leaves the platform: `{code, message, error_code, cause, remediation}`.
//!
//! `code` (the HTTP status) and `message` are what E2B's clients read; the rest is ours.

use http::StatusCode;
use serde::{Deserialize, Deserializer, Serialize};

pub use crate::code::{ErrorCode, UnknownCode};
pub use crate::kind::Kind;

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

impl ApiError {
    /// The code, when this build knows it: a server of another version may have others.
    pub fn known_code(&self) -> Option<ErrorCode> {
        self.error_code.as_deref()?.parse().ok()
    }
}

/// A failure on its way to the caller, before a server gives it a status. It goes from part to part as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What kind of failure.
    pub kind: Kind,
    /// What failed, for programs.
    pub error_code: ErrorCode,
    /// One sentence.
    pub message: String,
    /// The chain of sources, printed once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// What the caller can do.
    pub remediation: String,
}

/// By hand: a code that only the writer knows costs its name, not the failure.
impl<'de> Deserialize<'de> for Failure {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Written {
            kind: Kind,
            error_code: String,
            message: String,
            cause: Option<String>,
            remediation: String,
        }
        let Written { kind, error_code, message, cause, remediation } = Written::deserialize(reader)?;
        let (error_code, cause) = match error_code.parse() {
            Ok(code) => (code, cause),
            Err(UnknownCode(name)) => {
                let cause = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
                (ErrorCode::CodeOfAnotherVersion, Some(format!("{name}{cause}")))
            }
        };
        Ok(Self { kind, error_code, message, cause, remediation })
    }
}

impl Failure {
    /// A failure without a cause, of its code's kind.
    pub fn new(code: ErrorCode, message: impl Into<String>, remediation: impl Into<String>) -> Self {
        let (message, remediation) = (message.into(), remediation.into());
        Self { kind: code.kind(), error_code: code, message, cause: None, remediation }
    }

    /// The same of another kind: where one code is said of two things.
    pub fn of_kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    /// The body of the reply with `status`.
    pub fn body(&self, status: StatusCode) -> ApiError {
        ApiError {
            code: status.as_u16(),
            message: self.message.clone(),
            error_code: Some(self.error_code.to_string()),
            cause: self.cause.clone(),
            remediation: Some(self.remediation.clone()),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_comes_back_whole() {
        let failure =
            Failure::new(ErrorCode::TooManyConnections, "no place", "wait").of_kind(Kind::Exhausted);
        for cause in [None, Some("why".to_owned())] {
            let failure = Failure { cause, ..failure.clone() };
            let text = serde_json::to_string(&failure).unwrap();
            assert_eq!(serde_json::from_str::<Failure>(&text).unwrap(), failure);
        }
    }

    #[test]
    fn what_only_a_later_version_knows_is_still_a_failure() {
        let text = r#"{"kind": "frozen", "error_code": "too_cold", "message": "m", "cause": "c", "remediation": "r"}"#;
        let read: Failure = serde_json::from_str(text).unwrap();
        assert_eq!((read.kind, read.error_code), (Kind::Internal, ErrorCode::CodeOfAnotherVersion));
        assert_eq!((read.cause.as_deref(), read.message.as_str()), (Some("too_cold: c"), "m"));
    }
}
