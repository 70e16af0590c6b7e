//! What a hostile guest can make the host parse: replies on the control port, and what it says that it uses.

#![no_main]

use kelvin_api::guest::Reply;
use kelvin_api::sandbox::GuestMetrics;
use kelvin_fuzz::frames;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for frame in frames(bytes) {
        if let Ok((id, reply)) = Reply::decode(frame) {
            let again = reply.encode(id).expect("what was parsed can be written");
            assert_eq!(Reply::decode(&again[4..]), Ok((id, reply)));
        }
    }
    let _ = Reply::decode(bytes);
    let _ = serde_json::from_slice::<GuestMetrics>(bytes);
});
