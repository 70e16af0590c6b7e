//! The resources of one machine: user id, directory, disk, VMM; declared, made, released.
//!
//! ```text
//! declare(user, group, directory, vmm) ─> group ─> mkdir ─> disk ─> start ─> amend(pid)
//! release: kill ─> remove group, directory ─> strike         (each step safe twice, from any half-built state)
//! ```

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use kelvin_api::id::VmId;
use kelvin_api::units::Shape;
use kelvin_host::cgroup::{self, Cgroups};
use kelvin_host::ledger::{Ledger, Resource};
use kelvin_host::net::Slot;
use kelvin_host::process::{Process, ProcessKey, find_by_marker};
use kelvin_store::Store;
use kelvin_store::disk::clone_file;
use kelvin_vmm::{Disk, Driver, MachineSpec};

use crate::error::Error;
use crate::networks::Networks;

/// How often processes are looked for that were started for one machine: a launcher, then its VMM.
const LOOKS: u32 = 8;

/// User ids for VMMs: each machine has one of its own, the lowest that is free.
#[derive(Debug, Default)]
pub struct Users(Mutex<BTreeSet<u32>>);

impl Users {
    fn take(&self, first: Option<u32>) -> Option<u32> {
        let mut used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let id = (first?..).find(|id| !used.contains(id))?;
        used.insert(id);
        Some(id)
    }

    /// Marks the id of an adopted machine as used.
    pub fn claim(&self, id: u32) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
    }

    fn give_back(&self, id: Option<u32>) {
        if let Some(id) = id {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        }
    }
}

/// What making and releasing needs.
#[derive(Clone)]
pub struct MachineAllocator {
    /// Where everything is declared.
    pub ledger: Ledger,
    /// Where directories are.
    pub store: Store,
    /// Who is used.
    pub users: Arc<Users>,
    /// See `Options::first_user`.
    pub first_user: Option<u32>,
    /// Networks, where there are some.
    pub networks: Option<Arc<Networks>>,
    /// What a machine may take of the host; `None` where nothing can or needs to hold it to that.
    pub groups: Option<Groups>,
    /// Machines that could not be released: quarantined until the reaper succeeds.
    pub unreleased: Arc<Mutex<Vec<Unreleased>>>,
    /// Directories below `staging/` that could not be removed, for the same.
    pub unremoved: Arc<Mutex<Vec<PathBuf>>>,
}

/// Control groups, and who says what is in them.
#[derive(Clone)]
pub struct Groups {
    /// Those of this host.
    pub cgroups: Cgroups,
    /// Which limits a shape has.
    pub driver: Arc<dyn Driver>,
}

/// A machine whose release failed.
#[derive(Debug)]
pub struct Unreleased {
    spec: MachineSpec,
    key: Option<ProcessKey>,
}

/// The resources of one machine.
#[derive(Debug)]
pub struct MachineResources {
    /// For the driver.
    pub spec: MachineSpec,
    /// The ledger's entry of the VMM.
    vmm_entry: i64,
}

impl MachineResources {
    /// Notes which process the VMM is.
    ///
    /// # Errors
    /// As the ledger gives them.
    pub async fn started(&self, allocator: &MachineAllocator, key: ProcessKey) -> Result<(), Error> {
        let resource = Resource::Vmm { marker: self.spec.marker(), key: Some(key) };
        Ok(allocator.ledger.amend(self.vmm_entry, &resource).await?)
    }
}

impl MachineAllocator {
    /// Sets the limits of a machine that is there already: this server's, and those that were lifted when the last
    /// one ended.
    ///
    /// # Errors
    /// As the kernel gives them.
    pub fn limit(&self, spec: &MachineSpec) -> Result<(), Error> {
        let (Some(groups), Some(path)) = (&self.groups, &spec.cgroup) else { return Ok(()) };
        let Some(limits) = groups.driver.limits(spec.shape) else { return Ok(()) };
        let set = groups.cgroups.limit(path, &limits);
        set.map_err(|source| Error::Io { what: "limiting a machine", source })
    }

    /// Declares and makes the directory of a new machine, with `disk` cloned from `parent`, and takes a network
    /// for it, unless it is to have none.
    ///
    /// # Errors
    /// As the ledger, the network and the file system give them; then nothing is left.
    pub async fn build(
        &self,
        shape: Shape,
        guest: &str,
        parent: PathBuf,
        network: bool,
    ) -> Result<MachineResources, Error> {
        let (home, disk) = self.begin(shape, guest, parent, network).await?;
        match disk.await {
            Ok(()) => Ok(home),
            Err(source) => {
                self.release_or_log(&home.spec, None).await;
                Err(Error::Io { what: "making the machine's disk", source })
            }
        }
    }

    /// The same, but the disk is still on its way when it returns. Network and directory are made at once.
    ///
    /// # Errors
    /// As [`MachineAllocator::build`].
    pub async fn begin(
        &self,
        shape: Shape,
        guest: &str,
        parent: PathBuf,
        network: bool,
    ) -> Result<(MachineResources, Disk), Error> {
        let networks = self.networks.as_ref().filter(|_| network);
        let claiming = async {
            match networks {
                Some(networks) => networks.claim().await.map(Some),
                None => Ok(None),
            }
        };
        let (claimed, placed) = tokio::join!(claiming, self.place(shape, guest, parent));
        let (mut home, disk) = match (placed, &claimed) {
            (Ok(placed), _) => placed,
            (Err(error), Ok(Some(slot))) => {
                self.release_network(slot).await?;
                return Err(error);
            }
            (Err(error), _) => return Err(error),
        };
        let attached = match (claimed, networks) {
            (Ok(Some(slot)), Some(networks)) => {
                let resource = Resource::Slot { number: slot.number(), range: networks.slots.range() };
                home.spec.network = Some(slot);
                self.ledger.declare(&home.spec.vm, &[resource]).await.map(drop).map_err(Error::from)
            }
            (claimed, _) => claimed.map(drop),
        };
        match attached {
            Ok(()) => Ok((home, disk)),
            Err(error) => {
                let _ = disk.await;
                self.release_or_log(&home.spec, None).await;
                Err(error)
            }
        }
    }

    /// Declares and makes the directory of a machine without a network; its disk is on its way.
    async fn place(
        &self,
        shape: Shape,
        guest: &str,
        parent: PathBuf,
    ) -> Result<(MachineResources, Disk), Error> {
        let user = self.users.take(self.first_user);
        let vm = VmId::random();
        let limits = self
            .groups
            .as_ref()
            .and_then(|groups| groups.driver.limits(shape).map(|limits| (groups.cgroups.clone(), limits)));
        let spec = MachineSpec {
            cgroup: limits.as_ref().map(|(cgroups, _)| cgroups.path(&vm)),
            vm,
            data_dir: self.store.root().to_owned(),
            user,
            shape,
            guest: Path::new("guests").join(guest),
            network: None,
        };
        let mut resources: Vec<Resource> = user.map(|uid| Resource::User { uid }).into_iter().collect();
        resources.extend(spec.cgroup.clone().map(|path| Resource::Cgroup { path }));
        resources.push(Resource::Directory { path: spec.absolute() });
        resources.push(Resource::Vmm { marker: spec.marker(), key: None });
        let declared = self.ledger.declare(&spec.vm, &resources).await;
        let vmm_entry = match declared.map(|ids| ids.last().copied()) {
            Ok(Some(id)) => id,
            Ok(None) => 0,
            Err(error) => {
                self.users.give_back(user);
                return Err(error.into());
            }
        };
        let (directory, vm) = (spec.absolute(), spec.vm.clone());
        let home = MachineResources { spec, vmm_entry };
        let made = kelvin_host::blocking::spawn(move || {
            if let Some((cgroups, limits)) = limits {
                cgroups.create(&vm, &limits)?;
            }
            make_directory(&directory, user)
        })
        .await;
        match made.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(()) => {
                let disk = home.spec.absolute().join("disk");
                let making = kelvin_host::blocking::spawn(move || make_disk(&disk, user, &parent));
                Ok((
                    home,
                    Box::pin(async { making.await.unwrap_or_else(|error| Err(io::Error::other(error))) }),
                ))
            }
            Err(source) => {
                self.release_or_log(&home.spec, None).await;
                Err(Error::Io { what: "making the machine's directory", source })
            }
        }
    }

    /// Releases everything of a machine, in reverse order. What is gone already is fine.
    ///
    /// # Errors
    /// The first step that failed; the ledger keeps the machine, and the next start tries again.
    pub async fn release(&self, spec: &MachineSpec, key: Option<ProcessKey>) -> Result<(), Error> {
        match key {
            Some(key) => end(key).await?,
            // The start was announced, but its pid never noted.
            None => end_all(&spec.marker()).await?,
        }
        if let Some(path) = &spec.cgroup {
            let removed = cgroup::remove(path).await;
            removed.map_err(|source| Error::Io { what: "removing a machine's control group", source })?;
        }
        let directory = spec.absolute();
        let removed = kelvin_host::blocking::spawn(move || remove_directory(&directory)).await;
        removed
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(|source| Error::Io { what: "removing a machine's directory", source })?;
        if let Some(slot) = &spec.network {
            self.release_network(slot).await?;
        }
        self.ledger.strike_all(&spec.vm).await?;
        self.users.give_back(spec.user);
        Ok(())
    }

    async fn release_network(&self, slot: &Arc<Slot>) -> Result<(), Error> {
        match &self.networks {
            Some(networks) => networks.release(slot).await,
            None => Ok(()),
        }
    }

    /// [`MachineAllocator::release`] for where nobody can be told: what failed is logged, stays in the ledger, and is
    /// tried again by the reaper.
    pub async fn release_or_log(&self, spec: &MachineSpec, key: Option<ProcessKey>) {
        if let Err(error) = self.release(spec, key).await {
            tracing::error!(vm = %spec.vm, error = kelvin_api::error::chain(&error), "not released, the reaper tries again");
            let unreleased = Unreleased { spec: spec.clone(), key };
            self.unreleased.lock().unwrap_or_else(PoisonError::into_inner).push(unreleased);
        }
    }

    /// Tries to release what could not be released before, once.
    pub async fn reap(&self) {
        let tried = std::mem::take(&mut *self.unreleased.lock().unwrap_or_else(PoisonError::into_inner));
        for Unreleased { spec, key } in tried {
            self.release_or_log(&spec, key).await;
        }
        let staged = std::mem::take(&mut *self.unremoved.lock().unwrap_or_else(PoisonError::into_inner));
        for directory in staged {
            self.remove_staged(directory).await;
        }
    }

    /// Removes what was staged and is not published; when that fails, the reaper tries again.
    pub async fn remove_staged(&self, directory: PathBuf) {
        let path = directory.clone();
        let removed = kelvin_host::blocking::spawn(move || remove_directory(&path)).await;
        if let Err(error) = removed.unwrap_or_else(|error| Err(io::Error::other(error))) {
            tracing::error!(%error, path = %directory.display(), "not removed, the reaper tries again");
            self.unremoved.lock().unwrap_or_else(PoisonError::into_inner).push(directory);
        }
    }
}

/// Kills a VMM and waits for its end; gone already is fine.
async fn end(key: ProcessKey) -> Result<(), Error> {
    match Process::adopt(key) {
        Ok(process) => {
            process.kill().map_err(|source| Error::Io { what: "killing a VMM", source })?;
            process.ended().await;
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(Error::Io { what: "finding a VMM", source }),
    }
}

/// Kills whatever was started with `marker`: a launcher may just have started its VMM, so it is looked again. One empty look
/// is not enough: a process shows no environment while it becomes its program.
async fn end_all(marker: &str) -> Result<(), Error> {
    let mut was_empty = false;
    for _ in 0..LOOKS {
        let marker = marker.to_owned();
        let found = kelvin_host::blocking::spawn(move || find_by_marker(&marker)).await;
        let found = found
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(|source| Error::Io { what: "looking for a VMM", source })?;
        if found.is_empty() && was_empty {
            return Ok(());
        }
        was_empty = found.is_empty();
        for key in found {
            end(key).await?;
        }
    }
    Err(Error::Io { what: "ending a VMM", source: io::Error::other("it is started again and again") })
}

fn make_directory(directory: &Path, user: Option<u32>) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, chown};
    // The machine's VMM passes through it, and can replace nothing in it.
    std::fs::DirBuilder::new().mode(0o710).create(directory)?;
    if user.is_some() {
        chown(directory, None, user)?;
    }
    Ok(())
}

fn make_disk(disk: &Path, user: Option<u32>, parent: &Path) -> io::Result<()> {
    clone_file(parent, disk)?;
    if user.is_some() {
        std::os::unix::fs::chown(disk, user, user)?;
    }
    Ok(())
}

/// Removes `directory`; gone already is fine.
pub fn remove_directory(directory: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use kelvin_api::units::{DiskMib, MemoryMib};

    use super::*;

    fn allocator(root: &Path) -> MachineAllocator {
        let store = Store::open(root, true).unwrap();
        let ledger = Ledger::open(&root.join("ledger.db")).unwrap();
        std::fs::write(root.join("parent"), "disk").unwrap();
        MachineAllocator {
            ledger,
            store,
            users: Arc::default(),
            first_user: None,
            networks: None,
            groups: None,
            unreleased: Arc::default(),
            unremoved: Arc::default(),
        }
    }

    const SHAPE: Shape = Shape { vcpus: 1, memory_mib: MemoryMib(128), disk_mib: DiskMib(1) };

    #[tokio::test]
    async fn a_machine_is_released_twice_and_from_every_half() {
        let dir = tempfile::tempdir().unwrap();
        let allocator = allocator(dir.path());
        let home = allocator.build(SHAPE, "guest", dir.path().join("parent"), false).await.unwrap();
        assert_eq!(std::fs::read_to_string(home.spec.absolute().join("disk")).unwrap(), "disk");
        assert_eq!(allocator.ledger.count().await.unwrap(), 2);
        // Half of it is gone already.
        std::fs::remove_dir_all(home.spec.absolute()).unwrap();
        allocator.release(&home.spec, None).await.unwrap();
        allocator.release(&home.spec, None).await.unwrap();
        assert_eq!(allocator.ledger.count().await.unwrap(), 0);
        // What cannot be built leaves nothing.
        allocator.build(SHAPE, "guest", dir.path().join("absent"), false).await.unwrap_err();
        assert_eq!(allocator.ledger.count().await.unwrap(), 0);
        assert_eq!(std::fs::read_dir(dir.path().join("sandboxes")).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn what_cannot_be_released_is_reaped_later() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: not root, a mount is needed to make a directory stay");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let allocator = allocator(dir.path());
        let home = allocator.build(SHAPE, "guest", dir.path().join("parent"), false).await.unwrap();
        let stuck = home.spec.absolute().join("stuck");
        std::fs::create_dir(&stuck).unwrap();
        rustix::mount::mount("none", &stuck, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
        allocator.release_or_log(&home.spec, None).await;
        allocator.reap().await;
        assert_eq!(allocator.ledger.count().await.unwrap(), 2, "still declared while it exists");
        rustix::mount::unmount(&stuck, rustix::mount::UnmountFlags::empty()).unwrap();
        allocator.reap().await;
        assert!(!home.spec.absolute().exists());
        assert_eq!(allocator.ledger.count().await.unwrap(), 0);
    }
}
