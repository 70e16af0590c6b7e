//! Which files ADD unpacks: told by their content, as Docker does.

use std::fs::File;
use std::io::{self, Read};

use flate2::read::MultiGzDecoder;

/// A block of a tar.
const BLOCK: usize = 512;
/// Where a block has its checksum.
const CHECKSUM: std::ops::Range<usize> = 148..156;
/// What files of other compressions begin with.
const OTHERS: [(&[u8], &str); 3] = [(b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")];

/// What a file is for ADD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Copied as it is.
    File,
    /// A tar, plain or gzip: unpacked.
    Archive,
    /// Compressed by a method that is not unpacked here.
    Other(&'static str),
}

/// Looks at the begin of `file`.
pub(crate) fn kind(mut file: &File) -> io::Result<Kind> {
    let head = begin(&mut file)?;
    if let Some((_, name)) = OTHERS.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Ok(Kind::Other(name));
    }
    let block = if head.starts_with(b"\x1f\x8b") {
        // A file of one block at most is all that is unpacked here. One that is no gzip after all is a file.
        begin(&mut MultiGzDecoder::new(head.chain(file))).unwrap_or_default()
    } else {
        head
    };
    Ok(if is_tar(&block) { Kind::Archive } else { Kind::File })
}

fn begin(reader: &mut dyn Read) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(BLOCK);
    reader.take(BLOCK as u64).read_to_end(&mut head)?;
    Ok(head)
}

/// Whether `block` is the header of a tar's entry: its checksum is right.
fn is_tar(block: &[u8]) -> bool {
    let Some(field) = block.get(CHECKSUM).filter(|_| block.len() == BLOCK) else { return false };
    let text = String::from_utf8_lossy(field);
    let text = text.trim_matches([' ', '\0']);
    let Ok(wanted) = u32::from_str_radix(text, 8) else { return false };
    // The field itself counts as spaces.
    let sum = |at: usize, byte: u8| u32::from(if CHECKSUM.contains(&at) { b' ' } else { byte });
    block.iter().enumerate().map(|(at, byte)| sum(at, *byte)).sum::<u32>() == wanted
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn of(content: &[u8]) -> Kind {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        std::fs::write(&path, content).unwrap();
        kind(&File::open(path).unwrap()).unwrap()
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn archives_are_told_by_their_content() {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        builder.append_data(&mut header, "a", &b"x"[..]).unwrap();
        let tar = builder.into_inner().unwrap();
        assert_eq!(of(&tar), Kind::Archive);
        assert_eq!(of(&gzip(&tar)), Kind::Archive);
        // Compressed, and no archive.
        assert_eq!(of(&gzip(b"hello")), Kind::File);
        assert_eq!(of(&gzip(&[0; 4096])), Kind::File);
        assert_eq!(of(b"\x1f\x8bnot gzip"), Kind::File);
        assert_eq!(of(b""), Kind::File);
        assert_eq!(of(&[b'x'; 600]), Kind::File);
        assert_eq!(of(b"BZh91AY"), Kind::Other("bzip2"));
        assert_eq!(of(b"\xfd7zXZ\0\0"), Kind::Other("xz"));
        assert_eq!(of(b"\x28\xb5\x2f\xfd\0"), Kind::Other("zstd"));
        let mut wrong = tar;
        wrong[0] ^= 1;
        assert_eq!(of(&wrong), Kind::File);
    }
}
