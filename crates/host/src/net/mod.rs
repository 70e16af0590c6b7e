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

mod addresses;
mod error;
mod host;
pub mod link;
pub mod netfilter;
pub mod nft;
pub mod ns;
pub mod rules;
mod slot;
mod slots;

pub use addresses::{GUEST, GUEST_GATEWAY, GUEST_MAC, PROXY_PORT, Range, SLOTS, TAP, TAP_MAC, UP};
pub use error::Error;
pub use host::{check, default_uplink, foreign_drop};
pub use link::Sockets;
pub use slot::{Counters, Slot};
pub use slots::{Options, Slots};
