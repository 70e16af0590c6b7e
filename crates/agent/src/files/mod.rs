//! `/files`: content up and down, streamed in bounded memory; `/unpack`: the upload of a COPY.

mod archive;
mod copy;
mod download;
mod request;
mod tree;
mod unpack;
mod upload;

pub use download::download;
pub use request::admits;
pub use unpack::unpack;
pub use upload::{compose, upload};
