//! A registry on loopback that has the images of one run and lets them be pulled: what a bench and a test begin with, where there
//! is no network.
//!
//! ```text
//! GET|HEAD /v2/                              200
//! GET|HEAD /v2/NAME/manifests/REFERENCE      the manifest, whatever the reference is
//! GET|HEAD /v2/NAME/blobs/DIGEST             the blob
//! ```
//!
//! A thread for each connection, from the file to the socket within the kernel: who pulls is measured, not this. It listens in the
//! network namespace of the thread that starts it. Who writes: nobody; a crash leaves nothing.
//!
//! Source: OCI distribution specification, "Pull".

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kelvin_api::digest::sha256;

use super::layout::{Blob, Image};

/// Bytes of a request's head.
const MOST_HEAD: u64 = 16 << 10;
/// Connections at one time.
const MOST_CONNECTIONS: usize = 64;
/// How long a connection may be silent.
const SILENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
struct Shared {
    images: Mutex<HashMap<String, Image>>,
    /// Those that are open, to end them.
    connections: Mutex<HashMap<u64, TcpStream>>,
    is_over: AtomicBool,
}

/// The registry; it ends when it is dropped.
#[derive(Debug)]
pub struct Registry {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    /// Starts it; it has no image yet.
    ///
    /// # Errors
    /// When no port of loopback can be listened on.
    pub fn start() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared::default());
        let accepting = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("registry".to_owned())
                .spawn(move || accept(&listener, &shared))?
        };
        Ok(Self { address, shared, accepting: Some(accepting) })
    }

    /// Has `image` as `name` from now on; what it is pulled by.
    pub fn add(&self, name: &str, image: Image) -> String {
        locked(&self.shared.images).insert(name.to_owned(), image);
        format!("{}/{name}:latest", self.address)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    for (id, stream) in (0_u64..).zip(listener.incoming()) {
        if shared.is_over.load(Ordering::SeqCst) {
            break;
        }
        threads.retain(|thread| !thread.is_finished());
        // More is no client of ours: its connection is closed.
        let Ok(stream) = stream else { continue };
        if threads.len() >= MOST_CONNECTIONS {
            continue;
        }
        let Ok(copy) = stream.try_clone() else { continue };
        locked(&shared.connections).insert(id, copy);
        let of_thread = Arc::clone(shared);
        let serve = move || {
            // A client that goes away is no fault of the run.
            let _ = serve(&stream, &of_thread);
            locked(&of_thread.connections).remove(&id);
        };
        match std::thread::Builder::new().spawn(serve) {
            Ok(thread) => threads.push(thread),
            Err(_) => drop(locked(&shared.connections).remove(&id)),
        }
    }
    for stream in locked(&shared.connections).values() {
        let _ = stream.shutdown(Shutdown::Both);
    }
    for thread in threads {
        let _ = thread.join();
    }
}

/// What a request asks for: whether its body is wanted, and its path; nothing when it is none that is answered.
fn head(reader: &mut BufReader<&TcpStream>) -> io::Result<Option<(bool, String)>> {
    let mut text = String::new();
    let mut limited = reader.take(MOST_HEAD);
    loop {
        let begin = text.len();
        if limited.read_line(&mut text)? == 0 {
            return Ok(None);
        }
        if text[begin..].trim_end().is_empty() && begin > 0 {
            break;
        }
    }
    let mut words = text.split_whitespace();
    let is_get = match words.next() {
        Some("GET") => true,
        Some("HEAD") => false,
        _ => return Ok(None),
    };
    Ok(words.next().map(|path| (is_get, path.to_owned())))
}

/// What is answered.
enum Answer {
    Nothing,
    Manifest(Image),
    Blob(String, Blob),
    NotFound,
}

fn answer(path: &str, images: &HashMap<String, Image>) -> Answer {
    if path.trim_end_matches('/') == "/v2" {
        return Answer::Nothing;
    }
    let asked = path.strip_prefix("/v2/").unwrap_or_default();
    if let Some((name, _)) = asked.rsplit_once("/manifests/") {
        return images.get(name).map_or(Answer::NotFound, |image| Answer::Manifest(image.clone()));
    }
    let blob = asked.rsplit_once("/blobs/").and_then(|(name, digest)| {
        let blob = images.get(name)?.blobs.get(digest)?.clone();
        Some(Answer::Blob(digest.to_owned(), blob))
    });
    blob.unwrap_or(Answer::NotFound)
}

fn serve(stream: &TcpStream, shared: &Shared) -> io::Result<()> {
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    while let Some((is_get, path)) = head(&mut reader)? {
        let found = answer(&path, &locked(&shared.images));
        let mut writer = stream;
        let mut begin = |status: &str, about: &str, length: u64| {
            let head = format!(
                "HTTP/1.1 {status}\r\ndocker-distribution-api-version: registry/2.0\r\n{about}content-length: {length}\r\n\r\n"
            );
            writer.write_all(head.as_bytes())
        };
        match found {
            Answer::Nothing => begin("200 OK", "content-type: application/json\r\n", 2)
                .and_then(|()| if is_get { writer.write_all(b"{}") } else { Ok(()) })?,
            Answer::NotFound => begin("404 Not Found", "", 0)?,
            Answer::Manifest(image) => {
                let about = format!(
                    "content-type: {}\r\ndocker-content-digest: sha256:{}\r\n",
                    image.media_type(),
                    sha256(&image.manifest)
                );
                begin("200 OK", &about, image.manifest.len() as u64)?;
                if is_get {
                    writer.write_all(&image.manifest)?;
                }
            }
            Answer::Blob(digest, blob) => {
                let about =
                    format!("content-type: application/octet-stream\r\ndocker-content-digest: {digest}\r\n");
                match blob {
                    Blob::Bytes(bytes) => {
                        begin("200 OK", &about, bytes.len() as u64)?;
                        if is_get {
                            writer.write_all(&bytes)?;
                        }
                    }
                    Blob::File(path) => {
                        let mut file = File::open(path)?;
                        let length = file.metadata()?.len();
                        begin("200 OK", &about, length)?;
                        // One that has become shorter ends the connection: what was said of its length is not true.
                        if is_get && io::copy(&mut (&mut file).take(length), &mut writer)? != length {
                            return Err(io::ErrorKind::UnexpectedEof.into());
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kelvin_image::{Images, Options, Reach, Source};
    use serde_json::json;

    use super::*;

    fn ask(stream: &mut TcpStream, text: &str) -> String {
        stream.write_all(text.as_bytes()).unwrap();
        let mut head = String::new();
        let mut reader = BufReader::new(&*stream);
        while !head.ends_with("\r\n\r\n") && reader.read_line(&mut head).unwrap() > 0 {}
        head
    }

    #[tokio::test]
    async fn an_image_is_pulled_whole_and_everything_ends_with_the_registry() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(6);
        header.set_mode(0o644);
        archive.append_data(&mut header, "etc/file", &b"hello\n"[..]).unwrap();
        std::fs::write(path("layer.tar"), archive.into_inner().unwrap()).unwrap();
        let image = Image::of_archives(&[path("layer.tar")], &json!({})).unwrap();
        let registry = Registry::start().unwrap();
        let reference = registry.add("a/b", image);
        let images = Images::open(path("cache"), Options::default()).unwrap();
        let source = Source::Registry { reference, credentials: None, reach: Reach::Any };
        let found = images.resolve(&source, &|_| ()).await.unwrap();
        let made = images.make(&found, &path("x.ext4"), None, &|_| ()).await.unwrap();
        assert!(made.used_bytes > 0 && path("x.ext4").exists());

        let mut stream = TcpStream::connect(registry.address).unwrap();
        assert!(ask(&mut stream, "HEAD /v2/ HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200"));
        assert!(ask(&mut stream, "HEAD /v2/a/c/manifests/x HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
        assert!(ask(&mut stream, "GET /v2/a/b/blobs/../../x HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
        // What is no pull is not answered, nor is a head without end.
        for text in ["PUT /v2/ HTTP/1.1\r\n\r\n".to_owned(), "x".repeat(20 << 10)] {
            let mut other = TcpStream::connect(registry.address).unwrap();
            // It may be closed before all of it is written.
            let _ = other.write_all(text.as_bytes());
            let mut rest = Vec::new();
            let _ = other.read_to_end(&mut rest);
            assert!(rest.is_empty());
        }
        // A connection that is open does not hold it up.
        drop(registry);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.is_empty());
    }
}
