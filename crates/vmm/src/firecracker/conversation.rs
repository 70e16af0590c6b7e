//! The HTTP conversation with a guest, over one vsock connection after the other.
//!
//! A snapshot resets the connections of the machine that goes on. Its users' streams must not end for that: this
//! end and the agent's (`crates/agent/src/vsock.rs`) both count what they have had and keep what they sent last, and
//! go on over a new connection. Only a reset by a snapshot is gone over; whatever else ends a connection ends the
//! conversation. Bounded: what is kept, and how long a guest may take to come back.
//!
//! ```text
//! node <── socket pair ──> relay <── vsock ──> agent
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kelvin_api::guest::{HTTP_VSOCK, Hello, KEPT};
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::dialer::Dialer;
use crate::Error;
use crate::control::greeting;

/// One read.
const CHUNK: usize = 64 << 10;
/// How long a machine may take to go on after a snapshot.
const BACK: Duration = Duration::from_secs(120);

/// One conversation.
struct Conversation {
    dialer: Arc<Dialer>,
    session: [u8; 16],
    kept: VecDeque<u8>,
    sent: u64,
    received: u64,
    /// Had from the guest, not yet handed on.
    pending: Vec<u8>,
}

/// Begins a conversation and returns the caller's end of it.
///
/// # Errors
/// `Io` when nobody listens in the guest.
pub async fn begin(dialer: &Arc<Dialer>) -> Result<UnixStream, Error> {
    let io = |source| Error::Io { what: "connecting to the guest", source };
    let mut session = [0; 16];
    getrandom(&mut session, GetRandomFlags::empty()).map_err(|error| io(error.into()))?;
    let dialer = Arc::clone(dialer);
    let (kept, pending) = (VecDeque::new(), Vec::new());
    let conversation = Conversation { dialer, session, kept, sent: 0, received: 0, pending };
    let (generation, connection, _) = conversation.connect().await?;
    let (own, theirs) = UnixStream::pair().map_err(io)?;
    // Ends with either of its ends, and with the VMM.
    tokio::spawn(async move { conversation.relay(own, generation, connection).await });
    Ok(theirs)
}

impl Conversation {
    /// A connection of this conversation, its generation, and what the guest has had.
    async fn connect(&self) -> Result<(u64, UnixStream, u64), Error> {
        let io = |source| Error::Io { what: "connecting to the guest", source };
        let generation = self.dialer.generation.load(Ordering::Relaxed);
        let mut stream = self.dialer.ask(HTTP_VSOCK).await?;
        let hello = Hello { session: self.session, received: self.received };
        stream.write_all(&hello.encode()).await.map_err(io)?;
        greeting(&mut stream).await?;
        let had = stream.read_u64().await.map_err(io)?;
        Ok((generation, stream, had))
    }

    async fn relay(mut self, mut own: UnixStream, mut generation: u64, mut connection: UnixStream) {
        loop {
            let ended = self.pump(&mut own, &mut connection).await;
            let is_reset = generation != self.dialer.generation.load(Ordering::Relaxed);
            if !is_reset || matches!(ended, Ended::Here) {
                return;
            }
            match tokio::time::timeout(BACK, self.again()).await {
                Ok(Some(next)) => (generation, connection) = next,
                _ => {
                    tracing::debug!("a conversation with a guest did not outlive a snapshot");
                    return;
                }
            }
        }
    }

    /// Goes on over a new connection, once the guest runs again.
    async fn again(&mut self) -> Option<(u64, UnixStream)> {
        loop {
            let tried = tokio::select! {
                tried = self.connect() => tried,
                () = self.dialer.process.ended() => return None,
            };
            let Ok((generation, mut connection, had)) = tried else {
                // Reset once more, or the agent is busy: nothing tells when.
                tokio::time::sleep(Duration::from_millis(2)).await;
                continue;
            };
            let behind = self.sent.checked_sub(had).filter(|_| had != Hello::UNKNOWN)?;
            let behind = usize::try_from(behind).ok().filter(|behind| *behind <= self.kept.len())?;
            let missing: Vec<u8> = self.kept.range(self.kept.len() - behind..).copied().collect();
            if connection.write_all(&missing).await.is_ok() {
                return Some((generation, connection));
            }
        }
    }

    /// Carries bytes both ways until one end is over.
    async fn pump(&mut self, own: &mut UnixStream, connection: &mut UnixStream) -> Ended {
        let (mut from_here, mut to_here) = own.split();
        let (mut from_guest, mut to_guest) = connection.split();
        let (kept, sent, received) = (&mut self.kept, &mut self.sent, &mut self.received);
        let pending = &mut self.pending;
        let out = async {
            let mut buffer = vec![0; CHUNK];
            loop {
                let count = match from_here.read(&mut buffer).await {
                    Ok(count @ 1..) => count,
                    _ => return Ended::Here,
                };
                let mut rest = &buffer[..count];
                // Kept before it is written: a write that is cut short is sent again.
                kept.extend(rest);
                *sent += count as u64;
                let excess = kept.len().saturating_sub(KEPT);
                kept.drain(..excess);
                while !rest.is_empty() {
                    match to_guest.write(rest).await {
                        Ok(written @ 1..) => rest = &rest[written..],
                        _ => return Ended::There,
                    }
                }
            }
        };
        let back = async {
            loop {
                // First what was left when the last connection broke.
                while !pending.is_empty() {
                    match to_here.write(pending).await {
                        Ok(written @ 1..) => drop(pending.drain(..written)),
                        _ => return Ended::Here,
                    }
                }
                pending.reserve(CHUNK);
                match from_guest.read_buf(pending).await {
                    Ok(count @ 1..) => *received += count as u64,
                    _ => return Ended::There,
                }
            }
        };
        tokio::select! {
            ended = out => ended,
            ended = back => ended,
        }
    }
}

/// Which end of a conversation is over.
enum Ended {
    /// The node's.
    Here,
    /// The connection to the guest.
    There,
}
