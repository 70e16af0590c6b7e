//! The guest's network, the same in every guest: configured once, at boot, so that it is part of every
//! snapshot and an activation has nothing to do for it.
//!
//! IPv4 on the one link there is, with the gateway as a permanent neighbour; IPv6 only on `lo`, because the
//! host forwards none. The host's end is `kelvin-host`'s `net`; the constants are the same.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketType, socket};

const LINK: &str = "eth0";
const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 252);
/// The host's end, and who answers for names.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
const GATEWAY_MAC: [u8; 6] = [0x02, 0x4b, 0x54, 0, 0, 1];

/// `struct arpreq` of `linux/if_arp.h`.
#[repr(C)]
struct ArpRequest {
    address: libc::sockaddr,
    hardware: libc::sockaddr,
    flags: libc::c_int,
    mask: libc::sockaddr,
    device: [libc::c_char; 16],
}

fn control() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::INET, SocketType::DGRAM, None)?)
}

fn request(link: &str) -> libc::ifreq {
    // SAFETY: an all-zero `ifreq` is valid.
    #[allow(unsafe_code)]
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(link.bytes()) {
        *to = from.cast_signed();
    }
    request
}

/// An address as the kernel's old interfaces take it.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data: [libc::c_char; 14] = [0; 14];
    for (to, from) in data[2..6].iter_mut().zip(address.octets()) {
        *to = from.cast_signed();
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

/// Makes one request of `socket`; every request here has its name or its device set.
#[allow(unsafe_code)]
fn ask<T>(socket: &OwnedFd, number: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: each caller passes the struct that `number` takes; the kernel reads and writes inside it only,
    // and it outlives the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), number, std::ptr::from_mut(argument)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[allow(unsafe_code)]
fn up(socket: &OwnedFd, link: &str) -> io::Result<()> {
    let mut request = request(link);
    ask(socket, libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: the request before has set this member of the union.
    unsafe { request.ifr_ifru.ifru_flags |= (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short };
    ask(socket, libc::SIOCSIFFLAGS, &mut request)
}

/// Brings `lo` up: programs expect 127.0.0.1 even in a machine without a network.
pub fn loopback_up() -> io::Result<()> {
    up(&control()?, "lo")
}

fn hardware_address(mac: [u8; 6]) -> libc::sockaddr {
    let mut address = socket_address(Ipv4Addr::UNSPECIFIED);
    address.sa_family = libc::ARPHRD_ETHER;
    for (to, from) in address.sa_data.iter_mut().zip(mac) {
        *to = from.cast_signed();
    }
    address
}

/// Makes the gateway a permanent neighbour.
fn set_neighbour(socket: &OwnedFd) -> io::Result<()> {
    let mut neighbour = ArpRequest {
        address: socket_address(GATEWAY),
        hardware: hardware_address(GATEWAY_MAC),
        flags: libc::ATF_PERM | libc::ATF_COM,
        mask: socket_address(Ipv4Addr::UNSPECIFIED),
        device: [0; 16],
    };
    for (to, from) in neighbour.device.iter_mut().zip(LINK.bytes()) {
        *to = from.cast_signed();
    }
    ask(socket, libc::SIOCSARP, &mut neighbour)
}

/// The link's hardware address, which each machine gets of its own; opened before the snapshot.
pub struct Hardware(OwnedFd);

impl Hardware {
    /// Ready to be set.
    pub fn open() -> io::Result<Self> {
        Ok(Self(control()?))
    }

    /// Takes `mac` from now on.
    pub fn set(&self, mac: [u8; 6]) -> io::Result<()> {
        let mut request = request(LINK);
        request.ifr_ifru.ifru_hwaddr = hardware_address(mac);
        ask(&self.0, libc::SIOCSIFHWADDR, &mut request)?;
        // The kernel forgets neighbours with the address they knew, permanent ones too.
        set_neighbour(&self.0)
    }
}

/// Configures the link, when the machine has one.
pub fn configure() -> io::Result<()> {
    if !std::path::Path::new("/sys/class/net").join(LINK).exists() {
        return Ok(());
    }
    let ipv6 = format!("/proc/sys/net/ipv6/conf/{LINK}/disable_ipv6");
    match std::fs::write(ipv6, "1") {
        // A kernel without IPv6 has nothing to turn off.
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = control()?;
    for (number, address) in [(libc::SIOCSIFADDR, ADDRESS), (libc::SIOCSIFNETMASK, MASK)] {
        let mut request = request(LINK);
        request.ifr_ifru.ifru_addr = socket_address(address);
        ask(&socket, number, &mut request)?;
    }
    up(&socket, LINK)?;
    set_neighbour(&socket)?;
    // SAFETY: an all-zero `rtentry` is valid; its pointers stay null.
    #[allow(unsafe_code)]
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = socket_address(GATEWAY);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    ask(&socket, libc::SIOCADDRT, &mut route)
}
