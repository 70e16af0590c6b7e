//! Which stages of a build there are, which of them are needed, and what of them may be taken from a cache: pure.
//!
//! A stage begins with an earlier one or copies from it, and its own steps are the last one's: what is done can be said from the
//! end to the beginning, and is done from the beginning to the end. Steps are counted through all of them.

use kelvin_node_api::{Build, BuildFrom, BuildStep, Instruction};

/// Stages of one build, beside its own steps.
const MOST_STAGES: usize = 64;
/// Steps of one build, of all stages together.
const MOST_STEPS: usize = 1000;

/// A stage of a build.
#[derive(Debug, Clone, Copy)]
pub struct Stage<'a> {
    /// What it begins with.
    pub from: &'a BuildFrom,
    /// Its steps.
    pub steps: &'a [BuildStep],
    /// The number of the first of them.
    pub first: usize,
}

/// The earlier stage that `from` is, when it is one.
fn begun(from: &BuildFrom) -> Option<usize> {
    match from {
        BuildFrom::Stage(stage) => usize::try_from(*stage).ok(),
        _ => None,
    }
}

/// The stage that a step copies from, when it does.
pub fn copied(step: &BuildStep) -> Option<usize> {
    match &step.instruction {
        Instruction::CopyFrom { stage, .. } => usize::try_from(*stage).ok(),
        _ => None,
    }
}

impl Stage<'_> {
    /// The stage that it begins with, when it does.
    pub fn begins_with(&self) -> Option<usize> {
        begun(self.from)
    }
}

/// The stages of `build` in their order, its own steps as the last one.
///
/// # Errors
/// The step that names no earlier stage, or what there is too much of.
pub fn stages(build: &Build) -> Result<Vec<Stage<'_>>, (Option<usize>, String)> {
    if build.stages.len() > MOST_STAGES {
        return Err((None, format!("{} stages, {MOST_STAGES} are the most", build.stages.len())));
    }
    let parts = build.stages.iter().map(|stage| (&stage.from, &stage.steps[..]));
    let (mut all, mut first) = (Vec::new(), 0);
    for (at, (from, steps)) in parts.chain([(&build.from, &build.steps[..])]).enumerate() {
        let unknown = |stage: usize| format!("stage {at} names stage {stage}, which is no earlier one");
        if let Some(stage) = begun(from).filter(|stage| *stage >= at) {
            return Err((None, unknown(stage)));
        }
        for (index, step) in steps.iter().enumerate() {
            if let Some(stage) = copied(step).filter(|stage| *stage >= at) {
                return Err((Some(first + index), unknown(stage)));
            }
        }
        all.push(Stage { from, steps, first });
        first += steps.len();
    }
    if first > MOST_STEPS {
        return Err((None, format!("{first} steps, {MOST_STEPS} are the most")));
    }
    Ok(all)
}

/// Of each stage whether the last one needs it.
pub fn needed(stages: &[Stage<'_>]) -> Vec<bool> {
    let mut needed = vec![false; stages.len()];
    if let Some(last) = needed.last_mut() {
        *last = true;
    }
    for (at, stage) in stages.iter().enumerate().rev() {
        if needed[at] {
            for other in stage.steps.iter().filter_map(copied).chain(stage.begins_with()) {
                needed[other] = true;
            }
        }
    }
    needed
}

/// The stage whose base is the one of the stage `at`: its own, or that of what it begins with.
pub fn root(stages: &[Stage<'_>], mut at: usize) -> usize {
    while let Some(before) = stages[at].begins_with() {
        at = before;
    }
    at
}

/// Of each stage how many of its first steps may be taken from a cache: all before one that is forced, and before one that needs a
/// stage of which something is.
pub fn unforced(stages: &[Stage<'_>], force: bool) -> Vec<usize> {
    let mut all: Vec<usize> = Vec::with_capacity(stages.len());
    for stage in stages {
        let is_forced = |other: usize| all[other] < stages[other].steps.len();
        let count = match stage.begins_with() {
            _ if force => 0,
            Some(before) if is_forced(before) => 0,
            _ => {
                let forced = |step: &BuildStep| step.force || copied(step).is_some_and(is_forced);
                stage.steps.iter().position(forced).unwrap_or(stage.steps.len())
            }
        };
        all.push(count);
    }
    all
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kelvin_node_api::BuildStage;

    use super::*;

    fn run() -> BuildStep {
        let instruction = Instruction::Run { command: "a".to_owned(), user: None, argv: None };
        BuildStep { instruction, force: false, shown: String::new() }
    }

    fn copy(stage: u32) -> BuildStep {
        let (from, to) = ("/a".to_owned(), "/b".to_owned());
        let instruction = Instruction::CopyFrom { stage, from, to, owner: None, mode: None };
        BuildStep { instruction, ..run() }
    }

    fn build(mut all: Vec<(BuildFrom, Vec<BuildStep>)>) -> Build {
        let (from, steps) = all.pop().unwrap();
        Build {
            build: kelvin_api::id::BuildId::random(),
            template: "web".parse().unwrap(),
            project: kelvin_api::account::Project::default(),
            stages: all.into_iter().map(|(from, steps)| BuildStage { from, steps }).collect(),
            from,
            steps,
            force: false,
            start: None,
            ready: None,
            vcpus: None,
            memory_mib: None,
            disk_mib: None,
            min_free_mib: None,
            kernel: None,
            deadline: Duration::ZERO,
        }
    }

    #[test]
    fn what_nothing_needs_is_not_done() {
        let build = build(vec![
            (BuildFrom::Scratch, vec![run(), run()]),
            (BuildFrom::Scratch, vec![run()]),
            (BuildFrom::Stage(0), vec![run()]),
            (BuildFrom::Scratch, vec![run(), copy(2)]),
        ]);
        let stages = stages(&build).unwrap();
        assert_eq!(needed(&stages), [true, false, true, true]);
        assert_eq!(stages.iter().map(|stage| stage.first).collect::<Vec<_>>(), [0, 2, 3, 4]);
        assert_eq!([root(&stages, 2), root(&stages, 3)], [0, 3]);
        assert_eq!(unforced(&stages, false), [2, 1, 1, 2]);
        assert_eq!(unforced(&stages, true), [0; 4]);
    }

    #[test]
    fn what_is_forced_takes_what_needs_it_along() {
        let forced = BuildStep { force: true, ..run() };
        let build = build(vec![
            (BuildFrom::Scratch, vec![run(), forced]),
            (BuildFrom::Stage(0), vec![run()]),
            (BuildFrom::Scratch, vec![run(), copy(1), run()]),
        ]);
        assert_eq!(unforced(&stages(&build).unwrap(), false), [1, 0, 1]);
    }

    #[test]
    fn a_stage_names_earlier_ones_alone() {
        let of = |all| stages(&build(all)).map(|all| all.len());
        let scratch = || (BuildFrom::Scratch, vec![run()]);
        for (all, step) in [
            (vec![(BuildFrom::Stage(0), vec![])], None),
            (vec![(BuildFrom::Stage(1), vec![]), scratch()], None),
            (vec![scratch(), (BuildFrom::Scratch, vec![run(), copy(1)])], Some(2)),
            (vec![scratch(), (BuildFrom::Stage(u32::MAX), vec![])], None),
            (vec![(BuildFrom::Scratch, vec![]); MOST_STAGES + 2], None),
            (vec![(BuildFrom::Scratch, vec![run(); MOST_STEPS]), scratch()], None),
        ] {
            assert_eq!(of(all).unwrap_err().0, step);
        }
        assert_eq!(of(vec![scratch(), (BuildFrom::Stage(0), vec![copy(0)])]), Ok(2));
    }
}
