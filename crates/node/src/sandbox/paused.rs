//! A sandbox that is paused: a record and a snapshot, no machine.
//!
//! Only the record says that a snapshot may be resumed. A resume takes the record to the new machine in one
//! transaction, so each image is resumed once: what it was is never met by what its disk became. One gate for each
//! sandbox: whoever comes while it is being resumed waits for that and joins it.

use std::sync::atomic::AtomicBool;

use kelvin_api::id::VmId;
use tokio::sync::watch;

use crate::machine::console::Console;
use crate::sandbox::record::SandboxRecord;
use crate::snapshots::Lease;

/// A sandbox that is paused.
pub struct Paused {
    /// Under which the ledger has its record.
    pub owner: VmId,
    /// What is known of it; `snapshot` is what it is frozen in.
    pub record: SandboxRecord,
    /// Keeps that snapshot; none when its files are not there, which a resume then says.
    _lease: Option<Lease>,
    /// What was seen of its console.
    pub console: Console,
    pub gate: tokio::sync::Mutex<()>,
    /// Held by who ends it until that is on the disk: whoever wants the same meanwhile finds it done, or not.
    pub ending: tokio::sync::Mutex<()>,
    pub over: AtomicBool,
    /// Whether somebody wants it ended: a resume that is under way gives up.
    pub killed: watch::Sender<bool>,
}

impl Paused {
    /// The sandbox of `record`, which is in the ledger already.
    pub fn new(owner: VmId, record: SandboxRecord, lease: Option<Lease>, console: Console) -> Self {
        Self {
            owner,
            record,
            _lease: lease,
            console,
            gate: tokio::sync::Mutex::default(),
            ending: tokio::sync::Mutex::default(),
            over: AtomicBool::new(false),
            killed: watch::Sender::new(false),
        }
    }

    /// Waits until somebody wants it ended.
    pub async fn killed(&self) {
        let mut killed = self.killed.subscribe();
        // The sender is this one's.
        let _ = killed.wait_for(|killed| *killed).await;
    }
}
