//! Names and addresses: those that are the same in every slot, and those of all slots on the host.

use std::fmt;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

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

    pub(super) fn mac(self, number: u16, end: u8) -> [u8; 6] {
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

    pub(super) fn overlaps(self, address: Ipv4Addr, prefix: u8) -> bool {
        Ipv4Net::new(address, prefix)
            .is_ok_and(|other| other.prefix_len() > 0 && (other.contains(&self.0) || self.0.contains(&other)))
    }
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
