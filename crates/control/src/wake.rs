//! Traffic that wakes a paused sandbox: whether its owner may have one more that runs is decided here, and the node is asked
//! once however many come.
//!
//! Who writes: the task of the wake, which goes on when its visitors leave. A crash leaves a claim, which the next start
//! forgets.

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use futures::FutureExt;
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::SandboxId;
use kelvin_api::sandbox::PauseMode;
use kelvin_node_api::Wake;

use crate::control::{Control, Inner};
use crate::metrics::Start;

/// A wake among those that are under way, until it is dropped.
struct Under {
    inner: Arc<Inner>,
    id: SandboxId,
}

impl Drop for Under {
    fn drop(&mut self) {
        self.inner.wakes.lock().remove(&self.id);
    }
}

impl Inner {
    async fn wake(self: &Arc<Self>, id: &SandboxId) -> Result<(), Failure> {
        let asked = Instant::now();
        let row = self.row_here(id).await?;
        if !row.lifecycle.auto_resume {
            return Err(Failure::new(
                ErrorCode::SandboxPaused,
                format!("sandbox {id} is paused"),
                "resume it first: `kelvin sandbox resume`, or connect to it",
            ));
        }
        // It counts as one that runs until it does, or does not.
        let _permit = self.claim(id, self.accounts.quota_of(&row.key, &row.project)).await?;
        match self.node.resume(id, None, PauseMode::Full).await {
            Ok(created) => {
                self.metrics.started(Start::Resume, created.start_path, &created.timings, asked.elapsed());
                Ok(())
            }
            Err(failure) if failure.error_code == ErrorCode::SandboxRunning => Ok(()),
            Err(failure) => Err(failure),
        }
    }
}

#[async_trait]
impl Wake for Control {
    async fn wake(&self, sandbox: &SandboxId) -> Result<(), Failure> {
        let waking = {
            // Held until it is among them: its task takes it out.
            let mut wakes = self.inner.wakes.lock();
            match wakes.get(sandbox) {
                Some(waking) => waking.clone(),
                None => {
                    let (inner, id) = (Arc::clone(&self.inner), sandbox.clone());
                    let task = self.inner.tasks.spawn(async move {
                        // Made by the task: a runtime that ends drops one that was never begun, here and now.
                        let under = Under { inner, id };
                        under.inner.wake(&under.id).await
                    });
                    let ended = |ended: Result<Result<(), Failure>, tokio::task::JoinError>| {
                        ended.unwrap_or_else(|error| {
                            let text = "waking the sandbox was given up";
                            Err(Failure::new(ErrorCode::Aborted, text, "try again").with_cause(&error))
                        })
                    };
                    let waking = task.map(ended).boxed().shared();
                    wakes.insert(sandbox.clone(), waking.clone());
                    waking
                }
            }
        };
        waking.await
    }
}
