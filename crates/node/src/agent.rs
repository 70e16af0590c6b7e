//! The node's one HTTP/2 connection to each guest, shared by everybody who speaks to its agent.
//!
//! The connection is made by the first request, not before: a machine that is restored with it would wake
//! up for it too. One that broke is made again by the next request.
//! The guest is hostile: window sizes bound what it can make the daemon hold for each stream.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Why a guest could not be reached.
pub type SendError = Box<dyn std::error::Error + Send + Sync>;
/// A request's body on its way to an agent.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// How long a guest may be silent while a request waits, before it is asked, and before it is given up.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

enum Link {
    /// Connected, not a byte sent.
    Fresh(UnixStream),
    /// Shaken hands.
    Open(SendRequest<Body>),
    /// To be made by the next request.
    Broken,
}

/// The way to one agent.
pub struct Agent {
    link: Mutex<Link>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Agent {
    /// An agent that nobody has spoken to yet.
    pub fn new(tasks: TaskTracker, stop: CancellationToken) -> Self {
        Self { link: Mutex::new(Link::Broken), tasks, stop }
    }

    /// An agent over a connection on which nothing was sent yet.
    pub fn over(stream: UnixStream, tasks: TaskTracker, stop: CancellationToken) -> Self {
        Self { link: Mutex::new(Link::Fresh(stream)), tasks, stop }
    }

    /// Sends `request`; `reconnect` makes a new connection when there is none.
    ///
    /// # Errors
    /// When the guest does not answer, or its connection breaks.
    pub async fn send(
        &self,
        request: Request<Body>,
        reconnect: impl AsyncFnOnce() -> Result<UnixStream, SendError>,
    ) -> Result<Response<Incoming>, SendError> {
        let mut sender = {
            let mut link = self.link.lock().await;
            match std::mem::replace(&mut *link, Link::Broken) {
                Link::Open(sender) if !sender.is_closed() => {
                    *link = Link::Open(sender.clone());
                    sender
                }
                Link::Fresh(stream) => self.shake(&mut link, stream).await?,
                Link::Open(_) | Link::Broken => self.shake(&mut link, reconnect().await?).await?,
            }
        };
        Ok(sender.send_request(request).await?)
    }

    async fn shake(&self, link: &mut Link, stream: UnixStream) -> Result<SendRequest<Body>, SendError> {
        let (sender, connection) = Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(16 << 20)
            .max_frame_size(64 << 10)
            .max_header_list_size(64 << 10)
            .max_send_buf_size(256 << 10)
            // A guest that stopped answering: nothing else ends a connection that nobody closes. Only asked while
            // a request waits, so that an idle machine sleeps.
            .keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .handshake(TokioIo::new(stream))
            .await?;
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            if let Some(Err(error)) = stop.run_until_cancelled(connection).await {
                tracing::debug!(%error, "an agent's connection ended");
            }
        });
        *link = Link::Open(sender.clone());
        Ok(sender)
    }
}
