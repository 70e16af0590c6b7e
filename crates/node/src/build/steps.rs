//! The stages of a build: planned from the first to the last, looked up in the cache from the last to the first, and what is left is
//! done from the first to the last.
//!
//! ```text
//! plan:  key of each state ─> look up: last state that is cached, and whether an earlier stage is needed for the rest
//!        ─> do: base or earlier stage ─> machine: step ─> layer, … ; a copy from a stage: a second machine, on its disk
//! ```

use std::collections::BTreeMap;

use kelvin_api::units::{MemoryMib, Shape};
use kelvin_node_api::Instruction;
use kelvin_store::image::Guest;
use kelvin_store::layers::Layer;

use crate::build::base::{Base, Disk};
use crate::build::building::{Building, StepError, at, planned};
use crate::build::copy_from::of_stage;
use crate::build::machine::{BuildMachine, Ground};
use crate::build::plan::{BuildState, Planned, last_key};
use crate::build::run::{Doing, Source, write_defaults};
use crate::build::stages::{Stage, copied, root};
use crate::error::Error;

/// Memory of a machine that only packs files.
const PACKING: MemoryMib = MemoryMib(512);

/// A stage as it is planned.
pub(super) struct StagePlan {
    /// Its own base; none when it begins with another stage.
    base: Option<Base>,
    /// Of what it begins with.
    key: String,
    begin: BuildState,
    told: BuildState,
    guest: Guest,
    planned: Vec<Planned>,
    /// Of the first steps.
    may_be_cached: usize,
    /// Whether its disk is needed.
    wanted: bool,
    /// The last state that is cached, and how many steps it has behind it.
    start: Option<(Layer, usize)>,
    /// How many steps are not done.
    cached: usize,
}

impl StagePlan {
    fn state(&self) -> &BuildState {
        self.planned.last().map_or(&self.begin, |planned| &planned.state)
    }

    /// What is set in the end, and the guest.
    pub(super) fn end(&self) -> (BuildState, Guest) {
        (self.state().clone(), self.guest.clone())
    }

    /// The key of its last state.
    fn last_key(&self) -> &str {
        self.planned.last().map_or(&self.key, |planned| &planned.key)
    }

    /// The key of its disk.
    fn disk_key(&self) -> &str {
        let changed = self.planned.iter().rev().find(|planned| planned.needs_machine);
        changed.map_or(&self.key, |planned| &planned.key)
    }
}

/// Does `work` in a machine, unless that or the one that is copied from ends by itself meanwhile.
async fn in_machine<T>(
    machine: &BuildMachine,
    source: Option<&(usize, BuildMachine)>,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let source_ended = async {
        match source {
            Some((stage, source)) => of_stage(*stage, source.ended().await),
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        done = work => done,
        error = source_ended => Err(error),
        error = machine.ended() => Err(error),
    }
}

/// The stage whose disk a stage ends with: its own, or that of what it begins with.
fn owner(stages: &[Stage<'_>], disks: &[Option<Disk>], mut at: usize) -> usize {
    while disks[at].is_none()
        && let Some(before) = stages[at].begins_with()
    {
        at = before;
    }
    at
}

impl Building<'_> {
    /// Plans the stage `number`; those before are planned.
    pub(super) async fn plan_stage(
        &self,
        stages: &[Stage<'_>],
        number: usize,
        plans: &[Option<StagePlan>],
        may_be_cached: usize,
    ) -> Result<StagePlan, StepError> {
        let stage = stages[number];
        let before = stage.begins_with().and_then(|before| plans[before].as_ref());
        let (base, key, begin, told, guest) = match before {
            Some(before) => {
                let (state, guest) = before.end();
                (None, before.last_key().to_owned(), state, before.told.clone(), guest)
            }
            None => {
                let decides = root(stages, stages.len() - 1) == number;
                let base = self.find_base(stage.from, decides).await?;
                let (key, state, told) = (base.key.clone(), base.state.clone(), base.told.clone());
                let guest = base.guest.clone();
                (Some(base), key, state, told, guest)
            }
        };
        let mut digests = BTreeMap::new();
        for (index, step) in stage.steps.iter().enumerate() {
            let files = self.uploads.get(&(stage.first + index)).map(|files| files.digest().to_owned());
            let disk =
                copied(step).and_then(|from| plans[from].as_ref()).map(|plan| plan.disk_key().to_owned());
            digests.extend(files.or(disk).map(|digest| (index, digest)));
        }
        let planned = planned(stage, (&key, &begin), &digests)?;
        let (wanted, start, cached) = (false, None, 0);
        Ok(StagePlan { base, key, begin, told, guest, planned, may_be_cached, wanted, start, cached })
    }

    /// Says of each stage whether its disk is needed, and from where it goes on.
    async fn look_up(&self, stages: &[Stage<'_>], plans: &mut [Option<StagePlan>]) -> Result<(), Error> {
        if let Some(Some(last)) = plans.last_mut() {
            last.wanted = true;
        }
        for (number, stage) in stages.iter().enumerate().rev() {
            let (earlier, rest) = plans.split_at_mut(number);
            let Some(plan) = rest[0].as_mut() else { continue };
            if !plan.wanted {
                plan.cached = plan.planned.len();
                continue;
            }
            for index in (0..plan.may_be_cached).rev() {
                let planned = &plan.planned[index];
                if planned.needs_machine
                    && let Some(layer) = self.find_layer(&planned.key).await?
                {
                    plan.start = Some((layer, index + 1));
                    break;
                }
            }
            let done = plan.start.as_ref().map_or(0, |(_, done)| *done);
            let rest = plan.planned.iter().enumerate().take(plan.may_be_cached).skip(done);
            let mut left = rest.filter(|(_, planned)| planned.needs_machine).map(|(at, _)| at);
            plan.cached = left.next().unwrap_or(plan.may_be_cached);
            let begins = stage.begins_with().filter(|_| done == 0);
            for other in stage.steps[done..].iter().filter_map(copied).chain(begins) {
                if let Some(other) = &mut earlier[other] {
                    other.wanted = true;
                }
            }
        }
        Ok(())
    }

    /// Takes what is cached and does the rest. The disk in the end, which has been told of the defaults, and how many steps were
    /// not done again.
    pub(super) async fn do_stages(
        &mut self,
        stages: &[Stage<'_>],
        mut plans: Vec<Option<StagePlan>>,
        last: &BuildState,
        shape: Shape,
    ) -> Result<(Disk, u32), StepError> {
        let count = |all: &mut dyn Iterator<Item = usize>| at(all.sum()).unwrap_or(u32::MAX);
        let end = stages.len() - 1;
        let mut final_key = None;
        // What the disk has been told of is what it has to be told.
        if let Some(plan) = plans[end].as_ref().filter(|plan| plan.told.defaults() != last.defaults()) {
            let key = last_key(plan.last_key(), last);
            if plan.may_be_cached == plan.planned.len()
                && let Some(layer) = self.find_layer(&key).await?
            {
                let steps = count(&mut plans.iter().flatten().map(|plan| plan.planned.len()));
                self.log.note(&format!("{steps} steps are cached")).await;
                return Ok((Disk::Layer(layer), steps));
            }
            final_key = Some(key);
        }
        self.look_up(stages, &mut plans).await?;
        // A stage's machine has the guest of its own base, whoever copies from it.
        let guests: Vec<Option<Guest>> =
            plans.iter().map(|plan| plan.as_ref().map(|plan| plan.guest.clone())).collect();
        let mut disks: Vec<Option<Disk>> = stages.iter().map(|_| None).collect();
        for number in 0..stages.len() {
            let Some(plan) = plans[number].as_mut().filter(|plan| plan.wanted) else { continue };
            Box::pin(self.do_stage(stages, number, (&mut *plan, &guests), &mut disks, shape)).await?;
            if number == end
                && let Some(key) = &final_key
            {
                self.log.begin(None);
                self.ensure_machine(stages, number, &plan.guest, &disks, shape).await?;
                if let Some(machine) = &mut self.machine {
                    let told = in_machine(machine, None, write_defaults(&machine.processes, last));
                    Box::pin(self.stop.unless(told)).await?;
                    let kept = machine.keep(&self.inner.layers, key);
                    disks[number] = Some(Disk::Layer(Box::pin(self.stop.unless(kept)).await?));
                }
            }
            self.end_machines().await;
        }
        let cached = count(&mut plans.iter().flatten().map(|plan| plan.cached));
        let owner = owner(stages, &disks, end);
        match disks[owner].take() {
            Some(disk) => Ok((disk, cached)),
            None => Err(Error::Io { what: "building", source: std::io::ErrorKind::NotFound.into() }.into()),
        }
    }

    /// Boots the machine of the stage `number`, unless it runs.
    async fn ensure_machine(
        &mut self,
        stages: &[Stage<'_>],
        number: usize,
        guest: &Guest,
        disks: &[Option<Disk>],
        shape: Shape,
    ) -> Result<(), Error> {
        if self.machine.is_none() {
            self.machine = self.boot(stages, number, guest, disks, shape, true).await?;
        }
        Ok(())
    }

    /// Boots a machine on the disk of the stage `number`.
    async fn boot(
        &self,
        stages: &[Stage<'_>],
        number: usize,
        guest: &Guest,
        disks: &[Option<Disk>],
        shape: Shape,
        network: bool,
    ) -> Result<Option<BuildMachine>, Error> {
        let Some(disk) = &disks[owner(stages, disks, number)] else { return Ok(None) };
        let ground = Ground {
            template: self.request.template.clone(),
            guest: guest.digest.clone(),
            disk: disk.path(self.inner),
            shape,
            network,
        };
        Ok(Some(Box::pin(BuildMachine::start(self.inner, ground, self.stop)).await?))
    }

    /// Has the machine run that a copy from the stage `from` reads.
    async fn ensure_source(
        &mut self,
        stages: &[Stage<'_>],
        from: usize,
        guest: &Guest,
        disks: &[Option<Disk>],
        shape: Shape,
    ) -> Result<(), Error> {
        if self.source.as_ref().is_some_and(|(stage, _)| *stage == from) {
            return Ok(());
        }
        if let Some((_, former)) = self.source.take() {
            former.end().await;
        }
        let shape = Shape { vcpus: 1, memory_mib: shape.memory_mib.min(PACKING), ..shape };
        let booted = self.boot(stages, from, guest, disks, shape, false).await;
        self.source = booted.map_err(|error| of_stage(from, error))?.map(|machine| (from, machine));
        Ok(())
    }

    /// Does the steps of the stage `number` that are not cached; its disk is in `disks` then, unless it is that of what it begins
    /// with.
    async fn do_stage(
        &mut self,
        stages: &[Stage<'_>],
        number: usize,
        (plan, guests): (&mut StagePlan, &[Option<Guest>]),
        disks: &mut [Option<Disk>],
        shape: Shape,
    ) -> Result<(), StepError> {
        self.log.begin(None);
        if stages.len() > 1 {
            self.log.note(&format!("stage {number}, of {} in all", stages.len())).await;
        }
        let stage = stages[number];
        let mut done = 0;
        if let Some((layer, steps)) = plan.start.take() {
            (disks[number], done) = (Some(Disk::Layer(layer)), steps);
        } else if let Some(base) = &plan.base {
            disks[number] = Some(self.make_base(base).await?);
        }
        for (index, planned) in plan.planned.iter().enumerate() {
            let (step, counted) = (&stage.steps[index], stage.first + index);
            self.log.begin(at(counted));
            let kept = if index < plan.cached { "cached: " } else { "" };
            self.log.note(&format!("{kept}{}", step.shown)).await;
            if index < done || !planned.needs_machine {
                continue;
            }
            if let Instruction::CopyFrom { .. } = step.instruction
                && let Some(from) = copied(step)
                && let Some(guest) = &guests[from]
            {
                self.ensure_source(stages, from, guest, disks, shape).await?;
            }
            self.ensure_machine(stages, number, &plan.guest, disks, shape).await?;
            let Some(machine) = &mut self.machine else { continue };
            let before = match index {
                0 => &plan.begin,
                _ => &plan.planned[index - 1].state,
            };
            let source = self.source.as_ref().filter(|(stage, _)| copied(step) == Some(*stage));
            let reads =
                source.map(|(stage, machine)| Source { stage: *stage, processes: &machine.processes });
            let files = self.uploads.get(&counted);
            let doing = Doing { step, before, after: &planned.state, files, source: reads };
            let ran = in_machine(machine, source, doing.run(&machine.processes, &mut self.log));
            Box::pin(self.stop.unless(ran)).await?;
            let kept = machine.keep(&self.inner.layers, &planned.key);
            disks[number] = Some(Disk::Layer(Box::pin(self.stop.unless(kept)).await?));
        }
        Ok(())
    }
}
