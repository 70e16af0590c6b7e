//! Manifests of snapshots and templates, and what a disk that fails made of them.

#![no_main]

use kelvin_fuzz::same_again;
use kelvin_store::image::Template;
use kelvin_store::snapshot::Manifest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    same_again::<Manifest>(bytes);
    same_again::<Template>(bytes);
    if let Ok(manifest) = serde_json::from_slice::<Manifest>(bytes) {
        let identity = &manifest.identity;
        assert!(identity.differences(identity).is_empty(), "it is compatible with itself");
        let _ = identity.digest();
    }
});
