//! What became of sandboxes.

use kelvin_api::event::{Event, Happened};
use kelvin_api::id::SandboxId;
use kelvin_api::sandbox::{SandboxState, StartPath};

use super::data::{HOUR, Subject, begin, blue, live, make, open, row};
use crate::database::{Database, Which};
use crate::placement::{Epoch, Placement};

async fn events(database: &Database, which: Which) -> Vec<Event> {
    database.events(Which { limit: 100, ..which }).await.unwrap()
}

async fn of(database: &Database, id: &SandboxId) -> Vec<Happened> {
    let all = events(database, Which { sandbox: Some(id.clone()), ..Which::default() }).await;
    all.into_iter().map(|event| event.what).collect()
}

pub(crate) async fn what_becomes_of_a_sandbox_is_told_once_and_in_order(subject: &impl Subject) {
    let (database, here) = (open(subject), Placement::local());
    let parent = Some(SandboxId::random());
    let mut one = row(&here);
    one.parent.clone_from(&parent);
    make(&database, &one, SandboxState::Running).await;
    // Committed twice, as a start does with what a server before it has begun.
    database.commit(&here, &live(&one.id, SandboxState::Running, 0), None, None).await.unwrap();
    let created = Happened::Created { start_path: StartPath::Clone, parent };
    assert_eq!(of(&database, &one.id).await, std::slice::from_ref(&created));
    database.set_live(&here, &live(&one.id, SandboxState::Paused, 1)).await.unwrap();
    // What is known, and what is older than that, is no event.
    database.set_live(&here, &live(&one.id, SandboxState::Paused, 1)).await.unwrap();
    database.set_live(&here, &live(&one.id, SandboxState::Running, 0)).await.unwrap();
    assert_eq!(of(&database, &one.id).await, [created.clone(), Happened::Paused]);
    // Resumed and paused again before the node was asked.
    database.set_live(&here, &live(&one.id, SandboxState::Paused, 2)).await.unwrap();
    database.set_live(&here, &live(&one.id, SandboxState::Running, 2)).await.unwrap();
    let ends_at = one.ends_at + HOUR;
    database.set_deadline(&one.id, ends_at).await.unwrap();
    database.set_internet(&one.id, Some(false)).await.unwrap();
    let long = "é".repeat(1000);
    database.end(&here, &one.id, &long).await.unwrap();
    database.end(&here, &one.id, "again").await.unwrap();
    let told = of(&database, &one.id).await;
    let Some((Happened::Ended { reason }, told)) = told.split_last() else { panic!("{told:?}") };
    assert!(long.starts_with(reason) && (1000..=1024).contains(&reason.len()), "{}", reason.len());
    let [paused, resumed] = [Happened::Paused, Happened::Resumed];
    let changed = [Happened::DeadlineSet { end_at: ends_at }, Happened::NetworkSet];
    assert_eq!(told, [&[created, paused.clone(), resumed.clone(), paused, resumed][..], &changed].concat());

    let other = row(&here);
    make(&database, &other, SandboxState::Paused).await;
    let all = events(&database, Which::default()).await;
    assert!(all.is_sorted_by(|one, next| one.id < next.id));
    assert!(all.iter().all(|event| event.project == blue() && event.template == "base"));
    let last = all.last().unwrap();
    assert_eq!(last.sandbox, other.id);
    // Who goes on behind what it has seen misses nothing and sees nothing twice.
    let mut seen = Vec::new();
    loop {
        let after = seen.last().map_or(0, |event: &Event| event.id);
        let next = database.events(Which { after, limit: 2, ..Which::default() }).await.unwrap();
        if next.is_empty() {
            break;
        }
        seen.extend(next);
    }
    assert_eq!(seen, all);
    let green = Some("green".parse().unwrap());
    assert!(events(&database, Which { project: green, ..Which::default() }).await.is_empty());
    assert_eq!(events(&database, Which { project: Some(blue()), ..Which::default() }).await, all);
}

pub(crate) async fn there_is_no_event_of_what_was_not_recorded(subject: &impl Subject) {
    let (database, here) = (open(subject), Placement::local());
    let later = Placement { epoch: Epoch(2), ..here.clone() };
    let [undone, anothers] = [row(&here), row(&later)];
    begin(&database, &undone).await;
    assert!(of(&database, &undone.id).await.is_empty(), "nobody has seen it");
    database.set_live(&here, &live(&undone.id, SandboxState::Paused, 1)).await.unwrap();
    database.undo(&here, &undone.id).await.unwrap();
    assert!(of(&database, &undone.id).await.is_empty());
    begin(&database, &anothers).await;
    database.commit(&here, &live(&anothers.id, SandboxState::Running, 0), None, None).await.unwrap_err();
    assert!(of(&database, &anothers.id).await.is_empty(), "it is not its node's any more");
    database.commit(&later, &live(&anothers.id, SandboxState::Running, 0), None, None).await.unwrap();
    database.set_live(&here, &live(&anothers.id, SandboxState::Paused, 1)).await.unwrap();
    database.end(&here, &anothers.id, "killed").await.unwrap();
    assert_eq!(of(&database, &anothers.id).await.len(), 1);
    let gone = row(&here);
    database.set_deadline(&gone.id, gone.ends_at).await.unwrap();
    database.set_internet(&gone.id, None).await.unwrap();
    assert!(of(&database, &gone.id).await.is_empty());
}
