//! Processes that outlive the daemon, held by pidfd.
//!
//! Start: `posix_spawn` (no `pre_exec`, which would make the standard library fork) of
//! `setsid setpriv ... program`: both exec in place, so the pid is the program's from the start. A bare
//! pid is never signalled: a process is (pid, start time), checked after its pidfd is open.

mod key;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::io::{BufRead, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};

pub use self::key::ProcessKey;
use crate::jail::{Jail, Launched, MAX_GIVEN};
use crate::net::ns;

/// How long a process may take to stand still.
const STOP: Duration = Duration::from_secs(5);
/// The longest answer of a launcher, in bytes.
const MAX_LAUNCHED: u64 = 8 << 10;
/// The variable in a process's environment by which it is found when nobody noted its pid. Nobody else can read it there,
/// as everybody can the arguments. Source: proc(5), `environ`.
pub const MARKER: &str = "KELVIN_MARKER";

/// Makes this process the parent of what its own children leave behind, so that it is reaped: a jailed program is
/// started by a launcher that ends.
///
/// # Errors
/// When the kernel refuses.
pub fn adopt_orphans() -> io::Result<()> {
    Ok(rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?)
}

/// A process to start.
#[derive(Debug)]
pub struct Spawn {
    /// Path or name of the program.
    pub program: OsString,
    /// Its arguments: everybody on the host can read them.
    pub args: Vec<OsString>,
    /// By which it is found, see [`MARKER`].
    pub marker: String,
    /// Its working directory.
    pub cwd: PathBuf,
    /// User and group to drop to, with no capability left; `None` keeps the daemon's.
    pub user: Option<u32>,
    /// Where it finds the network.
    pub network: Network,
    /// Its standard input; nothing when `None`.
    pub stdin: Option<OwnedFd>,
}

/// The network namespace that a process starts in.
#[derive(Debug)]
pub enum Network {
    /// The daemon's.
    Shared,
    /// A new one with nothing in it, which ends with the process.
    Empty,
    /// This one.
    Of(OwnedFd),
}

/// A running process. Dropping it does not end it.
#[derive(Debug)]
pub struct Process {
    key: ProcessKey,
    held: Held,
}

/// What a process is held by.
#[derive(Debug)]
enum Held {
    Pidfd(AsyncFd<OwnedFd>),
    #[cfg(feature = "testing")]
    Fake(std::sync::Arc<crate::testing::FakeProcess>),
}

impl Process {
    /// Starts `spawn` as the leader of its own session; its standard error is returned.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn spawn(spawn: Spawn) -> io::Result<(Self, pipe::Receiver)> {
        // A child starts in the namespace of the thread that starts it: no code has to run between fork and
        // exec. The thread is used for nothing else.
        let (pid, stderr) = match &spawn.network {
            Network::Shared => start(spawn)?,
            Network::Empty | Network::Of(_) => {
                ns::on_thread(move || {
                    match &spawn.network {
                        Network::Of(namespace) => ns::enter(namespace.as_fd())?,
                        Network::Empty | Network::Shared => ns::unshare()?,
                    }
                    start(spawn)
                })
                .await?
            }
        };
        // The child cannot be reaped by anyone else, so its pid is still its own here.
        let process = Self::open(pid)?;
        process.or_end(nonblocking(stderr)).await
    }

    /// Starts `jail` through `launcher`, a program that calls [`crate::jail::run`] when its one argument is `jail`; what the
    /// jailed program says is returned. It has the descriptors of `given` from [`crate::jail::FIRST_GIVEN`] on, in their
    /// order, and is found by `marker`, see [`MARKER`].
    ///
    /// # Errors
    /// When it cannot be started, with the step that failed; then nothing of it is left. `InvalidInput` for more
    /// descriptors than [`MAX_GIVEN`].
    pub async fn spawn_jailed(
        launcher: &Path,
        mut jail: Jail,
        marker: String,
        network: Network,
        given: Vec<OwnedFd>,
    ) -> io::Result<(Self, pipe::Receiver)> {
        let marker = (MARKER.to_owned(), marker);
        jail.env.push(marker.clone());
        let (launcher, spec) = (launcher.to_owned(), serde_json::to_vec(&jail)?);
        let (mut child, input, launched, stderr) = ns::on_thread(move || {
            match &network {
                Network::Of(namespace) => ns::enter(namespace.as_fd())?,
                Network::Empty => ns::unshare()?,
                Network::Shared => {}
            }
            launch(&launcher, spec, marker, &given)
        })
        .await?;
        // The launcher is there until its input ends, so the pid is still the program's here.
        let opened = match launched {
            Ok(Launched::Pid(pid)) => Self::open(pid),
            Ok(Launched::Failed(reason)) => Err(io::Error::other(reason)),
            Err(error) => Err(error),
        };
        drop(input);
        let _ = tokio::task::spawn_blocking(move || child.wait()).await;
        opened?.or_end(nonblocking(stderr)).await
    }

    /// This process with its pipe; ended when there is none.
    async fn or_end(self, pipe: io::Result<pipe::Receiver>) -> io::Result<(Self, pipe::Receiver)> {
        match pipe {
            Ok(pipe) => Ok((self, pipe)),
            Err(error) => {
                self.kill()?;
                self.ended().await;
                Err(error)
            }
        }
    }

    #[allow(unsafe_code)]
    fn open(pid: i32) -> io::Result<Self> {
        let raw = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
        let pidfd = pidfd_open(raw, PidfdFlags::NONBLOCK)?;
        let key = ProcessKey { pid, start_time: start_time(pid)? };
        // SAFETY: the descriptor is owned by the `AsyncFd` and stays the same until it is dropped.
        let pidfd = unsafe { AsyncFd::register(pidfd) }?;
        Ok(Self { key, held: Held::Pidfd(pidfd) })
    }

    /// A process that is not the kernel's.
    #[cfg(feature = "testing")]
    pub fn fake(process: std::sync::Arc<crate::testing::FakeProcess>) -> Self {
        Self { key: process.key(), held: Held::Fake(process) }
    }

    /// Takes over a process that was started by a former daemon.
    ///
    /// # Errors
    /// `NotFound` when it is gone, or its pid belongs to another process now.
    pub fn adopt(key: ProcessKey) -> io::Result<Self> {
        #[cfg(feature = "testing")]
        if key.pid < 0 {
            let found = crate::testing::FakeProcess::find(key).ok_or(io::ErrorKind::NotFound)?;
            return Ok(Self::fake(found));
        }
        let gone = |error: io::Error| {
            let is_gone = error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error());
            if is_gone { io::ErrorKind::NotFound.into() } else { error }
        };
        // Looked at before it is ours: a stranger's end is not to be taken from who waits for it.
        if start_time(key.pid).map_err(gone)? != key.start_time {
            return Err(io::ErrorKind::NotFound.into());
        }
        let process = Self::open(key.pid).map_err(gone)?;
        // One that is over is reaped as it is dropped.
        if process.key == key && !process.is_over() {
            Ok(process)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    /// Takes its exit status from the kernel when it is a child of this daemon that has ended: it is a zombie until then.
    fn reap(&self) {
        match &self.held {
            Held::Pidfd(pidfd) => {
                let how = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
                let _ = waitid(WaitId::PidFd(pidfd.get_ref().as_fd()), how);
            }
            #[cfg(feature = "testing")]
            Held::Fake(_) => {}
        }
    }

    /// Which process it is.
    pub fn key(&self) -> ProcessKey {
        self.key
    }

    /// Kills it. One that is gone already is fine.
    ///
    /// # Errors
    /// When the kernel refuses for any other reason.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(Signal::KILL)
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        let pidfd = match &self.held {
            Held::Pidfd(pidfd) => pidfd.get_ref(),
            #[cfg(feature = "testing")]
            Held::Fake(process) => {
                if signal == Signal::KILL {
                    process.kill();
                }
                return Ok(());
            }
        };
        match pidfd_send_signal(pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes all of its threads stand still; it can be killed. Returns when they do. For children of this process, and
    /// what it has adopted.
    ///
    /// # Errors
    /// `TimedOut` when it does not; then it runs on. When it has ended. `ECHILD` for one that is nobody's here.
    pub async fn stop(&self) -> io::Result<()> {
        let pidfd = match &self.held {
            Held::Pidfd(pidfd) => pidfd.get_ref(),
            #[cfg(feature = "testing")]
            Held::Fake(process) if process.is_over() => return Err(io::Error::other("it has ended")),
            #[cfg(feature = "testing")]
            Held::Fake(_) => return Ok(()),
        };
        let mut children = signal(SignalKind::child())?;
        pidfd_send_signal(pidfd, Signal::STOP)?;
        let options =
            WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let stopped = async {
            loop {
                match waitid(WaitId::PidFd(pidfd.as_fd()), options)? {
                    Some(status) if status.stopped() => return Ok(()),
                    Some(_) => return Err(io::Error::other("it has ended")),
                    None => children.recv().await,
                };
            }
        };
        let stopped = tokio::time::timeout(STOP, stopped).await;
        let stopped = stopped.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        if stopped.is_err() {
            self.go_on()?;
        }
        stopped
    }

    /// Lets it run on; safe when it does, or is gone.
    ///
    /// # Errors
    /// When the kernel refuses for any other reason.
    pub fn go_on(&self) -> io::Result<()> {
        self.signal(Signal::CONT)
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let pidfd = match &self.held {
            Held::Pidfd(pidfd) => pidfd.get_ref(),
            #[cfg(feature = "testing")]
            Held::Fake(process) => return process.is_over(),
        };
        let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1..))
    }

    /// Waits until it has ended, and reaps it when it is a child of this daemon.
    // One of one, without the feature.
    #[allow(clippy::infallible_destructuring_match)]
    pub async fn ended(&self) {
        let pidfd = match &self.held {
            Held::Pidfd(pidfd) => pidfd,
            #[cfg(feature = "testing")]
            Held::Fake(process) => return process.ended().await,
        };
        // An error of the reactor leaves nothing to wait on; the caller then sees what is.
        if let Ok(mut ready) = pidfd.readable().await {
            ready.retain_ready();
        }
        self.reap();
    }
}

/// Whoever looks last at one that has ended is not always who waited for it.
impl Drop for Process {
    fn drop(&mut self) {
        self.reap();
    }
}

fn nonblocking(stderr: ChildStderr) -> io::Result<pipe::Receiver> {
    let fd = OwnedFd::from(stderr);
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
    pipe::Receiver::from_owned_fd(fd)
}

fn start(spawn: Spawn) -> io::Result<(i32, ChildStderr)> {
    let mut command = Command::new("setsid");
    if let Some(id) = spawn.user {
        command.arg("setpriv").arg(format!("--reuid={id}")).arg(format!("--regid={id}")).args([
            "--clear-groups",
            "--no-new-privs",
            "--inh-caps=-all",
            "--bounding-set=-all",
            "--",
        ]);
    }
    let mut child = command
        .arg(&spawn.program)
        .args(&spawn.args)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into()))
        .env(MARKER, &spawn.marker)
        .current_dir(&spawn.cwd)
        .stdin(spawn.stdin.map_or_else(Stdio::null, Stdio::from))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let stderr = child.stderr.take().ok_or_else(|| io::Error::other("no pipe for stderr"))?;
    Ok((i32::try_from(child.id()).map_err(io::Error::other)?, stderr))
}

/// A launcher, its input, what it said, and its standard error.
type Launching = (Child, UnixStream, io::Result<Launched>, ChildStderr);

/// Starts a launcher and reads what it says: a line.
fn launch(
    launcher: &Path,
    mut spec: Vec<u8>,
    (name, marker): (String, String),
    given: &[OwnedFd],
) -> io::Result<Launching> {
    let (input, theirs) = UnixStream::pair()?;
    let mut child = Command::new(launcher)
        .arg("jail")
        .env_clear()
        .env(name, marker)
        .current_dir("/")
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (Some(output), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(io::Error::other("a launcher without pipes"));
    };
    spec.push(b'\n');
    let mut line = String::new();
    let said = give(&input, &spec, given)
        .and_then(|()| io::BufReader::new(output.take(MAX_LAUNCHED)).read_line(&mut line))
        .and_then(|_| Ok(serde_json::from_str(&line)?));
    Ok((child, input, said, stderr))
}

/// Sends `bytes`, with descriptors beside the first of them.
fn give(mut stream: &UnixStream, bytes: &[u8], given: &[OwnedFd]) -> io::Result<()> {
    if given.len() > MAX_GIVEN {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors"));
    }
    let fds: Vec<BorrowedFd<'_>> = given.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_GIVEN))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("too many descriptors"));
    }
    let sent = sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    stream.write_all(&bytes[sent..])
}

fn start_time(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is a name in parentheses that may hold anything.
    stat.rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().nth(19))
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))
}

/// Processes that were started with `marker`, see [`MARKER`]: how a process is found whose start the ledger announced,
/// but whose pid it never learnt. Those of a former version have it as an argument. Start-up only: it scans `/proc`.
///
/// # Errors
/// When `/proc` or an entry of it cannot be read: whether there is one is not known then.
pub fn find_by_marker(marker: &str) -> io::Result<Vec<ProcessKey>> {
    #[cfg(feature = "testing")]
    {
        let fakes = crate::testing::FakeProcess::find_by_marker(marker);
        // A virtual host has no other processes, and looks through none.
        if !fakes.is_empty() || crate::testing::is_virtual() {
            return Ok(fakes);
        }
    }
    // Ended while it was looked at; or hidden from a server that is not root, and then somebody else's.
    let is_not_ours = |error: &io::Error| {
        matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied)
            || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
    };
    let variable = format!("{MARKER}={marker}");
    let has = |path: String, word: &str| match std::fs::read(path) {
        Err(error) if is_not_ours(&error) => Ok(false),
        text => text.map(|text| text.split(|byte| *byte == 0).any(|found| found == word.as_bytes())),
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if has(format!("/proc/{pid}/environ"), &variable)? || has(format!("/proc/{pid}/cmdline"), marker)? {
            match start_time(pid) {
                Err(error) if is_not_ours(&error) => {}
                start_time => found.push(ProcessKey { pid, start_time: start_time? }),
            }
        }
    }
    Ok(found)
}

/// Processes that work in `directory`, and those that work or are jailed in one of its `sandboxes/`: those that a node
/// starts.
pub fn working_in(directory: &Path) -> BTreeSet<i32> {
    use std::os::unix::fs::MetadataExt;
    let place = |path: &Path| std::fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    let jails = std::fs::read_dir(directory.join("sandboxes")).into_iter().flatten().flatten();
    let jails: BTreeSet<_> = jails.filter_map(|entry| place(&entry.path())).collect();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            std::fs::read_link(format!("/proc/{pid}/cwd"))
                .is_ok_and(|cwd| cwd == directory || cwd.parent() == Some(&directory.join("sandboxes")))
                || place(Path::new(&format!("/proc/{pid}/root"))).is_some_and(|root| jails.contains(&root))
        })
        .collect()
}

/// Proportional set size of a process in KiB: pages that n processes map count 1/n. Zero when it is gone.
pub fn proportional_kib(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

/// Waits until nobody reads what this program prints any more; for ever where that cannot be seen (a file).
#[allow(unsafe_code)]
pub async fn nobody_reads_stdout() {
    use tokio::io::Interest;
    let watched = std::io::stdout().as_fd().try_clone_to_owned().ok().and_then(|fd| {
        // SAFETY: the descriptor is owned by the `AsyncFd` and stays the same until it is dropped.
        unsafe { tokio::io::unix::AsyncFd::register_with_interest(fd, Interest::ERROR) }.ok()
    });
    match watched {
        Some(watched) if watched.ready(Interest::ERROR).await.is_ok() => {}
        _ => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(marker: &str) -> Spawn {
        Spawn {
            program: "sh".into(),
            args: ["-c", "exec sleep 60"].map(Into::into).to_vec(),
            marker: marker.to_owned(),
            cwd: "/".into(),
            user: None,
            network: Network::Shared,
            stdin: None,
        }
    }

    #[tokio::test]
    async fn one_that_ended_while_nobody_waited_is_reaped_by_whoever_looks() {
        let (process, _stderr) = Process::spawn(sleeper("marker-z1")).await.unwrap();
        let key = process.key();
        let is_zombie = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", key.pid)).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'))
        };
        drop(process);
        let pid = Pid::from_raw(key.pid).unwrap();
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
        while !is_zombie() {
            tokio::task::yield_now().await;
        }
        assert_eq!(Process::adopt(key).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(!is_zombie());
    }

    #[tokio::test]
    async fn a_process_is_found_killed_and_never_mistaken() {
        let (process, _stderr) = Process::spawn(sleeper("marker-a1")).await.unwrap();
        let key = process.key();
        // It shows no environment while it becomes its program.
        let started = std::time::Instant::now();
        while find_by_marker("marker-a1").unwrap() != [key] {
            assert!(started.elapsed().as_secs() < 30, "it is not found");
            tokio::task::yield_now().await;
        }
        assert!(Process::adopt(key).is_ok());
        let other = ProcessKey { start_time: key.start_time + 1, ..key };
        assert_eq!(Process::adopt(other).unwrap_err().kind(), io::ErrorKind::NotFound);
        // Everybody can read its arguments.
        let arguments = std::fs::read_to_string(format!("/proc/{}/cmdline", key.pid)).unwrap();
        assert!(!arguments.contains("marker"), "{arguments:?}");
        // `setsid` shows the same until it has become a leader and the program.
        let leads =
            || rustix::process::getsid(Pid::from_raw(key.pid)).unwrap().as_raw_nonzero().get() == key.pid;
        while !leads() {
            assert!(started.elapsed().as_secs() < 30, "it does not lead its own session");
            tokio::task::yield_now().await;
        }
        process.kill().unwrap();
        process.ended().await;
        process.kill().unwrap();
        assert_eq!(Process::adopt(key).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
