//! A virtio-serial port as an asynchronous byte stream, one stream for each connection of the host.
//!
//! Three traps (each seen, see `../shared/vmm-notes.md`): a port without a host end reports HUP, which
//! tokio takes as final, so each connection registers a fresh duplicate; a write then returns EAGAIN
//! for ever, so after the end of input writes fail; closing the port discards what has just arrived,
//! so it stays open.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
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

/// Waits until the host has connected to `port`, and gives the stream of that connection.
///
/// # Errors
/// When the port itself fails.
pub async fn accept(port: &File, state: &Arc<State>) -> io::Result<PortStream> {
    loop {
        let mut fds = [PollFd::new(port, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        if !fds[0].revents().contains(PollFlags::HUP) {
            break;
        }
        // A port without a host end offers nothing to wait on but this. The node keeps a connection
        // from before a snapshot to the end of the machine, so no create path passes here.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // SAFETY: the descriptor is owned by the `AsyncFd` and stays the same until it is dropped.
    #[allow(unsafe_code)]
    let fd = unsafe { AsyncFd::register(OwnedFd::from(port.try_clone()?)) }?;
    state.http_waiting.store(true, Ordering::Release);
    Ok(PortStream { fd, state: Arc::clone(state), ended: false })
}

/// One connection of the host.
pub struct PortStream {
    fd: AsyncFd<OwnedFd>,
    state: Arc<State>,
    ended: bool,
}

impl Drop for PortStream {
    fn drop(&mut self) {
        self.state.http_waiting.store(false, Ordering::Release);
    }
}

impl AsyncRead for PortStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.ended {
            return Poll::Ready(Ok(()));
        }
        loop {
            let mut guard = ready!(self.fd.poll_read_ready(cx))?;
            let result = guard.try_io(|fd| {
                rustix::io::read(fd.get_ref(), buf.initialize_unfilled()).map_err(io::Error::from)
            });
            match result {
                Ok(Ok(0)) => {
                    self.ended = true;
                    return Poll::Ready(Ok(()));
                }
                Ok(Ok(count)) => {
                    buf.advance(count);
                    self.state.http_waiting.store(false, Ordering::Release);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for PortStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        loop {
            let mut guard = ready!(self.fd.poll_write_ready(cx))?;
            let result = guard.try_io(|fd| rustix::io::write(fd.get_ref(), bytes).map_err(io::Error::from));
            if let Ok(result) = result {
                return Poll::Ready(result);
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
