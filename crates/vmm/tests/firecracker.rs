//! The Firecracker driver passes the conformance suite, with the real guest and a real Firecracker.
//!
//! Needs KVM, root, the binary that `KELVIN_FIRECRACKER` names, and `kelvin` built: `cargo xtask kvm-host` has them all.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use kelvin_api::guest::Request;
use kelvin_host::accel::{self, Accelerator};
use kelvin_host::net::ns;
use kelvin_host::process::{Process, find_by_marker};
use kelvin_vmm::conformance::{Bench, Outcome, activation, end_all, is_reachable, run};
use kelvin_vmm::firecracker::config::Options;
use kelvin_vmm::firecracker::{Firecracker, Setup};
use kelvin_vmm::{Error, Waiting};

/// What the tests need, or why they are skipped.
fn setup() -> Result<Setup, String> {
    let binary = std::env::var_os("KELVIN_FIRECRACKER").ok_or("no firecracker")?;
    let found = accel::detect();
    if found.accelerator != Accelerator::Kvm {
        return Err(format!("no KVM for firecracker: {}", found.reason));
    }
    if !rustix::process::geteuid().is_root() {
        return Err("no root for firecracker".to_owned());
    }
    let launcher = common::launcher()?;
    Ok(Setup { binary: binary.into(), launcher, options: Options::default() })
}

fn with_firecracker(network: bool, suite: impl AsyncFnOnce(&Bench<'_>) -> Outcome + Send + 'static) {
    let setup = match setup() {
        Ok(setup) => setup,
        Err(why) => {
            println!("skipped: {why}");
            return;
        }
    };
    common::in_namespace(async move || {
        let open = |data_dir: &Path| Firecracker::open(data_dir, setup).unwrap();
        common::with_bench(network, open, suite).await;
    });
}

/// What the machines of a test have left: nothing, once they were killed.
fn is_clean(bench: &Bench<'_>, mounts: &str) -> Outcome {
    let left: Vec<_> = std::fs::read_dir(bench.data_dir.join("sandboxes"))?
        .flatten()
        .map(|entry| find_by_marker(&format!("kelvin-{}", entry.file_name().to_string_lossy())))
        .collect::<Result<Vec<_>, _>>()?
        .concat();
    expect(left.is_empty(), &format!("VMMs are left: {left:?}"))?;
    expect(std::fs::read_to_string("/proc/self/mountinfo")? == mounts, "no mount is left")
}

fn expect(condition: bool, what: &str) -> Outcome {
    if condition { Ok(()) } else { Err(what.to_owned().into()) }
}

fn inode(path: &Path) -> std::io::Result<(u64, u64)> {
    std::fs::metadata(path).map(|found| (found.dev(), found.ino()))
}

/// The regular files that a VMM can write.
fn disks(pid: i32) -> std::io::Result<Vec<(u64, u64)>> {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
    let writable = |name: &std::ffi::OsStr| {
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", name.to_string_lossy()));
        let flags = info
            .ok()
            .and_then(|text| text.lines().find_map(|line| line.strip_prefix("flags:").map(str::to_owned)));
        flags.is_some_and(|flags| i64::from_str_radix(flags.trim(), 8).is_ok_and(|flags| flags & 3 != 0))
    };
    Ok(files
        .filter(|entry| writable(&entry.file_name()))
        .filter_map(|entry| std::fs::metadata(entry.path()).ok())
        .filter(std::fs::Metadata::is_file)
        .map(|found| (found.dev(), found.ino()))
        .collect())
}

const ANSWER: Duration = Duration::from_secs(60);

/// Twenty restores of one snapshot at once: each has its own disk, socket, address and user's jail, and answers.
#[test]
fn firecracker_restores_twenty_at_once() {
    with_firecracker(true, async |bench| {
        let baked = bench.bake().await?;
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        let restores = (0..20).map(|_| bench.restore_connected(&baked));
        let machines = futures::future::try_join_all(restores).await?;
        let answers = machines.into_iter().enumerate().map(async |(index, (running, mut control, spec))| {
            let name = format!("machine-{index}");
            control.call("activate", &Request::Activate(activation(&name)), ANSWER).await?;
            is_reachable(spec.network.clone()).await?;
            Ok::<_, Box<dyn std::error::Error>>((running, spec))
        });
        let machines = futures::future::try_join_all(answers).await?;
        let mut addresses = BTreeSet::new();
        for (running, spec) in &machines {
            let pid = running.key().pid;
            expect(disks(pid)? == [inode(&spec.absolute().join("disk"))?], "its own disk and no other")?;
            let root = inode(Path::new(&format!("/proc/{pid}/root")))?;
            expect(root == inode(&spec.absolute())?, "its own root")?;
            addresses.insert(spec.network.as_ref().ok_or("a network")?.address());
            let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
            let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            let user = spec.user.ok_or("a user")?.to_string();
            expect(
                field("Uid:").is_some_and(|ids| ids.split_whitespace().all(|id| id == user)),
                "its own user",
            )?;
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
                expect(
                    field(set) == Some("0000000000000000"),
                    &format!("no capability: {set} {:?}", field(set)),
                )?;
            }
            expect(field("NoNewPrivs:") == Some("1"), "no new privileges")?;
            // Its id outside, and inside: the first.
            expect(
                field("NSpid:").is_some_and(|ids| ids.split_whitespace().nth(1) == Some("1")),
                "its own ids",
            )?;
            println!("{pid}: seccomp {:?}", field("Seccomp:"));
        }
        expect(addresses.len() == 20, "twenty addresses")?;
        for (running, _) in &machines {
            running.kill().await?;
        }
        is_clean(bench, &mounts)
    });
}

/// What is wrong with a restore is found before its guest runs, has a type, and leaves nothing.
#[test]
fn firecracker_refuses_what_is_wrong() {
    with_firecracker(true, async |bench| {
        let baked = bench.bake().await?;
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        let state = bench.data_dir.join(&baked.state);
        let prepared = async || {
            let spec = bench.spec(&baked.disk).await?;
            let waiting = bench.driver.prepare(&spec, &baked.memory).await?;
            Ok::<_, Box<dyn std::error::Error>>((spec, waiting))
        };
        let refused = async |waiting: Waiting, state: &Path| match waiting.load(state).await {
            Ok(_) => Err(Box::<dyn std::error::Error>::from("it was loaded")),
            Err((waiting, error)) => {
                waiting.kill().await?;
                println!("{}", kelvin_api::error::chain(&error));
                Ok(error)
            }
        };

        let (spec, waiting) = prepared().await?;
        std::fs::write(spec.absolute().join("run/vsock.sock"), "")?;
        let error = refused(waiting, &state).await?;
        expect(matches!(error, Error::Refused { .. }), "a stale socket is refused")?;

        let (sibling, _) = prepared().await?;
        let (spec, waiting) = prepared().await?;
        let disk = spec.absolute().join("disk");
        std::fs::remove_file(&disk)?;
        std::fs::hard_link(sibling.absolute().join("disk"), &disk)?;
        let error = refused(waiting, &state).await?;
        let is_disk = kelvin_api::error::chain(&error).contains("another disk");
        expect(matches!(error, Error::Io { .. }) && is_disk, "a sibling's disk is refused")?;

        let (spec, waiting) = prepared().await?;
        let slot = spec.network.clone().ok_or("a network")?;
        let namespace = slot.namespace().try_clone()?;
        ns::inside(namespace.as_fd(), || {
            let removed = std::process::Command::new("ip").args(["link", "delete", "tap0"]).status()?;
            if removed.success() { Ok(()) } else { Err(std::io::Error::other("no tap to remove")) }
        })
        .await?;
        let error = refused(waiting, &state).await?;
        expect(matches!(error, Error::Refused { .. }), "a missing tap is refused")?;

        // The version stands as text in the first bytes.
        let (spec, waiting) = prepared().await?;
        let mut bytes = std::fs::read(&state)?;
        let at = bytes[..64].windows(4).position(|part| part == b".0.0").ok_or("no version in the state")?;
        bytes[at - 1] = if bytes[at - 1] == b'1' { b'2' } else { b'1' };
        let other = spec.absolute().join("other-version");
        std::fs::write(&other, bytes)?;
        std::fs::set_permissions(&other, std::fs::Permissions::from_mode(0o444))?;
        let error = refused(waiting, &other).await?;
        let is_version = kelvin_api::error::chain(&error).to_lowercase().contains("version");
        expect(matches!(error, Error::Refused { .. }) && is_version, "another version is refused")?;

        // Stopped, so that the load is on its way when the VMM dies.
        let (_, waiting) = prepared().await?;
        let key = waiting.key();
        let pid = rustix::process::Pid::from_raw(key.pid).ok_or("a pid")?;
        rustix::process::kill_process(pid, rustix::process::Signal::STOP)?;
        let dying = Process::adopt(key)?;
        let (error, killed) = tokio::join!(refused(waiting, &state), async {
            tokio::task::yield_now().await;
            dying.kill()
        });
        killed?;
        expect(matches!(error?, Error::Ended { .. }), "a VMM that dies is told")?;

        end_all(bench).await?;
        is_clean(bench, &mounts)
    });
}

/// A snapshot has every byte of the memory that the machine had: the first from KVM's log, the second from the pages
/// that are its own.
#[test]
fn firecracker_saves_all_of_memory() {
    with_firecracker(false, async |bench| {
        let baked = bench.bake().await?;
        let (running, mut control, spec) = bench.restore_connected(&baked).await?;
        control.call("activate", &Request::Activate(activation("clone")), ANSWER).await?;
        let mut running = running;
        for round in ["first", "second"] {
            control.call("quiesce", &Request::Quiesce, ANSWER).await?;
            let paused = running.pause().await.map_err(|(_, error)| error)?;
            let (memory, state) =
                (spec.absolute().join(round), spec.absolute().join(format!("{round}-state")));
            let saved = paused.save(&memory, &state).await?;
            let pid = paused.key().pid;
            let now = memory_of(pid, &bench.data_dir.join(&baked.memory))?;
            let (kept, parent) =
                (std::fs::read(&memory)?, std::fs::read(bench.data_dir.join(&baked.memory))?);
            let differs =
                |a: &[u8], b: &[u8]| a.chunks(4096).zip(b.chunks(4096)).filter(|(a, b)| a != b).count();
            println!(
                "{round}: {:?}, {} pages differ from the parent's",
                saved.dirty_pages,
                differs(&kept, &parent)
            );
            expect(
                kept == now,
                &format!("{} pages of the {round} snapshot are not the machine's", differs(&kept, &now)),
            )?;
            running = paused.resume().await.map_err(|(_, error)| error)?;
            control.call("ping", &Request::Ping, ANSWER).await?;
        }
        running.kill().await?;
        Ok(())
    });
}

/// The guest's memory as its VMM has it, where it has mapped the file `parent`.
fn memory_of(pid: i32, parent: &Path) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let inode = std::fs::metadata(parent)?.ino().to_string();
    let memory = std::fs::File::open(format!("/proc/{pid}/mem"))?;
    let mut parts = Vec::new();
    for line in std::fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        if fields.get(4) != Some(&inode.as_str()) {
            continue;
        }
        let (start, end) = fields[0].split_once('-').ok_or("a range")?;
        let (start, end) = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
        let mut bytes = vec![0; usize::try_from(end - start)?];
        memory.read_exact_at(&mut bytes, start)?;
        parts.push((u64::from_str_radix(fields[2], 16)?, bytes));
    }
    parts.sort();
    Ok(parts.into_iter().flat_map(|(_, bytes)| bytes).collect())
}

#[test]
fn firecracker_conforms() {
    with_firecracker(false, run);
}

#[test]
fn firecracker_conforms_with_a_network() {
    with_firecracker(true, run);
}
