//! What can go wrong between a reference and an ext4 file, and what to do about it.
//!
//! No text here has a secret in it: URLs, which may be signed, are named by their host alone, and what an image or a
//! registry says is shortened and escaped before it is shown.

use std::io;

use kelvin_api::error::{ErrorCode, Failure};

/// What was done when the host could not give back what was pulled.
pub(crate) const READING: &str = "reading a layer";

/// Why an image, or a part of one, is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// More than there may be.
    #[error("{what} exceed the limit of {limit}")]
    Limit {
        /// What there is too much of, in the plural.
        what: &'static str,
        /// How much there may be.
        limit: u64,
    },
    /// The content is another than its digest says.
    #[error("its digest is {found}, not {expected}")]
    Digest {
        /// As the manifest or the reference says.
        expected: String,
        /// As it is.
        found: String,
    },
    /// The content is longer or shorter than said.
    #[error("it has {found} bytes, not {expected}")]
    Size {
        /// As the manifest says.
        expected: u64,
        /// As it is.
        found: u64,
    },
    /// A digest that is none, or of another algorithm than SHA-256.
    #[error("{0} is not a sha256 digest")]
    Algorithm(String),
    /// There is nothing in it for linux/amd64.
    #[error("there is no image for linux/amd64, only for {0}")]
    Platform(String),
    /// A media type that is none of an image, or of a kind that is not supported.
    #[error("media type {0}")]
    MediaType(String),
    /// It is not the JSON that it has to be.
    #[error("{0}")]
    Json(String),
    /// An index that leads to itself.
    #[error("the index leads to itself")]
    Loop,
    /// It could be read in two ways.
    #[error("it is ambiguous: {0}")]
    Ambiguous(&'static str),
    /// A path that no file system of ours can have, or that leaves the root.
    #[error("the entry {name}: {reason}")]
    Name {
        /// As it is there, shortened.
        name: String,
        /// Why not.
        reason: &'static str,
    },
    /// A link that leads nowhere, or in a circle.
    #[error("the link {name} to {target}: {reason}")]
    Link {
        /// The entry.
        name: String,
        /// Where it leads.
        target: String,
        /// Why not.
        reason: &'static str,
    },
    /// An entry that cannot be what it says.
    #[error("the entry {name}: {reason}")]
    Entry {
        /// The entry.
        name: String,
        /// Why not.
        reason: &'static str,
    },
    /// The bytes are no tar archive.
    #[error("it is no tar archive: {0}")]
    Tar(&'static str),
    /// The bytes cannot be decompressed.
    #[error("it cannot be decompressed: {0}")]
    Compression(String),
}

/// A failure of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is no reference.
    #[error("{reference:?} is not a reference of an image: {reason}")]
    Reference {
        /// As given.
        reference: String,
        /// Why not.
        reason: &'static str,
    },
    /// An option cannot be used.
    #[error("{option} {value:?}: {reason}")]
    Options {
        /// Which.
        option: &'static str,
        /// As given.
        value: String,
        /// Why not.
        reason: &'static str,
    },
    /// There is no such image.
    #[error("there is no {image}: {reason}")]
    NotFound {
        /// As asked for.
        image: String,
        /// As the source says.
        reason: String,
    },
    /// The registry lets nobody in with these credentials, or without.
    #[error("{registry} does not allow it: {reason}")]
    Denied {
        /// Its host.
        registry: String,
        /// As it says.
        reason: String,
    },
    /// The registry, or where it sends a pull to, is not of the internet, and the pull is not the operator's.
    #[error("{registry} leads to an address of this machine or of a private network")]
    NotPublic {
        /// Its host.
        registry: String,
    },
    /// The registry does not answer, or answers nonsense.
    #[error("{registry} cannot be used: {reason}")]
    Unavailable {
        /// Its host.
        registry: String,
        /// Why not.
        reason: String,
    },
    /// The image is not taken.
    #[error("{part} is refused: {why}")]
    Refused {
        /// The image, or which part of it.
        part: String,
        /// Why.
        why: Refusal,
    },
    /// The image does not fit.
    #[error("a disk of {disk_bytes} bytes is too small for the image, which needs {needed_bytes}")]
    TooSmall {
        /// As asked for.
        disk_bytes: u64,
        /// What it takes at least.
        needed_bytes: u64,
    },
    /// The host's disk is full.
    #[error("the host's disk is full: {what}")]
    DiskFull {
        /// What was being written.
        what: String,
        /// As the system says it.
        source: io::Error,
    },
    /// A file of the host failed.
    #[error("{what} failed")]
    Io {
        /// What was being done.
        what: String,
        /// As the system says it.
        source: io::Error,
    },
    /// Nobody waits for the result any more.
    #[error("it was given up")]
    Stopped,
}

impl Error {
    /// What programs read.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Reference { .. } | Self::Options { .. } => ErrorCode::InvalidImage,
            Self::NotFound { .. } => ErrorCode::ImageNotFound,
            Self::Denied { .. } => ErrorCode::RegistryDenied,
            Self::NotPublic { .. } => ErrorCode::NotAnAdmin,
            Self::Unavailable { .. } => ErrorCode::RegistryUnavailable,
            Self::Refused { .. } | Self::TooSmall { .. } => ErrorCode::ImageRefused,
            Self::DiskFull { .. } => ErrorCode::DiskFull,
            Self::Io { .. } => ErrorCode::StoreIo,
            Self::Stopped => ErrorCode::BuildCancelled,
        }
    }

    /// What the caller can do.
    pub fn remediation(&self) -> &'static str {
        match self {
            Self::Reference { .. } => "name the image as for `docker pull`, for example python:3.12",
            Self::Options { .. } => "correct the option",
            Self::NotFound { .. } => "check the name and the tag; a private image needs credentials",
            Self::Denied { .. } => {
                "give credentials that may pull it, in the request or in the configuration of Docker"
            }
            Self::NotPublic { .. } => {
                "let the operator pull it with the server's own key, or set a mirror of the registry"
            }
            Self::Unavailable { .. } => "try again later, or set a mirror of the registry",
            Self::Refused { why: Refusal::Limit { .. }, .. } => {
                "use a smaller image, or let the operator raise the limit"
            }
            Self::Refused { why: Refusal::Platform(_), .. } => "build the image for linux/amd64",
            Self::Refused { why: Refusal::MediaType(_), .. } => {
                "use an image whose layers are tar archives: plain, gzip or zstd, not encrypted, not foreign"
            }
            Self::Refused { .. } => "build the image anew and push it again",
            Self::TooSmall { .. } => "ask for a larger disk",
            Self::DiskFull { .. } => "free space on the host",
            Self::Io { .. } => "look at the server's log and the host's disk",
            Self::Stopped => "ask for it again",
        }
    }

    /// The same as it leaves the node.
    pub fn failure(&self) -> Failure {
        Failure::new(self.code(), self.to_string(), self.remediation()).with_sources(self)
    }

    /// A failure of a file: a full disk has a code of its own.
    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        let what = what.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { what, source },
            _ => Self::Io { what, source },
        }
    }

    /// A thread that blocks has not come to its end: it was given up, or it has panicked, which is a fault of ours.
    pub(crate) fn ended(error: &tokio::task::JoinError) -> Self {
        match error.is_panic() {
            true => Self::io("working on an image", io::Error::other("a thread has panicked")),
            false => Self::Stopped,
        }
    }

    pub(crate) fn refused(part: impl Into<String>, why: Refusal) -> Self {
        Self::Refused { part: part.into(), why }
    }
}

/// A failure inside one part of an image, whose name the caller knows.
#[derive(Debug)]
pub(crate) enum Fault {
    Refused(Refusal),
    Io { what: &'static str, source: io::Error },
    Stopped,
}

impl Fault {
    /// It in the part of the image that is called so.
    pub(crate) fn of(self, part: &str) -> Error {
        match self {
            Self::Refused(why) => Error::refused(part, why),
            Self::Io { what, source } => Error::io(what, source),
            Self::Stopped => Error::Stopped,
        }
    }

    /// A failure while a stream of the image was read: what a reader of ours has said, the host's disk, or bytes that are not
    /// what they have to be.
    pub(crate) fn reading(error: io::Error) -> Self {
        if let Some(why) = error.get_ref().and_then(|inner| inner.downcast_ref::<Refusal>()) {
            return Self::Refused(why.clone());
        }
        if error.raw_os_error().is_some() {
            return Self::Io { what: READING, source: error };
        }
        Self::Refused(Refusal::Compression(shown(error.to_string().as_bytes())))
    }
}

impl From<Refusal> for Fault {
    fn from(why: Refusal) -> Self {
        Self::Refused(why)
    }
}

/// Characters of what others say that are shown.
const SHOWN: usize = 160;

/// A name or a text of an image or a registry, as it may stand in a message: escaped and short.
pub(crate) fn shown(text: &[u8]) -> String {
    let cut = &text[..text.len().min(SHOWN * 4)];
    let text: String = String::from_utf8_lossy(cut).chars().flat_map(char::escape_debug).collect();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_say_is_short_and_on_one_line() {
        assert_eq!(shown(b"a\n\x1b[31mb"), "a\\n\\u{1b}[31mb");
        assert!(shown(&[b'x'; 10_000]).chars().count() <= SHOWN + 1);
        assert_eq!(shown(b"\xff"), "\u{fffd}");
    }

    #[test]
    fn a_full_disk_has_its_own_code() {
        let full = Error::io("x", io::Error::from_raw_os_error(28));
        assert_eq!(full.code(), ErrorCode::DiskFull);
        assert_eq!(Error::io("x", io::Error::from_raw_os_error(5)).code(), ErrorCode::StoreIo);
        assert!(full.failure().cause.is_some());
    }
}
