//! Steps as a node is asked for them, as far as the seam between the parts reaches.
//!
//! RUN goes through a login
//! shell where the image has bash, whose `/etc/profile` may set PATH anew. Variables that are left for later go through ENV and
//! WORKDIR alone, whose texts a node expands when it does the step: it knows `${NAME}`, `${NAME:-word}` and `${NAME:+word}`, and
//! takes a backslash before what is special.

use std::fmt::Write as _;

pub use kelvin_node_api::{BuildStep, Instruction};

use crate::command::{self, quoted};
use crate::context::Context;
use crate::error::{Error, Fault};
use crate::plan::{Action, Copy, CopyFrom, Source, Stage};
use crate::text::{Apply, Part, Text};
use crate::upload::Upload;

/// A step for a node.
#[derive(Debug)]
pub struct Asked {
    /// The line of the Dockerfile that it begins on.
    pub line: u32,
    /// It.
    pub step: BuildStep,
    /// What has to be uploaded before, of a COPY.
    pub upload: Option<Upload>,
}

/// The steps of a stage for a node, in order: one for each, of a COPY one for each of its uploads, and of one from another stage
/// one for each of its sources.
///
/// # Errors
/// With the line of the first step that a node cannot be asked for, or whose files are not there.
pub fn steps(stage: &Stage, context: &Context) -> Result<Vec<Asked>, Error> {
    let mut asked = Vec::new();
    for step in &stage.steps {
        let beyond = || {
            let what = "a variable of the image in this instruction".to_owned();
            let instead = "Write the value, or set the variable by ARG or ENV in the same stage.";
            Fault::unsupported(what, instead).at(step.line, &step.shown)
        };
        let one =
            |instruction: Instruction| BuildStep { instruction, force: false, shown: step.shown.clone() };
        let Action::Copy(written) = &step.action else {
            let made = one(instruction(&step.action).ok_or_else(beyond)?);
            asked.push(Asked { line: step.line, step: made, upload: None });
            continue;
        };
        if let CopyFrom::Stage(stage) = written.from {
            for source in &written.sources {
                let made = one(copy_from(written, stage, source).ok_or_else(beyond)?);
                asked.push(Asked { line: step.line, step: made, upload: None });
            }
            continue;
        }
        for upload in context.uploads(step)? {
            let made = one(copy(written, &upload).ok_or_else(beyond)?);
            asked.push(Asked { line: step.line, step: made, upload: Some(upload) });
        }
    }
    Ok(asked)
}

/// `action` for a node, unless it is a copy: that is [`copy`] for each of its uploads.
pub fn instruction(action: &Action) -> Option<Instruction> {
    match action {
        Action::Env(pairs) => {
            let pairs = pairs.iter().map(|(name, value)| Some((name.clone(), expanded_later(value)?)));
            Some(Instruction::Env(pairs.collect::<Option<_>>()?))
        }
        Action::Workdir(path) => Some(Instruction::Workdir(expanded_later(path)?)),
        Action::User(user) => Some(Instruction::User(user.literal()?.to_owned())),
        Action::Run { argv, variables } => {
            let mut line = String::new();
            for (name, value) in variables {
                let value = quoted(value.literal().filter(|_| is_name(name))?);
                // A variable of the machine is stronger.
                let _ = write!(line, "[ -n \"${{{name}+x}}\" ] || {name}={value}; export {name}; ");
            }
            line.push_str(&command::line(argv));
            Some(Instruction::Run { command: line, user: None, argv: None })
        }
        Action::Copy(_) => None,
    }
}

/// One upload of `copy` for a node.
pub fn copy(copy: &Copy, upload: &Upload) -> Option<Instruction> {
    if copy.from != CopyFrom::Context {
        return None;
    }
    let to = copy.to.literal()?.to_owned();
    let owner = Some(copy.owner.literal()?.to_owned());
    Some(Instruction::Copy {
        files: upload.hash.clone(),
        from: upload.from.clone(),
        to,
        owner,
        mode: copy.mode,
    })
}

/// One source of `copy` for a node, from the disk of `stage` as the plan counts them.
fn copy_from(copy: &Copy, stage: usize, source: &Source) -> Option<Instruction> {
    // A file that stands in the Dockerfile is of no stage; the planner makes no such copy.
    let Source::Path(from) = source else { return None };
    let (to, owner) = (copy.to.literal()?.to_owned(), Some(copy.owner.literal()?.to_owned()));
    let stage = u32::try_from(stage).ok()?;
    Some(Instruction::CopyFrom { stage, from: from.clone(), to, owner, mode: copy.mode })
}

fn is_name(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && name.starts_with(|letter: char| !letter.is_ascii_digit())
}

/// `text` as a node expands it: a literal with its special letters escaped.
fn expanded_later(text: &Text) -> Option<String> {
    let mut written = String::new();
    for part in text.parts() {
        match part {
            Part::Literal(literal) => {
                for letter in literal.chars() {
                    if "$\\}".contains(letter) {
                        written.push('\\');
                    }
                    written.push(letter);
                }
            }
            Part::Variable { name, apply } => {
                let name = Some(name).filter(|name| is_name(name))?;
                let (kind, word) = match apply {
                    Apply::Plain => ("", String::new()),
                    Apply::Default { word, or_empty: true } => (":-", expanded_later(word)?),
                    Apply::Alternative { word, or_empty: true } => (":+", expanded_later(word)?),
                    _ => return None,
                };
                let _ = write!(written, "${{{name}{kind}{word}}}");
            }
        }
    }
    Some(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dockerfile, Options};

    fn of(line: &str) -> Option<Instruction> {
        let plan = Dockerfile::parse(&format!("FROM a\n{line}")).unwrap().plan(&Options::default()).unwrap();
        instruction(&plan.stages[0].steps[0].action)
    }

    #[test]
    fn a_node_expands_what_is_left_and_nothing_else() {
        let cases = [
            ("ENV PATH=/app:$PATH", Some("/app:${PATH}")),
            ("ENV a='$b'", Some("\\$b")),
            ("ENV a='x\\y}'", Some("x\\\\y\\}")),
            ("ENV a=${b:-'}'}${c:+${d}}", Some("${b:-\\}}${c:+${d}}")),
            ("ENV a=${b#x}", None),
            ("ENV a=${b-x}", None),
        ];
        for (line, value) in cases {
            let found = of(line).map(|instruction| match instruction {
                Instruction::Env(pairs) => pairs[0].1.clone(),
                other => panic!("{other:?}"),
            });
            assert_eq!(found.as_deref(), value, "{line}");
        }
        assert_eq!(of("WORKDIR $HOME/a"), Some(Instruction::Workdir("${HOME}/a".to_owned())));
        assert_eq!(of("USER $NAME"), None);
    }
}
