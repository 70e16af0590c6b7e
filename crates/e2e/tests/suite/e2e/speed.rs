//! The promises of SPEC.md about speed, as ratios in one run.
//!
//! Source of the tries: `kelvin_e2e::promises`.

use kelvin_e2e::Ground;
use kelvin_e2e::promises::{bench, bench_of, p50, promise};

/// The middle of five rounds.
fn middle(round: impl FnMut() -> f64) -> f64 {
    let mut ratios: Vec<f64> = std::iter::repeat_with(round).take(5).collect();
    ratios.sort_by(f64::total_cmp);
    ratios[2]
}

#[tokio::test]
async fn clones_are_as_fast_as_promised() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.server("speed", &["--waiting-vmms", "4"]).await;
    server.bake(4).await;
    let n = ["-n", "50"];
    let with = |more: &[&'static str]| -> Vec<&'static str> { n.iter().chain(more).copied().collect() };
    promise("clone ÷ bare restore, p50", 0.5, false, || {
        bench(&server, &with(&["--path", "clone", "--baseline"]))["ratio_p50"].as_f64().expect("a ratio")
    });
    promise("warm ÷ bare restore, p50", 0.1, false, || {
        bench(&server, &with(&["--path", "warm", "--baseline"]))["ratio_p50"].as_f64().expect("a ratio")
    });
    promise("forked source stands still ÷ prototype's fork, p50", 1.2, false, || {
        // Some 4 ms each: in rounds, as the network's below.
        middle(|| {
            bench_of(&server, "fork", &["-n", "10", "--baseline"])["ratio_p50"].as_f64().expect("a ratio")
        })
    });
    promise("cold ÷ clone, p50", 60.0, true, || {
        let cold = bench(&server, &["-n", "5", "--path", "cold"]);
        let agent = p50(&cold["phases"], "boot") + p50(&cold["phases"], "activate");
        let tcp = p50(&cold["phases"], "tcp");
        println!("ready after {agent:.0} ms by the agent, after {tcp:.0} ms by TCP");
        p50(&cold, "create_ms") / p50(&bench(&server, &n), "create_ms")
    });
    promise("three at once ÷ one, p50", 1.6, false, || {
        p50(&bench(&server, &["-n", "51", "--concurrency", "3"]), "create_ms")
            / p50(&bench(&server, &n), "create_ms")
    });
    promise("2 GiB ÷ 256 MiB, p50", 1.15, false, || {
        let large = bench(&server, &with(&["--memory-mib", "2048"]));
        p50(&large, "create_ms") / p50(&bench(&server, &n), "create_ms")
    });
    promise("with a network ÷ without, p50", 1.15, false, || {
        // Fifty each, in turns of ten: the two differ by less than a shared machine does from minute to minute.
        middle(|| {
            let without = bench(&server, &["-n", "10", "--no-network"]);
            p50(&bench(&server, &["-n", "10"]), "create_ms") / p50(&without, "create_ms")
        })
    });
    server.stop().await;
}
