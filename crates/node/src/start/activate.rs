//! *activate*: one round trip that makes a machine the sandbox that is asked for. Its reply is what "ready" means.

use kelvin_api::guest::{Activation, Request};
use kelvin_api::phase::Phase;
use kelvin_vmm::Running;
use kelvin_vmm::control::{Asked, Control};
use tracing::Instrument;

use crate::error::Error;
use crate::machine::clock::{random_bytes, sync_clock, wake, wall_clock_ns};
use crate::sandbox::record::SandboxRecord;
use crate::start::attempt::{Attempt, ended};
use crate::start::source::{FromSnapshot, StartSource, Way, Who};

impl Attempt<'_> {
    pub async fn activated(
        &mut self,
        running: &Running,
        control: &mut Control,
        asked: Asked,
    ) -> Result<(), Error> {
        let span = self.begin(Phase::Activate);
        let (limit, clock) = (self.inner.options.activate_deadline, self.inner.clock.clone());
        let answered = async {
            let done = control.wait("activation", asked, limit).await?;
            sync_clock(&clock, control, done, limit).await?;
            Ok::<_, Error>(done)
        };
        let answered = async {
            tokio::select! {
                biased;
                done = answered => done,
                end = running.ended() => Err(ended("activating", running, end).await),
                error = self.given_up() => Err(error),
            }
        };
        let done = answered.instrument(span).await?;
        self.lap(Phase::Activate);
        tracing::debug!(worked = ?done.worked, "the agent was activated");
        Ok(())
    }

    /// What the machine of `record` is told when it wakes up.
    pub fn activation_request(&self, record: &SandboxRecord) -> Result<Request, Error> {
        match self.source {
            StartSource::Snapshot(FromSnapshot { who: Who::Itself(_), way: Way::Restore, .. }) => {
                Ok(Request::Wake(wake(&self.inner.clock, true)?))
            }
            StartSource::Template(_) | StartSource::Snapshot(_) => {
                Ok(Request::Activate(self.activation(record.mac)?))
            }
        }
    }

    /// What makes a machine the sandbox that is asked for. The clock is read last: the frame leaves at once.
    pub fn activation(&self, mac: Option<[u8; 6]>) -> Result<Activation, Error> {
        let request = self.request;
        let token = request.access_token.as_ref().map(|token| token.expose().to_owned());
        Ok(Activation {
            sandbox_id: request.sandbox.to_string(),
            template: self.template.to_string(),
            hostname: request.sandbox.to_string(),
            machine_id: self.machine_id,
            boot_id: random_bytes()?,
            mac: mac.unwrap_or_default(),
            entropy: random_bytes()?,
            access_token: token.unwrap_or_default(),
            env_vars: request.env_vars.clone(),
            wall_clock_ns: wall_clock_ns(&self.inner.clock),
        })
    }
}
