//! One machine in its VMM: what is done to it while it lives.
//!
//! Writes: a snapshot's files where its caller wants them, each made here and nowhere a VMM could name. A crash of the daemon
//! leaves a part of them, which are the caller's.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use kelvin_host::process::Process;
use serde_json::json;
use tokio::net::UnixStream;
use tokio::sync::{Mutex, watch};

use super::qmp::Qmp;
use crate::control::{Control, Dial, Dialed};
use crate::process::{Sockets, Tail};
use crate::stream::GuestStream;
use crate::{Error, GuestEnd, Handle, Saved, pages};

/// What is kept of the console, in bytes.
pub(super) const CONSOLE: u32 = 64 << 10;
/// Names in the machine's directory.
pub(super) const DISK: &str = "disk";
pub(super) const CONTROL_SOCKET: &str = "control.sock";
pub(super) const HTTP_SOCKET: &str = "http.sock";
/// QEMU's set of descriptors for device state that is saved.
pub(super) const STATE_SET: u32 = 2;
/// The longest device state, in bytes: those of this machine have some 100 KiB.
pub(super) const MAX_STATE: u64 = 64 << 20;

/// A connection to the control port that waits for its first user.
pub(super) type Host = Arc<StdMutex<Option<UnixStream>>>;

/// One VMM.
pub(super) struct Machine {
    pub(super) process: Arc<Process>,
    pub(super) qmp: Mutex<Qmp>,
    /// Set when the guest has ended its machine.
    pub(super) guest_end: watch::Receiver<Option<GuestEnd>>,
    /// The end of the console: QEMU forgets what was read of it.
    pub(super) console: StdMutex<String>,
    pub(super) sockets: Arc<Sockets>,
    /// The host's end of the control port, as long as nobody has asked for it. QEMU waits for it before it makes the
    /// machine: one that comes later is announced to the guest when its vCPUs start, an eighth of a clone's activation
    /// (QEMU 7.2, `hw/char/virtio-console.c`: the port is cut off while the machine stands still).
    pub(super) host: Host,
    pub(super) tail: Tail,
    pub(super) directory: PathBuf,
    /// The file behind guest RAM.
    pub(super) memory: PathBuf,
    /// Whether that file is mapped private: only a machine that a former version booted writes to it.
    pub(super) private: bool,
    /// What the save that has begun has copied already.
    pub(super) ahead: StdMutex<Option<pages::Ahead>>,
}

impl Machine {
    /// A broken connection means that the VMM has ended or is about to: then say so, with its last words.
    async fn explain<T>(&self, what: &'static str, result: Result<T, Error>) -> Result<T, Error> {
        match result {
            Err(Error::Io { what: _, source: _ }) if self.ends_soon().await => {
                Err(Error::Ended { what, stderr: self.tail.words() })
            }
            other => other,
        }
    }

    /// What has ended cannot go on from a snapshot.
    fn check_guest(&self, what: &'static str) -> Result<(), Error> {
        match *self.guest_end.borrow() {
            None => Ok(()),
            Some(_) => Err(Error::Ended { what, stderr: "its guest has ended".to_owned() }),
        }
    }

    async fn ends_soon(&self) -> bool {
        tokio::time::timeout(Duration::from_secs(2), self.process.ended()).await.is_ok()
    }

    async fn try_load(&self, state: &Path) -> Result<(), Error> {
        let file =
            File::open(state).map_err(|source| Error::Io { what: "opening the device state", source })?;
        let mut qmp = self.qmp.lock().await;
        qmp.call_with("getfd", json!({ "fdname": "state" }), file.as_fd()).await?;
        qmp.call("migrate-incoming", json!({ "uri": "fd:state" })).await?;
        let loaded = qmp
            .event("MIGRATION", |data| match data["status"].as_str() {
                Some("completed") => Some(true),
                Some("failed") => Some(false),
                _ => None,
            })
            .await?;
        if loaded {
            return Ok(());
        }
        let reason = self.tail.words();
        Err(Error::Refused { command: "migrate-incoming", reason })
    }

    async fn try_save(&self, memory: &Path, state: &Path) -> Result<Saved, Error> {
        let io = |what| move |source| Error::Io { what, source };
        let (written, writer) = scratch().map_err(io("making a file for the device state"))?;
        let (pid, from, to) = (self.process.key().pid, self.memory.clone(), memory.to_owned());
        let private = self.private;
        // Side by side: writing device state touches no page of the guest.
        let ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default();
        let copying =
            tokio::task::spawn_blocking(move || pages::save_memory(pid, &from, &to, private, ahead));
        let saved = self.write_state(writer).await;
        let dirty_pages = copying
            .await
            .map_err(|error| io("copying memory")(io::Error::other(error)))?
            .map_err(io("copying memory"))?;
        saved?;
        let state = state.to_owned();
        tokio::task::spawn_blocking(move || take(written, &state))
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(io("copying the device state"))?;
        Ok(Saved { dirty_pages })
    }

    /// Has the VMM write its device state to `writer`.
    async fn write_state(&self, writer: OwnedFd) -> Result<(), Error> {
        let mut qmp = self.qmp.lock().await;
        let set = json!({ "fdset-id": STATE_SET });
        qmp.call_with("add-fd", set.clone(), writer.as_fd()).await?;
        let file = json!({ "filename": format!("/dev/fdset/{STATE_SET}"), "live": false });
        let saved = qmp.call("xen-save-devices-state", file).await;
        if matches!(saved, Ok(_) | Err(Error::Refused { .. })) {
            // The next save brings its own.
            qmp.call("remove-fd", set).await?;
        }
        saved.map(drop)
    }

    /// A VMM that opened another disk than its machine's must not run: paths are baked into device state.
    fn check_disk(&self) -> io::Result<()> {
        let own = fs::symlink_metadata(self.directory.join(DISK))?;
        let open = std::fs::read_dir(format!("/proc/{}/fd", self.process.key().pid))?;
        let mut files = open.flatten().filter_map(|entry| std::fs::metadata(entry.path()).ok());
        match files.any(|file| (file.dev(), file.ino()) == (own.dev(), own.ino())) {
            true => Ok(()),
            false => Err(io::Error::other("the VMM has opened another disk than its machine's")),
        }
    }
}

/// Connects to the guest's ports.
#[derive(Debug)]
struct Dialer {
    sockets: Arc<Sockets>,
    host: Host,
    process: Arc<Process>,
}

impl Dialer {
    async fn port(&self, name: &str) -> Result<UnixStream, Error> {
        let connected = self.sockets.connect(name, &self.process).await;
        connected.map_err(|source| Error::Io { what: "connecting to the guest", source })
    }
}

#[async_trait]
impl Dial for Dialer {
    async fn dial(&self) -> Result<Dialed, Error> {
        let waiting = self.host.lock().unwrap_or_else(PoisonError::into_inner).take();
        let stream = match waiting {
            Some(stream) => stream,
            None => self.port(CONTROL_SOCKET).await?,
        };
        Ok(Dialed { stream: stream.into(), greets: false })
    }

    async fn connect(&self) -> Result<GuestStream, Error> {
        self.port(HTTP_SOCKET).await.map(GuestStream::from)
    }
}

#[async_trait]
impl Handle for Machine {
    fn process(&self) -> &Process {
        &self.process
    }

    async fn load(&self, state: &Path) -> Result<(), Error> {
        self.check_disk().map_err(|source| Error::Io { what: "checking the VMM's disk", source })?;
        self.explain("loading", self.try_load(state).await).await
    }

    async fn resume(&self) -> Result<(), Error> {
        let result = self.qmp.lock().await.call("cont", json!({})).await;
        self.explain("resuming", result.map(drop)).await
    }

    async fn pause(&self) -> Result<(), Error> {
        let result = self.qmp.lock().await.call("stop", json!({})).await;
        self.explain("pausing", result.map(drop)).await?;
        self.check_guest("pausing")
    }

    async fn go_on(&self) -> Result<(), Error> {
        let mut qmp = self.qmp.lock().await;
        let status = qmp.call("query-status", json!({})).await?;
        match status["status"].as_str() {
            // One whose guest has ended it while nobody looked: a former daemon had it stay.
            Some("shutdown") => {
                Err(Error::Ended { what: "going on", stderr: "its guest has ended".to_owned() })
            }
            Some("paused" | "io-error" | "postmigrate") => qmp.call("cont", json!({})).await.map(drop),
            _ => Ok(()),
        }
    }

    async fn begin_save(&self, memory: &Path) -> Result<(), Error> {
        let (from, to, private) = (self.memory.clone(), memory.to_owned(), self.private);
        let pid = self.process.key().pid;
        let ahead = tokio::task::spawn_blocking(move || pages::begin_memory(pid, &from, &to, private))
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(|source| Error::Io { what: "beginning to copy memory", source })?;
        *self.ahead.lock().unwrap_or_else(PoisonError::into_inner) = Some(ahead);
        Ok(())
    }

    async fn save(&self, memory: &Path, state: &Path) -> Result<Saved, Error> {
        let saved = self.explain("saving", self.try_save(memory, state).await).await?;
        self.check_guest("saving")?;
        Ok(saved)
    }

    async fn control(&self) -> Result<Control, Error> {
        // Held open: a guest without its host end has to poll.
        Control::open(self.dialer()).await
    }

    fn dialer(&self) -> Arc<dyn Dial> {
        Arc::new(Dialer {
            sockets: Arc::clone(&self.sockets),
            host: Arc::clone(&self.host),
            process: Arc::clone(&self.process),
        })
    }

    async fn console(&self) -> Result<String, Error> {
        let arguments = json!({ "device": "console", "size": CONSOLE, "format": "utf8" });
        let fresh = self.qmp.lock().await.call("ringbuf-read", arguments).await?;
        let mut console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        console.push_str(fresh.as_str().unwrap_or_default());
        let excess = console.len().saturating_sub(CONSOLE as usize);
        let cut = (excess..=console.len()).find(|at| console.is_char_boundary(*at)).unwrap_or(excess);
        console.drain(..cut);
        Ok(console.clone())
    }

    async fn guest_ended(&self) -> GuestEnd {
        let mut told = self.guest_end.clone();
        loop {
            let now = *told.borrow_and_update();
            if let Some(end) = now {
                return end;
            }
            if told.changed().await.is_err() {
                // The connection has ended: whoever waits sees that of the process.
                std::future::pending::<()>().await;
            }
        }
    }

    fn stderr(&self) -> String {
        self.tail.words()
    }
}

/// A file in memory that a VMM is to write, and the way for it to do so. Not one on the disk: whoever has once been
/// given a descriptor may keep it, and a snapshot's files are never written again.
fn scratch() -> io::Result<(File, OwnedFd)> {
    let file = File::from(rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC)?);
    // QEMU asks for a descriptor that can be written and nothing else.
    let writer = File::options().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    Ok((file, writer.into()))
}

/// Copies what a VMM has written to the new file `to`.
fn take(mut from: File, to: &Path) -> io::Result<()> {
    let length = from.metadata()?.len();
    if length == 0 || length > MAX_STATE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("it has {length} bytes")));
    }
    let mut target = File::options().write(true).create_new(true).mode(0o600).open(to)?;
    // It may still be written by a VMM that was taken over: no more than that is read.
    io::copy(&mut io::Read::take(&mut from, length), &mut target).map(drop)
}
