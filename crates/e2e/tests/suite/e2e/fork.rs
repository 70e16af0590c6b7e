//! Forks: one instant, many machines, each its own.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use kelvin_api::sandbox::{BakeTemplate, ForkSandbox, NewSandbox, Sandbox, StartPath};
use kelvin_client::Error;
use kelvin_client::agent::Told;
use kelvin_e2e::{Ground, LIMIT, agent_of, new_sandbox, proportional_mib, sh, shell, start_counter};

/// What must differ between copies of a machine, one line each.
const EVERYTHING: &str = "cat /proc/sys/kernel/random/boot_id; cat /etc/machine-id; hostname; cat /sys/class/net/eth0/address; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo";
/// What Python adds to it. An emulated guest takes a second for that: every fourth child is asked.
const OF_PYTHON: &str =
    "python3 -c 'import random, uuid; print(random.random()); print(uuid.uuid4()); print(uuid.uuid1().node)'";

fn children(count: u32) -> ForkSandbox {
    ForkSandbox { count: Some(count), timeout: Some(600), ..ForkSandbox::default() }
}

#[tokio::test]
#[allow(clippy::too_many_lines, reason = "one story: each step rests on what the one before it left")]
async fn eight_children_go_on_from_one_instant_and_share_its_memory() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("fork", &["--waiting-vmms", "0"], 0).await;
    let client = server.client();
    // What eight machines cost that share nothing.
    let cold = NewSandbox { start_path: Some(StartPath::Cold), ..new_sandbox() };
    let mut booted = Vec::new();
    for _ in 0..8 {
        booted.push(client.create(&cold, None).await.expect("a boot").sandbox);
    }
    server.settle().await;
    let separate = proportional_mib(server.vmms());
    for sandbox in booted {
        client.kill(&sandbox.sandbox_id).await.expect("a kill");
    }
    server.settle().await;

    let body = NewSandbox {
        env_vars: Some([("INHERITED".into(), "yes".into()), ("REPLACED".into(), "no".into())].into()),
        metadata: Some([("kind".into(), "source".into())].into()),
        ..new_sandbox()
    };
    let source = client.create(&body, None).await.expect("a create").sandbox;
    let agent = agent_of(&client, &source);
    let pid = start_counter(&agent).await;
    // Somebody watches all the while.
    let mut watched = agent.attach(pid).await.expect("a stream");
    let before: String = sh(&agent, "cat /tmp/state").await;
    let vmms = server.vmms();
    let fork = ForkSandbox { env_vars: Some([("REPLACED".into(), "yes".into())].into()), ..children(8) };
    let started = Instant::now();
    let (results, capture) = client.fork(source.sandbox_id.as_str(), &fork).await.expect("a fork");
    println!(
        "8 children answer after {:.0} ms, the source stood still for {:.1} ms, {:?} pages written",
        started.elapsed().as_secs_f64() * 1e3,
        capture.paused_ms,
        capture.dirty_pages
    );
    let forked: Vec<Sandbox> = results.into_iter().map(|result| result.sandbox.expect("a child")).collect();
    assert_eq!(forked.len(), 8);
    let shared = proportional_mib(server.vmms().difference(&vmms).copied().collect());
    println!("memory of 8 idle children: {shared} MiB, of 8 separate boots: {separate} MiB");
    assert!(shared * 4 < separate, "{shared} MiB is not under a quarter of {separate} MiB");

    let word = |text: &str, index: usize| text.split_whitespace().nth(index).expect("a word").to_owned();
    let (at_least, token) = (word(&before, 0).parse::<u64>().expect("a number"), word(&before, 1));
    for child in &forked {
        let agent = agent_of(&client, child);
        let started = Instant::now();
        // Its own process goes on with what the source's knew.
        loop {
            let text = sh(&agent, "cat /tmp/state").await;
            assert_eq!(word(&text, 1), token);
            let count: u64 = word(&text, 0).parse().expect("a number");
            if count > at_least {
                break;
            }
            assert!(started.elapsed() < LIMIT);
        }
        let mut attached = agent.attach(pid).await.expect("the same process id");
        loop {
            match attached.next().await.expect("a stream").expect("output") {
                Told::Stdout(bytes) if String::from_utf8_lossy(&bytes).contains(&token) => break,
                Told::Ended { .. } => panic!("it has ended"),
                _ => {}
            }
        }
        assert_eq!(
            sh(&agent, "echo $INHERITED $REPLACED $KELVIN_SANDBOX_ID").await,
            format!("yes yes {}\n", child.sandbox_id)
        );
        let detail = client.sandbox(child.sandbox_id.as_str()).await.expect("a detail");
        assert_eq!(detail.parent_id.as_ref(), Some(&source.sandbox_id));
        assert_eq!(detail.metadata.get("kind").map(String::as_str), Some("source"));
        assert_ne!(child.envd_access_token, source.envd_access_token);
        // The source's token opens no child.
        let stranger =
            client.agent(&child.sandbox_id, source.envd_access_token.clone(), None).expect("an agent");
        assert!(stranger.processes().await.is_err());
    }
    // Files of one are no other's.
    sh(&agent_of(&client, &forked[0]), "echo mine > /home/user/own; sync").await;
    sh(&agent_of(&client, &forked[1]), "test ! -e /home/user/own").await;
    sh(&agent, "test ! -e /home/user/own").await;
    // The stream that was watched was never cut.
    let mut lines = 0;
    while lines < 20 {
        match watched.next().await.expect("the stream goes on").expect("output") {
            Told::Stdout(bytes) => lines += bytes.iter().filter(|byte| **byte == b'\n').count(),
            Told::Ended { .. } => panic!("it has ended"),
            _ => {}
        }
    }
    // Children of a child; the tree shows both; one is kept.
    let (grand, _) = client.fork(forked[0].sandbox_id.as_str(), &children(2)).await.expect("a fork");
    assert!(grand.iter().all(|result| result.error.is_none()), "{grand:?}");
    let tree = server.cli(&["sandbox", "tree"]).output().expect("kelvin runs");
    let tree = String::from_utf8_lossy(&tree.stdout).into_owned();
    assert_eq!(tree.lines().count(), 11, "{tree}");
    assert!(tree.starts_with(source.sandbox_id.as_str()) && tree.matches("└─ ").count() == 2, "{tree}");
    let ended = client.promote(forked[3].sandbox_id.as_str()).await.expect("a promotion");
    assert_eq!(ended.len(), 7);
    assert_eq!(
        client.list_all(&[]).await.expect("a list").len(),
        4,
        "the source, the one, two grandchildren"
    );
    assert!(
        matches!(client.promote(source.sandbox_id.as_str()).await, Err(Error::Refused(refused)) if refused.code == 409)
    );
    assert_eq!(sh(&agent_of(&client, &forked[3]), "echo here").await, "here\n");
    // Bad counts and unknown sources.
    for count in [0, 101] {
        assert!(
            matches!(client.fork(source.sandbox_id.as_str(), &children(count)).await, Err(Error::Refused(refused)) if refused.code == 400)
        );
    }
    assert!(
        matches!(client.fork("nosuchsandbox", &children(1)).await, Err(Error::Refused(refused)) if refused.code == 404)
    );
    server.stop().await;
}

#[tokio::test]
async fn a_hundred_forks_answer_and_share_no_identity() {
    let Some(ground) = Ground::with_networks().await else { return };
    // More than the emulated KVM host has, for machines that share most of theirs and do nothing most of the time.
    let options = ["--waiting-vmms", "0", "--slots", "8", "--memory-mib", "18432", "--vcpus", "128"];
    let server = ground.server("hundred", &options).await;
    let small = BakeTemplate { memory_mb: Some(128), ..BakeTemplate::default() };
    let client = server.client();
    client.bake("base", &small).await.expect("a bake");
    let body = NewSandbox { memory_mb: Some(128), ..new_sandbox() };
    let source = client.create(&body, None).await.expect("a create").sandbox;
    let agent = agent_of(&client, &source);
    // Everything that could be copied has been read and used before.
    let own = sh(&agent, &format!("{EVERYTHING}; {OF_PYTHON}")).await;
    sh_root(&agent, "mkdir -p /etc/kelvin/restored.d; printf '#!/bin/sh\\necho $KELVIN_SANDBOX_ID >> /tmp/told\\n' > /etc/kelvin/restored.d/10-mark; chmod +x /etc/kelvin/restored.d/10-mark", &client, &source).await;
    let started = Instant::now();
    let (results, capture) = client.fork(source.sandbox_id.as_str(), &children(100)).await.expect("a fork");
    let failed: Vec<_> = results.iter().filter_map(|result| result.error.as_ref()).collect();
    assert!(failed.is_empty(), "{failed:?}\n{}", server.log());
    println!(
        "100 forks answer after {:.1} s, the source stood still for {:.1} ms",
        started.elapsed().as_secs_f64(),
        capture.paused_ms
    );
    let forked: Vec<Sandbox> = results.into_iter().filter_map(|result| result.sandbox).collect();
    let mut seen: Vec<BTreeSet<String>> = own.lines().map(|line| [line.to_owned()].into()).collect();
    let mut tokens: BTreeSet<String> = BTreeSet::new();
    // A few at a time: each runs Python.
    let places = Arc::new(tokio::sync::Semaphore::new(4));
    let mut checks = tokio::task::JoinSet::new();
    for (index, child) in forked.into_iter().enumerate() {
        let (client, places) = (client.clone(), Arc::clone(&places));
        checks.spawn(async move {
            let _place = places.acquire().await;
            let agent = agent_of(&client, &child);
            let mut text = sh(&agent, EVERYTHING).await;
            if index % 4 == 0 {
                text.push_str(&sh(&agent, OF_PYTHON).await);
            }
            if index < 3 {
                let waiting = Instant::now();
                let told = "cat /tmp/told 2>/dev/null || true";
                while sh(&agent, told).await != format!("{}\n", child.sandbox_id) {
                    assert!(waiting.elapsed() < LIMIT, "the image's program was not told");
                }
            }
            client.kill(&child.sandbox_id).await.expect("a kill");
            (child, text)
        });
    }
    for (child, text) in checks.join_all().await {
        for (set, line) in seen.iter_mut().zip(text.lines()) {
            assert!(set.insert(line.to_owned()), "{} has {line:?} of another", child.sandbox_id);
        }
        assert_eq!(text.lines().nth(2), Some(child.sandbox_id.as_str()));
        tokens.insert(child.envd_access_token.as_ref().expect("a token").expose().to_owned());
    }
    let distinct: Vec<usize> = seen.iter().map(BTreeSet::len).collect();
    assert_eq!((distinct.as_slice(), tokens.len()), ([101, 101, 101, 101, 101, 26, 26, 26].as_slice(), 100));
    server.stop().await;
}

async fn sh_root(
    _: &kelvin_client::agent::Agent,
    script: &str,
    client: &kelvin_client::Client,
    sandbox: &Sandbox,
) {
    let root = client
        .agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), Some("root".to_owned()))
        .expect("an agent");
    let (code, _, stderr) = root.run(&shell(script), 1024).await.expect("it runs");
    assert_eq!(code, 0, "{}", String::from_utf8_lossy(&stderr));
}
