//! The fake driver passes the conformance suite: what is tested on it is tested on a driver.

#![allow(clippy::unwrap_used)]

use kelvin_api::units::{DiskMib, MemoryMib, Shape};
use kelvin_vmm::conformance::{Bench, run};
use kelvin_vmm::testing::FakeDriver;

#[tokio::test]
async fn the_fake_driver_conforms() {
    let data = tempfile::tempdir().unwrap();
    let data_dir = data.path().canonicalize().unwrap();
    for name in ["sandboxes", "guests"] {
        std::fs::create_dir(data_dir.join(name)).unwrap();
    }
    let rootfs = data_dir.join("rootfs");
    std::fs::write(&rootfs, "").unwrap();
    let driver = FakeDriver::new(());
    let bench = Bench {
        driver: &driver,
        data_dir: &data_dir,
        guest: "guests".into(),
        rootfs: &rootfs,
        shape: Shape { vcpus: 1, memory_mib: MemoryMib(128), disk_mib: DiskMib(1) },
        user: None,
        slots: None,
        clone_disk: |from, to| std::fs::copy(from, to).map(drop),
    };
    run(&bench).await.unwrap();
    assert_eq!(driver.machines(), []);
}
