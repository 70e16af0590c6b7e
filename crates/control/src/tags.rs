//! Tags of templates: names of a project for what a template is today.

use axum::extract::{Request, State};
use axum::response::IntoResponse;
use http::StatusCode;
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::TemplateName;
use serde::{Deserialize, Serialize};

use crate::accounts::Account;
use crate::control::{Control, Inner};
use crate::database::TagRow;
use crate::failures::database_failed;
use crate::request::{Outcome, Path, Query, Who, json, parse_required, read};

/// The tag that every template has. Source: E2B's clients.
pub(crate) const DEFAULT_TAG: &str = "default";
/// Tags in one request.
const MAX_TAGS: usize = 100;

/// The reply of `POST /templates/tags`.
#[derive(Debug, Serialize, schemars::JsonSchema)]
pub(crate) struct AddedTags {
    /// The tags that were given.
    tags: Vec<String>,
    /// Id of the build that the template is; of one that was imported, what stands for its image.
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

/// A name and its tag, when it has one.
pub(crate) fn split_tag(text: &str) -> (&str, Option<&str>) {
    match text.split_once(':') {
        Some((name, tag)) => (name, Some(tag)),
        None => (text, None),
    }
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
    /// Name of the template, with an optional `:tag`.
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
    tags.iter().map(|tag| parse_tag(tag).map(|tag| tag.to_string())).collect()
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
    // The tag that it is to be found by has to be there.
    control.inner.base(&caller, &body.target).await?;
    let build = control.inner.template(&caller, name).await?.build_id;
    let project = caller.project.to_string();
    let added = control.inner.database.add_tags(project, name.to_owned(), build.clone(), tags.clone());
    added.await.map_err(database_failed)?;
    let build_id = control.inner.shown_build(name, &build).await?;
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
        let text = "the tag \"default\" cannot be taken away";
        return Err(Failure::new(ErrorCode::InvalidTags, text, "leave it out").into());
    }
    control.inner.template(&caller, &body.name).await?;
    let removed = control.inner.database.remove_tags(caller.project.to_string(), body.name.clone(), tags);
    match removed.await.map_err(database_failed)? {
        None => Ok(StatusCode::NO_CONTENT.into_response()),
        Some(tag) => {
            let text = format!("{} has no tag {tag:?}", body.name);
            Err(Failure::new(ErrorCode::TagNotFound, text, "list its tags").into())
        }
    }
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
    /// The build that has made `image` for a template, as clients know it.
    pub(crate) async fn shown_build(&self, template: &str, image: &str) -> Result<String, Failure> {
        let known = self.database.build_of_image(template, image).await.map_err(database_failed)?;
        Ok(known.map_or_else(|| uuid_of(image), |build| build.to_string()))
    }

    async fn tags(&self, caller: &Account, name: &str) -> Result<Vec<TagRow>, Failure> {
        let template = self.template(caller, name).await?;
        let mut tags = self.database.tags(caller.project.as_str(), name).await.map_err(database_failed)?;
        if tags.iter().all(|row| row.tag != DEFAULT_TAG) {
            tags.push(TagRow {
                tag: DEFAULT_TAG.to_owned(),
                build: template.build_id,
                created_at: template.created_at,
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
