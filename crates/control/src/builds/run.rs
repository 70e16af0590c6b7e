//! Builds, from their request to their end, and the end of templates.
//!
//! Who writes: the task of the request, then the task of the build. What a crash leaves: see the module above.

use std::sync::Arc;
use std::time::Duration;

use kelvin_api::error::{ErrorCode, Failure, chain};
use kelvin_api::id::{BuildId, TemplateName, TemplateVersion};
use kelvin_api::units::{DiskMib, MemoryMib};
use kelvin_node_api::{Base, Build, BuildFailure, BuildFrom, BuildStage, Built, Instruction};
use tokio::sync::mpsc;

use super::lines::Book;
use super::under_way::Running;
use crate::accounts::Account;
use crate::control::Inner;
use crate::database::{
    BuildEnd, BuildError, BuildRow, BuildState, Caps, NewBuild, Requested, Started, TemplateOwner, Wanted,
};
use crate::failures::{database_failed, unknown_template};
use crate::tags::MAX_TAGS;
use crate::versions::{image_of, split_tag};

/// What a project may have.
pub(super) const CAPS: Caps = Caps {
    templates: 1000,
    requested: 100,
    under_way: 16,
    kept: 20,
    tags: MAX_TAGS as u64,
    life_ms: 24 * 3600 * 1000,
    log_bytes: 256 << 20,
};
/// When a build is given up.
const DEADLINE: Duration = Duration::from_secs(3600);
/// How long to wait before a node that could not be asked to give a build up, or a database that could not note its end, is
/// asked once more: neither tells when it can be.
const RETRY: Duration = Duration::from_millis(500);
/// How long a server that stops waits for a node that gives a build up.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// How long who asks for a build that has just ended waits until everybody knows what it has made.
const SEEN: Duration = Duration::from_secs(5);
/// What of a build's events may wait to be written, and is written at once.
const EVENTS: usize = 256;

pub(crate) fn name_taken(name: &str) -> Failure {
    let text = format!("the name {name} is taken");
    Failure::new(ErrorCode::NameTaken, text, "choose another, or delete what has it when it is yours")
}

pub(super) fn build_not_found(id: &str) -> Failure {
    // The same words whether it never existed, was forgotten, or is another project's.
    let shown: String = id.chars().take(80).collect();
    let text = format!("no build {shown:?} of this template");
    Failure::new(ErrorCode::BuildNotFound, text, "`kelvin template builds NAME` shows which there are")
}

pub(super) fn wrong_state(row: &BuildRow) -> Failure {
    let (text, remedy) = match row.state {
        BuildState::Requested => ("was not started yet", "start it"),
        BuildState::Waiting | BuildState::Building => ("is under way already", "look at its status"),
        BuildState::Ready | BuildState::Error => ("has ended", "ask for another"),
    };
    Failure::new(ErrorCode::BuildState, format!("build {} {text}", row.id), remedy)
}

fn too_many(what: &str, limit: u64) -> Failure {
    let text = format!("this project has as many {what} as it may have: {limit}");
    Failure::new(ErrorCode::TooManyBuilds, text, "wait for one to end, cancel one, or delete a template")
}

/// Why a build was given up.
fn given_up(why: ErrorCode, template: &str) -> Failure {
    let (text, remedy) = match why {
        ErrorCode::BuildCancelled => ("the build was cancelled".to_owned(), "start another"),
        ErrorCode::BuildSuperseded => {
            (format!("a later build of {template} goes on instead"), "look at that one")
        }
        _ => (
            "the server was stopped while the build was under way".to_owned(),
            "build again: steps that were done are not done again",
        ),
    };
    Failure::new(why, text, remedy)
}

impl Inner {
    /// The caller's build `id` of the template `name`.
    pub(super) async fn own_build(
        &self,
        caller: &Account,
        name: Option<&str>,
        id: &str,
    ) -> Result<BuildRow, Failure> {
        let parsed: BuildId = id.parse().map_err(|_| build_not_found(id))?;
        // Before the row: one that has ended by then is found as one that ends.
        let running = self.builds.find(&parsed);
        let row = self.database.build(&parsed).await.map_err(database_failed)?;
        let is_it = |row: &BuildRow| {
            row.project == caller.project.as_str() && name.is_none_or(|name| row.template == name)
        };
        let row = row.filter(is_it).ok_or_else(|| build_not_found(id))?;
        if let Some(running) = running
            && matches!(row.state, BuildState::Ready | BuildState::Error)
        {
            // Who is told of its end finds what it has changed: until then its template's name may mean the version before.
            let _ = tokio::time::timeout(SEEN, running.over.cancelled()).await;
        }
        Ok(row)
    }

    /// Whether the node has a template of that name.
    async fn has_template(&self, name: &str) -> Result<bool, Failure> {
        match self.node.source(name).await {
            Ok(source) => Ok(source.is_some_and(|source| matches!(source.base, Base::Template(_)))),
            Err(failure) if failure.kind == kelvin_api::error::Kind::NotFound => Ok(false),
            Err(failure) => Err(failure),
        }
    }

    /// Notes a build and that its template is the caller's project's; before there is anything of it.
    pub(super) async fn request_build(
        &self,
        caller: &Account,
        template: TemplateName,
        wanted: Wanted,
        key: Option<String>,
    ) -> Result<(BuildId, TemplateOwner), Failure> {
        let name = template.as_str();
        // Whose the name is stays as it is while this is held.
        let _changing = self.builds.changing.lock().await;
        if !self.owners.is_own(&caller.project, name) {
            // An imported template is everybody's, and a name of a snapshot would mean something else all at once.
            let is_taken = self.owners.of(name).is_some()
                || self.builds.is_imported(&template)
                || self.has_template(name).await?
                || self.snapshot_of(caller, name).await?.is_some();
            if is_taken {
                return Err(name_taken(name));
            }
        }
        let id = BuildId::random();
        let new = NewBuild {
            id: id.clone(),
            template: template.clone(),
            project: caller.project.clone(),
            node: self.placement.node.clone(),
            wanted,
            key,
        };
        match self.database.request_build(new, CAPS).await.map_err(database_failed)? {
            Requested::Done(owner) => {
                self.owners.set(name, owner.clone());
                Ok((id, owner))
            }
            Requested::NameTaken => Err(name_taken(name)),
            Requested::TooMany { what, limit } => Err(too_many(what, limit)),
        }
    }

    /// What a build begins with when that is the template that the caller calls `text`.
    pub(super) async fn template_to_build_on(
        &self,
        caller: &Account,
        text: &str,
    ) -> Result<BuildFrom, Failure> {
        match self.base(caller, text).await?.base {
            Base::Template(version) => Ok(BuildFrom::Template(version)),
            Base::Snapshot(_) => Err(unknown_template(text)),
        }
    }

    /// Has the build of `row` run, once it is its turn; a former one of its template is given up.
    pub(super) async fn start_build(
        self: &Arc<Self>,
        row: BuildRow,
        mut request: Build,
    ) -> Result<(), Failure> {
        let Wanted { tags: _, vcpus, memory_mib, disk_mib, min_free_mib, force } = row.wanted.clone();
        request.force |= force;
        request.vcpus = vcpus;
        request.memory_mib = memory_mib.map(MemoryMib);
        request.disk_mib = disk_mib.map(DiskMib);
        request.min_free_mib = min_free_mib.map(DiskMib);
        self.check_files(&request).await?;
        let _changing = self.builds.changing.lock().await;
        match self.database.start_build(&row.id, CAPS).await.map_err(database_failed)? {
            Started::Done => {}
            Started::TooMany { limit } => return Err(too_many("builds under way", limit)),
            // As it is now.
            Started::NotRequested => {
                let now = self.database.build(&row.id).await.map_err(database_failed)?;
                return Err(now.map_or_else(|| build_not_found(row.id.as_str()), |row| wrong_state(&row)));
            }
        }
        let former = self.builds.of(&request.template);
        for one in &former {
            one.give_up(ErrorCode::BuildSuperseded);
        }
        let running = self.builds.begin(row.id, request.template.clone());
        let inner = Arc::clone(self);
        self.tasks.spawn(async move { inner.see_through(&running, former, request).await });
        Ok(())
    }

    /// Refuses a build whose files were not uploaded, before anything of it is started.
    async fn check_files(&self, request: &Build) -> Result<(), Failure> {
        let mut known = std::collections::BTreeSet::new();
        let stages = request.stages.iter().flat_map(|stage| &stage.steps);
        for (at, step) in stages.chain(&request.steps).enumerate() {
            let Instruction::Copy { files, .. } = &step.instruction else { continue };
            if known.insert(files.as_str()) && !self.node.has_files(&request.project, files).await? {
                return Err(Failure::new(
                    ErrorCode::FilesMissing,
                    format!("step {} ({}): its files are not here", at + 1, step.shown),
                    "upload them to the URL that GET /templates/{name}/files/{hash} gives",
                ));
            }
        }
        Ok(())
    }

    /// Sees a build to its end, and writes that down.
    async fn see_through(self: Arc<Self>, running: &Arc<Running>, former: Vec<Arc<Running>>, request: Build) {
        let (inner, attempted, template) = (Arc::clone(&self), Arc::clone(running), request.template.clone());
        let attempt = self.tasks.spawn(async move { inner.attempt(&attempted, former, request).await });
        let ended = attempt.await.unwrap_or_else(|error| {
            let text = "the build was aborted";
            Err(Failure::new(ErrorCode::Aborted, text, "look at the server's log").with_cause(&error).into())
        });
        let end = match (ended, running.why()) {
            (Ok(built), _) => BuildEnd::Ready {
                image: image_of(&built.template),
                disk_mib: built.template.disk_size_mb,
                vcpus: built.template.cpu_count,
                memory_mib: built.template.memory_mb,
            },
            (Err(_), Some(why)) => {
                BuildEnd::Error(BuildError { step: None, failure: given_up(why, template.as_str()) })
            }
            (Err(BuildFailure { step, failure }), None) => BuildEnd::Error(BuildError { step, failure }),
        };
        while let Err(failure) = self.note_end(running, end.clone()).await {
            tracing::error!(build = %running.build, error = chain(&failure), "the end of a build was not recorded");
            // The next start says that it was interrupted.
            if self.stop.run_until_cancelled(tokio::time::sleep(RETRY)).await.is_none() {
                break;
            }
        }
        self.builds.end(running);
    }

    /// Writes down how a build ended; from then on its tags name what it has made.
    async fn note_end(&self, running: &Running, end: BuildEnd) -> Result<(), Failure> {
        let _changing = self.builds.changing.lock().await;
        self.database.end_build(&running.build, end).await.map_err(database_failed)?;
        self.renew_owner(running.template.as_str()).await
    }

    /// Waits for a build's turn and has the node build.
    async fn attempt(
        &self,
        running: &Running,
        former: Vec<Arc<Running>>,
        request: Build,
    ) -> Result<Built, BuildFailure> {
        let turn = async {
            for one in former {
                one.over.cancelled().await;
            }
            self.builds.turns.acquire().await
        };
        let _turn = tokio::select! {
            biased;
            () = self.given_up(running) => None,
            turn = turn => turn.ok(),
        };
        let template = request.template.clone();
        if let Some(why) = running.why() {
            return Err(given_up(why, template.as_str()).into());
        }
        self.database.run_build(&running.build).await.map_err(database_failed)?;
        let (told, mut events) = mpsc::channel(EVENTS);
        let building = self.node.build(request, told);
        let giving_up = self.give_up_on_node(running);
        let lapsed = async {
            self.stop.cancelled().await;
            tokio::time::sleep(STOP_GRACE).await;
        };
        tokio::pin!(building, giving_up, lapsed);
        let (mut book, mut batch, mut tells) =
            (Book::new(self.database.clone(), running.build.clone()), Vec::new(), true);
        let mut has_given_up = false;
        let ended = loop {
            tokio::select! {
                ended = &mut building => break ended,
                count = events.recv_many(&mut batch, EVENTS), if tells => match count {
                    0 => tells = false,
                    _ => book.write(&mut batch).await,
                },
                () = &mut giving_up, if !has_given_up => has_given_up = true,
                () = &mut lapsed => {
                    let text = "the node did not give the build up in time";
                    break Err(Failure::new(ErrorCode::BuildInterrupted, text, "build again").into());
                }
            }
        };
        while let Ok(event) = events.try_recv() {
            batch.push(event);
        }
        book.write(&mut batch).await;
        ended
    }

    /// Returns once a build is to be given up; it is when the server stops.
    async fn given_up(&self, running: &Running) {
        if self.stop.run_until_cancelled(running.given_up()).await.is_none() {
            running.give_up(ErrorCode::BuildInterrupted);
        }
    }

    /// Has the node give a build up once it is to be.
    async fn give_up_on_node(&self, running: &Running) {
        self.given_up(running).await;
        while let Err(failure) = self.node.cancel_build(&running.build).await {
            // Then it has ended, or is refused when it comes.
            if failure.error_code == ErrorCode::BuildNotFound {
                return;
            }
            tracing::warn!(build = %running.build, error = chain(&failure), "a build is not given up");
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Gives a build up; returns when nothing of it runs any more.
    pub(super) async fn cancel_build(&self, row: &BuildRow) -> Result<(), Failure> {
        let running = {
            let _changing = self.builds.changing.lock().await;
            let running = self.builds.find(&row.id);
            if running.is_none() {
                let failure = given_up(ErrorCode::BuildCancelled, &row.template);
                let end = BuildEnd::Error(BuildError { step: None, failure });
                if self.database.end_build(&row.id, end).await.map_err(database_failed)? {
                    return Ok(());
                }
            }
            running
        };
        if let Some(running) = running {
            running.give_up(ErrorCode::BuildCancelled);
            running.over.cancelled().await;
        }
        match self.database.build(&row.id).await.map_err(database_failed)? {
            None => Err(build_not_found(row.id.as_str())),
            Some(now) if is_given_up(&now) && !is_given_up(row) => Ok(()),
            Some(now) => Err(wrong_state(&now)),
        }
    }

    /// Removes a template that is the caller's own, its versions, its builds and its tags; for the server's own key one that was
    /// imported, too. With a tag, that tag of the caller's own alone, and the version that no other names. Whether there is such
    /// a one.
    pub(crate) async fn remove_template(&self, caller: &Account, text: &str) -> Result<bool, Failure> {
        let (name, tag) = split_tag(text);
        let Ok(template) = name.parse::<TemplateName>() else { return Ok(false) };
        if let Some(tag) = tag {
            return self.remove_tagged(caller, &template, tag).await;
        }
        let (_changing, is_own) = loop {
            let changing = self.builds.changing.lock().await;
            // Looked up each time: meanwhile it may have been deleted, and the name another project's.
            let is_own = self.owners.is_own(&caller.project, name);
            let is_imported = caller.is_admin && self.owners.of(name).is_none();
            let is_theirs = is_own || (is_imported && self.has_template(name).await?);
            if !is_theirs {
                return Ok(false);
            }
            let running = self.builds.of(&template);
            if running.is_empty() {
                break (changing, is_own);
            }
            drop(changing);
            for one in running {
                one.give_up(ErrorCode::BuildCancelled);
                one.over.cancelled().await;
            }
        };
        // Whose it was is forgotten last: until then it can be deleted again, and is nobody else's.
        let mut all = self.versions_there(&template).await?;
        if is_own {
            // Also those whose records the node cannot read now: what is not there is fine.
            all.push(template.clone().into());
            let rows = self.database.builds_of(name, None, usize::MAX).await.map_err(database_failed)?;
            all.extend(rows.into_iter().map(|row| TemplateVersion::of(template.clone(), row.id)));
            all.sort();
            all.dedup();
        }
        for version in all {
            match is_own {
                true => self.remove_version(&version).await?,
                false => self.node.remove_template(&version).await?,
            }
        }
        self.database.forget_template(name).await.map_err(database_failed)?;
        self.owners.forget(name);
        Ok(true)
    }

    /// After a start: ends what the last server did not live to see the end of.
    pub(crate) async fn interrupt_builds(&self) -> Result<(), Failure> {
        let text = "the server was started anew while the build was under way";
        let remedy = "build again: steps that were done are not done again";
        let failure = Failure::new(ErrorCode::BuildInterrupted, text, remedy);
        let error = BuildError { step: None, failure };
        let node = &self.placement.node;
        for id in self.database.interrupt_builds(node, error).await.map_err(database_failed)? {
            // A node that is another process may still be at it.
            if let Err(failure) = self.node.cancel_build(&id).await
                && !matches!(
                    failure.error_code,
                    ErrorCode::BuildNotFound | ErrorCode::BuildUnsupported | ErrorCode::NodeStopping
                )
            {
                tracing::warn!(build = %id, error = chain(&failure), "a build of the last server is not given up");
            }
        }
        Ok(())
    }
}

/// Whether somebody has cancelled it.
fn is_given_up(row: &BuildRow) -> bool {
    row.error.as_ref().is_some_and(|error| error.failure.error_code == ErrorCode::BuildCancelled)
}

impl Inner {
    /// A build that is about to be started, of its request alone: kernel, shape and force are added from what was asked for.
    pub(super) fn new_request(
        row: &BuildRow,
        mut stages: Vec<BuildStage>,
        force: bool,
        [start, ready]: [Option<String>; 2],
    ) -> Result<Build, Failure> {
        // The build's own is the last.
        let Some(BuildStage { from, steps }) = stages.pop() else {
            return Err(build_not_found(row.id.as_str()));
        };
        Ok(Build {
            build: row.id.clone(),
            template: row.template.parse().map_err(|_| build_not_found(row.id.as_str()))?,
            project: row.project.parse().map_err(|_| build_not_found(row.id.as_str()))?,
            stages,
            from,
            steps,
            force,
            start,
            ready,
            kernel: None,
            vcpus: None,
            memory_mib: None,
            disk_mib: None,
            min_free_mib: None,
            deadline: DEADLINE,
        })
    }
}
