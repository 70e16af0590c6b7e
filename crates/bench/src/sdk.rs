//! `kelvin bench sdk`: create to the end of the first command, as users of the official Python SDK see it.
//!
//! ComputeSDK's figure: sequential creates, each with one command, each killed before the next. A share of it is the
//! SDK's own; beside it stands the same with Kelvin's client, in the same run.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Instant;

use comfy_table::Table;
use kelvin_api::sandbox::NewSandbox;
use kelvin_client::Client;
use kelvin_client::agent::Command;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::{Percentiles, ms, percentile_table};

const PROGRAM: &str = include_str!("sdk.py");
const LIFE_S: u64 = 120;

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Sandboxes.
    #[arg(short, long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub n: u32,
    /// A Python with the package e2b.
    #[arg(long, default_value = "python3")]
    pub python: PathBuf,
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
    /// The SDK's program failed; what it says is on standard error.
    #[error("{program} failed: {reason}; it needs the package e2b: pip install e2b")]
    Sdk {
        /// Which Python.
        program: String,
        /// How.
        reason: String,
    },
    /// A command failed.
    #[error("a command exited with {0}")]
    Command(i32),
}

#[derive(Debug, Deserialize)]
struct Line {
    create_ms: f64,
    ready_ms: f64,
}

/// The result: one JSON object.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct Report {
    pub n: u32,
    /// The SDK: `Sandbox.create`.
    pub create_ms: Percentiles,
    /// The SDK: create to the end of the first command.
    pub ready_ms: Percentiles,
    /// Kelvin's client: the same.
    pub own_ready_ms: Percentiles,
}

impl Report {
    /// For people.
    pub fn table(&self) -> Table {
        let rows = [
            ("SDK: create", &self.create_ms),
            ("SDK: create to first command", &self.ready_ms),
            ("own client: the same", &self.own_ready_ms),
        ];
        percentile_table("milliseconds", 1, &rows)
    }
}

/// Runs the bench against the server of `client`.
///
/// # Errors
/// When the server, the SDK or a command fails.
pub async fn run(client: &Client, args: &Args) -> Result<Report, Error> {
    let (mut create, mut ready) = (Vec::new(), Vec::new());
    for line in with_sdk(client, args).await? {
        create.push(line.create_ms);
        ready.push(line.ready_ms);
    }
    let mut own = Vec::new();
    for _ in 0..args.n {
        let body =
            NewSandbox { template_id: args.template.clone(), timeout: Some(LIFE_S), ..NewSandbox::default() };
        let started = Instant::now();
        let sandbox = client.create(&body, None).await?.sandbox;
        let agent = client.agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), None)?;
        let echo = Command {
            program: "/bin/bash".into(),
            args: vec!["-l".into(), "-c".into(), "echo ready".into()],
            ..Command::default()
        };
        let (code, ..) = agent.run(&echo, 100).await?;
        own.push(ms(started));
        client.kill(&sandbox.sandbox_id).await?;
        if code != 0 {
            return Err(Error::Command(code));
        }
    }
    let of = |values: &[f64]| Percentiles::of(values).unwrap_or(Percentiles { p50: 0.0, p95: 0.0, p99: 0.0 });
    Ok(Report { n: args.n, create_ms: of(&create), ready_ms: of(&ready), own_ready_ms: of(&own) })
}

async fn with_sdk(client: &Client, args: &Args) -> Result<Vec<Line>, Error> {
    let failed = |reason: String| Error::Sdk { program: args.python.display().to_string(), reason };
    let mut child = tokio::process::Command::new(&args.python)
        .args(["-c", PROGRAM, &args.n.to_string(), &args.template])
        // Never on the command line: others can read that.
        .env("E2B_API_KEY", client.key().expose())
        .env("E2B_API_URL", client.url())
        .env("E2B_SANDBOX_URL", client.url())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let mut found = Vec::new();
    if let Some(output) = child.stdout.take() {
        let mut lines = BufReader::new(output).lines();
        while let Some(line) = lines.next_line().await.map_err(|error| failed(error.to_string()))? {
            found.push(serde_json::from_str(&line).map_err(|error| failed(error.to_string()))?);
        }
    }
    let status = child.wait().await.map_err(|error| failed(error.to_string()))?;
    if status.success() { Ok(found) } else { Err(failed(status.to_string())) }
}
