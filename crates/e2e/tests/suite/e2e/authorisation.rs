//! Who may do what: keys, projects, tokens, signatures, limits. What is somebody else's is not there.

use std::time::Duration;

use http::{Method, StatusCode};
use kelvin_api::account::NewApiKey;
use kelvin_api::id::Token;
use kelvin_api::sandbox::{AutoResume, NewSandbox};
use kelvin_api::signature::{Operation, sign};
use kelvin_client::{Client, Error};
use kelvin_e2e::{Ground, LIMIT, Server, agent_of, ask, new_sandbox, sh};

fn client_of(server: &Server, key: &str) -> Client {
    Client::new(server.url(), Token::from_secret(key.to_owned())).expect("a URL")
}

fn wanted(name: &str, project: &str) -> NewApiKey {
    NewApiKey { name: name.to_owned(), project: project.parse().expect("a project"), ..NewApiKey::default() }
}

/// Every route that is about one sandbox, with a body that is right.
const SANDBOX_ROUTES: &[(&str, &str, &str)] = &[
    ("GET", "/sandboxes/ID", ""),
    ("POST", "/sandboxes/ID/timeout", r#"{"timeout":60}"#),
    ("POST", "/sandboxes/ID/refreshes", r#"{"duration":60}"#),
    ("POST", "/sandboxes/ID/connect", r#"{"timeout":60}"#),
    ("POST", "/v2/sandboxes/ID/connect", "{}"),
    ("POST", "/sandboxes/ID/pause", "{}"),
    ("POST", "/sandboxes/ID/resume", "{}"),
    ("POST", "/sandboxes/ID/fork", "{}"),
    ("POST", "/sandboxes/ID/promote", ""),
    ("POST", "/sandboxes/ID/snapshots", "{}"),
    ("GET", "/sandboxes/ID/logs", ""),
    ("GET", "/v2/sandboxes/ID/logs", ""),
    ("GET", "/sandboxes/ID/metrics", ""),
    ("GET", "/sandboxes/ID/network", ""),
    ("PUT", "/sandboxes/ID/network", "{}"),
    ("DELETE", "/sandboxes/ID", ""),
];

/// Every route that is for the server's own key.
const ADMIN_ROUTES: &[(&str, &str, &str)] = &[
    ("GET", "/node", ""),
    ("POST", "/gc", ""),
    ("GET", "/pools", ""),
    ("PUT", "/pools/base", "{}"),
    ("GET", "/metrics", ""),
    ("POST", "/templates/base/bake", "{}"),
    (
        "POST",
        "/templates/base/import",
        r#"{"rootfs":"/etc/passwd","kernel":"/etc/passwd","initrd":"/etc/passwd"}"#,
    ),
    ("GET", "/api-keys", ""),
    ("POST", "/api-keys", r#"{"name":"x"}"#),
    ("PATCH", "/api-keys/x", r#"{"name":"y"}"#),
    ("DELETE", "/api-keys/x", ""),
    ("GET", "/audit", ""),
];

fn method(text: &str) -> Method {
    text.parse().expect("a method")
}

/// What `client` is told of sandboxes, or of one.
async fn told(client: &Client, of: Option<&str>) -> Vec<(String, &'static str)> {
    let events = client.events(0, of, 100).await.expect("events");
    events.into_iter().map(|event| (event.sandbox.to_string(), event.what.kind())).collect()
}

#[tokio::test]
async fn what_is_anothers_is_not_there() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("authorisation", &[], 1).await;
    let owner = server.client();
    let (blue, red) = (
        owner.create_key(&wanted("blue", "blue")).await.expect("a key"),
        owner.create_key(&wanted("red", "red")).await.expect("a key"),
    );
    let gone = owner.create_key(&wanted("gone", "blue")).await.expect("a key");
    owner.revoke_key(&gone.info.id).await.expect("it is revoked");
    let (blue_client, red_client) = (client_of(&server, &blue.key), client_of(&server, &red.key));
    let sandbox = blue_client.create(&new_sandbox(), None).await.expect("a sandbox").sandbox;
    let id = sandbox.sandbox_id.to_string();

    // No key, a wrong key, a revoked one: 401. Another project's: 404, in the same words as for one that never was.
    for (verb, path, body) in SANDBOX_ROUTES {
        for key in [None, Some("e2b_0000000000000000000000000000000000000000"), Some(gone.key.as_str())] {
            let headers: Vec<(&str, &str)> = key.map(|key| ("x-api-key", key)).into_iter().collect();
            let (status, reply) =
                ask(&server, &method(verb), &path.replace("ID", &id), &headers, body.to_owned()).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{verb} {path}: {reply}");
            assert!(!reply.contains(&id), "{verb} {path} tells: {reply}");
        }
        let headers = [("x-api-key", red.key.as_str())];
        let (status, foreign) =
            ask(&server, &method(verb), &path.replace("ID", &id), &headers, body.to_owned()).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{verb} {path}: {foreign}");
        let nobody = "aaaaaaaaaaaaaaaaaaaa";
        let (_, never) =
            ask(&server, &method(verb), &path.replace("ID", nobody), &headers, body.to_owned()).await;
        assert_eq!(foreign.replace(&id, nobody), never, "{verb} {path}");
    }
    for (verb, path, body) in ADMIN_ROUTES {
        let headers = [("x-api-key", blue.key.as_str())];
        let (status, reply) = ask(&server, &method(verb), path, &headers, body.to_owned()).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{verb} {path}: {reply}");
        let (status, _) = ask(&server, &method(verb), path, &[], body.to_owned()).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{verb} {path}");
    }
    assert!(red_client.list_all(&[]).await.expect("a list").is_empty());
    assert_eq!(blue_client.list_all(&[]).await.expect("a list").len(), 1);
    let path = format!("/sandboxes/metrics?sandbox_ids={id}");
    let (status, reply) = ask(&server, &Method::GET, &path, &[("x-api-key", &red.key)], "").await;
    assert_eq!((status, reply.as_str()), (StatusCode::OK, r#"{"sandboxes":{}}"#));
    assert_eq!(told(&blue_client, None).await, [(id.clone(), "created")]);
    assert_eq!(told(&owner, Some(&id)).await, [(id.clone(), "created")]);
    assert!(told(&red_client, None).await.is_empty() && told(&red_client, Some(&id)).await.is_empty());
    // Nothing of that has touched it.
    assert_eq!(sh(&agent_of(&blue_client, &sandbox), "echo here").await, "here\n");

    // Snapshots are a project's too: by id and by name.
    let (snapshot, _) = blue_client.snapshot(&id, Some("mine")).await.expect("a snapshot");
    for name in [snapshot.snapshot_id.as_str(), "mine", "mine:default"] {
        let body = NewSandbox { template_id: name.to_owned(), ..new_sandbox() };
        let refused = red_client.create(&body, None).await;
        assert!(matches!(&refused, Err(Error::Refused(error)) if error.code == 404), "{name}: {refused:?}");
        let headers = [("x-api-key", red.key.as_str())];
        for (verb, path) in [
            ("GET", "/templates/aliases/NAME"),
            ("POST", "/snapshots/NAME/verify"),
            ("DELETE", "/snapshots/NAME"),
            ("DELETE", "/templates/NAME"),
        ] {
            let path = path.replace("NAME", name);
            let (status, reply) = ask(&server, &method(verb), &path, &headers, "").await;
            assert_eq!(status, StatusCode::NOT_FOUND, "{verb} {path}: {reply}");
        }
    }
    let copy = NewSandbox { template_id: "mine".into(), ..new_sandbox() };
    let copy = blue_client.create(&copy, None).await.expect("its own").sandbox;
    blue_client.kill(&copy.sandbox_id).await.expect("a kill");
    blue_client.delete_snapshot("mine", false).await.expect("it is deleted");

    // One idempotency key is two in two projects.
    let one = blue_client.create(&new_sandbox(), Some("same")).await.expect("a sandbox").sandbox;
    let other = red_client.create(&new_sandbox(), Some("same")).await.expect("a sandbox").sandbox;
    assert_ne!(one.sandbox_id, other.sandbox_id);

    // Every change is written down, the refused ones too; nothing of a key is.
    let deadline = tokio::time::Instant::now() + LIMIT;
    let log = loop {
        let log = owner.audit(1000).await.expect("the log");
        if log.iter().any(|entry| entry.target == other.sandbox_id.as_str()) {
            break log;
        }
        assert!(tokio::time::Instant::now() < deadline, "it is not written down: {log:?}");
    };
    let has = |key: &str, action: &str, status: u16| {
        log.iter().any(|entry| entry.key_id == key && entry.action == action && entry.status == status)
    };
    assert!(has(&blue.info.id, "POST /v2/sandboxes", 201));
    assert!(has(&red.info.id, "DELETE /sandboxes/{id}", 404));
    assert!(has(&blue.info.id, "POST /gc", 403));
    assert!(has("server", "POST /api-keys", 201));
    let text = serde_json::to_string(&log).expect("JSON");
    assert!(!text.contains(&blue.key) && !text.contains(&red.key));
    for key in [&blue.key, &red.key, &gone.key] {
        assert!(!server.log().contains(key.as_str()), "a key is in the server's log");
    }
    server.stop().await;
}

#[tokio::test]
async fn tokens_and_signatures_open_one_door_each() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("tokens", &[], 2).await;
    let client = server.client();
    let mine = client.create(&new_sandbox(), None).await.expect("a sandbox").sandbox;
    let other = client.create(&new_sandbox(), None).await.expect("a sandbox").sandbox;
    let token = mine.envd_access_token.as_ref().expect("a token").expose().to_owned();
    let foreign = other.envd_access_token.as_ref().expect("a token").expose().to_owned();
    sh(&agent_of(&client, &mine), "echo mine > f; echo more > g").await;
    sh(&agent_of(&client, &other), "echo others > f").await;
    let (mine_id, other_id) = (mine.sandbox_id.to_string(), other.sandbox_id.to_string());
    let to = |id: &str| {
        vec![
            ("e2b-sandbox-id".to_owned(), id.to_owned()),
            ("e2b-sandbox-port".to_owned(), "49983".to_owned()),
        ]
    };
    let get = async |path: &str, id: Option<&str>, token: Option<&str>, verb: Method| {
        let mut headers = id.map(to).unwrap_or_default();
        headers.extend(token.map(|token| ("x-access-token".to_owned(), token.to_owned())));
        let headers: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        ask(&server, &verb, path, &headers, "").await
    };

    // The agent's own token, and no other.
    for path in ["/files?path=f", "/metrics", "/envs"] {
        assert_eq!(get(path, Some(&mine_id), Some(&token), Method::GET).await.0, StatusCode::OK, "{path}");
        for wrong in [None, Some(foreign.as_str()), Some(""), Some("x")] {
            let (status, reply) = get(path, Some(&mine_id), wrong, Method::GET).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{path}: {reply}");
        }
    }
    for path in ["/process.Process/List", "/filesystem.Filesystem/Stat"] {
        let mut headers = to(&mine_id);
        headers.extend([
            ("content-type".to_owned(), "application/json".to_owned()),
            ("x-access-token".to_owned(), foreign.clone()),
        ]);
        let headers: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let (status, reply) = ask(&server, &Method::POST, path, &headers, "{}").await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{reply}");
        assert!(reply.contains(r#""code":"unauthenticated""#), "{reply}");
    }

    // A signature: with the sandbox named or found, for what was signed, until it expires.
    let expiration = |seconds: i64| (jiff::Timestamp::now().as_second() + seconds).to_string();
    let url = |path: &str, operation, user: &str, until: Option<&str>| {
        let signature = sign(path, operation, user, &token, until);
        let signature = signature.replace('+', "%2B").replace('/', "%2F");
        let until = until.map(|until| format!("&signature_expiration={until}")).unwrap_or_default();
        format!("/files?path={path}&username={user}&signature={signature}{until}")
    };
    let later = expiration(60);
    for signed in [url("f", Operation::Read, "user", None), url("f", Operation::Read, "user", Some(&later))] {
        for id in [None, Some(mine_id.as_str())] {
            let (status, reply) = get(&signed, id, None, Method::GET).await;
            assert_eq!((status, reply.as_str()), (StatusCode::OK, "mine\n"), "{signed}");
        }
        for (case, replayed, id, verb) in [
            ("another sandbox", signed.clone(), Some(other_id.as_str()), Method::GET),
            ("another path", signed.replace("path=f", "path=g"), Some(&mine_id), Method::GET),
            ("another user", signed.replace("username=user", "username=root"), Some(&mine_id), Method::GET),
            ("another operation", signed.clone(), Some(&mine_id), Method::POST),
            (
                "no expiration",
                format!("{signed}&signature_expiration={}", expiration(9_999)),
                Some(&mine_id),
                Method::GET,
            ),
        ] {
            let (status, reply) = get(&replayed, id, None, verb).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{case}: {reply}");
            assert_eq!(reply, r#"{"code":401,"message":"invalid signature"}"#, "{case}");
        }
        // A wrong token is not helped by a right signature.
        assert_eq!(
            get(&signed, Some(&mine_id), Some(&foreign), Method::GET).await.0,
            StatusCode::UNAUTHORIZED
        );
    }
    // By the guest's clock, which may be a second behind.
    let (status, reply) =
        get(&url("f", Operation::Read, "user", Some(&expiration(-5))), None, None, Method::GET).await;
    let expired = r#"{"code":401,"message":"signature is already expired"}"#;
    assert_eq!((status, reply.as_str()), (StatusCode::UNAUTHORIZED, expired));
    // A signature that nobody made is like a request without a key.
    let forged = "/files?path=f&username=user&signature=v1_AAAA";
    assert_eq!(get(forged, None, None, Method::GET).await.0, StatusCode::UNAUTHORIZED);

    // The end of a sandbox is the end of its signatures.
    client.kill(&mine.sandbox_id).await.expect("a kill");
    let (status, _) = get(&url("f", Operation::Read, "user", Some(&later)), None, None, Method::GET).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    server.stop().await;
}

#[tokio::test]
async fn a_key_has_its_limits() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("limits", &[], 1).await;
    let owner = server.client();
    let slow = NewApiKey { requests_per_second: Some(2), ..wanted("slow", "limits") };
    let slow = owner.create_key(&slow).await.expect("a key");
    let few = NewApiKey { max_sandboxes: Some(1), ..wanted("few", "limits") };
    let few = owner.create_key(&few).await.expect("a key");

    let get = async |key: &str| ask(&server, &Method::GET, "/v2/sandboxes", &[("x-api-key", key)], "").await;
    let mut refused = 0;
    for _ in 0..6 {
        let (status, reply) = get(&slow.key).await;
        if status == StatusCode::TOO_MANY_REQUESTS {
            assert!(reply.contains("too_many_requests"), "{reply}");
            refused += 1;
        }
    }
    assert!(refused >= 3, "two in a second, not {}", 6 - refused);
    let response =
        kelvin_e2e::send(&server, &Method::GET, "/v2/sandboxes", &[("x-api-key", &slow.key)], "").await;
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    let wait: u64 = response.headers()["retry-after"].to_str().expect("text").parse().expect("seconds");
    assert_eq!(wait, 1);
    tokio::time::sleep(Duration::from_secs(wait)).await;
    assert_eq!(get(&slow.key).await.0, StatusCode::OK, "as it was told");

    let client = client_of(&server, &few.key);
    let body = NewSandbox {
        timeout: Some(60),
        auto_pause: Some(true),
        auto_resume: Some(AutoResume { enabled: true }),
        ..new_sandbox()
    };
    let first = client.create(&body, None).await.expect("the first").sandbox;
    let text = serde_json::to_string(&body).expect("JSON");
    let headers = [("x-api-key", few.key.as_str())];
    let response = kelvin_e2e::send(&server, &Method::POST, "/v2/sandboxes", &headers, text).await;
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    let wait: u64 = response.headers()["retry-after"].to_str().expect("text").parse().expect("seconds");
    assert!((1..=30).contains(&wait), "until the first one ends: {wait}");
    let fork = kelvin_api::sandbox::ForkSandbox::default();
    assert!(
        matches!(client.fork(first.sandbox_id.as_str(), &fork).await, Err(Error::Refused(error)) if error.code == 429)
    );
    // One that is paused does not run; to resume it, there has to be room.
    client.pause(first.sandbox_id.as_str()).await.expect("a pause");
    let second = client.create(&body, None).await.expect("room for another").sandbox;
    assert!(
        matches!(client.resume(first.sandbox_id.as_str(), 20).await, Err(Error::Refused(error)) if error.code == 429)
    );
    // Nor does its traffic make room.
    let token = first.envd_access_token.as_ref().expect("a token").expose();
    let headers = [
        ("e2b-sandbox-id", first.sandbox_id.as_str()),
        ("e2b-sandbox-port", "49983"),
        ("x-access-token", token),
    ];
    let (status, reply) = ask(&server, &Method::GET, "/files?path=/etc/hostname", &headers, "").await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "{reply}");
    assert!(reply.contains("sandboxes that this API key may have run already"), "{reply}");
    client.kill(&second.sandbox_id).await.expect("a kill");
    assert_eq!(sh(&agent_of(&client, &first), "echo awake").await, "awake\n", "room again");
    // Nobody else is held up.
    owner.create(&body, None).await.expect("another key's");
    server.stop().await;
}
