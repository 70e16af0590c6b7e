//! The host's end of a guest's control port.
//!
//! A connection may break: a guest that boots does not listen yet, an agent crashes, and a snapshot resets the
//! connections of machines with a vsock device. It is then made again and what was not answered is sent once more,
//! within the limit of whoever waits; every request can be done twice.
//!
//! A request is posted without waiting for anybody: what the socket does not take at once is sent by whoever waits for
//! the reply. A frame may be longer than the socket's buffer (208 KiB by default), and a guest whose vCPUs stand still
//! reads nothing, so a post that waited for the guest would wait for what comes after it. Everything else has a limit.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kelvin_api::guest::{self, Reply, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::Error;
use crate::hostile::{Pace, told};
use crate::stream::GuestStream;

/// The longest greeting of a VMM, in bytes.
const MAX_GREETING: usize = 32;
/// How long a VMM may take to accept a connection.
const DIAL: Duration = Duration::from_secs(10);
/// What may wait to be sent on one connection, in bytes: a guest that takes nothing gets another one.
const MAX_UNSENT: usize = 2 * guest::MAX_FRAME;
/// How long to wait before a connection is made again, at first and at the most.
const AGAIN: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// Makes connections to one machine's guest.
#[async_trait]
pub trait Dial: Send + Sync + std::fmt::Debug {
    /// Connects to the control port. What is written before the guest runs waits for the guest.
    async fn dial(&self) -> Result<Dialed, Error>;

    /// Connects to the HTTP port. One connection at a time. May take as long as a hostile guest wants it to, within a
    /// limit.
    async fn connect(&self) -> Result<GuestStream, Error>;

    /// Goes up when connections are of no more use that nobody has told so.
    fn generation(&self) -> u64 {
        0
    }
}

/// A new connection.
#[derive(Debug)]
pub struct Dialed {
    /// It.
    pub stream: GuestStream,
    /// Whether the VMM says something before the guest does: a line that begins with `OK`.
    pub greets: bool,
}

/// One way to the control port; one request at a time.
#[derive(Debug)]
pub struct Control {
    dial: Arc<dyn Dial>,
    link: Option<Link>,
    /// What was sent last.
    frame: Vec<u8>,
    next_id: u32,
}

/// One connection, and how far each side has come on it: whoever gives up in the middle of a frame leaves a connection
/// that can be gone on with.
#[derive(Debug)]
struct Link {
    /// The generation that it is of.
    generation: u64,
    dialed: Dialed,
    /// What it has not taken yet: the rest of a frame, and those after it.
    unsent: Vec<u8>,
    /// What came and is no whole frame yet.
    heard: Vec<u8>,
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
    /// wakes up. Waits for no guest: [`Control::wait`] sends what is too long to be taken at once.
    ///
    /// # Errors
    /// `Malformed` when it cannot be encoded, `Io`, `Deadline` when the VMM does not accept a connection.
    pub async fn post(&mut self, request: &Request) -> Result<Asked, Error> {
        self.next_id = self.next_id.wrapping_add(1);
        self.frame = request.encode(self.next_id)?;
        if self.link.as_ref().is_some_and(|link| link.unsent.len() > MAX_UNSENT) {
            self.link = None;
        }
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
            Ok(Ok(Reply::Failed(reason))) => Err(Error::Agent { what, reason: told(&reason) }),
            Ok(Err(error)) => Err(error),
            Err(_) => {
                Err(Error::Deadline { what, after: limit, detail: "the agent did not answer".to_owned() })
            }
        }
    }

    async fn connected(&mut self) -> Result<&mut Link, Error> {
        let generation = self.dial.generation();
        if self.link.as_ref().is_some_and(|link| link.generation != generation) {
            self.link = None;
        }
        match &mut self.link {
            Some(link) => Ok(link),
            link => {
                let Ok(dialed) = tokio::time::timeout(DIAL, self.dial.dial()).await else {
                    let detail = "the VMM did not accept a connection".to_owned();
                    return Err(Error::Deadline { what: "connecting to the agent", after: DIAL, detail });
                };
                let (unsent, heard) = (Vec::new(), Vec::new());
                Ok(link.insert(Link { generation, dialed: dialed?, unsent, heard }))
            }
        }
    }

    /// Sends what is to be sent as far as the socket takes it at once.
    async fn send(&mut self) -> Result<(), Error> {
        let frame = std::mem::take(&mut self.frame);
        let sent = match self.connected().await {
            Ok(link) => link.begin(&frame).map_err(io),
            Err(error) => Err(error),
        };
        self.frame = frame;
        sent
    }

    /// The reply to the last request, over as many connections as it takes. A VMM that is gone ends it.
    async fn answer(&mut self, id: u32) -> Result<Reply, Error> {
        let mut pause = AGAIN.0;
        loop {
            let answered = match &mut self.link {
                Some(link) => link.reply(id).await,
                None => Err(io(std::io::ErrorKind::NotConnected.into())),
            };
            match answered {
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
}

impl Link {
    /// Sends `frame` as far as the socket takes it at once.
    fn begin(&mut self, frame: &[u8]) -> std::io::Result<()> {
        // In order: the rest of an earlier one goes first.
        self.unsent.extend_from_slice(frame);
        let taken = self.dialed.stream.take_at_once(&self.unsent)?;
        self.unsent.drain(..taken);
        if self.unsent.is_empty() {
            // It may hold a token.
            self.unsent = Vec::new();
        }
        Ok(())
    }

    /// The reply to the request `id`, once all of it is sent. Cancel-safe.
    async fn reply(&mut self, id: u32) -> Result<Reply, Error> {
        while !self.unsent.is_empty() {
            let written = self.dialed.stream.write(&self.unsent).await.map_err(io)?;
            self.unsent.drain(..written);
        }
        self.unsent = Vec::new();
        let mut pace = Pace::default();
        loop {
            if self.dialed.greets {
                if let Some(length) = greeting_length(&self.heard).map_err(io)? {
                    self.heard.drain(..length);
                    self.dialed.greets = false;
                }
            } else if let Some(frame) = take_frame(&mut self.heard)? {
                let (answered, reply) = Reply::decode(&frame)?;
                if answered == id {
                    return Ok(reply);
                }
                // What answers nothing that is asked is read no faster than this.
                pace.after(frame.len()).await;
                continue;
            }
            if self.dialed.stream.read_buf(&mut self.heard).await.map_err(io)? == 0 {
                return Err(io(std::io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }
}

/// The body of the first whole frame of `heard`, which is taken out; `None` while there is none.
///
/// # Errors
/// `Malformed` for a length that none has: so `heard` never holds much more than one frame.
fn take_frame(heard: &mut Vec<u8>) -> Result<Option<Vec<u8>>, Error> {
    let Some((field, rest)) = heard.split_first_chunk() else { return Ok(None) };
    let length = guest::frame_length(*field)?;
    let Some(body) = rest.get(..length) else { return Ok(None) };
    let body = body.to_vec();
    heard.drain(..field.len() + length);
    Ok(Some(body))
}

/// How long the line is with which `heard` begins, when that is a VMM's greeting; `None` while it has no end.
fn greeting_length(heard: &[u8]) -> std::io::Result<Option<usize>> {
    let refused = |text: &str| Err(std::io::Error::other(text.to_owned()));
    match heard.iter().take(MAX_GREETING).position(|byte| *byte == b'\n') {
        Some(end) if heard.starts_with(b"OK ") => Ok(Some(end + 1)),
        Some(_) => refused("the VMM did not greet"),
        None if heard.len() >= MAX_GREETING => refused("the VMM's greeting has no end"),
        None => Ok(None),
    }
}

/// Reads what a VMM says when the guest has taken a connection: `OK` and a number. Nothing behind it.
///
/// # Errors
/// `Io` when it says something else, or hangs up.
pub async fn greeting(stream: &mut UnixStream) -> Result<(), Error> {
    let mut line = Vec::with_capacity(MAX_GREETING);
    while greeting_length(&line).map_err(io)?.is_none() {
        line.push(stream.read_u8().await.map_err(io)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use kelvin_api::guest::Activation;

    use super::*;

    /// Hands out connections that were made ahead.
    #[derive(Debug)]
    struct Made(Mutex<Vec<Dialed>>);

    #[async_trait]
    impl Dial for Made {
        async fn dial(&self) -> Result<Dialed, Error> {
            self.0.lock().unwrap().pop().ok_or_else(|| io(std::io::ErrorKind::NotFound.into()))
        }

        async fn connect(&self) -> Result<GuestStream, Error> {
            Err(io(std::io::ErrorKind::Unsupported.into()))
        }
    }

    /// A way to a guest that is the other end, with a small buffer between them.
    fn way(greets: bool) -> (Control, UnixStream) {
        let (stream, guest) = UnixStream::pair().unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&stream, 4096).unwrap();
        (Control::new(Arc::new(Made(Mutex::new(vec![Dialed { stream: stream.into(), greets }])))), guest)
    }

    fn large() -> Request {
        Request::Activate(Activation {
            sandbox_id: "i".repeat(20),
            template: "base".into(),
            hostname: "h".into(),
            machine_id: [1; 16],
            boot_id: [2; 16],
            mac: [3; 6],
            entropy: [4; 64],
            access_token: "t".into(),
            env_vars: [("LARGE".to_owned(), "x".repeat(600 << 10))].into(),
            wall_clock_ns: 1,
        })
    }

    async fn read_frame(guest: &mut UnixStream) -> (u32, Vec<u8>) {
        let mut length = [0; 4];
        guest.read_exact(&mut length).await.unwrap();
        let mut body = vec![0; guest::frame_length(length).unwrap()];
        guest.read_exact(&mut body).await.unwrap();
        let id = u32::from_le_bytes(*body.first_chunk().unwrap());
        (id, [length.to_vec(), body].concat())
    }

    fn done(id: u32) -> Vec<u8> {
        Reply::Done { wall_clock_ns: 7, worked_us: 1, http_waiting: false }.encode(id).unwrap()
    }

    #[tokio::test]
    async fn a_frame_that_no_buffer_takes_is_posted_before_the_guest_runs() {
        for greets in [false, true] {
            let (mut control, mut guest) = way(greets);
            let request = large();
            let posting = tokio::time::timeout(Duration::from_secs(5), control.post(&request));
            let asked = posting.await.expect("nobody reads yet, and nobody is waited for").unwrap();
            let running = async {
                if greets {
                    guest.write_all(b"OK 1073741824\n").await.unwrap();
                }
                let (id, frame) = read_frame(&mut guest).await;
                guest.write_all(&done(id)).await.unwrap();
                (id, frame)
            };
            let (answer, (id, frame)) =
                tokio::join!(control.wait("activation", asked, Duration::from_secs(5)), running);
            assert_eq!(answer.unwrap().wall_clock_ns, 7);
            assert_eq!(frame, large().encode(id).unwrap());
        }
    }

    #[tokio::test]
    async fn who_gives_up_in_the_middle_of_a_frame_leaves_a_way_that_can_be_used() {
        let (mut control, mut guest) = way(true);
        let short = Duration::from_millis(20);
        assert!(matches!(control.call("one", &large(), short).await, Err(Error::Deadline { .. })));
        // Half of a greeting, half of a reply.
        guest.write_all(b"OK 10").await.unwrap();
        assert!(matches!(control.call("two", &Request::Ping, short).await, Err(Error::Deadline { .. })));
        guest.write_all(b"73\n").await.unwrap();
        let asked = control.post(&Request::Freeze).await.unwrap();
        let running = async {
            let mut all = Vec::new();
            for _ in 0..3 {
                let (id, frame) = read_frame(&mut guest).await;
                all.extend_from_slice(&done(id));
                assert!(frame.len() > 8);
            }
            let (first, rest) = all.split_at(3);
            guest.write_all(first).await.unwrap();
            tokio::task::yield_now().await;
            guest.write_all(rest).await.unwrap();
        };
        let (answer, ()) = tokio::join!(control.wait("three", asked, Duration::from_secs(5)), running);
        assert_eq!(answer.unwrap().wall_clock_ns, 7);
    }

    #[tokio::test]
    async fn a_guest_that_takes_nothing_holds_no_more_than_some_frames() {
        let (mut control, _guest) = way(false);
        for _ in 0..20 {
            // At last another connection would be made, and there is none.
            if control.post(&large()).await.is_err() {
                return;
            }
            assert!(control.link.as_ref().unwrap().unsent.len() <= MAX_UNSENT + guest::MAX_FRAME);
        }
        panic!("what waits has no bound");
    }

    #[test]
    fn a_length_that_no_frame_has_is_refused_at_once() {
        let mut heard = u32::MAX.to_le_bytes().to_vec();
        assert!(matches!(take_frame(&mut heard), Err(Error::Malformed(_))));
        assert!(greeting_length(&[b'x'; MAX_GREETING]).is_err());
        assert!(greeting_length(b"NO 1\n").is_err());
        assert_eq!(greeting_length(b"OK").unwrap(), None);
    }
}

#[cfg(test)]
mod floods {
    use super::*;

    /// A guest whose end of the only connection the test has.
    #[derive(Debug)]
    struct Once(std::sync::Mutex<Option<UnixStream>>);

    #[async_trait]
    impl Dial for Once {
        async fn dial(&self) -> Result<Dialed, Error> {
            let stream = self.0.lock().unwrap().take();
            Ok(Dialed {
                stream: stream.ok_or_else(|| io(std::io::ErrorKind::NotFound.into()))?.into(),
                greets: false,
            })
        }

        async fn connect(&self) -> Result<GuestStream, Error> {
            Err(io(std::io::ErrorKind::NotFound.into()))
        }
    }

    fn control() -> (Control, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Control::new(Arc::new(Once(Some(ours).into()))), theirs)
    }

    #[tokio::test]
    async fn a_guest_that_answers_what_nobody_asked_is_left_and_costs_little() {
        let (mut control, mut theirs) = control();
        let flood = tokio::spawn(async move {
            let frame = Reply::Failed("x".repeat(60_000)).encode(7).unwrap();
            let mut sent = 0;
            while theirs.write_all(&frame).await.is_ok() {
                sent += frame.len();
            }
            sent
        });
        let limit = Duration::from_secs(1);
        let answer = control.call("quiesce", &Request::Quiesce, limit).await;
        assert!(matches!(answer, Err(Error::Deadline { .. })), "{answer:?}");
        drop(control);
        let sent = flood.await.unwrap();
        assert!(sent < 40 << 20, "{sent} bytes were read in a second");
    }

    #[tokio::test]
    async fn a_frame_that_is_too_long_is_refused_before_it_is_read() {
        let (mut control, mut theirs) = control();
        theirs.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
        let answer = control.call("quiesce", &Request::Quiesce, Duration::from_secs(20)).await;
        assert!(matches!(answer, Err(Error::Malformed { .. })), "{answer:?}");
    }

    #[tokio::test]
    async fn a_guests_reason_is_shown_in_part() {
        let (mut control, mut theirs) = control();
        let asked = control.post(&Request::Quiesce).await.unwrap();
        let frame = Reply::Failed("\u{1b}]0;x".repeat(10_000)).encode(asked.0).unwrap();
        theirs.write_all(&frame).await.unwrap();
        match control.wait("quiesce", asked, Duration::from_secs(20)).await {
            Err(Error::Agent { reason, .. }) => assert!(reason.len() <= 1000 && !reason.contains('\u{1b}')),
            other => panic!("{other:?}"),
        }
    }
}
