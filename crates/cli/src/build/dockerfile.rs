//! A Dockerfile as a build that a server can be asked for.
//!
//! ```text
//! Dockerfile ──plan──> stages, the target last ──seam::steps──> steps of a request, and their uploads
//! ```
//!
//! Docker's steps run as root in `/` where neither image nor Dockerfile says otherwise, a server's as `user` in that one's home:
//! two steps more say so. No registry is asked: what the image says itself is not known here.
//! Who writes: nobody; files are read, and a crash leaves nothing.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use kelvin_api::build::{MOST_STEPS, TemplateStage, TemplateStep, is_owner};
use kelvin_dockerfile::seam::{self, Asked, Instruction};
use kelvin_dockerfile::{
    Config, Context, Dockerfile, Error, Fault, Healthcheck, Limits, Options, Plan, Stage, StageFrom,
    Unsupported,
};

use super::files::Files;
use super::step::{Step, template_step};
use crate::args::DockerfileArgs;
use crate::output::Failed;

/// Bytes of a Dockerfile that are read: one more than it may have.
const MOST_BYTES: u64 = (1 << 20) + 1;

/// What a Dockerfile asks for.
#[derive(Debug)]
pub struct Built {
    /// The stages that are needed, in the order in which their steps are counted; the last becomes the template.
    pub stages: Vec<Part>,
    /// ENTRYPOINT and CMD.
    pub start: Option<String>,
    /// HEALTHCHECK's command.
    pub ready: Option<String>,
    /// What is odd, or not kept, and no error.
    pub warnings: Vec<String>,
}

/// A stage.
#[derive(Debug)]
pub struct Part {
    /// What it begins with; its steps are not in there.
    pub from: TemplateStage,
    /// What is done then.
    pub steps: Vec<Step>,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::from(error.failure())
    }
}

/// Reads the Dockerfile that `args` name, and hashes what it copies. `environment` has the values of build arguments that are
/// given without one.
///
/// # Errors
/// With the line of the first instruction that cannot be built, and what to do. When files cannot be read.
pub fn read(args: &DockerfileArgs, environment: &dyn Fn(&str) -> Option<OsString>) -> Result<Built, Failed> {
    let directory = args.context.as_deref().unwrap_or(Path::new("."));
    let path = args.dockerfile.clone().unwrap_or_else(|| directory.join("Dockerfile"));
    let (values, mut warnings) = build_args(&args.build_args, environment)?;
    let options = Options { target: args.target.clone(), args: values, ..Options::default() };
    let plan = Dockerfile::parse(&text(&path)?)?.plan(&options)?;
    let context = Context::open(directory, Some(&path), Limits::default())?;
    let stages = parts(&plan, &context)?;
    if let Some(beyond) = stages.iter().flat_map(|stage| &stage.steps).nth(MOST_STEPS) {
        let fault = Fault::TooLarge { what: "the Dockerfile in steps", limit: MOST_STEPS as u64 };
        let (line, instruction) = (beyond.line.unwrap_or_default(), beyond.shown.clone());
        return Err(Error { line, instruction, fault }.into());
    }
    warnings.extend(plan.warnings.iter().cloned());
    warnings.extend(not_kept(&plan.config));
    Ok(Built { stages, start: plan.start, ready: plan.ready, warnings })
}

fn text(path: &PathBuf) -> Result<String, Failed> {
    let failed = |error: io::Error| {
        let remedy = "name the Dockerfile with --file, or the directory that has it";
        Failed::new(format!("{}: {error}", path.display()), remedy)
    };
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MOST_BYTES).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 == MOST_BYTES {
        return Err(failed(io::Error::other("it is larger than 1 MiB")));
    }
    String::from_utf8(bytes).map_err(|_| failed(io::Error::other("it is not UTF-8")))
}

/// Values of ARG, and warnings of those that the environment does not have, as Docker leaves them out.
fn build_args(
    given: &[String],
    environment: &dyn Fn(&str) -> Option<OsString>,
) -> Result<(BTreeMap<String, String>, Vec<String>), Failed> {
    let (mut values, mut warnings) = (BTreeMap::new(), Vec::new());
    for text in given {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => match environment(text).map(OsString::into_string) {
                Some(Ok(value)) => (text.as_str(), Some(value)),
                Some(Err(_)) => {
                    let why = format!("the environment's {text} is not UTF-8");
                    return Err(Failed::new(why, "give the value: --build-arg NAME=VALUE"));
                }
                None => (text.as_str(), None),
            },
        };
        if name.is_empty() {
            let why = format!("--build-arg {text:?} has no name");
            return Err(Failed::new(why, "for example --build-arg VERSION=1.2"));
        }
        match value {
            Some(value) => drop(values.insert(name.to_owned(), value)),
            None => warnings.push(format!("the environment has no {name} for --build-arg {name}")),
        }
    }
    Ok((values, warnings))
}

/// The stages of `plan`.
fn parts(plan: &Plan, context: &Context) -> Result<Vec<Part>, Error> {
    let mut parts: Vec<Part> = Vec::new();
    // Whether a stage says, or one that it begins with, that it is as Docker has it.
    let mut says = Vec::new();
    for (number, stage) in plan.stages.iter().enumerate() {
        let asked = seam::steps(stage, context)?;
        let mut steps = asked.into_iter().map(step).collect::<Result<Vec<_>, _>>()?;
        let below = matches!(stage.from, StageFrom::Stage(base) if says[base]);
        // Of an image that is only copied from nothing is asked.
        let has_to = !below && (!steps.is_empty() || number == plan.target);
        if has_to {
            steps.splice(0..0, as_in_docker(&steps, stage));
        }
        says.push(below || has_to);
        parts.push(Part { from: begins(&stage.from), steps });
    }
    Ok(parts)
}

fn begins(from: &StageFrom) -> TemplateStage {
    let nothing = TemplateStage::default();
    match from {
        StageFrom::Image(image) => TemplateStage { from_image: Some(image.clone()), ..nothing },
        StageFrom::Stage(base) => TemplateStage { from_stage: u32::try_from(*base).ok(), ..nothing },
        StageFrom::Scratch => TemplateStage { scratch: Some(true), ..nothing },
    }
}

fn unsupported(line: u32, what: String, instruction: &str, instead: &'static str) -> Error {
    let fault = Fault::Unsupported(Unsupported { what, instead });
    Error { line, instruction: instruction.to_owned(), fault }
}

/// A step of a request.
fn step(asked: Asked) -> Result<Step, Error> {
    let Asked { line, step, upload } = asked;
    let shown = step.shown;
    let owner = |owner: &str| {
        if is_owner(owner) {
            return Ok(());
        }
        let instead = "Name a user, or user:group, by letters, digits, `.`, `_` and `-`, or their ids.";
        Err(unsupported(line, format!("the user {owner:?}"), &shown, instead))
    };
    let step = match step.instruction {
        Instruction::Copy { files, from, to, owner: of, mode } => {
            let of = of.unwrap_or_default();
            if !of.is_empty() {
                owner(&of)?;
            }
            let mode = mode.map(|mode| format!("{mode:o}")).unwrap_or_default();
            let files_hash = Some(files.to_string());
            TemplateStep { files_hash, ..template_step("COPY", vec![from, to, of, mode]) }
        }
        Instruction::CopyFrom { stage, from, to, owner: of, mode } => {
            let of = of.unwrap_or_default();
            if !of.is_empty() {
                owner(&of)?;
            }
            let mode = mode.map(|mode| format!("{mode:o}")).unwrap_or_default();
            TemplateStep { from_stage: Some(stage), ..template_step("COPY", vec![from, to, of, mode]) }
        }
        Instruction::Run { command, user, argv } => {
            TemplateStep { argv, ..template_step("RUN", [command].into_iter().chain(user).collect()) }
        }
        Instruction::Env(pairs) => {
            template_step("ENV", pairs.into_iter().flat_map(|(name, value)| [name, value]).collect())
        }
        Instruction::Workdir(path) => template_step("WORKDIR", vec![path]),
        Instruction::User(user) => {
            owner(&user)?;
            template_step("USER", vec![user])
        }
    };
    let files = upload.map(|upload| Files::Copied(upload, shown.clone()));
    Ok(Step { step, shown, line: Some(line), files })
}

/// What `steps` rely on and do not say themselves: that Docker begins as root, and in `/`. They stand where FROM does.
fn as_in_docker(steps: &[Step], stage: &Stage) -> Vec<Step> {
    let name = match &stage.from {
        StageFrom::Image(image) => image.as_str(),
        StageFrom::Stage(_) => stage.name.as_deref().unwrap_or("a stage"),
        StageFrom::Scratch => "scratch",
    };
    let first = |kinds: &[&str]| steps.iter().find(|step| kinds.contains(&step.step.kind.as_str()));
    let is_of = |step: &Step, kind: &str| step.step.kind == kind;
    let has_user = first(&["USER", "WORKDIR", "COPY", "RUN"]).is_some_and(|step| is_of(step, "USER"));
    let has_workdir = first(&["WORKDIR", "COPY", "RUN"]).is_some_and(|step| {
        is_of(step, "WORKDIR") && step.step.args.first().is_some_and(|path| path.starts_with('/'))
    });
    let step = |kind: &str, arg: &str| Step {
        step: template_step(kind, vec![arg.to_owned()]),
        shown: format!("FROM {name}: {kind} {arg}"),
        line: Some(stage.line),
        files: None,
    };
    let user = (!has_user).then(|| step("USER", "root"));
    user.into_iter().chain((!has_workdir).then(|| step("WORKDIR", "/"))).collect()
}

/// What a request has no place for.
fn not_kept(config: &Config) -> Option<String> {
    let has_times = matches!(
        &config.healthcheck,
        Some(Healthcheck::Command { interval, timeout, start_period, retries, .. })
            if interval.is_some() || timeout.is_some() || start_period.is_some() || retries.is_some()
    );
    let all = [
        (!config.labels.is_empty(), "LABEL"),
        (!config.exposed.is_empty(), "EXPOSE"),
        (!config.volumes.is_empty(), "VOLUME"),
        (config.stop_signal.is_some(), "STOPSIGNAL"),
        (has_times, "HEALTHCHECK's options"),
    ];
    let named: Vec<&str> = all.into_iter().filter(|(is, _)| *is).map(|(_, name)| name).collect();
    (!named.is_empty()).then(|| format!("not kept with the template: {}", named.join(", ")))
}

#[cfg(test)]
#[path = "dockerfile_tests.rs"]
mod tests;
