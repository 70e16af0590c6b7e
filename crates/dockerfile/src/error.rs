//! What is wrong with a Dockerfile or its context: always with the line and the instruction's text.

use std::io;
use std::path::PathBuf;

use kelvin_api::error::{ErrorCode, Failure};

use crate::text;

/// Characters of an instruction that an error shows.
const SHOWN: usize = 160;

/// Something that is not built, and where it stands.
#[derive(Debug, thiserror::Error)]
#[error("{}{fault}{}", before(*line), after(instruction))]
pub struct Error {
    /// The line that the instruction begins on, counted from 1; 0 when it is no line's fault.
    pub line: u32,
    /// The instruction, shortened; empty when it is no line's fault.
    pub instruction: String,
    /// What is wrong.
    pub fault: Fault,
}

fn before(line: u32) -> String {
    if line == 0 { String::new() } else { format!("line {line}: ") }
}

fn after(instruction: &str) -> String {
    if instruction.is_empty() { String::new() } else { format!(" (in `{instruction}`)") }
}

/// What is wrong.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// It is not how the instruction is written.
    #[error("{what}")]
    Syntax {
        /// What is not.
        what: String,
    },
    /// No instruction has that name.
    #[error("there is no instruction {name}{}", nearest.map(|nearest| format!(", perhaps {nearest}")).unwrap_or_default())]
    UnknownInstruction {
        /// As it is written.
        name: String,
        /// One that is nearly written so.
        nearest: Option<&'static str>,
    },
    /// Docker has it, and this builder has not.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// A variable's use.
    #[error(transparent)]
    Variable(#[from] text::Error),
    /// What has to be known before the build asks for a variable that the image may have.
    #[error("{name} may be a variable of the image, whose variables are not known here")]
    UnknownVariable {
        /// The variable.
        name: String,
    },
    /// No stage has that name or number.
    #[error("there is no stage {name}")]
    NoStage {
        /// As it is asked for.
        name: String,
    },
    /// A stage needs itself.
    #[error("stage {name} needs itself")]
    Circle {
        /// The stage.
        name: String,
    },
    /// The context has no such file.
    #[error("{source_path} matches no file of the context that .dockerignore leaves")]
    NoMatch {
        /// As the instruction has it.
        source_path: String,
    },
    /// A source is not in the context.
    #[error("{source_path} leaves the context")]
    Outside {
        /// As the instruction has it.
        source_path: String,
    },
    /// A pattern of an instruction or of a `.dockerignore`.
    #[error("{pattern} is not a valid pattern")]
    Pattern {
        /// It.
        pattern: String,
    },
    /// Two sources make a file and a directory of one name, or a file is no file.
    #[error("{}: {why}", path.display())]
    Entry {
        /// In the context.
        path: PathBuf,
        /// What of it cannot be copied.
        why: &'static str,
    },
    /// More than is read.
    #[error("{what} has more than {limit}")]
    TooLarge {
        /// What has.
        what: &'static str,
        /// What it may have, in the unit that `what` names.
        limit: u64,
    },
    /// The context cannot be read.
    #[error("{}: {error}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Something that Docker has, and this builder has not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} is not supported")]
pub struct Unsupported {
    /// What, as it is written.
    pub what: String,
    /// What to write in its place.
    pub instead: &'static str,
}

impl Fault {
    pub(crate) fn syntax(what: impl Into<String>) -> Self {
        Self::Syntax { what: what.into() }
    }

    pub(crate) fn unsupported(what: impl Into<String>, instead: &'static str) -> Self {
        Self::Unsupported(Unsupported { what: what.into(), instead })
    }

    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        |error| Self::Io { path, error }
    }

    /// As an error of the instruction `text` that begins on `line`.
    pub(crate) fn at(self, line: u32, text: &str) -> Error {
        Error { line, instruction: shortened(text), fault: self }
    }
}

impl Error {
    /// For programs.
    pub fn code(&self) -> ErrorCode {
        match self.fault {
            Fault::NoMatch { .. } => ErrorCode::FilesMissing,
            Fault::Outside { .. } | Fault::Entry { .. } => ErrorCode::FilesRefused,
            Fault::Unsupported(_) => ErrorCode::BuildUnsupported,
            Fault::Io { .. } => ErrorCode::InvalidFile,
            _ => ErrorCode::InvalidStep,
        }
    }

    /// What to do.
    pub fn remediation(&self) -> &'static str {
        match &self.fault {
            Fault::Unsupported(Unsupported { instead, .. }) => instead,
            Fault::Syntax { .. } | Fault::Pattern { .. } => "Correct the line.",
            Fault::UnknownInstruction { .. } => {
                "Correct the instruction's name; a command goes after RUN, and a line that goes on ends in a backslash."
            }
            Fault::Variable(_) => "Correct the variable's use, or give its value with --build-arg.",
            Fault::UnknownVariable { .. } => {
                "Set the variable by ARG or ENV in the same stage, or write its value."
            }
            Fault::NoStage { .. } => "Name a stage of this Dockerfile: FROM image AS name.",
            Fault::Circle { .. } => "Break the circle: a stage copies from stages that do not need it.",
            Fault::NoMatch { .. } => {
                "Check the path, which counts from the context's directory, and .dockerignore."
            }
            Fault::Outside { .. } => "Copy the file into the context, or give a directory above as context.",
            Fault::Entry { .. } => {
                "Leave the file out by .dockerignore, or copy it by an instruction of its own."
            }
            Fault::TooLarge { .. } => {
                "Ask for less: shorter lines, or fewer files, which .dockerignore leaves out."
            }
            Fault::Io { .. } => "Make the file readable, or leave it out by .dockerignore.",
        }
    }

    /// As it leaves the platform.
    pub fn failure(&self) -> Failure {
        Failure::new(self.code(), self.to_string(), self.remediation())
    }
}

/// The first line of an instruction, and not more than is shown of it.
pub(crate) fn shortened(text: &str) -> String {
    let line = text.trim().lines().next().unwrap_or_default();
    let mut shown: String = line.chars().filter(|letter| !letter.is_control()).take(SHOWN).collect();
    if shown.len() < line.len() {
        shown.push('…');
    }
    shown
}
