//! The console of a sandbox, as its log.

use axum::extract::State;
use http::{Method, StatusCode};
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::sandbox::{LogLevel, SandboxLogEntry, SandboxLogs};
use serde::{Deserialize, Serialize};

use crate::codes;
use crate::control::Control;
use crate::openapi::{Api, Tag, op};
use crate::request::{Outcome, Own, Query, json};

/// Log entries that are given at once. Source: E2B's OpenAPI.
const LOG_ENTRIES: usize = 1000;

/// The routes.
pub(crate) fn routes() -> Api {
    let get = Method::GET;
    Api::new()
        .route(
            &get,
            "/sandboxes/{id}/logs",
            logs,
            op("getSandboxLogs", Tag::Sandboxes, "The console of a sandbox")
                .errors(&[codes::SANDBOX, codes::STATE, codes::NODE])
                .query(&[("start", "milliseconds since 1970"), ("limit", "lines")])
                .reply::<SandboxLogs>(200),
        )
        .route(
            &get,
            "/v2/sandboxes/{id}/logs",
            log_entries,
            op("getSandboxLogsV2", Tag::Sandboxes, "The console of a sandbox, filtered")
                .errors(&[codes::SANDBOX, codes::STATE, codes::NODE])
                .query(&[
                    ("cursor", "milliseconds since 1970"),
                    ("limit", "entries, at most 1000"),
                    ("direction", "forward or backward"),
                    ("level", "the least that is shown: debug, info, warn, error"),
                    ("search", "only with this text in them"),
                ])
                .reply::<LogPage>(200),
        )
}

/// The reply of `GET /v2/sandboxes/{id}/logs`.
#[derive(Debug, Serialize, schemars::JsonSchema)]
struct LogPage {
    /// Entries, in the order that was asked for.
    logs: Vec<SandboxLogEntry>,
}

#[derive(Debug, Deserialize)]
struct OldLogQuery {
    start: Option<i64>,
    limit: Option<usize>,
}

async fn logs(
    State(control): State<Control>,
    Own { id, .. }: Own,
    Query(query): Query<OldLogQuery>,
) -> Outcome {
    let mut found = control.inner.logs(&id).await?;
    let (start, limit) = (query.start.unwrap_or(0), query.limit.unwrap_or(LOG_ENTRIES));
    found.logs.retain(|line| line.timestamp.as_millisecond() >= start);
    found.log_entries.retain(|entry| entry.timestamp.as_millisecond() >= start);
    found.logs.truncate(limit);
    found.log_entries.truncate(limit);
    Ok(json(StatusCode::OK, &found))
}

#[derive(Debug, Deserialize)]
struct LogQuery {
    cursor: Option<i64>,
    limit: Option<usize>,
    direction: Option<String>,
    level: Option<LogLevel>,
    search: Option<String>,
}

async fn log_entries(
    State(control): State<Control>,
    Own { id, .. }: Own,
    Query(query): Query<LogQuery>,
) -> Outcome {
    let backward = match query.direction.as_deref() {
        None | Some("forward") => false,
        Some("backward") => true,
        Some(_) => {
            return Err(Failure::new(
                ErrorCode::InvalidQuery,
                "direction is not allowed",
                "forward or backward",
            )
            .into());
        }
    };
    let mut entries = control.inner.logs(&id).await?.log_entries;
    if backward {
        entries.reverse();
    }
    let after = |entry: &SandboxLogEntry| {
        let at = entry.timestamp.as_millisecond();
        query.cursor.is_none_or(|cursor| if backward { at <= cursor } else { at >= cursor })
    };
    entries.retain(|entry| {
        after(entry)
            && query.level.is_none_or(|level| entry.level >= level)
            && query.search.as_ref().is_none_or(|text| entry.message.contains(text.as_str()))
    });
    entries.truncate(query.limit.unwrap_or(LOG_ENTRIES).min(LOG_ENTRIES));
    Ok(json(StatusCode::OK, &LogPage { logs: entries }))
}
