//! One slot: its tap, its sockets, its rules and what it has counted.
//!
//! Writes: the rules of its namespace, each change in one transaction. A crash of the daemon leaves those in force.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use kelvin_api::id::VmId;
use kelvin_api::network::{Policy, Traffic};

use super::addresses::GUEST_MAC;
use super::error::Error;
use super::link::{self, Sockets};
use super::{netfilter, nft, ns, rules};

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
    pub(super) number: u16,
    pub(super) owner: VmId,
    pub(super) setting: rules::Setting,
    pub(super) namespace: OwnedFd,
    pub(super) tap: Mutex<Option<OwnedFd>>,
    pub(super) sockets: Mutex<Option<Sockets>>,
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
