//! Snapshots, tags and measurements.

use kelvin_api::account::Limits;
use kelvin_api::id::SandboxId;
use kelvin_api::sandbox::{SandboxMetric, SandboxState};

use super::data::{Subject, blue, make, new, open, quota, row};
use crate::database::{Exceeded, Limited, NewSnapshot, Quota};
use crate::placement::{NodeName, Placement};

fn snapshot(id: &str, name: Option<&str>, node: &NodeName) -> NewSnapshot {
    NewSnapshot { id: id.into(), mib: 10, name: name.map(Into::into), node: node.clone() }
}

fn unlimited() -> Quota {
    quota(Limits::default(), Limits::default())
}

pub(crate) async fn a_name_is_the_newest_snapshots(subject: &impl Subject) {
    let (database, here) = (open(subject), NodeName::local());
    database.add_key_of(new("k")).await.unwrap();
    let named = async |name: &str| database.snapshot("blue", name).await.unwrap();
    for (id, key) in [("s1", None), ("s2", Some("k".to_owned()))] {
        let before = named("ready").await;
        let limit = database.begin_snapshot(snapshot(id, Some("ready"), &here), unlimited(), key).await;
        assert_eq!(limit.unwrap(), None);
        // Until it is there, its name means what it meant.
        assert_eq!(named("ready").await, before);
        assert_eq!(database.unfinished_snapshots(&here).await.unwrap(), [id]);
        database.finish_snapshot(id.into()).await.unwrap();
        assert_eq!(named("ready").await.as_deref(), Some(id));
        assert!(database.unfinished_snapshots(&here).await.unwrap().is_empty());
    }
    assert_eq!(database.key("k".into()).await.unwrap().unwrap().subjects, ["s2"]);
    assert_eq!(named("s1").await.as_deref(), Some("s1"));
    assert_eq!(database.snapshot("green", "s1").await.unwrap(), None);
    assert_eq!(database.snapshot("green", "ready").await.unwrap(), None);
    let tight = quota(Limits { max_snapshots: Some(2), ..Limits::default() }, Limits::default());
    let refused = database.begin_snapshot(snapshot("s3", None, &here), tight, None).await.unwrap();
    assert!(matches!(refused, Some(Exceeded { what: Limited::Snapshots, limit: 2, used: 2, .. })));
    assert!(!database.snapshot_owners().await.unwrap().contains_key("s3"));
    // A name that is deleted means nothing, never an older snapshot.
    database.forget_snapshot(&here, "s2".into()).await.unwrap();
    assert_eq!(named("ready").await, None);
    let owners = database.snapshot_owners().await.unwrap();
    assert_eq!((owners.len(), owners["s1"].project.as_str()), (1, "blue"));
}

pub(crate) async fn snapshots_are_their_nodes(subject: &impl Subject) {
    let (database, here, north) = (open(subject), NodeName::local(), NodeName::from("north".to_owned()));
    for (id, node) in [("mine", &here), ("theirs", &north)] {
        assert_eq!(
            database.begin_snapshot(snapshot(id, Some(id), node), unlimited(), None).await.unwrap(),
            None
        );
    }
    assert_eq!(database.unfinished_snapshots(&here).await.unwrap(), ["mine"]);
    assert_eq!(database.unfinished_snapshots(&north).await.unwrap(), ["theirs"]);
    database.finish_snapshot("theirs".into()).await.unwrap();
    database.forget_snapshot(&here, "theirs".into()).await.unwrap();
    assert_eq!(database.snapshot("blue", "theirs").await.unwrap().as_deref(), Some("theirs"));
    // What was there before there were projects: once.
    database.adopt_snapshots(&here, vec![("old".into(), Some("kept".into()), 1)]).await.unwrap();
    database.adopt_snapshots(&here, vec![("later".into(), None, 1)]).await.unwrap();
    let owners = database.snapshot_owners().await.unwrap();
    assert_eq!((owners["old"].project.as_str(), owners["old"].name.as_deref()), ("default", Some("kept")));
    assert!(!owners.contains_key("later"));
}

pub(crate) async fn tags_move_and_go_together(subject: &impl Subject) {
    let database = open(subject);
    let add = async |build: &str, tags: &[&str]| {
        let tags = tags.iter().map(ToString::to_string).collect();
        database.add_tags("blue".into(), "base".into(), build.into(), tags).await.unwrap();
    };
    let known = async || {
        let tags = database.tags("blue", "base").await.unwrap();
        tags.into_iter().map(|row| format!("{}={}", row.tag, row.build)).collect::<Vec<_>>()
    };
    add("b1", &["v1", "stable"]).await;
    add("b2", &["stable"]).await;
    let mut tags = known().await;
    tags.sort();
    assert_eq!(tags, ["stable=b2", "v1=b1"]);
    assert!(database.tags("green", "base").await.unwrap().is_empty());
    let remove = async |tags: &[&str]| {
        let tags = tags.iter().map(ToString::to_string).collect();
        database.remove_tags("blue".into(), "base".into(), tags).await.unwrap()
    };
    assert_eq!(remove(&["v1", "none"]).await.as_deref(), Some("none"));
    assert_eq!(known().await.len(), 2);
    assert_eq!(remove(&["v1", "stable"]).await, None);
    assert!(known().await.is_empty());
}

pub(crate) async fn measurements_are_of_sandboxes_that_are_there(subject: &impl Subject) {
    let (database, here) = (open(subject), Placement::local());
    let one = row(&here);
    make(&database, &one, SandboxState::Running).await;
    let metric = |at| SandboxMetric {
        timestamp: jiff::Timestamp::from_second(at).unwrap(),
        timestamp_unix: at,
        cpu_count: 2,
        cpu_used_pct: 12.5,
        mem_used: 1,
        mem_total: 2,
        mem_cache: 3,
        disk_used: 4,
        disk_total: 5,
    };
    let of = |id: &SandboxId| (1..4).map(|at| (id.clone(), metric(at))).collect::<Vec<_>>();
    let gone = SandboxId::random();
    database.add_metrics(of(&one.id), vec![(blue(), 3)], 10).await.unwrap();
    database.add_metrics(of(&gone), Vec::new(), 0).await.unwrap();
    let times = async |id: &SandboxId, start, end, most| {
        let found = database.metrics(id, start, end, most).await.unwrap();
        found.into_iter().map(|metric| metric.timestamp_unix).collect::<Vec<_>>()
    };
    assert_eq!(times(&one.id, 0, i64::MAX, 100).await, [1, 2, 3]);
    assert_eq!(times(&one.id, 0, i64::MAX, 2).await, [2, 3]);
    assert_eq!(times(&one.id, 1, 2, 100).await, [1, 2]);
    assert!(times(&gone, 0, i64::MAX, 100).await.is_empty());
    let found = database.metrics(&one.id, 1, 1, 1).await.unwrap();
    assert_eq!(format!("{:?}", found[0]), format!("{:?}", metric(1)));
    let used = database.project_metrics(&blue(), 0, i64::MAX).await.unwrap();
    assert_eq!((used.len(), used[0].concurrent_sandboxes), (1, 1));
    assert!((used[0].sandbox_start_rate - 0.3).abs() < 1e-9, "{used:?}");
    // Not another node's to end, and what was measured stays with it.
    let north = Placement { node: "north".to_owned().into(), ..here.clone() };
    database.end(&north, &one.id, "killed").await.unwrap();
    assert_eq!(times(&one.id, 0, i64::MAX, 100).await, [1, 2, 3]);
    database.end(&here, &one.id, "killed").await.unwrap();
    assert!(times(&one.id, 0, i64::MAX, 100).await.is_empty());
}
