//! What guests are answered by name: their resolver, and the proxy that connects for them where a policy
//! allows domains.
//!
//! ```text
//! guest ── 53 ───────> dns ──────┐
//!       ── 80, 443 ──> proxy ────┴─> upstream resolver, allowed servers        this process, unprivileged
//!                                     ^
//!       daemon ── run/egress.sock ── attach(slot, sockets, policy), policy, detach, state
//! ```
//!
//! A process of its own, for two reasons: hostile bytes are parsed without privileges, and a daemon that is
//! killed or upgraded takes no running machine's names away. It starts with nothing but a listening socket;
//! the sockets in the slots come from the daemon as descriptors, so a guest is known by the socket that it
//! speaks to and cannot pretend to be another.
//!
//! Who writes: nobody. State is in memory: the daemon attaches again when this process was restarted, and
//! without it names fail closed.

mod dns;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod options;
mod proxy;
mod server;
mod slot;
pub mod wire;

pub use dns::system_resolver;
pub use options::Options;
pub use server::run;
