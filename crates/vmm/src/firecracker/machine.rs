//! One machine in its VMM: what is done to it while it lives.
//!
//! Writes: in the machine's directory, files of a snapshot on its way, which the VMM fills. A crash of the daemon leaves them;
//! the next snapshot makes them anew.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use kelvin_host::cgroup;
use kelvin_host::jail::Bind;
use kelvin_host::process::Process;

use super::api::Api;
use super::config::{self, Call, DISK, Options};
use super::dialer::Dialer;
use super::guest::Guest;
use super::touched::Touched;
use super::version::Version;
use crate::control::{Control, Dial};
use crate::pages::{self, Mapping};
use crate::{Error, Handle, Saved};

/// One VMM.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) process: Arc<Process>,
    pub(super) api: Api,
    pub(super) dialer: Arc<Dialer>,
    /// The jail's root, absolute.
    pub(super) directory: PathBuf,
    pub(super) bind: Bind,
    /// The snapshot's memory that it maps private, absolute.
    pub(super) parent: Option<PathBuf>,
    /// Device and inode of its disk.
    pub(super) disk: (u64, u64),
    pub(super) has_network: bool,
    pub(super) cgroup: Option<PathBuf>,
    /// Whether its guest has to be told that connections are gone before it goes on, see [`Version::keeps_vsock_over_a_pause`].
    pub(super) needs_reset: AtomicBool,
    /// Whether its process is stopped.
    pub(super) is_stopped: AtomicBool,
    pub(super) touched: Touched,
    pub(super) version: Version,
    pub(super) options: Options,
}

impl Machine {
    /// Does of a resume what can be done while the machine stands still.
    async fn rest(&self) -> Result<(), Error> {
        if self.needs_reset.load(Ordering::Relaxed) && !self.version.keeps_vsock_over_a_pause() {
            self.tell_reset().await?;
        }
        self.needs_reset.store(false, Ordering::Relaxed);
        Ok(())
    }

    pub(super) async fn call(&self, call: Call) -> Result<serde_json::Value, Error> {
        self.api.call(call).await
    }

    /// A broken connection means that the VMM has ended or is about to: then say so, with its last words.
    pub(super) async fn explain<T>(&self, what: &'static str, result: Result<T, Error>) -> Result<T, Error> {
        match result {
            Err(Error::Io { .. })
                if tokio::time::timeout(Duration::from_secs(2), self.process.ended()).await.is_ok() =>
            {
                Err(Error::Ended { what, stderr: self.dialer.words() })
            }
            other => other,
        }
    }

    pub(super) async fn give_up(self, error: Error) -> Error {
        let _ = self.process.kill();
        self.process.ended().await;
        error
    }

    /// The jail's path of a file of the host.
    fn in_jail(&self, path: &Path) -> io::Result<PathBuf> {
        if let Ok(rest) = path.strip_prefix(&self.directory) {
            return Ok(rest.to_owned());
        }
        match path.strip_prefix(&self.bind.from) {
            Ok(rest) => Ok(self.bind.to.join(rest)),
            Err(_) => Err(io::Error::other(format!("{} is not in the jail", path.display()))),
        }
    }

    /// A VMM that opened another disk, or mapped other memory, than its machine's must not run: paths are baked into
    /// device state. One that did not gets the pages ahead that its guest writes first.
    pub(super) async fn check_files(&self) -> Result<(), Error> {
        let (pid, disk, parent) = (self.process.key().pid, self.disk, self.parent.clone());
        let first = parent.as_ref().map(|parent| self.touched.of(parent)).unwrap_or_default();
        let check = move || {
            let parts = right_files(pid, disk, parent.as_deref())?;
            if let Err(error) = pages::own_ahead(pid, &parts, &first) {
                // Its guest does it then, page by page.
                tracing::debug!(%error, "no page was copied ahead");
            }
            Ok(())
        };
        let checked = tokio::task::spawn_blocking(check).await;
        checked
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(|source| Error::Io { what: "checking the VMM's files", source })
    }

    async fn try_load(&self, state: &Path) -> Result<(), Error> {
        let io = |source| Error::Io { what: "opening the device state", source };
        let state = self.in_jail(state).map_err(io)?;
        self.call(config::load_snapshot(&state, self.has_network, &self.options, self.version)).await?;
        self.check_files().await?;
        // What was baked are the limits of another day, or none.
        if self.options.disk_bytes_per_s.is_some() || self.options.disk_ops_per_s.is_some() {
            self.call(config::patch_drive(&self.options)).await?;
        }
        Ok(())
    }

    /// Tells the guest that its connections are gone, which a snapshot does: one whose memory has nowhere to go.
    async fn tell_reset(&self) -> Result<(), Error> {
        let io = |source| Error::Io { what: "telling the guest of a reset", source };
        let user = fs::metadata(self.directory.join(DISK)).map_err(io)?;
        make_for(&user, &self.directory.join("state.new")).map_err(io)?;
        let nowhere = Path::new("run/none/memory");
        match self.call(config::create_snapshot(nowhere, Path::new("state.new"), false)).await {
            // The device state is whole by then, and the event on its way.
            Err(Error::Refused { .. }) => {}
            Err(error) => return Err(error),
            Ok(_) => return Err(io(io::Error::other("a snapshot went nowhere"))),
        }
        self.dialer.reset();
        Ok(())
    }

    async fn try_save(&self, memory: &Path, state: &Path) -> Result<Saved, Error> {
        let io = |what| move |source| Error::Io { what, source };
        let (own_memory, own_state) = (self.directory.join("memory.new"), self.directory.join("state.new"));
        let user = fs::metadata(self.directory.join(DISK)).map_err(io("saving"))?;
        make_for(&user, &own_state).map_err(io("saving"))?;
        if self.parent.is_none() {
            make_for(&user, &own_memory).map_err(io("saving"))?;
        } else if !own_memory.exists() {
            self.begin_save(memory).await?;
        }
        let marker = self.directory.join("snapshot-taken");
        let again = marker.exists();
        File::create(&marker).map_err(io("saving"))?;
        let relative = |path: &Path| path.file_name().map(PathBuf::from).unwrap_or_default();
        let call =
            config::create_snapshot(&relative(&own_memory), &relative(&own_state), self.parent.is_some());
        let (pid, parent) = (self.process.key().pid, self.parent.clone());
        let counting = tokio::task::spawn_blocking({
            let parent = parent.clone().filter(|_| !again);
            move || parent.map(|parent| pages::count_own(pid, &parent)).transpose()
        });
        // Firecracker has written all of it when it answers.
        let lifted =
            self.cgroup.as_deref().map(cgroup::lift_disk).transpose().map_err(io("lifting limits"))?;
        let saved = self.call(call).await;
        drop(lifted);
        // The reset is on its way to the guest, whatever became of the rest.
        self.needs_reset.store(false, Ordering::Relaxed);
        self.dialer.reset();
        match saved {
            Err(Error::Refused { reason, .. }) if reason.contains("No space left") => {
                return Err(io("writing the snapshot")(io::ErrorKind::StorageFull.into()));
            }
            other => other?,
        };
        let laying = tokio::task::spawn_blocking({
            let (parent, target) = (parent.filter(|_| again), own_memory.clone());
            // What it wrote before the last snapshot is in no log any more.
            move || match parent {
                Some(parent) => pages::save_memory(pid, &parent, &target, true, pages::Ahead::default()),
                None => Ok(None),
            }
        });
        let copied = |done: Result<io::Result<Option<u64>>, tokio::task::JoinError>| {
            done.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(io("copying memory"))
        };
        let dirty_pages = copied(counting.await)?.or(copied(laying.await)?);
        take(&own_memory, memory).map_err(io("moving the memory"))?;
        take(&own_state, state).map_err(io("moving the device state"))?;
        Ok(Saved { dirty_pages })
    }
}

#[async_trait]
impl Handle for Machine {
    fn process(&self) -> &Process {
        &self.process
    }

    async fn load(&self, state: &Path) -> Result<(), Error> {
        self.explain("loading", self.try_load(state).await).await
    }

    async fn resume(&self) -> Result<(), Error> {
        if self.is_stopped.swap(false, Ordering::Relaxed) {
            let going = self.process.go_on();
            return going.map_err(|source| Error::Io { what: "letting the VMM run on", source });
        }
        let resumed = async {
            self.rest().await?;
            self.call(config::resume()).await.map(drop)
        };
        let resumed = resumed.await;
        self.explain("resuming", resumed).await
    }

    async fn park(&self) -> Result<(), Error> {
        let stopped = self.process.stop().await;
        stopped.map_err(|source| Error::Io { what: "stopping the VMM", source })?;
        self.is_stopped.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn learn(&self) {
        if let Some(parent) = &self.parent {
            self.touched.learn(self.process.key().pid, parent);
        }
    }

    async fn pause(&self) -> Result<(), Error> {
        let paused = self.call(config::pause()).await.map(drop);
        if paused.is_ok() {
            self.needs_reset.store(true, Ordering::Relaxed);
        }
        self.explain("pausing", paused).await
    }

    async fn go_on(&self) -> Result<(), Error> {
        let instance = self.call(config::instance()).await?;
        if instance["state"] == "Paused" { self.resume().await } else { Ok(()) }
    }

    async fn begin_save(&self, _memory: &Path) -> Result<(), Error> {
        let Some(parent) = self.parent.clone() else { return Ok(()) };
        let (target, disk) = (self.directory.join("memory.new"), self.directory.join(DISK));
        let begun = tokio::task::spawn_blocking(move || {
            match fs::remove_file(&target) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            pages::clone_memory(&parent, &target)?;
            let user = fs::metadata(disk)?;
            chown(&target, Some(user.uid()), Some(user.gid()))
        });
        begun
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(|source| Error::Io { what: "beginning to copy memory", source })
    }

    async fn save(&self, memory: &Path, state: &Path) -> Result<Saved, Error> {
        let saved = self.try_save(memory, state).await;
        if saved.is_err() {
            for name in ["memory.new", "state.new"] {
                let _ = fs::remove_file(self.directory.join(name));
            }
        }
        self.explain("saving", saved).await
    }

    async fn control(&self) -> Result<Control, Error> {
        // Connected by the first request: before it is loaded there is nobody to connect to.
        Ok(Control::new(self.dialer()))
    }

    fn dialer(&self) -> Arc<dyn Dial> {
        Arc::new(Guest(Arc::clone(&self.dialer)))
    }

    async fn console(&self) -> Result<String, Error> {
        Ok(self.dialer.console.text())
    }

    fn stderr(&self) -> String {
        self.dialer.words()
    }
}

/// Where the VMM `pid` has mapped the memory `parent`; fails unless its files are that and `disk`, by device and inode.
fn right_files(pid: i32, disk: (u64, u64), parent: Option<&Path>) -> io::Result<Vec<Mapping>> {
    let memory = parent.map(fs::metadata).transpose()?;
    let open = fs::read_dir(format!("/proc/{pid}/fd"))?;
    let files = open.flatten().filter_map(|entry| fs::metadata(entry.path()).ok());
    let found: Vec<_> = files.filter(|file| file.is_file()).map(|file| (file.dev(), file.ino())).collect();
    // A restored VMM holds its memory open and nothing else; one that is about to boot has the guest's kernel.
    let others = memory.as_ref().is_some_and(|memory| {
        found.iter().any(|file| *file != disk && *file != (memory.dev(), memory.ino()))
    });
    if others || !found.contains(&disk) {
        return Err(io::Error::other("the VMM has opened another disk than its machine's"));
    }
    parent.map_or(Ok(Vec::new()), |parent| pages::parts(pid, parent))
}

/// Makes a file that the VMM of `user` writes: it cannot make one itself.
fn make_for(user: &Metadata, path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    File::options().write(true).create_new(true).open(path)?;
    chown(path, Some(user.uid()), Some(user.gid()))
}

/// Takes a file that a VMM has written: it is the file that was made for it, and nobody else has a name for it.
fn take(from: &Path, to: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(from)?;
    if !found.is_file() || found.nlink() != 1 {
        return Err(io::Error::other(format!("{} is not what was made", from.display())));
    }
    chown(from, Some(0), Some(0))?;
    fs::rename(from, to)
}
