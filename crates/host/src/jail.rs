//! A jail for one VMM: its own file system, process ids, user and control group.
//!
//! ```text
//! daemon ── posix_spawn ──> kelvin jail ── new mount, pid, ipc, uts namespaces; fork ──> VMM (pid 1 inside)
//!    │  specification and        │                     its root is the machine's directory
//!    │  descriptors on stdin     │                     its descriptors are 3, 4, 5, …
//!    │<── pid or error ──────────┘ ends when the daemon has the VMM's pidfd (end of stdin)
//! ```
//!
//! Files enter as open descriptors, or by bind mounts that live in the jail's own mount namespace: nothing is copied,
//! the host's mount table never sees them, and the kernel removes them with the process. The device nodes lie on a file
//! system in memory there. The jail keeps no privilege: no capability, no new privileges, one user that has nothing
//! else. The network namespace is the caller's, see [`crate::process`].
//!
//! Only root can make a jail. A daemon that is not root starts its VMMs in the same way ([`Jail::user`] is `None`), in the
//! same directory and with the same names in it, but without walls: such a VMM has the daemon's own rights.
//!
//! A crash of the daemon in between leaves a launcher that sees the end of its stdin and ends, and a VMM that is
//! found by its environment ([`crate::process::MARKER`]). Absent on purpose: user namespaces (they widen what a kernel
//! bug can reach) and any choice of the launched program's system calls, which is the VMM's own seccomp filter.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, chown, symlink};
use std::path::{Component, Path, PathBuf};

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, mount_remount, unmount,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Resource, Rlimit, getrlimit, pivot_root, setrlimit};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde::{Deserialize, Serialize};

/// The longest specification that a launcher reads.
const MAX_SPEC: usize = 1 << 20;
/// The most descriptors that a jailed program is given.
pub const MAX_GIVEN: usize = 16;
/// The first of them in the program.
pub const FIRST_GIVEN: RawFd = 3;

/// What a jailed program may do with what it sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Read it.
    #[default]
    Read,
    /// Read it, and map it as code.
    Execute,
    /// Read and write it.
    Write,
}

/// A file or directory of the host that a jail sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// Absolute path on the host.
    pub from: PathBuf,
    /// Path in the jail, relative to its root. Made when it is missing.
    pub to: PathBuf,
    /// What may be done with it there.
    #[serde(default)]
    pub access: Access,
}

impl Bind {
    /// Shows `from`, read-only.
    pub fn read(from: impl Into<PathBuf>, to: impl Into<PathBuf>) -> Self {
        Self { from: from.into(), to: to.into(), access: Access::Read }
    }
}

/// What a jailed process is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jail {
    /// The directory that becomes its root; it belongs to root, so that nothing in it can be replaced.
    pub root: PathBuf,
    /// Whether nothing in its root can be written but what is bound so; otherwise what belongs to its user can.
    #[serde(default)]
    pub read_only: bool,
    /// The program: static, or with [`Jail::libraries`].
    pub program: PathBuf,
    /// Its arguments, after its name.
    pub args: Vec<String>,
    /// Its whole environment.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// User and group; `None` starts it without walls, as the user that this process is.
    pub user: Option<u32>,
    /// Other groups that it is in, for what they may read.
    #[serde(default)]
    pub groups: Vec<u32>,
    /// What else it sees.
    pub binds: Vec<Bind>,
    /// Whether it may open `/dev/net/tun`.
    pub tun: bool,
    /// Whether it may open `/dev/kvm`. Those that former versions started may.
    #[serde(default = "always")]
    pub kvm: bool,
    /// The control group that it is born in.
    pub cgroup: Option<PathBuf>,
    /// The longest file that it can write, in bytes.
    pub max_file_bytes: u64,
    /// Descriptors that it may have.
    pub max_descriptors: u64,
    /// Whether the program is not static: then it sees the host's libraries too.
    pub libraries: bool,
}

fn always() -> bool {
    true
}

/// What a launcher says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Launched {
    /// The program runs; its id in the launcher's own namespace.
    Pid(i32),
    /// It does not, and why.
    Failed(String),
}

/// Where the loader and the libraries of a program that is not static lie.
const LIBRARIES: [&str; 6] =
    ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64"];

/// Where the loader finds them quicker.
const LOADER_CACHE: &str = "/etc/ld.so.cache";

/// Whether `program` needs a loader: an ELF file with an interpreter. Source: elf(5), `PT_INTERP`.
///
/// # Errors
/// When it cannot be read or is no 64-bit ELF file.
pub fn is_dynamic(program: &Path) -> io::Result<bool> {
    const PT_INTERP: u32 = 3;
    let mut head = [0; 64];
    let mut file = File::open(program)?;
    file.read_exact(&mut head)?;
    let odd = || io::Error::new(io::ErrorKind::InvalidData, "it is no 64-bit ELF program");
    if !head.starts_with(b"\x7fELF\x02\x01") {
        return Err(odd());
    }
    let number = |at: usize, length: usize| {
        head[at..at + length].iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte))
    };
    let (offset, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    for index in 0..count {
        let mut kind = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut kind, offset + index * size)
            .map_err(|_| odd())?;
        if u32::from_le_bytes(kind) == PT_INTERP {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The whole of `kelvin jail`: reads a [`Jail`] from standard input, starts it, says so on standard output and waits
/// for the end of the input. Called first thing in a process with one thread.
///
/// # Errors
/// When standard input or output break; everything else is told to whoever asked.
pub fn run() -> io::Result<()> {
    let (spec, given) = receive()?;
    let launched = match serde_json::from_slice::<Jail>(&spec) {
        Ok(jail) => launch(&jail, given),
        Err(error) => Err(io::Error::other(error)),
    };
    let said = match launched {
        Ok(pid) => Launched::Pid(pid),
        Err(error) => Launched::Failed(error.to_string()),
    };
    let mut line = serde_json::to_vec(&said)?;
    line.push(b'\n');
    io::stdout().write_all(&line)?;
    io::stdout().flush()?;
    // Until the caller holds the program by a descriptor, this process keeps its pid from being used again.
    io::copy(&mut io::stdin().lock(), &mut io::sink()).map(drop)
}

/// The line on standard input, and the descriptors that came with it.
fn receive() -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let (stdin, mut spec, mut given) = (rustix::stdio::stdin(), Vec::new(), Vec::new());
    let mut buffer = [0; 4096];
    while spec.last() != Some(&b'\n') {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_GIVEN))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut buffer)];
        let count = match recvmsg(stdin, parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => received.bytes,
            Err(rustix::io::Errno::INTR) => continue,
            // A daemon of a former version, whose program was replaced under it: a pipe.
            Err(rustix::io::Errno::NOTSOCK) => rustix::io::read(stdin, &mut buffer)?,
            Err(error) => return Err(error.into()),
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                given.extend(rights);
            }
        }
        if count == 0 || spec.len() + count > MAX_SPEC {
            return Err(io::ErrorKind::InvalidData.into());
        }
        spec.extend_from_slice(&buffer[..count]);
    }
    Ok((spec, given))
}

/// Says in which step something failed.
fn step<T>(what: impl std::fmt::Display, result: Result<T, impl Into<io::Error>>) -> io::Result<T> {
    result.map_err(|error| {
        let error: io::Error = error.into();
        io::Error::new(error.kind(), format!("{what}: {error}"))
    })
}

#[allow(unsafe_code)]
fn launch(jail: &Jail, given: Vec<OwnedFd>) -> io::Result<i32> {
    // Whatever root's shell or unit masks: what is made here is what the program passes through.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    step("leading a session", rustix::process::setsid())?;
    if let Some(cgroup) = &jail.cgroup {
        step("entering the control group", std::fs::write(cgroup.join("cgroup.procs"), "0"))?;
    }
    if jail.user.is_some() {
        let flags = UnshareFlags::NEWNS | UnshareFlags::NEWPID | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
        // SAFETY: this process has one thread and shares nothing that these namespaces would take away from another.
        step("making namespaces", unsafe { unshare_unsafe(flags) })?;
    }
    let (failed, told) = step("making a pipe", io::pipe())?;
    // Out of the way of the program's descriptors.
    let told = step("making a pipe", out_of_the_way(told.into()))?;
    // SAFETY: one thread, so the child is a whole copy; it runs nothing but `enter`, which ends in `exec` or `_exit`.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(failed);
            let error = match enter(jail, given) {
                Ok(never) => match never {},
                Err(error) => error,
            };
            let _ = File::from(told).write_all(error.to_string().as_bytes());
            // SAFETY: ends this process and nothing else.
            unsafe { libc::_exit(127) }
        }
        child => {
            drop(told);
            let mut text = String::new();
            (&failed).take(4096).read_to_string(&mut text)?;
            if text.is_empty() {
                return Ok(child);
            }
            // Nobody else knows of it: left to the daemon it would stay a zombie.
            if let Some(child) = rustix::process::Pid::from_raw(child) {
                // Why it failed is told, whatever becomes of this.
                let _ = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty());
            }
            Err(io::Error::other(text))
        }
    }
}

/// The same descriptor at a number that no program is given.
fn out_of_the_way(fd: OwnedFd) -> io::Result<OwnedFd> {
    let most = i32::try_from(MAX_GIVEN).map_err(io::Error::other)?;
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, FIRST_GIVEN + most)?)
}

/// Turns this process into the jailed program.
#[allow(unsafe_code)]
fn enter(jail: &Jail, given: Vec<OwnedFd>) -> io::Result<std::convert::Infallible> {
    // Opened here: it is not in the jail. Everything else that is open closes at `exec`.
    let program = step(jail.program.display(), File::open(&jail.program))?;
    let last = OwnedFd::from(step("/dev/null", File::options().read(true).write(true).open("/dev/null"))?);
    step("standard input", rustix::stdio::dup2_stdin(&last))?;
    // The serial console and what the VMM has to say: one pipe, read with a limit.
    step("standard output", rustix::stdio::dup2_stdout(rustix::stdio::stderr()))?;
    // SAFETY: marks descriptors of this process; none of them is used by anyone after `exec`.
    if unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) } != 0 {
        return step("closing descriptors", Err(io::Error::last_os_error()));
    }
    if let Some(user) = jail.user {
        build(jail, user)?;
        step("changing the root", change_root(&jail.root))?;
    } else {
        for bind in &jail.binds {
            link(&jail.root, bind)?;
        }
        step(jail.root.display(), rustix::process::chdir(&jail.root))?;
    }
    limit(jail)?;
    if let Some(user) = jail.user {
        give_up(user, &jail.groups)?;
    }
    let program = step("placing descriptors", out_of_the_way(program.into()))?;
    step("placing descriptors", place(given))?;
    let name = CString::new(jail.program.file_name().unwrap_or(OsStr::new("vmm")).as_bytes())?;
    let args = jail.args.iter().map(|arg| CString::new(arg.as_bytes())).collect::<Result<Vec<_>, _>>()?;
    let env = jail.env.iter().map(|(name, value)| CString::new(format!("{name}={value}")));
    let env = env.collect::<Result<Vec<_>, _>>()?;
    let pointers = |words: &[CString]| -> Vec<*const libc::c_char> {
        words.iter().map(|word| word.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (mut arguments, environment) = (vec![name.as_ptr()], pointers(&env));
    arguments.extend(pointers(&args));
    // SAFETY: both arrays end in a null pointer and every string in them outlives the call, which does not return
    // when it succeeds.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    step("starting the program", Err(io::Error::last_os_error()))
}

/// Gives the program what it was given, in its order, from [`FIRST_GIVEN`] on.
#[allow(unsafe_code)]
fn place(given: Vec<OwnedFd>) -> io::Result<()> {
    let given = given.into_iter().map(out_of_the_way).collect::<io::Result<Vec<_>>>()?;
    for (number, fd) in (FIRST_GIVEN..).zip(&given) {
        // SAFETY: what has that number closes at `exec` anyway, and nobody uses it before. The new one stays open.
        if unsafe { libc::dup2(fd.as_raw_fd(), number) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// What a program without walls sees in the place of a bind.
fn link(root: &Path, bind: &Bind) -> io::Result<()> {
    let to = inside(root, &bind.to)?;
    if to == bind.from {
        return Ok(());
    }
    step(to.display(), symlink(&bind.from, &to))
}

/// A path that stays below the root.
fn inside(root: &Path, path: &Path) -> io::Result<PathBuf> {
    if path.components().all(|part| matches!(part, Component::Normal(_))) {
        Ok(root.join(path))
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} leads out of the jail", path.display())))
    }
}

/// Makes the place that something is bound to: a directory, or an empty file.
fn make_place(from: &Path, to: &Path) -> io::Result<()> {
    let directory = |path: &Path| std::fs::DirBuilder::new().recursive(true).mode(0o755).create(path);
    if step(from.display(), std::fs::metadata(from))?.is_dir() {
        return step(to.display(), directory(to));
    }
    if let Some(parent) = to.parent() {
        step(parent.display(), directory(parent))?;
    }
    match File::options().write(true).create_new(true).open(to) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => step(to.display(), Err(error)),
        _ => Ok(()),
    }
}

fn build(jail: &Jail, user: u32) -> io::Result<()> {
    let root = &jail.root;
    step(
        "keeping mounts apart",
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC),
    )?;
    step("binding the root", mount_bind(root, root))?;
    let safe = MountFlags::NOSUID | MountFlags::NODEV;
    let bind = |from: &Path, to: &Path, access: Access| {
        let to = inside(root, to)?;
        make_place(from, &to)?;
        step(from.display(), mount_bind(from, &to))?;
        let flags = match access {
            Access::Read => MountFlags::RDONLY | MountFlags::NOEXEC,
            Access::Execute => MountFlags::RDONLY,
            Access::Write => MountFlags::NOEXEC,
        };
        step(to.display(), mount_remount(&to, MountFlags::BIND | safe | flags, c""))
    };
    for Bind { from, to, access } in &jail.binds {
        bind(from, to, *access)?;
    }
    if jail.libraries {
        for path in LIBRARIES.into_iter().filter(|path| Path::new(path).is_dir()) {
            bind(Path::new(path), Path::new(path.trim_start_matches('/')), Access::Execute)?;
        }
        let cache = Path::new(LOADER_CACHE);
        if cache.exists() {
            bind(cache, Path::new(LOADER_CACHE.trim_start_matches('/')), Access::Read)?;
        }
    }
    let dev = root.join("dev");
    step(dev.display(), std::fs::DirBuilder::new().recursive(true).mode(0o755).create(&dev))?;
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    step(dev.display(), mount("tmpfs", &dev, "tmpfs", flags, Some(c"mode=755,size=64k,nr_inodes=16")))?;
    let mut nodes = vec![("null", 1, 3), ("urandom", 1, 9)];
    if jail.kvm {
        nodes.push(("kvm", 10, 232));
    }
    if jail.tun {
        step("/dev/net", std::fs::create_dir(dev.join("net")))?;
        nodes.push(("net/tun", 10, 200));
    }
    for (name, major, minor) in nodes {
        let path = dev.join(name);
        let device = rustix::fs::makedev(major, minor);
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        let kind = rustix::fs::FileType::CharacterDevice;
        step(path.display(), rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, device))?;
        step(path.display(), chown(&path, Some(user), Some(user)))?;
    }
    step(dev.display(), mount_remount(&dev, MountFlags::RDONLY | flags, c""))?;
    // Last: the places of what is bound are made in it.
    let access = if jail.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    let flags = MountFlags::BIND | safe | MountFlags::NOEXEC | access;
    step("sealing the root", mount_remount(root, flags, c""))
}

/// Source: pivot_root(2), "pivot_root(".", ".")".
fn change_root(root: &Path) -> io::Result<()> {
    rustix::process::chdir(root)?;
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    Ok(())
}

fn limit(jail: &Jail) -> io::Result<()> {
    for (resource, most) in [
        (Resource::Core, 0),
        (Resource::Fsize, jail.max_file_bytes),
        (Resource::Nofile, jail.max_descriptors),
    ] {
        // A server that may have less cannot give more: raising a limit is a right of its own.
        let most = getrlimit(resource).maximum.map_or(most, |own| own.min(most));
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        step(format!("limiting {resource:?}"), setrlimit(resource, limit))?;
    }
    Ok(())
}

/// Gives up everything that root has.
#[allow(unsafe_code)]
fn give_up(user: u32, groups: &[u32]) -> io::Result<()> {
    let done = |result: libc::c_int| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: plain system calls on this process's own credentials. The first number that is refused is the first
    // that this kernel does not know.
    let dropped =
        (0..64).take_while(|number| unsafe { libc::prctl(libc::PR_CAPBSET_DROP, *number, 0, 0, 0) } == 0);
    if dropped.count() == 0 {
        return step("capabilities", Err(io::Error::last_os_error()));
    }
    // SAFETY: as above; one thread, so the whole process changes.
    unsafe {
        step("groups", done(libc::setgroups(groups.len(), groups.as_ptr())))?;
        step("group", done(libc::setresgid(user, user, user)))?;
        step("user", done(libc::setresuid(user, user, user)))?;
        step("privileges", done(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)))
    }
}
