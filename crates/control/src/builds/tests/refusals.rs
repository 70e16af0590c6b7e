//! What is refused, and how uploads are let in.

use kelvin_api::signature::{Operation, sign};

use super::*;

/// A body that comes in pieces, says no length, and may break off.
fn in_pieces(pieces: Vec<Result<&'static str, std::io::ErrorKind>>) -> Body {
    Body::from_stream(futures::stream::iter(
        pieces.into_iter().map(|piece| piece.map_err(std::io::Error::from)),
    ))
}

#[tokio::test]
async fn bad_requests_for_builds_are_refused_by_name() {
    let world = world().await;
    for (body, status, code) in [
        (json!({}), 400, "invalid_name"),
        (json!({ "name": "" }), 400, "invalid_name"),
        (json!({ "name": "A" }), 400, "invalid_name"),
        (json!({ "name": "../a" }), 400, "invalid_name"),
        (json!({ "name": "team/a" }), 400, "invalid_name"),
        (json!({ "name": "a", "alias": "b" }), 400, "invalid_name"),
        (json!({ "name": "a:" }), 400, "invalid_tag"),
        (json!({ "name": "a:b:c" }), 400, "invalid_tag"),
        (json!({ "name": "a", "tags": ["X"] }), 400, "invalid_tag"),
        (json!({ "name": "a", "tags": vec!["x"; 101] }), 400, "invalid_tags"),
        (json!({ "name": "a", "cpuCount": 0 }), 400, "invalid_shape"),
        (json!({ "name": "a", "memoryMB": 0 }), 400, "invalid_shape"),
        (json!({ "name": "a", "memoryMB": u64::MAX }), 400, "invalid_shape"),
        (json!({ "name": "a", "diskSizeMB": 0 }), 400, "invalid_shape"),
        (json!({ "name": "a", "minFreeDiskMb": u64::MAX }), 400, "invalid_shape"),
        (json!({ "name": "a", "cpuCount": -1 }), 400, "invalid_request"),
        (json!({ "name": "a", "dockerfile": "FROM a" }), 400, "invalid_request"),
        (json!(1), 400, "invalid_request"),
    ] {
        for path in ["/v3/templates", "/v2/templates"] {
            let reply = world.ask(&world.blue, "POST", path, body.clone()).await;
            assert_eq!((reply.status.as_u16(), reply.code()), (status, code), "{body}");
            assert!(!reply.body["remediation"].as_str().unwrap().is_empty());
        }
    }
    assert!(world.control.inner.database.template_owners().await.unwrap().is_empty());
    let old = world.ask(&world.blue, "POST", "/v2/templates", json!({ "alias": "web", "cpuCount": 2 })).await;
    assert_eq!(
        (old.status, &old.body["cpuCount"], &old.body["templateID"]),
        (StatusCode::ACCEPTED, &json!(2), &json!("web"))
    );
    let same =
        world.ask(&world.blue, "POST", "/v3/templates", json!({ "name": "web", "alias": "web" })).await;
    assert_eq!((same.status, &same.body["tags"]), (StatusCode::ACCEPTED, &json!(["default"])));
    world.control.stop().await;
}

#[tokio::test]
async fn bad_starts_are_refused_before_anything_is_started() {
    let world = world().await;
    let build = world.asked(&world.blue, "web").await;
    let step = |step: Value| json!({ "fromImage": "a", "steps": [{ "type": "USER", "args": ["a"] }, step] });
    let run = json!({ "type": "RUN", "args": ["true"] });
    for (body, status, code) in [
        (json!({}), 400, "invalid_image"),
        (json!({ "fromImage": "a", "fromTemplate": "base" }), 400, "invalid_image"),
        (json!({ "fromImage": "a b" }), 400, "invalid_image"),
        (json!({ "fromTemplate": "nothing" }), 404, "template_not_found"),
        (json!({ "fromTemplate": "web" }), 404, "template_not_found"),
        (json!({ "fromLayout": "/a" }), 403, "not_an_admin"),
        (json!({ "fromArchive": "/a" }), 403, "not_an_admin"),
        (json!({ "fromImage": "localhost:5000/a" }), 403, "not_an_admin"),
        (json!({ "fromImage": "a", "fromImageRegistry": { "type": "none" } }), 400, "invalid_request"),
        (
            json!({ "fromImage": "a", "fromImageRegistry": { "type": "aws", "awsAccessKeyId": "a", "awsSecretAccessKey": "b",
            "awsRegion": "c" } }),
            400,
            "unsupported_field",
        ),
        (
            json!({ "fromTemplate": "base", "fromImageRegistry": { "type": "registry", "username": "", "password": "" } }),
            400,
            "invalid_image",
        ),
        (json!({ "fromStage": 0 }), 400, "invalid_step"),
        (json!({ "scratch": true, "fromImage": "a" }), 400, "invalid_image"),
        (json!({ "fromImage": "a", "stages": [{ "steps": [] }] }), 400, "invalid_image"),
        (json!({ "fromImage": "a", "stages": [{ "fromLayout": "/a" }] }), 403, "not_an_admin"),
        (json!({ "fromStage": 0, "stages": [{ "fromStage": 0 }] }), 400, "invalid_step"),
        (json!({ "fromStage": 0, "stages": vec![json!({ "scratch": true }); 65] }), 400, "invalid_step"),
        (json!({ "fromStage": 0, "stages": [{ "fromTemplate": "nothing" }] }), 404, "template_not_found"),
        (json!({ "fromImage": "a", "startCmd": "a\u{0}b" }), 400, "invalid_step"),
        (json!({ "fromImage": "a", "steps": "none" }), 400, "invalid_request"),
        (json!({ "fromImage": "a", "kernels": "none" }), 400, "invalid_request"),
        (json!({ "fromImage": "a", "kernel": "/boot/vmlinuz" }), 403, "not_an_admin"),
        (json!({ "fromImage": "a", "steps": vec![run.clone(); 1001] }), 400, "invalid_step"),
        (step(json!({ "type": "EXPOSE", "args": ["1"] })), 400, "invalid_step"),
        (step(json!({ "type": "RUN" })), 400, "invalid_step"),
        (step(json!({ "type": "RUN", "args": [1] })), 400, "invalid_request"),
        (step(json!({ "args": ["a"] })), 400, "invalid_request"),
        (step(json!({ "type": "COPY", "args": ["a", "b"] })), 400, "invalid_step"),
        (step(json!({ "type": "COPY", "args": ["a", "b"], "filesHash": hash('b') })), 400, "files_missing"),
    ] {
        let reply = world.start(&world.blue, "web", &build, body.clone()).await;
        assert_eq!((reply.status.as_u16(), reply.code()), (status, code), "{body}: {reply:?}");
        if ["invalid_step", "files_missing"].contains(&code)
            && body["steps"].as_array().is_some_and(|all| all.len() == 2)
        {
            assert!(reply.body["message"].as_str().unwrap().starts_with("step 2 ("), "{reply:?}");
        }
    }
    assert_eq!(world.status(&world.blue, "web", &build).await["status"], "waiting");
    assert_eq!(world.node.building(), 0);
    for odd in ["x", "../../status", &build.to_uppercase()] {
        let reply = world.start(&world.blue, "web", odd, json!({ "fromImage": "a" })).await;
        assert_eq!(reply.status, StatusCode::NOT_FOUND, "{odd}");
    }
    let admins = world.asked(ADMIN, "local").await;
    let reply = world.start(ADMIN, "local", &admins, json!({ "fromImage": "a", "kernel": "vmlinuz" })).await;
    assert_eq!((reply.status, reply.code()), (StatusCode::BAD_REQUEST, "invalid_file"), "{reply:?}");
    let local = json!({ "fromLayout": "/images/a", "kernel": "/boot/vmlinuz" });
    let reply = world.start(ADMIN, "local", &admins, local).await;
    assert_eq!(reply.status, StatusCode::ACCEPTED, "{reply:?}");
    world.control.stop().await;
}

#[tokio::test]
async fn an_upload_is_let_in_by_what_was_signed_alone() {
    let world = world_with(BuildOptions { max_upload_bytes: 8, ..BuildOptions::default() }).await;
    world.asked(&world.blue, "web").await;
    let link = world.link(&world.blue, "web", &hash('a')).await;
    let url = link["url"].as_str().unwrap().strip_prefix("http://kelvin.example:7400").unwrap().to_owned();
    let refused = async |url: &str| {
        let reply = world.put(url, "a").await;
        (reply.status.as_u16(), reply.code().to_owned())
    };
    let wrong = (401, "wrong_api_key".to_owned());
    let a = hash('a').to_string();
    let uri: http::Uri = url.parse().unwrap();
    let parts = kelvin_api::signature::query(&uri).unwrap();
    for (old, new) in [
        (a.as_str(), hash('b').as_str()),
        ("project=blue", "project=green"),
        (&format!("key={}", parts["key"].replace('-', "%2D")), "key=server"),
        (&format!("expires={}", parts["expires"]), "expires=99999999999"),
        ("signature=v1", "signature=v2"),
    ] {
        assert!(url.contains(old), "{url} {old}");
        assert_eq!(refused(&url.replacen(old, new, 1)).await, wrong, "{old}");
    }
    assert_eq!(refused(&format!("/uploads/{a}")).await, (400, "invalid_query".to_owned()));
    assert_eq!(refused(&url.replacen(&a, "x", 1)).await, (400, "invalid_path".to_owned()));
    let read = world.send(Request::builder().uri(&*url).body(Body::empty()).unwrap()).await;
    assert_eq!((read.status, read.code()), (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed"));
    // It was right an hour ago.
    let secret = world.control.inner.upload_secret.expose();
    let by = format!("blue/{}", parts["key"]);
    let old = sign(&format!("/uploads/{a}"), Operation::Write, &by, secret, Some("1000"));
    let query = [("+", "%2B"), ("/", "%2F")].iter().fold(old, |text, (from, to)| text.replace(from, to));
    let expired = format!("/uploads/{a}?project=blue&key={}&expires=1000&signature={query}", parts["key"]);
    let reply = world.put(&expired, "a").await;
    assert_eq!(reply.status, StatusCode::UNAUTHORIZED);
    assert!(reply.body["message"].as_str().unwrap().contains("expired"), "{reply:?}");
    // What is too long, or breaks off, is not kept.
    let too_large = world.put(&url, "123456789").await;
    assert_eq!((too_large.status, too_large.code()), (StatusCode::PAYLOAD_TOO_LARGE, "body_too_large"));
    let unsaid = in_pieces(vec![Ok("12345"), Ok("6789")]);
    let too_large = world.put(&url, unsaid).await;
    assert_eq!((too_large.status, too_large.code()), (StatusCode::PAYLOAD_TOO_LARGE, "body_too_large"));
    let cut = in_pieces(vec![Ok("12345"), Err(std::io::ErrorKind::ConnectionReset)]);
    let cut = world.put(&url, cut).await;
    assert_eq!((cut.status, cut.code()), (StatusCode::BAD_REQUEST, "body_cut"));
    assert_eq!(world.node.uploaded("blue", &hash('a')), None);
    assert_eq!(world.put(&url, "12345678").await.status, StatusCode::NO_CONTENT);
    // Twice is once more: the client says what it is called.
    assert_eq!(world.put(&url, "other").await.status, StatusCode::NO_CONTENT);
    assert_eq!(world.node.uploaded("blue", &hash('a')).unwrap(), b"other");
    let entries = world.get(ADMIN, "/audit?limit=100").await.body;
    let uploads: Vec<_> =
        entries.as_array().unwrap().iter().filter(|entry| entry["action"] == "PUT /uploads/{hash}").collect();
    assert_eq!((uploads.len(), &uploads[0]["status"], &uploads[0]["target"]), (5, &json!(204), &json!(a)));
    // A key that was revoked signs nothing.
    let id = parts["key"].clone();
    assert!(world.control.inner.accounts.revoke(&id, &world.control.inner.database).await.unwrap());
    assert_eq!(refused(&url).await, wrong);
    world.control.stop().await;
}
