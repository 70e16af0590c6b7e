//! Imports, as a stream of what is told of them.

use std::sync::Arc;

use connectrpc::ConnectError;
use futures::{Stream, stream};
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::sandbox::Template;
use tokio::sync::watch;

use super::convert::{json, read};
use super::failure::{missing, refuse};
use super::generated::pb;
use super::generated::pb::__buffa::oneof::import_piece::Piece;
use crate::{Import, ImportTold, NodeService};

fn piece(piece: Piece) -> pb::ImportPiece {
    pb::ImportPiece { piece: Some(piece), ..Default::default() }
}

/// Has `node` import; what it tells, and how it ends. It comes to its end when nobody reads that any more. Who reads slowly
/// misses what was overtaken.
pub(super) fn pieces(
    node: Arc<dyn NodeService>,
    request: Import,
) -> impl Stream<Item = Result<pb::ImportPiece, ConnectError>> + Send + 'static {
    let (told, progress) = watch::channel(None);
    let importing = tokio::spawn(async move { node.import(request, told).await });
    stream::unfold(Some((progress, importing)), |state| async move {
        let (mut progress, importing) = state?;
        if progress.changed().await.is_ok() {
            let now = *progress.borrow_and_update();
            let told = json(&now).map(|text| piece(Piece::Progress(text))).map_err(refuse);
            return Some((told, Some((progress, importing))));
        }
        let imported = importing.await.unwrap_or_else(|error| {
            let text = "the import was given up";
            Err(Failure::new(ErrorCode::Aborted, text, "look at the node's log").with_cause(&error))
        });
        let last = imported.and_then(|template| Ok(piece(Piece::Template(json(&template)?))));
        Some((last.map_err(refuse), None))
    })
}

/// Passes on what a piece tells; the template, once it is there.
///
/// # Errors
/// When there is no piece, or it is not understood.
pub(super) fn read_piece(
    piece: Option<pb::ImportPiece>,
    told: &ImportTold,
) -> Result<Option<Template>, Failure> {
    match piece.and_then(|piece| piece.piece) {
        Some(Piece::Progress(text)) => {
            told.send_replace(read(&text)?);
            Ok(None)
        }
        Some(Piece::Template(text)) => read(&text).map(Some),
        None => Err(missing("the end of an import")),
    }
}
