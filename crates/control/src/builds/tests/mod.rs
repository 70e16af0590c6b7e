#![allow(clippy::unwrap_used)]

mod flow;
mod ownership;
mod refusals;
mod versions;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use http::{HeaderMap, StatusCode, header};
use http_body_util::BodyExt as _;
use kelvin_api::account::NewApiKey;
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::FilesHash;
use kelvin_host::clock::Clock;
use kelvin_node_api::{BuildEvent, BuildFailure, BuildLevel};
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::BuildOptions;
use crate::testing::{AskedBuild, ScriptedNode};
use crate::{ApiKey, Control, Undocumented};

const ADMIN: &str = "e2b_0123456789abcdef0123456789abcdef01234567";
/// Longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(30);

/// A control plane over a scripted node, and a key of each of two projects.
struct World {
    dir: tempfile::TempDir,
    node: Arc<ScriptedNode>,
    control: Control,
    router: Router,
    blue: String,
    green: String,
}

/// A reply, read whole.
#[derive(Debug)]
struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    body: Value,
}

impl Reply {
    fn code(&self) -> &str {
        self.body["error_code"].as_str().unwrap_or_default()
    }
}

async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, work).await.expect("it takes too long")
}

async fn control_of(dir: &std::path::Path, node: &Arc<ScriptedNode>, options: BuildOptions) -> Control {
    let path = dir.join("api-key");
    if !path.exists() {
        ApiKey::open(&path).unwrap();
        std::fs::write(&path, ADMIN).unwrap();
    }
    let (key, node) = (ApiKey::open(&path).unwrap(), Arc::clone(node) as _);
    Control::open(dir, node, key, None, Clock::system().unwrap(), options).await.unwrap()
}

async fn world_with(options: BuildOptions) -> World {
    let (dir, node) = (tempfile::tempdir().unwrap(), Arc::new(ScriptedNode::default()));
    let control = control_of(dir.path(), &node, options).await;
    let key = async |project: &str| {
        let wanted =
            NewApiKey { name: project.into(), project: project.parse().unwrap(), ..NewApiKey::default() };
        let made = control.inner.accounts.create(wanted, &control.inner.database).await.unwrap();
        made.key
    };
    let (blue, green) = (key("blue").await, key("green").await);
    World { dir, node, router: control.router(), control, blue, green }
}

async fn world() -> World {
    world_with(BuildOptions::default()).await
}

async fn read(response: axum::response::Response) -> Reply {
    assert_eq!(response.extensions().get::<Undocumented>(), None);
    let (parts, body) = response.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
    Reply { status: parts.status, headers: parts.headers, body }
}

impl World {
    async fn send(&self, request: Request) -> Reply {
        read(soon(self.router.clone().oneshot(request)).await.unwrap()).await
    }

    fn request(key: &str, method: &str, path: &str, body: &Value) -> Request {
        let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
        Request::builder()
            .method(method)
            .uri(path)
            .header("x-api-key", key)
            .header(header::HOST, "kelvin.example:7400")
            .body(body)
            .unwrap()
    }

    async fn ask(&self, key: &str, method: &str, path: &str, body: Value) -> Reply {
        self.send(Self::request(key, method, path, &body)).await
    }

    async fn get(&self, key: &str, path: &str) -> Reply {
        self.ask(key, "GET", path, Value::Null).await
    }

    /// Asks for a build; its id.
    async fn asked(&self, key: &str, name: &str) -> String {
        let reply = self.ask(key, "POST", "/v3/templates", json!({ "name": name })).await;
        assert_eq!(reply.status, StatusCode::ACCEPTED, "{reply:?}");
        reply.body["buildID"].as_str().unwrap().to_owned()
    }

    async fn start(&self, key: &str, name: &str, build: &str, body: Value) -> Reply {
        self.ask(key, "POST", &format!("/v2/templates/{name}/builds/{build}"), body).await
    }

    /// A build that the node has been asked for.
    async fn started(&self, key: &str, text: &str) -> (String, AskedBuild) {
        let build = self.asked(key, text).await;
        let name = crate::versions::split_tag(text).0;
        let reply = self.start(key, name, &build, json!({ "fromImage": "debian" })).await;
        assert_eq!(reply.status, StatusCode::ACCEPTED, "{reply:?}");
        let asked = soon(self.node.next_build()).await;
        assert_eq!(asked.request.build.as_str(), build);
        (build, asked)
    }

    async fn status(&self, key: &str, name: &str, build: &str) -> Value {
        let reply = self.get(key, &format!("/templates/{name}/builds/{build}/status")).await;
        assert_eq!(reply.status, StatusCode::OK, "{reply:?}");
        reply.body
    }

    /// Waits until a build is `wanted`; what is said of it then.
    async fn becomes(&self, key: &str, name: &str, build: &str, wanted: &str) -> Value {
        soon(async {
            loop {
                let status = self.status(key, name, build).await;
                if status["status"] == wanted {
                    return status;
                }
                assert!(!["ready", "error"].contains(&status["status"].as_str().unwrap()), "{status}");
                tokio::task::yield_now().await;
            }
        })
        .await
    }

    /// A template that `key`'s project has built, with an optional tag; the build.
    async fn built(&self, key: &str, text: &str) -> String {
        let (build, asked) = self.started(key, text).await;
        assert!(asked.end(Ok(()), &"cd".repeat(32)));
        self.becomes(key, crate::versions::split_tag(text).0, &build, "ready").await;
        build
    }

    /// Where files are uploaded.
    async fn link(&self, key: &str, name: &str, hash: &FilesHash) -> Value {
        let reply = self.get(key, &format!("/templates/{name}/files/{hash}")).await;
        assert_eq!(reply.status, StatusCode::CREATED, "{reply:?}");
        reply.body
    }

    async fn put(&self, url: &str, body: impl Into<Body>) -> Reply {
        let path = url.strip_prefix("http://kelvin.example:7400").unwrap_or(url);
        self.send(Request::builder().method("PUT").uri(path).body(body.into()).unwrap()).await
    }
}

fn hash(digit: char) -> FilesHash {
    digit.to_string().repeat(64).parse().unwrap()
}

fn event(step: Option<u32>, level: BuildLevel, message: &str) -> BuildEvent {
    BuildEvent { at: jiff::Timestamp::now(), level, step, message: message.to_owned() }
}

fn failure(step: Option<u32>, code: ErrorCode) -> BuildFailure {
    let failure = Failure { cause: Some("exit 3".into()), ..Failure::new(code, "it failed", "mend it") };
    BuildFailure { step, failure }
}
