//! Requests of guests in the clear, whose host is read.

#![no_main]

use kelvin_fuzz::block_on;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| block_on(kelvin_egress::fuzzing::http(bytes)));
