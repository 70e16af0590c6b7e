//! Builds from their request to their end.

use kelvin_node_api::{BuildFrom, Instruction};

use super::*;

#[tokio::test]
async fn a_build_goes_from_its_request_to_its_template() {
    let world = world().await;
    let body = json!({ "name": "web:v1", "tags": ["v2", "v1"], "cpuCount": 3, "memoryMB": 384, "minFreeDiskMb": 100,
        "teamID": "any" });
    let asked = world.ask(&world.blue, "POST", "/v3/templates", body).await;
    assert_eq!(asked.status, StatusCode::ACCEPTED);
    assert_eq!(asked.body["tags"], json!(["v1", "v2"]));
    assert_eq!((&asked.body["templateID"], &asked.body["names"]), (&json!("web"), &json!(["web"])));
    let build = asked.body["buildID"].as_str().unwrap().to_owned();
    assert_eq!(world.status(&world.blue, "web", &build).await["status"], "waiting");
    let alone = world.get(&world.blue, "/templates/web").await;
    assert_eq!((alone.status, &alone.body["buildStatus"]), (StatusCode::OK, &json!("waiting")));

    let link = world.link(&world.blue, "web", &hash('a')).await;
    assert_eq!(link["present"], false);
    let url = link["url"].as_str().unwrap().to_owned();
    assert_eq!(world.put(&url, "a tar").await.status, StatusCode::NO_CONTENT);
    assert_eq!(world.node.uploaded("blue", &hash('a')).unwrap(), b"a tar");
    assert_eq!(world.link(&world.blue, "web", &hash('a')).await["present"], true);
    // Another project's are its own.
    world.asked(&world.green, "other").await;
    assert_eq!(world.link(&world.green, "other", &hash('a')).await["present"], false);

    let start = json!({ "fromImage": "python:3.12", "force": false, "startCmd": "serve", "readyCmd": "",
        "fromImageRegistry": { "type": "registry", "username": "u", "password": "p" },
        "steps": [
            { "type": "COPY", "args": ["app", "/srv", "", ""], "force": false, "filesHash": hash('a'), "forceUpload": true },
            { "type": "RUN", "args": ["make"], "force": true },
        ] });
    let started = world.start(&world.blue, "web", &build, start).await;
    assert_eq!((started.status, started.body), (StatusCode::ACCEPTED, Value::Null));
    let node = soon(world.node.next_build()).await;
    let request = &node.request;
    assert_eq!(
        (request.build.as_str(), request.template.as_str(), request.project.as_str()),
        (&*build, "web", "blue")
    );
    assert_eq!((request.vcpus, request.memory_mib.map(|mib| mib.0)), (Some(3), Some(384)));
    assert_eq!((request.disk_mib, request.min_free_mib.map(|mib| mib.0)), (None, Some(100)));
    assert_eq!(
        (request.start.as_deref(), request.ready.as_deref(), request.force),
        (Some("serve"), None, false)
    );
    let BuildFrom::Image { reference, credentials: Some(login), .. } = &request.from else {
        panic!("{request:?}")
    };
    assert_eq!(
        (reference.as_str(), login.username.as_str(), login.password.expose()),
        ("python:3.12", "u", "p")
    );
    assert!(matches!(request.steps[0].instruction, Instruction::Copy { .. }));
    assert!(request.steps[1].force && !request.steps[0].force);

    world.becomes(&world.blue, "web", &build, "building").await;
    for number in 0..150 {
        let step = (number >= 10).then_some(1);
        node.told.send(event(step, BuildLevel::Info, &format!("line {number}"))).await.unwrap();
    }
    assert!(node.end(Ok(()), &"cd".repeat(32)));
    let done = world.becomes(&world.blue, "web", &build, "ready").await;
    // Whoever sees the end can read all of it, in pages.
    let entries = done["logEntries"].as_array().unwrap();
    assert_eq!((entries.len(), &entries[10]["step"], &entries[0]["step"]), (100, &json!("2"), &Value::Null));
    let path = format!("/templates/web/builds/{build}/status?logsOffset=100");
    let rest = world.get(&world.blue, &path).await.body;
    assert_eq!((rest["logEntries"].as_array().unwrap().len(), &rest["logs"][49]), (50, &json!("line 149")));
    assert_eq!(
        (&done["reason"], &done["templateID"], &done["buildID"]),
        (&Value::Null, &json!("web"), &json!(build))
    );

    let template = world.get(&world.blue, "/templates/web").await.body;
    assert_eq!((&template["buildStatus"], &template["public"]), (&json!("ready"), &json!(false)));
    assert_eq!(template["builds"][0]["buildID"], json!(build));
    assert_eq!(
        (&template["builds"][0]["status"], &template["builds"][0]["cpuCount"]),
        (&json!("ready"), &json!(3))
    );
    let tags = world.get(&world.blue, "/templates/web/tags").await.body;
    let named: Vec<_> =
        tags.as_array().unwrap().iter().map(|tag| (tag["tag"].as_str().unwrap(), &tag["buildID"])).collect();
    assert!(named.contains(&("v1", &json!(build))) && named.contains(&("v2", &json!(build))), "{tags}");
    let alias = world.get(&world.blue, "/templates/aliases/web").await;
    assert_eq!((alias.status, &alias.body["public"]), (StatusCode::OK, &json!(false)));
    world.control.stop().await;
}

#[tokio::test]
async fn a_step_that_failed_is_told_as_the_sdks_show_it() {
    let world = world().await;
    let before = world.built(&world.blue, "web").await;
    for (step, code, shown) in [
        (Some(1), ErrorCode::BuildStepFailed, json!("2")),
        (None, ErrorCode::BuildStepFailed, json!("finalize")),
        (None, ErrorCode::ImageNotFound, json!("base")),
        (None, ErrorCode::DiskFull, Value::Null),
    ] {
        let (build, node) = world.started(&world.blue, "web").await;
        node.told.send(event(Some(0), BuildLevel::Info, "another step")).await.unwrap();
        for at in 0..30 {
            node.told.send(event(step, BuildLevel::Error, &format!("it broke {at}\x1b[0m"))).await.unwrap();
        }
        node.end(Err(failure(step, code)), "");
        let reason = world.becomes(&world.blue, "web", &build, "error").await["reason"].clone();
        assert_eq!((&reason["step"], &reason["message"]), (&shown, &json!("it failed: exit 3")));
        assert_eq!(
            (&reason["errorCode"], &reason["remediation"]),
            (&json!(code.as_str()), &json!("mend it"))
        );
        let lines = reason["logEntries"].as_array().unwrap();
        assert_eq!((lines.len(), &lines[19]["message"]), (20, &json!("it broke 29[0m")));
        assert!(world.node.building() == 0);
    }
    // The template is what it was.
    let tags = world.get(&world.blue, "/templates/web/tags").await.body;
    assert_eq!(tags[0]["buildID"], json!(before));
    let (filtered, build) = (world.get(&world.blue, "/templates/web").await.body, &before);
    assert_eq!(filtered["builds"].as_array().unwrap().len(), 5);
    assert!(filtered["builds"][4]["buildID"] == json!(build));
    let page = world.get(&world.blue, "/templates/web?limit=2").await;
    let next = page.headers["x-next-token"].to_str().unwrap().to_owned();
    assert_eq!(page.body["builds"].as_array().unwrap().len(), 2);
    let page = world.get(&world.blue, &format!("/templates/web?limit=3&nextToken={next}")).await;
    assert_eq!(
        (page.body["builds"][2]["buildID"].clone(), page.headers.get("x-next-token")),
        (json!(before), None)
    );
    world.control.stop().await;
}

#[tokio::test]
async fn logs_are_read_from_both_ends_and_by_level() {
    let world = world().await;
    let (build, node) = world.started(&world.blue, "web").await;
    for (at, level) in
        [(1, BuildLevel::Debug), (2, BuildLevel::Info), (3, BuildLevel::Warn), (4, BuildLevel::Error)]
    {
        let at_ms = jiff::Timestamp::from_millisecond(at).unwrap();
        node.told.send(BuildEvent { at: at_ms, ..event(None, level, &at.to_string()) }).await.unwrap();
    }
    node.end(Ok(()), "i");
    world.becomes(&world.blue, "web", &build, "ready").await;
    let read = async |query: &str| {
        let reply = world.get(&world.blue, &format!("/templates/web/builds/{build}/logs?{query}")).await;
        assert_eq!(reply.status, StatusCode::OK, "{reply:?}");
        let lines = reply.body["logs"].as_array().unwrap().clone();
        lines.iter().map(|line| line["message"].as_str().unwrap()).collect::<Vec<_>>().join("")
    };
    assert_eq!(read("").await, "1234");
    assert_eq!(read("level=warn").await, "34");
    assert_eq!(read("direction=backward&limit=2").await, "43");
    assert_eq!(read("direction=backward&cursor=2").await, "21");
    assert_eq!(read("cursor=3&direction=forward&source=persistent").await, "34");
    assert_eq!(read("limit=0").await, "");
    for wrong in ["direction=up", "level=loud", "source=none", "limit=-1", "cursor=x"] {
        let reply = world.get(&world.blue, &format!("/templates/web/builds/{build}/logs?{wrong}")).await;
        assert_eq!((reply.status, reply.code()), (StatusCode::BAD_REQUEST, "invalid_query"), "{wrong}");
    }
    world.control.stop().await;
}

#[tokio::test]
async fn the_later_of_two_builds_wins_and_waits_for_the_former_to_end() {
    let world = world().await;
    let (first, node) = world.started(&world.blue, "web").await;
    world.becomes(&world.blue, "web", &first, "building").await;
    let second = world.asked(&world.blue, "web").await;
    let reply = world.start(&world.blue, "web", &second, json!({ "fromImage": "a" })).await;
    assert_eq!(reply.status, StatusCode::ACCEPTED);
    soon(node.given_up()).await;
    let later = soon(world.node.next_build()).await;
    assert_eq!(world.node.building(), 1, "the former is over when the later begins");
    let reason = world.becomes(&world.blue, "web", &first, "error").await["reason"].clone();
    assert_eq!(reason["errorCode"], "build_superseded");
    // Three at once: the one between is given up, whether it came to its turn or not.
    let (third, fourth) = (world.asked(&world.blue, "web").await, world.asked(&world.blue, "web").await);
    for build in [&third, &fourth] {
        world.start(&world.blue, "web", build, json!({ "fromImage": "a" })).await;
    }
    soon(later.given_up()).await;
    let last = loop {
        let asked = soon(world.node.next_build()).await;
        if asked.request.build.as_str() == fourth {
            break asked;
        }
        assert_eq!(asked.request.build.as_str(), third);
        soon(asked.given_up()).await;
    };
    assert_eq!(world.node.building(), 1);
    assert!(last.end(Ok(()), "i"));
    world.becomes(&world.blue, "web", &fourth, "ready").await;
    for build in [&second, &third] {
        assert_eq!(
            world.becomes(&world.blue, "web", build, "error").await["reason"]["errorCode"],
            "build_superseded"
        );
    }
    world.control.stop().await;
}

#[tokio::test]
async fn so_many_builds_run_at_once_and_so_many_of_a_project_wait() {
    let world = world_with(BuildOptions { max_builds: 1, ..BuildOptions::default() }).await;
    let (first, node) = world.started(&world.blue, "web").await;
    let mut waiting = Vec::new();
    for number in 1..super::super::run::CAPS.under_way {
        let name = format!("web{number}");
        let build = world.asked(&world.blue, &name).await;
        let reply = world.start(&world.blue, &name, &build, json!({ "fromImage": "a" })).await;
        assert_eq!(reply.status, StatusCode::ACCEPTED, "{reply:?}");
        assert_eq!(world.status(&world.blue, &name, &build).await["status"], "waiting");
        waiting.push((name, build));
    }
    let more = world.asked(&world.blue, "more").await;
    let refused = world.start(&world.blue, "more", &more, json!({ "fromImage": "a" })).await;
    assert_eq!((refused.status, refused.code()), (StatusCode::TOO_MANY_REQUESTS, "too_many_builds"));
    assert_eq!(world.node.building(), 1);
    // One that waits is given up without the node.
    let (name, build) = waiting.remove(0);
    let cancelled =
        world.ask(&world.blue, "DELETE", &format!("/templates/{name}/builds/{build}"), Value::Null).await;
    assert_eq!(cancelled.status, StatusCode::NO_CONTENT);
    assert_eq!(world.status(&world.blue, &name, &build).await["reason"]["errorCode"], "build_cancelled");
    // There is room for one more of the project, and for another project's.
    assert_eq!(
        world.start(&world.blue, "more", &more, json!({ "fromImage": "a" })).await.status,
        StatusCode::ACCEPTED
    );
    let other = world.asked(&world.green, "other").await;
    assert_eq!(
        world.start(&world.green, "other", &other, json!({ "fromImage": "a" })).await.status,
        StatusCode::ACCEPTED
    );
    assert!(node.end(Ok(()), "i"));
    world.becomes(&world.blue, "web", &first, "ready").await;
    let next = soon(world.node.next_build()).await;
    assert_eq!(next.request.build.as_str(), waiting[0].1, "in the order of their starts");
    world.control.stop().await;
    assert_eq!(world.node.building(), 0);
}

#[tokio::test]
async fn a_build_is_cancelled_in_each_of_its_states() {
    let world = world().await;
    let cancel = async |build: &str| {
        world.ask(&world.blue, "DELETE", &format!("/templates/web/builds/{build}"), Value::Null).await
    };
    let never_started = world.asked(&world.blue, "web").await;
    assert_eq!(cancel(&never_started).await.status, StatusCode::NO_CONTENT);
    let late = world.start(&world.blue, "web", &never_started, json!({ "fromImage": "a" })).await;
    assert_eq!((late.status, late.code()), (StatusCode::CONFLICT, "build_state"));
    let (running, node) = world.started(&world.blue, "web").await;
    let twice = world.start(&world.blue, "web", &running, json!({ "fromImage": "a" })).await;
    assert_eq!((twice.status, twice.code()), (StatusCode::CONFLICT, "build_state"));
    assert_eq!(cancel(&running).await.status, StatusCode::NO_CONTENT);
    assert_eq!(world.node.building(), 0, "nothing of it runs when that is replied");
    soon(node.given_up()).await;
    let status = world.status(&world.blue, "web", &running).await;
    assert_eq!(
        (&status["status"], &status["reason"]["errorCode"]),
        (&json!("error"), &json!("build_cancelled"))
    );
    let ready = world.built(&world.blue, "web").await;
    for build in [&running, &ready] {
        let refused = cancel(build).await;
        assert_eq!((refused.status, refused.code()), (StatusCode::CONFLICT, "build_state"));
    }
    // The same, of a client that does not know its answer, for the server died.
    for (build, status) in [(&running, StatusCode::NO_CONTENT), (&ready, StatusCode::CONFLICT)] {
        let path = format!("/templates/web/builds/{build}");
        let forgotten = crate::database::NewKey {
            key: format!("blue:{build}"),
            fingerprint: kelvin_api::digest::sha256(format!("DELETE {path}\n").as_bytes()),
            subjects: Vec::new(),
        };
        assert!(world.control.inner.database.add_key_of(forgotten).await.unwrap());
        let mut request = World::request(&world.blue, "DELETE", &path, &Value::Null);
        request.headers_mut().insert("idempotency-key", build.parse().unwrap());
        assert_eq!(world.send(request).await.status, status);
    }
    let unknown = cancel(&kelvin_api::id::BuildId::random().to_string()).await;
    assert_eq!((unknown.status, unknown.code()), (StatusCode::NOT_FOUND, "build_not_found"));
    world.control.stop().await;
}

#[tokio::test]
async fn a_build_is_cancelled_once_though_the_node_does_not_know_it_yet() {
    let world = world().await;
    let build = world.asked(&world.blue, "web").await;
    let held = world.node.hold_builds().await;
    world.start(&world.blue, "web", &build, json!({ "fromImage": "a" })).await;
    world.becomes(&world.blue, "web", &build, "building").await;
    let path = format!("/templates/web/builds/{build}");
    let cancelling = world.ask(&world.blue, "DELETE", &path, Value::Null);
    let coming = async {
        while world.node.cancels(&build) == 0 {
            tokio::task::yield_now().await;
        }
        drop(held);
    };
    let (cancelled, ()) = soon(async { futures::join!(cancelling, coming) }).await;
    assert_eq!(cancelled.status, StatusCode::NO_CONTENT, "{cancelled:?}");
    assert_eq!((world.node.cancels(&build), world.node.building()), (1, 0));
    assert_eq!(
        world.status(&world.blue, "web", &build).await["reason"]["errorCode"],
        json!("build_cancelled")
    );
    world.control.stop().await;
}

#[tokio::test]
async fn what_a_build_says_is_bounded() {
    let world = world().await;
    let (build, node) = world.started(&world.blue, "web").await;
    for _ in 0..20_010 {
        node.told.send(event(None, BuildLevel::Info, "x")).await.unwrap();
    }
    node.end(Ok(()), "i");
    world.becomes(&world.blue, "web", &build, "ready").await;
    let tail = async |build: &str| {
        let path = format!("/templates/web/builds/{build}/logs?direction=backward&limit=1");
        world.get(&world.blue, &path).await.body["logs"][0]["message"].as_str().unwrap().to_owned()
    };
    let count = async |build: &str, offset: u64| {
        let path = format!("/templates/web/builds/{build}/status?logsOffset={offset}");
        world.get(&world.blue, &path).await.body["logs"].as_array().unwrap().len()
    };
    assert!(tail(&build).await.starts_with("the log ends here"));
    assert_eq!((count(&build, 19_999).await, count(&build, 20_000).await), (1, 0));
    let (build, node) = world.started(&world.blue, "web").await;
    let long = "y".repeat(1 << 20);
    for _ in 0..400 {
        node.told.send(event(None, BuildLevel::Info, &long)).await.unwrap();
    }
    node.end(Ok(()), "i");
    world.becomes(&world.blue, "web", &build, "ready").await;
    assert!(tail(&build).await.starts_with("the log ends here"));
    // Of each line 16 KiB and a sign are kept: 5 MiB are 319 of them.
    assert_eq!((count(&build, 319).await, count(&build, 320).await), (1, 0));
    world.control.stop().await;
}

#[tokio::test]
async fn a_build_goes_on_when_its_client_leaves() {
    let world = world().await;
    let build = world.asked(&world.blue, "web").await;
    let path = format!("/v2/templates/web/builds/{build}");
    let request = World::request(&world.blue, "POST", &path, &json!({ "fromImage": "a" }));
    let mut leaving = Box::pin(world.router.clone().oneshot(request));
    // Once the request is on a task of its own, its client is gone.
    assert!(futures::poll!(&mut leaving).is_pending());
    drop(leaving);
    let node = soon(world.node.next_build()).await;
    assert!(node.end(Ok(()), "i"), "somebody waits for its end");
    world.becomes(&world.blue, "web", &build, "ready").await;
    let entries = world.get(ADMIN, "/audit?limit=10").await.body;
    let entry = entries
        .as_array()
        .unwrap()
        .iter()
        .find(|entry| entry["action"].as_str().unwrap().contains("{build}"));
    assert_eq!(
        (&entry.unwrap()["target"], &entry.unwrap()["status"]),
        (&json!("web"), &json!(202)),
        "{entries}"
    );
    world.control.stop().await;
}

#[tokio::test]
async fn a_restart_ends_what_was_under_way_and_keeps_the_rest() {
    let mut world = world().await;
    let ready = world.built(&world.blue, "web").await;
    let (running, node) = world.started(&world.blue, "web").await;
    let never_started = world.asked(&world.blue, "web").await;
    // A server that is told to stop has its builds given up.
    soon(world.control.stop()).await;
    soon(node.given_up()).await;
    world.control = control_of(world.dir.path(), &world.node, BuildOptions::default()).await;
    world.router = world.control.router();
    assert_eq!(world.status(&world.blue, "web", &running).await["reason"]["errorCode"], "build_interrupted");
    assert_eq!(world.status(&world.blue, "web", &ready).await["status"], "ready");
    assert_eq!(world.status(&world.blue, "web", &never_started).await["status"], "waiting");
    let foreign = world.get(&world.green, "/templates/web").await;
    assert_eq!(foreign.status, StatusCode::NOT_FOUND);
    // One that died left rows.
    world.start(&world.blue, "web", &never_started, json!({ "fromImage": "a" })).await;
    let node = soon(world.node.next_build()).await;
    let survivor = control_of(world.dir.path(), &world.node, BuildOptions::default()).await;
    soon(node.given_up()).await;
    let path = format!("/templates/web/builds/{never_started}/status");
    let request = World::request(&world.blue, "GET", &path, &Value::Null);
    let status = read(survivor.router().oneshot(request).await.unwrap()).await.body;
    assert_eq!(
        (&status["status"], &status["reason"]["errorCode"]),
        (&json!("error"), &json!("build_interrupted"))
    );
    survivor.stop().await;
    world.control.stop().await;
}
