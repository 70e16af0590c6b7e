//! Kinds of failures: what a caller can make of one, and its HTTP status.

use http::StatusCode;
use serde::{Deserialize, Serialize};

/// What kind of failure it is. [`Kind::status`] is its HTTP status; nothing below a server asks for it.
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
    /// Our fault; also what a reader takes a kind for that only a later version knows.
    #[serde(other)]
    Internal,
}

impl Kind {
    /// The HTTP status of a reply: the one place where a kind gets one.
    pub const fn status(self) -> StatusCode {
        match self {
            Self::Invalid => StatusCode::BAD_REQUEST,
            Self::NotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::Unauthenticated => StatusCode::UNAUTHORIZED,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Conflict => StatusCode::CONFLICT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Busy => StatusCode::TOO_MANY_REQUESTS,
            Self::Exhausted | Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Corrupt | Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}
