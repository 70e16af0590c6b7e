//! Who asks: keys, what they may do and how much of it, and what they did.
//!
//! Keys are kept as hashes (SHA-256 of 160 random bits: there is nothing to guess) in `kelvin.db` and in memory, where
//! each request is looked up. The server's own key is in the file `api-key`, stays out of the database, and is the
//! only one that may change what belongs to everybody. What another server on the same database changes, a revocation too, is
//! known here within [`STALENESS`], as long as the database answers. Who writes: `create`, `revoke` and `limit_project`, each on a task
//! that no caller can end half-way, and the meter for the times of last use; a crash loses the last of those, never a key.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use governor::clock::Clock as _;
use governor::{DefaultDirectRateLimiter, RateLimiter};
use http::HeaderMap;
use kelvin_api::account::{ApiKeyInfo, CreatedApiKey, Limits, Mask, NewApiKey, Project, ProjectInfo};
use kelvin_api::error::{ErrorCode, Failure, chain};
use kelvin_api::id::Token;
use kelvin_host::clock::Clock;

use crate::auth::{ApiKey, PREFIX, random, random_key};
use crate::database::{Database, Quota};
use crate::failures::database_failed;

/// Characters of a name.
const NAME: usize = 120;
/// How old what is cached of keys and limits may be, beside the time that the database takes.
const STALENESS: Duration = Duration::from_secs(10);
/// The id of the server's own key.
const OWN: &str = "server";

/// Whoever asks.
#[derive(Debug)]
pub struct Account {
    /// Id of the key.
    pub key: String,
    /// What its requests are about.
    pub project: Project,
    /// Whether it may change what belongs to everybody.
    pub is_admin: bool,
    /// What it may have at one time.
    pub limits: Limits,
    rate: Option<DefaultDirectRateLimiter>,
    /// Milliseconds since 1970; 0 is never.
    last_used: AtomicI64,
}

/// The account of a request.
pub type Caller = Arc<Account>;

type Known = HashMap<String, Caller>;

/// Every key that is accepted.
#[derive(Debug)]
pub struct Accounts {
    clock: Clock,
    own: ApiKey,
    owner: Caller,
    /// By hash. Replaced as a whole: a request clones one pointer.
    known: RwLock<Arc<Known>>,
    /// What projects may have; those without limits are not in it.
    projects: RwLock<HashMap<Project, Limits>>,
    /// Held while the database and what is in memory change together: whoever is later in one is later in the other. The
    /// revision of the database that is in memory; what was changed here since is, too.
    writing: tokio::sync::Mutex<Option<i64>>,
}

fn hash(key: &str) -> String {
    kelvin_api::digest::sha256(key.as_bytes())
}

fn limiter(requests_per_second: Option<u32>) -> Option<DefaultDirectRateLimiter> {
    requests_per_second
        .and_then(NonZeroU32::new)
        .map(|rate| RateLimiter::direct(governor::Quota::per_second(rate)))
}

impl Accounts {
    /// The server's own key and those of the database.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub async fn open(own: ApiKey, database: &Database) -> Result<Self, Failure> {
        let owner = Account {
            key: OWN.to_owned(),
            project: Project::default(),
            is_admin: true,
            limits: Limits::default(),
            rate: None,
            last_used: AtomicI64::default(),
        };
        let accounts = Self {
            clock: database.clock.clone(),
            own,
            owner: Arc::new(owner),
            known: RwLock::default(),
            projects: RwLock::default(),
            writing: tokio::sync::Mutex::default(),
        };
        accounts.refresh(database).await?;
        Ok(accounts)
    }

    /// Learns what another server has changed. A key that stays keeps its rate.
    ///
    /// # Errors
    /// When the database cannot be read.
    async fn refresh(&self, database: &Database) -> Result<(), Failure> {
        let mut revision = self.writing.lock().await;
        let Some(now) = database.known_since(*revision).await.map_err(database_failed)? else {
            return Ok(());
        };
        let former = self.known();
        let stays = |(hash, info): (String, ApiKeyInfo)| {
            let account = former.get(&hash).cloned().unwrap_or_else(|| Arc::new(account(&info)));
            (hash, account)
        };
        let known = now.keys.into_iter().map(stays).collect();
        *self.known.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(known);
        let projects = now.limits.into_iter().collect();
        *self.projects.write().unwrap_or_else(PoisonError::into_inner) = projects;
        *revision = Some(now.revision);
        Ok(())
    }

    /// Keeps what is cached no older than [`STALENESS`], for ever.
    pub async fn follow(&self, database: &Database) {
        let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + STALENESS, STALENESS);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Err(failure) = self.refresh(database).await {
                tracing::warn!(error = chain(&failure), "keys and limits may be older than they should be");
            }
        }
    }

    fn known(&self) -> Arc<Known> {
        Arc::clone(&self.known.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn change(&self, change: impl FnOnce(&mut Known)) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let mut next = Known::clone(&known);
        change(&mut next);
        *known = Arc::new(next);
    }

    /// Who asks, by `X-API-KEY` or as a bearer token.
    ///
    /// # Errors
    /// `Unauthenticated`; it does not say whether a key was close, or was revoked.
    pub fn admit(&self, headers: &HeaderMap) -> Result<Caller, Failure> {
        let remedy = "send the key in the header X-API-KEY; the server keeps its own in <data-dir>/api-key";
        let Some(shown) = shown(headers) else {
            let text = "the request has no API key";
            return Err(Failure::new(ErrorCode::NoApiKey, text, remedy));
        };
        let caller = if self.own.matches(shown) {
            Some(Arc::clone(&self.owner))
        } else {
            self.known().get(&hash(shown)).cloned()
        };
        let caller =
            caller.ok_or_else(|| Failure::new(ErrorCode::WrongApiKey, "the API key is not known", remedy))?;
        caller.last_used.store(self.clock.wall().as_millisecond(), Ordering::Relaxed);
        Ok(caller)
    }

    /// The account of a key by its id; none of one that was revoked.
    pub fn of(&self, id: &str) -> Option<Caller> {
        self.known().values().find(|account| account.key == id).cloned()
    }

    /// The account of a key by its id, the server's own too.
    pub fn by_id(&self, id: &str) -> Option<Caller> {
        if id == OWN { Some(Arc::clone(&self.owner)) } else { self.of(id) }
    }

    /// A secret for `purpose` that follows from the server's own key.
    pub fn secret_for(&self, purpose: &str) -> Token {
        self.own.secret_for(purpose)
    }

    /// Makes a key.
    ///
    /// # Errors
    /// `Invalid` for a name or a limit that is none, `Internal` when it cannot be kept.
    pub async fn create(&self, wanted: NewApiKey, database: &Database) -> Result<CreatedApiKey, Failure> {
        let name = check_name(&wanted.name)?;
        if wanted.requests_per_second == Some(0) || wanted.limits().has_zero() {
            return Err(no_limit());
        }
        let key = random_key()?;
        let info = ApiKeyInfo {
            id: uuid::Builder::from_random_bytes(random()?).into_uuid().to_string(),
            name,
            mask: Mask {
                prefix: PREFIX.to_owned(),
                value_length: u32::try_from(key.len() - PREFIX.len()).unwrap_or(u32::MAX),
                masked_value_prefix: key[PREFIX.len()..][..2].to_owned(),
                masked_value_suffix: key[key.len() - 4..].to_owned(),
            },
            created_at: database.clock.wall(),
            last_used: None,
            project: wanted.project,
            max_sandboxes: wanted.max_sandboxes,
            requests_per_second: wanted.requests_per_second,
            max_creating: wanted.max_creating,
            max_paused: wanted.max_paused,
            max_snapshots: wanted.max_snapshots,
            max_disk_mib: wanted.max_disk_mib,
        };
        let _writing = self.writing.lock().await;
        database.add_key(hash(&key), info.clone()).await.map_err(database_failed)?;
        self.change(|known| drop(known.insert(hash(&key), Arc::new(account(&info)))));
        Ok(CreatedApiKey { key, info })
    }

    /// Renames a key. Whether there is one of this id.
    ///
    /// # Errors
    /// `Invalid` for a name that is none, `Internal` when it cannot be kept.
    pub async fn rename(&self, id: &str, name: &str, database: &Database) -> Result<bool, Failure> {
        database.rename_key(id.to_owned(), check_name(name)?).await.map_err(database_failed)
    }

    /// Revokes a key: its next request is refused. Whether there was one.
    ///
    /// In memory first: whatever becomes of the caller or of the disk, a key that is gone from the database lets nobody in.
    ///
    /// # Errors
    /// When the database cannot be written; then it is accepted again.
    pub async fn revoke(&self, id: &str, database: &Database) -> Result<bool, Failure> {
        let former = self.known();
        let forget = |known: &mut Known| known.retain(|_, account| account.key != id);
        self.change(forget);
        let _writing = self.writing.lock().await;
        // Once more: what was being read before this one's turn knew it still.
        self.change(forget);
        match database.remove_key(id.to_owned()).await {
            Ok(gone) => Ok(gone),
            Err(error) => {
                let mine = former.iter().filter(|(_, account)| account.key == id);
                let mine: Vec<_> = mine.map(|(hash, account)| (hash.clone(), Arc::clone(account))).collect();
                self.change(|known| known.extend(mine));
                Err(database_failed(error))
            }
        }
    }

    /// Sets what all keys of a project may have together.
    ///
    /// # Errors
    /// `Invalid` for a limit that is none, `Internal` when it cannot be kept; then it is as it was.
    pub async fn limit_project(
        &self,
        project: &Project,
        limits: Limits,
        database: &Database,
    ) -> Result<ProjectInfo, Failure> {
        if limits.has_zero() {
            return Err(no_limit());
        }
        let _writing = self.writing.lock().await;
        database.set_project_limits(project, limits).await.map_err(database_failed)?;
        self.projects.write().unwrap_or_else(PoisonError::into_inner).insert(project.clone(), limits);
        let all = database.projects().await.map_err(database_failed)?;
        let none = || ProjectInfo { name: project.clone(), limits, used: Default::default() };
        Ok(all.into_iter().find(|info| info.name == *project).unwrap_or_else(none))
    }

    /// Whose limits hold for what `caller` does.
    pub fn quota(&self, caller: &Account) -> Quota {
        let projects = self.projects.read().unwrap_or_else(PoisonError::into_inner);
        Quota {
            key: caller.key.clone(),
            of_key: caller.limits,
            project: caller.project.clone(),
            of_project: projects.get(&caller.project).copied().unwrap_or_default(),
        }
    }

    /// Whose limits hold for a sandbox that the key `id` of `project` has made: a key that was revoked has none.
    pub fn quota_of(&self, id: &str, project: &Project) -> Quota {
        let projects = self.projects.read().unwrap_or_else(PoisonError::into_inner);
        Quota {
            key: id.to_owned(),
            of_key: self.of(id).map(|account| account.limits).unwrap_or_default(),
            project: project.clone(),
            of_project: projects.get(project).copied().unwrap_or_default(),
        }
    }

    /// The keys that are accepted beside the server's own, of one project or of all.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub async fn list(
        &self,
        project: Option<&Project>,
        database: &Database,
    ) -> Result<Vec<ApiKeyInfo>, Failure> {
        let project = project.map(ToString::to_string);
        let keys = database.keys(project).await.map_err(database_failed)?;
        let used: HashMap<String, i64> = self.used().into_iter().collect();
        let newer = |mut info: ApiKeyInfo| {
            let now = used.get(&info.id).and_then(|ms| jiff::Timestamp::from_millisecond(*ms).ok());
            info.last_used = info.last_used.max(now);
            info
        };
        Ok(keys.into_iter().map(|(_, info)| newer(info)).collect())
    }

    /// When each key was used last, in milliseconds since 1970; those that were not used since the start are left
    /// out.
    pub fn used(&self) -> Vec<(String, i64)> {
        let used = |account: &Caller| (account.key.clone(), account.last_used.load(Ordering::Relaxed));
        self.known().values().map(used).filter(|(_, ms)| *ms > 0).collect()
    }
}

/// The key of a request.
pub fn shown(headers: &HeaderMap) -> Option<&str> {
    let bearer = || headers.get("authorization")?.to_str().ok()?.strip_prefix("Bearer ");
    headers.get("x-api-key").and_then(|value| value.to_str().ok()).or_else(bearer)
}

fn no_limit() -> Failure {
    Failure::new(
        ErrorCode::InvalidLimit,
        "a limit of 0 allows nothing",
        "leave it out for no limit, or revoke the key",
    )
}

fn check_name(name: &str) -> Result<String, Failure> {
    let name = name.trim();
    if name.is_empty() || name.chars().count() > NAME || name.chars().any(char::is_control) {
        let text = format!("the name of a key is 1 to {NAME} characters without control characters");
        return Err(Failure::new(ErrorCode::InvalidName, text, "choose another name"));
    }
    Ok(name.to_owned())
}

fn account(info: &ApiKeyInfo) -> Account {
    Account {
        key: info.id.clone(),
        project: info.project.clone(),
        is_admin: false,
        limits: info.limits(),
        rate: limiter(info.requests_per_second),
        last_used: AtomicI64::default(),
    }
}

impl Account {
    #[cfg(test)]
    pub fn for_test(is_admin: bool) -> Self {
        Self {
            key: "test".to_owned(),
            project: Project::default(),
            is_admin,
            limits: Limits::default(),
            rate: None,
            last_used: AtomicI64::default(),
        }
    }

    /// Counts a request.
    ///
    /// # Errors
    /// After how long the next one is allowed, when this one is one too many.
    pub fn count(&self) -> Result<(), Duration> {
        let Some(rate) = &self.rate else { return Ok(()) };
        rate.check().map_err(|not_until| not_until.wait_time_from(rate.clock().now()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_key_lives_from_its_creation_to_its_end_and_is_kept_as_a_hash() {
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(&dir.path().join("kelvin.db"), Clock::system().unwrap()).unwrap();
        let own = ApiKey::open(&dir.path().join("api-key")).unwrap();
        let accounts = Accounts::open(own.clone(), &database).await.unwrap();
        let wanted = NewApiKey {
            name: "ci".into(),
            project: "blue".parse().unwrap(),
            max_sandboxes: Some(2),
            requests_per_second: Some(3),
            max_creating: None,
            max_paused: None,
            max_snapshots: Some(1),
            max_disk_mib: None,
        };
        let made = accounts.create(wanted.clone(), &database).await.unwrap();
        assert!(made.key.starts_with("e2b_") && made.key.len() == 44);
        let ask = |accounts: &Accounts, key: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("x-api-key", key.parse().unwrap());
            accounts.admit(&headers)
        };
        let caller = ask(&accounts, &made.key).unwrap();
        assert_eq!((caller.project.as_str(), caller.is_admin), ("blue", false));
        for _ in 0..3 {
            caller.count().unwrap();
        }
        assert!(caller.count().unwrap_err() <= Duration::from_secs(1), "the fourth in one second");
        // Another start knows it, and nobody can read it.
        let again = Accounts::open(own.clone(), &database).await.unwrap();
        assert_eq!(ask(&again, &made.key).unwrap().limits, wanted.limits());
        for file in std::fs::read_dir(dir.path()).unwrap().flatten() {
            if file.file_name() != "api-key" {
                let bytes = std::fs::read(file.path()).unwrap();
                let found = bytes.windows(made.key.len()).any(|window| window == made.key.as_bytes());
                assert!(!found, "{:?}", file.path());
            }
        }
        assert!(accounts.revoke(&made.info.id, &database).await.unwrap());
        assert!(!accounts.revoke(&made.info.id, &database).await.unwrap());
        assert_eq!(ask(&accounts, &made.key).unwrap_err().error_code, ErrorCode::WrongApiKey);
        for (name, rate) in [("", None), ("a\nb", None), ("a", Some(0))] {
            let bad = NewApiKey { name: name.into(), requests_per_second: rate, ..wanted.clone() };
            assert_eq!(
                accounts.create(bad, &database).await.unwrap_err().kind,
                kelvin_api::error::Kind::Invalid
            );
        }
    }

    /// Waits until `condition` holds: in virtual time, which goes on while the database's thread works.
    async fn soon(condition: impl Fn() -> bool) {
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while !condition() {
            assert!(std::time::Instant::now() < deadline, "it stays unknown");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_another_server_changes_becomes_known() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Database::open(&dir.path().join("kelvin.db"), Clock::system().unwrap()).unwrap();
        let own = ApiKey::open(&dir.path().join("api-key")).unwrap();
        let (one, other) = (open(), open());
        let accounts = Arc::new(Accounts::open(own.clone(), &one).await.unwrap());
        let others = Accounts::open(own, &other).await.unwrap();
        let wanted = NewApiKey { name: "a".into(), requests_per_second: Some(2), ..NewApiKey::default() };
        let made = others.create(wanted, &other).await.unwrap();
        let mut headers = HeaderMap::new();
        headers.insert("x-api-key", made.key.parse().unwrap());
        // Nobody follows yet.
        accounts.admit(&headers).unwrap_err();
        let follower = tokio::spawn({
            let (accounts, one) = (Arc::clone(&accounts), one.clone());
            async move { accounts.follow(&one).await }
        });
        soon(|| accounts.admit(&headers).is_ok()).await;
        let caller = accounts.admit(&headers).unwrap();
        let limits = Limits { max_paused: Some(1), ..Limits::default() };
        others.limit_project(&caller.project, limits, &other).await.unwrap();
        soon(|| accounts.quota(&caller).of_project == limits).await;
        // The same account, with what is left of its rate.
        assert!(Arc::ptr_eq(&caller, &accounts.admit(&headers).unwrap()));
        assert!(others.revoke(&made.info.id, &other).await.unwrap());
        soon(|| accounts.admit(&headers).is_err()).await;
        assert_eq!(accounts.admit(&headers).unwrap_err().error_code, ErrorCode::WrongApiKey);
        follower.abort();
    }

    #[tokio::test]
    async fn a_caller_that_leaves_at_any_point_leaves_no_key_that_opens_and_is_not_there() {
        use futures::FutureExt as _;
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(&dir.path().join("kelvin.db"), Clock::system().unwrap()).unwrap();
        let own = ApiKey::open(&dir.path().join("api-key")).unwrap();
        let accounts = Accounts::open(own, &database).await.unwrap();
        let mut ends = 0;
        for polls in 0..5 {
            let wanted = NewApiKey { name: "leaves".into(), ..NewApiKey::default() };
            let made = accounts.create(wanted.clone(), &database).await.unwrap();
            let mut headers = HeaderMap::new();
            headers.insert("x-api-key", made.key.parse().unwrap());
            let mut revoking = Box::pin(accounts.revoke(&made.info.id, &database));
            let mut is_over = false;
            for _ in 0..polls {
                is_over = (&mut revoking).now_or_never().is_some();
                if is_over {
                    break;
                }
                // Whatever it has asked of the database is done by then; of the disk, perhaps.
                database.keys(None).await.unwrap();
            }
            if polls == 4 && !is_over {
                (&mut revoking).await.unwrap();
                is_over = true;
            }
            ends += u32::from(is_over);
            drop(revoking);
            let kept = database.keys(None).await.unwrap();
            let is_there = kept.iter().any(|(_, info)| info.id == made.info.id);
            assert!(is_there || accounts.admit(&headers).is_err(), "after {polls} polls");
            // Nobody waits for a turn that is never given back.
            accounts.create(wanted, &database).await.unwrap();
            accounts.revoke(&made.info.id, &database).await.unwrap();
            assert!(accounts.admit(&headers).is_err());
        }
        assert!(ends > 0, "it never came to its end");
    }
}
