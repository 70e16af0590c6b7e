//! A sandbox: the task that owns one that runs, its record, one that is paused, one whose record cannot be read.

pub mod actor;
pub mod ending;
pub mod handle;
pub mod mail;
pub mod paused;
pub mod record;
pub mod registry;
pub mod resume;
pub mod unreadable;
