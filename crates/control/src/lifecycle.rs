//! Pause, resume, snapshots and forks: intent is recorded, the node is asked, the result is recorded.

use std::time::Duration;

use kelvin_api::error::{Failure, Kind, chain};
use kelvin_api::id::{SandboxId, TemplateName, Token};
use kelvin_api::node::{Child, Created, Live};
use kelvin_api::phase::Timings;
use kelvin_api::sandbox::{
    Capture, ForkResult, ForkSandbox, PauseMode, Sandbox, SandboxDetail, SandboxState, SnapshotInfo,
    SnapshotSandbox,
};

use crate::accounts::{Account, Caller};
use crate::database::SandboxRow;
use crate::reply;
use crate::service::{
    Control, DEFAULT_TIMEOUT_S, ENV_BYTES, Inner, METADATA_BYTES, Reply, check_env, check_map,
    database_failed, deadline, invalid,
};

/// Children of one fork. Source: E2B's OpenAPI, `SandboxForkRequest.count`.
const MAX_CHILDREN: u32 = 100;

/// What a fork replies.
pub(crate) struct Forked {
    pub results: Vec<ForkResult>,
    pub capture: Capture,
    pub timings: Timings,
}

fn is(failure: &Failure, code: &str) -> bool {
    failure.error_code == code
}

impl Control {
    pub(crate) async fn fork(
        &self,
        caller: Caller,
        id: SandboxId,
        body: ForkSandbox,
    ) -> Result<Forked, Failure> {
        let inner = std::sync::Arc::clone(&self.inner);
        // A client that goes away must not leave intent without a result.
        let task = self.inner.tasks.spawn(async move { inner.fork(&caller, &id, body).await });
        task.await.unwrap_or_else(|error| {
            Err(Failure::new(Kind::Internal, "fork_aborted", "the fork was aborted", "try again")
                .with_cause(&error))
        })
    }
}

impl Inner {
    pub(crate) async fn pause(
        &self,
        id: &SandboxId,
        mode: PauseMode,
        healthy: bool,
    ) -> Result<(Capture, Timings), Failure> {
        self.row(id).await?;
        let paused = self.node.pause(id, mode, healthy).await?;
        self.refresh(id).await?;
        Ok(paused)
    }

    /// Brings a row to what the node says now; its changes come by themselves, but the caller should not see an older
    /// state than what was replied.
    async fn refresh(&self, id: &SandboxId) -> Result<(), Failure> {
        match self.node.one(id).await? {
            Some(live) => self.database.set_live(&live).await.map_err(database_failed),
            None => Ok(()),
        }
    }

    /// Resumes a paused sandbox.
    pub(crate) async fn resume(
        &self,
        caller: &Account,
        id: &SandboxId,
        timeout_s: u64,
        mode: PauseMode,
    ) -> Result<Reply, Failure> {
        let row = self.row(id).await?;
        if row.state == SandboxState::Paused {
            self.check_room(caller).await?;
        }
        let created = self.node.resume(id, Some(deadline(timeout_s)?), mode).await?;
        self.refresh(id).await?;
        let sandbox = self.reply_of(&row, created.start_path, created.reason, &created.timings);
        Ok(Reply { sandbox, timings: created.timings })
    }

    /// A sandbox that runs for at least `timeout_s` from now: resumed when it is paused. Whether it was.
    pub(crate) async fn connect(
        &self,
        caller: &Account,
        id: &SandboxId,
        timeout_s: u64,
        mode: PauseMode,
    ) -> Result<(SandboxDetail, Option<Reply>), Failure> {
        // Twice: it may be paused or resumed by somebody else in between.
        for _ in 0..2 {
            if self.row(id).await?.state == SandboxState::Paused {
                match self.resume(caller, id, timeout_s, mode).await {
                    Ok(reply) => return Ok((self.get(id).await?, Some(reply))),
                    Err(failure) if is(&failure, "sandbox_running") => self.refresh(id).await?,
                    Err(failure) => return Err(failure),
                }
            }
            match self.set_timeout(id, timeout_s, false).await {
                Ok(detail) => return Ok((detail, None)),
                Err(failure) if is(&failure, "sandbox_paused") => self.refresh(id).await?,
                Err(failure) => return Err(failure),
            }
        }
        Err(Failure::new(
            Kind::Conflict,
            "sandbox_changing",
            format!("sandbox {id} is being paused"),
            "try again",
        ))
    }

    pub(crate) async fn snapshot(
        &self,
        id: &SandboxId,
        body: SnapshotSandbox,
    ) -> Result<(SnapshotInfo, Capture, Timings), Failure> {
        let row = self.row(id).await?;
        let name = match body.name {
            None => None,
            Some(text) => {
                let name: TemplateName = text.parse().map_err(|error: kelvin_api::id::ParseIdError| {
                    invalid(
                        "invalid_name",
                        error.to_string(),
                        "use 1 to 64 of a-z, 0-9, '.', '_' and '-'; no tags",
                    )
                })?;
                Some(name)
            }
        };
        let called = name.as_ref().map(ToString::to_string);
        let taken = self.node.snapshot(id, name, PauseMode::of(body.memory)).await?;
        let (snapshot, project) = (taken.0.snapshot_id.clone(), row.project.to_string());
        if let Err(error) = self.database.add_snapshot(snapshot, project, called).await {
            // Nobody would know whose it is.
            let _ = self.node.remove_snapshot(&taken.0.snapshot_id, false).await;
            return Err(database_failed(error));
        }
        Ok(taken)
    }

    async fn fork(&self, caller: &Account, id: &SandboxId, body: ForkSandbox) -> Result<Forked, Failure> {
        let source = self.row(id).await?;
        let count = body.count.unwrap_or(1);
        if !(1..=MAX_CHILDREN).contains(&count) {
            let text = format!("a fork has 1 to {MAX_CHILDREN} children, not {count}");
            return Err(invalid("invalid_count", text, "fork again for more"));
        }
        let timeout_s = body.timeout.unwrap_or(DEFAULT_TIMEOUT_S);
        let ends_at = deadline(timeout_s)?;
        let metadata = body.metadata.unwrap_or_else(|| source.metadata.clone());
        check_map("metadata", &metadata, METADATA_BYTES)?;
        let env_vars = body.env_vars.unwrap_or_default();
        check_map("envVars", &env_vars, ENV_BYTES)?;
        check_env(&env_vars)?;
        let (mut rows, mut children) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let row = SandboxRow {
                id: SandboxId::random(),
                metadata: metadata.clone(),
                access_token: source.access_token.as_ref().map(|_| Token::random()),
                traffic_token: source.traffic_token.as_ref().map(|_| Token::random()),
                started_at: jiff::Timestamp::now(),
                ends_at,
                state: SandboxState::Running,
                parent: Some(id.clone()),
                key: caller.key.clone(),
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
        let result = self.fork_rows(caller, id, &rows, children).await;
        if result.is_err() {
            for row in &rows {
                self.undo(&row.id).await;
            }
        }
        result
    }

    async fn fork_rows(
        &self,
        caller: &Account,
        id: &SandboxId,
        rows: &[SandboxRow],
        children: Vec<Child>,
    ) -> Result<Forked, Failure> {
        for row in rows {
            self.begin(caller, row, None).await?;
        }
        let forked = self.node.fork(id, children).await?;
        let mut results = Vec::new();
        for (row, child) in rows.iter().zip(forked.children) {
            let made = match child {
                Ok(created) => self.commit_child(row, created).await,
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

    async fn commit_child(&self, row: &SandboxRow, created: Created) -> Result<Sandbox, Failure> {
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
        if let Err(error) = self.database.commit(&live, None).await {
            let _ = self.node.kill(&row.id).await;
            return Err(database_failed(error));
        }
        self.count_start(&row.project);
        Ok(self.reply_of(row, start_path, reason, &timings))
    }

    async fn undo(&self, id: &SandboxId) {
        if let Err(error) = self.database.undo(id).await {
            tracing::error!(sandbox = %id, error = chain(&error), "a failed fork was not forgotten");
        }
    }

    /// Ends the siblings of a forked sandbox; it stays. Returns which ended.
    pub(crate) async fn promote(&self, id: &SandboxId) -> Result<Vec<SandboxId>, Failure> {
        let row = self.row(id).await?;
        let Some(parent) = row.parent else {
            return Err(Failure::new(
                Kind::Conflict,
                "not_forked",
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
