//! QEMU's machine protocol: one command at a time, events kept for whoever waits for one.
//!
//! Source: QEMU, docs/interop/qmp-spec. A VMM may have been taken over by its guest, so lines and events
//! are bounded.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;

use crate::Error;

const MAX_LINE: u64 = 1 << 20;
const MAX_EVENTS: usize = 64;
const LIMIT: Duration = Duration::from_secs(20);

/// A connection.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Reads the greeting and leaves negotiation mode.
    pub async fn open(stream: UnixStream) -> Result<Self, Error> {
        let mut qmp = Self { stream: BufReader::new(stream), events: VecDeque::new() };
        within("the VMM's greeting", qmp.line()).await?;
        qmp.call("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    async fn line(&mut self) -> Result<Value, Error> {
        let io = |source| Error::Io { what: "reading from the VMM", source };
        let mut line = Vec::new();
        let count = (&mut self.stream).take(MAX_LINE).read_until(b'\n', &mut line).await.map_err(io)?;
        if count == 0 {
            return Err(io(std::io::ErrorKind::UnexpectedEof.into()));
        }
        serde_json::from_slice(&line).map_err(|error| io(std::io::Error::other(error)))
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
        let io = |source| Error::Io { what: "writing to the VMM", source };
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string().into_bytes();
        line.push(b'\n');
        let stream = self.stream.get_mut();
        let mut sent = 0;
        if let Some(fd) = fd {
            let fds = [fd];
            sent = stream
                .async_io(Interest::WRITABLE, || {
                    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                    let mut control = SendAncillaryBuffer::new(&mut space);
                    control.push(SendAncillaryMessage::ScmRights(&fds));
                    Ok(sendmsg(&*stream, &[IoSlice::new(&line)], &mut control, SendFlags::NOSIGNAL)?)
                })
                .await
                .map_err(io)?;
        }
        stream.write_all(&line[sent..]).await.map_err(io)?;
        within(command, async {
            loop {
                let mut reply = self.line().await?;
                if reply.get("return").is_some() {
                    return Ok(reply["return"].take());
                }
                if let Some(error) = reply.get("error") {
                    return Err(Error::Refused {
                        command,
                        reason: error["desc"].as_str().unwrap_or("no reason given").to_owned(),
                    });
                }
                self.keep(reply);
            }
        })
        .await
    }

    fn keep(&mut self, event: Value) {
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// Waits for an event called `name` for which `done` returns something.
    pub async fn event<T>(
        &mut self,
        name: &'static str,
        mut done: impl FnMut(&Value) -> Option<T>,
    ) -> Result<T, Error> {
        within(name, async {
            loop {
                let event = match self.events.pop_front() {
                    Some(event) => event,
                    None => self.line().await?,
                };
                if event["event"] == name
                    && let Some(result) = done(&event["data"])
                {
                    return Ok(result);
                }
            }
        })
        .await
    }
}

async fn within<T>(what: &'static str, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match tokio::time::timeout(LIMIT, work).await {
        Ok(result) => result,
        Err(_) => Err(Error::Deadline { what, after: LIMIT, detail: "the VMM did not answer".to_owned() }),
    }
}
