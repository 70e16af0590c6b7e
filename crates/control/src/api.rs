//! Routes of the control API. Source: E2B's OpenAPI; `/node`, `/gc`, `/templates/{name}/bake` and
//! `/templates/{name}/import` are Kelvin's own.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Router};
use http::request::Parts;
use http::{HeaderValue, Method, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use kelvin_api::error::{ErrorCode, Failure, Kind};
use kelvin_api::id::SandboxId;
use kelvin_api::network::{NetworkState, NetworkUpdate};
use kelvin_api::phase::Timings;
use kelvin_api::sandbox::{
    BakeTemplate, CAPTURE_HEADER, Capture, ConnectSandbox, ForkResult, ForkSandbox, MAX_TIMEOUT_S,
    NewSandbox, NodeInfo, PauseMode, PauseSandbox, PoolInfo, ResumeSandbox, Sandbox, SandboxDetail, SetPool,
    SetTimeout, SnapshotInfo, SnapshotSandbox,
};
use kelvin_node_api::{Bake, Paused, Taken};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::accounts::Caller;
use crate::audit::Audit;
use crate::database::NewKey;
use crate::once::{self, Again, Key};
use crate::openapi::{Api, Operation, op};
use crate::reply::reply;
use crate::service::{Control, DEFAULT_TIMEOUT_S, Inner, invalid, memory_of, sandbox_of, unknown_template};
use crate::{catalog, import, list, logs, meter, metrics, people};

/// The largest body of a request.
const MAX_BODY: usize = 4 << 20;
/// The time to live that a connect without a timeout asks for, in seconds. Source: E2B's clients.
const CONNECT_TIMEOUT_S: u64 = 300;
/// The longest wait that a caller who is over a limit is told.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

pub(crate) type Outcome = Result<Response, Failed>;

/// A failure on its way out.
pub(crate) struct Failed(Failure);

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

/// What belongs to everybody: for the server's own key.
fn admin() -> Api {
    let (get, post, put) = (Method::GET, Method::POST, Method::PUT);
    Api::new()
        .route(
            &post,
            "/templates/{name}/bake",
            bake,
            op("Make sure that a snapshot of a template exists in a shape")
                .optional::<BakeTemplate>()
                .reply::<Baked>(200)
                .errors(&[400, 404, 503]),
        )
        .route(&get, "/pools", pools, op("Machines that wait").reply::<Vec<PoolInfo>>(200))
        .route(
            &put,
            "/pools/{name}",
            set_pool,
            op("Set how many machines of a template wait")
                .optional::<SetPool>()
                .empty(204)
                .errors(&[400, 404]),
        )
        .route(&get, "/metrics", metrics, op("The server's metrics, as text").empty(200))
        .route(&get, "/node", node, op("What runs here and what is left").reply::<NodeInfo>(200))
        .route(
            &post,
            "/gc",
            collect,
            op("Remove what nothing needs")
                .query(&[("dryRun", "true only says what would be removed")])
                .reply::<serde_json::Value>(200),
        )
        .merge(people::admin())
        .merge(import::routes())
        .for_admins(|router| router.route_layer(from_fn(for_admins)))
}

fn create_op() -> Operation {
    op("Create a sandbox; it is ready when this replies")
        .body::<NewSandbox>()
        .reply::<Sandbox>(201)
        .errors(&[400, 403, 404, 409, 413, 422, 503, 504])
}

fn connect_op() -> Operation {
    op("Have a sandbox run for at least a while; resumes one that is paused")
        .optional::<ConnectSandbox>()
        .reply::<Sandbox>(200)
        .reply::<Sandbox>(201)
        .errors(&[400, 404, 409, 503, 504])
}

fn sandboxes() -> Api {
    let (get, post, put, delete) = (Method::GET, Method::POST, Method::PUT, Method::DELETE);
    Api::new()
        .route(&post, "/sandboxes", create, create_op())
        .route(&post, "/v2/sandboxes", create, create_op())
        .route(&get, "/sandboxes/{id}", detail, op("One sandbox").reply::<SandboxDetail>(200).errors(&[404]))
        .route(&delete, "/sandboxes/{id}", kill, op("End a sandbox").empty(204).errors(&[404]))
        .route(
            &post,
            "/sandboxes/{id}/timeout",
            set_timeout,
            op("Set when a sandbox ends").body::<SetTimeout>().empty(204).errors(&[400, 404, 409]),
        )
        .route(
            &post,
            "/sandboxes/{id}/refreshes",
            refresh,
            op("Have a sandbox live for at least a while")
                .optional::<Refresh>()
                .empty(204)
                .errors(&[400, 404]),
        )
        .route(&post, "/sandboxes/{id}/connect", connect, connect_op())
        .route(&post, "/v2/sandboxes/{id}/connect", connect, connect_op())
        .route(
            &post,
            "/sandboxes/{id}/pause",
            pause,
            op("Freeze a sandbox").optional::<PauseSandbox>().empty(204).errors(&[400, 404, 409, 503]),
        )
        .route(
            &post,
            "/sandboxes/{id}/resume",
            resume,
            op("Let a paused sandbox go on")
                .optional::<ResumeSandbox>()
                .reply::<Sandbox>(201)
                .errors(&[400, 404, 409, 503, 504]),
        )
        .route(
            &post,
            "/sandboxes/{id}/fork",
            fork,
            op("Copy a sandbox that runs")
                .optional::<ForkSandbox>()
                .reply::<Vec<ForkResult>>(201)
                .errors(&[400, 404, 409, 503]),
        )
        .route(
            &post,
            "/sandboxes/{id}/promote",
            promote,
            op("Kelvin: end the siblings of a fork").reply::<Promoted>(200).errors(&[404, 409]),
        )
        .route(
            &post,
            "/sandboxes/{id}/snapshots",
            snapshot,
            op("Take a snapshot that is kept")
                .optional::<SnapshotSandbox>()
                .reply::<SnapshotInfo>(201)
                .errors(&[400, 404, 409, 503]),
        )
        .route(
            &get,
            "/sandboxes/{id}/network",
            network,
            op("Kelvin: what a sandbox may reach and what it was refused")
                .reply::<NetworkState>(200)
                .errors(&[404]),
        )
        .route(
            &put,
            "/sandboxes/{id}/network",
            set_network,
            op("Replace what a sandbox may reach")
                .optional::<NetworkUpdate>()
                .empty(204)
                .errors(&[400, 404, 409]),
        )
}

/// Every route that asks for an API key.
pub(crate) fn routes() -> Api {
    sandboxes()
        .merge(list::routes())
        .merge(logs::routes())
        .merge(meter::routes())
        .merge(catalog::routes())
        .merge(people::routes())
        .merge(admin())
}

impl Control {
    /// The control API; every route but `/health` and `/openapi.json` asks for an API key.
    pub fn router(&self) -> Router {
        // The same for every server of this program.
        static API: OnceLock<(Router<Control>, Bytes)> = OnceLock::new();
        let made = || {
            let api = routes();
            let document = Bytes::from(api.document().to_string());
            (api.router, document)
        };
        let (router, document) = API.get_or_init(made).clone();
        router
            .fallback(nowhere)
            .method_not_allowed_fallback(wrong_method)
            .layer(from_fn_with_state(self.clone(), authenticate))
            .route("/health", get(async || StatusCode::NO_CONTENT))
            .route(
                "/openapi.json",
                get(async || ([(header::CONTENT_TYPE, "application/json")], Body::from(document))),
            )
            .with_state(self.clone())
    }
}

/// The reply of `POST /templates/{name}/bake`.
#[derive(Debug, Serialize, schemars::JsonSchema)]
struct Baked {
    #[serde(rename = "snapshotID")]
    snapshot_id: String,
}

/// The reply of `POST /sandboxes/{id}/promote`.
#[derive(Debug, Serialize, schemars::JsonSchema)]
struct Promoted {
    ended: Vec<SandboxId>,
}

/// The query of a request; one that does not parse is refused as every other bad input is.
pub(crate) struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failed> {
        match axum::extract::Query::from_request_parts(parts, state).await {
            Ok(axum::extract::Query(query)) => Ok(Self(query)),
            Err(problem) => Err(invalid(
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
                Err(invalid(ErrorCode::InvalidPath, problem.body_text(), "names are UTF-8").into())
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
struct About(String);

/// Notes what a reply is about.
pub(crate) fn about(mut response: Response, target: &str) -> Response {
    response.extensions_mut().insert(About(target.to_owned()));
    response
}

/// Routes that write their own idempotency key and audit entry, in the transactions that they have.
const CREATES: [&str; 2] = ["/sandboxes", "/v2/sandboxes"];
/// Routes whose answers are not kept: they tell a secret.
const SECRETS: [&str; 1] = ["/api-keys"];

/// Admits a request and counts it. What could change something runs to its end, whoever leaves, and is written down.
async fn authenticate(State(control): State<Control>, mut request: Request, next: Next) -> Response {
    let caller = match control.inner.accounts.admit(request.headers()) {
        Ok(caller) => caller,
        Err(failure) => return reply(&failure),
    };
    if let Err(wait) = caller.count() {
        let text = "this API key asks too often";
        let failure = Failure::new(ErrorCode::TooManyRequests, text, "ask again after Retry-After seconds");
        return retry_after(reply(&failure), wait);
    }
    request.extensions_mut().insert(Arc::clone(&caller));
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        return next.run(request).await;
    }
    let inner = Arc::clone(&control.inner);
    let changing = control.inner.tasks.spawn(async move { change(&inner, caller, request, next).await });
    changing.await.unwrap_or_else(|error| {
        let text = "the request was aborted";
        reply(&Failure::new(ErrorCode::Aborted, text, "look at the server's log").with_cause(&error))
    })
}

/// Runs a request that could change something.
async fn change(inner: &Inner, caller: Caller, mut request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().map_or("?", MatchedPath::as_str).to_owned();
    let action = format!("{} {path}", request.method());
    // The one parameter of a path is what it is about.
    let named = path.split('/').position(|part| part.starts_with('{'));
    let target = named.and_then(|at| request.uri().path().split('/').nth(at)).unwrap_or_default();
    let target: String = target.chars().take(120).collect();
    let audit = Arc::new(Audit::new(&caller, action, target, inner.clock.wall()));
    request.extensions_mut().insert(Arc::clone(&audit));
    let is_create = CREATES.contains(&path.as_str());
    if !is_create && let Err(failure) = audit.begin(&inner.database).await {
        return reply(&failure);
    }
    let key = match once::key_of(request.headers()) {
        Ok(key) => key,
        Err(failure) => return reply_to(inner, &caller, &audit, reply(&failure)).await,
    };
    let response = match key.filter(|_| !is_create) {
        Some(_) if SECRETS.contains(&path.as_str()) => {
            let text = "what tells a secret takes no idempotency key: its answer would have to be kept";
            reply(&Failure::new(ErrorCode::UnsupportedHeader, text, "leave the header out"))
        }
        Some(key) => inner.once(&caller, &key, request, |request| next.run(request)).await,
        None => next.run(request).await,
    };
    reply_to(inner, &caller, &audit, response).await
}

/// Writes down how a request ended, and tells who is over a limit when to come again.
async fn reply_to(inner: &Inner, caller: &Caller, audit: &Audit, response: Response) -> Response {
    let about = response.extensions().get::<About>().map(|about| about.0.clone());
    audit.end(&inner.database, response.status(), about).await;
    if response.status() == StatusCode::TOO_MANY_REQUESTS {
        let first = inner.database.first_end(&caller.key).await.ok().flatten();
        let left = first.map(|first| first.duration_since(inner.clock.wall()));
        let wait = left.and_then(|left| Duration::try_from(left).ok()).unwrap_or(Duration::from_secs(1));
        return retry_after(response, wait.min(LONGEST_WAIT));
    }
    response
}

/// Tells a caller when to come again: in whole seconds, at least one.
fn retry_after(mut response: Response, wait: Duration) -> Response {
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
    response
}

async fn for_admins(Who(caller): Who, request: Request, next: Next) -> Response {
    if caller.is_admin {
        return next.run(request).await;
    }
    reply(&not_an_admin())
}

/// What is said to who may not do what the server's own key may.
pub(crate) fn not_an_admin() -> Failure {
    let text = "this is for the server's own key";
    let remedy = "the key is in <data-dir>/api-key of the server";
    Failure::new(ErrorCode::NotAnAdmin, text, remedy)
}

async fn nowhere(request: Request) -> Response {
    let text = format!("there is no {} {}", request.method(), request.uri().path());
    reply(&Failure::new(ErrorCode::NoRoute, text, "SPEC.md lists the routes"))
}

async fn wrong_method(request: Request) -> Response {
    let text = format!("{} is not allowed on {}", request.method(), request.uri().path());
    reply(&Failure::new(ErrorCode::MethodNotAllowed, text, "SPEC.md lists the routes"))
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

async fn create(
    State(control): State<Control>,
    Who(caller): Who,
    Extension(audit): Extension<Arc<Audit>>,
    request: Request,
) -> Outcome {
    let started = Instant::now();
    let key = once::key_of(request.headers())?;
    let bytes = read(request).await?;
    let body: NewSandbox = parse_required(&bytes)?;
    let key = key.map(|key| NewKey {
        key: format!("{}:{key}", caller.project),
        fingerprint: kelvin_api::digest::sha256(&bytes),
        subjects: Vec::new(),
    });
    let created = control.inner.create_once(&caller, body, key, &audit).await?;
    let reply = timed(json(StatusCode::CREATED, &created.sandbox), &created.timings, started.elapsed());
    Ok(about(reply, created.sandbox.sandbox_id.as_str()))
}

async fn detail(State(control): State<Control>, Own { id, .. }: Own) -> Outcome {
    Ok(json(StatusCode::OK, &control.inner.get(&id).await?))
}

async fn kill(
    State(control): State<Control>,
    Who(caller): Who,
    Path(id): Path<String>,
    again: Option<Extension<Again>>,
) -> Outcome {
    let killed = match control.inner.owned(&caller, &id).await {
        Ok(id) => control.inner.kill(&id).await,
        Err(failure) => Err(failure),
    };
    match killed {
        // It was there when it was first asked for.
        Err(failure) if failure.kind == Kind::NotFound && again.is_some() => {}
        other => other?,
    }
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn set_timeout(State(control): State<Control>, Own { id, .. }: Own, request: Request) -> Outcome {
    let body: SetTimeout = parse_required(&read(request).await?)?;
    control.inner.set_timeout(&id, body.timeout, true).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

#[derive(Debug, Default, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Refresh {
    duration: Option<u64>,
}

async fn refresh(State(control): State<Control>, Own { id, .. }: Own, request: Request) -> Outcome {
    let body: Refresh = parse(&read(request).await?)?;
    control.inner.set_timeout(&id, body.duration.unwrap_or(60).min(MAX_TIMEOUT_S), false).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn connect(
    State(control): State<Control>,
    Own { caller, id, since }: Own,
    request: Request,
) -> Outcome {
    let body: ConnectSandbox = parse(&read(request).await?)?;
    let seconds = body.timeout.unwrap_or(CONNECT_TIMEOUT_S);
    match control.inner.connect(&caller, &id, seconds, PauseMode::of(body.memory)).await? {
        (_, Some(resumed)) => {
            Ok(timed(json(StatusCode::CREATED, &resumed.sandbox), &resumed.timings, since.elapsed()))
        }
        (detail, None) => Ok(json(StatusCode::OK, &sandbox_of(&detail))),
    }
}

/// A reply that says how long each phase lasted.
fn timed(mut response: Response, timings: &Timings, total: Duration) -> Response {
    if let Ok(value) = HeaderValue::from_str(&timings.server_timing(total)) {
        response.headers_mut().insert("server-timing", value);
    }
    response
}

/// A reply that says what a snapshot cost its source.
fn captured(mut response: Response, capture: &Capture) -> Response {
    let text = serde_json::to_string(capture).unwrap_or_default();
    if let Ok(value) = HeaderValue::from_str(&text) {
        response.headers_mut().insert(CAPTURE_HEADER, value);
    }
    response
}

async fn pause(
    State(control): State<Control>,
    Own { id, since, .. }: Own,
    again: Option<Extension<Again>>,
    request: Request,
) -> Outcome {
    let body: PauseSandbox = parse(&read(request).await?)?;
    let (mode, healthy) = (PauseMode::of(body.memory), body.require_healthy_guest == Some(true));
    let Paused { capture, timings } = match control.inner.pause(&id, mode, healthy).await {
        // It was done before the server died.
        Err(failure) if failure.error_code == ErrorCode::SandboxPaused && again.is_some() => {
            return Ok(StatusCode::NO_CONTENT.into_response());
        }
        other => other?,
    };
    let response = timed(StatusCode::NO_CONTENT.into_response(), &timings, since.elapsed());
    Ok(captured(response, &capture))
}

async fn resume(
    State(control): State<Control>,
    Own { caller, id, since }: Own,
    again: Option<Extension<Again>>,
    request: Request,
) -> Outcome {
    let body: ResumeSandbox = parse(&read(request).await?)?;
    if body.auto_pause.is_some() {
        let text = "autoPause is set when a sandbox is created, not when it is resumed";
        return Err(Failure::new(ErrorCode::UnsupportedField, text, "leave the field out").into());
    }
    let (timeout, mode) = (body.timeout.unwrap_or(DEFAULT_TIMEOUT_S), PauseMode::of(body.memory));
    let resumed = match control.inner.resume(&caller, &id, timeout, mode).await {
        Err(failure) if failure.error_code == ErrorCode::SandboxRunning && again.is_some() => {
            return Ok(json(StatusCode::CREATED, &sandbox_of(&control.inner.get(&id).await?)));
        }
        other => other?,
    };
    Ok(timed(json(StatusCode::CREATED, &resumed.sandbox), &resumed.timings, since.elapsed()))
}

async fn fork(
    State(control): State<Control>,
    Own { caller, id, since }: Own,
    key: Option<Extension<Key>>,
    again: Option<Extension<Again>>,
    request: Request,
) -> Outcome {
    if let Some(Extension(Again(children))) = again
        && let Some(results) = control.inner.children_of(&children).await?
    {
        return Ok(json(StatusCode::CREATED, &results));
    }
    let body: ForkSandbox = parse(&read(request).await?)?;
    let forked = control.inner.fork(&caller, &id, body, key.map(|key| key.0.0)).await?;
    let response = timed(json(StatusCode::CREATED, &forked.results), &forked.timings, since.elapsed());
    Ok(captured(response, &forked.capture))
}

async fn promote(State(control): State<Control>, Own { id, .. }: Own) -> Outcome {
    let ended = control.inner.promote(&id).await?;
    Ok(json(StatusCode::OK, &Promoted { ended }))
}

async fn snapshot(
    State(control): State<Control>,
    Own { caller, id, since }: Own,
    key: Option<Extension<Key>>,
    again: Option<Extension<Again>>,
    request: Request,
) -> Outcome {
    if let Some(Extension(Again(taken))) = again
        && let Some(info) = control.inner.taken(&caller, &taken).await?
    {
        return Ok(json(StatusCode::CREATED, &info));
    }
    let body: SnapshotSandbox = parse(&read(request).await?)?;
    let taken = control.inner.snapshot(&caller, &id, body, key.map(|key| key.0.0)).await?;
    let Taken { snapshot: info, capture, timings } = taken;
    Ok(captured(timed(json(StatusCode::CREATED, &info), &timings, since.elapsed()), &capture))
}

async fn network(State(control): State<Control>, Own { id, .. }: Own) -> Outcome {
    Ok(json(StatusCode::OK, &control.inner.network(&id).await?))
}

async fn set_network(State(control): State<Control>, Own { id, .. }: Own, request: Request) -> Outcome {
    let update: NetworkUpdate = parse(&read(request).await?)?;
    control.inner.set_network(&id, update).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn bake(State(control): State<Control>, Path(name): Path<String>, request: Request) -> Outcome {
    let body: BakeTemplate = parse(&read(request).await?)?;
    let template = name.parse().map_err(|_| unknown_template(&name))?;
    let request = Bake {
        template,
        vcpus: body.cpu_count,
        memory_mib: memory_of(body.memory_mb)?,
        waiting_vmms: body.waiting_vmms,
        network: body.network,
    };
    let snapshot_id = control.inner.node.bake(request).await?.to_string();
    Ok(json(StatusCode::OK, &Baked { snapshot_id }))
}

async fn pools(State(control): State<Control>) -> Outcome {
    Ok(json(StatusCode::OK, &control.inner.node.pools().await?))
}

async fn set_pool(State(control): State<Control>, Path(name): Path<String>, request: Request) -> Outcome {
    let wanted: SetPool = parse(&read(request).await?)?;
    let template = name.parse().map_err(|_| unknown_template(&name))?;
    control.inner.node.set_pool(&template, wanted).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn metrics(State(control): State<Control>) -> Outcome {
    let (node, pools) = (control.inner.node.info().await?, control.inner.node.pools().await?);
    let text = metrics::text(&node, &pools);
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}

async fn node(State(control): State<Control>) -> Outcome {
    Ok(json(StatusCode::OK, &control.inner.node.info().await?))
}

async fn collect(State(control): State<Control>, Query(query): Query<HashMap<String, String>>) -> Outcome {
    let dry_run = query.get("dryRun").is_some_and(|value| value == "true");
    let before = control.inner.there().await?;
    let collected = control.inner.node.collect(dry_run).await?;
    if !dry_run {
        control.inner.forget_owners(before).await?;
    }
    Ok(json(StatusCode::OK, &collected))
}
