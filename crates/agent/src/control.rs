//! The control port: activation and quiesce, on a thread of its own with blocking reads.
//!
//! Everything here runs in a machine that was restored a moment ago and is still being translated:
//! few system calls, files that were opened before the snapshot, no allocation that can be avoided.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kelvin_api::guest::{self, Activation, Reply, Request, Wake};
use kelvin_api::id::VmId;
use rustix::time::{ClockId, Timespec};

use crate::activation::Kept;
use crate::identity::Identity;
use crate::network::Hardware;
use crate::state::State;
use crate::{hooks, port, services, vsock};

/// The control port, of the kind that this machine has.
pub enum Channel {
    /// One stream for ever, whoever the host is.
    Port(File),
    /// A connection for each host.
    Vsock(vsock::Port, Option<File>),
}

impl Channel {
    /// Opens it.
    ///
    /// # Errors
    /// When the machine has neither a port nor a vsock device.
    pub fn open() -> io::Result<Self> {
        match port::open(guest::CONTROL_PORT, false) {
            Ok(file) => Ok(Self::Port(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok(Self::Vsock(vsock::Port::open(guest::CONTROL_VSOCK)?, None))
            }
            Err(error) => Err(error),
        }
    }

    /// The stream to the host; waits for a connection where there are some.
    fn stream(&mut self) -> io::Result<&File> {
        match self {
            Self::Port(file) => Ok(file),
            Self::Vsock(port, connection) => match connection {
                Some(file) => Ok(file),
                None => Ok(connection.insert(port.accept()?)),
            },
        }
    }

    /// Goes on after a read that failed.
    fn recover(&mut self, error: &io::Error) {
        match self {
            Self::Port(file) if error.kind() == io::ErrorKind::InvalidData => {
                let _ = io::copy(&mut (&*file).take(guest::MAX_FRAME as u64), &mut io::sink());
            }
            // No host end: reads return at once and the port offers nothing to wait on. The node connects before it
            // restores, so this is never on a create path.
            Self::Port(_) => std::thread::sleep(Duration::from_millis(5)),
            Self::Vsock(_, connection) => *connection = None,
        }
    }
}

/// Serves the control port until the machine ends.
pub struct Control {
    state: Arc<State>,
    channel: Channel,
    random: File,
    identity: Arc<Mutex<Identity>>,
    look: Option<Look>,
    /// Whether it has looked at everything since the last activation.
    looked: bool,
    /// The last activation, for the agent after this one.
    kept: Kept,
    hardware: Hardware,
    /// What the link has, when it was set here.
    mac: [u8; 6],
    /// Since when the root file system is frozen.
    frozen: Arc<Mutex<Option<Instant>>>,
    /// Whether the image's programs have to be told of the next activation.
    tell: bool,
    /// What init could not do; a machine with problems refuses to be activated.
    problems: String,
    another: bool,
    /// Whether the image's services are known to run.
    ready: bool,
    /// Whether the last request made this another machine for its programs.
    renewed: bool,
}

impl Control {
    /// Opens everything that an activation will need.
    ///
    /// # Errors
    /// When the port or one of the files cannot be opened.
    pub fn open(state: Arc<State>, channel: Channel) -> io::Result<Self> {
        let random = open_random()?;
        let kept = Kept::open()?;
        let another = kept.arrive() > 0;
        if another {
            // One that was killed while it was frozen has left nobody who thaws it.
            let _ = ioctl_root(FITHAW);
        }
        // An agent before this one has crashed, or was killed: the machine is who it was.
        let former = kept.get();
        state.look_at_image();
        match &former {
            Some(activation) => state.become_sandbox(activation.clone()),
            // Torn in the middle of an activation: nobody is let in until the node activates again. A token that
            // nobody knows, not none.
            None if another => state.settings().access_token = VmId::random().to_string(),
            None => {}
        }
        let identity = Identity::open(
            former.as_ref().map(|former| (former.hostname.as_str(), former.machine_id, former.boot_id)),
        )?;
        let identity = Arc::new(Mutex::new(identity));
        let mac = former.as_ref().map_or([0; 6], |former| former.mac);
        Ok(Self {
            channel,
            random,
            look: Look::start(Arc::clone(&identity), Arc::clone(&state)),
            looked: false,
            state,
            identity,
            kept,
            hardware: Hardware::open()?,
            mac,
            frozen: Arc::default(),
            tell: another || hooks::exist(),
            problems: std::env::var(crate::init::PROBLEMS).unwrap_or_default(),
            another,
            ready: former.is_some(),
            renewed: false,
        })
    }

    /// Whether there was another agent of this machine before this one.
    pub fn is_another(&self) -> bool {
        self.another
    }

    /// Answers one frame after the other, for ever. A frame that does not parse is answered with its
    /// error; a length that cannot be right makes the stream useless, so what is there is dropped.
    pub fn run(mut self) -> ! {
        let mut frame = Vec::with_capacity(4096);
        loop {
            if let Err(error) = self.read_frame(&mut frame) {
                self.channel.recover(&error);
                continue;
            }
            let started = Instant::now();
            let (id, reply) = match Request::decode(&frame) {
                Ok((id, request)) => {
                    let becomes = matches!(request, Request::Activate(_));
                    let reply = self.answer(request, started);
                    if becomes && matches!(reply, Reply::Done { .. }) {
                        self.kept.put(&frame);
                    }
                    (id, reply)
                }
                Err(error) => (0, Reply::Failed(error.to_string())),
            };
            if let Ok(bytes) = reply.encode(id) {
                let _ = self.channel.stream().and_then(|mut stream| stream.write_all(&bytes));
            }
            if std::mem::take(&mut self.renewed) {
                self.state.restored.notify_one();
            }
        }
    }

    fn read_frame(&mut self, frame: &mut Vec<u8>) -> io::Result<()> {
        let mut stream = self.channel.stream()?;
        let mut length = [0; 4];
        stream.read_exact(&mut length)?;
        let length =
            guest::frame_length(length).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        frame.clear();
        frame.resize(length, 0);
        stream.read_exact(frame)
    }

    /// Waits until what the image runs can be used, once.
    fn ready(&mut self) -> io::Result<()> {
        if !self.ready {
            services::wait_ready().map_err(io::Error::other)?;
            self.ready = true;
        }
        Ok(())
    }

    fn answer(&mut self, request: Request, started: Instant) -> Reply {
        let result = match request {
            Request::Ping => self.ready(),
            Request::Activate(_) if !self.problems.is_empty() => {
                Err(io::Error::other(format!("the machine did not start whole: {}", self.problems)))
            }
            Request::Activate(activation) => self.activate(activation),
            Request::Quiesce => {
                self.check_identity();
                rustix::fs::sync();
                touch_heap();
                Ok(())
            }
            Request::Freeze => {
                self.check_identity();
                touch_heap();
                self.freeze()
            }
            Request::Wake(wake) => self.wake(&wake),
        };
        match result {
            Ok(()) => Reply::Done {
                wall_clock_ns: SystemTime::now()
                    .duration_since(UNIX_EPOCH)
                    .map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)),
                worked_us: u32::try_from(started.elapsed().as_micros()).unwrap_or(u32::MAX),
                http_waiting: self.state.is_http_waiting(),
            },
            Err(error) => Reply::Failed(error.to_string()),
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        // The clock first: it was read by the host just before the frame was sent.
        set_clock(activation.wall_clock_ns)?;
        thaw(&self.frozen, None);
        self.state.end_http(AT_REST);
        reseed(&self.random, &activation.entropy)?;
        match self.identity.try_lock() {
            Ok(mut identity) => {
                identity.set(&activation.hostname, activation.machine_id, activation.boot_id)?;
                // What was restored was looked at before it was saved: one system call less until its first answer.
                if !std::mem::take(&mut self.looked) {
                    self.state.look_at_image();
                }
            }
            // A look at the files is stuck, see there: they are as odd as its file system.
            Err(_) => {
                eprintln!("agent: files of identity cannot be written: a file system does not answer");
                rustix::system::sethostname(activation.hostname.as_bytes())?;
            }
        }
        if activation.mac != [0; 6] && activation.mac != self.mac {
            self.hardware.set(activation.mac)?;
            self.mac = activation.mac;
        }
        self.state.become_sandbox(activation);
        self.renewed = self.tell;
        // Whatever follows finds programs that ran as who this machine is now.
        self.tell = true;
        Ok(())
    }

    /// Goes on as who this machine is.
    fn wake(&mut self, wake: &Wake) -> io::Result<()> {
        set_clock(wake.wall_clock_ns)?;
        thaw(&self.frozen, None);
        reseed(&self.random, &wake.entropy)?;
        if wake.restored {
            self.state.end_http(AT_REST);
            self.renewed = true;
        }
        Ok(())
    }

    /// Looks at the files of identity, for a while: root may have frozen what they are on, or put them on a file system
    /// whose server is dead. Then the look goes on, on its thread, until that answers, and the next has another thread,
    /// which finds them taken.
    fn check_identity(&mut self) {
        if self.frozen.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            return;
        }
        if self.look.is_none() {
            self.look = Look::start(Arc::clone(&self.identity), Arc::clone(&self.state));
        }
        self.looked = self.look.as_ref().is_some_and(Look::done);
        if !self.looked {
            self.look = None;
        }
    }

    /// Writes everything back and stops writes to the root file system.
    fn freeze(&self) -> io::Result<()> {
        let mut frozen = self.frozen.lock().unwrap_or_else(PoisonError::into_inner);
        if frozen.is_some() {
            return Ok(());
        }
        let since = Instant::now();
        let shared = Arc::clone(&self.frozen);
        // A host that dies must not leave a machine that can write nothing. It sleeps to its deadline and is not told of
        // an earlier thaw: a thread that ends just then is work for a machine that was restored a moment ago.
        std::thread::Builder::new().name("thaw".to_owned()).spawn(move || {
            std::thread::sleep(FROZEN);
            thaw(&shared, Some(since));
        })?;
        ioctl_root(FIFREEZE)?;
        *frozen = Some(since);
        Ok(())
    }
}

/// Makes the next pages of this thread's heap its own. A machine is saved next: the first page fault of one that was restored
/// is a tenth of what it executes until it answers.
fn touch_heap() {
    const PAGE: usize = 4096;
    // Held together: wherever the allocator finds room for the next small ones, it is in one of these.
    let blocks: [Vec<u8>; 8] = std::array::from_fn(|_| {
        let mut block = Vec::with_capacity(2 * PAGE);
        for page in block.spare_capacity_mut().chunks_mut(PAGE) {
            page[0].write(0);
        }
        block
    });
    std::hint::black_box(blocks);
}

/// A thread that looks at the files of identity, and at the image's defaults, when it is asked. It waits in the snapshot: to
/// start one costs a restored guest more than the look.
struct Look {
    ask: SyncSender<()>,
    answer: Receiver<()>,
}

impl Look {
    fn start(identity: Arc<Mutex<Identity>>, state: Arc<State>) -> Option<Self> {
        let (ask, asked) = std::sync::mpsc::sync_channel(1);
        let (done, answer) = std::sync::mpsc::sync_channel(1);
        let look = move || {
            while asked.recv().is_ok() {
                if let Ok(mut identity) = identity.try_lock() {
                    identity.check();
                }
                state.look_at_image();
                if done.send(()).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("identity".to_owned()).spawn(look).ok()?;
        Some(Self { ask, answer })
    }

    /// Has it look. Whether it was done in time.
    fn done(&self) -> bool {
        self.ask.try_send(()).is_ok() && self.answer.recv_timeout(CHECK).is_ok()
    }
}

/// How long a look at the files of identity may take: some milliseconds are usual.
const CHECK: Duration = Duration::from_secs(5);
/// How long the root file system stays frozen without a host that says more, by the guest's clock.
const FROZEN: Duration = Duration::from_secs(20);
/// How long the HTTP port may take to notice that its connection is another machine's.
const AT_REST: Duration = Duration::from_secs(5);
/// Source: Linux `linux/fs.h`.
const FIFREEZE: libc::Ioctl = 0xc004_5877_u32 as libc::Ioctl;
const FITHAW: libc::Ioctl = 0xc004_5878_u32 as libc::Ioctl;

#[allow(unsafe_code)]
fn ioctl_root(request: libc::Ioctl) -> io::Result<()> {
    let root = File::open("/")?;
    // SAFETY: neither request reads or writes its argument.
    match unsafe { libc::ioctl(root.as_raw_fd(), request, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets the root file system be written again, when it is frozen; with `since`, when it is frozen since then.
fn thaw(frozen: &Mutex<Option<Instant>>, since: Option<Instant>) {
    let mut frozen = frozen.lock().unwrap_or_else(PoisonError::into_inner);
    if frozen.is_none() || since.is_some() && *frozen != since {
        return;
    }
    if let Err(error) = ioctl_root(FITHAW) {
        eprintln!("agent: thawing: {error}");
    }
    *frozen = None;
}

fn set_clock(wall_clock_ns: u64) -> io::Result<()> {
    let seconds = i64::try_from(wall_clock_ns / 1_000_000_000).map_err(io::Error::other)?;
    let nanos = i64::try_from(wall_clock_ns % 1_000_000_000).map_err(io::Error::other)?;
    Ok(rustix::time::clock_settime(ClockId::Realtime, Timespec { tv_sec: seconds, tv_nsec: nanos })?)
}

/// The kernel's generator, whatever has become of its node in `/dev`.
fn open_random() -> io::Result<File> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
    // Source: Linux, Documentation/admin-guide/devices.txt.
    let urandom = rustix::fs::makedev(1, 9);
    let open = |path: &str| {
        let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let found = file.metadata()?;
        match found.file_type().is_char_device() && found.rdev() == urandom {
            true => Ok(file),
            false => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{path} is not the kernel's generator"),
            )),
        }
    };
    open("/dev/urandom").or_else(|_| {
        let own = format!("/dev/.kelvin-{}", VmId::random());
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &own, rustix::fs::FileType::CharacterDevice, mode, urandom)?;
        let opened = open(&own);
        let _ = std::fs::remove_file(&own);
        opened
    })
}

/// Mixes `entropy` into the kernel's pool, credits it, and makes the generator use it at once, so that
/// no two clones of one snapshot share a random byte from here on.
/// Source: random(4), `RNDADDENTROPY` and `RNDRESEEDCRNG`.
#[allow(unsafe_code)]
fn reseed(random: &File, entropy: &[u8; 64]) -> io::Result<()> {
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
    #[repr(C)]
    struct PoolInfo {
        entropy_count: libc::c_int,
        buf_size: libc::c_int,
        buf: [u8; 64],
    }
    let info = PoolInfo { entropy_count: 512, buf_size: 64, buf: *entropy };
    // SAFETY: `info` has the layout of `rand_pool_info` with its 64 bytes behind it and outlives the
    // call; the second request takes no argument.
    let done = unsafe {
        libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &info) == 0
            && libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}
