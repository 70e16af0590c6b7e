//! A disk for tests that loses what was not synced when its power fails.
//!
//! ```text
//! program ──system calls──> kernel ──FUSE──> Disk (in memory) ──after_power_failure──> Disk, mounted again
//! ```
//!
//! The code under test is not changed, and neither is SQLite: what they sync is what survives. [`Disk::lose_syncs`] makes
//! the disk lie, so that a test shows which syncs it needs. A crash of the test leaves a dead mount point
//! (`umount -l`); a test that ends unmounts.
//!
//! The disk is served by threads of the program that uses it. While a mapping of a file is undone the kernel writes its
//! pages back, and no thread of the program can get memory meanwhile: a thread that serves and needs some would be waited
//! for by what it is to answer. So nothing may map a file of such a disk and write to it. SQLite maps the index of its log;
//! from the first [`Disk`] on it has that in memory, for all databases of the program. The index is in no promise: a
//! power failure takes it, and it is made anew.
//!
//! Deliberately absent: reflinks (FUSE has none; clones are copies), links, devices, extended attributes. A whole server with
//! its machines gets a [`Block`].

mod block;
mod fuse;
mod tree;

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

pub use block::Block;
use fuse::{is_there, lock, unmount};
pub use tree::Loss;
use tree::Tree;

/// The kernel asks again each time.
const NEVER: Duration = Duration::ZERO;

type Picks = Box<dyn Fn(&Path) -> bool + Send>;

#[derive(Default)]
struct State {
    tree: Tree,
    /// Of which paths syncs are told to have happened and have not.
    lies: Option<Picks>,
    /// Of which paths syncs fail.
    failures: Option<Picks>,
    /// The paths of all syncs that were asked for.
    syncs: Vec<PathBuf>,
}

/// A disk that is mounted; unmounted when it is dropped.
pub struct Disk {
    state: Arc<Mutex<State>>,
    directory: PathBuf,
    _session: BackgroundSession,
}

impl Drop for Disk {
    fn drop(&mut self) {
        unmount(&self.directory);
    }
}

/// See the documentation of the crate.
fn keep_index_of_log_in_memory() {
    static ONCE: Once = Once::new();
    // SAFETY: the name ends with a zero byte, and the file system that SQLite finds by it is never taken away.
    #[allow(unsafe_code)]
    ONCE.call_once(|| unsafe {
        let found = rusqlite::ffi::sqlite3_vfs_find(c"unix-excl".as_ptr());
        assert!(!found.is_null(), "SQLite has no such file system");
        assert_eq!(rusqlite::ffi::sqlite3_vfs_register(found, 1), rusqlite::ffi::SQLITE_OK);
    });
}

impl Disk {
    /// An empty disk, mounted on `directory`; `None` where there is no FUSE, or no right to use it.
    ///
    /// # Errors
    /// As the kernel gives them when it is there and cannot be mounted.
    pub fn mount(directory: &Path) -> io::Result<Option<Self>> {
        Self::mount_tree(directory, Tree::default())
    }

    fn mount_tree(directory: &Path, tree: Tree) -> io::Result<Option<Self>> {
        if !is_there() {
            return Ok(None);
        }
        keep_index_of_log_in_memory();
        let state = Arc::new(Mutex::new(State { tree, ..State::default() }));
        let session = fuser::spawn_mount(Server(Arc::clone(&state)), directory, &Config::default())?;
        Ok(Some(Self { state, directory: directory.to_owned(), _session: session }))
    }

    /// What a power failure at this moment leaves, mounted on `directory`. This disk goes on.
    ///
    /// # Errors
    /// As [`Disk::mount`].
    pub fn after_power_failure(&self, loss: Loss, directory: &Path) -> io::Result<Option<Self>> {
        let tree = lock(&self.state).tree.after_power_failure(loss);
        Self::mount_tree(directory, tree)
    }

    /// From now on, syncs of paths (from the root of the disk) that `picks` picks are confirmed and not done.
    pub fn lose_syncs(&self, picks: impl Fn(&Path) -> bool + Send + 'static) {
        lock(&self.state).lies = Some(Box::new(picks));
    }

    /// From now on, syncs of paths that `picks` picks fail, and are not done.
    pub fn fail_syncs(&self, picks: impl Fn(&Path) -> bool + Send + 'static) {
        lock(&self.state).failures = Some(Box::new(picks));
    }

    /// The paths that were synced until now, in order, lost syncs too.
    pub fn syncs(&self) -> Vec<PathBuf> {
        lock(&self.state).syncs.clone()
    }
}

struct Server(Arc<Mutex<State>>);

impl Server {
    fn sync(&self, number: INodeNo, reply: ReplyEmpty) {
        let mut state = lock(&self.0);
        let path = state.tree.path(number.0);
        let is_picked = |picks: &Option<Picks>| picks.as_ref().is_some_and(|picks| picks(&path));
        let (is_lost, fails) = (is_picked(&state.lies), is_picked(&state.failures));
        state.syncs.push(path);
        let done = match (is_lost, fails) {
            (_, true) => Err(Errno::EIO),
            (true, false) => Ok(()),
            (false, false) => state.tree.sync(number.0),
        };
        answer(done, reply);
    }
}

fn answer(done: Result<(), Errno>, reply: ReplyEmpty) {
    match done {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

fn mode_of(mode: u32, umask: u32) -> u16 {
    u16::try_from(mode & !umask & 0o7777).unwrap_or(0)
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let tree = &lock(&self.0).tree;
        match tree.lookup(parent.0, name).and_then(|number| tree.attr(number)) {
            Ok(attr) => reply.entry(&NEVER, &attr, Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match lock(&self.0).tree.attr(number.0) {
            Ok(attr) => reply.attr(&NEVER, &attr),
            Err(error) => reply.error(error),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        number: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let tree = &mut lock(&self.0).tree;
        let changed = tree.change(number.0, size, |meta| {
            meta.mode = mode.map_or(meta.mode, |mode| mode_of(mode, 0));
            meta.uid = uid.unwrap_or(meta.uid);
            meta.gid = gid.unwrap_or(meta.gid);
            match mtime {
                Some(TimeOrNow::SpecificTime(time)) => meta.mtime = time,
                Some(TimeOrNow::Now) => meta.mtime = SystemTime::now(),
                None => {}
            }
        });
        match changed.and_then(|()| tree.attr(number.0)) {
            Ok(attr) => reply.attr(&NEVER, &attr),
            Err(error) => reply.error(error),
        }
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let tree = &mut lock(&self.0).tree;
        let who = (mode_of(mode, umask), request.uid(), request.gid());
        match tree.make(parent.0, name, true, who).and_then(|number| tree.attr(number)) {
            Ok(attr) => reply.entry(&NEVER, &attr, Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let tree = &mut lock(&self.0).tree;
        let who = (mode_of(mode, umask), request.uid(), request.gid());
        match tree.make(parent.0, name, false, who).and_then(|number| tree.attr(number)) {
            Ok(attr) => reply.created(&NEVER, &attr, Generation(0), FileHandle(0), FopenFlags::empty()),
            Err(error) => reply.error(error),
        }
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(lock(&self.0).tree.remove(parent.0, name, false), reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(lock(&self.0).tree.remove(parent.0, name, true), reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        to: INodeNo,
        new: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if !flags.is_empty() {
            return reply.error(Errno::EINVAL);
        }
        answer(lock(&self.0).tree.rename((parent.0, name), (to.0, new)), reply);
    }

    fn read(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match lock(&self.0).tree.read(number.0, offset, size) {
            Ok(data) => reply.data(data),
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match lock(&self.0).tree.write(number.0, offset, data) {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX)),
            Err(error) => reply.error(error),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, number: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.sync(number, reply);
    }

    fn fsyncdir(&self, _: &Request, number: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.sync(number, reply);
    }

    fn readdir(&self, _: &Request, number: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let entries = match lock(&self.0).tree.list(number.0) {
            Ok(entries) => entries,
            Err(error) => return reply.error(error),
        };
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, (name, number, kind)) in entries.into_iter().enumerate().skip(skip) {
            if reply.add(INodeNo(number), index as u64 + 1, kind, &name) {
                break;
            }
        }
        reply.ok();
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write;

    use super::*;

    #[test]
    fn what_was_synced_survives_and_nothing_else() {
        let (now, then) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let Some(disk) = Disk::mount(now.path()).unwrap() else {
            println!("skipped: no /dev/fuse");
            return;
        };
        let sync = |path: &Path| File::open(path).unwrap().sync_all().unwrap();
        let (a, b) = (now.path().join("a"), now.path().join("b"));
        for directory in [&a, &b] {
            fs::create_dir(directory).unwrap();
        }
        sync(now.path());
        let mut kept = File::create(a.join("kept")).unwrap();
        kept.write_all(b"synced").unwrap();
        kept.sync_all().unwrap();
        kept.write_all(b", not synced").unwrap();
        fs::write(a.join("nameless"), "synced").unwrap();
        fs::write(a.join("empty"), "not synced").unwrap();
        sync(&a);
        fs::write(a.join("late"), "synced, its name is not").unwrap();
        sync(&a.join("late"));
        fs::rename(a.join("kept"), b.join("moved")).unwrap();
        let names = |root: &Path| {
            let list =
                |name: &str| fs::read_dir(root.join(name)).unwrap().map(|entry| entry.unwrap().file_name());
            let mut all: Vec<String> = ["a", "b"]
                .iter()
                .flat_map(|name| list(name))
                .map(|name| name.into_string().unwrap())
                .collect();
            all.sort();
            all
        };
        let after = disk.after_power_failure(Loss::Everything, then.path()).unwrap().unwrap();
        assert_eq!(names(then.path()), ["empty", "kept", "nameless"]);
        assert_eq!(fs::read(then.path().join("a/kept")).unwrap(), b"synced");
        assert_eq!(fs::read(then.path().join("a/empty")).unwrap(), b"");
        drop(after);
        let after = disk.after_power_failure(Loss::ContentAlone, then.path()).unwrap().unwrap();
        assert_eq!(names(then.path()), ["empty", "late", "moved", "nameless"]);
        assert_eq!(fs::read(then.path().join("b/moved")).unwrap(), b"synced");
        drop(after);
        // A rename is there as a whole, whichever of the two directories is synced.
        sync(&b);
        let after = disk.after_power_failure(Loss::Everything, then.path()).unwrap().unwrap();
        assert_eq!(names(then.path()), ["empty", "late", "moved", "nameless"]);
        drop(after);
        disk.lose_syncs(|path| path == Path::new("a/lost"));
        fs::write(a.join("lost"), "x").unwrap();
        sync(&a.join("lost"));
        sync(&a);
        let _after = disk.after_power_failure(Loss::Everything, then.path()).unwrap().unwrap();
        assert_eq!(fs::read(then.path().join("a/lost")).unwrap(), b"");
        assert!(disk.syncs().contains(&PathBuf::from("a/lost")));
    }
}
