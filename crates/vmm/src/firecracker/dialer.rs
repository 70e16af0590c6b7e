//! Connections to one guest, over its vsock device. Nothing is written.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kelvin_host::process::Process;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::config::VSOCK;
use super::streams::Streams;
use crate::Error;
use crate::process::{Sockets, Tail};

/// Makes connections to a guest.
#[derive(Debug)]
pub(super) struct Dialer {
    pub(super) sockets: Arc<Sockets>,
    pub(super) process: Arc<Process>,
    pub(super) generation: AtomicU64,
    /// The host's ends of those that were made in this generation.
    pub(super) streams: Streams,
    pub(super) console: Tail,
    pub(super) log: Tail,
}

impl Dialer {
    /// The last that the VMM has said.
    pub(super) fn words(&self) -> String {
        [self.log.text(), self.console.text()].join("\n").trim().to_owned()
    }

    /// Asks for a connection to a port of the guest; what is written after it waits for the guest.
    pub(super) async fn ask(&self, port: u32) -> Result<UnixStream, Error> {
        let io = |source| Error::Io { what: "connecting to the guest", source };
        let mut stream = match self.sockets.connect(VSOCK, &self.process).await {
            Ok(stream) => stream,
            // A VMM that is no more has said why.
            Err(_) if self.process.is_over() => {
                return Err(Error::Ended { what: "connecting to the guest", stderr: self.words() });
            }
            Err(source) => return Err(io(source)),
        };
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).await.map_err(io)?;
        let own = stream.as_fd().try_clone_to_owned().map_err(io)?;
        self.streams.add(own);
        Ok(stream)
    }

    /// Every connection is of no more use: the guest resets its ends when it goes on. Whoever has one is told now.
    pub(super) fn reset(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
        self.streams.close();
    }
}
