//! Warm machines: exact or not at all, once, alive, and no more of them than there should be.

use std::collections::BTreeSet;
use std::fs;

use kelvin_api::network::{NetworkConfig, NewNetwork};
use kelvin_api::sandbox::{NewSandbox, PoolInfo, Sandbox, SetPool, StartPath};
use kelvin_client::Error;
use kelvin_e2e::{Ground, Server, agent_of, new_sandbox, sh};

use super::firecracker::is_vmm;
use super::groups::group_of;

async fn pool(server: &Server) -> PoolInfo {
    let mut pools = server.client().pools().await.expect("pools");
    pools.retain(|pool| pool.template_id == "base" && pool.memory_mb == 256);
    pools.pop().expect("the pool of base")
}

async fn fixed(server: &Server, count: u32) {
    let wanted = SetPool { min: Some(count), max: Some(count), max_age_s: None };
    server.client().set_pool("base", &wanted).await.expect("a pool");
    server.node_when("warm", |node| node.settled && node.warm == count).await;
}

fn path(sandbox: &Sandbox) -> (Option<StartPath>, &str) {
    (sandbox.start_path, sandbox.start_reason.as_deref().unwrap_or_default())
}

fn signal(pid: i32, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).expect("a pid"), signal)
        .expect("a signal");
}

/// Makes a parked VMM stand still for whoever claims it: a Firecracker is stopped as a process already, and let run on by
/// its claim.
fn stick(pid: i32) {
    if is_vmm() {
        fs::write(group_of(pid).join("cgroup.freeze"), "1").expect("a control group");
    } else {
        signal(pid, rustix::process::Signal::STOP);
    }
}

#[tokio::test]
async fn fifty_claims_at_once_get_fifty_machines() {
    let Some(ground) = Ground::find() else { return };
    // More than the emulated KVM host has, for machines that share most of theirs.
    let options = ["--waiting-vmms", "0", "--memory-mib", "18432", "--warm-memory-mib", "4096"];
    let server = ground.baked("warm", &options, 0).await;
    fixed(&server, 8).await;
    let parked = server.vmms();
    assert_eq!(parked.len(), 8);
    // Behind the pool's back: one is gone, one stands still.
    let victims: Vec<i32> = parked.iter().copied().take(2).collect();
    signal(victims[0], rustix::process::Signal::KILL);
    stick(victims[1]);
    let mut creates = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let client = server.client();
        creates.spawn(async move { client.create(&new_sandbox(), None).await.expect("a create").sandbox });
    }
    let made: Vec<Sandbox> = creates.join_all().await;
    let ids: BTreeSet<_> = made.iter().map(|sandbox| sandbox.sandbox_id.clone()).collect();
    assert_eq!(ids.len(), 50);
    let warm: Vec<&Sandbox> =
        made.iter().filter(|sandbox| sandbox.start_path == Some(StartPath::Warm)).collect();
    assert!((6..=30).contains(&warm.len()), "{} were warm", warm.len());
    assert!(made.iter().any(|sandbox| path(sandbox).1.starts_with("clone: no warm slot")), "{made:?}");
    // Each is a machine of its own, and knows itself.
    let mut machines = BTreeSet::new();
    for sandbox in &made {
        let agent = agent_of(&server.client(), sandbox);
        let text = sh(
            &agent,
            "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id; echo $KELVIN_SANDBOX_ID",
        )
        .await;
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!((lines[0], lines[3]), (sandbox.sandbox_id.as_str(), sandbox.sandbox_id.as_str()));
        assert!(machines.insert(format!("{} {}", lines[1], lines[2])), "a machine was handed out twice");
    }
    assert_eq!(machines.len(), 50);
    let of_pool = pool(&server).await;
    assert_eq!(of_pool.hits, warm.len() as u64);
    assert_eq!(of_pool.hits + of_pool.misses, 50);
    assert!(of_pool.wasted >= 2, "{of_pool:?}");
    assert!(
        !server.vmms().contains(&victims[0]) && !server.vmms().contains(&victims[1]),
        "the stuck one was ended"
    );
    let metrics = get(&server, "/metrics");
    assert!(metrics.contains("kelvin_pool_hits_total{template=\"base\""), "{metrics}");
    server.stop().await;
}

/// `GET` with the server's key.
fn get(server: &Server, route: &str) -> String {
    let output = std::process::Command::new("curl")
        .args(["-s", "-H", &format!("X-API-KEY: {}", server.key()), &format!("{}{route}", server.url())])
        .output()
        .expect("curl runs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test]
async fn a_claim_is_exact_and_carries_everything() {
    let Some(ground) = Ground::with_networks().await else { return };
    let mut server = ground.baked("warm-exact", &["--waiting-vmms", "1", "--no-auto-bake"], 1).await;
    fixed(&server, 1).await;
    let client = server.client();
    let policy =
        NetworkConfig { deny_out: Some(vec!["203.0.113.0/24".to_owned()]), ..NetworkConfig::default() };
    let body = NewSandbox {
        env_vars: Some([("A".into(), "1".into())].into()),
        network: Some(NewNetwork::Config(Box::new(policy))),
        start_path: Some(StartPath::Warm),
        ..new_sandbox()
    };
    let claimed = client.create(&body, None).await.expect("a claim").sandbox;
    assert_eq!(path(&claimed), (Some(StartPath::Warm), "warm"));
    assert!(claimed.phases.contains_key(&kelvin_api::phase::Phase::Network), "its rules were put in force");
    let agent = agent_of(&client, &claimed);
    assert_eq!(sh(&agent, "echo $A").await, "1\n");
    let state = client.network(claimed.sandbox_id.as_str()).await.expect("a state");
    assert_eq!(state.deny_out, ["203.0.113.0/24"]);
    let clock: i64 = sh(&agent, "date +%s").await.trim().parse().expect("a time");
    assert!((clock - now_s()).abs() <= 2);
    // Another shape is another machine, and so is one without a network.
    server.settle().await;
    let larger = NewSandbox { memory_mb: Some(320), ..new_sandbox() };
    let booted = client.create(&larger, None).await.expect("a boot").sandbox;
    assert_eq!(path(&booted), (Some(StartPath::Cold), "cold: no snapshot for identity (memory_mib differs)"));
    assert_eq!(pool(&server).await.ready, 1);
    let insisted = NewSandbox { memory_mb: Some(320), start_path: Some(StartPath::Warm), ..new_sandbox() };
    assert!(
        matches!(client.create(&insisted, None).await, Err(Error::Refused(refused)) if refused.code == 409)
    );
    for sandbox in [claimed, booted] {
        client.kill(&sandbox.sandbox_id).await.expect("a kill");
    }
    // Its memory is still read from the snapshot: one that was touched is handed out no more.
    server.settle().await;
    let snapshot = pool(&server).await.snapshot_id;
    let memory = server.data_dir().join("snapshots").join(&snapshot).join("memory");
    fs::set_permissions(&memory, std::os::unix::fs::PermissionsExt::from_mode(0o444)).expect("a touch");
    let error = client.create(&body, None).await.expect_err("it was touched").to_string();
    assert!(error.contains("memory of snapshot"), "{error}");
    server.node_when("ended", |node| node.warm == 0).await;
    // Another agent: what waits for the former is ended.
    server.bake(1).await;
    fixed(&server, 1).await;
    let initrd = server.data_dir().join("initrd");
    let mut bytes = fs::read(ground.guest("initrd")).expect("an initrd");
    bytes.extend([0; 4]);
    fs::write(&initrd, bytes).expect("a file");
    server.import("base", &ground.guest("vmlinuz"), &initrd);
    let cold = client.create(&new_sandbox(), None).await.expect("a boot").sandbox;
    assert_eq!(path(&cold), (Some(StartPath::Cold), "cold: no snapshot for identity (agent differs)"));
    server.node_when("recycled", |node| node.warm == 0).await;
    // What was wanted is remembered; machines that nobody owned are not there after a crash.
    server.kill_9();
    server.start(&["--waiting-vmms", "0", "--no-auto-bake"]).await;
    let rule =
        server.client().set_pool("base", &SetPool { min: Some(9), max: Some(3), max_age_s: None }).await;
    assert!(
        matches!(rule, Err(Error::Refused(refused)) if refused.error_code.as_deref() == Some("invalid_pool"))
    );
    let unknown = server.client().set_pool("nothing", &SetPool::default()).await;
    assert!(matches!(unknown, Err(Error::Refused(refused)) if refused.code == 404));
    server.bake(0).await;
    server.node_when("warm again", |node| node.settled && node.warm == 1).await;
    assert_eq!((pool(&server).await.min, pool(&server).await.max), (1, 1));
    server.stop().await;
}

#[tokio::test]
async fn a_bursty_load_finds_machines_where_demand_leads() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.server("bursty", &["--waiting-vmms", "1", "--warm-memory-mib", "2500"]).await;
    let picture = server.data_dir().join("pools.svg");
    let output = server
        .cli(&["--output", "json", "bench", "pool", "--pools", "2", "--seconds", "15", "--rate", "1.5"])
        .args(["--spike", "3", "--spike-every", "5", "--plot"])
        .arg(&picture)
        .output()
        .expect("kelvin runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    println!("{report:#}");
    let rate = |row: usize| report["rows"][row]["hit_rate"].as_f64().expect("a rate");
    assert_eq!(rate(0), 0.0, "off");
    assert!(rate(1) > 0.1 && rate(2) > 0.3, "fixed {}, led by demand {}", rate(1), rate(2));
    assert!(fs::read_to_string(&picture).expect("a picture").contains("led by demand"));
    server.stop().await;
}

fn now_s() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    i64::try_from(now.as_secs()).expect("a time")
}

#[tokio::test]
async fn demand_fills_a_pool_and_requests_take_its_room() {
    let Some(ground) = Ground::find() else { return };
    // Room for four machines of 256 MiB.
    let args =
        ["--waiting-vmms", "0", "--warm-max", "2", "--memory-mib", "1216", "--warm-memory-mib", "1216"];
    let mut server = ground.baked("warm-demand", &args, 0).await;
    assert_eq!(pool(&server).await.ready, 0, "nobody has asked yet");
    let client = server.client();
    let first = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
    assert_eq!(path(&first).0, Some(StartPath::Clone));
    server.node_when("led by demand", |node| node.warm >= 1).await;
    let mut made = vec![first];
    // Four fit: the last ones take the room of machines that nobody has asked for.
    for _ in 0..3 {
        made.push(client.create(&new_sandbox(), None).await.expect("a create").sandbox);
    }
    let full = client.create(&new_sandbox(), None).await.expect_err("no room");
    assert!(matches!(full, Error::Refused(refused) if refused.code == 503));
    server.node_when("given up", |node| node.warm == 0 && node.sandboxes == 4).await;
    for sandbox in &made {
        sh(&agent_of(&client, sandbox), "true").await;
        client.kill(&sandbox.sandbox_id).await.expect("a kill");
    }
    // Age: what nobody claims is replaced, and a stop ends what waits.
    server
        .client()
        .set_pool("base", &SetPool { min: Some(1), max: Some(1), max_age_s: Some(2) })
        .await
        .expect("a pool");
    server.node_when("warm", |node| node.warm == 1).await;
    let young = server.vmms();
    let started = std::time::Instant::now();
    while server.vmms() == young || server.client().node().await.expect("a node").warm == 0 {
        assert!(started.elapsed() < kelvin_e2e::LIMIT, "it is never replaced");
    }
    server.terminate().await;
    assert_eq!(server.vmms().len(), 0);
    server.start(&args).await;
    server.stop().await;
}
