//! `/files`: content up and down, streamed in bounded memory.
//!
//! An upload writes in place, as envd does: watchers see one file, and a torn upload leaves what had
//! arrived (the caller gets the error).

use std::io::{self, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};

use crate::filesystem::{clean, make_dirs};
use crate::http::{Body, error, json, query};
use crate::state::State;
use crate::users::User;

const CHUNK: usize = 64 << 10;

struct Target {
    user: User,
    path: PathBuf,
}

#[allow(clippy::result_large_err)] // the error is the reply itself
fn target(state: &Arc<State>, request: &Request<Incoming>) -> Result<Target, Response<Body>> {
    let parameters = query(request.uri());
    let user = state
        .user(parameters.get("username").map(String::as_str))
        .map_err(|text| error(StatusCode::UNAUTHORIZED, &text))?;
    match parameters.get("path").filter(|path| !path.is_empty()) {
        Some(path) if !path.contains('\0') => Ok(Target { path: clean(&user.resolve(path)), user }),
        Some(_) => Err(error(StatusCode::BAD_REQUEST, "the path has a NUL byte")),
        None => Err(error(StatusCode::BAD_REQUEST, "the query parameter 'path' is missing")),
    }
}

fn failed(path: &std::path::Path, problem: &io::Error) -> Response<Body> {
    match problem.kind() {
        io::ErrorKind::NotFound => {
            error(StatusCode::NOT_FOUND, &format!("path '{}' does not exist", path.display()))
        }
        io::ErrorKind::IsADirectory => {
            error(StatusCode::BAD_REQUEST, &format!("path '{}' is a directory", path.display()))
        }
        io::ErrorKind::NotADirectory => {
            error(StatusCode::BAD_REQUEST, &format!("a parent of '{}' is not a directory", path.display()))
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            error(StatusCode::INSUFFICIENT_STORAGE, "not enough disk space available")
        }
        _ => error(StatusCode::INTERNAL_SERVER_ERROR, &format!("'{}': {problem}", path.display())),
    }
}

/// `GET /files`.
pub async fn download(state: &Arc<State>, request: &Request<Incoming>) -> Response<Body> {
    let Target { path, .. } = match target(state, request) {
        Ok(target) => target,
        Err(reply) => return reply,
    };
    let opened = async {
        let file = tokio::fs::File::open(&path).await?;
        let found = file.metadata().await?;
        if found.is_dir() { Err(io::ErrorKind::IsADirectory.into()) } else { Ok((file, found.len())) }
    };
    let (mut file, size) = match opened.await {
        Ok(opened) => opened,
        Err(problem) => return failed(&path, &problem),
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy().replace(['"', '\\', '\r', '\n'], "_");
    let mut reply = Response::builder()
        .header(CONTENT_TYPE, "application/octet-stream")
        .header("accept-ranges", "bytes")
        .header(CONTENT_DISPOSITION, format!("inline; filename=\"{name}\""));
    let (start, length) = match range(request.headers(), size) {
        Wanted::All => (0, size),
        Wanted::Part(start, length) => {
            reply = reply
                .status(StatusCode::PARTIAL_CONTENT)
                .header(CONTENT_RANGE, format!("bytes {start}-{}/{size}", start + length - 1));
            (start, length)
        }
        Wanted::Nothing => {
            let mut reply = error(StatusCode::RANGE_NOT_SATISFIABLE, "the range is outside the file");
            if let Ok(value) = format!("bytes */{size}").parse() {
                reply.headers_mut().insert(CONTENT_RANGE, value);
            }
            return reply;
        }
    };
    if let Err(problem) = file.seek(SeekFrom::Start(start)).await {
        return failed(&path, &problem);
    }
    let body = futures::stream::try_unfold((file, length), |(mut file, left)| async move {
        let mut buffer = vec![0; CHUNK.min(usize::try_from(left).unwrap_or(CHUNK))];
        match file.read(&mut buffer).await? {
            _ if left == 0 => Ok(None),
            // Shorter than it was: cut the stream, so that nobody takes a part for the whole.
            0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
            count => {
                buffer.truncate(count);
                Ok(Some((Frame::data(Bytes::from(buffer)), (file, left - count as u64))))
            }
        }
    });
    reply
        .header(CONTENT_LENGTH, length)
        .body(StreamBody::new(body).boxed_unsync())
        .unwrap_or_else(|problem| error(StatusCode::INTERNAL_SERVER_ERROR, &problem.to_string()))
}

#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    All,
    Part(u64, u64),
    Nothing,
}

/// What of `size` bytes a `Range` header asks for. Source: RFC 9110, 14.1.2; several ranges and other
/// units are answered with the whole, as the RFC allows.
fn range(headers: &HeaderMap, size: u64) -> Wanted {
    let Some((first, last)) = headers
        .get(RANGE)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.strip_prefix("bytes="))
        .and_then(|text| text.split_once('-'))
    else {
        return Wanted::All;
    };
    match (first.trim().parse::<u64>(), last.trim().parse::<u64>()) {
        (Ok(start), _) if start >= size => Wanted::Nothing,
        (Ok(start), Ok(end)) if end >= start => Wanted::Part(start, end.min(size - 1) - start + 1),
        (Ok(start), Err(_)) if last.trim().is_empty() => Wanted::Part(start, size - start),
        (Err(_), Ok(0)) if first.trim().is_empty() => Wanted::Nothing,
        (Err(_), Ok(suffix)) if first.trim().is_empty() && size > 0 => {
            let length = suffix.min(size);
            Wanted::Part(size - length, length)
        }
        _ => Wanted::All,
    }
}

/// `POST /files` with the raw content as body.
pub async fn upload(state: &Arc<State>, request: Request<Incoming>) -> Response<Body> {
    let Target { user, path } = match target(state, &request) {
        Ok(target) => target,
        Err(reply) => return reply,
    };
    let kind = request.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if !kind.starts_with("application/octet-stream") || request.headers().contains_key("content-encoding") {
        return error(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "send the content as application/octet-stream without an encoding; other forms come with a later version",
        );
    }
    let mut body = request.into_body();
    let written = async {
        if let Some(parent) = path.parent() {
            make_dirs(parent, &user)?;
        }
        let new = !path.exists();
        let mut file = tokio::fs::File::create(&path).await?;
        if new {
            std::os::unix::fs::chown(&path, Some(user.uid), Some(user.gid))?;
        }
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame.map_err(io::Error::other)?.into_data() {
                file.write_all(&data).await?;
            }
        }
        file.flush().await
    };
    match written.await {
        Ok(()) => json(
            StatusCode::OK,
            &serde_json::json!([{
                "name": path.file_name().unwrap_or_default().to_string_lossy(),
                "type": "file",
                "path": path.to_string_lossy(),
            }]),
        ),
        Err(problem) => failed(&path, &problem),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_follow_the_rfc() {
        let ask = |text: &str, size| {
            let mut headers = HeaderMap::new();
            headers.insert(RANGE, text.parse().unwrap());
            range(&headers, size)
        };
        assert_eq!(ask("bytes=0-9", 100), Wanted::Part(0, 10));
        assert_eq!(ask("bytes=90-", 100), Wanted::Part(90, 10));
        assert_eq!(ask("bytes=-10", 100), Wanted::Part(90, 10));
        assert_eq!(ask("bytes=50-1000", 100), Wanted::Part(50, 50));
        assert_eq!(ask("bytes=100-", 100), Wanted::Nothing);
        assert_eq!(ask("bytes=9-1", 100), Wanted::All);
        assert_eq!(ask("lines=1-2", 100), Wanted::All);
        assert_eq!(ask("bytes=0-", 0), Wanted::Nothing);
    }
}
