//! Routes of builds. Source: E2B's OpenAPI; `DELETE …/builds/{build}` and `GET /builds/{build}` are Kelvin's own.

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::IntoResponse;
use http::{Method, StatusCode};
use kelvin_api::ENVD_VERSION;
use kelvin_api::build::{
    BuildInfo, BuildLogEntry, BuildLogs, BuildReason, BuildStatus, NewTemplate, RequestedTemplate,
    StartBuild, TemplateBuild, UpdateTemplate, UpdatedTemplate,
};
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::TemplateName;
use kelvin_api::sandbox::{LogLevel, Template};
use kelvin_node_api::BuildStage;
use serde::Deserialize;

use super::codes as own;
use super::plan::{From as Begins, all_from, command, kernel};
use super::run::wrong_state;
use super::steps::all_steps;
use crate::codes;
use crate::control::{Control, Inner};
use crate::create::memory_of;
use crate::database::{
    BuildError, BuildLine, BuildRow, BuildState, DEFAULT_TAG, Lines, TemplateOwner, Wanted,
};
use crate::failures::{database_failed, unknown_template};
use crate::once::{Again, Key};
use crate::openapi::{Api, Tag, op};
use crate::request::{Outcome, Path, Query, Who, about, json, parse, parse_required, read};
use crate::tags::parse_tags;
use crate::versions::split_tag;

/// Lines that are given at once. Source: E2B's OpenAPI.
const LINES: usize = 100;
/// Lines of a step that failed, beside why it did.
const REASON_LINES: usize = 20;
/// vCPUs and memory, in MiB, of a template that names none.
const DEFAULT_SHAPE: (u32, u32) = (1, 512);

/// The routes.
#[allow(clippy::too_many_lines, reason = "a table: one entry for each route")]
pub(crate) fn routes() -> Api {
    let (get, post, delete) = (Method::GET, Method::POST, Method::DELETE);
    let request = |id| {
        op(id, Tag::Templates, "Ask for a build of a template; files are uploaded next, then it is started")
            .body::<NewTemplate>()
            .errors(&[codes::NODE, own::REQUEST])
    };
    let update = |id| {
        op(id, Tag::Templates, "Say who may use a template that was built")
            .optional::<UpdateTemplate>()
            .reply::<UpdatedTemplate>(200)
            .errors(&[&[ErrorCode::TemplateNotFound]])
    };
    Api::new()
        .route(&post, "/v3/templates", request_v3, request("requestBuild").reply::<RequestedTemplate>(202))
        .route(&post, "/v2/templates", request_v2, request("requestBuildV2").reply::<Template>(202))
        .route(
            &post,
            "/v2/templates/{name}/builds/{build}",
            start,
            op("startBuild", Tag::Templates, "Start a build; a former one of the template is given up")
                .body::<StartBuild>()
                .errors(&[codes::NODE, codes::BASE, own::BUILD, own::START])
                .empty(202),
        )
        .route(
            &get,
            "/templates/{name}/builds/{build}/status",
            status,
            op("getBuildStatus", Tag::Templates, "How far a build is, and what it said")
                .errors(&[own::BUILD])
                .query(&[
                    ("logsOffset", "lines to leave out"),
                    ("limit", "lines, at most 100"),
                    ("level", "the least that is shown: debug, info, warn, error"),
                ])
                .reply::<BuildInfo>(200),
        )
        .route(
            &get,
            "/templates/{name}/builds/{build}/logs",
            logs,
            op("getBuildLogs", Tag::Templates, "What a build said, filtered")
                .errors(&[own::BUILD])
                .query(&[
                    ("cursor", "milliseconds since 1970"),
                    ("limit", "lines, at most 100"),
                    ("direction", "forward or backward"),
                    ("level", "the least that is shown: debug, info, warn, error"),
                    ("source", "temporary or persistent: there is one log"),
                ])
                .reply::<BuildLogs>(200),
        )
        .route(
            &delete,
            "/templates/{name}/builds/{build}",
            cancel,
            op(
                "cancelBuild",
                Tag::Templates,
                "Kelvin: give a build up; nothing of it runs when this replies",
            )
            .errors(&[codes::NODE, own::BUILD, &[ErrorCode::BuildState]])
            .empty(204),
        )
        .route(
            &get,
            "/builds/{build}",
            find,
            op("getBuild", Tag::Templates, "Kelvin: how far a build is, of whatever template")
                .errors(&[own::BUILD])
                .reply::<BuildInfo>(200),
        )
        .route(&Method::PATCH, "/templates/{name}", set_public, update("updateTemplate"))
        .route(&Method::PATCH, "/v2/templates/{name}", set_public, update("updateTemplateV2"))
}

/// What a request for a build says, checked: the template, and the rest.
fn wanted_of(body: NewTemplate) -> Result<(TemplateName, Wanted), Failure> {
    let bad = |text: String| {
        Failure::new(ErrorCode::InvalidName, text, "use 1 to 64 of a-z, 0-9, '.', '_' and '-', and one :tag")
    };
    let text = match (body.name, body.alias) {
        (Some(name), Some(alias)) if name != alias => {
            return Err(bad("name and alias are two names".to_owned()));
        }
        (Some(name), _) | (None, Some(name)) => name,
        (None, None) => return Err(bad("there is no name".to_owned())),
    };
    let (name, tag) = split_tag(&text);
    let template = name.parse().map_err(|error: kelvin_api::id::ParseIdError| bad(error.to_string()))?;
    let mut tags: Vec<String> = tag.map(str::to_owned).into_iter().collect();
    tags.extend(body.tags.unwrap_or_default());
    if !tags.is_empty() {
        tags = parse_tags(tags)?;
    }
    tags.sort();
    tags.dedup();
    let mib = |wanted: Option<u64>| Ok::<_, Failure>(memory_of(wanted)?.map(|mib| mib.0));
    let wanted = Wanted {
        tags,
        vcpus: body.cpu_count,
        memory_mib: mib(body.memory_mb)?,
        disk_mib: mib(body.disk_size_mb)?,
        min_free_mib: mib(body.min_free_disk_mb)?.filter(|free| *free > 0),
        force: body.skip_cache == Some(true),
    };
    if [wanted.vcpus, wanted.memory_mib, wanted.disk_mib].contains(&Some(0)) {
        let text = "cpuCount, memoryMB and diskSizeMB are more than 0";
        return Err(Failure::new(ErrorCode::InvalidShape, text, "leave out what does not matter"));
    }
    Ok((template, wanted))
}

/// Tags as a reply has them: a build without any gets the one that every template has.
fn shown_tags(tags: &[String]) -> Vec<String> {
    if tags.is_empty() { vec![DEFAULT_TAG.to_owned()] } else { tags.to_vec() }
}

fn requested(row: &BuildRow, public: bool) -> RequestedTemplate {
    RequestedTemplate {
        template_id: row.template.clone(),
        build_id: row.id.to_string(),
        public,
        aliases: vec![row.template.clone()],
        names: vec![row.template.clone()],
        tags: shown_tags(&row.wanted.tags),
    }
}

impl Inner {
    /// Notes a build, or finds the one that the same request has made before.
    async fn request_once(
        &self,
        caller: &crate::accounts::Account,
        body: NewTemplate,
        key: Option<Extension<Key>>,
        again: Option<Extension<Again>>,
    ) -> Result<(BuildRow, TemplateOwner), Failure> {
        let made = again.and_then(|Extension(Again(made))| made.into_iter().next());
        let id = match made {
            Some(made) => made,
            None => {
                let (template, wanted) = wanted_of(body)?;
                let key = key.map(|Extension(Key(key))| key);
                self.request_build(caller, template, wanted, key).await?.0.to_string()
            }
        };
        let row = self.own_build(caller, None, &id).await?;
        let owner = self.owners.of(&row.template).ok_or_else(|| unknown_template(&row.template))?;
        Ok((row, owner))
    }
}

async fn request_v3(
    State(control): State<Control>,
    Who(caller): Who,
    key: Option<Extension<Key>>,
    again: Option<Extension<Again>>,
    request: Request,
) -> Outcome {
    let body = parse_required(&read(request).await?)?;
    let (row, owner) = control.inner.request_once(&caller, body, key, again).await?;
    Ok(about(json(StatusCode::ACCEPTED, &requested(&row, owner.public)), &row.template))
}

async fn request_v2(
    State(control): State<Control>,
    Who(caller): Who,
    key: Option<Extension<Key>>,
    again: Option<Extension<Again>>,
    request: Request,
) -> Outcome {
    let body = parse_required(&read(request).await?)?;
    let (row, owner) = control.inner.request_once(&caller, body, key, again).await?;
    Ok(about(json(StatusCode::ACCEPTED, &unbuilt(&row, &owner)), &row.template))
}

/// A template of which there is a build and nothing else yet.
pub(crate) fn unbuilt(row: &BuildRow, owner: &TemplateOwner) -> Template {
    Template {
        template_id: row.template.clone(),
        build_id: row.id.to_string(),
        cpu_count: row.wanted.vcpus.unwrap_or(DEFAULT_SHAPE.0),
        memory_mb: row.wanted.memory_mib.unwrap_or(DEFAULT_SHAPE.1),
        disk_size_mb: row.disk_mib.or(row.wanted.disk_mib).unwrap_or(0),
        public: owner.public,
        aliases: vec![row.template.clone()],
        names: vec![row.template.clone()],
        created_at: owner.created_at,
        updated_at: row.updated_at,
        created_by: None,
        last_spawned_at: None,
        spawn_count: 0,
        build_count: 0,
        envd_version: ENVD_VERSION.to_owned(),
        build_status: status_of(row.state).name().to_owned(),
        snapshots: Vec::new(),
        versions: Vec::new(),
    }
}

/// A build as a list has it.
pub(crate) fn listed(row: &BuildRow) -> TemplateBuild {
    TemplateBuild {
        build_id: row.id.to_string(),
        status: status_of(row.state),
        created_at: row.created_at,
        updated_at: row.updated_at,
        finished_at: row.ended_at,
        cpu_count: row.wanted.vcpus.unwrap_or(DEFAULT_SHAPE.0),
        memory_mb: row.wanted.memory_mib.unwrap_or(DEFAULT_SHAPE.1),
        disk_size_mb: row.disk_mib.or(row.wanted.disk_mib),
        envd_version: ENVD_VERSION.to_owned(),
    }
}

fn status_of(state: BuildState) -> BuildStatus {
    match state {
        BuildState::Requested | BuildState::Waiting => BuildStatus::Waiting,
        BuildState::Building => BuildStatus::Building,
        BuildState::Ready => BuildStatus::Ready,
        BuildState::Error => BuildStatus::Error,
    }
}

async fn start(
    State(control): State<Control>,
    Who(caller): Who,
    Path((name, build)): Path<(String, String)>,
    again: Option<Extension<Again>>,
    request: Request,
) -> Outcome {
    let inner = &control.inner;
    let row = inner.own_build(&caller, Some(&name), &build).await?;
    let mut body: StartBuild = parse_required(&read(request).await?)?;
    if row.state != BuildState::Requested {
        // It was started before the server died.
        return match again {
            Some(_) => Ok(StatusCode::ACCEPTED.into_response()),
            None => Err(wrong_state(&row).into()),
        };
    }
    let all = all_from(&caller, &mut body)?;
    let made = all_steps(&body)?;
    let commands = [command("startCmd", body.start_cmd)?, command("readyCmd", body.ready_cmd)?];
    let kernel = kernel(&caller, body.kernel.as_deref())?;
    let mut stages = Vec::new();
    for (begins, steps) in all.into_iter().zip(made) {
        let from = match begins {
            Begins::Node(from) => from,
            Begins::Template(text) => inner.template_to_build_on(&caller, &text).await?,
        };
        stages.push(BuildStage { from, steps });
    }
    let mut request = Inner::new_request(&row, stages, body.force == Some(true), commands)?;
    request.kernel = kernel;
    inner.start_build(row, request).await?;
    Ok(StatusCode::ACCEPTED.into_response())
}

/// Whether a build was given up, by whomever.
fn was_given_up(row: &BuildRow) -> bool {
    let code = row.error.as_ref().map(|error| error.failure.error_code);
    matches!(code, Some(ErrorCode::BuildCancelled | ErrorCode::BuildInterrupted))
}

async fn cancel(
    State(control): State<Control>,
    Who(caller): Who,
    Path((name, build)): Path<(String, String)>,
    again: Option<Extension<Again>>,
) -> Outcome {
    let row = control.inner.own_build(&caller, Some(&name), &build).await?;
    match control.inner.cancel_build(&row).await {
        // It was given up, or interrupted, before the server died.
        Err(failure)
            if failure.error_code == ErrorCode::BuildState && again.is_some() && was_given_up(&row) => {}
        other => other?,
    }
    Ok(StatusCode::NO_CONTENT.into_response())
}

fn entry(line: BuildLine) -> BuildLogEntry {
    BuildLogEntry {
        timestamp: line.at,
        message: line.message,
        level: line.level,
        step: line.step.map(|step| (step + 1).to_string()),
    }
}

/// The step that failed, as E2B's clients know it.
fn failed_step(error: &BuildError) -> Option<String> {
    if let Some(step) = error.step {
        return Some((step + 1).to_string());
    }
    match error.failure.error_code {
        ErrorCode::InvalidImage
        | ErrorCode::ImageNotFound
        | ErrorCode::ImageRefused
        | ErrorCode::RegistryDenied
        | ErrorCode::RegistryUnavailable => Some("base".to_owned()),
        ErrorCode::BuildStepFailed => Some("finalize".to_owned()),
        _ => None,
    }
}

impl Inner {
    async fn entries(
        &self,
        row: &BuildRow,
        lines: Lines,
        level: LogLevel,
        limit: usize,
    ) -> Result<Vec<BuildLogEntry>, Failure> {
        let found = self.database.build_lines(&row.id, lines, level, limit).await.map_err(database_failed)?;
        Ok(found.into_iter().map(entry).collect())
    }

    async fn reason(&self, row: &BuildRow) -> Result<Option<BuildReason>, Failure> {
        let Some(error) = &row.error else { return Ok(None) };
        let log_entries = self.entries(row, Lines::LastOf(error.step), LogLevel::Debug, REASON_LINES).await?;
        let Failure { error_code, message, cause, remediation, .. } = error.failure.clone();
        let cause = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
        Ok(Some(BuildReason {
            message: format!("{message}{cause}"),
            step: failed_step(error),
            log_entries,
            error_code: Some(error_code.to_string()),
            remediation: Some(remediation),
        }))
    }

    async fn build_info(
        &self,
        row: BuildRow,
        skip: u64,
        level: LogLevel,
        limit: usize,
    ) -> Result<BuildInfo, Failure> {
        let log_entries = self.entries(&row, Lines::Skip(skip), level, limit).await?;
        Ok(BuildInfo {
            reason: self.reason(&row).await?,
            template_id: row.template,
            build_id: row.id.to_string(),
            status: status_of(row.state),
            logs: log_entries.iter().map(|entry| entry.message.clone()).collect(),
            log_entries,
        })
    }
}

/// Which lines are shown, and how many at once, where a request may say so.
fn shown_lines(level: Option<LogLevel>, limit: Option<usize>) -> (LogLevel, usize) {
    (level.unwrap_or(LogLevel::Debug), limit.unwrap_or(LINES).min(LINES))
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StatusQuery {
    logs_offset: Option<u64>,
    limit: Option<usize>,
    level: Option<LogLevel>,
}

async fn status(
    State(control): State<Control>,
    Who(caller): Who,
    Path((name, build)): Path<(String, String)>,
    Query(query): Query<StatusQuery>,
) -> Outcome {
    // The row first: what it says of the end is not newer than the lines.
    let row = control.inner.own_build(&caller, Some(&name), &build).await?;
    let (level, limit) = shown_lines(query.level, query.limit);
    let skip = query.logs_offset.unwrap_or(0);
    Ok(json(StatusCode::OK, &control.inner.build_info(row, skip, level, limit).await?))
}

async fn find(State(control): State<Control>, Who(caller): Who, Path(build): Path<String>) -> Outcome {
    let row = control.inner.own_build(&caller, None, &build).await?;
    Ok(json(StatusCode::OK, &control.inner.build_info(row, 0, LogLevel::Debug, 0).await?))
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Direction {
    Forward,
    Backward,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum LogSource {
    Temporary,
    Persistent,
}

#[derive(Debug, Deserialize)]
struct LogQuery {
    cursor: Option<i64>,
    limit: Option<usize>,
    direction: Option<Direction>,
    level: Option<LogLevel>,
    /// Both are the same log here.
    #[serde(rename = "source")]
    _source: Option<LogSource>,
}

async fn logs(
    State(control): State<Control>,
    Who(caller): Who,
    Path((name, build)): Path<(String, String)>,
    Query(query): Query<LogQuery>,
) -> Outcome {
    let row = control.inner.own_build(&caller, Some(&name), &build).await?;
    let lines = match query.direction.unwrap_or(Direction::Forward) {
        Direction::Forward => Lines::From(query.cursor.unwrap_or(0)),
        Direction::Backward => Lines::Back(query.cursor),
    };
    let (level, limit) = shown_lines(query.level, query.limit);
    let logs = control.inner.entries(&row, lines, level, limit).await?;
    Ok(json(StatusCode::OK, &BuildLogs { logs }))
}

async fn set_public(
    State(control): State<Control>,
    Who(caller): Who,
    Path(name): Path<String>,
    request: Request,
) -> Outcome {
    let body: UpdateTemplate = parse(&read(request).await?)?;
    let inner = &control.inner;
    let _changing = inner.builds.changing.lock().await;
    let owner = inner.owners.of(&name).filter(|_| inner.owners.is_own(&caller.project, &name));
    let owner = owner.ok_or_else(|| unknown_template(&name))?;
    if let Some(public) = body.public {
        let project = caller.project.as_str();
        inner.database.set_template_public(project, &name, public).await.map_err(database_failed)?;
        inner.owners.set(&name, TemplateOwner { public, ..owner });
    }
    Ok(json(StatusCode::OK, &UpdatedTemplate { names: vec![name] }))
}
