//! Versions of templates: what tags name, and what becomes of what they name no more.

use std::collections::BTreeSet;

use http::HeaderName;
use kelvin_api::id::{BuildId, TemplateVersion};
use kelvin_node_api::Base;

use super::*;
use crate::accounts::Caller;
use crate::testing::template;
use crate::versions::UNNAMED;

fn version(name: &str, build: &str) -> TemplateVersion {
    TemplateVersion::of(name.parse().unwrap(), build.parse().unwrap())
}

impl World {
    fn inner(&self) -> &crate::control::Inner {
        &self.control.inner
    }

    fn account(&self, key: &str) -> Caller {
        let headers = HeaderMap::from_iter([(HeaderName::from_static("x-api-key"), key.parse().unwrap())]);
        self.inner().accounts.admit(&headers).unwrap()
    }

    /// The version that a create from `text` begins with.
    async fn starts(&self, key: &str, text: &str) -> Result<TemplateVersion, ErrorCode> {
        let found = self.inner().base(&self.account(key), text).await;
        match found.map_err(|failure| failure.error_code)?.base {
            Base::Template(version) => Ok(version),
            Base::Snapshot(id) => panic!("{text} is the snapshot {id}"),
        }
    }

    async fn tag(&self, key: &str, target: &str, tags: &[&str]) -> Reply {
        self.ask(key, "POST", "/templates/tags", json!({ "target": target, "tags": tags })).await
    }

    async fn tags(&self, key: &str, name: &str) -> BTreeSet<(String, String)> {
        let reply = self.get(key, &format!("/templates/{name}/tags")).await;
        assert_eq!(reply.status, StatusCode::OK, "{reply:?}");
        let text = |row: &Value, field: &str| row[field].as_str().unwrap().to_owned();
        reply.body.as_array().unwrap().iter().map(|row| (text(row, "tag"), text(row, "buildID"))).collect()
    }

    async fn delete(&self, key: &str, text: &str) -> (StatusCode, String) {
        let reply = self.ask(key, "DELETE", &format!("/templates/{text}"), Value::Null).await;
        (reply.status, reply.code().to_owned())
    }

    fn has(&self, name: &str, build: &str) -> bool {
        self.node.versions().contains(&version(name, build))
    }
}

fn pairs<const N: usize>(all: [(&str, &str); N]) -> BTreeSet<(String, String)> {
    all.into_iter().map(|(tag, build)| (tag.to_owned(), build.to_owned())).collect()
}

#[tokio::test]
async fn a_build_moves_its_tags_and_default_when_it_has_none() {
    let world = world().await;
    let first = world.built(&world.blue, "web:v1").await;
    // None but its own: the name alone means nothing yet, though there is such a template.
    assert_eq!(world.starts(&world.blue, "web").await, Err(ErrorCode::TemplateNotFound));
    assert_eq!(world.get(&world.blue, "/templates/aliases/web").await.status, StatusCode::OK);
    assert_eq!(world.starts(&world.blue, "web:v1").await, Ok(version("web", &first)));
    let second = world.built(&world.blue, "web").await;
    let third = world.built(&world.blue, "web:v2").await;
    for (text, build) in [("web", &second), ("web:default", &second), ("web:v1", &first), ("web:v2", &third)]
    {
        assert_eq!(world.starts(&world.blue, text).await, Ok(version("web", build)), "{text}");
    }
    // By its build, and no other project's.
    let other = world.built(&world.green, "other").await;
    assert_eq!(world.starts(&world.blue, &format!("web:{first}")).await, Ok(version("web", &first)));
    for text in [&format!("web:{other}"), &format!("web:{}", BuildId::random()), "web:none", "web:", ":v1"] {
        assert_eq!(world.starts(&world.blue, text).await, Err(ErrorCode::TemplateNotFound), "{text}");
    }
    assert_eq!(world.node.preferred(), Some(version("other", &other)));
    let list = world.get(&world.blue, "/templates").await.body;
    assert_eq!((list.as_array().unwrap().len(), &list[0]["buildID"]), (1, &json!(second)));
    assert_eq!(list[0]["versions"].as_array().unwrap().len(), 3, "{list}");
    let one = world.get(&world.blue, "/templates/web:v1").await.body;
    assert_eq!((&one["buildID"], &one["versions"].as_array().unwrap().len()), (&json!(first), &3));
    let tagged = |row: &&Value| row["buildID"] == json!(first);
    assert_eq!(one["versions"].as_array().unwrap().iter().find(tagged).unwrap()["tags"], json!(["v1"]));
    assert_eq!(world.get(&world.blue, "/templates/web:none").await.status, StatusCode::NOT_FOUND);
    world.control.stop().await;
}

#[tokio::test]
async fn tags_move_back_and_are_their_projects_own() {
    let world = world().await;
    let first = world.built(&world.blue, "web").await;
    let second = world.built(&world.blue, "web").await;
    assert_eq!(world.tags(&world.blue, "web").await, pairs([("default", &second)]));
    // Back, by its build: nothing else names it.
    let moved = world.tag(&world.blue, &format!("web:{first}"), &["default", "stable"]).await;
    assert_eq!((moved.status, &moved.body["buildID"]), (StatusCode::CREATED, &json!(first)));
    assert_eq!(world.starts(&world.blue, "web").await, Ok(version("web", &first)));
    assert_eq!(world.node.preferred(), Some(version("web", &first)));
    assert_eq!(world.tags(&world.blue, "web").await, pairs([("default", &first), ("stable", &first)]));
    // Refused as a whole: nothing moves.
    for (target, tags, code) in [
        ("web:none", vec!["default"], "template_not_found"),
        ("web", vec!["ok", second.as_str()], "invalid_tag"),
        ("web", vec!["ok", "UPPER"], "invalid_tag"),
        (&format!("web:{}", BuildId::random()), vec!["default"], "template_not_found"),
    ] {
        let refused = world.tag(&world.blue, target, &tags).await;
        assert_eq!(refused.code(), code, "{target} {tags:?}: {refused:?}");
    }
    assert_eq!(world.tags(&world.blue, "web").await.len(), 2);
    // Who may use it sees its tags, and moves none.
    assert_eq!(world.starts(&world.green, "web:stable").await, Err(ErrorCode::TemplateNotFound));
    world.ask(&world.blue, "PATCH", "/templates/web", json!({ "public": true })).await;
    assert_eq!(world.starts(&world.green, "web:stable").await, Ok(version("web", &first)));
    assert_eq!(world.tags(&world.green, "web").await, world.tags(&world.blue, "web").await);
    let body = json!({ "name": "web", "tags": ["stable"] });
    assert_eq!(
        world.ask(&world.green, "DELETE", "/templates/tags", body).await.status,
        StatusCode::NOT_FOUND
    );
    assert_eq!(world.tag(&world.green, "web", &["mine"]).await.status, StatusCode::NOT_FOUND);
    assert_eq!(world.delete(&world.green, "web:stable").await.0, StatusCode::NOT_FOUND);
    assert!(world.has("web", &first) && world.has("web", &second));
    world.control.stop().await;
}

#[tokio::test]
async fn a_version_is_deleted_by_its_tag_unless_another_names_it() {
    let world = world().await;
    let first = world.built(&world.blue, "web:v1").await;
    let second = world.built(&world.blue, "web").await;
    world.tag(&world.blue, "web:v1", &["old"]).await;
    let by_build = format!("web:{first}");
    let refused = world.delete(&world.blue, &by_build).await;
    assert_eq!(refused, (StatusCode::CONFLICT, "in_use".to_owned()));
    let refused = world.delete(&world.blue, "web:default").await;
    assert_eq!(refused, (StatusCode::BAD_REQUEST, "invalid_tags".to_owned()));
    assert_eq!(
        world.delete(&world.blue, "web:none").await,
        (StatusCode::NOT_FOUND, "tag_not_found".to_owned())
    );
    // Another names it: the tag alone goes.
    assert_eq!(world.delete(&world.blue, "web:v1").await.0, StatusCode::NO_CONTENT);
    assert!(world.has("web", &first));
    assert_eq!(world.starts(&world.blue, "web:v1").await, Err(ErrorCode::TemplateNotFound));
    // The last one takes it along.
    assert_eq!(world.delete(&world.blue, "web:old").await.0, StatusCode::NO_CONTENT);
    assert!(!world.has("web", &first) && world.has("web", &second));
    assert_eq!(world.starts(&world.blue, &by_build).await, Err(ErrorCode::TemplateNotFound));
    assert_eq!(world.starts(&world.blue, "web").await, Ok(version("web", &second)));
    // One that nothing names, by its build.
    let third = world.built(&world.blue, "web").await;
    assert_eq!(world.delete(&world.blue, &format!("web:{second}")).await.0, StatusCode::NO_CONTENT);
    assert!(!world.has("web", &second) && world.has("web", &third));
    // All of it.
    world.built(&world.blue, "web:v4").await;
    assert_eq!(world.delete(&world.blue, "web").await.0, StatusCode::NO_CONTENT);
    assert_eq!(world.node.versions(), []);
    world.control.stop().await;
}

#[tokio::test]
async fn what_was_built_before_there_were_versions_is_read_as_it_is() {
    let world = world().await;
    // As the last release has left it: one record, a row that says what it has made, a tag of its image.
    let (old, asked) = world.started(&world.blue, "web").await;
    asked.end(Err(failure(None, ErrorCode::BuildStepFailed)), "");
    world.becomes(&world.blue, "web", &old, "error").await;
    let (image, database) = ("cd".repeat(32), &world.inner().database);
    world.node.has_version(template("web", None, &image));
    database.add_tags("blue".into(), "web".into(), image.clone(), vec!["v1".into()]).await.unwrap();
    let plain: TemplateVersion = "web".parse().unwrap();
    for text in ["web", "web:default", "web:v1"] {
        assert_eq!(world.starts(&world.blue, text).await, Ok(plain.clone()), "{text}");
    }
    assert_eq!(
        world.get(&world.blue, "/templates/web").await.body["versions"][0]["tags"],
        json!(["default", "v1"])
    );
    // That release gave the default tag the digest of an image, too, and then made another: the name means what is there.
    database.add_tags("blue".into(), "web".into(), "ef".repeat(32), vec!["default".into()]).await.unwrap();
    assert_eq!(world.starts(&world.blue, "web").await, Ok(plain.clone()));
    assert_eq!(world.inner().expire_versions().await.unwrap(), 0);
    database.remove_tags("blue".into(), "web".into(), vec!["default".into()]).await.unwrap();
    // The next build is beside it, and there is a way back.
    let new = world.built(&world.blue, "web").await;
    assert_eq!(world.starts(&world.blue, "web").await, Ok(version("web", &new)));
    assert_eq!(world.starts(&world.blue, "web:v1").await, Ok(plain.clone()));
    world.inner().expire_versions().await.unwrap();
    assert_eq!(world.node.versions().len(), 2, "a tag names it");
    world.tag(&world.blue, "web:v1", &["default"]).await;
    assert_eq!(world.starts(&world.blue, "web").await, Ok(plain.clone()));
    world.tag(&world.blue, &format!("web:{new}"), &["default"]).await;
    // A tag of an image that is there no more is refused, and can be deleted.
    database.add_tags("blue".into(), "web".into(), "ef".repeat(32), vec!["lost".into()]).await.unwrap();
    assert_eq!(world.starts(&world.blue, "web:lost").await, Err(ErrorCode::TagOutdated));
    assert_eq!(world.delete(&world.blue, "web:lost").await.0, StatusCode::NO_CONTENT);
    assert_eq!(world.delete(&world.blue, "web:v1").await.0, StatusCode::NO_CONTENT);
    assert_eq!(world.node.versions(), [version("web", &new)]);
    // What is imported has one version, whatever tags say.
    world.node.has_template("base");
    world.tag(&world.green, "base", &["mine"]).await;
    assert_eq!(world.starts(&world.green, "base:mine").await, Ok("base".parse().unwrap()));
    world.node.has_version(template("base", None, "another"));
    assert_eq!(world.starts(&world.green, "base:mine").await, Err(ErrorCode::TagOutdated));
    world.inner().expire_versions().await.unwrap();
    assert!(world.node.versions().contains(&"base".parse().unwrap()));
    world.control.stop().await;
}

#[tokio::test]
async fn versions_that_nothing_names_go_after_a_while_or_when_there_are_many() {
    let world = world().await;
    let mut all = vec![world.built(&world.blue, "web:kept").await];
    for _ in 0..UNNAMED + 3 {
        // Since when each is unnamed is told in milliseconds.
        let before = jiff::Timestamp::now().as_millisecond();
        while jiff::Timestamp::now().as_millisecond() == before {
            tokio::task::yield_now().await;
        }
        all.push(world.built(&world.blue, "web").await);
    }
    // Another is under way: what it has made is not named yet, and stays.
    let (running, asked) = world.started(&world.blue, "web").await;
    world.node.has_version(template("web", Some(running.parse().unwrap()), "early"));
    // One whose build a server did not live to see the end of.
    let (lost, died) = world.started(&world.blue, "other").await;
    died.end(Err(failure(None, ErrorCode::BuildInterrupted)), "");
    world.becomes(&world.blue, "other", &lost, "error").await;
    world.node.has_version(template("other", Some(lost.parse().unwrap()), "lost"));
    // One that came when its template had been deleted: nobody sees it.
    let stray = BuildId::random();
    world.node.has_version(template("stray", Some(stray.clone()), "i"));
    for text in ["stray", &format!("stray:{stray}")] {
        assert_eq!(world.starts(&world.green, text).await, Err(ErrorCode::TemplateNotFound), "{text}");
    }
    assert_eq!(world.get(&world.green, "/templates").await.body, json!([]));
    assert_eq!(world.inner().expire_versions().await.unwrap(), 4);
    assert!(!world.has("other", &lost));
    // The tagged, the newest that are not, the default one, and the one that is about to be.
    let kept = [&all[..1], &all[all.len() - 1 - UNNAMED..]].concat();
    let expected: BTreeSet<_> = kept.iter().chain([&running]).map(|build| version("web", build)).collect();
    assert_eq!(world.node.versions().into_iter().collect::<BTreeSet<_>>(), expected);
    assert!(asked.end(Ok(()), "i"));
    world.becomes(&world.blue, "web", &running, "ready").await;
    // Twice is as good as once.
    assert_eq!(world.inner().expire_versions().await.unwrap(), 1);
    assert_eq!(world.inner().expire_versions().await.unwrap(), 0);
    assert_eq!(world.starts(&world.blue, "web").await, Ok(version("web", &running)));
    world.control.stop().await;
}

#[tokio::test]
async fn what_comes_at_once_has_one_winner_and_leaves_no_tag_without_a_version() {
    let world = world().await;
    for round in 0..20 {
        let old = world.built(&world.blue, "web:old").await;
        let new = world.built(&world.blue, "web").await;
        let target = format!("web:{old}");
        let (deleted, moved, started) = futures::join!(
            world.delete(&world.blue, "web:old"),
            world.tag(&world.blue, &target, &["default"]),
            world.starts(&world.blue, "web"),
        );
        let is = world.starts(&world.blue, "web").await.unwrap();
        match (deleted.0, moved.status) {
            // Moved first: the tag alone was deleted.
            (StatusCode::NO_CONTENT, StatusCode::CREATED) => assert_eq!(is, version("web", &old)),
            (StatusCode::NO_CONTENT, StatusCode::NOT_FOUND) => assert_eq!(is, version("web", &new)),
            other => panic!("round {round}: {other:?}"),
        }
        assert!(world.node.versions().contains(&is), "round {round}: {is}");
        assert!([version("web", &old), version("web", &new)].contains(&started.unwrap()));
    }
    // The whole template beside a tag.
    let build = world.built(&world.blue, "web:v1").await;
    let (deleted, moved) =
        futures::join!(world.delete(&world.blue, "web"), world.tag(&world.blue, "web:v1", &["default"]));
    assert_eq!(deleted.0, StatusCode::NO_CONTENT);
    assert!([StatusCode::CREATED, StatusCode::NOT_FOUND].contains(&moved.status), "{moved:?}");
    assert!(!world.has("web", &build));
    assert_eq!(world.get(&world.blue, "/templates/web").await.status, StatusCode::NOT_FOUND);
    world.control.stop().await;
}

#[tokio::test]
async fn a_start_has_machines_wait_for_what_default_names() {
    let mut world = world().await;
    let first = world.built(&world.blue, "web").await;
    world.built(&world.blue, "web").await;
    world.tag(&world.blue, &format!("web:{first}"), &["default"]).await;
    world.built(&world.blue, "web:v3").await;
    soon(world.control.stop()).await;
    world.node.forget_preferred();
    world.control = control_of(world.dir.path(), &world.node, BuildOptions::default()).await;
    world.router = world.control.router();
    assert_eq!(world.node.preferred(), Some(version("web", &first)));
    assert_eq!(world.starts(&world.blue, "web").await, Ok(version("web", &first)));
    world.control.stop().await;
}
