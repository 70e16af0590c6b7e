//! `GET /metrics`, for Prometheus: the node and its pools as they are, and how long starts and captures took.
//!
//! Who writes: whoever has started a machine or taken a snapshot, through [`Metrics`]; nothing is asked of the node for that.
//! Phases have the names that `Server-Timing` has. The histograms count from the start of the server: a restart begins anew.
//! Source: OpenMetrics 1.0.0, which Prometheus reads.

use std::array;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::phase::{Phase, Timings};
use kelvin_api::sandbox::{NodeInfo, PoolInfo, StartPath};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// What a reply of `GET /metrics` is.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds of the buckets of every histogram, in seconds.
const BUCKETS: [f64; 16] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// What a machine was started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    Create,
    /// Also one by traffic.
    Resume,
    /// A child of one.
    Fork,
}

impl Start {
    const ALL: [Self; 3] = [Self::Create, Self::Resume, Self::Fork];

    fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Resume => "resume",
            Self::Fork => "fork",
        }
    }
}

const PATHS: [StartPath; 3] = [StartPath::Cold, StartPath::Clone, StartPath::Warm];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StartLabels {
    operation: &'static str,
    start_path: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabels {
    operation: &'static str,
    start_path: &'static str,
    phase: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PoolLabels {
    template: String,
    snapshot: String,
    memory_mib: u32,
    network: String,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

fn histograms<L: Clone + std::hash::Hash + Eq>() -> Histograms<L> {
    Family::new_with_constructor(|| Histogram::new(BUCKETS))
}

/// One start path of one operation; each histogram is made when it is needed first, and found without a look-up then.
#[derive(Debug, Default)]
struct OfPath {
    total: OnceLock<Histogram>,
    phases: [OnceLock<Histogram>; Phase::ALL.len()],
}

/// How long things took since the server started.
#[derive(Debug)]
pub(crate) struct Metrics {
    starts: Histograms<StartLabels>,
    phases: Histograms<PhaseLabels>,
    known: [[OfPath; PATHS.len()]; Start::ALL.len()],
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            starts: histograms(),
            phases: histograms(),
            known: array::from_fn(|_| array::from_fn(|_| OfPath::default())),
        }
    }
}

impl Metrics {
    /// Counts a machine that was started, `total` after it was asked for.
    pub fn started(&self, start: Start, path: StartPath, timings: &Timings, total: Duration) {
        let (operation, start_path) = (start.name(), path.name());
        let known = &self.known[start as usize][path as usize];
        let whole = known
            .total
            .get_or_init(|| self.starts.get_or_create(&StartLabels { operation, start_path }).clone());
        whole.observe(total.as_secs_f64());
        for (phase, ms) in timings.iter() {
            let one = known.phases[phase as usize].get_or_init(|| {
                let labels = PhaseLabels { operation, start_path, phase: phase.name() };
                self.phases.get_or_create(&labels).clone()
            });
            one.observe(ms / 1e3);
        }
    }

    /// All of it as text, with what the node says.
    ///
    /// # Errors
    /// `Encoding`, when it cannot be written.
    pub fn text(&self, node: &NodeInfo, pools: &[PoolInfo]) -> Result<String, Failure> {
        let mut registry = Registry::with_prefix("kelvin");
        of_node(&mut registry, node);
        of_pools(&mut registry, pools);
        registry.register(
            "start_seconds",
            "Time from the request to the answer of starts that succeeded",
            self.starts.clone(),
        );
        registry.register(
            "start_phase_seconds",
            "Time in each phase of starts that succeeded",
            self.phases.clone(),
        );
        let mut text = String::new();
        encode(&mut text, &registry).map_err(|error| {
            Failure::new(ErrorCode::Encoding, "the metrics cannot be written", "report this")
                .with_cause(&error)
        })?;
        Ok(text)
    }
}

fn of_node(registry: &mut Registry, node: &NodeInfo) {
    let mut one = |name: &str, help: &str, value: u64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        registry.register(name, help, gauge);
    };
    one("sandboxes_running", "Sandboxes that run", node.sandboxes.into());
    one("sandboxes_paused", "Sandboxes that are paused", node.paused.into());
    one("memory_reserved_mib", "Memory that is given out", node.memory_reserved_mb);
    one("memory_mib", "Memory that can be given out", node.memory_mb);
    one("disk_free_mib", "Free space of the data directory", node.disk_free_mb);
    one("ledger_entries", "Host resources that exist", node.ledger_entries.into());
}

fn labels_of(pool: &PoolInfo) -> PoolLabels {
    PoolLabels {
        template: pool.template_id.clone(),
        snapshot: pool.snapshot_id.clone(),
        memory_mib: pool.memory_mb,
        network: pool.network.to_string(),
    }
}

fn of_pools(registry: &mut Registry, pools: &[PoolInfo]) {
    let mut number = |name: &str, help: &str, value: fn(&PoolInfo) -> u32| {
        let family = Family::<PoolLabels, Gauge<i64>>::default();
        for pool in pools {
            family.get_or_create(&labels_of(pool)).set(value(pool).into());
        }
        registry.register(name, help, family);
    };
    number("pool_ready", "Warm machines that wait", |pool| pool.ready);
    number("pool_target", "Warm machines that there should be", |pool| pool.target);
    number("pool_waiting_vmms", "VMMs that wait", |pool| pool.waiting_vmms);
    // Registered without the `_total` that they are written with.
    let mut count = |name: &str, help: &str, value: fn(&PoolInfo) -> u64| {
        let family = Family::<PoolLabels, Counter>::default();
        for pool in pools {
            family.get_or_create(&labels_of(pool)).inc_by(value(pool));
        }
        registry.register(name, help, family);
    };
    count("pool_hits", "Creates that got a warm machine", |pool| pool.hits);
    count("pool_misses", "Creates that did not", |pool| pool.misses);
    count("pool_wasted", "Warm machines that ended unclaimed", |pool| pool.wasted);
    let mut real = |name: &str, help: &str, value: fn(&PoolInfo) -> Option<f64>| {
        let family = Family::<PoolLabels, Gauge<f64, AtomicU64>>::default();
        for pool in pools {
            if let Some(value) = value(pool) {
                family.get_or_create(&labels_of(pool)).set(value);
            }
        }
        registry.register(name, help, family);
    };
    real("pool_arrivals_per_second", "Creates that are expected", |pool| Some(pool.arrivals_per_s));
    real("pool_refill_seconds", "How long one takes to make", |pool| Some(pool.refill_ms / 1e3));
    real("pool_oldest_seconds", "Age of the oldest that waits", |pool| pool.oldest_s.map(|age| age as f64));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn gauges_keep_their_names_and_each_start_is_in_its_histograms() {
        let node: NodeInfo = serde_json::from_value(json!({
            "version": "1", "vmm": "qemu", "accelerator": "kvm", "dataDir": "/", "reflink": true, "sandboxes": 3,
            "waitingVMMs": 0, "settled": true, "memoryMB": 1024, "memoryReservedMB": 512, "vcpus": 2,
            "vcpusReserved": 1, "diskFreeMB": 7, "ledgerEntries": 9,
        }))
        .unwrap();
        let pool: PoolInfo = serde_json::from_value(json!({
            "templateID": "base", "snapshotID": "s1", "cpuCount": 1, "memoryMB": 256, "network": true, "min": 0,
            "max": 1, "maxAgeS": 60, "target": 1, "ready": 1, "hits": 5, "misses": 2, "arrivalsPerS": 0.5,
            "refillMs": 1500.0, "oldestS": 4, "wasted": 1, "waitingVMMs": 2,
        }))
        .unwrap();
        let metrics = Metrics::default();
        let mut timings = Timings::default();
        timings.add(Phase::Reserve, Duration::from_micros(400));
        timings.add(Phase::Load, Duration::from_secs(20));
        for _ in 0..2 {
            metrics.started(Start::Create, StartPath::Clone, &timings, Duration::from_secs(21));
        }
        metrics.started(Start::Fork, StartPath::Clone, &timings, Duration::from_secs(90));
        let text = metrics.text(&node, &[pool]).unwrap();
        let of_pool = "{template=\"base\",snapshot=\"s1\",memory_mib=\"256\",network=\"true\"}";
        let lines = [
            "kelvin_sandboxes_running 3".to_owned(),
            "kelvin_sandboxes_paused 0".to_owned(),
            "kelvin_memory_reserved_mib 512".to_owned(),
            "kelvin_memory_mib 1024".to_owned(),
            "kelvin_disk_free_mib 7".to_owned(),
            "kelvin_ledger_entries 9".to_owned(),
            format!("kelvin_pool_ready{of_pool} 1"),
            format!("kelvin_pool_target{of_pool} 1"),
            format!("kelvin_pool_waiting_vmms{of_pool} 2"),
            format!("kelvin_pool_hits_total{of_pool} 5"),
            format!("kelvin_pool_misses_total{of_pool} 2"),
            format!("kelvin_pool_wasted_total{of_pool} 1"),
            format!("kelvin_pool_arrivals_per_second{of_pool} 0.5"),
            format!("kelvin_pool_refill_seconds{of_pool} 1.5"),
            format!("kelvin_pool_oldest_seconds{of_pool} 4.0"),
            "kelvin_start_seconds_count{operation=\"create\",start_path=\"clone\"} 2".to_owned(),
            "kelvin_start_seconds_bucket{le=\"60.0\",operation=\"fork\",start_path=\"clone\"} 0".to_owned(),
            "kelvin_start_phase_seconds_bucket{le=\"0.0005\",operation=\"create\",start_path=\"clone\",phase=\"reserve\"} 2"
                .to_owned(),
            "kelvin_start_phase_seconds_bucket{le=\"10.0\",operation=\"create\",start_path=\"clone\",phase=\"load\"} 0"
                .to_owned(),
        ];
        for line in lines {
            assert!(text.lines().any(|written| written == line), "{line} is not in\n{text}");
        }
        // What never happened is not there.
        assert!(!text.contains("phase=\"boot\"") && !text.contains("start_path=\"cold\""), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn phases_and_paths_are_numbered_as_they_are_listed() {
        assert!(Phase::ALL.into_iter().enumerate().all(|(at, phase)| phase as usize == at));
        assert!(PATHS.into_iter().enumerate().all(|(at, path)| path as usize == at));
        assert!(Start::ALL.into_iter().enumerate().all(|(at, start)| start as usize == at));
    }
}
