//! The QEMU driver passes the conformance suite with the real guest of `cargo xtask build`.

use std::path::PathBuf;

use kelvin_api::units::{DiskMib, MemoryMib, Shape};
use kelvin_host::accel::Accelerator;
use kelvin_vmm::conformance::{Bench, run};
use kelvin_vmm::qemu::Qemu;

#[tokio::test]
async fn qemu_conforms() {
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
    let bench = Bench {
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
