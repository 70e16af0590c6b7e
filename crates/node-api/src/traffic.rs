//! The way into sandboxes, and who wakes one that has a visitor.
//!
//! ```text
//! visitor ──> send, dial ──> SandboxAsleep ──> Wake::wake ──> send, dial again
//! ```
//!
//! The node says that a sandbox is paused and resumes by traffic only to a visitor that a running one would admit: a
//! stranger wakes nobody.

use std::io;

use async_trait::async_trait;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use kelvin_api::error::Failure;
use kelvin_api::id::{SandboxId, Token};
use kelvin_api::signature::Signature;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};

/// A request's body on its way in.
pub type Inbound = UnsyncBoxBody<Bytes, io::Error>;
/// A reply's body on its way out.
pub type Outbound = UnsyncBoxBody<Bytes, io::Error>;

/// A stream of bytes.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// What a gateway has to know of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// What callers of its agent, and of its ports as raw streams, must show.
    pub access_token: Option<Token>,
    /// What callers of its ports must show.
    pub traffic_token: Option<Token>,
    /// The `Host` that its servers see.
    pub mask_request_host: Option<String>,
}

/// Inside the I/O error of a connection that was cut because its sandbox went away: it was paused, or it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the sandbox was paused or has ended")]
pub struct Cut;

/// Why a request got no reply.
#[derive(Debug, thiserror::Error)]
#[error("{failure}")]
pub struct Unanswered {
    /// Why not.
    pub failure: Failure,
    /// The request as it was, when the sandbox has seen nothing of it: it may be sent again.
    pub unsent: Option<Box<Request<Inbound>>>,
}

impl From<Failure> for Unanswered {
    fn from(failure: Failure) -> Self {
        Self { failure, unsent: None }
    }
}

/// Who can reach sandboxes.
///
/// `SandboxNotFound` for one that is not here; `SandboxPaused` for one that only its owner resumes; `SandboxAsleep` for one
/// that [`Wake::wake`] makes reachable.
#[async_trait]
pub trait SandboxTraffic: Send + Sync + 'static {
    /// Sends `request` to the agent of `sandbox` and returns when its headers are back.
    ///
    /// # Errors
    /// Also `AgentUnreachable` when its agent does not answer.
    async fn send(
        &self,
        sandbox: &SandboxId,
        request: Request<Inbound>,
    ) -> Result<Response<Outbound>, Unanswered>;

    /// What to check and to rewrite. Never `SandboxAsleep`: who must not reach it must not wake it.
    async fn route(&self, sandbox: &SandboxId) -> Result<Route, Failure>;

    /// Connects to a port. The connection breaks, with [`Cut`], when the sandbox goes away.
    ///
    /// # Errors
    /// Also `PortClosed` when nobody listens, `PortSilent`, `TooManyConnections`, `NoNetwork`.
    async fn dial(&self, sandbox: &SandboxId, port: u16) -> Result<Box<dyn Io>, Failure>;

    /// Whose token signed a URL that names no sandbox.
    async fn signer(&self, signature: &Signature) -> Result<Option<SandboxId>, Failure>;

    /// Whose access token this is.
    async fn holder(&self, token: &Token) -> Result<Option<SandboxId>, Failure>;

    /// Why a sandbox ended, when that is known.
    async fn ended(&self, sandbox: &SandboxId) -> Result<Option<String>, Failure>;
}

/// Who lets a sandbox go on that has a visitor.
#[async_trait]
pub trait Wake: Send + Sync + 'static {
    /// Resumes `sandbox`, when its owner wants that and may have one more that runs; returns once it runs. Whoever comes
    /// meanwhile waits for the same resume. It goes on also when the caller goes away.
    async fn wake(&self, sandbox: &SandboxId) -> Result<(), Failure>;
}
