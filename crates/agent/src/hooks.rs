//! What the image wants to be run when its machine has become another: `/etc/kelvin/restored.d/*`.
//!
//! The kernel's generator, host name, machine-id, boot-id and clock are new before a machine is called ready. A
//! program that was running when the snapshot was taken has its own copies in its memory (the state of Python's
//! `random`, a TLS library's pool, a cached host name): only it can renew them, and these programs tell it.
//!
//! Run as root, by name, one after the other, after the node has its answer. They are told who the machine is by
//! the environment of every process. What fails is on the console; nothing waits for them.

use std::path::Path;
use std::time::Duration;

use crate::groups::Place;
use crate::services;
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
    let place = Place::root();
    for program in programs {
        let environment = state.settings().environment().into_iter().collect();
        let child = match services::start_program(&program, environment, &place, None).await {
            Ok(child) => child,
            Err(error) => {
                eprintln!("agent: {}: {error}", program.display());
                continue;
            }
        };
        match tokio::time::timeout(LIMIT, child.wait()).await {
            Ok(Ok(status)) if status.exit_status() == Some(0) => {}
            Ok(other) => eprintln!("agent: {}: {other:?}", program.display()),
            Err(_elapsed) => {
                eprintln!("agent: {} is ended: it took longer than {LIMIT:?}", program.display());
                child.kill();
                let _ = child.wait().await;
            }
        }
    }
}
