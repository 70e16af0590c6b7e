//! `/files`: content up and down, streamed in bounded memory.
//!
//! An upload writes in place, as envd does: watchers see one file, and a torn upload leaves what had
//! arrived (the caller gets the error).

use std::collections::HashMap;
use std::io::{self, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_compression::Level;
use async_compression::tokio::bufread::{GzipDecoder, GzipEncoder};
use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use http::header::{
    ACCEPT_ENCODING, CONTENT_DISPOSITION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE,
    RANGE, VARY,
};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, BodyStream, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use kelvin_api::signature::{Signature, query};
use serde::Deserialize;
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeekExt, AsyncWriteExt, BufReader};
use tokio_util::io::{ReaderStream, StreamReader};

use crate::entries::{clean, make_dirs};
use crate::fault::{FILE_SYSTEM, Fault, blocking};
use crate::metadata;
use crate::reply::{Body, error, json};
use crate::state::State;
use crate::users::User;

const CHUNK: usize = 64 << 10;
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

type Reply = Response<Body>;
type Content = Pin<Box<dyn AsyncRead + Send>>;

/// What every request to `/files` names.
struct Asked {
    user: User,
    path: Option<PathBuf>,
}

/// Whether a request without the access token shows a signature that stands in for it.
///
/// # Errors
/// The reply, when it does not.
pub fn admits(state: &State, request: &Request<Incoming>) -> Result<(), Box<Reply>> {
    let Some(signature) = Signature::of(request.method(), request.uri()) else {
        return Err(Box::new(error(StatusCode::UNAUTHORIZED, "missing signature query parameter")));
    };
    let token = state.settings().access_token.clone();
    signature
        .signed()
        .check(&token)
        .map_err(|problem| Box::new(error(StatusCode::UNAUTHORIZED, &problem.to_string())))
}

fn parameters(request: &Request<Incoming>) -> Result<HashMap<String, String>, Box<Reply>> {
    query(request.uri()).map_err(|text| Box::new(error(StatusCode::BAD_REQUEST, text)))
}

fn ask(state: &Arc<State>, request: &Request<Incoming>) -> Result<Asked, Box<Reply>> {
    let parameters = parameters(request)?;
    let user = state
        .user(parameters.get("username").map(String::as_str))
        .map_err(|text| Box::new(error(StatusCode::UNAUTHORIZED, &text)))?;
    let path = match parameters.get("path").filter(|path| !path.is_empty()) {
        Some(path) => Some(resolve(&user, path)?),
        None => None,
    };
    Ok(Asked { user, path })
}

fn resolve(user: &User, path: &str) -> Result<PathBuf, Box<Reply>> {
    if path.contains('\0') {
        return Err(Box::new(error(StatusCode::BAD_REQUEST, "the path has a NUL byte")));
    }
    Ok(clean(&user.resolve(path)))
}

fn no_path() -> Box<Reply> {
    Box::new(error(StatusCode::BAD_REQUEST, "the query parameter 'path' is missing"))
}

fn failed(path: &Path, problem: &io::Error) -> Reply {
    let fault = Fault::of(problem);
    let text = match (fault, problem.kind()) {
        (Fault::NotFound, _) => format!("path '{}' does not exist", path.display()),
        (_, io::ErrorKind::IsADirectory) => format!("path '{}' is a directory", path.display()),
        (_, io::ErrorKind::NotADirectory) => format!("a parent of '{}' is not a directory", path.display()),
        (_, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
            "not enough disk space available".to_owned()
        }
        _ => format!("'{}': {problem}", path.display()),
    };
    let stood_still = problem.get_ref().is_some_and(|inner| inner.is::<StoodStill>());
    error(if stood_still { StatusCode::REQUEST_TIMEOUT } else { fault.status() }, &text)
}

/// A caller's body that does not come.
#[derive(Debug, thiserror::Error)]
#[error("the body stood still")]
struct StoodStill;

/// Opens what can be read or written without waiting for somebody: a FIFO or a device would.
fn open(path: &Path, options: &mut std::fs::OpenOptions) -> io::Result<(std::fs::File, u64)> {
    let file = options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let found = file.metadata()?;
    if found.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !found.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    Ok((file, found.len()))
}

/// File systems of the kernel's own, whose files are made as they are read: what they say of their length is not so.
/// Source: Linux, `include/uapi/linux/magic.h`.
const MADE_AS_READ: [u64; 12] = [
    0x9fa0,      // proc
    0x6265_6572, // sysfs
    0x6367_7270, // cgroup2
    0x0027_e0eb, // cgroup
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x7363_6673, // securityfs
    0xcafe_4a11, // bpf
    0xde5e_81e4, // efivarfs
    0x6265_6570, // configfs
    0x6165_676c, // pstore
    0xf97c_ff8c, // selinux
];

/// A file to be downloaded, with its first bytes.
struct Opened {
    file: std::fs::File,
    first: Vec<u8>,
    /// Its length; none when that is known at its end only.
    size: Option<u64>,
}

impl Opened {
    fn at(path: &Path) -> io::Result<Self> {
        let (mut file, size) = open(path, std::fs::File::options().read(true))?;
        let mut first = vec![0; CHUNK];
        let mut filled = 0;
        // To the end of the chunk or of the file: what cannot be read is an error here, not in the middle of a reply.
        let at_end = loop {
            match io::Read::read(&mut file, &mut first[filled..]) {
                Ok(0) => break filled < first.len(),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A file of the kernel's that would have to be waited for, or that fails once it was read.
                Err(_) if filled > 0 => break true,
                Err(error) => return Err(error),
            }
        };
        first.truncate(filled);
        let made_as_read =
            || rustix::fs::fstatfs(&file).is_ok_and(|found| MADE_AS_READ.contains(&(found.f_type as u64)));
        let size = match at_end {
            // All of it is here: whatever was said of its length.
            true => Some(filled as u64),
            false if size < filled as u64 || made_as_read() => None,
            false => Some(size),
        };
        Ok(Self { file, first, size })
    }

    /// All of it.
    fn content(self) -> impl AsyncRead + Send + Unpin + 'static {
        std::io::Cursor::new(self.first).chain(File::from_std(self.file))
    }
}

/// `GET /files`.
pub async fn download(state: &Arc<State>, request: &Request<Incoming>) -> Reply {
    let path = match ask(state, request).and_then(|asked| asked.path.ok_or_else(no_path)) {
        Ok(path) => path,
        Err(reply) => return *reply,
    };
    let Some(coding) = coding(request.headers()) else {
        return error(
            StatusCode::NOT_ACCEPTABLE,
            "no acceptable encoding found, supported: [identity, gzip]",
        );
    };
    let at = path.clone();
    let opened = match blocking(move || Opened::at(&at)).await {
        Ok(opened) => opened,
        Err(problem) => return failed(&path, &problem),
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name: String =
        name.chars().map(|c| if c.is_ascii_graphic() && c != '"' && c != '\\' { c } else { '_' }).collect();
    let reply = Response::builder()
        .header(CONTENT_TYPE, "application/octet-stream")
        .header("accept-ranges", "bytes")
        .header(VARY, "accept-encoding")
        .header(CONTENT_DISPOSITION, format!("inline; filename=\"{name}\""));
    let packs = coding == Coding::Gzip && !request.headers().contains_key(RANGE);
    let made = match opened.size {
        Some(size) if size > 0 && !packs => match part(reply, opened, size, request.headers()).await {
            Ok(made) => made,
            Err(problem) => return failed(&path, &problem),
        },
        Some(1..) if packs => {
            let packed =
                GzipEncoder::with_quality(BufReader::with_capacity(CHUNK, opened.content()), Level::Fastest);
            reply.header(CONTENT_ENCODING, "gzip").body(stream(packed))
        }
        Some(_) => reply.header(CONTENT_LENGTH, 0).body(stream(tokio::io::empty())),
        // What there is goes out, its length unknown.
        None => reply.body(stream(opened.content())),
    };
    made.unwrap_or_else(|problem| error(StatusCode::INTERNAL_SERVER_ERROR, &problem.to_string()))
}

fn stream(content: impl AsyncRead + Send + 'static) -> Body {
    StreamBody::new(ReaderStream::with_capacity(content, CHUNK).map_ok(Frame::data)).boxed_unsync()
}

/// The body of a download whose length is known: all of it, or the range that is asked for.
async fn part(
    mut reply: http::response::Builder,
    opened: Opened,
    size: u64,
    headers: &HeaderMap,
) -> io::Result<Result<Reply, http::Error>> {
    let (start, length) = match range(headers, size) {
        Wanted::All => (0, size),
        Wanted::Part(start, length) => {
            reply = reply
                .status(StatusCode::PARTIAL_CONTENT)
                .header(CONTENT_RANGE, format!("bytes {start}-{}/{size}", start + length - 1));
            (start, length)
        }
        Wanted::Nothing => {
            let mut reply = error(StatusCode::RANGE_NOT_SATISFIABLE, "the range is outside the file");
            if let Ok(value) = format!("bytes */{size}").parse() {
                reply.headers_mut().insert(CONTENT_RANGE, value);
            }
            return Ok(Ok(reply));
        }
    };
    let has = opened.first.len() as u64;
    let content: Content = if start + length <= has {
        let from = usize::try_from(start).map_err(io::Error::other)?;
        Box::pin(std::io::Cursor::new(opened.first[from..].to_vec()))
    } else if start == 0 {
        Box::pin(opened.content())
    } else {
        let mut file = File::from_std(opened.file);
        file.seek(SeekFrom::Start(start)).await?;
        Box::pin(file)
    };
    let body = futures::stream::try_unfold((content, length), |(mut file, left)| async move {
        if left == 0 {
            return Ok(None);
        }
        let mut buffer = vec![0; CHUNK.min(usize::try_from(left).unwrap_or(CHUNK))];
        let read = tokio::time::timeout(FILE_SYSTEM, file.read(&mut buffer)).await;
        match read.unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()))? {
            // Shorter than it was: cut the stream, so that nobody takes a part for the whole.
            0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
            count => {
                buffer.truncate(count);
                Ok(Some((Frame::data(Bytes::from(buffer)), (file, left - count as u64))))
            }
        }
    });
    Ok(reply.header(CONTENT_LENGTH, length).body(StreamBody::new(body).boxed_unsync()))
}

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Coding {
    Identity,
    Gzip,
}

/// The coding of a download; `None` when the caller takes neither. Source: RFC 9110, 12.5.3.
///
/// Compressing costs the guest more than carrying the bytes does, so it is done only for who asks for gzip and
/// names nothing else: the list that every HTTP library sends says what it can read, not what it wants.
fn coding(headers: &HeaderMap) -> Option<Coding> {
    let text = headers.get(ACCEPT_ENCODING).map(|value| value.to_str().unwrap_or_default());
    let mut named: Vec<(String, bool)> = Vec::new();
    for item in text.unwrap_or_default().split(',') {
        let mut parts = item.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default().to_ascii_lowercase();
        let refused = parts
            .filter_map(|parameter| parameter.strip_prefix("q="))
            .any(|weight| weight.parse::<f32>().is_ok_and(|weight| weight <= 0.0));
        if !name.is_empty() {
            named.push((name, !refused));
        }
    }
    let takes = |name: &str| named.iter().find(|(known, _)| known == name).map(|(_, takes)| *takes);
    let any = takes("*");
    let gzip = takes("gzip").or(any).unwrap_or(false);
    let identity = takes("identity").or(any.filter(|takes| !takes)).unwrap_or(true);
    let alone = named.len() == 1 && takes("gzip") == Some(true);
    match (identity, gzip) {
        (_, true) if alone => Some(Coding::Gzip),
        (true, _) => Some(Coding::Identity),
        (false, true) => Some(Coding::Gzip),
        (false, false) => None,
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    All,
    Part(u64, u64),
    Nothing,
}

/// What of `size` bytes a `Range` header asks for. Source: RFC 9110, 14.1.2; several ranges and other
/// units are answered with the whole, as the RFC allows.
fn range(headers: &HeaderMap, size: u64) -> Wanted {
    let Some((first, last)) = headers
        .get(RANGE)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.strip_prefix("bytes="))
        .and_then(|text| text.split_once('-'))
    else {
        return Wanted::All;
    };
    match (first.trim().parse::<u64>(), last.trim().parse::<u64>()) {
        (Ok(start), _) if start >= size => Wanted::Nothing,
        (Ok(start), Ok(end)) if end >= start => Wanted::Part(start, end.min(size - 1) - start + 1),
        (Ok(start), Err(_)) if last.trim().is_empty() => Wanted::Part(start, size - start),
        (Err(_), Ok(0)) if first.trim().is_empty() => Wanted::Nothing,
        (Err(_), Ok(suffix)) if first.trim().is_empty() && size > 0 => {
            let length = suffix.min(size);
            Wanted::Part(size - length, length)
        }
        _ => Wanted::All,
    }
}

/// The body of an upload, unpacked, that fails when it stands still.
fn content(request: Request<Incoming>) -> Result<Content, Box<Reply>> {
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

    proptest::proptest! {
        #[test]
        fn any_header_gives_a_range_within_the_file(text in "bytes=[0-9]{0,22}-[0-9]{0,22}|.{0,60}", size in 0..=u64::MAX) {
            let Ok(value) = text.parse::<http::HeaderValue>() else { return Ok(()) };
            let mut headers = HeaderMap::new();
            headers.insert(RANGE, value.clone());
            headers.insert(ACCEPT_ENCODING, value);
            let _ = coding(&headers);
            if let Wanted::Part(start, length) = range(&headers, size) {
                proptest::prop_assert!(length > 0 && start < size && length <= size - start);
            }
        }

        #[test]
        fn any_metadata_is_within_its_limits(pairs in proptest::collection::vec(("[a-zA-Z-]{0,260}", ".{0,40}"), 0..20)) {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                let name = format!("x-metadata-{name}").parse::<http::HeaderName>();
                if let (Ok(name), Ok(value)) = (name, value.parse::<http::HeaderValue>()) {
                    headers.append(name, value);
                }
            }
            if let Ok(found) = metadata::of_headers(&headers) {
                let bytes: usize = found.iter().map(|(key, value)| key.len() + value.len()).sum();
                proptest::prop_assert!(bytes <= 4096);
            }
        }
    }

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

    #[test]
    fn ranges_follow_the_rfc() {
        let ask = |text: &str, size| {
            let mut headers = HeaderMap::new();
            headers.insert(RANGE, text.parse().unwrap());
            range(&headers, size)
        };
        assert_eq!(ask("bytes=0-9", 100), Wanted::Part(0, 10));
        assert_eq!(ask("bytes=90-", 100), Wanted::Part(90, 10));
        assert_eq!(ask("bytes=-10", 100), Wanted::Part(90, 10));
        assert_eq!(ask("bytes=50-1000", 100), Wanted::Part(50, 50));
        assert_eq!(ask("bytes=100-", 100), Wanted::Nothing);
        assert_eq!(ask("bytes=9-1", 100), Wanted::All);
        assert_eq!(ask("lines=1-2", 100), Wanted::All);
        assert_eq!(ask("bytes=0-", 0), Wanted::Nothing);
    }

    #[test]
    fn only_who_asks_for_gzip_alone_gets_it() {
        let ask = |text: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(text) = text {
                headers.insert(ACCEPT_ENCODING, text.parse().unwrap());
            }
            coding(&headers)
        };
        assert_eq!(ask(None), Some(Coding::Identity));
        assert_eq!(ask(Some("gzip")), Some(Coding::Gzip));
        assert_eq!(ask(Some("gzip, deflate, br")), Some(Coding::Identity));
        assert_eq!(ask(Some("gzip;q=1.0, identity;q=0")), Some(Coding::Gzip));
        assert_eq!(ask(Some("br")), Some(Coding::Identity));
        assert_eq!(ask(Some("br, identity;q=0")), None);
        assert_eq!(ask(Some("*;q=0")), None);
        assert_eq!(ask(Some("gzip;q=0")), Some(Coding::Identity));
    }
}
