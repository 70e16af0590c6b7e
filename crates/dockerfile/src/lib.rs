//! Dockerfiles: what one asks for, as a plan that a builder can follow, and the files of its context.
//!
//! ```text
//! text ──lines──> instructions ──planner, stage──> Plan { stages, steps, start, ready }
//! directory ──context, ignore──> Upload { hash, tar } of each COPY
//! ```
//!
//! Nothing here asks a network or starts a machine. What Docker has and this builder has not is refused with its line, and with
//! what to write in its place: `docs/dockerfile.md` is the list. Variables of an image that nobody has looked at stay variables
//! ([`Text`]) until the step is done. Who writes: nobody; a context is read, and a crash leaves nothing.

mod archive;
mod command;
mod context;
mod copy;
mod error;
mod expand;
mod flags;
mod glob;
mod ignore;
mod instruction;
mod lines;
mod paths;
mod pattern;
mod plan;
mod planner;
pub mod seam;
mod stage;
mod text;
mod upload;
mod words;

pub use command::{line, start};
pub use context::{Context, Limits};
pub use error::{Error, Fault, Unsupported};
pub use plan::{
    Action, Config, Copy, CopyFrom, Healthcheck, ImageConfig, Options, Plan, Source, Stage, StageFrom, Step,
};
pub use planner::Dockerfile;
pub use text::{Apply, Error as TextError, Part, Text};
pub use upload::Upload;
