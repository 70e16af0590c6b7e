//! The QEMU driver passes the conformance suite with the real guest of `cargo xtask build`, on the accelerator that a server
//! would use here: the emulated KVM host (`cargo xtask kvm-host`) has KVM, most machines of CI only emulation.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::time::Duration;

use kelvin_api::guest::Request;
use kelvin_host::accel::{self, Accelerator};
use kelvin_vmm::conformance::{Bench, Outcome, run};
use kelvin_vmm::made;
use kelvin_vmm::qemu::Qemu;

#[test]
fn qemu_conforms() {
    common::in_namespace(async || conforms(false).await);
}

#[test]
fn qemu_conforms_with_a_network() {
    common::in_namespace(async || conforms(true).await);
}

/// What a VMM of a former version left in a directory that it could write, while nobody looked: links to a secret. None
/// of it is followed, whoever asks for what.
#[test]
fn qemu_follows_no_name_that_a_vmm_could_write() {
    common::in_namespace(async || {
        with_qemu(false, replaced).await;
    });
}

const SECRET: &str = "the secret of the host";

async fn replaced(bench: &Bench<'_>) -> Outcome {
    let secret = bench.data_dir.join("api-key");
    fs::write(&secret, SECRET)?;
    let before = fs::metadata(&secret)?;
    let staging = bench.data_dir.join("staging");
    let spec = bench.spec(bench.rootfs).await?;
    let running = bench.driver.boot(&spec, made()).await?;
    running.control().await?.call("ping", &Request::Ping, Duration::from_secs(120)).await?;
    let (key, directory) = (running.key(), spec.absolute());
    drop(running);

    // The directory was the VMM's.
    std::os::unix::fs::chown(&directory, bench.user, bench.user)?;
    let memory = directory.join("memory");
    fs::rename(&memory, directory.join("kept"))?;
    for name in ["memory", "state.new"] {
        symlink(&secret, directory.join(name))?;
    }
    let running = bench.driver.adopt(&spec, key).await?;
    let found = fs::metadata(&directory)?;
    expect(found.uid() == 0 && found.mode() & 0o022 == 0, "the directory is taken from the VMM")?;
    let paused = running.pause().await.map_err(|(_, error)| error)?;
    let refused = paused.save(&staging.join("memory"), &staging.join("state")).await;
    expect(refused.is_err(), "memory that was replaced is not saved")?;
    for entry in fs::read_dir(&staging)?.flatten() {
        let text = fs::read(entry.path())?;
        let has = text.windows(SECRET.len()).any(|part| part == SECRET.as_bytes());
        expect(!has, &format!("{} has the secret", entry.path().display()))?;
        fs::remove_file(entry.path())?;
    }
    let running = paused.resume().await.map_err(|(_, error)| error)?;
    drop(running);

    // Where only the device state's place is taken, a save needs no place.
    fs::rename(directory.join("kept"), &memory)?;
    let running = bench.driver.adopt(&spec, key).await?;
    let paused = running.pause().await.map_err(|(_, error)| error)?;
    paused.save(&staging.join("memory"), &staging.join("state")).await?;
    expect(fs::read(staging.join("state"))?.starts_with(b"QEVM"), "the device state is QEMU's")?;
    paused.kill().await?;
    let after = fs::metadata(&secret)?;
    expect(fs::read_to_string(&secret)? == SECRET, "the secret is what it was")?;
    expect(
        (after.mode(), after.uid(), after.ctime()) == (before.mode(), before.uid(), before.ctime()),
        "so is its mode",
    )
}

fn expect(condition: bool, what: &str) -> Outcome {
    if condition { Ok(()) } else { Err(what.to_owned().into()) }
}

async fn conforms(network: bool) {
    with_qemu(network, run).await;
}

async fn with_qemu(network: bool, suite: impl AsyncFnOnce(&Bench<'_>) -> Outcome) {
    let launcher = match common::launcher() {
        Ok(launcher) => launcher,
        Err(why) => {
            println!("skipped: {why}");
            return;
        }
    };
    let found = accel::detect();
    println!("accelerator {}: {}", found.accelerator, found.reason);
    if std::env::var_os("KELVIN_KVM_HOST").is_some() {
        assert_eq!(found.accelerator, Accelerator::Kvm, "{}", found.reason);
    }
    let open = |data_dir: &Path| Qemu::open(data_dir, found.accelerator, launcher).unwrap();
    common::with_bench(network, open, suite).await;
}
