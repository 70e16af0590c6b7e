//! Builds, as a stream of what is told of them, and the uploads that they copy.
//!
//! ```text
//! build:  request ──> event.. ──> built | failure        put_files:  whose ──> data.. ──> end
//!                                                                                       done <──
//! ```
//!
//! A build comes to its end when nobody reads that any more; a reader that is slow slows it down. An upload whose stream ends
//! without its end being said was broken off, and is broken on the other side too.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use connectrpc::client::{BidiSendHalf, BidiStream};
use connectrpc::{ConnectError, InboundStream};
use futures::{Stream, StreamExt, stream};
use hyper::body::Incoming;
use kelvin_api::account::Project;
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::FilesHash;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::convert::{json, read, text};
use super::failure::{missing, refuse, refused};
use super::generated::pb;
use super::generated::pb::__buffa::oneof::build_piece::Piece;
use super::generated::pb::__buffa::oneof::files_piece::Piece as Sent;
use super::limits::STRETCH;
use crate::{Build, BuildFailure, BuildTold, Built, FilesContent, NodeService};

/// Events that wait between a build and its stream.
const AHEAD: usize = 64;

type FilesCall = BidiStream<Incoming, pb::FilesPiece, pb::__buffa::view::DoneView<'static>>;

fn piece(piece: Piece) -> pb::BuildPiece {
    pb::BuildPiece { piece: Some(piece), ..Default::default() }
}

/// Has `node` build; what it tells, and how it ends.
pub(super) fn pieces(
    node: Arc<dyn NodeService>,
    request: Build,
) -> impl Stream<Item = Result<pb::BuildPiece, ConnectError>> + Send + 'static {
    let (told, events) = mpsc::channel(AHEAD);
    let building = tokio::spawn(async move { node.build(request, told).await });
    stream::unfold(Some((events, building)), |state| async move {
        let (mut events, building) = state?;
        if let Some(event) = events.recv().await {
            let told = json(&event).map(|text| piece(Piece::Event(text))).map_err(refuse);
            return Some((told, Some((events, building))));
        }
        let built = building.await.unwrap_or_else(|error| {
            let text = "the build was given up";
            Err(Failure::new(ErrorCode::Aborted, text, "look at the node's log").with_cause(&error).into())
        });
        let last = match built {
            Ok(built) => json(&built).map(Piece::Built),
            Err(failure) => json(&failure).map(Piece::Failure),
        };
        Some((last.map(piece).map_err(refuse), None))
    })
}

/// Passes on what a piece tells; what was built, once it is.
///
/// # Errors
/// How the build failed; when there is no piece, or it is not understood.
pub(super) async fn read_piece(
    piece: Option<pb::BuildPiece>,
    told: &BuildTold,
) -> Result<Option<Built>, BuildFailure> {
    match piece.and_then(|piece| piece.piece) {
        Some(Piece::Event(text)) => {
            // Who has gone changes nothing.
            let _ = told.send(read(&text)?).await;
            Ok(None)
        }
        Some(Piece::Built(text)) => Ok(Some(read(&text)?)),
        Some(Piece::Failure(text)) => Err(read(&text)?),
        None => Err(missing("the end of a build").into()),
    }
}

pub(super) fn files(project: &Project, hash: &FilesHash) -> pb::FilesRequest {
    pb::FilesRequest { project: project.to_string(), hash: hash.to_string(), ..Default::default() }
}

fn sent(piece: Sent) -> pb::FilesPiece {
    pb::FilesPiece { piece: Some(piece), ..Default::default() }
}

/// Sends what comes; whether the other side took all of it.
async fn pour(
    mut requests: BidiSendHalf<pb::FilesPiece>,
    files: pb::FilesRequest,
    mut content: FilesContent,
) -> Result<(), Failure> {
    let mut goes_on = requests.send(sent(Sent::Files(Box::new(files)))).await.is_ok();
    while goes_on && let Some(bytes) = content.next().await {
        let mut bytes = bytes.map_err(|error| {
            let text = "the upload ended early";
            Failure::new(ErrorCode::BodyCut, text, "send it again").with_cause(&error)
        })?;
        while goes_on && !bytes.is_empty() {
            let stretch = bytes.split_to(bytes.len().min(STRETCH));
            goes_on = requests.send(sent(Sent::Data(stretch.to_vec()))).await.is_ok();
        }
    }
    if goes_on {
        let _ = requests.send(sent(Sent::End(Box::default()))).await;
    }
    // What refused it says why.
    requests.close_send();
    Ok(())
}

/// Sends an upload over `call`. What is still to be sent of it ends with the reply.
///
/// # Errors
/// As [`NodeService::put_files`]; `BodyCut` when `content` breaks off.
pub(super) async fn upload(
    call: FilesCall,
    files: pb::FilesRequest,
    content: FilesContent,
) -> Result<(), Failure> {
    let (requests, mut replies) = call.into_split();
    let sending = pour(requests, files, content);
    let replied = async {
        match replies.message().await.map_err(|error| refused(&error))? {
            Some(_) => Ok(()),
            None => Err(missing("what became of an upload")),
        }
    };
    tokio::pin!(sending, replied);
    tokio::select! {
        biased;
        reply = &mut replied => reply,
        sent = &mut sending => {
            // Also of one that broke off: when this returns, nothing of it is left there.
            let reply = replied.await;
            sent.and(reply)
        }
    }
}

fn cut_off() -> io::Error {
    io::ErrorKind::UnexpectedEof.into()
}

/// Has `node` keep an upload: on a task of its own, which ends with what comes.
///
/// # Errors
/// When the first piece does not say whose it is.
pub(super) async fn receive(
    node: Arc<dyn NodeService>,
    mut requests: InboundStream<pb::FilesPiece>,
) -> Result<impl Stream<Item = Result<pb::Done, ConnectError>> + Send + 'static, Failure> {
    let first = requests.next().await.and_then(Result::ok).and_then(|piece| piece.to_owned_message().piece);
    let Some(Sent::Files(files)) = first else {
        return Err(missing("whose files they are"));
    };
    let (project, hash): (Project, FilesHash) = (text(&files.project)?, text(&files.hash)?);
    // When its caller goes away, nothing more comes.
    let gone = CancellationToken::new();
    let caller = gone.clone().drop_guard();
    let content = stream::try_unfold((requests, gone), |(mut requests, gone)| async move {
        let next = gone.run_until_cancelled(requests.next()).await.flatten();
        match next.and_then(Result::ok).and_then(|piece| piece.to_owned_message().piece) {
            Some(Sent::Data(data)) => Ok(Some((Bytes::from(data), (requests, gone)))),
            Some(Sent::End(_)) => Ok(None),
            _ => Err(cut_off()),
        }
    });
    let keeping = tokio::spawn(async move { node.put_files(&project, &hash, Box::pin(content)).await });
    Ok(stream::once(async move {
        let _caller = caller;
        let kept = keeping.await.unwrap_or_else(|error| {
            let text = "the upload was given up";
            Err(Failure::new(ErrorCode::Aborted, text, "look at the node's log").with_cause(&error))
        });
        kept.map(|()| pb::Done::default()).map_err(refuse)
    }))
}
