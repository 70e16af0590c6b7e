//! What the conformance tests of all drivers share: a data directory with the real guest of `cargo xtask build`, and
//! networks in a namespace of their own.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use kelvin_api::units::{DiskMib, MemoryMib, Shape};
use kelvin_host::ledger::Ledger;
use kelvin_host::net::{Options, Slots, ns};
use kelvin_host::process::adopt_orphans;
use kelvin_vmm::Driver;
use kelvin_vmm::conformance::{Bench, Outcome};

/// Runs `work` in a network namespace of its own where that is possible.
pub fn in_namespace(work: impl AsyncFnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        if let Err(error) = ns::unshare() {
            println!("no network namespace of its own ({error})");
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(work());
    });
    thread.join().unwrap();
}

/// What is made by the build.
pub fn cache() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../.cache")
}

/// Kelvin, as it was built, or why it cannot be used.
pub fn launcher() -> Result<PathBuf, &'static str> {
    let launcher = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/release/kelvin");
    if launcher.exists() { Ok(launcher) } else { Err("kelvin is not built") }
}

/// Makes a data directory and a driver for it, and runs `suite`. Skips when there is no guest, or no network where
/// there is to be one.
pub async fn with_bench<D: Driver>(
    network: bool,
    open: impl FnOnce(&Path) -> D,
    suite: impl AsyncFnOnce(&Bench<'_>) -> Outcome,
) {
    if network && let Err(error) = kelvin_host::net::check().await {
        println!("skipped: {error}");
        return;
    }
    let guest = cache().join("guest");
    let rootfs = guest.join("base.ext4");
    if !rootfs.exists() {
        println!("skipped: no guest, `cargo xtask build` makes it");
        return;
    }
    // In the emulated KVM host this is a file system that can clone files.
    let inside = std::env::var_os("KELVIN_KVM_HOST").is_some();
    let ground = if inside { cache().join("e2e") } else { cache() };
    let rootfs = if inside { ground.join("guest/rootfs.ext4") } else { rootfs };
    let data = tempfile::tempdir_in(ground).unwrap();
    let data_dir = data.path().canonicalize().unwrap();
    for name in ["run", "sandboxes", "snapshots", "guests", "staging"] {
        std::fs::create_dir(data_dir.join(name)).unwrap();
        std::fs::set_permissions(data_dir.join(name), std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .unwrap();
    }
    // What is mounted in jails.
    std::fs::set_permissions(data_dir.join("guests"), std::os::unix::fs::PermissionsExt::from_mode(0o711))
        .unwrap();
    std::fs::copy(guest.join("kernel/vmlinuz"), data_dir.join("guests/vmlinuz")).unwrap();
    std::fs::copy(guest.join("initrd"), data_dir.join("guests/initrd")).unwrap();
    // On the same file system: every disk is a reflink then, where there are some.
    let image = data_dir.join("rootfs.ext4");
    kelvin_store::disk::import_file(&rootfs, &image).unwrap();
    adopt_orphans().unwrap();
    let driver = open(&data_dir);
    let root = rustix::process::geteuid().is_root();
    let disk_mib = u32::try_from(std::fs::metadata(&image).unwrap().len() >> 20).unwrap();
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
        rootfs: &image,
        shape: Shape { vcpus: 1, memory_mib: MemoryMib(256), disk_mib: DiskMib(disk_mib) },
        user: root.then_some(1_795_162_112),
        clone_disk: |from, to| kelvin_store::disk::clone_file(from, to).map(drop),
    };
    suite(&bench).await.unwrap();
}
