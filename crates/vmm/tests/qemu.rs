//! The QEMU driver passes the conformance suite with the real guest of `cargo xtask build`.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use kelvin_api::units::{DiskMib, MemoryMib, Shape};
use kelvin_host::accel::Accelerator;
use kelvin_host::ledger::Ledger;
use kelvin_host::net::{Options, Slots, ns};
use kelvin_vmm::conformance::{Bench, run};
use kelvin_vmm::qemu::Qemu;

/// Runs `work` in a network namespace of its own where that is possible.
fn in_namespace(work: impl AsyncFnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        if let Err(error) = ns::unshare() {
            println!("no network namespace of its own ({error})");
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(work());
    });
    thread.join().unwrap();
}

#[test]
fn qemu_conforms() {
    in_namespace(async || conforms(false).await);
}

#[test]
fn qemu_conforms_with_a_network() {
    in_namespace(async || match kelvin_host::net::check().await {
        Ok(()) => conforms(true).await,
        Err(error) => println!("skipped: {error}"),
    });
}

async fn conforms(network: bool) {
    let cache = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../.cache/guest");
    let rootfs = cache.join("base.ext4");
    if !rootfs.exists() {
        println!("skipped: no guest, `cargo xtask build` makes it");
        return;
    }
    let data = tempfile::tempdir_in(cache.parent().unwrap()).unwrap();
    let data_dir = data.path().canonicalize().unwrap();
    std::fs::set_permissions(&data_dir, std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    for name in ["run", "sandboxes", "snapshots", "guests"] {
        std::fs::create_dir(data_dir.join(name)).unwrap();
        std::fs::set_permissions(data_dir.join(name), std::os::unix::fs::PermissionsExt::from_mode(0o711))
            .unwrap();
    }
    std::fs::copy(cache.join("kernel/vmlinuz"), data_dir.join("guests/vmlinuz")).unwrap();
    std::fs::copy(cache.join("initrd"), data_dir.join("guests/initrd")).unwrap();
    let driver = Qemu::open(&data_dir, Accelerator::Tcg).unwrap();
    let root = rustix::process::geteuid().is_root();
    let disk_mib = u32::try_from(std::fs::metadata(&rootfs).unwrap().len() >> 20).unwrap();
    let ledger = Ledger::open(&data_dir.join("ledger.db")).unwrap();
    let options = Options {
        range: None,
        uplink: None,
        ready: 0,
        bandwidth_mbit: None,
        max_connections: 100,
        range_file: data_dir.join("run/slot-range"),
    };
    let slots = if network { Some(Slots::open(options, ledger).await.unwrap()) } else { None };
    let bench = Bench {
        slots: slots.as_ref(),
        driver: &driver,
        data_dir: &data_dir,
        guest: "guests".into(),
        rootfs: &rootfs,
        shape: Shape { vcpus: 1, memory_mib: MemoryMib(256), disk_mib: DiskMib(disk_mib) },
        user: root.then_some(1_795_162_112),
        clone_disk: |from, to| kelvin_store::disk::clone_file(from, to).map(drop),
    };
    run(&bench).await.unwrap();
}
