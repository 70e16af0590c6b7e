//! The seam between processes: Connect over HTTP/2, messages of `proto/node.proto`.
//!
//! Whoever reaches a [`server`] may do everything with the node: it listens where only its control plane and gateway come,
//! until the parts show each other who they are. A call that breaks may have been done or not; its caller asks again with the
//! same ids, or looks.

mod build;
mod client;
mod convert;
mod failure;
#[allow(missing_docs, clippy::all, clippy::unwrap_used, clippy::large_futures, clippy::too_many_lines)]
mod generated;
mod import;
mod limits;
mod server;
mod stream;

pub use client::Remote;
pub use server::serve;

#[cfg(test)]
mod build_tests;
#[cfg(test)]
mod tests;
