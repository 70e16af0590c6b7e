//! What the API does: intent is recorded, the node is asked, the result is recorded.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use http::StatusCode;
use kelvin_api::ENVD_VERSION;
use kelvin_api::account::Project;
use kelvin_api::error::{ErrorCode, Failure, chain};
use kelvin_api::id::{SandboxId, Token};
use kelvin_api::network::{NetworkState, NetworkUpdate};

use kelvin_api::phase::{Phase, Timings};
use kelvin_api::sandbox::{
    EnvVars, Lifecycle, LogLevel, MAX_TIMEOUT_S, Metadata, NewSandbox, OnTimeout, PauseMode, Sandbox,
    SandboxDetail, SandboxLog, SandboxLogEntry, SandboxLogs, SandboxState,
};
use kelvin_api::units::MemoryMib;
use kelvin_host::clock::Clock;
use kelvin_node_api::{ConsoleLine, Create, Created, Live, NodeService, Source};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::accounts::{Account, Accounts};
use crate::audit::Audit;
use crate::changes::Changes;
use crate::database::{self, Begun, Claim, Database, Exceeded, Filter, Limited, NewKey, Quota, SandboxRow};
use crate::placement::Placement;
use crate::wake::Wakes;
use crate::{ApiKey, network, once};

/// The time to live of requests that name none, in seconds. Source: E2B's OpenAPI, `NewSandbox.timeout`.
pub(crate) const DEFAULT_TIMEOUT_S: u64 = 15;
pub(crate) const METADATA_BYTES: usize = 64 << 10;
pub(crate) const ENV_BYTES: usize = 256 << 10;
/// How long to wait before a node that failed is asked again for its changes.
const RETRY: Duration = Duration::from_secs(1);

/// The control plane; cheap to clone.
#[derive(Clone)]
pub struct Control {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) clock: Clock,
    pub(crate) database: Database,
    pub(crate) node: Arc<dyn NodeService>,
    /// Which node that is.
    pub(crate) placement: Placement,
    pub(crate) accounts: Accounts,
    /// Sandboxes that were started since the last measurement, by project.
    pub(crate) started: Mutex<HashMap<Project, u32>>,
    domain: Option<String>,
    /// One lock for each idempotency key that is in use: a second request waits for the first, and is not told that it is under
    /// way. That there is one is decided by the database.
    keys: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Changes of sandboxes that are under way.
    pub(crate) changes: Arc<Changes>,
    pub(crate) wakes: Wakes,
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
}

/// What is said when a limit would be exceeded.
pub(crate) fn exceeded(Exceeded { what, of_project, limit, used }: Exceeded) -> Failure {
    let whose = if of_project { "this project" } else { "this API key" };
    let (code, text, remedy) = match what {
        Limited::Sandboxes => (
            ErrorCode::TooManySandboxes,
            format!("{used} of the {limit} sandboxes that {whose} may have run already"),
            "end or pause one",
        ),
        Limited::Creating => (
            ErrorCode::TooManyCreates,
            format!("{used} of the {limit} sandboxes that {whose} may make at one time are being made"),
            "wait until one is there",
        ),
        Limited::Paused => (
            ErrorCode::TooManyPaused,
            format!("{used} of the {limit} sandboxes that {whose} may pause are paused"),
            "end or resume one",
        ),
        Limited::Snapshots => (
            ErrorCode::TooManySnapshots,
            format!("{used} of the {limit} snapshots that {whose} may keep are kept"),
            "delete one",
        ),
        Limited::Disk => (
            ErrorCode::TooMuchDisk,
            format!("{used} MiB of the {limit} MiB of disk that {whose} may take are in use"),
            "delete snapshots, or end sandboxes",
        ),
    };
    let remedy = format!(
        "{remedy}, or ask the operator for another limit (`kelvin key create`, `kelvin project limit`)"
    );
    Failure::new(code, text, remedy)
}

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

/// What a create replies.
#[derive(Debug)]
pub(crate) struct Reply {
    pub sandbox: Sandbox,
    pub timings: Timings,
}

/// A page of a list.
#[derive(Debug)]
pub(crate) struct Page {
    pub sandboxes: Vec<SandboxDetail>,
    pub next: Option<String>,
}

pub(crate) fn database_failed(error: database::Error) -> Failure {
    match error {
        database::Error::Full(_) => Failure::new(
            ErrorCode::DiskFull,
            "the database cannot be written: the disk is full",
            "free space on the data directory's file system, `kelvin gc` removes what nothing needs",
        ),
        database::Error::Fenced => Failure::new(
            ErrorCode::SandboxChanging,
            "the sandbox was given to another node meanwhile",
            "try again",
        ),
        database::Error::Failed(_) => {
            let remedy = "check the disk of the data directory";
            Failure::new(ErrorCode::Database, "the database cannot be used", remedy).with_cause(&error)
        }
    }
}

pub(crate) fn invalid(
    code: ErrorCode,
    message: impl Into<String>,
    remediation: impl Into<String>,
) -> Failure {
    Failure::new(code, message, remediation)
}

fn not_found(id: &str) -> Failure {
    // The same words whether it never existed, has ended, or is no id at all.
    Failure::new(
        ErrorCode::SandboxNotFound,
        format!("sandbox {} was not found", id.chars().take(80).collect::<String>()),
        "`kelvin sandbox list` shows what runs",
    )
}

pub(crate) fn parse_id(text: &str) -> Result<SandboxId, Failure> {
    text.parse().map_err(|_| not_found(text))
}

impl Control {
    /// Opens the control plane over `node`, with its database in `data_dir`, and brings the database to what
    /// the node says.
    ///
    /// # Errors
    /// When the database or the node cannot be used.
    ///
    /// `domain` is told to clients, which reach ports as its hosts. `clock` is the node's.
    pub async fn open(
        data_dir: &Path,
        node: Arc<dyn NodeService>,
        key: ApiKey,
        domain: Option<String>,
        clock: Clock,
    ) -> Result<Self, Failure> {
        let path = data_dir.join("kelvin.db");
        let database = Database::open(&path, clock.clone()).map_err(database_failed)?;
        database.count_from_this_boot().await.map_err(database_failed)?;
        let accounts = Accounts::open(key, &database).await?;
        let inner = Arc::new(Inner {
            clock,
            database,
            node,
            placement: Placement::local(),
            accounts,
            started: Mutex::default(),
            domain,
            keys: Mutex::default(),
            changes: Arc::default(),
            wakes: Wakes::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        inner.compare(true).await?;
        let follower = Arc::clone(&inner);
        inner.tasks.spawn(async move {
            let stop = follower.stop.clone();
            stop.run_until_cancelled(follower.follow()).await;
        });
        let cache = Arc::clone(&inner);
        inner.tasks.spawn(async move {
            let stop = cache.stop.clone();
            stop.run_until_cancelled(cache.accounts.follow(&cache.database)).await;
        });
        let meter = Arc::clone(&inner);
        inner.tasks.spawn(async move {
            let stop = meter.stop.clone();
            stop.run_until_cancelled(meter.measure()).await;
        });
        Ok(Self { inner })
    }

    /// Ends what runs in the background; creates that are under way end first.
    pub async fn stop(&self) {
        self.inner.stop.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }
}

impl Inner {
    /// Brings the database to what the node has: after a start, or when the node's log was too short. Only
    /// at a start are rows that are being made somebody's who died.
    async fn compare(&self, at_start: bool) -> Result<(), Failure> {
        let by = &self.placement;
        if at_start {
            self.database.forget_claims(by).await.map_err(database_failed)?;
            self.compare_snapshots().await?;
        }
        let live: BTreeMap<SandboxId, Live> =
            self.node.live().await?.into_iter().map(|live| (live.sandbox.clone(), live)).collect();
        for (id, creating) in self.database.all(by).await.map_err(database_failed)? {
            if creating && !at_start {
                continue;
            }
            match (live.get(&id), creating) {
                (Some(live), true) => self.finish(live).await.map_err(database_failed)?,
                (Some(live), false) => self.database.set_live(by, live).await.map_err(database_failed)?,
                (None, true) => self.database.undo(by, &id).await.map_err(database_failed)?,
                (None, false) => self.database.end(by, &id).await.map_err(database_failed)?,
            }
        }
        Ok(())
    }

    /// Commits a sandbox whose create the last daemon did not live to see the end of.
    async fn finish(&self, live: &Live) -> Result<(), database::Error> {
        self.database.commit(&self.placement, live, None, None).await?;
        let Some(row) = self.database.get(&live.sandbox).await? else {
            return Ok(());
        };
        let reason = format!("{}: the server was restarted meanwhile", live.start_path.name());
        let sandbox = self.reply_of(&row, live.start_path, reason, &Timings::default());
        self.database.commit(&self.placement, live, serde_json::to_string(&sandbox).ok(), None).await
    }

    /// Follows what ends on the node.
    async fn follow(&self) {
        let by = &self.placement;
        let mut generation = 0;
        loop {
            match self.node.changes(generation).await {
                Ok(changes) => {
                    generation = changes.generation;
                    let mut result = Ok(());
                    for live in changes.changed.values() {
                        result = result.and(self.database.set_live(by, live).await.map_err(database_failed));
                    }
                    for id in changes.ended.keys() {
                        result = result.and(self.database.end(by, id).await.map_err(database_failed));
                    }
                    if changes.resync {
                        result = result.and(self.compare(false).await);
                    }
                    if let Err(error) = result {
                        tracing::error!(error = chain(&error), "the end of a sandbox was not recorded");
                        generation = u64::MAX;
                        tokio::time::sleep(RETRY).await;
                    }
                }
                Err(error) => {
                    tracing::warn!(error = chain(&error), "the node does not tell its changes");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

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

    /// Does `work` when nobody else does something for the idempotency key `key`.
    pub(crate) async fn alone_with_key<T>(&self, key: &str, work: impl Future<Output = T>) -> T {
        let lock = {
            let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(keys.entry(key.to_owned()).or_default())
        };
        let guard = lock.lock().await;
        let result = work.await;
        drop(guard);
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        // Two are this task's own and the map's.
        if Arc::strong_count(&lock) <= 2 {
            keys.remove(key);
        }
        result
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
        let mut since = Instant::now();
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

    pub(crate) fn count_start(&self, project: &Project) {
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        *started.entry(project.clone()).or_default() += 1;
    }

    /// The sandbox that a caller calls `text`, when it is one of its own.
    pub(crate) async fn owned(&self, caller: &Account, text: &str) -> Result<SandboxId, Failure> {
        let id = parse_id(text)?;
        let row = self.row(&id).await?;
        // The same words as for one that is not there.
        if row.project == caller.project || caller.is_admin { Ok(id) } else { Err(not_found(text)) }
    }

    /// A sandbox that is paused, or that runs and whose time is not over.
    pub(crate) async fn get(&self, id: &SandboxId) -> Result<SandboxDetail, Failure> {
        Ok(self.detail_of(self.row(id).await?, true))
    }

    pub(crate) async fn row(&self, id: &SandboxId) -> Result<SandboxRow, Failure> {
        let row = self.database.get(id).await.map_err(database_failed)?;
        match row {
            Some(row) if self.is_there(&row).await? => Ok(row),
            _ => Err(not_found(id.as_str())),
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
        self.database.end(&self.placement, id).await.map_err(database_failed)
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
            invalid(
                ErrorCode::InvalidToken,
                "nextToken is not one of ours",
                "use the value of X-Next-Token as it came",
            )
        })
}

/// When a time to live of `seconds` is over, as the wall clock is now. The node counts it on boot time from here on.
pub(crate) fn deadline(clock: &Clock, seconds: u64) -> Result<jiff::Timestamp, Failure> {
    if seconds > MAX_TIMEOUT_S {
        return Err(invalid(
            ErrorCode::InvalidTimeout,
            format!("a timeout of {seconds} s is longer than {MAX_TIMEOUT_S} s"),
            "ask for at most 24 hours and extend it later",
        ));
    }
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    clock
        .wall()
        .checked_add(jiff::SignedDuration::from_secs(seconds))
        .map_err(|error| invalid(ErrorCode::InvalidTimeout, error.to_string(), "ask for at most 24 hours"))
}

/// What a request says of memory, in MiB.
pub(crate) fn memory_of(wanted: Option<u64>) -> Result<Option<MemoryMib>, Failure> {
    let outside =
        |_| invalid(ErrorCode::InvalidShape, "memoryMB is outside every range", "ask for less memory");
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
        return Err(invalid(
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
        return Err(invalid(
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

/// What is said of a `templateID` that names nothing.
pub(crate) fn unknown_template(name: &str) -> Failure {
    let shown: String = name.chars().take(80).collect();
    Failure::new(
        ErrorCode::TemplateNotFound,
        format!("no template {shown:?}"),
        "`kelvin template list` and `kelvin snapshot list` show what there is",
    )
}

fn is_empty(value: &serde_json::Value) -> bool {
    value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty)
}

pub(crate) fn check_map(field: &'static str, map: &Metadata, limit: usize) -> Result<(), Failure> {
    let bytes: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes <= limit {
        return Ok(());
    }
    Err(invalid(
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
        Some((key, _)) => Err(invalid(
            ErrorCode::InvalidEnvVar,
            format!("{:?} cannot be an environment variable", key.chars().take(80).collect::<String>()),
            "names are not empty and have no '='; neither names nor values have a NUL byte",
        )),
    }
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
