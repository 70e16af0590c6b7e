//! A connection to a guest: a socket, or, of a fake machine, nothing but memory.
//!
//! Memory is not for speed alone: what is written to a socket is seen only when the reactor asks the kernel, and virtual
//! time must not move before it is.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;

/// A stream of bytes to and from a guest.
#[derive(Debug)]
pub enum GuestStream {
    /// A VMM's.
    Socket(UnixStream),
    /// A fake machine's.
    #[cfg(feature = "testing")]
    Memory(tokio::io::DuplexStream),
}

impl From<UnixStream> for GuestStream {
    fn from(socket: UnixStream) -> Self {
        Self::Socket(socket)
    }
}

impl GuestStream {
    /// Writes as much of `bytes` as is taken without waiting, and says how much that is. A socket is asked in the kernel: a
    /// runtime that has not looked at a new one yet says that it takes nothing.
    pub(crate) fn take_at_once(&mut self, bytes: &[u8]) -> io::Result<usize> {
        use rustix::net::{SendFlags, send};
        let mut taken = 0;
        while taken < bytes.len() {
            let rest = &bytes[taken..];
            match self {
                Self::Socket(socket) => match send(socket, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                    Ok(count) => taken += count,
                    Err(rustix::io::Errno::AGAIN) => break,
                    Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                },
                #[cfg(feature = "testing")]
                Self::Memory(memory) => {
                    let mut context = Context::from_waker(std::task::Waker::noop());
                    match Pin::new(memory).poll_write(&mut context, rest) {
                        Poll::Ready(count) => taken += count?,
                        Poll::Pending => break,
                    }
                }
            }
        }
        Ok(taken)
    }
}

/// Calls a method of whichever stream it is.
macro_rules! of {
    ($stream:expr, $method:ident $(, $argument:expr)*) => {
        match $stream.get_mut() {
            GuestStream::Socket(socket) => Pin::new(socket).$method($($argument),*),
            #[cfg(feature = "testing")]
            GuestStream::Memory(memory) => Pin::new(memory).$method($($argument),*),
        }
    };
}

impl AsyncRead for GuestStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        of!(self, poll_read, context, buffer)
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        of!(self, poll_write, context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        of!(self, poll_write_vectored, context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Socket(socket) => socket.is_write_vectored(),
            #[cfg(feature = "testing")]
            Self::Memory(memory) => memory.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        of!(self, poll_flush, context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        of!(self, poll_shutdown, context)
    }
}
