//! What a build carries from step to step, and the key of each state: pure, so that what is cached is known before a machine runs.
//!
//! ```text
//! key(base) = H(project, image or template, disk, guest, facts)
//! key(step) = H(key before, instruction, digest of its upload)
//! key(last) = H(key of the last step, the defaults that the image gets)
//! key(copy from a stage) = H(key before, instruction, key of that stage's disk)
//! ```
//!
//! The project is part of every key: what a command leaves differs each time, as a private key that it makes does, and neither that
//! nor whether it was run at all is another project's to know. An image that one project may pull is no other's, too.
//!
//! ENV and USER change the state alone; RUN, COPY and WORKDIR need a machine.
//!
//! Who steps run as, where nothing is said: as `user` in `/home/user`. E2B's SDK (2.63, `template/main.py`) sends no user with a
//! `RUN` by itself; what installs packages for everybody (`apt_install`, `pip_install`, `npm_install -g`) names `root`, which it
//! would not have to if that were the default, and its Dockerfile converter (`dockerfile_parser.py`) begins with `USER root` and
//! `WORKDIR /`, and ends with `USER user` and `WORKDIR /home/user` when the file has said neither. An image that has a USER or a
//! WORKDIR of its own has its way. A front end that wants Docker's defaults says so by steps, as E2B's does.

use std::collections::BTreeMap;

use kelvin_api::account::Project;
use kelvin_api::image::{self, ImageDefaults, MAX_DEFAULTS};
use kelvin_api::sandbox::EnvVars;
use kelvin_node_api::{BuildStep, Instruction};
use kelvin_store::hash::sha256;
use serde::{Deserialize, Serialize};

use crate::build::copy_from::Wanted;
use crate::build::expand::expand;

/// Part of every key: it grows when what a step does changes.
const VERSION: u32 = 1;
/// Steps of one build.
const MOST_STEPS: usize = 1000;
/// Bytes of one command: it is one argument. Source: Linux, `MAX_ARG_STRLEN`.
const MOST_COMMAND: usize = (128 << 10) - 4096;
/// Bytes of all words of one command without a shell.
const MOST_ARGV: usize = 1 << 20;
/// Bytes of a path. Source: Linux, `PATH_MAX`.
const MOST_PATH: usize = 4095;
/// Where steps run when neither image nor step says so.
const HOME: &str = "/home/user";

/// What an image says that nothing here acts on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFacts {
    /// Digest of its manifest.
    pub digest: Option<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its program.
    pub entrypoint: Vec<String>,
    /// That program's arguments, or the program.
    pub cmd: Vec<String>,
    /// As `80/tcp`.
    pub exposed_ports: Vec<String>,
    /// What ends it.
    pub stop_signal: Option<String>,
}

/// What steps before have set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildState {
    /// Of every process.
    pub env: EnvVars,
    /// Where processes begin, when something has said so.
    pub workdir: Option<String>,
    /// Whose they are, when something has said so.
    pub user: Option<String>,
    /// Of the image.
    pub image: ImageFacts,
}

impl BuildState {
    /// Who runs what says nothing of that.
    pub fn user(&self) -> &str {
        self.user.as_deref().unwrap_or(crate::machine::processes::USER)
    }

    /// Where that runs; none for that user's home.
    pub fn cwd(&self) -> Option<&str> {
        match (&self.workdir, &self.user) {
            (Some(workdir), _) => Some(workdir),
            (None, None) => Some(HOME),
            (None, Some(_)) => None,
        }
    }

    /// The state after `instruction`.
    ///
    /// # Errors
    /// What of it cannot be.
    pub fn after(&self, instruction: &Instruction) -> Result<Self, String> {
        let mut next = self.clone();
        match instruction {
            Instruction::Run { command, argv: None, .. } => check_text("the command", command, MOST_COMMAND)?,
            Instruction::Run { command, argv: Some(argv), .. } => {
                if !command.is_empty() || argv.first().is_none_or(String::is_empty) {
                    return Err("a RUN has a command, or a program and its arguments".to_owned());
                }
                argv.iter().try_for_each(|word| check_text("an argument", word, MOST_COMMAND))?;
                if argv.iter().map(String::len).sum::<usize>() > MOST_ARGV {
                    return Err(format!("the arguments have more than {MOST_ARGV} bytes together"));
                }
            }
            Instruction::CopyFrom { from, to, .. } => {
                check_text("the source", from, MOST_PATH)?;
                check_text("the destination", to, MOST_PATH)?;
                Wanted::of(from)?;
            }
            Instruction::Copy { from, to, .. } => {
                check_text("the source", from, MOST_PATH)?;
                check_text("the destination", to, MOST_PATH)?;
            }
            Instruction::Env(pairs) => {
                for (name, value) in pairs {
                    if name.is_empty() || name.contains(['=', '\0']) {
                        return Err(format!("{name:?} is no name of a variable"));
                    }
                    // Of what was there before the step, as in a Dockerfile.
                    next.env.insert(name.clone(), expand(value, &self.env)?);
                }
            }
            Instruction::Workdir(path) => next.workdir = Some(self.resolve(path)?),
            Instruction::User(user) => {
                let fits = |c: char| c.is_ascii_alphanumeric() || "_.-@$".contains(c);
                let is_name = |name: &str| (1..=64).contains(&name.len()) && name.chars().all(fits);
                let mut names = user.split(':');
                let is_user = names.next().is_some_and(is_name) && names.next().is_none_or(is_name);
                if !is_user || names.next().is_some() {
                    return Err(format!("{user:?} is no name of a user"));
                }
                next.user = Some(user.clone());
            }
        }
        // What the agent would ignore is no state.
        match next.defaults().encode() {
            Ok(_) => Ok(next),
            Err(image::Error::Size(_)) => {
                Err(format!("the variables of an image have at most {MAX_DEFAULTS} bytes together"))
            }
            Err(error) => Err(format!("the agent would not read what it is told of the image: {error}")),
        }
    }

    /// A path as WORKDIR means it: variables in it, and from the former one when it is relative.
    fn resolve(&self, path: &str) -> Result<String, String> {
        let path = expand(path, &self.env)?;
        check_text("the path", &path, MOST_PATH)?;
        if path.is_empty() {
            return Err("WORKDIR has no path".to_owned());
        }
        let mut parts: Vec<&str> = Vec::new();
        let before = self.workdir.as_deref().unwrap_or(HOME);
        let before = if path.starts_with('/') { "" } else { before };
        for part in before.split('/').chain(path.split('/')) {
            match part {
                "" | "." => {}
                ".." => drop(parts.pop()),
                part => parts.push(part),
            }
        }
        Ok(format!("/{}", parts.join("/")))
    }

    /// What the agent of the image's machines is told.
    pub fn defaults(&self) -> ImageDefaults {
        let Self { env, workdir, user, .. } = self;
        ImageDefaults { env: env.clone(), workdir: workdir.clone(), user: user.clone() }
    }
}

fn check_text(what: &str, text: &str, most: usize) -> Result<(), String> {
    if text.contains('\0') {
        return Err(format!("{what} has a NUL"));
    }
    if text.len() > most {
        return Err(format!("{what} has {} bytes, {most} is the most", text.len()));
    }
    Ok(())
}

/// A key over `parts`.
pub fn key(parts: &[&str]) -> String {
    let versioned: (u32, &[&str]) = (VERSION, parts);
    sha256(serde_json::to_string(&versioned).unwrap_or_default().as_bytes())
}

/// The key of what a build of `project` begins with: `what` says it whole, `state` what it has set.
pub fn base_key(project: &Project, what: &[&str], guest: &str, state: &BuildState) -> String {
    let state = serde_json::to_string(state).unwrap_or_default();
    let mut parts = vec!["base", project.as_str(), guest, &state];
    parts.extend(what);
    key(&parts)
}

/// A step, and the state that it leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// Of that state.
    pub key: String,
    /// What is set then.
    pub state: BuildState,
    /// Whether a machine does it.
    pub needs_machine: bool,
}

/// Every step with its key. `digests`: of what each step copies, an upload's or the key of a stage's disk.
///
/// # Errors
/// The step that cannot be, and why.
pub fn plan(
    base_key: &str,
    base: &BuildState,
    steps: &[BuildStep],
    digests: &BTreeMap<usize, String>,
) -> Result<Vec<Planned>, (Option<usize>, String)> {
    if steps.len() > MOST_STEPS {
        return Err((None, format!("{} steps, {MOST_STEPS} are the most", steps.len())));
    }
    let (mut before, mut state) = (base_key.to_owned(), base.clone());
    let mut planned = Vec::with_capacity(steps.len());
    for (at, step) in steps.iter().enumerate() {
        state = state.after(&step.instruction).map_err(|why| (Some(at), why))?;
        // Field order is the type's: the text is canonical.
        let instruction = match step.instruction.clone() {
            // What the stage is counts, not where it stands.
            Instruction::CopyFrom { from, to, owner, mode, .. } => {
                serde_json::to_string(&Instruction::CopyFrom { stage: 0, from, to, owner, mode })
            }
            other => serde_json::to_string(&other),
        };
        let instruction = instruction.unwrap_or_default();
        let digest = digests.get(&at).map_or("", String::as_str);
        before = key(&["step", &before, &instruction, digest]);
        let needs_machine = match step.instruction {
            Instruction::Run { .. }
            | Instruction::Copy { .. }
            | Instruction::CopyFrom { .. }
            | Instruction::Workdir(_) => true,
            Instruction::Env(_) | Instruction::User(_) => false,
        };
        planned.push(Planned { key: before.clone(), state: state.clone(), needs_machine });
    }
    Ok(planned)
}

/// The key of the last state, whose disk has the defaults of `state` on it.
pub fn last_key(before: &str, state: &BuildState) -> String {
    key(&["defaults", before, &serde_json::to_string(&state.defaults()).unwrap_or_default()])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(instruction: Instruction) -> BuildStep {
        BuildStep { instruction, force: false, shown: String::new() }
    }

    fn run(command: &str) -> BuildStep {
        step(Instruction::Run { command: command.to_owned(), user: None, argv: None })
    }

    fn exec(command: &str, argv: &[&str]) -> BuildStep {
        let argv = Some(argv.iter().map(ToString::to_string).collect());
        step(Instruction::Run { command: command.to_owned(), user: None, argv })
    }

    fn from_stage(stage: u32, from: &str) -> BuildStep {
        let (from, to) = (from.to_owned(), "/app".to_owned());
        step(Instruction::CopyFrom { stage, from, to, owner: None, mode: None })
    }

    fn env(name: &str, value: &str) -> BuildStep {
        step(Instruction::Env(vec![(name.to_owned(), value.to_owned())]))
    }

    fn keys(steps: &[BuildStep]) -> Vec<String> {
        let planned = plan("base", &BuildState::default(), steps, &BTreeMap::new()).unwrap();
        planned.into_iter().map(|planned| planned.key).collect()
    }

    #[test]
    fn a_key_is_of_everything_before_it_and_of_nothing_behind() {
        let steps = [run("a"), env("A", "1"), run("b"), run("c")];
        let before = keys(&steps);
        assert_eq!(keys(&steps), before);
        let shown = BuildStep { shown: "RUN a".to_owned(), force: true, ..run("a") };
        assert_eq!(keys(&[shown, env("A", "1"), run("b"), run("c")]), before);
        for (at, other) in [(0, run("x")), (1, env("A", "2")), (3, run("x"))] {
            let mut changed = steps.to_vec();
            changed[at] = other;
            let after = keys(&changed);
            assert_eq!(after[..at], before[..at]);
            assert!(after.iter().zip(&before).skip(at).all(|(new, old)| new != old));
        }
        // The same step twice is two states.
        let twice = keys(&[run("a"), run("a")]);
        assert_ne!(twice[0], twice[1]);
        let copy = Instruction::Copy {
            files: "ab".repeat(32).parse().unwrap(),
            from: ".".to_owned(),
            to: "/app".to_owned(),
            owner: None,
            mode: None,
        };
        let of = |digest: &str| {
            let digests = BTreeMap::from([(0, digest.to_owned())]);
            plan("base", &BuildState::default(), &[step(copy.clone())], &digests).unwrap().remove(0).key
        };
        assert_eq!(of("1"), of("1"));
        assert_ne!(of("1"), of("2"));
        // A copy from a stage is of what that is, wherever it stands.
        let of = |stage: u32, disk: &str| {
            let digests = BTreeMap::from([(0, disk.to_owned())]);
            plan("base", &BuildState::default(), &[from_stage(stage, "/a")], &digests).unwrap().remove(0).key
        };
        assert_eq!(of(0, "1"), of(1, "1"));
        assert_ne!(of(0, "1"), of(0, "2"));
        // What a former release has cached is found.
        let text = serde_json::to_string(&run("a").instruction).unwrap();
        assert_eq!(text, r#"{"run":{"command":"a","user":null}}"#);
        assert_ne!(keys(&[exec("", &["a"])]), keys(&[run("a")]));
        assert_ne!(last_key("k", &BuildState::default()), "k");
        let of = |project: &str| {
            base_key(&project.parse().unwrap(), &["image", "i"], "guest", &BuildState::default())
        };
        assert_eq!(of("a"), of("a"));
        assert_ne!(of("a"), of("b"));
    }

    #[test]
    fn steps_set_what_comes_after_them() {
        let image = BuildState {
            env: EnvVars::from([("PATH".to_owned(), "/usr/bin".to_owned())]),
            ..BuildState::default()
        };
        assert_eq!((image.user(), image.cwd()), ("user", Some("/home/user")));
        let steps = [
            env("PATH", "/app/bin:$PATH"),
            step(Instruction::Workdir("app".to_owned())),
            step(Instruction::Workdir("../$X/./web/".to_owned())),
            step(Instruction::User("app:staff".to_owned())),
            run("true"),
        ];
        let planned = plan("k", &image, &steps, &BTreeMap::new()).unwrap();
        let machine: Vec<bool> = planned.iter().map(|planned| planned.needs_machine).collect();
        assert_eq!(machine, [false, true, true, false, true]);
        assert_eq!(planned[1].state.workdir.as_deref(), Some("/home/user/app"));
        let last = &planned[4].state;
        assert_eq!((last.user(), last.cwd()), ("app:staff", Some("/home/user/web")));
        assert_eq!(
            String::from_utf8(last.defaults().encode().unwrap()).unwrap(),
            r#"{"env":{"PATH":"/app/bin:/usr/bin"},"workdir":"/home/user/web","user":"app:staff"}"#
        );
        assert_eq!(BuildState::default().defaults().encode().unwrap(), b"{}");
        let named = BuildState { user: Some("app".to_owned()), ..BuildState::default() };
        assert_eq!(named.cwd(), None);
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_step() {
        let (long, name) = ("x".repeat(MOST_COMMAND + 1), "x".repeat(65));
        for (bad, why) in [
            (run("a\0b"), "NUL"),
            (run(&long), "is the most"),
            (env("", "x"), "no name of a variable"),
            (env("A=B", "x"), "no name of a variable"),
            (env("A", "${B"), "no end"),
            (env("A", &"x".repeat(MAX_DEFAULTS)), "bytes together"),
            (step(Instruction::User(String::new())), "no name of a user"),
            (step(Instruction::User("a b".to_owned())), "no name of a user"),
            (step(Instruction::User("a:b:c".to_owned())), "no name of a user"),
            (step(Instruction::User(name)), "no name of a user"),
            (step(Instruction::Workdir(String::new())), "no path"),
            (exec("", &[]), "program"),
            (exec("", &["", "a"]), "program"),
            (exec("a", &["a"]), "program"),
            (exec("", &["a", "b\0"]), "NUL"),
            (from_stage(0, "../a"), "'..'"),
            (from_stage(0, ""), "empty"),
        ] {
            let steps = [run("good"), bad];
            let (at, text) = plan("k", &BuildState::default(), &steps, &BTreeMap::new()).unwrap_err();
            assert!(at == Some(1) && text.contains(why), "{text}");
        }
        let many = vec![run("x"); MOST_STEPS + 1];
        assert_eq!(plan("k", &BuildState::default(), &many, &BTreeMap::new()).unwrap_err().0, None);
    }
}
