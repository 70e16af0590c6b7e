//! Imports of templates, asked for as clients ask: `POST /templates/{name}/import` of a server over the fake driver.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use http::{Request, StatusCode, header};
use http_body_util::BodyExt;
use kelvin_api::import::{IMPORT_EVENTS, ImportEvent};
use kelvin_harness::client::{Ask, Book, Who};
use kelvin_harness::faults::{Faults, Plan, Scripted, What};
use kelvin_harness::world::{Broken, Life, Settings, World, live, open};
use kelvin_vmm::testing::FakeDriver;
use serde_json::{Value, json};

/// Runs `work` with a server that has the template `base`.
fn with_server<F: Future<Output = ()> + Send + 'static>(
    work: impl FnOnce(Arc<Life>, String) -> F + Send + 'static,
) {
    let world = World::make().unwrap();
    let plan = Plan { what: What::Nothing, at: 0, beside_at: u32::MAX, jitter: false, seed: 0, jump: 0 };
    let faults = Faults::new(plan, false);
    let driver = Arc::new(FakeDriver::new(Scripted(Arc::clone(&faults))));
    let (options, keys) = (world.options(Settings { warm: 0, memory: 8192 }), Arc::clone(&world.keys));
    let lived = live(&Arc::clone(&faults), async move {
        let own = keys[0].clone();
        let life = Arc::new(open(options, driver, &faults, keys, Book::default(), 0).await?);
        for name in ["rootfs", "kernel", "initrd"] {
            std::fs::write(life.node.data_dir().join(name), name)?;
        }
        std::fs::write(life.node.data_dir().join("kernel"), kelvin_store::kernel::SMALLEST)?;
        work(Arc::clone(&life), own).await;
        life.server.stop().await;
        Ok::<_, Broken>(())
    });
    lived.unwrap().expect("nobody kills it").unwrap();
}

fn body(directory: &Path, rootfs: &str) -> Value {
    let name = |name: &str| directory.join(name).display().to_string();
    json!({ "rootfs": name(rootfs), "kernel": name("kernel"), "initrd": name("initrd"), "memoryMB": 128 })
}

/// An import that is told of.
async fn told(life: &Life, key: &str, name: &str, body: &Value) -> axum::response::Response {
    let request = Request::post(format!("/templates/{name}/import"))
        .header("x-api-key", key)
        .header(header::ACCEPT, IMPORT_EVENTS)
        .body(Body::from(body.to_string()))
        .unwrap();
    tower::ServiceExt::oneshot(life.server.service(), request).await.unwrap()
}

/// How often each status is in the audit log for the import of `name`.
async fn audited(life: &Life, name: &str) -> BTreeMap<u64, usize> {
    let rows = life.client.get(Who::Admin, "/audit?limit=1000").await;
    let mut found = BTreeMap::new();
    for row in rows.as_array().unwrap() {
        if row["action"] == "POST /templates/{name}/import" && row["target"] == name {
            *found.entry(row["status"].as_u64().unwrap()).or_default() += 1;
        }
    }
    found
}

#[test]
fn an_import_is_for_the_servers_own_key_and_its_template_is_there_at_once() {
    with_server(|life, _| async move {
        let directory = life.node.data_dir().to_owned();
        let ask = |who, body: Value| life.client.ask(who, Ask::post("/templates/{}/import", "new", body));
        let good = body(&directory, "rootfs");
        assert_eq!(ask(Who::Blue, good.clone()).await.status, 403);
        std::os::unix::fs::symlink("rootfs", directory.join("link")).unwrap();
        for odd in ["absent", "link", "."] {
            let refused = ask(Who::Admin, body(&directory, odd)).await;
            assert_eq!((refused.status, refused.text("error_code").as_str()), (400, "invalid_file"), "{odd}");
        }
        let mut relative = good.clone();
        relative["kernel"] = "kernel".into();
        assert_eq!(ask(Who::Admin, relative).await.text("error_code"), "invalid_file");
        let mut more = good.clone();
        more["disk"] = 1.into();
        assert_eq!(ask(Who::Admin, more).await.text("error_code"), "invalid_request");
        let create = || Ask::post("/sandboxes", "", json!({ "templateID": "new", "timeout": 600 }));
        assert_eq!(life.client.ask(Who::Blue, create()).await.status, 404);
        let imported = ask(Who::Admin, good).await;
        assert_eq!((imported.status, imported.text("templateID").as_str()), (200, "new"), "{imported:?}");
        assert_eq!(imported.body["memoryMB"], 128);
        assert_eq!(life.client.ask(Who::Blue, create()).await.status, 201);
        assert_eq!(audited(&life, "new").await, BTreeMap::from([(200, 1), (400, 5), (403, 1)]));
    });
}

#[test]
fn an_import_is_told_of_until_its_end_and_goes_on_when_nobody_listens() {
    with_server(|life, own| async move {
        let directory = life.node.data_dir().to_owned();
        let good = body(&directory, "rootfs");
        // What is refused before it begins has its own status.
        let refused = told(&life, &own, "told", &body(&directory, "absent")).await;
        assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
        let answer = told(&life, &own, "told", &good).await;
        assert_eq!(
            (answer.status(), answer.headers()[header::CONTENT_TYPE].to_str().unwrap()),
            (StatusCode::OK, IMPORT_EVENTS)
        );
        let text = answer.into_body().collect().await.unwrap().to_bytes();
        let mut events: Vec<ImportEvent> = text
            .split_inclusive(|byte| *byte == b'\n')
            .map(|line| serde_json::from_slice(line).unwrap())
            .collect();
        let Some(ImportEvent::Template(template)) = events.pop() else { panic!("{events:?}") };
        assert_eq!(template.template_id, "told");
        assert!(!events.is_empty());
        for event in events {
            let ImportEvent::Progress(progress) = event else { panic!("{event:?}") };
            let total = ("rootfs".len() + "initrd".len() + kelvin_store::kernel::SMALLEST.len()) as u64;
            assert!(progress.done_bytes <= total && progress.total_bytes == total, "{progress:?}");
        }
        // Nobody reads what is told.
        drop(told(&life, &own, "left", &good).await);
        let there = async {
            while life.node.source("left").await.unwrap().is_none()
                || audited(&life, "left").await.contains_key(&0)
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), there).await.unwrap();
        assert_eq!(audited(&life, "told").await, BTreeMap::from([(200, 1), (400, 1)]));
        assert_eq!(audited(&life, "left").await, BTreeMap::from([(200, 1)]));
    });
}
