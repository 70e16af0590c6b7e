//! The contents of an image's files, one after another in one file that has no name: a crash leaves nothing of it.
//!
//! Only data is stored. Zeros in whole chunks of 64 KiB become holes, wherever they come from: so 10 GiB of zeros cost
//! neither memory nor disk.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Fault, Refusal};

/// What becomes a hole when it is all zeros. A multiple of ext4's blocks.
const CHUNK: usize = 64 << 10;
/// What is written at once.
const BUFFER: usize = 1 << 20;
/// Segments of one file.
const MAX_SEGMENTS: usize = 1 << 18;
static ZEROS: [u8; CHUNK] = [0; CHUNK];

/// The content of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Content {
    /// Where its data is in the spool.
    pub(crate) at: u64,
    /// Length, with its holes.
    pub(crate) size: u64,
    /// Data and holes in turn, beginning with data, which may be empty; none when all is data. All but the last are whole
    /// chunks.
    pub(crate) segments: Option<Box<[u64]>>,
}

impl Content {
    /// Bytes of its data.
    pub(crate) fn data(&self) -> u64 {
        match &self.segments {
            Some(segments) => segments.iter().step_by(2).sum(),
            None => self.size,
        }
    }

    /// What its segments cost in memory: here, and several times while the file system is written.
    pub(crate) fn cost(&self) -> u64 {
        self.segments.as_ref().map_or(0, |segments| 64 * segments.len() as u64)
    }
}

/// The spool; one writer.
#[derive(Debug)]
pub(crate) struct Spool {
    file: File,
    buffer: Vec<u8>,
    /// Where the buffer goes.
    at: u64,
}

fn full(source: io::Error) -> Fault {
    Fault::Io { what: "writing the files of an image", source }
}

impl Spool {
    /// An empty one in `directory`, without a name.
    pub(crate) fn new(directory: &Path) -> io::Result<Self> {
        let file = tempfile::tempfile_in(directory)?;
        Ok(Self { file, buffer: Vec::with_capacity(BUFFER), at: 0 })
    }

    /// A writer of the next file.
    pub(crate) fn begin(&mut self) -> Writer<'_> {
        let start = self.at + self.buffer.len() as u64;
        Writer { spool: self, start, chunk: Vec::new(), size: 0, segments: Vec::new() }
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        if self.buffer.len() + bytes.len() > BUFFER {
            self.flush()?;
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Fault> {
        self.file.write_all_at(&self.buffer, self.at).map_err(full)?;
        self.at += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// The file, with everything in it.
    pub(crate) fn finish(mut self) -> Result<File, Fault> {
        self.flush()?;
        Ok(self.file)
    }
}

/// A writer of one file.
#[derive(Debug)]
pub(crate) struct Writer<'a> {
    spool: &'a mut Spool,
    start: u64,
    /// Less than a chunk that is not decided on yet.
    chunk: Vec<u8>,
    size: u64,
    /// As in [`Content::segments`].
    segments: Vec<u64>,
}

impl Writer<'_> {
    fn data(&mut self, bytes: u64) -> Result<(), Fault> {
        if self.segments.len().is_multiple_of(2) {
            self.segments.push(0);
        }
        self.add(bytes)
    }

    fn hole(&mut self, bytes: u64) -> Result<(), Fault> {
        if self.segments.is_empty() {
            self.segments.push(0);
        }
        if !self.segments.len().is_multiple_of(2) {
            self.segments.push(0);
        }
        self.add(bytes)
    }

    fn add(&mut self, bytes: u64) -> Result<(), Fault> {
        if self.segments.len() > MAX_SEGMENTS {
            return Err(Refusal::Limit { what: "holes of a file", limit: MAX_SEGMENTS as u64 / 2 }.into());
        }
        if let Some(last) = self.segments.last_mut() {
            *last += bytes;
        }
        Ok(())
    }

    /// Decides on the chunk, which is full or the last.
    fn settle(&mut self) -> Result<(), Fault> {
        let chunk = std::mem::take(&mut self.chunk);
        let bytes = chunk.len() as u64;
        if chunk == ZEROS[..chunk.len()] {
            self.hole(bytes)?;
        } else {
            self.spool.push(&chunk)?;
            self.data(bytes)?;
        }
        self.chunk = chunk;
        self.chunk.clear();
        Ok(())
    }

    /// Adds `bytes` bytes of `source`, which has as many.
    pub(crate) fn copy(&mut self, source: &mut impl Read, mut bytes: u64) -> Result<(), Fault> {
        self.size += bytes;
        while bytes > 0 {
            let had = self.chunk.len();
            let more = bytes.min((CHUNK - had) as u64) as usize;
            self.chunk.resize(had + more, 0);
            source.read_exact(&mut self.chunk[had..]).map_err(Fault::reading)?;
            bytes -= more as u64;
            if self.chunk.len() == CHUNK {
                self.settle()?;
            }
        }
        Ok(())
    }

    /// Adds `bytes` zeros.
    pub(crate) fn zeros(&mut self, mut bytes: u64) -> Result<(), Fault> {
        self.size += bytes;
        if !self.chunk.is_empty() && bytes > 0 {
            let more = bytes.min((CHUNK - self.chunk.len()) as u64) as usize;
            self.chunk.resize(self.chunk.len() + more, 0);
            bytes -= more as u64;
            if self.chunk.len() == CHUNK {
                self.settle()?;
            }
        }
        let whole = bytes - bytes % CHUNK as u64;
        if whole > 0 {
            self.hole(whole)?;
        }
        self.chunk.resize(self.chunk.len() + (bytes - whole) as usize, 0);
        Ok(())
    }

    /// The file.
    pub(crate) fn finish(mut self) -> Result<Content, Fault> {
        if !self.chunk.is_empty() {
            self.settle()?;
        }
        let segments = (self.segments.len() > 1).then(|| self.segments.as_slice().into());
        Ok(Content { at: self.start, size: self.size, segments })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(file: &File, content: &Content) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut at = content.at;
        let whole = [content.size];
        for (place, length) in content.segments.as_deref().unwrap_or(&whole).iter().enumerate() {
            let mut part = vec![0; *length as usize];
            if place % 2 == 0 {
                file.read_exact_at(&mut part, at).unwrap();
                at += length;
            }
            bytes.extend(part);
        }
        bytes
    }

    #[test]
    fn zeros_are_holes_and_everything_comes_back() {
        let directory = tempfile::tempdir().unwrap();
        let mut spool = Spool::new(directory.path()).unwrap();
        let mut expected = Vec::new();
        let mut contents = Vec::new();
        let pieces: [&[(u8, usize)]; 6] = [
            &[],
            &[(1, 10)],
            &[(0, 10)],
            &[(1, CHUNK), (0, 3 * CHUNK), (2, 5)],
            &[(0, 2 * CHUNK + 7), (3, CHUNK)],
            &[(4, 3 * CHUNK + 1)],
        ];
        for file in pieces {
            let bytes: Vec<u8> = file.iter().flat_map(|(byte, times)| vec![*byte; *times]).collect();
            let mut writer = spool.begin();
            writer.copy(&mut &bytes[..], bytes.len() as u64).unwrap();
            contents.push(writer.finish().unwrap());
            expected.push(bytes.clone());
            // The same, told as a sparse file.
            let mut writer = spool.begin();
            for (byte, times) in file {
                match byte {
                    0 => writer.zeros(*times as u64).unwrap(),
                    _ => writer.copy(&mut &vec![*byte; *times][..], *times as u64).unwrap(),
                }
            }
            contents.push(writer.finish().unwrap());
            expected.push(bytes);
        }
        let file = spool.finish().unwrap();
        for (content, bytes) in contents.iter().zip(&expected) {
            assert!(read(&file, content) == *bytes);
            assert_eq!(content.size, bytes.len() as u64);
        }
        assert_eq!(contents[6].segments.as_deref(), Some(&[CHUNK as u64, 3 * CHUNK as u64, 5][..]));
        assert_eq!(contents[2].segments, None);
        // A file of zeros costs no disk.
        assert_eq!(contents[4].data(), 0);
        let used: u64 = contents.iter().map(Content::data).sum();
        assert_eq!(file.metadata().unwrap().len(), used);
    }

    #[test]
    fn ten_gigabytes_of_zeros_cost_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut spool = Spool::new(directory.path()).unwrap();
        let mut writer = spool.begin();
        writer.zeros(10 << 30).unwrap();
        writer.copy(&mut &b"x"[..], 1).unwrap();
        let content = writer.finish().unwrap();
        assert_eq!((content.size, content.data()), ((10 << 30) + 1, 1));
        assert_eq!(spool.finish().unwrap().metadata().unwrap().len(), 1);
    }
}
