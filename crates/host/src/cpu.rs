//! What the host's processor is, and how fast its time stamp counter runs.

use std::path::Path;
use std::sync::OnceLock;
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

/// What an identity says of this host: its processor, and the release of its kernel. Read once.
pub fn here() -> (String, String) {
    static HERE: OnceLock<(String, String)> = OnceLock::new();
    let read = || {
        let cpu = CpuModel::read();
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        (format!("{} {}", cpu.name, cpu.microcode), release)
    };
    HERE.get_or_init(read).clone()
}

/// Rate of the time stamp counter in kHz, as an emulated guest has to be told: QEMU's translator passes
/// the host's counter through, and `microvm` has no timer to calibrate it against.
///
/// The rate is part of a snapshot's kernel command line, so it has to be the same at every start: it is
/// kept in `file` and measured again (over 100 ms) to see whether it still holds within 0.1 %. Only three measurements that
/// agree on that it does not replace it: every snapshot would have to be baked again.
///
/// # Errors
/// When `file` cannot be written.
pub fn tsc_khz(file: &Path) -> std::io::Result<u32> {
    let mut measured = measure_tsc_khz();
    if let Ok(text) = std::fs::read_to_string(file)
        && let Ok(kept) = text.trim().parse::<u32>()
    {
        for _ in 0..3 {
            if kept.abs_diff(measured) <= kept / 1000 {
                return Ok(kept);
            }
            measured = measure_tsc_khz();
        }
    }
    // Before anything is baked with it: lost in a power failure, it would be measured a little otherwise.
    crate::file::write_durably(file, format!("{measured}\n").as_bytes())?;
    Ok(measured)
}

fn measure_tsc_khz() -> u32 {
    let (first_time, first) = reading();
    std::thread::sleep(Duration::from_millis(100));
    let (last_time, last) = reading();
    let elapsed = (last_time - first_time).as_nanos().max(1);
    u32::try_from(u128::from(last.wrapping_sub(first)) * 1_000_000 / elapsed).unwrap_or(u32::MAX)
}

/// Clock and counter of one moment: of many tries the one in which the least time passed between the two,
/// because a thread that is moved off its processor in between would be wrong by as much.
fn reading() -> (Instant, u64) {
    let one = || {
        let before = tsc();
        let time = Instant::now();
        let gap = tsc().wrapping_sub(before);
        (gap, time, before + gap / 2)
    };
    let best = (0..50).map(|_| one()).min_by_key(|(gap, ..)| *gap);
    let (_, time, counter) = best.unwrap_or_else(one);
    (time, counter)
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
