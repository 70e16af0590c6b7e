//! Layers become an ext4 file: pulled side by side, laid over each other in their order on one thread that may block.
//!
//! ```text
//!   pull, pull, pull ──(open layers, in order)──> tree and spool ──> ext4 ──> its name
//! ```
//!
//! What is half done when nobody waits any more, or when the process dies, has no name and goes with its descriptor.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::{StreamExt, stream};
use tokio::sync::mpsc;

use crate::cache::{Cache, Pinned};
use crate::decompress;
use crate::digest::{Digest, Hashing};
use crate::error::{Error, Fault, READING, Refusal};
use crate::ext4::{self, Written};
use crate::limits::Limits;
use crate::local::{Local, Opened};
use crate::registry::short;
use crate::resolve::{Layer, Origin, Resolved};
use crate::spool::Spool;
use crate::tar::Archive;
use crate::told::Told;
use crate::tree::Tree;

/// Layers that are pulled at one time.
const PULLS: usize = 3;

/// Where a layer's bytes are now.
enum Blob {
    /// Verified when it was pulled.
    Cached(Pinned),
    Local(Arc<Local>),
}

/// A reader that fails when nobody waits any more: one entry may have all bytes that there may be.
struct UntilStopped<'a, R> {
    inner: R,
    stopped: &'a dyn Fn() -> bool,
}

impl<R: Read> Read for UntilStopped<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if (self.stopped)() {
            return Err(io::Error::other("nobody waits any more"));
        }
        self.inner.read(buffer)
    }
}

/// Says that nobody waits any more.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Makes `target` of `image`.
pub(crate) async fn make(
    cache: &Arc<Cache>,
    limits: &Limits,
    image: &Resolved,
    target: &Path,
    disk: Option<u64>,
    told: &Told,
) -> Result<Written, Error> {
    // Room for all: while the feed waited for room, nobody would read what the other pulls get, and registries count as stalled.
    let (blobs, coming) = mpsc::channel(image.layers.len().max(1));
    let (lines, mut said) = mpsc::channel::<String>(16);
    let stop = Arc::new(AtomicBool::new(false));
    let _guard = StopOnDrop(Arc::clone(&stop));
    let job =
        Job { image: image.clone(), limits: limits.clone(), target: target.to_owned(), disk, stop, lines };
    let work = tokio::task::spawn_blocking(move || job.run(coming));
    let feed = async move {
        let pulls =
            stream::iter(0..image.layers.len()).map(|at| pull(cache, image, at, told)).buffered(PULLS);
        tokio::pin!(pulls);
        loop {
            let next = tokio::select! {
                // It has failed, and says why itself.
                () = blobs.closed() => return Ok(()),
                next = pulls.next() => next,
            };
            let Some(blob) = next else { return Ok(()) };
            if blobs.send(blob?).await.is_err() {
                return Ok(());
            }
        }
    };
    let log = async {
        while let Some(line) = said.recv().await {
            told(&line);
        }
    };
    let (fed, (), done): (Result<(), Error>, (), _) = tokio::join!(feed, log, work);
    fed?;
    done.map_err(|error| Error::ended(&error))?
}

async fn pull(cache: &Arc<Cache>, image: &Resolved, at: usize, told: &Told) -> Result<Blob, Error> {
    match (&image.origin, &image.layers[at].descriptor) {
        (Origin::Registry(session), Some(descriptor)) => {
            let what = format!("layer {}", at + 1);
            session.blob(cache, descriptor, &what, told).await.map(Blob::Cached)
        }
        (Origin::Local(local), _) => Ok(Blob::Local(Arc::clone(local))),
        // A registry's manifest says of each layer where it is.
        (Origin::Registry(_), None) | (Origin::Nobody, _) => Err(Error::Stopped),
    }
}

/// The part that blocks.
struct Job {
    image: Resolved,
    limits: Limits,
    target: PathBuf,
    disk: Option<u64>,
    stop: Arc<AtomicBool>,
    lines: mpsc::Sender<String>,
}

impl Job {
    fn run(&self, mut coming: mpsc::Receiver<Blob>) -> Result<Written, Error> {
        let writing = |error| Error::io("writing the files of an image", error);
        if self.target.symlink_metadata().is_ok() {
            return Err(writing(io::ErrorKind::AlreadyExists.into()));
        }
        let directory = match self.target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let stopped = || self.stop.load(Ordering::Relaxed);
        let mut spool = Spool::new(directory).map_err(writing)?;
        let mut tree = Tree::new(&self.limits);
        let (mut entries, mut left) = (0, self.limits.uncompressed_bytes);
        for (at, layer) in self.image.layers.iter().enumerate() {
            // A pull has failed, which is told there.
            let Some(blob) = coming.blocking_recv() else { return Err(Error::Stopped) };
            self.say(format!("layer {} of {}", at + 1, self.image.layers.len()));
            let (number, bytes) =
                self.layer(&mut tree, &mut spool, at, layer, &blob, entries, left, &stopped)?;
            (entries, left) = (number, left.saturating_sub(bytes));
        }
        if tree.take_lost_and_found().map_err(|why| Error::refused(self.image.shown(), why))? {
            self.say("lost+found of the image is left out: the file system has its own".to_owned());
        }
        self.say(format!("writing the file system: {} files and directories", tree.len()));
        let spool = spool.finish().map_err(|fault| fault.of(self.image.shown()))?;
        let key = self.image.key();
        let mut identity = [0; 16];
        for (byte, digits) in identity.iter_mut().zip(key.as_bytes().chunks_exact(2)) {
            let digits = std::str::from_utf8(digits).unwrap_or("0");
            *byte = u8::from_str_radix(digits, 16).unwrap_or(0);
        }
        ext4::write(tree, &spool, &self.target, self.disk, identity, &stopped)
    }

    /// Lays one layer over the tree: entries so far, and the bytes of its archive.
    #[expect(clippy::too_many_arguments, reason = "all of one loop's state")]
    fn layer(
        &self,
        tree: &mut Tree,
        spool: &mut Spool,
        at: usize,
        layer: &Layer,
        blob: &Blob,
        entries: u64,
        left: u64,
        stopped: &dyn Fn() -> bool,
    ) -> Result<(u64, u64), Error> {
        let part = match &layer.descriptor {
            Some(of) => format!("layer {} ({}) of {}", at + 1, short(&of.digest), self.image.shown()),
            None => format!("layer {} of {}", at + 1, self.image.shown()),
        };
        let refused = |why| Error::refused(part.clone(), why);
        let (source, size): Opened = match blob {
            Blob::Cached(pinned) => {
                let file = pinned.open()?;
                let size = file.metadata().map_err(|error| Error::io("reading a layer", error))?.len();
                (Box::new(file), size)
            }
            Blob::Local(local) => {
                let there = local.open(&layer.name).map_err(|fault| fault.of(&part))?;
                there.ok_or_else(|| refused(Refusal::Json("its file is missing".to_owned())))?
            }
        };
        if let Some(of) = &layer.descriptor
            && of.size != size
        {
            return Err(refused(Refusal::Size { expected: of.size, found: size }));
        }
        if size > self.limits.layer_bytes {
            return Err(refused(Refusal::Limit { what: "bytes of a layer", limit: self.limits.layer_bytes }));
        }
        let laid = (|| {
            // What was pulled has been digested; what is local is digested as it is read.
            let mut digested = match (&layer.descriptor, blob) {
                (Some(of), Blob::Local(_)) => (Some(&of.digest), Hashing::new(source)),
                _ => (None, Hashing::new(source)),
            };
            let (number, found, bytes) = {
                let plain = decompress::open(&mut digested.1, left).map_err(Fault::reading)?;
                let plain = Hashing::new(UntilStopped { inner: plain, stopped });
                let layer_number = u16::try_from(at).unwrap_or(u16::MAX);
                let mut archive = Archive::new(plain, &self.limits, entries);
                tree.apply(&mut archive, layer_number, spool, stopped)?;
                let number = archive.entries();
                let mut plain = archive.into_source();
                // What comes behind the end of the archive is of the digest, too.
                io::copy(&mut plain, &mut io::sink()).map_err(Fault::reading)?;
                let (found, bytes) = plain.finish();
                (number, found, bytes)
            };
            if let (Some(expected), mut compressed) = digested {
                io::copy(&mut compressed, &mut io::sink()).map_err(Fault::reading)?;
                expected.check(&compressed.finish().0)?;
            }
            layer.diff_id.check(&found)?;
            Ok((number, bytes))
        })();
        laid.map_err(|fault: Fault| {
            if stopped() {
                return Error::Stopped;
            }
            let is_limit = matches!(fault, Fault::Refused(Refusal::Limit { .. }));
            // Also one that the disk cannot give back.
            let may_be_bad = matches!(fault, Fault::Refused(_) | Fault::Io { what: READING, .. });
            if let (Blob::Cached(pinned), true, Some(of)) = (blob, may_be_bad, &layer.descriptor)
                && !is_limit
                && !is_sound(pinned, &of.digest)
            {
                // The disk, or a crash before it had the content: the next pull is of use, and the image is not to blame.
                pinned.forget();
                return Error::io("reading a cached layer", io::ErrorKind::InvalidData.into());
            }
            fault.of(&part)
        })
    }

    fn say(&self, line: String) {
        let _ = self.lines.blocking_send(line);
    }
}

/// Whether a blob is still what was verified when it was pulled.
fn is_sound(pinned: &Pinned, digest: &Digest) -> bool {
    let Ok(file) = pinned.open() else { return false };
    let mut all = Hashing::new(file);
    io::copy(&mut all, &mut io::sink()).is_ok() && all.finish().0 == *digest
}
