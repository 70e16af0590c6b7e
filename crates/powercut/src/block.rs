//! A block device for tests that loses what was not flushed when its power fails, and can be slow.
//!
//! ```text
//! file system ──loop──> `image` ──FUSE──> Block ── write ──> now        (what programs read)
//!                                               └─ flush ──> survives   (what a power failure leaves)
//! ```
//!
//! The device is one file; a loop device makes a disk of it, with a real file system and all that this can do (reflinks). A
//! power failure takes any of the blocks that were written since the last flush, as a disk with a cache would: those that
//! the test picks. From then on nothing answers but with an error. Both files are sparse, belong to the caller's directory, and
//! stay there when the test dies.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};

use crate::fuse::{is_there, lock, unmount};
use crate::tree::ROOT;

const IMAGE: u64 = 2;
const NAME: &str = "image";
/// What is lost or kept as a whole, in bytes.
const BLOCK: u64 = 4096;
const FOR_A_WHILE: Duration = Duration::from_secs(60);

struct State {
    now: File,
    survives: File,
    bytes: u64,
    /// Blocks that were written since the last flush.
    unflushed: BTreeSet<u64>,
    /// How long each write and each flush takes.
    delay: Duration,
    flushes: u64,
    has_failed: bool,
}

impl State {
    fn keep(&self, blocks: impl Iterator<Item = u64>) -> io::Result<()> {
        let mut content = vec![0; usize::try_from(BLOCK).unwrap_or_default()];
        for block in blocks {
            self.now.read_exact_at(&mut content, block * BLOCK)?;
            self.survives.write_all_at(&content, block * BLOCK)?;
        }
        Ok(())
    }

    fn read(&self, offset: u64, size: u32) -> io::Result<Vec<u8>> {
        let size = u64::from(size).min(self.bytes.saturating_sub(offset));
        let mut content = vec![0; usize::try_from(size).map_err(io::Error::other)?];
        self.now.read_exact_at(&mut content, offset)?;
        Ok(content)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let end = offset + data.len() as u64;
        if end > self.bytes {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.now.write_all_at(data, offset)?;
        self.unflushed.extend(offset / BLOCK..end.div_ceil(BLOCK));
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.flushes += 1;
        let blocks = std::mem::take(&mut self.unflushed);
        self.keep(blocks.into_iter())
    }

    fn attr(&self, number: u64) -> FileAttr {
        let is_image = number == IMAGE;
        let size = if is_image { self.bytes } else { BLOCK };
        FileAttr {
            ino: INodeNo(number),
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_image { FileType::RegularFile } else { FileType::Directory },
            perm: if is_image { 0o600 } else { 0o700 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

/// A device that is there; gone when it is dropped, and what uses it has to be gone before.
pub struct Block {
    state: Arc<Mutex<State>>,
    directory: PathBuf,
    _session: BackgroundSession,
}

impl Drop for Block {
    fn drop(&mut self) {
        // Whoever still waits for it gets an error.
        lock(&self.state).has_failed = true;
        unmount(&self.directory);
    }
}

impl Block {
    /// A device of `bytes` bytes, zeroes at first. `directory` is where it is mounted; what it holds is beside it, in files of its
    /// name and `.now` and `.survives`. After a power failure and the drop of the device, this is the next boot. `None` where
    /// there is no FUSE, or no right to use it.
    ///
    /// # Errors
    /// As the kernel gives them when it is there and cannot be mounted.
    pub fn mount(directory: &Path, bytes: u64) -> io::Result<Option<Self>> {
        if !is_there() {
            return Ok(None);
        }
        let (now, survives) = (directory.with_extension("now"), directory.with_extension("survives"));
        let open = |path: &Path| {
            let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
            file.set_len(bytes)?;
            io::Result::Ok(file)
        };
        let kept = open(&survives)?;
        std::fs::copy(&survives, &now)?;
        let state = State {
            now: open(&now)?,
            survives: kept,
            bytes,
            unflushed: BTreeSet::new(),
            delay: Duration::ZERO,
            flushes: 0,
            has_failed: false,
        };
        // Nobody opens it by name again.
        std::fs::remove_file(&now)?;
        let state = Arc::new(Mutex::new(state));
        let session = fuser::spawn_mount(Server(Arc::clone(&state)), directory, &Config::default())?;
        Ok(Some(Self { state, directory: directory.to_owned(), _session: session }))
    }

    /// The file that is the device, for a loop device.
    pub fn image(&self) -> PathBuf {
        self.directory.join(NAME)
    }

    /// From now on each write and each flush takes this long.
    pub fn slow_down(&self, delay: Duration) {
        lock(&self.state).delay = delay;
    }

    /// How many flushes there were.
    pub fn flushes(&self) -> u64 {
        lock(&self.state).flushes
    }

    /// The power fails. What was flushed survives, and of the other blocks those that `survives` picks by number.
    ///
    /// # Errors
    /// When what survives cannot be written.
    pub fn power_fails(&self, survives: impl Fn(u64) -> bool) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.has_failed = true;
        let blocks = std::mem::take(&mut state.unflushed);
        state.keep(blocks.into_iter().filter(|block| survives(*block)))
    }
}

struct Server(Arc<Mutex<State>>);

impl Server {
    /// The state, once the device has taken its time.
    fn after_a_while(&self) -> Result<MutexGuard<'_, State>, Errno> {
        let delay = lock(&self.0).delay;
        std::thread::sleep(delay);
        let state = lock(&self.0);
        if state.has_failed { Err(Errno::EIO) } else { Ok(state) }
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent.0 == ROOT && name == NAME {
            reply.entry(&FOR_A_WHILE, &lock(&self.0).attr(IMAGE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOR_A_WHILE, &lock(&self.0).attr(number.0));
    }

    fn setattr(
        &self,
        _: &Request,
        number: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        // A device has its size, and nobody asks for its times.
        reply.attr(&FOR_A_WHILE, &lock(&self.0).attr(number.0));
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let state = lock(&self.0);
        let content =
            if state.has_failed { Err(Errno::EIO) } else { state.read(offset, size).map_err(Errno::from) };
        match content {
            Ok(content) => reply.data(&content),
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written =
            self.after_a_while().and_then(|mut state| state.write(offset, data).map_err(Errno::from));
        match written {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX)),
            Err(error) => reply.error(error),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.after_a_while().and_then(|mut state| state.flush().map_err(Errno::from)) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_flushed_survives_and_what_is_picked() {
        let ground = tempfile::tempdir().unwrap();
        let directory = ground.path().join("device");
        std::fs::create_dir(&directory).unwrap();
        let Some(block) = Block::mount(&directory, 1 << 20).unwrap() else {
            println!("skipped: no /dev/fuse");
            return;
        };
        let file = File::options().read(true).write(true).open(block.image()).unwrap();
        let write = |number: u64, byte: u8| file.write_all_at(&[byte; 4096], number * BLOCK).unwrap();
        write(1, 1);
        write(2, 1);
        file.sync_all().unwrap();
        assert_eq!(block.flushes(), 1);
        for number in [2, 3, 4] {
            write(number, 2);
        }
        block.power_fails(|number| number == 3).unwrap();
        assert!(file.write_all_at(&[3; 4096], 0).is_err(), "a device without power takes nothing");
        drop((file, block));
        let block = Block::mount(&directory, 1 << 20).unwrap().unwrap();
        let left = std::fs::read(block.image()).unwrap();
        let first = |number: usize| left[number * 4096];
        assert_eq!((first(0), first(1), first(2), first(3), first(4)), (0, 1, 1, 2, 0));
        assert_eq!(left.len(), 1 << 20);
    }
}
