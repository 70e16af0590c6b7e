//! A create: it is checked, intent is recorded, the node is asked, the result is recorded.
//!
//! Who writes: the task of the request. A crash leaves a row in state `creating`, which the next start settles.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::StatusCode;
use kelvin_api::ENVD_VERSION;
use kelvin_api::error::{ErrorCode, Failure, chain};
use kelvin_api::id::{SandboxId, Token};
use kelvin_api::phase::{Phase, Timings};
use kelvin_api::sandbox::{
    EnvVars, Lifecycle, MAX_TIMEOUT_S, Metadata, NewSandbox, OnTimeout, PauseMode, Sandbox, SandboxState,
};
use kelvin_api::units::MemoryMib;
use kelvin_host::clock::Clock;
use kelvin_node_api::{Create, Created, Live, Source};

use crate::accounts::Account;
use crate::audit::Audit;
use crate::control::Inner;
use crate::database::{Begun, NewKey, Quota, SandboxRow};
use crate::failures::{database_failed, exceeded};
use crate::metrics::Start;
use crate::placement::Placement;
use crate::{network, once};

/// The time to live of requests that name none, in seconds. Source: E2B's OpenAPI, `NewSandbox.timeout`.
pub(crate) const DEFAULT_TIMEOUT_S: u64 = 15;
pub(crate) const METADATA_BYTES: usize = 64 << 10;
pub(crate) const ENV_BYTES: usize = 256 << 10;

/// What a create replies.
#[derive(Debug)]
pub(crate) struct Reply {
    pub sandbox: Sandbox,
    pub timings: Timings,
}

impl Inner {
    /// Creates a sandbox, once for its idempotency key.
    pub(crate) async fn create_once(
        self: &Arc<Self>,
        caller: &Account,
        body: NewSandbox,
        key: Option<NewKey>,
        audit: &Audit,
    ) -> Result<Reply, Failure> {
        let Some(key) = key else {
            return self.create_new(caller, body, None, audit).await;
        };
        let name = key.key.clone();
        self.alone_with_key(&name, self.create_with_key(caller, body, key, audit)).await
    }

    async fn create_with_key(
        self: &Arc<Self>,
        caller: &Account,
        body: NewSandbox,
        key: NewKey,
        audit: &Audit,
    ) -> Result<Reply, Failure> {
        let known = self.database.key(key.key.clone()).await.map_err(database_failed)?;
        let Some(known) = known else {
            return self.create_new(caller, body, Some(key), audit).await;
        };
        if known.fingerprint != key.fingerprint {
            return Err(once::reused());
        }
        let reply = known.reply.and_then(|reply| serde_json::from_str(&reply).ok());
        match reply {
            Some(sandbox) => Ok(Reply { sandbox, timings: Timings::default() }),
            None => Err(once::in_use()),
        }
    }

    async fn create_new(
        self: &Arc<Self>,
        caller: &Account,
        body: NewSandbox,
        key: Option<NewKey>,
        audit: &Audit,
    ) -> Result<Reply, Failure> {
        let asked = Instant::now();
        let mut since = asked;
        let mut timings = Timings::default();
        let source = self.base(caller, &body.template_id).await?;
        let (row, mut request) = prepare(&self.clock, self.placement.clone(), caller, body, source)?;
        self.begin(self.accounts.quota(caller), std::slice::from_ref(&row), key, Some(audit)).await?;
        request.ends_at = row.ends_at;
        timings.lap(Phase::Reserve, &mut since);
        let created = match self.node.create(request).await {
            Ok(created) => created,
            Err(failure) => {
                if let Err(error) = self.database.undo(&row.placement, &row.id).await {
                    tracing::error!(sandbox = %row.id, error = chain(&error), "a failed create was not forgotten");
                }
                return Err(failure);
            }
        };
        since = Instant::now();
        let Created { start_path, reason, timings: on_node, shape, started_at } = created;
        for (phase, ms) in on_node.iter() {
            timings.add(phase, Duration::from_secs_f64(ms / 1e3));
        }
        let live = Live {
            sandbox: row.id.clone(),
            ends_at: row.ends_at,
            shape,
            start_path,
            started_at,
            state: SandboxState::Running,
            generation: 0,
        };
        let sandbox = self.reply_of(&row, start_path, reason, &timings);
        let text = serde_json::to_string(&sandbox).ok();
        let ended = audit.to_end(StatusCode::CREATED, row.id.as_str());
        if let Err(error) = self.database.commit(&row.placement, &live, text, ended.clone()).await {
            let _ = self.node.kill(&row.id).await;
            // What cannot be written now is undone at the next start.
            let _ = self.database.undo(&row.placement, &row.id).await;
            return Err(database_failed(error));
        }
        audit.ended(ended);
        timings.lap(Phase::Commit, &mut since);
        self.count_start(&row.project);
        self.metrics.started(Start::Create, start_path, &timings, asked.elapsed());
        Ok(Reply { sandbox, timings })
    }

    /// Records intent, when there is room for all of it.
    pub(crate) async fn begin(
        &self,
        quota: Quota,
        rows: &[SandboxRow],
        key: Option<NewKey>,
        audit: Option<&Audit>,
    ) -> Result<(), Failure> {
        let target = rows.first().map(|row| row.id.to_string()).unwrap_or_default();
        let entry = audit.map(|audit| audit.to_begin(&target));
        match self.database.begin(rows, key, Some(quota), entry).await.map_err(database_failed)? {
            Begun::Done(entry) => {
                if let Some(audit) = audit {
                    audit.begun(entry);
                }
                Ok(())
            }
            Begun::Exceeded(limit) => Err(exceeded(limit)),
            Begun::KeyTaken => Err(once::in_use()),
        }
    }

    pub(crate) fn reply_of(
        &self,
        row: &SandboxRow,
        path: kelvin_api::sandbox::StartPath,
        reason: String,
        timings: &Timings,
    ) -> Sandbox {
        Sandbox {
            template_id: row.template.clone(),
            sandbox_id: row.id.clone(),
            alias: Some(row.template.clone()),
            client_id: "kelvin".to_owned(),
            envd_version: ENVD_VERSION.to_owned(),
            envd_access_token: row.access_token.clone(),
            traffic_access_token: row.traffic_token.clone(),
            domain: self.domain.clone(),
            start_path: Some(path),
            start_reason: Some(reason),
            phases: timings.iter().collect(),
        }
    }
}

/// When a time to live of `seconds` is over, as the wall clock is now. The node counts it on boot time from here on.
pub(crate) fn deadline(clock: &Clock, seconds: u64) -> Result<jiff::Timestamp, Failure> {
    if seconds > MAX_TIMEOUT_S {
        return Err(Failure::new(
            ErrorCode::InvalidTimeout,
            format!("a timeout of {seconds} s is longer than {MAX_TIMEOUT_S} s"),
            "ask for at most 24 hours and extend it later",
        ));
    }
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    clock.wall().checked_add(jiff::SignedDuration::from_secs(seconds)).map_err(|error| {
        Failure::new(ErrorCode::InvalidTimeout, error.to_string(), "ask for at most 24 hours")
    })
}

/// What a request says of memory, in MiB.
pub(crate) fn memory_of(wanted: Option<u64>) -> Result<Option<MemoryMib>, Failure> {
    let outside =
        |_| Failure::new(ErrorCode::InvalidShape, "memoryMB is outside every range", "ask for less memory");
    wanted.map(|memory| u32::try_from(memory).map(MemoryMib)).transpose().map_err(outside)
}

/// Checks a request and makes its row and what the node is asked. Every field is honoured or refused.
fn prepare(
    clock: &Clock,
    placement: Placement,
    caller: &Account,
    body: NewSandbox,
    source: Source,
) -> Result<(SandboxRow, Create), Failure> {
    let Source { base, shape } = source;
    let unsupported = [
        ("iam", body.iam.as_ref().is_some_and(|value| !is_empty(value))),
        ("volumeMounts", body.volume_mounts.as_ref().is_some_and(|mounts| !mounts.is_empty())),
    ];
    if let Some((field, _)) = unsupported.iter().find(|(_, used)| *used) {
        return Err(Failure::new(
            ErrorCode::UnsupportedField,
            format!("{field} is not supported by this version"),
            "leave the field out",
        ));
    }
    let metadata = body.metadata.unwrap_or_default();
    check_map("metadata", &metadata, METADATA_BYTES)?;
    let env_vars = body.env_vars.unwrap_or_default();
    check_map("envVars", &env_vars, ENV_BYTES)?;
    check_env(&env_vars)?;
    let memory_mib = memory_of(body.memory_mb)?;
    let network = network::wanted(body.network, body.allow_internet_access)?;
    let timeout = body.timeout.unwrap_or(DEFAULT_TIMEOUT_S);
    let ends_at = deadline(clock, timeout)?;
    let lifecycle = Lifecycle {
        on_timeout: if body.auto_pause == Some(true) { OnTimeout::Pause } else { OnTimeout::Kill },
        auto_resume: body.auto_resume.is_some_and(|wanted| wanted.enabled),
        pause_mode: PauseMode::of(body.auto_pause_memory),
    };
    if lifecycle.auto_resume && !lifecycle.pause_mode.is_full() {
        return Err(Failure::new(
            ErrorCode::InvalidLifecycle,
            "autoResume cannot be combined with autoPauseMemory: false",
            "a sandbox without memory boots again: resume it with an explicit request",
        ));
    }
    let id = SandboxId::random();
    let access_token = (body.secure != Some(false)).then(Token::random);
    let row = SandboxRow {
        id: id.clone(),
        template: body.template_id,
        metadata,
        access_token: access_token.clone(),
        allow_internet: body.allow_internet_access,
        traffic_token: network::traffic_token(&network),
        vcpus: 0,
        // What it is expected to take, until the node says.
        memory_mib: memory_mib.unwrap_or(shape.memory_mib).0,
        disk_mib: shape.disk_mib.0,
        start_path: kelvin_api::sandbox::StartPath::Cold,
        started_at: clock.wall(),
        ends_at,
        state: SandboxState::Running,
        lifecycle,
        parent: None,
        project: caller.project.clone(),
        key: caller.key.clone(),
        placement,
    };
    let create = Create {
        sandbox: id,
        project: caller.project.clone(),
        base,
        vcpus: body.cpu_count,
        memory_mib,
        env_vars,
        access_token,
        ends_at,
        start_path: body.start_path,
        probe_tcp: body.probe_tcp == Some(true),
        network,
        lifecycle,
        timeout: Duration::from_secs(timeout),
    };
    Ok((row, create))
}

fn is_empty(value: &serde_json::Value) -> bool {
    value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty)
}

pub(crate) fn check_map(field: &'static str, map: &Metadata, limit: usize) -> Result<(), Failure> {
    let bytes: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes <= limit {
        return Ok(());
    }
    Err(Failure::new(
        ErrorCode::TooLarge,
        format!("{field} has {bytes} bytes, {limit} are allowed"),
        "keep large values in a file inside the sandbox",
    ))
}

pub(crate) fn check_env(env_vars: &EnvVars) -> Result<(), Failure> {
    let bad = |key: &str, value: &str| {
        key.is_empty() || key.len() > 1024 || key.contains(['=', '\0']) || value.contains('\0')
    };
    match env_vars.iter().find(|(key, value)| bad(key, value)) {
        None => Ok(()),
        Some((key, _)) => Err(Failure::new(
            ErrorCode::InvalidEnvVar,
            format!("{:?} cannot be an environment variable", key.chars().take(80).collect::<String>()),
            "names are not empty and have no '='; neither names nor values have a NUL byte",
        )),
    }
}
