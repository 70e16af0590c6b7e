//! Connections that a policy allows by name: TLS by its server name, plain HTTP by the host of each request.
//!
//! The address that the guest dialled does not matter: the name is resolved here and the connection goes
//! there, so that an allowed name cannot be worn by another server. Without a name, or with one that is not
//! allowed, the connection is reset: fail closed.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::{TokioIo, TokioTimer};
use kelvin_api::network::is_never;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Mutex;

use crate::Options;
use crate::dns::{PAUSE, bind_to_uplink, resolve};
use crate::slot::{Named, Slot};

/// The first bytes of a connection have to come within this time.
const HELLO: Duration = Duration::from_secs(10);
/// The most of a TLS hello that is read.
const MAX_HELLO: usize = 16 << 10;
/// How long a server may take to accept.
const CONNECT: Duration = Duration::from_secs(10);
/// The first byte of a TLS handshake. Source: RFC 8446, 5.1.
const TLS_HANDSHAKE: u8 = 22;

/// Proxies until the slot is gone.
pub async fn serve(slot: Arc<Slot>, listener: TcpListener, options: Arc<Options>) {
    loop {
        let accepted = tokio::select! {
            () = slot.gone.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let Ok(permit) = Arc::clone(&slot.connections).try_acquire_owned() else {
            slot.refuse("connections", "proxied");
            reset(&stream);
            continue;
        };
        // Its two ends.
        let Some(descriptors) = slot.shared.take(2) else {
            slot.refuse("descriptors", "proxied");
            reset(&stream);
            continue;
        };
        let (slot, options) = (Arc::clone(&slot), Arc::clone(&options));
        tokio::spawn(async move {
            let gone = slot.gone.clone();
            if let Some(Err(error)) = gone.run_until_cancelled(one(&slot, stream, &options)).await {
                tracing::debug!(slot = slot.number(), %error, "a proxied connection ended");
            }
            drop((permit, descriptors));
        });
    }
}

/// Makes the end of `stream` a reset: the other side must not wait.
fn reset(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

async fn one(slot: &Arc<Slot>, stream: TcpStream, options: &Arc<Options>) -> io::Result<()> {
    let dialled = SockRef::from(&stream).original_dst_v4()?.as_socket();
    let Some(SocketAddr::V4(dialled)) = dialled else {
        reset(&stream);
        return Ok(());
    };
    let _ = stream.set_nodelay(true);
    let mut first = [0];
    let peeked = tokio::time::timeout(HELLO, stream.peek(&mut first)).await;
    let result = match peeked {
        Ok(Ok(1)) if first[0] == TLS_HANDSHAKE => tls(slot, stream, dialled.port(), options).await,
        Ok(Ok(1)) => plain(slot, stream, dialled.port(), options).await,
        _ => {
            slot.refuse("no_name", &format!("tcp {dialled}"));
            reset(&stream);
            Ok(())
        }
    };
    if result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
        return Ok(());
    }
    result
}

async fn connect(name: &str, port: u16, options: &Options) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in resolve(name, options).await? {
        // A name must not lead to where no address may.
        if is_never(&address.into()) || is_own(address) {
            last = io::Error::new(
                io::ErrorKind::PermissionDenied,
                "the name leads to an address that is never reachable",
            );
            continue;
        }
        match dial(address, port, options).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Whether an address is the host's: only those can be bound. They change, so no list of them is kept.
fn is_own(address: Ipv4Addr) -> bool {
    std::net::UdpSocket::bind((address, 0)).is_ok()
}

async fn dial(address: Ipv4Addr, port: u16, options: &Options) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    bind_to_uplink(&socket, options)?;
    let connected = tokio::time::timeout(CONNECT, socket.connect((address, port).into())).await;
    let stream = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

async fn tls(slot: &Arc<Slot>, mut stream: TcpStream, port: u16, options: &Options) -> io::Result<()> {
    let (hello, name) = match tokio::time::timeout(HELLO, read_hello(&mut stream)).await {
        Ok(Ok(found)) => found,
        _ => {
            slot.refuse("no_name", "tls without a hello that can be read");
            reset(&stream);
            return Ok(());
        }
    };
    let Some(name) = name else {
        slot.refuse("no_name", &format!("tls to port {port}"));
        reset(&stream);
        return Ok(());
    };
    if !slot.policy().names().allow(&name) {
        slot.refuse("name", &format!("tls {name}"));
        reset(&stream);
        return Ok(());
    }
    let named = slot.register(&name);
    let mut server = match connect(&name, port, options).await {
        Ok(server) => server,
        Err(error) => {
            if error.kind() == io::ErrorKind::PermissionDenied {
                slot.refuse("private", &name);
            }
            reset(&stream);
            return Err(error);
        }
    };
    server.write_all(&hello).await?;
    let copied = named.cut.run_until_cancelled(tokio::io::copy_bidirectional(&mut stream, &mut server)).await;
    if !matches!(copied, Some(Ok(_))) {
        reset(&stream);
        reset(&server);
    }
    Ok(())
}

/// Reads a TLS hello and the server name in it.
pub async fn read_hello(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<(Vec<u8>, Option<String>)> {
    let mut acceptor = rustls::server::Acceptor::default();
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let size = stream.read(&mut buffer).await?;
        if size == 0 || bytes.len() + size > MAX_HELLO {
            return Err(io::ErrorKind::InvalidData.into());
        }
        bytes.extend_from_slice(&buffer[..size]);
        let mut rest = &buffer[..size];
        while !rest.is_empty() {
            acceptor.read_tls(&mut rest)?;
            match acceptor.accept() {
                Ok(Some(accepted)) => {
                    let name = accepted.client_hello().server_name().map(str::to_ascii_lowercase);
                    return Ok((bytes, name));
                }
                Ok(None) => {}
                Err((error, _)) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            }
        }
    }
}

type Body = BoxBody<Bytes, hyper::Error>;

fn text(status: StatusCode, text: String) -> Response<Body> {
    let mut response = Response::new(Full::from(text).map_err(|never| match never {}).boxed());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain"));
    response
}

/// A server that the connection has spoken to, kept for the next request to the same host.
struct Upstream {
    host: String,
    sender: SendRequest<Incoming>,
    named: Named,
}

/// Forwards the requests of a guest's connection in the clear.
pub async fn plain(
    slot: &Arc<Slot>,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    port: u16,
    options: &Arc<Options>,
) -> io::Result<()> {
    let upstream: Arc<Mutex<Option<Upstream>>> = Arc::default();
    let service = hyper::service::service_fn(|request: Request<Incoming>| {
        let (slot, options, upstream) = (Arc::clone(slot), Arc::clone(options), Arc::clone(&upstream));
        async move { Ok::<_, hyper::Error>(forward(&slot, request, port, &options, &upstream).await) }
    });
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HELLO)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await
        .map_err(io::Error::other)
}

/// The host that a request is for, without its port.
fn host_of(request: &Request<Incoming>) -> Option<String> {
    let named = match request.uri().authority() {
        Some(authority) => authority.clone(),
        None => request.headers().get(header::HOST)?.to_str().ok()?.parse().ok()?,
    };
    Some(named.host().to_ascii_lowercase())
}

async fn forward(
    slot: &Arc<Slot>,
    mut request: Request<Incoming>,
    port: u16,
    options: &Options,
    upstream: &Mutex<Option<Upstream>>,
) -> Response<Body> {
    let host = host_of(&request);
    let allowed = host.as_deref().is_some_and(|host| slot.policy().names().allow(host));
    let Some(host) = host.filter(|_| allowed) else {
        let shown = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
        slot.refuse("name", &format!("http {}", shown.unwrap_or("without a host")));
        return text(
            StatusCode::FORBIDDEN,
            "This host is not allowed by the sandbox's network policy.\n".to_owned(),
        );
    };
    if request.method() == http::Method::CONNECT {
        slot.refuse("name", &format!("CONNECT {host}"));
        return text(
            StatusCode::METHOD_NOT_ALLOWED,
            "CONNECT is not allowed by the sandbox's network policy.\n".to_owned(),
        );
    }
    // What was checked is what the server is told: an absolute URI must not hide another `Host`.
    if let Some(authority) = request.uri().authority()
        && let Ok(value) = header::HeaderValue::from_str(authority.as_str())
    {
        request.headers_mut().insert(header::HOST, value);
    }
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str()).parse();
    *request.uri_mut() = path.unwrap_or_default();
    let client_upgrade = hyper::upgrade::on(&mut request);
    let mut held = upstream.lock().await;
    let usable = held.as_mut().is_some_and(|up| up.host == host && !up.sender.is_closed());
    if !usable {
        *held = None;
        match open(slot, &host, port, options).await {
            Ok(fresh) => *held = Some(fresh),
            Err(error) => {
                if error.kind() == io::ErrorKind::PermissionDenied {
                    slot.refuse("private", &host);
                }
                return text(StatusCode::BAD_GATEWAY, format!("{host} cannot be reached: {error}\n"));
            }
        }
    }
    let Some(up) = held.as_mut() else {
        return text(StatusCode::BAD_GATEWAY, "No connection.\n".to_owned());
    };
    let answered = match up.sender.ready().await {
        Ok(()) => up.sender.send_request(request).await,
        Err(error) => Err(error),
    };
    let mut response = match answered {
        Ok(response) => response,
        Err(error) => {
            *held = None;
            return text(StatusCode::BAD_GATEWAY, format!("{host} did not answer: {error}\n"));
        }
    };
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        // The connection belongs to the new protocol from here on; the name stays registered with it.
        let server_upgrade = hyper::upgrade::on(&mut response);
        let named = held.take().map(|up| up.named);
        tokio::spawn(async move {
            if let (Ok(client), Ok(server)) = (client_upgrade.await, server_upgrade.await) {
                let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
                let copy = tokio::io::copy_bidirectional(&mut client, &mut server);
                if let Some(named) = named {
                    named.cut.run_until_cancelled(copy).await;
                }
            }
        });
    }
    response.map(BodyExt::boxed)
}

async fn open(slot: &Arc<Slot>, host: &str, port: u16, options: &Options) -> io::Result<Upstream> {
    let stream = connect(host, port, options).await?;
    let (sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    let named = slot.register(host);
    let cut = named.cut.clone();
    tokio::spawn(async move { cut.run_until_cancelled(connection.with_upgrades()).await });
    Ok(Upstream { host: host.to_owned(), sender, named })
}
