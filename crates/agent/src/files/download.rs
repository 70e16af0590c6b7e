//! `GET /files`: one file, or a part of it, packed for who wants it so. Nothing is written.

use std::io::{self, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use async_compression::Level;
use async_compression::tokio::bufread::GzipEncoder;
use bytes::Bytes;
use futures::TryStreamExt;
use http::header::{
    ACCEPT_ENCODING, CONTENT_DISPOSITION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE,
    RANGE, VARY,
};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeekExt, BufReader};
use tokio_util::io::ReaderStream;

use super::request::{CHUNK, Content, Reply, ask, failed, no_path, open};
use crate::fault::{FILE_SYSTEM, blocking};
use crate::reply::{Body, error};
use crate::state::State;

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

#[cfg(test)]
mod tests {
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
