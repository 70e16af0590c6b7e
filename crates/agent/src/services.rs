//! What the image wants to be running when its machine is called ready: `/etc/kelvin/services.d/*`, started as root
//! when the machine boots, and started again when they end. `/etc/kelvin/ready`, when it is there, ends when they can
//! be used: a booted machine is not ready before, and a snapshot is of that instant.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Where they are.
const DIRECTORY: &str = "/etc/kelvin/services.d";
/// What tells that they can be used.
const READY: &str = "/etc/kelvin/ready";
/// How long a service has to run to be started again at once.
const AGAIN: Duration = Duration::from_secs(1);

fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null());
    command
}

/// Starts all of them, each with a task that keeps it running.
pub fn start() {
    let Ok(entries) = std::fs::read_dir(DIRECTORY) else {
        return;
    };
    for entry in entries.flatten() {
        tokio::spawn(keep(entry.path()));
    }
}

async fn keep(program: PathBuf) {
    loop {
        let started = Instant::now();
        let ended = match tokio::process::Command::from(command(&program)).spawn() {
            Ok(mut child) => child.wait().await,
            Err(error) => Err(error),
        };
        eprintln!("agent: service {} ended: {ended:?}", program.display());
        // One that cannot run must not take the processor from everybody.
        tokio::time::sleep(AGAIN.saturating_sub(started.elapsed())).await;
    }
}

/// Waits until the services can be used.
///
/// # Errors
/// A text for the node, when the image says that they cannot.
pub fn wait_ready() -> Result<(), String> {
    if !Path::new(READY).exists() {
        return Ok(());
    }
    match command(Path::new(READY)).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            let text: String = text.trim().chars().take(500).collect();
            Err(format!("{READY}: {}: {text}", output.status))
        }
        Err(error) => Err(format!("{READY}: {error}")),
    }
}
