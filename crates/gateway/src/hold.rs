//! Requests that are held until their sandbox is awake: so many at one time, each for so long.

use std::sync::Arc;
use std::time::Duration;

use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::SandboxId;
use kelvin_node_api::Wake;
use tokio::sync::Semaphore;

/// Requests that wait at one time; each holds its connection and what was read of its body.
const PLACES: usize = 4096;
/// How long one waits: longer than a resume may take whose machine boots.
const PATIENCE: Duration = Duration::from_secs(180);

/// The queue.
#[derive(Clone)]
pub(crate) struct Hold {
    waker: Arc<dyn Wake>,
    places: Arc<Semaphore>,
}

impl Hold {
    /// An empty one.
    pub(crate) fn new(waker: Arc<dyn Wake>) -> Self {
        Self { waker, places: Arc::new(Semaphore::new(PLACES)) }
    }

    /// Waits until `sandbox`, which sleeps, runs.
    ///
    /// # Errors
    /// What [`Wake::wake`] says; `TooManyWaiting` at once, `WakeTooSlow` after a time.
    pub(crate) async fn wake(&self, sandbox: &SandboxId) -> Result<(), Failure> {
        let _place = self.places.try_acquire().map_err(|_| {
            Failure::new(
                ErrorCode::TooManyWaiting,
                format!("{PLACES} requests wait for paused sandboxes already"),
                "try again later",
            )
        })?;
        let slow = |_| {
            Err(Failure::new(
                ErrorCode::WakeTooSlow,
                format!("sandbox {sandbox} is paused and was not resumed within {} s", PATIENCE.as_secs()),
                "try again; `kelvin sandbox resume` says what it waits for",
            ))
        };
        tokio::time::timeout(PATIENCE, self.waker.wake(sandbox)).await.unwrap_or_else(slow)
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;

    use super::*;

    /// Wakes nobody.
    struct Never;

    #[async_trait]
    impl Wake for Never {
        async fn wake(&self, _: &SandboxId) -> Result<(), Failure> {
            std::future::pending().await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn so_many_wait_and_each_for_so_long() {
        let (hold, sandbox) = (Hold::new(Arc::new(Never)), SandboxId::random());
        let waiting: Vec<_> = (0..PLACES)
            .map(|_| {
                let (hold, sandbox) = (hold.clone(), sandbox.clone());
                tokio::spawn(async move { hold.wake(&sandbox).await })
            })
            .collect();
        while hold.places.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let refused = hold.wake(&sandbox).await.unwrap_err();
        assert_eq!(refused.error_code, ErrorCode::TooManyWaiting);
        for one in waiting {
            assert_eq!(one.await.unwrap().unwrap_err().error_code, ErrorCode::WakeTooSlow);
        }
        assert_eq!(hold.places.available_permits(), PLACES, "places are given back");
    }
}
