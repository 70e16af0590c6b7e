//! The QEMU driver passes the conformance suite with the real guest of `cargo xtask build`.

#![allow(clippy::unwrap_used)]

mod common;

use kelvin_host::accel::Accelerator;
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
    common::with_bench(network, |data_dir| Qemu::open(data_dir, Accelerator::Tcg).unwrap(), run).await;
}
