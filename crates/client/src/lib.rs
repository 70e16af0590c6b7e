//! Client of the public API: the control API and the agents behind it, over one pool of connections.
//!
//! Nothing is retried here: a caller that repeats a create passes the same idempotency key. Over TLS the host's
//! roots are trusted, or those of `SSL_CERT_FILE`.

mod accounts;
pub mod agent;
pub mod build;
mod import;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use kelvin_api::error::ApiError;
use kelvin_api::id::{SandboxId, Token};
use kelvin_api::network::{NetworkState, NetworkUpdate};
use kelvin_api::sandbox::{
    BakeTemplate, CAPTURE_HEADER, Capture, ConnectSandbox, ForkResult, ForkSandbox, NewSandbox, NodeInfo,
    PauseSandbox, PoolInfo, ResumeSandbox, Sandbox, SandboxDetail, SandboxLogs, SetPool, SetTimeout,
    SnapshotInfo, SnapshotSandbox, SnapshotVerification, Template,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server's URL cannot be used.
    #[error("{url:?} is not the URL of a server: {reason}")]
    Url {
        /// As given.
        url: String,
        /// Why not.
        reason: String,
    },
    /// The server does not answer.
    #[error("the server at {url} does not answer")]
    Unreachable {
        /// Where.
        url: String,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The server refused.
    #[error(transparent)]
    Refused(#[from] ApiError),
    /// The reply makes no sense.
    #[error("the server's reply is not understood")]
    Reply(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The agent refused.
    #[error("{}", message(.0))]
    Agent(Box<connectrpc::ConnectError>),
    /// A local file or pipe failed.
    #[error("{what}")]
    Local {
        /// What was being done.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

fn message(error: &connectrpc::ConnectError) -> String {
    match &error.message {
        Some(text) => format!("{}: {text}", error.code.as_str()),
        None => error.code.as_str().to_owned(),
    }
}

/// The protocol of a raw stream, as the gateway knows it.
const RAW: &str = "kelvin-tcp";
/// The largest JSON reply.
const MAX_REPLY: usize = 64 << 20;

/// The body of a request.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;
type Http = hyper_util::client::legacy::Client<HttpsConnector<HttpConnector>, Body>;

/// A body that is known whole.
pub fn whole(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A create and what its headers say.
#[derive(Debug, Clone)]
pub struct Created {
    /// The sandbox.
    pub sandbox: Sandbox,
    /// The `Server-Timing` header.
    pub server_timing: String,
}

/// A page of sandboxes.
#[derive(Debug, Clone)]
pub struct Page {
    /// Its rows.
    pub sandboxes: Vec<SandboxDetail>,
    /// Ask with it for the next page.
    pub next: Option<String>,
}

/// A client; cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    base: String,
    /// Whose sandboxes are listed, when not the key's own project's.
    project: Option<String>,
    key: Token,
    http: Http,
}

impl Client {
    /// A client of the server at `url` (`http://host:port` or `https://…`) that shows `key`.
    ///
    /// # Errors
    /// `Url` when it is not an http URL, `Local` when there are no roots to trust for TLS.
    pub fn new(url: &str, key: Token) -> Result<Self, Error> {
        let bad = |reason: &str| Error::Url { url: url.to_owned(), reason: reason.to_owned() };
        let uri: Uri = url.parse().map_err(|_| bad("it does not parse"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(bad("it has to begin with http:// or https://"));
        }
        if uri.authority().is_none() {
            return Err(bad("it has no host"));
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(Duration::from_secs(10)));
        connector.enforce_http(false);
        let provider = rustls::crypto::ring::default_provider();
        let builder = HttpsConnectorBuilder::new();
        let builder = match uri.scheme_str() {
            // Roots are read from the disk: only where they are needed.
            Some("https") => builder.with_provider_and_native_roots(provider).map_err(|source| {
                Error::Local { what: "reading the roots that are trusted for TLS".to_owned(), source }
            })?,
            _ => {
                let config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
                    .with_safe_default_protocol_versions()
                    .map_err(|error| bad(&error.to_string()))?
                    .with_root_certificates(rustls::RootCertStore::empty())
                    .with_no_client_auth();
                builder.with_tls_config(config)
            }
        };
        let connector = builder.https_or_http().enable_http1().wrap_connector(connector);
        let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .build(connector);
        Ok(Self { project: None, base: url.trim_end_matches('/').to_owned(), key, http })
    }

    /// The key that is shown.
    pub fn key(&self) -> &Token {
        &self.key
    }

    /// The server's URL.
    pub fn url(&self) -> &str {
        &self.base
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, Error> {
        self.http
            .request(request)
            .await
            .map_err(|source| Error::Unreachable { url: self.base.clone(), source: source.into() })
    }

    fn request(&self, method: Method, path: &str) -> http::request::Builder {
        Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("x-api-key", self.key.expose())
    }

    async fn call<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&B>,
    ) -> Result<(StatusCode, HeaderMap, Bytes), Error> {
        let mut builder = self.request(method, path);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        let bytes = match body {
            Some(body) => {
                builder = builder.header(header::CONTENT_TYPE, "application/json");
                serde_json::to_vec(body).map_err(|error| Error::Reply(error.into()))?
            }
            None => Vec::new(),
        };
        let request = builder.body(whole(bytes)).map_err(|error| Error::Reply(error.into()))?;
        let (parts, body) = self.send(request).await?.into_parts();
        let bytes = Limited::new(body, MAX_REPLY).collect().await.map_err(Error::Reply)?.to_bytes();
        if parts.status.is_success() {
            return Ok((parts.status, parts.headers, bytes));
        }
        Err(refused(parts.status, &bytes))
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        decode(&self.call::<()>(Method::GET, path, &[], None).await?.2)
    }

    /// Creates a sandbox. With `idempotency_key`, repeating the call gives the same one.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn create(&self, body: &NewSandbox, idempotency_key: Option<&str>) -> Result<Created, Error> {
        let headers: Vec<(&str, &str)> =
            idempotency_key.map(|key| ("idempotency-key", key)).into_iter().collect();
        let (_, headers, bytes) = self.call(Method::POST, "/v2/sandboxes", &headers, Some(body)).await?;
        let server_timing =
            headers.get("server-timing").and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
        Ok(Created { sandbox: decode(&bytes)?, server_timing })
    }

    /// One page of the sandboxes, running and paused, newest first, narrowed by `metadata`.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn list(
        &self,
        metadata: &[(String, String)],
        limit: usize,
        next: Option<&str>,
    ) -> Result<Page, Error> {
        use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode as encode};
        let mut path = format!("/v2/sandboxes?limit={limit}");
        if !metadata.is_empty() {
            // As E2B's clients: each key and value twice, then the whole as one query parameter.
            let twice = |text: &str| {
                encode(&encode(text, NON_ALPHANUMERIC).to_string(), NON_ALPHANUMERIC).to_string()
            };
            let pairs: Vec<String> =
                metadata.iter().map(|(key, value)| format!("{}={}", twice(key), twice(value))).collect();
            path.push_str(&format!("&metadata={}", encode(&pairs.join("&"), NON_ALPHANUMERIC)));
        }
        if let Some(project) = &self.project {
            path.push_str(&format!("&project={}", encode(project, NON_ALPHANUMERIC)));
        }
        if let Some(next) = next {
            path.push_str(&format!("&nextToken={}", encode(next, NON_ALPHANUMERIC)));
        }
        let (_, headers, bytes) = self.call::<()>(Method::GET, &path, &[], None).await?;
        let next = headers.get("x-next-token").and_then(|value| value.to_str().ok()).map(str::to_owned);
        Ok(Page { sandboxes: decode(&bytes)?, next })
    }

    /// The same client, which lists the sandboxes of another project, or with `*` of all: for the server's own key.
    pub fn of_project(&self, project: &str) -> Self {
        Self { project: Some(project.to_owned()), ..self.clone() }
    }

    /// Every sandbox, running or paused, page by page.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn list_all(&self, metadata: &[(String, String)]) -> Result<Vec<SandboxDetail>, Error> {
        let mut page = self.list(metadata, 100, None).await?;
        let mut all = std::mem::take(&mut page.sandboxes);
        while let Some(next) = page.next.take() {
            page = self.list(metadata, 100, Some(&next)).await?;
            all.append(&mut page.sandboxes);
        }
        Ok(all)
    }

    /// One sandbox, with its access token.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn sandbox(&self, id: &str) -> Result<SandboxDetail, Error> {
        self.get(&format!("/sandboxes/{}", segment(id))).await
    }

    /// Kills a sandbox.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn kill(&self, id: &SandboxId) -> Result<(), Error> {
        self.call::<()>(Method::DELETE, &format!("/sandboxes/{id}"), &[], None).await.map(drop)
    }

    /// Sets the time to live, in seconds from now.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn set_timeout(&self, id: &SandboxId, seconds: u64) -> Result<(), Error> {
        let body = SetTimeout { timeout: seconds };
        self.call(Method::POST, &format!("/sandboxes/{id}/timeout"), &[], Some(&body)).await.map(drop)
    }

    /// Pauses a sandbox.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn pause(&self, id: &str) -> Result<Capture, Error> {
        self.pause_as(id, &PauseSandbox::default()).await
    }

    /// The same with options.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn pause_as(&self, id: &str, body: &PauseSandbox) -> Result<Capture, Error> {
        let path = format!("/sandboxes/{}/pause", segment(id));
        let (_, headers, _) = self.call(Method::POST, &path, &[], Some(body)).await?;
        Ok(capture_of(&headers))
    }

    /// Lets a paused sandbox go on for `seconds`.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn resume(&self, id: &str, seconds: u64) -> Result<Sandbox, Error> {
        let body = ResumeSandbox { timeout: Some(seconds), ..ResumeSandbox::default() };
        let path = format!("/sandboxes/{}/resume", segment(id));
        decode(&self.call(Method::POST, &path, &[], Some(&body)).await?.2)
    }

    /// A sandbox that runs for at least `seconds` from now: resumed when it is paused.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn connect(&self, id: &str, seconds: u64) -> Result<Sandbox, Error> {
        let body = ConnectSandbox { timeout: Some(seconds), ..ConnectSandbox::default() };
        let path = format!("/v2/sandboxes/{}/connect", segment(id));
        decode(&self.call(Method::POST, &path, &[], Some(&body)).await?.2)
    }

    /// Makes children of one instant of a sandbox.
    ///
    /// # Errors
    /// Any of [`Error`] when the source could not be saved; a child that failed has its error in the list.
    pub async fn fork(&self, id: &str, body: &ForkSandbox) -> Result<(Vec<ForkResult>, Capture), Error> {
        let path = format!("/sandboxes/{}/fork", segment(id));
        let (_, headers, bytes) = self.call(Method::POST, &path, &[], Some(body)).await?;
        Ok((decode(&bytes)?, capture_of(&headers)))
    }

    /// Ends the siblings of a forked sandbox; returns which.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn promote(&self, id: &str) -> Result<Vec<String>, Error> {
        let path = format!("/sandboxes/{}/promote", segment(id));
        let reply: serde_json::Value = decode(&self.call::<()>(Method::POST, &path, &[], None).await?.2)?;
        let ended = reply["ended"].as_array().into_iter().flatten();
        Ok(ended.filter_map(|id| id.as_str()).map(str::to_owned).collect())
    }

    /// Takes a snapshot of a sandbox that is kept; it goes on.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn snapshot(&self, id: &str, name: Option<&str>) -> Result<(SnapshotInfo, Capture), Error> {
        let body = SnapshotSandbox { name: name.map(str::to_owned), ..SnapshotSandbox::default() };
        let path = format!("/sandboxes/{}/snapshots", segment(id));
        let (_, headers, bytes) = self.call(Method::POST, &path, &[], Some(&body)).await?;
        Ok((decode(&bytes)?, capture_of(&headers)))
    }

    /// The snapshots that are kept, newest first, page by page.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn snapshots(&self) -> Result<Vec<SnapshotInfo>, Error> {
        let mut all: Vec<SnapshotInfo> = Vec::new();
        let mut path = "/snapshots".to_owned();
        loop {
            let (_, headers, bytes) = self.call::<()>(Method::GET, &path, &[], None).await?;
            all.extend(decode::<Vec<SnapshotInfo>>(&bytes)?);
            match headers.get("x-next-token").and_then(|value| value.to_str().ok()) {
                Some(next) => path = format!("/snapshots?nextToken={}", segment(next)),
                None => return Ok(all),
            }
        }
    }

    /// Has all of a kept snapshot read, and says of each file whether it is what it was.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn verify_snapshot(&self, name: &str) -> Result<SnapshotVerification, Error> {
        let path = format!("/snapshots/{}/verify", segment(name));
        let (_, _, bytes) = self.call::<()>(Method::POST, &path, &[], None).await?;
        decode(&bytes)
    }

    /// Deletes a kept snapshot, by id or name; with `cascade` those that descend from it too.
    ///
    /// # Errors
    /// `Refused` with the names of what needs it, any of [`Error`].
    pub async fn delete_snapshot(&self, name: &str, cascade: bool) -> Result<(), Error> {
        let path = format!("/snapshots/{}?cascade={cascade}", segment(name));
        self.call::<()>(Method::DELETE, &path, &[], None).await.map(drop)
    }

    /// What a sandbox may reach and what it was refused.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn network(&self, id: &str) -> Result<NetworkState, Error> {
        self.get(&format!("/sandboxes/{}/network", segment(id))).await
    }

    /// Replaces what a sandbox may reach; what is left out is cleared.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn set_network(&self, id: &str, update: &NetworkUpdate) -> Result<(), Error> {
        let path = format!("/sandboxes/{}/network", segment(id));
        self.call(Method::PUT, &path, &[], Some(update)).await.map(drop)
    }

    /// Opens a raw stream to a TCP port of a sandbox, through the gateway. `access_token` and `traffic_token` are
    /// those of [`SandboxDetail`].
    ///
    /// # Errors
    /// `Refused` when nobody listens there, any of [`Error`].
    pub async fn stream(
        &self,
        sandbox: &SandboxDetail,
        port: u16,
    ) -> Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<>, Error> {
        let mut builder = Request::builder()
            .uri(format!("{}/", self.base))
            .header(kelvin_api::SANDBOX_HEADER, sandbox.sandbox_id.as_str())
            .header(kelvin_api::PORT_HEADER, port)
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, RAW);
        for (name, token) in [
            ("x-access-token", &sandbox.envd_access_token),
            ("e2b-traffic-access-token", &sandbox.traffic_access_token),
        ] {
            if let Some(token) = token {
                builder = builder.header(name, token.expose());
            }
        }
        let request = builder.body(whole(Vec::new())).map_err(|error| Error::Reply(error.into()))?;
        let response = self.send(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            let (parts, body) = response.into_parts();
            let bytes = Limited::new(body, MAX_REPLY).collect().await.map_err(Error::Reply)?.to_bytes();
            return Err(refused(parts.status, &bytes));
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(|error| Error::Reply(error.into()))?;
        Ok(TokioIo::new(upgraded))
    }

    /// The last of a sandbox's console.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn logs(&self, id: &str) -> Result<SandboxLogs, Error> {
        self.get(&format!("/sandboxes/{}/logs", segment(id))).await
    }

    /// Every template.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn templates(&self) -> Result<Vec<Template>, Error> {
        self.get("/templates").await
    }

    /// Makes sure that a template has a snapshot of a shape; returns its id.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn bake(&self, template: &str, request: &BakeTemplate) -> Result<String, Error> {
        let path = format!("/templates/{}/bake", segment(template));
        let reply: serde_json::Value = decode(&self.call(Method::POST, &path, &[], Some(request)).await?.2)?;
        Ok(reply["snapshotID"].as_str().unwrap_or_default().to_owned())
    }

    /// Every pool of machines that wait.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn pools(&self) -> Result<Vec<PoolInfo>, Error> {
        self.get("/pools").await
    }

    /// Sets what is wanted of the warm machines of a template.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn set_pool(&self, template: &str, wanted: &SetPool) -> Result<(), Error> {
        let path = format!("/pools/{}", segment(template));
        self.call(Method::PUT, &path, &[], Some(wanted)).await.map(drop)
    }

    /// What runs on the node and what is left.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn node(&self) -> Result<NodeInfo, Error> {
        self.get("/node").await
    }

    /// Removes what nothing needs, or says what that would be.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn collect(&self, dry_run: bool) -> Result<serde_json::Value, Error> {
        decode(&self.call::<()>(Method::POST, &format!("/gc?dryRun={dry_run}"), &[], None).await?.2)
    }
}

fn capture_of(headers: &HeaderMap) -> Capture {
    let text = headers.get(CAPTURE_HEADER).and_then(|value| value.to_str().ok());
    text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

fn refused(status: StatusCode, body: &[u8]) -> Error {
    Error::Refused(serde_json::from_slice(body).unwrap_or_else(|_| ApiError {
        code: status.as_u16(),
        message: format!("the server replied {status}"),
        error_code: None,
        cause: None,
        remediation: None,
    }))
}

fn segment(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}

fn decode<T: DeserializeOwned>(bytes: &Bytes) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|error| Error::Reply(error.into()))
}
