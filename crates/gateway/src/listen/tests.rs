//! Peers that drop what they send in, read nothing, or only stay: over loopback, with short limits.

use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper::client::conn::http2;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

/// Short, and long enough for a busy machine to be on time.
const SHORT: Duration = Duration::from_millis(400);
/// Longer than any test waits.
const NEVER: Duration = Duration::from_secs(600);
/// How long anything may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(30);

fn limits() -> Limits {
    Limits { connections: 100, per_address: 100, header: NEVER, body: NEVER, idle: NEVER, unread: NEVER }
}

fn granted() -> Descriptors {
    Arc::new(|| Ok(()))
}

/// A server of everything that the tests ask for.
async fn server(door: &Arc<Door>) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service =
        tower::service_fn(|request: Request<Body>| async { Ok::<_, Infallible>(answer(request).await) });
    tokio::spawn(Arc::clone(door).serve(listener, None, service));
    address
}

async fn answer(mut request: Request<Body>) -> Response {
    match request.uri().path() {
        "/short" => Response::new(Body::from("short")),
        // Says how much came.
        "/upload" => match request.into_body().collect().await {
            Ok(body) => Response::new(Body::from(body.to_bytes().len().to_string())),
            Err(error) => Response::new(Body::from(format!("broke: {error}"))),
        },
        // More than any buffer holds, as fast as it is read.
        "/endless" => {
            let chunks = futures::stream::repeat_with(|| {
                Ok::<_, Infallible>(Frame::data(Bytes::from_static(&[7; 16 << 10])))
            });
            Response::new(Body::new(StreamBody::new(chunks)))
        }
        // Silent for a while, then one event, then silent until it is dropped.
        "/events" => {
            let quiet = SHORT * 5;
            let event = futures::stream::once(async move {
                tokio::time::sleep(quiet).await;
                Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"data: x\n\n")))
            });
            let mut reply =
                Response::new(Body::new(StreamBody::new(event.chain(futures::stream::pending()))));
            reply.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
            reply
        }
        // Whatever is sent comes back.
        "/raw" => {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let io = TokioIo::new(upgrade.await.unwrap());
                let (mut read, mut write) = tokio::io::split(io);
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
            let mut reply = Response::new(Body::empty());
            *reply.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            reply.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            reply.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("raw"));
            reply
        }
        other => panic!("{other}"),
    }
}

async fn connect(to: std::net::SocketAddr) -> TcpStream {
    TcpStream::connect(to).await.unwrap()
}

/// Everything until the server closes; fails when it does not.
async fn rest(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    // A reset is an end too.
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut text)).await.expect("it is closed");
    String::from_utf8_lossy(&text).into_owned()
}

async fn read_until(stream: &mut TcpStream, what: &str) -> String {
    let mut text = String::new();
    while !text.contains(what) {
        let mut buffer = [0; 4096];
        let read =
            tokio::time::timeout(PATIENCE, stream.read(&mut buffer)).await.expect("it answers").unwrap();
        assert!(read > 0, "closed after {text:?}");
        text.push_str(std::str::from_utf8(&buffer[..read]).unwrap());
    }
    text
}

#[tokio::test]
async fn a_connection_on_which_nothing_is_asked_is_closed() {
    let door = Door::new(Limits { header: SHORT, ..limits() }, granted());
    let address = server(&door).await;
    let since = Instant::now();
    let mut silent = connect(address).await;
    // Neither a whole head nor a whole preface of HTTP/2.
    let (mut one_byte, mut preface) = (connect(address).await, connect(address).await);
    one_byte.write_all(b"G").await.unwrap();
    preface.write_all(b"PRI * HTTP/2.0\r\n").await.unwrap();
    for stream in [&mut silent, &mut one_byte, &mut preface] {
        assert_eq!(rest(stream).await, "");
    }
    assert!(since.elapsed() >= SHORT);
    while door.connections() > 0 {
        assert!(since.elapsed() < PATIENCE, "their places are given back");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_head_that_comes_in_drops_is_not_waited_for() {
    let door = Door::new(Limits { header: SHORT, ..limits() }, granted());
    let address = server(&door).await;
    let mut stream = connect(address).await;
    // Also the second on a connection that has been of use.
    stream.write_all(b"GET /short HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    read_until(&mut stream, "short").await;
    let since = Instant::now();
    stream.write_all(b"GET /short HTTP/1.1\r\n").await.unwrap();
    loop {
        let dropped = stream.write_all(b"a: b\r\n").await;
        if dropped.is_err() {
            break;
        }
        assert!(since.elapsed() < PATIENCE, "it is never closed");
        tokio::time::sleep(SHORT / 8).await;
    }
    assert!(since.elapsed() >= SHORT);
}

#[tokio::test]
async fn a_body_that_stops_or_drips_gets_408() {
    let door = Door::new(Limits { body: SHORT, ..limits() }, granted());
    let address = server(&door).await;
    let head = b"POST /upload HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n";
    let mut stopped = connect(address).await;
    stopped.write_all(head).await.unwrap();
    stopped.write_all(b"a little").await.unwrap();
    let (mut read, mut write) = connect(address).await.into_split();
    write.write_all(head).await.unwrap();
    // Never silent for long.
    let dripping = tokio::spawn(async move {
        while write.write_all(b"d").await.is_ok() {
            tokio::time::sleep(SHORT / 8).await;
        }
    });
    let reply = rest(&mut stopped).await;
    assert!(
        reply.starts_with("HTTP/1.1 408") && reply.contains("\"error_code\":\"request_timeout\""),
        "{reply}"
    );
    let mut reply = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, read.read_to_end(&mut reply)).await.expect("it is closed");
    assert!(reply.starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&reply));
    tokio::time::timeout(PATIENCE, dripping).await.expect("it is closed").unwrap();
}

#[tokio::test]
async fn a_body_that_goes_on_may_take_longer_than_any_limit() {
    let door = Door::new(Limits { body: SHORT, ..limits() }, granted());
    let address = server(&door).await;
    let mut stream = connect(address).await;
    stream.write_all(b"POST /upload HTTP/1.1\r\nhost: x\r\ncontent-length: 20480\r\n\r\n").await.unwrap();
    for _ in 0..20 {
        stream.write_all(&[1; 1024]).await.unwrap();
        tokio::time::sleep(SHORT / 8).await;
    }
    assert!(read_until(&mut stream, "20480").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_one_in_use_is_not() {
    let door = Door::new(Limits { idle: SHORT, ..limits() }, granted());
    let address = server(&door).await;
    let mut stream = connect(address).await;
    let mut since = Instant::now();
    for _ in 0..8 {
        since = Instant::now();
        stream.write_all(b"GET /short HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        read_until(&mut stream, "short").await;
        tokio::time::sleep(SHORT / 4).await;
    }
    assert_eq!(rest(&mut stream).await, "");
    assert!(since.elapsed() >= SHORT);
}

/// A client of HTTP/2, and whether its connection is closed.
async fn h2(address: std::net::SocketAddr) -> (http2::SendRequest<Body>, tokio::task::JoinHandle<()>) {
    let (sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(connect(address).await)).await.unwrap();
    (sender, tokio::spawn(async move { drop(connection.await) }))
}

#[tokio::test]
async fn http2_is_closed_when_it_is_idle_or_its_replies_are_not_read() {
    let door = Door::new(Limits { idle: SHORT, unread: SHORT, ..limits() }, granted());
    let address = server(&door).await;
    let request = |path: &str| Request::get(format!("http://x{path}")).body(Body::empty()).unwrap();
    let (mut sender, closed) = h2(address).await;
    let reply = sender.send_request(request("/short")).await.unwrap();
    assert_eq!(reply.into_body().collect().await.unwrap().to_bytes(), "short");
    tokio::time::timeout(PATIENCE, closed).await.expect("it is closed").unwrap();
    // Its connection can send, one of its streams cannot.
    let (mut sender, closed) = h2(address).await;
    let reply = sender.send_request(request("/endless")).await.unwrap();
    tokio::time::timeout(PATIENCE, closed).await.expect("it is closed").unwrap();
    drop(reply);
}

#[tokio::test]
async fn a_reply_that_nobody_reads_ends_its_connection() {
    let door = Door::new(Limits { unread: SHORT, ..limits() }, granted());
    let address = server(&door).await;
    let mut stream = connect(address).await;
    stream.write_all(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let since = Instant::now();
    while door.connections() > 0 || since.elapsed() < SHORT {
        assert!(since.elapsed() < PATIENCE, "it is never closed");
        tokio::time::sleep(SHORT / 8).await;
    }
    // One that is read goes on.
    let mut reader = connect(address).await;
    reader.write_all(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let (since, mut buffer) = (Instant::now(), vec![0; 64 << 10]);
    while since.elapsed() < SHORT * 4 {
        assert!(reader.read(&mut buffer).await.unwrap() > 0);
    }
}

#[tokio::test]
async fn streams_may_be_silent() {
    let all = Limits { header: SHORT, body: SHORT, idle: SHORT, unread: SHORT, ..limits() };
    let door = Door::new(all, granted());
    let address = server(&door).await;
    let mut events = connect(address).await;
    events.write_all(b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut raw = connect(address).await;
    raw.write_all(b"GET /raw HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: raw\r\n\r\n")
        .await
        .unwrap();
    read_until(&mut raw, "\r\n\r\n").await;
    // A call whose messages come when there are some.
    let mut call = connect(address).await;
    let head = "POST /upload HTTP/1.1\r\nhost: x\r\ncontent-type: application/connect+json\r\ncontent-length: 9\r\n\r\n";
    call.write_all(head.as_bytes()).await.unwrap();
    read_until(&mut events, "data: x").await;
    raw.write_all(b"still here").await.unwrap();
    read_until(&mut raw, "still here").await;
    call.write_all(b"012345678").await.unwrap();
    read_until(&mut call, "\r\n\r\n9").await;
}

#[tokio::test]
async fn one_connection_too_many_is_told_why() {
    let door = Door::new(Limits { connections: 2, ..limits() }, granted());
    let address = server(&door).await;
    let mut first = connect(address).await;
    let mut raw = connect(address).await;
    raw.write_all(b"GET /raw HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: raw\r\n\r\n")
        .await
        .unwrap();
    read_until(&mut raw, "\r\n\r\n").await;
    first.write_all(b"GET /short HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    read_until(&mut first, "short").await;
    // What was upgraded is a connection still.
    let ask = b"GET /short HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut third = connect(address).await;
    third.write_all(ask).await.unwrap();
    let reply = rest(&mut third).await;
    assert!(reply.starts_with("HTTP/1.1 503"), "{reply}");
    assert!(
        reply.contains("retry-after") && reply.contains("\"error_code\":\"too_many_connections\""),
        "{reply}"
    );
    drop(raw);
    let since = Instant::now();
    while door.connections() > 1 {
        assert!(since.elapsed() < PATIENCE, "a place is given back");
        tokio::task::yield_now().await;
    }
    let mut again = connect(address).await;
    again.write_all(ask).await.unwrap();
    read_until(&mut again, "short").await;
}

/// Serves one connection as if it came from `peer`.
async fn from(door: &Arc<Door>, peer: &str) -> TcpStream {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut stream = connect(listener.local_addr().unwrap()).await;
    let (accepted, _) = listener.accept().await.unwrap();
    let service = tower::service_fn(|_: Request<Body>| {
        std::future::ready(Ok::<_, Infallible>(Response::new(Body::from("short"))))
    });
    door.let_in(accepted, peer.parse().unwrap(), None, service);
    stream.write_all(b"GET /short HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    stream
}

#[tokio::test]
async fn one_address_does_not_take_all_places_and_loopback_is_not_one() {
    let door = Door::new(Limits { per_address: 2, ..limits() }, granted());
    let mut open = Vec::new();
    for peer in ["203.0.113.7", "::ffff:203.0.113.7", "2001:db8::1", "2001:db8::ffff:2"] {
        let mut stream = from(&door, peer).await;
        read_until(&mut stream, "short").await;
        open.push(stream);
    }
    for peer in ["203.0.113.7", "2001:db8::3"] {
        let reply = rest(&mut from(&door, peer).await).await;
        assert!(reply.starts_with("HTTP/1.1 429"), "{peer}: {reply}");
        assert!(reply.contains("\"error_code\":\"too_many_connections_of_address\""), "{reply}");
    }
    for peer in ["203.0.113.8", "2001:db8:0:1::1", "127.0.0.1", "127.0.0.1", "127.0.0.1", "::1"] {
        let mut stream = from(&door, peer).await;
        read_until(&mut stream, "short").await;
        open.push(stream);
    }
    drop(open);
    let since = Instant::now();
    while door.connections() > 0 {
        assert!(since.elapsed() < PATIENCE, "places are given back");
        tokio::task::yield_now().await;
    }
    assert!(door.open().by_address.is_empty());
}

#[tokio::test]
async fn without_descriptors_a_connection_is_told_so_and_others_go_on() {
    let left = Arc::new(AtomicUsize::new(1));
    let descriptors: Descriptors = Arc::new(move || {
        let taken = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        taken.map(drop).map_err(|_| Failure::new(ErrorCode::DescriptorsExhausted, "none", "wait"))
    });
    let door = Door::new(limits(), descriptors);
    let address = server(&door).await;
    let ask = b"GET /short HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut first = connect(address).await;
    first.write_all(ask).await.unwrap();
    read_until(&mut first, "short").await;
    let mut second = connect(address).await;
    second.write_all(ask).await.unwrap();
    let reply = rest(&mut second).await;
    assert!(reply.starts_with("HTTP/1.1 503") && reply.contains("descriptors_exhausted"), "{reply}");
    assert_eq!(door.connections(), 1);
    first.write_all(ask).await.unwrap();
    read_until(&mut first, "short").await;
}
