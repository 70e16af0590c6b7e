//! What the daemon says to the egress process: length, JSON, and descriptors beside the first byte.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kelvin_api::network::{Policy, Refusal};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::Options;

/// The largest message: a policy with two full lists.
const MAX: usize = 1 << 20;
/// Descriptors of one message.
const FDS: usize = 3;
/// How long the other side may take.
const ANSWER: Duration = Duration::from_secs(10);

/// What can be asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Who are you?
    Hello,
    /// Answer the guest of a slot: three descriptors come along (DNS over UDP, over TCP, proxy).
    Attach {
        /// Its number.
        slot: u16,
        /// What it may reach.
        policy: Policy,
    },
    /// From now on another policy.
    Policy {
        /// Its number.
        slot: u16,
        /// What it may reach.
        policy: Policy,
    },
    /// Forget a slot; its connections are cut.
    Detach {
        /// Its number.
        slot: u16,
    },
    /// What was refused.
    State {
        /// Its number.
        slot: u16,
    },
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Settings, and the slots that are attached.
    Hello {
        /// How it was started.
        options: Options,
        /// Numbers.
        slots: Vec<u16>,
    },
    /// Done.
    Done,
    /// What was refused.
    State(State),
    /// Not done.
    Failed(String),
}

/// What was refused in one slot.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct State {
    /// Questions and connections, by reason.
    pub denied: BTreeMap<String, u64>,
    /// The last, newest last.
    pub recent: Vec<Refusal>,
}

/// Sends one message.
pub(crate) fn send(stream: &UnixStream, message: &impl Serialize, fds: &[OwnedFd]) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).map_err(io::Error::other)?.to_be_bytes();
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("too many descriptors"));
    }
    // The length is small enough to go out whole, and the descriptors with it.
    let sent = sendmsg(stream, &[IoSlice::new(&length)], &mut ancillary, SendFlags::NOSIGNAL)?;
    if sent != length.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    (&*stream).write_all(&body)
}

/// Reads all of `buffer`. Where the stream has a limit for one read, it is the limit of all of it: the other side parses
/// what guests send, and may have been taken over.
fn read(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<()> {
    let limit = stream.read_timeout()?;
    let (began, mut filled) = (Instant::now(), 0);
    while filled < buffer.len() {
        if limit.is_some_and(|limit| began.elapsed() > limit) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match (&*stream).read(&mut buffer[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Receives one message. `None` when the other side has closed between two.
pub(crate) fn receive<T: DeserializeOwned>(stream: &UnixStream) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut length = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(stream, &mut [IoSliceMut::new(&mut length)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?.bytes,
        }
    };
    if received == 0 {
        return Ok(None);
    }
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    read(stream, &mut length[received..])?;
    let length = usize::try_from(u32::from_be_bytes(length)).map_err(io::Error::other)?;
    if length > MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the message is too long"));
    }
    let mut body = vec![0; length];
    read(stream, &mut body)?;
    Ok(Some((serde_json::from_slice(&body)?, fds)))
}

/// The daemon's end. Calls block for the time of one round trip on a local socket.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    /// Given up when a call fails on the way: the answer to it may still come, and is not the next one's.
    stream: Mutex<Option<UnixStream>>,
}

fn open(path: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    Ok(stream)
}

impl Client {
    /// Connects to the process that listens at `path`.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), stream: Mutex::new(Some(open(path)?)) })
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// When the process is gone or does not answer, and `Other` with its words when it could not do it.
    pub fn call(&self, request: &Request, fds: &[OwnedFd]) -> io::Result<Reply> {
        let mut held = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = match held.take() {
            Some(stream) => stream,
            None => open(&self.path)?,
        };
        send(&stream, request, fds)?;
        let (reply, _) = receive::<Reply>(&stream)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        *held = Some(stream);
        match reply {
            Reply::Failed(reason) => Err(io::Error::other(reason)),
            reply => Ok(reply),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_carry_descriptors() {
        let (here, there) = UnixStream::pair().unwrap();
        let fds: Vec<OwnedFd> = (0..3).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect();
        send(&here, &Request::Attach { slot: 7, policy: Policy::default() }, &fds).unwrap();
        let (request, fds) = receive::<Request>(&there).unwrap().unwrap();
        assert!(matches!(request, Request::Attach { slot: 7, .. }));
        assert_eq!(fds.len(), 3);
        (&here).write_all(&[0xff; 4]).unwrap();
        assert_eq!(receive::<Request>(&there).unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(here);
        assert!(receive::<Request>(&there).unwrap().is_none());
    }

    #[test]
    fn an_answer_in_drops_is_not_waited_for() {
        let (here, there) = UnixStream::pair().unwrap();
        let limit = Duration::from_millis(200);
        there.set_read_timeout(Some(limit)).unwrap();
        let (done, over) = std::sync::mpsc::channel::<()>();
        let dripping = std::thread::spawn(move || {
            (&here).write_all(&1000_u32.to_be_bytes()).unwrap();
            while over.recv_timeout(limit / 10).is_err() && (&here).write_all(b" ").is_ok() {}
        });
        let began = Instant::now();
        let error = receive::<Reply>(&there).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() < limit * 10, "{:?}", began.elapsed());
        done.send(()).unwrap();
        dripping.join().unwrap();
    }
}
