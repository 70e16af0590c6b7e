//! The host's end of a guest's control port.

use std::time::Duration;

use kelvin_api::guest::{self, Reply, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::Error;

/// One connection to the control port; one request at a time.
#[derive(Debug)]
pub struct Control {
    stream: UnixStream,
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
    /// Takes over a connection to the port.
    pub fn new(stream: UnixStream) -> Self {
        // Ids of a former daemon's requests must not be met by chance.
        let next_id = std::process::id().rotate_left(16);
        Self { stream, next_id }
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
        let frame = request.encode(self.next_id)?;
        self.stream.write_all(&frame).await.map_err(io)?;
        Ok(Asked(self.next_id))
    }

    /// Waits for the reply to a request that was posted.
    ///
    /// # Errors
    /// As [`Control::call`].
    pub async fn wait(&mut self, what: &'static str, asked: Asked, limit: Duration) -> Result<Done, Error> {
        match tokio::time::timeout(limit, self.reply(asked.0)).await {
            Ok(Ok(Reply::Done { wall_clock_ns, worked_us, http_waiting })) => {
                Ok(Done { wall_clock_ns, worked: Duration::from_micros(worked_us.into()), http_waiting })
            }
            Ok(Ok(Reply::Failed(reason))) => Err(Error::Agent { what, reason }),
            Ok(Err(error)) => Err(error),
            Err(_) => {
                Err(Error::Deadline { what, after: limit, detail: "the agent did not answer".to_owned() })
            }
        }
    }

    async fn reply(&mut self, id: u32) -> Result<Reply, Error> {
        loop {
            let mut length = [0; 4];
            self.stream.read_exact(&mut length).await.map_err(io)?;
            let mut reply = vec![0; guest::frame_length(length)?];
            self.stream.read_exact(&mut reply).await.map_err(io)?;
            let (answered, reply) = Reply::decode(&reply)?;
            if answered == id {
                return Ok(reply);
            }
        }
    }
}
