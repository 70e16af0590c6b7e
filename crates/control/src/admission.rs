//! Before a handler and after it: who asks, how often, what is written down, and the idempotency key.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::{HeaderValue, Method, StatusCode, header};
use kelvin_api::error::{ErrorCode, Failure};

use crate::accounts::Caller;
use crate::audit::Audit;
use crate::control::{Control, Inner};
use crate::once;
use crate::openapi::Documented;
use crate::reply::reply;
use crate::request::{About, Who};

/// The longest wait that a caller who is over a limit is told.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// Routes that write their own idempotency key and audit entry, in the transactions that they have.
const CREATES: [&str; 2] = ["/sandboxes", "/v2/sandboxes"];

/// Routes whose answers are not kept: they tell a secret.
const SECRETS: [&str; 1] = ["/api-keys"];

/// Admits a request and counts it. What could change something runs to its end, whoever leaves, and is written down.
pub(crate) async fn authenticate(
    State(control): State<Control>,
    mut request: Request,
    next: Next,
) -> Response {
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

pub(crate) async fn for_admins(Who(caller): Who, request: Request, next: Next) -> Response {
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

/// A failure that its route does not name (`codes`), in the extensions of the reply: tests look for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Undocumented(pub String);

/// Compares each failure with what its route says that it may be. Callers get it either way.
pub(crate) async fn check_documented(
    State(documented): State<Arc<Documented>>,
    request: Request,
    next: Next,
) -> Response {
    let method = request.method().clone();
    let path = request.extensions().get::<MatchedPath>().cloned();
    let mut response = next.run(request).await;
    let code = response.extensions().get::<ErrorCode>().copied();
    if let (Some(path), Some(code)) = (path, code)
        && !documented.has(&method, path.as_str(), code)
    {
        tracing::error!(%code, "{method} {} does not document this failure", path.as_str());
        response.extensions_mut().insert(Undocumented(format!("{method} {} {code}", path.as_str())));
    }
    response
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use axum::Router;
    use axum::body::Body;
    use axum::middleware::from_fn_with_state;
    use axum::routing::get;
    use kelvin_host::clock::Clock;
    use tower::ServiceExt as _;

    use super::*;
    use crate::openapi::Documented;
    use crate::testing::ScriptedNode;
    use crate::{ApiKey, BuildOptions, api};

    const KEY: &str = "e2b_0123456789abcdef0123456789abcdef01234567";

    fn request(method: &str, path: &str, body: &str, key: &str) -> Request {
        let request = Request::builder().method(method).uri(path).header("x-api-key", key);
        request.body(Body::from(body.to_owned())).unwrap()
    }

    #[tokio::test]
    async fn each_route_names_what_it_refuses_with() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api-key");
        ApiKey::open(&path).unwrap();
        std::fs::write(&path, KEY).unwrap();
        let key = ApiKey::open(&path).unwrap();
        let node = Arc::new(ScriptedNode::default());
        let control =
            Control::open(dir.path(), node, key, None, Clock::system().unwrap(), BuildOptions::default())
                .await
                .unwrap();
        let router = control.router();
        let (mut failures, mut wrong) = (0, Vec::new());
        let id = kelvin_api::id::SandboxId::random().to_string();
        for (path, methods) in api::routes().document()["paths"].as_object().unwrap() {
            let named = path.split('/').map(|part| if part.starts_with('{') { id.as_str() } else { part });
            let named = named.collect::<Vec<_>>().join("/");
            let query = format!(
                "{named}?limit=x&nextToken=x&state=x&order=x&start=x&tag=x&level=x&before=x&metric=x"
            );
            for method in methods.as_object().unwrap().keys() {
                let method = method.to_ascii_uppercase();
                for (path, body, key) in [
                    (&named, "", KEY),
                    (&named, "", "none"),
                    (&named, "{", KEY),
                    (&named, "{\"nothing\": 1}", KEY),
                    (
                        &named,
                        "{\"name\": \"\", \"tags\": [], \"target\": \":\", \"templateID\": \"none\"}",
                        KEY,
                    ),
                    (&query, "", KEY),
                ] {
                    let response = router.clone().oneshot(request(&method, path, body, key)).await.unwrap();
                    failures += u32::from(response.extensions().get::<ErrorCode>().is_some());
                    wrong.extend(response.extensions().get::<Undocumented>().cloned());
                }
            }
        }
        control.stop().await;
        assert!(wrong.is_empty(), "{wrong:#?}");
        assert!(failures > 100, "only {failures} requests were refused");
    }

    #[tokio::test]
    async fn a_failure_that_a_route_does_not_name_is_seen() {
        let documented: Arc<Documented> = Arc::new(api::routes().documented());
        let fails = |code| move || async move { reply(&Failure::new(code, "", "")) };
        for (code, is_seen) in [
            (ErrorCode::NotForked, true),
            (ErrorCode::NodeStopping, false),
            (ErrorCode::WrongApiKey, false),
            (ErrorCode::VmmIo, false),
        ] {
            let router: Router = Router::new()
                .route("/pools", get(fails(code)))
                .layer(from_fn_with_state(Arc::clone(&documented), check_documented));
            let response = router.oneshot(request("GET", "/pools", "", "")).await.unwrap();
            let seen = response.extensions().get::<Undocumented>();
            assert_eq!(seen.is_some(), is_seen, "{code}");
        }
    }
}
