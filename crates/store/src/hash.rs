//! Content digests: SHA-256 over 4 MiB chunks, and over the list of their digests.
//!
//! Chunks are what is fetched, verified and shared later; a hole is a chunk of zeros whose digest is
//! computed once, so that hashing costs what a file holds and not how long it is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::LazyLock;

use kelvin_api::digest::hex;
pub use kelvin_api::digest::sha256;
use rustix::fs::{SeekFrom, seek};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Bytes of one chunk.
pub const CHUNK_BYTES: u64 = 4 << 20;

/// The digest of a chunk of zeros.
static ZEROS: LazyLock<String> = LazyLock::new(|| {
    let part = [0; 64 << 10];
    let mut digest = Sha256::new();
    for _ in 0..CHUNK_BYTES / part.len() as u64 {
        digest.update(part);
    }
    hex(&digest.finalize())
});

/// The digest of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileDigest {
    /// Length in bytes.
    pub bytes: u64,
    /// Over the list of `chunks`, in hexadecimal.
    pub digest: String,
    /// Of each chunk, in hexadecimal.
    pub chunks: Vec<String>,
}

impl FileDigest {
    /// The digest of a file of `bytes` whose chunks have the digests `chunks`.
    pub fn of(bytes: u64, chunks: Vec<String>) -> Self {
        Self { bytes, digest: sha256(chunks.concat().as_bytes()), chunks }
    }
}

/// A file that is digested chunk by chunk.
#[derive(Debug)]
pub struct Chunks {
    file: File,
    /// Length in bytes when it was opened.
    pub bytes: u64,
    buffer: Vec<u8>,
}

impl Chunks {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// As the file system gives them.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::of(File::open(path)?)
    }

    fn of(file: File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        // Most are short: no more is held than one has.
        let buffer = vec![0; usize::try_from(CHUNK_BYTES.min(bytes)).map_err(io::Error::other)?];
        Ok(Self { file, bytes, buffer })
    }

    /// How many chunks it has.
    pub fn count(&self) -> u64 {
        self.bytes.div_ceil(CHUNK_BYTES)
    }

    fn range(&self, index: u64) -> (u64, u64) {
        let offset = index * CHUNK_BYTES;
        (offset, CHUNK_BYTES.min(self.bytes.saturating_sub(offset)))
    }

    /// Whether chunk `index` is a whole one that holds nothing: its digest costs nothing.
    pub fn is_hole(&self, index: u64) -> bool {
        let (offset, length) = self.range(index);
        length == CHUNK_BYTES
            && match seek(&self.file, SeekFrom::Data(offset)) {
                Ok(data) => data >= offset + length,
                // No data behind this point.
                Err(rustix::io::Errno::NXIO) => true,
                Err(_) => false,
            }
    }

    /// The digest of chunk `index`, in hexadecimal.
    ///
    /// # Errors
    /// When it cannot be read whole.
    pub fn digest(&mut self, index: u64) -> io::Result<String> {
        if self.is_hole(index) {
            return Ok(ZEROS.clone());
        }
        let (offset, length) = self.range(index);
        let part = &mut self.buffer[..usize::try_from(length).map_err(io::Error::other)?];
        self.file.read_exact_at(part, offset)?;
        Ok(sha256(part))
    }
}

/// Digests the file at `path`.
///
/// # Errors
/// When it cannot be read whole.
pub fn digest_file(path: &Path) -> io::Result<FileDigest> {
    digest_open(File::open(path)?, &mut |_| ())
}

/// Digests a file that is open. `told` hears how many bytes are done.
///
/// # Errors
/// When it cannot be read whole.
pub(crate) fn digest_open(file: File, told: &mut dyn FnMut(u64)) -> io::Result<FileDigest> {
    let mut file = Chunks::of(file)?;
    let mut chunks = Vec::new();
    for index in 0..file.count() {
        chunks.push(file.digest(index)?);
        told(((index + 1) * CHUNK_BYTES).min(file.bytes));
    }
    Ok(FileDigest::of(file.bytes, chunks))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_and_zeros_have_one_digest() {
        let dir = tempfile::tempdir().unwrap();
        let (sparse, dense) = (dir.path().join("sparse"), dir.path().join("dense"));
        let length = CHUNK_BYTES * 2 + 100;
        File::create(&sparse).unwrap().set_len(length).unwrap();
        std::fs::write(&dense, vec![0; length as usize]).unwrap();
        let digest = digest_file(&sparse).unwrap();
        assert_eq!(digest, digest_file(&dense).unwrap());
        assert_eq!(digest.chunks.len(), 3);
        let mut content = vec![0; length as usize];
        content[CHUNK_BYTES as usize] = 1;
        std::fs::write(&dense, content).unwrap();
        let other = digest_file(&dense).unwrap();
        assert_eq!(other.chunks[0], digest.chunks[0]);
        assert_ne!(other.chunks[1], digest.chunks[1]);
        assert_ne!(other.digest, digest.digest);
    }
}
