//! What the control plane has replied is so after a power failure, on a disk that loses what was not synced.

use std::path::{Path, PathBuf};

use kelvin_api::account::NewApiKey;
use kelvin_host::clock::Clock;
use kelvin_powercut::{Disk, Loss};

use super::{Database, NewSnapshot};
use crate::ApiKey;
use crate::accounts::Accounts;
use crate::placement::NodeName;

const LOSSES: [Loss; 2] = [Loss::Everything, Loss::ContentAlone];

struct Ground {
    disk: Disk,
    now: tempfile::TempDir,
}

fn ground(lost: &'static str) -> Option<Ground> {
    let now = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(now.path()).unwrap() else {
        println!("skipped: no /dev/fuse");
        return None;
    };
    disk.lose_syncs(move |path| path == Path::new(lost));
    Some(Ground { disk, now })
}

impl Ground {
    fn path(&self, name: &str) -> PathBuf {
        self.now.path().join(name)
    }

    /// Whether `look` is content after every kind of power failure now.
    async fn holds(&self, look: impl AsyncFn(&Database, &Path) -> bool) -> bool {
        for loss in LOSSES {
            let then = tempfile::tempdir().unwrap();
            let _disk = self.disk.after_power_failure(loss, then.path()).unwrap().unwrap();
            let Ok(database) = Database::open(&then.path().join("kelvin.db"), Clock::system().unwrap())
            else {
                return false;
            };
            if !look(&database, then.path()).await {
                return false;
            }
        }
        true
    }
}

fn wanted() -> NewApiKey {
    serde_json::from_value(serde_json::json!({ "name": "ci", "project": "blue" })).unwrap()
}

/// What of it holds after a power failure at each reply: the server's key, a new key, its end, an owner, his name.
async fn replies(lost: &'static str) -> Option<[bool; 4]> {
    let ground = ground(lost)?;
    let own = ApiKey::open(&ground.path("api-key")).unwrap();
    let secret = std::fs::read_to_string(ground.path("api-key")).unwrap();
    let has_own = ground
        .holds(async |_, root| {
            ApiKey::open(&root.join("api-key")).is_ok_and(|key| key.matches(secret.trim()))
        })
        .await;
    let database = Database::open(&ground.path("kelvin.db"), Clock::system().unwrap()).unwrap();
    let accounts = Accounts::open(own, &database).await.unwrap();
    let made = accounts.create(wanted(), &database).await.unwrap();
    let is_known = async |database: &Database, _: &Path| {
        database.keys(None).await.unwrap().iter().any(|(_, info)| info.id == made.info.id)
    };
    let has_key = ground.holds(&is_known).await;
    accounts.revoke(&made.info.id, &database).await.unwrap();
    let is_gone = ground.holds(async |database, root| !is_known(database, root).await).await;
    let quota = accounts.quota_of("server", &"blue".parse().unwrap());
    let snapshot =
        NewSnapshot { id: "s1".into(), mib: 1, name: Some("ready".into()), node: NodeName::local() };
    assert!(database.begin_snapshot(snapshot, quota, None).await.unwrap().is_none());
    // Before the snapshot is taken; and when it was, with its name.
    let is_owned = async |database: &Database, name: Option<&str>| {
        let owners = database.snapshot_owners().await.unwrap();
        owners.get("s1").is_some_and(|owner| owner.project == "blue" && owner.name.as_deref() == name)
    };
    let is_begun = ground.holds(async |database, _| is_owned(database, None).await).await;
    database.finish_snapshot("s1".into()).await.unwrap();
    let is_finished = ground.holds(async |database, _| is_owned(database, Some("ready")).await).await;
    let has_owner = is_begun && is_finished;
    Some([has_own, has_key, is_gone, has_owner])
}

#[tokio::test]
async fn keys_revocations_and_owners_survive_a_power_failure() {
    let Some(held) = replies("nothing").await else { return };
    assert_eq!(held, [true; 4]);
    // And need their syncs: the last one is of the log, for each reply.
    assert_eq!(replies("kelvin.db-wal").await.unwrap(), [true, false, true, false]);
    assert!(!replies("").await.unwrap()[0]);
    let Some(ground) = ground("nothing") else { return };
    let database = Database::open(&ground.path("kelvin.db"), Clock::system().unwrap()).unwrap();
    let own = ApiKey::open(&ground.path("api-key")).unwrap();
    let accounts = Accounts::open(own, &database).await.unwrap();
    let made = accounts.create(wanted(), &database).await.unwrap();
    ground.disk.lose_syncs(|path| path == Path::new("kelvin.db-wal"));
    accounts.revoke(&made.info.id, &database).await.unwrap();
    let is_gone = async |database: &Database, _: &Path| database.keys(None).await.unwrap().is_empty();
    assert!(!ground.holds(is_gone).await, "a revocation needs no sync?");
}
