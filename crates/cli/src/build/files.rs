//! What is uploaded for a step: a tar that is packed while it is sent.
//!
//! Who writes: nobody here; what was sent of a tar that is not whole is broken off, and the server keeps none of it.

use std::io::{self, Write};

use kelvin_client::build::Pieces;
use kelvin_dockerfile::Upload;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::context::Context;
use crate::output::Failed;

/// Bytes that are sent at once.
const CHUNK: usize = 256 << 10;
/// Pieces that wait to be sent.
const AHEAD: usize = 4;

/// Files of one step.
#[derive(Debug)]
pub enum Files {
    /// Of `--copy`.
    Named(Context),
    /// Of a COPY or ADD of a Dockerfile, which is shown as this text.
    Copied(Upload, String),
}

impl Files {
    /// What they are called on the server.
    pub fn hash(&self) -> &str {
        match self {
            Self::Named(context) => &context.hash,
            Self::Copied(upload, _) => upload.hash.as_str(),
        }
    }

    /// What people know them by.
    pub fn name(&self) -> String {
        match self {
            Self::Named(context) => context.name.clone(),
            Self::Copied(_, shown) => format!("what `{shown}` copies"),
        }
    }

    fn write(&self, to: &mut dyn Write) -> Result<(), Failed> {
        let packing =
            |error: io::Error| Failed::new(format!("packing files: {error}"), "name files that can be read");
        match self {
            Self::Named(context) => context.write(to).map_err(packing)?,
            Self::Copied(upload, _) => upload.write(to).map_err(|error| Failed::from(error.failure()))?,
        }
        to.flush().map_err(packing)
    }

    /// The tar, piece by piece, and why it is not whole: none, too, where who reads the pieces has gone before their end.
    pub fn pack(self) -> (Pieces, JoinHandle<Option<Failed>>) {
        let (give, pieces) = mpsc::channel(AHEAD);
        let packing = tokio::task::spawn_blocking(move || {
            let mut writer = io::BufWriter::with_capacity(CHUNK, Sender(give.clone()));
            let failed = self.write(&mut writer).err().filter(|_| !give.is_closed())?;
            // What it still has goes before what says that the rest is missing.
            drop(writer);
            // So that what was sent is not taken for all of it.
            let _ = give.blocking_send(Err(io::Error::other("the files could not be packed")));
            Some(failed)
        });
        (pieces, packing)
    }
}

/// Sends what is written.
struct Sender(mpsc::Sender<io::Result<Vec<u8>>>);

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        self.0.blocking_send(Ok(bytes.to_vec())).map_err(gone)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn named(path: &Path) -> Files {
        Files::Named(Context::read(path, "/srv").unwrap())
    }

    #[tokio::test]
    async fn a_tar_is_sent_whole_or_broken_off() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("app");
        // More than waits to be sent.
        std::fs::write(&file, vec![b'x'; CHUNK * (AHEAD + 2)]).unwrap();
        let (mut pieces, packing) = named(&file).pack();
        let mut bytes = Vec::new();
        while let Some(piece) = pieces.recv().await {
            bytes.extend(piece.unwrap());
        }
        assert!(packing.await.unwrap().is_none());
        let mut archive = tar::Archive::new(&bytes[..]);
        let sizes: Vec<u64> = archive.entries().unwrap().map(|entry| entry.unwrap().size()).collect();
        assert_eq!(sizes, [(CHUNK * (AHEAD + 2)) as u64]);

        // What cannot be read breaks the upload off.
        let files = named(&file);
        std::fs::remove_file(&file).unwrap();
        let (mut pieces, packing) = files.pack();
        let mut is_cut = false;
        while let Some(piece) = pieces.recv().await {
            is_cut |= piece.is_err();
        }
        assert!(is_cut && packing.await.unwrap().is_some());
    }

    #[tokio::test]
    async fn a_reader_that_has_gone_is_no_fault_of_the_files() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("app");
        std::fs::write(&file, vec![b'x'; CHUNK * (AHEAD + 2)]).unwrap();
        let (pieces, packing) = named(&file).pack();
        drop(pieces);
        assert!(packing.await.unwrap().is_none());
    }
}
