//! What was sealed is what is restored, or it is refused by name.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};

use kelvin_api::sandbox::{NewSandbox, StartPath};
use kelvin_e2e::{Ground, new_sandbox};

#[tokio::test]
async fn a_damaged_snapshot_is_refused_by_the_name_of_its_file() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.server("integrity", &["--waiting-vmms", "1", "--no-auto-bake"]).await;
    let client = server.client();
    for file in ["memory", "state", "disk"] {
        for damage in ["bit", "page"] {
            let id = server.bake(1).await;
            let path = server.data_dir().join("snapshots").join(&id).join(file);
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("a mode");
            let handle = fs::File::options().read(true).write(true).open(&path).expect("a file");
            let length = handle.metadata().expect("a length").len();
            if damage == "bit" {
                let mut byte = [0];
                handle.read_exact_at(&mut byte, length / 2).expect("a byte");
                handle.write_all_at(&[byte[0] ^ 1], length / 2).expect("a byte");
            } else {
                handle.set_len(length.saturating_sub(4096)).expect("a length");
            }
            drop(handle);
            let insisted = NewSandbox { start_path: Some(StartPath::Clone), ..new_sandbox() };
            let error = client.create(&insisted, None).await.expect_err("a damaged snapshot").to_string();
            assert!(error.contains(&format!("{file} of snapshot {id}")), "{file} {damage}: {error}");
            // Without insisting it boots, and says why.
            if (file, damage) == ("memory", "bit") {
                let booted = client.create(&new_sandbox(), None).await.expect("a boot").sandbox;
                assert_eq!(booted.start_path, Some(StartPath::Cold));
                assert!(
                    booted
                        .start_reason
                        .as_deref()
                        .is_some_and(|reason| reason.contains("memory of snapshot"))
                );
                client.kill(&booted.sandbox_id).await.expect("a kill");
            }
        }
    }
    // Every bake made a new one; what nothing uses can be collected, what is used stays.
    let used = server.bake(1).await;
    let garbage = client.collect(true).await.expect("a plan");
    assert!(!garbage["snapshots"].as_array().expect("a list").iter().any(|id| *id == used.as_str()));
    server.stop().await;
}

#[tokio::test]
async fn a_snapshot_of_another_machine_is_not_used_and_the_log_says_why() {
    let Some(ground) = Ground::find() else { return };
    let mut server = ground.server("identity", &["--waiting-vmms", "1", "--no-auto-bake"]).await;
    server.bake(1).await;
    let reason = async |server: &kelvin_e2e::Server, body: &NewSandbox| {
        let client = server.client();
        let sandbox = client.create(body, None).await.expect("a boot").sandbox;
        client.kill(&sandbox.sandbox_id).await.expect("a kill");
        assert_eq!(sandbox.start_path, Some(StartPath::Cold));
        sandbox.start_reason.expect("a reason")
    };
    // Another shape.
    let larger = NewSandbox { memory_mb: Some(320), ..new_sandbox() };
    assert_eq!(reason(&server, &larger).await, "cold: no snapshot for identity (memory_mib differs)");
    let wider = NewSandbox { cpu_count: Some(2), ..new_sandbox() };
    assert_eq!(reason(&server, &wider).await, "cold: no snapshot for identity (vcpus differs)");
    // Another agent: one byte more in the initial RAM disk.
    let initrd = server.data_dir().join("initrd");
    let mut bytes = fs::read(ground.guest("initrd")).expect("an initrd");
    bytes.extend([0; 4]);
    fs::write(&initrd, bytes).expect("a file");
    // Noticed without a restart.
    server.import("base", &ground.guest("vmlinuz"), &initrd);
    assert_eq!(reason(&server, &new_sandbox()).await, "cold: no snapshot for identity (agent differs)");
    // Another kernel: the same with a byte behind its end.
    let kernel = server.data_dir().join("vmlinuz");
    let mut bytes = fs::read(ground.guest("vmlinuz")).expect("a kernel");
    bytes.push(0);
    fs::write(&kernel, bytes).expect("a file");
    server.terminate().await;
    server.import("base", &kernel, &ground.guest("initrd"));
    server.start(&["--waiting-vmms", "1", "--no-auto-bake"]).await;
    assert_eq!(
        reason(&server, &new_sandbox()).await,
        "cold: no snapshot for identity (guest_kernel differs)"
    );
    assert!(server.log().contains("guest_kernel differs"));
    // Nothing uses the old ones now.
    let garbage = server.client().collect(false).await.expect("a collection");
    assert_eq!(garbage["snapshots"].as_array().expect("a list").len(), 1);
    assert!(!garbage["guests"].as_array().expect("a list").is_empty());
    server.stop().await;
}
