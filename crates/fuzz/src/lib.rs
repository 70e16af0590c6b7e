//! What both fuzz targets have in common.

use kelvin_api::guest::frame_length;

/// The frames of a control port that stands in `bytes`, without their length fields, up to the first that is cut or
/// refused.
pub fn frames(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let (field, behind) = rest.split_first_chunk::<4>()?;
        let (frame, next) = behind.split_at_checked(frame_length(*field).ok()?)?;
        rest = next;
        Some(frame)
    })
}
