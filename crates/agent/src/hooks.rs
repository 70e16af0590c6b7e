//! What the image wants to be run when its machine has become another: `/etc/kelvin/restored.d/*`.
//!
//! The kernel's generator, host name, machine-id, boot-id and clock are new before a machine is called ready. A
//! program that was running when the snapshot was taken has its own copies in its memory (the state of Python's
//! `random`, a TLS library's pool, a cached host name): only it can renew them, and these programs tell it.
//!
//! Run as root, by name, one after the other, after the node has its answer. They are told who the machine is by
//! the environment of every process. What fails is on the console; nothing waits for them.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use crate::state::State;

/// Where they are.
pub const DIRECTORY: &str = "/etc/kelvin/restored.d";
/// How long one may take.
const LIMIT: Duration = Duration::from_secs(30);

/// Whether there may be some.
pub fn exist() -> bool {
    Path::new(DIRECTORY).exists()
}

/// Runs all of them.
pub async fn run(state: &State) {
    let Ok(entries) = std::fs::read_dir(DIRECTORY) else {
        return;
    };
    let mut programs: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    programs.sort();
    for program in programs {
        let environment = state.settings().environment();
        let started = tokio::process::Command::new(&program)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .envs(environment)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn();
        let ended = match started {
            Ok(mut child) => tokio::time::timeout(LIMIT, child.wait()).await,
            Err(error) => Ok(Err(error)),
        };
        match ended {
            Ok(Ok(status)) if status.success() => {}
            other => eprintln!("agent: {}: {other:?}", program.display()),
        }
    }
}
