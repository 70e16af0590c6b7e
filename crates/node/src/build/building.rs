//! One build on its way: what its parts (`entry`, `base`, `steps`) share, and how they refuse. The machines that it holds are in the
//! ledger.

use std::collections::BTreeMap;
use std::sync::Arc;

use kelvin_api::error::{ErrorCode, Failure};
use kelvin_node_api::Build;
use kelvin_store::uploads::Files;

use crate::build::log::Log;
use crate::build::machine::BuildMachine;
use crate::build::plan::{BuildState, Planned, plan};
use crate::build::registry::{Stop, Underway};
use crate::build::stages::Stage;
use crate::error::Error;
use crate::state::Inner;

/// Size of a disk when nobody has said one: it is sparse, and an image that needs more says so.
pub(super) const DISK_MIB: u32 = 4096;
/// A build that fails: of which step, and why.
#[derive(Debug)]
pub struct StepError {
    /// Counted from 0.
    pub step: Option<u32>,
    /// Why.
    pub error: Error,
}

impl From<Error> for StepError {
    fn from(error: Error) -> Self {
        Self { step: None, error }
    }
}

/// One build on its way.
pub struct Building<'a> {
    pub(super) inner: &'a Arc<Inner>,
    pub(super) request: &'a Build,
    pub(super) underway: &'a Underway,
    pub(super) stop: &'a Stop,
    pub(super) log: Log,
    /// What each step copies that was uploaded.
    pub(super) uploads: BTreeMap<usize, Files>,
    /// Of the stage that is being done.
    pub(super) machine: Option<BuildMachine>,
    /// Has the disk of a stage that is copied from, by its number.
    pub(super) source: Option<(usize, BuildMachine)>,
}

pub(super) fn refused(code: ErrorCode, text: impl Into<String>, remediation: &str) -> Error {
    Error::Build(Box::new(Failure::new(code, text, remediation)))
}

/// Does what blocks. It goes on when nobody waits for it any more.
pub(super) async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, kelvin_store::Error> + Send + 'static,
) -> Result<T, Error> {
    let done = kelvin_host::blocking::spawn(work).await;
    Ok(done.map_err(|error| Error::Io { what, source: std::io::Error::other(error) })??)
}

pub(super) fn bad_step(step: Option<usize>, why: String) -> StepError {
    let error = refused(ErrorCode::InvalidStep, why, "change the step, or the stage");
    StepError { step: step.and_then(at), error }
}

/// Plans a stage whose base is known.
pub(super) fn planned(
    stage: Stage<'_>,
    base: (&str, &BuildState),
    digests: &BTreeMap<usize, String>,
) -> Result<Vec<Planned>, StepError> {
    plan(base.0, base.1, stage.steps, digests)
        .map_err(|(step, why)| bad_step(step.map(|at| stage.first + at), why))
}

pub(super) fn at(step: usize) -> Option<u32> {
    u32::try_from(step).ok()
}

impl<'a> Building<'a> {
    /// Nothing is done yet.
    pub fn new(inner: &'a Arc<Inner>, request: &'a Build, underway: &'a Underway, log: Log) -> Self {
        let stop = &*underway.stop;
        Self { inner, request, underway, stop, log, uploads: BTreeMap::new(), machine: None, source: None }
    }

    /// Ends what runs for a stage.
    pub(super) async fn end_machines(&mut self) {
        if let Some(machine) = self.machine.take() {
            machine.end().await;
        }
        if let Some((_, machine)) = self.source.take() {
            machine.end().await;
        }
    }
}
