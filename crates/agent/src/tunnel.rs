//! Ways to what listens in the guest where the sandbox's own address does not lead: on loopback, on another address, of
//! another family. `CONNECT localhost:PORT` of HTTP/2, one stream for each connection. Source: RFC 9113, 8.5.
//!
//! Where a port is listened on is read from the kernel's table at each call: nothing is polled, nothing is remembered.
//! Nothing is written; a crash of the agent breaks the connections.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::guest_file;
use crate::reply::{Body, empty, error};

/// How long a server may take to accept.
const CONNECT: Duration = Duration::from_secs(10);
/// Connections at one time: they share one HTTP/2 connection with everything that is asked of the agent.
pub const CONNECTIONS: usize = 128;
/// The most that is read of the kernel's table, in bytes: some 100,000 sockets.
const TABLE: usize = 16 << 20;
/// The state of a socket that listens. Source: Linux, `include/net/tcp_states.h`.
const LISTEN: &str = "0A";

static PERMITS: std::sync::LazyLock<Arc<Semaphore>> =
    std::sync::LazyLock::new(|| Arc::new(Semaphore::new(CONNECTIONS)));

/// Connects the stream of `request` to the port that it names.
pub async fn open(request: Request<Incoming>) -> Response<Body> {
    let Some(port) = request.uri().port_u16().filter(|port| *port > 0) else {
        return error(StatusCode::BAD_REQUEST, "CONNECT wants localhost:PORT");
    };
    let Ok(permit) = Arc::clone(&PERMITS).try_acquire_owned() else {
        return error(StatusCode::TOO_MANY_REQUESTS, &format!("{CONNECTIONS} connections are open"));
    };
    let stream = match connect(port).await {
        Ok(stream) => stream,
        Err(problem) if problem.kind() == io::ErrorKind::TimedOut => {
            return error(StatusCode::GATEWAY_TIMEOUT, &format!("port {port} does not accept"));
        }
        Err(problem) => return error(StatusCode::BAD_GATEWAY, &format!("port {port}: {problem}")),
    };
    tokio::spawn(async move {
        let _permit = permit;
        if let Ok(upgraded) = hyper::upgrade::on(request).await {
            let mut stream = stream;
            let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(upgraded), &mut stream).await;
        }
    });
    empty(StatusCode::OK)
}

async fn connect(port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::ConnectionRefused);
    for address in listeners(port) {
        match tokio::time::timeout(CONNECT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(problem)) => last = problem,
            Err(_elapsed) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}

/// Where `port` is listened on.
fn listeners(port: u16) -> Vec<SocketAddr> {
    let read = |path: &str| {
        guest_file::read(Path::new(path), TABLE).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    };
    let mut found: Vec<SocketAddr> = ["/proc/self/net/tcp", "/proc/self/net/tcp6"]
        .into_iter()
        .filter_map(|path| read(path).ok())
        .flat_map(|table| parse(&table, port))
        .collect();
    found.sort();
    found.dedup();
    found
}

/// The addresses to reach a listener on `port` by, from a table of the kernel. Source: Linux,
/// Documentation/networking/proc_net_tcp.
fn parse(table: &str, port: u16) -> Vec<SocketAddr> {
    let line = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, state) = (fields.next()?, fields.nth(1)?);
        let (address, number) = local.split_once(':')?;
        let is_it = state == LISTEN && u16::from_str_radix(number, 16).ok()? == port;
        let address = if is_it { address_of(address)? } else { return None };
        Some(SocketAddr::new(address, port))
    };
    table.lines().filter_map(line).collect()
}

/// An address as the kernel writes it: words of the machine's order. Of "any" the loopback one.
fn address_of(text: &str) -> Option<IpAddr> {
    let words: Vec<[u8; 4]> = text
        .as_bytes()
        .chunks(8)
        .map(|word| u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok().map(u32::to_ne_bytes))
        .collect::<Option<_>>()?;
    match words.as_slice() {
        [word] => {
            let address = Ipv4Addr::from(*word);
            Some(IpAddr::V4(if address.is_unspecified() { Ipv4Addr::LOCALHOST } else { address }))
        }
        [_, _, _, _] => {
            let bytes: [u8; 16] = words.concat().try_into().ok()?;
            let address = Ipv6Addr::from(bytes);
            Some(IpAddr::V6(if address.is_unspecified() { Ipv6Addr::LOCALHOST } else { address }))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOUR: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n   \
        0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 1\n   \
        1: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2\n   \
        2: 0200007F:1F40 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 3\n   \
        3: 0300007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4\nnonsense\n";
    const SIX: &str = "0: 00000000000000000000000001000000:1F40 00000000000000000000000000000000:0000 0A x\n\
        1: 00000000000000000000000000000000:0051 00000000000000000000000000000000:0000 0A x\n";

    #[test]
    fn listeners_are_found_on_any_address() {
        let shown = |table, port| parse(table, port).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(shown(FOUR, 8000), ["127.0.0.1:8000", "127.0.0.3:8000"]);
        assert_eq!(shown(FOUR, 80), ["127.0.0.1:80"]);
        assert_eq!(shown(FOUR, 81), [] as [&str; 0]);
        assert_eq!(shown(SIX, 8000), ["[::1]:8000"]);
        assert_eq!(shown(SIX, 81), ["[::1]:81"]);
    }

    #[tokio::test]
    async fn what_listens_is_connected_to() {
        let listener = std::net::TcpListener::bind("127.0.0.9:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(connect(port).await.unwrap().peer_addr().unwrap(), listener.local_addr().unwrap());
        // Not by closing it: a child that another test starts has the descriptor too, until it becomes its program.
        rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).unwrap();
        assert_eq!(connect(port).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
