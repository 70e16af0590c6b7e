//! Uploads of files for builds, at URLs that are signed instead of asking for an API key.
//!
//! ```text
//! GET /templates/{name}/files/{hash} ──> {present, url} ── url: /uploads/{hash}?project&key&expires&signature
//! PUT url ──> the signature, the key's account, the length ──> streamed to the node, which keeps it once it is whole
//! ```
//!
//! A URL is good for an hour, and for as long as the key that asked for it is. Some uploads of a project run at one time, others
//! wait for their turn before anything is read of them. Who writes: the task of the request, which runs to its end when its
//! client leaves. A crash leaves what the node cleans up.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt as _, stream};
use http::{HeaderMap, Method, StatusCode, Uri, header};
use kelvin_api::build::FilesUpload;
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::FilesHash;
use kelvin_api::signature::{Operation, Signed, sign};
use serde::Deserialize;

use super::codes as own;
use super::turns::AT_ONCE;
use crate::accounts::Caller;
use crate::audit::Audit;
use crate::codes;
use crate::control::{Control, Inner};
use crate::failures::unknown_template;
use crate::openapi::{Api, Tag, op};
use crate::reply::reply;
use crate::request::{Outcome, OverTls, Path, Query, Who, json};

/// How long a URL is good, in seconds.
const LIFE_S: i64 = 3600;
/// When an upload of which nothing comes is given up.
const SILENCE: Duration = Duration::from_secs(60);
/// When an upload is given up that has begun.
const DEADLINE: Duration = Duration::from_secs(3600);

/// The routes.
pub(crate) fn routes() -> Api {
    Api::new()
        .route(
            &Method::GET,
            "/templates/{name}/files/{hash}",
            link,
            op("getBuildUploadLink", Tag::Templates, "Where to upload files for a build")
                .errors(&[
                    codes::NODE,
                    &[ErrorCode::TemplateNotFound, ErrorCode::InvalidRequest, ErrorCode::BuildUnsupported],
                ])
                .reply::<FilesUpload>(201),
        )
        .signed_route(
            &Method::PUT,
            "/uploads/{hash}",
            upload,
            op("uploadBuildFiles", Tag::Templates, "Upload files for a build: a tar, plain or gzip")
                .query(&[
                    ("project", "whose they are"),
                    ("key", "id of the API key that asked for the URL"),
                    ("expires", "seconds since 1970"),
                    ("signature", "of all of it"),
                ])
                .errors(&[codes::NODE, own::UPLOAD])
                .empty(204),
        )
}

/// What comes of an upload, until nothing comes for too long, or it lasts too long.
fn in_time<E: Into<axum::BoxError>>(
    content: impl Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    let end = tokio::time::Instant::now() + DEADLINE;
    stream::unfold(Some(content), move |content| async move {
        let mut content = content?;
        let until = end.min(tokio::time::Instant::now() + SILENCE);
        match tokio::time::timeout_at(until, content.next()).await {
            Ok(piece) => Some((piece?.map_err(io::Error::other), Some(content))),
            Err(_) => Some((Err(io::Error::new(io::ErrorKind::TimedOut, "nothing more came in time")), None)),
        }
    })
}

fn parse_hash(text: &str) -> Result<FilesHash, Failure> {
    text.parse().map_err(|error: kelvin_api::id::ParseIdError| {
        Failure::new(ErrorCode::InvalidPath, error.to_string(), "name the files by a SHA-256 of theirs")
    })
}

/// Who signed what, as one text: none of the parts has a colon or a slash.
fn signer(project: &str, key: &str) -> String {
    format!("{project}/{key}")
}

/// Where the server is for who sent this request: the URL goes back to nobody else, so what the headers claim harms nobody.
fn origin(uri: &Uri, headers: &HeaderMap, is_over_tls: bool) -> Result<String, Failure> {
    let host = uri.authority().map(|authority| authority.as_str().to_owned()).or_else(|| {
        let host = headers.get(header::HOST)?.to_str().ok()?;
        host.parse::<http::uri::Authority>().ok().map(|host| host.to_string())
    });
    let Some(host) = host.filter(|host| !host.contains('@')) else {
        let text = "the request does not say which host it is for";
        return Err(Failure::new(ErrorCode::InvalidRequest, text, "send the header Host"));
    };
    let is_behind_tls = headers.get("x-forwarded-proto").is_some_and(|scheme| scheme == "https");
    let scheme = if is_over_tls || is_behind_tls { "https" } else { "http" };
    Ok(format!("{scheme}://{host}"))
}

async fn link(
    State(control): State<Control>,
    Who(caller): Who,
    Path((name, hash)): Path<(String, String)>,
    request: Request,
) -> Outcome {
    let inner = &control.inner;
    if !inner.owners.is_own(&caller.project, &name) {
        return Err(unknown_template(&name).into());
    }
    let hash = parse_hash(&hash)?;
    let is_over_tls = request.extensions().get::<OverTls>().is_some();
    let origin = origin(request.uri(), request.headers(), is_over_tls)?;
    let present = inner.node.has_files(&caller.project, &hash).await?;
    let expires = (inner.clock.wall().as_second() + LIFE_S).to_string();
    let (project, key) = (caller.project.as_str(), caller.key.as_str());
    let path = format!("/uploads/{hash}");
    let secret = inner.upload_secret.expose();
    let signature = sign(&path, Operation::Write, &signer(project, key), secret, Some(&expires));
    let encode = |text: &str| {
        percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
    };
    let url = format!(
        "{origin}{path}?project={}&key={}&expires={expires}&signature={}",
        encode(project),
        encode(key),
        encode(&signature)
    );
    Ok(json(StatusCode::CREATED, &FilesUpload { present, url }))
}

#[derive(Debug, Deserialize)]
struct UploadQuery {
    project: String,
    key: String,
    expires: String,
    signature: String,
}

impl Inner {
    /// Who may upload `hash` by this URL.
    fn uploader(&self, hash: &FilesHash, query: &UploadQuery) -> Result<Caller, Failure> {
        let refused = |text: &str| {
            let remedy = "ask for another with GET /templates/{name}/files/{hash}";
            Failure::new(ErrorCode::WrongApiKey, text, remedy)
        };
        let path = format!("/uploads/{hash}");
        let signed = Signed {
            path: &path,
            user: &signer(&query.project, &query.key),
            operation: Operation::Write,
            signature: &query.signature,
            expiration: Some(&query.expires),
        };
        if !signed.is_of(self.upload_secret.expose()) {
            return Err(refused("the URL's signature is not valid"));
        }
        if query.expires.parse::<i64>().map_or(true, |until| until < self.clock.wall().as_second()) {
            return Err(refused("the URL's signature is already expired"));
        }
        // A key that was revoked meanwhile is none.
        let caller = self.accounts.by_id(&query.key);
        caller
            .filter(|caller| caller.project.as_str() == query.project)
            .ok_or_else(|| refused("the API key that asked for the URL is not known any more"))
    }

    /// Has the node keep the body of a request, as far as it is not too long.
    async fn receive(&self, caller: &Caller, hash: &FilesHash, request: Request) -> Result<(), Failure> {
        let most = self.build_options.max_upload_bytes;
        let too_large = || {
            let text = format!("the upload is larger than {} MiB", most >> 20);
            Failure::new(ErrorCode::BodyTooLarge, text, "leave out what the build does not need")
        };
        let length = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
        if length.and_then(|text| text.parse::<u64>().ok()).is_some_and(|length| length > most) {
            return Err(too_large());
        }
        let turns = self.uploading.turns(&caller.project);
        let waiting = tokio::time::timeout(DEADLINE, turns.acquire()).await;
        let Ok(Ok(_turn)) = waiting else {
            let text = format!("{AT_ONCE} uploads of this project are under way");
            return Err(Failure::new(ErrorCode::TooManyRequests, text, "send it again when one has ended"));
        };
        let (over, cut) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (is_over, is_cut, mut got) = (Arc::clone(&over), Arc::clone(&cut), 0_u64);
        let content = in_time(request.into_body().into_data_stream()).boxed().map(move |piece| match piece {
            Ok(piece) => {
                got += piece.len() as u64;
                if got <= most {
                    return Ok(piece);
                }
                is_over.store(true, Ordering::Relaxed);
                Err(io::Error::new(io::ErrorKind::FileTooLarge, "the upload is too large"))
            }
            Err(error) => {
                is_cut.store(true, Ordering::Relaxed);
                Err(error)
            }
        });
        let kept = self.node.put_files(&caller.project, hash, Box::pin(content)).await;
        match kept {
            Err(_) if over.load(Ordering::Relaxed) => Err(too_large()),
            Err(failure) if cut.load(Ordering::Relaxed) => Err(Failure::new(
                ErrorCode::BodyCut,
                "the body ended early, or came too slowly",
                "send it again",
            )
            .with_cause(&failure)),
            other => other,
        }
    }

    /// The same, written down.
    async fn upload(&self, caller: &Caller, hash: &FilesHash, request: Request) -> Response {
        let action = "PUT /uploads/{hash}".to_owned();
        let audit = Audit::new(caller, action, hash.to_string(), self.clock.wall());
        if let Err(failure) = audit.begin(&self.database).await {
            return reply(&failure);
        }
        let response = match self.receive(caller, hash, request).await {
            Ok(()) => StatusCode::NO_CONTENT.into_response(),
            Err(failure) => reply(&failure),
        };
        audit.end(&self.database, response.status(), None).await;
        response
    }
}

async fn upload(
    State(control): State<Control>,
    Path(hash): Path<String>,
    Query(query): Query<UploadQuery>,
    request: Request,
) -> Outcome {
    let hash = parse_hash(&hash)?;
    let caller = control.inner.uploader(&hash, &query)?;
    if caller.count().is_err() {
        let text = "this API key asks too often";
        return Err(Failure::new(ErrorCode::TooManyRequests, text, "send it again in a second").into());
    }
    let inner = Arc::clone(&control.inner);
    let uploading = control.inner.tasks.spawn(async move { inner.upload(&caller, &hash, request).await });
    Ok(uploading.await.unwrap_or_else(|error| {
        let text = "the request was aborted";
        reply(&Failure::new(ErrorCode::Aborted, text, "look at the server's log").with_cause(&error))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_upload_of_which_nothing_comes_is_given_up() {
        let piece = || Ok::<_, io::Error>(Bytes::from_static(b"a"));
        let silent = in_time(stream::iter([piece()]).chain(stream::pending()).boxed());
        let silent: Vec<_> = silent.collect().await;
        assert_eq!(silent.len(), 2);
        assert_eq!(silent[1].as_ref().unwrap_err().kind(), io::ErrorKind::TimedOut);
        // One that goes on for ever, a piece just before each end.
        let slow = stream::repeat(()).then(|()| tokio::time::sleep(SILENCE - Duration::from_secs(1)));
        let begun = tokio::time::Instant::now();
        let slow: Vec<_> = in_time(slow.map(move |()| piece()).boxed()).collect().await;
        assert!(slow.len() > 60 && slow.last().is_some_and(Result::is_err));
        assert_eq!(begun.elapsed().as_secs(), DEADLINE.as_secs());
        let whole: Vec<_> = in_time(stream::iter([piece(), piece()])).collect().await;
        assert!(whole.len() == 2 && whole.iter().all(Result::is_ok));
    }

    #[test]
    fn a_url_leads_back_to_where_the_request_came() {
        let of = |uri: &str, pairs: &[(&'static str, &'static str)], tls: bool| {
            let headers = pairs
                .iter()
                .map(|(name, value)| {
                    (http::HeaderName::from_static(name), http::HeaderValue::from_static(value))
                })
                .collect();
            origin(&uri.parse().unwrap(), &headers, tls).map_err(|failure| failure.error_code)
        };
        assert_eq!(of("/a", &[("host", "h:1")], false).unwrap(), "http://h:1");
        assert_eq!(of("/a", &[("host", "h:1")], true).unwrap(), "https://h:1");
        assert_eq!(of("/a", &[("host", "h"), ("x-forwarded-proto", "https")], false).unwrap(), "https://h");
        assert_eq!(of("/a", &[("host", "h"), ("x-forwarded-proto", "gopher")], false).unwrap(), "http://h");
        assert_eq!(of("https://h2:3/a", &[], true).unwrap(), "https://h2:3");
        for host in ["a b", "u@h", "h/x", ""] {
            let headers = [("host", host)];
            assert_eq!(of("/a", &headers, false), Err(ErrorCode::InvalidRequest), "{host:?}");
        }
        assert_eq!(of("/a", &[], false), Err(ErrorCode::InvalidRequest));
    }
}
