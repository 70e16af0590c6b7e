//! What a sandbox goes through beside its start and its end: pause, resume, snapshot, fork.
//!
//! The work is in `capture` (the snapshot), `sandbox` (the task that owns the source), `paused` and `create` (what
//! becomes of a snapshot); here they are joined. Each call runs on a task of the node: a caller that goes away
//! leaves nothing half-done.

use std::sync::Arc;
use std::time::Duration;

use kelvin_api::error::Failure;
use kelvin_api::id::{SandboxId, SnapshotId, TemplateName, TemplateVersion};
use kelvin_api::network::Wanted;
use kelvin_api::phase::Timings;
use kelvin_api::sandbox::{Capture, PauseMode, SnapshotInfo, StartPath};
use kelvin_node_api::{Base, Child, Create, Created, Forked, Source};
use kelvin_store::snapshot::{Durability, Origin, Snapshot};

use crate::error::Error;
use crate::pool::shelf::manifest_shape;
use crate::sandbox::handle::{Command, Sandbox};
use crate::sandbox::paused::Paused;
use crate::sandbox::record::SandboxRecord;
use crate::snapshots::Captured;
use crate::start::source::StartSource;
use crate::state::Inner;
use crate::{LOOKS, Node};

/// How long a machine that is ending may hold up the removal of what it ran from.
const ENDING: Duration = Duration::from_secs(10);

/// What a snapshot of a sandbox costs that is paused already.
const STANDING_STILL: Capture = Capture { paused_ms: 0.0, dirty_pages: None, quiesced: true };

/// A sandbox as it was found.
enum Found {
    Running(Arc<Sandbox>),
    Paused(Arc<Paused>),
}

fn info(inner: &Inner, snapshot: &Snapshot) -> Option<SnapshotInfo> {
    let manifest = &snapshot.manifest;
    let Origin::Kept { sandbox, name } = &manifest.origin else {
        return None;
    };
    let differences = manifest.identity.differences(&inner.identities.here(&manifest.identity));
    let unusable = (!differences.is_empty()).then(|| format!("{} differs", differences.join(", ")));
    let unusable = unusable.or_else(|| snapshot.check_seal().err().map(|error| error.to_string()));
    Some(SnapshotInfo {
        snapshot_id: manifest.id.to_string(),
        names: name.iter().map(ToString::to_string).collect(),
        sandbox_id: sandbox.clone(),
        template_id: manifest.template.to_string(),
        parent_id: manifest.parent.as_ref().map(ToString::to_string),
        created_at: manifest.created,
        cpu_count: manifest.identity.vcpus,
        memory_mb: manifest.identity.memory_mib,
        unusable,
    })
}

/// What a child of `source` is to be.
fn child_of(source: &SandboxRecord, child: Child, snapshot: SnapshotId) -> Create {
    let network = source.network.clone().map(|mut attachment| {
        attachment.traffic_token = child.traffic_token;
        attachment
    });
    let mut env_vars = source.env_vars.clone();
    env_vars.extend(child.env_vars);
    Create {
        sandbox: child.sandbox,
        project: child.project,
        base: Base::Snapshot(snapshot),
        vcpus: None,
        memory_mib: None,
        env_vars,
        access_token: child.access_token,
        ends_at: child.ends_at,
        start_path: Some(StartPath::Clone),
        probe_tcp: false,
        network: network.map_or(Wanted::None, Wanted::Required),
        lifecycle: source.lifecycle,
        timeout: child.timeout,
    }
}

impl Node {
    /// Runs what must not be left half-way when a client goes away.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let request = self.inner.activity.request();
        let task = self.inner.tasks.spawn(async move {
            let _request = request;
            work.await
        });
        task.await.map_err(|error| Error::Io { what, source: std::io::Error::other(error) })?
    }

    /// Freezes a sandbox: memory, device state and disk are kept, its machine ends, its capacity is free. Connections
    /// to it are cut; its processes go on when it is resumed. Of `Filesystem` the disk alone is kept, and it boots again.
    ///
    /// With `healthy`, a guest whose agent does not answer is not paused.
    ///
    /// # Errors
    /// `Unknown`, `Paused`, `Unhealthy`; `Exhausted`, `Vmm`, `Store` when it cannot be saved, and then it still runs.
    pub async fn pause(
        &self,
        id: &SandboxId,
        mode: PauseMode,
        healthy: bool,
    ) -> Result<(Capture, Timings), Error> {
        let (node, id) = (self.clone(), id.clone());
        self.run("pausing", async move {
            let mut looks = LOOKS;
            loop {
                let paused = match node.find(&id) {
                    Ok(sandbox) => {
                        let asked = sandbox.ask(|done| Command::Pause(mode, healthy, done)).await;
                        asked.and_then(std::convert::identity)
                    }
                    Err(error) => Err(error),
                };
                if !node.looks_again(&id, &paused, &mut looks).await? {
                    return paused.map(|captured| (captured.capture, captured.timings));
                }
            }
        })
        .await
    }

    /// Lets a paused sandbox go on, until `ends_at` or for as long as its owner asked for at last. With `Filesystem` it
    /// boots from its disk, whatever else was kept.
    ///
    /// # Errors
    /// `Running`, `Unknown`; as a create when it cannot be restored, and then it is still paused.
    pub async fn resume(
        &self,
        id: &SandboxId,
        ends_at: Option<jiff::Timestamp>,
        mode: PauseMode,
    ) -> Result<Created, Error> {
        let (inner, id) = (Arc::clone(&self.inner), id.clone());
        let resumed = self.run("resuming", async move {
            inner.resume(&id, ends_at, mode).await.map(|created| (created, id))
        });
        match resumed.await? {
            (Some(created), _) => Ok(created),
            (None, id) => Err(Error::Running(id.to_string())),
        }
    }

    /// The sandbox called `id` for traffic. One that would boot again is not woken by strangers.
    ///
    /// # Errors
    /// `Unknown`; `Asleep` when it is paused, its owner wants it to resume by traffic and it goes on from there; else `Paused`.
    pub(crate) fn ensure_running(&self, id: &SandboxId) -> Result<Arc<Sandbox>, Error> {
        match self.find(id) {
            Err(Error::Paused(_))
                if self.inner.paused(id).is_some_and(|paused| {
                    paused.record.lifecycle.auto_resume && self.inner.has_memory(&paused)
                }) =>
            {
                Err(Error::Asleep(id.to_string()))
            }
            other => other,
        }
    }

    /// Takes or makes a snapshot of a sandbox as it is found.
    async fn keep(
        &self,
        id: &SandboxId,
        snapshot: SnapshotId,
        origin: Origin,
        mode: PauseMode,
    ) -> Result<(SnapshotInfo, Capture, Timings), Error> {
        let (taken, capture, timings) = match self.find_any(id)? {
            Found::Running(sandbox) => {
                let ask = |done| Command::Snapshot(snapshot, origin, mode, Durability::Durable, done);
                let (captured, _) = sandbox.ask(ask).await??;
                (captured.snapshot, captured.capture, captured.timings)
            }
            Found::Paused(paused) => {
                let (kept, timings) = self.inner.keep_paused(&paused, snapshot, origin, mode).await?;
                (kept, STANDING_STILL, timings)
            }
        };
        let shown = info(&self.inner, &taken).ok_or_else(|| Error::Unknown(id.to_string()))?;
        Ok((shown, capture, timings))
    }

    /// What a sandbox is at one instant, for its children, and what is known of it.
    async fn point(&self, source: &SandboxId) -> Result<(Captured, SandboxRecord), Error> {
        match self.find_any(source)? {
            Found::Running(sandbox) => {
                let origin = Origin::Fork { sandbox: source.clone() };
                let ask = |done| {
                    Command::Snapshot(
                        SnapshotId::random(),
                        origin,
                        PauseMode::Full,
                        Durability::Ephemeral,
                        done,
                    )
                };
                sandbox.ask(ask).await?
            }
            // It stands still already, and its image is there.
            Found::Paused(paused) => {
                let (snapshot, _lease) = self.inner.image_of(&paused)?;
                let captured =
                    Captured { snapshot, _lease, capture: STANDING_STILL, timings: Timings::default() };
                Ok((captured, paused.record.clone()))
            }
        }
    }

    /// A sandbox, running or paused.
    fn find_any(&self, id: &SandboxId) -> Result<Found, Error> {
        match self.find(id) {
            Ok(sandbox) => Ok(Found::Running(sandbox)),
            Err(Error::Paused(_)) => match self.inner.paused(id) {
                Some(paused) => Ok(Found::Paused(paused)),
                // Resumed meanwhile.
                None => self.find(id).map(Found::Running),
            },
            Err(error) => Err(error),
        }
    }

    /// Takes a snapshot, called `snapshot`, of a sandbox that is kept until it is deleted; the sandbox goes on, or stays paused: of one that
    /// is paused without memory the disk is kept.
    ///
    /// # Errors
    /// `Unknown`, `NameTaken`; as [`Node::pause`] when it cannot be saved.
    pub async fn snapshot(
        &self,
        id: &SandboxId,
        snapshot: SnapshotId,
        name: Option<TemplateName>,
        mode: PauseMode,
    ) -> Result<(SnapshotInfo, Capture, Timings), Error> {
        self.find_any(id)?;
        if let Some(name) = &name
            && self.inner.store.has_template(name)?
        {
            return Err(Error::NameTaken(name.to_string()));
        }
        let (node, id) = (self.clone(), id.clone());
        self.run("taking a snapshot", async move {
            let mut looks = LOOKS;
            loop {
                let origin = Origin::Kept { sandbox: id.clone(), name: name.clone() };
                let taken = node.keep(&id, snapshot.clone(), origin, mode).await;
                if !node.looks_again(&id, &taken, &mut looks).await? {
                    return taken;
                }
            }
        })
        .await
    }

    /// Makes `children` of a sandbox, all of one instant of it. One that runs stands still once, for as long as saving
    /// what it has written takes; one that is paused stays paused.
    ///
    /// # Errors
    /// `Unknown`; as [`Node::pause`] when the source cannot be saved, and then there are no children. A
    /// child that fails is an error in its place; the others are there.
    pub async fn fork(&self, source: &SandboxId, children: Vec<Child>) -> Result<Forked, Error> {
        let (node, source) = (self.clone(), source.clone());
        self.run("forking", async move {
            let (inner, mut looks) = (&node.inner, LOOKS);
            let found = loop {
                let found = node.point(&source).await;
                if !node.looks_again(&source, &found, &mut looks).await? {
                    break found?;
                }
            };
            // The lease keeps the image until every child has one of its own.
            let (Captured { snapshot, _lease, capture, timings }, record) = found;
            let mut starting = Vec::new();
            for child in children {
                let mut request = child_of(&record, child, snapshot.manifest.id.clone());
                if !snapshot.manifest.mode.is_full() {
                    // Of the disk alone: its children boot.
                    request.start_path = None;
                }
                let start = StartSource::another(Arc::clone(&snapshot), Some(source.clone()));
                let inner = Arc::clone(inner);
                starting.push(inner.tasks.clone().spawn(async move { inner.create(request, start).await }));
            }
            let mut children = Vec::new();
            for child in starting {
                let created: Result<Created, Error> = child.await.unwrap_or_else(|error| {
                    Err(Error::Io { what: "starting a child", source: std::io::Error::other(error) })
                });
                children.push(created.map_err(Failure::from));
            }
            Ok(Forked { capture, timings, children })
        })
        .await
    }

    /// The snapshots that are kept, newest first.
    ///
    /// # Errors
    /// None today; a store elsewhere will have some.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotInfo>, Error> {
        let inner = Arc::clone(&self.inner);
        let listed = kelvin_host::blocking::spawn(move || {
            inner.snapshots.kept().iter().filter_map(|snapshot| info(&inner, snapshot)).collect()
        });
        listed.await.map_err(|error| Error::Io { what: "listing", source: std::io::Error::other(error) })
    }

    /// What a create starts from that names the version of a template, or the kept snapshot, `text`, by its name or its id. Names of
    /// snapshots are their owners', not the node's.
    ///
    /// # Errors
    /// `Store` when the template cannot be read.
    pub async fn source(&self, text: &str) -> Result<Option<Source>, Error> {
        if let Ok(version) = text.parse::<TemplateVersion>() {
            match self.inner.templates.get(&version).await {
                Ok(template) => {
                    return Ok(Some(Source { base: Base::Template(version), shape: template.shape }));
                }
                Err(Error::Store(kelvin_store::Error::Missing { .. })) => {}
                Err(error) => return Err(error),
            }
        }
        let id: Option<SnapshotId> = text.parse().ok();
        let kept = id.and_then(|id| self.inner.snapshots.get(&id));
        let kept = kept.filter(|found| matches!(found.manifest.origin, Origin::Kept { .. }));
        Ok(kept.map(|kept| Source {
            base: Base::Snapshot(kept.manifest.id.clone()),
            shape: manifest_shape(&kept.manifest),
        }))
    }

    /// Deletes a kept snapshot. With `cascade`, those that descend from it too; sandboxes are never ended for it.
    ///
    /// # Errors
    /// `Store` with `Missing`, `InUse` with the names of what needs it, or `Unreadable` when that is not known; then
    /// nothing is deleted.
    pub async fn remove_snapshot(&self, id: &SnapshotId, cascade: bool) -> Result<(), Error> {
        let missing = || kelvin_store::Error::Missing { kind: "snapshot", name: id.to_string() };
        let snapshot = self.inner.snapshots.get(id).ok_or_else(missing)?;
        if !matches!(snapshot.manifest.origin, Origin::Kept { .. }) {
            return Err(missing().into());
        }
        // What cannot be read may descend from it.
        let store = self.inner.store.clone();
        kelvin_host::blocking::spawn(move || store.manifests()).await.map_err(|error| Error::Io {
            what: "reading manifests",
            source: std::io::Error::other(error),
        })??;
        // Deepest last: what goes, and what it would take with it.
        let (mut going, mut dependents) = (vec![id.clone()], Vec::new());
        let mut at = 0;
        while let Some(next) = going.get(at).cloned() {
            at += 1;
            dependents.extend(self.running_from(&next));
            for child in self.inner.snapshots.children(&next) {
                match &child.manifest.origin {
                    Origin::Kept { .. } if cascade => going.push(child.manifest.id.clone()),
                    Origin::Kept { name, .. } => dependents.push(match name {
                        Some(name) => format!("snapshot {} ({name})", child.manifest.id),
                        None => format!("snapshot {}", child.manifest.id),
                    }),
                    Origin::Pause { sandbox, .. } => dependents.push(format!("sandbox {sandbox} (paused)")),
                    Origin::Fork { sandbox } => dependents.push(format!("forks of sandbox {sandbox}")),
                    Origin::Bake => {}
                }
            }
        }
        dependents.sort();
        dependents.dedup();
        let in_use = |dependents| {
            Err(kelvin_store::Error::InUse { kind: "snapshot", name: id.to_string(), dependents }.into())
        };
        if !dependents.is_empty() {
            return in_use(dependents);
        }
        for id in going.into_iter().rev() {
            let known = self.inner.snapshots.get(&id);
            if !self.forget(&id).await {
                let mut users = self.running_from(&id);
                if users.is_empty() {
                    users.push("a machine that is ending".to_owned());
                }
                return in_use(users);
            }
            let store = self.inner.store.clone();
            let removed = kelvin_host::blocking::spawn(move || store.delete_snapshot(&id))
                .await
                .map_err(|error| Error::Io { what: "removing", source: std::io::Error::other(error) })
                .and_then(|removed| Ok(removed?));
            if let Err(error) = removed {
                // It keeps its place while its files have theirs: its owner sees it, and tries again.
                if let Some(snapshot) = known.filter(|snapshot| snapshot.directory.exists()) {
                    self.inner.snapshots.add(snapshot);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Forgets a snapshot that no sandbox runs from; a machine that is ending is waited for. Whether it was: somebody
    /// may have begun to run from it since.
    async fn forget(&self, id: &SnapshotId) -> bool {
        let ended = async {
            loop {
                let changed = self.inner.activity.settled();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if self.inner.snapshots.forget(id) {
                    return true;
                }
                if !self.running_from(id).is_empty() {
                    return false;
                }
                changed.await;
            }
        };
        tokio::time::timeout(ENDING, ended).await.unwrap_or(false)
    }

    /// Sandboxes whose machines map the memory of `snapshot`.
    fn running_from(&self, snapshot: &SnapshotId) -> Vec<String> {
        let sandboxes = self.inner.sandboxes.running();
        let from = |sandbox: &&Arc<Sandbox>| sandbox.snapshot.as_ref() == Some(snapshot);
        sandboxes.values().filter(from).map(|sandbox| format!("sandbox {}", sandbox.live().sandbox)).collect()
    }
}
