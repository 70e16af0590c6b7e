//! QEMU's machine protocol: one command at a time, events kept for whoever waits for one.
//!
//! ```text
//! VMM ── lines ──> reader task ──> replies, by the id of their command
//!                            ├──> events, the last 64
//!                            └──> how the guest ended, once
//! ```
//!
//! Source: QEMU, docs/interop/qmp-spec. A VMM may have been taken over by its guest, so lines, replies and events are
//! bounded. The reader ends with the connection. Nothing is written; a crash of the daemon leaves the VMM as it is.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, watch};

use crate::hostile::{Pace, told};
use crate::{Error, GuestEnd};

/// The longest line: a console of 64 KiB whose every byte is escaped, and room.
const MAX_LINE: u64 = 512 << 10;
/// The longest event that is kept; those that are waited for have a few hundred bytes. What is parsed takes up to
/// sixteen times as much memory as its text.
const MAX_EVENT: usize = 4 << 10;
const MAX_EVENTS: usize = 64;
/// Replies that nobody has taken: of commands that were given up.
const MAX_REPLIES: usize = 2;
/// How long a command may take.
const LIMIT: Duration = Duration::from_secs(20);
/// How long one may take that waits for the disk: QEMU writes back what the guest has written before it has stopped. A
/// command that was given up is done all the same, so giving up early leaves a machine that stops when nobody expects it.
const DISK_LIMIT: Duration = Duration::from_secs(300);

fn limit_of(command: &str) -> Duration {
    if matches!(command, "stop" | "xen-save-devices-state") { DISK_LIMIT } else { LIMIT }
}

/// What the reader has read and nobody has taken.
#[derive(Debug, Default)]
struct Inbox {
    replies: VecDeque<Value>,
    events: VecDeque<Value>,
    /// Why there will be no more.
    closed: Option<io::ErrorKind>,
}

#[derive(Debug, Default)]
struct Shared {
    inbox: Mutex<Inbox>,
    changed: Notify,
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `take` finds something in the inbox.
    async fn wait<T>(&self, take: impl Fn(&mut Inbox) -> Option<T>) -> Result<T, Error> {
        loop {
            let changed = self.changed.notified();
            {
                let mut inbox = self.inbox();
                if let Some(found) = take(&mut inbox) {
                    return Ok(found);
                }
                if let Some(kind) = inbox.closed {
                    return Err(Error::Io { what: "reading from the VMM", source: kind.into() });
                }
            }
            changed.await;
        }
    }
}

/// Keeps the last `limit`.
fn keep(queue: &mut VecDeque<Value>, value: Value, limit: usize) {
    if queue.len() == limit {
        queue.pop_front();
    }
    queue.push_back(value);
}

/// A connection.
#[derive(Debug)]
pub struct Qmp {
    writer: OwnedWriteHalf,
    shared: Arc<Shared>,
    last_id: u64,
    /// Whether a command was given up before all of it was written: what follows would be the rest of it.
    is_cut: bool,
    guest_end: watch::Receiver<Option<GuestEnd>>,
}

/// Reads until the connection ends.
async fn read(
    mut reader: BufReader<OwnedReadHalf>,
    shared: Arc<Shared>,
    guest_end: watch::Sender<Option<GuestEnd>>,
) {
    let (mut line, mut pace) = (Vec::new(), Pace::default());
    let kind = loop {
        pace.after(line.len()).await;
        line.clear();
        match (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line).await {
            Ok(0) => break io::ErrorKind::UnexpectedEof,
            Err(error) => break error.kind(),
            Ok(_) => {}
        }
        let Ok(value) = serde_json::from_slice::<Value>(&line) else { break io::ErrorKind::InvalidData };
        if let Some(end) = ends_guest(&value) {
            guest_end.send_replace(Some(end));
        }
        let mut inbox = shared.inbox();
        match value.get("event") {
            Some(_) if line.len() > MAX_EVENT => {}
            Some(_) => keep(&mut inbox.events, value, MAX_EVENTS),
            None => keep(&mut inbox.replies, value, MAX_REPLIES),
        }
        drop(inbox);
        shared.changed.notify_waiters();
    };
    shared.inbox().closed = Some(kind);
    shared.changed.notify_waiters();
}

/// How a guest has ended, when `event` says so. Source: QEMU, `qapi/run-state.json`, `ShutdownCause`.
fn ends_guest(event: &Value) -> Option<GuestEnd> {
    if event["event"] != "SHUTDOWN" {
        return None;
    }
    match event["data"]["reason"].as_str() {
        Some("guest-shutdown") => Some(GuestEnd::PowerOff),
        Some("guest-reset" | "subsystem-reset") => Some(GuestEnd::Reset),
        Some("guest-panic") => Some(GuestEnd::Panic),
        // The host's own doing.
        _ => None,
    }
}

impl Qmp {
    /// Reads the greeting and leaves negotiation mode.
    pub async fn open(stream: UnixStream) -> Result<Self, Error> {
        let (reader, writer) = stream.into_split();
        let (sender, guest_end) = watch::channel(None);
        let shared = Arc::<Shared>::default();
        tokio::spawn(read(BufReader::new(reader), Arc::clone(&shared), sender));
        let mut qmp = Self { writer, shared, last_id: 0, is_cut: false, guest_end };
        let is_greeting = |value: &Value| value.get("QMP").is_some();
        let greeting = |inbox: &mut Inbox| inbox.replies.pop_front().filter(is_greeting);
        within("the VMM's greeting", LIMIT, qmp.shared.wait(greeting)).await?;
        qmp.call("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Tells how the guest has ended, when it has.
    pub fn guest_end(&self) -> watch::Receiver<Option<GuestEnd>> {
        self.guest_end.clone()
    }

    /// Runs `command` and returns its result.
    pub async fn call(&mut self, command: &'static str, arguments: Value) -> Result<Value, Error> {
        self.send(command, &arguments, None).await
    }

    /// Runs `command` with a descriptor beside it.
    pub async fn call_with(
        &mut self,
        command: &'static str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, Error> {
        self.send(command, &arguments, Some(fd)).await
    }

    async fn send(
        &mut self,
        command: &'static str,
        arguments: &Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, Error> {
        within(command, limit_of(command), self.exchange(command, arguments, fd)).await
    }

    async fn exchange(
        &mut self,
        command: &'static str,
        arguments: &Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, Error> {
        let io = |source| Error::Io { what: "writing to the VMM", source };
        if std::mem::replace(&mut self.is_cut, true) {
            return Err(io(io::Error::other("the VMM did not take all of an earlier command")));
        }
        self.last_id += 1;
        let id = self.last_id;
        let mut line =
            json!({ "execute": command, "arguments": arguments, "id": id }).to_string().into_bytes();
        line.push(b'\n');
        let mut sent = 0;
        if let Some(fd) = fd {
            let fds = [fd];
            let stream: &UnixStream = self.writer.as_ref();
            sent = stream
                .async_io(Interest::WRITABLE, || {
                    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                    let mut control = SendAncillaryBuffer::new(&mut space);
                    control.push(SendAncillaryMessage::ScmRights(&fds));
                    Ok(sendmsg(stream, &[IoSlice::new(&line)], &mut control, SendFlags::NOSIGNAL)?)
                })
                .await
                .map_err(io)?;
        }
        self.writer.write_all(&line[sent..]).await.map_err(io)?;
        self.is_cut = false;
        // What answers an earlier command came too late for it.
        let own = |inbox: &mut Inbox| {
            while let Some(reply) = inbox.replies.pop_front() {
                if reply["id"] == id {
                    return Some(reply);
                }
            }
            None
        };
        let mut reply = self.shared.wait(own).await?;
        match reply.get("error") {
            None => Ok(reply["return"].take()),
            Some(error) => Err(Error::Refused {
                command,
                reason: told(error["desc"].as_str().unwrap_or("no reason given")),
            }),
        }
    }

    /// Waits for an event called `name` for which `done` returns something.
    pub async fn event<T>(
        &mut self,
        name: &'static str,
        done: impl Fn(&Value) -> Option<T>,
    ) -> Result<T, Error> {
        let wanted = |inbox: &mut Inbox| {
            while let Some(event) = inbox.events.pop_front() {
                if event["event"] == name
                    && let Some(result) = done(&event["data"])
                {
                    return Some(result);
                }
            }
            None
        };
        within(name, LIMIT, self.shared.wait(wanted)).await
    }
}

async fn within<T>(
    what: &'static str,
    limit: Duration,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(Error::Deadline { what, after: limit, detail: "the VMM did not answer".to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn pair() -> (Qmp, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (qmp, ()) = tokio::join!(Qmp::open(ours), async {
            theirs.write_all(b"{\"QMP\": {}}\n{\"return\": {}, \"id\": 1}\n").await.unwrap();
        });
        (qmp.unwrap(), theirs)
    }

    #[tokio::test]
    async fn a_reply_that_came_too_late_is_not_another_commands() {
        let (mut qmp, mut theirs) = pair().await;
        let replies = b"{\"return\": 1, \"id\": 1}\n{\"event\": \"STOP\"}\n{\"return\": 2}\n{\"return\": 3, \"id\": 2}\n";
        theirs.write_all(replies).await.unwrap();
        assert_eq!(qmp.call("query-status", json!({})).await.unwrap(), 3);
        theirs.write_all(b"{\"error\": {\"desc\": \"no\"}, \"id\": 3}\n").await.unwrap();
        assert!(
            matches!(qmp.call("stop", json!({})).await, Err(Error::Refused { reason, .. }) if reason == "no")
        );
    }

    #[tokio::test]
    async fn the_end_of_a_guest_is_seen_while_nobody_asks() {
        for (reason, end) in [
            ("guest-shutdown", Some(GuestEnd::PowerOff)),
            ("guest-reset", Some(GuestEnd::Reset)),
            ("guest-panic", Some(GuestEnd::Panic)),
            ("host-signal", None),
        ] {
            let (qmp, mut theirs) = pair().await;
            let event = json!({ "event": "SHUTDOWN", "data": { "guest": true, "reason": reason } });
            theirs.write_all(format!("{event}\n").as_bytes()).await.unwrap();
            drop(theirs);
            let mut ended = qmp.guest_end();
            // Until the sender is gone: then nothing else can come.
            while ended.changed().await.is_ok() {}
            assert_eq!(*ended.borrow(), end, "{reason}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_disk_costs_a_pause_and_a_save_time_and_nothing_else() {
        for command in ["stop", "xen-save-devices-state"] {
            let (mut qmp, mut theirs) = pair().await;
            let written_back = async {
                tokio::time::sleep(Duration::from_secs(60)).await;
                theirs.write_all(b"{\"return\": {}, \"id\": 2}\n").await.unwrap();
            };
            let (stopped, ()) = tokio::join!(qmp.call(command, json!({})), written_back);
            stopped.unwrap_or_else(|error| panic!("{command}: {error}"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_vmm_that_takes_no_command_has_a_limit_and_gets_no_half_of_one() {
        let (mut qmp, _theirs) = pair().await;
        let long = json!({ "text": "x".repeat(4 << 20) });
        let started = tokio::time::Instant::now();
        assert!(matches!(qmp.call("query-status", long).await, Err(Error::Deadline { .. })));
        assert_eq!(started.elapsed(), LIMIT);
        assert!(matches!(qmp.call("cont", json!({})).await, Err(Error::Io { .. })));
    }

    #[tokio::test]
    async fn a_vmm_that_floods_holds_nothing() {
        let (mut qmp, mut theirs) = pair().await;
        for _ in 0..1000 {
            theirs.write_all(b"{\"event\": \"STOP\"}\n{\"return\": 0}\n").await.unwrap();
        }
        theirs.write_all(b"{\"return\": 7, \"id\": 2}\n").await.unwrap();
        assert_eq!(qmp.call("cont", json!({})).await.unwrap(), 7);
        assert!(qmp.shared.inbox().events.len() <= MAX_EVENTS);
    }

    #[tokio::test]
    async fn what_a_vmm_says_takes_little_memory_and_time() {
        let (qmp, mut theirs) = pair().await;
        let began = tokio::time::Instant::now();
        // Lines that take the most memory once they are parsed, as many as are read within a second.
        let zeros = format!("[{}0]", "0,".repeat(100_000));
        let (event, reply) =
            (format!("{{\"event\":\"X\",\"data\":{zeros}}}\n"), format!("{{\"return\":{zeros}}}\n"));
        let flood = async {
            let mut sent = 0;
            loop {
                theirs.write_all(event.as_bytes()).await.unwrap();
                theirs.write_all(reply.as_bytes()).await.unwrap();
                sent += event.len() + reply.len();
                if began.elapsed() > Duration::from_secs(1) {
                    return sent;
                }
            }
        };
        let sent = flood.await;
        assert!(sent < 40 << 20, "{sent} bytes were read in a second");
        let inbox = qmp.shared.inbox();
        assert!(inbox.events.is_empty(), "an event of 200 KB is kept");
        assert!(inbox.replies.len() <= MAX_REPLIES);
    }

    #[tokio::test]
    async fn a_line_without_an_end_ends_the_connection() {
        let (mut qmp, mut theirs) = pair().await;
        let flood = tokio::spawn(async move {
            let mut sent = 0;
            while theirs.write_all(&[b' '; 4096]).await.is_ok() {
                sent += 4096;
            }
            sent
        });
        let refused = qmp.call("query-status", json!({})).await;
        assert!(matches!(refused, Err(Error::Io { .. })), "{refused:?}");
        drop(qmp);
        assert!(flood.await.unwrap() < 4 << 20);
    }
}
