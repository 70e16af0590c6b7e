//! What the end-to-end tests stand on: real servers of the built binary, each with a data directory of
//! its own on a file system that can clone files.
//!
//! `cargo xtask test` makes the ground and names it in `KELVIN_E2E_DIR` and `KELVIN_E2E_BINARY`; without
//! it the tests say `skipped: ...`. A server that is stopped has to have left nothing; one whose test
//! failed is cleared away. Each test has a network namespace of its own; [`world`] gives it an internet.

pub mod golden;
mod ground;
mod links;
pub mod promises;
mod requests;
mod server;
pub mod soak;
pub mod world;

use std::collections::BTreeSet;
use std::fs;

use kelvin_api::sandbox::{NewSandbox, Sandbox};
use kelvin_client::Client;
use kelvin_client::agent::{self, Agent};
use kelvin_host::process::proportional_kib;

pub use ground::Ground;
pub use links::{ip, slot_links};
pub use requests::{ask, send, upload_zeroes};
pub use server::{LIMIT, Server};

/// The body of an ordinary create.
pub fn new_sandbox() -> NewSandbox {
    NewSandbox { template_id: "base".to_owned(), timeout: Some(600), ..NewSandbox::default() }
}

/// The agent of a sandbox that was just created.
pub fn agent_of(client: &Client, sandbox: &Sandbox) -> Agent {
    client.agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), None).expect("a URL")
}

/// A shell command.
pub fn shell(script: &str) -> agent::Command {
    agent::Command {
        program: "/bin/bash".to_owned(),
        args: vec!["-c".to_owned(), script.to_owned()],
        ..agent::Command::default()
    }
}

/// A process that counts, says so, and holds a token that it made: `COUNT TOKEN` in `/tmp/state` and on its standard
/// output, twenty times a second.
pub const COUNTER: &str = "import os, time\ntoken = os.urandom(16).hex()\nn = 0\nwhile True:\n    n += 1\n    open('/tmp/state.new', 'w').write(f'{n} {token}')\n    os.replace('/tmp/state.new', '/tmp/state')\n    print(n, token, flush=True)\n    time.sleep(0.05)\n";

/// Starts [`COUNTER`] and waits until it has counted; its process id.
pub async fn start_counter(agent: &Agent) -> u32 {
    let command = agent::Command {
        program: "python3".to_owned(),
        args: ["-c", COUNTER].map(str::to_owned).to_vec(),
        ..agent::Command::default()
    };
    let mut process = agent.start(&command).await.expect("it starts");
    let mut pid = 0;
    loop {
        match process.next().await.expect("a stream").expect("output") {
            agent::Told::Started { pid: started } => pid = started,
            agent::Told::Stdout(_) => return pid,
            other => panic!("the counter: {other:?}"),
        }
    }
}

/// What these processes take, in MiB: pages that n of them share count 1/n.
pub fn proportional_mib(pids: BTreeSet<i32>) -> u64 {
    pids.into_iter().map(proportional_kib).sum::<u64>() / 1024
}

/// Runs a shell command and returns its standard output; it has to succeed.
pub async fn sh(agent: &Agent, script: &str) -> String {
    let (code, stdout, stderr) = agent.run(&shell(script), 1 << 20).await.expect("the command runs");
    assert_eq!(code, 0, "{script}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).expect("text")
}

/// Memory that a process has resident, in MiB.
pub fn resident_mib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") >> 10
}
