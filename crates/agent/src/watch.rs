//! Watches of directories, as a stream or polled.
//!
//! ```text
//! inotify -> Watch (names, new directories of a tree) -> WatchDir: one client's stream
//!                                                    └-> Watcher: kept until GetWatcherEvents
//! ```
//!
//! Bounded: watches, directories of a tree, events that wait. What is lost is said, never passed over.
//! Nothing is written; a crash of the agent ends them all.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use connectrpc::ConnectError;
use kelvin_api::envd::filesystem::{EventType, FilesystemEvent};
use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init, remove_watch};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use crate::entries::{entry, failed};
use crate::port::watched;

/// Watches at one time.
pub const MAX_WATCHES: usize = 1024;
/// Directories of one tree.
const MAX_DIRECTORIES: usize = 16_384;
/// Events that are taken from the kernel before others have their turn.
const BATCH: usize = 1024;
/// Events that wait to be fetched, of one watcher and of all.
const MAX_EVENTS: usize = 4096;
const MAX_EVENTS_OF_ALL: usize = 65_536;

const MASK: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR);

/// What of a directory is wanted.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub root: PathBuf,
    pub recursive: bool,
    pub include_entry: bool,
}

/// A directory, or a tree of them, with what happens in it.
#[derive(Debug)]
pub struct Watch {
    wanted: Wanted,
    fd: Arc<AsyncFd<OwnedFd>>,
    /// Paths relative to the root.
    directories: HashMap<i32, PathBuf>,
    root: i32,
    /// What was found in directories that are new, and reported then: its event is on its way and not told again.
    told: HashSet<PathBuf>,
    /// Why nothing comes any more.
    over: Option<&'static str>,
    /// Whether something was missed.
    overflowed: bool,
    _place: Place,
}

/// One of [`MAX_WATCHES`].
#[derive(Debug)]
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A watch and what of it was not fetched yet.
#[derive(Debug)]
struct Polled {
    watch: Watch,
    events: VecDeque<FilesystemEvent>,
    lost: usize,
    waiting: Arc<AtomicUsize>,
}

impl Drop for Polled {
    fn drop(&mut self) {
        self.waiting.fetch_sub(self.events.len(), Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Watcher {
    polled: Arc<Mutex<Polled>>,
    reader: JoinHandle<()>,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// All watches of the agent.
#[derive(Debug, Default)]
pub struct Watches {
    live: Arc<AtomicUsize>,
    waiting: Arc<AtomicUsize>,
    watchers: Mutex<HashMap<String, Watcher>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watches {
    /// Watches a directory.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument` for what is not a directory, `ResourceExhausted` past a limit.
    pub fn open(&self, wanted: Wanted) -> Result<Watch, ConnectError> {
        if self.live.fetch_add(1, Ordering::Relaxed) >= MAX_WATCHES {
            self.live.fetch_sub(1, Ordering::Relaxed);
            let text = format!("{MAX_WATCHES} directories are watched already");
            return Err(ConnectError::resource_exhausted(text));
        }
        Watch::open(wanted, Place(Arc::clone(&self.live)))
    }

    /// Watches a directory until [`Self::remove`]; gives the watcher's id.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn create(&self, wanted: Wanted) -> Result<String, ConnectError> {
        let watch = self.open(wanted)?;
        let fd = Arc::clone(&watch.fd);
        let polled = Arc::new(Mutex::new(Polled {
            watch,
            events: VecDeque::new(),
            lost: 0,
            waiting: Arc::clone(&self.waiting),
        }));
        let reader = {
            let polled = Arc::clone(&polled);
            tokio::spawn(async move {
                while let Ok(mut ready) = fd.readable().await {
                    {
                        let mut polled = locked(&polled);
                        if polled.read() {
                            // What came after the last look has made it ready again.
                            ready.clear_ready();
                        }
                        if polled.watch.over.is_some() {
                            return;
                        }
                    }
                    tokio::task::yield_now().await;
                }
            })
        };
        let id = kelvin_api::id::VmId::random().to_string();
        locked(&self.watchers).insert(id.clone(), Watcher { polled, reader });
        Ok(id)
    }

    /// What happened since the last call.
    ///
    /// # Errors
    /// `NotFound` for a watcher that is not there, or whose directory is gone and all else was told;
    /// `ResourceExhausted`, once, when events were dropped.
    pub fn fetch(&self, id: &str) -> Result<Vec<FilesystemEvent>, ConnectError> {
        let polled = match locked(&self.watchers).get(id) {
            Some(watcher) => Arc::clone(&watcher.polled),
            None => return Err(unknown(id)),
        };
        let mut polled = locked(&polled);
        // What has happened by now is told now, whether the task has seen it or not; not more than it could keep.
        for _ in 0..MAX_EVENTS / BATCH {
            if polled.read() {
                break;
            }
        }
        let lost = std::mem::take(&mut polled.lost);
        if lost > 0 {
            let text =
                format!("{lost} events were dropped: nobody fetched them. Look at the directory itself");
            return Err(ConnectError::resource_exhausted(text));
        }
        let events: Vec<_> = polled.events.drain(..).collect();
        polled.waiting.fetch_sub(events.len(), Ordering::Relaxed);
        match polled.watch.over {
            Some(why) if events.is_empty() => Err(gone(&polled.watch.wanted.root, why)),
            _ => Ok(events),
        }
    }

    /// Ends a watcher.
    ///
    /// # Errors
    /// `NotFound` for one that is not there.
    pub fn remove(&self, id: &str) -> Result<(), ConnectError> {
        locked(&self.watchers).remove(id).map(drop).ok_or_else(|| unknown(id))
    }
}

fn unknown(id: &str) -> ConnectError {
    let id: String = id.chars().take(80).collect();
    ConnectError::not_found(format!("watcher with id {id} not found"))
}

/// Why a watch tells nothing more.
pub fn gone(root: &Path, why: &str) -> ConnectError {
    ConnectError::not_found(format!("the watched directory '{}' {why}", root.display()))
}

impl Polled {
    /// Whether that was all.
    fn read(&mut self) -> bool {
        let (events, all) = self.watch.read();
        for event in events {
            if self.events.len() >= MAX_EVENTS || self.waiting.load(Ordering::Relaxed) >= MAX_EVENTS_OF_ALL {
                self.lost += 1;
                continue;
            }
            self.waiting.fetch_add(1, Ordering::Relaxed);
            self.events.push_back(event);
        }
        if std::mem::take(&mut self.watch.overflowed) {
            self.lost += 1;
        }
        all
    }
}

impl Watch {
    fn open(wanted: Wanted, place: Place) -> Result<Self, ConnectError> {
        let path = wanted.root.clone();
        let at = |error: io::Error| refused(&path, &error);
        let found = std::fs::metadata(&path).map_err(at)?;
        if !found.is_dir() {
            let text = format!("path '{}' is not a directory", path.display());
            return Err(ConnectError::invalid_argument(text));
        }
        let fd = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(|error| at(error.into()))?;
        let mut watch = Self {
            fd: Arc::new(watched(fd).map_err(at)?),
            wanted,
            directories: HashMap::new(),
            root: -1,
            told: HashSet::new(),
            over: None,
            overflowed: false,
            _place: place,
        };
        watch.root = watch.add(Path::new("")).map_err(at)?;
        if watch.wanted.recursive {
            watch.descend(Path::new(""), None).map_err(at)?;
        }
        Ok(watch)
    }

    fn add(&mut self, path: &Path) -> io::Result<i32> {
        if self.directories.len() >= MAX_DIRECTORIES {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        // The root may be a link; below it none is followed.
        let flags = if path.as_os_str().is_empty() { MASK } else { MASK | WatchFlags::DONT_FOLLOW };
        let wd = add_watch(self.fd.get_ref(), self.wanted.root.join(path), flags)?;
        self.directories.insert(wd, path.to_owned());
        Ok(wd)
    }

    /// Watches the directories below the one at `path`, which is watched, and reports into `events` what is found in
    /// them.
    fn descend(&mut self, path: &Path, mut events: Option<&mut Vec<FilesystemEvent>>) -> io::Result<()> {
        let mut open = vec![path.to_owned()];
        while let Some(path) = open.pop() {
            let found = match std::fs::read_dir(self.wanted.root.join(&path)) {
                Ok(found) => found,
                Err(error) if path.as_os_str().is_empty() => return Err(error),
                // Gone again, or no directory after all.
                Err(_) => continue,
            };
            for child in found.flatten() {
                let name = path.join(child.file_name());
                if let Some(events) = events.as_deref_mut() {
                    if self.told.len() >= MAX_EVENTS_OF_ALL {
                        return Err(io::ErrorKind::QuotaExceeded.into());
                    }
                    self.told.insert(name.clone());
                    events.push(self.event(&name, EventType::EVENT_TYPE_CREATE));
                }
                if child.file_type().is_ok_and(|kind| kind.is_dir()) {
                    match self.add(&name) {
                        Ok(_) => open.push(name),
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        Ok(())
    }

    /// Forgets the directory at `path` and all below it.
    fn forget(&mut self, path: &Path) {
        let below: Vec<i32> = self
            .directories
            .iter()
            .filter(|(_, directory)| directory.starts_with(path))
            .map(|(wd, _)| *wd)
            .collect();
        for wd in below {
            self.directories.remove(&wd);
            // Gone with its directory: then the kernel forgot it first.
            let _ = remove_watch(self.fd.get_ref(), wd);
        }
    }

    fn event(&self, name: &Path, kind: EventType) -> FilesystemEvent {
        let path = self.wanted.root.join(name);
        let gone = matches!(kind, EventType::EVENT_TYPE_REMOVE | EventType::EVENT_TYPE_RENAME);
        let seen = if self.wanted.include_entry && !gone { entry(&path).ok() } else { None };
        let name = if name.as_os_str().is_empty() { Path::new(".") } else { name };
        FilesystemEvent {
            name: name.to_string_lossy().into_owned(),
            r#type: kind.into(),
            entry: seen.into(),
            ..Default::default()
        }
    }

    /// What the kernel has to tell now, and whether that is all.
    fn read(&mut self) -> (Vec<FilesystemEvent>, bool) {
        let mut events = Vec::new();
        if self.over.is_some() {
            return (events, true);
        }
        let fd = Arc::clone(&self.fd);
        let mut buffer = [MaybeUninit::uninit(); 16 << 10];
        let mut reader = Reader::new(fd.get_ref(), &mut buffer);
        // What was read from the kernel together is told together: the reader has it and would take it along.
        let mut taken = 0;
        while taken < BATCH || !reader.is_buffer_empty() {
            taken += 1;
            let Ok(raw) = reader.next() else {
                // AGAIN. What was on its way when a directory was looked through has come.
                self.told.clear();
                return (events, true);
            };
            let name = raw.file_name().map(|name| OsStr::from_bytes(name.to_bytes()).to_owned());
            self.took(raw.wd(), raw.events(), name, &mut events);
            if self.over.is_some() {
                return (events, true);
            }
        }
        (events, false)
    }

    fn took(&mut self, wd: i32, what: ReadFlags, name: Option<OsString>, events: &mut Vec<FilesystemEvent>) {
        if what.contains(ReadFlags::QUEUE_OVERFLOW) {
            self.overflowed = true;
            return;
        }
        let Some(directory) = self.directories.get(&wd) else {
            return;
        };
        let Some(name) = name else {
            if what.contains(ReadFlags::IGNORED) {
                self.directories.remove(&wd);
            }
            if wd == self.root {
                self.own(what, events);
            }
            return;
        };
        let path = directory.join(&name);
        let created = what.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO);
        if created && self.told.remove(&path) {
            return;
        }
        if what.intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM) {
            // It was there before its directory was watched: no event of its creation was to come.
            self.told.remove(&path);
        }
        let kind = if created {
            EventType::EVENT_TYPE_CREATE
        } else if what.contains(ReadFlags::MODIFY) {
            EventType::EVENT_TYPE_WRITE
        } else if what.contains(ReadFlags::DELETE) {
            EventType::EVENT_TYPE_REMOVE
        } else if what.contains(ReadFlags::MOVED_FROM) {
            EventType::EVENT_TYPE_RENAME
        } else {
            EventType::EVENT_TYPE_CHMOD
        };
        events.push(self.event(&path, kind));
        if !self.wanted.recursive || !what.contains(ReadFlags::ISDIR) {
            return;
        }
        if what.contains(ReadFlags::MOVED_FROM) {
            self.forget(&path);
        } else if created {
            let added = self.add(&path).and_then(|_| self.descend(&path, Some(events)));
            match added {
                Err(error) if error.kind() != io::ErrorKind::NotFound => self.overflowed = true,
                _ => {}
            }
        }
    }

    /// What happened to the root itself.
    fn own(&mut self, what: ReadFlags, events: &mut Vec<FilesystemEvent>) {
        let root = Path::new("");
        if what.contains(ReadFlags::MOVE_SELF) {
            events.push(self.event(root, EventType::EVENT_TYPE_RENAME));
            self.over = Some("was moved away");
        } else if what.contains(ReadFlags::DELETE_SELF) {
            events.push(self.event(root, EventType::EVENT_TYPE_REMOVE));
            self.over = Some("was removed");
        } else if what.intersects(ReadFlags::UNMOUNT | ReadFlags::IGNORED) {
            self.over = Some("is not mounted any more");
        } else if what.contains(ReadFlags::ATTRIB) {
            events.push(self.event(root, EventType::EVENT_TYPE_CHMOD));
        }
    }

    /// Waits for what happens next.
    ///
    /// # Errors
    /// `NotFound` when the directory is gone and everything was told; `ResourceExhausted` when events
    /// were lost.
    pub async fn next(&mut self) -> Result<Vec<FilesystemEvent>, ConnectError> {
        loop {
            let (events, all) = self.read();
            if std::mem::take(&mut self.overflowed) {
                return Err(ConnectError::resource_exhausted("events were lost: too much happened at once"));
            }
            if !events.is_empty() {
                return Ok(events);
            }
            if let Some(why) = self.over {
                return Err(gone(&self.wanted.root, why));
            }
            if !all {
                tokio::task::yield_now().await;
                continue;
            }
            let fd = Arc::clone(&self.fd);
            match fd.readable().await {
                Ok(mut ready) => ready.clear_ready(),
                Err(error) => return Err(refused(&self.wanted.root, &error)),
            };
        }
    }
}

fn refused(path: &Path, error: &io::Error) -> ConnectError {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ConnectError::resource_exhausted(format!(
                "path '{}': more than {MAX_DIRECTORIES} directories, or than the kernel allows, would be watched",
                path.display()
            ))
        }
        _ if error.raw_os_error() == Some(libc::EMFILE) => {
            ConnectError::resource_exhausted("the machine has no watch left")
        }
        _ => failed(path, error),
    }
}
