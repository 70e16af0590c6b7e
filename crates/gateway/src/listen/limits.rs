//! What a connection may take.

use std::time::Duration;

/// How long a connection may take to end in good order.
pub const LINGER: Duration = Duration::from_secs(1);
/// Bytes a second that a body has to bring on average, beyond its first time limit.
pub const BODY_RATE: u64 = 512;

/// What a connection may take. Every time is for nothing happening, not for a whole request.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at one time.
    pub connections: usize,
    /// Of those the ones of one address (IPv6: of one /64). Loopback has no limit of its own.
    pub per_address: usize,
    /// A request's head, from its first byte; and the first request of a connection.
    pub header: Duration,
    /// The next bytes of a body that is waited for.
    pub body: Duration,
    /// The next request.
    pub idle: Duration,
    /// The next bytes of a reply being read.
    pub unread: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 10_000,
            per_address: 2048,
            header: Duration::from_secs(30),
            body: Duration::from_secs(60),
            idle: Duration::from_secs(75),
            unread: Duration::from_secs(300),
        }
    }
}
