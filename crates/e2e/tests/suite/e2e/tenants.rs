//! Clients that leave, tenants that race, requests that are repeated.

use std::time::Duration;

use futures::future::join_all;
use http::{Method, StatusCode};
use kelvin_api::account::{AuditEntry, Limits, NewApiKey};
use kelvin_api::id::Token;
use kelvin_api::sandbox::{ForkSandbox, Sandbox, SandboxState};
use kelvin_client::{Client, Error};
use kelvin_e2e::{Ground, Server, agent_of, ask, new_sandbox, sh};
use tokio::io::AsyncWriteExt;

fn client_of(server: &Server, key: &str) -> Client {
    Client::new(server.url(), Token::from_secret(key.to_owned())).expect("a URL")
}

async fn key(server: &Server, project: &str, limits: Limits) -> String {
    let wanted = NewApiKey {
        name: project.to_owned(),
        project: project.parse().expect("a project"),
        max_sandboxes: limits.max_sandboxes,
        max_creating: limits.max_creating,
        max_paused: limits.max_paused,
        max_snapshots: limits.max_snapshots,
        max_disk_mib: limits.max_disk_mib,
        ..NewApiKey::default()
    };
    server.client().create_key(&wanted).await.expect("a key").key
}

fn code_of<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    match result {
        Err(Error::Refused(error)) => error.error_code.unwrap_or_default(),
        other => panic!("it was not refused: {other:?}"),
    }
}

/// Sends a request and leaves after a while, without an answer.
async fn leave(server: &Server, key: &str, path: &str, body: &str, after: Duration) {
    let address = server.url().trim_start_matches("http://").to_owned();
    let mut stream = tokio::net::TcpStream::connect(&address).await.expect("a connection");
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: {address}\r\nx-api-key: {key}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.expect("a write");
    // This is the client's patience.
    tokio::time::sleep(after).await;
}

/// The audit log of what `project` asked for, when nothing of it is under way any more.
async fn settled_audit(server: &Server, project: &str, count: usize) -> Vec<AuditEntry> {
    let client = server.client();
    for _ in 0..200 {
        let log = client.audit(1000).await.expect("a log");
        let found: Vec<_> = log.into_iter().filter(|entry| entry.project == project).collect();
        if found.len() >= count && found.iter().all(|entry| entry.status != 0) {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("requests of {project} are still under way: {:?}", client.audit(1000).await);
}

#[tokio::test]
async fn what_a_client_leaves_behind_has_an_owner_and_an_entry() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("tenants-leave", &[], 2).await;
    let secret = key(&server, "blue", Limits::default()).await;
    let blue = client_of(&server, &secret);
    let sandbox = blue.create(&new_sandbox(), None).await.expect("a create").sandbox;
    let path = format!("/sandboxes/{}/snapshots", sandbox.sandbox_id);
    let patience = [0, 2, 5, 20, 60].map(Duration::from_millis);
    for after in patience {
        leave(&server, &secret, &path, "{}", after).await;
    }
    let body = serde_json::to_string(&new_sandbox()).expect("JSON");
    for after in patience {
        leave(&server, &secret, "/sandboxes", &body, after).await;
    }
    // One that left before it was read has asked for nothing; whatever was asked for was done, and is written down.
    let log = settled_audit(&server, "blue", 1 + 8).await;
    let done =
        |action: &str| log.iter().filter(|entry| entry.action == action && entry.status == 201).count();
    let (taken, made) = (done("POST /sandboxes/{id}/snapshots"), done("POST /sandboxes"));
    println!("{taken} snapshots and {made} creates of clients that left");
    assert!(taken >= 4 && made >= 4, "{log:?}");
    assert_eq!(blue.snapshots().await.expect("a list").len(), taken, "each has its owner");
    assert_eq!(blue.list_all(&[]).await.expect("a list").len(), 1 + made);
    // Nobody else's: the server's own key is of the project `default`.
    assert_eq!(server.client().snapshots().await.expect("a list"), []);
    // Refusals are written down too, with what they were about.
    code_of(blue.resume("nosuch", 10).await);
    let log = settled_audit(&server, "blue", log.len() + 1).await;
    assert!(log.iter().any(|entry| entry.status == 404 && entry.target == "nosuch"), "{log:?}");
    server.stop().await;
}

#[tokio::test]
async fn limits_hold_for_requests_that_come_at_once() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("tenants-limits", &[], 3).await;
    let one = Limits { max_sandboxes: Some(1), ..Limits::default() };
    let red = client_of(&server, &key(&server, "red", one).await);
    let mut paused: Vec<Sandbox> = Vec::new();
    for _ in 0..3 {
        let made = red.create(&new_sandbox(), None).await.expect("a create").sandbox;
        red.pause(made.sandbox_id.as_str()).await.expect("a pause");
        paused.push(made);
    }
    let resumed = join_all(paused.iter().map(|sandbox| red.resume(sandbox.sandbox_id.as_str(), 60))).await;
    assert_eq!(resumed.iter().filter(|result| result.is_ok()).count(), 1, "{resumed:?}");
    let connected = join_all(paused.iter().map(|sandbox| red.connect(sandbox.sandbox_id.as_str(), 60))).await;
    assert_eq!(connected.iter().filter(|result| result.is_ok()).count(), 1, "the one that runs");
    let body = new_sandbox();
    let creates = join_all((0..3).map(|_| red.create(&body, None))).await;
    for create in creates {
        assert_eq!(code_of(create), "too_many_sandboxes");
    }

    // Each of the others, by name, with what is in use.
    let few = Limits {
        max_paused: Some(1),
        max_snapshots: Some(1),
        max_disk_mib: Some(100_000),
        ..Limits::default()
    };
    let green = client_of(&server, &key(&server, "green", few).await);
    let (first, second) = (
        green.create(&new_sandbox(), None).await.expect("a create").sandbox,
        green.create(&new_sandbox(), None).await.expect("a create").sandbox,
    );
    let ids = [first.sandbox_id.as_str(), second.sandbox_id.as_str()];
    let taken = join_all(ids.map(|id| green.snapshot(id, None))).await;
    assert_eq!(taken.iter().filter(|result| result.is_ok()).count(), 1, "{taken:?}");
    let halted = join_all(ids.map(|id| green.pause(id))).await;
    assert_eq!(halted.iter().filter(|result| result.is_ok()).count(), 1, "{halted:?}");
    assert!(halted.into_iter().filter_map(Result::err).any(|error| error.to_string().contains("1 of the 1")));
    let green_project = "green".parse().expect("a project");
    let owner = server.client();
    let info = owner.limit_project(&green_project, &Limits::default()).await.expect("limits");
    assert_eq!((info.used.sandboxes, info.used.paused, info.used.snapshots), (1, 1, 1));
    // The whole project's: for another key of it too.
    let tight = Limits { max_disk_mib: Some(info.used.disk_mib), ..Limits::default() };
    owner.limit_project(&green_project, &tight).await.expect("limits");
    let other = client_of(&server, &key(&server, "green", Limits::default()).await);
    assert_eq!(code_of(other.create(&new_sandbox(), None).await), "too_much_disk");
    let fork = ForkSandbox { count: Some(2), ..ForkSandbox::default() };
    let running = if green.sandbox(ids[0]).await.expect("it").state == SandboxState::Running { 0 } else { 1 };
    assert_eq!(code_of(green.fork(ids[running], &fork).await), "too_much_disk");
    owner.limit_project(&green_project, &Limits::default()).await.expect("limits");
    other.create(&new_sandbox(), None).await.expect("room again");
    server.stop().await;
}

/// Asks for a change with an idempotency key, and gives status and body.
async fn with_key(
    server: &Server,
    method: &Method,
    path: &str,
    key: &str,
    body: &str,
) -> (StatusCode, String) {
    let own = server.key();
    let headers = [("x-api-key", own.as_str()), ("idempotency-key", key)];
    ask(server, method, path, &headers, body.to_owned()).await
}

#[tokio::test]
async fn a_request_that_is_repeated_gets_the_first_answer() {
    let Some(ground) = Ground::find() else { return };
    let mut server = ground.baked("tenants-again", &[], 2).await;
    let client = server.client();
    let made = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
    let id = made.sandbox_id.as_str();
    let post = Method::POST;
    let steps = [
        ("fork", Method::POST, format!("/sandboxes/{id}/fork"), r#"{"count":2,"timeout":300}"#, 201),
        ("snapshot", Method::POST, format!("/sandboxes/{id}/snapshots"), r#"{"name":"again"}"#, 201),
        ("pause", Method::POST, format!("/sandboxes/{id}/pause"), "{}", 204),
        ("resume", Method::POST, format!("/sandboxes/{id}/resume"), r#"{"timeout":300}"#, 201),
        ("kill", Method::DELETE, format!("/sandboxes/{id}"), "", 204),
    ];
    let mut answers = Vec::new();
    for (name, method, path, body, status) in &steps {
        // At once: one does it, the other gets its answer.
        let (first, again) = tokio::join!(
            with_key(&server, method, path, name, body),
            with_key(&server, method, path, name, body)
        );
        assert_eq!((first.0.as_u16(), &first), (*status, &again), "{name}");
        answers.push(first);
    }
    assert_eq!(client.list_all(&[]).await.expect("a list").len(), 2, "the children of one fork");
    assert_eq!(client.snapshots().await.expect("a list").len(), 1);
    server.kill_9();
    server.start(&["--waiting-vmms", "0"]).await;
    for ((name, method, path, body, _), first) in steps.iter().zip(&answers) {
        assert_eq!(with_key(&server, method, path, name, body).await, *first, "{name} after a restart");
    }
    // Another request with a key that was used is refused, and so is one that would have to keep a secret.
    let other = with_key(&server, &post, &format!("/sandboxes/{id}/fork"), "fork", r#"{"count":3}"#).await;
    assert!(other.0 == StatusCode::CONFLICT && other.1.contains("idempotency_key_reused"), "{other:?}");
    let secret = with_key(&server, &post, "/api-keys", "secret", r#"{"name":"x"}"#).await;
    assert!(secret.0 == StatusCode::BAD_REQUEST && secret.1.contains("unsupported_header"), "{secret:?}");
    server.client().delete_snapshot("again", false).await.expect("a removal");
    server.stop().await;
}

#[tokio::test]
async fn a_kill_wins_and_everything_else_takes_its_turn() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("tenants-turns", &[], 2).await;
    let client = server.client();
    let idle = server.settle().await.memory_reserved_mb;
    // A kill beside a resume, at several instants of it: it has ended, whoever was first.
    for after in [0, 5, 20, 60] {
        let made = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
        let id = made.sandbox_id.as_str();
        client.pause(id).await.expect("a pause");
        let kill = async {
            tokio::time::sleep(Duration::from_millis(after)).await;
            client.kill(&made.sandbox_id).await
        };
        let (resumed, killed) = tokio::join!(client.resume(id, 60), kill);
        killed.unwrap_or_else(|error| panic!("a kill {after} ms after a resume: {error}"));
        println!("killed {after} ms after a resume, which came to {}", resumed.is_ok());
        assert_eq!(code_of(client.sandbox(id).await), "sandbox_not_found");
    }
    let node = server.node_when("nothing runs", |node| node.sandboxes == 0 && node.settled).await;
    assert_eq!((node.paused, node.memory_reserved_mb), (0, idle), "{node:?}");

    // What comes during a pause waits for it, and finds what it left: never nothing.
    let made = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
    let id = made.sandbox_id.as_str();
    let fork = ForkSandbox { count: Some(1), timeout: Some(60), ..ForkSandbox::default() };
    for _ in 0..3 {
        let (paused, connected) = tokio::join!(client.pause(id), client.connect(id, 60));
        paused.expect("a pause");
        connected.expect("it runs, before the pause or after it");
        client.connect(id, 60).await.expect("it runs");
        let (paused, forked) = tokio::join!(client.pause(id), client.fork(id, &fork));
        paused.expect("a pause");
        forked.expect("of what runs or of what is paused");
        let (resumed, taken) = tokio::join!(client.resume(id, 60), client.snapshot(id, None));
        resumed.expect("a resume");
        let (info, _) = taken.expect("of what runs or of what is paused");
        client.delete_snapshot(&info.snapshot_id, false).await.expect("a removal");
        let (paused, set) = tokio::join!(client.pause(id), client.set_timeout(&made.sandbox_id, 60));
        paused.expect("a pause");
        if let Err(error) = set {
            assert!(error.to_string().contains("is paused"), "{error}");
        }
        client.resume(id, 60).await.expect("a resume");
    }
    assert_eq!(
        sh(&agent_of(&client, &client.connect(id, 60).await.expect("it runs")), "echo ok").await,
        "ok\n"
    );
    server.stop().await;
}
