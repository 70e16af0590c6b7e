//! Builds of templates, as they are asked for and told of. Source: E2B's OpenAPI and what its clients send beside it.

use serde::{Deserialize, Serialize};

use crate::id::Token;
use crate::sandbox::{LogLevel, Template};

/// Steps of one build, those of all its stages.
pub const MOST_STEPS: usize = 1000;

/// Whether `text` is a user, or `user:group`, by names or ids, as a step takes one.
pub fn is_owner(text: &str) -> bool {
    let is_name = |name: &str| {
        (1..=64).contains(&name.len())
            && !name.starts_with('-')
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    match text.split_once(':') {
        Some((user, group)) => is_name(user) && is_name(group),
        None => is_name(text),
    }
}

/// `POST /v3/templates` and `POST /v2/templates`: begin a version of a template. Its files are uploaded next, then it is
/// started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NewTemplate {
    /// Name of the template, with an optional `:tag`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The same, as E2B's older clients call it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
    /// Tags that the version gets once it is built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tags: Option<Vec<String>>,
    /// A key has one project: it is the key's, whatever is said here.
    #[serde(rename = "teamID", default, skip_serializing_if = "Option::is_none")]
    pub team_id: Option<String>,
    /// vCPUs of sandboxes that ask for none; one when it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_count: Option<u32>,
    /// Memory of sandboxes that ask for none, in MiB; 512 when it is left out.
    #[serde(rename = "memoryMB", default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u64>,
    /// Kelvin: size of the disk, in MiB, with what is on it; the node's default when it is left out.
    #[serde(rename = "diskSizeMB", default, skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<u64>,
    /// Free space on the disk after the steps, in MiB, best effort; the disk is never made smaller. 0 asks for none.
    #[serde(alias = "minFreeDiskMB", default, skip_serializing_if = "Option::is_none")]
    pub min_free_disk_mb: Option<u64>,
    /// Whether every step is run, whatever is cached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_cache: Option<bool>,
}

/// The reply of `POST /v3/templates`. Source: E2B's `TemplateRequestResponseV3`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct RequestedTemplate {
    /// Name of the template.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// Id of the build.
    #[serde(rename = "buildID")]
    pub build_id: String,
    /// Whether every project may use the template.
    pub public: bool,
    /// Its names, as E2B's older clients read them.
    pub aliases: Vec<String>,
    /// Its names.
    pub names: Vec<String>,
    /// Tags that the version gets once it is built.
    pub tags: Vec<String>,
}

/// The reply of `GET /templates/{name}/files/{hash}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct FilesUpload {
    /// Whether they are there already.
    pub present: bool,
    /// Where to `PUT` them, a tar, plain or gzip. For an hour; no API key is needed.
    pub url: String,
}

/// Says what the field is that tells the kinds apart, which no attribute can.
#[cfg(feature = "schema")]
fn describe_type(schema: &mut schemars::Schema) {
    let kinds = schema.ensure_object().get_mut("oneOf").and_then(serde_json::Value::as_array_mut);
    for kind in kinds.into_iter().flatten() {
        if let Some(field) = kind.pointer_mut("/properties/type").and_then(serde_json::Value::as_object_mut) {
            field.insert("description".to_owned(), "Which kind of registry.".into());
        }
    }
}

/// Who pulls an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(transform = describe_type))]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum RegistryLogin {
    /// Of any registry.
    Registry {
        /// The user.
        username: String,
        /// Its password, or a token.
        password: Token,
    },
    /// Of Google's Artifact Registry.
    Gcp {
        /// The service account's key, JSON.
        #[serde(rename = "serviceAccountJson")]
        service_account_json: Token,
    },
    /// Of Amazon's Elastic Container Registry: refused, it wants a password that `aws ecr get-login-password` makes.
    Aws {
        /// Id of the access key.
        #[serde(rename = "awsAccessKeyId")]
        access_key_id: String,
        /// Its secret.
        #[serde(rename = "awsSecretAccessKey")]
        secret_access_key: Token,
        /// Where the registry is.
        #[serde(rename = "awsRegion")]
        region: String,
    },
}

/// One step of a build.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TemplateStep {
    /// `COPY`, `ADD`, `RUN`, `ENV`, `WORKDIR` or `USER`.
    #[serde(rename = "type")]
    pub kind: String,
    /// COPY and ADD: source, destination, owner, mode in octal. RUN: the command, the user. ENV: names and values in turn.
    /// WORKDIR, USER: it.
    #[serde(default)]
    pub args: Vec<String>,
    /// Kelvin, of RUN: a program and its arguments, started as they are, without a shell. The command is left out or empty then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub argv: Option<Vec<String>>,
    /// Kelvin, of COPY: the number of the earlier stage whose files are copied, from 0 on, in place of uploaded ones. The source is
    /// a path from the root of its disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_stage: Option<u32>,
    /// Of COPY and ADD: what the uploaded files are called.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files_hash: Option<String>,
    /// Whether this step and what comes after it are run, whatever is cached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub force: Option<bool>,
    /// Of the client, which uploads files that are there; nothing depends on it here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub force_upload: Option<bool>,
    /// Of the client, which archives what links lead to; nothing depends on it here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolve_symlinks: Option<bool>,
    /// Of the client, which compresses the archive; it is seen from the archive itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gzip: Option<bool>,
}

/// Kelvin: a part of a build that becomes no template, but what later stages begin with or copy from. It begins with exactly one
/// of the `from…` and `scratch`; nothing of it is done when no later one needs it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TemplateStage {
    /// An image of a registry, as of a build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_image: Option<String>,
    /// Who pulls it; otherwise whom the server knows for the registry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_image_registry: Option<RegistryLogin>,
    /// A template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_template: Option<String>,
    /// For the server's own key: an OCI image layout, an absolute path on the server's machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_layout: Option<String>,
    /// For the server's own key: what `docker save` has written, an absolute path on the server's machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_archive: Option<String>,
    /// How an earlier stage ends, by its number, from 0 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_stage: Option<u32>,
    /// Whether it begins with no file and no setting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<bool>,
    /// What is done, in this order.
    #[serde(default)]
    pub steps: Vec<TemplateStep>,
}

/// `POST /v2/templates/{name}/builds/{build}`: start a build. It begins with exactly one of the `from…` and `scratch`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StartBuild {
    /// An image of a registry: `python:3.12`, `host:5000/team/app@sha256:…`. One of this machine is for the server's own key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_image: Option<String>,
    /// Who pulls it; otherwise whom the server knows for the registry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_image_registry: Option<RegistryLogin>,
    /// A template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_template: Option<String>,
    /// Kelvin, for the server's own key: an OCI image layout, an absolute path on the server's machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_layout: Option<String>,
    /// Kelvin, for the server's own key: what `docker save` has written, an absolute path on the server's machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_archive: Option<String>,
    /// Kelvin: how a stage ends, by its number, from 0 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_stage: Option<u32>,
    /// Kelvin: whether it begins with no file and no setting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<bool>,
    /// Kelvin: what is made before, in this order; at most 64. Steps are counted through all stages, the build's own last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<TemplateStage>,
    /// Whether every step is run, whatever is cached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub force: Option<bool>,
    /// What is done, in this order; at most 1000, with those of all stages.
    #[serde(default)]
    pub steps: Vec<TemplateStep>,
    /// Runs in every sandbox of the template, from before its snapshot is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_cmd: Option<String>,
    /// Tried until it exits with 0: then the snapshot is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_cmd: Option<String>,
    /// Kelvin, for the server's own key: the kernel of its machines, an absolute path on the server's machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
}

/// How far a build is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum BuildStatus {
    /// It was not started yet, or waits for its turn.
    Waiting,
    /// It runs.
    Building,
    /// The template is what it has made, or what a later one has.
    Ready,
    /// It has failed, or was given up. The template is what it was.
    Error,
}

impl BuildStatus {
    /// Whether nothing more happens.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Ready | Self::Error)
    }

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Building => "building",
            Self::Ready => "ready",
            Self::Error => "error",
        }
    }
}

/// A line of a build. Source: E2B's `BuildLogEntry`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct BuildLogEntry {
    /// When it was said.
    pub timestamp: jiff::Timestamp,
    /// It, without control characters.
    pub message: String,
    /// How much it matters.
    pub level: LogLevel,
    /// Number of the step that it is of, from 1 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
}

/// Why a build has failed. Source: E2B's `BuildStatusReason`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct BuildReason {
    /// One sentence, with what was underneath.
    pub message: String,
    /// The step that failed: its number, from 1 on, `base` for what it began with, `finalize` for what follows the steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// The last that the step has said.
    #[serde(rename = "logEntries", default)]
    pub log_entries: Vec<BuildLogEntry>,
    /// Kelvin: a stable name for programs, in snake_case.
    #[serde(rename = "errorCode", default, skip_serializing_if = "Option::is_none")]
    pub error_code: Option<String>,
    /// Kelvin: what the caller can do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remediation: Option<String>,
}

/// The reply of `GET /templates/{name}/builds/{build}/status`. Source: E2B's `TemplateBuildInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct BuildInfo {
    /// Name of the template.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// Id of the build.
    #[serde(rename = "buildID")]
    pub build_id: String,
    /// How far it is.
    pub status: BuildStatus,
    /// The messages of `logEntries`.
    pub logs: Vec<String>,
    /// What it has said, from `logsOffset` on, at most 100.
    #[serde(rename = "logEntries")]
    pub log_entries: Vec<BuildLogEntry>,
    /// Why it has failed, when it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<BuildReason>,
}

/// The reply of `GET /templates/{name}/builds/{build}/logs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct BuildLogs {
    /// Entries, in the order that was asked for.
    pub logs: Vec<BuildLogEntry>,
}

/// A build of a template. Source: E2B's `TemplateBuild`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct TemplateBuild {
    /// Id of the build; of a template that was imported, one that stands for its image.
    #[serde(rename = "buildID")]
    pub build_id: String,
    /// How far it is.
    pub status: BuildStatus,
    /// When it was asked for, or imported.
    pub created_at: jiff::Timestamp,
    /// When it went on last.
    pub updated_at: jiff::Timestamp,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<jiff::Timestamp>,
    /// Number of vCPUs of a sandbox that asks for none.
    pub cpu_count: u32,
    /// Memory of a sandbox that asks for none, in MiB.
    #[serde(rename = "memoryMB")]
    pub memory_mb: u32,
    /// Size of its disk, in MiB, once it is known.
    #[serde(rename = "diskSizeMB", default, skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<u32>,
    /// Version of envd's API that its agent speaks.
    pub envd_version: String,
}

/// The reply of `GET /templates/{name}`. Source: E2B's `TemplateWithBuilds`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TemplateWithBuilds {
    /// It.
    #[serde(flatten)]
    pub template: Template,
    /// Its builds, newest first.
    pub builds: Vec<TemplateBuild>,
}

/// `PATCH /templates/{name}` and `PATCH /v2/templates/{name}`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct UpdateTemplate {
    /// Whether every project may use it; as it is when it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public: Option<bool>,
}

/// The reply of `PATCH /templates/{name}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct UpdatedTemplate {
    /// Names of the template.
    pub names: Vec<String>,
}
