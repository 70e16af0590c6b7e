//! The framed exchange between a node and the agent on the machine's control port.
//!
//! It exists beside HTTP/2 because the first answer of a restored machine is guest code that an
//! emulator still has to translate: this exchange is a few hundred lines, an HTTP/2 server is not
//! (10 against 32 ms under emulation). One request is in flight at a time, each has an
//! id, so that a reply to a request that was given up is never taken for another's.
//!
//! ```text
//! frame   = u32 length of the rest, little endian | u32 request id | u8 operation | payload
//! reply   = u32 length of the rest               | u32 request id | u8 status    | payload
//! string  = u16 length | UTF-8          bytes = u32 length | data
//! ```
//!
//! Both sides treat the other as hostile: lengths are checked against [`MAX_FRAME`] before anything
//! is allocated, and a frame that does not parse to its end is an error.

use crate::sandbox::EnvVars;

/// The name of the control port under `/sys/class/virtio-ports`.
pub const CONTROL_PORT: &str = "kelvin.control";
/// The name of the port that carries HTTP/2.
pub const HTTP_PORT: &str = "kelvin.http";
/// The control port of a machine with a vsock device. Below 1024: no user's process can take it.
pub const CONTROL_VSOCK: u32 = 1;
/// The same for HTTP/2.
pub const HTTP_VSOCK: u32 = 2;
/// What each end of a conversation over vsock keeps of what it sent, in bytes: more than a socket, a VMM and a vsock
/// hold. It may have to be sent again.
pub const KEPT: usize = 512 << 10;
/// The largest frame, in bytes after the length field.
pub const MAX_FRAME: usize = 1 << 20;

/// What begins each connection to the port of HTTP/2 of a machine with a vsock device. The answer is how much the
/// guest has had, in 8 bytes, big endian, or [`Hello::UNKNOWN`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// Which conversation it is of: one outlives its connections.
    pub session: [u8; 16],
    /// How much of it the host has had, in bytes.
    pub received: u64,
}

impl Hello {
    /// Its length, in bytes.
    pub const LENGTH: usize = 24;
    /// The answer to a host that goes on with a conversation of which the agent knows nothing.
    pub const UNKNOWN: u64 = u64::MAX;

    /// As it is sent.
    pub fn encode(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        let (session, received) = bytes.split_at_mut(16);
        session.copy_from_slice(&self.session);
        received.copy_from_slice(&self.received.to_be_bytes());
        bytes
    }

    /// What was sent.
    pub fn decode(bytes: [u8; Self::LENGTH]) -> Self {
        let (mut session, mut received) = ([0; 16], [0; 8]);
        session.copy_from_slice(&bytes[..16]);
        received.copy_from_slice(&bytes[16..]);
        Self { session, received: u64::from_be_bytes(received) }
    }
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The length field is over [`MAX_FRAME`] or under the size of a header.
    #[error("a frame of {0} bytes is outside the limits")]
    Length(usize),
    /// The payload ends too early.
    #[error("the frame is truncated")]
    Truncated,
    /// Bytes are left over.
    #[error("the frame has {0} bytes too many")]
    Trailing(usize),
    /// Not UTF-8.
    #[error("a text is not UTF-8")]
    Text,
    /// An operation or a status that is not known.
    #[error("unknown operation {0}")]
    Operation(u8),
}

/// What a node asks of the agent.
#[allow(clippy::large_enum_variant)] // one at a time, never in a collection
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Are you there?
    Ping,
    /// Become this sandbox; the reply is what "ready" means.
    Activate(Activation),
    /// Flush the file systems and say whether the HTTP port has come to rest: then a snapshot may be taken.
    Quiesce,
    /// Flush and freeze the root file system until an activation or a wake-up; after some seconds it thaws by itself.
    Freeze,
    /// Go on as who you are: after a pause, or after the instant in which a snapshot was taken.
    Wake(Wake),
}

/// What a machine that stays itself has to know when it goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wake {
    /// Wall clock in nanoseconds since the epoch, taken just before the frame is sent.
    pub wall_clock_ns: u64,
    /// Bytes for the kernel's generator, from the host's.
    pub entropy: [u8; 64],
    /// Whether it was restored: connections of its former VMM are gone.
    pub restored: bool,
}

/// Everything that makes a clone a machine of its own.
#[derive(Clone, PartialEq, Eq)]
pub struct Activation {
    /// The sandbox, also exported to its processes.
    pub sandbox_id: String,
    /// The template it came from.
    pub template: String,
    /// Host name, a DNS label.
    pub hostname: String,
    /// New machine-id.
    pub machine_id: [u8; 16],
    /// New boot-id.
    pub boot_id: [u8; 16],
    /// New hardware address of the link; zeros for a machine without a network.
    pub mac: [u8; 6],
    /// Bytes for the kernel's generator, from the host's.
    pub entropy: [u8; 64],
    /// Wall clock in nanoseconds since the epoch, taken just before the frame is sent.
    pub wall_clock_ns: u64,
    /// What a caller must show; empty means that the agent asks for none.
    pub access_token: String,
    /// Environment of every process that is started from now on.
    pub env_vars: EnvVars,
}

impl std::fmt::Debug for Activation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Activation").field("sandbox_id", &self.sandbox_id).finish_non_exhaustive()
    }
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Done.
    Done {
        /// The guest's wall clock afterwards, in nanoseconds since the epoch.
        wall_clock_ns: u64,
        /// How long the agent worked on it, in microseconds.
        worked_us: u32,
        /// Whether the HTTP port has no connection and waits for one.
        http_waiting: bool,
    },
    /// Not done, and why.
    Failed(String),
}

struct Writer(Vec<u8>);

impl Writer {
    fn frame(request_id: u32, kind: u8) -> Self {
        let mut bytes = Vec::with_capacity(512);
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&request_id.to_le_bytes());
        bytes.push(kind);
        Self(bytes)
    }

    fn text(&mut self, text: &str) -> Result<(), Error> {
        let length = u16::try_from(text.len()).map_err(|_| Error::Length(text.len()))?;
        self.0.extend_from_slice(&length.to_le_bytes());
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }

    fn long_text(&mut self, text: &str) -> Result<(), Error> {
        let length = u32::try_from(text.len()).map_err(|_| Error::Length(text.len()))?;
        self.0.extend_from_slice(&length.to_le_bytes());
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<u8>, Error> {
        let length = self.0.len() - 4;
        if length > MAX_FRAME {
            return Err(Error::Length(length));
        }
        self.0[..4].copy_from_slice(&u32::try_from(length).map_err(|_| Error::Length(length))?.to_le_bytes());
        Ok(self.0)
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Error> {
        let (head, tail) = self.0.split_at_checked(count).ok_or(Error::Truncated)?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        self.take(N)?.try_into().map_err(|_| Error::Truncated)
    }

    fn byte(&mut self) -> Result<u8, Error> {
        Ok(self.array::<1>()?[0])
    }

    fn string(&mut self, length: usize) -> Result<String, Error> {
        std::str::from_utf8(self.take(length)?).map(str::to_owned).map_err(|_| Error::Text)
    }

    fn text(&mut self) -> Result<String, Error> {
        let length = u16::from_le_bytes(self.array()?);
        self.string(usize::from(length))
    }

    fn long_text(&mut self) -> Result<String, Error> {
        let length = u32::from_le_bytes(self.array()?);
        self.string(usize::try_from(length).map_err(|_| Error::Truncated)?)
    }

    fn end(self) -> Result<(), Error> {
        if self.0.is_empty() { Ok(()) } else { Err(Error::Trailing(self.0.len())) }
    }
}

/// How many bytes follow the four of the length field.
///
/// # Errors
/// `Length` when they are more than [`MAX_FRAME`] or fewer than a header has.
pub fn frame_length(field: [u8; 4]) -> Result<usize, Error> {
    let length = usize::try_from(u32::from_le_bytes(field)).map_err(|_| Error::Length(usize::MAX))?;
    if (5..=MAX_FRAME).contains(&length) { Ok(length) } else { Err(Error::Length(length)) }
}

impl Request {
    /// The frame, length field included.
    ///
    /// # Errors
    /// `Length` when a text or the whole frame is over its limit.
    pub fn encode(&self, request_id: u32) -> Result<Vec<u8>, Error> {
        let activation = match self {
            Self::Ping => return Writer::frame(request_id, 0).finish(),
            Self::Quiesce => return Writer::frame(request_id, 2).finish(),
            Self::Freeze => return Writer::frame(request_id, 3).finish(),
            Self::Wake(wake) => {
                let mut writer = Writer::frame(request_id, 4);
                writer.0.extend_from_slice(&wake.wall_clock_ns.to_le_bytes());
                writer.0.extend_from_slice(&wake.entropy);
                writer.0.push(u8::from(wake.restored));
                return writer.finish();
            }
            Self::Activate(activation) => activation,
        };
        let mut writer = Writer::frame(request_id, 1);
        writer.0.extend_from_slice(&activation.wall_clock_ns.to_le_bytes());
        writer.0.extend_from_slice(&activation.machine_id);
        writer.0.extend_from_slice(&activation.boot_id);
        writer.0.extend_from_slice(&activation.mac);
        writer.0.extend_from_slice(&activation.entropy);
        for text in
            [&activation.sandbox_id, &activation.template, &activation.hostname, &activation.access_token]
        {
            writer.text(text)?;
        }
        let count =
            u16::try_from(activation.env_vars.len()).map_err(|_| Error::Length(activation.env_vars.len()))?;
        writer.0.extend_from_slice(&count.to_le_bytes());
        for (key, value) in &activation.env_vars {
            writer.text(key)?;
            writer.long_text(value)?;
        }
        writer.finish()
    }

    /// Parses what follows the length field.
    ///
    /// # Errors
    /// Any of [`Error`] for bytes that are not one whole request.
    pub fn decode(frame: &[u8]) -> Result<(u32, Self), Error> {
        let mut reader = Reader(frame);
        let request_id = u32::from_le_bytes(reader.array()?);
        let request = match reader.byte()? {
            0 => Self::Ping,
            1 => {
                let wall_clock_ns = u64::from_le_bytes(reader.array()?);
                let machine_id = reader.array()?;
                let boot_id = reader.array()?;
                let mac = reader.array()?;
                let entropy = reader.array()?;
                let sandbox_id = reader.text()?;
                let template = reader.text()?;
                let hostname = reader.text()?;
                let access_token = reader.text()?;
                let count = u16::from_le_bytes(reader.array()?);
                let mut env_vars = EnvVars::new();
                for _ in 0..count {
                    let key = reader.text()?;
                    env_vars.insert(key, reader.long_text()?);
                }
                Self::Activate(Activation {
                    sandbox_id,
                    template,
                    hostname,
                    machine_id,
                    boot_id,
                    mac,
                    entropy,
                    wall_clock_ns,
                    access_token,
                    env_vars,
                })
            }
            2 => Self::Quiesce,
            3 => Self::Freeze,
            4 => Self::Wake(Wake {
                wall_clock_ns: u64::from_le_bytes(reader.array()?),
                entropy: reader.array()?,
                restored: reader.byte()? != 0,
            }),
            other => return Err(Error::Operation(other)),
        };
        reader.end()?;
        Ok((request_id, request))
    }
}

impl Reply {
    /// The frame, length field included.
    ///
    /// # Errors
    /// `Length` when the message is over its limit.
    pub fn encode(&self, request_id: u32) -> Result<Vec<u8>, Error> {
        match self {
            Self::Done { wall_clock_ns, worked_us, http_waiting } => {
                let mut writer = Writer::frame(request_id, 0);
                writer.0.extend_from_slice(&wall_clock_ns.to_le_bytes());
                writer.0.extend_from_slice(&worked_us.to_le_bytes());
                writer.0.push(u8::from(*http_waiting));
                writer.finish()
            }
            Self::Failed(message) => {
                let mut writer = Writer::frame(request_id, 1);
                writer.text(message)?;
                writer.finish()
            }
        }
    }

    /// Parses what follows the length field.
    ///
    /// # Errors
    /// Any of [`Error`] for bytes that are not one whole reply.
    pub fn decode(frame: &[u8]) -> Result<(u32, Self), Error> {
        let mut reader = Reader(frame);
        let request_id = u32::from_le_bytes(reader.array()?);
        let reply = match reader.byte()? {
            0 => Self::Done {
                wall_clock_ns: u64::from_le_bytes(reader.array()?),
                worked_us: u32::from_le_bytes(reader.array()?),
                http_waiting: reader.byte()? != 0,
            },
            1 => Self::Failed(reader.text()?),
            other => return Err(Error::Operation(other)),
        };
        reader.end()?;
        Ok((request_id, reply))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_parse_or_fail_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = Request::decode(&bytes);
            let _ = Reply::decode(&bytes);
        }

        #[test]
        fn an_activation_survives_the_wire(
            texts in proptest::collection::vec(".{0,40}", 4),
            env in proptest::collection::btree_map("[A-Z_]{1,12}", ".{0,80}", 0..8),
            clock in any::<u64>(),
            id in any::<u32>(),
            machine_id in any::<[u8; 16]>(),
        ) {
            let request = Request::Activate(Activation {
                sandbox_id: texts[0].clone(),
                template: texts[1].clone(),
                hostname: texts[2].clone(),
                access_token: texts[3].clone(),
                machine_id,
                boot_id: machine_id,
                mac: [2, 0, 0, 0, 0, 9],
                entropy: [7; 64],
                wall_clock_ns: clock,
                env_vars: env,
            });
            let frame = request.encode(id).unwrap();
            let length = frame_length(frame[..4].try_into().unwrap()).unwrap();
            prop_assert_eq!(length, frame.len() - 4);
            prop_assert_eq!(Request::decode(&frame[4..]).unwrap(), (id, request));
            // Every proper prefix is refused.
            prop_assert!(Request::decode(&frame[4..frame.len() - 1]).is_err());
        }
    }

    #[test]
    fn a_wake_up_survives_the_wire() {
        for request in [
            Request::Freeze,
            Request::Wake(Wake { wall_clock_ns: 1 << 60, entropy: [9; 64], restored: true }),
        ] {
            let frame = request.encode(3).unwrap();
            assert_eq!(Request::decode(&frame[4..]), Ok((3, request)));
        }
    }

    #[test]
    fn limits_hold_before_anything_is_allocated() {
        assert_eq!(frame_length(u32::MAX.to_le_bytes()), Err(Error::Length(u32::MAX as usize)));
        assert_eq!(frame_length([4, 0, 0, 0]), Err(Error::Length(4)));
        let reply = Reply::Failed("x".repeat(70_000));
        assert_eq!(reply.encode(1), Err(Error::Length(70_000)));
    }
}
