//! Maps of sparse files: GNU tar's old format, and PAX 0.0, 0.1 and 1.0.

use super::header::{BLOCK, decimal, number};
use crate::error::{Fault, Refusal};

/// Segments of data of one file.
const MAX_SEGMENTS: usize = 65_536;
/// Longest line of a map in PAX 1.0: a number of 64 bits.
const MAX_LINE: usize = 20;

/// Segments as (offset, length).
pub(super) type Segments = Vec<(u64, u64)>;

/// What an extended header says about a sparse file.
#[derive(Debug, Default)]
pub(super) struct PaxSparse {
    pub(super) name: Option<Vec<u8>>,
    major: Option<u64>,
    minor: Option<u64>,
    real: Option<u64>,
    /// Offsets and lengths, alternating.
    map: Vec<u64>,
}

fn odd() -> Refusal {
    Refusal::Tar("the map of a sparse file is not what it has to be")
}

fn too_many() -> Refusal {
    Refusal::Limit { what: "segments of a sparse file", limit: MAX_SEGMENTS as u64 }
}

impl PaxSparse {
    pub(super) fn is_some(&self) -> bool {
        self.major.is_some() || self.real.is_some() || !self.map.is_empty()
    }

    pub(super) fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), Refusal> {
        let number = || decimal(value).ok_or_else(odd);
        match key {
            b"name" => self.name = Some(value.to_vec()),
            b"major" => self.major = Some(number()?),
            b"minor" => self.minor = Some(number()?),
            b"size" | b"realsize" => self.real = Some(number()?),
            b"offset" | b"numbytes" => {
                // They come in turn.
                if self.map.len().is_multiple_of(2) != (key == b"offset") {
                    return Err(odd());
                }
                self.map.push(number()?);
            }
            b"map" => {
                self.map = value
                    .split(|byte| *byte == b',')
                    .filter(|text| !text.is_empty())
                    .take(2 * MAX_SEGMENTS + 1)
                    .map(|text| decimal(text).ok_or_else(odd))
                    .collect::<Result<_, _>>()?;
            }
            _ => {}
        }
        if self.map.len() > 2 * MAX_SEGMENTS { Err(too_many()) } else { Ok(()) }
    }
}

/// The map of a file of type `S`, whose first segments are in its header `block`, and its length. `next` gives the block after
/// that, and so on.
pub(super) fn old(
    block: &[u8; BLOCK],
    mut next: impl FnMut() -> Result<[u8; BLOCK], Fault>,
) -> Result<(u64, Segments), Fault> {
    let real = number(&block[483..495])?;
    let mut segments = Segments::new();
    let mut take = |bytes: &[u8]| -> Result<(), Fault> {
        for pair in bytes.chunks_exact(24) {
            if pair.iter().all(|byte| *byte == 0) {
                break;
            }
            segments.push((number(&pair[..12])?, number(&pair[12..])?));
        }
        if segments.len() > MAX_SEGMENTS { Err(too_many().into()) } else { Ok(()) }
    };
    take(&block[386..482])?;
    let mut goes_on = block[482] != 0;
    while goes_on {
        // More of the map, before the content and not counted in its size.
        let more = next()?;
        if more[..24].iter().all(|byte| *byte == 0) && more[504] != 0 {
            return Err(odd().into());
        }
        take(&more[..504])?;
        goes_on = more[504] != 0;
    }
    Ok((real, segments))
}

/// The map that an extended header has, or that stands at the beginning of the content (1.0), and the file's length. `next`
/// gives the next block of the content.
pub(super) fn of_pax(
    said: &PaxSparse,
    next: impl FnMut() -> Result<[u8; BLOCK], Fault>,
) -> Result<(u64, Segments), Fault> {
    let real = said.real.ok_or_else(odd)?;
    if (said.major, said.minor) != (Some(1), Some(0)) {
        if said.major.is_some_and(|major| major != 0) || !said.map.len().is_multiple_of(2) {
            return Err(odd().into());
        }
        return Ok((real, said.map.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()));
    }
    let mut lines = Lines { next, block: [0; BLOCK], at: BLOCK };
    let count = lines.number()?;
    if count > MAX_SEGMENTS as u64 {
        return Err(too_many().into());
    }
    let mut segments = Segments::new();
    for _ in 0..count {
        segments.push((lines.number()?, lines.number()?));
    }
    Ok((real, segments))
}

/// Lines with numbers, in whole blocks.
struct Lines<F> {
    next: F,
    block: [u8; BLOCK],
    at: usize,
}

impl<F: FnMut() -> Result<[u8; BLOCK], Fault>> Lines<F> {
    fn number(&mut self) -> Result<u64, Fault> {
        let mut line = Vec::new();
        loop {
            if self.at == BLOCK {
                (self.block, self.at) = ((self.next)()?, 0);
            }
            let byte = self.block[self.at];
            self.at += 1;
            if byte == b'\n' {
                return decimal(&line).ok_or_else(|| odd().into());
            }
            line.push(byte);
            if line.len() > MAX_LINE {
                return Err(odd().into());
            }
        }
    }
}

/// Why a map of a file of `real` bytes with `stored` bytes of data cannot be.
pub(super) fn check(segments: &[(u64, u64)], real: u64, stored: u64) -> Result<(), &'static str> {
    let (mut end, mut sum) = (0_u64, 0_u64);
    for &(offset, length) in segments {
        if offset < end {
            return Err("the segments of the sparse file overlap");
        }
        end =
            offset.checked_add(length).filter(|end| *end <= real).ok_or("a segment ends behind the file")?;
        sum += length;
    }
    if sum == stored { Ok(()) } else { Err("the segments of the sparse file are not what is stored") }
}
