//! The control port: activation and quiesce, on a thread of its own with blocking reads.
//!
//! Everything here runs in a machine that was restored a moment ago and is still being translated:
//! few system calls, files that were opened before the snapshot, no allocation that can be avoided.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kelvin_api::guest::{self, Activation, Reply, Request, Wake};
use rustix::time::{ClockId, Timespec};

use crate::network::Hardware;
use crate::state::State;
use crate::{hooks, port, services, vsock};

/// Files that hold the machine's identity; `/etc` has links to them, so that activation writes memory
/// and not the disk.
const RUN: &str = "/run/kelvin";
/// `/etc/hosts` up to the machine's own name.
const HOSTS: &[u8] = b"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 ";

/// A file in memory, mapped before the snapshot: to write it is to copy bytes, with no system call and no
/// kernel code that an emulator would have to translate first (6 to 13 ms for one `write`, measured).
struct IdentityFile {
    file: File,
    bytes: *mut u8,
    length: usize,
}

// SAFETY: the mapping belongs to this struct alone and lives as long as the process.
#[allow(unsafe_code)]
unsafe impl Send for IdentityFile {}

/// Room for each identity file, in bytes: one page.
const ROOM: usize = 4096;

impl IdentityFile {
    /// Makes the file with `length` bytes of space in it: what a usual content has. `keep` leaves what a former
    /// agent wrote.
    #[allow(unsafe_code)]
    fn create(name: &str, length: usize, keep: bool) -> io::Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let path = format!("{RUN}/{name}");
        let file = File::options().create(true).truncate(!keep).read(true).write(true).open(path)?;
        let length = match file.metadata()?.len() {
            kept @ 1.. if keep => usize::try_from(kept).map_err(io::Error::other)?.min(ROOM),
            _ => length,
        };
        file.set_len(length as u64)?;
        // SAFETY: a new mapping at an address of the kernel's choice; the file has a page behind it as long
        // as its length is not zero, which `set` keeps.
        let bytes = unsafe {
            mmap(std::ptr::null_mut(), ROOM, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)?
        };
        let mut made = Self { file, bytes: bytes.cast(), length };
        // Touched now: the page is there, writable, before the snapshot.
        if !keep {
            made.set(&vec![b'\n'; length])?;
        }
        Ok(made)
    }

    /// Replaces the content. Only a length that differs from the last one costs a system call.
    #[allow(unsafe_code)]
    fn set(&mut self, content: &[u8]) -> io::Result<()> {
        if content.is_empty() || content.len() > ROOM {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "an identity file has 1 to 4096 bytes"));
        }
        if content.len() != self.length {
            self.file.set_len(content.len() as u64)?;
            self.length = content.len();
        }
        // SAFETY: the mapping has `ROOM` bytes, which `content` fits into, and its page exists because the
        // file is not empty; nobody else in this process reads or writes it.
        unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), self.bytes, content.len()) };
        Ok(())
    }
}

/// Whether an agent of this machine was activated before this one: the identity is there.
fn was_activated() -> bool {
    std::fs::read(format!("{RUN}/machine-id")).is_ok_and(|id| id.iter().any(|byte| *byte != b'\n'))
}

fn hex(bytes: [u8; 16]) -> [u8; 33] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = [b'\n'; 33];
    for (pair, byte) in text.chunks_exact_mut(2).zip(bytes) {
        pair.copy_from_slice(&[DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
    }
    text
}

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
    hostname: IdentityFile,
    machine_id: IdentityFile,
    boot_id: IdentityFile,
    hosts: IdentityFile,
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
        std::fs::create_dir_all(RUN)?;
        let random = File::options().read(true).write(true).open("/dev/urandom")?;
        let again = was_activated();
        if again {
            // A former agent of this machine has crashed, and the sandbox's token with it. Nobody is let in
            // until the node activates again: a token that nobody knows, not none.
            let mut secret = [0; 16];
            (&random).read_exact(&mut secret)?;
            state.settings().access_token = String::from_utf8_lossy(&hex(secret)).trim_end().to_owned();
        }
        let boot_id = IdentityFile::create("boot-id", 37, again)?;
        if !again {
            // The kernel's own is made once for each boot, and a snapshot has one boot.
            rustix::mount::mount_bind(format!("{RUN}/boot-id"), BOOT_ID)?;
        }
        Ok(Self {
            state,
            channel,
            random,
            boot_id,
            hardware: Hardware::open()?,
            mac: [0; 6],
            frozen: Arc::default(),
            tell: again || hooks::exist(),
            hostname: IdentityFile::create("hostname", 21, again)?,
            machine_id: IdentityFile::create("machine-id", 33, again)?,
            hosts: IdentityFile::create("hosts", HOSTS.len() + 21, again)?,
            problems: std::env::var(crate::init::PROBLEMS).unwrap_or_default(),
            another: again,
            ready: again,
            renewed: false,
        })
    }

    /// Whether another agent of this machine was activated before this one.
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
                Ok((id, request)) => (id, self.answer(request, started)),
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
                rustix::fs::sync();
                Ok(())
            }
            Request::Freeze => self.freeze(),
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
        rustix::system::sethostname(activation.hostname.as_bytes())?;
        let line = [activation.hostname.as_bytes(), b"\n"].concat();
        self.hostname.set(&line)?;
        self.machine_id.set(&hex(activation.machine_id))?;
        self.boot_id.set(&uuid(activation.boot_id))?;
        if activation.mac != [0; 6] && activation.mac != self.mac {
            self.hardware.set(activation.mac)?;
            self.mac = activation.mac;
        }
        self.hosts.set(&[HOSTS, &line].concat())?;
        let mut settings = self.state.settings();
        settings.sandbox_id = activation.sandbox_id;
        settings.template = activation.template;
        settings.env_vars = activation.env_vars;
        settings.access_token = activation.access_token;
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

/// How long the root file system stays frozen without a host that says more, by the guest's clock.
const FROZEN: Duration = Duration::from_secs(20);
/// How long the HTTP port may take to notice that its connection is another machine's.
const AT_REST: Duration = Duration::from_secs(5);
/// Where the kernel shows its boot-id.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
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

/// A random UUID as the kernel writes one, with the end of its line. Source: RFC 9562, 5.4.
fn uuid(mut bytes: [u8; 16]) -> [u8; 37] {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let digits = hex(bytes);
    let mut text = [b'-'; 37];
    for (to, from) in [(0..8, 0..8), (9..13, 8..12), (14..18, 12..16), (19..23, 16..20), (24..36, 20..32)] {
        text[to].copy_from_slice(&digits[from]);
    }
    text[36] = b'\n';
    text
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_id_is_a_random_uuid() {
        let bytes = std::array::from_fn(|index| index as u8 * 17);
        assert_eq!(&uuid(bytes), b"00112233-4455-4677-8899-aabbccddeeff\n");
    }

    #[test]
    fn a_machine_id_is_a_line_of_hexadecimal() {
        let mut bytes = [0; 16];
        (bytes[0], bytes[15]) = (0xab, 0x01);
        assert_eq!(&hex(bytes), b"ab000000000000000000000000000001\n");
    }
}
