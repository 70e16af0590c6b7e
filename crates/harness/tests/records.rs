//! A record that a build cannot read costs nobody a machine: what it names is kept, listed and can be killed, and goes on when
//! a build is started that reads it.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use http::Method;
use kelvin_api::id::VmId;
use kelvin_harness::client::{Ask, Book, Who};
use kelvin_harness::faults::{Faults, Plan, Scripted, What};
use kelvin_harness::world::{Broken, Life, Settings, World, live, open};
use kelvin_host::ledger::{Body, Ledger};
use kelvin_vmm::testing::FakeDriver;
use serde_json::{Value, json};

/// What goes on from one life of the daemon to the next.
#[derive(Clone)]
struct Scene {
    faults: Arc<Faults>,
    driver: Arc<FakeDriver>,
    book: Book,
}

impl Scene {
    fn new() -> Self {
        let nothing =
            Plan { what: What::Nothing, at: 0, beside_at: u32::MAX, jitter: false, seed: 0, jump: 0 };
        let faults = Faults::new(nothing, false);
        let driver = Arc::new(FakeDriver::new(Scripted(Arc::clone(&faults))));
        Self { faults, driver, book: Book::default() }
    }

    /// Has a daemon live, which stops in the end.
    fn live<T, F>(&self, world: &World, work: impl FnOnce(Arc<Life>) -> F + Send + 'static) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + Send,
    {
        let (options, keys) = (world.options(Settings { warm: 0, memory: 8192 }), Arc::clone(&world.keys));
        let (scene, faults) = (self.clone(), Arc::clone(&self.faults));
        let lived = live(&faults, async move {
            let life = open(options, scene.driver, &scene.faults, keys, scene.book, 0).await?;
            let life = Arc::new(life);
            assert!(life.settle().await, "it does not come to rest");
            let done = work(Arc::clone(&life)).await;
            assert!(life.settle().await, "it does not come to rest");
            life.server.stop().await;
            Ok::<_, Broken>(done)
        });
        lived.unwrap().expect("nobody kills it").unwrap()
    }

    /// Changes every record between two lives; what they were.
    fn change(&self, world: &World, change: fn(Body) -> Body) -> BTreeMap<VmId, Body> {
        let path = world.root().join("ledger.db");
        let changed = live(&self.faults, async move {
            let ledger = Ledger::open(&path).unwrap();
            let mut before = BTreeMap::new();
            for record in ledger.read().await.unwrap().1 {
                ledger.put_record(&record.owner, change(record.body.clone())).await.unwrap();
                before.insert(record.owner, record.body);
            }
            before
        });
        changed.unwrap().unwrap()
    }

    fn put_back(&self, world: &World, records: BTreeMap<VmId, Body>) {
        let path = world.root().join("ledger.db");
        let put = live(&self.faults, async move {
            let ledger = Ledger::open(&path).unwrap();
            for (owner, body) in records {
                ledger.put_record(&owner, body).await.unwrap();
            }
        });
        put.unwrap().unwrap();
    }

    fn running(&self) -> usize {
        self.driver.machines().iter().filter(|machine| machine.running && machine.name.is_some()).count()
    }
}

fn create() -> Ask {
    Ask::post("/sandboxes", "", json!({ "templateID": "base", "timeout": 3600 }))
}

async fn state(life: &Life, id: &str) -> String {
    let found = life.client.ask(Who::Blue, Ask::new(Method::GET, "/sandboxes/{}", id)).await;
    found.text("state")
}

/// A sandbox that runs and one that is paused.
async fn two(life: &Life) -> (String, String) {
    let mut ids = Vec::new();
    for _ in 0..2 {
        let made = life.client.ask(Who::Blue, create()).await;
        assert_eq!(made.status, 201, "{}", made.body);
        ids.push(made.text("sandboxID"));
    }
    let paused = life.client.ask(Who::Blue, Ask::post("/sandboxes/{}/pause", &ids[1], json!({}))).await;
    assert!(paused.is_good(), "{}", paused.body);
    (ids[0].clone(), ids[1].clone())
}

/// Of a release to come.
fn of_a_newer_form(body: Body) -> Body {
    Body { version: body.version + 1, ..body }
}

/// Of a release to come that forgot to say so.
fn with_a_field_more(body: Body) -> Body {
    let mut record: Value = serde_json::from_str(&body.json).unwrap();
    record["sandbox"]["zone"] = json!("eu");
    record["sandbox"]["shape"] = json!("large");
    Body { json: record.to_string(), ..body }
}

#[test]
fn what_a_build_cannot_read_goes_on_and_is_adopted_by_one_that_can() {
    for change in [of_a_newer_form, with_a_field_more] {
        let (world, scene) = (World::make().unwrap(), Scene::new());
        let (runs, paused) = scene.live(&world, |life| async move { two(&life).await });
        assert_eq!(scene.running(), 1);
        let before = scene.change(&world, change);
        assert_eq!(before.len(), 2);

        let (first, second) = (runs.clone(), paused.clone());
        scene.live(&world, move |life| async move {
            let node = life.node.info().await.unwrap();
            let told: Vec<_> =
                node.unreadable.iter().filter_map(|record| record.sandbox_id.clone()).collect();
            assert!(told.contains(&first) && told.contains(&second), "{:?}", node.unreadable);
            assert_eq!(node.unreadable.iter().filter(|record| record.pid.is_some()).count(), 1);
            assert_eq!(
                (state(&life, &first).await, state(&life, &second).await),
                ("running".into(), "paused".into())
            );
            for (id, action) in [(&first, "/sandboxes/{}/pause"), (&second, "/sandboxes/{}/resume")] {
                let refused = life.client.ask(Who::Blue, Ask::post(action, id, json!({}))).await;
                assert_eq!(
                    (refused.status, refused.text("error_code").as_str()),
                    (409, "record_unreadable"),
                    "{}",
                    refused.body
                );
            }
            let collected = life.client.ask(Who::Admin, Ask::post("/gc", "", json!({}))).await;
            assert!(!collected.is_good(), "what they need is not known: {}", collected.body);
        });
        assert_eq!(scene.running(), 1, "it runs on");

        scene.put_back(&world, before);
        let (first, second) = (runs, paused);
        scene.live(&world, move |life| async move {
            assert!(life.node.info().await.unwrap().unreadable.is_empty());
            let again = life.client.ask(Who::Blue, Ask::post("/sandboxes/{}/pause", &first, json!({}))).await;
            assert!(again.is_good(), "{}", again.body);
            let ask = Ask::post("/sandboxes/{}/resume", &second, json!({ "timeout": 60 }));
            let resumed = life.client.ask(Who::Blue, ask).await;
            assert!(resumed.is_good(), "{}", resumed.body);
            for id in [&first, &second] {
                assert_eq!(life.delete(Who::Blue, "/sandboxes/{}", id).await, 204);
            }
        });
        assert_eq!(scene.running(), 0);
    }
}

#[test]
fn what_a_build_cannot_read_can_be_killed_and_leaves_nothing() {
    let (world, scene) = (World::make().unwrap(), Scene::new());
    let (runs, paused) = scene.live(&world, |life| async move { two(&life).await });
    scene.change(&world, of_a_newer_form);
    let images = world.bakes().clone();
    let snapshots = world.root().join("snapshots");
    scene.live(&world, move |life| async move {
        for id in [&runs, &paused] {
            assert_eq!(life.delete(Who::Blue, "/sandboxes/{}", id).await, 204);
            assert_eq!(life.delete(Who::Blue, "/sandboxes/{}", id).await, 404);
            assert_eq!(state(&life, id).await, "");
        }
        assert!(life.settle().await);
        assert!(life.node.info().await.unwrap().unreadable.is_empty());
        assert_eq!(kelvin_harness::world::names(&snapshots), images, "what it was frozen in is gone too");
    });
    assert_eq!(scene.running(), 0);
    let path = world.root().join("ledger.db");
    let left = live(&scene.faults, async move {
        let (entries, records) = Ledger::open(&path).unwrap().read().await.unwrap();
        (entries.len(), records.len())
    });
    assert_eq!(left.unwrap(), Some((0, 0)));
}

#[test]
fn one_whose_vmm_ended_is_gone_without_being_read() {
    let (world, scene) = (World::make().unwrap(), Scene::new());
    let (runs, _) = scene.live(&world, |life| async move { two(&life).await });
    scene.change(&world, of_a_newer_form);
    let driver = Arc::clone(&scene.driver);
    scene.live(&world, move |life| async move {
        assert_eq!(state(&life, &runs).await, "running");
        driver.kill_all();
        // The reaper looks twice a minute.
        tokio::time::sleep(std::time::Duration::from_secs(61)).await;
        assert_eq!(state(&life, &runs).await, "");
        assert_eq!(life.node.info().await.unwrap().unreadable.len(), 1, "what is paused stays");
    });
}
