//! From a layer's bytes to its tar archive: how it is compressed stands in its first bytes, whatever its media type says.
//!
//! A zstd stream may have many frames, and frames to be skipped, as `zstd:chunked` writes them. A window above
//! [`MAX_WINDOW`] is refused before memory is taken for it.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use crate::error::Refusal;

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const BUFFER: usize = 256 << 10;
/// The largest window of a zstd frame. `zstd -19` has 8 MiB.
const MAX_WINDOW: u64 = 32 << 20;
/// Formats that are named when they are refused.
const OTHERS: [(&[u8], &str); 4] =
    [(b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"PK\x03\x04", "zip"), (b"\x04\x22\x4d\x18", "lz4")];

/// The tar archive in `blob`, of which not more than `limit` bytes are given.
///
/// # Errors
/// Of the reader, and a [`Refusal`] as the inner error when the compression is none that is supported.
pub(crate) fn open<'a>(blob: impl Read + Send + 'a, limit: u64) -> io::Result<Box<dyn Read + Send + 'a>> {
    let mut blob = BufReader::with_capacity(BUFFER, blob);
    let first = blob.fill_buf()?;
    if let Some((_, name)) = OTHERS.iter().find(|(magic, _)| first.starts_with(magic)) {
        return Err(io::Error::other(Refusal::Compression(format!("{name} is not supported"))));
    }
    let is_skipped = first.len() >= 4 && first[1..4] == [0x2a, 0x4d, 0x18] && first[0] & 0xf0 == 0x50;
    Ok(if first.starts_with(&GZIP) {
        Box::new(Limited::new(MultiGzDecoder::new(blob), limit))
    } else if first.starts_with(&ZSTD) || is_skipped {
        Box::new(Limited::new(Zstd::new(blob), limit))
    } else {
        Box::new(Limited::new(blob, limit))
    })
}

/// A reader that fails, rather than ends, after `limit` bytes.
struct Limited<R> {
    inner: R,
    left: u64,
    limit: u64,
}

impl<R> Limited<R> {
    fn new(inner: R, limit: u64) -> Self {
        Self { inner, left: limit, limit }
    }
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.left = self.left.checked_sub(read as u64).ok_or_else(|| {
            io::Error::other(Refusal::Limit { what: "decompressed bytes", limit: self.limit })
        })?;
        Ok(read)
    }
}

/// Frames of zstd, one after another.
struct Zstd<R> {
    source: R,
    decoder: FrameDecoder,
    is_in_frame: bool,
}

fn odd(reason: impl ToString) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.to_string())
}

/// Length of the size of the content in a header with this descriptor, and of the dictionary's number. Source: RFC 8878,
/// section 3.1.1.1.
fn lengths(descriptor: u8) -> (usize, usize) {
    let is_single = descriptor & 0x20 != 0;
    let size = match descriptor >> 6 {
        0 => usize::from(is_single),
        flag => 1 << flag,
    };
    (size, [0, 1, 2, 4][usize::from(descriptor & 3)])
}

/// The window that a frame header, with its magic, asks for.
fn window(header: &[u8]) -> u64 {
    let (size, dictionary) = lengths(header[4]);
    if header[4] & 0x20 == 0 {
        let byte = u64::from(header[5]);
        let base = 1_u64 << (10 + (byte >> 3));
        return base + base / 8 * (byte & 7);
    }
    let mut bytes = [0; 8];
    bytes[..size].copy_from_slice(&header[5 + dictionary..5 + dictionary + size]);
    u64::from_le_bytes(bytes) + if size == 2 { 256 } else { 0 }
}

impl<R: BufRead> Zstd<R> {
    fn new(source: R) -> Self {
        Self { source, decoder: FrameDecoder::new(), is_in_frame: false }
    }

    /// Reads `bytes` more of a header.
    fn more(&mut self, header: &mut Vec<u8>, bytes: usize) -> io::Result<()> {
        let had = header.len();
        (&mut self.source).take(bytes as u64).read_to_end(header)?;
        if header.len() < had + bytes { Err(odd("a frame is cut short")) } else { Ok(()) }
    }

    /// Begins the next frame; `false` when there is none.
    fn begin(&mut self) -> io::Result<bool> {
        loop {
            if self.source.fill_buf()?.is_empty() {
                return Ok(false);
            }
            let mut header = Vec::with_capacity(18);
            self.more(&mut header, 4)?;
            if header[1..4] == [0x2a, 0x4d, 0x18] && header[0] & 0xf0 == 0x50 {
                self.more(&mut header, 4)?;
                let length = u64::from(u32::from_le_bytes([header[4], header[5], header[6], header[7]]));
                if io::copy(&mut (&mut self.source).take(length), &mut io::sink())? < length {
                    return Err(odd("a frame is cut short"));
                }
                continue;
            }
            if header != ZSTD {
                return Err(odd("no frame of zstd"));
            }
            self.more(&mut header, 1)?;
            let (size, dictionary) = lengths(header[4]);
            let is_single = header[4] & 0x20 != 0;
            self.more(&mut header, size + dictionary + usize::from(!is_single))?;
            if window(&header) > MAX_WINDOW {
                let why = Refusal::Limit { what: "bytes of a zstd window", limit: MAX_WINDOW };
                return Err(io::Error::other(why));
            }
            self.decoder.reset(&header[..]).map_err(odd)?;
            self.is_in_frame = true;
            return Ok(true);
        }
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.is_in_frame && !self.begin()? {
                return Ok(0);
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                self.decoder
                    .decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBlocks(1))
                    .map_err(odd)?;
            }
            let read = self.decoder.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            self.is_in_frame = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn all(blob: &[u8], limit: u64) -> io::Result<Vec<u8>> {
        let mut plain = Vec::new();
        open(blob, limit)?.read_to_end(&mut plain)?;
        Ok(plain)
    }

    fn zstd(plain: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(plain, ruzstd::encoding::CompressionLevel::Fastest)
    }

    #[test]
    fn what_it_is_stands_in_its_bytes() {
        let plain: Vec<u8> = (0..300_000_u32).flat_map(|n| (n % 7919).to_le_bytes()).collect();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        let gzip = gzip.finish().unwrap();
        let skipped = [&[0x52, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        let one = zstd(&plain);
        for blob in [&plain, &gzip, &one, &[&skipped[..], &one, &skipped].concat()] {
            assert!(all(blob, u64::MAX).unwrap() == plain);
        }
        assert!(all(&[&one[..], &one].concat(), u64::MAX).unwrap() == [&plain[..], &plain].concat());
        assert!(all(&[&gzip[..], &gzip].concat(), u64::MAX).unwrap() == [&plain[..], &plain].concat());
        assert!(all(b"", 0).unwrap().is_empty());
        for blob in [&gzip, &one] {
            assert!(all(&blob[..blob.len() - 9], u64::MAX).is_err());
            assert!(all(blob, plain.len() as u64 - 1).is_err());
            assert!(all(blob, plain.len() as u64).is_ok());
        }
    }

    #[test]
    fn large_windows_and_other_formats_are_refused() {
        // 1 GiB, as `zstd --long=30` writes it.
        let long = all(&[0x28, 0xb5, 0x2f, 0xfd, 0x04, 20 << 3, 0, 0, 0, 0], u64::MAX).unwrap_err();
        assert!(long.to_string().contains("window"), "{long}");
        for (bytes, name) in [(&b"BZh91AY"[..], "bzip2"), (b"\xfd7zXZ\0..", "xz")] {
            assert!(all(bytes, u64::MAX).unwrap_err().to_string().contains(name));
        }
    }
}
