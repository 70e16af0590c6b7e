//! A node that says what a test has it say, and does nothing.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::{SandboxId, SnapshotId, TemplateName};
use kelvin_api::network::{NetworkState, Policy};
use kelvin_api::sandbox::{
    GuestMetrics, NodeInfo, PauseMode, PoolInfo, SetPool, SnapshotInfo, SnapshotVerification, Template,
};
use kelvin_node_api::{
    Bake, Changes, Child, ConsoleLine, Create, Created, Forked, Garbage, Import, ImportTold, Live,
    NodeService, Paused, Source, Taken,
};

#[derive(Debug, Default)]
pub(crate) struct ScriptedNode {
    live: Mutex<Vec<Live>>,
    changes: Mutex<VecDeque<Changes>>,
    told: tokio::sync::Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refused<T>() -> Result<T, Failure> {
    Err(Failure::new(ErrorCode::NodeStopping, "this node does nothing", "ask another"))
}

impl ScriptedNode {
    /// Has these sandboxes from now on.
    pub fn has(&self, live: Vec<Live>) {
        *lock(&self.live) = live;
    }

    /// Tells this, after what it was to tell before.
    pub fn tell(&self, changes: Changes) {
        lock(&self.changes).push_back(changes);
        self.told.notify_one();
    }
}

#[async_trait]
impl NodeService for ScriptedNode {
    async fn create(&self, _: Create) -> Result<Created, Failure> {
        refused()
    }

    async fn kill(&self, id: &SandboxId) -> Result<(), Failure> {
        lock(&self.live).retain(|live| live.sandbox != *id);
        Ok(())
    }

    async fn set_deadline(&self, _: &SandboxId, _: jiff::Timestamp) -> Result<(), Failure> {
        refused()
    }

    async fn set_policy(&self, _: &SandboxId, _: Policy) -> Result<(), Failure> {
        refused()
    }

    async fn network(&self, _: &SandboxId) -> Result<NetworkState, Failure> {
        refused()
    }

    async fn metrics(&self, _: &SandboxId) -> Result<GuestMetrics, Failure> {
        refused()
    }

    async fn console(&self, _: &SandboxId) -> Result<Vec<ConsoleLine>, Failure> {
        refused()
    }

    async fn source(&self, _: &str) -> Result<Option<Source>, Failure> {
        Ok(None)
    }

    async fn pause(&self, _: &SandboxId, _: PauseMode, _: bool) -> Result<Paused, Failure> {
        refused()
    }

    async fn resume(
        &self,
        _: &SandboxId,
        _: Option<jiff::Timestamp>,
        _: PauseMode,
    ) -> Result<Created, Failure> {
        refused()
    }

    async fn snapshot(
        &self,
        _: &SandboxId,
        _: SnapshotId,
        _: Option<TemplateName>,
        _: PauseMode,
    ) -> Result<Taken, Failure> {
        refused()
    }

    async fn fork(&self, _: &SandboxId, _: Vec<Child>) -> Result<Forked, Failure> {
        refused()
    }

    async fn snapshots(&self) -> Result<Vec<SnapshotInfo>, Failure> {
        Ok(Vec::new())
    }

    async fn remove_snapshot(&self, _: &SnapshotId, _: bool) -> Result<(), Failure> {
        refused()
    }

    async fn verify_snapshot(&self, _: &SnapshotId) -> Result<SnapshotVerification, Failure> {
        refused()
    }

    async fn pools(&self) -> Result<Vec<PoolInfo>, Failure> {
        Ok(Vec::new())
    }

    async fn set_pool(&self, _: &TemplateName, _: SetPool) -> Result<(), Failure> {
        refused()
    }

    async fn one(&self, id: &SandboxId) -> Result<Option<Live>, Failure> {
        Ok(lock(&self.live).iter().find(|live| live.sandbox == *id).cloned())
    }

    async fn live(&self) -> Result<Vec<Live>, Failure> {
        Ok(lock(&self.live).clone())
    }

    async fn changes(&self, _: u64) -> Result<Changes, Failure> {
        loop {
            if let Some(changes) = lock(&self.changes).pop_front() {
                return Ok(changes);
            }
            self.told.notified().await;
        }
    }

    async fn templates(&self) -> Result<Vec<Template>, Failure> {
        Ok(Vec::new())
    }

    async fn import(&self, _: Import, _: ImportTold) -> Result<Template, Failure> {
        refused()
    }

    async fn bake(&self, _: Bake) -> Result<SnapshotId, Failure> {
        refused()
    }

    async fn info(&self) -> Result<NodeInfo, Failure> {
        refused()
    }

    async fn collect(&self, _: bool) -> Result<Garbage, Failure> {
        refused()
    }
}
