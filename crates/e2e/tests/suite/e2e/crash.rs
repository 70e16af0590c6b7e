//! The server dies: nothing is orphaned, nothing is made twice, what ran goes on.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use kelvin_api::phase::Phase;
use kelvin_api::sandbox::StartPath;
use kelvin_client::Error;
use kelvin_e2e::{Ground, agent_of, new_sandbox, sh};

/// How long a restarted server may take to clear away.
const CLEAR: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_create_that_dies_in_any_phase_leaves_no_orphan_and_no_double() {
    let Some(ground) = Ground::find() else { return };
    let mut server = ground.baked("crash-create", &["--waiting-vmms", "1"], 1).await;
    server.terminate().await;
    let clone = [
        Phase::Reserve,
        Phase::Queue,
        Phase::Vmm,
        Phase::Load,
        Phase::Resume,
        Phase::Activate,
        Phase::Commit,
    ];
    let cold = [Phase::Disk, Phase::Vmm, Phase::Boot, Phase::Activate, Phase::Commit];
    let cases = clone
        .map(|phase| (StartPath::Clone, phase))
        .into_iter()
        .chain(cold.map(|phase| (StartPath::Cold, phase)));
    for (path, phase) in cases {
        let case = format!("{} {}", path.name(), phase.name());
        server.start(&["--waiting-vmms", "1", "--no-auto-bake", "--crash-at", phase.name()]).await;
        let mut body = new_sandbox();
        body.start_path = Some(path);
        let key = format!("key {case}");
        let failed = server.client().create(&body, Some(&key)).await;
        let error = failed.expect_err("the server was to die");
        assert!(matches!(error, Error::Unreachable { .. }), "{case}: refused instead of dying: {error}");
        server.wait_for_death().await;

        server.start(&["--waiting-vmms", "1", "--no-auto-bake"]).await;
        let started = Instant::now();
        let node = server.node_when("clear", |node| node.settled && node.sandboxes == 0).await;
        assert!(started.elapsed() < CLEAR, "{case}: cleared after {:?}", started.elapsed());
        // Only what waits is there: one VMM with its directory.
        assert_eq!(node.waiting_vmms, 1, "{case}");
        assert_eq!((server.vmms().len(), server.machines().len()), (1, 1), "{case}");

        let client = server.client();
        let first =
            client.create(&body, Some(&key)).await.unwrap_or_else(|error| panic!("{case}: {error}")).sandbox;
        let again = client.create(&body, Some(&key)).await.expect("the same again").sandbox;
        assert_eq!(first.sandbox_id, again.sandbox_id, "{case}");
        assert_eq!(first.envd_access_token, again.envd_access_token, "{case}");
        assert_eq!(client.list_all(&[]).await.expect("a list").len(), 1, "{case}");
        assert_eq!(sh(&agent_of(&client, &first), "echo ok").await, "ok\n", "{case}");
        // The key for another request is refused.
        let other = client.create(&new_sandbox(), Some(&key)).await.expect_err("another request");
        assert!(other.to_string().contains("idempotency key was used"), "{case}: {other}");
        client.kill(&first.sandbox_id).await.expect("a kill");
        server.settle().await;
        server.terminate().await;
    }
    server.start(&["--waiting-vmms", "0"]).await;
    server.stop().await;
}

#[tokio::test]
async fn a_server_that_is_told_to_stop_while_it_starts_leaves_nothing() {
    let Some(ground) = Ground::with_networks().await else { return };
    let mut server = ground.server("crash-start", &["--waiting-vmms", "0", "--no-auto-bake"]).await;
    server.terminate().await;
    let mut early = 0;
    for _ in 0..5 {
        server.launch(&["--waiting-vmms", "0", "--no-auto-bake"]);
        let started = Instant::now();
        // Each look is at every process: a pause between two of them could miss the start.
        while server.helpers().is_empty() {
            assert!(started.elapsed() < CLEAR, "no helper after {CLEAR:?}");
        }
        // It has made something, and answers nobody yet.
        early += u32::from(!server.is_announced());
        server.terminate().await;
        assert_eq!(server.helpers(), BTreeSet::new(), "{}", server.log());
    }
    println!("told before it was ready {early} times of 5");
    assert!(early > 0, "it was never told before it was ready");
    server.start(&["--waiting-vmms", "0", "--no-auto-bake"]).await;
    server.stop().await;
}

#[tokio::test]
async fn sandboxes_outlive_the_server_and_are_adopted() {
    let Some(ground) = Ground::find() else { return };
    let mut server = ground.baked("crash-adopt", &["--waiting-vmms", "2"], 2).await;
    let client = server.client();
    let mut sandboxes = Vec::new();
    for path in [StartPath::Clone, StartPath::Clone, StartPath::Cold] {
        let mut body = new_sandbox();
        body.start_path = Some(path);
        sandboxes.push(client.create(&body, None).await.expect("a create").sandbox);
    }
    for sandbox in &sandboxes {
        sh(
            &agent_of(&client, sandbox),
            "hostname > /tmp/name; nohup sleep 1000 >/dev/null 2>&1 & echo $! > /tmp/pid",
        )
        .await;
    }
    server.settle().await;
    let waiting = server.client().node().await.expect("a node").waiting_vmms;
    let all = server.vmms();
    for round in ["kill -9", "SIGTERM"] {
        let before = server.vmms();
        if round == "kill -9" {
            server.kill_9();
        } else {
            server.terminate().await;
        }
        server.start(&["--waiting-vmms", "0"]).await;
        let node = server.node_when("adopted", |node| node.sandboxes == 3).await;
        assert_eq!(node.waiting_vmms, 0, "VMMs that waited for the dead server are gone");
        let after = server.vmms();
        assert!(after.is_subset(&before), "{round}: the same processes");
        assert_eq!(after.len(), 3, "{round}");
        let client = server.client();
        for sandbox in &sandboxes {
            let agent = agent_of(&client, sandbox);
            let text = sh(&agent, "cat /tmp/name; kill -0 $(cat /tmp/pid) && echo alive").await;
            assert_eq!(text, format!("{}\nalive\n", sandbox.sandbox_id), "{round}");
            let detail = client.sandbox(sandbox.sandbox_id.as_str()).await.expect("a detail");
            assert_eq!(detail.envd_access_token, sandbox.envd_access_token);
        }
    }
    assert_eq!(all.len(), 3 + waiting as usize);
    // A VMM that dies while nobody looks is noticed.
    server.kill_9();
    let victim = *server.vmms().iter().next().expect("a VMM");
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(victim).expect("a pid"),
        rustix::process::Signal::KILL,
    )
    .expect("a kill");
    server.start(&["--waiting-vmms", "0"]).await;
    let node = server.settle().await;
    assert_eq!(node.sandboxes, 2);
    assert_eq!(server.client().list_all(&[]).await.expect("a list").len(), 2);
    // And one that dies while the server watches.
    let victim = *server.vmms().iter().next().expect("a VMM");
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(victim).expect("a pid"),
        rustix::process::Signal::KILL,
    )
    .expect("a kill");
    server.node_when("one left", |node| node.sandboxes == 1 && node.settled).await;
    assert_eq!(server.vmms().len(), 1);
    let distinct: BTreeSet<_> = sandboxes.iter().map(|sandbox| &sandbox.sandbox_id).collect();
    assert_eq!(distinct.len(), 3);
    server.stop().await;
}
