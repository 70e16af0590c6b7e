//! Wire types, ids, units and error codes that every part of Kelvin shares. No I/O.
//!
//! Nothing here is written to disk and nothing here can crash half-way. What is deliberately absent:
//! anything a driver needs.

pub mod account;
pub mod boot;
pub mod build;
mod code;
pub mod digest;
pub mod error;
pub mod event;
pub mod guest;
pub mod id;
pub mod image;
pub mod import;
mod kind;
pub mod network;
pub mod phase;
pub mod sandbox;
pub mod signal;
pub mod signature;
pub mod units;

/// envd's services, generated from `proto/`.
#[cfg(feature = "envd")]
#[allow(missing_docs, clippy::all, clippy::unwrap_used, clippy::too_many_lines)]
pub mod envd {
    connectrpc::include_generated!();
}

/// The version of envd whose features the agent has; clients gate on it.
/// Source: the official E2B clients' version checks.
pub const ENVD_VERSION: &str = "0.6.13";
/// The port under which clients address the agent itself.
pub const AGENT_PORT: u16 = 49983;
/// Header that names the sandbox a request is for.
pub const SANDBOX_HEADER: &str = "e2b-sandbox-id";
/// Header that names the port inside that sandbox.
pub const PORT_HEADER: &str = "e2b-sandbox-port";
