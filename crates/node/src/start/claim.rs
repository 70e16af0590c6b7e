//! *claim*: a warm machine of exactly the snapshot that is wanted becomes the sandbox.

use std::sync::Arc;
use std::time::Duration;

use kelvin_api::error::chain;
use kelvin_api::phase::Phase;
use kelvin_api::sandbox::StartPath;
use tracing::Instrument;

use crate::error::Error;
use crate::pool::shelf::{Parked, Pool};
use crate::start::attempt::{Attempt, Started};

/// How long a claim of a warm machine may take before the next way is tried.
const CLAIM: Duration = Duration::from_secs(3);

impl Attempt<'_> {
    /// Claims a machine that is parked for exactly this snapshot. One that does not answer is ended, and the next tried.
    pub async fn warm(&mut self, pool: &Arc<Pool>) -> Option<Started> {
        let claimed = loop {
            let (taken, dead) = pool.take_warm();
            for corpse in dead {
                tracing::warn!(vm = %corpse.home.spec.vm, "a warm machine had died");
                self.inner.discard_parked_later(corpse);
            }
            let Some(parked) = taken else { break None };
            match self.claim_parked(pool, parked).await {
                Ok(started) => break Some(started),
                Err(error) => {
                    pool.spoilt();
                    tracing::warn!(snapshot = %pool.snapshot_id(), error = chain(&error), "a warm machine did not answer");
                }
            }
        };
        pool.wanted(claimed.is_some());
        self.inner.pools.look();
        claimed
    }

    pub async fn claim_parked(&mut self, pool: &Arc<Pool>, parked: Parked) -> Result<Started, Error> {
        let Parked { home, paused, mut control, lease, mac, hold, .. } = parked;
        // What it held as a parked machine; the sandbox holds the same already.
        drop(hold);
        let key = paused.key();
        let mut record = self.record(StartPath::Warm);
        record.mac = mac;
        record.snapshot = Some(pool.snapshot_id());
        record.lineage = record.snapshot.clone();
        self.lap(Phase::Vmm);
        let work = async {
            // Pages that it has not touched yet are still read from the snapshot.
            pool.snapshot.check_seal()?;
            self.rule(&home.spec, true).await?;
            let span = self.begin(Phase::Resume);
            let resumed = async {
                let asked = control.post(&self.activation_request(&record)?).await?;
                let running = paused.resume().await.map_err(|(_, error)| error)?;
                Ok::<_, Error>((asked, running))
            };
            let (asked, running) = resumed.instrument(span).await?;
            self.lap(Phase::Resume);
            self.activated(&running, &mut control, asked).await?;
            Ok::<_, Error>((running, control))
        };
        // The claim is also the probe: a VMM that is stuck must not hold up a create that could be a clone.
        let claimed = tokio::time::timeout(CLAIM, work).await.unwrap_or_else(|_| {
            let detail = "the machine did not answer".to_owned();
            Err(kelvin_vmm::Error::Deadline { what: "claiming a warm machine", after: CLAIM, detail }.into())
        });
        match claimed {
            Ok((running, control)) => {
                let identity = pool.snapshot.manifest.identity.clone();
                Ok(Started { spec: home.spec, running, control, record, identity, lease })
            }
            Err(error) => {
                if let Error::Store(kelvin_store::Error::Seal { .. }) = &error {
                    pool.refuse(error.to_string());
                }
                self.inner.allocator.release_or_log(&home.spec, Some(key)).await;
                Err(error)
            }
        }
    }
}
