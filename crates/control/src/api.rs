//! Routes of the control API. Source: E2B's OpenAPI; `/node`, `/gc` and `/templates/{name}/bake` are
//! Kelvin's own.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use kelvin_api::error::{Failure, Kind};
use kelvin_api::network::NetworkUpdate;
use kelvin_api::phase::Timings;
use kelvin_api::sandbox::{
    BakeTemplate, CAPTURE_HEADER, Capture, ConnectSandbox, ForkSandbox, MAX_TIMEOUT_S, Metadata, NewSandbox,
    PauseMode, PauseSandbox, ResumeSandbox, SandboxState, SetPool, SetTimeout, SnapshotInfo, SnapshotSandbox,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::database::Filter;
use crate::metrics;
use crate::reply::reply;
use crate::service::{Control, DEFAULT_TIMEOUT_S, parse_id, sandbox_of, unknown_template};

/// The largest body of a request.
const MAX_BODY: usize = 4 << 20;
/// Rows of a page that asks for no number, and the most. Source: E2B's OpenAPI, `paginationLimit`.
const PAGE: usize = 100;
/// The time to live that a connect without a timeout asks for, in seconds. Source: E2B's clients.
const CONNECT_TIMEOUT_S: u64 = 300;

type Outcome = Result<Response, Failed>;

/// A failure on its way out.
struct Failed(Failure);

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

fn json(status: StatusCode, body: &impl Serialize) -> Response {
    match serde_json::to_vec(body) {
        Ok(bytes) => {
            (status, [(header::CONTENT_TYPE, "application/json")], Body::from(bytes)).into_response()
        }
        Err(error) => reply(
            &Failure::new(Kind::Internal, "encoding", "the reply cannot be written", "report this")
                .with_cause(&error),
        ),
    }
}

impl Control {
    /// The control API; every route but `/health` asks for the API key.
    pub fn router(&self) -> Router {
        let create = post(create);
        let list = get(list);
        Router::new()
            .route("/sandboxes", create.clone().merge(get(list_running)))
            .route("/v2/sandboxes", create.merge(list))
            .route("/sandboxes/{id}", get(detail).delete(kill))
            .route("/sandboxes/{id}/timeout", post(set_timeout))
            .route("/sandboxes/{id}/refreshes", post(refresh))
            .route("/sandboxes/{id}/connect", post(connect))
            .route("/v2/sandboxes/{id}/connect", post(connect))
            .route("/sandboxes/{id}/pause", post(pause))
            .route("/sandboxes/{id}/resume", post(resume))
            .route("/sandboxes/{id}/fork", post(fork))
            .route("/sandboxes/{id}/promote", post(promote))
            .route("/sandboxes/{id}/snapshots", post(snapshot))
            .route("/snapshots", get(snapshots))
            .route("/snapshots/{name}", delete(remove_snapshot))
            .route("/sandboxes/{id}/logs", get(logs))
            .route("/sandboxes/{id}/network", get(network).put(set_network))
            .route("/templates", get(templates))
            .route("/templates/{name}", get(template).delete(remove_snapshot))
            .route("/templates/{name}/bake", post(bake))
            .route("/pools", get(pools))
            .route("/pools/{name}", put(set_pool))
            .route("/metrics", get(metrics))
            .route("/node", get(node))
            .route("/gc", post(collect))
            .fallback(nowhere)
            .method_not_allowed_fallback(wrong_method)
            .layer(from_fn_with_state(self.clone(), authenticate))
            .route("/health", get(async || StatusCode::NO_CONTENT))
            .with_state(self.clone())
    }
}

async fn authenticate(State(control): State<Control>, request: Request, next: Next) -> Response {
    match control.inner.key.check(request.headers()) {
        Ok(()) => next.run(request).await,
        Err(failure) => reply(&failure),
    }
}

async fn nowhere(request: Request) -> Response {
    let text = format!("there is no {} {}", request.method(), request.uri().path());
    reply(&Failure::new(Kind::NotFound, "no_route", text, "SPEC.md lists the routes"))
}

async fn wrong_method(request: Request) -> Response {
    let text = format!("{} is not allowed on {}", request.method(), request.uri().path());
    reply(&Failure::new(Kind::NotAllowed, "method_not_allowed", text, "SPEC.md lists the routes"))
}

async fn read(request: Request) -> Result<Bytes, Failure> {
    let too_large = || {
        Failure::new(
            Kind::TooLarge,
            "body_too_large",
            format!("the body is larger than {MAX_BODY} bytes"),
            "send files through the sandbox's /files",
        )
    };
    match Limited::new(request.into_body(), MAX_BODY).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(too_large()),
        Err(error) => Err(Failure::new(Kind::Invalid, "body_cut", "the body ended early", "send it again")
            .with_cause(&*error)),
    }
}

fn parse<T: DeserializeOwned + Default>(bytes: &Bytes) -> Result<T, Failure> {
    if bytes.is_empty() {
        return Ok(T::default());
    }
    parse_required(bytes)
}

fn parse_required<T: DeserializeOwned>(bytes: &Bytes) -> Result<T, Failure> {
    serde_json::from_slice(bytes).map_err(|error| {
        let code = if error.is_data() { "invalid_request" } else { "malformed_json" };
        Failure::new(
            Kind::Invalid,
            code,
            format!("the body is not what is expected here: {error}"),
            "SPEC.md lists the fields of each route",
        )
    })
}

async fn create(State(control): State<Control>, request: Request) -> Outcome {
    let started = Instant::now();
    let key = idempotency_key(request.headers())?;
    let bytes = read(request).await?;
    let body: NewSandbox = parse_required(&bytes)?;
    let key = key.map(|key| (key, kelvin_store::hash::sha256(&bytes)));
    let created = control.create(body, key).await?;
    Ok(timed(json(StatusCode::CREATED, &created.sandbox), &created.timings, started.elapsed()))
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Failure> {
    let Some(value) = headers.get("idempotency-key") else {
        return Ok(None);
    };
    match value.to_str() {
        Ok(key) if !key.is_empty() && key.len() <= 255 => Ok(Some(key.to_owned())),
        _ => Err(Failure::new(
            Kind::Invalid,
            "invalid_idempotency_key",
            "the idempotency key is empty, longer than 255 characters or not ASCII",
            "use a random UUID",
        )),
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListQuery {
    metadata: Option<String>,
    state: Option<String>,
    order: Option<String>,
    started_after: Option<String>,
    template: Option<String>,
    limit: Option<String>,
    next_token: Option<String>,
}

fn metadata_filter(text: &str) -> Metadata {
    let decode = |part: &str| {
        percent_encoding::percent_decode_str(&part.replace('+', " ")).decode_utf8_lossy().into_owned()
    };
    text.split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(key, value)| (decode(key), decode(value)))
        .collect()
}

impl ListQuery {
    fn filter(&self) -> Result<Filter, Failure> {
        let invalid = |field: &str, text: &str, remedy: &str| {
            let shown: String = text.chars().take(80).collect();
            Failure::new(Kind::Invalid, "invalid_query", format!("{field}={shown:?} is not allowed"), remedy)
        };
        let limit = page_limit(self.limit.as_ref())?;
        let ascending = match self.order.as_deref() {
            None | Some("desc") => false,
            Some("asc") => true,
            Some(other) => return Err(invalid("order", other, "asc or desc")),
        };
        let started_after = match &self.started_after {
            None => None,
            Some(text) => Some(text.parse().map_err(|_| invalid("startedAfter", text, "an RFC 3339 time"))?),
        };
        Ok(Filter {
            metadata: self.metadata.as_deref().map(metadata_filter).unwrap_or_default(),
            template: self.template.clone(),
            state: None,
            started_after,
            ascending,
            after: None,
            limit,
        })
    }

    /// The one state that is wanted; none when both are.
    fn wanted_state(&self) -> Result<Option<SandboxState>, Failure> {
        let (mut running, mut paused) = (false, false);
        for state in self.state.as_deref().unwrap_or("running,paused").split(',') {
            match state {
                "running" => running = true,
                "paused" => paused = true,
                other => {
                    return Err(Failure::new(
                        Kind::Invalid,
                        "invalid_query",
                        format!("no state {:?}", other.chars().take(80).collect::<String>()),
                        "running or paused",
                    ));
                }
            }
        }
        Ok(match (running, paused) {
            (true, false) => Some(SandboxState::Running),
            (false, true) => Some(SandboxState::Paused),
            _ => None,
        })
    }
}

/// The older list knows no paused sandboxes. Source: E2B's OpenAPI, `GET /sandboxes`.
async fn list_running(state: State<Control>, Query(query): Query<ListQuery>) -> Outcome {
    list(state, Query(ListQuery { state: Some("running".to_owned()), ..query })).await
}

async fn list(State(control): State<Control>, Query(query): Query<ListQuery>) -> Outcome {
    let filter = Filter { state: query.wanted_state()?, ..query.filter()? };
    let page = control.inner.list(filter, query.next_token.as_deref()).await?;
    let mut response = json(StatusCode::OK, &page.sandboxes);
    if let Some(next) = page.next.and_then(|next| HeaderValue::from_str(&next).ok()) {
        response.headers_mut().insert("x-next-token", next);
    }
    Ok(response)
}

async fn detail(State(control): State<Control>, Path(id): Path<String>) -> Outcome {
    Ok(json(StatusCode::OK, &control.inner.get(&parse_id(&id)?).await?))
}

async fn kill(State(control): State<Control>, Path(id): Path<String>) -> Outcome {
    control.inner.kill(&parse_id(&id)?).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn set_timeout(State(control): State<Control>, Path(id): Path<String>, request: Request) -> Outcome {
    let id = parse_id(&id)?;
    let body: SetTimeout = parse_required(&read(request).await?)?;
    control.inner.set_timeout(&id, body.timeout, true).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Refresh {
    duration: Option<u64>,
}

async fn refresh(State(control): State<Control>, Path(id): Path<String>, request: Request) -> Outcome {
    let id = parse_id(&id)?;
    let body: Refresh = parse(&read(request).await?)?;
    control.inner.set_timeout(&id, body.duration.unwrap_or(60).min(MAX_TIMEOUT_S), false).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn connect(State(control): State<Control>, Path(id): Path<String>, request: Request) -> Outcome {
    let id = parse_id(&id)?;
    let body: ConnectSandbox = parse(&read(request).await?)?;
    let started = Instant::now();
    let seconds = body.timeout.unwrap_or(CONNECT_TIMEOUT_S);
    match control.inner.connect(&id, seconds, PauseMode::of(body.memory)).await? {
        (_, Some(resumed)) => {
            Ok(timed(json(StatusCode::CREATED, &resumed.sandbox), &resumed.timings, started.elapsed()))
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

async fn pause(State(control): State<Control>, Path(id): Path<String>, request: Request) -> Outcome {
    let (id, started) = (parse_id(&id)?, Instant::now());
    let body: PauseSandbox = parse(&read(request).await?)?;
    let (mode, healthy) = (PauseMode::of(body.memory), body.require_healthy_guest == Some(true));
    let (capture, timings) = control.inner.pause(&id, mode, healthy).await?;
    let response = timed(StatusCode::NO_CONTENT.into_response(), &timings, started.elapsed());
    Ok(captured(response, &capture))
}

async fn resume(State(control): State<Control>, Path(id): Path<String>, request: Request) -> Outcome {
    let (id, started) = (parse_id(&id)?, Instant::now());
    let body: ResumeSandbox = parse(&read(request).await?)?;
    if body.auto_pause.is_some() {
        let text = "autoPause is set when a sandbox is created, not when it is resumed";
        return Err(Failure::new(Kind::Invalid, "unsupported_field", text, "leave the field out").into());
    }
    let (timeout, mode) = (body.timeout.unwrap_or(DEFAULT_TIMEOUT_S), PauseMode::of(body.memory));
    let resumed = control.inner.resume(&id, timeout, mode).await?;
    Ok(timed(json(StatusCode::CREATED, &resumed.sandbox), &resumed.timings, started.elapsed()))
}

async fn fork(State(control): State<Control>, Path(id): Path<String>, request: Request) -> Outcome {
    let (id, started) = (parse_id(&id)?, Instant::now());
    no_key(request.headers())?;
    let body: ForkSandbox = parse(&read(request).await?)?;
    let forked = control.fork(id, body).await?;
    let response = timed(json(StatusCode::CREATED, &forked.results), &forked.timings, started.elapsed());
    Ok(captured(response, &forked.capture))
}

/// Forks and snapshots are of another instant each time.
fn no_key(headers: &HeaderMap) -> Result<(), Failure> {
    if !headers.contains_key("idempotency-key") {
        return Ok(());
    }
    let text = "forks and snapshots have no idempotency key: each is of another instant";
    Err(Failure::new(Kind::Invalid, "unsupported_header", text, "leave the header out"))
}

async fn promote(State(control): State<Control>, Path(id): Path<String>) -> Outcome {
    let ended = control.inner.promote(&parse_id(&id)?).await?;
    Ok(json(StatusCode::OK, &serde_json::json!({ "ended": ended })))
}

async fn snapshot(State(control): State<Control>, Path(id): Path<String>, request: Request) -> Outcome {
    let (id, started) = (parse_id(&id)?, Instant::now());
    no_key(request.headers())?;
    let body: SnapshotSandbox = parse(&read(request).await?)?;
    let (info, capture, timings) = control.inner.snapshot(&id, body).await?;
    Ok(captured(timed(json(StatusCode::CREATED, &info), &timings, started.elapsed()), &capture))
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SnapshotQuery {
    #[serde(rename = "sandboxID")]
    sandbox_id: Option<String>,
    name: Option<String>,
    limit: Option<String>,
    next_token: Option<String>,
}

fn page_limit(text: Option<&String>) -> Result<usize, Failure> {
    let Some(text) = text else {
        return Ok(PAGE);
    };
    text.parse().ok().filter(|limit| (1..=PAGE).contains(limit)).ok_or_else(|| {
        let shown: String = text.chars().take(80).collect();
        let message = format!("limit={shown:?} is not allowed");
        Failure::new(Kind::Invalid, "invalid_query", message, "ask for 1 to 100")
    })
}

async fn snapshots(State(control): State<Control>, Query(query): Query<SnapshotQuery>) -> Outcome {
    let wanted = |info: &SnapshotInfo| {
        query.sandbox_id.as_ref().is_none_or(|id| info.sandbox_id.as_str() == id)
            && query.name.as_ref().is_none_or(|name| info.snapshot_id == *name || info.names.contains(name))
    };
    let limit = page_limit(query.limit.as_ref())?;
    let mut found: Vec<SnapshotInfo> = control.inner.node.snapshots().await?;
    found.retain(wanted);
    if let Some(after) = &query.next_token {
        let at = found.iter().position(|info| info.snapshot_id == *after);
        found.drain(..at.map_or(found.len(), |at| at + 1));
    }
    let more = found.len() > limit;
    found.truncate(limit);
    let mut response = json(StatusCode::OK, &found);
    let next = found.last().filter(|_| more).and_then(|info| HeaderValue::from_str(&info.snapshot_id).ok());
    if let Some(next) = next {
        response.headers_mut().insert("x-next-token", next);
    }
    Ok(response)
}

async fn remove_snapshot(
    State(control): State<Control>,
    Path(name): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Outcome {
    let cascade = query.get("cascade").is_some_and(|value| value == "true");
    control.inner.node.remove_snapshot(&name, cascade).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn network(State(control): State<Control>, Path(id): Path<String>) -> Outcome {
    Ok(json(StatusCode::OK, &control.inner.network(&parse_id(&id)?).await?))
}

async fn set_network(State(control): State<Control>, Path(id): Path<String>, request: Request) -> Outcome {
    let id = parse_id(&id)?;
    let update: NetworkUpdate = parse(&read(request).await?)?;
    control.inner.set_network(&id, update).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn logs(State(control): State<Control>, Path(id): Path<String>) -> Outcome {
    Ok(json(StatusCode::OK, &control.inner.logs(&parse_id(&id)?).await?))
}

async fn templates(State(control): State<Control>) -> Outcome {
    Ok(json(StatusCode::OK, &control.inner.node.templates().await?))
}

async fn template(State(control): State<Control>, Path(name): Path<String>) -> Outcome {
    let templates = control.inner.node.templates().await?;
    let found = templates
        .iter()
        .find(|template| template.template_id == name)
        .ok_or_else(|| unknown_template(&name))?;
    Ok(json(StatusCode::OK, found))
}

async fn bake(State(control): State<Control>, Path(name): Path<String>, request: Request) -> Outcome {
    let body: BakeTemplate = parse(&read(request).await?)?;
    let template = name.parse().map_err(|_| unknown_template(&name))?;
    let snapshot = control.inner.node.bake(&template, body).await?;
    Ok(json(StatusCode::OK, &serde_json::json!({ "snapshotID": snapshot })))
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
    Ok(json(StatusCode::OK, &control.inner.node.collect(dry_run).await?))
}
