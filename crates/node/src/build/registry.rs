//! The builds that are under way: the later of two of a name goes on, each can be given up, and whoever does waits for its end.
//!
//! ```text
//! begin ──> under way ──> ended                       an entry is there for as long as its [`Underway`]
//!              └ give up: cancelled, superseded, too late, or the node stops ──> ended
//! ```
//!
//! Nothing is written; a crash leaves none of them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::{BuildId, TemplateName};
use tokio_util::sync::CancellationToken;

use crate::error::Error;

/// Builds of one node at one time: beyond it somebody has lost count.
const MOST: usize = 64;
/// Builds that were cancelled before they came, and are known: more than can be on their way.
const MOST_EARLY: usize = 1024;

/// Tells one build that it is given up, and why.
#[derive(Debug)]
pub struct Stop {
    token: CancellationToken,
    why: OnceLock<Failure>,
}

impl Stop {
    /// The first reason counts.
    pub fn give_up(&self, why: Failure) {
        let _ = self.why.set(why);
        self.token.cancel();
    }

    /// For what takes no reason.
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// Refuses to go on with what is given up.
    ///
    /// # Errors
    /// `Build` with the reason; `Stopping` when the node stops.
    pub fn check(&self) -> Result<(), Error> {
        if self.token.is_cancelled() { Err(self.error()) } else { Ok(()) }
    }

    fn error(&self) -> Error {
        match self.why.get() {
            Some(why) => Error::Build(Box::new(why.clone())),
            None => Error::Stopping,
        }
    }

    /// What a build that ended with `error` has failed with: what is broken by giving it up is not why.
    pub fn instead_of(&self, error: Error) -> Error {
        if self.token.is_cancelled() { self.error() } else { error }
    }

    /// Does `work`, unless it is given up meanwhile: then `work` is dropped where it stands.
    ///
    /// # Errors
    /// As `work`, and as [`Stop::check`].
    pub async fn unless<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        match self.token.run_until_cancelled(work).await {
            Some(done) => done,
            None => Err(self.error()),
        }
    }
}

#[derive(Debug)]
struct Entry {
    build: BuildId,
    template: TemplateName,
    stop: Arc<Stop>,
    ended: CancellationToken,
    /// Digests of images and guests that must not be collected.
    needs: Vec<String>,
}

/// A cheap handle.
#[derive(Debug, Clone, Default)]
pub struct Builds {
    entries: Arc<Mutex<Vec<Entry>>>,
    /// What was cancelled and was not under way, the newest first. Taken with `entries` held.
    early: Arc<Mutex<VecDeque<BuildId>>>,
}

/// A build, until it is dropped: then nothing of it runs any more.
#[derive(Debug)]
pub struct Underway {
    of: Builds,
    build: BuildId,
    /// Tells it to end.
    pub stop: Arc<Stop>,
    /// Those of the same name before it, which were told to end.
    before: Vec<CancellationToken>,
    ended: CancellationToken,
}

impl Drop for Underway {
    fn drop(&mut self) {
        self.of.entries().retain(|entry| entry.build != self.build);
        self.ended.cancel();
    }
}

impl Underway {
    /// Keeps the image or the guest of this digest from collections until the build has ended.
    pub fn needs(&self, digest: &str) {
        let mut entries = self.of.entries();
        let own = entries.iter_mut().find(|entry| entry.build == self.build);
        if let Some(entry) = own {
            entry.needs.push(digest.to_owned());
        }
    }

    /// Waits until those that it supersedes have ended.
    pub async fn first_of_its_name(&self) {
        for ended in &self.before {
            ended.cancelled().await;
        }
    }
}

impl Builds {
    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn early(&self) -> MutexGuard<'_, VecDeque<BuildId>> {
        self.early.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins `build` of `template`; others of that name are told to end. `hurry`: the node stops.
    ///
    /// # Errors
    /// `Build` when there is one of that id, it was cancelled before, or there are too many.
    pub fn begin(
        &self,
        build: &BuildId,
        template: &TemplateName,
        hurry: &CancellationToken,
    ) -> Result<Underway, Error> {
        let refused = |code, text: String, remediation: &str| {
            Err(Error::Build(Box::new(Failure::new(code, text, remediation))))
        };
        let mut entries = self.entries();
        if entries.iter().any(|entry| entry.build == *build) {
            let text = format!("build {build} is under way");
            return refused(ErrorCode::BuildState, text, "wait for it, or begin another");
        }
        let mut early = self.early();
        if let Some(at) = early.iter().position(|id| id == build) {
            early.remove(at);
            return refused(
                ErrorCode::BuildCancelled,
                format!("build {build} was cancelled"),
                "begin it anew",
            );
        }
        drop(early);
        if entries.len() >= MOST {
            let text = format!("{MOST} builds are under way on this node");
            return refused(ErrorCode::TooManyBuilds, text, "try again when some have ended");
        }
        let mut before = Vec::new();
        for older in entries.iter().filter(|entry| entry.template == *template) {
            older.stop.give_up(Failure::new(
                ErrorCode::BuildSuperseded,
                format!("build {build} of template {template} began later"),
                "nothing: the later one goes on",
            ));
            before.push(older.ended.clone());
        }
        let stop = Arc::new(Stop { token: hurry.child_token(), why: OnceLock::new() });
        let ended = CancellationToken::new();
        let (template, told) = (template.clone(), Arc::clone(&stop));
        entries.push(Entry {
            build: build.clone(),
            template,
            stop: told,
            ended: ended.clone(),
            needs: Vec::new(),
        });
        Ok(Underway { of: self.clone(), build: build.clone(), stop, before, ended })
    }

    /// Digests of images and guests that builds need.
    pub fn needed(&self) -> Vec<String> {
        self.entries().iter().flat_map(|entry| entry.needs.clone()).collect()
    }

    /// Gives `build` up, and returns that of which its end is seen; one that is not under way is refused when it comes.
    fn give_up(&self, build: &BuildId) -> Option<CancellationToken> {
        let entries = self.entries();
        if let Some(entry) = entries.iter().find(|entry| entry.build == *build) {
            let text = format!("build {build} was cancelled");
            entry.stop.give_up(Failure::new(ErrorCode::BuildCancelled, text, "begin it anew"));
            return Some(entry.ended.clone());
        }
        let mut early = self.early();
        if !early.contains(build) {
            early.truncate(MOST_EARLY - 1);
            early.push_front(build.clone());
        }
        None
    }

    /// Gives `build` up and waits for its end.
    ///
    /// # Errors
    /// `Build` with `BuildNotFound` when it is not under way: then it is refused when it comes.
    pub async fn cancel(&self, build: &BuildId) -> Result<(), Error> {
        let Some(ended) = self.give_up(build) else {
            let text = format!("no build {build} is under way");
            let failure =
                Failure::new(ErrorCode::BuildNotFound, text, "it may have ended: ask for its state");
            return Err(Error::Build(Box::new(failure)));
        };
        ended.cancelled().await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    fn code(error: Error) -> ErrorCode {
        Failure::from(error).error_code
    }

    #[tokio::test]
    async fn the_later_of_a_name_goes_on_when_the_former_has_ended() {
        let (builds, hurry) = (Builds::default(), CancellationToken::new());
        let (web, other): (TemplateName, TemplateName) = ("web".parse().unwrap(), "other".parse().unwrap());
        let ids: Vec<BuildId> = (0..4).map(|_| BuildId::random()).collect();
        let first = builds.begin(&ids[0], &web, &hurry).unwrap();
        let beside = builds.begin(&ids[1], &other, &hurry).unwrap();
        assert_eq!(code(builds.begin(&ids[0], &other, &hurry).unwrap_err()), ErrorCode::BuildState);
        first.first_of_its_name().now_or_never().expect("there is none before it");
        let second = builds.begin(&ids[2], &web, &hurry).unwrap();
        let third = builds.begin(&ids[3], &web, &hurry).unwrap();
        for superseded in [&first, &second] {
            assert_eq!(code(superseded.stop.check().unwrap_err()), ErrorCode::BuildSuperseded);
        }
        beside.stop.check().unwrap();
        assert!(third.first_of_its_name().now_or_never().is_none());
        drop(first);
        assert!(third.first_of_its_name().now_or_never().is_none());
        drop(second);
        third.first_of_its_name().now_or_never().expect("the only one");
        // What was broken by it is not why it failed.
        let lost = Error::Unknown("machine".to_owned());
        assert_eq!(code(third.stop.instead_of(lost)), ErrorCode::SandboxNotFound);
        hurry.cancel();
        assert_eq!(code(third.stop.instead_of(Error::Unknown(String::new()))), ErrorCode::NodeStopping);
    }

    #[tokio::test]
    async fn who_cancels_waits_for_the_end() {
        let (builds, hurry) = (Builds::default(), CancellationToken::new());
        let (id, web) = (BuildId::random(), "web".parse().unwrap());
        let build = builds.begin(&id, &web, &hurry).unwrap();
        build.needs("image");
        assert_eq!(builds.needed(), ["image"]);
        let mut cancelling = std::pin::pin!(builds.cancel(&id));
        assert!(cancelling.as_mut().now_or_never().is_none());
        let work = build.stop.unless(std::future::pending::<Result<(), Error>>());
        assert_eq!(code(work.await.unwrap_err()), ErrorCode::BuildCancelled);
        drop(build);
        assert!(builds.needed().is_empty());
        cancelling.await.unwrap();
        assert_eq!(code(builds.cancel(&id).await.unwrap_err()), ErrorCode::BuildNotFound);
    }

    #[tokio::test]
    async fn one_that_is_cancelled_before_it_comes_is_refused_when_it_does() {
        let (builds, hurry) = (Builds::default(), CancellationToken::new());
        let (early, web) = (BuildId::random(), "web".parse().unwrap());
        for _ in 0..2 {
            assert_eq!(code(builds.cancel(&early).await.unwrap_err()), ErrorCode::BuildNotFound);
        }
        let other = builds.begin(&BuildId::random(), &web, &hurry).unwrap();
        assert_eq!(code(builds.begin(&early, &web, &hurry).unwrap_err()), ErrorCode::BuildCancelled);
        other.stop.check().expect("it is superseded by none");
        for _ in 0..2 * MOST_EARLY {
            let _ = builds.cancel(&BuildId::random()).await;
        }
        assert_eq!(builds.early().len(), MOST_EARLY);
    }

    #[test]
    fn there_is_a_limit() {
        let (builds, hurry) = (Builds::default(), CancellationToken::new());
        let begin = |at: usize| builds.begin(&BuildId::random(), &format!("t{at}").parse().unwrap(), &hurry);
        let held: Vec<Underway> = (0..MOST).map(|at| begin(at).unwrap()).collect();
        assert_eq!(code(begin(MOST).unwrap_err()), ErrorCode::TooManyBuilds);
        drop(held);
        drop(begin(0).unwrap());
    }
}
