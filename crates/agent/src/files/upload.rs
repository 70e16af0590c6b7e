//! Content up: as one file, as a form, or of files that are there.
//!
//! An upload writes in place, as envd does: watchers see one file, and a torn upload leaves what had
//! arrived (the caller gets the error). What is composed is whole or not there; a crash leaves a file `.compose-*` beside it.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_compression::tokio::bufread::GzipDecoder;
use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, BodyStream, Limited};
use hyper::body::{Frame, Incoming};
use serde::Deserialize;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio_util::io::{ReaderStream, StreamReader};

use super::request::{Asked, CHUNK, Content, Reply, StoodStill, ask, failed, no_path, open, resolve};
use crate::entries::make_dirs;
use crate::fault::blocking;
use crate::metadata;
use crate::reply::{error, json};
use crate::state::State;
use crate::users::User;

/// How long the body of an upload may stand still.
const IDLE: Duration = Duration::from_secs(30);
/// The largest body of a request to compose, and the most files in one.
const MAX_COMPOSE: usize = 1 << 20;
/// Files in one upload.
const MAX_PARTS: usize = 10_000;
/// What stands before the content of a file in a form, in bytes.
const MAX_HEAD: usize = 256 << 10;
/// What a form's parser is given at once, in bytes.
const PORTION: usize = 256 << 10;

/// The body of an upload, unpacked, that fails when it stands still.
pub(super) fn content(request: Request<Incoming>) -> Result<Content, Box<Reply>> {
    let coding = request.headers().get(CONTENT_ENCODING).map(|value| value.to_str().unwrap_or("?").trim());
    let gzip = match coding {
        None | Some("" | "identity") => false,
        Some(name) if name.eq_ignore_ascii_case("gzip") => true,
        Some(name) => {
            let text = format!("content encoding '{name}' is not supported, supported: [identity, gzip]");
            return Err(Box::new(error(StatusCode::UNSUPPORTED_MEDIA_TYPE, &text)));
        }
    };
    let torn = |problem| io::Error::new(io::ErrorKind::UnexpectedEof, problem);
    let frames = TryStreamExt::map_err(BodyStream::new(request.into_body()), torn)
        .try_filter_map(|frame: Frame<Bytes>| async { Ok(frame.into_data().ok()) });
    let reader = BufReader::with_capacity(CHUNK, StreamReader::new(Box::pin(impatient(frames))));
    Ok(if gzip { Box::pin(GzipDecoder::new(reader)) } else { Box::pin(reader) })
}

/// `frames` with an error instead of a pause that is too long.
fn impatient(
    frames: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
) -> impl Stream<Item = io::Result<Bytes>> + Send {
    futures::stream::try_unfold(Box::pin(frames), |mut frames| async move {
        match tokio::time::timeout(IDLE, frames.try_next()).await {
            Ok(next) => Ok(next?.map(|bytes| (bytes, frames))),
            Err(_elapsed) => Err(io::Error::new(io::ErrorKind::TimedOut, StoodStill)),
        }
    })
}

/// `POST /files`: one file as it is, or one and more as a form.
pub async fn upload(state: &Arc<State>, request: Request<Incoming>) -> Reply {
    let kind = request.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.to_owned();
    let result = async {
        let asked = ask(state, &request)?;
        let attributes = metadata::of_headers(request.headers())
            .map_err(|text| Box::new(error(StatusCode::BAD_REQUEST, &text)))?;
        let essence = kind.split(';').next().unwrap_or_default().trim();
        if essence.eq_ignore_ascii_case("application/octet-stream") {
            let path = asked.path.ok_or_else(no_path)?;
            let content = content(request)?;
            return Ok(vec![write(path, content, &asked.user, &attributes).await?]);
        }
        if !essence.eq_ignore_ascii_case("multipart/form-data") {
            return Err(Box::new(error(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "send the content as multipart/form-data or application/octet-stream",
            )));
        }
        let boundary = multer::parse_boundary(&kind).map_err(|problem| form_error(&problem))?;
        let portions = Portions::of(content(request)?);
        let left = Arc::clone(&portions.left);
        write_form(multer::Multipart::new(portions, boundary), &left, &asked, &attributes).await
    };
    match result.await {
        Ok(written) => json(StatusCode::OK, &written),
        Err(reply) => *reply,
    }
}

/// The body of a form for its parser, which takes all that there is before it looks at it: what a caller sends fast, or
/// packed, would be in memory as a whole.
struct Portions {
    content: ReaderStream<Content>,
    /// Given since the parser last had to wait, in bytes.
    given: usize,
    /// What may come before the next file's content begins, in bytes; `usize::MAX` while it comes.
    left: Arc<AtomicUsize>,
}

impl Portions {
    fn of(content: Content) -> Self {
        Self {
            content: ReaderStream::with_capacity(content, CHUNK),
            given: 0,
            left: Arc::new(AtomicUsize::new(MAX_HEAD + PORTION)),
        }
    }
}

impl Stream for Portions {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.given >= PORTION {
            self.given = 0;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let left = self.left.load(Ordering::Relaxed);
        if left == 0 {
            let text = format!("more than {MAX_HEAD} bytes before the content of a file");
            return Poll::Ready(Some(Err(io::Error::new(io::ErrorKind::InvalidData, text))));
        }
        let next = ready!(Pin::new(&mut self.content).poll_next(context));
        if let Some(Ok(bytes)) = &next {
            self.given += bytes.len();
            if left != usize::MAX {
                self.left.store(left.saturating_sub(bytes.len()), Ordering::Relaxed);
            }
        }
        Poll::Ready(next)
    }
}

fn form_error(problem: &multer::Error) -> Box<Reply> {
    let mut source = std::error::Error::source(problem);
    while let Some(inner) = source {
        if let Some(inner) = inner.downcast_ref::<io::Error>() {
            return Box::new(failed(Path::new("form"), inner));
        }
        source = inner.source();
    }
    Box::new(error(StatusCode::BAD_REQUEST, &format!("the form cannot be read: {problem}")))
}

async fn write_form(
    mut form: multer::Multipart<'static>,
    left: &AtomicUsize,
    asked: &Asked,
    attributes: &[(String, String)],
) -> Result<Vec<Written>, Box<Reply>> {
    let mut written: Vec<Written> = Vec::new();
    loop {
        // Some of it may be of the file that follows.
        left.store(MAX_HEAD + PORTION, Ordering::Relaxed);
        let next = form.next_field().await.map_err(|problem| form_error(&problem))?;
        left.store(usize::MAX, Ordering::Relaxed);
        let Some(mut field) = next else { break };
        if field.name() != Some("file") {
            while field.chunk().await.map_err(|problem| form_error(&problem))?.is_some() {}
            continue;
        }
        let path = match (&asked.path, field.file_name()) {
            (Some(path), _) => path.clone(),
            (None, Some(name)) if !name.is_empty() => resolve(&asked.user, name)?,
            (None, _) => return Err(no_path()),
        };
        if written.iter().any(|known| known.is(&path)) {
            let text = format!("path '{}' stands twice in one upload; the first was written", path.display());
            return Err(Box::new(error(StatusCode::BAD_REQUEST, &text)));
        }
        if written.len() >= MAX_PARTS {
            let text = format!("more than {MAX_PARTS} files in one upload");
            return Err(Box::new(error(StatusCode::BAD_REQUEST, &text)));
        }
        let content = StreamReader::new(field.map_err(|problem| {
            let kind = match std::error::Error::source(&problem).and_then(|inner| inner.downcast_ref()) {
                Some(inner) => io::Error::kind(inner),
                None => io::ErrorKind::InvalidData,
            };
            io::Error::new(kind, problem)
        }));
        written.push(write(path, Box::pin(content), &asked.user, attributes).await?);
    }
    if written.is_empty() {
        return Err(Box::new(error(StatusCode::BAD_REQUEST, "the form has no field 'file'")));
    }
    Ok(written)
}

/// What the caller is told of a file that was written.
#[derive(serde::Serialize)]
struct Written {
    name: String,
    r#type: &'static str,
    path: String,
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    metadata: HashMap<String, String>,
}

impl Written {
    fn at(path: &Path) -> Self {
        Self {
            name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            r#type: "file",
            path: path.to_string_lossy().into_owned(),
            metadata: metadata::read(path),
        }
    }

    fn is(&self, path: &Path) -> bool {
        self.path == path.to_string_lossy()
    }
}

/// Creates or empties the file at `path`; who makes it new owns it.
async fn create(path: &Path, user: &User) -> io::Result<File> {
    let (path, user) = (path.to_owned(), user.clone());
    let made = blocking(move || {
        if let Some(parent) = path.parent() {
            make_dirs(parent, &user)?;
        }
        let new = !path.exists();
        let (file, size) = open(&path, std::fs::File::options().write(true).create(true).truncate(false))?;
        if new {
            std::os::unix::fs::fchown(&file, Some(user.uid), Some(user.gid))?;
        } else if size > 0 {
            match file.set_len(0) {
                // Files of the kernel's have a length and cannot be cut.
                Err(error) if error.raw_os_error() != Some(libc::EINVAL) => return Err(error),
                _ => {}
            }
        }
        Ok(file)
    });
    Ok(File::from_std(made.await?))
}

async fn write(
    path: PathBuf,
    mut content: Content,
    user: &User,
    attributes: &[(String, String)],
) -> Result<Written, Box<Reply>> {
    let result = async {
        let mut file = create(&path, user).await?;
        let mut buffer = vec![0; CHUNK];
        loop {
            match content.read(&mut buffer).await? {
                0 => break,
                count => file.write_all(&buffer[..count]).await?,
            }
        }
        file.flush().await?;
        let (path, attributes) = (path.clone(), attributes.to_vec());
        blocking(move || metadata::replace(&path, &attributes).map(|()| Written::at(&path))).await
    };
    match result.await {
        Ok(written) => Ok(written),
        Err(problem) => Err(Box::new(failed(&path, &problem))),
    }
}

#[derive(Debug, Deserialize)]
struct Compose {
    source_paths: Vec<String>,
    destination: String,
    username: Option<String>,
}

/// `POST /files/compose`: appends files to one another and removes them. The destination is written beside itself
/// and renamed, so that it may be one of the sources and is whole or not there.
pub async fn compose(state: &Arc<State>, request: Request<Incoming>) -> Reply {
    let result = async {
        let bad = |text: &str| Box::new(error(StatusCode::BAD_REQUEST, text));
        let body = Limited::new(request.into_body(), MAX_COMPOSE).collect().await;
        let body = body.map_err(|problem| bad(&problem.to_string()))?.to_bytes();
        let asked: Compose = serde_json::from_slice(&body).map_err(|problem| bad(&problem.to_string()))?;
        let user = state
            .user(asked.username.as_deref())
            .map_err(|text| Box::new(error(StatusCode::UNAUTHORIZED, &text)))?;
        if asked.source_paths.is_empty() || asked.destination.is_empty() {
            return Err(bad("source_paths and destination have to be given"));
        }
        let sources: Vec<PathBuf> =
            asked.source_paths.iter().map(|path| resolve(&user, path)).collect::<Result<_, _>>()?;
        let destination = resolve(&user, &asked.destination)?;
        join(&sources, &destination, &user).await?;
        Ok(Written::at(&destination))
    };
    match result.await {
        Ok(written) => json(StatusCode::OK, &written),
        Err(reply) => *reply,
    }
}

async fn join(sources: &[PathBuf], destination: &Path, user: &User) -> Result<(), Box<Reply>> {
    let at = |path: &Path, problem: &io::Error| Box::new(failed(path, problem));
    let mut inputs = Vec::new();
    for path in sources {
        let own = path.clone();
        let opened = blocking(move || open(&own, std::fs::File::options().read(true))).await;
        inputs.push(File::from_std(opened.map_err(|problem| at(path, &problem))?.0));
    }
    if destination.is_dir() {
        return Err(at(destination, &io::ErrorKind::IsADirectory.into()));
    }
    let part = destination.with_file_name(format!(".compose-{}", kelvin_api::id::VmId::random()));
    let written = async {
        let mut file = create(&part, user).await?;
        for mut input in inputs {
            tokio::io::copy(&mut input, &mut file).await?;
        }
        file.flush().await?;
        tokio::fs::rename(&part, destination).await
    };
    if let Err(problem) = written.await {
        let _ = tokio::fs::remove_file(&part).await;
        return Err(at(destination, &problem));
    }
    for path in sources.iter().filter(|path| *path != destination) {
        match tokio::fs::remove_file(path).await {
            // The same source twice.
            Err(problem) if problem.kind() == io::ErrorKind::NotFound => {}
            Err(problem) => return Err(at(path, &problem)),
            Ok(()) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    #[tokio::test]
    async fn a_form_is_taken_in_portions_and_its_head_is_bounded() {
        let endless = |content: &'static [u8]| -> Content {
            Box::pin(content.chain(tokio::io::repeat(b'a').take(64 << 20)))
        };
        // The parser alone would take all of it at once.
        let mut form = Portions::of(endless(b""));
        form.left.store(usize::MAX, Ordering::Relaxed);
        let mut at_once = 0;
        while let Poll::Ready(Some(Ok(bytes))) = futures::poll!(form.next()) {
            at_once += bytes.len();
        }
        assert_eq!(at_once, PORTION);

        let form = Portions::of(endless(b"--b\r\nContent-Disposition: "));
        let mut form = multer::Multipart::new(form, "b");
        let problem = form.next_field().await.unwrap_err();
        assert_eq!(form_error(&problem).status(), StatusCode::BAD_REQUEST);
    }
}
