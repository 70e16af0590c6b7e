//! Progress.

/// Takes a line of progress, for the log of a build. It has no secret in it, and does not wait.
pub type Told = dyn Fn(&str) + Send + Sync;
