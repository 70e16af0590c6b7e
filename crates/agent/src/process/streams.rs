//! Pipes and terminals of a process.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use tokio::io::unix::AsyncFd;

use super::output::Chunk;
use crate::port::watched;
use crate::pty;
use crate::users::User;

/// Our end of a pipe or a terminal.
pub(super) type End = Arc<AsyncFd<OwnedFd>>;

/// What a process reads and writes, and our ends of it.
pub(super) struct Streams {
    pub(super) child: [OwnedFd; 3],
    pub(super) input: Option<End>,
    pub(super) outputs: Vec<(End, Wrap)>,
}

/// Which output a pipe is.
pub(super) type Wrap = fn(Vec<u8>) -> Chunk;

impl Streams {
    /// Pipes of `user`'s own: who is given one may open it again, by `/dev/stdout`.
    pub(super) fn pipes(with_stdin: bool, user: &User) -> io::Result<Self> {
        let pipe = || {
            let ends = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
            std::os::unix::fs::fchown(&ends.0, Some(user.uid), Some(user.gid))?;
            Ok::<_, io::Error>(ends)
        };
        let (stdout, stdout_child) = pipe()?;
        let (stderr, stderr_child) = pipe()?;
        let (input, stdin_child) = if with_stdin {
            let (reader, writer) = pipe()?;
            (Some(end(writer)?), reader)
        } else {
            (None, File::open("/dev/null")?.into())
        };
        Ok(Self {
            child: [stdin_child, stdout_child, stderr_child],
            input,
            outputs: vec![(end(stdout)?, Chunk::Stdout), (end(stderr)?, Chunk::Stderr)],
        })
    }

    pub(super) fn terminal(size: rustix::termios::Winsize, user: &User) -> io::Result<Self> {
        let (ours, theirs) = pty::open(size, user)?;
        let ours = end(ours)?;
        Ok(Self {
            child: [theirs.try_clone()?, theirs.try_clone()?, theirs],
            input: Some(Arc::clone(&ours)),
            outputs: vec![(ours, Chunk::Pty)],
        })
    }
}

fn end(fd: OwnedFd) -> io::Result<End> {
    let flags = rustix::fs::fcntl_getfl(fd.as_fd())?;
    rustix::fs::fcntl_setfl(fd.as_fd(), flags | rustix::fs::OFlags::NONBLOCK)?;
    Ok(Arc::new(watched(fd)?))
}

/// Writes all of `bytes`, however long their reader takes.
pub(super) async fn write(end: &End, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = end.writable().await?;
        match ready.try_io(|end| rustix::io::write(end.get_ref(), bytes).map_err(io::Error::from)) {
            Ok(written) => bytes = &bytes[written?..],
            Err(_would_block) => {}
        }
    }
    Ok(())
}
