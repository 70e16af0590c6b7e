//! The one way to start anything in the guest: commands, services, hooks.
//!
//! ```text
//! agent ── clone3 into a control group ──> child: session, terminal, streams, limits, user, directory ── exec
//!   ^                                        │
//!   └──────────── a pipe that exec closes ───┘   or: the step that failed and its errno
//! ```
//!
//! What the agent has of its own does not reach a child: neither its OOM score (-1000, nothing would be left to be
//! killed when memory is out), nor its limit of descriptors, its descriptors, its signal mask or its ignored signals.
//! The kernel owns what is started; a crash of the agent leaves it to init.

use std::collections::BTreeMap;
use std::ffi::{CString, NulError, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{WaitId, WaitIdOptions, WaitIdStatus, waitid};
use tokio::io::unix::AsyncFd;

use crate::groups::Place;
use crate::port::watched;
use crate::shell;
use crate::users::User;

/// Where programs are looked for. Source: the `base` template of E2B.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Descriptors that a process may have unless it asks for more, as a login of the distribution has it.
const USUAL_DESCRIPTORS: libc::rlim_t = 1024;
/// How long the way to `exec` may take: a working directory may be on a file system whose server is dead.
const START: Duration = Duration::from_secs(10);
/// How much of that is waited for at once: it takes 1 to 3 ms, and a task that is woken up costs more.
const AT_ONCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// A program to start.
pub struct Program<'a> {
    /// Its name, looked for in the `PATH` of `env`; or its path.
    pub name: &'a OsStr,
    /// Its arguments, without the name.
    pub args: &'a [String],
    /// The whole environment.
    pub env: BTreeMap<String, String>,
    /// Its working directory, entered as `user`.
    pub cwd: &'a Path,
    /// Who runs it.
    pub user: &'a User,
    /// Standard input, output and error. With `terminal`, the first becomes the controlling terminal.
    pub streams: [BorrowedFd<'a>; 3],
    /// Whether the streams are a terminal's.
    pub terminal: bool,
    /// Which reserve it counts against.
    pub place: &'a Place,
    /// How soon the kernel ends it when memory is out: the higher, the sooner.
    pub oom_score: i16,
}

/// Why a program was not started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A NUL byte in a name, an argument or the environment.
    #[error("the {0} has a NUL byte")]
    Nul(&'static str),
    /// The working directory cannot be entered.
    #[error("entering the working directory")]
    Cwd(#[source] io::Error),
    /// The program cannot be executed.
    #[error("executing the program")]
    Exec(#[source] io::Error),
    /// There is no room for one more process.
    #[error("starting a process")]
    Fork(#[source] io::Error),
    /// Something else on the way.
    #[error("{0}")]
    Step(&'static str, #[source] io::Error),
    /// It is stuck before it runs.
    #[error(
        "it did not run after {START:?}: its working directory or its program is on a file system that does not answer"
    )]
    Stuck,
}

/// Source: Linux, `include/uapi/linux/sched.h`; libc's constant has the wrong width.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// The steps of a child, as it tells the one that failed.
const STEPS: [&str; 7] = [
    "making a session",
    "taking the terminal",
    "setting the streams",
    "setting limits",
    "becoming the user",
    "entering the working directory",
    "executing the program",
];
const CWD: u8 = 5;
const EXEC: u8 = 6;

/// A child that runs.
#[derive(Debug)]
pub struct Child {
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
}

impl Child {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits until it has ended, and reaps it.
    ///
    /// # Errors
    /// When the kernel does not say how it ended.
    pub async fn wait(&self) -> io::Result<WaitIdStatus> {
        loop {
            let mut ready = self.pidfd.readable().await?;
            let status = waitid(
                WaitId::PidFd(self.pidfd.get_ref().as_fd()),
                WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
            );
            match status {
                Ok(Some(status)) => return Ok(status),
                Ok(None) => ready.clear_ready(),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Ends it for good.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(self.pidfd.get_ref(), rustix::process::Signal::KILL);
    }
}

/// Everything that the child needs, made before there is a child: between clone and exec nothing is allocated.
struct Plan {
    candidates: Vec<CString>,
    argv: Vec<CString>,
    env: Vec<CString>,
    cwd: CString,
    uid: libc::uid_t,
    gid: libc::gid_t,
    groups: Vec<libc::gid_t>,
    streams: [RawFd; 3],
    terminal: bool,
    oom_score: CString,
    descriptors: libc::rlimit,
}

/// What a process may ask for: as much as the agent.
fn most_descriptors() -> libc::rlim_t {
    let own = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    own.maximum.unwrap_or(libc::RLIM_INFINITY)
}

fn text(what: &'static str, bytes: impl Into<Vec<u8>>) -> Result<CString, Error> {
    CString::new(bytes).map_err(|_: NulError| Error::Nul(what))
}

/// Where `name` may be: itself when it is a path, else in each directory of `path`. Source: execvp(3).
fn candidates(name: &OsStr, path: &str) -> Vec<PathBuf> {
    if name.as_bytes().contains(&b'/') {
        return vec![PathBuf::from(name)];
    }
    path.split(':')
        .map(|directory| Path::new(if directory.is_empty() { "." } else { directory }).join(name))
        .collect()
}

impl Plan {
    fn of(program: &Program<'_>, name: &OsStr, args: &[String]) -> Result<Self, Error> {
        let path = program.env.get("PATH").map_or(PATH, String::as_str);
        let candidates = candidates(name, path)
            .into_iter()
            .map(|path| text("name of the command", path.into_os_string().as_bytes()))
            .collect::<Result<Vec<_>, _>>()?;
        let mut argv = vec![text("name of the command", name.as_bytes())?];
        for argument in args {
            argv.push(text("command", argument.as_bytes())?);
        }
        let mut env = Vec::with_capacity(program.env.len());
        for (name, value) in &program.env {
            env.push(text("environment", format!("{name}={value}"))?);
        }
        Ok(Self {
            candidates,
            argv,
            env,
            cwd: text("working directory", program.cwd.as_os_str().as_bytes())?,
            uid: program.user.uid,
            gid: program.user.gid,
            groups: program.user.groups.clone(),
            streams: program.streams.map(|fd| fd.as_raw_fd()),
            terminal: program.terminal,
            oom_score: text("score", program.oom_score.to_string())?,
            descriptors: libc::rlimit { rlim_cur: USUAL_DESCRIPTORS, rlim_max: most_descriptors() },
        })
    }
}

fn pointers(texts: &[CString]) -> Vec<*const libc::c_char> {
    texts.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect()
}

/// Starts `program`; when it returns, that program runs. In the place of a shell that the image has not, another.
///
/// Runs on a task of its own: a caller that goes away in the middle would leave a child that nobody reaps.
///
/// # Errors
/// What stood in the way; then no process is left.
pub async fn start(program: &Program<'_>) -> Result<Child, Error> {
    let missing = match start_as(program, program.name, program.args).await {
        Err(Error::Exec(error)) if error.kind() == io::ErrorKind::NotFound => error,
        started => return started,
    };
    for shell in shell::instead_of(program.name) {
        match start_as(program, OsStr::new(shell), &shell::understood(program.args)).await {
            Err(Error::Exec(error)) if error.kind() == io::ErrorKind::NotFound => {}
            started => return started,
        }
    }
    Err(Error::Exec(missing))
}

/// Starts what is called `name`, with `args`, and everything else as `program` has it.
async fn start_as(program: &Program<'_>, name: &OsStr, args: &[String]) -> Result<Child, Error> {
    let plan = Plan::of(program, name, args)?;
    let step = |what| move |error: io::Error| Error::Step(what, error);
    let (mut failure, failure_child) = pipe().map_err(step("making a pipe"))?;
    let child = clone(&plan, &failure_child, program.place)?;
    drop(failure_child);
    // Almost always there at once; what is not must not hold up everybody.
    let mut fds = [PollFd::new(&failure, PollFlags::IN)];
    let soon = poll(&mut fds, Some(&AT_ONCE)).is_ok_and(|count| count > 0);
    if !soon {
        let ready = watched(failure.try_clone().map_err(step("waiting for a child"))?)
            .map_err(step("waiting for a child"))?;
        if tokio::time::timeout(START, ready.readable()).await.is_err() {
            child.kill();
            // It may be stuck for good: nothing waits for it but init.
            tokio::spawn(async move { child.wait().await });
            return Err(Error::Stuck);
        }
    }
    let mut told = [0; 5];
    match failure.read_exact(&mut told) {
        // Closed by exec.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(child),
        Err(error) => return Err(Error::Step("waiting for a child", error)),
        Ok(()) => {}
    }
    let _ = child.wait().await;
    let [what, number @ ..] = told;
    let error = io::Error::from_raw_os_error(i32::from_ne_bytes(number));
    Err(match what {
        CWD => Error::Cwd(error),
        // The user has as many processes as it may have.
        EXEC if error.raw_os_error() == Some(libc::EAGAIN) => Error::Fork(error),
        EXEC => Error::Exec(error),
        other => Error::Step(STEPS.get(usize::from(other)).copied().unwrap_or("starting"), error),
    })
}

fn pipe() -> io::Result<(File, OwnedFd)> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    Ok((reader.into(), writer))
}

/// Makes the child: in the control group of `place` where there is one.
#[allow(unsafe_code)]
fn clone(plan: &Plan, failure: &OwnedFd, place: &Place) -> Result<Child, Error> {
    let (argv, env) = (pointers(&plan.argv), pointers(&plan.env));
    // For a script without an interpreter line. Source: execvp(3), ENOEXEC.
    let mut script: Vec<*const libc::c_char> = vec![c"/bin/sh".as_ptr(), std::ptr::null()];
    script.extend(argv.iter().skip(1));
    let mut group = place.descriptor();
    loop {
        let mut pidfd: RawFd = -1;
        // SAFETY: all zeros are valid for the struct.
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        args.flags = libc::CLONE_PIDFD as u64;
        args.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
        args.exit_signal = libc::SIGCHLD as u64;
        if let Some(group) = &group {
            args.flags |= CLONE_INTO_CGROUP;
            args.cgroup = group.as_raw_fd() as u64;
        }
        // SAFETY: as fork: without CLONE_VM the child has its own copy of all memory, in which only async-signal-safe
        // calls are made until exec or _exit.
        let pid = unsafe {
            libc::syscall(libc::SYS_clone3, std::ptr::from_mut(&mut args), size_of::<libc::clone_args>())
        };
        if pid == 0 {
            // SAFETY: this is the child; everything it uses was made before.
            unsafe { become_program(plan, &argv, &env, &mut script, failure.as_raw_fd()) }
        }
        if pid < 0 {
            let error = io::Error::last_os_error();
            // Somebody has removed the group, or made it one that takes no processes.
            let groupless =
                [libc::ENOENT, libc::ENODEV, libc::EBUSY, libc::EOPNOTSUPP, libc::EINVAL, libc::EBADF];
            if group.is_some() && error.raw_os_error().is_some_and(|number| groupless.contains(&number)) {
                group = None;
                continue;
            }
            return Err(Error::Fork(error));
        }
        // SAFETY: the kernel has just made this descriptor for us.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        let again = pidfd.try_clone();
        return match watched(pidfd) {
            Ok(pidfd) => Ok(Child { pid: u32::try_from(pid).unwrap_or(0), pidfd }),
            Err(error) => {
                // Nobody would know of it.
                if let Ok(pidfd) = again {
                    let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
                    let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
                }
                Err(Error::Step("watching a child", error))
            }
        };
    }
}

/// What the child does. Never returns.
///
/// # Safety
/// Only in a child of `clone`: async-signal-safe calls on memory that was made before.
#[allow(unsafe_code)]
unsafe fn become_program(
    plan: &Plan,
    argv: &[*const libc::c_char],
    env: &[*const libc::c_char],
    script: &mut [*const libc::c_char],
    failure: RawFd,
) -> ! {
    let fail = |step: u8, number: libc::c_int| -> ! {
        let mut told = [step; 5];
        told[1..].copy_from_slice(&number.to_ne_bytes());
        // SAFETY: plain system calls.
        unsafe {
            libc::write(failure, told.as_ptr().cast(), told.len());
            libc::_exit(127)
        }
    };
    // SAFETY: errno of this thread's copy.
    let errno = || unsafe { *libc::__errno_location() };
    let check = |step: u8, result: libc::c_int| {
        if result < 0 {
            fail(step, errno());
        }
    };
    // SAFETY: see above; every pointer is to memory of `plan` or of this frame.
    unsafe {
        // Nothing that the agent blocks or ignores: Rust's programs ignore SIGPIPE.
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        for signal in 1..=libc::SIGSYS {
            libc::signal(signal, libc::SIG_DFL);
        }
        check(0, libc::setsid());
        if plan.terminal {
            check(1, libc::ioctl(plan.streams[0], libc::TIOCSCTTY, 0));
        }
        // Streams below 3 would be overwritten while they are still needed: the agent's own are open, so none is.
        for (to, from) in plan.streams.iter().enumerate() {
            let to = to as libc::c_int;
            if *from == to {
                check(2, libc::fcntl(to, libc::F_SETFD, 0));
            } else {
                check(2, libc::dup2(*from, to));
            }
        }
        // Everything else is the agent's.
        let closed = libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
        check(2, closed as libc::c_int);
        libc::umask(0o022);
        check(3, libc::setrlimit(libc::RLIMIT_NOFILE, &raw const plan.descriptors));
        let score = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if score >= 0 {
            libc::write(score, plan.oom_score.as_ptr().cast(), plan.oom_score.count_bytes());
            libc::close(score);
        }
        // The kernel's calls: those of the C library have every thread change, and wait for locks that threads of the agent
        // may have held when this child was made of it.
        check(4, libc::syscall(libc::SYS_setgroups, plan.groups.len(), plan.groups.as_ptr()) as libc::c_int);
        check(4, libc::syscall(libc::SYS_setgid, plan.gid) as libc::c_int);
        check(4, libc::syscall(libc::SYS_setuid, plan.uid) as libc::c_int);
        check(CWD, libc::chdir(plan.cwd.as_ptr()));
        let mut denied = false;
        for path in &plan.candidates {
            libc::execve(path.as_ptr(), argv.as_ptr(), env.as_ptr());
            match errno() {
                libc::EACCES => denied = true,
                libc::ENOENT | libc::ENOTDIR => {}
                libc::ENOEXEC => {
                    if let Some(place) = script.get_mut(1) {
                        *place = path.as_ptr();
                    }
                    libc::execve(c"/bin/sh".as_ptr(), script.as_ptr(), env.as_ptr());
                    if errno() == libc::ENOENT {
                        libc::execve(shell::BROUGHT_C.as_ptr(), script.as_ptr(), env.as_ptr());
                    }
                    fail(EXEC, errno());
                }
                other => fail(EXEC, other),
            }
        }
        fail(EXEC, if denied { libc::EACCES } else { libc::ENOENT })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me() -> User {
        User {
            name: "me".to_owned(),
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            groups: rustix::process::getgroups().unwrap().iter().map(|group| group.as_raw()).collect(),
            home: PathBuf::from("/"),
            shell: "/bin/sh".to_owned(),
        }
    }

    async fn run(name: &str, args: &[&str], cwd: &str) -> Result<(Option<i32>, String), Error> {
        let (reader, writer) = pipe().unwrap();
        let null = File::open("/dev/null").unwrap();
        let args: Vec<String> = args.iter().map(|text| (*text).to_owned()).collect();
        let user = me();
        let program = Program {
            name: OsStr::new(name),
            args: &args,
            env: [("PATH".to_owned(), PATH.to_owned()), ("A".to_owned(), "b".to_owned())].into(),
            cwd: Path::new(cwd),
            user: &user,
            streams: [null.as_fd(), writer.as_fd(), writer.as_fd()],
            terminal: false,
            place: &Place::none(),
            oom_score: 100,
        };
        let child = start(&program).await?;
        drop(writer);
        let status = child.wait().await.unwrap();
        let mut text = String::new();
        { reader }.read_to_string(&mut text).unwrap();
        Ok((status.exit_status(), text))
    }

    #[tokio::test]
    async fn a_child_has_nothing_of_the_agents() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: not root, groups cannot be set");
            return;
        }
        // Descriptors of ours that are inherited by mistake must not be either.
        let leaked = rustix::io::dup(File::open("/dev/null").unwrap()).unwrap();
        let script = "ls /proc/self/fd | wc -l; grep -E '^Sig(Blk|Ign)' /proc/self/status; cat /proc/self/oom_score_adj; \
                      ulimit -n; pwd; echo $A; ps -o sid= -p $$ >/dev/null 2>&1; exit 7";
        let (code, text) = run("sh", &["-c", script], "/usr").await.unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(code, Some(7), "{text}");
        // Three streams and the one that `ls` reads with.
        assert_eq!(lines[0], "4", "{text}");
        assert_eq!(lines[1], "SigBlk:\t0000000000000000");
        // Above 31 are those of the C library, which nobody may change.
        let ignored = lines[2].strip_prefix("SigIgn:\t").and_then(|text| u64::from_str_radix(text, 16).ok());
        assert_eq!(ignored.map(|mask| mask & 0x7fff_ffff), Some(0), "{text}");
        assert_eq!(&lines[3..], ["100", "1024", "/usr", "b"], "{text}");
        drop(leaked);
    }

    /// Threads of the agent come and go: what they hold when a child is made, the child holds for ever.
    #[tokio::test]
    async fn a_child_waits_for_no_thread_of_the_agents() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: not root, groups cannot be set");
            return;
        }
        let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let churning: Vec<_> = (0..4)
            .map(|_| {
                let over = std::sync::Arc::clone(&over);
                std::thread::spawn(move || {
                    while !over.load(std::sync::atomic::Ordering::Relaxed) {
                        std::thread::spawn(|| {}).join().unwrap();
                    }
                })
            })
            .collect();
        let mut outcome = Ok(());
        for _ in 0..300 {
            outcome = run("true", &[], "/").await.map(drop);
            if outcome.is_err() {
                break;
            }
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        for thread in churning {
            thread.join().unwrap();
        }
        outcome.unwrap();
    }

    #[tokio::test]
    async fn what_stands_in_the_way_is_told() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: not root, groups cannot be set");
            return;
        }
        let kind = |error: &io::Error| error.raw_os_error().unwrap();
        assert!(
            matches!(run("no-such-program", &[], "/").await, Err(Error::Exec(error)) if kind(&error) == libc::ENOENT)
        );
        assert!(
            matches!(run("/etc/passwd", &[], "/").await, Err(Error::Exec(error)) if kind(&error) == libc::EACCES)
        );
        assert!(
            matches!(run("true", &[], "/none").await, Err(Error::Cwd(error)) if kind(&error) == libc::ENOENT)
        );
        assert!(
            matches!(run("true", &[], "/etc/passwd").await, Err(Error::Cwd(error)) if kind(&error) == libc::ENOTDIR)
        );
        assert!(matches!(run("a\0b", &[], "/").await, Err(Error::Nul(_))));
        let huge = "x".repeat(3 << 20);
        assert!(
            matches!(run("true", &[&huge], "/").await, Err(Error::Exec(error)) if kind(&error) == libc::E2BIG)
        );
    }

    /// As in an image without bash: the `PATH` leads to none.
    #[tokio::test]
    async fn a_shell_that_is_missing_has_another_in_its_place() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: not root, groups cannot be set");
            return;
        }
        let (reader, writer) = pipe().unwrap();
        let null = File::open("/dev/null").unwrap();
        let args = ["--login", "-c", "echo $0 $A"].map(str::to_owned);
        let (user, place) = (me(), Place::none());
        let program = |name: &'static str| Program {
            name: OsStr::new(name),
            args: &args,
            env: [("PATH".to_owned(), "/none".to_owned()), ("A".to_owned(), "b".to_owned())].into(),
            cwd: Path::new("/"),
            user: &user,
            streams: [null.as_fd(), writer.as_fd(), null.as_fd()],
            terminal: false,
            place: &place,
            oom_score: 100,
        };
        let child = start(&program("bash")).await.unwrap();
        assert_eq!(child.wait().await.unwrap().exit_status(), Some(0));
        // What is no shell is not there.
        assert!(matches!(start(&program("python3")).await, Err(Error::Exec(_))));
        drop(writer);
        let mut text = String::new();
        { reader }.read_to_string(&mut text).unwrap();
        assert_eq!(text, "/bin/sh b\n");
    }

    #[tokio::test]
    async fn a_script_without_an_interpreter_line_is_the_shells() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: not root, groups cannot be set");
            return;
        }
        use std::os::unix::fs::PermissionsExt;
        let path = std::env::temp_dir().join(format!("kelvin-spawn-{}", std::process::id()));
        std::fs::write(&path, "echo \"$1\"\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let ran = run(path.to_str().unwrap(), &["word"], "/").await;
        std::fs::remove_file(&path).unwrap();
        assert_eq!(ran.unwrap(), (Some(0), "word\n".to_owned()));
    }
}
