//! Why `kelvin bench build` has no result.

use std::io;

use super::{fixtures, layout};
use crate::create;

/// Why there is no template: as its user is told.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotBuilt(pub String);

/// Why a bench has no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server failed.
    #[error("the server failed")]
    Client(#[from] kelvin_client::Error),
    /// A build failed.
    #[error("{0} failed")]
    Build(&'static str, #[source] NotBuilt),
    /// A build was not what was to be measured.
    #[error("{what} is not what was measured: {why}")]
    Other {
        /// Which.
        what: &'static str,
        /// Why not.
        why: String,
    },
    /// There is nothing to begin with.
    #[error("the image that is built on")]
    Base(#[from] layout::Error),
    /// The packages cannot be made.
    #[error("the packages of the build")]
    Fixtures(#[from] fixtures::Error),
    /// Pulling or unpacking failed.
    #[error("pulling and unpacking")]
    Images(#[from] kelvin_image::Error),
    /// One of the programs beside ours failed.
    #[error("{0} ended with {1}: {2}")]
    Program(String, String, String),
    /// Files or threads of this program.
    #[error("the bench's own files and tasks")]
    Task(#[source] io::Error),
    /// There is no such template.
    #[error("there is no template {0:?} to compare with, see `kelvin template list`")]
    NoTemplate(String),
    /// Clones of nothing.
    #[error("clones of a built template need a build: --builds 1 or more, or -n 0")]
    NothingBuilt,
    /// A create failed.
    #[error("a clone failed")]
    Create(#[from] create::Error),
    /// The node did not come to rest.
    #[error("the node did not settle")]
    Settle(#[from] crate::Unsettled),
    /// It was told to end.
    #[error("interrupted")]
    Interrupted,
}
