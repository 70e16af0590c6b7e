//! What Firecracker's jail keeps a VMM to, when something has broken out of its guest: tried by a process that is put
//! in the VMM's place, its control group.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use kelvin_e2e::promises::Limit::AtMost;
use kelvin_e2e::promises::{bench, p50, promise, ratio};
use kelvin_e2e::{Ground, LIMIT, Server, agent_of, new_sandbox, sh};

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

/// The control group of a process.
pub fn group_of(pid: i32) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("it runs");
    let path = text.lines().find_map(|line| line.strip_prefix("0::/")).expect("version 2");
    Path::new("/sys/fs/cgroup").join(path)
}

/// Runs a shell command inside of a control group; its standard output.
fn inside(group: &Path, script: &str) -> String {
    let output = Command::new("sh")
        .args(["-c", &format!("echo $$ >{}/cgroup.procs; {script}", group.display())])
        .stdin(Stdio::null())
        .output()
        .expect("a shell");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Ends what runs in a control group beside its VMM.
fn only(group: &Path, vmm: i32) {
    let started = Instant::now();
    loop {
        let text = fs::read_to_string(group.join("cgroup.procs")).expect("processes");
        // KVM's own worker for the machine is in its group too: it runs no program, and nothing kills it.
        let is_program = |pid: &&str| fs::read_link(format!("/proc/{pid}/exe")).is_ok();
        let strays: Vec<&str> =
            text.lines().filter(|pid| pid.parse() != Ok(vmm)).filter(is_program).collect();
        if strays.is_empty() {
            return;
        }
        assert!(started.elapsed() < LIMIT, "{strays:?} do not end");
        let _ = Command::new("sh").args(["-c", "kill -9 \"$@\"", "sh"]).args(&strays).output();
    }
}

/// A counter of a file of a control group: `name value`.
fn counter(group: &Path, file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(group.join(file)).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or(0)
}

/// The VMMs of a server that were not there before.
fn new_vmm(server: &Server, before: &std::collections::BTreeSet<i32>) -> i32 {
    let now = server.vmms();
    let mut new = now.difference(before);
    let one = *new.next().expect("a VMM");
    assert_eq!(new.next(), None, "one VMM");
    one
}

#[tokio::test]
async fn firecracker_keeps_what_breaks_out_to_its_limits() {
    if !is_firecracker() {
        return;
    }
    let Some(ground) = Ground::find() else { return };
    let limits = ["--waiting-vmms", "0", "--sandbox-disk-bandwidth", "2", "--sandbox-disk-iops", "400"];
    let server = ground.server("limits", &limits).await;
    server.bake(0).await;
    let client = server.client();
    let before = server.vmms();
    let hostile = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
    let pid = new_vmm(&server, &before);
    let neighbour = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
    let agent = agent_of(&client, &neighbour);
    assert_eq!(sh(&agent, "echo here").await, "here\n");
    let group = group_of(pid);
    assert!(group.ends_with(server.machine_of(pid)), "{}", group.display());

    // Processes: far fewer than were asked for.
    let forked = inside(
        &group,
        "python3 -c '
import os
# Each ends with this one, however it ends.
made, (ends, held) = 0, os.pipe()
try:
    while made < 300:
        if os.fork() == 0:
            os.close(held)
            os.read(ends, 1)
            os._exit(0)
        made += 1
except BlockingIOError:
    pass
print(made)'",
    );
    only(&group, pid);
    let refused = counter(&group, "pids.events", "max ");
    let most = fs::read_to_string(group.join("pids.max")).expect("a limit");
    println!("of 300 processes there were {} of {}, {refused} refused", forked.trim(), most.trim());
    let (forked, most): (u32, u32) =
        (forked.trim().parse().expect("a number"), most.trim().parse().expect("a number"));
    assert!((1..most.min(100)).contains(&forked) && refused > 0, "{forked} processes, {refused} refused");

    // The disk: 2 MiB each second are the guest's, what has broken out has twice that.
    let file = server.data_dir().join("run/hog");
    let started = Instant::now();
    inside(&group, &format!("dd if=/dev/zero of={} bs=1M count=24 oflag=direct 2>/dev/null", file.display()));
    let took = started.elapsed().as_secs_f64();
    assert_eq!(fs::metadata(&file).expect("it was written").len(), 24 << 20);
    fs::remove_file(&file).expect("it can be removed");
    println!("24 MiB took {took:.1} s, {:.1} MiB/s of 4", 24.0 / took);
    assert!(24.0 / took < 5.0, "{:.1} MiB/s", 24.0 / took);
    // The guest itself is kept to its own limit, in its restored machine too.
    let own = agent_of(&client, &hostile);
    let started = Instant::now();
    sh(&own, "dd if=/dev/zero of=/tmp/hog bs=1M count=12 oflag=direct 2>/dev/null; rm /tmp/hog").await;
    let rate = 12.0 / started.elapsed().as_secs_f64();
    println!("the guest writes {rate:.1} MiB/s of 2");
    assert!(rate < 3.5, "{rate:.1} MiB/s");

    // Memory, last: the group goes as a whole, with the VMM in it.
    let free = || {
        let text = fs::read_to_string("/proc/meminfo").expect("memory");
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).expect("a line");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") >> 10
    };
    let had = free();
    let said = inside(&group, "python3 -c 'bytearray(2 << 30)'; echo lived");
    assert_eq!(said, "", "2 GiB were had in a group of 320 MiB");
    let started = Instant::now();
    while client.sandbox(hostile.sandbox_id.as_str()).await.is_ok() {
        assert!(started.elapsed() < LIMIT, "its sandbox goes on\n{}", server.log());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert!(free() + 512 > had, "the host had {had} MiB and has {}", free());

    // The neighbour has noticed nothing.
    assert_eq!(sh(&agent, "echo still here").await, "still here\n");
    server.settle().await;
    assert!(!group.exists(), "the group is gone with its machine");
    server.stop().await;
    let left: Vec<_> = fs::read_dir("/sys/fs/cgroup/kelvin").expect("groups").flatten().collect();
    assert!(left.iter().all(|entry| !entry.path().is_dir()), "groups are left: {left:?}");
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

/// Restores of `../shared/prototypes/firecracker_clone.py` in milliseconds, p50 of fifty; `None`, and a line that says why,
/// where it is not.
fn prototype(server: &Server) -> Option<f64> {
    let named = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.exists());
    let (Some(program), Some(initrd)) = (named("KELVIN_E2E_PROTOTYPE"), named("KELVIN_E2E_PROTOTYPE_INITRD"))
    else {
        println!("skipped: no ../shared/prototypes/firecracker_clone.py with its guest to compare with");
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
        let report = bench(server, &["-n", "8", "--path", path, "--baseline"]);
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
            / p50(&bench(&server, &["-n", "8"]), "create_ms")
    });
    server.stop().await;
}
