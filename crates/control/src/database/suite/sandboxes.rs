//! Sandboxes, their limits, and what becomes of them.

use std::collections::BTreeMap;

use kelvin_api::account::{Limits, Project};
use kelvin_api::id::{SandboxId, Token};
use kelvin_api::sandbox::{Lifecycle, OnTimeout, PauseMode, SandboxState};
use kelvin_host::clock::Simulated;

use super::data::{HOUR, Subject, all, begin, blue, entry, live, make, open, quota, row};
use crate::database::{Begun, Claim, Ended, Error, Exceeded, Filter, Limited, NewKey, SandboxRow};
use crate::placement::{Epoch, Placement};

pub(crate) async fn what_is_begun_is_seen_once_it_is_committed(subject: &impl Subject) {
    let (database, here) = (open(subject), Placement::local());
    let mut wanted = row(&here);
    wanted.metadata = [("a".to_owned(), "b\"'c".to_owned())].into();
    (wanted.access_token, wanted.traffic_token) = (Some(Token::random()), Some(Token::random()));
    wanted.allow_internet = Some(false);
    wanted.parent = Some(SandboxId::random());
    let on_timeout = OnTimeout::Pause;
    wanted.lifecycle = Lifecycle { on_timeout, auto_resume: true, pause_mode: PauseMode::Filesystem };
    let key = NewKey { key: "k".into(), fingerprint: "f".into(), subjects: vec![wanted.id.to_string()] };
    let begun = database.begin(std::slice::from_ref(&wanted), Some(key), None, Some(entry("create"))).await;
    let Begun::Done(Some(entry)) = begun.unwrap() else { panic!("it has an entry") };
    assert_eq!(database.get(&wanted.id).await.unwrap(), None);
    assert!(all(&database).await.is_empty());
    assert_eq!(database.all(&here).await.unwrap(), [(wanted.id.clone(), true)]);
    assert_eq!(database.key("k".into()).await.unwrap().unwrap().reply, None);
    let made = live(&wanted.id, SandboxState::Running, 0);
    let ended = Ended { entry, status: 201, target: wanted.id.to_string() };
    database.commit(&here, &made, Some("reply".into()), Some(ended)).await.unwrap();
    wanted.started_at = made.started_at;
    assert_eq!(database.get(&wanted.id).await.unwrap(), Some(wanted.clone()));
    assert_eq!(all(&database).await, [wanted.clone()]);
    assert_eq!(database.all(&here).await.unwrap(), [(wanted.id.clone(), false)]);
    let key = database.key("k".into()).await.unwrap().unwrap();
    assert_eq!((key.reply.as_deref(), key.fingerprint.as_str()), (Some("reply"), "f"));
    assert_eq!(key.subjects, [wanted.id.to_string()]);
    let log = database.audit(None, 10).await.unwrap();
    assert_eq!((log.len(), log[0].status, log[0].target.as_str()), (1, 201, wanted.id.as_str()));
    assert_eq!(database.spawns().await.unwrap()["base"], (1, made.started_at));
    assert_eq!(database.first_end("ci").await.unwrap(), Some(wanted.ends_at));
    assert_eq!(database.first_end("other").await.unwrap(), None);
    let parent = wanted.parent.clone().unwrap();
    assert_eq!(database.children(&parent).await.unwrap(), [wanted.id.clone()]);
    let later = wanted.ends_at + HOUR;
    database.set_deadline(&wanted.id, later).await.unwrap();
    database.set_internet(&wanted.id, None).await.unwrap();
    let now = database.get(&wanted.id).await.unwrap().unwrap();
    assert_eq!((now.ends_at, now.allow_internet), (later, None));
}

pub(crate) async fn what_is_undone_leaves_no_key_and_what_has_ended_does(subject: &impl Subject) {
    let (database, here) = (open(subject), Placement::local());
    let [undone, ended] = [row(&here), row(&here)];
    begin(&database, &undone).await;
    make(&database, &ended, SandboxState::Running).await;
    database.undo(&here, &undone.id).await.unwrap();
    database.end(&here, &ended.id, "killed").await.unwrap();
    // Twice is as once.
    database.undo(&here, &undone.id).await.unwrap();
    database.end(&here, &ended.id, "killed").await.unwrap();
    assert!(database.all(&here).await.unwrap().is_empty());
    assert!(database.key(undone.id.to_string()).await.unwrap().is_none());
    assert!(database.key(ended.id.to_string()).await.unwrap().is_some());
}

pub(crate) async fn what_exceeds_a_limit_is_not_written(subject: &impl Subject) {
    let (database, here) = (open(subject), Placement::local());
    make(&database, &row(&here), SandboxState::Running).await;
    let limits = |max| Limits { max_sandboxes: max, ..Limits::default() };
    let disk = Limits { max_disk_mib: Some(100), ..Limits::default() };
    let refusals = [
        (limits(Some(1)), Limits::default(), Limited::Sandboxes, false, 1, 1),
        (Limits::default(), limits(Some(1)), Limited::Sandboxes, true, 1, 1),
        (disk, Limits::default(), Limited::Disk, false, 100, 64),
    ];
    for (of_key, of_project, what, by_project, limit, used) in refusals {
        let refused = row(&here);
        let key = NewKey { key: "k".into(), fingerprint: "f".into(), subjects: Vec::new() };
        let quota = quota(of_key, of_project);
        let begun = database.begin(&[refused], Some(key), Some(quota), Some(entry("create"))).await.unwrap();
        let Begun::Exceeded(found) = begun else { panic!("there is no room: {begun:?}") };
        assert_eq!(found, Exceeded { what, of_project: by_project, limit, used });
        assert_eq!(database.all(&here).await.unwrap().len(), 1);
        assert!(database.key("k".into()).await.unwrap().is_none());
        assert!(database.audit(None, 10).await.unwrap().is_empty());
    }
    // All of a fork or nothing.
    let two = [row(&here), row(&here)];
    let quota = |max| Some(quota(limits(Some(max)), Limits::default()));
    assert!(matches!(database.begin(&two, None, quota(2), None).await.unwrap(), Begun::Exceeded(_)));
    assert_eq!(database.all(&here).await.unwrap().len(), 1);
    assert!(matches!(database.begin(&two, None, quota(3), None).await.unwrap(), Begun::Done(None)));
    assert_eq!(database.all(&here).await.unwrap().len(), 3);
}

pub(crate) async fn the_newer_state_of_a_sandbox_stays(subject: &impl Subject) {
    let (database, here) = (open(subject), Placement::local());
    let one = row(&here);
    begin(&database, &one).await;
    // Not before it is there.
    database.set_live(&here, &live(&one.id, SandboxState::Paused, 1)).await.unwrap();
    assert_eq!(database.all(&here).await.unwrap(), [(one.id.clone(), true)]);
    database.commit(&here, &live(&one.id, SandboxState::Running, 0), None, None).await.unwrap();
    let state = async || database.get(&one.id).await.unwrap().unwrap().state;
    for (told, generation, known) in [
        (SandboxState::Paused, 1, SandboxState::Paused),
        (SandboxState::Running, 0, SandboxState::Paused),
        (SandboxState::Running, 1, SandboxState::Running),
        (SandboxState::Paused, 1, SandboxState::Running),
    ] {
        database.set_live(&here, &live(&one.id, told, generation)).await.unwrap();
        assert_eq!(state().await, known, "{told:?} {generation}");
    }
}

pub(crate) async fn a_row_is_changed_by_its_own_node_alone(subject: &impl Subject) {
    let database = open(subject);
    let first = Placement::local();
    let second = Placement { epoch: Epoch(2), ..first.clone() };
    let north = Placement { node: "north".to_owned().into(), epoch: Epoch(2) };
    let [creating, running] = [row(&second), row(&second)];
    begin(&database, &creating).await;
    make(&database, &running, SandboxState::Running).await;
    let before = all(&database).await;
    for other in [&first, &north] {
        assert!(database.all(other).await.unwrap().is_empty());
        database.set_live(other, &live(&running.id, SandboxState::Paused, 9)).await.unwrap();
        database.end(other, &running.id, "killed").await.unwrap();
        database.undo(other, &creating.id).await.unwrap();
        let late = live(&creating.id, SandboxState::Running, 0);
        let refused = database.commit(other, &late, Some("reply".into()), None).await;
        assert!(matches!(refused, Err(Error::Fenced)), "{refused:?}");
        let key = database.key(creating.id.to_string()).await.unwrap();
        assert!(key.is_some_and(|key| key.reply.is_none()));
        assert_eq!(all(&database).await, before);
        assert_eq!(database.all(&second).await.unwrap().len(), 2);
        assert_eq!(database.spawns().await.unwrap()["base"].0, 1);
    }
    // In a later epoch of the node they are still its own.
    let third = Placement { epoch: Epoch(3), ..first };
    assert_eq!(database.all(&third).await.unwrap().len(), 2);
    database.undo(&third, &creating.id).await.unwrap();
    database.end(&third, &running.id, "killed").await.unwrap();
    assert!(database.all(&second).await.unwrap().is_empty());
}

pub(crate) async fn lists_are_narrowed_ordered_and_continued(subject: &impl Subject) {
    let (database, here) = (open(subject), Placement::local());
    let mut rows = Vec::new();
    for number in 0..6_i64 {
        let mut one = row(&here);
        // Two of each time.
        one.started_at = jiff::Timestamp::from_millisecond(1000 + number / 2).unwrap();
        one.metadata = [("n".to_owned(), number.to_string())].into();
        if number == 0 {
            one.project = Project::default();
            one.template = "other".into();
        }
        let state = if number == 1 { SandboxState::Paused } else { SandboxState::Running };
        make(&database, &one, state).await;
        one.state = state;
        rows.push(one);
    }
    rows.sort_by_key(|row| (row.started_at, row.id.clone()));
    let everything = || Filter { limit: 100, ascending: true, ..Filter::default() };
    let ids = async |filter| {
        let found = database.list(filter).await.unwrap();
        found.into_iter().map(|row| row.id).collect::<Vec<_>>()
    };
    let of = |keep: &dyn Fn(&SandboxRow) -> bool| {
        rows.iter().filter(|row| keep(row)).map(|row| row.id.clone()).collect::<Vec<_>>()
    };
    assert_eq!(ids(everything()).await, of(&|_| true));
    let mut backwards = of(&|_| true);
    backwards.reverse();
    assert_eq!(ids(Filter { ascending: false, ..everything() }).await, backwards);
    let blue = blue();
    assert_eq!(
        ids(Filter { project: Some(blue.clone()), ..everything() }).await,
        of(&|row| row.project == blue)
    );
    let template = Some("other".to_owned());
    assert_eq!(ids(Filter { template, ..everything() }).await, of(&|row| row.template == "other"));
    let state = Some(SandboxState::Paused);
    assert_eq!(ids(Filter { state, ..everything() }).await, of(&|row| row.state == SandboxState::Paused));
    let metadata: BTreeMap<_, _> = [("n".to_owned(), "3".to_owned())].into();
    let found = ids(Filter { metadata: metadata.clone(), ..everything() }).await;
    assert_eq!(found, of(&|row| row.metadata == metadata));
    let after = jiff::Timestamp::from_millisecond(1001).unwrap();
    let found = ids(Filter { started_after: Some(after), ..everything() }).await;
    assert_eq!(found, of(&|row| row.started_at >= after));
    // Page by page, each way.
    for ascending in [true, false] {
        let (mut pages, mut place) = (Vec::new(), None);
        loop {
            let page = Filter { ascending, after: place.take(), limit: 2, ..Filter::default() };
            let page = database.list(page).await.unwrap();
            let Some(last) = page.last() else { break };
            place = Some((last.started_at.as_millisecond(), last.id.to_string()));
            pages.extend(page.into_iter().map(|row| row.id));
        }
        assert_eq!(pages, ids(Filter { ascending, ..everything() }).await);
    }
}

pub(crate) async fn what_is_resumed_or_paused_counts_as_both(subject: &impl Subject) {
    let (database, here) = (open(subject), Placement::local());
    let [paused, running] = [row(&here), row(&here)];
    make(&database, &paused, SandboxState::Paused).await;
    make(&database, &running, SandboxState::Running).await;
    let used = async || database.projects().await.unwrap().into_iter().find(|info| info.name == blue());
    let counts = async || used().await.map(|info| (info.used.sandboxes, info.used.paused)).unwrap();
    assert_eq!(counts().await, (1, 1));
    let tight = quota(Limits { max_sandboxes: Some(1), ..Limits::default() }, Limits::default());
    let refused = database.claim(&paused.id, Some(tight.clone())).await.unwrap();
    assert!(matches!(refused, Claim::Exceeded(Exceeded { what: Limited::Sandboxes, used: 1, .. })));
    assert_eq!(database.claim(&running.id, None).await.unwrap(), Claim::NotPaused);
    assert_eq!(database.claim(&paused.id, None).await.unwrap(), Claim::Held);
    assert_eq!(counts().await, (2, 1));
    // Whoever joins takes no more.
    assert_eq!(database.claim(&paused.id, Some(tight)).await.unwrap(), Claim::Held);
    database.disclaim(&paused.id).await.unwrap();
    assert_eq!(counts().await, (2, 1));
    database.disclaim(&paused.id).await.unwrap();
    database.disclaim(&paused.id).await.unwrap();
    assert_eq!(counts().await, (1, 1));
    let tight = quota(Limits { max_paused: Some(1), ..Limits::default() }, Limits::default());
    let refused = database.begin_pause(&running.id, tight, 128).await.unwrap();
    assert!(matches!(refused, Some(Exceeded { what: Limited::Paused, used: 1, .. })));
    assert_eq!(counts().await, (1, 1));
    let free = quota(Limits::default(), Limits::default());
    assert_eq!(database.begin_pause(&running.id, free, 128).await.unwrap(), None);
    assert_eq!(counts().await, (1, 2));
    database.end_pause(&running.id).await.unwrap();
    assert_eq!(counts().await, (1, 1));
    assert_eq!(database.claim(&paused.id, None).await.unwrap(), Claim::Held);
    database.forget_claims(&here).await.unwrap();
    assert_eq!(counts().await, (1, 1));
}

pub(crate) async fn what_was_written_is_there_for_the_next_server(subject: &impl Subject) {
    let (time, here) = (Simulated::start(), Placement::local());
    let one = row(&here);
    let database = subject.open(time.clock());
    database.count_from_this_boot().await.unwrap();
    make(&database, &one, SandboxState::Running).await;
    database.flush().await.unwrap();
    let before = all(&database).await;
    drop(database);
    let database = subject.open(time.clock());
    database.count_from_this_boot().await.unwrap();
    assert_eq!(all(&database).await, before);
    assert!(database.key(one.id.to_string()).await.unwrap().is_some());
}
