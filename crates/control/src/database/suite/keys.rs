//! Idempotency keys, API keys and the audit log.

use std::time::Duration;

use kelvin_api::account::{ApiKeyInfo, Limits, Mask};
use kelvin_host::clock::Simulated;

use super::data::{HOUR, Subject, blue, entry, new, open, row};
use crate::database::answers::KEY_LIFE_MS;
use crate::database::{Begun, Ended, NewKey};
use crate::placement::Placement;

const LIFE: Duration = Duration::from_millis(KEY_LIFE_MS as u64);

pub(crate) async fn a_key_gives_its_answer_until_it_is_forgotten(subject: &impl Subject) {
    let database = open(subject);
    database.count_from_this_boot().await.unwrap();
    assert!(database.key("k".into()).await.unwrap().is_none());
    database.add_key_of(new("k")).await.unwrap();
    database.note_subjects("k".into(), vec!["a".into(), "b".into()]).await.unwrap();
    let known = database.key("k".into()).await.unwrap().unwrap();
    assert_eq!((known.fingerprint.as_str(), known.reply), ("f", None));
    assert_eq!(known.subjects, ["a", "b"]);
    database.answer("k".into(), "yes".into()).await.unwrap();
    assert_eq!(database.key("k".into()).await.unwrap().unwrap().reply.as_deref(), Some("yes"));
    database.forget_key("k".into()).await.unwrap();
    database.forget_key("k".into()).await.unwrap();
    assert!(database.key("k".into()).await.unwrap().is_none());
}

fn key_info(id: &str, project: &str, ms: i64) -> ApiKeyInfo {
    ApiKeyInfo {
        id: id.into(),
        name: "ci".into(),
        mask: Mask {
            prefix: "e2b_".into(),
            value_length: 40,
            masked_value_prefix: "ab".into(),
            masked_value_suffix: "cdef".into(),
        },
        created_at: jiff::Timestamp::from_millisecond(ms).unwrap(),
        last_used: None,
        project: project.parse().unwrap(),
        max_sandboxes: Some(1),
        requests_per_second: Some(2),
        max_creating: Some(3),
        max_paused: Some(4),
        max_snapshots: Some(5),
        max_disk_mib: Some(6),
    }
}

pub(crate) async fn what_is_cached_of_keys_and_limits_learns_of_each_change(subject: &impl Subject) {
    let database = open(subject);
    let mut revision = database.known_since(None).await.unwrap().expect("nothing is known yet").revision;
    let info = key_info("a", "blue", 1000);
    let learn = async |revision| database.known_since(Some(revision)).await.unwrap();
    assert!(learn(revision).await.is_none());
    database.add_key("h".into(), info.clone()).await.unwrap();
    let known = learn(revision).await.expect("a key is new");
    assert_eq!((known.keys, known.limits), (vec![("h".into(), info)], Vec::new()));
    revision = known.revision;
    // Of these nothing is cached.
    database.rename_key("a".into(), "laptop".into()).await.unwrap();
    database.note_used(vec![("a".into(), 5000)]).await.unwrap();
    database.remove_key("nobody".into()).await.unwrap();
    assert!(learn(revision).await.is_none());
    let limits = Limits { max_paused: Some(7), ..Limits::default() };
    database.set_project_limits(&blue(), limits).await.unwrap();
    let known = learn(revision).await.expect("limits are new");
    assert_eq!((known.keys.len(), known.limits), (1, vec![(blue(), limits)]));
    revision = known.revision;
    database.remove_key("a".into()).await.unwrap();
    assert!(learn(revision).await.expect("a key is gone").keys.is_empty());
}

pub(crate) async fn a_key_is_one_requests_whoever_asks_first(subject: &impl Subject) {
    let (database, here) = (open(subject), Placement::local());
    database.count_from_this_boot().await.unwrap();
    assert!(database.add_key_of(new("k")).await.unwrap());
    let second = NewKey { fingerprint: "second".into(), ..new("k") };
    assert!(!database.add_key_of(second.clone()).await.unwrap());
    let begun = database.begin(&[row(&here)], Some(second), None, Some(entry("create"))).await.unwrap();
    assert!(matches!(begun, Begun::KeyTaken), "{begun:?}");
    assert!(database.all(&here).await.unwrap().is_empty());
    assert!(database.audit(None, 10).await.unwrap().is_empty());
    assert_eq!(database.key("k".into()).await.unwrap().unwrap().fingerprint, "f");
    database.forget_key("k".into()).await.unwrap();
    assert!(database.add_key_of(new("k")).await.unwrap());
}

pub(crate) async fn a_wall_clock_that_jumps_and_a_restart_end_no_key_early_or_late(subject: &impl Subject) {
    for jump in [HOUR, -HOUR] {
        let time = Simulated::start();
        let database = subject.open(time.clock());
        database.count_from_this_boot().await.unwrap();
        database.add_key_of(new("old")).await.unwrap();
        time.jump_wall(jump);
        drop(database);
        let database = subject.open(time.clock());
        database.count_from_this_boot().await.unwrap();
        tokio::time::advance(LIFE - Duration::from_secs(1)).await;
        // To remember one forgets those that are too old.
        database.add_key_of(new("young")).await.unwrap();
        assert!(database.key("old".into()).await.unwrap().is_some(), "early after {jump}");
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(database.key("old".into()).await.unwrap().is_none(), "late after {jump}");
        assert!(database.key("young".into()).await.unwrap().is_some());
        for key in ["old", "young"] {
            database.forget_key(key.into()).await.unwrap();
        }
    }
}

pub(crate) async fn after_a_reboot_keys_are_as_old_as_the_wall_clock_and_the_boot_say(
    subject: &impl Subject,
) {
    let time = Simulated::start();
    let database = subject.open(time.clock());
    database.count_from_this_boot().await.unwrap();
    database.add_key_of(new("a")).await.unwrap();
    tokio::time::advance(LIFE / 2).await;
    time.reboot();
    database.count_from_this_boot().await.unwrap();
    assert!(database.key("a".into()).await.unwrap().is_some());
    // The wall clock is set back: the key is older than this boot all the same.
    time.jump_wall(-HOUR * 48);
    tokio::time::advance(LIFE / 2 + Duration::from_secs(1)).await;
    assert!(database.key("a".into()).await.unwrap().is_none());
    database.add_key_of(new("b")).await.unwrap();
    time.reboot();
    tokio::time::advance(LIFE + Duration::from_secs(1)).await;
    time.jump_wall(-HOUR * 48);
    database.count_from_this_boot().await.unwrap();
    assert!(database.key("b".into()).await.unwrap().is_none());
}

pub(crate) async fn api_keys_and_limits_are_there_until_they_are_removed(subject: &impl Subject) {
    let database = open(subject);
    let (young, old) = (key_info("y", "blue", 2000), key_info("o", "green", 1000));
    database.add_key("h1".into(), young.clone()).await.unwrap();
    database.add_key("h2".into(), old.clone()).await.unwrap();
    // A key is one key's.
    database.add_key("h1".into(), key_info("z", "blue", 1)).await.unwrap_err();
    let known = |keys: Vec<(String, ApiKeyInfo)>| {
        keys.into_iter().map(|(hash, info)| format!("{hash} {info:?}")).collect::<Vec<_>>()
    };
    let [shown_old, shown_young] = [format!("h2 {old:?}"), format!("h1 {young:?}")];
    assert_eq!(known(database.keys(None).await.unwrap()), [shown_old, shown_young.clone()]);
    assert_eq!(known(database.keys(Some("blue".into())).await.unwrap()), [shown_young]);
    assert!(database.rename_key("y".into(), "laptop".into()).await.unwrap());
    assert!(!database.rename_key("nobody".into(), "laptop".into()).await.unwrap());
    database.note_used(vec![("y".into(), 5000), ("nobody".into(), 1)]).await.unwrap();
    let (_, now) = database.keys(Some("blue".into())).await.unwrap().remove(0);
    assert_eq!(now.name, "laptop");
    assert_eq!(now.last_used, Some(jiff::Timestamp::from_millisecond(5000).unwrap()));
    assert!(database.remove_key("y".into()).await.unwrap());
    assert!(!database.remove_key("y".into()).await.unwrap());
    assert!(database.keys(Some("blue".into())).await.unwrap().is_empty());
    let limits = Limits { max_paused: Some(7), max_disk_mib: Some(1 << 40), ..Limits::default() };
    database.set_project_limits(&blue(), Limits::default()).await.unwrap();
    database.set_project_limits(&blue(), limits).await.unwrap();
    let known = database.known_since(None).await.unwrap().expect("nothing is known yet");
    assert_eq!(known.limits, [(blue(), limits)]);
    let projects = database.projects().await.unwrap();
    let names: Vec<_> = projects.iter().map(|info| (info.name.as_str(), info.limits)).collect();
    assert_eq!(names, [("blue", limits), ("green", Limits::default())]);
}

pub(crate) async fn the_audit_log_is_read_backwards(subject: &impl Subject) {
    let database = open(subject);
    let mut numbers = Vec::new();
    for action in ["a", "b", "c"] {
        numbers.push(database.note(entry(action)).await.unwrap());
    }
    assert!(numbers.is_sorted() && numbers[0] < numbers[2]);
    database.note_end(Ended { entry: numbers[1], status: 204, target: "t".into() }).await.unwrap();
    let read = async |before, limit| {
        let found = database.audit(before, limit).await.unwrap();
        found.into_iter().map(|entry| entry.action).collect::<Vec<_>>()
    };
    assert_eq!(read(None, 2).await, ["c", "b"]);
    assert_eq!(read(Some(numbers[1]), 2).await, ["a"]);
    let second = database.audit(Some(numbers[2]), 1).await.unwrap().remove(0);
    assert_eq!((second.id, second.status, second.target.as_str()), (numbers[1], 204, "t"));
}
