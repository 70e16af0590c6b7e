//! The node's one HTTP/2 connection to each guest, shared by everybody who speaks to its agent.
//!
//! The connection is made by the first request, not before: a machine that is restored with it would wake
//! up for it too. One that broke is made again by the next request, and tried before that is sent: a port does not
//! tell one conversation from the next, so the agent may take what is left of the last one for the first words of
//! this, and hang up.
//! The guest is hostile: window sizes bound what it can make the daemon hold for each stream.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Why a guest could not be reached.
pub type SendError = Box<dyn std::error::Error + Send + Sync>;
/// A request's body on its way to an agent.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// How long a guest may be silent while a request waits, before it is asked, and before it is given up.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// How often a connection is made again when the agent hangs up on it.
const TRIES: u32 = 20;
/// How long to stay away in between: the agent has to see that nobody is there, `DISMISSED` in its `port.rs`.
const AWAY: Duration = Duration::from_millis(50);
/// How long a connection is tried, however often it is made again: an agent that crashed has to be started.
const TRIED: Duration = Duration::from_secs(10);

enum Link {
    /// Connected, not a byte sent.
    Fresh(UnixStream),
    /// Shaken hands.
    Open(SendRequest<Body>),
    /// To be made by the next request; nobody has spoken to this agent since its machine was started.
    First,
    /// To be made by the next request, again.
    Broken,
}

/// The way to one agent.
pub struct Agent {
    link: Mutex<Link>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Agent {
    /// An agent without a connection. `adopted`: another server may have spoken to it.
    pub fn new(adopted: bool, tasks: TaskTracker, stop: CancellationToken) -> Self {
        let link = if adopted { Link::Broken } else { Link::First };
        Self { link: Mutex::new(link), tasks, stop }
    }

    /// An agent over a connection on which nothing was sent yet.
    pub fn over(stream: UnixStream, tasks: TaskTracker, stop: CancellationToken) -> Self {
        Self { link: Mutex::new(Link::Fresh(stream)), tasks, stop }
    }

    /// Sends `request`; `reconnect` makes a new connection when there is none.
    ///
    /// # Errors
    /// When the guest does not answer, or its connection breaks.
    pub async fn send<C: Future<Output = Result<UnixStream, SendError>>>(
        &self,
        request: Request<Body>,
        reconnect: impl Fn() -> C,
    ) -> Result<Response<Incoming>, SendError> {
        let mut sender = {
            let mut link = self.link.lock().await;
            match std::mem::replace(&mut *link, Link::Broken) {
                Link::Open(sender) if !sender.is_closed() => {
                    *link = Link::Open(sender.clone());
                    sender
                }
                Link::Fresh(stream) => self.shake(&mut link, stream).await?,
                Link::First => self.shake(&mut link, reconnect().await?).await?,
                Link::Open(_) | Link::Broken => self.shake_again(&mut link, &reconnect).await?,
            }
        };
        let mut unsent = match sender.try_send_request(request).await {
            Ok(response) => return Ok(response),
            Err(unsent) => unsent,
        };
        // Its connection was breaking, of an agent that was started again: not a byte of it was sent.
        let Some(request) = unsent.take_message() else { return Err(unsent.into_error().into()) };
        let mut link = self.link.lock().await;
        *link = Link::Broken;
        let mut sender = self.shake_again(&mut link, &reconnect).await?;
        drop(link);
        Ok(sender.send_request(request).await?)
    }

    async fn shake_again<C: Future<Output = Result<UnixStream, SendError>>>(
        &self,
        link: &mut Link,
        reconnect: &impl Fn() -> C,
    ) -> Result<SendRequest<Body>, SendError> {
        let (mut tries, deadline) = (0, Instant::now() + TRIED);
        loop {
            let mut sender = self.shake(link, reconnect().await?).await?;
            let nothing = Empty::new().map_err(|never| match never {}).boxed_unsync();
            let question = Request::get("http://agent/health").body(nothing)?;
            tries += 1;
            match tokio::time::timeout_at(deadline, sender.send_request(question)).await {
                // Who is silent is waited for by the request itself.
                Ok(Ok(_)) | Err(_) => return Ok(sender),
                Ok(Err(error)) if tries == TRIES => return Err(error.into()),
                Ok(Err(error)) => tracing::debug!(%error, tries, "an agent hung up"),
            }
            *link = Link::Broken;
            drop(sender);
            // Nothing tells this end when the agent has seen it.
            tokio::time::sleep(AWAY).await;
        }
    }

    async fn shake(&self, link: &mut Link, stream: UnixStream) -> Result<SendRequest<Body>, SendError> {
        let (sender, connection) = Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            // All tunnels together, whose visitors do not read, leave a third for everything else.
            .initial_stream_window_size(128 << 10)
            .initial_connection_window_size(24 << 20)
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
