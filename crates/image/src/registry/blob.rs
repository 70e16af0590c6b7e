//! Pulling a blob into the cache: it goes on where it stopped, and is digested as it comes, on a thread that may block.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use ::http::header::{self, HeaderMap, HeaderValue};
use ::http::{Response, StatusCode};
use bytes::Bytes;
use hyper::body::Incoming;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::http::{Pace, Trouble, later};
use super::{Endpoint, Session, short, wrong_size};
use crate::cache::{Cache, Flight, Pinned, key};
use crate::digest::Digest;
use crate::error::Error;
use crate::manifest::Descriptor;
use crate::told::Told;

/// Frames between the network and the disk.
const QUEUE: usize = 16;

/// The beginning of a blob, and the right to write it: it goes with the thread that writes, so that nobody else begins
/// while that one has not ended.
struct Part {
    file: File,
    hasher: Sha256,
    bytes: u64,
    _turn: Flight,
}

fn writing(error: io::Error) -> Error {
    Error::io("writing a blob", error)
}

impl Part {
    /// What is there of a blob of `size` bytes.
    fn open(path: &Path, size: u64, turn: Flight) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut part = Self { file, hasher: Sha256::new(), bytes: 0, _turn: turn };
        if part.file.metadata()?.len() > size {
            part.restart()?;
        }
        let mut buffer = vec![0; 256 << 10];
        loop {
            let read = part.file.read(&mut buffer)?;
            if read == 0 {
                return Ok(part);
            }
            part.hasher.update(&buffer[..read]);
            part.bytes += read as u64;
        }
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        (self.hasher, self.bytes) = (Sha256::new(), 0);
        Ok(())
    }

    /// Writes what comes until nothing more does.
    fn take(mut self, mut frames: mpsc::Receiver<Bytes>) -> (Self, io::Result<()>) {
        while let Some(frame) = frames.blocking_recv() {
            if let Err(error) = self.file.write_all(&frame) {
                // How much of it was written is not known.
                let restarted = self.restart();
                return (self, restarted.and(Err(error)));
            }
            self.hasher.update(&frame);
            self.bytes += frame.len() as u64;
        }
        (self, Ok(()))
    }
}

/// Where the bytes of a 206 begin: `bytes 10-99/100`.
fn range_start(response: &Response<Incoming>) -> Option<u64> {
    let text = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    text.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    spawn_blocking(work).await.map_err(|error| Error::ended(&error))
}

impl Session {
    /// The blob, from the cache or pulled into it. `what` names it in messages.
    ///
    /// # Errors
    /// `NotFound`, `Denied`, `Unavailable`, `DiskFull`, `Io`; `Refused` when it is not what `descriptor` says.
    pub(crate) async fn blob(
        &self,
        cache: &Arc<Cache>,
        descriptor: &Descriptor,
        what: &str,
        told: &Told,
    ) -> Result<Pinned, Error> {
        let key = key(&self.reference.full_repository(), &descriptor.digest);
        let mut failed = None;
        for endpoint in &self.endpoints {
            let turn = cache.flight(&key).await;
            if let Some(pinned) = cache.get(&key, descriptor.size) {
                return Ok(pinned);
            }
            match self.blob_from(endpoint, cache, &key, descriptor, turn, what, told).await {
                Ok(pinned) => return Ok(pinned),
                Err(error @ (Error::DiskFull { .. } | Error::Io { .. })) => return Err(error),
                Err(error) => {
                    self.next_endpoint(endpoint, &error, told);
                    failed = Some(error);
                }
            }
        }
        Err(failed.unwrap_or(Error::Stopped))
    }

    #[expect(clippy::too_many_arguments, reason = "where from, where to, and what")]
    async fn blob_from(
        &self,
        endpoint: &Endpoint,
        cache: &Arc<Cache>,
        key: &Digest,
        descriptor: &Descriptor,
        turn: Flight,
        what: &str,
        told: &Told,
    ) -> Result<Pinned, Error> {
        let size = descriptor.size;
        let mut part = {
            let (cache, path) = (Arc::clone(cache), cache.part(key));
            let open = move || cache.trim_parts().and_then(|()| Part::open(&path, size, turn));
            blocking(open).await?.map_err(writing)?
        };
        told(&match part.bytes {
            0 => format!("pulling {what} {}, {size} bytes", short(&descriptor.digest)),
            had => format!("pulling {what} {}, {had} of {size} bytes are there", short(&descriptor.digest)),
        });
        let mut is_begun_by_another = part.bytes > 0;
        let mut tries = self.tries(endpoint);
        loop {
            while part.bytes < size {
                let (back, outcome) = self.some(endpoint, descriptor, part, what).await?;
                part = back;
                match outcome {
                    Ok(()) if part.bytes == size => {}
                    Ok(()) => tries.again(format!("{what} is cut short"), None, told).await?,
                    Err(Trouble::Later { reason, after }) => tries.again(reason, after, told).await?,
                    Err(Trouble::Missing(reason)) => return Err(self.missing(endpoint, what, &reason)),
                    Err(Trouble::Failed(error)) => return Err(error),
                }
            }
            let Err(why) = descriptor.digest.check(&Digest::finish(part.hasher.clone())) else { break };
            part = blocking(move || part.restart().map(|()| part)).await?.map_err(writing)?;
            if !is_begun_by_another {
                return Err(Error::refused(self.part(what, descriptor), why));
            }
            // A mirror that lies, or a crash, has left a beginning that is none: that is not for this source to answer for.
            is_begun_by_another = false;
            told(&format!("what was there of {what} is of no use: pulling it from its beginning"));
        }
        let (cache, key) = (Arc::clone(cache), key.clone());
        blocking(move || {
            let _turn = part;
            cache.publish(&key, size).map_err(writing)
        })
        .await?
    }

    /// One request for what is missing of `part`, which comes back with what came.
    async fn some(
        &self,
        endpoint: &Endpoint,
        descriptor: &Descriptor,
        mut part: Part,
        what: &str,
    ) -> Result<(Part, Result<(), Trouble>), Error> {
        let size = descriptor.size;
        let mut headers = HeaderMap::new();
        if part.bytes > 0
            && let Ok(range) = HeaderValue::from_str(&format!("bytes={}-", part.bytes))
        {
            headers.insert(header::RANGE, range);
        }
        let response = match self.get(endpoint, &format!("blobs/{}", descriptor.digest), headers).await {
            Ok(response) => response,
            Err(trouble) => return Ok((part, Err(trouble))),
        };
        match response.status() {
            StatusCode::PARTIAL_CONTENT if range_start(&response) == Some(part.bytes) => {}
            // The whole of it.
            StatusCode::OK => {
                part = blocking(move || part.restart().map(|()| part)).await?.map_err(writing)?;
            }
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                part = blocking(move || part.restart().map(|()| part)).await?.map_err(writing)?;
                return Ok((part, Err(later("it does not go on where it stopped"))));
            }
            _ => {
                let most = self.shared.limits.retry_after;
                let trouble = self.shared.http.trouble(&endpoint.authority, response, most).await;
                return Ok((part, Err(trouble)));
            }
        }
        let had = part.bytes;
        let name = self.part(what, descriptor);
        let length =
            response.headers().get(header::CONTENT_LENGTH).and_then(|it| it.to_str().ok()?.parse().ok());
        if let Some(length) = length.map(|length: u64| length.saturating_add(had))
            && length != size
        {
            return Ok((part, Err(wrong_size(&name, size, length))));
        }
        let (sender, frames) = mpsc::channel(QUEUE);
        let writer = spawn_blocking(move || part.take(frames));
        let mut body = response.into_body();
        let mut came = had;
        let mut pace = Pace::new(self.shared.limits.slowest, self.shared.limits.idle);
        let outcome = loop {
            let asked = Instant::now();
            match self.shared.http.frame(&mut body).await {
                Ok(None) => break Ok(()),
                Err(trouble) => break Err(trouble),
                Ok(Some(bytes)) => {
                    came += bytes.len() as u64;
                    if came > size {
                        break Err(wrong_size(&name, size, came));
                    }
                    if let Err(trouble) = pace.came(bytes.len() as u64, asked.elapsed()) {
                        break Err(trouble);
                    }
                    // It has failed; why, it says itself.
                    if sender.send(bytes).await.is_err() {
                        break Ok(());
                    }
                }
            }
        };
        drop(sender);
        let (part, written) = writer.await.map_err(|error| Error::ended(&error))?;
        written.map_err(writing)?;
        Ok((part, outcome))
    }
}
