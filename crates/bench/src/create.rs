//! `kelvin bench create`: from the request to the agent's answer, and to the end of the first command.
//!
//! Creates come in rounds of `--concurrency`; a round begins when the node has settled (pools full,
//! nothing torn down), so that a round measures a request and not the clearing up after the last one.
//! First commands start when all creates of the round are answered. With `--baseline`, one bare restore
//! runs before each round, on the same machine at the same time of day.

use std::collections::BTreeMap;
use std::time::Instant;

use comfy_table::{Table, presets};
use kelvin_api::network::{NewNetwork, Word};
use kelvin_api::phase::Phase;
use kelvin_api::sandbox::{BakeTemplate, NewSandbox, Sandbox, SetPool, StartPath};
use kelvin_client::Client;
use kelvin_client::agent::Command;
use serde::Serialize;

use crate::bare::{self, Bare};
use crate::{Percentiles, ms, settle};

/// How long a sandbox of the bench lives at the most, in seconds.
const LIFE_S: u64 = 300;

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Which start path.
    #[arg(long, value_enum, default_value_t = Path::Clone)]
    pub path: Path,
    /// Creates in total.
    #[arg(short, long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub n: u32,
    /// Creates at one time.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub concurrency: u32,
    /// Memory of the machines in MiB, instead of the template's.
    #[arg(long)]
    pub memory_mib: Option<u64>,
    /// Machines without a network.
    #[arg(long)]
    pub no_network: bool,
    /// Template.
    #[arg(long, default_value = "base")]
    pub template: String,
    /// Measure the bare sequence beside it: a VMM spawned on the spot, same files, same flags, same
    /// activation. Needs to run on the server's machine, as its user.
    #[arg(long)]
    pub baseline: bool,
}

/// The two ways to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Path {
    /// Boot.
    Cold,
    /// Restore a snapshot.
    Clone,
    /// Claim a machine that waits; the pool of the template is kept at the number of creates at one time, and one
    /// more.
    Warm,
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
    /// A create took another path than was asked for.
    #[error("a create took the path {0}")]
    Path(&'static str),
    /// The first command failed.
    #[error("the first command exited with {0}")]
    Command(i32),
    /// The node did not come to rest.
    #[error("the node did not settle")]
    Settle(#[from] crate::Unsettled),
    /// The options contradict each other.
    #[error("--baseline goes with --path clone or warm")]
    Baseline,
}

/// The result: one JSON object.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct Report {
    pub path: Path,
    pub n: usize,
    pub concurrency: u32,
    pub memory_mib: u32,
    pub accelerator: String,
    /// Client: request sent to reply read.
    pub create_ms: Percentiles,
    /// Client: the same, and the first command from its request to its end.
    pub first_exec_ms: Percentiles,
    /// Server: each phase.
    pub phases: BTreeMap<Phase, Percentiles>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline_ms: Option<Percentiles>,
    /// p50 of creates over p50 of the bare sequence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio_p50: Option<f64>,
}

impl Report {
    /// For people.
    pub fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["MS", "P50", "P95", "P99"]);
        let mut row = |name: &str, values: &Percentiles| {
            table.add_row([
                name.to_owned(),
                format!("{:.2}", values.p50),
                format!("{:.2}", values.p95),
                format!("{:.2}", values.p99),
            ]);
        };
        row("create", &self.create_ms);
        row("create + first command", &self.first_exec_ms);
        for (phase, values) in &self.phases {
            let note = match phase {
                Phase::Boot => ", the agent answers",
                Phase::Tcp => ", TCP is answered (boot and activate)",
                _ => "",
            };
            row(&format!("  {}{note}", phase.name()), values);
        }
        if let Some(baseline) = &self.baseline_ms {
            row("bare sequence", baseline);
        }
        if let Some(ratio) = self.ratio_p50 {
            table.add_row(["create ÷ bare, p50".to_owned(), format!("{ratio:.3}")]);
        }
        table
    }
}

/// Measures.
///
/// # Errors
/// The first failure of anything that is measured: a bench of failures is no bench.
pub async fn run(client: &Client, args: &Args) -> Result<Report, Error> {
    if args.path != Path::Warm {
        return measure(client, args).await;
    }
    let former = client.pools().await?.into_iter().find(|pool| pool.template_id == args.template);
    let count = Some(args.concurrency + 1);
    client.set_pool(&args.template, &SetPool { min: count, max: count, max_age_s: None }).await?;
    let measured = measure(client, args).await;
    let (min, max) = former.map_or((0, 0), |pool| (pool.min, pool.max));
    client.set_pool(&args.template, &SetPool { min: Some(min), max: Some(max), max_age_s: None }).await?;
    measured
}

async fn measure(client: &Client, args: &Args) -> Result<Report, Error> {
    if args.baseline && args.path == Path::Cold {
        return Err(Error::Baseline);
    }
    let node = client.node().await?;
    let mut bare = None;
    if args.path != Path::Cold {
        let network = args.no_network.then_some(false);
        let request = BakeTemplate { memory_mb: args.memory_mib, network, ..BakeTemplate::default() };
        let snapshot = client.bake(&args.template, &request).await?;
        if args.baseline {
            bare = Some(Bare::open(node.data_dir.as_ref(), &snapshot)?);
        }
    }
    let (mut creates, mut firsts, mut bares) = (Vec::new(), Vec::new(), Vec::new());
    let mut phases: BTreeMap<Phase, Vec<f64>> = BTreeMap::new();
    let mut left = args.n;
    while left > 0 {
        settle(client).await?;
        if let Some(bare) = &bare {
            bares.push(bare.restore()?);
            bare.forget()?;
            // The create begins as the bare restore began: after a look at a node that is at rest.
            settle(client).await?;
        }
        let round = args.concurrency.min(left);
        left -= round;
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..round {
            tasks.spawn(create(client.clone(), args.clone()));
        }
        let made: Result<Vec<_>, Error> = tasks.join_all().await.into_iter().collect();
        let made = made?;
        let mut commands = tokio::task::JoinSet::new();
        for (sandbox, ms) in made {
            creates.push(ms);
            for (phase, ms) in &sandbox.phases {
                phases.entry(*phase).or_default().push(*ms);
            }
            commands.spawn(first_command(client.clone(), sandbox, ms));
        }
        for first in commands.join_all().await {
            firsts.push(first?);
        }
    }
    let none = Percentiles { p50: 0.0, p95: 0.0, p99: 0.0 };
    let create_ms = Percentiles::of(&creates).unwrap_or(none);
    let baseline_ms = Percentiles::of(&bares);
    Ok(Report {
        path: args.path,
        n: creates.len(),
        concurrency: args.concurrency,
        memory_mib: memory(client, args).await?,
        accelerator: node.accelerator,
        create_ms,
        first_exec_ms: Percentiles::of(&firsts).unwrap_or(none),
        phases: phases
            .iter()
            .filter_map(|(phase, values)| Some((*phase, Percentiles::of(values)?)))
            .collect(),
        baseline_ms,
        ratio_p50: baseline_ms.map(|bare| (create_ms.p50 / bare.p50 * 1000.0).round() / 1000.0),
    })
}

async fn memory(client: &Client, args: &Args) -> Result<u32, Error> {
    if let Some(memory) = args.memory_mib {
        return Ok(u32::try_from(memory).unwrap_or(u32::MAX));
    }
    let templates = client.templates().await?;
    Ok(templates
        .iter()
        .find(|template| template.template_id == args.template)
        .map_or(0, |template| template.memory_mb))
}

pub(crate) async fn create(client: Client, args: Args) -> Result<(Sandbox, f64), Error> {
    let path = match args.path {
        Path::Cold => StartPath::Cold,
        Path::Clone => StartPath::Clone,
        Path::Warm => StartPath::Warm,
    };
    let body = NewSandbox {
        template_id: args.template,
        timeout: Some(LIFE_S),
        memory_mb: args.memory_mib,
        start_path: Some(path),
        probe_tcp: (path == StartPath::Cold && !args.no_network).then_some(true),
        network: args.no_network.then_some(NewNetwork::Word(Word::None)),
        ..NewSandbox::default()
    };
    let started = Instant::now();
    let created = client.create(&body, None).await?;
    // The agent's answer is what ready means: a wait for the other sign, to compare, is not the create's.
    let phase = |name| created.sandbox.phases.iter().find(|(phase, _)| **phase == name).map(|(_, ms)| *ms);
    let by_agent = phase(Phase::Boot).unwrap_or_default() + phase(Phase::Activate).unwrap_or_default();
    let waited = phase(Phase::Tcp).map_or(0.0, |tcp| (tcp - by_agent).max(0.0));
    let took = ms(started) - waited;
    match created.sandbox.start_path {
        Some(taken) if taken == path => Ok((created.sandbox, took)),
        other => Err(Error::Path(other.map_or("unknown", StartPath::name))),
    }
}

pub(crate) async fn first_command(client: Client, sandbox: Sandbox, created_ms: f64) -> Result<f64, Error> {
    let agent = client.agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), None)?;
    let started = Instant::now();
    let command = Command { program: "true".to_owned(), ..Command::default() };
    let ran = agent.run(&command, 0).await;
    let took = created_ms + ms(started);
    // Also one whose command failed.
    client.kill(&sandbox.sandbox_id).await?;
    let (code, ..) = ran?;
    if code == 0 { Ok(took) } else { Err(Error::Command(code)) }
}
