//! Builds of templates: asked for, given files, started, told of.
//!
//! ```text
//! POST /v3/templates ──> requested ── files: GET …/files/{hash}, PUT /uploads/{hash}
//!                            │
//! POST …/builds/{build} ──> waiting ──> building ──> ready     its tags name the version that it has made
//!                            └───────────┴────────> error     every tag names what it named
//! ```
//!
//! One build of a template runs at a time: a later one has the former given up, and waits until nothing of it runs. As many
//! run at once as the server was told, the others wait. A build is seen to its end by a task of its own, whoever leaves.
//!
//! Who writes: requests, and the task of each build. Whose a template is, is written before there is anything of it, so a
//! crash leaves no template without an owner; that it is ready and what its tags name is written in one step. A crash leaves
//! builds `waiting` or `building`, which the next start ends with `build_interrupted`. Credentials of registries are in memory alone: a build that was interrupted is not taken up again.

mod codes;
mod lines;
mod owners;
mod plan;
pub(crate) mod routes;
mod run;
mod steps;
pub(crate) mod turns;
mod under_way;
pub(crate) mod uploads;

#[cfg(test)]
mod tests;

pub(crate) use owners::Owners;
pub(crate) use run::name_taken;
pub use under_way::BuildOptions;
pub(crate) use under_way::{Importing, UnderWay};
