//! What tells whether something that was made is up to date.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use crate::files as fs;

/// So that the same files give the same image.
pub const EPOCH: &str = "1767225600";

/// Whether `stamp` holds `key`; the thing beside it is then up to date.
pub fn is_fresh(stamp: &Path, key: &str) -> bool {
    fs::read_to_string(stamp).is_ok_and(|text| text == key)
}

/// A short digest of `parts`, for stamps.
pub fn digest(parts: &[&[u8]]) -> String {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}
