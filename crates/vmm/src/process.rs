//! What the drivers share of a VMM's process: the end of what it says, and its sockets.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kelvin_host::process::Process;
use rustix::fs::{Mode, OFlags};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;

use crate::Error;
use crate::guest_end::telling;
use crate::hostile::Pace;

/// How long a VMM may take to open its sockets.
const START: Duration = Duration::from_secs(30);

/// Sees to it that a machine's directory can be written by nobody but the daemon, and is passed through by its VMM alone.
/// What a former version let its VMM write is closed by it.
pub fn close_directory(directory: &Path, user: Option<u32>) -> io::Result<()> {
    if user.is_some() {
        chown(directory, Some(rustix::process::geteuid().as_raw()), user)?;
    }
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o710))
}

/// The group that may read `path`, when it is not everybody's to read: a snapshot's own.
pub fn readers(path: &Path) -> io::Result<Option<u32>> {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::symlink_metadata(path)?;
    Ok((found.gid() != 0 && found.mode() & 0o044 == 0o040).then(|| found.gid()))
}

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

    /// The same without what every VMM says.
    pub fn words(&self) -> String {
        telling(&self.text()).collect::<Vec<_>>().join("\n")
    }
}

/// The machine's sockets, reached through a descriptor of its directory: the path of a Unix socket may
/// have 107 bytes, that of a data directory more.
#[derive(Debug)]
pub struct Sockets(File);

impl Sockets {
    /// A socket `name` in `directory` on which the VMM is to listen. It is made here, so that nobody can replace it and
    /// connections wait in it from now on.
    pub fn listen(&self, name: &str) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}/{name}", self.0.as_raw_fd());
        let listener = std::os::unix::net::UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(listener.into())
    }

    /// Those in `directory`.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        File::open(directory)
            .map(Self)
            .map_err(|source| Error::Io { what: "opening the machine's directory", source })
    }

    /// Connects to the socket `name`. A link in its place leads nowhere, and nobody else answers: it is one that this
    /// daemon made and gave to the VMM, or one of the VMM's that it serves itself.
    pub async fn connect(&self, name: &str, process: &Process) -> io::Result<UnixStream> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let socket = rustix::fs::openat(&self.0, name, flags, Mode::empty())?;
        let found = rustix::fs::fstat(&socket)?;
        let is_ours = found.st_uid == rustix::process::geteuid().as_raw() && found.st_nlink == 1;
        let stream = UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await?;
        if !is_ours && stream.peer_cred()?.pid() != Some(process.key().pid) {
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
                return Err(Error::Ended { what: "starting", stderr: tail.words() });
            }
            if started.elapsed() > START {
                return Err(Error::Deadline { what: "starting the VMM", after: START, detail: tail.words() });
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
