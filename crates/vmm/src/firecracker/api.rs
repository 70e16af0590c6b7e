//! Firecracker's API: HTTP/1.1 over a Unix socket, one request at a time.
//!
//! A VMM may have been taken over by its guest: replies are bounded in size and time.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use super::config::{Call, SNAPSHOT_CREATE};
use crate::Error;
use crate::hostile::told;

/// The longest reply that is read, in bytes.
const MAX_REPLY: usize = 64 << 10;
/// How long a command may take.
const LIMIT: Duration = Duration::from_secs(60);
/// How long a snapshot may take to be written: all of a large machine, to a disk that has others to serve.
const SAVE_LIMIT: Duration = Duration::from_secs(300);

/// A connection.
#[derive(Debug)]
pub struct Api(Mutex<SendRequest<Full<Bytes>>>);

impl Api {
    /// Shakes hands over `stream`.
    ///
    /// # Errors
    /// `Io` when it breaks.
    pub async fn open(stream: UnixStream) -> Result<Self, Error> {
        let (sender, connection) =
            handshake(TokioIo::new(stream)).await.map_err(|error| io(std::io::Error::other(error)))?;
        // Ends with the VMM, or with this.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a VMM's API connection ended");
            }
        });
        Ok(Self(Mutex::new(sender)))
    }

    /// Runs a command.
    ///
    /// # Errors
    /// `Refused` with the VMM's words, `Io` when it hangs up, `Deadline`.
    pub async fn call(&self, call: Call) -> Result<Value, Error> {
        let command = call.name;
        let limit = if call.path == SNAPSHOT_CREATE { SAVE_LIMIT } else { LIMIT };
        match tokio::time::timeout(limit, self.send(call)).await {
            Ok(result) => result,
            Err(_) => Err(Error::Deadline {
                what: command,
                after: limit,
                detail: "the VMM did not answer".to_owned(),
            }),
        }
    }

    async fn send(&self, Call { name, method, path, body }: Call) -> Result<Value, Error> {
        let other = |error: Box<dyn std::error::Error + Send + Sync>| io(std::io::Error::other(error));
        let bytes = if method == Method::GET { Bytes::new() } else { Bytes::from(body.to_string()) };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, "localhost")
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::new(bytes))
            .map_err(|error| other(error.into()))?;
        let mut sender = self.0.lock().await;
        sender.ready().await.map_err(|error| other(error.into()))?;
        let reply = sender.send_request(request).await.map_err(|error| other(error.into()))?;
        let status = reply.status();
        let body = Limited::new(reply.into_body(), MAX_REPLY).collect().await.map_err(other)?.to_bytes();
        if status == StatusCode::NO_CONTENT {
            return Ok(Value::Null);
        }
        let value: Value = serde_json::from_slice(&body).unwrap_or_default();
        if status.is_success() {
            return Ok(value);
        }
        let reason = value["fault_message"].as_str().map_or_else(|| status.to_string(), told);
        Err(Error::Refused { command: name, reason })
    }
}

fn io(source: std::io::Error) -> Error {
    Error::Io { what: "speaking to the VMM", source }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// What a call comes to whose VMM answers `head` and then `part` for ever, and how much of it is read.
    async fn flooded(head: &'static [u8], part: &'static [u8]) -> (Result<Value, Error>, usize) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let flood = tokio::spawn(async move {
            let _ = theirs.read(&mut [0; 4096]).await;
            let mut sent = 0;
            if theirs.write_all(head).await.is_ok() {
                while theirs.write_all(part).await.is_ok() {
                    sent += part.len();
                }
            }
            sent
        });
        let api = Api::open(ours).await.unwrap();
        let call = Call { name: "x", method: Method::PATCH, path: "/vm", body: json!({}) };
        let answer = api.call(call).await;
        drop(api);
        (answer, flood.await.unwrap())
    }

    #[tokio::test]
    async fn a_vmm_that_answers_without_end_is_not_listened_to() {
        for (head, part) in [
            // Headers, a body, chunks, and a chunk's extensions.
            (&b"HTTP/1.1 200 OK\r\n"[..], &b"a: bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb\r\n"[..]),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n", &[b' '; 4096]),
            (b"HTTP/1.1 400 Bad\r\ntransfer-encoding: chunked\r\n\r\n", b"4\r\n    \r\n"),
            (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4", b";an-extension-without-an-end"),
        ] {
            let (answer, sent) = flooded(head, part).await;
            assert!(matches!(answer, Err(Error::Io { .. })), "{answer:?}");
            assert!(sent < 2 << 20, "{sent} bytes were read");
        }
    }
}
