//! `kelvin bench pause`: pauses and resumes of one sandbox, with a process that writes all the while.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use comfy_table::Table;
use kelvin_api::sandbox::NewSandbox;
use kelvin_client::Client;
use kelvin_client::agent::Command;
use serde::Serialize;

use crate::{Percentiles, ms, percentile_table};

const LIFE_S: u64 = 600;
const WRITER: &str = "n=0; while :; do n=$((n+1)); echo $n > /tmp/n; dd if=/dev/urandom of=/home/user/data bs=64k count=4 conv=notrunc 2>/dev/null; done";

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Cycles.
    #[arg(short, long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub n: u32,
    /// Memory of the machine in MiB, instead of the template's.
    #[arg(long)]
    pub memory_mib: Option<u64>,
    /// Template.
    #[arg(long, default_value = "base")]
    pub template: String,
}

/// Why a bench has no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server failed.
    #[error("the server failed")]
    Client(#[from] kelvin_client::Error),
    /// A command failed.
    #[error("a command exited with {0}")]
    Command(i32),
    /// What a command printed is not what was expected.
    #[error("a command printed {0:?}")]
    Output(String),
}

/// The result: one JSON object.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct Report {
    pub n: u32,
    /// Client: request sent to reply read: it can be resumed.
    pub pause_ms: Percentiles,
    /// Server: from the vCPUs' stop to the end of their machine.
    pub paused_ms: Percentiles,
    pub dirty_pages: Percentiles,
    /// Client: request sent to reply read: its agent has answered.
    pub resume_ms: Percentiles,
    /// Client: the first command after it.
    pub first_exec_ms: Percentiles,
    /// The guest's wall clock against this machine's, while a command reads it.
    pub clock_error_s: Percentiles,
}

impl Report {
    /// For people.
    pub fn table(&self) -> Table {
        let rows = [
            ("pause, ms", &self.pause_ms),
            ("  stopped and saved, ms", &self.paused_ms),
            ("  pages it had written", &self.dirty_pages),
            ("resume, ms", &self.resume_ms),
            ("first command, ms", &self.first_exec_ms),
            ("clock error, s", &self.clock_error_s),
        ];
        percentile_table("", 3, &rows)
    }
}

fn now_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn shell(script: &str) -> Command {
    Command {
        program: "/bin/bash".to_owned(),
        args: vec!["-c".to_owned(), script.to_owned()],
        ..Command::default()
    }
}

/// Measures.
///
/// # Errors
/// The first failure of anything that is measured.
pub async fn run(client: &Client, args: &Args) -> Result<Report, Error> {
    let body = NewSandbox {
        template_id: args.template.clone(),
        timeout: Some(LIFE_S),
        memory_mb: args.memory_mib,
        ..NewSandbox::default()
    };
    let sandbox = client.create(&body, None).await?.sandbox;
    let agent = client.agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), None)?;
    drop(agent.start(&shell(WRITER)).await?);
    let id = sandbox.sandbox_id.as_str();
    let mut figures: [Vec<f64>; 6] = Default::default();
    for _ in 0..args.n {
        let started = Instant::now();
        let capture = client.pause(id).await?;
        let paused = ms(started);
        let started = Instant::now();
        client.resume(id, LIFE_S).await?;
        let resumed = ms(started);
        let (started, before) = (Instant::now(), now_s());
        let (code, stdout, _) = agent.run(&shell("date +%s.%N"), 64).await?;
        let (first, after) = (ms(started), now_s());
        if code != 0 {
            return Err(Error::Command(code));
        }
        let text = String::from_utf8_lossy(&stdout).trim().to_owned();
        let clock: f64 = text.parse().map_err(|_| Error::Output(text))?;
        let error = (before - clock).max(clock - after).max(0.0);
        let dirty = capture.dirty_pages.unwrap_or_default() as f64;
        for (list, value) in figures.iter_mut().zip([paused, capture.paused_ms, dirty, resumed, first, error])
        {
            list.push(value);
        }
    }
    client.kill(&sandbox.sandbox_id).await?;
    let none = Percentiles { p50: 0.0, p95: 0.0, p99: 0.0 };
    let [pause_ms, paused_ms, dirty_pages, resume_ms, first_exec_ms, clock_error_s] =
        figures.map(|list| Percentiles::of(&list).unwrap_or(none));
    Ok(Report { n: args.n, pause_ms, paused_ms, dirty_pages, resume_ms, first_exec_ms, clock_error_s })
}
