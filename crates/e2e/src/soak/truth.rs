//! What is listed, against what the clients of a soak know. Called while they stand still and the node has settled.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kelvin_api::id::SandboxId;
use kelvin_api::sandbox::SandboxState;
use kelvin_client::Client;

use super::book::{Shared, Up};
use super::load::{Belief, Kept, Worker, is_itself};
use crate::{LIMIT, Server};

/// How much later than its time a sandbox may end.
const LATE: Duration = Duration::from_secs(5);

/// Compares, tells faults, corrects what clients were unsure of, and ends what nobody knows: it was made for clients that
/// have left. How many sandboxes were listed.
pub async fn compare(shared: &Shared, server: &Server, workers: &mut [Worker]) -> usize {
    let up: Up = shared.up().await;
    let client = up.client.of_project("*");
    let mut listed = stable(shared, &client, workers).await;
    let count = listed.len();
    for worker in workers.iter_mut() {
        for id in &worker.killed {
            if listed.contains_key(id) {
                shared.fault(format!("sandbox {id} was killed, and is listed"));
            }
        }
        let mut kept = Vec::new();
        for mut one in worker.kept.drain(..) {
            let found = listed.remove(&one.id);
            match (one.belief, found) {
                (Belief::Ends(at), Some(_)) if at.elapsed() > LATE => {
                    shared.fault(format!("sandbox {} lives {:?} after its time", one.id, at.elapsed()));
                    listed.insert(one.id, SandboxState::Running);
                    continue;
                }
                (Belief::Ends(_), Some(_)) => {
                    kept.push(one);
                    continue;
                }
                (Belief::Ends(_) | Belief::Unsure { killed: true }, None) => continue,
                (_, None) => {
                    lost(shared, &format!("sandbox {} ({:?})", one.id, one.belief));
                    continue;
                }
                (Belief::Runs, Some(SandboxState::Paused)) => {
                    shared.fault(format!("sandbox {} is paused, and nobody asked for it", one.id));
                }
                (Belief::IsPaused, Some(SandboxState::Running)) => {
                    shared.fault(format!("sandbox {} runs, and was paused", one.id));
                }
                _ => {}
            }
            one.belief = match found {
                Some(SandboxState::Paused) => Belief::IsPaused,
                _ => Belief::Runs,
            };
            if one.belief == Belief::Runs {
                match tokio::time::timeout(LIMIT, is_itself(&up.client, &one)).await {
                    Ok(Ok(true)) => shared.did("memory looked at"),
                    Ok(Ok(false)) => shared.fault(format!("sandbox {} has another's memory", one.id)),
                    Ok(Err(error)) => shared.judge("command at the end of a round", &up, &error),
                    Err(_) => shared.fault(format!("sandbox {}: its agent does not answer", one.id)),
                }
            }
            kept.push(one);
        }
        worker.kept = kept;
    }
    for id in listed.keys() {
        shared.did("made for a client that left");
        if let Err(error) = up.client.kill(id).await {
            shared.judge("kill what is listed", &up, &error);
        }
    }
    server.settle().await;
    for snapshot in up.client.snapshots().await.expect("a list") {
        if let Err(error) = up.client.delete_snapshot(&snapshot.snapshot_id, false).await {
            shared.judge("delete a snapshot that nobody uses", &up, &error);
        } else {
            shared.did("snapshot of a client that left");
        }
    }
    count
}

/// The list, once it no longer changes: the control plane hears from the node what has ended, been paused or resumed. What
/// contradicts a client is looked at again until it is [`LATE`].
async fn stable(shared: &Shared, client: &Client, workers: &[Worker]) -> BTreeMap<SandboxId, SandboxState> {
    let started = Instant::now();
    // What went with its VMM stays away.
    let late = if shared.book().vmms_die { LATE / 5 } else { LATE };
    let mut before = None;
    loop {
        let rows = client.list_all(&[]).await.expect("a list");
        let now: BTreeMap<_, _> = rows.into_iter().map(|row| (row.sandbox_id, row.state)).collect();
        let contradicts = workers.iter().any(|worker| {
            let is_wrong = |one: &Kept| match one.belief {
                Belief::Runs => now.get(&one.id) != Some(&SandboxState::Running),
                Belief::IsPaused => now.get(&one.id) != Some(&SandboxState::Paused),
                Belief::Ends(_) => now.contains_key(&one.id),
                Belief::Unsure { .. } => false,
            };
            worker.kept.iter().any(is_wrong) || worker.killed.iter().any(|id| now.contains_key(id))
        });
        if before.as_ref() == Some(&now) && (!contradicts || started.elapsed() > late) {
            return now;
        }
        assert!(started.elapsed() < LIMIT, "the list changes while nobody asks for anything");
        before = Some(now);
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

/// A sandbox that nobody ended is gone: each VMM that was killed may have been one's, no more of them than that.
fn lost(shared: &Shared, what: &str) {
    shared.did("sandbox lost");
    let killed = shared.done("VMM killed");
    if shared.done("sandbox lost") > killed {
        shared.fault(format!("{what} is gone; nobody ended it, and {killed} VMMs were killed in all"));
    }
}
