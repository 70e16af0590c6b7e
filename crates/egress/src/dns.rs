//! The guests' resolver: a forwarder that asks only for names that the slot's policy allows.
//!
//! A guest's packet is never passed on. What was asked is read, and a question of our own is sent: the name,
//! the type, an identifier and a port of our choice, nothing else that could carry data out. IPv6 addresses
//! are answered with none, because nothing leaves over IPv6.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use kelvin_api::network::Names;
use simple_dns::rdata::RData;
use simple_dns::{CLASS, Name, Packet, PacketFlag, QCLASS, QTYPE, Question, RCODE, TYPE};
use socket2::{Domain, SockRef, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};

use crate::Options;
use crate::slot::Slot;

/// How long one try may take, and how many there are.
const TRY: Duration = Duration::from_secs(2);
const TRIES: usize = 2;
/// What fits into an answer over UDP without extensions. Source: RFC 1035, 4.2.1.
const UDP_ANSWER: usize = 512;
/// How long to leave a socket alone that failed.
pub const PAUSE: Duration = Duration::from_millis(10);
/// How long a TCP connection may wait for its next question, and for its answer to be read.
const IDLE: Duration = Duration::from_secs(10);

/// Binds a socket to the uplink, so that no routing table decides.
pub fn bind_to_uplink(socket: &impl std::os::fd::AsFd, options: &Options) -> io::Result<()> {
    match &options.uplink {
        Some(name) => SockRef::from(socket).bind_device(Some(name.as_bytes())),
        None => Err(io::Error::new(io::ErrorKind::NetworkUnreachable, "there is no uplink")),
    }
}

/// Answers over UDP until the slot is gone.
pub async fn serve_udp(slot: Arc<Slot>, socket: UdpSocket, options: Arc<Options>) {
    let socket = Arc::new(socket);
    let mut buffer = [0; 4096];
    loop {
        let (size, from) = tokio::select! {
            () = slot.gone.cancelled() => return,
            received = socket.recv_from(&mut buffer) => match received {
                Ok(received) => received,
                // An earlier answer could not be delivered; the socket goes on.
                Err(_) => {
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            },
        };
        let Some(permit) = slot.question() else { continue };
        let (question, slot, options, socket) =
            (buffer[..size].to_vec(), Arc::clone(&slot), Arc::clone(&options), Arc::clone(&socket));
        tokio::spawn(async move {
            if let Some(mut answer) = answer(&slot, &question, &options).await {
                if answer.len() > UDP_ANSWER {
                    truncate(&mut answer);
                }
                let _ = socket.send_to(&answer, from).await;
            }
            drop(permit);
        });
    }
}

/// Answers over TCP until the slot is gone.
pub async fn serve_tcp(slot: Arc<Slot>, listener: TcpListener, options: Arc<Options>) {
    loop {
        let accepted = tokio::select! {
            () = slot.gone.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((mut stream, _)) = accepted else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let Some(permit) = slot.question() else { continue };
        let (slot, options) = (Arc::clone(&slot), Arc::clone(&options));
        tokio::spawn(async move {
            let talk = async {
                while let Ok(Ok(question)) = tokio::time::timeout(IDLE, read_framed(&mut stream)).await {
                    let Some(answer) = answer(&slot, &question, &options).await else { break };
                    // Who does not read its answers gets no more.
                    let written = tokio::time::timeout(IDLE, write_framed(&mut stream, &answer)).await;
                    if !matches!(written, Ok(Ok(()))) {
                        break;
                    }
                }
            };
            slot.gone.run_until_cancelled(talk).await;
            drop(permit);
        });
    }
}

async fn read_framed(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_framed(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes()[..], message].concat()).await
}

/// Leaves header and question, and says that there is more over TCP.
pub fn truncate(answer: &mut Vec<u8>) {
    let kept = Packet::parse(answer).ok().and_then(|packet| {
        let mut short = Packet::new_reply(packet.id());
        short.set_flags(
            PacketFlag::TRUNCATION | PacketFlag::RECURSION_DESIRED | PacketFlag::RECURSION_AVAILABLE,
        );
        short.questions.clone_from(&packet.questions);
        short.build_bytes_vec().ok()
    });
    *answer = kept.unwrap_or_default();
}

fn refusal(id: u16, question: Option<&Question<'_>>, code: RCODE) -> Option<Vec<u8>> {
    let mut reply = Packet::new_reply(id);
    reply.set_flags(PacketFlag::RECURSION_DESIRED | PacketFlag::RECURSION_AVAILABLE);
    *reply.rcode_mut() = code;
    reply.questions.extend(question.cloned());
    reply.build_bytes_vec().ok()
}

/// A name as text, when every label is one that a host's name may have: a dot or an escape inside a label
/// must not pass for two.
fn text(name: &Name<'_>) -> Option<String> {
    let mut text = String::new();
    for label in name.as_bytes() {
        if !label.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')) {
            return None;
        }
        if !text.is_empty() {
            text.push('.');
        }
        text.push_str(std::str::from_utf8(label).ok()?);
    }
    (!text.is_empty()).then_some(text)
}

/// The answer to a guest's question; `None` when there is nothing to answer to.
pub async fn answer(slot: &Slot, bytes: &[u8], options: &Options) -> Option<Vec<u8>> {
    let id = u16::from_be_bytes(*bytes.first_chunk()?);
    let Ok(packet) = Packet::parse(bytes) else {
        slot.refuse("dns_malformed", "a question that does not parse");
        return refusal(id, None, RCODE::FormatError);
    };
    let [question] = packet.questions.as_slice() else {
        slot.refuse("dns_malformed", "not one question");
        return refusal(id, None, RCODE::FormatError);
    };
    if packet.has_flags(PacketFlag::RESPONSE) || question.qclass != QCLASS::CLASS(CLASS::IN) {
        slot.refuse("dns_malformed", "no question of class IN");
        return refusal(id, Some(question), RCODE::NotImplemented);
    }
    let name = text(&question.qname);
    let allowed = match (&name, slot.policy().names()) {
        (_, Names::All) => true,
        (Some(name), names) => names.allow(name),
        (None, _) => false,
    };
    let shown = || name.clone().unwrap_or_else(|| question.qname.to_string());
    if !allowed {
        slot.refuse("dns_name", &shown());
        return refusal(id, Some(question), RCODE::Refused);
    }
    if question.qtype == QTYPE::TYPE(TYPE::AAAA) {
        return refusal(id, Some(question), RCODE::NoError);
    }
    match ask(question.clone().into_owned(), options).await {
        Ok(mut reply) => {
            reply.get_mut(..2)?.copy_from_slice(&id.to_be_bytes());
            Some(reply)
        }
        Err(error) => {
            if error.kind() == io::ErrorKind::NetworkUnreachable {
                slot.refuse("no_uplink", &shown());
                return refusal(id, Some(question), RCODE::Refused);
            }
            tracing::debug!(slot = slot.number(), %error, "a question was not answered");
            refusal(id, Some(question), RCODE::ServerFailure)
        }
    }
}

/// Asks upstream and returns the reply, whose identifier is ours and whose question is the one asked.
async fn ask(question: Question<'static>, options: &Options) -> io::Result<Vec<u8>> {
    let unreachable = || io::Error::new(io::ErrorKind::NetworkUnreachable, "there is no uplink");
    if options.uplink.is_none() {
        return Err(unreachable());
    }
    let resolver = options.resolver.ok_or_else(unreachable)?;
    let mut random = [0; 2];
    getrandom::fill(&mut random).map_err(|error| io::Error::other(error.to_string()))?;
    let mut packet = Packet::new_query(u16::from_be_bytes(random));
    packet.set_flags(PacketFlag::RECURSION_DESIRED);
    packet.questions.push(question);
    let bytes = packet.build_bytes_vec().map_err(io::Error::other)?;
    let mut last = io::Error::from(io::ErrorKind::TimedOut);
    for _ in 0..TRIES {
        match tokio::time::timeout(TRY, exchange(&bytes, &packet, resolver, options)).await {
            Ok(Ok(reply)) => return Ok(reply),
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}

/// The host's own resolver is on `lo`; every other is beyond the uplink.
fn bind(socket: &impl std::os::fd::AsFd, resolver: SocketAddr, options: &Options) -> io::Result<()> {
    if resolver.ip().is_loopback() { Ok(()) } else { bind_to_uplink(socket, options) }
}

fn is_reply(reply: &[u8], asked: &Packet<'_>) -> bool {
    Packet::parse(reply).is_ok_and(|packet| {
        let same = |a: &Question<'_>, b: &Question<'_>| {
            a.qtype == b.qtype && a.qname.to_string().eq_ignore_ascii_case(&b.qname.to_string())
        };
        packet.id() == asked.id()
            && packet.has_flags(PacketFlag::RESPONSE)
            && packet.questions.len() == 1
            && same(&packet.questions[0], &asked.questions[0])
    })
}

async fn exchange(
    bytes: &[u8],
    asked: &Packet<'_>,
    resolver: SocketAddr,
    options: &Options,
) -> io::Result<Vec<u8>> {
    let socket = Socket::new(Domain::for_address(resolver), Type::DGRAM.nonblocking(), None)?;
    bind(&socket, resolver, options)?;
    socket.connect(&resolver.into())?;
    let socket = UdpSocket::from_std(socket.into())?;
    socket.send(bytes).await?;
    let mut buffer = [0; 4096];
    let reply = loop {
        let size = socket.recv(&mut buffer).await?;
        if is_reply(&buffer[..size], asked) {
            break &buffer[..size];
        }
    };
    let cut = reply[2] & 2 != 0;
    if !cut {
        return Ok(reply.to_vec());
    }
    let socket = if resolver.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    bind(&socket, resolver, options)?;
    let mut stream = socket.connect(resolver).await?;
    write_framed(&mut stream, bytes).await?;
    let reply = read_framed(&mut stream).await?;
    if is_reply(&reply, asked) { Ok(reply) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// The IPv4 addresses in a resolver's answer.
fn addresses(reply: &[u8]) -> io::Result<Vec<Ipv4Addr>> {
    let packet = Packet::parse(reply).map_err(io::Error::other)?;
    let address = |record: &simple_dns::ResourceRecord<'_>| match &record.rdata {
        RData::A(address) => Some(Ipv4Addr::from(address.address)),
        _ => None,
    };
    Ok(packet.answers.iter().filter_map(address).collect())
}

/// Reads `bytes` as a resolver's answer; for the fuzz target.
#[cfg(feature = "fuzzing")]
pub fn read_answer(bytes: &[u8]) {
    let _ = addresses(bytes);
    if let Ok(asked) = Packet::parse(bytes)
        && asked.questions.len() == 1
        && asked.has_flags(PacketFlag::RESPONSE)
    {
        assert!(is_reply(bytes, &asked), "it answers itself");
    }
}

/// The IPv4 addresses of `name`.
///
/// # Errors
/// When there are none, or nobody answers.
pub async fn resolve(name: &str, options: &Options) -> io::Result<Vec<Ipv4Addr>> {
    let name = Name::new(name).map_err(io::Error::other)?.into_owned();
    let question = Question::new(name, QTYPE::TYPE(TYPE::A), QCLASS::CLASS(CLASS::IN), false);
    let reply = ask(question, options).await?;
    let addresses = addresses(&reply)?;
    if addresses.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no IPv4 address"));
    }
    Ok(addresses)
}

/// The resolver of this host: the first of `/etc/resolv.conf`.
pub fn system_resolver() -> Option<SocketAddr> {
    std::fs::read_to_string("/etc/resolv.conf")
        .ok()?
        .lines()
        .find_map(|line| line.strip_prefix("nameserver")?.trim().parse::<IpAddr>().ok())
        .map(|address| SocketAddr::new(address, 53))
}

#[cfg(test)]
mod tests {
    use kelvin_api::network::Policy;

    use super::*;
    use crate::slot::Shared;

    fn slot(policy: Policy) -> Slot {
        Slot::new(0, policy, 10, Shared::new(1024))
    }

    fn nowhere() -> Options {
        Options { uplink: None, resolver: None, max_connections: 10, build: String::new() }
    }

    fn question(name: &str, kind: TYPE) -> Vec<u8> {
        let mut packet = Packet::new_query(77);
        let name = Name::new_unchecked(name);
        packet.questions.push(Question::new(name, QTYPE::TYPE(kind), QCLASS::CLASS(CLASS::IN), false));
        packet.build_bytes_vec().unwrap()
    }

    async fn code(slot: &Slot, bytes: &[u8]) -> RCODE {
        let reply = answer(slot, bytes, &nowhere()).await.unwrap();
        let packet = Packet::parse(&reply).unwrap();
        assert_eq!(packet.id(), u16::from_be_bytes([bytes[0], bytes[1]]));
        packet.rcode()
    }

    #[tokio::test]
    async fn only_allowed_names_are_asked_for() {
        let lists = (["*.example.com".to_owned()], ["0.0.0.0/0".to_owned()]);
        let slot = slot(Policy::parse(&lists.0, &lists.1, None).unwrap());
        assert_eq!(code(&slot, &question("secret.attacker.org", TYPE::TXT)).await, RCODE::Refused);
        assert_eq!(code(&slot, &question("a.example.com", TYPE::AAAA)).await, RCODE::NoError);
        // Allowed, but this host leads nowhere.
        assert_eq!(code(&slot, &question("a.example.com", TYPE::A)).await, RCODE::Refused);
        assert_eq!(slot.state().denied["dns_name"], 1);
        assert_eq!(slot.state().denied["no_uplink"], 1);
        assert_eq!(slot.state().recent[0].target, "secret.attacker.org");
    }

    #[tokio::test]
    async fn what_is_no_question_is_refused() {
        let slot = slot(Policy::default());
        assert_eq!(code(&slot, &[0, 7, 1, 0, 0, 9, 0, 0, 0, 0, 0, 0, 200]).await, RCODE::FormatError);
        assert_eq!(code(&slot, &[0, 7, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]).await, RCODE::FormatError);
        let mut reply = question("a.example.com", TYPE::A);
        reply[2] |= 0x80;
        assert_eq!(code(&slot, &reply).await, RCODE::NotImplemented);
        assert!(answer(&slot, &[1], &nowhere()).await.is_none());
    }

    #[tokio::test]
    async fn a_dot_inside_a_label_is_no_separator() {
        let lists = (["*.example.com".to_owned()], ["0.0.0.0/0".to_owned()]);
        let slot = slot(Policy::parse(&lists.0, &lists.1, None).unwrap());
        let mut bytes = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        bytes.extend(b"\x0da.example.com\x03net\0\0\x01\0\x01");
        assert_eq!(code(&slot, &bytes).await, RCODE::Refused);
        bytes.splice(12.., *b"\x01a\x0bexample.com\0\0\x01\0\x01");
        assert_eq!(code(&slot, &bytes).await, RCODE::Refused);
    }
}
