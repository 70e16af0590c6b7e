//! What Firecracker alone has: limits of the disk, and its own speed.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use kelvin_e2e::promises::Limit::AtMost;
use kelvin_e2e::promises::{bench, p50, promise, ratio};
use kelvin_e2e::{Ground, Server, agent_of, new_sandbox, sh};

use super::groups::{group_of, inside, new_vmm};

/// Whether the servers of these tests use Firecracker.
pub fn is_vmm() -> bool {
    std::env::var("KELVIN_VMM").is_ok_and(|vmm| vmm == "firecracker")
}

/// The same, or a line that says that they do not.
fn is_firecracker() -> bool {
    if !is_vmm() {
        println!(
            "skipped: no firecracker, `cargo xtask kvm-host -- cargo xtask test --driver firecracker` has it"
        );
    }
    is_vmm()
}

/// A firecracker's group has twice what the disk gives its guest; the guest is kept to its own, in a restored machine too.
#[tokio::test]
async fn firecracker_keeps_what_breaks_out_to_the_limits_of_the_disk() {
    if !is_firecracker() {
        return;
    }
    let Some(ground) = Ground::find() else { return };
    let limits = ["--waiting-vmms", "0", "--sandbox-disk-bandwidth", "2", "--sandbox-disk-iops", "400"];
    let server = ground.baked("disk-limits", &limits, 0).await;
    let client = server.client();
    let before = server.vmms();
    let hostile = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
    let group = group_of(new_vmm(&server, &before));
    let file = server.data_dir().join("run/hog");
    let started = Instant::now();
    inside(&group, &format!("dd if=/dev/zero of={} bs=1M count=24 oflag=direct 2>/dev/null", file.display()));
    let took = started.elapsed().as_secs_f64();
    assert_eq!(fs::metadata(&file).expect("it was written").len(), 24 << 20);
    fs::remove_file(&file).expect("it can be removed");
    println!("24 MiB took {took:.1} s, {:.1} MiB/s of 4", 24.0 / took);
    assert!(24.0 / took < 5.0, "{:.1} MiB/s", 24.0 / took);
    let own = agent_of(&client, &hostile);
    let started = Instant::now();
    sh(&own, "dd if=/dev/zero of=/tmp/hog bs=1M count=12 oflag=direct 2>/dev/null; rm /tmp/hog").await;
    let rate = 12.0 / started.elapsed().as_secs_f64();
    println!("the guest writes {rate:.1} MiB/s of 2");
    assert!(rate < 3.5, "{rate:.1} MiB/s");
    server.stop().await;
}

#[tokio::test]
async fn firecracker_sandboxes_are_not_lost_to_a_server_of_qemu() {
    if !is_firecracker() {
        return;
    }
    let Some(ground) = Ground::find() else { return };
    let mut server = ground.baked("other-vmm", &["--waiting-vmms", "0"], 0).await;
    let sandbox = server.client().create(&new_sandbox(), None).await.expect("a create").sandbox;
    server.kill_9();
    let had = server.vmms();
    let said = server.refuses(&["--vmm", "qemu"]);
    assert!(said.contains("1 sandboxes run in firecracker") && said.contains("--vmm firecracker"), "{said}");
    assert_eq!(server.vmms(), had, "it goes on");
    server.start(&["--waiting-vmms", "0"]).await;
    let client = server.client();
    assert_eq!(sh(&agent_of(&client, &sandbox), "echo here").await, "here\n");
    server.stop().await;
}

/// Restores of `firecracker_clone.py` (see `crates/xtask/src/prototype.rs`) in milliseconds, p50 of fifty; `None`, and a
/// line that says why, where it is not.
fn prototype(server: &Server) -> Option<f64> {
    let named = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.exists());
    let (Some(program), Some(initrd)) = (named("KELVIN_E2E_PROTOTYPE"), named("KELVIN_E2E_PROTOTYPE_INITRD"))
    else {
        println!("skipped: no .cache/prototypes/firecracker_clone.py with its guest to compare with");
        return None;
    };
    let guests = fs::read_dir(server.data_dir().join("guests")).expect("guests").flatten();
    let kernel =
        guests.map(|entry| entry.path().join("vmlinux")).find(|kernel| kernel.exists()).expect("a kernel");
    let directory = server.data_dir().join("run/prototype");
    let guest = directory.join("guest");
    fs::create_dir_all(&guest).expect("a directory");
    fs::copy(kernel, guest.join("vmlinuz")).expect("a kernel");
    fs::copy(initrd, guest.join("initrd.gz")).expect("an initial RAM disk");
    let output = Command::new("python3")
        .arg(program)
        .arg("--firecracker")
        .arg(std::env::var_os("KELVIN_FIRECRACKER").expect("a firecracker"))
        .arg("--guest")
        .arg(&guest)
        .arg("--dir")
        .arg(directory.join("machines"))
        .args(["-n", "50"])
        .stdin(Stdio::null())
        .output()
        .expect("python3");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fs::remove_dir_all(&directory).expect("it can be removed");
    let lines = String::from_utf8_lossy(&output.stdout).into_owned();
    let steps = lines.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let clones: Vec<_> = steps.filter(|step| step["total_ms"].is_number()).collect();
    assert_eq!(clones.len(), 50, "{lines}");
    let middle = |part: &str| {
        let mut all: Vec<f64> = clones.iter().filter_map(|clone| clone[part].as_f64()).collect();
        all.sort_by(f64::total_cmp);
        all[24]
    };
    let [spawn, load, ready, total] = ["spawn_ms", "load_ms", "ready_ms", "total_ms"].map(middle);
    println!(
        "firecracker_clone.py, p50: spawn {spawn}, load {load}, first answer {ready}, together {total} ms"
    );
    Some(total)
}

/// Measures a path against the bare sequence, and the prototype where there is one.
fn is_as_fast(server: &Server, path: &str, limit: f64) {
    // First: it is printed whether the promise is kept or not.
    let prototype = prototype(server);
    let mut measured = Vec::new();
    promise(&format!("{path} ÷ bare restore, p50"), AtMost(limit), || {
        let report = bench(server, &["-n", "9", "--path", path, "--baseline"]);
        println!("{report}");
        measured.push(p50(&report, "create_ms"));
        ratio(&report)
    });
    measured.sort_by(f64::total_cmp);
    let Some(prototype) = prototype else { return };
    let ratio = measured[measured.len() / 2] / prototype;
    println!("{path} ÷ firecracker_clone.py, p50: {ratio:.3} (promised at most {limit})");
    assert!(ratio <= limit, "{ratio:.3}");
}

#[tokio::test]
async fn firecracker_clones_are_as_fast_as_promised() {
    if !is_firecracker() {
        return;
    }
    let Some(ground) = Ground::find() else { return };
    let server = ground.server("speed", &["--waiting-vmms", "4"]).await;
    server.bake(4).await;
    is_as_fast(&server, "clone", 0.8);
    is_as_fast(&server, "warm", 0.1);
    server.stop().await;
}

#[tokio::test]
async fn firecracker_runs_three_at_once() {
    if !is_firecracker() {
        return;
    }
    if std::thread::available_parallelism().is_ok_and(|processors| processors.get() == 1) {
        println!(
            "skipped: one processor, on which three take three times as long: KELVIN_KVM_HOST_PROCESSORS=2"
        );
        return;
    }
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("three", &["--waiting-vmms", "4"], 4).await;
    promise("three at once ÷ one, p50", AtMost(1.7), || {
        p50(&bench(&server, &["-n", "9", "--concurrency", "3"]), "create_ms")
            / p50(&bench(&server, &["-n", "9"]), "create_ms")
    });
    server.stop().await;
}
