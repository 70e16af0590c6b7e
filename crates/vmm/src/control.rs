//! The host's end of a guest's control port.
//!
//! A connection may break: a guest that boots does not listen yet, an agent crashes, and a snapshot resets the
//! connections of machines with a vsock device. It is then made again and what was not answered is sent once more,
//! within the limit of whoever waits; every request can be done twice.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kelvin_api::guest::{self, Reply, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::Error;

/// The longest greeting of a VMM, in bytes.
const MAX_GREETING: usize = 32;
/// How long to wait before a connection is made again, at first and at the most.
const AGAIN: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// Makes connections to one machine's guest.
#[async_trait]
pub trait Dial: Send + Sync + std::fmt::Debug {
    /// Connects to the control port. What is written before the guest runs waits for the guest.
    async fn dial(&self) -> Result<Dialed, Error>;

    /// Connects to the HTTP port. One connection at a time. May take as long as a hostile guest wants it to, within a
    /// limit.
    async fn connect(&self) -> Result<UnixStream, Error>;

    /// Goes up when connections are of no more use that nobody has told so.
    fn generation(&self) -> u64 {
        0
    }
}

/// A new connection.
#[derive(Debug)]
pub struct Dialed {
    /// It.
    pub stream: UnixStream,
    /// Whether the VMM says something before the guest does: a line that begins with `OK`.
    pub greets: bool,
}

/// One way to the control port; one request at a time.
#[derive(Debug)]
pub struct Control {
    dial: Arc<dyn Dial>,
    /// With the generation that it is of.
    link: Option<(u64, Dialed)>,
    /// What was sent last.
    frame: Vec<u8>,
    next_id: u32,
}

/// A request that was posted.
#[derive(Debug)]
pub struct Asked(u32);

fn io(source: std::io::Error) -> Error {
    Error::Io { what: "speaking to the agent", source }
}

/// What the agent said when it had done something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// The guest's wall clock afterwards, in nanoseconds since the epoch.
    pub wall_clock_ns: u64,
    /// How long the agent worked on it.
    pub worked: Duration,
    /// Whether the HTTP port has no connection and waits for one.
    pub http_waiting: bool,
}

impl Control {
    /// A way that is opened by the first request.
    pub fn new(dial: Arc<dyn Dial>) -> Self {
        // Ids of a former daemon's requests must not be met by chance.
        let next_id = std::process::id().rotate_left(16);
        Self { dial, link: None, frame: Vec::new(), next_id }
    }

    /// A way that is open.
    ///
    /// # Errors
    /// `Io` when the VMM is gone.
    pub async fn open(dial: Arc<dyn Dial>) -> Result<Self, Error> {
        let mut control = Self::new(dial);
        control.connected().await?;
        Ok(control)
    }

    /// Sends `request` and waits for its reply; replies to requests that were given up are passed over.
    /// `what` names it in errors.
    ///
    /// # Errors
    /// `Deadline`, `Agent` with the reason, `Malformed` when a hostile guest sends nonsense, `Io`.
    pub async fn call(
        &mut self,
        what: &'static str,
        request: &Request,
        limit: Duration,
    ) -> Result<Done, Error> {
        let asked = self.post(request).await?;
        self.wait(what, asked, limit).await
    }

    /// Sends `request` without waiting for its reply: a machine whose vCPUs are stopped finds it when it
    /// wakes up.
    ///
    /// # Errors
    /// `Malformed` when it cannot be encoded, `Io`.
    pub async fn post(&mut self, request: &Request) -> Result<Asked, Error> {
        self.next_id = self.next_id.wrapping_add(1);
        self.frame = request.encode(self.next_id)?;
        if self.send().await.is_err() {
            // Broken since the last request.
            self.link = None;
            self.send().await?;
        }
        Ok(Asked(self.next_id))
    }

    /// Waits for the reply to a request that was posted.
    ///
    /// # Errors
    /// As [`Control::call`].
    pub async fn wait(&mut self, what: &'static str, asked: Asked, limit: Duration) -> Result<Done, Error> {
        match tokio::time::timeout(limit, self.answer(asked.0)).await {
            Ok(Ok(Reply::Done { wall_clock_ns, worked_us, http_waiting })) => {
                // It may hold a token.
                self.frame = Vec::new();
                Ok(Done { wall_clock_ns, worked: Duration::from_micros(worked_us.into()), http_waiting })
            }
            Ok(Ok(Reply::Failed(reason))) => Err(Error::Agent { what, reason }),
            Ok(Err(error)) => Err(error),
            Err(_) => {
                Err(Error::Deadline { what, after: limit, detail: "the agent did not answer".to_owned() })
            }
        }
    }

    async fn connected(&mut self) -> Result<&mut Dialed, Error> {
        let generation = self.dial.generation();
        if self.link.as_ref().is_some_and(|(made, _)| *made != generation) {
            self.link = None;
        }
        match &mut self.link {
            Some((_, dialed)) => Ok(dialed),
            link => Ok(&mut link.insert((generation, self.dial.dial().await?)).1),
        }
    }

    async fn send(&mut self) -> Result<(), Error> {
        let frame = std::mem::take(&mut self.frame);
        let sent = match self.connected().await {
            Ok(dialed) => dialed.stream.write_all(&frame).await.map_err(io),
            Err(error) => Err(error),
        };
        self.frame = frame;
        sent
    }

    /// The reply to the last request, over as many connections as it takes. A VMM that is gone ends it.
    async fn answer(&mut self, id: u32) -> Result<Reply, Error> {
        let mut pause = AGAIN.0;
        loop {
            match self.reply(id).await {
                Err(Error::Io { .. }) => self.link = None,
                other => return other,
            }
            // Nothing tells when the guest listens.
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(AGAIN.1);
            if let Err(error) = self.send().await {
                match self.link.take() {
                    // Broken in the middle of it.
                    Some(_) => {}
                    None => return Err(error),
                }
            }
        }
    }

    async fn reply(&mut self, id: u32) -> Result<Reply, Error> {
        let Some((_, Dialed { stream, greets })) = &mut self.link else {
            return Err(io(std::io::ErrorKind::NotConnected.into()));
        };
        if std::mem::take(greets) {
            greeting(stream).await?;
        }
        loop {
            let mut length = [0; 4];
            stream.read_exact(&mut length).await.map_err(io)?;
            let mut reply = vec![0; guest::frame_length(length)?];
            stream.read_exact(&mut reply).await.map_err(io)?;
            let (answered, reply) = Reply::decode(&reply)?;
            if answered == id {
                return Ok(reply);
            }
        }
    }
}

/// Reads what a VMM says when the guest has taken a connection: `OK` and a number.
///
/// # Errors
/// `Io` when it says something else, or hangs up.
pub async fn greeting(stream: &mut UnixStream) -> Result<(), Error> {
    let mut line = Vec::with_capacity(MAX_GREETING);
    while line.last() != Some(&b'\n') {
        if line.len() == MAX_GREETING {
            return Err(io(std::io::Error::other("the VMM's greeting has no end")));
        }
        line.push(stream.read_u8().await.map_err(io)?);
    }
    if line.starts_with(b"OK ") { Ok(()) } else { Err(io(std::io::Error::other("the VMM did not greet"))) }
}
