//! A header block of 512 bytes.

use crate::error::Refusal;

/// Bytes of a block.
pub(super) const BLOCK: usize = 512;

/// A header, as it is there.
pub(super) struct Header {
    pub(super) kind: u8,
    name: Vec<u8>,
    prefix: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) mode: [u8; 8],
    pub(super) uid: [u8; 8],
    pub(super) gid: [u8; 8],
    size: [u8; 12],
    mtime: [u8; 12],
    pub(super) major: [u8; 8],
    pub(super) minor: [u8; 8],
}

fn field<const N: usize>(block: &[u8; BLOCK], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&block[at..at + N]);
    field
}

fn text(bytes: &[u8]) -> Vec<u8> {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()
}

/// A number in decimal digits.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 19 || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A number: octal digits, or base 256 when the first bit is set. Empty is 0.
pub(super) fn number(field: &[u8]) -> Result<u64, Refusal> {
    match signed(field)? {
        number if number >= 0 => Ok(number as u64),
        _ => Err(Refusal::Tar("a number is negative")),
    }
}

fn signed(field: &[u8]) -> Result<i64, Refusal> {
    let wrong = Refusal::Tar("a field is no number");
    if field[0] & 0x80 != 0 {
        // Two's complement of the field's width, without the marking bit: 0xff begins a negative number.
        let is_negative = field[0] & 0x40 != 0;
        let mut number: i128 = if is_negative { -1 } else { 0 };
        for (at, byte) in field.iter().enumerate() {
            let byte = if at == 0 && !is_negative { byte & 0x7f } else { *byte };
            number = (number << 8) | i128::from(byte);
        }
        return i64::try_from(number).map_err(|_| wrong);
    }
    let digits: Vec<u8> = field
        .iter()
        .copied()
        .skip_while(|byte| *byte == b' ')
        .take_while(|byte| *byte != 0 && *byte != b' ')
        .collect();
    digits.iter().try_fold(0_i64, |number, digit| match digit {
        b'0'..=b'7' => number
            .checked_mul(8)
            .and_then(|number| number.checked_add(i64::from(digit - b'0')))
            .ok_or(wrong.clone()),
        _ => Err(wrong.clone()),
    })
}

impl Header {
    pub(super) fn parse(block: &[u8; BLOCK]) -> Result<Self, Refusal> {
        let said = number(&block[148..156])?;
        let sum = |byte: fn(u8) -> i64| -> i64 {
            let blank = 8 * i64::from(b' ');
            block[..148].iter().chain(&block[156..]).map(|it| byte(*it)).sum::<i64>() + blank
        };
        // Very old writers added signed bytes.
        if said as i64 != sum(i64::from) && said as i64 != sum(|it| i64::from(it as i8)) {
            return Err(Refusal::Tar("the checksum of a header is wrong"));
        }
        let is_ustar = &block[257..263] == b"ustar\0";
        Ok(Self {
            kind: block[156],
            name: text(&block[..100]),
            // GNU's header has other fields there.
            prefix: if is_ustar { text(&block[345..500]) } else { Vec::new() },
            link: text(&block[157..257]),
            mode: field(block, 100),
            uid: field(block, 108),
            gid: field(block, 116),
            size: field(block, 124),
            mtime: field(block, 136),
            major: field(block, 329),
            minor: field(block, 337),
        })
    }

    pub(super) fn path(&self) -> Vec<u8> {
        match self.prefix.is_empty() {
            true => self.name.clone(),
            false => [&self.prefix[..], b"/", &self.name].concat(),
        }
    }

    pub(super) fn size(&self) -> Result<u64, Refusal> {
        number(&self.size)
    }

    /// What cannot be read is the epoch: no image is refused for a date.
    pub(super) fn mtime(&self) -> (i64, u32) {
        (signed(&self.mtime).unwrap_or(0), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256() {
        for (bytes, expected) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"    644 ", Some(0o644)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"\x80\0\0\0\x7f\xff\xff\xff", Some(0x7fff_ffff)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"0000008\0", None),
            (b"-000001\0", None),
            (b"77777777777777777777777777", None),
        ] {
            assert_eq!(number(bytes).ok(), expected, "{bytes:?}");
        }
        assert_eq!(signed(&[0xff; 12]), Ok(-1));
    }
}
