//! Who may do what, and what was done: API keys, projects, the audit log, events.

use http::Method;
use kelvin_api::account::{ApiKeyInfo, AuditEntry, CreatedApiKey, Limits, NewApiKey, Project, ProjectInfo};
use kelvin_api::event::Event;

use crate::{Client, Error, decode, segment};

impl Client {
    /// Makes an API key.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn create_key(&self, wanted: &NewApiKey) -> Result<CreatedApiKey, Error> {
        let (_, _, body) = self.call(Method::POST, "/api-keys", &[], Some(wanted)).await?;
        decode(&body)
    }

    /// Every project, what it may have and what it uses.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn projects(&self) -> Result<Vec<ProjectInfo>, Error> {
        self.get("/projects").await
    }

    /// Sets what all keys of a project may have together.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn limit_project(&self, project: &Project, limits: &Limits) -> Result<ProjectInfo, Error> {
        let path = format!("/projects/{project}");
        let (_, _, body) = self.call(Method::PUT, &path, &[], Some(limits)).await?;
        decode(&body)
    }

    /// The API keys beside the server's own.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn keys(&self) -> Result<Vec<ApiKeyInfo>, Error> {
        self.get("/api-keys").await
    }

    /// Revokes an API key by its id.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn revoke_key(&self, id: &str) -> Result<(), Error> {
        self.call::<()>(Method::DELETE, &format!("/api-keys/{}", segment(id)), &[], None).await.map(drop)
    }

    /// What became of sandboxes, oldest first: the first `limit` behind the event `after`, of one sandbox or of all.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn events(&self, after: i64, sandbox: Option<&str>, limit: usize) -> Result<Vec<Event>, Error> {
        let sandbox = sandbox.map_or_else(String::new, |id| format!("&sandbox={}", segment(id)));
        self.get(&format!("/events?after={after}&limit={limit}{sandbox}")).await
    }

    /// The newest entries of the audit log, newest first.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn audit(&self, limit: usize) -> Result<Vec<AuditEntry>, Error> {
        self.get(&format!("/audit?limit={limit}")).await
    }
}
