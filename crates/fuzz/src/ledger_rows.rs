//! Rows of the ledger: resources of the host, and records of sandboxes.

#![no_main]

// The file alone: of the node nothing else is needed here, and all of it would be compiled once more.
#[allow(dead_code, reason = "the node uses all of it")]
#[path = "../../node/src/sandbox/record.rs"]
mod record;

use kelvin_fuzz::same_again;
use kelvin_host::ledger::Resource;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    same_again::<Resource>(bytes);
    same_again::<record::Record>(bytes);
});
