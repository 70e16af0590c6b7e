//! A node that says what a test has it say, and does nothing.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use futures::StreamExt as _;
use kelvin_api::account::Project;
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::{BuildId, FilesHash, SandboxId, SnapshotId, TemplateName, TemplateVersion};
use kelvin_api::network::{NetworkState, Policy};
use kelvin_api::sandbox::{
    GuestMetrics, NodeInfo, PauseMode, PoolInfo, SetPool, SnapshotInfo, SnapshotVerification, Template,
    VersionInfo,
};
use kelvin_api::units::{DiskMib, MemoryMib, Shape};
use kelvin_node_api::{
    Bake, Base, Build, BuildFailure, BuildTold, Built, Changes, Child, ConsoleLine, Create, Created,
    FilesContent, Forked, Garbage, Import, ImportTold, Live, NodeService, Paused, Source, Taken,
};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

#[derive(Debug, Default)]
pub(crate) struct ScriptedNode {
    live: Mutex<Vec<Live>>,
    changes: Mutex<VecDeque<Changes>>,
    told: tokio::sync::Notify,
    templates: Mutex<BTreeMap<TemplateVersion, Template>>,
    /// Versions that machines were to wait for, in this order.
    preferred: Mutex<Vec<TemplateVersion>>,
    /// Builds that were asked for and that no test has taken yet.
    asked: Mutex<VecDeque<AskedBuild>>,
    has_asked: tokio::sync::Notify,
    /// Builds that are under way.
    building: Mutex<HashMap<BuildId, CancellationToken>>,
    /// Builds that it was asked to give up, in this order.
    cancelled: Mutex<Vec<BuildId>>,
    /// Held by a test while no build begins.
    begins: tokio::sync::Mutex<()>,
    /// Held by a test while no import ends.
    imports: tokio::sync::Mutex<()>,
    has_import: tokio::sync::Notify,
    files: Mutex<HashMap<(Project, FilesHash), Vec<u8>>>,
}

/// A build that the node was asked for. It ends when a test says how, or when it is cancelled.
#[derive(Debug)]
pub(crate) struct AskedBuild {
    pub request: Build,
    pub told: BuildTold,
    answer: oneshot::Sender<Result<Built, BuildFailure>>,
}

impl AskedBuild {
    /// It ends so. Whether somebody still waits for it.
    pub fn end(self, answer: Result<(), BuildFailure>, image: &str) -> bool {
        let build = Some(self.request.build.clone());
        let template = template(self.request.template.as_str(), build, image);
        let built = answer.map(|()| Built { template, from_digest: None, cached_steps: 0 });
        self.answer.send(built).is_ok()
    }

    /// Whether it was given up.
    pub async fn given_up(mut self) {
        self.answer.closed().await;
    }
}

/// A version of a template of that name.
pub(crate) fn template(name: &str, build: Option<BuildId>, image: &str) -> Template {
    let build_id = build.as_ref().map_or_else(|| image.to_owned(), ToString::to_string);
    let version = VersionInfo {
        build_id: build,
        tags: Vec::new(),
        image: image.to_owned(),
        image_bytes: 2 << 30,
        image_disk_bytes: 1 << 30,
        memory_disk_bytes: Some(1 << 20),
        kernel: "k".to_owned(),
        created_at: jiff::Timestamp::UNIX_EPOCH,
        from_digest: None,
    };
    Template {
        template_id: name.to_owned(),
        build_id,
        cpu_count: 3,
        memory_mb: 384,
        disk_size_mb: 2048,
        public: false,
        aliases: vec![name.to_owned()],
        names: vec![name.to_owned()],
        created_at: jiff::Timestamp::UNIX_EPOCH,
        updated_at: jiff::Timestamp::UNIX_EPOCH,
        created_by: None,
        last_spawned_at: None,
        spawn_count: 0,
        build_count: 1,
        envd_version: kelvin_api::ENVD_VERSION.to_owned(),
        build_status: "ready".to_owned(),
        snapshots: Vec::new(),
        versions: vec![version],
    }
}

/// How the node calls it.
fn called(template: &Template) -> TemplateVersion {
    let name: TemplateName = template.template_id.parse().expect("a name");
    TemplateVersion { name, build: template.versions[0].build_id.clone() }
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

    /// Has a template of this name from now on, as if it was imported.
    pub fn has_template(&self, name: &str) {
        self.has_version(template(name, None, &"ab".repeat(32)));
    }

    /// Has this version of a template from now on.
    pub fn has_version(&self, template: Template) {
        lock(&self.templates).insert(called(&template), template);
    }

    /// The versions that it has.
    pub fn versions(&self) -> Vec<TemplateVersion> {
        lock(&self.templates).keys().cloned().collect()
    }

    /// As if it was started anew.
    pub fn forget_preferred(&self) {
        lock(&self.preferred).clear();
    }

    /// The version that machines are to wait for.
    pub fn preferred(&self) -> Option<TemplateVersion> {
        lock(&self.preferred).last().cloned()
    }

    /// The next build that it is asked for.
    pub async fn next_build(&self) -> AskedBuild {
        loop {
            if let Some(asked) = lock(&self.asked).pop_front() {
                return asked;
            }
            self.has_asked.notified().await;
        }
    }

    /// Builds that are under way.
    pub fn building(&self) -> usize {
        lock(&self.building).len()
    }

    /// While it lives, a build that is asked for has not come yet.
    pub async fn hold_builds(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.begins.lock().await
    }

    /// While it lives, no import ends.
    pub async fn hold_imports(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.imports.lock().await
    }

    /// Returns when it was asked for an import.
    pub async fn importing(&self) {
        self.has_import.notified().await;
    }

    /// How often it was asked to give a build up.
    pub fn cancels(&self, build: &str) -> usize {
        lock(&self.cancelled).iter().filter(|id| id.as_str() == build).count()
    }

    /// What was uploaded.
    pub fn uploaded(&self, project: &str, hash: &FilesHash) -> Option<Vec<u8>> {
        let project = project.parse().ok()?;
        lock(&self.files).get(&(project, hash.clone())).cloned()
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

    async fn source(&self, text: &str) -> Result<Option<Source>, Failure> {
        let Ok(version) = text.parse::<TemplateVersion>() else { return Ok(None) };
        let Some(found) = lock(&self.templates).get(&version).cloned() else { return Ok(None) };
        let shape = Shape {
            vcpus: found.cpu_count,
            memory_mib: MemoryMib(found.memory_mb),
            disk_mib: DiskMib(found.disk_size_mb),
        };
        Ok(Some(Source { base: Base::Template(version), shape }))
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
        Ok(lock(&self.templates).values().cloned().collect())
    }

    async fn import(&self, _: Import, _: ImportTold) -> Result<Template, Failure> {
        self.has_import.notify_one();
        drop(self.imports.lock().await);
        refused()
    }

    async fn bake(&self, _: Bake) -> Result<SnapshotId, Failure> {
        refused()
    }

    async fn build(&self, request: Build, told: BuildTold) -> Result<Built, BuildFailure> {
        let (answer, answered) = oneshot::channel();
        let (id, cancelled) = (request.build.clone(), CancellationToken::new());
        drop(self.begins.lock().await);
        if lock(&self.cancelled).contains(&id) {
            return Err(Failure::new(ErrorCode::BuildCancelled, "it was given up", "none").into());
        }
        lock(&self.building).insert(id.clone(), cancelled.clone());
        lock(&self.asked).push_back(AskedBuild { request, told, answer });
        self.has_asked.notify_one();
        let ended = cancelled.run_until_cancelled(answered).await;
        lock(&self.building).remove(&id);
        let built = match ended {
            Some(Ok(answer)) => answer?,
            _ => return Err(Failure::new(ErrorCode::BuildCancelled, "it was given up", "none").into()),
        };
        self.has_version(built.template.clone());
        Ok(built)
    }

    async fn cancel_build(&self, build: &BuildId) -> Result<(), Failure> {
        let gone = || Failure::new(ErrorCode::BuildNotFound, "it is not under way", "look");
        lock(&self.cancelled).push(build.clone());
        lock(&self.building).get(build).ok_or_else(gone)?.cancel();
        Ok(())
    }

    async fn has_files(&self, project: &Project, hash: &FilesHash) -> Result<bool, Failure> {
        Ok(lock(&self.files).contains_key(&(project.clone(), hash.clone())))
    }

    async fn put_files(
        &self,
        project: &Project,
        hash: &FilesHash,
        mut content: FilesContent,
    ) -> Result<(), Failure> {
        let mut bytes = Vec::new();
        while let Some(piece) = content.next().await {
            let cut = |error: std::io::Error| {
                Failure::new(ErrorCode::NodeIo, "it was cut", "send it again").with_cause(&error)
            };
            bytes.extend_from_slice(&piece.map_err(cut)?);
        }
        lock(&self.files).insert((project.clone(), hash.clone()), bytes);
        Ok(())
    }

    async fn remove_template(&self, version: &TemplateVersion) -> Result<(), Failure> {
        let gone = || Failure::new(ErrorCode::TemplateNotFound, "no such template", "look");
        lock(&self.templates).remove(version).map(drop).ok_or_else(gone)
    }

    async fn prefer_template(&self, version: &TemplateVersion) -> Result<(), Failure> {
        lock(&self.preferred).push(version.clone());
        Ok(())
    }

    async fn info(&self) -> Result<NodeInfo, Failure> {
        refused()
    }

    async fn collect(&self, _: bool) -> Result<Garbage, Failure> {
        refused()
    }
}
