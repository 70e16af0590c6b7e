//! What one VMM may take of the host, when something has broken out of its guest: tried by a process that is put in the
//! VMM's place, its control group.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use kelvin_e2e::{Ground, LIMIT, Server, agent_of, new_sandbox, sh};
use kelvin_host::cgroup;

/// The control group of a process.
pub fn group_of(pid: i32) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("it runs");
    let path = text.lines().find_map(|line| line.strip_prefix("0::/")).expect("version 2");
    Path::new("/sys/fs/cgroup").join(path)
}

/// Runs a shell command inside of a control group; its standard output.
pub fn inside(group: &Path, script: &str) -> String {
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
pub fn new_vmm(server: &Server, before: &std::collections::BTreeSet<i32>) -> i32 {
    let now = server.vmms();
    let mut new = now.difference(before);
    let one = *new.next().expect("a VMM");
    assert_eq!(new.next(), None, "one VMM");
    one
}

#[tokio::test]
async fn what_breaks_out_of_its_machine_is_kept_to_its_limits() {
    if let Err(missing) = cgroup::check() {
        // There it must not pass by being skipped.
        assert!(std::env::var_os("KELVIN_KVM_HOST").is_none(), "the KVM host limits nothing: {missing}");
        println!("skipped: {missing}: `cargo xtask kvm-host -- cargo xtask test --driver qemu` has it");
        return;
    }
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("limits", &["--waiting-vmms", "0"], 0).await;
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

    // Memory, last: the group goes as a whole, with the VMM in it.
    let free = || {
        let text = fs::read_to_string("/proc/meminfo").expect("memory");
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).expect("a line");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") >> 10
    };
    let had = free();
    let said = inside(&group, "python3 -c 'bytearray(2 << 30)'; echo lived");
    assert_eq!(said, "", "2 GiB were had in a group of less");
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
