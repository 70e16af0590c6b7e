//! Pause, resume, snapshots and forks: intent is recorded, the node is asked, the result is recorded.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kelvin_api::error::{ErrorCode, Failure, Kind, chain};
use kelvin_api::id::{SandboxId, SnapshotId, TemplateName, Token};
use kelvin_api::phase::Timings;
use kelvin_api::sandbox::{
    Capture, ForkResult, ForkSandbox, PauseMode, Sandbox, SandboxDetail, SandboxState, SnapshotInfo,
    SnapshotSandbox,
};
use kelvin_node_api::{Child, Created, Live, Paused, Taken};

use crate::accounts::Account;
use crate::builds::name_taken;
use crate::control::Inner;
use crate::create::{DEFAULT_TIMEOUT_S, ENV_BYTES, METADATA_BYTES, Reply, check_env, check_map, deadline};
use crate::database::{NewSnapshot, SandboxRow};
use crate::failures::{database_failed, exceeded};
use crate::metrics::Start;
use crate::reply;
use crate::service::sandbox_of;

/// Children of one fork. Source: E2B's OpenAPI, `SandboxForkRequest.count`.
const MAX_CHILDREN: u32 = 100;

/// What a fork replies.
pub(crate) struct Forked {
    pub results: Vec<ForkResult>,
    pub capture: Capture,
    pub timings: Timings,
}

impl Inner {
    pub(crate) async fn pause(
        &self,
        id: &SandboxId,
        mode: PauseMode,
        healthy: bool,
    ) -> Result<Paused, Failure> {
        let _change = self.changes.begin(id, "pause").await?;
        let row = self.row_here(id).await?;
        if row.state == SandboxState::Paused {
            return self.node.pause(id, mode, healthy).await;
        }
        let quota = self.accounts.quota_of(&row.key, &row.project);
        let memory = if mode.is_full() { row.memory_mib } else { 0 };
        let limit = self.database.begin_pause(id, quota, memory).await.map_err(database_failed)?;
        if let Some(limit) = limit {
            return Err(exceeded(limit));
        }
        // What is paused survives a power failure, and so does whose it is.
        if let Err(error) = self.database.flush().await {
            // It would be counted as one that is being paused for as long as it runs.
            self.database.end_pause(id).await.map_err(database_failed)?;
            return Err(database_failed(error));
        }
        let paused = self.node.pause(id, mode, healthy).await;
        // In this order: it counts all the time, as one that is being paused or that is.
        let refreshed = self.refresh(id).await;
        self.database.end_pause(id).await.map_err(database_failed)?;
        refreshed?;
        paused
    }

    /// Brings a row to what the node says now; its changes come by themselves, but the caller should not see an older
    /// state than what was replied.
    pub(crate) async fn refresh(&self, id: &SandboxId) -> Result<(), Failure> {
        match self.node.one(id).await? {
            Some(live) => self.database.set_live(&self.placement, &live).await.map_err(database_failed),
            None => Ok(()),
        }
    }

    /// Resumes a paused sandbox.
    pub(crate) async fn resume(
        self: &Arc<Self>,
        caller: &Account,
        id: &SandboxId,
        timeout_s: u64,
        mode: PauseMode,
    ) -> Result<Reply, Failure> {
        let _change = self.changes.begin(id, "resume").await?;
        self.resume_now(caller, id, timeout_s, mode).await
    }

    /// The same, by whoever changes the sandbox already.
    async fn resume_now(
        self: &Arc<Self>,
        caller: &Account,
        id: &SandboxId,
        timeout_s: u64,
        mode: PauseMode,
    ) -> Result<Reply, Failure> {
        let asked = Instant::now();
        let row = self.row_here(id).await?;
        let ends_at = deadline(&self.clock, timeout_s)?;
        // An operator resumes within the limits of the owner.
        let quota = match caller.is_admin {
            true => self.accounts.quota_of(&row.key, &row.project),
            false => self.accounts.quota(caller),
        };
        let permit = self.claim(id, quota).await?;
        let created = self.node.resume(id, Some(ends_at), mode).await?;
        self.refresh(id).await?;
        drop(permit);
        self.metrics.started(Start::Resume, created.start_path, &created.timings, asked.elapsed());
        let sandbox = self.reply_of(&row, created.start_path, created.reason, &created.timings);
        Ok(Reply { sandbox, timings: created.timings })
    }

    /// A sandbox that runs for at least `timeout_s` from now: resumed when it is paused. Whether it was.
    pub(crate) async fn connect(
        self: &Arc<Self>,
        caller: &Account,
        id: &SandboxId,
        timeout_s: u64,
        mode: PauseMode,
    ) -> Result<(SandboxDetail, Option<Reply>), Failure> {
        let _change = self.changes.begin(id, "connect").await?;
        // Again: the node may pause or resume it by itself in between.
        for _ in 0..3 {
            if self.row(id).await?.state == SandboxState::Paused {
                match self.resume_now(caller, id, timeout_s, mode).await {
                    Ok(reply) => return Ok((self.get(id).await?, Some(reply))),
                    Err(failure) if failure.error_code == ErrorCode::SandboxRunning => {
                        self.refresh(id).await?
                    }
                    Err(failure) => return Err(failure),
                }
            }
            match self.set_timeout_now(id, timeout_s, false).await {
                Ok(detail) => return Ok((detail, None)),
                Err(failure) if failure.error_code == ErrorCode::SandboxPaused => self.refresh(id).await?,
                Err(failure) => return Err(failure),
            }
        }
        Err(Failure::new(
            ErrorCode::SandboxChanging,
            format!("sandbox {id} is paused and resumed by others all the time"),
            "try again",
        ))
    }

    /// Takes a snapshot. Whose it is, is written before it is there. `key`: the idempotency key that it is taken for.
    pub(crate) async fn snapshot(
        &self,
        caller: &Account,
        id: &SandboxId,
        body: SnapshotSandbox,
        key: Option<String>,
    ) -> Result<Taken, Failure> {
        let name = match body.name {
            None => None,
            Some(text) => {
                let name: TemplateName = text.parse().map_err(|error: kelvin_api::id::ParseIdError| {
                    Failure::new(
                        ErrorCode::InvalidName,
                        error.to_string(),
                        "use 1 to 64 of a-z, 0-9, '.', '_' and '-'; no tags",
                    )
                })?;
                Some(name)
            }
        };
        let _change = self.changes.begin(id, "snapshot").await?;
        let row = self.row_here(id).await?;
        // A template that is yet to be built would hide it. The node refuses the names of those that it has.
        if let Some(name) = &name
            && self.owners.is_own(&row.project, name.as_str())
        {
            return Err(name_taken(name.as_str()));
        }
        let mode = PauseMode::of(body.memory);
        // The sandbox's project owns it, whoever asks.
        let quota = match caller.project == row.project {
            true => self.accounts.quota(caller),
            false => self.accounts.quota_of(&row.key, &row.project),
        };
        let snapshot = SnapshotId::random();
        let memory = if mode.is_full() { u64::from(row.memory_mib) } else { 0 };
        let new = NewSnapshot {
            id: snapshot.to_string(),
            mib: u64::from(row.disk_mib) + memory,
            name: name.as_ref().map(ToString::to_string),
            node: self.placement.node.clone(),
        };
        if let Some(limit) = self.database.begin_snapshot(new, quota, key).await.map_err(database_failed)? {
            return Err(exceeded(limit));
        }
        let taken = match self.node.snapshot(id, snapshot.clone(), name, mode).await {
            Ok(taken) => taken,
            Err(failure) => {
                self.forget_snapshot(&snapshot).await;
                return Err(failure);
            }
        };
        if let Err(error) = self.database.finish_snapshot(snapshot.to_string()).await {
            let _ = self.node.remove_snapshot(&snapshot, false).await;
            self.forget_snapshot(&snapshot).await;
            return Err(database_failed(error));
        }
        Ok(taken)
    }

    async fn forget_snapshot(&self, snapshot: &SnapshotId) {
        if let Err(error) = self.database.forget_snapshot(&self.placement.node, snapshot.to_string()).await {
            // It counts until the next start, which finds that it is not there.
            tracing::error!(%snapshot, error = chain(&error), "a snapshot that was not taken was not forgotten");
        }
    }

    /// The snapshot of `caller` that a request took whose answer was lost.
    pub(crate) async fn taken(
        &self,
        caller: &Account,
        ids: &[String],
    ) -> Result<Option<SnapshotInfo>, Failure> {
        let all = self.snapshots(caller).await?;
        Ok(all.into_iter().find(|info| ids.contains(&info.snapshot_id)))
    }

    /// What became of the children of a fork whose answer was lost; none when none of them is there.
    pub(crate) async fn children_of(&self, ids: &[String]) -> Result<Option<Vec<ForkResult>>, Failure> {
        let (mut results, mut is_any) = (Vec::new(), false);
        for id in ids {
            let found = match id.parse() {
                Ok(id) => self.get(&id).await,
                Err(_) => continue,
            };
            is_any |= found.is_ok();
            results.push(match found {
                Ok(detail) => ForkResult { sandbox: Some(sandbox_of(&detail)), error: None },
                Err(failure) => ForkResult { sandbox: None, error: Some(reply::body(&failure)) },
            });
        }
        Ok(is_any.then_some(results))
    }

    /// Makes children of a sandbox. `key`: the idempotency key that they are made for.
    pub(crate) async fn fork(
        &self,
        caller: &Account,
        id: &SandboxId,
        body: ForkSandbox,
        key: Option<String>,
    ) -> Result<Forked, Failure> {
        let count = body.count.unwrap_or(1);
        if !(1..=MAX_CHILDREN).contains(&count) {
            let text = format!("a fork has 1 to {MAX_CHILDREN} children, not {count}");
            return Err(Failure::new(ErrorCode::InvalidCount, text, "fork again for more"));
        }
        let timeout_s = body.timeout.unwrap_or(DEFAULT_TIMEOUT_S);
        let env_vars = body.env_vars.unwrap_or_default();
        check_map("envVars", &env_vars, ENV_BYTES)?;
        check_env(&env_vars)?;
        let _change = self.changes.begin(id, "fork").await?;
        let source = self.row_here(id).await?;
        let ends_at = deadline(&self.clock, timeout_s)?;
        let metadata = body.metadata.unwrap_or_else(|| source.metadata.clone());
        check_map("metadata", &metadata, METADATA_BYTES)?;
        let (mut rows, mut children) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let row = SandboxRow {
                id: SandboxId::random(),
                metadata: metadata.clone(),
                access_token: source.access_token.as_ref().map(|_| Token::random()),
                traffic_token: source.traffic_token.as_ref().map(|_| Token::random()),
                started_at: self.clock.wall(),
                ends_at,
                state: SandboxState::Running,
                parent: Some(id.clone()),
                key: caller.key.clone(),
                placement: self.placement.clone(),
                ..source.clone()
            };
            children.push(Child {
                sandbox: row.id.clone(),
                project: row.project.clone(),
                access_token: row.access_token.clone(),
                traffic_token: row.traffic_token.clone(),
                env_vars: env_vars.clone(),
                ends_at,
                timeout: Duration::from_secs(timeout_s),
            });
            rows.push(row);
        }
        let quota = match caller.project == source.project {
            true => self.accounts.quota(caller),
            false => self.accounts.quota_of(&source.key, &source.project),
        };
        self.begin(quota, &rows, None, None).await?;
        let noted = match key {
            Some(key) => {
                let subjects = rows.iter().map(|row| row.id.to_string()).collect();
                self.database.note_subjects(key, subjects).await.map_err(database_failed)
            }
            None => Ok(()),
        };
        let result = match noted {
            Ok(()) => self.fork_rows(id, &rows, children).await,
            Err(failure) => Err(failure),
        };
        if result.is_err() {
            for row in &rows {
                self.undo(&row.id).await;
            }
        }
        result
    }

    async fn fork_rows(
        &self,
        id: &SandboxId,
        rows: &[SandboxRow],
        children: Vec<Child>,
    ) -> Result<Forked, Failure> {
        let asked = Instant::now();
        let forked = self.node.fork(id, children).await?;
        let mut results = Vec::new();
        for (row, child) in rows.iter().zip(forked.children) {
            let made = match child {
                Ok(created) => self.commit_child(row, created, asked).await,
                Err(failure) => Err(failure),
            };
            results.push(match made {
                Ok(sandbox) => ForkResult { sandbox: Some(sandbox), error: None },
                Err(failure) => {
                    self.undo(&row.id).await;
                    ForkResult { sandbox: None, error: Some(reply::body(&failure)) }
                }
            });
        }
        Ok(Forked { results, capture: forked.capture, timings: forked.timings })
    }

    async fn commit_child(
        &self,
        row: &SandboxRow,
        created: Created,
        asked: Instant,
    ) -> Result<Sandbox, Failure> {
        let Created { start_path, reason, timings, shape, started_at } = created;
        let live = Live {
            sandbox: row.id.clone(),
            ends_at: row.ends_at,
            shape,
            start_path,
            started_at,
            state: SandboxState::Running,
            generation: 0,
        };
        if let Err(error) = self.database.commit(&self.placement, &live, None, None).await {
            let _ = self.node.kill(&row.id).await;
            return Err(database_failed(error));
        }
        self.count_start(&row.project);
        self.metrics.started(Start::Fork, start_path, &timings, asked.elapsed());
        Ok(self.reply_of(row, start_path, reason, &timings))
    }

    async fn undo(&self, id: &SandboxId) {
        if let Err(error) = self.database.undo(&self.placement, id).await {
            tracing::error!(sandbox = %id, error = chain(&error), "a failed fork was not forgotten");
        }
    }

    /// Ends the siblings of a forked sandbox; it stays. Returns which ended.
    pub(crate) async fn promote(&self, id: &SandboxId) -> Result<Vec<SandboxId>, Failure> {
        let row = self.row(id).await?;
        let Some(parent) = row.parent else {
            return Err(Failure::new(
                ErrorCode::NotForked,
                format!("sandbox {id} was not forked from another"),
                "`kelvin sandbox tree` shows which were",
            ));
        };
        let mut ended = Vec::new();
        for sibling in self.database.children(&parent).await.map_err(database_failed)? {
            if sibling == *id {
                continue;
            }
            match self.kill(&sibling).await {
                Ok(()) => ended.push(sibling),
                // Ended by itself meanwhile.
                Err(failure) if failure.kind == Kind::NotFound => {}
                Err(failure) => return Err(failure),
            }
        }
        Ok(ended)
    }
}
