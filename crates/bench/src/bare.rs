//! The bare sequence: what a restore costs with nothing but the VMM in the way.
//!
//! A VMM is spawned on the spot with the arguments of the bake, the disk is cloned, device state loaded,
//! vCPUs started, the agent activated: the shortest sequence there is, with this
//! platform's machine; Firecracker's is in `firecracker.rs`. It is the floor that creates
//! are measured against, so it takes every shortcut that a program may take: blocking calls, no ledger, no checks, no
//! user of its own.

use std::io::{self, BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

pub use crate::restore::Error;
use crate::restore::{GAP, Network, activate, at, clone_disk, connect};

/// A snapshot to restore.
#[derive(Debug)]
pub struct Bare {
    data_dir: PathBuf,
    snapshot: PathBuf,
    arguments: Vec<String>,
    is_firecracker: bool,
    /// Made ahead, as everybody would, and kept: to take one down keeps the kernel busy while the next create is
    /// measured. `None` for machines without a network.
    network: Option<Network>,
}

impl Bare {
    /// Reads the manifest of `snapshot` below `data_dir`.
    ///
    /// # Errors
    /// When it cannot be read: the bench has to run where the server runs.
    pub fn open(data_dir: &Path, snapshot: &str) -> Result<Self, Error> {
        let directory = Path::new("snapshots").join(snapshot);
        let text = std::fs::read(data_dir.join(&directory).join("manifest.json"))
            .map_err(at("reading the manifest"))?;
        let manifest: Value =
            serde_json::from_slice(&text).map_err(|error| Error::Refused(error.to_string()))?;
        let guest = format!("guests/{}", manifest["guest"].as_str().unwrap_or_default());
        let memory = directory.join("memory");
        let arguments: Vec<String> = manifest["arguments"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .map(|argument| {
                argument.replace("{guest}", &guest).replace("{memory}", &memory.to_string_lossy())
            })
            .collect();
        let is_firecracker = manifest["identity"]["vmm"] == "firecracker";
        let has_network = arguments
            .iter()
            .any(|argument| argument.contains("fd=0") || argument.contains("/network-interfaces/"));
        let network = match has_network {
            true => Some(Network::make(is_firecracker).map_err(at("making a network"))?),
            false => None,
        };
        Ok(Self {
            data_dir: data_dir.to_owned(),
            snapshot: data_dir.join(directory),
            arguments,
            is_firecracker,
            network,
        })
    }

    /// One restore, from nothing to the agent's reply; milliseconds. Nothing is left of it.
    ///
    /// # Errors
    /// The step that failed.
    pub fn restore(&self) -> Result<f64, Error> {
        if self.is_firecracker {
            return crate::firecracker::restore(&self.data_dir, &self.snapshot, self.network.as_ref());
        }
        self.with_machine(|ms, _, _, _| Ok(ms))
    }

    /// Waits until the file system has nothing left to do for the last restore: it frees files beside what follows.
    ///
    /// # Errors
    /// As the kernel gives them.
    pub fn forget(&self) -> Result<(), Error> {
        let forgotten =
            std::fs::File::open(&self.data_dir).and_then(|directory| Ok(rustix::fs::syncfs(&directory)?));
        forgotten.map_err(at("forgetting a bare machine"))
    }

    /// One restore, and a bare fork: stop, save device state, clone the memory
    /// file, copy the pages that the machine has written over it, continue. Milliseconds from the stop to the end, and
    /// how many pages those were. Nothing is left of it.
    ///
    /// # Errors
    /// The step that failed.
    pub fn fork(&self) -> Result<(f64, u64), Error> {
        if self.is_firecracker {
            return Err(Error::Refused("the prototype of a fork is QEMU's: leave --baseline out".to_owned()));
        }
        let memory = self.snapshot.join("memory");
        self.with_machine(|_, pid, directory, qmp| fork(pid, qmp, &memory, directory))
    }

    fn with_machine<T>(
        &self,
        work: impl FnOnce(f64, u32, &Path, &mut Qmp) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let name = format!("staging/bare-{}", std::process::id());
        let directory = self.data_dir.join(&name);
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir(&directory).map_err(at("making a directory"))?;
        let stdin = match self.network.as_ref().and_then(|network| network.tap.as_ref()) {
            Some(tap) => tap.try_clone().map_err(at("lending the tap"))?.into(),
            None => Stdio::null(),
        };
        let mut child = None;
        let result =
            self.sequence(&name, &directory, stdin, &mut child).and_then(|(ms, mut qmp, _control)| {
                let pid = child.as_ref().map_or(0, Child::id);
                work(ms, pid, &directory, &mut qmp)
            });
        if let Some(mut child) = child {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_dir_all(&directory);
        result
    }

    fn sequence(
        &self,
        name: &str,
        directory: &Path,
        stdin: Stdio,
        child: &mut Option<Child>,
    ) -> Result<(f64, Qmp, UnixStream), Error> {
        let started = Instant::now();
        clone_disk(&self.snapshot, directory)?;
        let spawned = Command::new("qemu-system-x86_64")
            .args(self.arguments.iter().map(|argument| argument.replace("{vm}", name)))
            .args(["-S", "-incoming", "defer"])
            .current_dir(&self.data_dir)
            .stdin(stdin)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(at("starting QEMU"))?;
        *child = Some(spawned);
        let mut qmp = Qmp::open(connect(&directory.join("qmp.sock"))?)?;
        let mut control = connect(&directory.join("control.sock"))?;
        qmp.load(&self.snapshot.join("state"))?;
        qmp.call("cont", &json!({}), None)?;
        activate(&mut control)?;
        Ok((started.elapsed().as_secs_f64() * 1e3, qmp, control))
    }
}

/// Source: Linux, Documentation/admin-guide/mm/pagemap.
const PAGE: u64 = 4096;

fn fork(pid: u32, qmp: &mut Qmp, memory: &Path, directory: &Path) -> Result<(f64, u64), Error> {
    let (new_memory, new_state) = (directory.join("memory.fork"), directory.join("state.fork"));
    let started = Instant::now();
    qmp.call("stop", &json!({}), None)?;
    qmp.call("xen-save-devices-state", &json!({ "filename": new_state, "live": true }), None)?;
    let copied = copy(pid, memory, &new_memory).map_err(at("copying the memory"))?;
    qmp.call("cont", &json!({}), None)?;
    Ok((started.elapsed().as_secs_f64() * 1e3, copied))
}

/// The memory of `pid`, a private mapping of `from`, as a clone of `from` with the written pages laid over it.
fn copy(pid: u32, from: &Path, to: &Path) -> io::Result<u64> {
    use std::os::unix::fs::FileExt;
    let source = std::fs::File::open(from)?;
    let target = std::fs::File::create(to)?;
    if rustix::fs::ioctl_ficlone(&target, &source).is_err() {
        std::fs::copy(from, to)?;
    }
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let line = maps.lines().find(|line| line.ends_with(&*from.to_string_lossy()));
    let range = line.and_then(|line| line.split_whitespace().next()?.split_once('-'));
    let bounds = range.and_then(|(low, high)| {
        Some((u64::from_str_radix(low, 16).ok()?, u64::from_str_radix(high, 16).ok()?))
    });
    let (low, high) = bounds.ok_or_else(|| io::Error::other("the machine does not map its memory"))?;
    let pages = (high - low) / PAGE;
    let mut entries = vec![0; usize::try_from(pages * 8).map_err(io::Error::other)?];
    std::fs::File::open(format!("/proc/{pid}/pagemap"))?.read_exact_at(&mut entries, low / PAGE * 8)?;
    let memory = std::fs::File::open(format!("/proc/{pid}/mem"))?;
    let own = |entry: &[u8]| {
        let entry = u64::from_ne_bytes(entry.try_into().unwrap_or_default());
        entry >> 62 & 1 == 1 || (entry >> 63 & 1 == 1 && entry >> 61 & 1 == 0)
    };
    let (mut first, mut copied, mut buffer) = (None, 0, Vec::new());
    for (page, entry) in (0_u64..).zip(entries.chunks_exact(8).map(own).chain([false])) {
        match (entry, first) {
            (true, None) => first = Some(page),
            (false, Some(start)) => {
                buffer.resize(usize::try_from((page - start) * PAGE).map_err(io::Error::other)?, 0);
                memory.read_exact_at(&mut buffer, low + start * PAGE)?;
                target.write_all_at(&buffer, start * PAGE)?;
                copied += page - start;
                first = None;
            }
            _ => {}
        }
    }
    Ok(copied)
}

struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn open(stream: UnixStream) -> Result<Self, Error> {
        let mut qmp = Self(BufReader::new(stream));
        qmp.line()?;
        qmp.call("qmp_capabilities", &json!({}), None)?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value, Error> {
        let mut line = String::new();
        self.0.read_line(&mut line).map_err(at("reading from QEMU"))?;
        serde_json::from_str(&line).map_err(|error| Error::Refused(format!("QEMU said {line:?}: {error}")))
    }

    fn call(&mut self, command: &str, arguments: &Value, fd: Option<&std::fs::File>) -> Result<Value, Error> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        let stream = self.0.get_mut();
        match fd {
            Some(fd) => {
                let fds = [fd.as_fd()];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                control.push(SendAncillaryMessage::ScmRights(&fds));
                sendmsg(&*stream, &[IoSlice::new(line.as_bytes())], &mut control, SendFlags::empty())
                    .map_err(|error| at("writing to QEMU")(error.into()))?;
            }
            None => stream.write_all(line.as_bytes()).map_err(at("writing to QEMU"))?,
        }
        loop {
            let mut reply = self.line()?;
            if reply.get("return").is_some() {
                return Ok(reply["return"].take());
            }
            if let Some(error) = reply.get("error") {
                return Err(Error::Refused(format!("{command}: {error}")));
            }
        }
    }

    fn load(&mut self, state: &Path) -> Result<(), Error> {
        let file = std::fs::File::open(state).map_err(at("opening the device state"))?;
        self.call("getfd", &json!({ "fdname": "state" }), Some(&file))?;
        self.call("migrate-incoming", &json!({ "uri": "fd:state" }), None)?;
        loop {
            match self.call("query-migrate", &json!({}), None)?["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed") => return Err(Error::Refused("QEMU failed to load the state".to_owned())),
                _ => std::thread::sleep(GAP),
            }
        }
    }
}
