//! A QEMU that a guest has taken over: whatever it says, commands and waits for events come to an end.

#![no_main]

use kelvin_fuzz::{block_on, peer_that_said};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    block_on(async {
        // With the greeting, and without.
        let greeting: &[u8] = b"{\"QMP\": {}}\n{\"return\": {}, \"id\": 1}\n";
        for parts in [&[greeting, bytes][..], &[bytes]] {
            let (ours, _theirs) = peer_that_said(parts);
            kelvin_vmm::fuzzing::qmp(ours).await;
        }
    });
});
