//! Failures as HTTP replies.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header;
use kelvin_api::error::{ApiError, Failure, Kind};

/// `failure` as it leaves the platform.
pub fn body(failure: &Failure) -> ApiError {
    failure.body(failure.kind.status())
}

/// `failure` as a reply. It is logged here, once, when it is our fault.
pub fn reply(failure: &Failure) -> Response {
    let status = failure.kind.status();
    if status.is_server_error() {
        tracing::error!(code = %failure.error_code, cause = failure.cause, "{}", failure.message);
    }
    let bytes = serde_json::to_vec(&body(failure)).unwrap_or_default();
    let mut reply = (status, [(header::CONTENT_TYPE, "application/json")], Body::from(bytes)).into_response();
    // For the check that the route says so (`admission`).
    reply.extensions_mut().insert(failure.error_code);
    if matches!(failure.kind, Kind::Exhausted | Kind::Busy) {
        reply.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
    }
    reply
}
