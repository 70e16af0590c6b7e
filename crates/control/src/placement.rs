//! Where a sandbox is: on which node, and in which of its epochs.
//!
//! A node has an epoch for each time that it is given its sandboxes to look after. Whoever speaks for a node speaks for one
//! epoch: what it says of a sandbox that is on another node, or that was given to the node in a later epoch, says nothing.
//! `kelvin serve` is one node, [`NodeName::local`], whose first epoch does not end: its data directory is nobody else's.

use std::fmt;
use std::sync::Arc;

/// The name of a node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NodeName(Arc<str>);

impl NodeName {
    /// The node of a server that is one.
    pub fn local() -> Self {
        Self("local".into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for NodeName {
    fn from(name: String) -> Self {
        Self(name.into())
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Counts how often a node was given its sandboxes to look after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(pub u32);

impl Epoch {
    /// That of what was written before there were epochs, too.
    pub const FIRST: Self = Self(1);
}

/// A node, and one of its epochs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    pub node: NodeName,
    pub epoch: Epoch,
}

impl Placement {
    /// That of everything on a server that is one node.
    pub fn local() -> Self {
        Self { node: NodeName::local(), epoch: Epoch::FIRST }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use kelvin_api::error::ErrorCode;
    use kelvin_api::id::SandboxId;
    use kelvin_api::sandbox::SandboxState;
    use kelvin_host::clock::Clock;
    use kelvin_node_api::Changes;

    use super::*;
    use crate::database::suite::{begin, live, quota, row};
    use crate::database::{Claim, Database, Filter, NewSnapshot};
    use crate::testing::ScriptedNode;
    use crate::{ApiKey, BuildOptions, Control};

    /// One that is being made, one that runs, one that is paused and being resumed; and a snapshot that is being taken.
    async fn settle(database: &Database, at: &Placement) -> [SandboxId; 3] {
        let [creating, running, paused] = [row(at), row(at), row(at)];
        for row in [&creating, &running, &paused] {
            begin(database, row).await;
        }
        database.commit(at, &live(&running.id, SandboxState::Running, 0), None, None).await.unwrap();
        database.commit(at, &live(&paused.id, SandboxState::Paused, 1), None, None).await.unwrap();
        assert_eq!(database.claim(&paused.id, None).await.unwrap(), Claim::Held);
        let snapshot =
            NewSnapshot { id: format!("of-{}", running.id), mib: 1, name: None, node: at.node.clone() };
        let quota = quota(Default::default(), Default::default());
        assert!(database.begin_snapshot(snapshot, quota, None).await.unwrap().is_none());
        [creating, running, paused].map(|row| row.id)
    }

    /// All that is known of what is at `at`.
    async fn known(database: &Database, at: &Placement, ids: &[SandboxId; 3]) -> String {
        let mut rows = database.list(Filter { limit: 100, ..Filter::default() }).await.unwrap();
        rows.retain(|row| row.placement == *at);
        let mut keys = Vec::new();
        for id in ids {
            keys.push(database.key(id.to_string()).await.unwrap());
        }
        let all = database.all(at).await.unwrap();
        let mine: Vec<_> = all.into_iter().filter(|(id, _)| ids.contains(id)).collect();
        let projects = database.projects().await.unwrap();
        format!("{rows:?} {keys:?} {mine:?} {projects:?}")
    }

    async fn open(dir: &Path, node: &Arc<ScriptedNode>) -> Control {
        let key = ApiKey::open(&dir.join("api-key")).unwrap();
        let node: Arc<dyn kelvin_node_api::NodeService> = Arc::clone(node) as _;
        Control::open(dir, node, key, None, Clock::system().unwrap(), BuildOptions::default()).await.unwrap()
    }

    /// Has the node tell `changes`, and returns when they are written.
    async fn follow(control: &Control, node: &ScriptedNode, changes: Changes) {
        let last = row(&Placement::local());
        let database = &control.inner.database;
        begin(database, &last).await;
        node.tell(changes);
        // They are written in the order in which they are told.
        node.tell(Changes { ended: [(last.id.clone(), String::new())].into(), ..Changes::default() });
        let gone = async {
            while database.all(&Placement::local()).await.unwrap().iter().any(|(id, _)| *id == last.id) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), gone).await.expect("the changes are written");
    }

    #[tokio::test]
    async fn a_node_ends_and_changes_no_sandbox_of_another_node_or_of_a_later_epoch() {
        let north = Placement { node: "north".to_owned().into(), epoch: Epoch::FIRST };
        let later = Placement { epoch: Epoch(2), ..Placement::local() };
        for other in [north, later] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("kelvin.db");
            let database = Database::open(&path, Clock::system().unwrap()).unwrap();
            database.count_from_this_boot().await.unwrap();
            let mine = settle(&database, &Placement::local()).await;
            let theirs = settle(&database, &other).await;
            let unfinished = database.unfinished_snapshots(&other.node).await.unwrap();
            let before = known(&database, &other, &theirs).await;
            drop(database);

            let node = Arc::new(ScriptedNode::default());
            // One of them the node has: it is said to be gone later.
            node.has(vec![live(&mine[1], SandboxState::Running, 0)]);
            let control = open(dir.path(), &node).await;
            let database = &control.inner.database;
            assert_eq!(database.all(&Placement::local()).await.unwrap(), [(mine[1].clone(), false)]);
            // What a project has together changes with this node's.
            let counts = |text: &str| text.split("ProjectInfo").next().unwrap().to_owned();
            assert_eq!(counts(&known(database, &other, &theirs).await), counts(&before), "after a start");
            if other.node != NodeName::local() {
                assert_eq!(database.unfinished_snapshots(&other.node).await.unwrap(), unfinished[..]);
                database.forget_snapshot(&NodeName::local(), unfinished[0].clone()).await.unwrap();
                assert!(database.snapshot_owners().await.unwrap().contains_key(&unfinished[0]));
            }
            let started = known(database, &other, &theirs).await;

            let said = |id: &SandboxId| (id.clone(), live(id, SandboxState::Paused, 7));
            let mut changes = Changes { generation: 1, ..Changes::default() };
            changes.changed = theirs.iter().map(said).collect();
            follow(&control, &node, changes).await;
            let mut changes = Changes { generation: 2, ..Changes::default() };
            changes.ended = theirs.iter().map(|id| (id.clone(), String::new())).collect();
            follow(&control, &node, changes).await;
            assert_eq!(known(database, &other, &theirs).await, started, "after changes");
            node.has(theirs.iter().map(|id| live(id, SandboxState::Paused, 7)).collect());
            follow(&control, &node, Changes { resync: true, ..Changes::default() }).await;
            node.has(Vec::new());
            follow(&control, &node, Changes { resync: true, ..Changes::default() }).await;
            assert!(database.all(&Placement::local()).await.unwrap().is_empty());
            database.undo(&Placement::local(), &theirs[0]).await.unwrap();
            let late = live(&theirs[0], SandboxState::Running, 0);
            database.commit(&Placement::local(), &late, None, None).await.unwrap_err();
            database.forget_claims(&Placement::local()).await.unwrap();
            let mine_are_gone = known(database, &other, &theirs).await;
            assert_eq!(counts(&mine_are_gone), counts(&started), "after a resync");
            // One is being made, one runs, one counts as running while it is resumed.
            assert!(mine_are_gone.contains("sandboxes: 3, creating: 1"), "{mine_are_gone}");
            control.stop().await;
        }
    }

    #[tokio::test]
    async fn a_sandbox_of_another_node_is_shown_and_is_its_own_nodes_to_change() {
        let north = Placement { node: "north".to_owned().into(), epoch: Epoch::FIRST };
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(&dir.path().join("kelvin.db"), Clock::system().unwrap()).unwrap();
        let [_, running, paused] = settle(&database, &north).await;
        drop(database);
        let control = open(dir.path(), &Arc::default()).await;
        let inner = &control.inner;
        for (id, state) in [(&running, SandboxState::Running), (&paused, SandboxState::Paused)] {
            assert_eq!(inner.get(id).await.unwrap().state, state);
            let refused = inner.kill(id).await.unwrap_err();
            assert_eq!(refused.error_code, ErrorCode::NodeUnreachable);
            assert!(refused.message.contains("node north"), "{}", refused.message);
            assert_eq!(inner.get(id).await.unwrap().state, state);
        }
        let page = inner.list(Filter { limit: 10, ..Filter::default() }, None).await.unwrap();
        assert_eq!(page.sandboxes.len(), 2);
        control.stop().await;
    }
}
