//! Snapshots that are kept: their names, their children, and what becomes of those that others have touched.

use std::fs;
use std::time::{Duration, Instant};

use kelvin_api::sandbox::{FileState, NewSandbox, SandboxState, SnapshotVerification, StartPath};
use kelvin_client::Client;
use kelvin_e2e::{Ground, LIMIT, Server, agent_of, new_sandbox, sh, start_counter};

use super::freeze::{goes_on, refused, snapshots, state};

#[tokio::test]
#[allow(clippy::too_many_lines, reason = "one story: each step rests on what the one before it left")]
async fn snapshots_have_names_children_and_only_their_own_disks() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("kept", &["--waiting-vmms", "1"], 1).await;
    let client = server.client();
    let sandbox = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
    let (id, agent) = (sandbox.sandbox_id.as_str(), agent_of(&client, &sandbox));
    start_counter(&agent).await;
    sh(&agent, "echo first > /home/user/note").await;
    let (first, capture) = client.snapshot(id, Some("mine")).await.expect("a snapshot");
    assert!(capture.quiesced && capture.dirty_pages.is_some(), "{capture:?}");
    sh(&agent, "echo second > /home/user/note").await;
    client.snapshot(id, Some("mine")).await.expect("another");
    assert_eq!(first.names, ["mine"]);
    let (count, token) = state(&agent).await;
    goes_on(&agent, count).await;
    // From each, by id; the newest by name. What ran, runs.
    let mut made = Vec::new();
    for (template, note) in
        [(first.snapshot_id.as_str(), "first\n"), ("mine", "second\n"), ("mine:default", "second\n")]
    {
        let body = NewSandbox { template_id: template.to_owned(), ..new_sandbox() };
        let child = client.create(&body, None).await.expect("a create").sandbox;
        let agent = agent_of(&client, &child);
        assert_eq!(sh(&agent, "cat /home/user/note").await, note);
        let (count, same) = state(&agent).await;
        assert_eq!(same, token);
        goes_on(&agent, count).await;
        assert_eq!(sh(&agent, "hostname").await, format!("{}\n", child.sandbox_id));
        made.push(child);
    }
    // Bad requests.
    for (body, code) in [
        (NewSandbox { template_id: "mine".into(), memory_mb: Some(512), ..new_sandbox() }, "snapshot_fixed"),
        (
            NewSandbox { template_id: "mine".into(), start_path: Some(StartPath::Cold), ..new_sandbox() },
            "start_path_impossible",
        ),
        (NewSandbox { template_id: "yours".into(), ..new_sandbox() }, "template_not_found"),
    ] {
        assert_eq!(refused(client.create(&body, None).await.expect_err(code)).1, code);
    }
    assert_eq!(refused(client.snapshot(id, Some("Bad Name")).await.expect_err("a name")).1, "invalid_name");
    assert_eq!(refused(client.snapshot(id, Some("base")).await.expect_err("a template's")).1, "name_taken");
    assert_eq!(refused(client.snapshot("nosuchsandbox", None).await.expect_err("nobody")).0, 404);
    // A snapshot of a sandbox that came from one descends from it.
    let (third, _) = client.snapshot(made[0].sandbox_id.as_str(), None).await.expect("a snapshot");
    assert_eq!(third.parent_id.as_deref(), Some(first.snapshot_id.as_str()));
    assert_eq!(client.snapshots().await.expect("a list").len(), 3);
    let (status, code, text) =
        refused(client.delete_snapshot(&first.snapshot_id, false).await.expect_err("it is needed"));
    assert_eq!((status, code.as_str()), (409, "in_use"));
    assert!(text.contains(&third.snapshot_id) && text.contains(made[0].sandbox_id.as_str()), "{text}");
    client.kill(&made[0].sandbox_id).await.expect("a kill");
    server.settle().await;
    let (_, _, text) =
        refused(client.delete_snapshot(&first.snapshot_id, false).await.expect_err("it has a child"));
    assert!(text.contains(&third.snapshot_id) && !text.contains("sandbox "), "{text}");
    client.delete_snapshot(&first.snapshot_id, true).await.expect("with its child");
    assert_eq!(client.snapshots().await.expect("a list").len(), 1);
    assert_eq!(refused(client.delete_snapshot(&first.snapshot_id, true).await.expect_err("gone")).0, 404);

    // Old memory over a newer disk, over another sandbox's, and a file that was touched.
    let file = |snapshot: &str, name: &str| server.data_dir().join("snapshots").join(snapshot).join(name);
    let (older, _) = client.snapshot(id, Some("older")).await.expect("a snapshot");
    sh(&agent, "echo newer > /home/user/note; sync").await;
    let (newer, _) = client.snapshot(id, Some("newer")).await.expect("a snapshot");
    let other = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
    let (others, _) = client.snapshot(other.sandbox_id.as_str(), Some("others")).await.expect("a snapshot");
    let create = async |template: &str| {
        let body = NewSandbox { template_id: template.to_owned(), ..new_sandbox() };
        client.create(&body, None).await
    };
    fs::remove_file(file(&older.snapshot_id, "disk")).expect("a file");
    fs::copy(file(&newer.snapshot_id, "disk"), file(&older.snapshot_id, "disk")).expect("a copy");
    let (status, code, text) = refused(create("older").await.expect_err("a newer disk"));
    assert_eq!((status, code.as_str()), (500, "snapshot_corrupt"));
    assert!(text.contains(&format!("disk of snapshot {}", older.snapshot_id)), "{text}");
    fs::rename(file(&others.snapshot_id, "disk"), file(&newer.snapshot_id, "disk")).expect("a rename");
    let (_, _, text) = refused(create("newer").await.expect_err("another sandbox's disk"));
    assert!(text.contains(&format!("disk of snapshot {}", newer.snapshot_id)), "{text}");
    // A paused sandbox's memory, touched: it stays paused, with its name in the refusal.
    client.pause(id).await.expect("a pause");
    server.settle().await;
    let images: Vec<_> = fs::read_dir(server.data_dir().join("snapshots"))
        .expect("a directory")
        .flatten()
        .map(|entry| entry.path())
        .collect();
    let image = images
        .iter()
        .find(|path| {
            fs::read_to_string(path.join("manifest.json")).is_ok_and(|text| text.contains("\"pause\""))
        })
        .expect("its image");
    fs::set_permissions(image.join("memory"), std::os::unix::fs::PermissionsExt::from_mode(0o444))
        .expect("a touch");
    let (_, code, text) = refused(client.resume(id, 60).await.expect_err("it was touched"));
    assert_eq!(code, "snapshot_corrupt");
    assert!(text.contains("memory of snapshot") && text.contains("touched"), "{text}");
    assert_eq!(client.sandbox(id).await.expect("a detail").state, SandboxState::Paused);
    client.kill(&sandbox.sandbox_id).await.expect("a kill");
    for sandbox in made.iter().skip(1).chain([&other]) {
        client.kill(&sandbox.sandbox_id).await.expect("a kill");
    }
    server.settle().await;
    a_kept_snapshot_that_rots_is_told_by_its_chunk(&server, &client, "mine", &older.snapshot_id).await;
    for snapshot in ["older", "newer", "others", "mine"] {
        client.delete_snapshot(snapshot, false).await.expect("nothing needs it");
    }
    // Its files may still be read, for their digests.
    server.settle().await;
    assert_eq!(snapshots(&server), 1, "only the template's");
    server.stop().await;
}

/// `name` is a snapshot that nobody has touched; the disk of `touched` is another's.
async fn a_kept_snapshot_that_rots_is_told_by_its_chunk(
    server: &Server,
    client: &Client,
    name: &str,
    touched: &str,
) {
    let started = Instant::now();
    let whole = loop {
        let found = client.verify_snapshot(name).await.expect("a verification");
        assert!(found.intact, "{found:?}");
        if found.files.iter().all(|file| file.state == FileState::Intact) {
            break found;
        }
        assert!(started.elapsed() < LIMIT, "it gets no digests: {found:?}");
        tokio::time::sleep(Duration::from_millis(250)).await;
    };
    println!("digests after {:.1} s: {:?}", started.elapsed().as_secs_f32(), whole.files);
    let found = client.verify_snapshot(touched).await.expect("a verification");
    let states: Vec<_> = found.files.iter().map(|file| file.state).collect();
    assert!(!found.intact && matches!(states[2], FileState::Unsealed | FileState::Damaged), "{found:?}");
    // One byte of the second chunk.
    let memory = server.data_dir().join("snapshots").join(&whole.snapshot_id).join("memory");
    let file = fs::File::options().read(true).write(true).open(memory).expect("root may");
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, (4 << 20) + 5).expect("a byte");
    std::os::unix::fs::FileExt::write_all_at(&file, &[byte[0] ^ 1], (4 << 20) + 5).expect("another");
    let verify = server.cli(&["--output", "json", "snapshot", "verify", name]).output().expect("a command");
    let text = String::from_utf8_lossy(&verify.stdout);
    assert_eq!(verify.status.code(), Some(1), "{text}");
    let found: Vec<SnapshotVerification> = serde_json::from_str(&text).expect("its result");
    assert_eq!((found[0].files[0].state, &found[0].files[0].chunks[..]), (FileState::Damaged, &[1][..]));
    assert_eq!(refused(client.verify_snapshot("absent").await.expect_err("none")).0, 404);
}
