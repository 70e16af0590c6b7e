//! `GET /metrics`: the node and its pools, for Prometheus. Source: Prometheus, text exposition format 0.0.4.

use std::fmt::Write;

use kelvin_api::sandbox::{NodeInfo, PoolInfo};

struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP kelvin_{name} {help}\n# TYPE kelvin_{name} {kind}");
    }

    fn one(&mut self, name: &str, help: &str, value: impl std::fmt::Display) {
        self.head(name, "gauge", help);
        let _ = writeln!(self.0, "kelvin_{name} {value}");
    }

    fn each(
        &mut self,
        pools: &[PoolInfo],
        name: &str,
        kind: &str,
        help: &str,
        value: impl Fn(&PoolInfo) -> Option<f64>,
    ) {
        self.head(name, kind, help);
        for pool in pools {
            if let Some(value) = value(pool) {
                // Names and ids need no escaping: they are made of [a-z0-9._-].
                let _ = writeln!(
                    self.0,
                    "kelvin_{name}{{template=\"{}\",snapshot=\"{}\",memory_mib=\"{}\",network=\"{}\"}} {value}",
                    pool.template_id, pool.snapshot_id, pool.memory_mb, pool.network
                );
            }
        }
    }
}

/// The text.
pub fn text(node: &NodeInfo, pools: &[PoolInfo]) -> String {
    let mut text = Text(String::new());
    text.one("sandboxes_running", "Sandboxes that run.", node.sandboxes);
    text.one("sandboxes_paused", "Sandboxes that are paused.", node.paused);
    text.one("memory_reserved_mib", "Memory that is given out.", node.memory_reserved_mb);
    text.one("memory_mib", "Memory that can be given out.", node.memory_mb);
    text.one("disk_free_mib", "Free space of the data directory.", node.disk_free_mb);
    text.one("ledger_entries", "Host resources that exist.", node.ledger_entries);
    text.each(pools, "pool_ready", "gauge", "Warm machines that wait.", |pool| Some(pool.ready.into()));
    text.each(pools, "pool_target", "gauge", "Warm machines that there should be.", |pool| {
        Some(pool.target.into())
    });
    text.each(pools, "pool_waiting_vmms", "gauge", "VMMs that wait.", |pool| Some(pool.waiting_vmms.into()));
    text.each(pools, "pool_hits_total", "counter", "Creates that got a warm machine.", |pool| {
        Some(pool.hits as f64)
    });
    text.each(pools, "pool_misses_total", "counter", "Creates that did not.", |pool| {
        Some(pool.misses as f64)
    });
    text.each(pools, "pool_wasted_total", "counter", "Warm machines that ended unclaimed.", |pool| {
        Some(pool.wasted as f64)
    });
    text.each(pools, "pool_arrivals_per_second", "gauge", "Creates that are expected.", |pool| {
        Some(pool.arrivals_per_s)
    });
    text.each(pools, "pool_refill_seconds", "gauge", "How long one takes to make.", |pool| {
        Some(pool.refill_ms / 1e3)
    });
    text.each(pools, "pool_oldest_seconds", "gauge", "Age of the oldest that waits.", |pool| {
        pool.oldest_s.map(|age| age as f64)
    });
    text.0
}
