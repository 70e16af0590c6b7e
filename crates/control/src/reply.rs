//! Failures as HTTP replies: the one place where a kind gets a status.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};
use kelvin_api::error::{ApiError, Failure, Kind};

/// The status of a kind.
pub fn status(kind: Kind) -> StatusCode {
    match kind {
        Kind::Invalid => StatusCode::BAD_REQUEST,
        Kind::NotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        Kind::Unauthenticated => StatusCode::UNAUTHORIZED,
        Kind::Forbidden => StatusCode::FORBIDDEN,
        Kind::NotFound => StatusCode::NOT_FOUND,
        Kind::Conflict => StatusCode::CONFLICT,
        Kind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        Kind::Busy => StatusCode::TOO_MANY_REQUESTS,
        Kind::Exhausted | Kind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Kind::Timeout => StatusCode::GATEWAY_TIMEOUT,
        Kind::Corrupt | Kind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// `failure` as it leaves the platform.
pub fn body(failure: &Failure) -> ApiError {
    ApiError {
        code: status(failure.kind).as_u16(),
        message: failure.message.clone(),
        error_code: Some(failure.error_code.to_owned()),
        cause: failure.cause.clone(),
        remediation: Some(failure.remediation.clone()),
    }
}

/// `failure` as a reply. It is logged here, once, when it is our fault.
pub fn reply(failure: &Failure) -> Response {
    let status = status(failure.kind);
    if status.is_server_error() {
        tracing::error!(code = failure.error_code, cause = failure.cause, "{}", failure.message);
    }
    let bytes = serde_json::to_vec(&body(failure)).unwrap_or_default();
    let mut reply = (status, [(header::CONTENT_TYPE, "application/json")], Body::from(bytes)).into_response();
    if matches!(failure.kind, Kind::Exhausted | Kind::Busy) {
        reply.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
    }
    reply
}
