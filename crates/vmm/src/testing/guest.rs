//! What answers in a fake machine: the control port, and HTTP/2; what is asked there is in `exec`.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{Request as HttpRequest, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use kelvin_api::guest::{self, Reply, Request};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf};

use super::exec;
use super::machine::Machine;
use super::script::Call;
use crate::Error;

/// Answers one control connection until another one is made, or the VMM ends.
pub(super) async fn serve_control(machine: Arc<Machine>, stream: DuplexStream) {
    let mut mine = 0;
    machine.state.send_modify(|state| {
        state.control += 1;
        mine = state.control;
    });
    let mut state = machine.state.subscribe();
    tokio::select! {
        biased;
        () = machine.process.ended() => {}
        _ = state.wait_for(|state| state.control != mine) => {}
        _ = answer_all(&machine, stream) => {}
    }
}

async fn answer_all(machine: &Machine, mut stream: DuplexStream) -> Result<(), Error> {
    let io = |source| Error::Io { what: "answering the host", source };
    loop {
        let mut length = [0; 4];
        stream.read_exact(&mut length).await.map_err(io)?;
        let mut frame = vec![0; guest::frame_length(length)?];
        stream.read_exact(&mut frame).await.map_err(io)?;
        machine.awake().await;
        let (id, request) = Request::decode(&frame)?;
        let reply = match answer(machine, &request).await {
            Ok(()) => Reply::Done {
                wall_clock_ns: clock(&request),
                worked_us: 1,
                http_waiting: machine.state.borrow().http == 0,
            },
            Err(error) => Reply::Failed(error.to_string()),
        };
        // It may have been stopped, or have fallen silent, in the middle of it.
        machine.awake().await;
        stream.write_all(&reply.encode(id)?).await.map_err(io)?;
    }
}

async fn answer(machine: &Machine, request: &Request) -> Result<(), Error> {
    let call = match request {
        Request::Ping => Call::Ping,
        Request::Activate(_) => Call::Activate,
        Request::Quiesce => Call::Quiesce,
        Request::Freeze => Call::Freeze,
        Request::Wake(_) => Call::Wake,
    };
    machine.step(call).await?;
    machine.awake().await;
    match request {
        Request::Ping | Request::Quiesce => {}
        Request::Activate(activation) => machine.is_now(Some(&activation.sandbox_id))?,
        Request::Freeze => machine.state.send_modify(|state| state.frozen = true),
        Request::Wake(_) => machine.is_now(None)?,
    }
    Ok(())
}

/// What the guest's clock shows: what it was told last, or else the right time.
fn clock(request: &Request) -> u64 {
    match request {
        Request::Activate(activation) => activation.wall_clock_ns,
        Request::Wake(wake) => wake.wall_clock_ns,
        Request::Ping | Request::Quiesce | Request::Freeze => 0,
    }
}

/// Answers one connection to the HTTP port.
pub(super) async fn serve_http(machine: Arc<Machine>, stream: DuplexStream) {
    machine.state.send_modify(|state| state.http += 1);
    let answering = Arc::clone(&machine);
    let service = service_fn(move |request: HttpRequest<Incoming>| {
        let machine = Arc::clone(&answering);
        async move { Ok::<_, Infallible>(respond(&machine, request).await) }
    });
    let stream = TokioIo::new(Awake { machine: Arc::clone(&machine), stream, waiting: None });
    let serving =
        hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(stream, service);
    tokio::select! {
        biased;
        () = machine.process.ended() => {}
        // How it ends is the host's business.
        _ = serving => {}
    }
    machine.state.send_modify(|state| state.http -= 1);
}

async fn respond(machine: &Machine, request: HttpRequest<Incoming>) -> Response<Full<Bytes>> {
    let stepped = machine.step(Call::Http).await;
    machine.awake().await;
    let (head, body) = request.into_parts();
    let done = match stepped {
        Ok(()) => exec::answer(machine, &head.method, &head.uri, body).await,
        Err(error) => Err(error),
    };
    // It may have been stopped in the middle of it.
    machine.awake().await;
    let (status, kind, body) = done.unwrap_or_else(|error| {
        (StatusCode::INTERNAL_SERVER_ERROR, "text/plain", Bytes::from(error.to_string()))
    });
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
    response
}

/// A stream that its end in the guest reads only while the guest does anything.
struct Awake {
    machine: Arc<Machine>,
    stream: DuplexStream,
    waiting: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl AsyncRead for Awake {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let machine = Arc::clone(&self.machine);
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(async move { machine.awake().await }));
        ready!(waiting.as_mut().poll(context));
        self.waiting = None;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Awake {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
