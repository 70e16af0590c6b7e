//! Builds of templates, as a node is asked for them and as it tells of them.

use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use kelvin_api::account::Project;
use kelvin_api::error::Failure;
use kelvin_api::id::{BuildId, FilesHash, TemplateName, TemplateVersion, Token};
use kelvin_api::sandbox::Template;
use kelvin_api::units::{DiskMib, MemoryMib};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

/// Make a template of an image, or of another template, and of steps over it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Build {
    /// Chosen by the control plane and recorded there before; then the id of the version that it makes.
    pub build: BuildId,
    /// Its name. Other versions of it stay what they are.
    pub template: TemplateName,
    /// Whose it is: uploaded files are this project's own.
    pub project: Project,
    /// What is made before, for what comes after it: a stage names earlier ones alone. The build's own steps are the last stage.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<BuildStage>,
    /// What it begins with.
    pub from: BuildFrom,
    /// What is done then, in this order.
    pub steps: Vec<BuildStep>,
    /// Whether every step is run, whatever is cached.
    pub force: bool,
    /// Runs in every machine of the template: started before its snapshot, for `/bin/sh -c`, as the default user. A text of the
    /// build, or none: then the image's ENTRYPOINT and CMD are told of and not started.
    pub start: Option<String>,
    /// Tried until it exits with 0, for `/bin/sh -c`: then the snapshot is taken.
    pub ready: Option<String>,
    /// The kernel of its machines, a file on the node's machine, by its absolute path; otherwise that of what it begins with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Of machines that ask for no other; 1 when it is left out.
    pub vcpus: Option<u32>,
    /// Of machines that ask for no other; 512 when it is left out.
    pub memory_mib: Option<MemoryMib>,
    /// Size of the disk, with what is on it; the node's default when it is left out.
    pub disk_mib: Option<DiskMib>,
    /// Free space that the disk is to have when the steps are done: it is made larger for that, best effort, and never smaller.
    #[serde(default)]
    pub min_free_mib: Option<DiskMib>,
    /// When it is given up, counted from when the node is asked.
    pub deadline: Duration,
}

/// A part of a build that is no template: a disk that later stages begin with, or copy from. One that nothing needs is not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildStage {
    /// What it begins with.
    pub from: BuildFrom,
    /// What is done then, in this order.
    pub steps: Vec<BuildStep>,
}

/// What a build, or a stage of it, begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BuildFrom {
    /// An image of a registry.
    Image {
        /// As in `docker pull`: `python:3.12`, `host:5000/team/app@sha256:…`.
        reference: String,
        /// Of this request; otherwise those that the node has for the registry.
        credentials: Option<RegistryCredentials>,
        /// Where the registry may be.
        reach: RegistryReach,
    },
    /// A version of a template that is there.
    Template(TemplateVersion),
    /// An OCI image layout, a directory on the node's machine, by its absolute path.
    Layout(PathBuf),
    /// An archive that `docker save` has written, on the node's machine, by its absolute path.
    Archive(PathBuf),
    /// How the stage of that number ends, counted from 0: its disk, variables, working directory and user.
    Stage(u32),
    /// No file and no setting.
    Scratch,
}

/// Which addresses a pull may connect to, beside those of the node's mirrors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RegistryReach {
    /// Those of the internet.
    Public,
    /// Every address, the node's own and private ones too: for the operator.
    Any,
}

/// Who pulls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistryCredentials {
    /// The user.
    pub username: String,
    /// Its password, or a token.
    pub password: Token,
}

/// One step of a build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildStep {
    /// What is done.
    pub instruction: Instruction,
    /// Whether it and what comes after it are done, whatever is cached.
    pub force: bool,
    /// As it is shown: `RUN pip install flask`.
    pub shown: String,
}

/// What a step does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Instruction {
    /// Copies uploaded files into the machine.
    Copy {
        /// The upload: a tar, plain or gzip, of the files under their paths in the context.
        files: FilesHash,
        /// What of it, as the context names it. A pattern is resolved by who has uploaded: what the archive has is copied. A
        /// directory's content is copied, not the directory.
        from: String,
        /// To where: a relative path counts from the working directory; one that ends in `/`, or several sources, is a directory.
        to: String,
        /// Whose the files become: `user`, `user:group` or ids; the step's user when it is left out.
        owner: Option<String>,
        /// Their mode.
        mode: Option<u32>,
    },
    /// Copies files of a stage into the machine, as a copy of uploaded files does.
    CopyFrom {
        /// The stage, an earlier one, counted from 0.
        stage: u32,
        /// What of its disk: a path from its root, or a pattern. A directory's content is copied, not the directory. The path
        /// may be a link, which is followed; links below it are kept.
        from: String,
        /// To where: as of a copy of uploaded files.
        to: String,
        /// Whose the files become: `user`, `user:group` or ids; the step's user when it is left out.
        owner: Option<String>,
        /// Their mode.
        mode: Option<u32>,
    },
    /// Runs a command, for `/bin/bash -lc`, or `/bin/sh -c` where there is no bash.
    Run {
        /// It; empty when there is `argv`.
        command: String,
        /// As whom; the build's user when it is left out.
        user: Option<String>,
        /// A program and its arguments, started as they are, without a shell.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        argv: Option<Vec<String>>,
    },
    /// Sets variables, for the steps after it and for every process of the template's machines.
    Env(Vec<(String, String)>),
    /// Sets the working directory, and makes it.
    Workdir(String),
    /// Sets the user.
    User(String),
}

/// Something that a build tells while it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildEvent {
    /// When.
    pub at: jiff::Timestamp,
    /// How much it matters.
    pub level: BuildLevel,
    /// Of which step, counted from 0 through all stages in their order, the build's own steps last; none for what comes before and after the steps.
    pub step: Option<u32>,
    /// A line, without its end and without control characters.
    pub message: String,
}

/// How much a line matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BuildLevel {
    /// For who looks for a fault.
    Debug,
    /// As it should be.
    Info,
    /// It goes on, but not as asked.
    Warn,
    /// Why it failed.
    Error,
}

/// Where a build tells. A reader that is slow slows the build down; one that has gone changes nothing.
pub type BuildTold = mpsc::Sender<BuildEvent>;

/// What a build has made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Built {
    /// It, with the one version that was made. A create finds that.
    pub template: Template,
    /// The digest of the image that it began with, where it began with one: what a tag meant then.
    pub from_digest: Option<String>,
    /// How many steps were done before and were not done again.
    pub cached_steps: u32,
}

/// Why a build has made nothing. No version of its template has changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BuildFailure {
    /// The step that failed, counted as a [`BuildEvent`]'s; none when it was none.
    pub step: Option<u32>,
    /// Why.
    pub failure: Failure,
}

impl From<Failure> for BuildFailure {
    fn from(failure: Failure) -> Self {
        Self { step: None, failure }
    }
}

/// Bytes of an upload, as they come.
pub type FilesContent = Pin<Box<dyn Stream<Item = std::io::Result<Bytes>> + Send>>;
