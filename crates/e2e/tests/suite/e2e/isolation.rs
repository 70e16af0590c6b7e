//! Two hundred machines of one snapshot: each is a machine of its own, and nothing is left of them.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use kelvin_e2e::{Ground, agent_of, new_sandbox, sh};

const COUNT: usize = 200;
const AT_ONCE: usize = 8;

#[derive(Debug)]
struct Seen {
    /// Host name, machine-id, boot-id, random bytes.
    identity: [String; 4],
    clock_error: f64,
}

#[tokio::test]
async fn two_hundred_machines_share_nothing_and_leave_nothing() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("isolation", &[], AT_ONCE as u32).await;
    let mounts = || std::fs::read_to_string("/proc/self/mountinfo").expect("mounts").lines().count();
    let loops = || {
        std::fs::read_dir("/sys/block")
            .expect("blocks")
            .flatten()
            .filter(|entry| entry.path().join("loop").exists())
            .count()
    };
    let before = server.settle().await;
    let (mounts_before, loops_before, vmms_before) = (mounts(), loops(), server.vmms().len());

    let mut seen = Vec::new();
    let mut tasks = tokio::task::JoinSet::new();
    let mut started = 0;
    while seen.len() < COUNT {
        while started < COUNT && tasks.len() < AT_ONCE {
            started += 1;
            let client = server.client();
            tasks.spawn(async move {
                let sandbox = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
                let agent = agent_of(&client, &sandbox);
                let now = || SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_secs_f64();
                let asked = now();
                // The disk: nobody else's file is there, and one's own can be written.
                let text = sh(
                    &agent,
                    "date +%s.%N; hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id; \
                    head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo; \
                    ls /var/tmp; hostname > /var/tmp/mine; sync; cat /var/tmp/mine",
                )
                .await;
                let answered = now();
                let lines: Vec<&str> = text.lines().collect();
                assert_eq!(lines.len(), 6, "a stranger's file is on the disk: {text}");
                assert_eq!(lines[1], sandbox.sandbox_id.as_str());
                assert_eq!(lines[5], lines[1]);
                let clock: f64 = lines[0].parse().expect("a time");
                let clock_error = (asked - clock).max(clock - answered).max(0.0);
                client.kill(&sandbox.sandbox_id).await.expect("a kill");
                Seen { identity: [lines[1], lines[2], lines[3], lines[4]].map(str::to_owned), clock_error }
            });
        }
        seen.push(tasks.join_next().await.expect("a task").expect("a machine"));
    }
    for field in 0..4 {
        let distinct: BTreeSet<&String> = seen.iter().map(|one| &one.identity[field]).collect();
        assert_eq!(distinct.len(), COUNT, "two machines share {distinct:?}");
    }
    let worst = seen.iter().map(|one| one.clock_error).fold(0.0, f64::max);
    println!(
        "{COUNT} machines, {AT_ONCE} at once: all distinct, clocks outside of the asking by at most {worst:.3} s"
    );
    assert!(worst < 1.0, "a clock is {worst} s off");

    let after = server.settle().await;
    assert_eq!((after.sandboxes, after.ledger_entries), (0, before.ledger_entries));
    assert_eq!(after.memory_reserved_mb, before.memory_reserved_mb);
    assert_eq!((mounts(), loops(), server.vmms().len()), (mounts_before, loops_before, vmms_before));
    assert_eq!(server.machines().len(), vmms_before);
    server.stop().await;
}
