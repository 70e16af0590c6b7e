//! `kelvin bench build`: what a build costs, cold and again; what pulling and unpacking an image costs beside other programs; what a
//! clone of what was built costs beside one of an imported template.
//!
//! ```text
//! pulls    rounds of: ours, skopeo copy + umoci unpack
//! builds   rounds of: cold ─> nothing changed ─> the last line changed
//! clones   rounds of: one of what was built, one of the template that it is compared with
//! ```
//!
//! A cold build is one of which nothing is cached: image, uploads and packages of every round are new ones. A build is measured as
//! its user waits for it, from the reading of the Dockerfile to a template whose snapshot is there, and what was measured is checked:
//! how many steps were cached, and what the template's machine says.
//!
//! Who writes: the server, one template, which is deleted at the end however that comes; a directory of this program, which goes with
//! it. After a `kill -9` both stay: `kelvin template delete`, and a directory in `--directory`. Layers, blobs and uploads of the
//! builds stay in the server's caches until these need the room: nothing clears them for one project. `cargo xtask bench build`
//! removes its whole server. A sandbox of a run that is ended early ends by its own timeout.

pub mod fixtures;
pub mod layout;
pub mod registry;

mod args;
mod clones;
mod context;
mod error;
mod report;
mod unpack;

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use kelvin_api::build::BuildLogEntry;
use kelvin_client::Client;

pub use args::Args;
pub use error::{Error, NotBuilt};
pub use layout::Image;
pub use registry::Registry;
pub use report::{Ratio, Report, Samples};

use crate::{ms, settle};
use report::{Builds, Pulls};

/// A build that somebody else does: as `kelvin template build NAME DIRECTORY --build-arg BASE=...`.
#[derive(Debug)]
pub struct Order {
    /// The template.
    pub template: String,
    /// The Dockerfile and its context.
    pub directory: PathBuf,
    /// What `FROM` begins with, a reference.
    pub base: String,
    /// vCPUs of its machines.
    pub cpus: u32,
    /// Their memory, in MiB.
    pub memory_mib: u64,
}

/// Who builds.
pub trait Builder {
    /// Builds, and follows the build to its end; what the build has said.
    fn build(&self, order: Order) -> impl Future<Output = Result<Vec<BuildLogEntry>, NotBuilt>>;
}

/// Says on standard error how far it is: standard output has the figures alone.
fn say(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

fn seconds(since: Instant) -> f64 {
    ms(since) / 1e3
}

/// Measures. `stopped` ends it early, as a signal does: what it made is removed then, too.
///
/// # Errors
/// The first failure of anything that is measured.
pub async fn run(
    client: &Client,
    args: &Args,
    builder: &impl Builder,
    stopped: impl Future<Output = ()>,
) -> Result<Report, Error> {
    if args.n > 0 && args.builds == 0 {
        return Err(Error::NothingBuilt);
    }
    let template = format!("bench-build-{}", std::process::id());
    let measured = tokio::select! {
        biased;
        () = stopped => Err(Error::Interrupted),
        measured = Box::pin(measure(client, args, builder, &template)) => measured,
    };
    let removed = if args.builds > 0 { remove(client, &template).await } else { Ok(()) };
    match (measured, removed) {
        (Err(error), removed) => {
            if let Err(left) = removed {
                let left = kelvin_api::error::chain(&left);
                say(&format!("the template {template} was not removed: {left}"));
            }
            Err(error)
        }
        (Ok(report), removed) => removed.map(|()| report),
    }
}

/// Removes the template: builds of it that are under way end first. One that is not there is fine.
async fn remove(client: &Client, template: &str) -> Result<(), Error> {
    let is_gone = |error: &kelvin_client::Error| matches!(error, kelvin_client::Error::Refused(refused) if refused.code == 404);
    let known = match client.template(template).await {
        Ok(known) => known,
        Err(error) if is_gone(&error) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    for build in known.builds.iter().filter(|build| !build.status.is_over()) {
        match client.cancel_build(template, &build.build_id).await {
            Ok(()) => {}
            Err(error) if is_gone(&error) => {}
            // It has ended meanwhile.
            Err(kelvin_client::Error::Refused(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match client.delete_template(template).await {
        Err(error) if is_gone(&error) => Ok(()),
        done => Ok(done?),
    }
}

async fn measure(
    client: &Client,
    args: &Args,
    builder: &impl Builder,
    template: &str,
) -> Result<Report, Error> {
    let node = client.node().await?;
    let image = Image::of_layout(&args.base)?;
    let beside = client.templates().await?.into_iter().find(|found| found.template_id == args.template);
    let beside = beside.ok_or_else(|| Error::NoTemplate(args.template.clone()))?;
    let directory = match &args.directory {
        Some(directory) => directory.clone(),
        None => std::env::temp_dir(),
    };
    let scratch =
        tempfile::Builder::new().prefix("kelvin-bench-").tempdir_in(directory).map_err(Error::Task)?;
    let pulls = pulls(client, args, &image, scratch.path()).await?;
    let work = Work {
        client,
        builder,
        image: &image,
        template,
        scratch: scratch.path(),
        shape: (beside.cpu_count, u64::from(beside.memory_mb)),
    };
    let builds = work.builds(args.builds).await?;
    let clones = match args.n {
        0 => None,
        n => {
            say(&format!("clones: {n} of what was built, and of {}", args.template));
            Some(clones::run(client, template, &args.template, n).await?)
        }
    };
    scratch.close().map_err(Error::Task)?;
    Ok(Report::new(node.accelerator, &image, args, (pulls, builds, clones)))
}

/// Pulls, or why there are none.
async fn pulls(
    client: &Client,
    args: &Args,
    image: &Image,
    scratch: &Path,
) -> Result<Result<Pulls, String>, Error> {
    if args.pulls == 0 {
        return Ok(Err("--pulls 0".to_owned()));
    }
    let (skopeo, umoci) = match (unpack::version("skopeo").await, unpack::version("umoci").await) {
        (Ok(skopeo), Ok(umoci)) => (skopeo, umoci),
        (Err(why), _) | (_, Err(why)) => return Ok(Err(why)),
    };
    settle(client).await?;
    say(&format!("pulling and unpacking: {} rounds", args.pulls));
    Ok(Ok(Pulls { skopeo, umoci, measured: unpack::run(image, args.pulls, scratch).await? }))
}

/// What builds are done with.
struct Work<'a, B> {
    client: &'a Client,
    builder: &'a B,
    image: &'a Image,
    template: &'a str,
    scratch: &'a Path,
    /// vCPUs and MiB of memory.
    shape: (u32, u64),
}

/// Which of a round's builds it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Cold,
    Unchanged,
    LastLine,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Cold => "the cold build",
            Self::Unchanged => "the build of what has not changed",
            Self::LastLine => "the build of what has another last line",
        }
    }

    /// Whether what a build has said is what one of its kind says.
    ///
    /// Source: `crates/node/src/build/steps.rs`.
    fn check(self, said: &[BuildLogEntry]) -> Result<(), Error> {
        let count = |fits: &dyn Fn(&str) -> bool| said.iter().filter(|entry| fits(&entry.message)).count();
        let steps = count(&|message| message.starts_with("cached: "));
        let all = count(&|message| message == format!("{} steps are cached", context::STEPS));
        let base = count(&|message| message == "the image's file system is here");
        let wanted = match self {
            Self::Cold => (0, 0, 0),
            Self::Unchanged => (0, 1, 0),
            Self::LastLine => (context::STEPS - 1, 0, 0),
        };
        if (steps, all, base) == wanted {
            return Ok(());
        }
        let why = format!(
            "{steps} steps of {} were said to be cached one by one, all of them {all} times, the image {base} times",
            context::STEPS
        );
        Err(Error::Other { what: self.name(), why })
    }
}

impl<B: Builder> Work<'_, B> {
    async fn builds(&self, rounds: u32) -> Result<Builds, Error> {
        let mut all = Builds::default();
        if rounds == 0 {
            return Ok(all);
        }
        let registry = Registry::start().map_err(Error::Task)?;
        let begun = std::time::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_secs());
        for round in 0..rounds {
            // Nothing of another run, or of another round, is found by it. `noise` ignores the lowest bit.
            let seed = (u64::from(std::process::id()) << 32 | u64::from(round) << 1) ^ (begun << 8);
            let name = format!("bench/round-{seed:x}");
            let base = registry.add(&name, self.image.labelled(&format!("{seed:x}"))?);
            let place = tempfile::tempdir_in(self.scratch).map_err(Error::Task)?;
            let directory = place.path().to_owned();
            let made = tokio::task::spawn_blocking(move || context::make(&directory, seed)).await;
            all.context_bytes = made.map_err(|error| Error::Task(io::Error::other(error)))??;
            for kind in [Kind::Cold, Kind::Unchanged, Kind::LastLine] {
                let word = if kind == Kind::LastLine { "second" } else { "first" };
                context::change_last_line(place.path(), word).map_err(Error::Task)?;
                let took = self.build(kind, place.path(), &base).await?;
                say(&format!("{}, {} of {rounds}: {took:.1} s", kind.name(), round + 1));
                all.of(kind).push(took);
                let said = clones::page(self.client, self.template).await?;
                if said != context::page(seed, word) {
                    let why = format!("its machine answers {said:?}");
                    return Err(Error::Other { what: kind.name(), why });
                }
            }
            place.close().map_err(Error::Task)?;
        }
        Ok(all)
    }

    async fn build(&self, kind: Kind, directory: &Path, base: &str) -> Result<f64, Error> {
        settle(self.client).await?;
        let order = Order {
            template: self.template.to_owned(),
            directory: directory.to_owned(),
            base: base.to_owned(),
            cpus: self.shape.0,
            memory_mib: self.shape.1,
        };
        let begun = Instant::now();
        let said = self.builder.build(order).await.map_err(|error| Error::Build(kind.name(), error))?;
        let took = seconds(begun);
        kind.check(&said)?;
        Ok(took)
    }
}

impl Builds {
    fn of(&mut self, kind: Kind) -> &mut Vec<f64> {
        match kind {
            Kind::Cold => &mut self.cold,
            Kind::Unchanged => &mut self.unchanged,
            Kind::LastLine => &mut self.last_line,
        }
    }
}

#[cfg(test)]
mod tests {
    use kelvin_api::sandbox::LogLevel;

    use super::*;

    fn said(messages: &[String]) -> Vec<BuildLogEntry> {
        let entry = |message: &String| BuildLogEntry {
            timestamp: jiff::Timestamp::UNIX_EPOCH,
            message: message.clone(),
            level: LogLevel::Info,
            step: None,
        };
        messages.iter().map(entry).collect()
    }

    #[test]
    fn a_build_that_was_another_kind_is_no_figure() {
        let run = vec!["RUN a".to_owned()];
        let all = vec![format!("{} steps are cached", context::STEPS)];
        let most: Vec<_> = (1..context::STEPS).map(|step| format!("cached: RUN {step}")).collect();
        let base = vec!["the image's file system is here".to_owned()];
        for (messages, is) in [
            (&run, Some(Kind::Cold)),
            (&all, Some(Kind::Unchanged)),
            (&most, Some(Kind::LastLine)),
            (&base, None),
            (&most[1..].to_vec(), None),
        ] {
            for kind in [Kind::Cold, Kind::Unchanged, Kind::LastLine] {
                assert_eq!(kind.check(&said(messages)).is_ok(), is == Some(kind), "{kind:?}: {messages:?}");
            }
        }
    }

    /// Builds nothing.
    struct Nobody;

    impl Builder for Nobody {
        async fn build(&self, _: Order) -> Result<Vec<BuildLogEntry>, NotBuilt> {
            Err(NotBuilt("nobody builds here".to_owned()))
        }
    }

    /// A server that is not there, and no layout.
    async fn refused(builds: u32, n: u32) -> Error {
        let client = Client::new("http://127.0.0.1:1", kelvin_api::id::Token::from_secret("k".to_owned()));
        let args = Args {
            base: PathBuf::from("/nonexistent"),
            builds,
            pulls: 0,
            n,
            template: "base".to_owned(),
            directory: None,
        };
        let stopped = std::future::pending();
        run(&client.unwrap(), &args, &Nobody, stopped).await.unwrap_err()
    }

    #[tokio::test]
    async fn what_cannot_be_measured_is_refused_by_name() {
        assert!(matches!(refused(0, 50).await, Error::NothingBuilt));
        assert!(matches!(refused(0, 0).await, Error::Client(kelvin_client::Error::Unreachable { .. })));
        // The template cannot be removed either: the first error is the one that counts.
        assert!(matches!(refused(1, 0).await, Error::Client(_)));
    }
}
