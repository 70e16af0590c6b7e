//! Builds of templates: an image or a template, steps over it in microVMs of the builder's own, a bake, and one rename.
//!
//! ```text
//! stages: base ─> plan ─> last state that is cached ─> machine: step ─> layer, step ─> layer, … ─> defaults ─> layer
//!                                                                        bake (service, ready) ─> publish ─> pool
//! ```
//!
//! Read in this order: `service` (what a node is asked), `entry` (a build from its request to its template; `building` is what
//! its parts share), `stages` (which there
//! are), `base` (what they begin with), `plan` (their keys), `steps` (what is cached, and the rest), `machine`, `run` (one step),
//! `copy_from` (a copy from a stage), `log`, `image` and `oci` (where images come from), `registry` (cancel, supersede).
//!
//! Who writes: `layers/` and `uploads/`, through `kelvin-store`; the ledger, for machines; image, snapshot and template, in the end.
//! A crash leaves a machine without a record and something in `staging/`, both of which the next start removes, and layers, from
//! which the next build goes on.

mod base;
pub mod building;
mod copy_from;
pub mod entry;
mod expand;
pub mod image;
pub mod log;
pub mod machine;
pub mod oci;
pub mod plan;
pub mod registry;
pub mod run;
mod service;
mod stages;
mod steps;
