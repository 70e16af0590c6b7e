//! Everything at once for a while: nothing is lost, nothing is left.

use std::time::Duration;

use kelvin_e2e::Ground;
use kelvin_e2e::soak::{Options, run};

/// What the suite runs; `cargo xtask soak --minutes N --seed S` says otherwise.
const SECONDS: u64 = 120;
const SEED: u64 = 1;

fn number(variable: &str, otherwise: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable}={text:?} is not a number")),
        Err(_) => otherwise,
    }
}

#[tokio::test]
async fn soak_leaves_everything_as_it_was() {
    let Some(ground) = Ground::with_networks().await else { return };
    let duration = Duration::from_secs(number("KELVIN_SOAK_SECONDS", SECONDS));
    run(&ground, Options { duration, seed: number("KELVIN_SOAK_SEED", SEED) }).await;
}
