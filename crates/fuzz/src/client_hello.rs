//! The beginning of a guest's TLS connection, of which the server's name is read.

#![no_main]

use kelvin_fuzz::block_on;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| block_on(kelvin_egress::fuzzing::client_hello(bytes)));
