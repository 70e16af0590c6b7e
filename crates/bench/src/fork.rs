//! `kelvin bench fork`: how long a source stands still while it is forked, how soon its children answer, and what they
//! cost in memory.
//!
//! Each round makes a source, forks it once and ends everything. With `--baseline`, the prototype's sequence runs on a
//! bare machine of the same snapshot before each round, and the sources are as idle as that one. Without, the source
//! runs a Python process that holds and changes state, as an agent's would.

use std::time::Instant;

use comfy_table::Table;
use kelvin_api::sandbox::{BakeTemplate, ForkSandbox, NewSandbox, StartPath};
use kelvin_client::Client;
use kelvin_client::agent::Command;
use serde::Serialize;

use crate::bare::{self, Bare};
use kelvin_host::process::{proportional_kib, working_in};

use crate::{Percentiles, ms, percentile_table, settle};

/// How long a sandbox of the bench lives at the most, in seconds.
const LIFE_S: u64 = 300;
/// State in a process: 8 MiB that are touched, and a counter.
const STATE: &str = "import time\nheld = bytearray(8 << 20)\nn = 0\nwhile True:\n    n += 1\n    held[n * 4096 % len(held)] = n % 256\n    time.sleep(0.01)\n";

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Forks in total.
    #[arg(short, long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub n: u32,
    /// Children of each.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub children: u32,
    /// Memory of the machines in MiB, instead of the template's.
    #[arg(long)]
    pub memory_mib: Option<u64>,
    /// Template.
    #[arg(long, default_value = "base")]
    pub template: String,
    /// Measure the prototype's fork of a bare machine beside it, both idle. Needs to run on the server's machine, as
    /// its user.
    #[arg(long)]
    pub baseline: bool,
    /// Measure the memory of the children: proportional set sizes of their VMMs. Needs to run on the server's machine.
    #[arg(long)]
    pub memory: bool,
}

/// Why a bench has no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server failed.
    #[error("the server failed")]
    Client(#[from] kelvin_client::Error),
    /// The bare sequence failed.
    #[error("the bare sequence failed")]
    Bare(#[from] bare::Error),
    /// A child could not be started.
    #[error("a child could not be started")]
    Child(#[source] kelvin_api::error::ApiError),
    /// A command failed.
    #[error("a command exited with {0}")]
    Command(i32),
    /// The node did not come to rest.
    #[error("the node did not settle")]
    Settle(#[from] crate::Unsettled),
}

/// The result: one JSON object.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct Report {
    pub n: u32,
    pub children: u32,
    /// Server: the source's vCPUs stood still.
    pub paused_ms: Percentiles,
    pub dirty_pages: Percentiles,
    /// Client: request sent to reply read: every child has answered.
    pub fork_ms: Percentiles,
    /// Proportional set size of all children of a fork, in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub children_mib: Option<Percentiles>,
    /// The prototype's sequence: its vCPUs stood still.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline_ms: Option<Percentiles>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline_dirty_pages: Option<Percentiles>,
    /// p50 of the source's pause over p50 of the prototype's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio_p50: Option<f64>,
}

impl Report {
    /// For people.
    pub fn table(&self) -> Table {
        let fork = format!("fork to {} answering, ms", self.children);
        let mut rows = vec![
            ("source stood still, ms", &self.paused_ms),
            ("pages it had written", &self.dirty_pages),
            (fork.as_str(), &self.fork_ms),
        ];
        rows.extend(self.children_mib.as_ref().map(|memory| ("memory of the children, MiB", memory)));
        if let (Some(baseline), Some(pages)) = (&self.baseline_ms, &self.baseline_dirty_pages) {
            rows.extend([("prototype stood still, ms", baseline), ("pages it had written", pages)]);
        }
        let mut table = percentile_table("", 2, &rows);
        if let Some(ratio) = self.ratio_p50 {
            table.add_row(["source ÷ prototype, p50".to_owned(), format!("{ratio:.3}")]);
        }
        table
    }
}

/// Measures.
///
/// # Errors
/// The first failure of anything that is measured.
pub async fn run(client: &Client, args: &Args) -> Result<Report, Error> {
    let node = client.node().await?;
    let request = BakeTemplate { memory_mb: args.memory_mib, ..BakeTemplate::default() };
    let snapshot = client.bake(&args.template, &request).await?;
    let bare = if args.baseline { Some(Bare::open(node.data_dir.as_ref(), &snapshot)?) } else { None };
    let (mut paused, mut pages, mut forks, mut memory) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut bares, mut bare_pages) = (Vec::new(), Vec::new());
    for _ in 0..args.n {
        settle(client).await?;
        if let Some(bare) = &bare {
            let (ms, dirty) = bare.fork()?;
            bares.push(ms);
            bare_pages.push(dirty as f64);
        }
        let body = NewSandbox {
            template_id: args.template.clone(),
            timeout: Some(LIFE_S),
            memory_mb: args.memory_mib,
            start_path: Some(StartPath::Clone),
            ..NewSandbox::default()
        };
        let source = client.create(&body, None).await?.sandbox;
        if bare.is_none() {
            let agent = client.agent(&source.sandbox_id, source.envd_access_token.clone(), None)?;
            let args = ["-c", STATE].map(str::to_owned).to_vec();
            let command = Command { program: "python3".to_owned(), args, ..Command::default() };
            drop(agent.start(&command).await?);
            let ready = Command { program: "true".to_owned(), ..Command::default() };
            let (code, ..) = agent.run(&ready, 0).await?;
            if code != 0 {
                return Err(Error::Command(code));
            }
        }
        let before = working_in(node.data_dir.as_ref());
        let body =
            ForkSandbox { timeout: Some(LIFE_S), count: Some(args.children), ..ForkSandbox::default() };
        let started = Instant::now();
        let (children, capture) = client.fork(source.sandbox_id.as_str(), &body).await?;
        forks.push(ms(started));
        paused.push(capture.paused_ms);
        pages.push(capture.dirty_pages.unwrap_or_default() as f64);
        if args.memory {
            let kib: u64 = working_in(node.data_dir.as_ref())
                .difference(&before)
                .map(|pid| proportional_kib(*pid))
                .sum();
            memory.push(kib as f64 / 1024.0);
        }
        for child in children {
            match (child.sandbox, child.error) {
                (Some(sandbox), _) => client.kill(&sandbox.sandbox_id).await?,
                (None, Some(error)) => return Err(Error::Child(error)),
                (None, None) => {}
            }
        }
        client.kill(&source.sandbox_id).await?;
    }
    let none = Percentiles { p50: 0.0, p95: 0.0, p99: 0.0 };
    let paused_ms = Percentiles::of(&paused).unwrap_or(none);
    let baseline_ms = Percentiles::of(&bares);
    Ok(Report {
        n: args.n,
        children: args.children,
        paused_ms,
        dirty_pages: Percentiles::of(&pages).unwrap_or(none),
        fork_ms: Percentiles::of(&forks).unwrap_or(none),
        children_mib: Percentiles::of(&memory),
        baseline_ms,
        baseline_dirty_pages: Percentiles::of(&bare_pages),
        ratio_p50: baseline_ms.map(|bare| (paused_ms.p50 / bare.p50 * 1000.0).round() / 1000.0),
    })
}
