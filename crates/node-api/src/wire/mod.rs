//! The seam between processes: Connect over HTTP/2, messages of `proto/node.proto`.
//!
//! Whoever reaches a [`server`] may do everything with the node: it listens where only its control plane and gateway come,
//! until the parts show each other who they are. A call that breaks may have been done or not; its caller asks again with the
//! same ids, or looks.

mod client;
mod convert;
mod failure;
mod import;
mod server;
mod stream;

pub use client::Remote;
pub use server::serve;

/// Generated from `proto/node.proto`.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, clippy::large_futures, clippy::too_many_lines)]
mod generated {
    connectrpc::include_generated!();
}
use generated::kelvin::node::v1 as pb;

/// The header that carries [`crate::VERSION`].
const VERSION_HEADER: &str = "kelvin-node-api";
/// The largest message: a node full of sandboxes, or a fork of many children.
const MAX_MESSAGE: usize = 64 << 20;
/// Bytes of one message of a stream.
const STRETCH: usize = 64 << 10;
/// What may be on its way in one stream, in bytes. That of a connection is no limit: a reader that sleeps stops its own
/// stream, and nobody else's.
const STREAM_WINDOW: u32 = 128 << 10;
const CONNECTION_WINDOW: u32 = 1 << 30;
/// Calls, connections and requests of one peer at one time.
const STREAMS: u32 = 16 << 10;
/// How long a peer may be silent before it is asked, and before it is given up.
const KEEP_ALIVE: std::time::Duration = std::time::Duration::from_secs(20);

#[cfg(test)]
mod tests;
