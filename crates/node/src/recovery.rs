//! Start-up: the ledger against the kernel. Sandboxes that run are adopted; everything else that the
//! ledger names is removed, and directories of machines that it does not know and nothing runs from; nothing else is touched.
//!
//! No VMM and no guest is spoken to here: a sandbox whose process is there is listed, holds its capacity, its network and
//! what it was restored from, and can be ended. Its own task takes over its VMM then (`sandbox`), many at one time,
//! while the API answers. A guest that is silent is reported and goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kelvin_api::error::chain;
use kelvin_api::id::VmId;
use kelvin_host::ledger::{Body, Entry, Record as LedgerRecord, Resource};
use kelvin_host::net::{Range, Slot};
use kelvin_host::process::{Process, ProcessKey, find_by_marker};
use kelvin_store::snapshot::Snapshot;
use kelvin_vmm::MachineSpec;

use crate::capacity::Amount;
use crate::error::Error;
use crate::machine::console::Console;
use crate::sandbox::actor::Orphan;
use crate::sandbox::paused::Paused;
use crate::sandbox::record::{SandboxRecord, State};
use crate::sandbox::unreadable::NO_SHAPE;
use crate::state::Inner;

#[derive(Default)]
struct Found {
    key: Option<ProcessKey>,
    user: Option<u32>,
    record: Option<SandboxRecord>,
    slot: Option<(u16, Range)>,
    cgroup: Option<std::path::PathBuf>,
    /// A record that cannot be read, and why.
    unreadable: Option<(Body, String)>,
    /// Whether there is anything beside a slot: a machine.
    is_machine: bool,
}

/// What a start found.
#[derive(Debug, Clone, Copy)]
pub struct Reconciled {
    /// Sandboxes that go on: their tasks take them over.
    pub adopting: u32,
    /// Machines that were removed.
    pub removed: u32,
    /// Records that cannot be read; see `unreadable`. What they need is not known.
    pub unreadable: u32,
}

/// Refuses to take over sandboxes that run in VMMs of another kind than `ours`: they would be ended.
///
/// # Errors
/// `OtherVmm`.
pub fn check_vmm(
    ours: &'static str,
    entries: &[Entry],
    records: &[LedgerRecord],
    snapshots: &[Snapshot],
) -> Result<(), Error> {
    let running = |owner: &VmId| {
        entries.iter().any(|entry| match &entry.resource {
            Resource::Vmm { key: Some(key), .. } => entry.owner == *owner && Process::adopt(*key).is_ok(),
            _ => false,
        })
    };
    let theirs: Vec<String> = records
        .iter()
        .filter_map(|record| {
            let sandbox = SandboxRecord::read(&record.body).ok()?;
            if sandbox.state != State::Running {
                return None;
            }
            // What was restored is what its snapshot is.
            let restored =
                snapshots.iter().find(|found| Some(&found.manifest.id) == sandbox.snapshot.as_ref());
            let vmm = restored.map(|found| found.manifest.identity.vmm.clone());
            let vmm = vmm.or_else(|| sandbox.identity.map(|identity| identity.vmm))?;
            (vmm != ours && running(&record.owner)).then_some(vmm)
        })
        .collect();
    match theirs.first() {
        Some(first) => Err(Error::OtherVmm { count: theirs.len(), theirs: first.clone(), ours }),
        None => Ok(()),
    }
}

impl Inner {
    /// Brings the host to what the ledger says.
    ///
    /// `entries` and `records` are what the ledger had; `attached` the slots that the egress process answers.
    pub async fn reconcile(
        self: &Arc<Self>,
        entries: Vec<Entry>,
        records: Vec<LedgerRecord>,
        attached: &[u16],
    ) -> Result<Reconciled, Error> {
        let mut unreadable = 0;
        let known: BTreeSet<VmId> = entries
            .iter()
            .map(|entry| entry.owner.clone())
            .chain(records.iter().map(|record| record.owner.clone()))
            .collect();
        let mut machines = self.found(entries);
        for record in records {
            match SandboxRecord::read(&record.body) {
                Ok(sandbox) if sandbox.state == State::Paused => {
                    let lease = sandbox.snapshot.as_ref().and_then(|id| self.snapshots.lease(id));
                    let paused = Paused::new(record.owner, sandbox, lease, Console::default());
                    let id = paused.record.sandbox.clone();
                    self.sandboxes.paused().insert(id, Arc::new(paused));
                }
                Ok(sandbox) => machines.entry(record.owner).or_default().record = Some(sandbox),
                Err(why) => {
                    unreadable += 1;
                    let has_machine = machines.get(&record.owner).is_some_and(|found| found.is_machine);
                    if has_machine {
                        machines.entry(record.owner).or_default().unreadable = Some((record.body, why));
                    } else {
                        self.keep_unreadable(record.owner, &record.body, why, None);
                    }
                }
            }
        }
        // Slots are their own owners; a machine's entry says which one it has.
        let (machines, slots): (BTreeMap<_, _>, BTreeMap<_, _>) =
            machines.into_iter().partition(|(_, found)| found.is_machine);
        let mut slots: BTreeMap<u16, (VmId, Range)> = slots
            .into_iter()
            .filter_map(|(owner, found)| found.slot.map(|(number, range)| (number, (owner, range))))
            .collect();
        let (mut adopting, mut removed) = (0, 0);
        let mut kept = BTreeSet::new();
        for (vm, mut found) in machines {
            let mut spec = self.spec(vm, &found);
            if let (Some((body, why)), Some(key)) = (found.unreadable.take(), found.key)
                && Process::adopt(key).is_ok()
            {
                let slot =
                    found.slot.and_then(|(number, _)| slots.remove(&number).map(|slot| (number, slot)));
                kept.extend(slot.as_ref().map(|(number, _)| *number));
                spec.network = self.keep_slot(slot, key);
                self.keep_unreadable(spec.vm.clone(), &body, why, Some((spec, key)));
                continue;
            }
            if let (Some(record), Some(key)) = (&found.record, found.key)
                && record.state == State::Running
            {
                let slot = found.slot.and_then(|(number, _)| slots.get(&number).map(|slot| (number, slot)));
                match self.take(&mut spec, key, record.clone(), slot, attached).await {
                    Ok(()) => {
                        if let Some((number, _)) = found.slot {
                            slots.remove(&number);
                        }
                        adopting += 1;
                        continue;
                    }
                    Err(error) => {
                        tracing::warn!(sandbox = %record.sandbox, error = chain(&error), "not adopted");
                        self.changes.add(record.sandbox.clone(), "it did not survive the restart");
                    }
                }
            }
            // Its slot is removed below, by its own entry.
            spec.network = None;
            self.allocator.release_or_log(&spec, found.key).await;
            removed += 1;
        }
        self.remove_slots(slots, attached, &kept).await?;
        removed += self.remove_unknown(&known).await?;
        Ok(Reconciled { adopting, removed, unreadable })
    }

    /// What the ledger names, by its owner.
    fn found(&self, entries: Vec<Entry>) -> BTreeMap<VmId, Found> {
        let mut machines: BTreeMap<VmId, Found> = BTreeMap::new();
        for entry in entries {
            let found = machines.entry(entry.owner).or_default();
            match entry.resource {
                Resource::Slot { number, range } => {
                    found.slot = Some((number, range));
                    continue;
                }
                // The networks have looked after it.
                Resource::Helper { .. } => continue,
                Resource::User { uid } => {
                    found.user = Some(uid);
                    self.allocator.users.claim(uid);
                }
                Resource::Vmm { key, .. } => found.key = key,
                Resource::Cgroup { path } => found.cgroup = Some(path),
                // It lies where the machine's id says.
                Resource::Directory { .. } => {}
            }
            found.is_machine = true;
        }
        machines
    }

    /// Removes `slots`, which nothing uses any more. `kept`: those that the egress process goes on to answer.
    async fn remove_slots(
        &self,
        slots: BTreeMap<u16, (VmId, Range)>,
        attached: &[u16],
        kept: &BTreeSet<u16>,
    ) -> Result<(), Error> {
        let Some(networks) = &self.allocator.networks else { return Ok(()) };
        for (number, (owner, range)) in slots {
            if range != networks.slots.range() {
                // Its number means nothing here; its link went with its machine.
                self.allocator.ledger.strike_all(&owner).await?;
            } else if let Err(error) = networks.discard(number, &owner).await {
                tracing::error!(number, error = chain(&error), "a network slot is quarantined");
            }
        }
        // Names of what is kept as it is are answered as before.
        let attached: Vec<u16> = attached.iter().copied().filter(|number| !kept.contains(number)).collect();
        networks.forget(&attached).await;
        Ok(())
    }

    /// Removes directories of machines that the ledger does not know: the power failed after they were made, and before
    /// their entries were on the disk. What runs from one is nobody's that we know, and is left alone.
    async fn remove_unknown(&self, known: &BTreeSet<VmId>) -> Result<u32, Error> {
        let directory = self.store.root().join("sandboxes");
        let looking = |source| Error::Io { what: "looking for machines that nobody knows", source };
        let listing = kelvin_host::blocking::spawn(move || {
            let names: std::io::Result<Vec<_>> =
                std::fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name())).collect();
            names
        });
        let names =
            listing.await.unwrap_or_else(|error| Err(std::io::Error::other(error))).map_err(looking)?;
        let mut removed = 0;
        for name in names {
            let Some(vm) = name.to_str().and_then(|name| name.parse::<VmId>().ok()) else { continue };
            if known.contains(&vm) {
                continue;
            }
            let spec = self.spec(vm, &Found::default());
            let marker = spec.marker();
            let running = kelvin_host::blocking::spawn(move || find_by_marker(&marker));
            let running =
                running.await.unwrap_or_else(|error| Err(std::io::Error::other(error))).map_err(looking)?;
            if running.is_empty() {
                self.allocator.release_or_log(&spec, None).await;
                removed += 1;
            } else {
                tracing::error!(vm = %spec.vm, pids = ?running, "a VMM runs that the ledger does not know");
            }
        }
        Ok(removed)
    }

    /// The slot of a machine that is kept as it is; none when it is not of this server's range, and stays in the ledger.
    fn keep_slot(&self, slot: Option<(u16, (VmId, Range))>, key: ProcessKey) -> Option<Arc<Slot>> {
        let networks = self.allocator.networks.as_ref()?;
        let (number, (owner, range)) = slot?;
        if range != networks.slots.range() {
            return None;
        }
        let kept = networks.slots.adopt(number, owner, key);
        kept.inspect_err(|error| tracing::error!(number, error = chain(error), "its network cannot be seen"))
            .ok()
    }

    fn spec(&self, vm: VmId, found: &Found) -> MachineSpec {
        MachineSpec {
            vm,
            data_dir: self.store.root().to_owned(),
            user: found.user,
            shape: found.record.as_ref().map_or(NO_SHAPE, |record| record.shape),
            guest: found
                .record
                .as_ref()
                .map_or_else(Default::default, |record| std::path::Path::new("guests").join(&record.guest)),
            network: None,
            cgroup: found.cgroup.clone(),
        }
    }

    /// Makes what runs a sandbox, without a word to it.
    async fn take(
        self: &Arc<Self>,
        spec: &mut MachineSpec,
        key: ProcessKey,
        record: SandboxRecord,
        slot: Option<(u16, &(VmId, Range))>,
        attached: &[u16],
    ) -> Result<(), Error> {
        let gone = |source| Error::Io { what: "finding a VMM", source };
        Process::adopt(key).map_err(gone)?;
        let networks = self.allocator.networks.as_ref();
        match (&record.network, slot, networks) {
            (None, ..) => {}
            (Some(attachment), Some((number, (owner, range))), Some(networks))
                if *range == networks.slots.range() =>
            {
                let slot = networks.slots.adopt(number, owner.clone(), key)?;
                networks.adopt(&slot, &attachment.policy, attached).await?;
                spec.network = Some(slot);
            }
            // No reason to end it: its rules hold, only its ports are out of reach.
            (Some(_), slot, networks) => tracing::warn!(
                sandbox = %record.sandbox, slot = slot.map(|(number, _)| number), networks = networks.is_some(),
                "its network is not this server's: it goes on, its ports cannot be reached"
            ),
        }
        // No reason to end it.
        if let Err(error) = self.allocator.limit(spec) {
            tracing::error!(sandbox = %record.sandbox, error = chain(&error), "it goes on with the limits that it had");
        }
        let hold = Some(self.capacity.take(Amount::machine(record.shape)));
        let lease = record.snapshot.as_ref().and_then(|id| self.snapshots.lease(id));
        let restored = record.snapshot.as_ref().and_then(|id| self.snapshots.get(id));
        let identity =
            restored.map(|snapshot| snapshot.manifest.identity.clone()).or(record.identity.clone());
        Inner::adopt(self, Orphan { spec: spec.clone(), key, record, identity, lease, hold });
        Ok(())
    }
}
