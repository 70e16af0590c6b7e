//! What the fuzz targets have in common.
//!
//! A target is a program of this package for each kind of bytes that comes from somebody who may lie. Where a parser reads a
//! connection, the target is its peer: what is fuzzed is what runs in the server, not a copy of its parser.

use std::future::Future;
use std::io::Write;
use std::sync::OnceLock;

use kelvin_api::guest::frame_length;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

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

/// Runs `work` to its end.
///
/// # Panics
/// Without a runtime: there is nothing to fuzz then.
pub fn block_on<T>(work: impl Future<Output = T>) -> T {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME
        .get_or_init(|| {
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
        })
        .block_on(work)
}

/// A connection on which the peer has said `parts`, and nothing more: it reads nothing, and has closed its half.
///
/// # Panics
/// Without descriptors, or with more than a socket holds.
pub fn peer_that_said(parts: &[&[u8]]) -> (UnixStream, std::os::unix::net::UnixStream) {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
    for part in parts {
        (&theirs).write_all(part).expect("it fits into the socket");
    }
    theirs.shutdown(std::net::Shutdown::Write).expect("it is connected");
    ours.set_nonblocking(true).expect("it is ours");
    (UnixStream::from_std(ours).expect("there is a runtime"), theirs)
}

/// Parses `bytes` as JSON of type `T`; what parses is written, parsed again, and has to be the same.
///
/// # Panics
/// When it is not: that is what is looked for.
pub fn same_again<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(value) = serde_json::from_slice::<T>(bytes) {
        let text = serde_json::to_vec(&value).expect("what was parsed can be written");
        assert_eq!(serde_json::from_slice::<T>(&text).expect("what was written parses"), value);
    }
}
