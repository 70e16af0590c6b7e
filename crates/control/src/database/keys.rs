//! API keys, and the limits of projects.

use async_trait::async_trait;
use kelvin_api::account::{ApiKeyInfo, Limits, Project, ProjectInfo};

use super::Error;

/// What keys are accepted, and what projects may have, at one moment.
#[derive(Debug, Clone)]
pub struct Known {
    /// Grows with each change.
    pub revision: i64,
    /// Each key by its hash.
    pub keys: Vec<(String, ApiKeyInfo)>,
    /// Of projects that have some.
    pub limits: Vec<(Project, Limits)>,
}

/// What of this is written survives a power failure, but for when keys were used.
#[async_trait]
pub trait Keys: Send + Sync {
    /// The hash of each key and what it is, oldest first; of one project, or of all.
    async fn keys(&self, project: Option<String>) -> Result<Vec<(String, ApiKeyInfo)>, Error>;
    /// Keys and limits, unless they are as they were at `revision`. Names and times of last use do not count.
    async fn known_since(&self, revision: Option<i64>) -> Result<Option<Known>, Error>;
    /// Remembers a key by its hash.
    async fn add_key(&self, hash: String, info: ApiKeyInfo) -> Result<(), Error>;
    /// Gives a key another name; whether there is one of this id.
    async fn rename_key(&self, id: String, name: String) -> Result<bool, Error>;
    /// Forgets a key; whether there was one of this id.
    async fn remove_key(&self, id: String) -> Result<bool, Error>;
    /// Writes down when keys were used last.
    async fn note_used(&self, used: Vec<(String, i64)>) -> Result<(), Error>;
    /// Sets the limits of a project.
    async fn set_project_limits(&self, project: &Project, limits: Limits) -> Result<(), Error>;
    /// Every project that has limits, keys, sandboxes or snapshots, with what it uses.
    async fn projects(&self) -> Result<Vec<ProjectInfo>, Error>;
}
