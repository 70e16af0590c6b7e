//! Connection tracking and the log of refusals, by netlink.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use ipnet::Ipv4Net;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, Tuple};
use netlink_packet_netfilter::nflog::{ConfigCmd, ConfigMode, PacketNla, ULogMessage, config_request};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use tokio::io::unix::AsyncFd;

use super::rules::LOG_GROUP;

/// Room for one read: the kernel's dumps come in parts of at most 32 KiB.
const BUFFER: usize = 64 << 10;

fn request(message: ConntrackMessage, flags: u16) -> NetlinkMessage<NetfilterMessage> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut packet = NetlinkMessage::new(
        header,
        NetlinkPayload::from(NetfilterMessage::new(
            NetfilterHeader::new(NetfilterProtoFamily::IPv4, 0, 0),
            message,
        )),
    );
    packet.finalize();
    packet
}

fn send(socket: &Socket, packet: &NetlinkMessage<NetfilterMessage>) -> io::Result<()> {
    let mut bytes = vec![0; packet.buffer_len()];
    packet.serialize(&mut bytes);
    socket.send(&bytes, 0).map(drop)
}

/// Reads the parts of one reply until `each` is content or the kernel is done.
fn receive(
    socket: &Socket,
    mut each: impl FnMut(NetlinkPayload<NetfilterMessage>) -> io::Result<bool>,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let size = socket.recv(&mut &mut buffer[..], 0)?;
        let mut rest = &buffer[..size];
        while rest.len() >= 16 {
            let message = NetlinkMessage::<NetfilterMessage>::deserialize(rest).map_err(io::Error::other)?;
            let length = usize::try_from(message.header.length).unwrap_or(rest.len()).next_multiple_of(4);
            if each(message.payload)? {
                return Ok(());
            }
            rest = rest.get(length.max(16)..).unwrap_or_default();
        }
    }
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Whether a connection came from or goes to `net`.
fn touches(net: Ipv4Net, attributes: &[ConntrackAttribute]) -> bool {
    let inside = |address: &IpAddr| matches!(address, IpAddr::V4(address) if net.contains(address));
    attributes.iter().any(|attribute| match attribute {
        ConntrackAttribute::CtaTupleOrig(tuples) => tuples.iter().any(|tuple| {
            matches!(tuple, Tuple::Ip(ips) if ips.iter().any(|ip| matches!(ip,
                IPTuple::SourceAddress(found) | IPTuple::DestinationAddress(found) if inside(found))))
        }),
        _ => false,
    })
}

/// Forgets connections of this thread's namespace from or to `net`; returns how many. Reads the whole table:
/// never on a request's path.
///
/// # Errors
/// As the kernel gives them.
pub fn forget(net: Ipv4Net) -> io::Result<u32> {
    let socket = open()?;
    send(&socket, &request(ConntrackMessage::Get(Vec::new()), NLM_F_DUMP))?;
    let mut found = Vec::new();
    receive(&socket, |payload| {
        match payload {
            NetlinkPayload::Done(_) => return Ok(true),
            NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
            NetlinkPayload::InnerMessage(message) => {
                if let NetfilterMessageInner::Conntrack(
                    ConntrackMessage::New(attributes) | ConntrackMessage::Get(attributes),
                ) = message.inner
                    && touches(net, &attributes)
                {
                    found.extend(
                        attributes
                            .into_iter()
                            .find(|attribute| matches!(attribute, ConntrackAttribute::CtaTupleOrig(_))),
                    );
                }
            }
            _ => {}
        }
        Ok(false)
    })?;
    let mut count = 0;
    for tuple in found {
        send(&socket, &request(ConntrackMessage::Delete(vec![tuple]), NLM_F_ACK))?;
        receive(&socket, |payload| match payload {
            NetlinkPayload::Error(error) => match error.to_io() {
                _ if error.code.is_none() => Ok(true),
                // It ended by itself meanwhile.
                gone if gone.raw_os_error() == Some(libc::ENOENT) => Ok(true),
                other => Err(other),
            },
            _ => Ok(false),
        })?;
        count += 1;
    }
    Ok(count)
}

/// A refusal as the kernel logged it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// One of the reasons in the rules.
    pub reason: String,
    /// Protocol, address and port that were refused, when the packet tells.
    pub target: String,
}

/// The log of one slot's refusals.
#[derive(Debug)]
pub struct Log(AsyncFd<OwnedFd>);

impl Log {
    /// Opens the log in this thread's namespace; [`Log::watch`] makes it readable. The socket is the only
    /// reader of its group.
    pub fn open() -> io::Result<OwnedFd> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        let nlas = vec![ConfigCmd::Bind.into(), ConfigMode::new_packet(64).into()];
        send(&socket, &config_request(NetfilterProtoFamily::Unspec, LOG_GROUP, nlas))?;
        receive(&socket, |payload| match payload {
            NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
            NetlinkPayload::Error(_) => Ok(true),
            _ => Ok(false),
        })?;
        socket.set_non_blocking(true)?;
        duplicate(&socket)
    }

    /// Registers an open log with the runtime.
    ///
    /// # Errors
    /// As the runtime gives them.
    #[allow(unsafe_code)]
    pub fn watch(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: the descriptor is owned by the `AsyncFd` and stays the same until it is dropped.
        Ok(Self(unsafe { AsyncFd::register(fd) }?))
    }

    /// The next refusals; waits until there are some. A buffer that overflowed has lost some, which is fine:
    /// the counters have not.
    ///
    /// # Errors
    /// When the socket is of no more use.
    pub async fn next(&self) -> io::Result<Vec<Refused>> {
        let mut buffer = vec![0; BUFFER];
        loop {
            let mut ready = self.0.readable().await?;
            match rustix::io::read(self.0.get_ref(), &mut buffer) {
                Ok(size) => return Ok(parse(&buffer[..size])),
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(rustix::io::Errno::NOBUFS | rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The socket's type does not give its descriptor away.
#[allow(unsafe_code)]
fn duplicate(socket: &Socket) -> io::Result<OwnedFd> {
    // SAFETY: the socket is open for the length of this call.
    unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) }.as_fd().try_clone_to_owned()
}

fn parse(mut bytes: &[u8]) -> Vec<Refused> {
    let mut found = Vec::new();
    while bytes.len() >= 16 {
        let Ok(message) = NetlinkMessage::<NetfilterMessage>::deserialize(bytes) else {
            break;
        };
        let length = usize::try_from(message.header.length).unwrap_or(bytes.len()).next_multiple_of(4);
        if let NetlinkPayload::InnerMessage(NetfilterMessage {
            inner: NetfilterMessageInner::ULog(ULogMessage::Packet(nlas)),
            ..
        }) = message.payload
        {
            let mut refused = Refused { reason: String::new(), target: String::new() };
            for nla in nlas {
                match nla {
                    PacketNla::Prefix(prefix) => refused.reason = prefix.to_string_lossy().into_owned(),
                    PacketNla::Payload(packet) => refused.target = target(&packet),
                    _ => {}
                }
            }
            found.push(refused);
        }
        bytes = bytes.get(length.max(16)..).unwrap_or_default();
    }
    found
}

/// What a packet was for. A guest wrote it: everything is checked.
fn target(packet: &[u8]) -> String {
    let Some(&[a, b, c, d]) = packet.get(16..20).and_then(|bytes| bytes.first_chunk::<4>()) else {
        return String::new();
    };
    let address = Ipv4Addr::new(a, b, c, d);
    let header = usize::from(packet[0] & 15) * 4;
    let port = packet.get(header + 2..header + 4).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
    match (packet[9], port) {
        (6, Some(port)) => format!("tcp {address}:{port}"),
        (17, Some(port)) => format!("udp {address}:{port}"),
        (1, _) => format!("icmp {address}"),
        (other, _) => format!("protocol {other} {address}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_tells_its_target() {
        let mut packet = vec![0x45; 24];
        packet[9] = 6;
        packet[16..20].copy_from_slice(&[10, 0, 0, 1]);
        packet[22..24].copy_from_slice(&443_u16.to_be_bytes());
        assert_eq!(target(&packet), "tcp 10.0.0.1:443");
        packet[9] = 47;
        assert_eq!(target(&packet), "protocol 47 10.0.0.1");
        assert_eq!(target(&packet[..12]), "");
        packet[0] = 0x4f;
        packet[9] = 17;
        assert_eq!(target(&packet), "protocol 17 10.0.0.1", "a header longer than the packet");
    }
}
