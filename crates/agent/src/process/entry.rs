//! One process that was started here: what it writes is read, what its clients send is written to it, it is told when its
//! time is over.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use connectrpc::ConnectError;
use futures::{StreamExt, stream};
use kelvin_api::envd::process::__buffa::oneof::{process_event::Event, process_input::Input};
use kelvin_api::envd::process::{ProcessConfig, ProcessEvent, ProcessInput, process_event};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::sync::watch;

use super::output::{Chunk, Hub};
use super::streams::{End, Wrap, write};

/// The size of one chunk, in bytes.
const CHUNK: usize = 32 << 10;
/// How long a process may take to obey SIGTERM at its deadline.
const GRACE: Duration = Duration::from_secs(1);
/// More than a terminal holds of what was written to it, in bytes.
const TERMINAL: u64 = 128 << 10;
/// Pipes of commands that have ended, held open by what they left running.
const MAX_LEFT_OPEN: usize = 4096;
/// How many of those there are.
static LEFT_OPEN: AtomicUsize = AtomicUsize::new(0);

/// One process that was started here.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) pid: u32,
    pub(super) config: ProcessConfig,
    pub(super) tag: Option<String>,
    pub(super) hub: Hub,
    /// Where input goes; `None` when the process takes none, or no more.
    pub(super) stdin: tokio::sync::Mutex<Option<End>>,
    /// The terminal, when it has one: the same file as `stdin`.
    pub(super) pty: Option<End>,
    pub(super) ended: watch::Sender<bool>,
}

impl Entry {
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::NotFound)?;
        kill_process_group(pid, signal).map_err(io::Error::from)
    }
}

/// Copies a pipe or a terminal to the hub until it ends, or until what was in it when the process exited is read: what
/// it left running may hold the other end open, and write to it, for ever. That is read on, so that it does not die of
/// a pipe without a reader, and nobody is told of it. A terminal hangs up with its process.
pub(super) async fn pump(end: End, wrap: Wrap, entry: Arc<Entry>, mut exited: watch::Receiver<bool>) {
    let mut buffer = vec![0; CHUNK];
    // What is left to be read, in bytes; none while the process runs.
    let mut left: Option<u64> = None;
    while left != Some(0) {
        // One that writes without end, and to nobody, must not keep the others waiting.
        tokio::task::coop::consume_budget().await;
        if left.is_none() && *exited.borrow_and_update() {
            left = Some(match entry.pty {
                None => rustix::io::ioctl_fionread(end.get_ref()).unwrap_or(0),
                // It tells of a part of what a terminal holds only.
                Some(_) => TERMINAL,
            });
            continue;
        }
        let most = left.map_or(CHUNK, |left| CHUNK.min(usize::try_from(left).unwrap_or(CHUNK)));
        match rustix::io::read(end.get_ref(), &mut buffer[..most]) {
            Ok(0) => return,
            Ok(count) => {
                left = left.map(|left| left - count as u64);
                entry.hub.push(wrap(buffer[..count].to_vec())).await;
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if left.is_some() => break,
            Err(Errno::AGAIN) => {
                tokio::select! {
                    // Cleared before the next read: what arrives after it makes it ready again.
                    ready = end.readable() => match ready {
                        Ok(mut ready) => ready.clear_ready(),
                        Err(_) => return,
                    },
                    changed = exited.changed() => if changed.is_err() { return },
                }
            }
            // EIO: nobody has the terminal open any more.
            Err(_) => return,
        }
    }
    if entry.pty.is_none() {
        tokio::spawn(read_on(end));
    }
}

/// Reads what nobody is told of, until the last writer has gone.
async fn read_on(end: End) {
    if LEFT_OPEN.fetch_add(1, Ordering::Relaxed) < MAX_LEFT_OPEN {
        // Small: there may be many.
        let mut buffer = [0; 4096];
        loop {
            tokio::task::coop::consume_budget().await;
            match rustix::io::read(end.get_ref(), &mut buffer) {
                Ok(1..) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => match end.readable().await {
                    Ok(mut ready) => ready.clear_ready(),
                    Err(_) => break,
                },
                Ok(0) | Err(_) => break,
            }
        }
    }
    LEFT_OPEN.fetch_sub(1, Ordering::Relaxed);
}

/// Ends `entry`'s process group at `deadline`: politely, then not.
pub(super) async fn end_at(deadline: tokio::time::Instant, entry: Arc<Entry>) {
    let mut ended = entry.ended.subscribe();
    let mut over = async || {
        let _ = ended.wait_for(|ended| *ended).await;
    };
    if tokio::time::timeout_at(deadline, over()).await.is_ok() {
        return;
    }
    let _ = entry.signal(Signal::TERM);
    if tokio::time::timeout(GRACE, over()).await.is_err() {
        let _ = entry.signal(Signal::KILL);
    }
}

/// The events of one client: start, what it missed, what comes, and keepalives in between.
pub(super) fn events(
    entry: &Entry,
    keepalive: Option<Duration>,
) -> impl futures::Stream<Item = ProcessEvent> + Send + use<> {
    let start = ProcessEvent {
        event: Some(Event::Start(Box::new(process_event::StartEvent {
            pid: entry.pid,
            ..Default::default()
        }))),
        ..Default::default()
    };
    let (missed, receiver) = entry.hub.attach();
    let over = missed.iter().any(|chunk| matches!(chunk, Chunk::End { .. }));
    let first = stream::iter([start].into_iter().chain(missed.into_iter().map(Chunk::event)));
    let rest = stream::unfold((receiver, over), move |(mut receiver, over)| async move {
        if over {
            return None;
        }
        let next = match keepalive {
            Some(interval) => tokio::time::timeout(interval, receiver.recv()).await,
            None => Ok(receiver.recv().await),
        };
        match next {
            Ok(Some(chunk)) => {
                let last = matches!(chunk, Chunk::End { .. });
                Some((chunk.event(), (receiver, last)))
            }
            Ok(None) => None,
            Err(_elapsed) => {
                let event = Event::Keepalive(Box::default());
                Some((ProcessEvent { event: Some(event), ..Default::default() }, (receiver, false)))
            }
        }
    });
    first.chain(rest)
}

/// Writes `input` to where `entry` reads it.
pub(super) async fn feed(entry: &Entry, input: ProcessInput) -> Result<(), ConnectError> {
    let bytes = match (input.input, &entry.pty) {
        (Some(Input::Stdin(bytes)), None) | (Some(Input::Pty(bytes)), Some(_)) => bytes,
        (Some(Input::Stdin(_)), Some(_)) => {
            return Err(ConnectError::failed_precondition("the process has a PTY: send the input as pty"));
        }
        (Some(Input::Pty(_)), None) => {
            return Err(ConnectError::failed_precondition("the process has no PTY"));
        }
        (None, _) => return Err(ConnectError::invalid_argument("the input is empty")),
    };
    // Held while it is written: two inputs never mix.
    let stdin = entry.stdin.lock().await;
    let end = stdin.as_ref().ok_or_else(|| ConnectError::failed_precondition("stdin is not open"))?;
    let mut ended = entry.ended.subscribe();
    let written = tokio::select! {
        written = write(end, &bytes) => written,
        // Whatever holds the other end by now, it is not the process.
        _ = ended.wait_for(|ended| *ended) => Err(io::ErrorKind::BrokenPipe.into()),
    };
    written.map_err(|error| ConnectError::failed_precondition(format!("writing to stdin: {error}")))
}
