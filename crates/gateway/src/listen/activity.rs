//! What happens on one connection, and how long nothing has.
//!
//! The connection's task asks [`Activity::expired`]; the socket, the requests' bodies and the replies' are wrapped, and note
//! what they see. Nothing here closes anything.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderMap, Request, Version, header};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep};

use super::limits::{BODY_RATE, LINGER, Limits};

/// Whether a message of this type is a stream, which may be silent: events, streaming calls of Connect and gRPC.
pub fn is_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    ["text/event-stream", "application/connect+", "application/grpc", "multipart/x-mixed-replace"]
        .iter()
        .any(|prefix| kind.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix)))
}

/// What one connection is about, and since when.
pub struct Activity {
    /// Its limits.
    pub limits: Limits,
    began: Instant,
    state: Mutex<State>,
}

struct State {
    /// When the last request was over, or the connection began.
    since: Instant,
    /// When the first byte came that belongs to no request yet.
    first_byte: Option<Instant>,
    /// Since when the peer has taken nothing of what is to be sent.
    blocked: Option<Instant>,
    has_served: bool,
    is_h2: bool,
    /// Requests under way.
    timings: Vec<Arc<Timing>>,
}

/// Of one request.
#[derive(Default)]
pub struct Timing {
    /// It may be silent.
    pub is_stream: AtomicBool,
    /// Its reply has begun.
    pub is_answered: AtomicBool,
    /// When a part of its reply was taken and no more were asked for, in milliseconds since the connection began, plus one.
    unread: AtomicU64,
    /// Its body does not come.
    pub stalled: Notify,
}

/// A request under way; over when it is dropped.
pub struct Exchange {
    /// Of its connection.
    pub activity: Arc<Activity>,
    /// Its own.
    pub timing: Arc<Timing>,
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let mut state = self.activity.state();
        state.timings.retain(|timing| !Arc::ptr_eq(timing, &self.timing));
        state.since = Instant::now();
    }
}

impl Activity {
    /// Of a connection that begins.
    pub fn new(limits: Limits) -> Self {
        let now = Instant::now();
        let state = State {
            since: now,
            first_byte: None,
            blocked: None,
            has_served: false,
            is_h2: false,
            timings: Vec::new(),
        };
        Self { limits, began: now, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that `request` has come.
    pub fn begin(self: &Arc<Self>, request: &Request<Incoming>) -> Exchange {
        let timing = Arc::<Timing>::default();
        timing.is_stream.store(is_stream(request.headers()), Ordering::Relaxed);
        let mut state = self.state();
        state.first_byte = None;
        state.has_served = true;
        state.is_h2 |= request.version() == Version::HTTP_2;
        state.timings.push(Arc::clone(&timing));
        drop(state);
        Exchange { activity: Arc::clone(self), timing }
    }

    /// When the connection has to be closed unless something happens, and why.
    fn deadline(&self) -> Option<(Instant, &'static str)> {
        let (state, limits) = (self.state(), &self.limits);
        let unread = |since: Instant| (since + limits.unread, "a reply is not read");
        if state.timings.is_empty() {
            return Some(match (state.blocked, state.first_byte) {
                (Some(since), _) => unread(since),
                // Frames of HTTP/2 come without a request too.
                (None, Some(since)) if !state.is_h2 => {
                    (since + limits.header, "a request's head is not sent")
                }
                _ if state.has_served => (state.since + limits.idle, "it is idle"),
                _ => (state.since + limits.header, "nothing is asked for"),
            });
        }
        let is_stream = |timing: &&Arc<Timing>| timing.is_stream.load(Ordering::Relaxed);
        let blocked = state.blocked.filter(|_| !state.timings.iter().any(|timing| is_stream(&timing)));
        let waiting = state.timings.iter().filter(|timing| !is_stream(timing)).filter_map(|timing| {
            let taken = timing.unread.load(Ordering::Relaxed).checked_sub(1)?;
            Some(self.began + Duration::from_millis(taken))
        });
        waiting.chain(blocked).min().map(unread)
    }

    /// Waits until the connection has to be closed, and says why.
    pub async fn expired(&self) -> &'static str {
        let limits = &self.limits;
        let least = limits.header.min(limits.idle).min(limits.unread);
        loop {
            // What begins meanwhile is over no sooner than that.
            let look_again = Instant::now() + least;
            let at = match self.deadline() {
                Some((at, what)) if at <= Instant::now() => return what,
                Some((at, _)) => at.min(look_again),
                None => look_again,
            };
            tokio::time::sleep_until(at).await;
        }
    }
}

/// A connection's bytes, seen on their way.
pub struct Watched<I, P> {
    /// They.
    pub io: I,
    /// What they are part of.
    pub activity: Arc<Activity>,
    /// Given back with the connection.
    pub _place: P,
}

impl<I, P> Watched<I, P> {
    /// Notes whether the peer takes what is sent.
    fn sent<T>(&self, sent: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        let mut state = self.activity.state();
        match &sent {
            Poll::Pending => {
                state.blocked.get_or_insert_with(Instant::now);
            }
            Poll::Ready(_) => state.blocked = None,
        }
        drop(state);
        sent
    }
}

impl<I: AsyncRead + Unpin, P: Unpin> AsyncRead for Watched<I, P> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.io).poll_read(context, buffer);
        if buffer.filled().len() > before {
            let mut state = self.activity.state();
            if state.timings.is_empty() {
                state.first_byte.get_or_insert_with(Instant::now);
            }
        }
        read
    }
}

impl<I: AsyncWrite + Unpin, P: Unpin> AsyncWrite for Watched<I, P> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let sent = Pin::new(&mut self.io).poll_write(context, bytes);
        self.sent(sent)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let sent = Pin::new(&mut self.io).poll_write_vectored(context, buffers);
        self.sent(sent)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // TLS keeps what its socket does not take.
        let flushed = Pin::new(&mut self.io).poll_flush(context);
        self.sent(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

/// A request's body, which has to go on while somebody waits for it and nothing was answered.
pub struct Upload {
    body: Incoming,
    timing: Arc<Timing>,
    limit: Duration,
    began: Instant,
    received: u64,
    /// Since when the next part is waited for.
    waiting: Option<Instant>,
    sleep: Option<Pin<Box<Sleep>>>,
    /// It took too long. Whoever answers has been told, and drops this.
    has_stalled: bool,
}

impl Upload {
    /// Of a request that has come.
    pub fn new(body: Incoming, exchange: &Exchange) -> Self {
        Self {
            body,
            timing: Arc::clone(&exchange.timing),
            limit: exchange.activity.limits.body,
            began: Instant::now(),
            received: 0,
            waiting: None,
            sleep: None,
            has_stalled: false,
        }
    }

    /// Ready when whoever waits for the next part has to be given an error.
    fn poll_limit(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let now = Instant::now();
        let since = *self.waiting.get_or_insert(now);
        let credit = Duration::from_secs(self.received / BODY_RATE);
        let deadline = (since + self.limit).min(self.began + self.limit + credit);
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if !self.has_stalled && sleep.deadline() != deadline {
            sleep.as_mut().reset(deadline);
        }
        loop {
            std::task::ready!(sleep.as_mut().poll(context));
            if self.has_stalled {
                return Poll::Ready(());
            }
            let timing = &self.timing;
            if timing.is_stream.load(Ordering::Relaxed) || timing.is_answered.load(Ordering::Relaxed) {
                // Answered meanwhile, and goes both ways from then on.
                sleep.as_mut().reset(now + self.limit);
                continue;
            }
            // The reply is to be the one that names the limit, not what is made of a broken body.
            self.has_stalled = true;
            timing.stalled.notify_one();
            sleep.as_mut().reset(now + LINGER);
        }
    }
}

impl http_body::Body for Upload {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            self.waiting = None;
            let length =
                frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()).map_or(0, Bytes::len);
            self.received += u64::try_from(length).unwrap_or(u64::MAX);
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        std::task::ready!(self.poll_limit(context));
        Poll::Ready(Some(Err(io::Error::new(io::ErrorKind::TimedOut, "the body stopped").into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A reply's body, with a note of whether its peer takes it.
pub struct Download {
    /// It.
    pub body: Body,
    /// Over when this is dropped.
    pub exchange: Arc<Exchange>,
}

impl http_body::Body for Download {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        // Asked for means that what was taken before has gone on its way.
        let unread = match &polled {
            Poll::Ready(Some(Ok(_))) => {
                let taken = self.exchange.activity.began.elapsed().as_millis();
                u64::try_from(taken).unwrap_or(u64::MAX - 1) + 1
            }
            _ => 0,
        };
        self.exchange.timing.unread.store(unread, Ordering::Relaxed);
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
