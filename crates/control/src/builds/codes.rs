//! Which failures the routes of builds can have.

use kelvin_api::error::ErrorCode::{self, *};

/// Of what is asked for with a name.
pub(super) const REQUEST: &[ErrorCode] =
    &[InvalidName, InvalidTag, InvalidTags, InvalidShape, NameTaken, TooManyBuilds];
/// Of what a build begins with and does.
pub(super) const START: &[ErrorCode] = &[
    InvalidImage,
    InvalidStep,
    InvalidFile,
    UnsupportedField,
    FilesMissing,
    NotAnAdmin,
    BuildState,
    TooManyBuilds,
    BuildUnsupported,
];
/// Of a build that is named.
pub(super) const BUILD: &[ErrorCode] = &[BuildNotFound];
/// Of an upload, which shows a signature instead of a key.
pub(super) const UPLOAD: &[ErrorCode] = &[
    WrongApiKey,
    TooManyRequests,
    BodyTooLarge,
    BodyCut,
    DiskFull,
    FilesRefused,
    CapacityExhausted,
    BuildUnsupported,
];
