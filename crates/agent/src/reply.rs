//! Replies of the agent's HTTP port: without a body, with JSON, with envd's error.

use std::convert::Infallible;
use std::io;

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use serde::Serialize;

/// The body of every reply.
pub type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A reply without a body.
pub fn empty(status: StatusCode) -> Response<Body> {
    let mut reply = Response::new(Full::default().map_err(|never: Infallible| match never {}).boxed_unsync());
    *reply.status_mut() = status;
    reply
}

/// A JSON reply.
pub fn json(status: StatusCode, body: &impl Serialize) -> Response<Body> {
    let Ok(bytes) = serde_json::to_vec(body) else {
        return empty(StatusCode::INTERNAL_SERVER_ERROR);
    };
    let mut reply =
        Response::new(Full::from(bytes).map_err(|never: Infallible| match never {}).boxed_unsync());
    *reply.status_mut() = status;
    reply
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    reply
}

/// envd's error body.
pub fn error(status: StatusCode, message: &str) -> Response<Body> {
    json(status, &serde_json::json!({ "code": status.as_u16(), "message": message }))
}
