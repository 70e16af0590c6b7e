//! What a server holds of its host, counted from outside.
//!
//! Only what belongs to the server is counted: other tests and other users of the machine come and go meanwhile.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::{Server, slot_links};

/// Databases of a server.
pub const DATABASES: [&str; 2] = ["kelvin.db", "ledger.db"];

/// Numbers by name, in the order in which they are printed.
#[derive(Debug, Clone)]
pub struct Inventory(Vec<Count>);

#[derive(Debug, Clone)]
struct Count {
    name: &'static str,
    now: u64,
    /// How many more there may be later.
    slack: u64,
}

impl Inventory {
    /// Counts what `server` holds now.
    pub async fn take(server: &Server) -> Self {
        let node = server.client().node().await.expect("the node answers");
        let pid = server.pid();
        let data = server.data_dir();
        let vmms = server.vmms();
        let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
        let in_data = |name: &str| entries(&data.join(name)).count() as u64;
        let root = rustix::process::geteuid().is_root();
        let rules =
            if root { kelvin_host::net::nft::run("list ruleset").expect("rules") } else { String::new() };
        let count = |name, now| Count { name, now, slack: 0 };
        let about = |name, now, slack| Count { name, now, slack };
        let mut files = Files::default();
        files.walk(data, data);
        Self(vec![
            // Idle connections of clients, and what a database has open while it looks.
            about("descriptors", entries(Path::new(&format!("/proc/{pid}/fd"))).count() as u64, 8),
            // Threads that block are kept for a while.
            about("threads", entries(Path::new(&format!("/proc/{pid}/task"))).count() as u64, 8),
            count("VMMs", vmms.len() as u64),
            count("helpers", server.helpers().len() as u64),
            count("zombies", zombies(pid)),
            about("memory of the server, KiB", resident_kib(server), 64 << 10),
            about("write-ahead logs, KiB", logs_kib(server).into_iter().sum(), 8 << 10),
            count("sandboxes", u64::from(node.sandboxes + node.paused)),
            count("reserved memory, MiB", node.memory_reserved_mb),
            count("reserved vCPUs", u64::from(node.vcpus_reserved)),
            count("ledger entries", u64::from(node.ledger_entries)),
            count("mounts", mounts(data)),
            count("loop devices", loops(data)),
            count("control groups", groups(&vmms)),
            count("network namespaces", namespaces(pid, &vmms)),
            count("network links", slot_links().len() as u64),
            count("nft rules and elements", rules.matches("\"handle\"").count() as u64),
            count("machine directories", in_data("sandboxes")),
            count("snapshots", in_data("snapshots")),
            count("staged", in_data("staging")),
            count("files", files.count),
            // Journals of file systems in guests, logs of helpers.
            about("files, KiB", files.kib, 8 << 10),
        ])
    }

    /// What there is more of than in `before`, or less where that is as wrong, in words.
    pub fn more_than(&self, before: &Self) -> Vec<String> {
        let pairs = self.0.iter().zip(&before.0);
        let wrong = pairs.filter(|(now, then)| {
            now.now > then.now + then.slack || (then.slack == 0 && now.now != then.now)
        });
        wrong
            .map(|(now, then)| {
                format!("{}: {} (before: {}, may grow by {})", now.name, now.now, then.now, then.slack)
            })
            .collect()
    }
}

/// Prints three inventories beside each other.
pub fn print(before: &Inventory, after: &Inventory, restarted: &Inventory) {
    println!("{:28} {:>10} {:>10} {:>10} {:>10}", "held", "before", "after", "restarted", "may grow");
    for ((before, after), restarted) in before.0.iter().zip(&after.0).zip(&restarted.0) {
        println!(
            "{:28} {:>10} {:>10} {:>10} {:>10}",
            before.name, before.now, after.now, restarted.now, before.slack
        );
    }
}

/// Resident memory of the server.
pub fn resident_kib(server: &Server) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok()).unwrap_or_default()
}

/// The write-ahead logs of the databases.
pub fn logs_kib(server: &Server) -> [u64; 2] {
    DATABASES.map(|name| {
        fs::metadata(server.data_dir().join(format!("{name}-wal"))).map_or(0, |found| found.len() >> 10)
    })
}

/// Ended children of the server that nobody has waited for.
fn zombies(server: u32) -> u64 {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let is_zombie = |stat: &str| {
        // Behind the name in parentheses, which may hold anything: state, parent.
        let mut rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ');
        rest.next() == Some("Z") && rest.next().and_then(|parent| parent.parse().ok()) == Some(server)
    };
    let stats = entries.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
    stats.filter(|stat| is_zombie(stat)).count() as u64
}

fn mounts(data: &Path) -> u64 {
    let data = data.display().to_string();
    let all = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    all.lines().filter(|line| line.contains(&data)).count() as u64
}

fn loops(data: &Path) -> u64 {
    let backing = fs::read_dir("/sys/block")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("loop/backing_file")).ok());
    backing.filter(|file| Path::new(file.trim()).starts_with(data)).count() as u64
}

/// Groups of the server's VMMs, and groups of machines in which no process is left: of other servers there is none of these
/// for longer than a moment.
fn groups(vmms: &BTreeSet<i32>) -> u64 {
    let of_vmm = |pid: &i32| {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let group = text.lines().find_map(|line| line.strip_prefix("0::/"))?.to_owned();
        group.contains("kelvin").then_some(group)
    };
    let used: BTreeSet<String> = vmms.iter().filter_map(of_vmm).collect();
    let children = |path: &Path| {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect::<Vec<_>>()
    };
    let parents = children(Path::new("/sys/fs/cgroup")).into_iter();
    let parents =
        parents.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().contains("kelvin")));
    let is_empty =
        |path: &Path| fs::read_to_string(path.join("cgroup.procs")).is_ok_and(|text| text.is_empty());
    let left = parents.flat_map(|parent| children(&parent)).filter(|group| is_empty(group)).count();
    (used.len() + left) as u64
}

/// Network namespaces that the server has open or its VMMs are in.
fn namespaces(server: u32, vmms: &BTreeSet<i32>) -> u64 {
    let open = fs::read_dir(format!("/proc/{server}/fd")).into_iter().flatten().flatten();
    let open = open.filter_map(|entry| fs::metadata(entry.path()).ok().zip(fs::read_link(entry.path()).ok()));
    let mut found: BTreeSet<u64> = open
        .filter(|(_, link)| link.to_string_lossy().starts_with("net:["))
        .map(|(found, _)| found.ino())
        .collect();
    found.extend(vmms.iter().filter_map(|pid| Some(fs::metadata(format!("/proc/{pid}/ns/net")).ok()?.ino())));
    found.len() as u64
}

/// Files below a data directory, without databases and logs, which grow with what was done.
#[derive(Default)]
struct Files {
    count: u64,
    kib: u64,
}

impl Files {
    fn walk(&mut self, top: &Path, directory: &Path) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let (path, Ok(found)) = (entry.path(), entry.metadata()) else { continue };
            let name = entry.file_name().to_string_lossy().into_owned();
            let grows = DATABASES.iter().any(|database| name.starts_with(database)) || name.ends_with(".log");
            // What waiting machines have is counted by machine.
            if found.is_dir() && path != top.join("sandboxes") {
                self.walk(top, &path);
            } else if !found.is_dir() && !grows {
                self.count += 1;
                self.kib += found.blocks() / 2;
            }
        }
    }
}
