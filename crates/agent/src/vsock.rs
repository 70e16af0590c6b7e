//! The two ways in where the machine has a vsock device: each connection is a stream of its own.
//!
//! Only the host is let in, by its address: a process of the guest must not activate its own machine. A snapshot
//! resets every connection of the machine, of its source as of its clones; listeners stay (Linux,
//! `net/vmw_vsock/virtio_transport.c`, transport reset event).

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use kelvin_api::guest::{Hello, KEPT};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::port::watched;
use crate::state::State;

/// The host's address. Source: vsock(7), `VMADDR_CID_HOST`.
const HOST: u32 = 2;
/// Every address of this machine, whichever it has after a restore.
const ANY: u32 = libc::VMADDR_CID_ANY;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

fn listen(port: u32) -> io::Result<Socket> {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    socket.bind(&SockAddr::vsock(ANY, port))?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// The next connection of the host; others are refused by being closed.
fn accept(socket: &Socket) -> io::Result<Socket> {
    loop {
        match socket.accept() {
            Ok((stream, peer)) if peer.as_vsock_address().is_some_and(|(cid, _)| cid == HOST) => {
                return Ok(stream);
            }
            // One that was reset before it was accepted says nothing about the next.
            Ok(_) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::ECONNRESET | libc::ECONNABORTED)) => {}
            Err(error) => return Err(error),
        }
    }
}

/// A port whose connections are read by a thread.
pub struct Port(Socket);

impl Port {
    /// Listens on `port`.
    ///
    /// # Errors
    /// When the machine has no vsock device, or the port is taken.
    pub fn open(port: u32) -> io::Result<Self> {
        listen(port).map(Self)
    }

    /// Waits for the host's next connection.
    ///
    /// # Errors
    /// When the socket itself fails.
    pub fn accept(&self) -> io::Result<File> {
        let stream = accept(&self.0)?;
        stream.set_nonblocking(false)?;
        Ok(File::from(OwnedFd::from(stream)))
    }
}

/// How long a host may take to say hello.
const HELLO: Duration = Duration::from_secs(5);

/// A port whose conversations are served one after the other. A conversation outlives its connection: a snapshot
/// resets those of the machine that goes on, and its streams must not end for that.
pub struct Listener {
    socket: AsyncFd<Socket>,
    state: Arc<State>,
    current: Option<([u8; 16], Arc<Mutex<Conversation>>)>,
    next: Option<(Hello, OwnedFd)>,
}

impl Listener {
    /// Listens on `port`.
    ///
    /// # Errors
    /// As [`Port::open`].
    pub fn new(port: u32, state: Arc<State>) -> io::Result<Self> {
        let socket = listen(port)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket: watched(socket)?, state, current: None, next: None })
    }

    /// Waits until the host begins a conversation.
    ///
    /// # Errors
    /// When the socket itself fails.
    pub async fn accept(&mut self) -> io::Result<Stream> {
        self.current = None;
        if self.next.is_none() {
            self.state.set_http_waiting(true);
        }
        loop {
            let (hello, fd) = match self.next.take() {
                Some(next) => next,
                None => self.greet().await?,
            };
            if hello.received > 0 {
                // Of a machine that this one was, or of an agent that crashed.
                let _ = rustix::io::write(&fd, &Hello::UNKNOWN.to_be_bytes());
                continue;
            }
            if rustix::io::write(&fd, &0_u64.to_be_bytes()).is_err() {
                continue;
            }
            self.state.set_http_waiting(false);
            let conversation = Arc::new(Mutex::new(Conversation::new(watched(fd)?)));
            self.current = Some((hello.session, Arc::clone(&conversation)));
            return Ok(Stream(conversation));
        }
    }

    /// Gives the conversation that is served its next connections; ends when the host begins another one.
    ///
    /// # Errors
    /// When the socket itself fails.
    pub async fn watch(&mut self) -> io::Result<()> {
        loop {
            let (hello, fd) = self.greet().await?;
            match &self.current {
                Some((session, conversation)) if *session == hello.session => {
                    let mut conversation = conversation.lock().unwrap_or_else(PoisonError::into_inner);
                    let answer = conversation.received;
                    if rustix::io::write(&fd, &answer.to_be_bytes()).is_ok() {
                        conversation.resume(watched(fd)?, hello.received);
                    }
                }
                _ => {
                    self.next = Some((hello, fd));
                    return Ok(());
                }
            }
        }
    }

    /// The host's next connection that says what it is.
    async fn greet(&self) -> io::Result<(Hello, OwnedFd)> {
        loop {
            let mut guard = self.socket.readable().await?;
            let Ok(accepted) = guard.try_io(|socket| accept(socket.get_ref())) else { continue };
            let stream = accepted?;
            stream.set_nonblocking(true)?;
            let fd = watched(OwnedFd::from(stream))?;
            if let Ok(Ok(hello)) = tokio::time::timeout(HELLO, hello(&fd)).await {
                return Ok((hello, fd.into_inner()));
            }
        }
    }
}

async fn hello(fd: &AsyncFd<OwnedFd>) -> io::Result<Hello> {
    let (mut bytes, mut had) = ([0; Hello::LENGTH], 0);
    while had < bytes.len() {
        let mut guard = fd.readable().await?;
        match guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut bytes[had..])?)) {
            Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => had += count?,
            Err(_would_block) => {}
        }
    }
    Ok(Hello::decode(bytes))
}

/// One conversation, over one connection after the other.
struct Conversation {
    /// None while a reset waits for the host to come again.
    connection: Option<AsyncFd<OwnedFd>>,
    /// The last that was sent, [`KEPT`] at the most.
    kept: VecDeque<u8>,
    /// How much of `kept`, from its end, has to be sent again.
    behind: usize,
    sent: u64,
    received: u64,
    over: bool,
    wakers: [Option<Waker>; 2],
}

/// Whether an error is a reset of the connection and not the host's goodbye.
fn is_reset(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ECONNRESET | libc::ENOTCONN))
}

impl Conversation {
    fn new(connection: AsyncFd<OwnedFd>) -> Self {
        let (kept, wakers) = (VecDeque::new(), [None, None]);
        Self { connection: Some(connection), kept, behind: 0, sent: 0, received: 0, over: false, wakers }
    }

    fn resume(&mut self, connection: AsyncFd<OwnedFd>, host_received: u64) {
        let behind = self.sent.checked_sub(host_received).and_then(|behind| usize::try_from(behind).ok());
        match behind.filter(|behind| *behind <= self.kept.len()) {
            Some(behind) => {
                self.behind = behind;
                self.connection = Some(connection);
            }
            None => self.over = true,
        }
        self.wakers.iter_mut().filter_map(Option::take).for_each(Waker::wake);
    }

    /// Whoever waits on a connection has to hear of the next one too.
    fn wait(&mut self, side: usize, cx: &Context<'_>) {
        match &mut self.wakers[side] {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.kept.extend(bytes);
        let excess = self.kept.len().saturating_sub(KEPT);
        self.kept.drain(..excess);
        self.sent += bytes.len() as u64;
    }

    /// Writes to the connection. A reset is no error: it waits for the next connection.
    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: Option<&[u8]>) -> Poll<io::Result<usize>> {
        loop {
            if self.over {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            self.wait(1, cx);
            let Some(connection) = &self.connection else { return Poll::Pending };
            let from = self.kept.len() - self.behind;
            let again = self.kept.range(from..).copied().take(64 << 10).collect::<Vec<u8>>();
            let next = if again.is_empty() { bytes.unwrap_or_default() } else { &again };
            if next.is_empty() {
                return Poll::Ready(Ok(0));
            }
            let mut guard = ready!(connection.poll_write_ready(cx))?;
            match guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), next)?)) {
                Ok(Ok(count)) if again.is_empty() => {
                    self.keep(&next[..count]);
                    return Poll::Ready(Ok(count));
                }
                Ok(Ok(count)) => self.behind -= count,
                Ok(Err(error)) if is_reset(&error) => self.connection = None,
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.over {
                return Poll::Ready(Ok(()));
            }
            if self.behind > 0 {
                // Who only reads sends again too.
                let _ = self.poll_send(cx, None)?;
            }
            self.wait(0, cx);
            let Some(connection) = &self.connection else { return Poll::Pending };
            let mut guard = ready!(connection.poll_read_ready(cx))?;
            let read = guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), buffer.initialize_unfilled())?));
            match read {
                Ok(Ok(0)) => self.over = true,
                Ok(Ok(count)) => {
                    self.received += count as u64;
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if is_reset(&error) => self.connection = None,
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

/// The stream of one conversation.
pub struct Stream(Arc<Mutex<Conversation>>);

impl Stream {
    fn conversation(&self) -> MutexGuard<'_, Conversation> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.conversation().poll_receive(cx, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.conversation().poll_send(cx, Some(bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut conversation = self.conversation();
        conversation.over = true;
        // The host sees the end at once.
        conversation.connection = None;
        Poll::Ready(Ok(()))
    }
}
