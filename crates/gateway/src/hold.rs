//! Requests that are held until their sandbox is awake: so many at one time, each for so long.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::SandboxId;
use kelvin_node_api::Wake;

/// Requests that wait at one time; each holds its connection and what was read of its body.
const PLACES: usize = 4096;
/// Of those for one sandbox: its visitors leave places for those of others.
const OF_ONE: usize = 256;
/// How long one waits: longer than a resume may take whose machine boots.
const PATIENCE: Duration = Duration::from_secs(180);

/// The queue.
#[derive(Clone)]
pub(crate) struct Hold {
    waker: Arc<dyn Wake>,
    waiting: Arc<Mutex<Waiting>>,
}

#[derive(Debug, Default)]
struct Waiting {
    all: usize,
    by: HashMap<SandboxId, usize>,
}

/// One that waits; given back when this is dropped.
struct Place {
    waiting: Arc<Mutex<Waiting>>,
    sandbox: SandboxId,
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut waiting = lock(&self.waiting);
        waiting.all -= 1;
        if let Some(count) = waiting.by.get_mut(&self.sandbox) {
            *count -= 1;
            if *count == 0 {
                waiting.by.remove(&self.sandbox);
            }
        }
    }
}

impl Hold {
    /// An empty one.
    pub(crate) fn new(waker: Arc<dyn Wake>) -> Self {
        Self { waker, waiting: Arc::default() }
    }

    fn place(&self, sandbox: &SandboxId) -> Result<Place, Failure> {
        let full = |limit: usize, whom: &str| {
            Failure::new(
                ErrorCode::TooManyWaiting,
                format!("{limit} requests wait for {whom} already"),
                "try again later",
            )
        };
        let mut waiting = lock(&self.waiting);
        if waiting.all >= PLACES {
            return Err(full(PLACES, "paused sandboxes"));
        }
        let own = waiting.by.entry(sandbox.clone()).or_default();
        if *own >= OF_ONE {
            return Err(full(OF_ONE, &format!("sandbox {sandbox}")));
        }
        *own += 1;
        waiting.all += 1;
        Ok(Place { waiting: Arc::clone(&self.waiting), sandbox: sandbox.clone() })
    }

    /// Waits until `sandbox`, which sleeps, runs.
    ///
    /// # Errors
    /// What [`Wake::wake`] says; `TooManyWaiting` at once, `WakeTooSlow` after a time.
    pub(crate) async fn wake(&self, sandbox: &SandboxId) -> Result<(), Failure> {
        let _place = self.place(sandbox)?;
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
        let hold = Hold::new(Arc::new(Never));
        let mut waiting = Vec::new();
        for full in 1..=PLACES / OF_ONE {
            let sandbox = SandboxId::random();
            for _ in 0..OF_ONE {
                let (hold, sandbox) = (hold.clone(), sandbox.clone());
                waiting.push(tokio::spawn(async move { hold.wake(&sandbox).await }));
            }
            while lock(&hold.waiting).all < full * OF_ONE {
                tokio::task::yield_now().await;
            }
            // One has its own, and no more: the next sandbox's visitors find places.
            let refused = hold.wake(&sandbox).await.unwrap_err();
            assert_eq!(refused.error_code, ErrorCode::TooManyWaiting);
        }
        let refused = hold.wake(&SandboxId::random()).await.unwrap_err();
        assert_eq!(refused.error_code, ErrorCode::TooManyWaiting);
        assert!(refused.message.contains(&PLACES.to_string()), "{refused}");
        for one in waiting {
            assert_eq!(one.await.unwrap().unwrap_err().error_code, ErrorCode::WakeTooSlow);
        }
        let left = lock(&hold.waiting);
        assert!(left.all == 0 && left.by.is_empty(), "places are given back: {left:?}");
    }
}
