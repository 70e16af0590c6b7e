//! What a hostile host or caller can make the agent parse: requests on the control port, and signed URLs.

#![no_main]

use http::{Method, Uri};
use kelvin_api::guest::Request;
use kelvin_api::signature::{Signature, query};
use kelvin_fuzz::frames;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for frame in frames(bytes) {
        if let Ok((id, request)) = Request::decode(frame) {
            let again = request.encode(id).expect("what was parsed can be written");
            assert_eq!(Request::decode(&again[4..]), Ok((id, request)));
        }
    }
    let _ = Request::decode(bytes);
    let mut target = b"/files?".to_vec();
    target.extend(bytes);
    if let Ok(uri) = Uri::try_from(target) {
        let _ = query(&uri);
        if let Some(signature) = Signature::of(&Method::GET, &uri) {
            assert!(signature.signed().check("a token").is_err(), "nobody has signed this");
        }
    }
});
