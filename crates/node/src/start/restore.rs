//! *clone*: a snapshot is restored into a VMM that waited for it, or that is started for it.

use std::sync::Arc;

use kelvin_api::phase::Phase;
use kelvin_api::sandbox::StartPath;
use tracing::Instrument;

use crate::error::Error;
use crate::pool::shelf::{Pool, Ready};
use crate::start::attempt::{Attempt, Started, held_for, lineage};
use crate::start::turns::TURN;

impl Attempt<'_> {
    /// Restores the pool's snapshot; whether a VMM waited for it. A failure is the reason why it has to be a boot.
    pub async fn clone(&mut self, pool: &Arc<Pool>) -> Result<(Started, bool), Error> {
        let span = self.begin(Phase::Queue);
        let turn = async {
            tokio::select! {
                biased;
                turn = self.inner.turns.take(&self.request.project) => turn,
                error = self.given_up() => Err(error),
            }
        };
        let turn = turn.instrument(span).await?;
        self.lap(Phase::Queue);
        let span = self.begin(Phase::Vmm);
        let (ready, waited) = self.claim(pool).instrument(span).await?;
        self.lap(Phase::Vmm);
        let held = (turn, self.working.take());
        let started = held_for(TURN, held, self.restore(pool, ready)).await;
        match started {
            Ok(started) => Ok((started, waited)),
            Err(Error::Store(error @ kelvin_store::Error::Seal { .. })) => {
                pool.refuse(error.to_string());
                Err(error.into())
            }
            Err(error) => Err(error),
        }
    }

    pub async fn claim(&self, pool: &Arc<Pool>) -> Result<(Ready, bool), Error> {
        let (taken, dead) = pool.take();
        for corpse in dead {
            tracing::warn!(vm = %corpse.home.spec.vm, stderr = corpse.waiting.stderr(), "a waiting VMM had died");
            self.inner.discard(corpse).await;
        }
        match taken {
            Some(mut ready) => {
                // The sandbox holds the same already.
                drop(ready.hold.take());
                Ok((ready, true))
            }
            None => Ok((self.inner.prepare(pool, None).await?, false)),
        }
    }

    pub async fn restore(&mut self, pool: &Arc<Pool>, ready: Ready) -> Result<Started, Error> {
        let Ready { home, waiting, mut control, .. } = ready;
        let key = waiting.key();
        let mut record = self.record(StartPath::Clone);
        let (id, manifest) = (pool.snapshot_id(), &pool.snapshot.manifest);
        if record.lineage.is_none() {
            record.lineage = lineage(&pool.snapshot);
        }
        record.snapshot = Some(id.clone());
        let lease = self.inner.snapshots.lease(&id);
        if lease.is_none() {
            // Deleted since it was looked up.
            self.inner.allocator.release_or_log(&home.spec, Some(key)).await;
            return Err(kelvin_store::Error::Missing { kind: "snapshot", name: id.to_string() }.into());
        }
        let work = async {
            let span = self.begin(Phase::Load);
            let paused = async {
                // Memory over another disk, or a file that was touched, must not get further than this.
                pool.snapshot.check_seal()?;
                let state = pool.snapshot.file("state");
                let loading = async { waiting.load(&state).await.map_err(|(_, error)| Error::from(error)) };
                // Beside each other: the machine is in the ledger already, and nothing runs in it yet.
                let (paused, ()) = tokio::try_join!(loading, self.declare(&home.spec, &record))?;
                Ok::<_, Error>(paused)
            };
            let paused = paused.instrument(span).await?;
            if self.source.image().is_some() {
                self.hardware(&home.spec, &mut record).await?;
            }
            self.lap(Phase::Load);
            self.rule(&home.spec, false).await?;
            let span = self.begin(Phase::Resume);
            let resumed = async {
                // Posted while the vCPUs stand still: the guest wakes up once, with its identity at hand.
                let asked = control.post(&self.activation_request(&record)?).await?;
                let running = paused.resume().await.map_err(|(_, error)| error)?;
                Ok::<_, Error>((asked, running))
            };
            let (asked, running) = resumed.instrument(span).await?;
            self.lap(Phase::Resume);
            self.activated(&running, &mut control, asked).await?;
            // A paused sandbox's snapshot is restored once.
            if self.source.resumed().is_none() {
                running.learn();
            }
            Ok::<_, Error>((running, control))
        };
        match work.await {
            Ok((running, control)) => {
                let identity = manifest.identity.clone();
                Ok(Started { spec: home.spec, running, control, record, identity, lease })
            }
            Err(error) => {
                self.inner.allocator.release_or_log(&home.spec, Some(key)).await;
                Err(error)
            }
        }
    }
}
