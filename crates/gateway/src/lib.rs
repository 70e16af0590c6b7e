//! The way from outside to what runs inside: agents and every other port, over HTTP/1.1, HTTP/2, WebSocket
//! and raw TCP.
//!
//! ```text
//! request ── target (header, host, path) ──> 49983: the agent, over the node's HTTP/2 link
//!                                       └──> any other port: a connection into the sandbox's slot
//! ```
//!
//! Streams both ways without buffering: a body is forwarded frame by frame under flow control, and a
//! connection that breaks on one side is broken on the other, never ended cleanly. What comes to a sandbox that sleeps waits
//! until it was woken up (`hold`). Idle connections are kept
//! for the next request to the same port of the same sandbox; the node cuts them all when the sandbox ends.
//! The agent checks the access token; private ports are checked here; what belongs to the platform alone is
//! refused here. Writes nothing; a crash cuts streams, processes go on.

mod headers;
mod hold;
pub mod listen;
mod page;
mod reach;
mod target;
pub mod tls;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, Version, header};
use http_body_util::BodyExt;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use kelvin_api::error::{ErrorCode, Failure, Kind, chain};
use kelvin_api::id::{SandboxId, Token};
use kelvin_api::signature::Signature;
use kelvin_api::{AGENT_PORT, PORT_HEADER, SANDBOX_HEADER};
use kelvin_node_api::{Cut, Route, SandboxTraffic, Wake};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use headers::{host_for, shows, strip, takes_trailers, upgrade_of};
use hold::Hold;
use page::Problem;
use reach::{Awake, Dialer};
use target::{Target, Way};

/// Marks, as an extension, a request that came over TLS.
#[derive(Debug, Clone, Copy)]
pub struct Secure;

/// Paths of the agent that only the platform may call. Source: `x-internal` in envd's OpenAPI.
// The last is ours: uploads of a build.
const INTERNAL: [&str; 7] = ["/init", "/freeze", "/unfreeze", "/collapse", "/fsfreeze", "/fsthaw", "/unpack"];

/// What callers of a private port show. Source: E2B's clients.
pub const TRAFFIC_TOKEN: &str = "e2b-traffic-access-token";
/// What callers of an agent show. Source: E2B's clients.
const ACCESS_TOKEN: &str = "x-access-token";
/// The protocol that a raw stream asks to be upgraded to.
pub const RAW: &str = "kelvin-tcp";
/// By path, what a sandbox sends has the origin of the control API in a browser. It gets one of its own.
const OWN_ORIGIN: HeaderValue =
    HeaderValue::from_static("sandbox allow-downloads allow-forms allow-modals allow-popups allow-scripts");
/// How long an idle connection into a sandbox is kept, and how many for each port.
const IDLE: Duration = Duration::from_secs(30);
const IDLE_CONNECTIONS: usize = 16;

/// A cheap handle.
#[derive(Clone)]
pub struct Gateway {
    way: Awake,
    client: Client<Dialer, Body>,
    domain: Arc<str>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// What a request shows that may say whom it is for when nothing else does.
struct Secrets {
    path: String,
    /// Clients that have looked a sandbox up send no more. Source: E2B's Python SDK 2.20, `Sandbox.connect`.
    token: Option<Token>,
    /// With one address for everybody, nothing else in a signed URL says so.
    signature: Option<Signature>,
}

impl Secrets {
    fn of(request: &Request<Body>) -> Self {
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str()).to_owned();
        let signature = Signature::of(request.method(), request.uri());
        Self { token: token_alone(request, &path), signature, path }
    }
}

impl Gateway {
    /// A gateway to `sandboxes`, whose ports are also hosts of `domain` (which may have a port); those that sleep it has
    /// woken up by `waker`.
    pub fn new(sandboxes: Arc<dyn SandboxTraffic>, waker: Arc<dyn Wake>, domain: &str) -> Self {
        let way = Awake { sandboxes, hold: Hold::new(waker) };
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(IDLE_CONNECTIONS)
            .set_host(false)
            // As the proxies of others write them: servers by hand look for `Host:`, and HTTP/2 has no capitals.
            .http1_title_case_headers(true)
            .build(Dialer(way.clone()));
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        Self { way, client, domain: domain.into(), tasks, stop }
    }

    /// Ends upgraded connections; the listener ends all others.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Forwards a request for a sandbox; gives one for the control API back.
    ///
    /// # Errors
    /// The request, when it is not for a sandbox.
    pub async fn forward(&self, request: Request<Body>) -> Result<Response, Request<Body>> {
        let found = match target::target(&request, &self.domain) {
            Some(target) => Ok(Some(target)),
            None => self.by_secret(Secrets::of(&request)).await,
        };
        let target = match found {
            Ok(Some(target)) => target,
            Ok(None) => return Err(request),
            Err(failure) => {
                let nobody =
                    Target { shown: String::new(), port: None, way: Way::Header, path: String::new() };
                return Ok(self.explain(&nobody, &failure).await.reply(&HeaderMap::new()));
            }
        };
        // What a page needs to know is kept: the request goes away.
        let mut shown = HeaderMap::new();
        if let (Some(accept), true) = (request.headers().get(header::ACCEPT), target.way != Way::Header) {
            shown.insert(header::ACCEPT, accept.clone());
        }
        let result = self.to(&target, request).await;
        Ok(match result {
            Ok(response) => response,
            Err(Refusal::Problem(problem)) => problem.reply(&shown),
            Err(Refusal::Failure(failure)) => self.explain(&target, &failure).await.reply(&shown),
        })
    }

    /// The agent that a request is for which names no sandbox; none for the control API.
    async fn by_secret(&self, shown: Secrets) -> Result<Option<Target>, Failure> {
        let sandboxes = &self.way.sandboxes;
        let mut found = match &shown.token {
            Some(token) => sandboxes.holder(token).await?,
            None => None,
        };
        if found.is_none()
            && let Some(signature) = &shown.signature
        {
            found = sandboxes.signer(signature).await?;
        }
        Ok(found.map(|sandbox| Target {
            shown: sandbox.to_string(),
            port: Some(AGENT_PORT),
            way: Way::Header,
            path: shown.path,
        }))
    }

    async fn to(&self, target: &Target, request: Request<Body>) -> Result<Response, Refusal> {
        let problem = |status, message: &str, advice: &str| {
            Refusal::Problem(Problem {
                status,
                page_status: status,
                sandbox: target.shown.clone(),
                message: message.to_owned(),
                advice: advice.to_owned(),
            })
        };
        let Some(sandbox) = target.sandbox() else {
            return Err(not_found("no such id").into());
        };
        let Some(port) = target.port else {
            return Err(problem(
                StatusCode::BAD_REQUEST,
                "The port is not a number from 1 to 65535",
                "Name the port of a server in the sandbox.",
            ));
        };
        if port == AGENT_PORT {
            let path = target.path.split('?').next().unwrap_or_default();
            if INTERNAL.contains(&path) {
                let text = "This path belongs to the platform";
                return Err(problem(StatusCode::FORBIDDEN, text, "Use the control API."));
            }
            if request.method() == Method::CONNECT {
                // The node's own way to ports, which are reached by name.
                let text = "CONNECT belongs to the platform";
                return Err(problem(StatusCode::METHOD_NOT_ALLOWED, text, "Name the port of the sandbox."));
            }
            return self.to_agent(&sandbox, target, request).await;
        }
        let route = self.way.sandboxes.route(&sandbox).await?;
        if !shows(request.headers(), TRAFFIC_TOKEN, route.traffic_token.as_ref()) {
            return Err(problem(
                StatusCode::FORBIDDEN,
                "The ports of this sandbox are private",
                "Send its trafficAccessToken in the header e2b-traffic-access-token.",
            ));
        }
        if upgrade_of(&request)
            .is_some_and(|protocol| protocol.as_bytes().eq_ignore_ascii_case(RAW.as_bytes()))
        {
            if !shows(request.headers(), ACCESS_TOKEN, route.access_token.as_ref()) {
                return Err(problem(
                    StatusCode::UNAUTHORIZED,
                    "A raw stream needs the sandbox's access token",
                    "Send its envdAccessToken in the header X-Access-Token.",
                ));
            }
            return self.raw(&sandbox, port, request).await;
        }
        self.to_port(&sandbox, port, target, &route, request).await
    }

    async fn to_agent(
        &self,
        sandbox: &SandboxId,
        target: &Target,
        request: Request<Body>,
    ) -> Result<Response, Refusal> {
        let (mut parts, body) = request.into_parts();
        parts.uri = uri("agent", &target.path)?;
        parts.version = Version::HTTP_2;
        strip(&mut parts.headers);
        parts.headers.remove(header::HOST);
        parts.headers.remove(header::EXPECT);
        parts.extensions.clear();
        let again = is_repeatable(&parts, &body).then(|| parts.clone());
        let request = Request::from_parts(parts, body.map_err(io::Error::other).boxed_unsync());
        let mut answer = self.way.send(sandbox, request).await;
        let broke = answer.as_ref().is_err_and(|failure| failure.error_code == ErrorCode::AgentUnreachable);
        if broke && let Some(parts) = again {
            // Paused under the request, or its agent has just been started again.
            let nothing = Body::empty().map_err(io::Error::other).boxed_unsync();
            answer = self.way.send(sandbox, Request::from_parts(parts, nothing)).await;
        }
        let (mut parts, body) = answer?.into_parts();
        parts.version = Version::HTTP_11;
        strip(&mut parts.headers);
        if target.way == Way::Path {
            parts.headers.append(header::CONTENT_SECURITY_POLICY, OWN_ORIGIN);
        }
        Ok(Response::from_parts(parts, Body::new(body)))
    }

    async fn to_port(
        &self,
        sandbox: &SandboxId,
        port: u16,
        target: &Target,
        route: &Route,
        mut request: Request<Body>,
    ) -> Result<Response, Refusal> {
        let upgrade = upgrade_of(&request);
        let client_upgrade = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
        let host = host_for(target, route, port, target::host(&request));
        let original = target::host(&request).and_then(|host| HeaderValue::from_str(host).ok());
        let (mut parts, body) = request.into_parts();
        let secure = parts.extensions.get::<Secure>().is_some();
        parts.uri = uri(&format!("{sandbox}:{port}"), &target.path)?;
        parts.version = Version::HTTP_11;
        let takes_trailers = takes_trailers(&parts.headers);
        let trailer = parts.headers.get_all(header::TRAILER).iter().cloned().collect::<Vec<_>>();
        strip(&mut parts.headers);
        let headers = &mut parts.headers;
        // Of one connection by the letter, and what a proxy has to hand on so that they get through: RFC 9110, 6.5.1.
        if takes_trailers {
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
            headers.insert(header::CONNECTION, HeaderValue::from_static("te"));
        }
        for names in trailer {
            headers.append(header::TRAILER, names);
        }
        // The gateway's own: a server in the sandbox has no business with them.
        for name in [TRAFFIC_TOKEN, SANDBOX_HEADER, PORT_HEADER, "x-forwarded-prefix"] {
            headers.remove(name);
        }
        headers.remove(header::EXPECT);
        headers.insert(header::HOST, host);
        if let Some(original) = original {
            headers.insert("x-forwarded-host", original);
        }
        headers.insert("x-forwarded-proto", HeaderValue::from_static(if secure { "https" } else { "http" }));
        if target.way == Way::Path
            && let Ok(prefix) = HeaderValue::from_str(&format!("/sandboxes/{sandbox}/ports/{port}"))
        {
            headers.insert("x-forwarded-prefix", prefix);
        }
        if let Some(protocol) = upgrade {
            let both = if takes_trailers { "te, upgrade" } else { "upgrade" };
            headers.insert(header::CONNECTION, HeaderValue::from_static(both));
            headers.insert(header::UPGRADE, protocol);
        }
        parts.extensions.clear();
        let again = is_repeatable(&parts, &body).then(|| parts.clone());
        let mut answer = self.client.request(Request::from_parts(parts, body)).await;
        let cut = answer.as_ref().is_err_and(|error| was_cut(error));
        if cut && let Some(parts) = again {
            // It was paused under the request: asked once more, it is woken up, or the reply says why not.
            answer = self.client.request(Request::from_parts(parts, Body::empty())).await;
        }
        let mut response = match answer {
            Ok(response) => response,
            Err(error) => return Err(self.broken(sandbox, port, &error).into()),
        };
        let protocol = response.headers().get(header::UPGRADE).cloned();
        let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        if switched && client_upgrade.is_none() {
            let text = format!("port {port} of sandbox {sandbox} switched protocols unasked");
            return Err(Failure::new(ErrorCode::PortBroken, text, "look at the server in the sandbox").into());
        }
        let server_upgrade = switched.then(|| hyper::upgrade::on(&mut response));
        let (mut parts, body) = response.into_parts();
        parts.version = Version::HTTP_11;
        let trailer = parts.headers.get_all(header::TRAILER).iter().cloned().collect::<Vec<_>>();
        strip(&mut parts.headers);
        for names in trailer {
            // Without it HTTP/1.1 sends no trailers.
            parts.headers.append(header::TRAILER, names);
        }
        if target.way == Way::Path {
            parts.headers.append(header::CONTENT_SECURITY_POLICY, OWN_ORIGIN);
        }
        if let (Some(client), Some(server)) = (client_upgrade, server_upgrade) {
            parts.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            if let Some(protocol) = protocol {
                parts.headers.insert(header::UPGRADE, protocol);
            }
            self.splice(async move {
                let (client, server) = (client.await, server.await);
                let both = client.and_then(|client| Ok((client, server?))).map_err(io::Error::other)?;
                let (mut client, mut server) = (TokioIo::new(both.0), TokioIo::new(both.1));
                tokio::io::copy_bidirectional(&mut client, &mut server).await
            });
        }
        Ok(Response::from_parts(parts, Body::new(body)))
    }

    /// Why a request did not get its answer: what the dial said, or that the connection broke.
    fn broken(&self, sandbox: &SandboxId, port: u16, error: &(dyn std::error::Error + 'static)) -> Failure {
        let mut source = Some(error);
        while let Some(error) = source {
            if let Some(failure) = error.downcast_ref::<Failure>() {
                return failure.clone();
            }
            if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::TimedOut)
            {
                let text = format!("port {port} of sandbox {sandbox} fell silent");
                let remedy = "the sandbox may be busy: look at its processes, try again";
                return Failure::new(ErrorCode::PortSilent, text, remedy);
            }
            source = error.source();
        }
        let text = format!("port {port} of sandbox {sandbox} closed the connection without an answer");
        Failure::new(ErrorCode::PortBroken, text, "look at the server in the sandbox").with_cause(error)
    }

    async fn raw(
        &self,
        sandbox: &SandboxId,
        port: u16,
        mut request: Request<Body>,
    ) -> Result<Response, Refusal> {
        let mut stream = self.way.dial(sandbox, port).await?;
        let client = hyper::upgrade::on(&mut request);
        self.splice(async move {
            let mut client = TokioIo::new(client.await.map_err(io::Error::other)?);
            tokio::io::copy_bidirectional(&mut client, &mut stream).await
        });
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(RAW));
        Ok(response)
    }

    fn splice(&self, work: impl Future<Output = io::Result<(u64, u64)>> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            if let Some(Err(error)) = stop.run_until_cancelled(work).await {
                tracing::debug!(%error, "an upgraded connection ended");
            }
        });
    }

    async fn explain(&self, target: &Target, failure: &Failure) -> Problem {
        let ended = match target.sandbox() {
            Some(sandbox) if failure.kind == Kind::NotFound => {
                // What cannot be asked is not known: the page says less.
                self.way.sandboxes.ended(&sandbox).await.ok().flatten()
            }
            _ => None,
        };
        let bad = StatusCode::BAD_GATEWAY;
        let (status, page_status, message, advice) = match (failure.kind, failure.error_code) {
            (_, ErrorCode::SandboxPaused | ErrorCode::SandboxAsleep) => (
                bad,
                StatusCode::SERVICE_UNAVAILABLE,
                "The sandbox was not found".to_owned(),
                "It is paused. Resume it: `kelvin sandbox resume`.".to_owned(),
            ),
            (Kind::NotFound, _) => match ended {
                Some(reason) => (
                    bad,
                    StatusCode::GONE,
                    "The sandbox was not found".to_owned(),
                    format!(
                        "It has ended: {}. Create another one.",
                        reason.chars().take(200).collect::<String>()
                    ),
                ),
                None => (
                    bad,
                    StatusCode::NOT_FOUND,
                    "The sandbox was not found".to_owned(),
                    "Check its id: `kelvin sandbox list` shows what runs.".to_owned(),
                ),
            },
            (_, ErrorCode::PortClosed) => (
                bad,
                bad,
                "The sandbox is running but port is not open".to_owned(),
                format!(
                    "Start a server in the sandbox that listens on port {}.",
                    target.port.unwrap_or_default()
                ),
            ),
            (Kind::Timeout, _) => (
                StatusCode::GATEWAY_TIMEOUT,
                StatusCode::GATEWAY_TIMEOUT,
                failure.message.clone(),
                failure.remediation.clone(),
            ),
            (Kind::Busy, _) => (
                StatusCode::TOO_MANY_REQUESTS,
                StatusCode::TOO_MANY_REQUESTS,
                failure.message.clone(),
                failure.remediation.clone(),
            ),
            (_, ErrorCode::AgentUnreachable) => (
                bad,
                bad,
                "The sandbox is running but its agent does not answer".to_owned(),
                failure.remediation.clone(),
            ),
            _ => (bad, bad, failure.message.clone(), failure.remediation.clone()),
        };
        if !is_gone(failure) && failure.kind != Kind::Busy {
            tracing::info!(
                sandbox = target.shown,
                port = target.port,
                error = chain(failure),
                cause = failure.cause,
                "a sandbox was not reached"
            );
        }
        Problem { status, page_status, sandbox: target.shown.clone(), message, advice }
    }
}

/// Whether there is no machine to reach.
fn is_gone(failure: &Failure) -> bool {
    failure.kind == Kind::NotFound
        || matches!(failure.error_code, ErrorCode::SandboxPaused | ErrorCode::SandboxAsleep)
}

/// Why a request was not forwarded.
enum Refusal {
    /// It was the request.
    Problem(Problem),
    /// It was the sandbox.
    Failure(Failure),
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

fn not_found(text: &str) -> Failure {
    Failure::new(ErrorCode::SandboxNotFound, text, "`kelvin sandbox list` shows what runs")
}

fn uri(authority: &str, path: &str) -> Result<Uri, Failure> {
    Uri::builder().scheme("http").authority(authority).path_and_query(path).build().map_err(|error| {
        Failure::new(ErrorCode::InvalidPath, "the path is not one", "check the URL").with_cause(&error)
    })
}

/// The access token of a request for an agent that names no sandbox.
fn token_alone(request: &Request<Body>, path: &str) -> Option<Token> {
    let headers = request.headers();
    let is_it = target::is_agents(path) && !headers.contains_key("x-api-key");
    let shown = headers.get(ACCESS_TOKEN).filter(|_| is_it)?.to_str().ok()?;
    Some(Token::from_secret(shown.to_owned()))
}

/// Whether a request may be sent twice: it changes nothing, and all of it is at hand. Source: RFC 9110, 9.2.
fn is_repeatable(parts: &http::request::Parts, body: &Body) -> bool {
    parts.method.is_safe()
        && !parts.headers.contains_key(header::UPGRADE)
        && http_body::Body::size_hint(body).exact() == Some(0)
}

/// Whether a connection broke because its sandbox went away.
fn was_cut(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut source = Some(error);
    while let Some(error) = source {
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if inner.is_some_and(|inner| inner.is::<Cut>()) {
            return true;
        }
        source = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_cut_and_changes_nothing_is_sent_again() {
        assert!(was_cut(&io::Error::new(io::ErrorKind::ConnectionReset, Cut)));
        assert!(!was_cut(&io::Error::from(io::ErrorKind::ConnectionReset)));
        let parts = |method: &str, name: &str| {
            let request = Request::builder().method(method).header(name, "x");
            request.body(()).unwrap().into_parts().0
        };
        assert!(is_repeatable(&parts("GET", "accept"), &Body::empty()));
        assert!(!is_repeatable(&parts("POST", "accept"), &Body::empty()));
        assert!(!is_repeatable(&parts("GET", "upgrade"), &Body::empty()));
        assert!(!is_repeatable(&parts("GET", "accept"), &Body::from("x")));
    }
}
