//! The promises of SPEC.md about speed, as ratios in one run.
//!
//! How many rounds there are: `kelvin_e2e::promises`. How many machines a round has is what its ratio needs to say
//! something: few where the limit is far, more where it is near.

use kelvin_e2e::Ground;
use kelvin_e2e::promises::Limit::{AtLeast, AtMost};
use kelvin_e2e::promises::{bench, bench_of, p50, promise, ratio};

#[tokio::test]
async fn clones_are_as_fast_as_promised() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.server("speed", &["--waiting-vmms", "4"]).await;
    server.bake(4).await;
    let one = |args: &[&str]| p50(&bench(&server, args), "create_ms");
    promise("clone ÷ bare restore, p50", AtMost(0.5), || {
        ratio(&bench(&server, &["-n", "9", "--path", "clone", "--baseline"]))
    });
    promise("warm ÷ bare restore, p50", AtMost(0.1), || {
        ratio(&bench(&server, &["-n", "9", "--path", "warm", "--baseline"]))
    });
    promise("forked source stands still ÷ prototype's fork, p50", AtMost(1.2), || {
        // Some 4 ms each.
        ratio(&bench_of(&server, "fork", &["-n", "9", "--baseline"]))
    });
    promise("cold ÷ clone, p50", AtLeast(60.0), || {
        let cold = bench(&server, &["-n", "1", "--path", "cold"]);
        let agent = p50(&cold["phases"], "boot") + p50(&cold["phases"], "activate");
        let tcp = p50(&cold["phases"], "tcp");
        println!("ready after {agent:.0} ms by the agent, after {tcp:.0} ms by TCP");
        p50(&cold, "create_ms") / one(&["-n", "5"])
    });
    promise("three at once ÷ one, p50", AtMost(1.6), || {
        one(&["-n", "9", "--concurrency", "3"]) / one(&["-n", "9"])
    });
    promise("2 GiB ÷ 256 MiB, p50", AtMost(1.15), || {
        one(&["-n", "9", "--memory-mib", "2048"]) / one(&["-n", "9"])
    });
    promise("with a network ÷ without, p50", AtMost(1.15), || {
        // The two differ by less than a shared machine does from minute to minute.
        let without = one(&["-n", "9", "--no-network"]);
        one(&["-n", "9"]) / without
    });
    server.stop().await;
}
