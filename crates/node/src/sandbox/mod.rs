//! A sandbox: the task that owns one that runs, its record, one that is paused, one whose record cannot be read.

pub mod actor;
pub mod mail;
pub mod paused;
pub mod record;
pub mod unreadable;
