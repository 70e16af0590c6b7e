//! Work that blocks, away from the reactor: files and `/proc`.
//!
//! One way for all of it, so that a test can decide when it is done: see `testing`.

use tokio::task::JoinHandle;

/// Runs `work` on a thread on which it may block. It goes on when the handle is dropped.
pub fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    #[cfg(feature = "testing")]
    if let Some(step) = crate::testing::blocking() {
        return step.run(work);
    }
    tokio::task::spawn_blocking(work)
}
