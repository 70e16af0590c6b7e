//! An internet of one thread: a namespace that owns every address a test tries, and remembers who came.
//!
//! ```text
//! test's namespace (the server's host)          the world's namespace
//!   wan0 198.51.100.2, 2001:db8:1::2  ═══════  net0 198.51.100.1, 2001:db8:1::1
//!   default route ───────────────────────────> lo: 203.0.113.10 (public), .20 (another), .53 (resolver),
//!                                                  169.254.169.254, 10.0.0.1, 192.168.7.1, 2001:db8:2::10
//! ```
//!
//! A packet that a rule lets through by mistake ends here and is seen; none ever reaches the machine's uplink.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use kelvin_host::net::ns;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use simple_dns::rdata::{A, RData};
use simple_dns::{CLASS, Packet, PacketFlag, QTYPE, RCODE, ResourceRecord, TYPE};

/// What answers for `public.test`.
pub const PUBLIC: &str = "203.0.113.10";
/// What answers for `other.test`.
pub const OTHER: &str = "203.0.113.20";
/// Where questions go.
pub const RESOLVER: &str = "203.0.113.53";
/// Addresses that no sandbox may reach, each owned by the world.
pub const FORBIDDEN: [&str; 5] = ["169.254.169.254", "10.0.0.1", "172.16.0.1", "192.168.7.1", "100.64.0.1"];
/// The same over IPv6: one that would be public.
pub const V6: &str = "2001:db8:2::10";

/// Who came where.
#[derive(Debug, Default)]
struct Seen {
    /// Connections and datagrams, by local address and port.
    arrivals: BTreeMap<SocketAddr, u32>,
    names: Vec<String>,
}

/// The world; ends with the test's process.
pub struct World {
    seen: Arc<Mutex<Seen>>,
}

fn lock(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().expect("no panic while it is held")
}

impl World {
    /// Makes the world and the way to it from this thread's namespace.
    pub fn make() -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (ready, made) = mpsc::channel();
        let (linked, go) = mpsc::channel::<()>();
        let inner = Arc::clone(&seen);
        std::thread::spawn(move || {
            ns::unshare().expect("a namespace");
            ready.send(rustix::thread::gettid().as_raw_nonzero().get()).expect("a test");
            go.recv().expect("a link");
            inhabit(&inner);
            ready.send(0).expect("a test");
            // The namespace lives as long as somebody is in it.
            loop {
                std::thread::park();
            }
        });
        let tid = made.recv().expect("a thread");
        crate::ip(&format!("link add wan0 type veth peer name net0 netns {tid}"));
        crate::ip("addr add 198.51.100.2/24 dev wan0");
        crate::ip("link set wan0 up");
        crate::ip("-6 addr add 2001:db8:1::2/64 dev wan0 nodad");
        linked.send(()).expect("a world");
        made.recv().expect("an inhabited world");
        crate::ip("route add default via 198.51.100.1");
        crate::ip("-6 route add default via 2001:db8:1::1");
        Self { seen }
    }

    /// Arrivals at `address` on any port.
    pub fn arrivals(&self, address: &str) -> u32 {
        let address: IpAddr = address.parse().expect("an address");
        lock(&self.seen).arrivals.iter().filter(|(to, _)| to.ip() == address).map(|(_, count)| count).sum()
    }

    /// Names that the resolver was asked for.
    pub fn names(&self) -> Vec<String> {
        lock(&self.seen).names.clone()
    }

    /// Forgets who came.
    pub fn forget(&self) {
        *lock(&self.seen) = Seen::default();
    }
}

fn ip(words: &str) {
    let status = Command::new("ip").args(words.split_whitespace()).status().expect("iproute2 is installed");
    assert!(status.success(), "ip {words}");
}

fn inhabit(seen: &Arc<Mutex<Seen>>) {
    ip("link set lo up");
    ip("addr add 198.51.100.1/24 dev net0");
    ip("link set net0 up");
    ip("-6 addr add 2001:db8:1::1/64 dev net0 nodad");
    for address in FORBIDDEN.iter().chain(&[PUBLIC, OTHER, RESOLVER]) {
        ip(&format!("addr add {address}/32 dev lo"));
    }
    ip(&format!("-6 addr add {V6}/128 dev lo nodad"));
    for port in [22, 53, 80, 443, 8080] {
        for any in ["0.0.0.0", "::"] {
            listen(SocketAddr::new(any.parse().expect("an address"), port), Arc::clone(seen));
        }
    }
    datagrams(53, Arc::clone(seen), |_, _, _| {});
    resolver(Arc::clone(seen));
    // Asks for a stream of datagrams by one.
    datagrams(9000, Arc::clone(seen), |socket, _, from| {
        let socket = socket.try_clone().expect("a socket");
        std::thread::spawn(move || {
            for _ in 0..400 {
                let _ = socket.send_to(b"are you still there?", from);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
    });
}

fn listen(at: SocketAddr, seen: Arc<Mutex<Seen>>) {
    use rustix::net::sockopt::set_ipv6_v6only;
    use rustix::net::{AddressFamily, SocketType, bind, listen, socket};
    let family = if at.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket(family, SocketType::STREAM, None).expect("a socket");
    if at.is_ipv6() {
        set_ipv6_v6only(&socket, true).expect("an option");
    }
    bind(&socket, &at).expect("a free port");
    listen(&socket, 128).expect("a listener");
    let listener = TcpListener::from(socket);
    let tls = tls_config();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let Ok(local) = stream.local_addr() else { continue };
            *lock(&seen).arrivals.entry(local).or_default() += 1;
            let tls = Arc::clone(&tls);
            std::thread::spawn(move || {
                let _ =
                    if local.port() == 443 { speak_tls(stream, local, tls) } else { speak(stream, local) };
            });
        }
    });
}

fn datagrams(
    port: u16,
    seen: Arc<Mutex<Seen>>,
    answer: impl Fn(&UdpSocket, &[u8], SocketAddr) + Send + 'static,
) {
    let sockets: Vec<Ipv4Addr> = FORBIDDEN
        .iter()
        .chain(&[PUBLIC, OTHER])
        .map(|address| address.parse().expect("an address"))
        .collect();
    let answer = Arc::new(Mutex::new(answer));
    for address in sockets {
        let socket = UdpSocket::bind((address, port)).expect("a free port");
        let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((size, from)) = socket.recv_from(&mut buffer) {
                *lock(&seen).arrivals.entry((address, port).into()).or_default() += 1;
                answer.lock().expect("no panic")(&socket, &buffer[..size], from);
            }
        });
    }
}

/// A reply that says where it came from and which host was asked for; `/stream` goes on for ever.
fn speak(mut stream: impl Read + Write, local: SocketAddr) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte)? == 0 || request.len() > 8192 {
            return Ok(());
        }
        request.push(byte[0]);
    }
    let text = String::from_utf8_lossy(&request).into_owned();
    let host = text.lines().find_map(|line| {
        line.split_once(':')
            .filter(|(name, _)| name.eq_ignore_ascii_case("host"))
            .map(|(_, host)| host.trim())
    });
    if text.starts_with("GET /stream ") {
        stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")?;
        loop {
            stream.write_all(b".")?;
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let body = format!("I am {}, you asked for {}\n", local.ip(), host.unwrap_or("nobody"));
    let length = body.len();
    stream.write_all(
        format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}").as_bytes(),
    )
}

/// A self-signed certificate for `names`: chain and key, PEM.
pub fn certificate(names: &[&str]) -> (String, String) {
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let made = rcgen::generate_simple_self_signed(names).expect("a certificate");
    (made.cert.pem(), made.signing_key.serialize_pem())
}

/// An authority, and a certificate for `names` that it has signed: the authority, the chain and the key, PEM.
pub fn authority(names: &[&str]) -> (String, String, String) {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // Python 3.13 insists on it.
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(DnType::CommonName, "an authority of our own");
    let (own_key, key) = (KeyPair::generate().expect("a key"), KeyPair::generate().expect("a key"));
    let own = params.self_signed(&own_key).expect("an authority");
    let issuer = Issuer::new(params, own_key);
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let mut params = CertificateParams::new(names).expect("names");
    params.use_authority_key_identifier_extension = true;
    let signed = params.signed_by(&key, &issuer);
    (own.pem(), signed.expect("a certificate").pem(), key.serialize_pem())
}

/// Answers every question on port 53 of this thread's namespace: all names are here.
pub fn everything_is_here() {
    let socket = UdpSocket::bind(("127.0.0.1", 53)).expect("a free port");
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((size, from)) = socket.recv_from(&mut buffer) {
            let Ok(question) = Packet::parse(&buffer[..size]) else { continue };
            let mut reply = Packet::new_reply(question.id());
            for asked in question.questions {
                if asked.qtype == QTYPE::TYPE(TYPE::A) {
                    let here = RData::A(A { address: Ipv4Addr::LOCALHOST.into() });
                    reply.answers.push(ResourceRecord::new(asked.qname.clone(), CLASS::IN, 1, here));
                }
                reply.questions.push(asked);
            }
            if let Ok(bytes) = reply.build_bytes_vec() {
                let _ = socket.send_to(&bytes, from);
            }
        }
    });
}

fn tls_config() -> Arc<rustls::ServerConfig> {
    let made = rcgen::generate_simple_self_signed(["public.test".to_owned(), "other.test".to_owned()]);
    let made = made.expect("a certificate");
    let chain = vec![CertificateDer::from(made.cert.der().to_vec())];
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key));
    Arc::new(config.expect("a configuration"))
}

fn speak_tls(stream: TcpStream, local: SocketAddr, tls: Arc<rustls::ServerConfig>) -> std::io::Result<()> {
    let connection = rustls::ServerConnection::new(tls).map_err(std::io::Error::other)?;
    let mut stream = rustls::StreamOwned::new(connection, stream);
    speak(&mut stream, local)?;
    stream.conn.send_close_notify();
    stream.flush()
}

/// Knows three names; one of them leads to where nobody may go.
fn resolver(seen: Arc<Mutex<Seen>>) {
    let socket = UdpSocket::bind((RESOLVER, 53)).expect("a free port");
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((size, from)) = socket.recv_from(&mut buffer) {
            if let Some(answer) = answer(&buffer[..size], &seen) {
                let _ = socket.send_to(&answer, from);
            }
        }
    });
}

fn answer(question: &[u8], seen: &Mutex<Seen>) -> Option<Vec<u8>> {
    let packet = Packet::parse(question).ok()?;
    let asked = packet.questions.first()?;
    let name = asked.qname.to_string().to_ascii_lowercase();
    lock(seen).names.push(name.clone());
    let known = [
        ("public.test", PUBLIC),
        ("other.test", OTHER),
        ("rebind.test", "10.0.0.1"),
        ("self.test", "198.51.100.2"),
    ];
    let mut reply = Packet::new_reply(packet.id());
    reply.set_flags(PacketFlag::RECURSION_DESIRED | PacketFlag::RECURSION_AVAILABLE);
    reply.questions.push(asked.clone());
    match known.iter().find(|(known, _)| *known == name) {
        Some((_, address)) if asked.qtype == QTYPE::TYPE(TYPE::A) => {
            let address: Ipv4Addr = address.parse().ok()?;
            let data = RData::A(A { address: address.into() });
            reply.answers.push(ResourceRecord::new(asked.qname.clone(), CLASS::IN, 60, data));
        }
        Some(_) => {}
        None => *reply.rcode_mut() = RCODE::NameError,
    }
    reply.build_bytes_vec().ok()
}
