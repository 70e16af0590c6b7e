//! What sandboxes are made from: templates, snapshots that are kept, and tags.
//!
//! Templates that were imported are everybody's, what was built is its project's until that says otherwise; snapshots and tags
//! are a project's. What a tag means is decided in `versions`.

use std::collections::{HashMap, HashSet};

use axum::Extension;
use axum::extract::State;
use axum::response::IntoResponse;
use http::{Method, StatusCode};
use kelvin_api::build::{BuildStatus, TemplateBuild, TemplateWithBuilds};
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::{SnapshotId, TemplateVersion};
use kelvin_api::sandbox::{SnapshotInfo, SnapshotVerification, Template};
use kelvin_node_api::{Base, Source};
use serde::{Deserialize, Serialize};

use crate::accounts::Account;
use crate::builds::routes::{listed, unbuilt};
use crate::codes;
use crate::control::{Control, Inner};
use crate::database::{BuildRow, DEFAULT_TAG, TagRow};
use crate::failures::{database_failed, unknown_template};
use crate::list::{PAGE, page_limit, with_next};
use crate::once::Again;
use crate::openapi::{self, Api, op};
use crate::request::{Outcome, Path, Query, Who, json};
use crate::service::{make_page_token, parse_page_token};
use crate::tags::{
    AddTags, AddedTags, RemoveTags, Tag, TagCount, TagExists, add_tags, count_tags, has_tag, remove_tags,
    tags,
};
use crate::versions::{is_plain, joined, split_tag};

/// The routes.
#[allow(clippy::too_many_lines, reason = "a table: one entry for each route")]
pub(crate) fn routes() -> Api {
    let (get, post, delete) = (Method::GET, Method::POST, Method::DELETE);
    let remove = |id, tag, summary| {
        op(id, tag, summary)
            .errors(&[
                codes::NODE,
                codes::BASE,
                &[ErrorCode::InUse, ErrorCode::SandboxChanging, ErrorCode::BuildUnsupported],
            ])
            .query(&[("cascade", "Kelvin: true deletes those that descend from it too")])
            .empty(204)
    };
    Api::new()
        .route(
            &get,
            "/snapshots",
            snapshots,
            op("listSnapshots", openapi::Tag::Snapshots, "Snapshots that are kept, newest first")
                .errors(&[codes::NODE, codes::PAGES])
                .query(&[("sandboxID", "only of this sandbox"), ("name", "only of this name")])
                .query(PAGE)
                .reply::<Vec<SnapshotInfo>>(200),
        )
        .route(
            &delete,
            "/snapshots/{name}",
            remove_snapshot,
            remove("deleteSnapshot", openapi::Tag::Snapshots, "Kelvin: delete a snapshot"),
        )
        .route(
            &post,
            "/snapshots/{name}/verify",
            verify_snapshot,
            op(
                "verifySnapshot",
                openapi::Tag::Snapshots,
                "Kelvin: read all of a snapshot and compare it with what was taken",
            )
            .errors(&[codes::NODE, codes::BASE])
            .reply::<SnapshotVerification>(200),
        )
        .route(
            &get,
            "/templates",
            templates,
            op("listTemplates", openapi::Tag::Templates, "Templates")
                .errors(&[codes::NODE])
                .query(&[("teamID", "every project has the same templates")])
                .reply::<Vec<Template>>(200),
        )
        .route(
            &get,
            "/v2/templates",
            template_page,
            op("listTemplatesV2", openapi::Tag::Templates, "Templates, by name")
                .errors(&[codes::NODE, codes::PAGES])
                .query(&[("teamID", "every project has the same templates")])
                .query(PAGE)
                .reply::<Vec<Template>>(200),
        )
        .route(
            &get,
            "/default-templates",
            templates,
            op("listDefaultTemplates", openapi::Tag::Templates, "Templates")
                .errors(&[codes::NODE])
                .reply::<Vec<Template>>(200),
        )
        .route(
            &post,
            "/templates/tags",
            add_tags,
            op("addTemplateTags", openapi::Tag::Templates, "Have tags name a version of a template, all in one step")
                .errors(&[codes::NODE, codes::BASE, &[ErrorCode::InvalidTags, ErrorCode::InvalidTarget]])
                .body::<AddTags>()
                .reply::<AddedTags>(201),
        )
        .route(
            &delete,
            "/templates/tags",
            remove_tags,
            op("removeTemplateTags", openapi::Tag::Templates, "Take tags from a template")
                .errors(&[codes::NODE, codes::BASE, &[ErrorCode::InvalidTags, ErrorCode::TagNotFound]])
                .body::<RemoveTags>()
                .empty(204),
        )
        .route(
            &get,
            "/templates/aliases/{alias}",
            alias,
            op("getTemplateAlias", openapi::Tag::Templates, "Whether a name means a template or a snapshot")
                .errors(&[codes::NODE, codes::BASE])
                .reply::<Alias>(200),
        )
        .route(
            &get,
            "/templates/{name}",
            template,
            op("getTemplate", openapi::Tag::Templates, "One template; with `:tag`, or the id of a build, as that version of it")
                .errors(&[codes::NODE, codes::BASE, codes::PAGES])
                .query(PAGE)
                .reply::<TemplateWithBuilds>(200),
        )
        .route(
            &delete,
            "/templates/{name}",
            delete_template,
            remove(
                "deleteTemplate",
                openapi::Tag::Templates,
                "Delete a template that was built, or a snapshot; of a template with `:tag` the tag, and its version when no \
                 other names it",
            )
            .errors(&[
                codes::NODE,
                codes::BASE,
                &[ErrorCode::InUse, ErrorCode::SandboxChanging, ErrorCode::BuildUnsupported],
                &[ErrorCode::TagNotFound, ErrorCode::InvalidTags],
            ]),
        )
        .route(
            &get,
            "/templates/{name}/tags",
            tags,
            op("listTemplateTags", openapi::Tag::Templates, "Tags of a template")
                .errors(&[codes::NODE, codes::BASE])
                .reply::<Vec<Tag>>(200),
        )
        .route(
            &get,
            "/templates/{name}/tags/count",
            count_tags,
            op("countTemplateTags", openapi::Tag::Templates, "How many tags a template has")
                .errors(&[codes::NODE, codes::BASE])
                .reply::<TagCount>(200),
        )
        .route(
            &get,
            "/templates/{name}/tags/exists",
            has_tag,
            op("hasTemplateTag", openapi::Tag::Templates, "Whether a template has a tag")
                .errors(&[codes::NODE, codes::BASE])
                .query(&[("tag", "its name")])
                .reply::<TagExists>(200),
        )
}

/// The reply of `GET /templates/aliases/{alias}`.
#[derive(Debug, Serialize, schemars::JsonSchema)]
struct Alias {
    /// Name of the template, or id of the snapshot.
    #[serde(rename = "templateID")]
    template_id: String,
    /// Whether every project may use it.
    public: bool,
}

impl Inner {
    /// What `text` (a template, or a snapshot by id or name, each with or without a tag) is for a caller.
    pub(crate) async fn base(&self, caller: &Account, text: &str) -> Result<Source, Failure> {
        // A template first: its default version is known without the database, and no snapshot can take its name. Another
        // project's is not there.
        if let Some(source) = self.template_source(caller, text).await? {
            return Ok(source);
        }
        let (name, tag) = split_tag(text);
        let kept = match self.snapshot_of(caller, name).await? {
            // E2B's clients add the tag to every name.
            Some(id) if tag.is_none_or(|tag| tag == DEFAULT_TAG) => self.node.source(id.as_str()).await?,
            _ => None,
        };
        kept.ok_or_else(|| unknown_template(text))
    }

    /// The id of the snapshot that a caller calls `name`, when it has such a one. What has no owner is nobody's.
    pub(crate) async fn snapshot_of(
        &self,
        caller: &Account,
        name: &str,
    ) -> Result<Option<SnapshotId>, Failure> {
        let found = self.database.snapshot(caller.project.as_str(), name).await.map_err(database_failed)?;
        Ok(found.and_then(|id| id.parse().ok()))
    }

    /// After a start: gives what was there before there were projects to the default one, once, and brings to an end what
    /// the last server did not live to see the end of.
    pub(crate) async fn compare_snapshots(&self) -> Result<(), Failure> {
        let there = self.node.snapshots().await?;
        let known = there
            .iter()
            .map(|info| {
                let name = info.names.first().cloned();
                (info.snapshot_id.clone(), name, info.created_at.as_millisecond())
            })
            .collect();
        let node = &self.placement.node;
        self.database.adopt_snapshots(node, known).await.map_err(database_failed)?;
        for id in self.database.unfinished_snapshots(node).await.map_err(database_failed)? {
            let ended = match there.iter().any(|info| info.snapshot_id == id) {
                true => self.database.finish_snapshot(id).await,
                false => self.database.forget_snapshot(node, id).await,
            };
            ended.map_err(database_failed)?;
        }
        Ok(())
    }

    /// Every template that a caller may use, with its versions and how often it was started.
    async fn templates(&self, caller: &Account) -> Result<Vec<Template>, Failure> {
        let mut tags: HashMap<(String, String), Vec<TagRow>> = HashMap::new();
        for (project, template, row) in self.database.all_tags().await.map_err(database_failed)? {
            tags.entry((project, template)).or_default().push(row);
        }
        let mut spawns: HashMap<String, (u64, jiff::Timestamp)> = HashMap::new();
        for (text, (count, last)) in self.database.spawns().await.map_err(database_failed)? {
            let of = spawns.entry(split_tag(&text).0.to_owned()).or_insert((0, last));
            *of = (of.0 + u64::try_from(count).unwrap_or(0), of.1.max(last));
        }
        let mut templates = Vec::new();
        for (name, mut records) in self.records().await? {
            if !self.owners.may_use(&caller.project, &name) {
                continue;
            }
            let owner = self.owners.of(&name);
            records.retain(|record| owner.is_some() || is_plain(record));
            // Of what is everybody's, each project has its own.
            let project = owner.as_ref().map_or(caller.project.as_str(), |owner| &owner.project);
            let own = tags.get(&(project.to_owned(), name.clone()));
            let own: Vec<&TagRow> = own.into_iter().flatten().collect();
            let Some(mut template) = joined(records, &own, None) else { continue };
            template.public = owner.is_some_and(|owner| owner.public);
            if let Some((count, last)) = spawns.get(&name) {
                template.spawn_count += count;
                template.last_spawned_at = template.last_spawned_at.max(Some(*last));
            }
            templates.push(template);
        }
        Ok(templates)
    }

    pub(crate) async fn template(&self, caller: &Account, name: &str) -> Result<Template, Failure> {
        let templates = self.templates(caller).await?;
        templates
            .into_iter()
            .find(|template| template.template_id == name)
            .ok_or_else(|| unknown_template(name))
    }

    /// A template as one version of it, the one that `text` means.
    async fn template_version(&self, caller: &Account, text: &str) -> Result<Template, Failure> {
        let (name, tag) = split_tag(text);
        let template = self.template(caller, name).await?;
        if tag.is_none() {
            return Ok(template);
        }
        let Some(Source { base: Base::Template(version), .. }) = self.template_source(caller, text).await?
        else {
            return Err(unknown_template(text));
        };
        self.as_version(template, &version).await
    }

    /// The same of a version that is known to be there. What all have in common stays.
    async fn as_version(&self, template: Template, version: &TemplateVersion) -> Result<Template, Failure> {
        let records = self.records().await?.remove(version.name.as_str()).unwrap_or_default();
        let chosen = joined(records, &[], Some(version));
        let chosen = chosen.ok_or_else(|| unknown_template(&version.to_string()))?;
        let Template { public, spawn_count, last_spawned_at, versions, .. } = template;
        Ok(Template { public, spawn_count, last_spawned_at, versions, ..chosen })
    }

    /// The ids of the snapshots that the node can open.
    pub(crate) async fn there(&self) -> Result<HashSet<String>, Failure> {
        Ok(self.node.snapshots().await?.into_iter().map(|info| info.snapshot_id).collect())
    }

    /// Forgets whose the snapshots were that were there `before` a removal and are gone now. One that cannot be opened today
    /// was not there before either: it keeps its owner, and is its owner's again once it is mended.
    pub(crate) async fn forget_owners(&self, before: HashSet<String>) -> Result<(), Failure> {
        let there = self.there().await?;
        for id in before.difference(&there) {
            self.database.forget_snapshot(&self.placement.node, id.clone()).await.map_err(database_failed)?;
        }
        Ok(())
    }

    /// The snapshots of a caller's project, newest first.
    pub(crate) async fn snapshots(&self, caller: &Account) -> Result<Vec<SnapshotInfo>, Failure> {
        let owners = self.database.snapshot_owners().await.map_err(database_failed)?;
        let mut found = self.node.snapshots().await?;
        found.retain_mut(|info| match owners.get(&info.snapshot_id) {
            Some(owner) => {
                // The name that it was taken with may have gone to a newer one.
                info.names = owner.name.iter().cloned().collect();
                owner.project == caller.project.as_str()
            }
            None => false,
        });
        Ok(found)
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SnapshotQuery {
    #[serde(rename = "sandboxID")]
    sandbox_id: Option<String>,
    name: Option<String>,
    limit: Option<String>,
    next_token: Option<String>,
}

async fn snapshots(
    State(control): State<Control>,
    Who(caller): Who,
    Query(query): Query<SnapshotQuery>,
) -> Outcome {
    let wanted = |info: &SnapshotInfo| {
        query.sandbox_id.as_ref().is_none_or(|id| info.sandbox_id.as_str() == id)
            && query.name.as_ref().is_none_or(|name| info.snapshot_id == *name || info.names.contains(name))
    };
    let limit = page_limit(query.limit.as_ref())?;
    let mut found = control.inner.snapshots(&caller).await?;
    found.retain(wanted);
    let place = |info: &SnapshotInfo| (info.created_at.as_millisecond(), info.snapshot_id.clone());
    found.sort_by_key(|info| std::cmp::Reverse(place(info)));
    if let Some(token) = &query.next_token {
        // A place in the order, not a row: it holds when its snapshot is gone.
        let after = parse_page_token(token)?;
        found.retain(|info| place(info) < after);
    }
    let more = found.len() > limit;
    found.truncate(limit);
    let next = found.last().filter(|_| more).map(|info| make_page_token(&place(info)));
    Ok(with_next(json(StatusCode::OK, &found), next))
}

fn no_snapshot(name: &str) -> Failure {
    let shown: String = name.chars().take(80).collect();
    let text = format!("no snapshot {shown:?}");
    Failure::new(ErrorCode::SnapshotNotFound, text, "`kelvin snapshot list` shows what there is")
}

async fn verify_snapshot(
    State(control): State<Control>,
    Who(caller): Who,
    Path(name): Path<String>,
) -> Outcome {
    let (bare, _) = split_tag(&name);
    let id = control.inner.snapshot_of(&caller, bare).await?.ok_or_else(|| no_snapshot(&name))?;
    Ok(json(StatusCode::OK, &control.inner.node.verify_snapshot(&id).await?))
}

async fn remove_snapshot(
    State(control): State<Control>,
    Who(caller): Who,
    Path(name): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Outcome {
    let cascade = query.get("cascade").is_some_and(|value| value == "true");
    let (bare, _) = split_tag(&name);
    let id = control.inner.snapshot_of(&caller, bare).await?.ok_or_else(|| no_snapshot(&name))?;
    let before = control.inner.there().await?;
    control.inner.node.remove_snapshot(&id, cascade).await?;
    control.inner.forget_owners(before).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn templates(State(control): State<Control>, Who(caller): Who) -> Outcome {
    Ok(json(StatusCode::OK, &control.inner.templates(&caller).await?))
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct TemplateQuery {
    limit: Option<String>,
    next_token: Option<String>,
}

async fn template_page(
    State(control): State<Control>,
    Who(caller): Who,
    Query(query): Query<TemplateQuery>,
) -> Outcome {
    let limit = page_limit(query.limit.as_ref())?;
    let mut found = control.inner.templates(&caller).await?;
    found.sort_by(|one, other| one.template_id.cmp(&other.template_id));
    if let Some(token) = &query.next_token {
        let (_, after) = parse_page_token(token)?;
        found.retain(|template| template.template_id > after);
    }
    let more = found.len() > limit;
    found.truncate(limit);
    let next = found.last().filter(|_| more).map(|last| make_page_token(&(0, last.template_id.clone())));
    Ok(with_next(json(StatusCode::OK, &found), next))
}

impl Inner {
    /// A page of the builds of a template that are the caller's to see, and where the next one begins.
    async fn builds_of(
        &self,
        caller: &Account,
        name: &str,
        query: &TemplateQuery,
    ) -> Result<(Vec<TemplateBuild>, Option<String>), Failure> {
        let limit = page_limit(query.limit.as_ref())?;
        let after = query.next_token.as_deref().map(parse_page_token).transpose()?;
        if !self.owners.is_own(&caller.project, name) {
            return Ok((Vec::new(), None));
        }
        let mut rows = self.database.builds_of(name, after, limit + 1).await.map_err(database_failed)?;
        let more = rows.len() > limit;
        rows.truncate(limit);
        let place = |row: &BuildRow| make_page_token(&(row.created_at.as_millisecond(), row.id.to_string()));
        let next = rows.last().filter(|_| more).map(place);
        Ok((rows.iter().map(listed).collect(), next))
    }
}

async fn template(
    State(control): State<Control>,
    Who(caller): Who,
    Path(name): Path<String>,
    Query(query): Query<TemplateQuery>,
) -> Outcome {
    let (inner, text) = (&control.inner, name);
    let (name, tag) = split_tag(&text);
    let (mut builds, next) = inner.builds_of(&caller, name, &query).await?;
    let template = match inner.template_version(&caller, &text).await {
        // It was not built yet.
        Err(failure) if failure.error_code == ErrorCode::TemplateNotFound && tag.is_none() => {
            let owner = inner.owners.of(name).filter(|_| inner.owners.is_own(&caller.project, name));
            let newest = inner.database.builds_of(name, None, 1).await.map_err(database_failed)?;
            match (owner, newest.first()) {
                (Some(owner), Some(row)) => unbuilt(row, &owner),
                _ => return Err(failure.into()),
            }
        }
        found => found?,
    };
    if builds.is_empty() && query.next_token.is_none() {
        // It was imported, or is another project's: the image that it is now.
        builds.push(TemplateBuild {
            build_id: inner.shown_build(name, &template.build_id).await?,
            status: BuildStatus::Ready,
            created_at: template.created_at,
            updated_at: template.updated_at,
            finished_at: Some(template.updated_at),
            cpu_count: template.cpu_count,
            memory_mb: template.memory_mb,
            disk_size_mb: Some(template.disk_size_mb),
            envd_version: template.envd_version.clone(),
        });
    }
    Ok(with_next(json(StatusCode::OK, &TemplateWithBuilds { template, builds }), next))
}

async fn delete_template(
    State(control): State<Control>,
    Who(caller): Who,
    Path(name): Path<String>,
    query: Query<HashMap<String, String>>,
    again: Option<Extension<Again>>,
) -> Outcome {
    let removed = match control.inner.remove_template(&caller, &name).await {
        Ok(true) => Ok(StatusCode::NO_CONTENT.into_response()),
        Ok(false) => remove_snapshot(State(control), Who(caller), Path(name), query).await,
        Err(failure) => Err(failure.into()),
    };
    match removed {
        // It was done before the server died.
        Err(failed)
            if again.is_some()
                && matches!(failed.code(), ErrorCode::SnapshotNotFound | ErrorCode::TagNotFound) =>
        {
            Ok(StatusCode::NO_CONTENT.into_response())
        }
        removed => removed,
    }
}

/// Whether a name means something. Another project's snapshot is not there.
async fn alias(State(control): State<Control>, Who(caller): Who, Path(alias): Path<String>) -> Outcome {
    let inner = &control.inner;
    let public = |name: &str| inner.owners.of(name).is_none_or(|owner| owner.public);
    let (template_id, public) = match inner.base(&caller, &alias).await.map(|source| source.base) {
        Ok(Base::Template(version)) => (version.name.to_string(), public(version.name.as_str())),
        Ok(Base::Snapshot(id)) => (id.to_string(), false),
        // A template of which there are versions, but none of the default tag.
        Err(failure) => match inner.template(&caller, &alias).await {
            Ok(template) => (template.template_id, public(&alias)),
            Err(_) => return Err(failure.into()),
        },
    };
    Ok(json(StatusCode::OK, &Alias { template_id, public }))
}
