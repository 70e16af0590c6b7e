//! The way from outside to what runs inside: for now the agent, by the headers that the SDKs send.
//!
//! Streams both ways without buffering: a body is forwarded frame by frame under HTTP/2's flow control,
//! and a connection that breaks on one side is broken on the other, never ended cleanly. The agent checks
//! the access token; what belongs to the platform alone is refused here. Writes nothing; a crash cuts
//! streams, processes go on. Absent until machines have a network: every other port.

use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, Request, StatusCode, Uri, Version, header};
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use kelvin_api::error::{Failure, Kind, chain};
use kelvin_api::id::SandboxId;
use kelvin_api::{AGENT_PORT, PORT_HEADER, SANDBOX_HEADER};

/// A request's body on its way in.
pub type Inbound = UnsyncBoxBody<Bytes, io::Error>;
/// A reply's body on its way out.
pub type Outbound = UnsyncBoxBody<Bytes, io::Error>;

/// Who can reach agents.
#[async_trait]
pub trait Agents: Send + Sync + 'static {
    /// Sends `request` to the agent of `sandbox` and returns when its headers are back.
    ///
    /// # Errors
    /// Of kind `NotFound` when it does not run, `Unavailable` when its agent does not answer.
    async fn send(
        &self,
        sandbox: &SandboxId,
        request: Request<Inbound>,
    ) -> Result<Response<Outbound>, Failure>;
}

/// Paths of the agent that only the platform may call. Source: `x-internal` in envd's OpenAPI.
const INTERNAL: [&str; 6] = ["/init", "/freeze", "/unfreeze", "/collapse", "/fsfreeze", "/fsthaw"];

/// Headers that belong to one connection. Source: RFC 9110, 7.6.1.
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
];

/// A cheap handle.
#[derive(Clone)]
pub struct Gateway {
    agents: Arc<dyn Agents>,
}

impl Gateway {
    /// A gateway to `agents`.
    pub fn new(agents: Arc<dyn Agents>) -> Self {
        Self { agents }
    }

    /// Whether a request is for a sandbox and not for the control API.
    pub fn wants(headers: &HeaderMap) -> bool {
        headers.contains_key(SANDBOX_HEADER)
    }

    /// Forwards one request.
    pub async fn forward(&self, request: Request<Body>) -> Response {
        let shown = request.headers().get(SANDBOX_HEADER).and_then(|id| id.to_str().ok()).unwrap_or_default();
        let shown: String = shown.chars().take(80).collect();
        let port = match request.headers().get(PORT_HEADER) {
            None => Some(AGENT_PORT),
            Some(port) => port.to_str().ok().and_then(|port| port.parse().ok()),
        };
        let Ok(id) = shown.parse::<SandboxId>() else {
            return not_found(&shown);
        };
        match port {
            Some(AGENT_PORT) => {}
            Some(port) => {
                let text = format!("The sandbox has no network: port {port} cannot be reached");
                return error(StatusCode::BAD_GATEWAY, &shown, &text);
            }
            None => {
                return error(StatusCode::BAD_REQUEST, &shown, "The port is not a number from 1 to 65535");
            }
        }
        if INTERNAL.contains(&request.uri().path()) {
            return error(StatusCode::FORBIDDEN, &shown, "This path belongs to the platform");
        }
        let request = match rewrite(request) {
            Ok(request) => request,
            Err(problem) => return error(StatusCode::BAD_REQUEST, &shown, &problem.to_string()),
        };
        match self.agents.send(&id, request).await {
            Ok(response) => {
                let (mut parts, body) = response.into_parts();
                parts.version = Version::HTTP_11;
                strip(&mut parts.headers);
                Response::from_parts(parts, Body::new(body))
            }
            Err(failure) if failure.kind == Kind::NotFound => not_found(&shown),
            Err(failure) => {
                tracing::warn!(
                    sandbox = shown,
                    error = chain(&failure),
                    cause = failure.cause,
                    "the agent was not reached"
                );
                error(StatusCode::BAD_GATEWAY, &shown, "The sandbox is running but its agent does not answer")
            }
        }
    }
}

fn rewrite(request: Request<Body>) -> Result<Request<Inbound>, http::Error> {
    let (mut parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    parts.uri = Uri::builder().scheme("http").authority("agent").path_and_query(path).build()?;
    parts.version = Version::HTTP_2;
    strip(&mut parts.headers);
    parts.headers.remove(header::HOST);
    parts.headers.remove(header::EXPECT);
    parts.extensions.clear();
    Ok(Request::from_parts(parts, body.map_err(io::Error::other).boxed_unsync()))
}

fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in HOP_BY_HOP.iter().chain(&named) {
        headers.remove(name);
    }
}

/// The body that E2B's clients recognise. Source: `../shared/specs/e2b.md`.
fn error(status: StatusCode, sandbox: &str, message: &str) -> Response {
    let body = serde_json::json!({ "sandboxId": sandbox, "message": message, "code": status.as_u16() });
    (status, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

fn not_found(sandbox: &str) -> Response {
    error(StatusCode::BAD_GATEWAY, sandbox, "The sandbox was not found")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_one_connection_stays_there() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, x-private"),
            ("x-private", "1"),
            ("transfer-encoding", "chunked"),
            ("x-access-token", "t"),
        ] {
            headers.insert(name, value.parse().unwrap());
        }
        strip(&mut headers);
        assert_eq!(headers.keys().collect::<Vec<_>>(), ["x-access-token"]);
    }
}
