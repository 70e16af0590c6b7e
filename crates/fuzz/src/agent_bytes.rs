//! What a hostile guest can make the host parse: replies on the control port, and what it says that it uses.

#![no_main]

use kelvin_api::guest::{Reply, frame_length};
use kelvin_api::sandbox::GuestMetrics;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut rest = bytes;
    while let Some((field, behind)) = rest.split_first_chunk::<4>() {
        let Ok(length) = frame_length(*field) else { break };
        let Some((frame, next)) = behind.split_at_checked(length) else { break };
        if let Ok((id, reply)) = Reply::decode(frame) {
            let again = reply.encode(id).expect("what was parsed can be written");
            assert_eq!(Reply::decode(&again[4..]), Ok((id, reply)));
        }
        rest = next;
    }
    let _ = Reply::decode(bytes);
    let _ = serde_json::from_slice::<GuestMetrics>(bytes);
});
