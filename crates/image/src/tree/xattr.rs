//! Extended attributes: from what a tar archive has to what ext4 has.

use crate::error::{Fault, Refusal};

/// An attribute: its name with its namespace, and its value as ext4 has it on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Xattr {
    pub(crate) name: Box<str>,
    pub(crate) value: Box<[u8]>,
}

/// What does not fit into an inode takes a block: long links, many attributes. In memory, until it is written.
pub(super) const BLOCK_COST: u64 = 4096 + 100;
/// Bytes of all attributes of a file: a block, less its header.
const MAX_BYTES: usize = 4096 - 36;
/// What fits into an inode beside it.
const INLINE: usize = 92;
const NAMESPACES: [&str; 3] = ["user.", "trusted.", "security."];
const ACLS: [&str; 2] = ["system.posix_acl_access", "system.posix_acl_default"];

fn on_disk(name: &str, value: &[u8]) -> usize {
    16 + name.len().next_multiple_of(4) + value.len().next_multiple_of(4)
}

pub(super) fn cost(xattrs: &[Xattr]) -> u64 {
    let sum: usize = xattrs.iter().map(|it| on_disk(&it.name, &it.value)).sum();
    let held: usize = xattrs.iter().map(|it| 150 + 3 * (it.name.len() + it.value.len())).sum();
    held as u64 + if sum > INLINE { BLOCK_COST } else { 0 }
}

/// An ACL as ext4 has it: version 1, and no id where none is meant. In an archive it is as `getxattr` gives it: version 2,
/// eight bytes an entry.
///
/// Source: Linux `fs/ext4/acl.h`, `include/uapi/linux/posix_acl_xattr.h`.
fn acl(value: &[u8]) -> Option<Vec<u8>> {
    let entries = value.strip_prefix(&2_u32.to_le_bytes())?;
    if !entries.len().is_multiple_of(8) {
        return None;
    }
    let mut disk = 1_u32.to_le_bytes().to_vec();
    for entry in entries.chunks_exact(8) {
        match u16::from_le_bytes([entry[0], entry[1]]) {
            // Owner, owning group, mask, others.
            0x01 | 0x04 | 0x10 | 0x20 => disk.extend(&entry[..4]),
            // A user, a group.
            0x02 | 0x08 => disk.extend(entry),
            _ => return None,
        }
    }
    Some(disk)
}

/// What of an entry's attributes Linux knows: those of other systems (`com.apple.…`) are left out, as Docker leaves them out.
///
/// # Errors
/// `Limit` when they do not fit, `Tar` when one of ours is not what it has to be.
pub(super) fn read(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<Box<[Xattr]>, Fault> {
    let mut kept = Vec::new();
    let mut sum = 0;
    for (name, value) in xattrs {
        let Ok(name) = std::str::from_utf8(name) else { continue };
        let value = if ACLS.contains(&name) {
            acl(value).ok_or(Refusal::Tar("an access control list is not what it has to be"))?
        } else if let Some(rest) = NAMESPACES.iter().find_map(|space| name.strip_prefix(space)) {
            if rest.is_empty() || rest.len() > 255 || name.contains('\0') {
                return Err(Refusal::Tar("the name of an extended attribute is none").into());
            }
            value.clone()
        } else {
            continue;
        };
        sum += on_disk(name, &value);
        if sum > MAX_BYTES {
            return Err(
                Refusal::Limit { what: "bytes of extended attributes", limit: MAX_BYTES as u64 }.into()
            );
        }
        kept.push(Xattr { name: name.into(), value: value.into() });
    }
    Ok(kept.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_control_lists_are_as_ext4_has_them() {
        let entry = |tag: u16, perm: u16, id: u32| {
            [&tag.to_le_bytes()[..], &perm.to_le_bytes(), &id.to_le_bytes()].concat()
        };
        let list = [
            2_u32.to_le_bytes().to_vec(),
            entry(1, 6, u32::MAX),
            entry(2, 7, 1000),
            entry(0x20, 4, u32::MAX),
        ]
        .concat();
        let disk = acl(&list).unwrap();
        assert_eq!(
            disk,
            [&[1, 0, 0, 0][..], &[1, 0, 6, 0], &[2, 0, 7, 0, 0xe8, 3, 0, 0], &[0x20, 0, 4, 0]].concat()
        );
        assert!(acl(&list[..list.len() - 1]).is_none());
        assert!(acl(&[1, 0, 0, 0]).is_none());
    }

    #[test]
    fn what_does_not_fit_is_refused_and_what_is_foreign_left_out() {
        let one = |name: &str, value: &[u8]| (name.as_bytes().to_vec(), value.to_vec());
        let kept =
            read(&[one("com.apple.provenance", b"x"), one("user.a", b"1"), one("system.x", b"")]).unwrap();
        assert_eq!(kept.len(), 1);
        assert!(read(&[one("user.a", &[0; 5000])]).is_err());
        assert!(read(&[one("user.", b"")]).is_err());
        assert!(read(&[one(&format!("user.{}", "x".repeat(256)), b"")]).is_err());
    }
}
