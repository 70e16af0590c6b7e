//! Builds, what they said and whose their templates are.

use std::time::Duration;

use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::BuildId;
use kelvin_api::sandbox::LogLevel;

use super::data::{Subject, new, open};
use crate::database::{
    BuildEnd, BuildError, BuildLine, BuildState, Caps, Database, Lines, NewBuild, Requested, Started, Wanted,
};
use crate::placement::NodeName;

const CAPS: Caps =
    Caps { templates: 2, requested: 3, under_way: 1, kept: 2, tags: 100, life_ms: 3_600_000, log_bytes: 200 };

fn asked(project: &str, template: &str) -> NewBuild {
    NewBuild {
        id: BuildId::random(),
        template: template.parse().unwrap(),
        project: project.parse().unwrap(),
        node: NodeName::local(),
        wanted: Wanted { tags: vec!["v1".into()], vcpus: Some(2), ..Wanted::default() },
        key: None,
    }
}

fn failed() -> BuildEnd {
    let failure = Failure::new(ErrorCode::BuildStepFailed, "it failed", "mend it");
    BuildEnd::Error(BuildError { step: Some(3), failure })
}

fn ready(image: &str) -> BuildEnd {
    BuildEnd::Ready { image: image.into(), disk_mib: 7, vcpus: 2, memory_mib: 512 }
}

async fn requested(database: &Database, build: &NewBuild) -> BuildId {
    let done = database.request_build(build.clone(), CAPS).await.unwrap();
    assert!(matches!(done, Requested::Done(_)), "{done:?}");
    build.id.clone()
}

async fn state(database: &Database, id: &BuildId) -> Option<BuildState> {
    database.build(id).await.unwrap().map(|row| row.state)
}

pub(crate) async fn a_build_ends_once_and_gives_its_template_tags(subject: &impl Subject) {
    let database = open(subject);
    database.add_key_of(new("k")).await.unwrap();
    let first = NewBuild { key: Some("k".into()), ..asked("blue", "web") };
    let id = requested(&database, &first).await;
    assert_eq!(database.key("k".into()).await.unwrap().unwrap().subjects, [id.to_string()]);
    assert_eq!(database.start_build(&id, CAPS).await.unwrap(), Started::Done);
    assert_eq!(database.start_build(&id, CAPS).await.unwrap(), Started::NotRequested);
    assert_eq!(state(&database, &id).await, Some(BuildState::Waiting));
    let other = requested(&database, &asked("blue", "web")).await;
    assert_eq!(database.start_build(&other, CAPS).await.unwrap(), Started::TooMany { limit: 1 });
    database.run_build(&id).await.unwrap();
    database.run_build(&other).await.unwrap();
    assert_eq!(state(&database, &id).await, Some(BuildState::Building));
    assert_eq!(state(&database, &other).await, Some(BuildState::Requested));
    assert!(database.tags("blue", "web").await.unwrap().is_empty());
    assert!(database.end_build(&id, ready("i1")).await.unwrap());
    assert!(!database.end_build(&id, failed()).await.unwrap(), "it has ended");
    let row = database.build(&id).await.unwrap().unwrap();
    assert_eq!((row.state, row.image.as_deref(), row.disk_mib), (BuildState::Ready, Some("i1"), Some(7)));
    assert_eq!((row.wanted.vcpus, row.wanted.memory_mib), (Some(2), Some(512)));
    assert!(row.ended_at.is_some() && row.error.is_none());
    let tags = database.tags("blue", "web").await.unwrap();
    assert_eq!((tags.len(), tags[0].tag.as_str(), tags[0].build.as_str()), (1, "v1", id.as_str()));
    assert_eq!(database.build_of_image("web", "i1").await.unwrap(), Some(id.clone()));
    assert_eq!(database.build_of_image("web", "i2").await.unwrap(), None);
    // What fails moves no tag.
    assert_eq!(database.start_build(&other, CAPS).await.unwrap(), Started::Done);
    assert!(database.end_build(&other, failed()).await.unwrap());
    let row = database.build(&other).await.unwrap().unwrap();
    assert_eq!(
        row.error.map(|error| (error.step, error.failure.error_code)),
        Some((Some(3), ErrorCode::BuildStepFailed))
    );
    assert_eq!(database.tags("blue", "web").await.unwrap()[0].build, id.as_str());
    // After a start.
    let late = requested(&database, &asked("blue", "web")).await;
    let waits = requested(&database, &asked("blue", "web")).await;
    database.start_build(&late, CAPS).await.unwrap();
    let BuildEnd::Error(error) = failed() else { panic!() };
    let north = NodeName::from("north".to_owned());
    assert!(database.interrupt_builds(&north, error.clone()).await.unwrap().is_empty());
    assert_eq!(
        database.interrupt_builds(&NodeName::local(), error).await.unwrap(),
        std::slice::from_ref(&late)
    );
    assert_eq!(state(&database, &late).await, Some(BuildState::Error));
    assert_eq!(state(&database, &waits).await, Some(BuildState::Requested));
}

pub(crate) async fn a_version_is_unnamed_since_its_last_tag_moved(subject: &impl Subject) {
    let database = open(subject);
    let built = async |tags: &[&str], image: &str| {
        let wanted = Wanted { tags: tags.iter().map(ToString::to_string).collect(), ..Wanted::default() };
        let id = requested(&database, &NewBuild { wanted, ..asked("blue", "web") }).await;
        database.start_build(&id, CAPS).await.unwrap();
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(database.end_build(&id, ready(image)).await.unwrap());
        id
    };
    let since = async |id: &BuildId| database.build(id).await.unwrap().unwrap().untagged_at;
    let default = async || database.template_owner("web").await.unwrap().unwrap().default;
    let tag = async |project: &str, build: &str, tag: &str| {
        database.add_tags(project.into(), "web".into(), build.into(), vec![tag.into()]).await.unwrap();
    };
    assert_eq!(database.template_owner("web").await.unwrap(), None);
    let first = built(&["v1"], "i1").await;
    assert_eq!((default().await, since(&first).await), (None, None));
    // What the name means while no build has its default tag has a time of its own from when one has.
    let before = built(&["v0"], "i0").await;
    assert_eq!(database.remove_tags("blue".into(), "web".into(), vec!["v0".into()]).await.unwrap(), None);
    let stamped = since(&before).await.expect("no tag names it");
    let second = built(&[], "i2").await;
    assert!(since(&before).await > Some(stamped));
    assert_eq!((default().await.as_ref(), since(&second).await), (Some(&second), None));
    assert_eq!(database.template_owners().await.unwrap()["web"].default.as_ref(), Some(&second));
    let third = built(&[], "i3").await;
    assert_eq!(default().await.as_ref(), Some(&third));
    let unnamed = since(&second).await.expect("no tag names it");
    // Another tag moves: it is unnamed since then. Another project's does not count.
    tokio::time::advance(Duration::from_secs(1)).await;
    tag("blue", third.as_str(), "v1").await;
    tag("green", second.as_str(), "mine").await;
    assert_eq!(since(&second).await, Some(unnamed));
    assert!(since(&first).await > Some(unnamed));
    // Back: it is named, and what was there is not.
    tag("blue", first.as_str(), "default").await;
    assert_eq!(
        (default().await.as_ref(), since(&first).await, since(&third).await),
        (Some(&first), None, None)
    );
    assert_eq!(database.remove_tags("blue".into(), "web".into(), vec!["v1".into()]).await.unwrap(), None);
    assert!(since(&third).await.is_some());
    // As it was before tags named builds.
    tag("blue", "i2", "default").await;
    assert_eq!((default().await, since(&second).await), (None, None));
    let all = database.all_tags().await.unwrap();
    let all: Vec<_> =
        all.iter().map(|(project, template, row)| (&**project, &**template, &*row.tag)).collect();
    assert_eq!(all, [("blue", "web", "default"), ("green", "web", "mine")]);
    // What a tag names is not forgotten, however many come after it.
    tag("blue", first.as_str(), "v1").await;
    // Nor the last ones that tags have named: there is a way back to them, until others have come.
    built(&[], "later").await;
    for _ in 0..5 {
        let id = requested(&database, &asked("blue", "web")).await;
        database.start_build(&id, CAPS).await.unwrap();
        assert!(database.end_build(&id, failed()).await.unwrap());
    }
    assert_eq!(state(&database, &third).await, Some(BuildState::Ready));
    for number in 0..8 {
        built(&[], &format!("later {number}")).await;
    }
    assert_eq!(state(&database, &first).await, Some(BuildState::Ready));
    assert_eq!(state(&database, &third).await, None);
}

pub(crate) async fn a_template_is_its_first_projects(subject: &impl Subject) {
    let database = open(subject);
    requested(&database, &asked("blue", "web")).await;
    let refused = database.request_build(asked("green", "web"), CAPS).await.unwrap();
    assert_eq!(refused, Requested::NameTaken);
    requested(&database, &asked("blue", "api")).await;
    let third = database.request_build(asked("blue", "jobs"), CAPS).await.unwrap();
    assert!(matches!(third, Requested::TooMany { limit: 2, .. }), "{third:?}");
    let owners = database.template_owners().await.unwrap();
    assert_eq!((owners.len(), owners["web"].project.as_str(), owners["web"].public), (2, "blue", false));
    assert!(!database.set_template_public("green", "web", true).await.unwrap());
    assert!(database.set_template_public("blue", "web", true).await.unwrap());
    let owners = database.template_owners().await.unwrap();
    assert!(owners["web"].public && !owners["api"].public);
    let last = requested(&database, &asked("blue", "web")).await;
    let fourth = database.request_build(asked("blue", "web"), CAPS).await.unwrap();
    assert!(matches!(fourth, Requested::TooMany { limit: 3, .. }), "{fourth:?}");
    database.add_tags("blue".into(), "web".into(), "i".into(), vec!["v1".into()]).await.unwrap();
    database.forget_template("web").await.unwrap();
    assert_eq!(state(&database, &last).await, None);
    assert!(database.tags("blue", "web").await.unwrap().is_empty());
    assert!(!database.template_owners().await.unwrap().contains_key("web"));
    requested(&database, &asked("green", "web")).await;
}

pub(crate) async fn builds_that_are_too_old_are_forgotten(subject: &impl Subject) {
    let database = open(subject);
    let mut all = Vec::new();
    for at in 0..6 {
        let id = requested(&database, &asked("blue", "web")).await;
        database.start_build(&id, CAPS).await.unwrap();
        let end = if at == 0 { ready("i1") } else { failed() };
        database.end_build(&id, end).await.unwrap();
        let line = BuildLine {
            at: jiff::Timestamp::UNIX_EPOCH,
            level: LogLevel::Info,
            step: None,
            message: "a".into(),
        };
        database.add_build_lines(&id, 0, vec![line]).await.unwrap();
        all.push(id);
        tokio::time::advance(Duration::from_secs(1)).await;
    }
    let never_started = requested(&database, &asked("blue", "web")).await;
    let kept = database.builds_of("web", None, 100).await.unwrap();
    let kept: Vec<_> = kept.into_iter().map(|row| row.id).collect();
    // The one that the template is, whatever has failed since, and the newest.
    assert_eq!(kept, [never_started.clone(), all[5].clone(), all[4].clone(), all[0].clone()]);
    assert_eq!(database.build_lines(&all[5], Lines::Skip(0), LogLevel::Debug, 9).await.unwrap().len(), 1);
    assert!(database.build_lines(&all[1], Lines::Skip(0), LogLevel::Debug, 9).await.unwrap().is_empty());
    let first = database.builds_of("web", None, 2).await.unwrap();
    let place = (first[1].created_at.as_millisecond(), first[1].id.to_string());
    let rest = database.builds_of("web", Some(place), 9).await.unwrap();
    assert_eq!(rest.into_iter().map(|row| row.id).collect::<Vec<_>>(), kept[2..]);
    tokio::time::advance(Duration::from_secs(7200)).await;
    requested(&database, &asked("blue", "web")).await;
    assert_eq!(state(&database, &never_started).await, None);
}

pub(crate) async fn what_a_build_said_is_read_from_both_ends(subject: &impl Subject) {
    let database = open(subject);
    let id = requested(&database, &asked("blue", "web")).await;
    let line = |number: i64| BuildLine {
        at: jiff::Timestamp::from_millisecond(1000 + number).unwrap(),
        level: if number % 2 == 0 { LogLevel::Debug } else { LogLevel::Warn },
        step: (number >= 4).then_some(1),
        message: number.to_string(),
    };
    database.add_build_lines(&id, 0, (0..6).map(line).collect()).await.unwrap();
    database.add_build_lines(&id, 6, (6..10).map(line).collect()).await.unwrap();
    // Written again after a doubt.
    database.add_build_lines(&id, 6, (6..10).map(line).collect()).await.unwrap();
    let read = async |lines, level, limit| {
        let found = database.build_lines(&id, lines, level, limit).await.unwrap();
        found.into_iter().map(|line| line.message).collect::<Vec<_>>().join("")
    };
    assert_eq!(read(Lines::Skip(0), LogLevel::Debug, 100).await, "0123456789");
    assert_eq!(read(Lines::Skip(4), LogLevel::Debug, 3).await, "456");
    assert_eq!(read(Lines::Skip(10), LogLevel::Debug, 3).await, "");
    assert_eq!(read(Lines::Skip(1), LogLevel::Info, 2).await, "35");
    assert_eq!(read(Lines::From(1004), LogLevel::Debug, 3).await, "456");
    assert_eq!(read(Lines::Back(None), LogLevel::Debug, 3).await, "987");
    assert_eq!(read(Lines::Back(Some(1004)), LogLevel::Warn, 9).await, "31");
    assert_eq!(read(Lines::LastOf(Some(1)), LogLevel::Debug, 2).await, "89");
    assert_eq!(read(Lines::LastOf(None), LogLevel::Debug, 9).await, "0123");
    let found = database.build_lines(&id, Lines::Skip(5), LogLevel::Debug, 1).await.unwrap();
    assert_eq!(found, [line(5)]);
}

pub(crate) async fn what_a_projects_builds_said_is_bounded(subject: &impl Subject) {
    let database = open(subject);
    let said = async |project: &str, template: &str| {
        let id = requested(&database, &asked(project, template)).await;
        database.start_build(&id, CAPS).await.unwrap();
        let line = BuildLine {
            at: jiff::Timestamp::UNIX_EPOCH,
            level: LogLevel::Info,
            step: None,
            message: "a".repeat(30),
        };
        database.add_build_lines(&id, 0, vec![line]).await.unwrap();
        tokio::time::advance(Duration::from_secs(1)).await;
        id
    };
    let lines = async |id: &BuildId| {
        let lines = database.build_lines(id, Lines::Skip(0), LogLevel::Debug, 9).await.unwrap();
        lines.into_iter().map(|line| line.message).collect::<Vec<_>>()
    };
    let kept = |lines: Vec<String>| lines == ["a".repeat(30)];
    let others = said("green", "other").await;
    database.end_build(&others, failed()).await.unwrap();
    let mut all = Vec::new();
    for template in ["web", "api", "web"] {
        let id = said("blue", template).await;
        database.end_build(&id, failed()).await.unwrap();
        all.push(id);
    }
    for id in &all {
        assert!(kept(lines(id).await), "there is room until the next begins");
    }
    let last = said("blue", "api").await;
    // Two lines have room; the one that runs and another project's are not counted.
    let first = lines(&all[0]).await;
    assert!(first.len() == 1 && first[0].contains("not kept any more"), "{first:?}");
    for id in [&all[1], &all[2], &last, &others] {
        assert!(kept(lines(id).await));
    }
    assert_eq!(state(&database, &all[0]).await, Some(BuildState::Error));
}
