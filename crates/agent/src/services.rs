//! What the image wants to be running when its machine is called ready: `/etc/kelvin/services.d/*`, started as root
//! when the machine boots, and started again when they end. `/etc/kelvin/ready`, when it is there, ends when they can
//! be used: a booted machine is not ready before, and a snapshot is of that instant.
//!
//! Which process each is, is noted in `/run`: an agent that comes after one that crashed waits for the end of those that
//! still run, and starts the others.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;

use crate::groups::Place;
use crate::guest_file;
use crate::spawn::{self, Child, PATH, Program};
use crate::users::User;

/// Where they are.
const DIRECTORY: &str = "/etc/kelvin/services.d";
/// What tells that they can be used.
const READY: &str = "/etc/kelvin/ready";
/// Where it is noted which process each of them is.
const NOTES: &str = "/run/kelvin-services";
/// How long a service has to run to be started again at once.
const AGAIN: Duration = Duration::from_secs(1);
/// What is kept of what [`READY`] says, in bytes.
const LAST_WORDS: usize = 4096;

/// Starts `program`, of the image and as root; `errors` is its standard error, the console when there is none.
pub async fn start_program(
    program: &Path,
    environment: Vec<(String, String)>,
    place: &Place,
    errors: Option<OwnedFd>,
) -> io::Result<Child> {
    let null = File::open("/dev/null")?;
    let console = io::stderr();
    let errors = errors.as_ref().map_or(console.as_fd(), |fd| fd.as_fd());
    let root = User::root();
    let env = [("PATH".to_owned(), PATH.to_owned())].into_iter().chain(environment).collect();
    let program = Program {
        name: program.as_os_str(),
        args: &[],
        env,
        cwd: Path::new("/"),
        user: &root,
        streams: [null.as_fd(), console.as_fd(), errors],
        terminal: false,
        place,
        oom_score: 0,
    };
    spawn::start(&program).await.map_err(io::Error::other)
}

/// Starts those that do not run, each with a task that keeps it running. `again`: an agent before this one may have
/// started them.
pub fn start(again: bool) {
    let Ok(entries) = std::fs::read_dir(DIRECTORY) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        tokio::spawn(keep(entry.path(), name, again));
    }
}

/// Where it is noted which process a service is: its id, and when it was started, by the kernel's clock.
fn note(name: &str) -> PathBuf {
    Path::new(NOTES).join(name)
}

/// When a process was started, in the kernel's ticks. Source: proc_pid_stat(5), field 22.
fn started_at(pid: u32) -> Option<String> {
    let stat = guest_file::read(Path::new(&format!("/proc/{pid}/stat")), 4096).ok()?;
    let stat = String::from_utf8_lossy(&stat).into_owned();
    // The name in parentheses may hold anything.
    Some(stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.to_owned())
}

fn write_note(name: &str, pid: u32) -> io::Result<()> {
    let started = started_at(pid).ok_or(io::ErrorKind::NotFound)?;
    std::fs::create_dir_all(NOTES)?;
    let fresh = Path::new(NOTES).join(format!(".{name}"));
    std::fs::write(&fresh, format!("{pid} {started}"))?;
    std::fs::rename(fresh, note(name))
}

/// Waits for the end of what an agent before this one has started.
async fn outlive(name: &str) -> io::Result<()> {
    let Ok(text) = guest_file::read(&note(name), 256) else { return Ok(()) };
    let text = String::from_utf8_lossy(&text).into_owned();
    let Some((pid, started)) = text.split_once(' ') else { return Ok(()) };
    let Some(number) = pid.parse().ok().and_then(rustix::process::Pid::from_raw) else { return Ok(()) };
    let Ok(pidfd) = rustix::process::pidfd_open(number, rustix::process::PidfdFlags::empty()) else {
        return Ok(());
    };
    // After the descriptor: it is of the process that is looked at.
    if started_at(number.as_raw_nonzero().get().unsigned_abs()).as_deref() == Some(started) {
        let _ = crate::port::watched(pidfd)?.readable().await?;
    }
    Ok(())
}

async fn keep(program: PathBuf, name: String, again: bool) {
    if again && let Err(error) = outlive(&name).await {
        eprintln!("agent: service {name}: {error}");
    }
    let place = Place::service(&name);
    loop {
        let started = Instant::now();
        let ended = match start_program(&program, Vec::new(), &place, None).await {
            Ok(child) => {
                if let Err(error) = write_note(&name, child.pid()) {
                    eprintln!("agent: service {name}: {error}");
                }
                child.wait().await.map(|status| format!("{status:?}"))
            }
            Err(error) => Err(error),
        };
        eprintln!("agent: service {name} ended: {ended:?}");
        // One that cannot run must not take the processor from everybody.
        tokio::time::sleep(AGAIN.saturating_sub(started.elapsed())).await;
    }
}

/// Waits until the services can be used. For a thread without a runtime.
///
/// # Errors
/// A text for the node, when the image says that they cannot.
pub fn wait_ready() -> Result<(), String> {
    if !Path::new(READY).exists() {
        return Ok(());
    }
    let failed = |error: io::Error| format!("{READY}: {error}");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let (words, errors) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    let ended = runtime.block_on(async {
        let mut words = tokio::net::unix::pipe::Receiver::from_owned_fd(words)?;
        let child = start_program(Path::new(READY), Vec::new(), &Place::root(), Some(errors)).await?;
        let ended = child.wait();
        tokio::pin!(ended);
        let (mut said, mut buffer) = (Vec::new(), [0; 1024]);
        let mut is_open = true;
        loop {
            // Read while it runs, so that it never waits for a reader; not longer: what it left running may hold it open.
            tokio::select! {
                biased;
                read = words.read(&mut buffer), if is_open => match read {
                    Ok(count @ 1..) => said.extend(buffer[..count].iter().take(LAST_WORDS - said.len().min(LAST_WORDS))),
                    _ => is_open = false,
                },
                status = &mut ended => return status.map(|status| (status, said)),
            }
        }
    });
    let (status, said) = ended.map_err(failed)?;
    if status.exit_status() == Some(0) {
        return Ok(());
    }
    let text: String = String::from_utf8_lossy(&said).trim().chars().take(500).collect();
    Err(format!("{READY}: {status:?}: {text}"))
}
