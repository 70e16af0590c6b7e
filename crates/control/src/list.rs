//! Lists of sandboxes, and what all lists have in common: pages.

use axum::extract::State;
use axum::response::Response;
use http::{HeaderValue, Method, StatusCode};
use kelvin_api::account::Project;
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::sandbox::{Metadata, SandboxDetail, SandboxState};
use serde::Deserialize;

use crate::accounts::Caller;
use crate::admission::not_an_admin;
use crate::codes;
use crate::control::Control;
use crate::database::Filter;
use crate::openapi::{Api, Tag, op};
use crate::request::{Outcome, Query, Who, json};

/// Rows of a page that asks for no number, and the most. Source: E2B's OpenAPI, `paginationLimit`.
const ROWS: usize = 100;
/// Pairs of metadata in one filter.
const MAX_PAIRS: usize = 64;
/// Parameters of every list that has pages.
pub(crate) const PAGE: &[(&str, &str)] =
    &[("limit", "rows of a page, at most 100"), ("nextToken", "X-Next-Token of the page before")];
/// Parameters of a list of sandboxes.
const LIST: &[(&str, &str)] = &[
    ("metadata", "pairs key=value, encoded, joined by &"),
    ("state", "running, paused, or both, joined by a comma"),
    ("order", "asc or desc, by start"),
    ("startedAfter", "RFC 3339"),
    ("template", "only of this template"),
    ("project", "Kelvin: of another project, or * for all; for the server's own key"),
];

/// The routes.
pub(crate) fn routes() -> Api {
    let get = Method::GET;
    Api::new()
        .route(
            &get,
            "/sandboxes",
            list_running,
            op("listSandboxes", Tag::Sandboxes, "Sandboxes that run")
                .errors(&[codes::PAGES, codes::NODE, &[ErrorCode::NotAnAdmin, ErrorCode::InvalidProject]])
                .query(LIST)
                .query(PAGE)
                .reply::<Vec<SandboxDetail>>(200),
        )
        .route(
            &get,
            "/v2/sandboxes",
            list,
            op("listSandboxesV2", Tag::Sandboxes, "Sandboxes, running and paused")
                .errors(&[codes::PAGES, codes::NODE, &[ErrorCode::NotAnAdmin, ErrorCode::InvalidProject]])
                .query(LIST)
                .query(PAGE)
                .reply::<Vec<SandboxDetail>>(200),
        )
}

fn not_allowed(field: &str, text: &str, remedy: &str) -> Failure {
    let shown: String = text.chars().take(80).collect();
    Failure::new(ErrorCode::InvalidQuery, format!("{field}={shown:?} is not allowed"), remedy)
}

/// How many rows a page has.
///
/// # Errors
/// `Invalid` for what is no number, or too many.
pub(crate) fn page_limit(text: Option<&String>) -> Result<usize, Failure> {
    let Some(text) = text else {
        return Ok(ROWS);
    };
    let number = text.parse().ok().filter(|limit| (1..=ROWS).contains(limit));
    number.ok_or_else(|| not_allowed("limit", text, "1 to 100"))
}

/// A page that says where the next one begins.
pub(crate) fn with_next(mut response: Response, next: Option<String>) -> Response {
    if let Some(next) = next.and_then(|next| HeaderValue::from_str(&next).ok()) {
        response.headers_mut().insert("x-next-token", next);
    }
    response
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
    /// Kelvin: for the server's own key.
    project: Option<String>,
}

/// The pairs of a filter. Clients encode keys and values, then the pairs as a form, and both are undone here, as E2B's
/// server does; the query string's own encoding was undone before. Source: E2B's clients, `SandboxQuery`.
fn metadata_filter(text: &str) -> Result<Metadata, Failure> {
    let once = |part: &str| {
        percent_encoding::percent_decode_str(&part.replace('+', " ")).decode_utf8_lossy().into_owned()
    };
    let decode = |part: &str| once(&once(part));
    let pairs: Metadata = text
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(key, value)| (decode(key), decode(value)))
        .collect();
    if pairs.len() > MAX_PAIRS {
        let text = format!("metadata names {} pairs", pairs.len());
        return Err(Failure::new(ErrorCode::InvalidQuery, text, format!("ask for at most {MAX_PAIRS}")));
    }
    Ok(pairs)
}

impl ListQuery {
    fn filter(&self, project: Option<Project>) -> Result<Filter, Failure> {
        let limit = page_limit(self.limit.as_ref())?;
        let ascending = match self.order.as_deref() {
            None | Some("desc") => false,
            Some("asc") => true,
            Some(other) => return Err(not_allowed("order", other, "asc or desc")),
        };
        let started_after = match &self.started_after {
            None => None,
            Some(text) => {
                Some(text.parse().map_err(|_| not_allowed("startedAfter", text, "an RFC 3339 time"))?)
            }
        };
        Ok(Filter {
            project,
            metadata: self.metadata.as_deref().map(metadata_filter).transpose()?.unwrap_or_default(),
            template: self.template.clone(),
            state: None,
            started_after,
            ascending,
            after: None,
            limit,
        })
    }

    /// Whose sandboxes are wanted: the caller's, or what the server's own key asks for (`*` is everybody's).
    fn of_project(&self, caller: &Caller) -> Result<Option<Project>, Failure> {
        match self.project.as_deref() {
            None => Ok(Some(caller.project.clone())),
            Some(_) if !caller.is_admin => Err(not_an_admin()),
            Some("*") => Ok(None),
            Some(name) => name.parse().map(Some).map_err(|_| not_allowed("project", name, "a project, or *")),
        }
    }

    /// The one state that is wanted; none when both are.
    fn wanted_state(&self) -> Result<Option<SandboxState>, Failure> {
        let (mut running, mut paused) = (false, false);
        for state in self.state.as_deref().unwrap_or("running,paused").split(',') {
            match state {
                "running" => running = true,
                "paused" => paused = true,
                other => return Err(not_allowed("state", other, "running or paused")),
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
async fn list_running(state: State<Control>, who: Who, Query(query): Query<ListQuery>) -> Outcome {
    list(state, who, Query(ListQuery { state: Some("running".to_owned()), ..query })).await
}

async fn list(State(control): State<Control>, Who(caller): Who, Query(query): Query<ListQuery>) -> Outcome {
    let filter = Filter { state: query.wanted_state()?, ..query.filter(query.of_project(&caller)?)? };
    let page = control.inner.list(filter, query.next_token.as_deref()).await?;
    Ok(with_next(json(StatusCode::OK, &page.sandboxes), page.next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_encode_comes_back() {
        use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode as encode};
        for value in ["blue", "blue green", "a+b", "100%", "%20", "a=b&c", "\u{fc}\u{1f600}", "", "a/b?c#d"] {
            let twice = |text: &str| {
                encode(&encode(text, NON_ALPHANUMERIC).to_string(), NON_ALPHANUMERIC).to_string()
            };
            let text = format!("{}={}&x=y", twice(value), twice(value));
            let pairs = metadata_filter(&text).unwrap();
            assert_eq!(pairs.get(value).map(String::as_str), Some(value), "{text}");
            assert_eq!(pairs.get("x").map(String::as_str), Some("y"));
        }
        // By hand: a form, or nothing encoded at all.
        assert_eq!(metadata_filter("team=blue+green").unwrap()["team"], "blue green");
        assert_eq!(metadata_filter("team=blue%20green").unwrap()["team"], "blue green");
    }
}
