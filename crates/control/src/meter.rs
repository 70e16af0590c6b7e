//! What sandboxes use: asked of each guest now and then, kept for the sandbox's life.

use std::collections::{BTreeMap, HashMap};
use std::sync::PoisonError;
use std::time::Duration;

use axum::extract::State;
use futures::StreamExt;
use http::{Method, StatusCode};
use kelvin_api::account::Project;
use kelvin_api::error::{ErrorCode, Failure, Kind, chain};
use kelvin_api::id::SandboxId;
use kelvin_api::sandbox::{GuestMetrics, ProjectMetric, SandboxMetric, SandboxState};
use serde::{Deserialize, Serialize};

use crate::accounts::Account;
use crate::codes;
use crate::control::{Control, Inner};
use crate::failures::database_failed;
use crate::openapi::{Api, Tag, op};
use crate::request::{Outcome, Own, Path, Query, Who, json};

/// How often each sandbox is asked. Rarer than E2B's 5 s: each time wakes a machine that may be idle.
const EVERY: Duration = Duration::from_secs(15);
/// Sandboxes that are asked at one time.
const AT_ONCE: usize = 8;
/// How long a guest may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Measurements of one sandbox that are given at once: the newest.
const MAX_ROWS: u32 = 10_000;
/// Sandboxes in one request. Source: E2B's OpenAPI.
const MAX_IDS: usize = 100;

/// The routes.
pub(crate) fn routes() -> Api {
    const INTERVAL: &[(&str, &str)] = &[("start", "seconds since 1970"), ("end", "seconds since 1970")];
    let get = Method::GET;
    Api::new()
        .route(
            &get,
            "/sandboxes/metrics",
            of_many,
            op("listSandboxMetrics", Tag::Metrics, "The newest measurement of sandboxes")
                .errors(&[codes::NODE])
                .query(&[("sandbox_ids", "ids, joined by commas; at most 100")])
                .reply::<ManyMetrics>(200),
        )
        .route(
            &get,
            "/sandboxes/{id}/metrics",
            of_one,
            op("getSandboxMetrics", Tag::Metrics, "What a sandbox used")
                .errors(&[codes::SANDBOX, codes::NODE, &[ErrorCode::InvalidInterval]])
                .query(INTERVAL)
                .reply::<Vec<SandboxMetric>>(200),
        )
        .route(
            &get,
            "/teams/{id}/metrics",
            of_project,
            op("getTeamMetrics", Tag::Metrics, "What a project used")
                .errors(&[&[ErrorCode::TeamNotFound, ErrorCode::InvalidInterval]])
                .query(INTERVAL)
                .reply::<Vec<ProjectMetric>>(200),
        )
        .route(
            &get,
            "/teams/{id}/metrics/max",
            most_of_project,
            op("getTeamMetricsMax", Tag::Metrics, "The most that a project used")
                .errors(&[&[ErrorCode::TeamNotFound, ErrorCode::InvalidInterval]])
                .query(&[
                    ("start", "seconds since 1970"),
                    ("end", "seconds since 1970"),
                    ("metric", "concurrent_sandboxes or sandbox_start_rate"),
                ])
                .reply::<MaxMetric>(200),
        )
}

/// The reply of `GET /sandboxes/metrics`.
#[derive(Debug, Serialize, schemars::JsonSchema)]
struct ManyMetrics {
    /// The newest measurement of each sandbox that has one, by its id.
    sandboxes: BTreeMap<String, SandboxMetric>,
}

/// The reply of `GET /teams/{id}/metrics/max`.
#[derive(Debug, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
struct MaxMetric {
    /// When it was the most.
    timestamp: jiff::Timestamp,
    /// The same, in seconds since 1970.
    timestamp_unix: i64,
    /// The most.
    value: f64,
}

/// What `guest` says; `now` is the host's clock: a guest may have set its own.
fn as_metric(guest: &GuestMetrics, now: jiff::Timestamp) -> SandboxMetric {
    SandboxMetric {
        timestamp: jiff::Timestamp::from_second(now.as_second()).unwrap_or(now),
        timestamp_unix: now.as_second(),
        cpu_count: guest.cpu_count,
        cpu_used_pct: if guest.cpu_used_pct.is_finite() { guest.cpu_used_pct.max(0.0) } else { 0.0 },
        mem_used: guest.mem_used,
        mem_total: guest.mem_total,
        mem_cache: guest.mem_cache,
        disk_used: guest.disk_used,
        disk_total: guest.disk_total,
    }
}

impl Inner {
    async fn ask_guest(&self, id: &SandboxId) -> Option<(SandboxId, SandboxMetric)> {
        match tokio::time::timeout(PATIENCE, self.node.metrics(id)).await {
            Ok(Ok(guest)) => Some((id.clone(), as_metric(&guest, self.clock.wall()))),
            Ok(Err(failure)) => {
                tracing::debug!(sandbox = %id, error = chain(&failure), "not measured");
                None
            }
            Err(_elapsed) => None,
        }
    }

    /// Measures every sandbox that runs, for ever.
    pub(crate) async fn measure(&self) {
        // Not at once: guests that were just adopted find out about the former server first.
        let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + EVERY, EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last = self.clock.now();
        loop {
            ticks.tick().await;
            let live = match self.node.live().await {
                Ok(live) => live,
                Err(failure) => {
                    tracing::warn!(error = chain(&failure), "the node does not say what runs");
                    continue;
                }
            };
            let running =
                live.into_iter().filter(|live| live.state == SandboxState::Running).map(|live| live.sandbox);
            let asked = running.map(|id| async move { self.ask_guest(&id).await });
            let metrics: Vec<_> = futures::stream::iter(asked)
                .buffer_unordered(AT_ONCE)
                .filter_map(|metric| async { metric })
                .collect()
                .await;
            let started: Vec<(Project, u32)> = {
                let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
                started.drain().collect()
            };
            if let Err(error) = self.database.note_used(self.accounts.used()).await {
                tracing::error!(error = chain(&error), "when keys were used was not written");
            }
            let whole = Duration::from_secs(self.clock.now().saturating_duration_since(last).as_secs());
            let span = i64::try_from(whole.as_secs()).unwrap_or(i64::MAX);
            // What is left of a second belongs to the next span.
            last = last + whole;
            if let Err(error) = self.database.add_metrics(metrics, started, span).await {
                tracing::error!(error = chain(&error), "measurements were not written");
            }
        }
    }

    /// The newest measurement of a sandbox; taken now, when there is none yet.
    async fn newest(&self, id: &SandboxId) -> Result<Option<SandboxMetric>, Failure> {
        let known = self.database.metrics(id, 0, i64::MAX, 1).await.map_err(database_failed)?;
        if let Some(last) = known.into_iter().next() {
            return Ok(Some(last));
        }
        if self.row(id).await?.state != SandboxState::Running {
            return Ok(None);
        }
        let Some((id, metric)) = self.ask_guest(id).await else { return Ok(None) };
        let metrics = vec![(id, metric.clone())];
        self.database.add_metrics(metrics, Vec::new(), 0).await.map_err(database_failed)?;
        Ok(Some(metric))
    }
}

#[derive(Debug, Deserialize)]
struct Interval {
    start: Option<i64>,
    end: Option<i64>,
    metric: Option<String>,
}

impl Interval {
    fn check(&self) -> Result<(i64, i64), Failure> {
        let (start, end) = (self.start.unwrap_or(0), self.end.unwrap_or(i64::MAX));
        if start < 0 || end < start {
            let remedy = "seconds since 1970, start before end";
            return Err(Failure::new(ErrorCode::InvalidInterval, "the interval is none", remedy));
        }
        Ok((start, end))
    }
}

async fn of_one(
    State(control): State<Control>,
    Own { id, .. }: Own,
    Query(query): Query<Interval>,
) -> Outcome {
    let (start, end) = query.check()?;
    control.inner.newest(&id).await?;
    let found = control.inner.database.metrics(&id, start, end, MAX_ROWS).await.map_err(database_failed)?;
    Ok(json(StatusCode::OK, &found))
}

/// The newest measurement of each sandbox; those that are not there, or another's, are left out.
async fn of_many(
    State(control): State<Control>,
    Who(caller): Who,
    Query(query): Query<HashMap<String, String>>,
) -> Outcome {
    let ids: Vec<&str> = query
        .get("sandbox_ids")
        .map(|ids| ids.split(',').filter(|id| !id.is_empty()).collect())
        .unwrap_or_default();
    if ids.is_empty() || ids.len() > MAX_IDS {
        let text = format!("sandbox_ids names {} sandboxes", ids.len());
        return Err(Failure::new(ErrorCode::InvalidQuery, text, format!("name 1 to {MAX_IDS}")).into());
    }
    let mut found = BTreeMap::new();
    for id in ids {
        match control.inner.owned(&caller, id).await {
            Ok(id) => {
                if let Some(metric) = control.inner.newest(&id).await? {
                    found.insert(id.to_string(), metric);
                }
            }
            Err(failure) if failure.kind == Kind::NotFound => {}
            Err(failure) => return Err(failure.into()),
        }
    }
    Ok(json(StatusCode::OK, &ManyMetrics { sandboxes: found }))
}

fn project_of(caller: &Account, id: &str) -> Result<Project, Failure> {
    let none = || {
        let shown: String = id.chars().take(80).collect();
        Failure::new(ErrorCode::TeamNotFound, format!("no team {shown:?}"), "GET /teams has yours")
    };
    let project: Project = id.parse().map_err(|_| none())?;
    if project == caller.project || caller.is_admin { Ok(project) } else { Err(none()) }
}

/// What the project `id` of a path used in the interval that is asked for.
async fn used(
    control: &Control,
    caller: &Account,
    id: &str,
    query: &Interval,
) -> Result<Vec<ProjectMetric>, Failure> {
    let (project, (start, end)) = (project_of(caller, id)?, query.check()?);
    control.inner.database.project_metrics(&project, start, end).await.map_err(database_failed)
}

async fn of_project(
    State(control): State<Control>,
    Who(caller): Who,
    Path(id): Path<String>,
    Query(query): Query<Interval>,
) -> Outcome {
    Ok(json(StatusCode::OK, &used(&control, &caller, &id, &query).await?))
}

async fn most_of_project(
    State(control): State<Control>,
    Who(caller): Who,
    Path(id): Path<String>,
    Query(query): Query<Interval>,
) -> Outcome {
    let found = used(&control, &caller, &id, &query).await?;
    let value = match query.metric.as_deref() {
        Some("concurrent_sandboxes") => |metric: &ProjectMetric| f64::from(metric.concurrent_sandboxes),
        Some("sandbox_start_rate") => |metric: &ProjectMetric| metric.sandbox_start_rate,
        _ => {
            let remedy = "concurrent_sandboxes or sandbox_start_rate";
            return Err(Failure::new(ErrorCode::InvalidQuery, "metric is not allowed", remedy).into());
        }
    };
    let most = found.iter().max_by(|one, other| value(one).total_cmp(&value(other)));
    let timestamp = most.map_or_else(|| control.inner.clock.wall(), |metric| metric.timestamp);
    let reply =
        MaxMetric { timestamp, timestamp_unix: timestamp.as_second(), value: most.map_or(0.0, value) };
    Ok(json(StatusCode::OK, &reply))
}
