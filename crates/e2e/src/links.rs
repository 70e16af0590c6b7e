//! Links of a test's own network namespace.

use std::process::Command;

/// Runs `ip` with these words, in this thread's namespace.
pub fn ip(words: &str) {
    let output = Command::new("ip").args(words.split_whitespace()).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Links of slots in this thread's namespace.
pub fn slot_links() -> Vec<String> {
    let output = Command::new("ip").args(["-o", "link"]).output().expect("iproute2 is installed");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1))
        .filter(|name| name.starts_with("kv"))
        .map(str::to_owned)
        .collect()
}
