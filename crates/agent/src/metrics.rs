//! `/metrics`: what the machine uses, from the kernel's own counters.

use std::io;
use std::sync::Mutex;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// The reply, in envd's names. Source: E2B's `envd.yaml`, `Metrics`.
#[derive(Debug, Serialize)]
pub struct Metrics {
    ts: u64,
    cpu_count: usize,
    cpu_used_pct: f32,
    mem_total: u64,
    mem_used: u64,
    mem_cache: u64,
    mem_total_mib: u64,
    mem_used_mib: u64,
    disk_used: u64,
    disk_total: u64,
}

/// The last reading of the CPU's counters: a percentage needs two.
#[derive(Debug, Default)]
pub struct CpuMeter(Mutex<Option<(Instant, u64)>>);

impl CpuMeter {
    /// Percent of one CPU used since the last call, or since boot at the first.
    fn percent(&self) -> io::Result<f32> {
        const TICKS_PER_SECOND: f32 = 100.0;
        let stat = std::fs::read_to_string("/proc/stat")?;
        let fields: Vec<u64> = stat
            .lines()
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .skip(1)
            .filter_map(|field| field.parse().ok())
            .collect();
        // user, nice, system, irq, softirq, steal: all but idle and iowait.
        let busy: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|index| fields.get(*index)).sum();
        let all: u64 = fields.iter().take(8).sum();
        let now = Instant::now();
        let mut last = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let percent = match last.replace((now, busy)) {
            Some((then, before)) => {
                let seconds = (now - then).as_secs_f32().max(0.001);
                busy.saturating_sub(before) as f32 / TICKS_PER_SECOND / seconds * 100.0
            }
            None => busy as f32 / all.max(1) as f32 * 100.0,
        };
        // As envd: two digits after the point.
        Ok((percent * 100.0).round() / 100.0)
    }
}

/// Reads all counters.
///
/// # Errors
/// When `/proc` is not there.
pub fn read(meter: &CpuMeter) -> io::Result<Metrics> {
    let info = std::fs::read_to_string("/proc/meminfo")?;
    let kib = |name: &str| {
        info.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
            .unwrap_or(0)
    };
    let (total, cache) = (kib("MemTotal") << 10, kib("Cached") << 10);
    let used = total.saturating_sub(kib("MemAvailable") << 10);
    let disk = rustix::fs::statvfs("/")?;
    Ok(Metrics {
        ts: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        cpu_count: std::thread::available_parallelism().map_or(1, usize::from),
        cpu_used_pct: meter.percent()?,
        mem_total: total,
        mem_used: used,
        mem_cache: cache,
        mem_total_mib: total >> 20,
        mem_used_mib: used >> 20,
        disk_used: disk.f_blocks.saturating_sub(disk.f_bfree) * disk.f_frsize,
        disk_total: disk.f_blocks * disk.f_frsize,
    })
}
