//! Promises about speed, as ratios in one run.
//!
//! Machines are shared: what a neighbour does can only make a figure worse, so each promise has three tries, and
//! every try is printed.

use serde_json::Value;

use crate::Server;

/// Runs `kelvin bench create` with these arguments.
pub fn bench(server: &Server, args: &[&str]) -> Value {
    bench_of(server, "create", args)
}

/// Runs `kelvin bench WHAT` with these arguments; its report.
///
/// # Panics
/// Beside other tests, which it would measure too: its test has to be among those that run alone.
pub fn bench_of(server: &Server, what: &str, args: &[&str]) -> Value {
    assert!(
        std::env::var_os("KELVIN_E2E_BESIDE").is_none(),
        "this test measures beside others: name it in ALONE, crates/xtask/src/suite.rs"
    );
    let mut all = vec!["--output", "json", "bench", what];
    all.extend(args);
    let output = server.cli(&all).output().expect("kelvin runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// The middle of a figure.
pub fn p50(report: &Value, field: &str) -> f64 {
    report[field]["p50"].as_f64().expect("a figure")
}

/// Tries three times whether a ratio keeps to its limit, and prints each.
pub fn promise(name: &str, limit: f64, at_least: bool, mut ratio: impl FnMut() -> f64) {
    for attempt in 1..=3 {
        let value = ratio();
        println!(
            "{name}: {value:.3} (promised {} {limit}), try {attempt}",
            if at_least { "at least" } else { "at most" }
        );
        if if at_least { value >= limit } else { value <= limit } {
            return;
        }
    }
    panic!("{name}: three tries, none within {limit}");
}
