//! What a node is asked about builds.

use std::sync::Arc;

use futures::StreamExt as _;
use kelvin_api::account::Project;
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::{BuildId, FilesHash, TemplateVersion};
use kelvin_node_api::{Build, BuildFailure, BuildTold, FilesContent};
use kelvin_store::uploads::Upload;

use crate::Node;
use crate::build::building::Building;
use crate::build::entry::Made;
use crate::build::log::Log;
use crate::error::Error;
use crate::inspect::Known;

/// What of an upload is written at once, in bytes.
const PORTION: usize = 1 << 20;

impl Node {
    /// Makes a template of an image and of steps over it; creates find it when this returns. It goes on when the caller goes away.
    /// The template, and how it was made.
    ///
    /// # Errors
    /// Of the step that failed; then the template is what it was.
    pub async fn build(&self, request: Build, told: BuildTold) -> Result<(Known, Made), BuildFailure> {
        let (inner, node) = (Arc::clone(&self.inner), self.clone());
        let refused = |error: Error| BuildFailure::from(Failure::from(error));
        if inner.hurry.is_cancelled() {
            return Err(refused(Error::Stopping));
        }
        let underway = inner.builds.begin(&request.build, &request.template, &inner.hurry);
        let underway = underway.map_err(refused)?;
        let counted = inner.activity.request();
        let task = self.inner.tasks.spawn(async move {
            let _counted = counted;
            let span = tracing::info_span!("build", build = %request.build, template = %request.template);
            tracing::Instrument::instrument(Box::pin(node.build_one(request, told, underway)), span).await
        });
        let done = task.await;
        done.map_err(|error| refused(Error::Io { what: "building", source: std::io::Error::other(error) }))?
    }

    async fn build_one(
        &self,
        request: Build,
        told: BuildTold,
        underway: crate::build::registry::Underway,
    ) -> Result<(Known, Made), BuildFailure> {
        let inner = &self.inner;
        let log = Log::new(told, inner.clock.clone(), underway.stop.token().clone());
        let work = async {
            underway.first_of_its_name().await;
            Box::pin(Building::new(inner, &request, &underway, log).run()).await
        };
        let deadline = tokio::time::sleep(request.deadline);
        tokio::pin!(work, deadline);
        let made = tokio::select! {
            biased;
            made = &mut work => made,
            () = &mut deadline => {
                let text = format!("the build took longer than {} s", request.deadline.as_secs());
                underway.stop.give_up(Failure::new(ErrorCode::BuildDeadline, text, "give it more time"));
                work.await
            }
        };
        let made = made.map_err(|failed| {
            let failure = Failure::from(failed.error);
            // A step and what it wrote are its project's: both may have secrets in them.
            let is_ours = failure.error_code != ErrorCode::BuildStepFailed;
            tracing::info!(
                step = failed.step,
                code = %failure.error_code,
                error = is_ours.then_some(&*failure.message),
                cause = failure.cause.as_deref().filter(|_| is_ours),
                "the build failed"
            );
            BuildFailure { step: failed.step, failure }
        })?;
        let known = self
            .templates()
            .await
            .ok()
            .and_then(|all| all.into_iter().find(|known| known.template == made.template));
        // It is there, whether it can be read again or was removed meanwhile.
        let known = known.unwrap_or_else(|| Known::new(made.template.clone(), inner.clock.wall()));
        Ok((known, made))
    }

    /// Gives a build up; returns when nothing of it runs any more.
    ///
    /// # Errors
    /// `Build` with `BuildNotFound` when it is not under way.
    pub async fn cancel_build(&self, build: &BuildId) -> Result<(), Error> {
        self.inner.builds.cancel(build).await
    }

    /// Whether `project` has uploaded the files `hash`. It counts as a use of them.
    ///
    /// # Errors
    /// `Store` when that cannot be told.
    pub async fn has_files(&self, project: &Project, hash: &FilesHash) -> Result<bool, Error> {
        let (uploads, project, hash) = (self.inner.uploads.clone(), project.clone(), hash.clone());
        upload_work(move || Ok(uploads.find(&project, &hash)?.is_some())).await
    }

    /// Keeps an upload once it has come whole; one that was there is replaced.
    ///
    /// # Errors
    /// `Store` with `Oversized`, `Io` when the stream ends too early; then nothing has changed.
    pub async fn put_files(
        &self,
        project: &Project,
        hash: &FilesHash,
        mut content: FilesContent,
    ) -> Result<(), Error> {
        let inner = Arc::clone(&self.inner);
        inner.ensure_disk().await?;
        let (uploads, project, hash) = (inner.uploads.clone(), project.clone(), hash.clone());
        // Not on a task of the node: a client that goes away takes its upload along.
        let _request = inner.activity.request();
        let work = async {
            let mut upload = upload_work(move || uploads.begin(&project, &hash)).await?;
            let mut portion = Vec::new();
            while let Some(bytes) = content.next().await {
                let bytes = bytes.map_err(|source| {
                    let text = "the upload ended before its end";
                    let failure = Failure::new(ErrorCode::BodyCut, text, "send it again");
                    Error::Build(Box::new(failure.with_cause(&source)))
                })?;
                portion.extend_from_slice(&bytes);
                if portion.len() >= PORTION {
                    // Uploads that come at one time are bounded by nothing else.
                    inner.ensure_disk().await?;
                    upload = written(upload, std::mem::take(&mut portion)).await?;
                }
            }
            let upload = written(upload, portion).await?;
            upload_work(move || upload.finish().map(drop)).await
        };
        inner.hurry.run_until_cancelled(work).await.unwrap_or(Err(Error::Stopping))
    }

    /// Removes a version of a template: no create finds it. What was made of it stays.
    ///
    /// # Errors
    /// `NoTemplate`, `Importing` when it is being made anew, `Store`.
    pub async fn remove_template(&self, version: &TemplateVersion) -> Result<(), Error> {
        let (inner, version) = (Arc::clone(&self.inner), version.clone());
        self.run("removing a template", async move {
            let _alone = inner.templates.begin_import(&version)?;
            let (store, gone) = (inner.store.clone(), version.clone());
            let removed = upload_work(move || store.remove_template(&gone)).await;
            removed.map_err(|error| match error {
                Error::Store(kelvin_store::Error::Missing { .. }) => Error::NoTemplate(version.to_string()),
                other => other,
            })?;
            inner.templates.forget(&version);
            inner.settle_pools(&version.name).await;
            tracing::info!(template = %version, "removed");
            Ok(())
        })
        .await
    }

    /// Has machines wait for this version of its template, and for no other. Not remembered: it is said again after a start.
    ///
    /// # Errors
    /// `NoTemplate` when it is not here.
    pub async fn prefer_template(&self, version: &TemplateVersion) -> Result<(), Error> {
        let (inner, version) = (Arc::clone(&self.inner), version.clone());
        self.run("choosing a version", async move {
            inner.templates.get(&version).await.map_err(|error| match error {
                Error::Store(kelvin_store::Error::Missing { .. }) => Error::NoTemplate(version.to_string()),
                other => other,
            })?;
            inner.templates.prefer(&version);
            inner.settle_pools(&version.name).await;
            Ok(())
        })
        .await
    }
}

async fn upload_work<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, kelvin_store::Error> + Send + 'static,
) -> Result<T, Error> {
    let done = kelvin_host::blocking::spawn(work).await;
    Ok(done.map_err(|error| Error::Io { what: "using the store", source: std::io::Error::other(error) })??)
}

async fn written(mut upload: Upload, portion: Vec<u8>) -> Result<Upload, Error> {
    upload_work(move || upload.write(&portion).map(|()| upload)).await
}
