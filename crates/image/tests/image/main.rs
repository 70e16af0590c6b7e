//! Images through the public interface: what becomes of good ones, of bad ones, and of registries that behave badly.

#![allow(clippy::unwrap_used)]

mod fixture;
mod hostile;
mod make;
mod registry;
mod server;
