//! *commit*: the sandbox is recorded, owned and visible. What fails here is released as before.

use crate::error::Error;
use crate::machine::console::Console;
use crate::sandbox::actor::Machine;
use crate::sandbox::handle::body;
use crate::sandbox::record::{Event, SandboxRecord, next};
use crate::start::attempt::{Attempt, Started};

impl Attempt<'_> {
    pub async fn commit(&mut self, started: Started) -> Result<SandboxRecord, Error> {
        let Started { spec, running, control, mut record, identity, lease } = started;
        let event = if self.source.resumed().is_some() { Event::Resume } else { Event::Ready };
        if let Some(state) = next(record.state, event) {
            record.state = state;
        }
        let remembered = match self.source.resumed() {
            // From here on its image is used up.
            Some(paused) => match body(&record) {
                Ok(body) => {
                    match self.inner.allocator.ledger.move_record(&paused.owner, &spec.vm, body).await {
                        Ok(true) => Ok(()),
                        // It was killed meanwhile.
                        Ok(false) => Err(Error::Unknown(record.sandbox.to_string())),
                        Err(error) => Err(error.into()),
                    }
                }
                Err(error) => Err(error),
            },
            None => {
                record.started_at = self.inner.clock.wall();
                self.inner.remember(&spec, &record).await
            }
        };
        if let Err(error) = remembered {
            self.inner.allocator.release_or_log(&spec, Some(running.key())).await;
            return Err(error);
        }
        self.inner.own(Machine {
            spec,
            running,
            control,
            record: record.clone(),
            identity: Some(identity),
            lease,
            console: self
                .source
                .resumed()
                .map_or_else(Console::default, |paused| paused.console.on_another_machine()),
            hold: self.hold.take(),
        });
        if self.source.resumed().is_some() {
            self.inner.changes.is(record.live());
        }
        Ok(record)
    }
}
