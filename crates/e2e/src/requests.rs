//! Requests as others would make them, by a client of HTTP/1.1 that knows nothing of the API.

use http_body_util::BodyExt;
use hyper_util::client::legacy::connect::HttpConnector;

use crate::server::Server;

/// A client of HTTP/1.1 that knows nothing of the API, for requests as others would make them.
fn http() -> hyper_util::client::legacy::Client<HttpConnector, Whole> {
    hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new()).build_http()
}

type Whole = http_body_util::combinators::UnsyncBoxBody<bytes::Bytes, std::io::Error>;

/// Sends a request to the server as it is.
pub async fn send(
    server: &Server,
    method: &http::Method,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<bytes::Bytes>,
) -> http::Response<hyper::body::Incoming> {
    let mut request = http::Request::builder().method(method).uri(format!("{}{path}", server.url()));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let body = http_body_util::Full::new(body.into()).map_err(|never| match never {}).boxed_unsync();
    http().request(request.body(body).expect("a request")).await.expect("a reply")
}

/// The same; status and text of the reply.
pub async fn ask(
    server: &Server,
    method: &http::Method,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<bytes::Bytes>,
) -> (http::StatusCode, String) {
    let response = send(server, method, path, headers, body).await;
    let status = response.status();
    let bytes = match response.into_body().collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => panic!("{method} {path}: {status}, and then {error}"),
    };
    (status, String::from_utf8_lossy(&bytes).into_owned())
}

/// Uploads `bytes` zeroes as a stream of chunks.
pub async fn upload_zeroes(
    server: &Server,
    headers: &[(&str, &str)],
    path: &str,
    bytes: u64,
) -> http::StatusCode {
    const CHUNK: usize = 256 << 10;
    let chunk = bytes::Bytes::from(vec![0; CHUNK]);
    let frames = (0..bytes / CHUNK as u64).map(move |_| Ok(hyper::body::Frame::data(chunk.clone())));
    let body = http_body_util::StreamBody::new(futures::stream::iter(frames)).boxed_unsync();
    let mut request = http::Request::builder().method("POST").uri(format!("{}{path}", server.url()));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.header("content-type", "application/octet-stream").body(body);
    http().request(request.expect("a request")).await.expect("a reply").status()
}
