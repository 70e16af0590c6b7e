//! Requests and connections into sandboxes; those into one that sleeps wait until it was woken up for them.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Request, Response, Uri};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::SandboxId;
use kelvin_node_api::{Inbound, Io, Outbound, SandboxTraffic, Unanswered};

use crate::hold::Hold;

/// The way to sandboxes that run, and to those that are woken up for it.
#[derive(Clone)]
pub(crate) struct Awake {
    pub(crate) sandboxes: Arc<dyn SandboxTraffic>,
    pub(crate) hold: Hold,
}

impl Awake {
    /// Sends a request to an agent; once more when the sandbox had to be woken up for it.
    pub(crate) async fn send(
        &self,
        sandbox: &SandboxId,
        request: Request<Inbound>,
    ) -> Result<Response<Outbound>, Failure> {
        match self.sandboxes.send(sandbox, request).await {
            Err(Unanswered { failure, unsent: Some(request) })
                if failure.error_code == ErrorCode::SandboxAsleep =>
            {
                self.hold.wake(sandbox).await?;
                self.sandboxes.send(sandbox, *request).await.map_err(|refused| refused.failure)
            }
            other => other.map_err(|refused| refused.failure),
        }
    }

    /// Connects to a port; once more when the sandbox had to be woken up for it.
    pub(crate) async fn dial(&self, sandbox: &SandboxId, port: u16) -> Result<Box<dyn Io>, Failure> {
        match self.sandboxes.dial(sandbox, port).await {
            Err(failure) if failure.error_code == ErrorCode::SandboxAsleep => {
                self.hold.wake(sandbox).await?;
                self.sandboxes.dial(sandbox, port).await
            }
            other => other,
        }
    }
}

/// Connects to `http://<sandbox>:<port>`: the pool of connections is by both, so none is ever used for another
/// sandbox.
#[derive(Clone)]
pub(crate) struct Dialer(pub(crate) Awake);

pub(crate) struct Dialled(TokioIo<Box<dyn Io>>);

impl Connection for Dialled {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl hyper::rt::Read for Dialled {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl hyper::rt::Write for Dialled {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

impl tower::Service<Uri> for Dialer {
    type Response = Dialled;
    type Error = Failure;
    type Future = Pin<Box<dyn Future<Output = Result<Dialled, Failure>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let way = self.0.clone();
        Box::pin(async move {
            let wrong = || Failure::new(ErrorCode::NoTarget, "the request has no target", "report this");
            let sandbox: SandboxId = uri.host().and_then(|host| host.parse().ok()).ok_or_else(wrong)?;
            let port = uri.port_u16().ok_or_else(wrong)?;
            Ok(Dialled(TokioIo::new(way.dial(&sandbox, port).await?)))
        })
    }
}
