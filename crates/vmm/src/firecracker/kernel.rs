//! The guest's kernel as Firecracker boots it: the ELF program inside of a bzImage.
//!
//! Before 1.17 it boots nothing else, and a guest that need not unpack its own kernel boots sooner. The program is
//! made once for each guest, in `staging/` and renamed, beside the kernel that it is from; it goes with it. A crash
//! leaves a part of it in `staging/`, which the next start empties.
//! Source: Linux, Documentation/arch/x86/boot.rst (`payload_offset`), and LZ4's legacy frame format.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// The program's name in a guest's directory.
pub const NAME: &str = "vmlinux";
/// The largest kernel, in bytes.
const MAX: usize = 512 << 20;
/// The most that one block of LZ4's legacy format holds.
const BLOCK: usize = 8 << 20;

/// Makes the program in the guest's `directory`, when it is missing; `staging` is of the same file system.
///
/// # Errors
/// When the kernel is of no format that is known, in words; or as the file system gives them.
pub fn ensure(directory: &Path, staging: &Path) -> io::Result<()> {
    let done = directory.join(NAME);
    if done.exists() {
        return Ok(());
    }
    let elf = unpack(&fs::read(directory.join("vmlinuz"))?)?;
    // Two boots at once may both make it: each writes a file of its own and renames it when it is whole.
    let mut fresh = tempfile::NamedTempFile::with_prefix_in(NAME, staging)?;
    fresh.write_all(&elf)?;
    fresh.as_file().set_permissions(fs::Permissions::from_mode(0o444))?;
    fresh.persist(done)?;
    Ok(())
}

fn odd(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the guest's kernel: {}", reason.into()))
}

fn number(bytes: &[u8], at: usize) -> io::Result<usize> {
    let field = bytes.get(at..at + 4).and_then(|field| field.try_into().ok());
    let value = field.map(u32::from_le_bytes).ok_or_else(|| odd("it ends in its header"))?;
    usize::try_from(value).map_err(io::Error::other)
}

fn unpack(image: &[u8]) -> io::Result<Vec<u8>> {
    if image.starts_with(b"\x7fELF") {
        return Ok(image.to_vec());
    }
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err(odd("it is neither an ELF program nor a bzImage"));
    }
    let sectors = usize::from(*image.get(0x1f1).ok_or_else(|| odd("it ends in its header"))?);
    // Zero stands for four, from before there was a field.
    let start = (if sectors == 0 { 4 } else { sectors } + 1) * 512 + number(image, 0x248)?;
    let payload = start
        .checked_add(number(image, 0x24c)?)
        .and_then(|end| image.get(start..end))
        .ok_or_else(|| odd("its payload is not in it"))?;
    let elf = match payload {
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => lz4(blocks)?,
        [0x1f, 0x8b, ..] => limited(flate2::read::GzDecoder::new(payload))?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => limited(
            ruzstd::decoding::StreamingDecoder::new(payload).map_err(|error| odd(error.to_string()))?,
        )?,
        [a, b, c, d, ..] => {
            return Err(odd(format!(
                "its packing ({a:02x}{b:02x}{c:02x}{d:02x}) is none of LZ4, gzip and Zstandard"
            )));
        }
        _ => return Err(odd("it has no payload")),
    };
    if elf.starts_with(b"\x7fELF") { Ok(elf) } else { Err(odd("its payload is no ELF program")) }
}

fn limited(reader: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(MAX as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > MAX { Err(odd("it is too large")) } else { Ok(bytes) }
}

fn lz4(mut blocks: &[u8]) -> io::Result<Vec<u8>> {
    let (mut bytes, mut block) = (Vec::new(), vec![0; BLOCK]);
    // The build appends the size of what was packed: four bytes that are no block.
    while blocks.len() > 4 {
        let end = number(blocks, 0)?.checked_add(4).filter(|end| *end <= blocks.len());
        let packed = &blocks[4..end.ok_or_else(|| odd("a block is longer than the rest"))?];
        let count =
            lz4_flex::block::decompress_into(packed, &mut block).map_err(|error| odd(error.to_string()))?;
        bytes.extend_from_slice(&block[..count]);
        if bytes.len() > MAX {
            return Err(odd("it is too large"));
        }
        blocks = &blocks[4 + packed.len()..];
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 5 * 512];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend([0; 16]);
        image.extend(payload);
        image
    }

    #[test]
    fn kernels_are_unpacked() {
        let elf = [b"\x7fELF".as_slice(), &[7; 9000]].concat();
        assert_eq!(unpack(&elf).unwrap(), elf);
        let packed = lz4_flex::block::compress(&elf);
        let length = u32::try_from(packed.len()).unwrap().to_le_bytes();
        let size = u32::try_from(elf.len()).unwrap().to_le_bytes();
        let lz4 = [&[0x02, 0x21, 0x4c, 0x18], &length[..], &packed, &size].concat();
        assert_eq!(unpack(&image(&lz4)).unwrap(), elf);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&elf).unwrap();
        assert_eq!(unpack(&image(&gzip.finish().unwrap())).unwrap(), elf);
    }

    #[test]
    fn what_is_no_kernel_is_refused_in_words() {
        for (bytes, why) in [
            (vec![], "neither"),
            (vec![0; 600], "neither"),
            (image(b""), "no payload"),
            (image(b"\xfd7zXZ\0"), "none of LZ4"),
            (image(&[0x02, 0x21, 0x4c, 0x18, 255, 255, 255, 127, 0]), "longer than the rest"),
            (image(b"\x1f\x8b\x08"), ""),
        ] {
            let error = unpack(&bytes).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
