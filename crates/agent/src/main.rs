//! The program inside every guest: PID 1, and the agent that answers the node.
//!
//! One static binary plays two parts, so that neither can take the other down:
//!
//! ```text
//! PID 1  init: mounts, modules, switch to the root disk, then reap and restart the agent for ever
//!   └─ agent: control port (activation, quiesce) on its own thread, HTTP/2 with envd's services
//!        └─ processes of the user
//! ```
//!
//! Writes: the guest's own file system and `/run/kelvin`. A crash of the agent ends its connections,
//! not the user's processes (init inherits them), and init starts it again; init itself has no step
//! that can end it. Absent on purpose: logging on any request path (it would be translated code that
//! nobody reads) and every way in but the two ports, which are
//! virtio ports or vsock, as the machine has them.

mod activation;
mod control;
mod defaults;
mod entries;
mod fault;
mod files;
mod filesystem;
mod furnish;
mod groups;
mod guest_file;
mod hooks;
mod http;
mod identity;
mod init;
mod metadata;
mod metrics;
mod network;
mod place;
mod port;
mod process;
mod pty;
mod reply;
mod services;
mod shell;
mod spawn;
mod state;
mod tunnel;
mod users;
mod vsock;
mod watch;

use std::process::ExitCode;

fn main() -> ExitCode {
    if rustix::process::getpid().as_raw_nonzero().get() == 1 {
        init::run();
    }
    match std::env::args().nth(1).as_deref() {
        Some("agent") => match http::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("agent: {error}");
                ExitCode::FAILURE
            }
        },
        _ => {
            eprintln!("usage: kelvin-agent agent (started by init inside a guest)");
            ExitCode::from(2)
        }
    }
}
