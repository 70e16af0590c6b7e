//! One golden snapshot for all servers of a run.
//!
//! ```text
//! <ground>/golden/lock    held while it is made or looked for
//!                data/    the data directory of a server that has ended: template `base`, baked
//!                id       the snapshot's id; there when all of it is
//! ```
//!
//! The first test that needs it bakes it as every other server would; [`Ground::baked`] brings it into each server's data
//! directory by `kelvin template adopt`: cloned, hashed and sealed there, so that what a test damages is its own. A server
//! of another identity (another VMM, no networks) does not use it and bakes. Tests that are about baking, or about a disk
//! of their own, take [`Ground::server`] and bake. Who writes: whoever holds the lock. A crash leaves no `id`, and the next
//! one begins anew.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;

use crate::{Ground, Server};

impl Ground {
    /// Starts a server called `name` whose template `base` is baked, with `waiting` VMMs.
    pub async fn baked(&self, name: &str, args: &[&str], waiting: u32) -> Server {
        let golden = self.golden().await;
        let data_dir = self.directory.join(name);
        fs::create_dir(&data_dir).expect("a fresh data directory");
        let mut server = self.prepared(None, data_dir, None);
        server.import_base();
        server.adopt(&golden);
        server.start(args).await;
        let id = server.bake(waiting).await;
        if !golden.ends_with(&id) {
            println!("{name}: baked, the run's golden snapshot is of another identity");
        }
        server
    }

    /// The directory of the run's golden snapshot.
    async fn golden(&self) -> PathBuf {
        let place = self.directory.join("golden");
        fs::create_dir_all(&place).expect("a directory");
        let lock = fs::File::create(place.join("lock")).expect("a lock");
        // Nothing else runs in this test; another's bake is waited for.
        lock.lock().expect("a lock");
        let (data_dir, note) = (place.join("data"), place.join("id"));
        let snapshot = |id: &str| data_dir.join("snapshots").join(id);
        if let Ok(id) = fs::read_to_string(&note) {
            return snapshot(&id);
        }
        let _ = fs::remove_dir_all(&data_dir);
        fs::create_dir(&data_dir).expect("a fresh data directory");
        let mut server = self.prepared(None, data_dir.clone(), None);
        server.begin(&["--waiting-vmms", "0", "--no-auto-bake"]).await;
        let id = server.bake(0).await;
        server.terminate().await;
        assert!(server.vmms().is_empty() && server.machines().is_empty(), "{}", server.log());
        // Its directory stays.
        server.stopped = true;
        fs::write(&note, &id).expect("a note");
        snapshot(&id)
    }
}

impl Server {
    /// Brings the snapshot in `golden` into the data directory; the server does not run. And the rate of the host's counter that
    /// it was baked with: a data directory keeps the one that was measured first, a second measurement may be 1 kHz off, and
    /// then nothing of another directory is of its identity.
    fn adopt(&self, golden: &std::path::Path) {
        let rate =
            golden.ancestors().nth(2).map(|data| data.join("run/tsc_khz")).filter(|rate| rate.exists());
        if let Some(rate) = rate {
            let kept = self.data_dir.join("run/tsc_khz");
            fs::create_dir_all(self.data_dir.join("run")).expect("a directory");
            fs::copy(rate, &kept).expect("a rate");
        }
        let mut adopt = self.command();
        adopt.args(["template", "adopt", "--data-dir"]).arg(&self.data_dir).arg(golden);
        let status = adopt.stdout(Stdio::null()).status().expect("kelvin starts");
        assert!(status.success(), "template adopt: {status}");
    }
}
