//! QEMU with hardware virtualisation: the same driver as everywhere, another accelerator.
//!
//! `cargo xtask kvm-host -- cargo xtask test --driver qemu` runs it where the machine itself has no KVM.

use std::fs;
use std::time::Instant;

use kelvin_api::sandbox::StartPath;
use kelvin_e2e::{Ground, LIMIT, agent_of, new_sandbox, sh, start_counter};
use kelvin_host::accel::{self, Accelerator};

/// A clone, a pause and a resume on `/dev/kvm`: its VMM has the device open, and what ran goes on with its memory.
#[tokio::test]
async fn qemu_runs_on_kvm() {
    if super::firecracker::is_vmm() {
        println!("skipped: the servers of this run use Firecracker, which has tests of its own");
        return;
    }
    let found = accel::detect();
    if found.accelerator != Accelerator::Kvm {
        // There it must not pass by being skipped.
        assert!(std::env::var_os("KELVIN_KVM_HOST").is_none(), "the KVM host has no KVM: {}", found.reason);
        println!(
            "skipped: no KVM ({}): `cargo xtask kvm-host -- cargo xtask test --driver qemu` has it",
            found.reason
        );
        return;
    }
    let Some(ground) = Ground::find() else { return };
    let server = ground.server("kvm", &["--waiting-vmms", "1", "--no-auto-bake"]).await;
    server.bake(1).await;
    let client = server.client();
    let node = client.node().await.expect("a node");
    assert!(node.vmm.starts_with("qemu"), "{}", node.vmm);
    assert_eq!(node.accelerator, "kvm");

    let cloned = client.create(&new_sandbox(), None).await.expect("a clone");
    let sandbox = cloned.sandbox;
    assert_eq!(sandbox.start_path, Some(StartPath::Clone), "{:?}", sandbox.start_reason);
    let agent = agent_of(&client, &sandbox);
    let pid = start_counter(&agent).await;
    server.settle().await;
    // Not what it was told to use: what it has.
    for vmm in server.vmms() {
        let descriptors = fs::read_dir(format!("/proc/{vmm}/fd")).expect("it runs").flatten();
        let opened: Vec<_> = descriptors.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
        let text = format!("{opened:?}");
        assert!(text.contains("/dev/kvm") && text.contains("anon_inode:kvm-vcpu"), "{text}");
    }
    let before = sh(&agent, "cat /tmp/state").await;
    let token = before.split_whitespace().nth(1).expect("a token").to_owned();

    let id = sandbox.sandbox_id.as_str();
    client.pause(id).await.expect("a pause");
    server.node_when("paused", |node| node.paused == 1 && node.sandboxes == 0 && node.settled).await;
    client.resume(id, 600).await.expect("a resume");
    let started = Instant::now();
    let goes_on = format!("kill -0 {pid} && cat /tmp/state");
    loop {
        let now = sh(&agent, &goes_on).await;
        assert_eq!(now.split_whitespace().nth(1), Some(token.as_str()), "its memory is another's");
        let count = |text: &str| text.split_whitespace().next().and_then(|word| word.parse::<u64>().ok());
        if count(&now) > count(&before) {
            println!("clone, pause and resume on {} with accelerator {}", node.vmm, node.accelerator);
            break;
        }
        assert!(started.elapsed() < LIMIT, "the counter stands still at {now}");
    }
    server.stop().await;
}
