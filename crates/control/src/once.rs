//! Requests with an `Idempotency-Key`: the first answer is given again, for 24 hours, also after a restart.
//!
//! ```text
//! key ──> known, answered:  that answer
//!     ──> known, not answered: the server died meanwhile; the request looks what became of it, see [`Again`]
//!     ──> new: written down ──> the request ──> 2xx: its answer is kept ──> the reply
//!                                          └──> else: forgotten, a retry starts afresh
//! ```
//!
//! Whose a key is, is decided by the database: of two requests that find it new, on whatever servers, one writes it down and
//! the other is told that it is in use. A create writes its key and its answer in its own transactions (`create`); the
//! rest is here. Who writes: the task of the request. What makes a secret (an API key) takes no key: its answer would have to
//! be kept.

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use http_body_util::BodyExt;
use kelvin_api::error::{ErrorCode, Failure, chain};
use kelvin_api::sandbox::CAPTURE_HEADER;
use serde::{Deserialize, Serialize};

use crate::accounts::Account;
use crate::control::Inner;
use crate::database::NewKey;
use crate::failures::database_failed;
use crate::reply::reply;
use crate::request::read;

/// The key of the request that is on its way, for handlers that note what it makes.
#[derive(Debug, Clone)]
pub(crate) struct Key(pub String);

/// What a request with the same key had made when the server died: sandboxes, or a snapshot. The request may have been
/// done, in part or not at all.
#[derive(Debug, Clone)]
pub(crate) struct Again(pub Vec<String>);

/// An answer as it is kept.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    status: u16,
    headers: Vec<(String, String)>,
    body: String,
}

/// Headers of an answer that are part of it.
const HEADERS: [HeaderName; 2] = [header::CONTENT_TYPE, HeaderName::from_static(CAPTURE_HEADER)];

/// The idempotency key of a request.
///
/// # Errors
/// `Invalid` for one that is none.
pub(crate) fn key_of(headers: &HeaderMap) -> Result<Option<String>, Failure> {
    let Some(value) = headers.get("idempotency-key") else {
        return Ok(None);
    };
    match value.to_str() {
        Ok(key) if !key.is_empty() && key.len() <= 255 => Ok(Some(key.to_owned())),
        _ => Err(Failure::new(
            ErrorCode::InvalidIdempotencyKey,
            "the idempotency key is empty, longer than 255 characters or not ASCII",
            "use a random UUID",
        )),
    }
}

/// That a request with a key has not ended yet.
pub(crate) fn in_use() -> Failure {
    Failure::new(
        ErrorCode::IdempotencyKeyInUse,
        "a request with this idempotency key is under way",
        "try again",
    )
}

/// That a key was used for another request.
pub(crate) fn reused() -> Failure {
    Failure::new(
        ErrorCode::IdempotencyKeyReused,
        "the idempotency key was used for another request",
        "use a new key for each request; the same one only to repeat it",
    )
}

impl Inner {
    /// Does `work` with `request`, once for its idempotency key `key`.
    pub(crate) async fn once<F: Future<Output = Response>>(
        &self,
        caller: &Account,
        key: &str,
        request: Request,
        work: impl FnOnce(Request) -> F,
    ) -> Response {
        let (mut parts, body) = request.into_parts();
        let bytes = match read(Request::from_parts(parts.clone(), body)).await {
            Ok(bytes) => bytes,
            Err(failure) => return reply(&failure),
        };
        let target =
            format!("{} {}\n", parts.method, parts.uri.path_and_query().map_or("", |path| path.as_str()));
        let fingerprint = kelvin_api::digest::sha256(&[target.as_bytes(), &bytes].concat());
        // Each project has its own.
        let key = format!("{}:{key}", caller.project);
        self.alone_with_key(&key, async {
            match self.database.key(key.clone()).await.map_err(database_failed) {
                Err(failure) => return reply(&failure),
                Ok(Some(known)) if known.fingerprint != fingerprint => return reply(&reused()),
                Ok(Some(known)) => {
                    if let Some(kept) = known.reply.and_then(|text| serde_json::from_str::<Kept>(&text).ok())
                    {
                        return kept.response();
                    }
                    parts.extensions.insert(Again(known.subjects));
                }
                Ok(None) => {
                    let new = NewKey { key: key.clone(), fingerprint, subjects: Vec::new() };
                    match self.database.add_key_of(new).await {
                        Ok(true) => {}
                        Ok(false) => return reply(&in_use()),
                        Err(error) => return reply(&database_failed(error)),
                    }
                }
            }
            parts.extensions.insert(Key(key.clone()));
            let response = work(Request::from_parts(parts, Body::from(bytes))).await;
            self.keep(key.clone(), response).await
        })
        .await
    }

    /// Keeps an answer under its key, and gives it.
    async fn keep(&self, key: String, response: Response) -> Response {
        let (parts, body) = response.into_parts();
        let Ok(body) = body.collect().await else {
            return reply(&Failure::new(ErrorCode::Encoding, "the reply was cut", "report this"));
        };
        let body: Bytes = body.to_bytes();
        let text = String::from_utf8(body.to_vec());
        let written = match text {
            Ok(text) if parts.status.is_success() => {
                let of = |name: &HeaderName| {
                    let value = parts.headers.get(name)?.to_str().ok()?;
                    Some((name.to_string(), value.to_owned()))
                };
                let headers = HEADERS.iter().filter_map(of).collect();
                let kept = Kept { status: parts.status.as_u16(), headers, body: text };
                let kept = serde_json::to_string(&kept).unwrap_or_default();
                self.database.answer(key, kept).await
            }
            _ => self.database.forget_key(key).await,
        };
        if let Err(error) = written {
            tracing::error!(error = chain(&error), "the answer of an idempotency key was not kept");
        }
        Response::from_parts(parts, Body::from(body))
    }
}

impl Kept {
    fn response(self) -> Response {
        let mut response = Body::from(self.body).into_response();
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::OK);
        for (name, value) in self.headers {
            if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_str(&value)) {
                response.headers_mut().insert(name, value);
            }
        }
        response
    }
}
