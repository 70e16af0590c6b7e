//! The QEMU driver passes the conformance suite with the real guest of `cargo xtask build`, on the accelerator that a server
//! would use here: the emulated KVM host (`cargo xtask kvm-host`) has KVM, most machines of CI only emulation.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use kelvin_host::accel::{self, Accelerator};
use kelvin_vmm::conformance::run;
use kelvin_vmm::qemu::Qemu;

#[test]
fn qemu_conforms() {
    common::in_namespace(async || conforms(false).await);
}

#[test]
fn qemu_conforms_with_a_network() {
    common::in_namespace(async || conforms(true).await);
}

async fn conforms(network: bool) {
    let found = accel::detect();
    println!("accelerator {}: {}", found.accelerator, found.reason);
    if std::env::var_os("KELVIN_KVM_HOST").is_some() {
        assert_eq!(found.accelerator, Accelerator::Kvm, "{}", found.reason);
    }
    let open = |data_dir: &Path| Qemu::open(data_dir, found.accelerator).unwrap();
    common::with_bench(network, open, run).await;
}
