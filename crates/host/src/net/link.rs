//! Links, addresses, neighbours, routes and taps of one slot, by netlink and ioctl.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use futures::TryStreamExt;
use netlink_packet_route::link::{InfoData, InfoVeth, LinkAttribute};
use netlink_packet_route::neighbour::NeighbourState;
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::addresses::{GUEST, GUEST_GATEWAY, GUEST_MAC, PROXY_PORT, Range, TAP, TAP_MAC, UP};
use super::rules::{self, Setting};
use super::{nft, ns};

/// The sockets in a slot that answer its guest.
#[derive(Debug)]
pub struct Sockets {
    /// Questions over UDP.
    pub dns: UdpSocket,
    /// Questions over TCP.
    pub dns_tcp: TcpListener,
    /// Connections that are allowed by name.
    pub proxy: TcpListener,
}

fn failed(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}

/// The number of a link in this thread's namespace.
pub fn index(name: &str) -> io::Result<u32> {
    rustix::net::netdevice::name_to_index(socket()?, name).map_err(Into::into)
}

fn socket() -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    Ok(socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

/// Runs `work` with a netlink connection to this thread's namespace.
async fn netlink<T>(work: impl AsyncFnOnce(Handle) -> io::Result<T>) -> io::Result<T> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let task = tokio::spawn(connection);
    let result = work(handle).await;
    task.abort();
    result
}

/// The same, on a small runtime of its own, for threads that are in a namespace.
fn blocking_netlink<T>(work: impl AsyncFnOnce(Handle) -> io::Result<T>) -> io::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(netlink(work))
}

async fn address(handle: &Handle, index: u32, address: Ipv4Addr) -> io::Result<()> {
    handle.address().add(index, IpAddr::V4(address), 30).execute().await.map_err(failed)
}

/// An entry that is never asked for and never ages: no first packet waits on ARP.
async fn neighbour(handle: &Handle, index: u32, address: Ipv4Addr, mac: [u8; 6]) -> io::Result<()> {
    handle
        .neighbours()
        .add(index, IpAddr::V4(address))
        .state(NeighbourState::Permanent)
        .link_layer_address(&mac)
        .replace()
        .execute()
        .await
        .map_err(failed)
}

async fn up(handle: &Handle, index: u32, mac: Option<[u8; 6]>) -> io::Result<()> {
    let mut message = LinkUnspec::new_with_index(index).up();
    if let Some(mac) = mac {
        message = message.address(mac.to_vec());
    }
    handle.link().set(message.build()).execute().await.map_err(failed)
}

fn sysctl(path: &str, value: &str) -> io::Result<()> {
    let path = format!("/proc/sys/net/{path}");
    std::fs::write(&path, value).map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))
}

/// Opens a tap in this thread's namespace; it lives, and the namespace with it, as long as a descriptor of it does.
///
/// # Errors
/// When `/dev/net/tun` cannot be opened or has no right to make one.
#[allow(unsafe_code)]
pub fn tap() -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: an all-zero `ifreq` is valid; the kernel reads name and flags, both set here, and writes only
    // inside the struct, which outlives the call.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(TAP.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        if libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &mut request) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(device.into())
}

/// Lets a tap outlive its descriptor, and `user` open it.
///
/// # Errors
/// As the kernel gives them.
#[allow(unsafe_code)]
pub fn keep_tap(tap: &OwnedFd, user: u32) -> io::Result<()> {
    for (request, value) in [(libc::TUNSETOWNER, user), (libc::TUNSETPERSIST, 1)] {
        // SAFETY: both requests take a number and no memory.
        if unsafe { libc::ioctl(tap.as_raw_fd(), request, libc::c_ulong::from(value)) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// What [`build`] makes.
pub struct Built {
    /// Holds everything below.
    pub namespace: OwnedFd,
    /// The guest's end of the network.
    pub tap: OwnedFd,
    /// Where the guest's questions and proxied connections arrive.
    pub sockets: Sockets,
}

/// Builds a slot from nothing. Blocks for some milliseconds; on a thread of its own, which is left in the new
/// namespace. What was made before a failure goes with the thread.
pub fn build(setting: &Setting) -> io::Result<Built> {
    let home = ns::current()?;
    ns::unshare()?;
    let namespace = ns::current()?;
    for (path, value) in [
        ("ipv6/conf/all/disable_ipv6", "1"),
        ("ipv6/conf/default/disable_ipv6", "1"),
        ("ipv4/ip_forward", "1"),
        // A refusal must not wait for the next second's token.
        ("ipv4/icmp_ratelimit", "0"),
    ] {
        match sysctl(path, value) {
            // A kernel without IPv6 has nothing to turn off.
            Err(error) if error.kind() == io::ErrorKind::NotFound && path.starts_with("ipv6") => {}
            other => other?,
        }
    }
    let tap = tap()?;
    let (range, number) = (setting.range, setting.number);
    blocking_netlink(async |handle| {
        let host_name = range.link(number);
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(host_name)
            .address(range.mac(number, 1).to_vec())
            .setns_by_fd(home.as_raw_fd())
            .build();
        let pair = LinkMessageBuilder::<LinkVeth>::new(UP, "")
            .address(range.mac(number, 2).to_vec())
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .up()
            .build();
        handle.link().add(pair).execute().await.map_err(failed)?;
        up(&handle, index("lo")?, None).await?;
        let inner = index(TAP)?;
        up(&handle, inner, Some(TAP_MAC)).await?;
        address(&handle, inner, GUEST_GATEWAY).await?;
        neighbour(&handle, inner, GUEST, GUEST_MAC).await?;
        let outer = index(UP)?;
        address(&handle, outer, range.address(number)).await?;
        neighbour(&handle, outer, range.host_end(number), range.mac(number, 1)).await?;
        let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(range.host_end(number)).build();
        handle.route().add(route).execute().await.map_err(failed)
    })?;
    nft::run(&rules::slot(setting))?;
    let sockets = sockets()?;
    ns::enter(home.as_fd())?;
    host_end(range, number)?;
    Ok(Built { namespace, tap, sockets })
}

/// Opens the sockets of a slot, in this thread's namespace.
pub fn sockets() -> io::Result<Sockets> {
    Ok(Sockets {
        dns: UdpSocket::bind((GUEST_GATEWAY, 53))?,
        dns_tcp: TcpListener::bind((GUEST_GATEWAY, 53))?,
        proxy: TcpListener::bind((GUEST_GATEWAY, PROXY_PORT))?,
    })
}

fn host_end(range: Range, number: u16) -> io::Result<()> {
    let name = range.link(number);
    let _ = sysctl(&format!("ipv6/conf/{name}/disable_ipv6"), "1");
    sysctl(&format!("ipv4/conf/{name}/forwarding"), "1")?;
    blocking_netlink(async |handle| {
        let index = index(&name)?;
        up(&handle, index, None).await?;
        address(&handle, index, range.host_end(number)).await?;
        neighbour(&handle, index, range.address(number), range.mac(number, 2)).await
    })
}

/// Makes `mac` the hardware address to which this namespace sends its guest's packets. Blocks; on a thread in the
/// slot's namespace.
///
/// # Errors
/// As the kernel gives them.
pub fn set_guest(mac: [u8; 6]) -> io::Result<()> {
    blocking_netlink(async |handle| neighbour(&handle, index(TAP)?, GUEST, mac).await)
}

/// Removes the host's end of a slot, and the slot's with it. Gone already is fine.
pub async fn remove(name: &str) -> io::Result<()> {
    let index = match index(name) {
        Ok(index) => index,
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
        Err(error) => return Err(error),
    };
    match netlink(async |handle| handle.link().del(index).execute().await.map_err(failed)).await {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        other => other,
    }
}

/// Every IPv4 address of this namespace.
pub async fn addresses() -> io::Result<Vec<Ipv4Addr>> {
    use netlink_packet_route::address::AddressAttribute;
    let messages: Vec<_> =
        netlink(async |handle| handle.address().get().execute().try_collect().await.map_err(failed)).await?;
    let own =
        messages.into_iter().flat_map(|message| message.attributes).filter_map(|attribute| match attribute {
            AddressAttribute::Local(IpAddr::V4(own)) => Some(own),
            _ => None,
        });
    Ok(own.collect())
}

/// Every IPv4 route of this namespace: destination, prefix, output link.
pub async fn routes() -> io::Result<Vec<(Ipv4Addr, u8, Option<u32>)>> {
    use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader};
    let filter = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let messages: Vec<_> =
        netlink(async |handle| handle.route().get(filter).execute().try_collect().await.map_err(failed))
            .await?;
    Ok(messages
        .into_iter()
        .filter(|message| message.header.table == RouteHeader::RT_TABLE_MAIN)
        .map(|message| {
            let mut destination = Ipv4Addr::UNSPECIFIED;
            let mut out = None;
            for attribute in &message.attributes {
                match attribute {
                    RouteAttribute::Destination(RouteAddress::Inet(address)) => destination = *address,
                    RouteAttribute::Oif(index) => out = Some(*index),
                    _ => {}
                }
            }
            (destination, message.header.destination_prefix_length, out)
        })
        .collect())
}

/// Names of the links in this namespace that begin with `prefix`.
pub async fn names(prefix: &str) -> io::Result<Vec<String>> {
    let messages: Vec<_> =
        netlink(async |handle| handle.link().get().execute().try_collect().await.map_err(failed)).await?;
    Ok(messages
        .into_iter()
        .flat_map(|message| message.attributes)
        .filter_map(|attribute| match attribute {
            LinkAttribute::IfName(name) if name.starts_with(prefix) => Some(name),
            _ => None,
        })
        .collect())
}

/// The name of a link.
pub fn name(index: u32) -> io::Result<String> {
    rustix::net::netdevice::index_to_name(socket()?, index).map_err(Into::into)
}

/// Lets packets that arrive on `name` be forwarded; the host's other links stay as they are.
pub fn forward_from(name: &str) -> io::Result<()> {
    sysctl(&format!("ipv4/conf/{name}/forwarding"), "1")
}
