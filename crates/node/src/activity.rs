//! What is under way on a node, counted by guards: who prepares ahead waits for quiet, a node that stops for its requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// A cheap handle of the counts.
#[derive(Debug, Clone, Default)]
pub struct Activity(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    requests: AtomicU32,
    work: AtomicU32,
    teardowns: AtomicU32,
    /// Told when a count falls, and when something is ready.
    settled: Notify,
}

/// What is counted.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Request,
    Work,
    Teardown,
}

/// Counts something for as long as it lives.
#[must_use = "what is dropped is not counted"]
#[derive(Debug)]
pub struct Underway {
    of: Activity,
    kind: Kind,
}

impl Drop for Underway {
    fn drop(&mut self) {
        self.of.count(self.kind).fetch_sub(1, Ordering::SeqCst);
        self.of.changed();
    }
}

impl Activity {
    fn count(&self, kind: Kind) -> &AtomicU32 {
        match kind {
            Kind::Request => &self.0.requests,
            Kind::Work => &self.0.work,
            Kind::Teardown => &self.0.teardowns,
        }
    }

    fn begin(&self, kind: Kind) -> Underway {
        self.count(kind).fetch_add(1, Ordering::SeqCst);
        Underway { of: self.clone(), kind }
    }

    /// A request.
    pub fn request(&self) -> Underway {
        self.begin(Kind::Request)
    }

    /// Work that asks something of a processor now; a request that waits for a guest is none.
    pub fn work(&self) -> Underway {
        self.begin(Kind::Work)
    }

    /// The end of a machine, until all of it is released.
    pub fn teardown(&self) -> Underway {
        self.begin(Kind::Teardown)
    }

    /// How many requests are under way.
    pub fn requests(&self) -> u32 {
        self.count(Kind::Request).load(Ordering::SeqCst)
    }

    /// How many teardowns are.
    pub fn teardowns(&self) -> u32 {
        self.count(Kind::Teardown).load(Ordering::SeqCst)
    }

    /// Says that something is ready, or gone.
    pub fn changed(&self) {
        self.0.settled.notify_waiters();
    }

    /// Resolves when something is ready or gone the next time.
    pub fn settled(&self) -> Notified<'_> {
        self.0.settled.notified()
    }

    /// Waits until no create or capture asks for a processor.
    pub async fn quiet(&self) {
        self.none(Kind::Work).await;
    }

    /// Waits until no request is under way.
    pub async fn no_request(&self) {
        self.none(Kind::Request).await;
    }

    async fn none(&self, kind: Kind) {
        loop {
            let changed = self.settled();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.count(kind).load(Ordering::SeqCst) == 0 {
                return;
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_waits_for_quiet_goes_on_when_the_last_guard_is_dropped() {
        let activity = Activity::default();
        activity.quiet().await;
        let (one, two) = (activity.work(), activity.work());
        let _request = activity.request();
        let waiting = tokio::spawn({
            let activity = activity.clone();
            async move { activity.quiet().await }
        });
        drop(one);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(two);
        waiting.await.unwrap();
        assert_eq!((activity.requests(), activity.teardowns()), (1, 0));
    }
}
