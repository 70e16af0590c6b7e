//! `kelvin bench pool`: the same bursty arrivals against pools that are off, of a fixed size, and led by demand.
//!
//! Arrivals are a Poisson process over pools of unequal popularity (the kth as popular as 1/k), with a spike of creates
//! for one pool every so often; they are drawn once, from a seed, and replayed for each policy. Each pool is another
//! shape of one template: another identity, so that no machine fits twice. Results are a table and, with `--plot`, a
//! picture.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use kelvin_api::sandbox::{BakeTemplate, NewSandbox, SetPool, StartPath};
use kelvin_client::Client;
use serde::Serialize;

use kelvin_host::process::{proportional_kib, working_in};

use crate::{Percentiles, ms, settle};

/// Memory of the smallest shape, and the step to the next, in MiB.
const SMALLEST: u64 = 144;
const STEP: u64 = 16;
/// How long a sandbox of the load is used.
const USED: Duration = Duration::from_millis(500);
const LIFE_S: u64 = 120;

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Pools: shapes of the template.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=32))]
    pub pools: u32,
    /// Seconds of load for each policy.
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(5..=3600))]
    pub seconds: u64,
    /// Creates per second, all pools together, beside the spikes.
    #[arg(long, default_value_t = 0.5)]
    pub rate: f64,
    /// Creates of a spike.
    #[arg(long, default_value_t = 4)]
    pub spike: u32,
    /// Seconds from one spike to the next.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    pub spike_every: u64,
    /// Warm machines of each pool while the size is fixed.
    #[arg(long, default_value_t = 1)]
    pub fixed: u32,
    /// The most of each pool while demand decides.
    #[arg(long, default_value_t = 4)]
    pub max: u32,
    /// Of the arrivals.
    #[arg(long, default_value_t = 7)]
    pub seed: u64,
    /// Template.
    #[arg(long, default_value = "base")]
    pub template: String,
    /// Write an SVG of how many creates were answered within which time.
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
}

/// Why a bench has no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server failed.
    #[error("the server failed")]
    Client(#[from] kelvin_client::Error),
    /// The node did not come to rest.
    #[error("the node did not settle")]
    Settle(#[from] crate::Unsettled),
    /// The picture could not be written.
    #[error("writing {path}")]
    Plot {
        /// Where to.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

/// One policy's result.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct Row {
    pub policy: &'static str,
    pub creates: usize,
    /// Of all creates, those that claimed a warm machine.
    pub hit_rate: f64,
    pub create_ms: Percentiles,
    /// Warm machines that waited, on average.
    pub warm_mean: f64,
    /// Their guests' memory as it is reserved, in MiB, on average.
    pub warm_reserved_mib: f64,
    /// Proportional set size of every VMM of the node, in MiB, on average.
    pub vmms_mib: f64,
    /// Machines that were made and ended unclaimed.
    pub wasted: u64,
    /// Milliseconds of each create, in order of arrival.
    #[serde(skip)]
    pub latencies: Vec<f64>,
}

/// The result: one JSON object.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct Report {
    pub pools: u32,
    pub seconds: u64,
    pub rate: f64,
    pub spike: u32,
    pub spike_every: u64,
    pub rows: Vec<Row>,
}

impl Report {
    /// For people; as Markdown, for docs.
    pub fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN);
        table.set_header([
            "policy",
            "creates",
            "warm",
            "p50 ms",
            "p95 ms",
            "p99 ms",
            "machines waiting",
            "MiB reserved",
            "MiB of all VMMs",
            "wasted",
        ]);
        for row in &self.rows {
            table.add_row([
                row.policy.to_owned(),
                row.creates.to_string(),
                format!("{:.0} %", row.hit_rate * 100.0),
                format!("{:.1}", row.create_ms.p50),
                format!("{:.1}", row.create_ms.p95),
                format!("{:.1}", row.create_ms.p99),
                format!("{:.1}", row.warm_mean),
                format!("{:.0}", row.warm_reserved_mib),
                format!("{:.0}", row.vmms_mib),
                row.wasted.to_string(),
            ]);
        }
        table
    }

    /// How many creates were answered within which time, one line for each policy, milliseconds on a logarithmic axis.
    pub fn plot(&self) -> String {
        const WIDTH: f64 = 640.0;
        const HEIGHT: f64 = 320.0;
        const COLOURS: [&str; 3] = ["#b3261e", "#6b6b6b", "#1a6b52"];
        let all = self.rows.iter().flat_map(|row| &row.latencies).copied();
        let (low, high) = all.fold((1.0_f64, 10.0_f64), |(low, high), ms| (low.min(ms), high.max(ms)));
        let x = |ms: f64| 60.0 + (ms.max(low).ln() - low.ln()) / (high.ln() - low.ln()) * (WIDTH - 80.0);
        let y = |share: f64| HEIGHT - 40.0 - share * (HEIGHT - 70.0);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"11\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
             <text x=\"60\" y=\"18\">creates answered within x ms, by policy</text>\n"
        );
        for tick in [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0] {
            if (low..=high).contains(&tick) {
                let at = x(tick);
                let _ = writeln!(
                    svg,
                    "<path d=\"M{at:.1} {} V{}\" stroke=\"#ddd\"/><text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{tick}</text>",
                    y(0.0),
                    y(1.0),
                    HEIGHT - 24.0
                );
            }
        }
        for share in [0.0, 0.25, 0.5, 0.75, 1.0] {
            let at = y(share);
            let _ = writeln!(
                svg,
                "<path d=\"M60 {at:.1} H{}\" stroke=\"#ddd\"/><text x=\"54\" y=\"{:.1}\" text-anchor=\"end\">{:.0} %</text>",
                WIDTH - 20.0,
                at + 4.0,
                share * 100.0
            );
        }
        for (index, (row, colour)) in self.rows.iter().zip(COLOURS).enumerate() {
            let mut sorted = row.latencies.clone();
            sorted.sort_by(f64::total_cmp);
            let mut path = String::new();
            let mut share = 0.0;
            for (rank, ms) in sorted.iter().enumerate() {
                let _ = write!(path, "{}{:.1} {:.1} ", if rank == 0 { "M" } else { "L" }, x(*ms), y(share));
                share = (rank + 1) as f64 / sorted.len() as f64;
                let _ = write!(path, "L{:.1} {:.1} ", x(*ms), y(share));
            }
            let _ =
                writeln!(svg, "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>");
            let _ = writeln!(
                svg,
                "<text x=\"{}\" y=\"{}\" fill=\"{colour}\">{}: {:.0} % warm</text>",
                WIDTH - 190.0,
                HEIGHT - 100.0 + 16.0 * index as f64,
                row.policy,
                row.hit_rate * 100.0
            );
        }
        svg.push_str("</svg>\n");
        svg
    }
}

/// SplitMix64: the same arrivals for the same seed. Source: Steele, Lea, Flood, OOPSLA 2014.
struct Random(u64);

impl Random {
    /// In (0, 1).
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64 + f64::EPSILON
    }
}

/// `(when, which pool)`, by time.
fn arrivals(args: &Args) -> Vec<(Duration, u32)> {
    let mut random = Random(args.seed);
    let weights: Vec<f64> = (1..=args.pools).map(|k| 1.0 / f64::from(k)).collect();
    let total: f64 = weights.iter().sum();
    let pick = |random: &mut Random| {
        let mut left = random.unit() * total;
        let found = weights.iter().position(|weight| {
            left -= weight;
            left <= 0.0
        });
        u32::try_from(found.unwrap_or(0)).unwrap_or(0)
    };
    let (mut at, mut all) = (0.0, Vec::new());
    loop {
        at += -random.unit().ln() / args.rate.max(1e-6);
        if at >= args.seconds as f64 {
            break;
        }
        let pool = pick(&mut random);
        all.push((Duration::from_secs_f64(at), pool));
    }
    for spike in 1..args.seconds.div_ceil(args.spike_every) {
        let pool = pick(&mut random);
        all.extend((0..args.spike).map(|_| (Duration::from_secs(spike * args.spike_every), pool)));
    }
    all.sort_unstable();
    all
}

/// Measures.
///
/// # Errors
/// The first failure of anything that is measured.
pub async fn run(client: &Client, args: &Args) -> Result<Report, Error> {
    let node = client.node().await?;
    for pool in 0..args.pools {
        let memory_mb = Some(SMALLEST + STEP * u64::from(pool));
        client.bake(&args.template, &BakeTemplate { memory_mb, ..BakeTemplate::default() }).await?;
    }
    let former = client.pools().await?.into_iter().find(|pool| pool.template_id == args.template);
    let arrivals = arrivals(args);
    let measured = async {
        let mut rows = Vec::new();
        for (policy, min, max) in
            [("off", 0, 0), ("fixed size", args.fixed, args.fixed), ("led by demand", 0, args.max)]
        {
            // Everything is forgotten first: demand of the last policy's load must not help the next.
            client.set_pool(&args.template, &set(0, 0)).await?;
            settle(client).await?;
            client.set_pool(&args.template, &set(min, max)).await?;
            settle(client).await?;
            rows.push(load(client, args, policy, &arrivals, &node.data_dir).await?);
        }
        Ok::<_, Error>(rows)
    };
    let measured = measured.await;
    // Whatever was measured or failed: the pool is as its operator wanted it.
    if let Some(former) = former {
        client.set_pool(&args.template, &set(former.min, former.max)).await?;
    }
    let rows = measured?;
    let report = Report {
        pools: args.pools,
        seconds: args.seconds,
        rate: args.rate,
        spike: args.spike,
        spike_every: args.spike_every,
        rows,
    };
    if let Some(path) = &args.plot {
        std::fs::write(path, report.plot()).map_err(|source| Error::Plot { path: path.clone(), source })?;
    }
    Ok(report)
}

fn set(min: u32, max: u32) -> SetPool {
    SetPool { min: Some(min), max: Some(max), max_age_s: None }
}

async fn wasted(client: &Client) -> Result<u64, Error> {
    Ok(client.pools().await?.iter().map(|pool| pool.wasted).sum())
}

async fn load(
    client: &Client,
    args: &Args,
    policy: &'static str,
    arrivals: &[(Duration, u32)],
    data_dir: &str,
) -> Result<Row, Error> {
    let before = wasted(client).await?;
    let started = Instant::now();
    let mut running = tokio::task::JoinSet::new();
    let mut samples: Vec<(f64, f64, f64)> = Vec::new();
    let mut next_sample = Duration::ZERO;
    for (index, (at, pool)) in arrivals.iter().enumerate() {
        // The load's own pace.
        while started.elapsed() < *at {
            let sample = next_sample.saturating_sub(started.elapsed());
            tokio::time::sleep((*at - started.elapsed()).min(sample.max(Duration::from_millis(1)))).await;
            if started.elapsed() >= next_sample {
                samples.push(sample_of(client, data_dir).await?);
                next_sample += Duration::from_secs(2);
            }
        }
        let (client, template) = (client.clone(), args.template.clone());
        let memory_mb = Some(SMALLEST + STEP * u64::from(*pool));
        running.spawn(async move {
            let body = NewSandbox {
                template_id: template,
                timeout: Some(LIFE_S),
                memory_mb,
                ..NewSandbox::default()
            };
            let since = Instant::now();
            let created = client.create(&body, None).await?.sandbox;
            let took = ms(since);
            tokio::time::sleep(USED).await;
            client.kill(&created.sandbox_id).await?;
            Ok::<_, Error>((index, created.start_path == Some(StartPath::Warm), took))
        });
    }
    let mut results = BTreeMap::new();
    while let Some(joined) = running.join_next().await {
        let (index, warm, took) =
            joined.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
        results.insert(index, (warm, took));
    }
    let latencies: Vec<f64> = results.values().map(|(_, took)| *took).collect();
    let hits = results.values().filter(|(warm, _)| *warm).count();
    let mean = |pick: fn(&(f64, f64, f64)) -> f64| {
        samples.iter().map(pick).sum::<f64>() / (samples.len() as f64).max(1.0)
    };
    let none = Percentiles { p50: 0.0, p95: 0.0, p99: 0.0 };
    Ok(Row {
        policy,
        creates: latencies.len(),
        hit_rate: hits as f64 / (latencies.len() as f64).max(1.0),
        create_ms: Percentiles::of(&latencies).unwrap_or(none),
        warm_mean: mean(|sample| sample.0),
        warm_reserved_mib: mean(|sample| sample.1),
        vmms_mib: mean(|sample| sample.2),
        wasted: wasted(client).await?.saturating_sub(before),
        latencies,
    })
}

/// Warm machines, their guests' memory, and what all VMMs of the node take, in MiB.
async fn sample_of(client: &Client, data_dir: &str) -> Result<(f64, f64, f64), Error> {
    let pools = client.pools().await?;
    let warm: u32 = pools.iter().map(|pool| pool.ready).sum();
    let reserved: u32 = pools.iter().map(|pool| pool.ready * pool.memory_mb).sum();
    let kib: u64 = working_in(data_dir.as_ref()).into_iter().map(proportional_kib).sum();
    Ok((f64::from(warm), f64::from(reserved), kib as f64 / 1024.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_are_the_same_for_the_same_seed() {
        let args = Args {
            pools: 10,
            seconds: 1000,
            rate: 2.0,
            spike: 5,
            spike_every: 100,
            fixed: 1,
            max: 4,
            seed: 7,
            template: "base".into(),
            plot: None,
        };
        let first = arrivals(&args);
        assert_eq!(first, arrivals(&args));
        assert_ne!(first, arrivals(&Args { seed: 8, ..args.clone() }));
        assert!((1850..2250).contains(&first.len()), "{}", first.len());
        let of = |pool| first.iter().filter(|(_, which)| *which == pool).count();
        assert!(of(0) > 2 * of(3), "popularity differs");
    }
}
