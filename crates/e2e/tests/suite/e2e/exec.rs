//! Commands: large output, deadlines, clients that go away.

use std::time::{Duration, Instant};

use kelvin_client::Error;
use kelvin_client::agent::{Command, Told};
use kelvin_e2e::{Ground, LIMIT, agent_of, new_sandbox, sh, shell};

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a status");
    let line = status.lines().find(|line| line.starts_with("VmRSS")).expect("VmRSS");
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number")
}

#[tokio::test]
async fn a_hundred_mebibytes_arrive_whole_in_flat_memory() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("exec-large", &["--waiting-vmms", "1"], 1).await;
    let client = server.client();
    let sandbox = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
    let agent = agent_of(&client, &sandbox);
    sh(&agent, "true").await;
    let before = resident_kib(server.pid());
    let started = Instant::now();
    let mut process = agent.start(&shell("head -c 104857600 /dev/zero | tr '\\0' k")).await.expect("a start");
    let (mut bytes, mut most, mut code) = (0_u64, before, None);
    while let Some(told) = process.next().await.expect("a stream") {
        match told {
            Told::Stdout(chunk) => {
                assert!(chunk.iter().all(|byte| *byte == b'k'));
                bytes += chunk.len() as u64;
                most = most.max(resident_kib(server.pid()));
            }
            Told::Ended { exit_code, .. } => code = Some(exit_code),
            Told::Started { .. } | Told::Stderr(_) => {}
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "100 MiB in {seconds:.1} s ({:.1} MiB/s), the server grew by {} KiB",
        100.0 / seconds,
        most - before
    );
    assert_eq!((bytes, code), (100 << 20, Some(0)));
    assert!(most - before < 32 << 10, "the server grew from {before} to {most} KiB");
    // A client that does not read is waited for, not buffered for.
    let mut process = agent.start(&shell("head -c 104857600 /dev/zero")).await.expect("a start");
    assert!(matches!(process.next().await, Ok(Some(Told::Started { .. }))));
    sh(&agent, "sleep 1").await;
    let stuck = resident_kib(server.pid());
    assert!(
        stuck - before < 48 << 10,
        "the server holds {} KiB for a client that does not read",
        stuck - before
    );
    drop(process);
    server.stop().await;
}

#[tokio::test]
async fn deadlines_end_what_does_not_listen_and_clients_come_and_go() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("exec", &["--waiting-vmms", "1"], 1).await;
    let client = server.client();
    let mut body = new_sandbox();
    body.env_vars = Some([("FROM_CREATE".into(), "yes".into())].into());
    let sandbox = client.create(&body, None).await.expect("a create").sandbox;
    let agent = agent_of(&client, &sandbox);
    assert_eq!(
        sh(&agent, "echo $FROM_CREATE $E2B_SANDBOX_ID $HOME $PWD").await,
        format!("yes {} /home/user /home/user\n", sandbox.sandbox_id)
    );

    // It ignores SIGTERM, and so do its children.
    let mut deaf = shell("trap '' TERM; echo $$ > /tmp/deaf; while :; do sleep 0.2; done");
    deaf.deadline = Some(Duration::from_secs(2));
    let error = agent.run(&deaf, 0).await.expect_err("a deadline");
    assert!(
        matches!(&error, Error::Agent(inner) if inner.code == kelvin_client::agent::DEADLINE_EXCEEDED),
        "{error}"
    );
    let gone =
        "for i in $(seq 100); do kill -0 $(cat /tmp/deaf) 2>/dev/null || exit 0; sleep 0.1; done; exit 1";
    sh(&agent, gone).await;

    // A client that goes away leaves the process running; what it said meanwhile is there for the next.
    // It says nothing before: what was sent to a client is not sent to the next.
    let talk =
        "until [ -e /tmp/left ]; do sleep 0.1; done; echo first; sleep 2; echo second; sleep 1; exit 5";
    let mut process = agent.start(&shell(talk)).await.expect("a start");
    let Ok(Some(Told::Started { pid })) = process.next().await else { panic!("no start") };
    drop(process);
    assert!(agent.processes().await.expect("a list").iter().any(|process| process.pid == pid));
    // The second in which the agent may learn that nobody reads any more is seen nowhere.
    sh(&agent, "sleep 1; touch /tmp/left; sleep 2.5").await;
    let mut attached = agent.attach(pid).await.expect("it still runs");
    let (mut text, mut code) = (String::new(), None);
    while let Some(told) = attached.next().await.expect("a stream") {
        match told {
            Told::Stdout(bytes) => text.push_str(&String::from_utf8_lossy(&bytes)),
            Told::Ended { exit_code, .. } => code = Some(exit_code),
            Told::Started { pid: same } => assert_eq!(same, pid),
            Told::Stderr(_) => {}
        }
    }
    assert_eq!((text.as_str(), code), ("first\nsecond\n", Some(5)));
    // Its end was read: then it is forgotten.
    if let Ok(mut late) = agent.attach(pid).await {
        assert!(late.next().await.expect_err("forgotten").to_string().contains("not found"));
    }

    // Signals, input, a second client at the same time.
    let mut cat = agent
        .start(&Command { program: "cat".into(), stdin: true, ..Command::default() })
        .await
        .expect("a start");
    let Ok(Some(Told::Started { pid })) = cat.next().await else { panic!("no start") };
    let mut second = agent.attach(pid).await.expect("a second client");
    agent.feed(pid, b"hello\n".to_vec()).await.expect("input");
    assert!(matches!(second.next().await, Ok(Some(Told::Started { .. }))));
    assert_eq!(second.next().await.expect("output"), Some(Told::Stdout(b"hello\n".to_vec())));
    assert_eq!(cat.next().await.expect("output"), Some(Told::Stdout(b"hello\n".to_vec())));
    agent.signal(pid, false).await.expect("a signal");
    assert!(matches!(cat.next().await, Ok(Some(Told::Ended { exit_code: -1, .. }))));
    assert!(agent.signal(999_999, true).await.is_err(), "a pid that is not ours");

    // The token, the user, the directory.
    let stranger = client.agent(&sandbox.sandbox_id, None, None).expect("a URL");
    assert!(stranger.processes().await.expect_err("no token").to_string().contains("unauthenticated"));
    let nobody = client
        .agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), Some("nosuch".into()))
        .expect("a URL");
    assert!(
        nobody
            .run(&shell("true"), 0)
            .await
            .expect_err("no user")
            .to_string()
            .contains("invalid username: 'nosuch'")
    );
    let lost = Command { cwd: Some("/nosuch".into()), ..shell("true") };
    assert!(agent.run(&lost, 0).await.expect_err("no directory").to_string().contains("does not exist"));

    // A sandbox that is killed cuts its streams; it does not end them cleanly.
    let mut process = agent.start(&shell("sleep 100")).await.expect("a start");
    assert!(matches!(process.next().await, Ok(Some(Told::Started { .. }))));
    client.kill(&sandbox.sandbox_id).await.expect("a kill");
    let cut = tokio::time::timeout(LIMIT, process.next()).await.expect("the stream ends");
    assert!(cut.is_err(), "{cut:?}");
    server.stop().await;
}
