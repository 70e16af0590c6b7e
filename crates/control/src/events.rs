//! What became of sandboxes, for who asks. Nothing is written here.

use axum::extract::State;
use http::{Method, StatusCode};
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::event::Event;
use serde::Deserialize;

use crate::control::Control;
use crate::database::Which;
use crate::failures::database_failed;
use crate::openapi::{Api, Tag, op};
use crate::request::{Outcome, Query, Who, json};

/// Events that are given at once.
const PAGE: usize = 1000;

/// The routes.
pub(crate) fn routes() -> Api {
    Api::new().route(
        &Method::GET,
        "/events",
        events,
        op(
            "listEvents",
            Tag::Sandboxes,
            "Kelvin: what became of sandboxes, also of those that are no more, oldest first",
        )
        .query(&[
            ("after", "only those behind this number: the id of the last one that was seen"),
            ("sandbox", "only of this sandbox"),
            ("limit", "events, at most 1000"),
        ])
        .reply::<Vec<Event>>(200),
    )
}

#[derive(Debug, Deserialize)]
struct EventQuery {
    after: Option<i64>,
    sandbox: Option<String>,
    limit: Option<usize>,
}

/// Those of the caller's project; for the server's own key those of all.
async fn events(
    State(control): State<Control>,
    Who(caller): Who,
    Query(query): Query<EventQuery>,
) -> Outcome {
    let sandbox = query.sandbox.map(|id| id.parse()).transpose().map_err(|_| {
        Failure::new(ErrorCode::InvalidQuery, "sandbox is not the id of one", "leave it out, or name one")
    })?;
    let which = Which {
        after: query.after.unwrap_or(0),
        project: (!caller.is_admin).then(|| caller.project.clone()),
        sandbox,
        limit: query.limit.unwrap_or(PAGE).min(PAGE),
    };
    let database = &control.inner.database;
    let found = database.events(which).await.map_err(database_failed)?;
    // A number that was told is not given again: not after a power failure, either.
    if !found.is_empty() {
        database.flush().await.map_err(database_failed)?;
    }
    Ok(json(StatusCode::OK, &found))
}
