//! Requests and connections into sandboxes, as streams both ways.
//!
//! ```text
//! send:  request ──> admitted ──> data.. end        dial:  dial ──> open ──> data.. end
//!        reply <── data.. end    (or: unsent)              data.. end | cut
//! ```
//!
//! The body of a request stays with its caller until the sandbox has admitted it, so that one that sleeps can be sent the same
//! request again. An end is said: a stream that ends without it was broken off, and is broken on the other side too. Nothing is
//! read ahead but what the windows of HTTP/2 hold.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use connectrpc::client::{BidiRecvHalf, BidiSendHalf, BidiStream};
use connectrpc::{ConnectError, InboundStream};
use futures::{Stream, StreamExt, stream};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper::body::{Body, Frame, Incoming};
use kelvin_api::error::{ErrorCode, Failure, Kind};
use kelvin_api::id::SandboxId;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::mpsc;
use tokio_util::io::StreamReader;
use tokio_util::sync::{CancellationToken, PollSender};
use tokio_util::task::AbortOnDropHandle;

use super::convert::text;
use super::failure::{from_wire, missing, odd, refuse, refused, to_wire};
use super::generated::pb;
use super::generated::pb::__buffa::oneof::dial_piece::Piece as Dialled;
use super::generated::pb::__buffa::oneof::send_piece::Piece as Sent;
use super::limits::STRETCH;
use crate::{Cut, Inbound, Io, Outbound, SandboxTraffic, Unanswered};

/// Pieces that wait between a body and its stream.
const AHEAD: usize = 4;

type SendCall = BidiStream<Incoming, pb::SendPiece, pb::__buffa::view::SendPieceView<'static>>;
type SendReplies = BidiRecvHalf<Incoming, pb::__buffa::view::SendPieceView<'static>>;
type DialCall = BidiStream<Incoming, pb::DialPiece, pb::__buffa::view::DialPieceView<'static>>;
type DialReplies = BidiRecvHalf<Incoming, pb::__buffa::view::DialPieceView<'static>>;

fn sent(piece: Sent) -> pb::SendPiece {
    pb::SendPiece { piece: Some(piece), ..Default::default() }
}

fn dialled(piece: Dialled) -> pb::DialPiece {
    pb::DialPiece { piece: Some(piece), ..Default::default() }
}

fn headers(map: &HeaderMap) -> Vec<pb::Header> {
    let header = |(name, value): (&HeaderName, &HeaderValue)| pb::Header {
        name: name.to_string(),
        value: value.as_bytes().to_vec(),
        ..Default::default()
    };
    map.iter().map(header).collect()
}

fn to_headers(list: &[pb::Header]) -> Result<HeaderMap, Failure> {
    let mut map = HeaderMap::new();
    for header in list {
        let name = HeaderName::from_bytes(header.name.as_bytes()).map_err(|error| odd("a header", &error))?;
        let value = HeaderValue::from_bytes(&header.value).map_err(|error| odd("a header", &error))?;
        map.append(name, value);
    }
    Ok(map)
}

/// A failure where only an I/O error fits; what others tell apart by its kind keeps it.
fn broken(failure: Failure) -> io::Error {
    let kind = match failure.kind {
        Kind::Timeout => io::ErrorKind::TimedOut,
        _ => io::ErrorKind::ConnectionReset,
    };
    io::Error::new(kind, failure)
}

/// The same, the other way.
fn broke(sandbox: &SandboxId, error: &io::Error) -> Failure {
    let (code, what) = match error.kind() {
        io::ErrorKind::TimedOut => (ErrorCode::PortSilent, "fell silent"),
        _ => (ErrorCode::PortBroken, "broke the connection"),
    };
    Failure::new(code, format!("sandbox {sandbox} {what}"), "look at the server in the sandbox")
        .with_cause(error)
}

fn cut_off() -> io::Error {
    io::ErrorKind::UnexpectedEof.into()
}

/// Sends a body piece by piece, and its end once it was whole.
async fn pour<F, S>(mut body: Inbound, mut give: F) -> io::Result<()>
where
    F: FnMut(Sent) -> S,
    S: Future<Output = bool>,
{
    let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
    let mut trailers = HeaderMap::new();
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(mut data) => {
                while !data.is_empty() {
                    let stretch = data.split_to(data.len().min(STRETCH));
                    if !give(Sent::Data(stretch.to_vec())).await {
                        return Err(gone());
                    }
                }
            }
            Err(frame) => trailers = frame.into_trailers().unwrap_or_default(),
        }
    }
    let end = pb::Trailers { headers: headers(&trailers), ..Default::default() };
    if give(Sent::End(Box::new(end))).await { Ok(()) } else { Err(gone()) }
}

/// One frame of a body; none of its trailers, when it has none.
fn frame(piece: Option<Sent>) -> io::Result<Option<Frame<Bytes>>> {
    match piece {
        Some(Sent::Data(data)) => Ok(Some(Frame::data(data.into()))),
        Some(Sent::End(end)) if end.headers.is_empty() => Ok(None),
        Some(Sent::End(end)) => Ok(Some(Frame::trailers(to_headers(&end.headers).map_err(broken)?))),
        _ => Err(cut_off()),
    }
}

/// Sends `request` over `call`.
///
/// # Errors
/// As [`SandboxTraffic::send`].
pub(super) async fn request(
    mut call: SendCall,
    sandbox: &SandboxId,
    request: Request<Inbound>,
) -> Result<Response<Outbound>, Unanswered> {
    let (parts, body) = request.into_parts();
    let is_whole = body.is_end_stream();
    let head = pb::RequestHead {
        sandbox: sandbox.to_string(),
        method: parts.method.to_string(),
        uri: parts.uri.to_string(),
        headers: headers(&parts.headers),
        is_whole,
        ..Default::default()
    };
    let begun = call.send(sent(Sent::Request(Box::new(head)))).await;
    let (mut requests, mut replies) = call.into_split();
    // What refused it says why.
    if begun.is_err() || is_whole {
        requests.close_send();
    }
    let mut upload = Upload::Held(body, requests);
    loop {
        let piece = replies.message().await.map_err(|error| refused(&error))?;
        match piece.and_then(|piece| piece.to_owned_message().piece) {
            Some(Sent::Admitted(_)) => upload = upload.begin(),
            Some(Sent::Unsent(failure)) => {
                let unsent = match upload {
                    Upload::Held(body, _) => Some(Box::new(Request::from_parts(parts, body))),
                    Upload::Begun { .. } => None,
                };
                return Err(Unanswered { failure: from_wire(*failure), unsent });
            }
            Some(Sent::Reply(head)) => return Ok(reply(*head, replies, upload)?),
            _ => return Err(missing("a reply").into()),
        }
    }
}

/// The body of a request. What is still being sent of it ends with its reply.
enum Upload {
    /// It was not asked for yet: a reply may come before that.
    Held(Inbound, BidiSendHalf<pb::SendPiece>),
    Begun {
        _sending: AbortOnDropHandle<()>,
    },
}

impl Upload {
    fn begin(self) -> Self {
        match self {
            Self::Held(body, requests) => {
                Self::Begun { _sending: AbortOnDropHandle::new(tokio::spawn(upload(body, requests))) }
            }
            begun => begun,
        }
    }
}

async fn upload(body: Inbound, requests: BidiSendHalf<pb::SendPiece>) {
    let requests = Arc::new(tokio::sync::Mutex::new(requests));
    let give = |piece| {
        let requests = Arc::clone(&requests);
        async move { requests.lock().await.send(sent(piece)).await.is_ok() }
    };
    // Its end is not said when it broke, so that the other side breaks too.
    if let Err(error) = pour(body, give).await {
        tracing::debug!(%error, "a request was broken off");
    }
}

/// A reply whose body follows in `replies`.
fn reply(head: pb::ReplyHead, replies: SendReplies, upload: Upload) -> Result<Response<Outbound>, Failure> {
    let status = u16::try_from(head.status).unwrap_or_default();
    let status = http::StatusCode::from_u16(status).map_err(|error| odd("a status", &error))?;
    let body = stream::try_unfold(Some((replies, upload)), |state| async move {
        let Some((mut replies, mut upload)) = state else {
            return Ok(None);
        };
        loop {
            let piece = replies.message().await.map_err(|error| broken(refused(&error)))?;
            let piece = piece.and_then(|piece| piece.to_owned_message().piece);
            if matches!(piece, Some(Sent::Admitted(_))) {
                upload = upload.begin();
                continue;
            }
            let is_last = matches!(piece, Some(Sent::End(_)));
            return Ok(frame(piece)?.map(|frame| (frame, (!is_last).then_some((replies, upload)))));
        }
    });
    let mut response = Response::new(StreamBody::new(body).boxed_unsync());
    *response.status_mut() = status;
    *response.headers_mut() = to_headers(&head.headers)?;
    Ok(response)
}

/// Hands a request on to `traffic`; the stream of what comes of it.
///
/// # Errors
/// When the first piece is not the head of a request.
pub(super) async fn send(
    traffic: Arc<dyn SandboxTraffic>,
    mut requests: InboundStream<pb::SendPiece>,
) -> Result<impl Stream<Item = Result<pb::SendPiece, ConnectError>> + Send + 'static, Failure> {
    let first = requests.next().await.and_then(Result::ok).and_then(|piece| piece.to_owned_message().piece);
    let Some(Sent::Request(head)) = first else {
        return Err(missing("the head of a request"));
    };
    let sandbox: SandboxId = text(&head.sandbox)?;
    let mut request = Request::builder().method(head.method.as_str()).uri(head.uri.as_str());
    if let Some(map) = request.headers_mut() {
        *map = to_headers(&head.headers)?;
    }
    let (give, pieces) = mpsc::channel(AHEAD);
    let body = match head.is_whole {
        true => Empty::new().map_err(|never| match never {}).boxed_unsync(),
        false => arriving(requests, give.clone()),
    };
    let request =
        request.version(http::Version::HTTP_2).body(body).map_err(|error| odd("a request", &error))?;
    tokio::spawn(async move {
        tokio::select! {
            () = give.closed() => {}
            () = answer(&*traffic, &sandbox, request, &give) => {}
        }
    });
    Ok(received(pieces))
}

/// What a task sends.
fn received<T: Send + 'static>(pieces: mpsc::Receiver<T>) -> impl Stream<Item = T> + Send + 'static {
    stream::unfold(pieces, |mut pieces| async move { Some((pieces.recv().await?, pieces)) })
}

/// A body that is asked for once somebody reads it: then the sandbox has admitted the request.
fn arriving(
    requests: InboundStream<pb::SendPiece>,
    give: mpsc::Sender<Result<pb::SendPiece, ConnectError>>,
) -> Inbound {
    let body = stream::try_unfold(Some((requests, Some(give))), |state| async move {
        let Some((mut requests, mut give)) = state else {
            return Ok(None);
        };
        if let Some(give) = give.take() {
            let _ = give.send(Ok(sent(Sent::Admitted(Box::default())))).await;
        }
        let piece = requests.next().await.ok_or_else(cut_off)?.map_err(io::Error::other)?;
        let piece = piece.to_owned_message().piece;
        let is_last = matches!(piece, Some(Sent::End(_)));
        Ok(frame(piece)?.map(|frame| (frame, (!is_last).then_some((requests, None)))))
    });
    StreamBody::new(body).boxed_unsync()
}

async fn answer(
    traffic: &dyn SandboxTraffic,
    sandbox: &SandboxId,
    request: Request<Inbound>,
    give: &mpsc::Sender<Result<pb::SendPiece, ConnectError>>,
) {
    let response = match traffic.send(sandbox, request).await {
        Ok(response) => response,
        Err(Unanswered { failure, unsent }) => {
            let refusal = match unsent {
                Some(_) => Ok(sent(Sent::Unsent(Box::new(to_wire(failure))))),
                None => Err(refuse(failure)),
            };
            let _ = give.send(refusal).await;
            return;
        }
    };
    let (parts, body) = response.into_parts();
    let head = pb::ReplyHead {
        status: parts.status.as_u16().into(),
        headers: headers(&parts.headers),
        ..Default::default()
    };
    if give.send(Ok(sent(Sent::Reply(Box::new(head))))).await.is_err() {
        return;
    }
    let poured = pour(body, |piece| async { give.send(Ok(sent(piece))).await.is_ok() }).await;
    if let Err(error) = poured {
        let _ = give.send(Err(refuse(broke(sandbox, &error)))).await;
    }
}

/// Opens a connection over `call`.
///
/// # Errors
/// As [`SandboxTraffic::dial`].
pub(super) async fn connect(
    mut call: DialCall,
    sandbox: &SandboxId,
    port: u16,
) -> Result<Box<dyn Io>, Failure> {
    let dial = pb::DialRequest { sandbox: sandbox.to_string(), port: port.into(), ..Default::default() };
    let begun = call.send(dialled(Dialled::Dial(Box::new(dial)))).await;
    if begun.is_err() {
        call.close_send();
    }
    let opened = call.message().await.map_err(|error| refused(&error))?;
    let Some(Dialled::Open(_)) = opened.and_then(|piece| piece.to_owned_message().piece) else {
        return Err(missing("an open connection"));
    };
    let (requests, replies) = call.into_split();
    let (give, pieces) = mpsc::channel(1);
    tokio::spawn(forward(pieces, requests));
    Ok(Box::new(Connection {
        from: StreamReader::new(Box::pin(incoming(replies))),
        to: PollSender::new(give),
    }))
}

/// Sends what is written; its end is said when the writer has shut it down.
async fn forward(mut pieces: mpsc::Receiver<Option<Bytes>>, mut requests: BidiSendHalf<pb::DialPiece>) {
    while let Some(piece) = pieces.recv().await {
        let is_last = piece.is_none();
        let piece = match piece {
            Some(data) => Dialled::Data(data.to_vec()),
            None => Dialled::End(Box::default()),
        };
        if requests.send(dialled(piece)).await.is_err() || is_last {
            return;
        }
    }
}

type Coming = Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;

fn incoming(replies: DialReplies) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::try_unfold(replies, |mut replies| async move {
        let piece = replies.message().await.map_err(|error| broken(refused(&error)))?;
        match piece.and_then(|piece| piece.to_owned_message().piece) {
            Some(Dialled::Data(data)) => Ok(Some((Bytes::from(data), replies))),
            Some(Dialled::End(_)) => Ok(None),
            Some(Dialled::Cut(_)) => Err(io::Error::new(io::ErrorKind::ConnectionReset, Cut)),
            _ => Err(cut_off()),
        }
    })
}

/// A connection to a port of a sandbox of another node.
struct Connection {
    from: StreamReader<Coming, Bytes>,
    /// None says that nothing follows.
    to: PollSender<Option<Bytes>>,
}

fn gone<T>(_: T) -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.from).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.to.poll_reserve(context)).map_err(gone)?;
        let stretch = &bytes[..bytes.len().min(STRETCH)];
        self.to.send_item(Some(Bytes::copy_from_slice(stretch))).map_err(gone)?;
        Poll::Ready(Ok(stretch.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Nothing is kept back.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.to.is_closed() && ready!(self.to.poll_reserve(context)).is_ok() {
            let _ = self.to.send_item(None);
            self.to.close();
        }
        Poll::Ready(Ok(()))
    }
}

/// Opens a connection of `traffic`; the stream of what comes out of it.
///
/// # Errors
/// As [`SandboxTraffic::dial`].
pub(super) async fn dial(
    traffic: Arc<dyn SandboxTraffic>,
    mut requests: InboundStream<pb::DialPiece>,
) -> Result<impl Stream<Item = Result<pb::DialPiece, ConnectError>> + Send + 'static, Failure> {
    let first = requests.next().await.and_then(Result::ok).and_then(|piece| piece.to_owned_message().piece);
    let Some(Dialled::Dial(dial)) = first else {
        return Err(missing("where to connect"));
    };
    let sandbox: SandboxId = text(&dial.sandbox)?;
    let port = u16::try_from(dial.port).map_err(|error| odd("a port", &error))?;
    let (read, write) = tokio::io::split(traffic.dial(&sandbox, port).await?);
    let (give, pieces) = mpsc::channel(AHEAD);
    // When one direction breaks, so does the other.
    let broken = CancellationToken::new();
    tokio::spawn({
        let broken = broken.clone();
        async move { broken.run_until_cancelled(feed(requests, write, &broken)).await }
    });
    tokio::spawn(async move {
        tokio::select! {
            () = give.closed() => broken.cancel(),
            () = broken.cancelled() => {}
            is_whole = drain(&sandbox, read, &give) => {
                if !is_whole {
                    broken.cancel();
                }
            }
        }
    });
    Ok(received(pieces))
}

/// Writes what comes to the sandbox, until its end is said.
async fn feed(
    mut requests: InboundStream<pb::DialPiece>,
    mut write: impl AsyncWrite + Unpin,
    broken: &CancellationToken,
) {
    while let Some(piece) = requests.next().await {
        let written = match piece.map(|piece| piece.to_owned_message().piece) {
            Ok(Some(Dialled::Data(data))) => write.write_all(&data).await,
            Ok(Some(Dialled::End(_))) => {
                let _ = write.shutdown().await;
                return;
            }
            _ => break,
        };
        if written.is_err() {
            // Whoever reads from it hears why.
            return;
        }
    }
    broken.cancel();
}

/// Sends what comes out of the sandbox; whether it came to its end.
async fn drain(
    sandbox: &SandboxId,
    mut read: impl AsyncRead + Unpin,
    give: &mpsc::Sender<Result<pb::DialPiece, ConnectError>>,
) -> bool {
    if give.send(Ok(dialled(Dialled::Open(Box::default())))).await.is_err() {
        return false;
    }
    let mut buffer = vec![0; STRETCH];
    loop {
        let (piece, ends) = match read.read(&mut buffer).await {
            Ok(0) => (Ok(Dialled::End(Box::default())), Some(true)),
            Ok(count) => (Ok(Dialled::Data(buffer[..count].to_vec())), None),
            Err(error) if error.get_ref().is_some_and(|inner| inner.is::<Cut>()) => {
                (Ok(Dialled::Cut(Box::default())), Some(false))
            }
            Err(error) => (Err(refuse(broke(sandbox, &error))), Some(false)),
        };
        if give.send(piece.map(dialled)).await.is_err() {
            return false;
        }
        if let Some(is_whole) = ends {
            return is_whole;
        }
    }
}
