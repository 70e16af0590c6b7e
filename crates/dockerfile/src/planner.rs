//! From instructions to a plan: stages are found by name, and those that the target does not need are not looked at.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use crate::command;
use crate::error::{Error, Fault, shortened};
use crate::expand::{Lookup, MOST_VALUE, Scope};
use crate::instruction::{self, Instruction, Located};
use crate::lines;
use crate::plan::{Action, Healthcheck, Options, Plan, Stage, StageFrom, Step};
use crate::stage::{Args, State};
use crate::text::Text;

/// The most stages of a Dockerfile.
const MOST_STAGES: usize = 128;
/// What is built, and where.
const PLATFORM: [(&str, &str); 8] = [
    ("BUILDPLATFORM", "linux/amd64"),
    ("BUILDOS", "linux"),
    ("BUILDARCH", "amd64"),
    ("BUILDVARIANT", ""),
    ("TARGETPLATFORM", "linux/amd64"),
    ("TARGETOS", "linux"),
    ("TARGETARCH", "amd64"),
    ("TARGETVARIANT", ""),
];
/// Ways to write it.
const PLATFORMS: [&str; 5] = ["linux/amd64", "linux/x86_64", "linux", "amd64", "x86_64"];

/// A Dockerfile that has been read.
#[derive(Debug)]
pub struct Dockerfile {
    escape: char,
    globals: Vec<Located>,
    stages: Vec<Written>,
}

#[derive(Debug)]
struct Written {
    /// FROM.
    from: Located,
    image: String,
    platform: Option<String>,
    name: Option<String>,
    body: Vec<Located>,
}

impl Dockerfile {
    /// Reads a Dockerfile.
    ///
    /// # Errors
    /// With the line of the first instruction that is not one, or is not written as it should be.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let lines = lines::read(text)?;
        let escape = lines.escape;
        let mut file = Self { escape, globals: Vec::new(), stages: Vec::new() };
        for located in instruction::read(lines)? {
            file.add(located)?;
        }
        if file.stages.is_empty() {
            return Err(Fault::syntax("the Dockerfile has no FROM").at(0, ""));
        }
        Ok(file)
    }

    fn add(&mut self, located: Located) -> Result<(), Error> {
        if let Instruction::From { image, platform, name } = &located.instruction {
            let (image, platform, name) = (image.clone(), platform.clone(), name.clone());
            if let Some(name) = &name
                && self.stages.iter().any(|stage| stage.name.as_ref() == Some(name))
            {
                return Err(located.fault(Fault::syntax(format!("another stage has the name {name}"))));
            }
            if self.stages.len() == MOST_STAGES {
                let limit = MOST_STAGES as u64;
                return Err(located.fault(Fault::TooLarge { what: "the Dockerfile in stages", limit }));
            }
            self.stages.push(Written { from: located, image, platform, name, body: Vec::new() });
            return Ok(());
        }
        match (self.stages.last_mut(), &located.instruction) {
            (Some(stage), _) => stage.body.push(located),
            (None, Instruction::Arg(_)) => self.globals.push(located),
            (None, _) => return Err(located.fault(Fault::syntax("only ARG may come before the first FROM"))),
        }
        Ok(())
    }

    /// What it asks for.
    ///
    /// # Errors
    /// With the line of the first instruction that cannot be done: it is not supported, a variable's use is wrong, a stage is
    /// not there. Stages that the target does not need are not looked at.
    pub fn plan(&self, options: &Options) -> Result<Plan, Error> {
        let mut planner = Planner {
            file: self,
            options,
            globals: self.globals(options)?,
            plan: Vec::new(),
            states: Vec::new(),
            visits: vec![Visit::Not; self.stages.len()],
            images: BTreeMap::new(),
        };
        let target = planner.visit(self.target(options)?)?;
        let (stages, states) = (planner.plan, planner.states);
        let config = states.get(target).map(|state| state.config.clone()).unwrap_or_default();
        let ready = match &config.healthcheck {
            Some(Healthcheck::Command { argv, .. }) => Some(command::check(argv)),
            Some(Healthcheck::Disabled) | None => None,
        };
        let warnings = self.unused(options);
        let mut plan = Plan { stages, target, start: None, ready, config, warnings };
        plan.start = plan.start_of(&[], &[]);
        Ok(plan)
    }

    /// Values that FROM sees.
    fn globals(&self, options: &Options) -> Result<BTreeMap<String, String>, Error> {
        let mut globals: BTreeMap<String, String> =
            PLATFORM.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        for located in &self.globals {
            let Instruction::Arg(pairs) = &located.instruction else { continue };
            for (name, default) in pairs {
                let value = match (options.args.get(name), default) {
                    (Some(given), _) => given.clone(),
                    (None, Some(default)) => {
                        self.expanded(default, &globals).map_err(|fault| located.fault(fault))?
                    }
                    (None, None) => continue,
                };
                globals.insert(name.clone(), value);
            }
        }
        Ok(globals)
    }

    fn expanded(&self, word: &str, globals: &BTreeMap<String, String>) -> Result<String, Fault> {
        let text = Text::read(word, self.escape)?.expand(&Globals(globals), MOST_VALUE)?;
        Ok(text.literal().unwrap_or_default().to_owned())
    }

    fn target(&self, options: &Options) -> Result<usize, Error> {
        let Some(target) = &options.target else { return Ok(self.stages.len() - 1) };
        let found = self.named(target).or_else(|| target.parse().ok().filter(|at| *at < self.stages.len()));
        found.ok_or_else(|| Fault::NoStage { name: target.clone() }.at(0, ""))
    }

    fn named(&self, name: &str) -> Option<usize> {
        self.stages
            .iter()
            .position(|stage| stage.name.as_deref().is_some_and(|known| known.eq_ignore_ascii_case(name)))
    }

    /// Values that no ARG asks for.
    fn unused(&self, options: &Options) -> Vec<String> {
        let bodies = self.stages.iter().flat_map(|stage| &stage.body);
        let asked = self.globals.iter().chain(bodies).filter_map(|located| match &located.instruction {
            Instruction::Arg(pairs) => Some(pairs.iter().map(|(name, _)| name.as_str())),
            _ => None,
        });
        let asked: BTreeSet<&str> = asked.flatten().collect();
        let unused = options
            .args
            .keys()
            .filter(|name| !asked.contains(name.as_str()) && !name.to_ascii_uppercase().ends_with("_PROXY"));
        unused.map(|name| format!("no ARG asks for the build argument {name}")).collect()
    }
}

/// A scope in which everything is known.
struct Globals<'a>(&'a BTreeMap<String, String>);

impl Scope for Globals<'_> {
    fn get(&self, name: &str) -> Lookup<'_> {
        self.0.get(name).map_or(Lookup::Unset, |value| Lookup::Set(value))
    }
}

/// What has become of a stage.
#[derive(Debug, Clone, Copy)]
enum Visit {
    Not,
    /// What it needs is being looked at: who needs it now closes a circle.
    Begun,
    /// It has this place in the plan.
    Done(usize),
}

struct Planner<'a> {
    file: &'a Dockerfile,
    options: &'a Options,
    globals: BTreeMap<String, String>,
    plan: Vec<Stage>,
    /// Of each stage of the plan, after its last instruction.
    states: Vec<State>,
    visits: Vec<Visit>,
    /// Images that COPY --from names.
    images: BTreeMap<String, usize>,
}

/// A step as it is shown: ENV without its values, which a log would keep.
fn shown(located: &Located, action: &Action) -> String {
    let Action::Env(pairs) = action else { return located.shown() };
    let names: Vec<&str> = pairs.iter().map(|(name, _)| name.as_str()).collect();
    shortened(&format!("ENV {}", names.join(" ")))
}

impl Planner<'_> {
    /// The place of a stage in the plan, which it has afterwards.
    fn visit(&mut self, at: usize) -> Result<usize, Error> {
        if let Visit::Done(place) = self.visits[at] {
            return Ok(place);
        }
        self.visits[at] = Visit::Begun;
        let file = self.file;
        let written = &file.stages[at];
        let (from, mut state) = self.begin(at)?;
        state.predefine(&self.options.args);
        let mut needs = BTreeSet::new();
        if let StageFrom::Stage(base) = from {
            needs.insert(base);
        }
        let (globals, options) = (self.globals.clone(), self.options);
        let args = Args { given: &options.args, global: &globals };
        let mut steps = Vec::new();
        for located in &written.body {
            // A stage that a COPY asks for may have an error of its own, with its own line.
            let inner = RefCell::new(None);
            let mut find = |name: &str| {
                let place = self.source(at, located, name);
                let place = place.map_err(|error| {
                    let fault = Fault::NoStage { name: name.to_owned() };
                    inner.replace(Some(error));
                    fault
                })?;
                needs.insert(place);
                Ok(place)
            };
            let done = state.step(located, file.escape, &args, &mut find);
            let done = done.map_err(|fault| inner.into_inner().unwrap_or_else(|| located.fault(fault)));
            if let Some(action) = done? {
                steps.push(Step { line: located.line, shown: shown(located, &action), action });
            }
        }
        let stage = Stage {
            name: written.name.clone(),
            line: written.from.line,
            from,
            steps,
            needs: needs.into_iter().collect(),
        };
        let place = self.push(stage, state);
        self.visits[at] = Visit::Done(place);
        Ok(place)
    }

    fn push(&mut self, stage: Stage, state: State) -> usize {
        self.plan.push(stage);
        self.states.push(state);
        self.plan.len() - 1
    }

    /// What a stage begins with.
    fn begin(&mut self, at: usize) -> Result<(StageFrom, State), Error> {
        let written = &self.file.stages[at];
        let fault = |fault| written.from.fault(fault);
        if let Some(platform) = &written.platform {
            let platform = self.file.expanded(platform, &self.globals).map_err(fault)?;
            if !PLATFORMS.contains(&platform.to_ascii_lowercase().as_str()) {
                let instead = "Build for linux/amd64, which is what machines are, or leave --platform away.";
                return Err(fault(Fault::unsupported(format!("the platform {platform}"), instead)));
            }
        }
        let image = self.file.expanded(&written.image, &self.globals).map_err(fault)?;
        if image.is_empty() || image.contains(char::is_whitespace) {
            let what = format!("{} comes to {image:?}, which is no image", written.image);
            return Err(fault(Fault::syntax(what)));
        }
        if let Some(base) = self.file.named(&image).filter(|base| *base < at) {
            // It copies from this stage.
            if matches!(self.visits[base], Visit::Begun) {
                return Err(fault(Fault::Circle { name: image }));
            }
            let base = self.visit(base)?;
            return Ok((StageFrom::Stage(base), self.states[base].derived()));
        }
        if image == "scratch" {
            return Ok((StageFrom::Scratch, State::scratch()));
        }
        let state = self.options.images.get(&image).map(State::of).unwrap_or_default();
        Ok((StageFrom::Image(image), state))
    }

    /// The stage of the plan that `COPY --from=name` in the stage `at` means.
    fn source(&mut self, at: usize, located: &Located, name: &str) -> Result<usize, Error> {
        let no_stage = || located.fault(Fault::NoStage { name: name.to_owned() });
        if name.contains('$') {
            let instead =
                "Give the image a stage of its own, whose FROM may have variables: FROM $IMAGE AS name.";
            return Err(located.fault(Fault::unsupported(format!("a variable in --from={name}"), instead)));
        }
        let found = match self.file.named(name) {
            None if !name.is_empty() && name.bytes().all(|digit| digit.is_ascii_digit()) => Some(
                name.parse().ok().filter(|number| *number < self.file.stages.len()).ok_or_else(no_stage)?,
            ),
            found => found,
        };
        match found {
            Some(found) if matches!(self.visits[found], Visit::Begun) => {
                let name = self.file.stages[at].name.clone().unwrap_or_else(|| at.to_string());
                Err(located.fault(Fault::Circle { name }))
            }
            Some(found) => self.visit(found),
            None if name.is_empty() || name == "scratch" || name == "context" => Err(no_stage()),
            None => Ok(self.image(name, located.line)),
        }
    }

    /// A stage that is an image and nothing else.
    fn image(&mut self, reference: &str, line: u32) -> usize {
        if let Some(place) = self.images.get(reference) {
            return *place;
        }
        let from = StageFrom::Image(reference.to_owned());
        let stage = Stage { name: None, line, from, steps: Vec::new(), needs: Vec::new() };
        let place = self.push(stage, State::default());
        self.images.insert(reference.to_owned(), place);
        place
    }
}
