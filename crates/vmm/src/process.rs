//! What the drivers share of a VMM's process: the end of what it says, and its sockets.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kelvin_host::process::Process;
use rustix::fs::{Mode, OFlags};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;

use crate::Error;
use crate::hostile::Pace;

/// How long a VMM may take to open its sockets.
const START: Duration = Duration::from_secs(30);

/// The end of what a VMM says on its standard error.
#[derive(Debug, Clone, Default)]
pub struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    /// Reads `pipe` until the VMM ends; the task ends with it. `limit` bytes are kept.
    pub fn follow(mut pipe: pipe::Receiver, limit: usize) -> Self {
        let tail = Self::default();
        let kept = tail.clone();
        tokio::spawn(async move {
            let (mut buffer, mut pace) = ([0; 4096], Pace::default());
            while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
                kept.keep(&buffer[..count], limit);
                pace.after(count).await;
            }
        });
        tail
    }

    fn keep(&self, said: &[u8], limit: usize) {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.extend(said);
        let excess = bytes.len().saturating_sub(limit);
        bytes.drain(..excess);
    }

    /// Reads the named pipe at `path`, which the VMM has opened; nothing when it cannot be read.
    pub fn of_pipe(path: &Path, limit: usize) -> Self {
        pipe::OpenOptions::new()
            .open_receiver(path)
            .map_or_else(|_| Self::default(), |pipe| Self::follow(pipe, limit))
    }

    /// What is kept, as text.
    pub fn text(&self) -> String {
        let bytes: Vec<u8> = self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }
}

/// The machine's sockets, reached through a descriptor of its directory: the path of a Unix socket may
/// have 107 bytes, that of a data directory more.
#[derive(Debug)]
pub struct Sockets(File);

impl Sockets {
    /// Those in `directory`.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        File::open(directory)
            .map(Self)
            .map_err(|source| Error::Io { what: "opening the machine's directory", source })
    }

    /// Connects to the socket `name`. The VMM can write its directory, but a link in it leads nowhere, and nobody
    /// else answers in its place.
    pub async fn connect(&self, name: &str, process: &Process) -> io::Result<UnixStream> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let socket = rustix::fs::openat(&self.0, name, flags, Mode::empty())?;
        let stream = UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await?;
        if stream.peer_cred()?.pid() != Some(process.key().pid) {
            return Err(io::Error::other(format!("{name} is another process's")));
        }
        Ok(stream)
    }

    /// Connects to a socket that the VMM is about to open. Never on a create path but a cold one.
    pub async fn connect_new(&self, name: &str, process: &Process, tail: &Tail) -> Result<UnixStream, Error> {
        let started = Instant::now();
        loop {
            match self.connect(name, process).await {
                Ok(stream) => return Ok(stream),
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                }
                Err(source) => {
                    return Err(Error::Io { what: "connecting to the VMM", source });
                }
            }
            if process.is_over() {
                // Let the reader of the pipe see the last words.
                tokio::task::yield_now().await;
                return Err(Error::Ended { what: "starting", stderr: tail.text() });
            }
            if started.elapsed() > START {
                return Err(Error::Deadline { what: "starting the VMM", after: START, detail: tail.text() });
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
