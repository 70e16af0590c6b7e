//! The control plane: the public API and the database of intent.
//!
//! Read in this order: [`Control`], `api` (the routes), `create`, `lifecycle` and `service` (what they do), `reconcile` (what the
//! node says by itself), `database` (what is remembered: an
//! interface, and SQLite behind it), `placement` (whose node may change what), `wake` (traffic to what is paused). It never
//! links a node: [`kelvin_node_api::NodeService`] is what it needs of one, and the binary joins the two.
//!
//! What changes something runs on a task of its own to its end, whoever leaves: its owner and its entry in the audit log are
//! written before its effect is there (`audit`, `once`, `changes`).
//!
//! Who writes: `kelvin.db` alone. A crash leaves rows in state `creating`; the next start asks the node
//! which of them exist, keeps those and forgets the others, so that a retry with the same idempotency key
//! gives exactly one sandbox.

mod accounts;
mod admission;
mod api;
mod audit;
mod auth;
mod builds;
mod catalog;
mod changes;
mod codes;
mod control;
mod create;
mod database;
mod events;
mod failures;
mod import;
mod lifecycle;
mod list;
mod logs;
mod meter;
mod metrics;
mod network;
mod once;
mod openapi;
mod people;
mod placement;
mod reconcile;
mod reply;
mod request;
mod service;
mod tags;
#[cfg(test)]
mod testing;
mod versions;
mod wake;

pub use admission::Undocumented;
pub use auth::ApiKey;
pub use builds::BuildOptions;
pub use control::Control;
pub use reply::reply;
pub use request::OverTls;
