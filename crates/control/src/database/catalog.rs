//! What is known of templates and snapshots beside what the node says: owners, tags, how often they were used.

use std::collections::HashMap;

use async_trait::async_trait;

use super::{Error, Exceeded, Quota};
use crate::placement::NodeName;

/// A snapshot that is to be taken.
#[derive(Debug)]
pub struct NewSnapshot {
    /// Its id.
    pub id: String,
    /// MiB of disk that it may come to.
    pub mib: u64,
    /// What it is to be called.
    pub name: Option<String>,
    /// Where it is to be.
    pub node: NodeName,
}

/// Whose a snapshot is.
#[derive(Debug, Clone)]
pub struct Owner {
    pub project: String,
    pub name: Option<String>,
}

/// The tag that a name without one means, and that a build gives which names none. Source: E2B's clients.
pub const DEFAULT_TAG: &str = "default";

/// One tag of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagRow {
    pub tag: String,
    /// The build whose version it names; the digest of an image, of what was imported, or built when one version of a name was
    /// kept.
    pub build: String,
    pub created_at: jiff::Timestamp,
}

/// Owners and tags survive a power failure.
#[async_trait]
pub trait Catalog: Send + Sync {
    /// Notes whose a snapshot is to be, when `quota` has room for it, and what its idempotency key is about: before it is
    /// there. Until it is, its name means what it meant. The limit that it would exceed.
    async fn begin_snapshot(
        &self,
        snapshot: NewSnapshot,
        quota: Quota,
        key: Option<String>,
    ) -> Result<Option<Exceeded>, Error>;
    /// Notes that a snapshot is there now, and gives it its name. A name is one snapshot's: who had it before keeps its id
    /// alone, so that a name which is deleted means nothing and never an older snapshot.
    async fn finish_snapshot(&self, id: String) -> Result<(), Error>;
    /// Snapshots that are being taken on `node`: after a start, those whose end the last server did not live to see.
    async fn unfinished_snapshots(&self, node: &NodeName) -> Result<Vec<String>, Error>;
    /// Gives what has no owner on `node` to the default project: once, for a database from before there were projects. Since then
    /// every snapshot has had an owner before it was there, and what has none is nobody's.
    async fn adopt_snapshots(
        &self,
        node: &NodeName,
        there: Vec<(String, Option<String>, i64)>,
    ) -> Result<(), Error>;
    /// Forgets whose a snapshot of `node` was, and its name with it: a database of an older build may have others of that
    /// name. Nothing when it is another node's.
    async fn forget_snapshot(&self, node: &NodeName, id: String) -> Result<(), Error>;
    /// The snapshot of a project that `text` names: its id, or its name.
    async fn snapshot(&self, project: &str, text: &str) -> Result<Option<String>, Error>;
    /// The owner of each snapshot, and its name.
    async fn snapshot_owners(&self) -> Result<HashMap<String, Owner>, Error>;
    /// Gives a template tags, all or none; one that it has already moves to this build.
    async fn add_tags(
        &self,
        project: String,
        template: String,
        build: String,
        tags: Vec<String>,
    ) -> Result<(), Error>;
    /// Takes tags from a template; the first that it does not have, and then none is taken.
    async fn remove_tags(
        &self,
        project: String,
        template: String,
        tags: Vec<String>,
    ) -> Result<Option<String>, Error>;
    /// The tags of a template, newest first.
    async fn tags(&self, project: &str, template: &str) -> Result<Vec<TagRow>, Error>;
    /// The tags of every template, with the project whose they are and the template, each template's newest first.
    async fn all_tags(&self) -> Result<Vec<(String, String, TagRow)>, Error>;
    /// How often each template was started, and when last.
    async fn spawns(&self) -> Result<HashMap<String, (i64, jiff::Timestamp)>, Error>;
}
