//! Builds of templates, what they said, and whose the templates are that they make.

use std::collections::HashMap;

use async_trait::async_trait;
use kelvin_api::account::Project;
use kelvin_api::error::Failure;
use kelvin_api::id::{BuildId, TemplateName};
use kelvin_api::sandbox::LogLevel;
use serde::{Deserialize, Serialize};

use super::Error;
use crate::placement::NodeName;

/// What was asked for when a build was.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// Tags that name its version when it is built; when there are none, the default one does.
    pub tags: Vec<String>,
    pub vcpus: Option<u32>,
    pub memory_mib: Option<u32>,
    pub disk_mib: Option<u32>,
    pub min_free_mib: Option<u32>,
    pub force: bool,
}

/// A build that is asked for.
#[derive(Debug, Clone)]
pub struct NewBuild {
    pub id: BuildId,
    pub template: TemplateName,
    pub project: Project,
    /// Where it is to run.
    pub node: NodeName,
    pub wanted: Wanted,
    /// The idempotency key of its request.
    pub key: Option<String>,
}

/// How many a project may have.
#[derive(Debug, Clone, Copy)]
pub struct Caps {
    /// Templates that are its own.
    pub templates: u64,
    /// Builds that were asked for and not started.
    pub requested: u64,
    /// Builds that wait for their turn or run.
    pub under_way: u64,
    /// Builds of one template that have ended and are remembered.
    pub kept: u64,
    /// Tags of one template: each keeps a version.
    pub tags: u64,
    /// How long one that was asked for may be started, in milliseconds.
    pub life_ms: i64,
    /// Bytes of what builds said that have ended, with what keeping a line takes: beyond it that of the oldest is forgotten.
    pub log_bytes: u64,
}

/// What became of a build that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Requested {
    /// It may be started; the template is its project's.
    Done(TemplateOwner),
    /// The template is another project's.
    NameTaken,
    /// The project has as many templates of its own, or builds that were not started, as it may have.
    TooMany { what: &'static str, limit: u64 },
}

/// What became of a build that was to be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Started {
    /// It waits for its turn.
    Done,
    /// It was started before, or has ended.
    NotRequested,
    /// As many of the project's as may be are under way.
    TooMany { limit: u64 },
}

/// Whose a template is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateOwner {
    pub project: String,
    /// Whether every project may use it.
    pub public: bool,
    pub created_at: jiff::Timestamp,
    /// The build whose version the default tag names; none while it names none, and then the name means what was built when one
    /// version of it was kept, if there is that.
    pub default: Option<BuildId>,
}

/// How far a build is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BuildState {
    /// Its files may be uploaded.
    Requested,
    /// It waits for its turn.
    Waiting,
    Building,
    Ready,
    Error,
}

/// Why a build has failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BuildError {
    /// The step that failed, counted from 0.
    pub step: Option<u32>,
    pub failure: Failure,
}

/// How a build ended.
#[derive(Debug, Clone, PartialEq)]
pub enum BuildEnd {
    /// The template is this image, on a disk of so many MiB, of this shape.
    Ready {
        image: String,
        disk_mib: u32,
        vcpus: u32,
        memory_mib: u32,
    },
    Error(BuildError),
}

/// A build.
#[derive(Debug, Clone, PartialEq)]
pub struct BuildRow {
    pub id: BuildId,
    pub template: String,
    pub project: String,
    pub state: BuildState,
    pub wanted: Wanted,
    pub created_at: jiff::Timestamp,
    pub updated_at: jiff::Timestamp,
    pub ended_at: Option<jiff::Timestamp>,
    /// The image that it has made.
    pub image: Option<String>,
    pub error: Option<BuildError>,
    /// Size of the disk, once it is known.
    pub disk_mib: Option<u32>,
    /// Since when no tag names its version.
    pub untagged_at: Option<jiff::Timestamp>,
}

/// A line of a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildLine {
    pub at: jiff::Timestamp,
    pub level: LogLevel,
    /// Of which step, counted from 0.
    pub step: Option<u32>,
    pub message: String,
}

/// Which lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lines {
    /// In order, without the first of them.
    Skip(u64),
    /// In order, from a time on, in milliseconds since 1970.
    From(i64),
    /// Newest first, from a time back.
    Back(Option<i64>),
    /// The last of a step, in order.
    LastOf(Option<u32>),
}

/// Owners and builds survive a power failure; what a build says may be lost by one.
#[async_trait]
pub trait Builds: Send + Sync {
    /// Notes a build and whose its template is to be, before there is anything of it. Forgets what is too old of the
    /// template's builds.
    async fn request_build(&self, build: NewBuild, caps: Caps) -> Result<Requested, Error>;
    /// Has a build wait for its turn, when the project has room for it. Forgets what is too much of what its former ones said.
    async fn start_build(&self, id: &BuildId, caps: Caps) -> Result<Started, Error>;
    /// Notes that a build runs.
    async fn run_build(&self, id: &BuildId) -> Result<(), Error>;
    /// Notes how a build ended, and has its tags name its version, in one step; nothing when it has ended. Whether it had not.
    async fn end_build(&self, id: &BuildId, end: BuildEnd) -> Result<bool, Error>;
    /// Ends what waits or runs on `node`: after a start, what the last server did not live to see the end of. Which.
    async fn interrupt_builds(&self, node: &NodeName, error: BuildError) -> Result<Vec<BuildId>, Error>;
    /// One build.
    async fn build(&self, id: &BuildId) -> Result<Option<BuildRow>, Error>;
    /// Builds of a template, newest first, after the place `after` (milliseconds and id).
    async fn builds_of(
        &self,
        template: &str,
        after: Option<(i64, String)>,
        limit: usize,
    ) -> Result<Vec<BuildRow>, Error>;
    /// The newest build of a template that has made `image`.
    async fn build_of_image(&self, template: &str, image: &str) -> Result<Option<BuildId>, Error>;
    /// Adds lines to what a build said, the first of which is number `first`.
    async fn add_build_lines(&self, id: &BuildId, first: u64, lines: Vec<BuildLine>) -> Result<(), Error>;
    /// What a build said that matters at least as much as `level`.
    async fn build_lines(
        &self,
        id: &BuildId,
        lines: Lines,
        level: LogLevel,
        limit: usize,
    ) -> Result<Vec<BuildLine>, Error>;
    /// Whose a template is; none of one that is everybody's.
    async fn template_owner(&self, template: &str) -> Result<Option<TemplateOwner>, Error>;
    /// Whose each template is; one that is everybody's is not in it.
    async fn template_owners(&self) -> Result<HashMap<String, TemplateOwner>, Error>;
    /// Whether every project may use a template of `project`. Whether there is such a one.
    async fn set_template_public(&self, project: &str, template: &str, public: bool) -> Result<bool, Error>;
    /// Forgets whose a template was, its builds and its tags.
    async fn forget_template(&self, template: &str) -> Result<(), Error>;
}
