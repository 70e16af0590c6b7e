//! What a VMM counts: a line of JSON a minute, through a pipe. Only failures are worth a word.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::pipe;

/// The longest line that is read.
const MAX_LINE: u64 = 64 << 10;
/// Lines are read and failures told at most this often; a VMM that says more waits.
const EVERY: Duration = Duration::from_secs(1);
/// Counters that stay at zero in a VMM that is well. Source: Firecracker, `docs/metrics.md`.
const FAILURES: [&str; 6] = [
    "/seccomp/num_faults",
    "/vcpu/failures",
    "/vmm/panic_count",
    "/block/execute_fails",
    "/net/tap_write_fails",
    "/logger/missed_log_count",
];

/// Reads the pipe at `path` until the VMM ends, and logs what failed, for the machine at `machine`.
pub fn follow(path: &Path, machine: PathBuf) {
    let Ok(receiver) = pipe::OpenOptions::new().open_receiver(path) else { return };
    tokio::spawn(async move {
        let mut reader = BufReader::new(receiver);
        let mut line = Vec::new();
        while let Ok(1..) = (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line).await {
            let failures = failures(&line);
            if !failures.is_empty() {
                tracing::warn!(machine = %machine.display(), failures = failures.join(" "), "its VMM counts failures");
            }
            line.clear();
            tokio::time::sleep(EVERY).await;
        }
    });
}

/// Counters of `line` that should be zero and are not.
pub fn failures(line: &[u8]) -> Vec<String> {
    let counted: Value = serde_json::from_slice(line).unwrap_or_default();
    let count = |name: &&str| counted.pointer(name).and_then(Value::as_u64).filter(|count| *count > 0);
    FAILURES
        .iter()
        .filter_map(|name| {
            Some(format!("{}={}", name.trim_start_matches('/').replace('/', "."), count(name)?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_failures_are_told() {
        let line = br#"{"seccomp":{"num_faults":2},"vcpu":{"failures":0},"api_server":{"process_startup_time_us":9}}"#;
        assert_eq!(failures(line), ["seccomp.num_faults=2"]);
        assert!(failures(b"not json").is_empty());
    }
}
