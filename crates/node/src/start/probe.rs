//! Readiness by TCP, for comparison alone: how others find it out who know of no better sign.
//!
//! Nothing is written; a crash leaves nothing.

use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use kelvin_api::AGENT_PORT;
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;

/// How long one connection may take.
const CONNECT: Duration = Duration::from_millis(50);
/// Between two of them.
const GAP: Duration = Duration::from_millis(5);
/// How long a guest is given once its agent has answered.
const PATIENCE: Duration = Duration::from_secs(5);

/// A probe that runs until it is dropped.
pub struct Probe(AbortOnDropHandle<Duration>);

impl Probe {
    /// Asks the guest at `address` from now on. The port is envd's; that nobody listens there is an answer too.
    pub fn begin(address: Ipv4Addr) -> Self {
        let since = Instant::now();
        Self(AbortOnDropHandle::new(tokio::spawn(async move {
            while !is_answered(address).await {
                // The way that is compared waits between two looks; whoever knows of nothing better has to.
                tokio::time::sleep(GAP).await;
            }
            since.elapsed()
        })))
    }

    /// How long it took; nothing when the guest does not answer.
    pub async fn answer(self) -> Option<Duration> {
        tokio::time::timeout(PATIENCE, self.0).await.ok()?.ok()
    }
}

async fn is_answered(address: Ipv4Addr) -> bool {
    match tokio::time::timeout(CONNECT, TcpStream::connect((address, AGENT_PORT))).await {
        Ok(Ok(_)) => true,
        Ok(Err(error)) => error.kind() == ErrorKind::ConnectionRefused,
        Err(_) => false,
    }
}
