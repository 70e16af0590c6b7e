//! What control plane and gateway ask of a node, and nothing behind it.
//!
//! ```text
//! gateway ── SandboxTraffic ──> node          requests and connections into sandboxes
//! control ── NodeService ─────> node          everything that changes or tells what runs
//! gateway ── Wake ────────────> control       a sandbox that sleeps has a visitor
//! ```
//!
//! A node never calls: state comes back in replies, and in [`NodeService::changes`], which waits. Every type is owned and goes
//! through serde, so that the parts may run apart; in one process they are called directly and nothing is written down.
//!
//! Nothing here has a state, so a crash leaves nothing.

mod build;
mod service;
#[cfg(feature = "testing")]
pub mod testing;
mod traffic;
mod types;
#[cfg(feature = "wire")]
pub mod wire;

pub use build::{
    Build, BuildEvent, BuildFailure, BuildFrom, BuildLevel, BuildStage, BuildStep, BuildTold, Built,
    FilesContent, Instruction, RegistryCredentials, RegistryReach,
};
pub use service::NodeService;
pub use traffic::{Cut, Inbound, Io, Outbound, Route, SandboxTraffic, Unanswered, Wake};
pub use types::{
    Bake, Base, Changes, Child, ConsoleLine, Create, Created, Forked, Garbage, Import, ImportTold, Live,
    Paused, Source, Taken,
};

/// The version of these types and services. It grows with each change that a peer of the former version would misread: a
/// field that means something else, or that must not be left out. A field that may be absent, a method and an error code
/// are no such changes: who does not know them says so, or passes them on.
pub const VERSION: u32 = 2;
