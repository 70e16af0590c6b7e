//! Versions of templates: which one a name and a tag mean, and the end of those that nothing names any more.
//!
//! ```text
//! build ends ──> version on the node ──> ready, and its tags name it: one transaction ──> machines wait for the default one
//!                       └─ crash: nothing names it; it goes with the next collection, every tag is what it was
//! last tag moved on, or taken away ──> unnamed ──GRACE, or newer ones are enough──> removed ──> what it alone needed, too
//! ```
//!
//! What was imported has one version, and so has what was built by a release that kept one: the version without a build. A tag
//! of such a one has the digest of its image, and is outdated once that is another.
//!
//! Who writes: tags are the database's, versions the node's. Both change while `builds.changing` is held, so a version is not
//! removed while a tag begins to name it. A create that has found its version meanwhile gets it, or `not_found`. Sandboxes and
//! snapshots need no version: what they need of the store they keep there themselves.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use kelvin_api::error::{ErrorCode, Failure, Kind, chain};
use kelvin_api::id::{BuildId, TemplateName, TemplateVersion};
use kelvin_api::sandbox::Template;
use kelvin_node_api::{Base, Source};

use crate::accounts::Account;
use crate::control::Inner;
use crate::database::{BuildState, DEFAULT_TAG, TagRow, TemplateOwner};
use crate::failures::{database_failed, unknown_template};

/// How long a version stays that no tag names: tags can be given back to it.
pub(crate) const GRACE: SignedDuration = SignedDuration::from_hours(24);
/// Versions of one template that stay for that long: the newest of them.
pub(crate) const UNNAMED: usize = 5;
/// How often is looked for others.
const EVERY: Duration = Duration::from_secs(3600);

/// A name and its tag, when it has one.
pub(crate) fn split_tag(text: &str) -> (&str, Option<&str>) {
    match text.split_once(':') {
        Some((name, tag)) => (name, Some(tag)),
        None => (text, None),
    }
}

/// The version that a row of a template as the node tells it is of.
fn version_of(record: &Template) -> Option<TemplateVersion> {
    let name = record.template_id.parse().ok()?;
    Some(TemplateVersion { name, build: record.versions.first()?.build_id.clone() })
}

/// Digest of the image of such a row.
pub(crate) fn image_of(record: &Template) -> String {
    record.versions.first().map_or_else(|| record.build_id.clone(), |version| version.image.clone())
}

/// Whether the version of such a row has no build. Of a template without an owner it is everybody's, and the others are nobody's:
/// they came when their template had been deleted.
pub(crate) fn is_plain(record: &Template) -> bool {
    record.versions.first().is_none_or(|version| version.build_id.is_none())
}

/// Whether a tag names the version of such a row.
fn names(tag: &TagRow, record: &Template) -> bool {
    match record.versions.first().and_then(|version| version.build_id.as_ref()) {
        Some(build) => tag.build == build.as_str(),
        None => tag.build == image_of(record),
    }
}

/// Whether it is the default tag and names a build. The release before versions gave it the digest of an image, which said
/// nothing of what the name means.
pub(crate) fn is_default(tag: &TagRow) -> bool {
    tag.tag == DEFAULT_TAG && tag.build.parse::<BuildId>().is_ok()
}

/// The tags, of those of its template, that name the version of such a row. Without a default one that names a build the name
/// means the version that has none.
pub(crate) fn tags_of(record: &Template, tags: &[&TagRow]) -> Vec<String> {
    let mut found: Vec<String> =
        tags.iter().filter(|tag| names(tag, record)).map(|tag| tag.tag.clone()).collect();
    if is_plain(record) && !tags.iter().copied().any(is_default) {
        found.push(DEFAULT_TAG.to_owned());
    }
    found.sort();
    found.dedup();
    found
}

/// All versions of one template as one row: of the `chosen` one, else of the one that the default tag names, else of the newest.
pub(crate) fn joined(
    mut records: Vec<Template>,
    tags: &[&TagRow],
    chosen: Option<&TemplateVersion>,
) -> Option<Template> {
    for record in &mut records {
        let found = tags_of(record, tags);
        if let Some(version) = record.versions.first_mut() {
            version.tags = found;
        }
    }
    records.sort_by_key(|record| std::cmp::Reverse((record.created_at, version_of(record))));
    let has_default = |record: &Template| {
        record.versions.first().is_some_and(|version| version.tags.iter().any(|tag| tag == DEFAULT_TAG))
    };
    let shown = match chosen {
        Some(version) => records.iter().find(|record| version_of(record).as_ref() == Some(version))?,
        None => records.iter().find(|record| has_default(record)).or(records.first())?,
    };
    let created_at = records.iter().map(|record| record.created_at).min().unwrap_or(shown.created_at);
    let mut shown = Template { created_at, ..shown.clone() };
    shown.build_count = u32::try_from(records.len()).unwrap_or(u32::MAX);
    shown.versions = records.into_iter().flat_map(|record| record.versions).collect();
    Some(shown)
}

fn outdated(name: &TemplateName, tag: &str) -> Failure {
    Failure::new(
        ErrorCode::TagOutdated,
        format!("{name} was imported anew since it was tagged {tag:?}"),
        "assign the tag again, or leave it out",
    )
}

impl Inner {
    /// What the node starts for a version, when it has it.
    pub(crate) async fn node_source(&self, version: &TemplateVersion) -> Result<Option<Source>, Failure> {
        match self.node.source(&version.to_string()).await {
            Ok(source) => Ok(source.filter(|source| matches!(source.base, Base::Template(_)))),
            Err(failure) if failure.kind == Kind::NotFound => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// Digest of the image of the version of `name` that has no build, when there is that.
    pub(crate) async fn plain_image(&self, name: &TemplateName) -> Result<Option<String>, Failure> {
        let plain = TemplateVersion::from(name.clone());
        let all = self.node.templates().await?;
        let found = all.iter().find(|record| version_of(record).as_ref() == Some(&plain));
        Ok(found.map(image_of))
    }

    /// The version of a template that was built which `tag`, a tag or the id of a build, means; the default one without it. None
    /// when it means none. The default one may not be there.
    pub(crate) async fn built_version(
        &self,
        owner: &TemplateOwner,
        name: &TemplateName,
        tag: Option<&str>,
    ) -> Result<Option<TemplateVersion>, Failure> {
        let of = |build: Option<BuildId>| TemplateVersion { name: name.clone(), build };
        let Some(tag) = tag.filter(|tag| *tag != DEFAULT_TAG) else {
            return Ok(Some(of(owner.default.clone())));
        };
        let tags = self.database.tags(&owner.project, name.as_str()).await.map_err(database_failed)?;
        if let Some(row) = tags.into_iter().find(|row| row.tag == tag) {
            return match row.build.parse() {
                Ok(build) => Ok(Some(of(Some(build)))),
                Err(_) if self.plain_image(name).await? == Some(row.build) => Ok(Some(of(None))),
                Err(_) => Err(outdated(name, tag)),
            };
        }
        let Ok(build) = tag.parse::<BuildId>() else { return Ok(None) };
        let row = self.database.build(&build).await.map_err(database_failed)?.filter(|row| {
            row.template == name.as_str() && row.project == owner.project && row.state == BuildState::Ready
        });
        let Some(row) = row else { return Ok(None) };
        let version = of(Some(build));
        if self.node_source(&version).await?.is_some() {
            return Ok(Some(version));
        }
        let is_plain = row.image.is_some() && self.plain_image(name).await? == row.image;
        Ok(is_plain.then(|| of(None)))
    }

    /// The template that `text`, a name with an optional tag or build, is for a caller; none when it is none of theirs.
    ///
    /// # Errors
    /// `TagOutdated` when the tag was given to what is there no more.
    pub(crate) async fn template_source(
        &self,
        caller: &Account,
        text: &str,
    ) -> Result<Option<Source>, Failure> {
        let (name, tag) = split_tag(text);
        let Ok(parsed) = name.parse::<TemplateName>() else { return Ok(None) };
        if let Some(owner) = self.owners.of(name) {
            if !self.owners.may_use(&caller.project, name) {
                return Ok(None);
            }
            return match self.built_version(&owner, &parsed, tag).await? {
                Some(version) => self.node_source(&version).await,
                None => Ok(None),
            };
        }
        // Everybody's: tags of it are each project's own, and name what it is today.
        let source = self.node_source(&parsed.clone().into()).await?;
        let Some(tag) = tag.filter(|tag| *tag != DEFAULT_TAG && source.is_some()) else { return Ok(source) };
        let tags = self.database.tags(caller.project.as_str(), name).await.map_err(database_failed)?;
        let Some(known) = tags.into_iter().find(|row| row.tag == tag) else { return Ok(None) };
        match self.plain_image(&parsed).await? == Some(known.build) {
            true => Ok(source),
            false => Err(outdated(&parsed, tag)),
        }
    }

    /// The version that `text` means, whoever's it is: for an administrator.
    pub(crate) async fn any_version(&self, text: &str) -> Result<TemplateVersion, Failure> {
        let (name, tag) = split_tag(text);
        let parsed: TemplateName = name.parse().map_err(|_| unknown_template(text))?;
        let version = match self.owners.of(name) {
            Some(owner) => self.built_version(&owner, &parsed, tag).await?,
            None => tag.is_none().then(|| parsed.into()),
        };
        version.ok_or_else(|| unknown_template(text))
    }

    /// What a version is called in the database: its build, or without one the digest of its image.
    pub(crate) async fn tagged_as(&self, version: &TemplateVersion) -> Result<String, Failure> {
        match &version.build {
            Some(build) => Ok(build.to_string()),
            None => {
                let image = self.plain_image(&version.name).await?;
                image.ok_or_else(|| unknown_template(version.name.as_str()))
            }
        }
    }

    /// Takes over from the database whose a template is and what its default tag names, and has machines wait for that. While
    /// `builds.changing` is held.
    pub(crate) async fn renew_owner(&self, name: &str) -> Result<(), Failure> {
        match self.database.template_owner(name).await.map_err(database_failed)? {
            Some(owner) => {
                self.owners.set(name, owner.clone());
                self.prefer(name, owner.default).await;
            }
            None => self.owners.forget(name),
        }
        Ok(())
    }

    /// Has machines wait for a version. Creates find it either way.
    async fn prefer(&self, name: &str, build: Option<BuildId>) {
        let Ok(name) = name.parse() else { return };
        let version = TemplateVersion { name, build };
        match self.node.prefer_template(&version).await {
            // It was never built; or a node that makes no builds, and has no version of anything.
            Err(failure)
                if matches!(
                    failure.error_code,
                    ErrorCode::TemplateNotFound | ErrorCode::BuildUnsupported | ErrorCode::NodeStopping
                ) => {}
            Err(failure) => {
                tracing::warn!(template = %version, error = chain(&failure), "no machines wait for a version");
            }
            Ok(()) => {}
        }
    }

    /// After a start: tells the node which versions machines wait for.
    pub(crate) async fn prefer_all(&self) -> Result<(), Failure> {
        for (name, owner) in self.database.template_owners().await.map_err(database_failed)? {
            self.prefer(&name, owner.default).await;
        }
        Ok(())
    }

    /// Removes a version from the node. One that is gone is fine.
    pub(crate) async fn remove_version(&self, version: &TemplateVersion) -> Result<(), Failure> {
        match self.node.remove_template(version).await {
            // It was never built, or the server died before it had forgotten it; a node that makes none has none.
            Err(failure)
                if matches!(
                    failure.error_code,
                    ErrorCode::TemplateNotFound | ErrorCode::BuildUnsupported
                ) =>
            {
                Ok(())
            }
            other => other,
        }
    }

    /// Every version that the node has, by template.
    pub(crate) async fn records(&self) -> Result<BTreeMap<String, Vec<Template>>, Failure> {
        let mut found: BTreeMap<String, Vec<Template>> = BTreeMap::new();
        for record in self.node.templates().await? {
            found.entry(record.template_id.clone()).or_default().push(record);
        }
        Ok(found)
    }

    /// The versions of a template that the node has.
    pub(crate) async fn versions_there(&self, name: &TemplateName) -> Result<Vec<TemplateVersion>, Failure> {
        let records = self.records().await?.remove(name.as_str()).unwrap_or_default();
        Ok(records.iter().filter_map(version_of).collect())
    }

    /// Since when a version is unnamed; none when it is not to be removed.
    async fn unnamed_since(
        &self,
        record: &Template,
        tags: &[&TagRow],
    ) -> Result<Option<jiff::Timestamp>, Failure> {
        if !tags_of(record, tags).is_empty() {
            return Ok(None);
        }
        let build = match record.versions.first().and_then(|version| version.build_id.clone()) {
            Some(build) if self.builds.find(&build).is_some() => return Ok(None),
            Some(build) => Some(build),
            None => {
                let found = self.database.build_of_image(&record.template_id, &image_of(record)).await;
                found.map_err(database_failed)?
            }
        };
        let row = match build {
            Some(build) => self.database.build(&build).await.map_err(database_failed)?,
            None => None,
        };
        Ok(Some(match row {
            Some(row) if row.state == BuildState::Ready => {
                row.untagged_at.or(row.ended_at).unwrap_or(record.created_at)
            }
            // Its build was interrupted: nobody was told of it.
            Some(_) => jiff::Timestamp::MIN,
            None => record.created_at,
        }))
    }

    /// Removes versions that no tag has named for so long, or of which there are too many. How many.
    pub(crate) async fn expire_versions(&self) -> Result<usize, Failure> {
        let mut removed = 0;
        for (name, records) in self.records().await? {
            // What was listed may be named by now: that is looked up while nothing changes.
            let _changing = self.builds.changing.lock().await;
            let owner = self.owners.of(&name);
            let tags = match &owner {
                Some(owner) => self.database.tags(&owner.project, &name).await.map_err(database_failed)?,
                None => Vec::new(),
            };
            let tags: Vec<&TagRow> = tags.iter().collect();
            let mut unnamed = Vec::new();
            for record in records.iter().filter(|record| owner.is_some() || !is_plain(record)) {
                if let (Some(version), Some(since)) =
                    (version_of(record), self.unnamed_since(record, &tags).await?)
                {
                    unnamed.push((since, version));
                }
            }
            unnamed.sort();
            let now = self.clock.wall();
            for (at, (since, version)) in unnamed.into_iter().rev().enumerate() {
                if at < UNNAMED && now.duration_since(since) < GRACE {
                    continue;
                }
                match self.remove_version(&version).await {
                    Ok(()) => removed += 1,
                    Err(failure) => {
                        tracing::warn!(template = %version, error = chain(&failure), "a version is not removed");
                    }
                }
            }
        }
        Ok(removed)
    }

    /// Removes versions that nothing names, and from the store what they alone needed, until the server stops. What sandboxes
    /// and snapshots still need then stays for the next time, or for `kelvin gc`.
    pub(crate) async fn keep_versions(self: Arc<Self>) {
        loop {
            // Nothing tells that a time is over.
            tokio::time::sleep(EVERY).await;
            if let Err(failure) = self.tidy().await {
                tracing::warn!(error = chain(&failure), "versions that nothing names are left");
            }
        }
    }

    /// What a sandbox still held when its version went is free once that sandbox has ended: so it is collected each time.
    async fn tidy(&self) -> Result<(), Failure> {
        self.expire_versions().await?;
        let before = self.there().await?;
        self.node.collect(false).await?;
        self.forget_owners(before).await
    }
}
