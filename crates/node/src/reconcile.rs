//! Start-up: the ledger against the kernel. Sandboxes that run are adopted; everything else that the
//! ledger names is removed; nothing else is touched.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kelvin_api::error::chain;
use kelvin_api::guest::Request;
use kelvin_api::id::VmId;
use kelvin_host::ledger::Resource;
use kelvin_host::process::ProcessKey;
use kelvin_vmm::control::Control;
use kelvin_vmm::{MachineSpec, Port};

use crate::Inner;
use crate::capacity::Amount;
use crate::error::Error;
use crate::record::{Record, SandboxRecord, State};
use crate::sandbox::Machine;

/// How long an adopted agent may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Found {
    key: Option<ProcessKey>,
    user: Option<u32>,
    record: Option<SandboxRecord>,
}

impl Inner {
    /// Brings the host to what the ledger says. Returns how many sandboxes were adopted and how many
    /// machines removed.
    pub async fn reconcile(self: &Arc<Self>) -> Result<(u32, u32), Error> {
        let (entries, records) = self.keeper.ledger.read().await?;
        let mut machines: BTreeMap<VmId, Found> = BTreeMap::new();
        for entry in entries {
            let found = machines.entry(entry.owner).or_default();
            match entry.resource {
                Resource::User { uid } => {
                    found.user = Some(uid);
                    self.keeper.users.claim(uid);
                }
                Resource::Vmm { key, .. } => found.key = key,
                // It lies where the machine's id says.
                Resource::Directory { .. } => {}
            }
        }
        for record in records {
            let found = machines.entry(record.owner).or_default();
            match serde_json::from_str(&record.body) {
                Ok(Record::Sandbox(sandbox)) => found.record = Some(sandbox),
                Err(error) => tracing::error!(%error, "a record does not parse, its machine is removed"),
            }
        }
        let (mut adopted, mut removed) = (0, 0);
        for (vm, found) in machines {
            let spec = self.spec(vm, &found);
            if let (Some(record), Some(key)) = (&found.record, found.key)
                && record.state == State::Running
            {
                match self.adopt(&spec, key, record.clone()).await {
                    Ok(()) => {
                        adopted += 1;
                        continue;
                    }
                    Err(error) => {
                        tracing::warn!(sandbox = %record.sandbox, error = chain(&error), "not adopted");
                        self.changes.add(record.sandbox.clone(), "it did not survive the restart");
                    }
                }
            }
            self.keeper.release_or_log(&spec, found.key).await;
            removed += 1;
        }
        Ok((adopted, removed))
    }

    fn spec(&self, vm: VmId, found: &Found) -> MachineSpec {
        let unknown = kelvin_api::units::Shape {
            vcpus: 0,
            memory_mib: kelvin_api::units::MemoryMib(0),
            disk_mib: kelvin_api::units::DiskMib(0),
        };
        MachineSpec {
            vm,
            data_dir: self.store.root().to_owned(),
            user: found.user,
            shape: found.record.as_ref().map_or(unknown, |record| record.shape),
            guest: found
                .record
                .as_ref()
                .map_or_else(Default::default, |record| std::path::Path::new("guests").join(&record.guest)),
        }
    }

    async fn adopt(
        self: &Arc<Self>,
        spec: &MachineSpec,
        key: ProcessKey,
        record: SandboxRecord,
    ) -> Result<(), Error> {
        let running = self.driver.adopt(spec, key).await?;
        let mut control = Control::new(running.connect(Port::Control).await?);
        control.call("ping", &Request::Ping, ANSWER).await?;
        self.capacity().take(Amount::machine(record.shape));
        tracing::info!(sandbox = %record.sandbox, pid = key.pid, "adopted");
        self.own(Machine { spec: spec.clone(), running, control, record });
        Ok(())
    }
}
