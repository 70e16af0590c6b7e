//! Pull and unpack of one image, ours beside `skopeo copy` and `umoci unpack`, from the same registry on loopback.
//!
//! ```text
//! registry ──pull──> blobs ──lay──> ext4 file                  kelvin-image, as a node uses it, with an empty cache
//! registry ──skopeo copy──> OCI layout ──umoci unpack──> tree
//! ```
//!
//! Rounds of both, who is first in turns; every round begins with empty directories, with the registry's files in the page cache and
//! with nothing left to be written back. Nobody syncs what he has made. Who writes: both, below a directory that goes with the run.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use kelvin_image::{Images, Options, Reach, Source};
use tokio::process::Command;
use tokio::runtime::Runtime;

use super::error::Error;
use super::layout::Image;
use super::registry::Registry;
use crate::ms;

/// What was measured, in seconds.
#[derive(Debug, Default)]
pub(super) struct Measured {
    pub ours: Vec<f64>,
    pub copy: Vec<f64>,
    pub unpack: Vec<f64>,
    /// Bytes that the file system uses that was made.
    pub unpacked_bytes: u64,
}

impl Measured {
    /// Both programs together, round by round.
    pub fn theirs(&self) -> Vec<f64> {
        self.copy.iter().zip(&self.unpack).map(|(copy, unpack)| copy + unpack).collect()
    }
}

/// The version that `program` says, or why it is not here.
pub(super) async fn version(program: &str) -> Result<String, String> {
    let asked = Command::new(program).arg("--version").stdin(Stdio::null()).output().await;
    match asked {
        Ok(said) if said.status.success() => {
            Ok(String::from_utf8_lossy(&said.stdout).lines().next().unwrap_or_default().trim().to_owned())
        }
        Ok(said) => Err(format!("{program} --version ended with {}", said.status)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(format!("{program} is not installed (Debian: {program})"))
        }
        Err(error) => Err(format!("{program} cannot be started: {error}")),
    }
}

/// A runtime as a server's, which ends without being waited for.
struct Threads(Option<Runtime>);

impl Threads {
    fn start() -> io::Result<Self> {
        Ok(Self(Some(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)))
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, kelvin_image::Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let Some(runtime) = &self.0 else { return Err(Error::Task(io::ErrorKind::BrokenPipe.into())) };
        let done = runtime.spawn(work).await.map_err(|error| Error::Task(io::Error::other(error)))?;
        Ok(done?)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Ours: seconds, and the bytes that the file system uses.
async fn ours(threads: &Threads, reference: String, place: &Path) -> Result<(f64, u64), Error> {
    let (cache, target) = (place.join("cache"), place.join("disk.ext4"));
    let begun = Instant::now();
    let made = threads
        .run(async move {
            let images = Images::open(cache, Options::default())?;
            let source = Source::Registry { reference, credentials: None, reach: Reach::Any };
            let found = images.resolve(&source, &|_| ()).await?;
            images.make(&found, &target, None, &|_| ()).await
        })
        .await?;
    Ok((ms(begun) / 1e3, made.used_bytes))
}

/// Runs `command`; how many seconds it took.
async fn timed(mut command: Command) -> Result<f64, Error> {
    let shown = command.as_std().get_program().to_string_lossy().into_owned();
    // A run that is given up takes them along.
    command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::null());
    let begun = Instant::now();
    let done = command.output().await.map_err(Error::Task)?;
    let took = ms(begun) / 1e3;
    if done.status.success() {
        return Ok(took);
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    Err(Error::Program(shown, done.status.to_string(), last.to_owned()))
}

async fn theirs(reference: &str, place: &Path) -> Result<(f64, f64), Error> {
    let (layout, bundle) = (place.join("layout"), place.join("bundle"));
    let named = format!("{}:latest", layout.display());
    let mut copy = Command::new("skopeo");
    copy.args(["--insecure-policy", "copy", "--quiet", "--src-tls-verify=false"]);
    copy.arg(format!("docker://{reference}")).arg(format!("oci:{named}"));
    let copied = timed(copy).await?;
    let mut unpack = Command::new("umoci");
    unpack.arg("unpack");
    if !rustix::process::geteuid().is_root() {
        unpack.arg("--rootless");
    }
    unpack.arg("--image").arg(named).arg(bundle);
    Ok((copied, timed(unpack).await?))
}

/// A fresh directory in `directory`, once nothing is left to be written back there.
fn place(directory: &Path) -> Result<tempfile::TempDir, Error> {
    let settled = File::open(directory).and_then(|file| Ok(rustix::fs::syncfs(file)?));
    settled.map_err(Error::Task)?;
    tempfile::tempdir_in(directory).map_err(Error::Task)
}

/// Measures `rounds` of both, below `directory`.
pub(super) async fn run(image: &Image, rounds: u32, directory: &Path) -> Result<Measured, Error> {
    let registry = Registry::start().map_err(Error::Task)?;
    let reference = registry.add("bench/pulled", image.clone());
    image.read_all()?;
    let threads = Threads::start().map_err(Error::Task)?;
    let mut measured = Measured::default();
    for round in 0..rounds {
        for turn in 0..2 {
            let place = place(directory)?;
            if (round + turn) % 2 == 0 {
                let (took, bytes) = ours(&threads, reference.clone(), place.path()).await?;
                measured.ours.push(took);
                measured.unpacked_bytes = bytes;
            } else {
                let (copy, unpack) = theirs(&reference, place.path()).await?;
                measured.copy.push(copy);
                measured.unpack.push(unpack);
            }
            // Not by dropping it: what cannot be removed is said.
            place.close().map_err(Error::Task)?;
        }
    }
    Ok(measured)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// An image of a few files.
    fn image(directory: &Path) -> Image {
        let mut archive = tar::Builder::new(Vec::new());
        for name in ["etc/a", "etc/b"] {
            let mut header = tar::Header::new_gnu();
            header.set_size(2);
            header.set_mode(0o644);
            archive.append_data(&mut header, name, &b"x\n"[..]).unwrap();
        }
        let path = directory.join("layer.tar");
        std::fs::write(&path, archive.into_inner().unwrap()).unwrap();
        Image::of_archives(&[path], &json!({})).unwrap()
    }

    #[tokio::test]
    async fn both_pull_and_unpack_and_nothing_is_left() {
        for program in ["skopeo", "umoci"] {
            if let Err(why) = version(program).await {
                println!("skipped: {why}");
                return;
            }
        }
        let directory = tempfile::tempdir().unwrap();
        let scratch = directory.path().join("scratch");
        std::fs::create_dir(&scratch).unwrap();
        let measured = run(&image(directory.path()), 3, &scratch).await.unwrap();
        let theirs = measured.theirs();
        assert_eq!((measured.ours.len(), theirs.len()), (3, 3));
        assert!(measured.ours.iter().chain(&theirs).all(|took| *took > 0.0));
        assert!(measured.unpacked_bytes > 0);
        assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_program_that_is_missing_or_fails_is_named() {
        let why = version("kelvin-no-such-program").await.unwrap_err();
        assert!(why.contains("kelvin-no-such-program is not installed"), "{why}");
        let mut command = Command::new("sh");
        command.args(["-c", "echo first >&2; echo the cause >&2; exit 3"]);
        let shown = timed(command).await.unwrap_err().to_string();
        assert!(shown.contains("sh") && shown.contains("the cause") && shown.contains('3'), "{shown}");
    }
}
