//! Tags of templates: each names a version of what a project has built, or what an imported template is today.

use axum::extract::{Request, State};
use axum::response::IntoResponse;
use http::StatusCode;
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::{BuildId, TemplateName, TemplateVersion};
use kelvin_node_api::Base;
use serde::{Deserialize, Serialize};

use crate::accounts::Account;
use crate::control::{Control, Inner};
use crate::database::{DEFAULT_TAG, TagRow};
use crate::failures::{database_failed, unknown_template};
use crate::request::{Outcome, Path, Query, Who, json, parse_required, read};
use crate::versions::{is_default, split_tag};

/// Tags in one request, and of one template.
pub(crate) const MAX_TAGS: usize = 100;

/// The reply of `POST /templates/tags`.
#[derive(Debug, Serialize, schemars::JsonSchema)]
pub(crate) struct AddedTags {
    /// The tags that were given.
    tags: Vec<String>,
    /// Id of the build whose version they name; of a template that was imported, what stands for its image.
    #[serde(rename = "buildID")]
    build_id: String,
}

/// A row of `GET /templates/{name}/tags`.
#[derive(Debug, Serialize, schemars::JsonSchema)]
pub(crate) struct Tag {
    /// The tag.
    tag: String,
    /// Id of the build that it names; of a template that was imported, what stands for its image.
    #[serde(rename = "buildID")]
    build_id: String,
    /// When it was given.
    #[serde(rename = "createdAt")]
    created_at: jiff::Timestamp,
}

/// The reply of `GET /templates/{name}/tags/count`.
#[derive(Debug, Serialize, schemars::JsonSchema)]
pub(crate) struct TagCount {
    /// How many tags there are.
    total: usize,
}

/// The reply of `GET /templates/{name}/tags/exists`.
#[derive(Debug, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TagExists {
    /// Whether there is one.
    exists: bool,
    /// The tag as it is kept.
    normalized_tag: String,
}

fn parse_tag(text: &str) -> Result<TemplateName, Failure> {
    text.parse().map_err(|error: kelvin_api::id::ParseIdError| {
        Failure::new(ErrorCode::InvalidTag, error.to_string(), "use 1 to 64 of a-z, 0-9, '.', '_' and '-'")
    })
}

/// `POST /templates/tags`.
#[derive(Debug, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct AddTags {
    /// Name of the template, with an optional `:tag`; Kelvin: or the id of a build.
    target: String,
    /// 1 to 100 tags.
    tags: Vec<String>,
}

/// `DELETE /templates/tags`.
#[derive(Debug, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RemoveTags {
    /// Name of the template.
    name: String,
    /// 1 to 100 tags.
    tags: Vec<String>,
}

pub(crate) fn parse_tags(tags: Vec<String>) -> Result<Vec<String>, Failure> {
    if tags.is_empty() || tags.len() > MAX_TAGS {
        return Err(Failure::new(
            ErrorCode::InvalidTags,
            format!("name 1 to {MAX_TAGS} tags"),
            "split the request",
        ));
    }
    let assignable = |tag: &String| match tag.parse::<BuildId>() {
        // `name:<build>` means that build.
        Ok(_) => {
            Err(Failure::new(ErrorCode::InvalidTag, format!("{tag} reads as a build"), "choose another"))
        }
        Err(_) => parse_tag(tag).map(|tag| tag.to_string()),
    };
    tags.iter().map(assignable).collect()
}

pub(crate) async fn add_tags(State(control): State<Control>, Who(caller): Who, request: Request) -> Outcome {
    let body: AddTags = parse_required(&read(request).await?)?;
    let tags = parse_tags(body.tags)?;
    let (name, tag) = split_tag(&body.target);
    if name.is_empty() || tag == Some("") {
        return Err(Failure::new(
            ErrorCode::InvalidTarget,
            "the target is no name:tag",
            "for example base:default",
        )
        .into());
    }
    let inner = &control.inner;
    // What the target names stays until the tags name it, too.
    let _changing = inner.builds.changing.lock().await;
    if inner.owners.of(name).is_some() && !inner.owners.is_own(&caller.project, name) {
        return Err(unknown_template(&body.target).into());
    }
    let version = match inner.base(&caller, &body.target).await?.base {
        Base::Template(version) => version,
        Base::Snapshot(_) => return Err(unknown_template(&body.target).into()),
    };
    let build = inner.tagged_as(&version).await?;
    let project = caller.project.to_string();
    let known = inner.database.tags(&project, name).await.map_err(database_failed)?;
    let new = tags.iter().filter(|tag| known.iter().all(|row| row.tag != **tag)).count();
    if known.len() + new > MAX_TAGS {
        let text = format!("{name} would have more than {MAX_TAGS} tags: each keeps a version");
        return Err(Failure::new(ErrorCode::InvalidTags, text, "take some away first").into());
    }
    let added = inner.database.add_tags(project, name.to_owned(), build.clone(), tags.clone()).await;
    // Also when it failed: it may have been written, and what the name means is what is written.
    if inner.owners.of(name).is_some() {
        inner.renew_owner(name).await?;
    }
    added.map_err(database_failed)?;
    let build_id = inner.shown_build(name, &build).await?;
    Ok(json(StatusCode::CREATED, &AddedTags { tags, build_id }))
}

pub(crate) async fn remove_tags(
    State(control): State<Control>,
    Who(caller): Who,
    request: Request,
) -> Outcome {
    let body: RemoveTags = parse_required(&read(request).await?)?;
    let tags = parse_tags(body.tags)?;
    if tags.iter().any(|tag| tag == DEFAULT_TAG) {
        return Err(default_stays().into());
    }
    let inner = &control.inner;
    let _changing = inner.builds.changing.lock().await;
    if inner.owners.of(&body.name).is_some() && !inner.owners.is_own(&caller.project, &body.name) {
        return Err(unknown_template(&body.name).into());
    }
    inner.template(&caller, &body.name).await?;
    let removed = inner.database.remove_tags(caller.project.to_string(), body.name.clone(), tags);
    match removed.await.map_err(database_failed)? {
        None => Ok(StatusCode::NO_CONTENT.into_response()),
        Some(tag) => Err(no_tag(&body.name, &tag).into()),
    }
}

fn default_stays() -> Failure {
    let text = "the tag \"default\" cannot be taken away";
    Failure::new(ErrorCode::InvalidTags, text, "leave it out, or give it to another version")
}

fn no_tag(name: &str, tag: &str) -> Failure {
    Failure::new(ErrorCode::TagNotFound, format!("{name} has no tag {tag:?}"), "list its tags")
}

/// What stands for an image where E2B's clients read a UUID: made of its digest.
fn uuid_of(image: &str) -> String {
    match image.as_bytes() {
        digits if digits.len() >= 32 && digits[..32].iter().all(u8::is_ascii_hexdigit) => format!(
            "{}-{}-{}-{}-{}",
            &image[..8],
            &image[8..12],
            &image[12..16],
            &image[16..20],
            &image[20..32]
        ),
        _ => image.to_owned(),
    }
}

impl Inner {
    /// The build that a tag, or a template, is said to be of, as clients know it: where that is an image, the one that has made it.
    pub(crate) async fn shown_build(&self, template: &str, build: &str) -> Result<String, Failure> {
        if build.parse::<BuildId>().is_ok() {
            return Ok(build.to_owned());
        }
        let known = self.database.build_of_image(template, build).await.map_err(database_failed)?;
        Ok(known.map_or_else(|| uuid_of(build), |build| build.to_string()))
    }

    /// Takes from a template of the caller's own the tag `tag`, or, when it is the id of a build, nothing; and removes the version
    /// that it meant when no other tag names it. Whether the template is the caller's own.
    pub(crate) async fn remove_tagged(
        &self,
        caller: &Account,
        name: &TemplateName,
        tag: &str,
    ) -> Result<bool, Failure> {
        let _changing = self.builds.changing.lock().await;
        let project = &caller.project;
        let Some(owner) =
            self.owners.of(name.as_str()).filter(|_| self.owners.is_own(project, name.as_str()))
        else {
            return Ok(false);
        };
        if tag == DEFAULT_TAG {
            return Err(default_stays());
        }
        let is_tag = tag.parse::<BuildId>().is_err();
        let version = match self.built_version(&owner, name, Some(tag)).await {
            Ok(Some(version)) => version,
            Ok(None) => return Err(no_tag(name.as_str(), tag)),
            // It names nothing any more.
            Err(failure) if failure.error_code == ErrorCode::TagOutdated => {
                return self.untag(caller, name, tag).await;
            }
            Err(failure) => return Err(failure),
        };
        let others = self.named_by(&owner.project, &version, tag).await?;
        if is_tag {
            self.untag(caller, name, tag).await?;
        } else if !others.is_empty() {
            let text = format!("{version} is named by: {}", others.join(", "));
            return Err(Failure::new(ErrorCode::InUse, text, "give these tags to another version first"));
        }
        if others.is_empty() {
            // After a crash between the two it is an unnamed version, and goes with those.
            self.remove_version(&version).await?;
        }
        Ok(true)
    }

    async fn untag(&self, caller: &Account, name: &TemplateName, tag: &str) -> Result<bool, Failure> {
        let (project, name) = (caller.project.to_string(), name.to_string());
        let removed = self.database.remove_tags(project, name.clone(), vec![tag.to_owned()]).await;
        match removed.map_err(database_failed)? {
            None => Ok(true),
            Some(tag) => Err(no_tag(&name, &tag)),
        }
    }

    /// The tags but `tag` that name a version.
    async fn named_by(
        &self,
        project: &str,
        version: &TemplateVersion,
        tag: &str,
    ) -> Result<Vec<String>, Failure> {
        let tags = self.database.tags(project, version.name.as_str()).await.map_err(database_failed)?;
        // Of what the tags say, not of what the node shows: a version whose record it cannot read now is named all the same.
        let is_plain = version.build.is_none();
        let text = match &version.build {
            Some(build) => Some(build.to_string()),
            None => self.plain_image(&version.name).await?,
        };
        let named = |row: &&TagRow| text.as_ref() == Some(&row.build);
        let mut found: Vec<String> = tags.iter().filter(named).map(|row| row.tag.clone()).collect();
        if is_plain && !tags.iter().any(is_default) {
            found.push(DEFAULT_TAG.to_owned());
        }
        found.retain(|one| one != tag);
        Ok(found)
    }

    async fn tags(&self, caller: &Account, name: &str) -> Result<Vec<TagRow>, Failure> {
        let template = self.template(caller, name).await?;
        let owner = self.owners.of(name);
        let project = owner.as_ref().map_or(caller.project.as_str(), |owner| &owner.project);
        let mut tags = self.database.tags(project, name).await.map_err(database_failed)?;
        if owner.is_some() {
            tags.retain(|row| row.tag != DEFAULT_TAG || is_default(row));
        }
        let plain = template.versions.iter().find(|version| version.build_id.is_none());
        if let Some(plain) = plain.filter(|_| tags.iter().all(|row| row.tag != DEFAULT_TAG)) {
            tags.push(TagRow {
                tag: DEFAULT_TAG.to_owned(),
                build: plain.image.clone(),
                created_at: plain.created_at,
            });
        }
        Ok(tags)
    }
}

pub(crate) async fn tags(
    State(control): State<Control>,
    Who(caller): Who,
    Path(name): Path<String>,
) -> Outcome {
    let mut tags = Vec::new();
    for TagRow { tag, build, created_at } in control.inner.tags(&caller, &name).await? {
        tags.push(Tag { tag, build_id: control.inner.shown_build(&name, &build).await?, created_at });
    }
    Ok(json(StatusCode::OK, &tags))
}

pub(crate) async fn count_tags(
    State(control): State<Control>,
    Who(caller): Who,
    Path(name): Path<String>,
) -> Outcome {
    let total = control.inner.tags(&caller, &name).await?.len();
    Ok(json(StatusCode::OK, &TagCount { total }))
}

#[derive(Debug, Deserialize)]
pub(crate) struct TagQuery {
    tag: String,
}

pub(crate) async fn has_tag(
    State(control): State<Control>,
    Who(caller): Who,
    Path(name): Path<String>,
    Query(query): Query<TagQuery>,
) -> Outcome {
    let tag = parse_tag(&query.tag)?;
    let exists = control.inner.tags(&caller, &name).await?.iter().any(|row| row.tag == tag.as_str());
    Ok(json(StatusCode::OK, &TagExists { exists, normalized_tag: tag.to_string() }))
}
