//! Archives of a COPY: whatever they say, nothing outside the root is touched, and what is refused is told.
//!
//! An input is the source of the copy, a line, and blocks of a tar, whose headers are given the checksums that they should
//! have: without that hardly any would be read. Once more as a gzip.

#![no_main]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

// The files alone: the agent is a program, and of the rest of it nothing is needed here.
#[allow(dead_code, reason = "the agent uses all of it")]
#[path = "../../agent/src/files"]
mod files {
    mod archive;
    mod copy;
    mod tree;

    mod request {
        pub(super) const CHUNK: usize = 64 << 10;
    }

    use std::path::Path;

    /// Unpacks `from` of `archive`, a tar of so many blocks, to `/to` below `root`, as whoever runs this.
    pub fn unpack(archive: &[u8], from: &str, root: &Path, blocks: u64) {
        let Ok(from) = copy::Source::new(from) else { return };
        let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let wanted = copy::Wanted { from, to: "/to".into(), is_directory: false, owner, mode: None };
        match archive::unpack(archive, &wanted, root) {
            Ok(done) => assert!(done.files <= blocks, "an entry takes a block: {done:?}"),
            Err(problem) => assert!(!problem.to_string().contains('\n'), "one line: {problem}"),
        }
    }
}

/// The most that the content of one input may take when it is unpacked, in bytes: sparse files are as long as they say.
const LARGEST: u64 = 64 << 10;
const BLOCK: usize = 512;

/// A directory, and beside it a file that nothing may touch.
static GROUND: LazyLock<PathBuf> = LazyLock::new(|| {
    let ground = std::env::temp_dir().join(format!("kelvin-fuzz-unpack-{}", std::process::id()));
    let _ = fs::remove_dir_all(&ground);
    fs::create_dir_all(&ground).expect("a directory");
    fs::write(ground.join("outside"), "outside").expect("a file");
    ground
});

/// Gives the headers in `archive` their checksums, each after what the one before it says that it has. `None` when one says
/// that it has more than is to be written.
fn with_checksums(archive: &[u8]) -> Option<Vec<u8>> {
    let mut whole = archive.to_vec();
    let mut at = 0;
    while let Some(block) = whole.get_mut(at..at + BLOCK) {
        let header = tar::Header::from_byte_slice(block).clone();
        if header.entry_type().is_gnu_sparse()
            && header.as_gnu().and_then(|gnu| gnu.real_size().ok()).is_some_and(|size| size > LARGEST)
        {
            return None;
        }
        let mut header = header;
        header.set_cksum();
        block.copy_from_slice(header.as_bytes());
        let size = usize::try_from(header.entry_size().unwrap_or(0)).unwrap_or(usize::MAX);
        at = at.saturating_add(BLOCK).saturating_add(size).checked_next_multiple_of(BLOCK)?;
        if at > whole.len() {
            break;
        }
    }
    Some(whole)
}

/// Takes away what was unpacked, whatever the modes of its directories are.
fn clear(root: &Path) {
    let mut left = vec![root.to_owned()];
    while let Some(path) = left.pop() {
        let _ = fs::set_permissions(&path, fs::Permissions::from_mode(0o700));
        for entry in fs::read_dir(&path).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                left.push(entry.path());
            }
        }
    }
    fs::remove_dir_all(root).expect("it is ours");
}

fuzz_target!(|bytes: &[u8]| {
    let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else { return };
    let (Ok(from), Some(archive)) = (std::str::from_utf8(&bytes[..end]), with_checksums(&bytes[end + 1..]))
    else {
        return;
    };
    let blocks = archive.len().div_ceil(BLOCK) as u64;
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(&archive).expect("into memory");
    let packed = packed.finish().expect("into memory");
    for archive in [archive, packed] {
        let root = GROUND.join("root");
        fs::create_dir_all(&root).expect("a directory");
        files::unpack(&archive, from, &root, blocks);
        clear(&root);
    }
    assert_eq!(fs::read(GROUND.join("outside")).expect("it is there"), b"outside");
    assert_eq!(
        fs::read_dir(&*GROUND).expect("it is there").count(),
        1,
        "something was written beside the root"
    );
});
