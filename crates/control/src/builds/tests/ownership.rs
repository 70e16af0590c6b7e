//! Whose templates and builds are.

use super::*;

async fn names(world: &World, key: &str, path: &str) -> Vec<String> {
    let found = world.get(key, path).await.body;
    found.as_array().unwrap().iter().map(|row| row["templateID"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn another_projects_template_is_not_there() {
    let world = world().await;
    world.node.has_template("base");
    let build = world.built(&world.blue, "web").await;
    let taken = world.ask(&world.green, "POST", "/v3/templates", json!({ "name": "web" })).await;
    assert_eq!((taken.status, taken.code()), (StatusCode::CONFLICT, "name_taken"));
    for path in ["/templates", "/v2/templates", "/default-templates"] {
        assert_eq!(names(&world, &world.blue, path).await, ["base", "web"]);
        assert_eq!(names(&world, &world.green, path).await, ["base"]);
    }
    let own = world.asked(&world.green, "own").await;
    let status = format!("/templates/web/builds/{build}/status");
    for (method, path, body) in [
        ("GET", "/templates/web", Value::Null),
        ("GET", "/templates/web/tags", Value::Null),
        ("GET", "/templates/aliases/web", Value::Null),
        ("GET", &format!("/templates/web/files/{}", hash('a')), Value::Null),
        ("GET", &status, Value::Null),
        ("GET", &format!("/builds/{build}"), Value::Null),
        ("GET", &format!("/templates/own/builds/{build}/status"), Value::Null),
        ("DELETE", &format!("/templates/web/builds/{build}"), Value::Null),
        ("DELETE", "/templates/web", Value::Null),
        ("PATCH", "/templates/web", json!({ "public": true })),
        ("POST", "/sandboxes", json!({ "templateID": "web" })),
        ("POST", "/templates/tags", json!({ "target": "web", "tags": ["x"] })),
        ("DELETE", "/templates/tags", json!({ "name": "web", "tags": ["x"] })),
        ("POST", &format!("/v2/templates/web/builds/{build}"), json!({ "fromImage": "a" })),
        ("POST", &format!("/v2/templates/own/builds/{own}"), json!({ "fromTemplate": "web" })),
    ] {
        let reply = world.ask(&world.green, method, path, body).await;
        assert_eq!(reply.status, StatusCode::NOT_FOUND, "{method} {path}: {reply:?}");
    }
    assert_eq!(world.get(&world.blue, &format!("/builds/{build}")).await.body["templateID"], "web");
    // Until its project says otherwise.
    let told = world.ask(&world.blue, "PATCH", "/v2/templates/web", json!({ "public": true })).await;
    assert_eq!((told.status, &told.body["names"]), (StatusCode::OK, &json!(["web"])));
    assert_eq!(names(&world, &world.green, "/templates").await, ["base", "web"]);
    let seen = world.get(&world.green, "/templates/web").await.body;
    assert_eq!((&seen["public"], &seen["builds"][0]["buildID"]), (&json!(true), &json!(build)));
    assert_eq!(world.get(&world.green, &status).await.status, StatusCode::NOT_FOUND);
    let reply = world.start(&world.green, "own", &own, json!({ "fromTemplate": "web" })).await;
    assert_eq!(reply.status, StatusCode::ACCEPTED, "{reply:?}");
    world.control.stop().await;
}

#[tokio::test]
async fn what_was_imported_is_everybodys_and_its_name_is_taken() {
    let world = world().await;
    world.node.has_template("base");
    for key in [&world.blue, ADMIN] {
        let taken = world.ask(key, "POST", "/v3/templates", json!({ "name": "base" })).await;
        assert_eq!(taken.code(), "name_taken", "{taken:?}");
    }
    assert_eq!(world.get(&world.green, "/templates/base").await.body["builds"][0]["status"], "ready");
    let build = world.asked(&world.blue, "own").await;
    let reply = world.start(&world.blue, "own", &build, json!({ "fromTemplate": "base" })).await;
    assert_eq!(reply.status, StatusCode::ACCEPTED);
    assert!(soon(world.node.next_build()).await.end(Ok(()), "i"));
    assert_eq!(
        world.ask(&world.blue, "DELETE", "/templates/base", Value::Null).await.status,
        StatusCode::NOT_FOUND
    );
    assert_eq!(
        world.ask(ADMIN, "DELETE", "/templates/base", Value::Null).await.status,
        StatusCode::NO_CONTENT
    );
    assert_eq!(
        world.ask(ADMIN, "DELETE", "/templates/base", Value::Null).await.status,
        StatusCode::NOT_FOUND
    );
    // An import does not replace what a project has built.
    world.built(&world.blue, "web").await;
    let body = json!({ "rootfs": "/a", "kernel": "/b", "initrd": "/c" });
    let refused = world.ask(ADMIN, "POST", "/templates/web/import", body).await;
    assert_eq!((refused.status, refused.code()), (StatusCode::CONFLICT, "name_taken"));
    world.control.stop().await;
}

#[tokio::test]
async fn a_template_that_is_deleted_leaves_nothing_and_its_name_is_free() {
    let world = world().await;
    let build = world.built(&world.blue, "web").await;
    let tagged =
        world.ask(&world.blue, "POST", "/templates/tags", json!({ "target": "web", "tags": ["v1"] })).await;
    assert_eq!((tagged.status, &tagged.body["buildID"]), (StatusCode::CREATED, &json!(build)));
    let (running, node) = world.started(&world.blue, "web").await;
    let gone = world.ask(&world.blue, "DELETE", "/templates/web", Value::Null).await;
    assert_eq!(gone.status, StatusCode::NO_CONTENT);
    soon(node.given_up()).await;
    for build in [&build, &running] {
        assert_eq!(world.get(&world.blue, &format!("/builds/{build}")).await.status, StatusCode::NOT_FOUND);
    }
    assert_eq!(world.get(&world.blue, "/templates/web").await.status, StatusCode::NOT_FOUND);
    assert_eq!(
        world.ask(&world.blue, "DELETE", "/templates/web", Value::Null).await.status,
        StatusCode::NOT_FOUND
    );
    world.built(&world.green, "web").await;
    let tags = world.get(&world.green, "/templates/web/tags").await.body;
    assert_eq!(tags.as_array().unwrap().len(), 1, "{tags}");
    // One that was never built.
    world.asked(&world.blue, "never").await;
    assert_eq!(
        world.ask(&world.blue, "DELETE", "/templates/never", Value::Null).await.status,
        StatusCode::NO_CONTENT
    );
    world.asked(&world.green, "never").await;
    world.control.stop().await;
}

#[tokio::test]
async fn the_same_request_with_the_same_key_is_one_build() {
    let world = world().await;
    let send = async |path: &str, body: &Value, key: &str| {
        let mut request = World::request(&world.blue, "POST", path, body);
        request.headers_mut().insert("idempotency-key", key.parse().unwrap());
        world.send(request).await
    };
    let wanted = json!({ "name": "web" });
    let (first, again) =
        (send("/v3/templates", &wanted, "k").await, send("/v3/templates", &wanted, "k").await);
    assert_eq!((first.status, &first.body), (StatusCode::ACCEPTED, &again.body));
    let build = first.body["buildID"].as_str().unwrap().to_owned();
    // As if the server had died before it had kept the answer.
    let forgotten = crate::database::NewKey {
        key: "blue:k2".into(),
        fingerprint: kelvin_api::digest::sha256(format!("POST /v3/templates\n{wanted}").as_bytes()),
        subjects: vec![build.clone()],
    };
    assert!(world.control.inner.database.add_key_of(forgotten).await.unwrap());
    assert_eq!(send("/v3/templates", &wanted, "k2").await.body, first.body);
    let path = format!("/v2/templates/web/builds/{build}");
    let start = json!({ "fromImage": "a" });
    assert_eq!(send(&path, &start, "s").await.status, StatusCode::ACCEPTED);
    assert_eq!(send(&path, &start, "s").await.status, StatusCode::ACCEPTED);
    let node = soon(world.node.next_build()).await;
    assert_eq!(world.node.building(), 1);
    node.end(Ok(()), "i");
    world.becomes(&world.blue, "web", &build, "ready").await;
    let entries = world.get(ADMIN, "/audit?limit=10").await.body;
    let seen: Vec<_> =
        entries.as_array().unwrap().iter().map(|entry| (&entry["action"], &entry["target"])).collect();
    assert!(seen.contains(&(&json!("POST /v3/templates"), &json!("web"))), "{seen:?}");
    world.control.stop().await;
}

#[tokio::test]
async fn a_template_that_became_another_projects_meanwhile_is_not_deleted() {
    let world = world().await;
    world.built(&world.blue, "web").await;
    let inner = &world.control.inner;
    // Another delete is before this one: it has begun, and its turn has not come.
    let changing = inner.builds.changing.lock().await;
    let request = World::request(&world.blue, "DELETE", "/templates/web", &Value::Null);
    let deleting = tokio::spawn(world.router.clone().oneshot(request));
    let audited = async || {
        let entries = world.get(ADMIN, "/audit?limit=10").await.body;
        entries.as_array().unwrap().iter().any(|entry| entry["action"] == "DELETE /templates/{name}")
    };
    soon(async {
        while !audited().await {
            tokio::task::yield_now().await;
        }
        // Between its entry and its turn it waits for nothing but this thread.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let owner = crate::database::TemplateOwner {
        project: "green".into(),
        public: false,
        created_at: jiff::Timestamp::UNIX_EPOCH,
        default: None,
    };
    inner.owners.set("web", owner);
    drop(changing);
    let gone = read(soon(deleting).await.unwrap().unwrap()).await;
    assert_eq!(gone.status, StatusCode::NOT_FOUND, "{gone:?}");
    assert_eq!(world.get(&world.green, "/templates/web").await.status, StatusCode::OK);
    world.control.stop().await;
}

#[tokio::test]
async fn no_project_takes_the_name_of_an_import_that_is_under_way() {
    let world = world().await;
    let held = world.node.hold_imports().await;
    let body = json!({ "rootfs": "/a", "kernel": "/b", "initrd": "/c" });
    let importing = tokio::spawn(world.router.clone().oneshot(World::request(
        ADMIN,
        "POST",
        "/templates/new/import",
        &body,
    )));
    soon(world.node.importing()).await;
    let taken = world.ask(&world.blue, "POST", "/v3/templates", json!({ "name": "new" })).await;
    assert_eq!((taken.status, taken.code()), (StatusCode::CONFLICT, "name_taken"));
    drop(held);
    // The scripted node imports nothing: the name is free again.
    assert!(!soon(importing).await.unwrap().unwrap().status().is_success());
    world.asked(&world.blue, "new").await;
    world.control.stop().await;
}
