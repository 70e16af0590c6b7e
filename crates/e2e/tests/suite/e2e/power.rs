//! What a reply has promised, on a disk that is slow and on one whose power fails.

use std::time::{Duration, Instant};

use kelvin_api::account::NewApiKey;
use kelvin_api::id::Token;
use kelvin_api::sandbox::{NewSandbox, SandboxState};
use kelvin_client::Client;
use kelvin_e2e::{Ground, Server, agent_of, new_sandbox, sh, start_counter};

use super::freeze::{goes_on, operate, state};

const ARGS: [&str; 2] = ["--waiting-vmms", "0"];
const DISK_MIB: u32 = 3000;
/// How long each write and each flush of the slow disk takes.
const SLOW: Duration = Duration::from_millis(4);

/// Its own part of the blocks that were not flushed survives each failure, as a disk's cache would have it.
fn some(failure: u64) -> impl Fn(u64) -> bool {
    move |block| (block ^ failure).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 63 == 1
}

fn of(server: &Server, key: &str) -> Client {
    Client::new(server.url(), Token::from_secret(key.to_owned())).expect("a URL")
}

async fn server(ground: &Ground, name: &str) -> Option<Server> {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: not root, a file system has to be mounted");
        return None;
    }
    let server = ground.server_on_block(DISK_MIB, name, &ARGS).await?;
    server.bake(0).await;
    Some(server)
}

#[tokio::test]
async fn what_was_answered_survives_a_power_failure() {
    let Some(ground) = Ground::find() else { return };
    let Some(mut server) = server(&ground, "power").await else { return };
    let client = server.client();
    let create = async |client: &Client| client.create(&new_sandbox(), None).await.expect("a create").sandbox;

    let (paused, source, running) = (create(&client).await, create(&client).await, create(&client).await);
    let mut counts = Vec::new();
    for sandbox in [&paused, &source] {
        let agent = agent_of(&client, sandbox);
        start_counter(&agent).await;
        sh(&agent, "echo kept > /home/user/kept; sync").await;
        counts.push(state(&agent).await);
    }
    let named = |name: &str| NewApiKey { name: name.to_owned(), ..NewApiKey::default() };
    let revoked = client.create_key(&named("revoked")).await.expect("a key");
    of(&server, &revoked.key).list_all(&[]).await.expect("it opens");

    // Each of these is the last thing that was answered before the power fails, once.
    for (failure, last) in ["pause", "snapshot", "key", "revocation"].into_iter().enumerate() {
        let client = server.client();
        let (mut snapshot, mut key) = (None, None);
        match last {
            "pause" => drop(client.pause(paused.sandbox_id.as_str()).await.expect("a pause")),
            "snapshot" => {
                let source = create(&client).await;
                let agent = agent_of(&client, &source);
                start_counter(&agent).await;
                let before = state(&agent).await;
                let (info, _) =
                    client.snapshot(source.sandbox_id.as_str(), Some("kept")).await.expect("a snapshot");
                snapshot = Some((info.snapshot_id, before));
            }
            "key" => key = Some(client.create_key(&named("kept")).await.expect("a key").key),
            _ => client.revoke_key(&revoked.info.id).await.expect("it is revoked"),
        }
        server.power_fails(some(failure as u64)).await;
        server.start(&ARGS).await;
        let client = server.client();
        // What ran died with the power, and nobody says that it runs.
        let listed = client.list_all(&[]).await.expect("a list");
        let ids: Vec<&str> = listed.iter().map(|sandbox| sandbox.sandbox_id.as_str()).collect();
        assert_eq!(ids, [paused.sandbox_id.as_str()], "after a {last}");
        for gone in [&running, &source] {
            assert!(client.sandbox(gone.sandbox_id.as_str()).await.is_err(), "after a {last}");
        }
        if let Some((id, (count, token))) = snapshot {
            let wanted = NewSandbox { template_id: id, ..new_sandbox() };
            let child = client.create(&wanted, None).await.expect("a create from a snapshot").sandbox;
            let agent = agent_of(&client, &child);
            assert_eq!(state(&agent).await.1, token);
            goes_on(&agent, count).await;
            assert!(client.snapshots().await.expect("a list").iter().any(|info| info.names == ["kept"]));
            client.kill(&child.sandbox_id).await.expect("a kill");
        }
        if let Some(key) = key {
            of(&server, &key).list_all(&[]).await.expect("a key that was given away opens");
        }
        let opens = of(&server, &revoked.key).list_all(&[]).await.is_ok();
        assert_eq!(opens, last != "revocation", "the key, after a {last}");
    }
    // After four failures it goes on where it was.
    let client = server.client();
    let (count, token) = counts.swap_remove(0);
    client.resume(paused.sandbox_id.as_str(), 600).await.expect("a resume");
    let agent = agent_of(&client, &paused);
    assert_eq!(state(&agent).await.1, token);
    goes_on(&agent, count).await;
    assert_eq!(sh(&agent, "cat /home/user/kept").await, "kept\n");
    server.stop().await;
}

#[tokio::test]
async fn a_slow_disk_costs_time_and_nothing_else() {
    let Some(ground) = Ground::find() else { return };
    let Some(server) = server(&ground, "slow").await else { return };
    let client = server.client();
    let sandbox = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
    let (id, agent) = (sandbox.sandbox_id.as_str(), agent_of(&client, &sandbox));
    start_counter(&agent).await;
    let (mut count, token) = state(&agent).await;
    server.block().slow_down(SLOW);
    for operation in ["snapshot", "fork", "pause", "snapshot", "resume", "fork"] {
        let began = (Instant::now(), server.block().flushes());
        match operation {
            "resume" => drop(client.resume(id, 600).await.expect("a resume")),
            _ => operate(&client, operation, id).await.unwrap_or_else(|error| panic!("{operation}: {error}")),
        }
        let flushes = server.block().flushes() - began.1;
        println!("{operation}: {:.1} s, {flushes} flushes on a slow disk", began.0.elapsed().as_secs_f64());
        let detail = client.sandbox(id).await.expect("it is there");
        if detail.state == SandboxState::Running {
            let (now, same) = state(&agent).await;
            assert_eq!(same, token, "{operation}");
            count = goes_on(&agent, now.max(count)).await;
        }
    }
    server.block().slow_down(Duration::ZERO);
    server.stop().await;
}
