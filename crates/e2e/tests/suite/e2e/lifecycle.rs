//! Time limits, lists, and two servers that must not meet.

use std::time::{Duration, Instant};

use kelvin_client::Error;
use kelvin_e2e::{Ground, agent_of, new_sandbox, sh};

#[tokio::test]
async fn sandboxes_end_on_time_and_lists_have_pages() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("lifecycle", &["--waiting-vmms", "4"], 4).await;
    let client = server.client();

    // The node ends it, nobody has to ask.
    let mut body = new_sandbox();
    body.timeout = Some(2);
    let short = client.create(&body, None).await.expect("a create").sandbox;
    let started = Instant::now();
    server.node_when("ended", |node| node.sandboxes == 0).await;
    let lived = started.elapsed();
    assert!((Duration::from_millis(1000)..Duration::from_secs(6)).contains(&lived), "it lived {lived:?}");
    let gone = client.sandbox(short.sandbox_id.as_str()).await.expect_err("it has ended");
    assert!(matches!(gone, Error::Refused(refused) if refused.code == 404));
    assert!(agent_of(&client, &short).processes().await.is_err());

    // A limit can be moved, both ways.
    let sandbox = client.create(&body, None).await.expect("a create").sandbox;
    client.set_timeout(&sandbox.sandbox_id, 60).await.expect("longer");
    sh(&agent_of(&client, &sandbox), "sleep 3").await;
    client.set_timeout(&sandbox.sandbox_id, 0).await.expect("now");
    server.node_when("ended", |node| node.sandboxes == 0).await;

    // Pages: every sandbox once, newest first; filters hold on every page.
    let mut made = Vec::new();
    for index in 0..5 {
        let mut body = new_sandbox();
        body.metadata =
            Some([("n".into(), (index % 2).to_string()), ("odd & strange".into(), "a=b&c".into())].into());
        made.push(client.create(&body, None).await.expect("a create").sandbox.sandbox_id);
    }
    made.reverse();
    let mut seen = Vec::new();
    let mut next = None;
    loop {
        let page = client
            .list(&[("odd & strange".into(), "a=b&c".into())], 2, next.as_deref())
            .await
            .expect("a page");
        assert!(page.sandboxes.len() <= 2);
        seen.extend(page.sandboxes.into_iter().map(|sandbox| sandbox.sandbox_id));
        next = page.next;
        if next.is_none() {
            break;
        }
    }
    assert_eq!(seen, made);
    assert_eq!(client.list_all(&[("n".into(), "1".into())]).await.expect("a list").len(), 2);
    let listed = client.list_all(&[]).await.expect("a list");
    assert!(listed.iter().all(|sandbox| sandbox.envd_access_token.is_none()), "a list shows no tokens");

    // Fifty creates with ten keys make ten sandboxes.
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..30 {
        let client = client.clone();
        tasks.spawn(async move { client.create(&new_sandbox(), Some(&format!("key {}", index % 3))).await });
    }
    let ids: std::collections::BTreeSet<_> =
        tasks.join_all().await.into_iter().map(|made| made.expect("a create").sandbox.sandbox_id).collect();
    assert_eq!(ids.len(), 3);

    // A second server on the same data directory is refused.
    let second = server.cli(&["serve", "--listen", "127.0.0.1:0"]).output().expect("kelvin runs");
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("another server uses"));
    // The key and the databases are for the server alone.
    for name in ["api-key", "kelvin.db", "ledger.db"] {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(server.data_dir().join(name)).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    // VMMs run as users of their own, without privileges.
    if rustix::process::geteuid().is_root() {
        // One that is being started has not dropped everything yet.
        server.settle().await;
        let mut users = std::collections::BTreeSet::new();
        let mut filtered = 0;
        for pid in server.vmms() {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a status");
            let field = |name: &str| {
                status.lines().find_map(|line| line.strip_prefix(name)).expect("a field").trim().to_owned()
            };
            assert_eq!(field("CapEff:"), "0000000000000000");
            assert_eq!(field("NoNewPrivs:"), "1");
            // Firecracker sets the filter of its first thread before a guest runs, not while it waits for one.
            let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
            if !field("Name:").starts_with("firecracker") || maps.contains("/memory") {
                assert_eq!(field("Seccomp:"), "2");
                filtered += 1;
            }
            users.insert(field("Uid:").split_whitespace().next().expect("a uid").to_owned());
        }
        let sandboxes = client.list_all(&[]).await.expect("a list").len();
        assert!(filtered >= sandboxes.max(1), "{filtered} of {sandboxes} are filtered");
        assert_eq!(users.len(), server.vmms().len(), "each has its own user");
        assert!(!users.contains("0"));
    }
    server.stop().await;
}
