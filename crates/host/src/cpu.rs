//! What the host's processor is, and how fast its time stamp counter runs.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// The part of an identity that is the host's processor.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CpuModel {
    /// As `/proc/cpuinfo` calls it.
    pub name: String,
    /// Microcode revision, or empty.
    pub microcode: String,
}

impl CpuModel {
    /// The processor of this host.
    pub fn read() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            cpuinfo
                .lines()
                .find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))
                .and_then(|line| line.split_once(':'))
                .map(|(_, value)| value.trim().to_owned())
                .unwrap_or_default()
        };
        Self { name: field("model name"), microcode: field("microcode") }
    }
}

/// Rate of the time stamp counter in kHz, as an emulated guest has to be told: QEMU's translator passes
/// the host's counter through, and `microvm` has no timer to calibrate it against.
///
/// The rate is part of a snapshot's kernel command line, so it has to be the same at every start: it is
/// kept in `file` and measured again (over 100 ms) to see whether it still holds within 0.05 %.
///
/// # Errors
/// When `file` cannot be written.
pub fn tsc_khz(file: &Path) -> std::io::Result<u32> {
    let measured = measure_tsc_khz();
    if let Ok(text) = std::fs::read_to_string(file)
        && let Ok(kept) = text.trim().parse::<u32>()
        && kept.abs_diff(measured) <= kept / 2000
    {
        return Ok(kept);
    }
    std::fs::write(file, format!("{measured}\n"))?;
    Ok(measured)
}

fn measure_tsc_khz() -> u32 {
    let (started, first) = (Instant::now(), tsc());
    std::thread::sleep(Duration::from_millis(100));
    let (ticks, elapsed) = (tsc().wrapping_sub(first), started.elapsed());
    u32::try_from(u128::from(ticks) * 1_000_000 / elapsed.as_nanos().max(1)).unwrap_or(u32::MAX)
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
fn tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 processor and has no effect but its result.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_and_plausible() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tsc_khz");
        let first = tsc_khz(&file).unwrap();
        assert!((500_000..10_000_000).contains(&first), "{first} kHz");
        assert_eq!(tsc_khz(&file).unwrap(), first);
        std::fs::write(&file, "1000\n").unwrap();
        assert!(tsc_khz(&file).unwrap() > 500_000, "a rate that no longer holds is replaced");
    }
}
