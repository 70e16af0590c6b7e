//! Failures as errors of calls, whole in both directions.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use buffa::Message as _;
use connectrpc::{ConnectError, ErrorDetail};
use kelvin_api::error::{ErrorCode, Failure, Kind};

use super::generated::pb;

/// The name of the detail.
const DETAIL: &str = "kelvin.node.v1.Failure";

/// A kind, or a code, as its name.
fn name(value: impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        _ => String::new(),
    }
}

/// What connectrpc calls a kind: for readers that know no details.
fn code(kind: Kind) -> connectrpc::ErrorCode {
    use connectrpc::ErrorCode as Code;
    match kind {
        Kind::Invalid | Kind::NotAllowed | Kind::TooLarge => Code::InvalidArgument,
        Kind::Unauthenticated => Code::Unauthenticated,
        Kind::Forbidden => Code::PermissionDenied,
        Kind::NotFound => Code::NotFound,
        Kind::Conflict => Code::FailedPrecondition,
        Kind::Exhausted | Kind::Busy => Code::ResourceExhausted,
        Kind::Timeout => Code::DeadlineExceeded,
        Kind::Unavailable => Code::Unavailable,
        Kind::Corrupt => Code::DataLoss,
        Kind::Internal => Code::Internal,
    }
}

pub(super) fn to_wire(failure: Failure) -> pb::Failure {
    pb::Failure {
        kind: name(failure.kind),
        code: name(failure.error_code),
        message: failure.message,
        cause: failure.cause,
        remediation: failure.remediation,
        ..Default::default()
    }
}

pub(super) fn from_wire(failure: pb::Failure) -> Failure {
    // As a failure is read everywhere: what only the writer knows is no reason to lose the rest.
    let read = serde_json::from_value(serde_json::json!({
        "kind": failure.kind, "error_code": failure.code, "message": failure.message, "cause": failure.cause,
        "remediation": failure.remediation,
    }));
    read.unwrap_or_else(|error| odd("a failure", &error))
}

/// A failure as the error of a call.
pub(super) fn refuse(failure: Failure) -> ConnectError {
    let error = ConnectError::new(code(failure.kind), failure.message.clone());
    error.with_detail(ErrorDetail::from_message(DETAIL, &to_wire(failure)))
}

/// The failure in the error of a call; one that no node has written says that the node was not reached.
pub(super) fn refused(error: &ConnectError) -> Failure {
    let details = error.details.iter().filter(|detail| detail.type_url.ends_with(DETAIL));
    let found = details.filter_map(|detail| detail.value.as_deref()).find_map(|text| {
        let bytes = STANDARD_NO_PAD.decode(text).or_else(|_| STANDARD.decode(text)).ok()?;
        pb::Failure::decode_from_slice(&bytes).ok()
    });
    found.map(from_wire).unwrap_or_else(|| {
        let advice = "look whether the node runs and can be reached; what was asked for may have been done";
        Failure::new(ErrorCode::NodeUnreachable, "the node did not answer", advice).with_cause(error)
    })
}

/// A message that does not have what it must have.
pub(super) fn odd(what: &str, error: &dyn std::error::Error) -> Failure {
    let advice = "run control plane, gateway and node of one version";
    Failure::new(ErrorCode::UnreadableMessage, format!("{what} between the parts cannot be read"), advice)
        .with_cause(error)
}

/// The same without more to say.
pub(super) fn missing(what: &str) -> Failure {
    let advice = "run control plane, gateway and node of one version";
    Failure::new(
        ErrorCode::UnreadableMessage,
        format!("a message between the parts lacks {what}, or has one that is not known here"),
        advice,
    )
}
