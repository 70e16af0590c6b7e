//! Benchmarks: what a client sees, and the bare VMM beside it in the same run.
//!
//! Every figure in `SPEC.md` comes from here. Absolute times depend on the machine; ratios against the
//! bare sequence of the same run are what is promised.

pub mod bare;
pub mod build;
pub mod create;
mod firecracker;
pub mod fork;
pub mod load;
pub mod pause;
mod restore;
pub mod sdk;
pub mod slots;

use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use kelvin_client::Client;
use serde::Serialize;

/// How long a node may take to come to rest.
const SETTLE: Duration = Duration::from_secs(180);

/// Percentiles, by nearest rank.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    /// Half are faster.
    pub p50: f64,
    /// 95 of 100 are faster.
    pub p95: f64,
    /// 99 of 100 are faster.
    pub p99: f64,
}

impl Percentiles {
    /// Of `values`; `None` when there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        let rank = |percent: usize| {
            let index = (sorted.len() * percent).div_ceil(100).saturating_sub(1).min(last);
            (sorted[index] * 1000.0).round() / 1000.0
        };
        Some(Self { p50: rank(50), p95: rank(95), p99: rank(99) })
    }
}

/// A table of percentiles for people: what `unit` says, with `digits` behind the point.
fn percentile_table(unit: &str, digits: usize, rows: &[(&str, &Percentiles)]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([unit, "P50", "P95", "P99"]);
    for (name, values) in rows {
        let figures = [values.p50, values.p95, values.p99].map(|value| format!("{value:.digits$}"));
        table.add_row([(*name).to_owned()].into_iter().chain(figures));
    }
    table
}

/// Why a node is not waited for any longer.
#[derive(Debug, thiserror::Error)]
pub enum Unsettled {
    /// The server failed.
    #[error("the server failed")]
    Client(#[from] kelvin_client::Error),
    /// It has something left to do.
    #[error("the node did not settle within {SETTLE:?}")]
    Busy,
}

/// Waits until the node's pools are full and nothing is torn down: what is measured next is not slowed by it.
async fn settle(client: &Client) -> Result<(), Unsettled> {
    let deadline = Instant::now() + SETTLE;
    while !client.node().await?.settled {
        if Instant::now() > deadline {
            return Err(Unsettled::Busy);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(Percentiles::of(&values), Some(Percentiles { p50: 50.0, p95: 95.0, p99: 99.0 }));
        assert_eq!(Percentiles::of(&[3.0]), Some(Percentiles { p50: 3.0, p95: 3.0, p99: 3.0 }));
        assert_eq!(Percentiles::of(&[]), None);
    }
}
