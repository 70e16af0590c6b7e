//! Teams (our projects), API keys and the audit log.

use axum::extract::{Request, State};
use axum::response::IntoResponse;
use http::{Method, StatusCode};
use kelvin_api::account::{
    ApiKeyInfo, AuditEntry, CreatedApiKey, DEFAULT_PROJECT, Limits, NewApiKey, Project, ProjectInfo,
};
use kelvin_api::error::{ErrorCode, Failure};
use serde::{Deserialize, Serialize};

use crate::accounts::shown;
use crate::control::Control;
use crate::failures::database_failed;
use crate::openapi::{Api, Tag, op};
use crate::request::{Outcome, Path, Query, Who, about, json, parse_required, read};

/// Entries of the audit log that are given at once.
const AUDIT_PAGE: usize = 1000;
/// Routes of everybody.
pub(crate) fn routes() -> Api {
    Api::new().route(
        &Method::GET,
        "/teams",
        teams,
        op("listTeams", Tag::Access, "The project of the key").reply::<Vec<Team>>(200),
    )
}

/// Routes of the server's own key.
pub(crate) fn admin() -> Api {
    Api::new()
        .route(
            &Method::GET,
            "/api-keys",
            keys,
            op("listApiKeys", Tag::Access, "API keys")
                .query(&[("project", "Kelvin: only of this project")])
                .reply::<Vec<ApiKeyInfo>>(200),
        )
        .route(
            &Method::POST,
            "/api-keys",
            create_key,
            op("createApiKey", Tag::Access, "Make an API key; it is told this once")
                .errors(&[&[ErrorCode::InvalidName, ErrorCode::InvalidLimit]])
                .secret()
                .body::<NewApiKey>()
                .reply::<CreatedApiKey>(201),
        )
        .route(
            &Method::PATCH,
            "/api-keys/{id}",
            rename_key,
            op("renameApiKey", Tag::Access, "Rename an API key")
                .errors(&[&[ErrorCode::KeyNotFound, ErrorCode::InvalidName]])
                .body::<Rename>()
                .empty(200),
        )
        .route(
            &Method::DELETE,
            "/api-keys/{id}",
            revoke_key,
            op("revokeApiKey", Tag::Access, "Revoke an API key")
                .errors(&[&[ErrorCode::KeyNotFound]])
                .empty(204),
        )
        .route(
            &Method::GET,
            "/projects",
            projects,
            op("listProjects", Tag::Access, "Kelvin: projects, what they may have and what they use")
                .reply::<Vec<ProjectInfo>>(200),
        )
        .route(
            &Method::PUT,
            "/projects/{name}",
            limit_project,
            op(
                "setProjectLimits",
                Tag::Access,
                "Kelvin: set what all keys of a project may have together; what is left out has no limit",
            )
            .errors(&[&[ErrorCode::InvalidProject, ErrorCode::InvalidLimit]])
            .body::<Limits>()
            .reply::<ProjectInfo>(200),
        )
        .route(
            &Method::GET,
            "/audit",
            audit,
            op("listAuditEntries", Tag::Access, "Kelvin: who changed what, newest first")
                .query(&[("before", "the last id of the page before"), ("limit", "entries, at most 1000")])
                .reply::<Vec<AuditEntry>>(200),
        )
}

/// A project, as E2B's clients know one. Source: E2B's `Team`.
#[derive(Debug, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
struct Team {
    /// Id of the project: its name.
    #[serde(rename = "teamID")]
    team_id: Project,
    /// Name of the project.
    name: Project,
    /// The key that the request showed.
    api_key: String,
    /// Whether it is the project of keys that name none.
    is_default: bool,
}

/// The one project of the caller's key. Source: E2B's `Team`; the key is the one that was shown.
async fn teams(Who(caller): Who, request: Request) -> Outcome {
    let key = shown(request.headers()).unwrap_or_default();
    let team = Team {
        team_id: caller.project.clone(),
        name: caller.project.clone(),
        api_key: key.to_owned(),
        is_default: caller.project.as_str() == DEFAULT_PROJECT,
    };
    Ok(json(StatusCode::OK, &[team]))
}

#[derive(Debug, Deserialize)]
struct KeyQuery {
    project: Option<Project>,
}

async fn keys(State(control): State<Control>, Query(query): Query<KeyQuery>) -> Outcome {
    let inner = &control.inner;
    Ok(json(StatusCode::OK, &inner.accounts.list(query.project.as_ref(), &inner.database).await?))
}

async fn create_key(State(control): State<Control>, request: Request) -> Outcome {
    let wanted: NewApiKey = parse_required(&read(request).await?)?;
    let made = control.inner.accounts.create(wanted, &control.inner.database).await?;
    Ok(about(json(StatusCode::CREATED, &made), &made.info.id))
}

fn no_key(id: &str) -> Failure {
    let shown: String = id.chars().take(80).collect();
    let remedy = "`kelvin key list` shows which there are";
    Failure::new(ErrorCode::KeyNotFound, format!("no API key {shown:?}"), remedy)
}

/// `PATCH /api-keys/{id}`.
#[derive(Debug, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Rename {
    /// The new name: 1 to 120 characters.
    name: String,
}

async fn rename_key(State(control): State<Control>, Path(id): Path<String>, request: Request) -> Outcome {
    let body: Rename = parse_required(&read(request).await?)?;
    match control.inner.accounts.rename(&id, &body.name, &control.inner.database).await? {
        true => Ok(StatusCode::OK.into_response()),
        false => Err(no_key(&id).into()),
    }
}

async fn revoke_key(State(control): State<Control>, Path(id): Path<String>) -> Outcome {
    match control.inner.accounts.revoke(&id, &control.inner.database).await? {
        true => Ok(StatusCode::NO_CONTENT.into_response()),
        false => Err(no_key(&id).into()),
    }
}

async fn projects(State(control): State<Control>) -> Outcome {
    Ok(json(StatusCode::OK, &control.inner.database.projects().await.map_err(database_failed)?))
}

async fn limit_project(
    State(control): State<Control>,
    Path(name): Path<String>,
    request: Request,
) -> Outcome {
    let project: Project = name
        .parse()
        .map_err(|error: &str| Failure::new(ErrorCode::InvalidProject, error, "for example team-1"))?;
    let limits: Limits = parse_required(&read(request).await?)?;
    let inner = &control.inner;
    Ok(json(StatusCode::OK, &inner.accounts.limit_project(&project, limits, &inner.database).await?))
}

#[derive(Debug, Deserialize)]
struct AuditQuery {
    before: Option<i64>,
    limit: Option<usize>,
}

/// The newest entries first; `before` is the id of the last one of the page before.
async fn audit(State(control): State<Control>, Query(query): Query<AuditQuery>) -> Outcome {
    let limit = query.limit.unwrap_or(AUDIT_PAGE).min(AUDIT_PAGE);
    let entries = control.inner.database.audit(query.before, limit).await.map_err(database_failed)?;
    Ok(json(StatusCode::OK, &entries))
}
