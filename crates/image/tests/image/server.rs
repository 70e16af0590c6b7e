//! A registry on loopback that answers as a test says: it may stall, reset, lie and send elsewhere.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::fixture::{Image, MANIFEST, digest};

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Asked {
    pub method: String,
    /// With its query.
    pub path: String,
    /// Names in lower case.
    pub headers: HashMap<String, String>,
    pub body: String,
}

impl Asked {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// How a body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// As it should.
    Whole,
    /// After so many bytes the connection is reset.
    Reset(usize),
    /// After so many bytes nothing more comes.
    Stall(usize),
    /// Byte by byte, with so long between them.
    Trickle(Duration),
}

#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub end: End,
    /// Whether its length is said.
    pub has_length: bool,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), end: End::Whole, has_length: true }
    }

    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub fn ending(mut self, end: End) -> Self {
        self.end = end;
        self
    }
}

type Answer = dyn Fn(&Asked) -> Reply + Send + Sync;

pub struct Server {
    pub address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub async fn start(answer: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (answer, log): (Arc<Answer>, _) = (Arc::new(answer), Arc::clone(&asked));
        let task = tokio::spawn(async move {
            let mut conversations = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                conversations.spawn(talk(stream, Arc::clone(&answer), Arc::clone(&log)));
            }
        });
        Self { address, asked, task }
    }

    /// What was asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// How often a path that contains `part` was asked for.
    pub fn times(&self, part: &str) -> usize {
        self.asked().iter().filter(|asked| asked.path.contains(part)).count()
    }

    /// A reference of an image in it.
    pub fn reference(&self, rest: &str) -> String {
        format!("{}/{rest}", self.address)
    }
}

/// One request a connection: what breaks is that one alone.
async fn talk(mut stream: TcpStream, answer: Arc<Answer>, log: Arc<Mutex<Vec<Asked>>>) -> Option<()> {
    let mut text = Vec::new();
    let end = loop {
        if let Some(at) = text.windows(4).position(|window| window == b"\r\n\r\n") {
            break at;
        }
        if stream.read_buf(&mut text).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(text[..end].to_vec()).ok()?;
    let mut lines = head.split("\r\n");
    let mut first = lines.next()?.split(' ');
    let (method, path) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers: HashMap<_, _> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let length: usize = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
    while text.len() < end + 4 + length {
        stream.read_buf(&mut text).await.ok()?;
    }
    let body = String::from_utf8(text[end + 4..].to_vec()).ok()?;
    let asked = Asked { method, path, headers, body };
    let reply = answer(&asked);
    log.lock().unwrap().push(asked);
    let mut head = format!("HTTP/1.1 {} x\r\nconnection: close\r\n", reply.status);
    if reply.has_length && !reply.headers.iter().any(|(name, _)| name == "content-length") {
        head.push_str(&format!("content-length: {}\r\n", reply.body.len()));
    }
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await.ok()?;
    match reply.end {
        End::Whole => stream.write_all(&reply.body).await.ok()?,
        End::Reset(after) => {
            stream.write_all(&reply.body[..after]).await.ok()?;
            stream.flush().await.ok()?;
            // What was sent is read first: a reset may throw it away.
            let _ = tokio::time::timeout(Duration::from_millis(200), stream.read_u8()).await;
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).ok()?;
        }
        End::Trickle(between) => {
            for byte in &reply.body {
                stream.write_u8(*byte).await.ok()?;
                stream.flush().await.ok()?;
                // The pace is what is tested.
                tokio::time::sleep(between).await;
            }
        }
        End::Stall(after) => {
            stream.write_all(&reply.body[..after]).await.ok()?;
            stream.flush().await.ok()?;
            // Until the other side has enough of it.
            let _ = stream.read_u8().await;
        }
    }
    let _ = stream.shutdown().await;
    Some(())
}

/// What a registry without faults answers: manifests by tag `latest` and by digest, blobs with ranges.
pub fn good(image: &Image, asked: &Asked) -> Reply {
    let path = asked.path.as_str();
    if path.contains("/manifests/") {
        let wanted = path.rsplit('/').next().unwrap();
        return if wanted == "latest" || wanted == image.digest() {
            Reply::new(200, image.manifest.clone()).with("content-type", MANIFEST)
        } else {
            missing("MANIFEST_UNKNOWN")
        };
    }
    let wanted = path.rsplit('/').next().unwrap();
    let blob = if wanted == digest(image.config.as_bytes()) {
        image.config.clone().into_bytes()
    } else {
        match image.layers.iter().find(|layer| layer.digest == wanted) {
            Some(layer) => layer.blob.clone(),
            None => return missing("BLOB_UNKNOWN"),
        }
    };
    let begin =
        asked.header("range").and_then(|it| it.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    match begin {
        Some(begin) if begin < blob.len() => {
            let range = format!("bytes {begin}-{}/{}", blob.len() - 1, blob.len());
            Reply::new(206, &blob[begin..]).with("content-range", range)
        }
        Some(_) => Reply::new(416, ""),
        None => Reply::new(200, blob),
    }
}

pub fn missing(code: &str) -> Reply {
    Reply::new(404, format!(r#"{{"errors":[{{"code":"{code}","message":"unknown"}}]}}"#))
}
