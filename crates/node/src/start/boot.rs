//! *cold*: a machine boots, of a template or from the disk of a snapshot.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use kelvin_api::guest::Request;
use kelvin_api::phase::Phase;
use kelvin_api::sandbox::StartPath;
use kelvin_store::identity::Identity;
use kelvin_store::image::Template;
use kelvin_store::snapshot::Snapshot;
use kelvin_vmm::control::Control;
use kelvin_vmm::{MachineSpec, Running};
use tracing::Instrument;

use crate::error::Error;
use crate::machine::processes::Processes;
use crate::machine::service;
use crate::machine::warm_up::quiesce;
use crate::sandbox::record::SandboxRecord;
use crate::start::attempt::{Attempt, Started, ended, held_for, lineage};
use crate::start::probe::Probe;
use crate::start::source::StartSource;
use crate::state::Inner;

/// How long a machine that boots counts as work: one that takes longer waits for something else than a processor.
const BOOTING: Duration = Duration::from_secs(5);

impl Attempt<'_> {
    pub async fn boot_template(&mut self, template: &Template) -> Result<Started, Error> {
        let identity = self.inner.identities.of_template(template, self.shape, self.network.is_some());
        self.cold(self.inner.store.rootfs(&template.image), identity).await
    }

    /// Boots from the disk of a snapshot, with the guest that wrote it.
    pub async fn boot_disk(&mut self, snapshot: &Snapshot) -> Result<Started, Error> {
        let id = &snapshot.manifest.id;
        let missing = || kelvin_store::Error::Missing { kind: "snapshot", name: id.to_string() };
        // Until its disk is cloned.
        let lease = self.inner.snapshots.lease(id).ok_or_else(missing)?;
        snapshot.check_seal()?;
        let identity = Identity {
            vcpus: self.shape.vcpus,
            memory_mib: self.shape.memory_mib.0,
            devices: self.inner.identities.devices(self.network.is_some()),
            ..self.inner.identities.here(&snapshot.manifest.identity)
        };
        let started = self.cold(snapshot.file("disk"), identity).await;
        drop(lease);
        started
    }

    pub async fn cold(&mut self, disk: PathBuf, identity: Identity) -> Result<Started, Error> {
        let span = self.begin(Phase::Disk);
        let network = self.network.is_some();
        let begun = self.inner.allocator.begin(self.shape, &self.guest, disk, network);
        let (home, making) = begun.instrument(span.clone()).await?;
        // Beside the start of the VMM, where that can wait for it.
        let (since, took) = (self.since, Arc::new(OnceLock::new()));
        let told = Arc::clone(&took);
        let making = async move {
            let made = making.await;
            let _ = told.set(since.elapsed());
            made
        };
        let making: kelvin_vmm::Disk = Box::pin(making.instrument(span));
        let mut record = SandboxRecord {
            identity: Some(identity.clone()),
            shape: self.shape,
            snapshot: None,
            start_path: StartPath::Cold,
            ..self.record(StartPath::Cold)
        };
        if let (None, Some(snapshot)) = (&record.lineage, self.source.image()) {
            record.lineage = lineage(snapshot);
        }
        let work = async {
            self.hardware(&home.spec, &mut record).await?;
            self.rule(&home.spec, false).await?;
            let span = self.begin(Phase::Vmm);
            // The disk is measured from its own begin: the two overlap.
            self.since = Instant::now();
            let running = async {
                self.declare(&home.spec, &record).await?;
                let running = self.inner.driver.boot(&home.spec, making).await?;
                home.started(&self.inner.allocator, running.key()).await?;
                Ok::<_, Error>(running)
            };
            let running = running.instrument(span).await?;
            self.timings.add(Phase::Disk, took.get().copied().unwrap_or_default());
            self.lap(Phase::Vmm);
            let span = self.begin(Phase::Boot);
            let slot = home.spec.network.as_ref().filter(|_| self.request.probe_tcp);
            let probe = slot.map(|slot| Probe::begin(slot.address()));
            let working = self.working.take();
            let booted = async {
                tokio::select! {
                    biased;
                    control = held_for(BOOTING, working, self.inner.boot_guest(&running)) => control,
                    error = self.given_up() => Err(error),
                }
            };
            let mut control = booted.instrument(span).await?;
            self.begin_service(&running, &home.spec, &mut control).await?;
            self.lap(Phase::Boot);
            let asked = control.post(&self.activation_request(&record)?).await?;
            self.activated(&running, &mut control, asked).await?;
            // Not before: the guest has its hardware address only now, and the slot knows no other.
            if let Some(probe) = probe {
                if let Some(took) = probe.answer().await {
                    self.timings.add(Phase::Tcp, took);
                }
                self.since = Instant::now();
            }
            Ok::<_, Error>((running, control))
        };
        match work.await {
            Ok((running, control)) => {
                Ok(Started { spec: home.spec, running, control, record, identity, lease: None })
            }
            Err(error) => {
                self.inner.allocator.release_or_log(&home.spec, None).await;
                Err(error)
            }
        }
    }
}

impl Attempt<'_> {
    /// Starts what a snapshot of the template would have running: before the machine is anybody's, as in a bake.
    async fn begin_service(
        &self,
        running: &Running,
        spec: &MachineSpec,
        control: &mut Control,
    ) -> Result<(), Error> {
        let StartSource::Template(template) = self.source else { return Ok(()) };
        if template.service.is_none() {
            return Ok(());
        }
        let work = async {
            let processes = Processes::over(running.connect().await?, &spec.vm, None);
            let begun = service::begin(&processes, template).await;
            processes.close().await;
            begun?;
            quiesce(control).await
        };
        tokio::select! {
            biased;
            begun = work => begun,
            end = running.ended() => Err(ended("starting the template's service", running, end).await),
            error = self.given_up() => Err(error),
        }
    }
}

impl Inner {
    /// Waits for a booting guest's agent. The console tells why, when it does not come.
    pub async fn boot_guest(&self, running: &Running) -> Result<Control, Error> {
        let mut control = running.control().await?;
        let limit = self.options.boot_deadline;
        tokio::select! {
            biased;
            answer = control.call("booting", &Request::Ping, limit) => match answer {
                Ok(_) => Ok(control),
                Err(kelvin_vmm::Error::Deadline { what, after, .. }) => {
                    let console = running.console().await.unwrap_or_default();
                    let tail: Vec<&str> = console.lines().rev().take(15).collect();
                    let detail = tail.into_iter().rev().collect::<Vec<_>>().join(" | ");
                    Err(kelvin_vmm::Error::Deadline { what, after, detail }.into())
                }
                Err(error) => Err(error.into()),
            },
            end = running.ended() => Err(ended("booting", running, end).await),
        }
    }
}
