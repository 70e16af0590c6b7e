//! Routes of the control API. Source: E2B's OpenAPI; `/node`, `/gc`, `/templates/{name}/bake` and
//! `/templates/{name}/import` are Kelvin's own.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Router};
use http::{HeaderValue, Method, StatusCode, header};
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
use serde::{Deserialize, Serialize};

use crate::admission::{authenticate, check_documented, for_admins};
use crate::audit::Audit;
use crate::codes;
use crate::control::Control;
use crate::create::{DEFAULT_TIMEOUT_S, memory_of};
use crate::database::NewKey;
use crate::failures::unknown_template;
use crate::once::{self, Again, Key};
use crate::openapi::{Api, Documented, Operation, Tag, op};
use crate::reply::reply;
use crate::request::{Outcome, Own, Path, Query, Who, about, json, parse, parse_required, read};
use crate::service::sandbox_of;
use crate::{builds, catalog, events, import, list, logs, meter, metrics, people};

/// The time to live that a connect without a timeout asks for, in seconds. Source: E2B's clients.
const CONNECT_TIMEOUT_S: u64 = 300;

/// What belongs to everybody: for the server's own key.
fn admin() -> Api {
    let (get, post, put) = (Method::GET, Method::POST, Method::PUT);
    Api::new()
        .route(
            &post,
            "/templates/{name}/bake",
            bake,
            op("bakeTemplate", Tag::Templates, "Make sure that a snapshot of a template exists in a shape")
                .errors(&[codes::NODE, codes::START, codes::BASE, &[ErrorCode::InvalidShape]])
                .optional::<BakeTemplate>()
                .reply::<Baked>(200),
        )
        .route(
            &get,
            "/pools",
            pools,
            op("listPools", Tag::Node, "Machines that wait")
                .errors(&[codes::NODE])
                .reply::<Vec<PoolInfo>>(200),
        )
        .route(
            &put,
            "/pools/{name}",
            set_pool,
            op("setPool", Tag::Node, "Set how many machines of a template wait")
                .errors(&[codes::NODE, codes::BASE, &[ErrorCode::InvalidPool]])
                .optional::<SetPool>()
                .empty(204),
        )
        .route(
            &get,
            "/metrics",
            metrics,
            op("getServerMetrics", Tag::Node, "The server's metrics, as text")
                .errors(&[codes::NODE])
                .empty(200),
        )
        .route(
            &get,
            "/node",
            node,
            op("getNode", Tag::Node, "What runs here and what is left")
                .errors(&[codes::NODE])
                .reply::<NodeInfo>(200),
        )
        .route(
            &post,
            "/gc",
            collect,
            op("collectGarbage", Tag::Node, "Remove what nothing needs")
                .errors(&[codes::NODE])
                .query(&[("dryRun", "true only says what would be removed")])
                .reply::<serde_json::Value>(200),
        )
        .merge(people::admin())
        .merge(import::routes())
        .for_admins(|router| router.route_layer(from_fn(for_admins)))
}

fn create_op(id: &'static str) -> Operation {
    op(id, Tag::Sandboxes, "Create a sandbox; it is ready when this replies")
        .body::<NewSandbox>()
        .reply::<Sandbox>(201)
        .errors(&[
            codes::START,
            codes::BASE,
            codes::NETWORK,
            codes::ENVIRONMENT,
            codes::TIMEOUT,
            codes::NODE,
            &[
                ErrorCode::InvalidLifecycle,
                ErrorCode::InvalidShape,
                ErrorCode::SnapshotFixed,
                ErrorCode::StartPathImpossible,
                ErrorCode::OtherVmm,
                ErrorCode::SandboxChanging,
                ErrorCode::SandboxNotFound,
            ],
        ])
}

fn connect_op(id: &'static str) -> Operation {
    op(id, Tag::Sandboxes, "Have a sandbox run for at least a while; resumes one that is paused")
        .optional::<ConnectSandbox>()
        .reply::<Sandbox>(200)
        .reply::<Sandbox>(201)
        .errors(&[codes::SANDBOX, codes::STATE, codes::TIMEOUT, codes::NODE, codes::START])
}

#[allow(clippy::too_many_lines, reason = "a table: one entry for each route")]
fn sandboxes() -> Api {
    let (get, post, put, delete) = (Method::GET, Method::POST, Method::PUT, Method::DELETE);
    Api::new()
        .route(&post, "/sandboxes", create, create_op("createSandbox"))
        .route(&post, "/v2/sandboxes", create, create_op("createSandboxV2"))
        .route(
            &get,
            "/sandboxes/{id}",
            detail,
            op("getSandbox", Tag::Sandboxes, "One sandbox")
                .errors(&[codes::SANDBOX, codes::NODE])
                .reply::<SandboxDetail>(200),
        )
        .route(
            &delete,
            "/sandboxes/{id}",
            kill,
            op("killSandbox", Tag::Sandboxes, "End a sandbox")
                .errors(&[codes::SANDBOX, codes::STATE, codes::NODE])
                .empty(204),
        )
        .route(
            &post,
            "/sandboxes/{id}/timeout",
            set_timeout,
            op("setSandboxTimeout", Tag::Sandboxes, "Set when a sandbox ends")
                .errors(&[codes::SANDBOX, codes::STATE, codes::TIMEOUT, codes::NODE])
                .body::<SetTimeout>()
                .empty(204),
        )
        .route(
            &post,
            "/sandboxes/{id}/refreshes",
            refresh,
            op("refreshSandbox", Tag::Sandboxes, "Have a sandbox live for at least a while")
                .errors(&[codes::SANDBOX, codes::STATE, codes::TIMEOUT, codes::NODE])
                .optional::<Refresh>()
                .empty(204),
        )
        .route(&post, "/sandboxes/{id}/connect", connect, connect_op("connectSandbox"))
        .route(&post, "/v2/sandboxes/{id}/connect", connect, connect_op("connectSandboxV2"))
        .route(
            &post,
            "/sandboxes/{id}/pause",
            pause,
            op("pauseSandbox", Tag::Sandboxes, "Freeze a sandbox")
                .errors(&[
                    codes::SANDBOX,
                    codes::STATE,
                    codes::NODE,
                    codes::CAPTURE,
                    &[ErrorCode::GuestUnhealthy, ErrorCode::TooManyPaused],
                ])
                .optional::<PauseSandbox>()
                .empty(204),
        )
        .route(
            &post,
            "/sandboxes/{id}/resume",
            resume,
            op("resumeSandbox", Tag::Sandboxes, "Let a paused sandbox go on")
                .errors(&[
                    codes::SANDBOX,
                    codes::STATE,
                    codes::TIMEOUT,
                    codes::NODE,
                    codes::START,
                    &[ErrorCode::UnsupportedField],
                ])
                .optional::<ResumeSandbox>()
                .reply::<Sandbox>(201),
        )
        .route(
            &post,
            "/sandboxes/{id}/fork",
            fork,
            op("forkSandbox", Tag::Sandboxes, "Copy a sandbox that runs")
                .errors(&[
                    codes::SANDBOX,
                    codes::STATE,
                    codes::TIMEOUT,
                    codes::NODE,
                    codes::START,
                    codes::CAPTURE,
                    codes::ENVIRONMENT,
                    &[ErrorCode::InvalidCount],
                ])
                .optional::<ForkSandbox>()
                .reply::<Vec<ForkResult>>(201),
        )
        .route(
            &post,
            "/sandboxes/{id}/promote",
            promote,
            op("promoteSandbox", Tag::Sandboxes, "Kelvin: end the siblings of a fork")
                .errors(&[codes::SANDBOX, codes::STATE, codes::NODE, &[ErrorCode::NotForked]])
                .reply::<Promoted>(200),
        )
        .route(
            &post,
            "/sandboxes/{id}/snapshots",
            snapshot,
            op("createSnapshot", Tag::Snapshots, "Take a snapshot that is kept")
                .errors(&[
                    codes::SANDBOX,
                    codes::STATE,
                    codes::NODE,
                    codes::CAPTURE,
                    &[
                        ErrorCode::InvalidName,
                        ErrorCode::NameTaken,
                        ErrorCode::AlreadyThere,
                        ErrorCode::TooManySnapshots,
                    ],
                ])
                .optional::<SnapshotSandbox>()
                .reply::<SnapshotInfo>(201),
        )
        .route(
            &get,
            "/sandboxes/{id}/network",
            network,
            op(
                "getSandboxNetwork",
                Tag::Sandboxes,
                "Kelvin: what a sandbox may reach and what it was refused",
            )
            .errors(&[codes::SANDBOX, codes::STATE, codes::NODE, &[ErrorCode::NoNetwork]])
            .reply::<NetworkState>(200),
        )
        .route(
            &put,
            "/sandboxes/{id}/network",
            set_network,
            op("setSandboxNetwork", Tag::Sandboxes, "Replace what a sandbox may reach")
                .errors(&[codes::SANDBOX, codes::STATE, codes::NODE, codes::NETWORK])
                .optional::<NetworkUpdate>()
                .empty(204),
        )
}

/// Every route that asks for an API key.
pub(crate) fn routes() -> Api {
    sandboxes()
        .merge(list::routes())
        .merge(logs::routes())
        .merge(events::routes())
        .merge(meter::routes())
        .merge(catalog::routes())
        .merge(builds::routes::routes())
        .merge(builds::uploads::routes())
        .merge(people::routes())
        .merge(admin())
}

impl Control {
    /// The control API; every route but `/health`, `/openapi.json` and those with signed URLs asks for an API key.
    pub fn router(&self) -> Router {
        // The same for every server of this program.
        static API: OnceLock<([Router<Control>; 2], Bytes, Arc<Documented>)> = OnceLock::new();
        let made = || {
            let api = routes();
            let document = Bytes::from(api.document().to_string());
            let documented = Arc::new(api.documented());
            ([api.router, api.signed], document, documented)
        };
        let ([router, signed], document, documented) = API.get_or_init(made).clone();
        router
            .fallback(nowhere)
            .method_not_allowed_fallback(wrong_method)
            .layer(from_fn_with_state(self.clone(), authenticate))
            // Signed URLs ask for no key.
            .merge(signed.method_not_allowed_fallback(wrong_method))
            .layer(from_fn_with_state(documented, check_documented))
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
    /// Id of the snapshot.
    #[serde(rename = "snapshotID")]
    snapshot_id: String,
}

/// The reply of `POST /sandboxes/{id}/promote`.
#[derive(Debug, Serialize, schemars::JsonSchema)]
struct Promoted {
    /// Siblings that ended.
    ended: Vec<SandboxId>,
}

async fn nowhere(request: Request) -> Response {
    let text = format!("there is no {} {}", request.method(), request.uri().path());
    reply(&Failure::new(ErrorCode::NoRoute, text, "SPEC.md lists the routes"))
}

async fn wrong_method(request: Request) -> Response {
    let text = format!("{} is not allowed on {}", request.method(), request.uri().path());
    reply(&Failure::new(ErrorCode::MethodNotAllowed, text, "SPEC.md lists the routes"))
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

/// `POST /sandboxes/{id}/refreshes`.
#[derive(Debug, Default, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Refresh {
    /// Seconds from now; 60 when it is left out; never shortens a time to live.
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
    let template = control.inner.any_version(&name).await?;
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
    let text = control.inner.metrics.text(&node, &pools)?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

async fn node(State(control): State<Control>) -> Outcome {
    Ok(json(StatusCode::OK, &control.inner.node.info().await?))
}

async fn collect(State(control): State<Control>, Query(query): Query<HashMap<String, String>>) -> Outcome {
    let dry_run = query.get("dryRun").is_some_and(|value| value == "true");
    if !dry_run {
        control.inner.expire_versions().await?;
    }
    let before = control.inner.there().await?;
    let collected = control.inner.node.collect(dry_run).await?;
    if !dry_run {
        control.inner.forget_owners(before).await?;
    }
    Ok(json(StatusCode::OK, &collected))
}
