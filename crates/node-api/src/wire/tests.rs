#![allow(clippy::unwrap_used)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream};
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::{SandboxId, Token};
use kelvin_api::signature::Signature;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::CancellationToken;

use super::limits::STREAM_WINDOW;
use super::{Remote, serve};
use crate::{Inbound, Io, NodeService, Outbound, Route, SandboxTraffic, Unanswered};

/// Longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(30);

/// Sandboxes that are a script: what they were sent comes back, and their connections are the test's.
struct Script {
    dialled: mpsc::Sender<DuplexStream>,
    /// What became of the bodies of requests to `/swallow`.
    swallowed: mpsc::Sender<Result<Bytes, String>>,
    asleep: Mutex<bool>,
}

fn nobody() -> Failure {
    Failure::new(ErrorCode::SandboxNotFound, "nobody is here", "look elsewhere")
}

#[async_trait]
impl SandboxTraffic for Script {
    async fn send(&self, _: &SandboxId, request: Request<Inbound>) -> Result<Response<Outbound>, Unanswered> {
        if std::mem::take(&mut *self.asleep.lock().await) {
            let failure = Failure::new(ErrorCode::SandboxAsleep, "it sleeps", "wake it up");
            return Err(Unanswered { failure, unsent: Some(Box::new(request)) });
        }
        let (parts, body) = request.into_parts();
        match parts.uri.path() {
            "/echo" => {
                let mut response = Response::new(body);
                *response.headers_mut() = parts.headers;
                Ok(response)
            }
            "/swallow" => {
                let read = body.collect().await;
                let read = read.map(|body| body.to_bytes()).map_err(|error| error.to_string());
                self.swallowed.send(read).await.unwrap();
                Err(nobody().into())
            }
            "/broken" => {
                let frames = [
                    Ok(Frame::data(Bytes::from_static(b"half"))),
                    Err(io::Error::from(io::ErrorKind::ConnectionReset)),
                ];
                Ok(Response::new(StreamBody::new(stream::iter(frames)).boxed_unsync()))
            }
            other => panic!("no {other}"),
        }
    }

    async fn route(&self, _: &SandboxId) -> Result<Route, Failure> {
        Err(nobody())
    }

    async fn dial(&self, _: &SandboxId, port: u16) -> Result<Box<dyn Io>, Failure> {
        if port == 1 {
            return Err(Failure::new(ErrorCode::PortClosed, "nobody listens", "listen").with_cause(&nobody()));
        }
        let (ours, theirs) = tokio::io::duplex(1 << 10);
        self.dialled.send(theirs).await.unwrap();
        Ok(Box::new(ours))
    }

    async fn signer(&self, _: &Signature) -> Result<Option<SandboxId>, Failure> {
        Ok(None)
    }

    async fn holder(&self, _: &Token) -> Result<Option<SandboxId>, Failure> {
        Ok(None)
    }

    async fn ended(&self, _: &SandboxId) -> Result<Option<String>, Failure> {
        Ok(None)
    }
}

/// A node that is a script, asked over the wire.
struct World {
    address: http::Uri,
    remote: Remote,
    dialled: mpsc::Receiver<DuplexStream>,
    swallowed: mpsc::Receiver<Result<Bytes, String>>,
    script: Arc<Script>,
    _stop: tokio_util::sync::DropGuard,
}

async fn world() -> World {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address: http::Uri = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    let ((dialled, dialled_there), (swallowed, swallowed_there)) = (mpsc::channel(1), mpsc::channel(1));
    let script = Arc::new(Script { dialled, swallowed, asleep: Mutex::default() });
    let stop = CancellationToken::new();
    // Only sandboxes are a script: the node itself is one that is not there.
    let node = Arc::new(Remote::new(http::Uri::from_static("http://127.0.0.1:1")));
    tokio::spawn(serve(listener, node, Arc::clone(&script) as _, stop.clone()));
    World {
        remote: Remote::new(address.clone()),
        address,
        dialled: dialled_there,
        swallowed: swallowed_there,
        script,
        _stop: stop.drop_guard(),
    }
}

fn request(path: &str, body: Inbound) -> Request<Inbound> {
    let request = Request::post(format!("http://agent{path}")).header("x-odd", &b"\xff"[..]);
    request.body(body).unwrap()
}

fn whole(bytes: impl Into<Bytes>) -> Inbound {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, work).await.expect("it takes too long")
}

#[tokio::test]
async fn bodies_headers_and_trailers_go_both_ways() {
    let (world, id) = (world().await, SandboxId::random());
    let long: Bytes = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    for bytes in [Bytes::new(), Bytes::from_static(b"short"), long] {
        let answer = soon(world.remote.send(&id, request("/echo", whole(bytes.clone())))).await.unwrap();
        assert_eq!(answer.headers()["x-odd"].as_bytes(), b"\xff");
        assert!(soon(answer.into_body().collect()).await.unwrap().to_bytes() == bytes);
    }
    let trailers: HeaderMap = [(http::header::ETAG, "last".parse().unwrap())].into_iter().collect();
    let frames = [Ok(Frame::data(Bytes::from_static(b"x"))), Ok(Frame::trailers(trailers.clone()))];
    let body = StreamBody::new(stream::iter(frames)).boxed_unsync();
    let answer = soon(world.remote.send(&id, request("/echo", body))).await.unwrap();
    let collected = soon(answer.into_body().collect()).await.unwrap();
    assert_eq!(collected.trailers(), Some(&trailers));
}

#[tokio::test]
async fn a_body_that_breaks_off_is_not_taken_for_a_whole_one() {
    let (mut world, id) = (world().await, SandboxId::random());
    let half = stream::iter([Ok(Frame::data(Bytes::from_static(b"half"))), Err(io::ErrorKind::Other.into())]);
    let body = StreamBody::new(half).boxed_unsync();
    let refused = soon(world.remote.send(&id, request("/swallow", body))).await.unwrap_err();
    assert_eq!((refused.failure, refused.unsent.is_none()), (nobody(), true));
    assert!(soon(world.swallowed.recv()).await.unwrap().is_err());
    let answer = soon(world.remote.send(&id, request("/broken", whole("")))).await.unwrap();
    assert!(soon(answer.into_body().collect()).await.is_err());
    // A caller that goes away in the middle of its request.
    let endless = stream::iter([Ok(Frame::data(Bytes::from_static(b"half")))]).chain(stream::pending());
    let body = StreamBody::new(endless).boxed_unsync();
    let left =
        tokio::time::timeout(Duration::from_millis(200), world.remote.send(&id, request("/swallow", body)));
    assert!(left.await.is_err());
    // Whether it was cut while it was read, or nobody waits for it any more: it was not taken for whole.
    let taken = tokio::time::timeout(Duration::from_millis(200), world.swallowed.recv()).await;
    assert!(!matches!(taken, Ok(Some(Ok(_)))), "{taken:?}");
}

#[tokio::test]
async fn a_request_that_was_not_sent_comes_back_with_its_body() {
    let (world, id) = (world().await, SandboxId::random());
    *world.script.asleep.lock().await = true;
    let refused = soon(world.remote.send(&id, request("/echo", whole("a body")))).await.unwrap_err();
    assert_eq!(refused.failure.error_code, ErrorCode::SandboxAsleep);
    let again = soon(world.remote.send(&id, *refused.unsent.unwrap())).await.unwrap();
    assert_eq!(again.headers()["x-odd"].as_bytes(), b"\xff");
    assert_eq!(soon(again.into_body().collect()).await.unwrap().to_bytes(), "a body");
}

#[tokio::test]
async fn a_connection_carries_bytes_and_the_end_of_each_direction() {
    let (mut world, id) = (world().await, SandboxId::random());
    let mut ours = soon(world.remote.dial(&id, 80)).await.unwrap();
    let mut theirs = soon(world.dialled.recv()).await.unwrap();
    let sent = vec![7; 500_000];
    let (written, read) = soon(async {
        let mut read = Vec::new();
        let write = async {
            ours.write_all(&sent).await.unwrap();
            ours.shutdown().await.unwrap();
        };
        let ((), count) = tokio::join!(write, theirs.read_to_end(&mut read));
        (count.unwrap(), read)
    })
    .await;
    assert_eq!(written, sent.len());
    assert!(read == sent);
    // The other direction is still open.
    theirs.write_all(b"and back").await.unwrap();
    drop(theirs);
    let mut back = String::new();
    soon(ours.read_to_string(&mut back)).await.unwrap();
    assert_eq!(back, "and back");
}

#[tokio::test]
async fn a_connection_whose_caller_goes_away_ends_in_the_sandbox() {
    let (mut world, id) = (world().await, SandboxId::random());
    let mut ours = soon(world.remote.dial(&id, 80)).await.unwrap();
    let mut theirs = soon(world.dialled.recv()).await.unwrap();
    ours.write_all(b"hello").await.unwrap();
    let mut hello = [0; 5];
    soon(theirs.read_exact(&mut hello)).await.unwrap();
    drop(ours);
    // A pipe has no resets: that it ends at all is what can be seen.
    assert_eq!(soon(theirs.read(&mut hello)).await.unwrap(), 0);
    let written = soon(async {
        loop {
            if let Err(error) = theirs.write_all(&[0; 1 << 10]).await {
                return error;
            }
        }
    });
    assert_eq!(written.await.kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn a_reader_that_sleeps_stops_its_own_stream_alone() {
    let (mut world, id) = (world().await, SandboxId::random());
    let mut sleepers = Vec::new();
    for _ in 0..8 {
        let ours = soon(world.remote.dial(&id, 80)).await.unwrap();
        let mut theirs = soon(world.dialled.recv()).await.unwrap();
        let written = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&written);
        let writing = tokio::spawn(async move {
            while theirs.write_all(&[0; 4 << 10]).await.is_ok() {
                count.fetch_add(4 << 10, Ordering::Relaxed);
            }
        });
        sleepers.push((ours, writing, written));
    }
    // Until each has filled its window.
    soon(async {
        while sleepers.iter().any(|(_, _, written)| written.load(Ordering::Relaxed) < STREAM_WINDOW) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let answer = soon(world.remote.send(&id, request("/echo", whole("x")))).await.unwrap();
    assert_eq!(soon(answer.into_body().collect()).await.unwrap().to_bytes(), "x");
    for (ours, writing, _) in sleepers {
        assert!(!writing.is_finished(), "somebody read what nobody asked for");
        drop(ours);
        soon(writing).await.unwrap();
    }
}

#[tokio::test]
async fn failures_come_whole() {
    let (world, id) = (world().await, SandboxId::random());
    let wanted = Failure::new(ErrorCode::PortClosed, "nobody listens", "listen").with_cause(&nobody());
    assert_eq!(soon(world.remote.dial(&id, 1)).await.err(), Some(wanted));
    assert_eq!(soon(world.remote.route(&id)).await.unwrap_err(), nobody());
    // Through two: what the first has not reached, the second tells.
    let behind = soon(world.remote.kill(&id)).await.unwrap_err();
    assert_eq!(behind.error_code, ErrorCode::NodeUnreachable);
}

#[tokio::test]
async fn another_version_is_refused_by_name() {
    let (world, id) = (world().await, SandboxId::random());
    let later = Remote::of_version(world.address.clone(), crate::VERSION + 1);
    let unary = soon(later.kill(&id)).await.unwrap_err();
    let streamed = soon(later.dial(&id, 80)).await.err().unwrap();
    for failure in [unary, streamed] {
        assert_eq!(failure.error_code, ErrorCode::UnknownVersion);
        assert!(failure.message.contains(&format!("{:?}", (crate::VERSION + 1).to_string())), "{failure:?}");
    }
}

#[tokio::test]
async fn a_node_that_is_not_there_is_said_to_be_unreachable() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    drop(listener);
    let remote = Remote::new(address);
    let failure = soon(remote.kill(&SandboxId::random())).await.unwrap_err();
    assert_eq!(failure.error_code, ErrorCode::NodeUnreachable);
    assert!(failure.cause.is_some());
}
