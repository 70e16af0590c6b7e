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
use kelvin_vmm::stream::GuestStream;
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
    Fresh(GuestStream),
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
    pub fn over(stream: GuestStream, tasks: TaskTracker, stop: CancellationToken) -> Self {
        Self { link: Mutex::new(Link::Fresh(stream)), tasks, stop }
    }

    /// Sends `request`; `reconnect` makes a new connection when there is none.
    ///
    /// # Errors
    /// When the guest does not answer, or its connection breaks.
    pub async fn send<C: Future<Output = Result<GuestStream, SendError>>>(
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

    async fn shake_again<C: Future<Output = Result<GuestStream, SendError>>>(
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

    async fn shake(&self, link: &mut Link, stream: GuestStream) -> Result<SendRequest<Body>, SendError> {
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use http_body_util::Limited;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const HEADERS: u8 = 1;
    const RESET: u8 = 3;
    const SETTINGS: u8 = 4;
    const PING: u8 = 6;
    const CONTINUATION: u8 = 9;

    /// A frame of HTTP/2. Source: RFC 9113, 4.1.
    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    }

    fn nothing() -> Body {
        Empty::new().map_err(|never| match never {}).boxed_unsync()
    }

    /// By how much a flood of a second may let this process grow; what is kept of one would be more.
    const MOST_GROWN: usize = 128 << 20;

    /// Memory of this process, in bytes.
    fn resident() -> usize {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        pages.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    /// An agent whose guest sends its settings and then `first` once and `again` for ever, without reading. What a request to
    /// it comes to, whose reply of at most 1 MiB is read, and how much was taken of it in a second.
    async fn flooded(first: Vec<u8>, again: Vec<u8>) -> (Result<usize, SendError>, usize) {
        let (ours, mut theirs) = tokio::net::UnixStream::pair().unwrap();
        let sent = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&sent);
        let flood = tokio::spawn(async move {
            // Not before it is asked: a reply belongs to a request.
            let _ = theirs.read(&mut [0; 4096]).await;
            let begin = [frame(SETTINGS, 0, 0, &[]), frame(SETTINGS, 1, 0, &[]), first].concat();
            if theirs.write_all(&begin).await.is_ok() {
                while theirs.write_all(&again).await.is_ok() {
                    counted.fetch_add(again.len(), Ordering::Relaxed);
                    tokio::task::yield_now().await;
                }
            }
        });
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let agent = Agent::over(ours.into(), tasks.clone(), stop.clone());
        let gone = || std::future::ready(Err("there is one connection".into()));
        let ask = async {
            let request = Request::get("http://agent/metrics").body(nothing())?;
            let reply = agent.send(request, gone).await?;
            Ok(Limited::new(reply.into_body(), 1 << 20).collect().await?.to_bytes().len())
        };
        let silent = |_| Err("silent".into());
        let before = resident();
        let answer = tokio::time::timeout(Duration::from_secs(1), ask).await.unwrap_or_else(silent);
        let (taken, grown) = (sent.load(Ordering::Relaxed), resident().saturating_sub(before));
        assert!(grown < MOST_GROWN, "{grown} bytes are held");
        stop.cancel();
        tasks.close();
        tasks.wait().await;
        // It may stand still for ever: nobody reads it any more, and it reads nothing.
        drop(agent);
        flood.abort();
        let _ = flood.await;
        (answer, taken)
    }

    /// `:status: 200`, of the static table. Source: RFC 7541, appendix A.
    const OK: [u8; 1] = [0x88];
    /// `:status: 103`, written out.
    const EARLY: [u8; 5] = [0x08, 3, b'1', b'0', b'3'];

    #[tokio::test]
    async fn a_reply_without_an_end_is_cut_off() {
        let chunk = frame(0, 0, 1, &[b'x'; 16 << 10]);
        let (answer, taken) = flooded(frame(HEADERS, 4, 1, &OK), chunk).await;
        // More than its window, or more than is read of it.
        assert!(answer.is_err(), "{answer:?}");
        assert!(taken < 4 << 20, "{taken} bytes were taken");
    }

    #[tokio::test]
    async fn a_reply_that_nobody_reads_takes_its_window_and_no_more() {
        let (ours, mut theirs) = tokio::net::UnixStream::pair().unwrap();
        let before = resident();
        let flood = tokio::spawn(async move {
            let _ = theirs.read(&mut [0; 4096]).await;
            let begin = [frame(SETTINGS, 0, 0, &[]), frame(SETTINGS, 1, 0, &[]), frame(HEADERS, 4, 1, &OK)];
            theirs.write_all(&begin.concat()).await.unwrap();
            // Frames of one byte: what each costs beside it counts too.
            let tiny = frame(0, 0, 1, b"x").repeat(1000);
            while theirs.write_all(&tiny).await.is_ok() {}
        });
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let agent = Agent::over(ours.into(), tasks.clone(), stop.clone());
        let gone = || std::future::ready(Err("there is one connection".into()));
        let reply =
            agent.send(Request::get("http://agent/files").body(nothing()).unwrap(), gone).await.unwrap();
        let _ = tokio::time::timeout(Duration::from_secs(1), flood).await;
        let grown = resident().saturating_sub(before);
        assert!(grown < MOST_GROWN, "{grown} bytes are held");
        drop(reply);
        stop.cancel();
        tasks.close();
        tasks.wait().await;
    }

    #[tokio::test]
    async fn headers_without_an_end_are_cut_off() {
        // A header of 8 KiB, and one more, and one more.
        let value = [&[0x00, 1, b'a', 0x7f, 0x81, 0x3f][..], &[b'v'; 8192]].concat();
        let (answer, taken) = flooded(frame(HEADERS, 0, 1, &OK), frame(CONTINUATION, 0, 1, &value)).await;
        assert!(answer.is_err(), "{answer:?}");
        assert!(taken < 2 << 20, "{taken} bytes were taken");
        // Early hints that never become a reply: passed over, and not kept.
        let (answer, _) = flooded(Vec::new(), frame(HEADERS, 4, 1, &EARLY)).await;
        assert!(answer.is_err(), "{answer:?}");
    }

    #[tokio::test]
    async fn settings_and_pings_that_are_not_read_stop_their_sender() {
        for again in [frame(SETTINGS, 0, 0, &[]), frame(PING, 0, 0, &[7; 8])] {
            // Many in one write: one by one the test would be the limit.
            let (answer, taken) = flooded(Vec::new(), again.repeat(1000)).await;
            assert!(answer.is_err_and(|error| error.to_string() == "silent"));
            assert!(taken < 4 << 20, "{taken} bytes were taken");
        }
    }

    #[tokio::test]
    async fn resets_of_what_was_not_asked_end_the_connection() {
        let (answer, taken) = flooded(Vec::new(), frame(RESET, 0, 9, &[0, 0, 0, 8]).repeat(1000)).await;
        assert!(answer.is_err(), "{answer:?}");
        assert!(taken < 2 << 20, "{taken} bytes were taken");
        // A stream that nobody has opened, of the guest's own.
        let promise = frame(5, 4, 1, &[&[0, 0, 0, 2][..], &OK].concat());
        let (answer, taken) = flooded(Vec::new(), promise.repeat(1000)).await;
        assert!(answer.is_err(), "{answer:?}");
        assert!(taken < 2 << 20, "{taken} bytes were taken");
    }
}
