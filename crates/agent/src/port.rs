//! A virtio-serial port as an asynchronous byte stream, one stream for each connection of the host.
//!
//! Three traps (each seen on QEMU 7.2): a port without a host end reports HUP, which
//! tokio takes as final, so each connection registers a fresh duplicate; a read or a write then returns EAGAIN
//! for ever while tokio says that it is ready, so whoever is told both has come to the end; closing the port discards
//! what has just arrived, so it stays open.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::state::State;

/// Opens the port called `name`.
///
/// # Errors
/// `NotFound` when the machine has no such port.
pub fn open(name: &str, nonblocking: bool) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    for entry in std::fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        if std::fs::read_to_string(entry.path().join("name")).is_ok_and(|text| text.trim() == name) {
            let flags = if nonblocking { libc::O_NONBLOCK } else { 0 };
            return File::options()
                .read(true)
                .write(true)
                .custom_flags(flags)
                .open(std::path::Path::new("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("no virtio port {name}")))
}

/// Takes over a descriptor and asks the runtime when it is ready.
///
/// # Errors
/// When it cannot be polled.
#[allow(unsafe_code)]
pub fn watched<T: AsRawFd>(fd: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: the descriptor is owned by the `AsyncFd` and stays the same until it is dropped.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// An HTTP/2 frame that ends a connection: GOAWAY, INTERNAL_ERROR, no stream was done. Source: RFC 9113, 6.8.
const GOAWAY: [u8; 17] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
/// How long a host may take to hang up before it is told again.
const DISMISSED: Duration = Duration::from_millis(20);

/// The guest's end of the HTTP port, between connections.
///
/// A port without a host end reports HUP and nothing else, so there is nothing to wait on but the signal
/// that the driver sends when the host comes (`O_ASYNC`, Linux `drivers/char/virtio_console.c`). While it
/// waits, no timer runs: a machine that is restored here wakes up for its activation alone.
pub struct Listener {
    port: File,
    came: tokio::signal::unix::Signal,
    state: Arc<State>,
    /// Whether the end of the last stream was seen: its host has gone, and all that it said was read.
    ended: Arc<AtomicBool>,
}

impl Listener {
    /// Takes over the port.
    ///
    /// # Errors
    /// When the signal cannot be directed here.
    #[allow(unsafe_code)]
    pub fn new(port: File, state: Arc<State>) -> io::Result<Self> {
        let came = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::io())?;
        // SAFETY: a plain system call on a descriptor that is open.
        if unsafe { libc::fcntl(port.as_raw_fd(), libc::F_SETOWN, libc::getpid()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { port, came, state, ended: Arc::default() })
    }

    #[allow(unsafe_code)]
    fn announce(&self, wanted: bool) -> io::Result<()> {
        let flags = libc::O_NONBLOCK | if wanted { libc::O_ASYNC } else { 0 };
        // SAFETY: a plain system call on a descriptor that is open.
        if unsafe { libc::fcntl(self.port.as_raw_fd(), libc::F_SETFL, flags) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn has_host(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.port, PollFlags::IN)];
        // The very signal that a host has come interrupts the look for it.
        rustix::io::retry_on_intr(|| poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })))?;
        Ok(!fds[0].revents().contains(PollFlags::HUP))
    }

    /// Ends a conversation that broke off. Unless its host has gone, what was said made no sense: it was of two
    /// conversations. The host has to hang up then: it would take the next greeting as part of this one, and answer
    /// it without end.
    ///
    /// # Errors
    /// When the port itself fails.
    pub async fn end(&mut self) -> io::Result<()> {
        if self.ended.load(Ordering::Relaxed) { Ok(()) } else { self.dismiss().await }
    }

    /// Tells a host that is connected to hang up, and waits until it has: it cannot see by itself that the conversation
    /// is over. What it had said is dropped: to the next connection it would be noise.
    ///
    /// # Errors
    /// When the port itself fails.
    pub async fn dismiss(&mut self) -> io::Result<()> {
        while self.has_host()? {
            // What was being read when the first came may have swallowed it.
            let _ = (&self.port).write(&GOAWAY);
            tokio::time::sleep(DISMISSED).await;
            self.drain();
        }
        self.drain();
        Ok(())
    }

    fn drain(&self) {
        let mut dropped = [0; 4096];
        while matches!((&self.port).read(&mut dropped), Ok(1..)) {}
    }

    /// Waits until the host has connected, and gives the stream of that connection.
    ///
    /// # Errors
    /// When the port itself fails.
    pub async fn accept(&mut self) -> io::Result<Stream> {
        // Asked for before the look: a host that comes in between is not missed.
        self.announce(true)?;
        while !self.has_host()? {
            self.state.set_http_waiting(true);
            self.came.recv().await;
        }
        self.state.set_http_waiting(false);
        self.announce(false)?;
        let fd = watched(OwnedFd::from(self.port.try_clone()?))?;
        self.ended = Arc::default();
        Ok(Stream { fd, ended: Arc::clone(&self.ended) })
    }
}

/// One connection of the host.
pub struct Stream {
    fd: AsyncFd<OwnedFd>,
    ended: Arc<AtomicBool>,
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.ended.load(Ordering::Relaxed) {
            return Poll::Ready(Ok(()));
        }
        loop {
            let mut guard = ready!(self.fd.poll_read_ready(cx))?;
            let has_hung_up = guard.ready().is_read_closed();
            let result = guard.try_io(|fd| {
                rustix::io::read(fd.get_ref(), buf.initialize_unfilled()).map_err(io::Error::from)
            });
            match result {
                Ok(Ok(0)) => {
                    self.ended.store(true, Ordering::Relaxed);
                    return Poll::Ready(Ok(()));
                }
                Ok(Ok(count)) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                // Another host has come since this one hung up: what it says is of the next conversation.
                Err(_would_block) if has_hung_up => {
                    self.ended.store(true, Ordering::Relaxed);
                    return Poll::Ready(Ok(()));
                }
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.ended.load(Ordering::Relaxed) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        loop {
            let mut guard = ready!(self.fd.poll_write_ready(cx))?;
            let has_hung_up = guard.ready().is_write_closed();
            let result = guard.try_io(|fd| rustix::io::write(fd.get_ref(), bytes).map_err(io::Error::from));
            match result {
                Ok(result) => return Poll::Ready(result),
                // It would be tried again at once, without end, and nothing else would be done in this process. What the host
                // said last may still be read.
                Err(_would_block) if has_hung_up => {
                    return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
                }
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// The near end of a terminal whose far end is closed: it has hung up, and takes no more than it has room for.
    fn hung_up() -> OwnedFd {
        let near =
            rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY).unwrap();
        rustix::pty::grantpt(&near).unwrap();
        rustix::pty::unlockpt(&near).unwrap();
        let name = rustix::pty::ptsname(&near, Vec::new()).unwrap();
        drop(
            rustix::fs::open(
                name,
                rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY,
                rustix::fs::Mode::empty(),
            )
            .unwrap(),
        );
        rustix::io::ioctl_fionbio(&near, true).unwrap();
        near
    }

    /// Runs `work` and waits for it from another thread: work that never waits is not interrupted by a timer of its own.
    fn ends<F: Future<Output = io::Result<()>>>(work: impl FnOnce() -> F + Send + 'static) -> io::Result<()> {
        let (done, end) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let _ = done.send(runtime.block_on(async { work().await }));
        });
        end.recv_timeout(Duration::from_secs(20)).expect("it does not end")
    }

    #[test]
    fn who_writes_to_a_host_that_has_hung_up_is_told() {
        let error = ends(|| async {
            let mut stream = Stream { fd: watched(hung_up())?, ended: Arc::default() };
            stream.write_all(&vec![b'x'; 4 << 20]).await
        })
        .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn who_reads_when_another_host_has_come_is_at_the_end_of_the_first() {
        let read = ends(|| async {
            let (near, far) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK)?;
            let again = format!("/proc/self/fd/{}", near.as_raw_fd());
            let mut stream = Stream { fd: watched(near)?, ended: Arc::default() };
            drop(far);
            // The end is seen, and another has come before anybody reads: nothing is there, and nobody has gone.
            assert!(stream.fd.readable().await?.ready().is_read_closed());
            let another = File::options().write(true).open(again)?;
            assert_eq!(stream.read(&mut [0; 8]).await?, 0);
            assert!(stream.ended.load(Ordering::Relaxed));
            drop(another);
            Ok(())
        });
        read.unwrap();
    }
}
