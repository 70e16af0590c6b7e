//! What is prepared ahead of requests: VMMs that wait, warm machines, network slots.

pub mod filler;
pub mod policy;
pub mod pools;
pub mod shelf;
pub mod warm;
