//! Steps of a bare restore that are the same whichever VMM does it: network, disk, sockets, activation.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kelvin_api::guest::{Activation, Reply, Request, frame_length};
use kelvin_host::net::{link, ns};

/// How long a VMM or a guest may take to answer.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Between two looks, as in the prototype.
pub const GAP: Duration = Duration::from_micros(200);

/// Why there is no figure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or socket failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// QEMU or the agent said no.
    #[error("{0}")]
    Refused(String),
}

/// Says what was being done.
pub fn at(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { what, source }
}

/// The network of the machines of the baseline.
#[derive(Debug)]
pub struct Network {
    /// Lives as long as this.
    pub namespace: OwnedFd,
    /// What a VMM is lent, when it does not open it by its name: that has to be free.
    pub tap: Option<OwnedFd>,
}

impl Network {
    /// A namespace with a tap. `by_name`: whether a VMM opens it itself.
    pub fn make(by_name: bool) -> io::Result<Self> {
        let made = std::thread::spawn(move || {
            ns::unshare()?;
            let tap = link::tap()?;
            if by_name {
                link::keep_tap(&tap, 0)?;
            }
            Ok(Self { namespace: ns::current()?, tap: (!by_name).then_some(tap) })
        });
        made.join().unwrap_or_else(|_| Err(io::Error::other("a thread in a namespace panicked")))
    }
}

/// Clones the disk of `snapshot` into `directory`.
pub fn clone_disk(snapshot: &Path, directory: &Path) -> Result<(), Error> {
    let (from, to) = (snapshot.join("disk"), directory.join("disk"));
    let source = std::fs::File::open(&from).map_err(at("opening the disk"))?;
    let disk = std::fs::File::create(&to).map_err(at("making the disk"))?;
    if rustix::fs::ioctl_ficlone(&disk, &source).is_err() {
        std::fs::copy(from, to).map_err(at("copying the disk"))?;
    }
    Ok(())
}

/// Connects to a socket that a VMM is about to open.
pub fn connect(path: &Path) -> Result<UnixStream, Error> {
    let started = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(LIMIT)).map_err(at("setting a time limit"))?;
                return Ok(stream);
            }
            Err(error) if started.elapsed() > LIMIT => return Err(at("connecting to the VMM")(error)),
            Err(_) => std::thread::sleep(GAP),
        }
    }
}

/// Activates a guest.
pub fn activate(control: &mut UnixStream) -> Result<(), Error> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let request = Request::Activate(Activation {
        sandbox_id: "bareaaaaaaaaaaaaaaaa".to_owned(),
        template: "base".to_owned(),
        hostname: "bareaaaaaaaaaaaaaaaa".to_owned(),
        machine_id: [1; 16],
        boot_id: [3; 16],
        mac: [0; 6],
        entropy: [2; 64],
        wall_clock_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        access_token: "bareaaaaaaaaaaaaaaaaaaaaaaaaaaaa".to_owned(),
        env_vars: std::collections::BTreeMap::new(),
    });
    let refused = |error: kelvin_api::guest::Error| Error::Refused(error.to_string());
    control.write_all(&request.encode(1).map_err(refused)?).map_err(at("writing to the agent"))?;
    let mut length = [0; 4];
    control.read_exact(&mut length).map_err(at("reading from the agent"))?;
    let mut frame = vec![0; frame_length(length).map_err(refused)?];
    control.read_exact(&mut frame).map_err(at("reading from the agent"))?;
    match Reply::decode(&frame).map_err(refused)? {
        (1, Reply::Done { .. }) => Ok(()),
        (id, reply) => Err(Error::Refused(format!("the agent replied {reply:?} to {id}"))),
    }
}
