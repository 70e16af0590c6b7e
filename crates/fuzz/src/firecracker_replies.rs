//! A Firecracker that a guest has taken over: whatever it answers, a command comes to an end; and what it counts is read.

#![no_main]

use kelvin_fuzz::{block_on, peer_that_said};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    block_on(async {
        let (ours, _theirs) = peer_that_said(&[bytes]);
        kelvin_vmm::fuzzing::firecracker(ours).await;
    });
    kelvin_vmm::fuzzing::firecracker_metrics(bytes);
});
