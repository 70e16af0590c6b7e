//! What an error of the guest's kernel means to a caller: one table for Connect's codes and for HTTP's statuses.
//!
//! Source: errno(3), Connect's protocol ("error codes"), and what envd answers where clients depend on it.

use std::io;
use std::time::Duration;

use connectrpc::ConnectError;
use http::StatusCode;

/// How long a call may wait for a file system: one whose server is dead (FUSE, NFS) never answers.
pub const FILE_SYSTEM: Duration = Duration::from_secs(30);

/// The kinds that callers can tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is there.
    NotFound,
    /// Something is there already.
    Exists,
    /// What is asked for makes no sense there, whoever asks.
    Invalid,
    /// The kernel does not allow it.
    Denied,
    /// Space, descriptors, processes or memory are used up.
    Exhausted,
    /// It would do in another state: a directory that is not empty, a busy device, another file system.
    Precondition,
    /// Longer than the file may be.
    TooLarge,
    /// It did not happen in time.
    Timeout,
    /// The kernel or the file system cannot do it.
    Unsupported,
    /// The device failed.
    Broken,
    /// Anything else.
    Internal,
}

impl Fault {
    /// The kind of `error`.
    pub fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOENT) => Self::NotFound,
            Some(libc::EEXIST) => Self::Exists,
            Some(
                libc::ENOTDIR
                | libc::EISDIR
                | libc::ENAMETOOLONG
                | libc::EINVAL
                | libc::ELOOP
                | libc::E2BIG
                | libc::ENXIO
                | libc::EILSEQ
                | libc::ENOEXEC
                | libc::ENOTTY
                | libc::ESPIPE
                | libc::EBADF,
            ) => Self::Invalid,
            Some(libc::EACCES | libc::EPERM) => Self::Denied,
            Some(
                libc::ENOSPC
                | libc::EDQUOT
                | libc::EMFILE
                | libc::ENFILE
                | libc::ENOMEM
                | libc::EMLINK
                | libc::EAGAIN
                | libc::ENOBUFS
                | libc::EUSERS,
            ) => Self::Exhausted,
            Some(
                libc::EXDEV
                | libc::ENOTEMPTY
                | libc::EBUSY
                | libc::ETXTBSY
                | libc::EROFS
                | libc::ENOTCONN
                | libc::ESTALE,
            ) => Self::Precondition,
            Some(libc::EFBIG | libc::EOVERFLOW) => Self::TooLarge,
            Some(libc::ETIMEDOUT) => Self::Timeout,
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) => Self::Unsupported,
            Some(libc::EIO | libc::EREMOTEIO | libc::ECONNABORTED | libc::EUCLEAN) => Self::Broken,
            Some(_) => Self::Internal,
            None => match error.kind() {
                io::ErrorKind::NotFound => Self::NotFound,
                io::ErrorKind::AlreadyExists => Self::Exists,
                io::ErrorKind::PermissionDenied => Self::Denied,
                io::ErrorKind::TimedOut => Self::Timeout,
                io::ErrorKind::FileTooLarge => Self::TooLarge,
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::OutOfMemory => {
                    Self::Exhausted
                }
                io::ErrorKind::NotADirectory
                | io::ErrorKind::IsADirectory
                | io::ErrorKind::InvalidInput
                | io::ErrorKind::InvalidData
                | io::ErrorKind::InvalidFilename
                | io::ErrorKind::UnexpectedEof => Self::Invalid,
                _ => Self::Internal,
            },
        }
    }

    /// As a Connect error that says `text`.
    pub fn connect(self, text: String) -> ConnectError {
        match self {
            Self::NotFound => ConnectError::not_found(text),
            Self::Exists => ConnectError::already_exists(text),
            Self::Invalid => ConnectError::invalid_argument(text),
            Self::Denied => ConnectError::permission_denied(text),
            Self::Exhausted => ConnectError::resource_exhausted(text),
            Self::Precondition => ConnectError::failed_precondition(text),
            Self::TooLarge => ConnectError::out_of_range(text),
            Self::Timeout => ConnectError::deadline_exceeded(text),
            Self::Unsupported => ConnectError::unimplemented(text),
            Self::Broken => ConnectError::data_loss(text),
            Self::Internal => ConnectError::internal(text),
        }
    }

    /// As the status of an HTTP reply.
    pub fn status(self) -> StatusCode {
        match self {
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Exists | Self::Precondition => StatusCode::CONFLICT,
            Self::Invalid => StatusCode::BAD_REQUEST,
            Self::Denied => StatusCode::FORBIDDEN,
            Self::Exhausted => StatusCode::INSUFFICIENT_STORAGE,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Unsupported => StatusCode::NOT_IMPLEMENTED,
            Self::Broken | Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// `error` as a Connect error that says `text`.
pub fn typed(error: &io::Error, text: String) -> ConnectError {
    Fault::of(error).connect(text)
}

/// Runs `work` where it may wait, for [`FILE_SYSTEM`] at the most.
///
/// # Errors
/// Its own; `TimedOut` when a file system does not answer (the thread is left to it).
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    match tokio::time::timeout(FILE_SYSTEM, tokio::task::spawn_blocking(work)).await {
        Ok(done) => done.unwrap_or_else(|error| Err(io::Error::other(error))),
        Err(_elapsed) => Err(io::Error::new(io::ErrorKind::TimedOut, "the file system does not answer")),
    }
}

#[cfg(test)]
mod tests {
    use connectrpc::ErrorCode;

    use super::*;

    #[test]
    fn every_usual_errno_has_a_kind() {
        for (number, fault, code, status) in [
            (libc::ENOENT, Fault::NotFound, ErrorCode::NotFound, 404),
            (libc::EEXIST, Fault::Exists, ErrorCode::AlreadyExists, 409),
            (libc::ENOTDIR, Fault::Invalid, ErrorCode::InvalidArgument, 400),
            (libc::ELOOP, Fault::Invalid, ErrorCode::InvalidArgument, 400),
            (libc::E2BIG, Fault::Invalid, ErrorCode::InvalidArgument, 400),
            (libc::EACCES, Fault::Denied, ErrorCode::PermissionDenied, 403),
            (libc::EPERM, Fault::Denied, ErrorCode::PermissionDenied, 403),
            (libc::ENOSPC, Fault::Exhausted, ErrorCode::ResourceExhausted, 507),
            (libc::EXDEV, Fault::Precondition, ErrorCode::FailedPrecondition, 409),
            (libc::ENOTEMPTY, Fault::Precondition, ErrorCode::FailedPrecondition, 409),
            (libc::EROFS, Fault::Precondition, ErrorCode::FailedPrecondition, 409),
            (libc::EFBIG, Fault::TooLarge, ErrorCode::OutOfRange, 413),
            (libc::EOPNOTSUPP, Fault::Unsupported, ErrorCode::Unimplemented, 501),
            (libc::EIO, Fault::Broken, ErrorCode::DataLoss, 500),
        ] {
            let error = io::Error::from_raw_os_error(number);
            assert_eq!(Fault::of(&error), fault, "{error}");
            assert_eq!(typed(&error, error.to_string()).code, code, "{error}");
            assert_eq!(fault.status().as_u16(), status, "{error}");
        }
    }
}
