//! What the API says of sandboxes, and changes of them that start none; what starts them is in `create` and `lifecycle`.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine as _;
use kelvin_api::ENVD_VERSION;
use kelvin_api::error::{ErrorCode, Failure, chain};
use kelvin_api::id::SandboxId;
use kelvin_api::network::{NetworkState, NetworkUpdate};
use kelvin_api::sandbox::{
    LogLevel, OnTimeout, Sandbox, SandboxDetail, SandboxLog, SandboxLogEntry, SandboxLogs, SandboxState,
};
use kelvin_node_api::ConsoleLine;

use crate::accounts::Account;
use crate::control::Inner;
use crate::create::deadline;
use crate::database::{Claim, Filter, Quota, SandboxRow};
use crate::failures::{database_failed, exceeded, sandbox_not_found};
use crate::network;

/// A paused sandbox that counts as one that runs while it is being resumed; it is given back when this is dropped.
pub(crate) struct Permit {
    inner: Arc<Inner>,
    id: SandboxId,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let (inner, id) = (Arc::clone(&self.inner), self.id.clone());
        // In this order: it counts all the time, as claimed or as one that runs.
        self.inner.tasks.spawn(async move {
            let refreshed = inner.refresh(&id).await;
            if let Err(failure) = refreshed.and(inner.database.disclaim(&id).await.map_err(database_failed)) {
                tracing::error!(sandbox = %id, error = chain(&failure), "a claim stays until the next start");
            }
        });
    }
}

/// A page of a list.
#[derive(Debug)]
pub(crate) struct Page {
    pub sandboxes: Vec<SandboxDetail>,
    pub next: Option<String>,
}

pub(crate) fn parse_id(text: &str) -> Result<SandboxId, Failure> {
    text.parse().map_err(|_| sandbox_not_found(text))
}

impl Inner {
    /// Has a paused sandbox count as one that runs, when there is room. None when it is not paused.
    pub(crate) async fn claim(
        self: &Arc<Self>,
        id: &SandboxId,
        quota: Quota,
    ) -> Result<Option<Permit>, Failure> {
        match self.database.claim(id, Some(quota)).await.map_err(database_failed)? {
            Claim::Held => Ok(Some(Permit { inner: Arc::clone(self), id: id.clone() })),
            Claim::NotPaused => Ok(None),
            Claim::Exceeded(limit) => Err(exceeded(limit)),
        }
    }

    /// The sandbox that a caller calls `text`, when it is one of its own.
    pub(crate) async fn owned(&self, caller: &Account, text: &str) -> Result<SandboxId, Failure> {
        let id = parse_id(text)?;
        let row = self.row(&id).await?;
        // The same words as for one that is not there.
        if row.project == caller.project || caller.is_admin { Ok(id) } else { Err(sandbox_not_found(text)) }
    }

    /// A sandbox that is paused, or that runs and whose time is not over.
    pub(crate) async fn get(&self, id: &SandboxId) -> Result<SandboxDetail, Failure> {
        Ok(self.detail_of(self.row(id).await?, true))
    }

    pub(crate) async fn row(&self, id: &SandboxId) -> Result<SandboxRow, Failure> {
        let row = self.database.get(id).await.map_err(database_failed)?;
        match row {
            Some(row) if self.is_there(&row).await? => Ok(row),
            _ => Err(sandbox_not_found(id.as_str())),
        }
    }

    /// The same of one that is to be changed, or looked into: only its own node can.
    pub(crate) async fn row_here(&self, id: &SandboxId) -> Result<SandboxRow, Failure> {
        let row = self.row(id).await?;
        if row.placement.node == self.placement.node {
            return Ok(row);
        }
        Err(Failure::new(
            ErrorCode::NodeUnreachable,
            format!("sandbox {id} is on node {}, which this server does not reach", row.placement.node),
            "ask a server that reaches this node; the sandbox is as it was",
        ))
    }

    pub(crate) async fn kill(&self, id: &SandboxId) -> Result<(), Failure> {
        self.row_here(id).await?;
        self.node.kill(id).await?;
        self.database.end(&self.placement, id, "killed").await.map_err(database_failed)
    }

    pub(crate) async fn set_timeout(
        &self,
        id: &SandboxId,
        seconds: u64,
        may_shorten: bool,
    ) -> Result<SandboxDetail, Failure> {
        let _change = self.changes.begin(id, "change of its deadline").await?;
        self.set_timeout_now(id, seconds, may_shorten).await
    }

    /// The same, by whoever changes the sandbox already.
    pub(crate) async fn set_timeout_now(
        &self,
        id: &SandboxId,
        seconds: u64,
        may_shorten: bool,
    ) -> Result<SandboxDetail, Failure> {
        let ends_at = deadline(&self.clock, seconds)?;
        let mut row = self.row_here(id).await?;
        let moves = may_shorten || {
            // By the wall clock as it is now: what is recorded may be from before it was set.
            ends_at > self.node.one(id).await?.map_or(row.ends_at, |live| live.ends_at)
        };
        if moves {
            self.node.set_deadline(id, ends_at).await?;
            self.database.set_deadline(id, ends_at).await.map_err(database_failed)?;
            row.ends_at = ends_at;
        }
        Ok(self.detail_of(row, true))
    }

    pub(crate) async fn set_network(&self, id: &SandboxId, update: NetworkUpdate) -> Result<(), Failure> {
        let _change = self.changes.begin(id, "change of its network").await?;
        self.row_here(id).await?;
        let allowed = update.allow_internet_access;
        self.node.set_policy(id, network::policy(update)?).await?;
        self.database.set_internet(id, allowed).await.map_err(database_failed)
    }

    pub(crate) async fn network(&self, id: &SandboxId) -> Result<NetworkState, Failure> {
        self.row_here(id).await?;
        self.node.network(id).await
    }

    pub(crate) async fn logs(&self, id: &SandboxId) -> Result<SandboxLogs, Failure> {
        self.row_here(id).await?;
        let console = match self.node.console(id).await {
            // It has said nothing since it was paused.
            Err(failure) if failure.error_code == ErrorCode::SandboxPaused => Vec::new(),
            other => other?,
        };
        let mut found = SandboxLogs::default();
        for ConsoleLine { at, text } in console {
            // Clients of the older route read each line as JSON. Source: E2B's CLI, `sandbox logs`.
            let line =
                serde_json::json!({ "level": "info", "logger": "console", "message": text, "sandboxID": id });
            found.logs.push(SandboxLog { timestamp: at, line: line.to_string() });
            found.log_entries.push(SandboxLogEntry {
                timestamp: at,
                message: text,
                level: LogLevel::Info,
                fields: BTreeMap::from([("source".to_owned(), "console".to_owned())]),
            });
        }
        Ok(found)
    }

    pub(crate) async fn list(&self, mut filter: Filter, token: Option<&str>) -> Result<Page, Failure> {
        if let Some(token) = token {
            filter.after = Some(parse_page_token(token)?);
        }
        let limit = filter.limit;
        // One more than asked tells whether there is a next page.
        filter.limit = limit + 1;
        let mut rows = self.database.list(filter).await.map_err(database_failed)?;
        let more = rows.len() > limit;
        rows.truncate(limit);
        let next = rows
            .last()
            .filter(|_| more)
            .map(|row| make_page_token(&(row.started_at.as_millisecond(), row.id.to_string())));
        let mut sandboxes = Vec::new();
        for row in rows {
            if self.is_there(&row).await? {
                sandboxes.push(self.detail_of(row, false));
            }
        }
        Ok(Page { sandboxes, next })
    }

    /// Whether a sandbox is there for its owner: its end may not have been recorded yet. When its time is over by the wall
    /// clock, the node says whether it is: that clock may have been set.
    async fn is_there(&self, row: &SandboxRow) -> Result<bool, Failure> {
        let is_over = row.state == SandboxState::Running
            && row.lifecycle.on_timeout == OnTimeout::Kill
            && row.ends_at <= self.clock.wall()
            // Another's end is for its own node to say.
            && row.placement.node == self.placement.node;
        Ok(!is_over || self.node.one(&row.id).await?.is_some())
    }
}

/// A place in a list: a time in milliseconds and an id.
pub(crate) fn make_page_token((ms, id): &(i64, String)) -> String {
    let text = format!("{ms}:{id}");
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text)
}

pub(crate) fn parse_page_token(token: &str) -> Result<(i64, String), Failure> {
    base64::engine::general_purpose::URL_SAFE_NO_PAD
        .decode(token)
        .ok()
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .and_then(|text| text.split_once(':').map(|(ms, id)| (ms.to_owned(), id.to_owned())))
        .and_then(|(ms, id)| Some((ms.parse().ok()?, id)))
        .ok_or_else(|| {
            Failure::new(
                ErrorCode::InvalidToken,
                "nextToken is not one of ours",
                "use the value of X-Next-Token as it came",
            )
        })
}

pub(crate) fn sandbox_of(detail: &SandboxDetail) -> Sandbox {
    Sandbox {
        template_id: detail.template_id.clone(),
        sandbox_id: detail.sandbox_id.clone(),
        alias: detail.alias.clone(),
        client_id: detail.client_id.clone(),
        envd_version: detail.envd_version.clone(),
        envd_access_token: detail.envd_access_token.clone(),
        traffic_access_token: detail.traffic_access_token.clone(),
        domain: detail.domain.clone(),
        start_path: Some(detail.start_path),
        start_reason: None,
        phases: BTreeMap::new(),
    }
}

impl Inner {
    pub(crate) fn detail_of(&self, row: SandboxRow, with_secrets: bool) -> SandboxDetail {
        SandboxDetail {
            alias: Some(row.template.clone()),
            template_id: row.template,
            sandbox_id: row.id,
            client_id: "kelvin".to_owned(),
            started_at: row.started_at,
            end_at: row.ends_at,
            envd_version: ENVD_VERSION.to_owned(),
            cpu_count: row.vcpus,
            memory_mb: row.memory_mib,
            disk_size_mb: row.disk_mib,
            state: row.state,
            metadata: row.metadata,
            start_path: row.start_path,
            envd_access_token: row.access_token.filter(|_| with_secrets),
            allow_internet_access: row.allow_internet,
            traffic_access_token: row.traffic_token.filter(|_| with_secrets),
            domain: self.domain.clone(),
            lifecycle: row.lifecycle,
            parent_id: row.parent,
        }
    }
}
