//! What a durable call has committed is there after a power failure, on a disk that loses what was not synced; what was
//! only committed may be lost, newest first, and is never torn.

// Everything here is a test.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use kelvin_api::id::VmId;
use kelvin_host::db::{Db, Error};
use kelvin_host::ledger::{Body, Ledger, Record};
use kelvin_powercut::{Disk, Loss};

const TABLE: &[&str] = &["CREATE TABLE t (k INTEGER PRIMARY KEY, v BLOB)"];
const LOSSES: [Loss; 2] = [Loss::Everything, Loss::ContentAlone];

fn disk() -> Option<(Disk, tempfile::TempDir)> {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk::mount(directory.path()).unwrap();
    if disk.is_none() {
        println!("skipped: no /dev/fuse");
    }
    Some((disk?, directory))
}

/// A power failure now, and the path of `name` after it.
fn fail(disk: &Disk, loss: Loss, name: &str) -> (Disk, tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let after = disk.after_power_failure(loss, directory.path()).unwrap().unwrap();
    let path = directory.path().join(name);
    (after, directory, path)
}

async fn insert(db: &Db, key: i64, is_durable: bool) -> Result<(), Error> {
    let job = move |connection: &mut rusqlite::Connection| {
        connection.execute("INSERT INTO t VALUES (?1, randomblob(2000))", [key]).map(drop)
    };
    if is_durable { db.call_durable(job).await } else { db.call(job).await }
}

/// The keys that a database has, which is sound.
async fn keys(path: &Path) -> Vec<i64> {
    let db = Db::open(path, TABLE).unwrap();
    db.call(|connection| {
        let sound: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
        assert_eq!(sound, "ok");
        connection.prepare("SELECT k FROM t ORDER BY k")?.query_map([], |row| row.get(0))?.collect()
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn a_durable_call_and_all_before_it_survive_also_while_the_log_is_copied() {
    let Some((disk, directory)) = disk() else { return };
    let db = Db::open(&directory.path().join("a.db"), TABLE).unwrap();
    let mut lost = 0;
    // Past two copies of the log, which is then begun anew.
    for round in 0..8_i64 {
        for key in 0..400 {
            insert(&db, round * 1000 + key, false).await.unwrap();
        }
        insert(&db, round * 1000 + 500, true).await.unwrap();
        insert(&db, round * 1000 + 600, false).await.unwrap();
        for loss in LOSSES {
            let (_after, _directory, path) = fail(&disk, loss, "a.db");
            let keys = keys(&path).await;
            let expected =
                (0..=round).flat_map(|round| (0..400).chain([500, 600]).map(move |key| round * 1000 + key));
            let expected: Vec<i64> = expected.collect();
            assert!(expected.starts_with(&keys), "something is missing in the middle");
            assert!(keys.contains(&(round * 1000 + 500)), "a durable call was lost in round {round}");
            lost += expected.len() - keys.len();
        }
    }
    assert!(lost > 0, "what was only committed was never lost: the disk loses nothing");
    let syncs = disk.syncs();
    assert!(
        syncs.iter().filter(|path| path.ends_with("a.db")).count() > 2,
        "the log was never copied: {syncs:?}"
    );
}

#[tokio::test]
async fn a_durable_call_needs_its_syncs() {
    for lost in ["a.db-wal", ""] {
        let Some((disk, directory)) = disk() else { return };
        disk.lose_syncs(move |path| path == Path::new(lost));
        let db = Db::open(&directory.path().join("a.db"), TABLE).unwrap();
        insert(&db, 1, true).await.unwrap();
        let mut is_lost = false;
        for loss in LOSSES {
            let (_after, _directory, path) = fail(&disk, loss, "a.db");
            is_lost |= !path.exists() || keys(&path).await != [1];
        }
        assert!(is_lost, "without the sync of {lost:?} nothing is lost: is it needed?");
    }
}

fn body(json: &str) -> Body {
    Body { version: 1, json: json.to_owned() }
}

#[tokio::test]
async fn the_record_of_a_paused_sandbox_survives_and_stays_gone() {
    let Some((disk, directory)) = disk() else { return };
    let ledger = Ledger::open(&directory.path().join("ledger.db")).unwrap();
    let (machine, nobody) = (VmId::random(), VmId::random());
    ledger.put_record(&machine, body("runs")).await.unwrap();
    let records = async |loss| {
        let (_after, _directory, path) = fail(&disk, loss, "ledger.db");
        Ledger::open(&path).unwrap().read().await.unwrap().1
    };
    assert!(ledger.move_record(&machine, &nobody, body("paused")).await.unwrap());
    for loss in LOSSES {
        assert_eq!(records(loss).await, [Record { owner: nobody.clone(), body: body("paused") }]);
    }
    // Killed while it is paused: nothing brings it back.
    assert!(ledger.strike_record(&nobody).await.unwrap());
    for loss in LOSSES {
        assert!(records(loss).await.is_empty());
    }
}

/// It is part of every snapshot's identity: one that is measured anew makes all of them useless.
#[test]
fn the_rate_of_the_counter_survives() {
    let Some((disk, directory)) = disk() else { return };
    let rate = kelvin_host::cpu::tsc_khz(&directory.path().join("tsc_khz")).unwrap();
    for loss in LOSSES {
        let (_after, _directory, path) = fail(&disk, loss, "tsc_khz");
        assert_eq!(std::fs::read_to_string(path).unwrap().trim(), rate.to_string());
    }
}

#[tokio::test]
async fn a_move_that_the_disk_does_not_confirm_has_not_happened() {
    let Some((disk, directory)) = disk() else { return };
    let ledger = Ledger::open(&directory.path().join("ledger.db")).unwrap();
    let (machine, nobody) = (VmId::random(), VmId::random());
    ledger.put_record(&machine, body("runs")).await.unwrap();
    disk.fail_syncs(|path| path.ends_with("ledger.db-wal"));
    let error = ledger.move_record(&machine, &nobody, body("paused")).await.unwrap_err();
    assert!(matches!(error, Error::Sync { .. }), "{error}");
    disk.fail_syncs(|_| false);
    let (_, records) = ledger.read().await.unwrap();
    assert_eq!(records, [Record { owner: machine, body: body("runs") }]);
}
