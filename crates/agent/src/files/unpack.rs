//! `POST /unpack`: the upload of a COPY, unpacked where it is wanted.
//!
//! ```text
//! body ──task: 64 KiB at a time──> a bounded queue ──thread: gzip, tar (`archive.rs`)──> files (`copy.rs`, `tree.rs`)
//! ```
//!
//! Writes whatever the archive and the request name, as root. What fails in the middle leaves what was unpacked: the builder
//! throws the machine away. One at a time: each remembers what it has made. The thread has the turn: a client that leaves
//! does not end it before its file system does.

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use bytes::{Buf, Bytes, BytesMut};
use http::{Request, StatusCode};
use hyper::body::Incoming;
use kelvin_api::image::Unpacked;
use kelvin_api::signature::query;
use tokio::io::AsyncReadExt;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc};

use super::archive;
use super::copy::{Error, Source, Wanted};
use super::request::{CHUNK, Content, Reply, StoodStill};
use super::upload::content;
use crate::entries::clean;
use crate::fault::{FILE_SYSTEM, Fault};
use crate::reply::{error, json};
use crate::users;

/// Chunks on the way from the body to the thread.
const QUEUE: usize = 8;
/// Archives that are unpacked at one time.
static AT_ONCE: Semaphore = Semaphore::const_new(1);

/// `POST /unpack`.
pub async fn unpack(request: Request<Incoming>) -> Reply {
    let bad = |text: &str| error(StatusCode::BAD_REQUEST, text);
    let wanted = match query(request.uri()).map_err(str::to_owned).and_then(|given| wanted(&given)) {
        Ok(wanted) => wanted,
        Err(text) => return bad(&text),
    };
    let content = match content(request) {
        Ok(content) => content,
        Err(reply) => return *reply,
    };
    let Ok(Ok(turn)) = tokio::time::timeout(FILE_SYSTEM, AT_ONCE.acquire()).await else {
        return error(StatusCode::TOO_MANY_REQUESTS, "another upload is being unpacked");
    };
    match run(content, wanted, Path::new("/"), turn).await {
        Ok(unpacked) => json(StatusCode::OK, &unpacked),
        Err(problem) => {
            let source = std::error::Error::source(&problem).map(|source| format!(": {source}"));
            error(status(&problem), &format!("{problem}{}", source.unwrap_or_default()))
        }
    }
}

async fn run(
    content: Content,
    wanted: Wanted,
    root: &Path,
    turn: SemaphorePermit<'static>,
) -> Result<Unpacked, Error> {
    let root = root.to_owned();
    let (sender, receiver) = mpsc::channel(QUEUE);
    let work = tokio::task::spawn_blocking(move || {
        let queue = Queue { receiver, chunk: Bytes::new(), ended: false };
        let _turn = turn;
        archive::unpack(queue, &wanted, &root)
    });
    tokio::select! {
        () = feed(content, &sender) => {}
        // It has failed: the rest of the body is not waited for.
        () = sender.closed() => {}
    }
    drop(sender);
    work.await.unwrap_or_else(|problem| Err(Error::Torn(io::Error::other(problem))))
}

/// Sends all of `content`; an empty chunk is its end.
async fn feed(mut content: Content, sender: &mpsc::Sender<io::Result<Bytes>>) {
    loop {
        let mut buffer = BytesMut::with_capacity(CHUNK);
        let read = content.read_buf(&mut buffer).await.map(|_| buffer.freeze());
        let is_last = read.as_ref().map_or(true, Bytes::is_empty);
        if sender.send(read).await.is_err() || is_last {
            return;
        }
    }
}

/// The thread's end of the queue.
struct Queue {
    receiver: mpsc::Receiver<io::Result<Bytes>>,
    chunk: Bytes,
    ended: bool,
}

impl Read for Queue {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.chunk.is_empty() && !self.ended {
            // Without the chunk that says so the body is not whole: whoever sent it has gone.
            self.chunk = self.receiver.blocking_recv().ok_or(io::ErrorKind::UnexpectedEof)??;
            self.ended = self.chunk.is_empty();
        }
        let count = buffer.len().min(self.chunk.len());
        self.chunk.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

/// What the request asks for.
///
/// # Errors
/// A text for the caller.
fn wanted(given: &HashMap<String, String>) -> Result<Wanted, String> {
    if let Some(name) =
        given.keys().find(|name| !["from", "to", "owner", "mode", "workdir"].contains(&name.as_str()))
    {
        return Err(format!("the query parameter '{name}' is not known"));
    }
    let value = |name: &str| given.get(name).filter(|value| !value.is_empty());
    let needed = |name: &str| value(name).ok_or_else(|| format!("the query parameter '{name}' is missing"));
    let (from, to) = (needed("from")?, needed("to")?);
    if given.values().any(|value| value.contains('\0')) {
        return Err("a query parameter has a NUL byte".to_owned());
    }
    let workdir = value("workdir").map_or("/", String::as_str);
    if !workdir.starts_with('/') {
        return Err(format!("workdir '{workdir}' is not an absolute path"));
    }
    let owner = match value("owner") {
        None => (0, 0),
        Some(owner) => users::owner(owner)
            .ok_or_else(|| format!("owner '{owner}': the image has no such user or group"))?,
    };
    let mode = match value("mode") {
        None => None,
        Some(mode) => Some(
            u32::from_str_radix(mode, 8)
                .ok()
                .filter(|bits| *bits <= 0o7777 && !mode.starts_with('+'))
                .ok_or_else(|| format!("mode '{mode}' is not an octal number up to 7777"))?,
        ),
    };
    let is_directory = to.ends_with('/') || matches!(to.rsplit('/').next(), Some("." | ".."));
    let to: PathBuf = clean(&Path::new(workdir).join(to));
    Ok(Wanted { from: Source::new(from)?, to, is_directory, owner, mode })
}

/// The status of the reply that tells of `problem`.
fn status(problem: &Error) -> StatusCode {
    match problem {
        Error::Torn(source) if source.get_ref().is_some_and(|inner| inner.is::<StoodStill>()) => {
            StatusCode::REQUEST_TIMEOUT
        }
        Error::At { source, .. } => Fault::of(source).status(),
        _ => StatusCode::BAD_REQUEST,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(pairs: &[(&str, &str)]) -> Result<Wanted, String> {
        let pairs = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        wanted(
            &[("from", "a"), ("to", "b")]
                .map(|(n, v)| (n.to_owned(), v.to_owned()))
                .into_iter()
                .chain(pairs)
                .collect(),
        )
    }

    #[test]
    fn what_is_asked_for_is_read_strictly() {
        let all = ask(&[("workdir", "/app"), ("owner", "55:7"), ("mode", "4755")]).unwrap();
        assert_eq!((all.to.as_path(), all.is_directory), (Path::new("/app/b"), false));
        assert_eq!((all.owner, all.mode), ((55, 7), Some(0o4755)));
        let to =
            |to: &str| ask(&[("to", to), ("workdir", "/w")]).map(|wanted| (wanted.to, wanted.is_directory));
        assert_eq!(to("/x/"), Ok(("/x".into(), true)));
        assert_eq!(to("."), Ok(("/w".into(), true)));
        assert_eq!(to("../../../x/.."), Ok(("/".into(), true)));
        for odd in [
            ("from", ""),
            ("to", ""),
            ("from", "../x"),
            ("to", "a\0b"),
            ("workdir", "app"),
            ("owner", "no such user"),
            ("mode", "888"),
            ("mode", "17777"),
            ("mode", "+7"),
            ("user", "root"),
        ] {
            assert!(ask(&[odd]).is_err(), "{odd:?}");
        }
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_is_no_end() {
        let read = |chunks: Vec<io::Result<Bytes>>| async {
            let (sender, receiver) = mpsc::channel(QUEUE);
            for chunk in chunks {
                sender.send(chunk).await.unwrap();
            }
            drop(sender);
            let mut queue = Queue { receiver, chunk: Bytes::new(), ended: false };
            tokio::task::spawn_blocking(move || {
                let mut bytes = Vec::new();
                queue.read_to_end(&mut bytes).map(|_| bytes).map_err(|error| error.kind())
            })
            .await
            .unwrap()
        };
        let chunk = |text: &'static str| Ok(Bytes::from_static(text.as_bytes()));
        assert_eq!(read(vec![chunk("ab"), chunk("c"), chunk("")]).await, Ok(b"abc".to_vec()));
        assert_eq!(read(vec![chunk("ab")]).await, Err(io::ErrorKind::UnexpectedEof));
        let failed = Err(io::ErrorKind::TimedOut.into());
        assert_eq!(read(vec![chunk("ab"), failed]).await, Err(io::ErrorKind::TimedOut));
    }

    #[tokio::test]
    async fn an_archive_is_unpacked_as_it_comes_and_a_bad_one_is_not_waited_for() {
        let root = std::env::temp_dir().join(format!("kelvin-unpack-run-{}", std::process::id()));
        std::fs::create_dir_all(&root).unwrap();
        let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let to = |to: &str| Wanted { owner, ..ask(&[("from", "."), ("to", to)]).unwrap() };
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        // More than the queue holds.
        let large = vec![7; 3 * QUEUE * CHUNK];
        header.set_size(large.len() as u64);
        header.set_mode(0o600);
        builder.append_data(&mut header, "large", &large[..]).unwrap();
        let tar = builder.into_inner().unwrap();
        static TURNS: Semaphore = Semaphore::const_new(1);
        let content: Content = Box::pin(io::Cursor::new(tar.clone()));
        let done = run(content, to("/good"), &root, TURNS.acquire().await.unwrap()).await.unwrap();
        assert_eq!((done.files, done.bytes), (1, large.len() as u64));
        assert_eq!(std::fs::read(root.join("good/large")).unwrap(), large);
        // Its sender goes on for ever, and sends nothing.
        let (silent, _other) = tokio::io::duplex(64);
        let content: Content = Box::pin(AsyncReadExt::chain(io::Cursor::new(vec![7; 1024]), silent));
        let minute = std::time::Duration::from_secs(60);
        let turn = TURNS.acquire().await.unwrap();
        let done = tokio::time::timeout(minute, run(content, to("/bad"), &root, turn));
        let problem = done.await.expect("it is waited for").unwrap_err();
        assert_eq!(status(&problem), StatusCode::BAD_REQUEST);
        // Its client leaves in the middle: the thread has the turn until it has seen that.
        let (silent, _other) = tokio::io::duplex(64);
        let content: Content =
            Box::pin(AsyncReadExt::chain(io::Cursor::new(tar[..1 << 20].to_vec()), silent));
        let turn = TURNS.acquire().await.unwrap();
        let mut left = Box::pin(run(content, to("/left"), &root, turn));
        while !root.join("left/large").exists() {
            assert!(futures::poll!(&mut left).is_pending(), "there is more to come");
            tokio::task::yield_now().await;
        }
        assert!(TURNS.try_acquire().is_err());
        drop(left);
        let _next = tokio::time::timeout(minute, TURNS.acquire()).await.expect("its turn ends").unwrap();
        std::fs::remove_dir_all(&root).unwrap();
        let stood_still = Error::Torn(io::Error::new(io::ErrorKind::TimedOut, StoodStill));
        assert_eq!(status(&stood_still), StatusCode::REQUEST_TIMEOUT);
        let source = io::Error::from_raw_os_error(libc::ENOSPC);
        let full = Error::At { name: "a".to_owned(), source };
        assert_eq!(status(&full), StatusCode::INSUFFICIENT_STORAGE);
    }
}
