//! `/files`: content up and down, streamed in bounded memory.

mod download;
mod request;
mod upload;

pub use download::download;
pub use request::admits;
pub use upload::{compose, upload};
