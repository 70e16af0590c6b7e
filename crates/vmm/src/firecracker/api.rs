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
        let reason = value["fault_message"].as_str().map_or_else(|| status.to_string(), str::to_owned);
        Err(Error::Refused { command: name, reason })
    }
}

fn io(source: std::io::Error) -> Error {
    Error::Io { what: "speaking to the VMM", source }
}
