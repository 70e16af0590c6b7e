//! Pause and resume: what was frozen goes on, whole, or is refused by name.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kelvin_api::sandbox::{ForkSandbox, NewSandbox, PauseSandbox, SandboxState, StartPath};
use kelvin_client::agent::{Agent, Told};
use kelvin_client::{Client, Error};
use kelvin_e2e::{Ground, LIMIT, Server, agent_of, new_sandbox, sh, shell, start_counter};
use kelvin_host::ledger::Ledger;

/// How long an agent does not answer that stands still.
const SILENT: Duration = Duration::from_secs(3);

fn now_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64()
}

/// Status, code and message of a refusal.
pub(super) fn refused(error: Error) -> (u16, String, String) {
    match error {
        Error::Refused(refused) => (refused.code, refused.error_code.unwrap_or_default(), refused.message),
        other => panic!("not refused: {other}"),
    }
}

/// The counter and the token of a process that runs [`COUNTER`].
pub(super) async fn state(agent: &Agent) -> (u64, String) {
    let text = sh(agent, "cat /tmp/state").await;
    let (count, token) = text.trim().split_once(' ').expect("two words");
    (count.parse().expect("a number"), token.to_owned())
}

pub(super) async fn goes_on(agent: &Agent, from: u64) -> u64 {
    let started = Instant::now();
    loop {
        let (count, _) = state(agent).await;
        if count > from {
            return count;
        }
        assert!(started.elapsed() < LIMIT, "the counter stands still at {count}");
    }
}

/// How many snapshots a server has.
pub(super) fn snapshots(server: &Server) -> usize {
    fs::read_dir(server.data_dir().join("snapshots")).expect("a directory").count()
}

/// What a directory takes on its disk, shared blocks counted each time, in MiB.
fn blocks_mib(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).expect("a directory").flatten();
    entries.map(|entry| entry.metadata().map_or(0, |found| (found.blocks() * 512) >> 20)).sum()
}

#[tokio::test]
async fn fifty_pauses_keep_memory_files_processes_and_time() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("freeze", &["--waiting-vmms", "2"], 2).await;
    let client = server.client();
    let sandbox = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
    let (id, agent) = (sandbox.sandbox_id.as_str(), agent_of(&client, &sandbox));
    let pid = start_counter(&agent).await;
    sh(
        &agent,
        "head -c 4M /dev/urandom > /home/user/kept; sha256sum /home/user/kept > /home/user/sum; \
                cat /proc/sys/kernel/random/boot_id /etc/machine-id /etc/hostname > /home/user/who",
    )
    .await;
    // A server that listens, which takes it a while in an emulated host, and one that writes files all the while.
    drop(agent.start(&shell("mkdir -p /tmp/www; echo hello > /tmp/www/hello; cd /tmp/www; exec python3 -m http.server 8000")).await.expect("a server"));
    sh(&agent, "curl -s --retry-connrefused --retry 300 --retry-delay 1 http://localhost:8000/hello").await;
    drop(agent.start(&shell("while :; do dd if=/dev/urandom of=/home/user/data bs=64k count=4 conv=notrunc; sync; done 2>/dev/null")).await.expect("a writer"));
    let (mut count, token) = state(&agent).await;
    let free = client.node().await.expect("a node").disk_free_mb;
    let capacity = client.node().await.expect("a node").memory_reserved_mb;
    let (mut worst_clock, mut worst_pause) = (0.0_f64, 0.0_f64);
    for cycle in 1..=50 {
        let capture =
            client.pause(id).await.unwrap_or_else(|error| panic!("cycle {cycle}: {error}\n{}", server.log()));
        assert!(capture.quiesced, "cycle {cycle}");
        worst_pause = worst_pause.max(capture.paused_ms);
        if cycle == 1 {
            let detail = client.sandbox(id).await.expect("a detail");
            assert_eq!(detail.state, SandboxState::Paused);
            let node = server.node_when("given back", |node| node.sandboxes == 0 && node.settled).await;
            assert_eq!(node.paused, 1);
            assert!(node.memory_reserved_mb < capacity, "its capacity is free");
            assert_eq!(refused(client.pause(id).await.expect_err("again")).0, 409);
            assert!(agent.processes().await.is_err(), "nobody is woken up without being asked");
        }
        let resumed = client
            .resume(id, 600)
            .await
            .unwrap_or_else(|error| panic!("cycle {cycle}: {error}\n{}", server.log()));
        assert_eq!(resumed.envd_access_token, sandbox.envd_access_token);
        let before = now_s();
        let clock: f64 = sh(&agent, "date +%s.%N").await.trim().parse().expect("a time");
        worst_clock = worst_clock.max(before - clock).max(clock - now_s());
        let (now, same) = state(&agent).await;
        assert!(now >= count, "cycle {cycle}: {now} after {count}");
        assert_eq!(same, token, "cycle {cycle}: its memory is another's");
        count = goes_on(&agent, now).await;
        if cycle % 10 == 0 {
            sh(&agent, "sha256sum -c --quiet /home/user/sum").await;
            assert_eq!(sh(&agent, "curl -s http://localhost:8000/hello").await, "hello\n", "cycle {cycle}");
            assert!(snapshots(&server) <= 3, "cycle {cycle}: {} snapshots", snapshots(&server));
        }
    }
    assert_eq!(refused(client.resume(id, 600).await.expect_err("it runs")).0, 409);
    sh(&agent, "cat /proc/sys/kernel/random/boot_id /etc/machine-id /etc/hostname | cmp - /home/user/who")
        .await;
    // Its output is still there for whoever comes back to it.
    let mut attached = agent.attach(pid).await.expect("the same process");
    loop {
        match attached.next().await.expect("a stream").expect("output") {
            Told::Stdout(bytes) if String::from_utf8_lossy(&bytes).contains(&token) => break,
            Told::Ended { .. } => panic!("the counter has ended"),
            _ => {}
        }
    }
    server.settle().await;
    let after = client.node().await.expect("a node").disk_free_mb;
    println!(
        "50 pauses: clocks outside of the asking by at most {worst_clock:.3} s, stood still at most {worst_pause:.0} ms, {} MiB more of the disk",
        free.saturating_sub(after)
    );
    assert!(worst_clock < 1.0, "{worst_clock}");
    assert!(free.saturating_sub(after) < 300, "{free} MiB were free, now {after}");
    // Paused and killed: nothing is left of it.
    client.pause(id).await.expect("a pause");
    client.kill(&sandbox.sandbox_id).await.expect("a kill");
    server.settle().await;
    assert_eq!(snapshots(&server), 1, "only the template's");
    server.stop().await;
}

#[tokio::test]
async fn at_its_deadline_it_is_paused_and_traffic_resumes_it_once() {
    let Some(ground) = Ground::with_networks().await else { return };
    let mut server = ground.baked("auto", &["--waiting-vmms", "1"], 1).await;
    let client = server.client();
    let body = NewSandbox {
        auto_pause: Some(true),
        auto_resume: Some(kelvin_api::sandbox::AutoResume { enabled: true }),
        ..new_sandbox()
    };
    let sandbox = client.create(&body, None).await.expect("a create").sandbox;
    let agent = agent_of(&client, &sandbox);
    drop(
        agent
            .start(&shell("cd /etc; exec python3 -m http.server 8000 --bind 0.0.0.0"))
            .await
            .expect("a server"),
    );
    let id = sandbox.sandbox_id.as_str();
    let url = format!("{}/sandboxes/{id}/ports/8000/hostname", server.url());
    let get = || {
        let url = url.clone();
        tokio::task::spawn_blocking(move || {
            let output = std::process::Command::new("curl")
                .args(["-s", "-m", "60", "-w", "%{http_code}", &url])
                .output()
                .expect("curl runs");
            String::from_utf8_lossy(&output.stdout).into_owned()
        })
    };
    let answer = format!("{id}\n200");
    let started = Instant::now();
    while get().await.expect("a request") != answer {
        assert!(started.elapsed() < LIMIT, "the server in the sandbox does not answer");
    }
    client.set_timeout(&sandbox.sandbox_id, 1).await.expect("a timeout");
    server.node_when("paused", |node| node.paused == 1 && node.sandboxes == 0 && node.settled).await;
    assert_eq!(client.sandbox(id).await.expect("a detail").state, SandboxState::Paused);
    // Eight at once are held and join one resume.
    let requests: Vec<_> = (0..8).map(|_| get()).collect();
    for request in requests {
        assert_eq!(request.await.expect("a request"), answer);
    }
    assert_eq!(server.log().matches("resumed, generation 1").count(), 1);
    // It lives as long as it was asked to in the beginning, and the list says that it runs.
    let started = Instant::now();
    while client.sandbox(id).await.expect("a detail").state != SandboxState::Running {
        assert!(started.elapsed() < LIMIT, "the control plane was not told");
    }
    // The same for a command, and after a restart: what is paused stays paused.
    client.pause(id).await.expect("a pause");
    server.settle().await;
    server.kill_9();
    server.start(&["--waiting-vmms", "1"]).await;
    let client = server.client();
    assert_eq!(client.list_all(&[]).await.expect("a list")[0].state, SandboxState::Paused);
    let agent = client.agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), None).expect("an agent");
    assert_eq!(sh(&agent, "hostname").await, format!("{id}\n"));
    // Who does not want it is not woken up.
    let booted = NewSandbox { start_path: Some(StartPath::Cold), ..new_sandbox() };
    let quiet = client.create(&booted, None).await.expect("a boot").sandbox;
    client.pause(quiet.sandbox_id.as_str()).await.expect("a pause");
    let error = sh_fails(&agent_of(&client, &quiet)).await;
    assert!(error.contains("502"), "{error}");
    // A connect resumes it: 201 in E2B's words, and never shortens its time.
    let connected = client.connect(quiet.sandbox_id.as_str(), 300).await.expect("a connect");
    assert_eq!(connected.start_reason.as_deref(), Some("clone: resumed, generation 1"));
    assert_eq!(sh(&agent_of(&client, &quiet), "echo back").await, "back\n");
    // One that was booted has children too.
    let body = ForkSandbox { count: Some(1), timeout: Some(600), ..ForkSandbox::default() };
    let (children, _) = client.fork(quiet.sandbox_id.as_str(), &body).await.expect("a fork");
    assert!(children[0].error.is_none(), "{children:?}");
    // A stranger wakes nobody.
    client.pause(id).await.expect("a pause");
    let stranger = client.agent(&sandbox.sandbox_id, None, None).expect("an agent");
    assert!(stranger.processes().await.is_err());
    assert_eq!(client.sandbox(id).await.expect("a detail").state, SandboxState::Paused);
    server.stop().await;
}

#[tokio::test]
async fn what_cannot_be_paused_is_not_ended_and_a_silent_guest_can_be_paused() {
    let Some(ground) = Ground::find() else { return };
    let usual = ["--waiting-vmms", "0"];
    let mut server = ground.baked("stubborn", &usual, 0).await;
    let body = NewSandbox { auto_pause: Some(true), timeout: Some(600), ..new_sandbox() };
    let sandbox = server.client().create(&body, None).await.expect("a create").sandbox;
    let id = sandbox.sandbox_id.as_str();
    // Its deadline comes while there is no space to pause it in.
    server.terminate().await;
    server.start(&["--waiting-vmms", "0", "--disk-floor-mib", "100000000"]).await;
    server.client().set_timeout(&sandbox.sandbox_id, 1).await.expect("a timeout");
    let started = Instant::now();
    while !server.log().contains("not paused at its deadline, tried again") {
        assert!(started.elapsed() < LIMIT, "it was not tried");
    }
    assert_eq!(sh(&agent_of(&server.client(), &sandbox), "echo alive").await, "alive\n");
    server.terminate().await;
    server.start(&usual).await;
    server.client().set_timeout(&sandbox.sandbox_id, 1).await.expect("a timeout");
    server.node_when("paused", |node| node.paused == 1 && node.settled).await;
    // A guest whose agent stands still: captured all the same, and it says so.
    let client = server.client();
    client.resume(id, 600).await.expect("a resume");
    let agent = client.agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), Some("root".to_owned()));
    let agent = agent.expect("an agent");
    let stop = "setsid sh -c 'sleep 0.5; kill -STOP $(pgrep -f \"^/proc/self/exe agent\")' >/dev/null 2>&1 &";
    sh(&agent, stop).await;
    // Until the signal has come, it answers.
    let started = Instant::now();
    while tokio::time::timeout(SILENT, agent.run(&shell("true"), 1024)).await.is_ok() {
        assert!(started.elapsed() < LIMIT, "the agent never stood still");
    }
    let healthy = PauseSandbox { require_healthy_guest: Some(true), ..PauseSandbox::default() };
    let refusal = client.pause_as(id, &healthy).await.expect_err("its agent does not answer");
    assert_eq!(refused(refusal).1, "guest_unhealthy");
    assert_eq!(client.sandbox(id).await.expect("a detail").state, SandboxState::Running);
    let capture = client.pause(id).await.expect("a pause");
    assert!(!capture.quiesced);
    println!("a guest that does not answer stood still for {:.1} ms", capture.paused_ms);
    let (status, code, _) = refused(client.resume(id, 600).await.expect_err("ready is the agent's answer"));
    assert_eq!((status, code.as_str()), (504, "vmm_deadline"));
    assert_eq!(client.sandbox(id).await.expect("a detail").state, SandboxState::Paused, "nothing is lost");
    server.stop().await;
}

async fn sh_fails(agent: &Agent) -> String {
    agent.run(&shell("true"), 1024).await.expect_err("it is paused").to_string()
}

/// Starts `operation` on a sandbox and does not wait for more than its end.
pub(super) async fn operate(client: &Client, operation: &str, id: &str) -> Result<(), Error> {
    match operation {
        "pause" => client.pause(id).await.map(drop),
        "snapshot" => client.snapshot(id, None).await.map(drop),
        _ => {
            let body = ForkSandbox { count: Some(2), timeout: Some(600), ..ForkSandbox::default() };
            client.fork(id, &body).await.map(drop)
        }
    }
}

/// How many records of a server that is dead say that a sandbox can be resumed: a second one would be an older life.
async fn paused_records(server: &Server) -> usize {
    let ledger = Ledger::open(&server.data_dir().join("ledger.db")).expect("a ledger");
    let (_, records) = ledger.read().await.expect("its records");
    records.iter().filter(|record| record.body.json.contains(r#""state":"paused""#)).count()
}

#[tokio::test]
async fn a_daemon_that_dies_while_it_saves_loses_nothing_and_leaves_nothing() {
    let Some(ground) = Ground::find() else { return };
    let usual = ["--waiting-vmms", "0"];
    let mut server = ground.baked("freeze-crash", &usual, 0).await;
    let sandbox = server.client().create(&new_sandbox(), None).await.expect("a create").sandbox;
    let agent = agent_of(&server.client(), &sandbox);
    start_counter(&agent).await;
    let (mut count, token) = state(&agent).await;
    let id = sandbox.sandbox_id.as_str();
    server.settle().await;
    let before = snapshots(&server);
    let cases = [
        ("pause", &["quiesce", "pause", "save", "publish", "commit"][..]),
        ("snapshot", &["quiesce", "pause", "save", "resume", "publish"]),
        ("fork", &["quiesce", "pause", "save", "resume", "publish", "load", "activate"]),
    ];
    for (operation, phases) in cases {
        for phase in phases {
            let case = format!("{operation}, killed at {phase}");
            server.terminate().await;
            server.start(&["--waiting-vmms", "0", "--crash-at", phase]).await;
            operate(&server.client(), operation, id).await.expect_err("the server dies");
            server.wait_for_death().await;
            server.start(&usual).await;
            let client = server.client();
            let node = server.settle().await;
            assert_eq!((node.sandboxes, node.paused), (1, 0), "{case}\n{}", server.log());
            assert_eq!(snapshots(&server), before, "{case}");
            assert_eq!(
                fs::read_dir(server.data_dir().join("staging")).expect("a directory").count(),
                0,
                "{case}"
            );
            assert_eq!((server.vmms().len(), server.machines().len()), (1, 1), "{case}");
            let agent = agent_of(&client, &sandbox);
            let (now, same) = state(&agent).await;
            assert_eq!(same, token, "{case}");
            assert!(now >= count, "{case}");
            count = goes_on(&agent, now).await;
            sh(&agent, "echo writes > /home/user/written && sync").await;
            assert_eq!(client.list_all(&[]).await.expect("a list").len(), 1, "{case}");
        }
    }
    // A resume that dies: it is still paused, and can be resumed.
    server.client().pause(id).await.expect("a pause");
    for phase in ["load", "activate", "commit"] {
        server.terminate().await;
        server.start(&["--waiting-vmms", "0", "--crash-at", phase]).await;
        server.client().resume(id, 600).await.expect_err("the server dies");
        server.wait_for_death().await;
        assert_eq!(paused_records(&server).await, 1, "resume, killed at {phase}");
        server.start(&usual).await;
        let node = server.settle().await;
        assert_eq!((node.sandboxes, node.paused), (0, 1), "resume, killed at {phase}\n{}", server.log());
        assert_eq!(server.vmms().len(), 0);
    }
    server.client().resume(id, 600).await.expect("a resume");
    let (now, same) = state(&agent_of(&server.client(), &sandbox)).await;
    assert!(same == token && now >= count);

    // The same of the disk alone: a boot that dies takes nothing with it.
    let disk_alone = PauseSandbox { memory: Some(false), ..PauseSandbox::default() };
    server.client().pause_as(id, &disk_alone).await.expect("a pause");
    for phase in ["disk", "vmm", "boot", "activate", "commit"] {
        server.terminate().await;
        server.start(&["--waiting-vmms", "0", "--crash-at", phase]).await;
        server.client().resume(id, 600).await.expect_err("the server dies");
        server.wait_for_death().await;
        assert_eq!(paused_records(&server).await, 1, "boot, killed at {phase}");
        server.start(&usual).await;
        let node = server.settle().await;
        assert_eq!((node.sandboxes, node.paused), (0, 1), "boot, killed at {phase}\n{}", server.log());
        assert_eq!((server.vmms().len(), server.machines().len()), (0, 0), "boot, killed at {phase}");
    }
    let resumed = server.client().resume(id, 600).await.expect("a resume");
    assert_eq!(resumed.envd_access_token, sandbox.envd_access_token);
    let agent = agent_of(&server.client(), &sandbox);
    assert_eq!(sh(&agent, "cat /home/user/written").await, "writes\n");
    assert!(agent.processes().await.expect("a list").is_empty(), "it has booted");
    // And again with memory: what it has become can be kept whole.
    server.client().pause(id).await.expect("a pause");
    server.client().resume(id, 600).await.expect("a resume");
    assert_eq!(sh(&agent_of(&server.client(), &sandbox), "cat /home/user/written").await, "writes\n");
    server.stop().await;
}

#[tokio::test]
async fn a_full_disk_stops_no_sandbox_and_leaves_no_half() {
    let Some(ground) = Ground::find() else { return };
    if !rustix::process::geteuid().is_root() {
        println!("skipped: not root, a file system has to be mounted");
        return;
    }
    let args = ["--waiting-vmms", "0", "--disk-floor-mib", "0"];
    let mut server = ground.server_on(1200, "full", &args).await;
    server.bake(0).await;
    let client = server.client();
    let sandbox = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
    let (id, agent) = (sandbox.sandbox_id.as_str(), agent_of(&client, &sandbox));
    start_counter(&agent).await;
    // Memory of its own that has to be saved.
    drop(agent.start(&shell("exec python3 -c 'import time; held = bytearray(48 << 20); held[::4096] = b\"x\" * (12 << 10); time.sleep(10000)'")).await.expect("a process"));
    sh(&agent, "while [ $(ps -o rss= -C python3 | sort -n | tail -1) -lt 50000 ]; do sleep 0.1; done; sync")
        .await;
    let (mut count, token) = state(&agent).await;
    server.settle().await;
    let before = snapshots(&server);
    for left_mib in [24_u64, 2, 0] {
        for operation in ["pause", "snapshot", "fork"] {
            let case = format!("{operation} with {left_mib} MiB");
            let ballast = Ballast::fill(server.data_dir(), left_mib);
            let (status, code, text) = refused(operate(&client, operation, id).await.expect_err(&case));
            assert_eq!((status, code.as_str()), (503, "disk_full"), "{case}: {text}");
            drop(ballast);
            assert_eq!(snapshots(&server), before, "{case}");
            assert_eq!(
                fs::read_dir(server.data_dir().join("staging")).expect("a directory").count(),
                0,
                "{case}"
            );
            let (now, same) = state(&agent).await;
            assert_eq!(same, token, "{case}");
            assert!(now >= count, "{case}");
            count = goes_on(&agent, now).await;
            assert_eq!(client.list_all(&[]).await.expect("a list").len(), 1, "{case}");
        }
    }
    // With space again, all of it works; a restart finds a store that makes sense.
    server.kill_9();
    server.start(&args).await;
    let client = server.client();
    for operation in ["snapshot", "pause"] {
        operate(&client, operation, id).await.unwrap_or_else(|error| panic!("{operation}: {error}"));
    }
    client.resume(id, 600).await.expect("a resume");
    goes_on(&agent_of(&client, &sandbox), count).await;
    // The floor refuses before anything is begun.
    server.terminate().await;
    server.start(&["--waiting-vmms", "0", "--disk-floor-mib", "100000"]).await;
    let (status, code, _) = refused(operate(&server.client(), "pause", id).await.expect_err("the floor"));
    assert_eq!((status, code.as_str()), (503, "capacity_exhausted"));
    println!("{} MiB of snapshots on a disk of 1200", snapshot_blocks(&server));
    server.stop().await;
}

fn snapshot_blocks(server: &Server) -> u64 {
    let directories = fs::read_dir(server.data_dir().join("snapshots")).expect("a directory").flatten();
    directories.map(|entry| blocks_mib(&entry.path())).sum()
}

/// A file that takes all but some MiB of a file system.
struct Ballast(std::path::PathBuf);

impl Ballast {
    fn fill(directory: &Path, left_mib: u64) -> Self {
        let path = directory.join("ballast");
        let file = fs::File::create(&path).expect("a file");
        let free = || {
            let found = rustix::fs::statvfs(directory).expect("statvfs");
            found.f_bavail * found.f_frsize
        };
        let mut size = 0;
        // What the file system keeps for itself is not known before: taken in ever smaller steps.
        for step in [64 << 20, 8 << 20, 1 << 20, 64 << 10, 4 << 10] {
            while free() > (left_mib << 20) + step {
                match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), size, step) {
                    Ok(()) => size += step,
                    Err(_) => break,
                }
            }
        }
        Self(path)
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
