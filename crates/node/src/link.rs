//! The way into one sandbox's network: connections to its ports, cut when it ends.
//!
//! A slot's address is used again. No connection of a sandbox may outlive it: each holds a token of the
//! sandbox, and the slot is given back when the last is gone.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use kelvin_api::id::Token;
use kelvin_api::network::{Attachment, Refusal};
use kelvin_host::descriptors::{Budget, CONNECTION};
use kelvin_host::net::Slot;
use kelvin_node_api::Cut;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::error::Error;

/// How long a guest may take to accept.
const CONNECT: Duration = Duration::from_secs(10);
/// The same for what is sent later, in milliseconds.
const SILENCE_MS: u32 = 10_000;
/// Connections into one sandbox at one time.
const CONNECTIONS: usize = 1024;
/// Of those the ones through the agent, which share its one connection with everything that is asked of it. The next one
/// waits, as long as a connection may take.
const TUNNELS: usize = 128;
/// How long connections may take to notice that they are cut.
const CUT: Duration = Duration::from_secs(10);
/// Refusals that are remembered.
const RECENT: usize = 64;

/// The network of a sandbox that runs.
pub struct Network {
    /// Its slot.
    pub slot: Arc<Slot>,
    attachment: RwLock<Attachment>,
    cut: CancellationToken,
    open: TaskTracker,
    permits: Arc<Semaphore>,
    tunnels: Arc<Semaphore>,
    recent: Mutex<VecDeque<Refusal>>,
}

impl Network {
    /// A network without connections.
    pub fn new(slot: Arc<Slot>, attachment: Attachment) -> Self {
        Self {
            slot,
            attachment: RwLock::new(attachment),
            cut: CancellationToken::new(),
            open: TaskTracker::new(),
            permits: Arc::new(Semaphore::new(CONNECTIONS)),
            tunnels: Arc::new(Semaphore::new(TUNNELS)),
            recent: Mutex::default(),
        }
    }

    /// Its rules.
    pub fn attachment(&self) -> Attachment {
        self.attachment.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What callers of its ports must show, and the `Host` that servers see.
    pub fn way_in(&self) -> (Option<Token>, Option<String>) {
        let attachment = self.attachment.read().unwrap_or_else(PoisonError::into_inner);
        (attachment.traffic_token.clone(), attachment.mask_request_host.clone())
    }

    /// Remembers other rules.
    pub fn set_attachment(&self, attachment: Attachment) {
        *self.attachment.write().unwrap_or_else(PoisonError::into_inner) = attachment;
    }

    /// Connects to a port of the guest.
    ///
    /// # Errors
    /// `Busy`, `Descriptors`, `PortClosed`, `PortSilent`.
    pub async fn dial(&self, sandbox: &str, port: u16) -> Result<Stream, Error> {
        let place = self.place(sandbox)?;
        let _descriptor = Budget::of_process().take(CONNECTION)?;
        let address = SocketAddr::from((self.slot.address(), port));
        let connecting = tokio::time::timeout(CONNECT, TcpStream::connect(address));
        let gone = || Error::Unknown(sandbox.to_owned());
        match self.cut.run_until_cancelled(connecting).await {
            None => Err(gone()),
            Some(Err(_)) => Err(Error::PortSilent { sandbox: sandbox.to_owned(), port, after: CONNECT }),
            Some(Ok(Err(source))) => Err(Error::PortClosed { sandbox: sandbox.to_owned(), port, source }),
            Some(Ok(Ok(stream))) => {
                let _ = stream.set_nodelay(true);
                // A kept connection to a guest that fell silent must not look like a slow server for a quarter of an
                // hour: bytes that nobody acknowledges end it.
                let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, SILENCE_MS);
                Ok(self.stream(Way::Direct(stream), place))
            }
        }
    }

    /// A connection that the agent makes inside of the guest, to what does not listen on the slot's address. `opening`
    /// opens it.
    ///
    /// # Errors
    /// `Busy`, `Unknown` when the sandbox ends meanwhile, and what `opening` says.
    pub async fn tunnel(
        &self,
        sandbox: &str,
        opening: impl Future<Output = Result<Tunnel, Error>>,
    ) -> Result<Stream, Error> {
        let mut place = self.place(sandbox)?;
        let busy = || Error::Busy { sandbox: sandbox.to_owned(), limit: TUNNELS };
        let turn = tokio::time::timeout(CONNECT, Arc::clone(&self.tunnels).acquire_owned());
        let turn = self.cut.run_until_cancelled(turn).await;
        let turn = turn.ok_or_else(|| Error::Unknown(sandbox.to_owned()))?;
        place._tunnel = Some(turn.map_err(|_| busy())?.map_err(|_| busy())?);
        match self.cut.run_until_cancelled(opening).await {
            None => Err(Error::Unknown(sandbox.to_owned())),
            Some(Err(error)) => Err(error),
            Some(Ok(tunnel)) => Ok(self.stream(Way::Tunnel(tunnel), place)),
        }
    }

    fn place(&self, sandbox: &str) -> Result<Place, Error> {
        let permit = Arc::clone(&self.permits)
            .try_acquire_owned()
            .map_err(|_| Error::Busy { sandbox: sandbox.to_owned(), limit: CONNECTIONS })?;
        Ok(Place { _token: self.open.token(), _permit: permit, _tunnel: None })
    }

    fn stream(&self, way: Way, place: Place) -> Stream {
        Stream { way, cut: Box::pin(self.cut.clone().cancelled_owned()), _place: place }
    }

    /// Cuts every connection and waits until all are gone.
    pub async fn close(&self) {
        self.cut.cancel();
        self.open.close();
        if tokio::time::timeout(CUT, self.open.wait()).await.is_err() {
            tracing::error!(
                slot = self.slot.number(),
                left = self.open.len(),
                "connections outlive their sandbox"
            );
        }
    }

    /// Follows the slot's log until the network is closed.
    pub async fn follow(self: Arc<Self>, sandbox: String) {
        let follow = async {
            let log = self.slot.log().await.map_err(|error| io::Error::other(error.to_string()))?;
            loop {
                for refused in log.next().await? {
                    tracing::info!(
                        sandbox,
                        reason = refused.reason,
                        target = refused.target,
                        "egress refused"
                    );
                    let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
                    if recent.len() == RECENT {
                        recent.pop_front();
                    }
                    let at = jiff::Timestamp::now();
                    recent.push_back(Refusal { at, reason: refused.reason, target: refused.target });
                }
            }
        };
        let followed: Option<io::Result<()>> = self.cut.run_until_cancelled(follow).await;
        if let Some(Err(error)) = followed {
            tracing::warn!(sandbox, %error, "refusals are counted but not logged");
        }
    }

    /// The last refusals, oldest first.
    pub fn recent(&self) -> Vec<Refusal> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

/// A stream of bytes that the agent connects inside of the guest.
pub type Tunnel = TokioIo<hyper::upgrade::Upgraded>;

enum Way {
    Direct(TcpStream),
    Tunnel(Tunnel),
}

/// One connection among those that a sandbox may have, and that its end waits for.
struct Place {
    _token: TaskTrackerToken,
    _permit: OwnedSemaphorePermit,
    _tunnel: Option<OwnedSemaphorePermit>,
}

/// A connection to a port of a guest.
pub struct Stream {
    way: Way,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    _place: Place,
}

/// Does the same to either way.
macro_rules! on_way {
    ($stream:expr, $way:ident => $work:expr) => {
        match &mut $stream.way {
            Way::Direct(stream) => {
                let $way = Pin::new(stream);
                $work
            }
            Way::Tunnel(stream) => {
                let $way = Pin::new(stream);
                $work
            }
        }
    };
}

impl Stream {
    fn poll_cut(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.cut.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::Error::new(io::ErrorKind::ConnectionReset, Cut)),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_cut(context)?;
        on_way!(self, way => way.poll_read(context, buffer))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_cut(context)?;
        on_way!(self, way => way.poll_write(context, bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_cut(context)?;
        on_way!(self, way => way.poll_flush(context))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_cut(context)?;
        on_way!(self, way => way.poll_shutdown(context))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_cut(context)?;
        on_way!(self, way => way.poll_write_vectored(context, buffers))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.way {
            Way::Direct(stream) => stream.is_write_vectored(),
            Way::Tunnel(stream) => stream.is_write_vectored(),
        }
    }
}
