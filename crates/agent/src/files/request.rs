//! What every request to `/files` names, who may ask it, and what is told of its failure. Nothing is written.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use kelvin_api::signature::{Signature, query};
use tokio::io::AsyncRead;

use crate::entries::clean;
use crate::fault::Fault;
use crate::reply::{Body, error};
use crate::state::State;
use crate::users::User;

/// One read, in bytes.
pub(super) const CHUNK: usize = 64 << 10;

pub(super) type Reply = Response<Body>;
pub(super) type Content = Pin<Box<dyn AsyncRead + Send>>;

/// What every request to `/files` names.
pub(super) struct Asked {
    pub(super) user: User,
    pub(super) path: Option<PathBuf>,
}

/// Whether a request without the access token shows a signature that stands in for it.
///
/// # Errors
/// The reply, when it does not.
pub fn admits(state: &State, request: &Request<Incoming>) -> Result<(), Box<Reply>> {
    let Some(signature) = Signature::of(request.method(), request.uri()) else {
        return Err(Box::new(error(StatusCode::UNAUTHORIZED, "missing signature query parameter")));
    };
    let token = state.settings().access_token.clone();
    signature
        .signed()
        .check(&token)
        .map_err(|problem| Box::new(error(StatusCode::UNAUTHORIZED, &problem.to_string())))
}

fn parameters(request: &Request<Incoming>) -> Result<HashMap<String, String>, Box<Reply>> {
    query(request.uri()).map_err(|text| Box::new(error(StatusCode::BAD_REQUEST, text)))
}

pub(super) fn ask(state: &Arc<State>, request: &Request<Incoming>) -> Result<Asked, Box<Reply>> {
    let parameters = parameters(request)?;
    let user = state
        .user(parameters.get("username").map(String::as_str))
        .map_err(|text| Box::new(error(StatusCode::UNAUTHORIZED, &text)))?;
    let path = match parameters.get("path").filter(|path| !path.is_empty()) {
        Some(path) => Some(resolve(&user, path)?),
        None => None,
    };
    Ok(Asked { user, path })
}

pub(super) fn resolve(user: &User, path: &str) -> Result<PathBuf, Box<Reply>> {
    if path.contains('\0') {
        return Err(Box::new(error(StatusCode::BAD_REQUEST, "the path has a NUL byte")));
    }
    Ok(clean(&user.resolve(path)))
}

pub(super) fn no_path() -> Box<Reply> {
    Box::new(error(StatusCode::BAD_REQUEST, "the query parameter 'path' is missing"))
}

pub(super) fn failed(path: &Path, problem: &io::Error) -> Reply {
    let fault = Fault::of(problem);
    let text = match (fault, problem.kind()) {
        (Fault::NotFound, _) => format!("path '{}' does not exist", path.display()),
        (_, io::ErrorKind::IsADirectory) => format!("path '{}' is a directory", path.display()),
        (_, io::ErrorKind::NotADirectory) => format!("a parent of '{}' is not a directory", path.display()),
        (_, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
            "not enough disk space available".to_owned()
        }
        _ => format!("'{}': {problem}", path.display()),
    };
    let stood_still = problem.get_ref().is_some_and(|inner| inner.is::<StoodStill>());
    error(if stood_still { StatusCode::REQUEST_TIMEOUT } else { fault.status() }, &text)
}

/// A caller's body that does not come.
#[derive(Debug, thiserror::Error)]
#[error("the body stood still")]
pub(super) struct StoodStill;

/// Opens what can be read or written without waiting for somebody: a FIFO or a device would.
pub(super) fn open(path: &Path, options: &mut std::fs::OpenOptions) -> io::Result<(std::fs::File, u64)> {
    let file = options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let found = file.metadata()?;
    if found.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !found.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    Ok((file, found.len()))
}
