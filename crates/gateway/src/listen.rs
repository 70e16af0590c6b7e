//! The way into the server: connections of all its listeners, counted, and timed while nothing happens on them.
//!
//! ```text
//! accept ── too many, or no descriptors ──> one reply with the reason ──> closed
//!       └─> head ──> body ──> reply ──> idle ──> head ...
//!            header   body     unread    idle          each with a time limit
//! ```
//!
//! A request that was answered with a stream (events, calls of agents, upgraded and raw connections) may be silent for as
//! long as it is open: its peer is told to be gone by TCP's keep-alive alone. Everything else has to go on: whoever sends
//! a head or a body in drops, does not read what was asked for, or only holds a connection, is cut off. What the limits
//! are for and why they are what they are: `docs/decisions/0026-connections-have-limits.md`.
//!
//! Writes nothing; a crash closes every connection.

mod activity;
mod limits;

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderValue, Request, StatusCode, Version, header};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use kelvin_api::error::{ErrorCode, Failure, Kind};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service;

use activity::{Activity, Download, Exchange, Upload, Watched, is_stream};
pub use limits::Limits;
use limits::{BODY_RATE, LINGER};

/// Connections that are told at one time why they are refused; more are closed without a word.
const REFUSALS: usize = 64;
/// How long telling one may take.
const REFUSAL: Duration = Duration::from_secs(5);
/// How long a TLS handshake may take, and how many there are at one time.
const HANDSHAKE: Duration = Duration::from_secs(10);
const HANDSHAKES: usize = 256;
/// Requests at one time on one HTTP/2 connection.
const STREAMS: u32 = 256;
/// When TCP asks whether a silent peer is still there, how often, and how many times in vain.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(15), 4);
/// Refusals are logged at most this often.
const LOG_EVERY: Duration = Duration::from_secs(1);

/// Asked for the descriptor of each new connection.
pub type Descriptors = Arc<dyn Fn() -> Result<(), Failure> + Send + Sync>;

#[derive(Debug, Default)]
struct Open {
    all: usize,
    by_address: HashMap<IpAddr, usize>,
    /// Refused since that was last logged.
    refused: u64,
    logged: Option<Instant>,
}

/// Lets connections in; shared by all listeners.
pub struct Door {
    limits: Limits,
    descriptors: Descriptors,
    open: Mutex<Open>,
    refusals: Arc<Semaphore>,
    handshakes: Semaphore,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// One connection among those that are open.
struct Place {
    door: Arc<Door>,
    address: Option<IpAddr>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.door.open();
        open.all = open.all.saturating_sub(1);
        if let Some(address) = self.address
            && let Some(count) = open.by_address.get_mut(&address)
        {
            *count -= 1;
            if *count == 0 {
                open.by_address.remove(&address);
            }
        }
    }
}

/// Under which address a peer is counted; none on loopback, where the proxies and users of this host all are.
fn counted(peer: IpAddr) -> Option<IpAddr> {
    match peer.to_canonical() {
        peer if peer.is_loopback() => None,
        IpAddr::V6(peer) => {
            // Whoever has one address of IPv6 has a network of them.
            Some(Ipv6Addr::from_bits(peer.to_bits() & !u128::from(u64::MAX)).into())
        }
        peer => Some(peer),
    }
}

impl Door {
    /// A door without connections.
    pub fn new(limits: Limits, descriptors: Descriptors) -> Arc<Self> {
        Arc::new(Self {
            limits,
            descriptors,
            open: Mutex::default(),
            refusals: Arc::new(Semaphore::new(REFUSALS)),
            handshakes: Semaphore::new(HANDSHAKES),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        })
    }

    /// Connections that are open.
    pub fn connections(&self) -> usize {
        self.open().all
    }

    /// Nobody is let in any more, and connections end once their requests have. Waits for none.
    pub fn close(&self) {
        self.stop.cancel();
        self.tasks.close();
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(self: &Arc<Self>, peer: IpAddr) -> Result<Place, Failure> {
        let address = counted(peer);
        let (most, most_each) = (self.limits.connections, self.limits.per_address);
        {
            let mut open = self.open();
            if open.all >= most {
                return Err(Failure::new(
                    ErrorCode::TooManyConnections,
                    format!("the server has {most} connections, as many as it may have"),
                    "close connections that are not used, or try again later; --max-connections sets the limit",
                )
                .of_kind(Kind::Exhausted));
            }
            if let Some(address) = address {
                let count = open.by_address.entry(address).or_default();
                if *count >= most_each {
                    return Err(Failure::new(
                        ErrorCode::TooManyConnectionsOfAddress,
                        format!("{peer} has {most_each} connections, as many as one address may have"),
                        "use connections again; --max-connections-per-address sets the limit, for proxies too",
                    ));
                }
                *count += 1;
            }
            open.all += 1;
        }
        // From here on the place is given back by its drop.
        let place = Place { door: Arc::clone(self), address };
        (self.descriptors)()?;
        Ok(place)
    }

    fn log_refusal(&self, peer: IpAddr, failure: &Failure) {
        let mut open = self.open();
        open.refused += 1;
        if open.logged.is_none_or(|logged| logged.elapsed() >= LOG_EVERY) {
            open.logged = Some(Instant::now());
            let count = std::mem::take(&mut open.refused);
            tracing::warn!(%peer, count, code = %failure.error_code, "a connection was refused: {failure}");
        }
    }

    /// Serves what `listener` accepts, until it is dropped; `tls` shakes hands first.
    pub async fn serve<S>(self: Arc<Self>, listener: TcpListener, tls: Option<TlsAcceptor>, service: S)
    where
        S: Service<Request<Body>, Response = Response, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send,
    {
        while !self.stop.is_cancelled() {
            match listener.accept().await {
                Ok((stream, peer)) => self.let_in(stream, peer.ip(), tls.clone(), service.clone()),
                // Over before it was accepted.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionAborted
                            | io::ErrorKind::ConnectionReset
                            | io::ErrorKind::ConnectionRefused
                    ) => {}
                Err(error) => {
                    // Of the whole host, or what was kept back is used up: nothing tells when that is over.
                    tracing::warn!(%error, "a connection cannot be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Serves one connection of `peer` on a task of its own, or tells it why not.
    fn let_in<S>(self: &Arc<Self>, stream: TcpStream, peer: IpAddr, tls: Option<TlsAcceptor>, service: S)
    where
        S: Service<Request<Body>, Response = Response, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send,
    {
        let _ = stream.set_nodelay(true);
        let (time, interval, retries) = KEEPALIVE;
        let keepalive = TcpKeepalive::new().with_time(time).with_interval(interval).with_retries(retries);
        let _ = SockRef::from(&stream).set_tcp_keepalive(&keepalive);
        let door = Arc::clone(self);
        match self.admit(peer) {
            Ok(place) => {
                self.tasks.spawn(async move { door.shake(stream, tls, Some(place), service).await });
            }
            Err(failure) => {
                self.log_refusal(peer, &failure);
                let Ok(permit) = Arc::clone(&self.refusals).try_acquire_owned() else { return };
                let service = tower::service_fn(move |request: Request<Body>| {
                    std::future::ready(Ok::<_, Infallible>(reply(&failure, None, request.version())))
                });
                self.tasks.spawn(async move {
                    let _ = tokio::time::timeout(REFUSAL, door.shake(stream, tls, None, service)).await;
                    drop(permit);
                });
            }
        }
    }

    async fn shake<S>(
        self: Arc<Self>,
        stream: TcpStream,
        tls: Option<TlsAcceptor>,
        place: Option<Place>,
        service: S,
    ) where
        S: Service<Request<Body>, Response = Response, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send,
    {
        let Some(tls) = tls else {
            return self.talk(stream, place, service).await;
        };
        let shaken = async {
            let _turn = self.handshakes.acquire().await;
            tls.accept(stream).await
        };
        match tokio::time::timeout(HANDSHAKE, shaken).await {
            Ok(Ok(stream)) => self.talk(stream, place, service).await,
            Ok(Err(error)) => tracing::debug!(%error, "TLS handshake"),
            Err(_) => tracing::debug!("TLS handshake took too long"),
        }
    }

    async fn talk<I, S>(&self, io: I, place: Option<Place>, service: S)
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        S: Service<Request<Body>, Response = Response, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send,
    {
        let activity = Arc::new(Activity::new(self.limits.clone()));
        // The place is the socket's: it outlives the HTTP on it when that is upgraded.
        let io = Watched { io, activity: Arc::clone(&activity), _place: place };
        let mut builder = auto::Builder::new(TokioExecutor::new());
        // CONNECT's protocols, for WebSockets over HTTP/2.
        builder.http2().enable_connect_protocol().max_concurrent_streams(STREAMS);
        let handler = hyper::service::service_fn({
            let activity = Arc::clone(&activity);
            move |request: Request<Incoming>| {
                let exchange = activity.begin(&request);
                handle(service.clone(), request, exchange)
            }
        });
        let mut connection = pin!(builder.serve_connection_with_upgrades(TokioIo::new(io), handler));
        let mut stopping = false;
        loop {
            tokio::select! {
                ended = connection.as_mut() => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "a connection ended");
                    }
                    return;
                }
                what = activity.expired() => {
                    tracing::debug!(what, "a connection is closed");
                    connection.as_mut().graceful_shutdown();
                    let _ = tokio::time::timeout(LINGER, connection).await;
                    return;
                }
                () = self.stop.cancelled(), if !stopping => {
                    stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }
}

/// `failure` as the last reply of a connection of `version`; with another status than its kind's where HTTP has a better
/// one.
fn reply(failure: &Failure, status: Option<StatusCode>, version: Version) -> Response {
    let status = status.unwrap_or_else(|| failure.kind.status());
    let mut reply = Response::new(Body::from(serde_json::to_vec(&failure.body(status)).unwrap_or_default()));
    *reply.status_mut() = status;
    let headers = reply.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if version != Version::HTTP_2 {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if status != StatusCode::REQUEST_TIMEOUT {
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    reply
}

async fn handle<S>(
    mut service: S,
    request: Request<Incoming>,
    exchange: Exchange,
) -> Result<Response, Infallible>
where
    S: Service<Request<Body>, Response = Response, Error = Infallible>,
{
    let (exchange, version) = (Arc::new(exchange), request.version());
    let request = request.map(|body| {
        if body.is_end_stream() { Body::empty() } else { Body::new(Upload::new(body, &exchange)) }
    });
    let answered = tokio::select! {
        biased;
        answered = service.call(request) => answered?,
        // Nothing was begun that needs the whole body.
        () = exchange.timing.stalled.notified() => {
            let limit = exchange.activity.limits.body.as_secs_f32();
            let text = format!("the body stopped, or came too slowly: nothing for {limit} s, or under {BODY_RATE} bytes a second");
            let failure = Failure::new(ErrorCode::RequestTimeout, text, "send it again; --body-timeout sets the limit");
            reply(&failure, Some(StatusCode::REQUEST_TIMEOUT), version)
        }
    };
    exchange.timing.is_answered.store(true, Ordering::Relaxed);
    if answered.status() == StatusCode::SWITCHING_PROTOCOLS || is_stream(answered.headers()) {
        exchange.timing.is_stream.store(true, Ordering::Relaxed);
    }
    Ok(answered.map(|body| Body::new(Download { body, exchange })))
}

#[cfg(test)]
mod tests;
