//! Slots: prebuilt networks for machines.
//!
//! ```text
//!  host namespace                          a slot's namespace (no name; held by descriptors and its VMM)
//!  uplink <─ forward, masquerade ─ kv<n> ══ up0 ─ forward, NAT, policy ─ tap0 ── guest eth0
//!                                  .1 /30   .2                169.254.0.22   169.254.0.21
//! ```
//!
//! Inside, all slots are equal: same tap, same addresses, same MACs, so that a snapshot fits every slot.
//! Outside, slot n has its own /30. All neighbours are permanent entries: nothing ever asks by ARP, and
//! nothing stale can answer. A namespace is never used twice: releasing a slot removes it, connections,
//! counters and queued packets with it, and only the number is used again.
//!
//! Who writes: [`Slots`] alone, numbers in the ledger before a slot exists. A crash of the daemon takes the
//! slots that waited with it, because nobody else held them; slots with a VMM inside go on and are adopted.

pub mod link;
pub mod netfilter;
pub mod nft;
pub mod ns;
pub mod rules;
mod slots;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use ipnet::Ipv4Net;
use kelvin_api::id::VmId;
use kelvin_api::network::{Policy, Traffic};
use serde::{Deserialize, Serialize};

pub use slots::{Options, Slots};

/// The tap's name in every slot.
pub const TAP: &str = "tap0";
/// The name of a slot's link to the host.
pub const UP: &str = "up0";
/// The guest's address, in every guest.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
/// The guest's gateway and resolver, in every guest.
pub const GUEST_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
/// The guest's MAC, in every guest.
pub const GUEST_MAC: [u8; 6] = [0x02, 0x4b, 0x47, 0, 0, 1];
/// The tap's MAC, in every slot.
pub const TAP_MAC: [u8; 6] = [0x02, 0x4b, 0x54, 0, 0, 1];
/// Where connections arrive that are allowed by name.
pub const PROXY_PORT: u16 = 3129;
/// Slots of one range: one /30 each.
pub const SLOTS: u16 = 1 << 14;

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This host cannot have slots.
    #[error("no network for sandboxes: {0}")]
    Unavailable(String),
    /// What was asked for is not there.
    #[error("{0}")]
    Options(String),
    /// All numbers are used.
    #[error("all {SLOTS} network slots are used")]
    Full,
    /// A slot could not be made or removed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The ledger.
    #[error("the ledger cannot be written")]
    Ledger(#[from] crate::db::Error),
}

/// The addresses of all slots: a /16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Ipv4Net", into = "Ipv4Net")]
pub struct Range(Ipv4Net);

impl TryFrom<Ipv4Net> for Range {
    type Error = String;

    fn try_from(net: Ipv4Net) -> Result<Self, String> {
        if net.prefix_len() != 16 || net.trunc() != net {
            return Err(format!("{net} is no /16"));
        }
        if !net.addr().is_private() {
            return Err(format!("{net} is not of a private block"));
        }
        Ok(Self(net))
    }
}

impl From<Range> for Ipv4Net {
    fn from(range: Range) -> Self {
        range.0
    }
}

impl std::str::FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::try_from(text.parse::<Ipv4Net>().map_err(|error| format!("{text:?}: {error}"))?)
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Range {
    fn bits(self, number: u16, end: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.0.addr()) + u32::from(number) * 4 + end)
    }

    /// The host's address towards slot `number`.
    pub fn host_end(self, number: u16) -> Ipv4Addr {
        self.bits(number, 1)
    }

    /// The address of slot `number`.
    pub fn address(self, number: u16) -> Ipv4Addr {
        self.bits(number, 2)
    }

    fn mac(self, number: u16, end: u8) -> [u8; 6] {
        let [_, second, ..] = self.0.addr().octets();
        let [high, low] = number.to_be_bytes();
        [0x02, 0x4b, end, second, high, low]
    }

    /// What the host's links of this range begin with.
    pub fn links(self) -> String {
        let [first, second, ..] = self.0.addr().octets();
        format!("kv{first:02x}{second:02x}")
    }

    /// The host's link to slot `number`.
    pub fn link(self, number: u16) -> String {
        format!("{}{number:04x}", self.links())
    }

    /// The host's table of rules.
    pub fn table(self) -> String {
        let [first, second, ..] = self.0.addr().octets();
        format!("kelvin_{first}_{second}")
    }

    fn overlaps(self, address: Ipv4Addr, prefix: u8) -> bool {
        Ipv4Net::new(address, prefix)
            .is_ok_and(|other| other.prefix_len() > 0 && (other.contains(&self.0) || self.0.contains(&other)))
    }
}

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

/// What a slot has counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Out of the guest.
    pub sent: Traffic,
    /// Into the guest.
    pub received: Traffic,
    /// Packets that were refused, by reason.
    pub denied: BTreeMap<String, u64>,
}

/// One network for one machine.
#[derive(Debug)]
pub struct Slot {
    number: u16,
    owner: VmId,
    setting: rules::Setting,
    namespace: OwnedFd,
    tap: Mutex<Option<OwnedFd>>,
    sockets: Mutex<Option<Sockets>>,
}

impl Slot {
    /// Its number.
    pub fn number(&self) -> u16 {
        self.number
    }

    /// Who it is to the ledger: numbers are used again, owners are not.
    pub fn owner(&self) -> &VmId {
        &self.owner
    }

    /// A hardware address for one machine: administered locally, 32 random bits below the prefix of ours.
    ///
    /// # Errors
    /// `Io` when the kernel gives no random bytes.
    pub fn random_mac() -> Result<[u8; 6], Error> {
        let mut mac = [GUEST_MAC[0], GUEST_MAC[1], 0, 0, 0, 0];
        rustix::rand::getrandom(&mut mac[2..], rustix::rand::GetRandomFlags::empty())
            .map_err(|error| Error::Io { what: "reading random bytes", source: error.into() })?;
        Ok(mac)
    }

    /// Sends its guest's packets to `mac` from now on, instead of to [`GUEST_MAC`]: its machine has or takes it.
    ///
    /// # Errors
    /// `Io` with what the kernel said.
    pub async fn set_guest_mac(&self, mac: [u8; 6]) -> Result<(), Error> {
        ns::inside(self.namespace.as_fd(), move || link::set_guest(mac))
            .await
            .map_err(|source| Error::Io { what: "setting the guest's hardware address", source })
    }

    /// Where the host reaches it: its guest's ports are this address's.
    pub fn address(&self) -> Ipv4Addr {
        self.setting.range.address(self.number)
    }

    /// The namespace, for what has to start inside.
    pub fn namespace(&self) -> &OwnedFd {
        &self.namespace
    }

    /// The tap, once: it belongs to the VMM from then on.
    pub fn take_tap(&self) -> Option<OwnedFd> {
        self.tap.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Leaves the tap in the namespace, for a VMM of `user` that opens it by its name; it goes with the namespace.
    ///
    /// # Errors
    /// When it was taken before, or as the kernel gives them.
    pub fn lend_tap(&self, user: u32) -> io::Result<()> {
        let tap = self.take_tap().ok_or_else(|| io::Error::other("the slot's tap is in use"))?;
        link::keep_tap(&tap, user)
    }

    /// The sockets, once: they belong to whoever answers the guest from then on.
    pub fn take_sockets(&self) -> Option<Sockets> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Opens the sockets anew, when those who had them are gone.
    ///
    /// # Errors
    /// `Io` when somebody has them still.
    pub async fn open_sockets(&self) -> Result<Sockets, Error> {
        ns::inside(self.namespace.as_fd(), link::sockets)
            .await
            .map_err(|source| Error::Io { what: "opening the sockets of a slot", source })
    }

    /// Opens the log of this slot's refusals.
    ///
    /// # Errors
    /// `Io` when somebody reads it already.
    pub async fn log(&self) -> Result<netfilter::Log, Error> {
        ns::inside(self.namespace.as_fd(), netfilter::Log::open)
            .await
            .and_then(netfilter::Log::watch)
            .map_err(|source| Error::Io { what: "opening the log of a slot", source })
    }

    /// Enforces `policy` from now on, in one transaction; connections out of the guest are looked at again.
    ///
    /// # Errors
    /// `Io` with what nftables said; then the former policy holds.
    pub async fn apply(&self, policy: &Policy) -> Result<(), Error> {
        // At random: a slot that was adopted does not tell which generation is in force.
        let mut random = [0; 4];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| Error::Io { what: "reading random bytes", source: error.into() })?;
        let generation = u32::from_ne_bytes(random).max(2);
        let commands = rules::changes(&self.setting, policy, generation);
        ns::inside(self.namespace.as_fd(), move || nft::run(&commands).map(drop))
            .await
            .map_err(|source| Error::Io { what: "changing the rules of a slot", source })
    }

    /// Puts the policy of a machine that has not run yet in force, once, on a new slot.
    ///
    /// # Errors
    /// `Io` with what nftables said.
    pub async fn begin(&self, policy: &Policy) -> Result<(), Error> {
        let commands = rules::additions(&self.setting, policy);
        ns::inside(self.namespace.as_fd(), move || nft::run(&commands).map(drop))
            .await
            .map_err(|source| Error::Io { what: "making the rules of a slot", source })
    }

    /// What was counted since the slot was built.
    ///
    /// # Errors
    /// `Io` with what nftables said.
    pub async fn counters(&self) -> Result<Counters, Error> {
        let text = ns::inside(self.namespace.as_fd(), || nft::run("list counters"))
            .await
            .map_err(|source| Error::Io { what: "reading the counters of a slot", source })?;
        Ok(counters(&text))
    }
}

fn counters(text: &str) -> Counters {
    let parsed: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
    let mut counters = Counters::default();
    for item in parsed["nftables"].as_array().into_iter().flatten() {
        let counter = &item["counter"];
        let (Some(name), Some(packets), Some(bytes)) =
            (counter["name"].as_str(), counter["packets"].as_u64(), counter["bytes"].as_u64())
        else {
            continue;
        };
        match name {
            "sent" => counters.sent = Traffic { packets, bytes },
            "received" => counters.received = Traffic { packets, bytes },
            _ => {
                let reason = name.strip_prefix("denied_").filter(|_| packets > 0);
                counters.denied.extend(reason.map(|reason| (reason.to_owned(), packets)));
            }
        }
    }
    counters
}

/// Whether this host can have slots, tried and not guessed: root, `/dev/net/tun`, `libnftables`, and a
/// namespace in which all of it works.
///
/// # Errors
/// `Unavailable` with the first thing that is missing and what to do.
pub async fn check() -> Result<(), Error> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::Unavailable("it needs root; run the server as root".to_owned()));
    }
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/net/tun") {
        return Err(Error::Unavailable(format!("/dev/net/tun: {error}; run `modprobe tun`")));
    }
    if let Err(error) = nft::check() {
        return Err(Error::Unavailable(format!("{error}; run `apt-get install libnftables1`")));
    }
    let tried = ns::on_thread(|| {
        ns::unshare()?;
        nft::run(
            "add table inet kelvin_check; add chain inet kelvin_check c { type nat hook postrouting priority srcnat; }; add rule inet kelvin_check c masquerade",
        )
    });
    match tried.await {
        Ok(_) => Ok(()),
        Err(error) => {
            Err(Error::Unavailable(format!("network namespaces with nftables do not work here: {error}")))
        }
    }
}

/// Another firewall's chain that drops what is forwarded unless it says otherwise, as Docker's does: a packet that our
/// rules accept is dropped there, and what a sandbox sends into the internet is lost without a word.
///
/// # Errors
/// As nftables gives them.
pub async fn foreign_drop() -> io::Result<Option<String>> {
    let text = ns::on_thread(|| nft::run("list chains")).await?;
    let parsed: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let chains = parsed["nftables"].as_array().into_iter().flatten().map(|item| &item["chain"]);
    let found = chains
        .filter(|chain| chain["hook"] == "forward" && chain["policy"] == "drop" && chain["family"] != "ip6")
        .map(|chain| ["family", "table", "name"].map(|key| chain[key].as_str().unwrap_or_default()).join(" "))
        .next();
    Ok(found)
}

/// The link of the host's default route.
///
/// # Errors
/// As netlink gives them.
pub async fn default_uplink() -> io::Result<Option<String>> {
    let routes = link::routes().await?;
    let index = routes.into_iter().find_map(|(_, prefix, index)| index.filter(|_| prefix == 0));
    index.map(link::name).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_has_its_own_addresses() {
        let range: Range = "10.213.0.0/16".parse().unwrap();
        assert_eq!(range.host_end(0), Ipv4Addr::new(10, 213, 0, 1));
        assert_eq!(range.address(0), Ipv4Addr::new(10, 213, 0, 2));
        assert_eq!(range.address(SLOTS - 1), Ipv4Addr::new(10, 213, 255, 254));
        assert_eq!(range.link(SLOTS - 1), "kv0ad53fff");
        assert!(range.overlaps(Ipv4Addr::new(10, 0, 0, 0), 8));
        assert!(range.overlaps(Ipv4Addr::new(10, 213, 7, 0), 24));
        assert!(!range.overlaps(Ipv4Addr::UNSPECIFIED, 0), "a default route is everywhere");
        for bad in ["10.213.0.0/15", "10.213.1.0/16", "8.8.0.0/16", "x"] {
            assert!(bad.parse::<Range>().is_err(), "{bad}");
        }
    }
}
