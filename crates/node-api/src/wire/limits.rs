//! What both ends of the wire hold to.

use std::time::Duration;

/// The header that carries [`crate::VERSION`].
pub(super) const VERSION_HEADER: &str = "kelvin-node-api";
/// The largest message: a node full of sandboxes, or a fork of many children.
pub(super) const MAX_MESSAGE: usize = 64 << 20;
/// Bytes of one message of a stream.
pub(super) const STRETCH: usize = 64 << 10;
/// What may be on its way in one stream, in bytes. That of a connection is no limit: a reader that sleeps stops its own
/// stream, and nobody else's.
pub(super) const STREAM_WINDOW: u32 = 128 << 10;
pub(super) const CONNECTION_WINDOW: u32 = 1 << 30;
/// Calls, connections and requests of one peer at one time.
pub(super) const STREAMS: u32 = 16 << 10;
/// How long a peer may be silent before it is asked, and before it is given up.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(20);
