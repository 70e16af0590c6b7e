//! What a Dockerfile asks for: stages, in an order in which each comes after those it needs, and their steps.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::command;
use crate::text::Text;

/// What decides about a plan besides the Dockerfile.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// The stage to build, by its name or number; the last one when it is left out.
    pub target: Option<String>,
    /// Values of ARG: `--build-arg`.
    pub args: BTreeMap<String, String>,
    /// What images say, by their references as FROM has them, expanded. Of one that is not here nothing is known: what depends
    /// on its variables stays a variable.
    pub images: BTreeMap<String, ImageConfig>,
}

/// What an image's configuration says, as far as a plan depends on it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Variables.
    pub env: Vec<(String, String)>,
    /// Working directory; empty for `/`.
    pub workdir: String,
    /// ENTRYPOINT.
    pub entrypoint: Vec<String>,
    /// CMD.
    pub cmd: Vec<String>,
    /// SHELL; empty for `/bin/sh -c`.
    pub shell: Vec<String>,
}

/// A plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The stages that the target needs, and it: each comes after those that it needs.
    pub stages: Vec<Stage>,
    /// The stage that becomes the template: the last one.
    pub target: usize,
    /// ENTRYPOINT and CMD together, as a line for `/bin/sh -c`. Where FROM's image is not known, as if it had neither:
    /// [`Plan::start_of`] knows more.
    pub start: Option<String>,
    /// HEALTHCHECK's command, as a line for `/bin/sh -c`.
    pub ready: Option<String>,
    /// What the target says about itself.
    pub config: Config,
    /// What is odd and no error.
    pub warnings: Vec<String>,
}

/// A stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// After AS, in lower case. An image that COPY --from names is a stage without a name and without steps.
    pub name: Option<String>,
    /// The line of its FROM, or of its COPY.
    pub line: u32,
    /// What it begins with.
    pub from: StageFrom,
    /// What is done then.
    pub steps: Vec<Step>,
    /// The stages that have to be there before, in the order of their numbers.
    pub needs: Vec<usize>,
}

/// What a stage begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StageFrom {
    /// An image of a registry.
    Image(String),
    /// An earlier stage of the plan: its disk, its variables, working directory and user.
    Stage(usize),
    /// Nothing.
    Scratch,
}

/// A step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The line that it begins on.
    pub line: u32,
    /// As it is shown: `RUN pip install flask`.
    pub shown: String,
    /// What is done.
    pub action: Action,
}

/// What a step does. A [`Text`] may have variables of the image left in it: they are resolved when the step is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Sets variables. A value sees what was before this step.
    Env(Vec<(String, Text)>),
    /// Sets the working directory, and makes it. A relative one counts from the one before, which was not known.
    Workdir(Text),
    /// Sets the user, and perhaps the group.
    User(Text),
    /// Runs a command, in the state's working directory and as its user.
    Run {
        /// The command and its arguments; the shell form comes with its shell.
        argv: Vec<String>,
        /// Values of ARG, for this command alone. One that the state has a variable for gives way to that.
        variables: Vec<(String, Text)>,
    },
    /// Copies files.
    Copy(Copy),
}

/// COPY or ADD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copy {
    /// Where the sources are.
    pub from: CopyFrom,
    /// What is copied, in order. A directory's content is copied, not the directory.
    pub sources: Vec<Source>,
    /// To where: one that ends in `/` is a directory. A relative path counts from the working directory, which was not known.
    pub to: Text,
    /// Whose the files become: `user`, `user:group` or ids. Docker's default is `0:0`, whatever USER says.
    pub owner: Text,
    /// The mode of all of them; their own when it is left out.
    pub mode: Option<u32>,
    /// Whether a source that is an archive is unpacked.
    pub unpack: bool,
}

/// Where a COPY has its sources from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CopyFrom {
    /// The context.
    Context,
    /// A stage of the plan.
    Stage(usize),
}

/// A source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A path, or a pattern as of Go's `filepath.Match`: in the context, or of the stage's root.
    Path(String),
    /// A file that stands in the Dockerfile.
    Inline {
        /// Its name.
        name: String,
        /// What it says.
        content: String,
    },
}

/// What an image says about itself. What is left out is as FROM's image has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// ENTRYPOINT; the shell form comes with its shell.
    pub entrypoint: Option<Vec<String>>,
    /// CMD; an ENTRYPOINT drops the image's.
    pub cmd: Option<Vec<String>>,
    /// LABEL and MAINTAINER, to be added to the image's.
    pub labels: BTreeMap<String, Text>,
    /// EXPOSE, as `port/protocol`, to be added to the image's.
    pub exposed: Vec<String>,
    /// VOLUME, to be added to the image's.
    pub volumes: Vec<String>,
    /// STOPSIGNAL.
    pub stop_signal: Option<String>,
    /// SHELL.
    pub shell: Option<Vec<String>>,
    /// HEALTHCHECK.
    pub healthcheck: Option<Healthcheck>,
}

/// HEALTHCHECK.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Healthcheck {
    /// NONE: the image's is not run.
    Disabled,
    /// CMD.
    Command {
        /// The command and its arguments; the shell form comes with its shell.
        argv: Vec<String>,
        /// Between two checks.
        interval: Option<Duration>,
        /// Of one check.
        timeout: Option<Duration>,
        /// How long checks may fail after the start.
        start_period: Option<Duration>,
        /// How many may fail then.
        retries: Option<u32>,
    },
}

impl Plan {
    /// The images that it begins with, in the order of the stages.
    pub fn images(&self) -> Vec<&str> {
        let images = self.stages.iter().filter_map(|stage| match &stage.from {
            StageFrom::Image(reference) => Some(reference.as_str()),
            StageFrom::Stage(_) | StageFrom::Scratch => None,
        });
        let mut found: Vec<&str> = Vec::new();
        for image in images {
            if !found.contains(&image) {
                found.push(image);
            }
        }
        found
    }

    /// Groups of stages: those of one group are independent of each other, and need earlier groups alone.
    pub fn waves(&self) -> Vec<Vec<usize>> {
        let mut wave_of: Vec<usize> = Vec::new();
        let mut waves: Vec<Vec<usize>> = Vec::new();
        for (at, stage) in self.stages.iter().enumerate() {
            let after = stage.needs.iter().filter_map(|need| wave_of.get(*need)).max();
            let wave = after.map_or(0, |after| after + 1);
            wave_of.push(wave);
            if waves.len() <= wave {
                waves.resize_with(wave + 1, Vec::new);
            }
            waves[wave].push(at);
        }
        waves
    }

    /// [`Plan::start`] over an image whose own ENTRYPOINT and CMD these are.
    pub fn start_of(&self, entrypoint: &[String], cmd: &[String]) -> Option<String> {
        let entrypoint = self.config.entrypoint.as_deref().unwrap_or(entrypoint);
        command::start(entrypoint, self.config.cmd.as_deref().unwrap_or(cmd))
    }
}
