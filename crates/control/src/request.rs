//! What handlers are made of: parts of a request that are refused alike everywhere, and replies.

use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequestParts, Request};
use axum::response::{IntoResponse, Response};
use http::request::Parts;
use http::{StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::SandboxId;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::accounts::Caller;
use crate::control::Control;
use crate::reply::reply;

/// The largest body of a request.
const MAX_BODY: usize = 4 << 20;

pub(crate) type Outcome = Result<Response, Failed>;

/// Marks, as an extension, a request that came over TLS.
#[derive(Debug, Clone, Copy)]
pub struct OverTls;

/// A failure on its way out.
pub(crate) struct Failed(Failure);

impl Failed {
    /// What failed.
    pub(crate) fn code(&self) -> ErrorCode {
        self.0.error_code
    }
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Self(failure)
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        reply(&self.0)
    }
}

pub(crate) fn json(status: StatusCode, body: &impl Serialize) -> Response {
    match serde_json::to_vec(body) {
        Ok(bytes) => {
            (status, [(header::CONTENT_TYPE, "application/json")], Body::from(bytes)).into_response()
        }
        Err(error) => reply(
            &Failure::new(ErrorCode::Encoding, "the reply cannot be written", "report this")
                .with_cause(&error),
        ),
    }
}

/// The query of a request; one that does not parse is refused as every other bad input is.
pub(crate) struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failed> {
        match axum::extract::Query::from_request_parts(parts, state).await {
            Ok(axum::extract::Query(query)) => Ok(Self(query)),
            Err(problem) => Err(Failure::new(
                ErrorCode::InvalidQuery,
                problem.body_text(),
                "GET /openapi.json lists the parameters",
            )
            .into()),
        }
    }
}

/// The parameters of a path, refused in the same way.
pub(crate) struct Path<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failed> {
        match axum::extract::Path::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(path)) => Ok(Self(path)),
            Err(problem) => {
                Err(Failure::new(ErrorCode::InvalidPath, problem.body_text(), "names are UTF-8").into())
            }
        }
    }
}

/// The account of a request, from the layer that admits it.
pub(crate) struct Who(pub Caller);

impl<S: Sync> FromRequestParts<S> for Who {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failed> {
        let none = || Failure::new(ErrorCode::NoAccount, "the request has no account", "report this");
        Ok(Self(parts.extensions.get::<Caller>().cloned().ok_or_else(none)?))
    }
}

/// The caller's sandbox that a path names. Asked for before the body is: of what is another's nothing is said, not even
/// what is wrong with the request.
pub(crate) struct Own {
    pub caller: Caller,
    pub id: SandboxId,
    /// When the request came.
    pub since: Instant,
}

impl FromRequestParts<Control> for Own {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, control: &Control) -> Result<Self, Failed> {
        let since = Instant::now();
        let Who(caller) = Who::from_request_parts(parts, control).await?;
        let Path(id) = Path::<String>::from_request_parts(parts, control).await?;
        let id = control.inner.owned(&caller, &id).await?;
        Ok(Self { caller, id, since })
    }
}

/// What a reply is about, for the audit log, when the path does not say it.
#[derive(Clone)]
pub(crate) struct About(pub String);

/// Notes what a reply is about.
pub(crate) fn about(mut response: Response, target: &str) -> Response {
    response.extensions_mut().insert(About(target.to_owned()));
    response
}

pub(crate) async fn read(request: Request) -> Result<Bytes, Failure> {
    let too_large = || {
        Failure::new(
            ErrorCode::BodyTooLarge,
            format!("the body is larger than {MAX_BODY} bytes"),
            "send files through the sandbox's /files",
        )
    };
    match Limited::new(request.into_body(), MAX_BODY).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(too_large()),
        Err(error) => {
            Err(Failure::new(ErrorCode::BodyCut, "the body ended early", "send it again").with_cause(&*error))
        }
    }
}

pub(crate) fn parse<T: DeserializeOwned + Default>(bytes: &Bytes) -> Result<T, Failure> {
    if bytes.is_empty() {
        return Ok(T::default());
    }
    parse_required(bytes)
}

pub(crate) fn parse_required<T: DeserializeOwned>(bytes: &Bytes) -> Result<T, Failure> {
    serde_json::from_slice(bytes).map_err(|error| {
        let code = if error.is_data() { ErrorCode::InvalidRequest } else { ErrorCode::MalformedJson };
        Failure::new(
            code,
            format!("the body is not what is expected here: {error}"),
            "SPEC.md lists the fields of each route",
        )
    })
}
