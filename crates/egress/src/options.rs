//! What the process is started with.

use std::net::SocketAddr;

/// How this process reaches the outside.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Options {
    /// The link that outgoing connections are bound to; `None` leads nowhere.
    pub uplink: Option<String>,
    /// Where questions are sent.
    pub resolver: Option<SocketAddr>,
    /// Proxied connections of one sandbox at one time.
    pub max_connections: u32,
    /// Which build speaks: another one is replaced at the daemon's start.
    pub build: String,
}
