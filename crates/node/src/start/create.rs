//! A create from its request to its sandbox: *reserve*, and which way is taken.

use std::sync::Arc;
use std::time::Instant;

use kelvin_api::error::chain;
use kelvin_api::network::{Attachment, Wanted};
use kelvin_api::phase::{Phase, Timings};
use kelvin_api::sandbox::StartPath;
use kelvin_api::units::{MemoryMib, Shape};
use kelvin_host::descriptors::{Budget, MACHINE};
use kelvin_node_api::{Create, Created};
use kelvin_store::image::Template;
use kelvin_store::snapshot::Snapshot;
use tracing::Instrument;

use crate::capacity::{Amount, Hold};
use crate::error::Error;
use crate::machine::clock::random_bytes;
use crate::pool::shelf::{Pool, manifest_shape};
use crate::sandbox::record::SandboxRecord;
use crate::start::attempt::{Attempt, Started};
use crate::start::source::{FromSnapshot, StartSource, Way, Who};
use crate::state::Inner;

impl Inner {
    /// Creates a sandbox. When it returns, the agent has answered its activation.
    ///
    /// Not cancel-safe: callers run it on a task of its own.
    pub async fn create(self: &Arc<Self>, request: Create, source: StartSource) -> Result<Created, Error> {
        let _request = self.activity.request();
        let (since, deadline) = (Instant::now(), self.clock.stamp(self.clock.at(request.ends_at)));
        self.crash_point(Phase::Reserve);
        let mut network = self.attachment(&request.network)?;
        let (template, guest, shape) = match &source {
            StartSource::Snapshot(FromSnapshot { image, way, .. }) => {
                let manifest = &image.manifest;
                let mut shape = manifest_shape(manifest);
                match way {
                    Way::Boot => {
                        // A disk fits any machine.
                        shape.vcpus = request.vcpus.unwrap_or(shape.vcpus);
                        shape.memory_mib = request.memory_mib.unwrap_or(shape.memory_mib);
                    }
                    Way::Restore => network = self.fits(image, &request, network)?,
                }
                (manifest.template.clone(), manifest.guest.clone(), shape)
            }
            StartSource::Template(template) => {
                let shape = Shape {
                    vcpus: request.vcpus.unwrap_or(template.shape.vcpus),
                    memory_mib: request.memory_mib.unwrap_or(template.shape.memory_mib),
                    disk_mib: template.shape.disk_mib,
                };
                (template.name.clone(), template.guest.clone(), shape)
            }
        };
        let machine_id = source.resumed().and_then(|paused| paused.record.machine_id);
        let machine_id = machine_id.map_or_else(random_bytes, Ok)?;
        let _descriptors = Budget::of_process().take(MACHINE)?;
        let hold = self.reserve(&request, shape)?;
        let mut attempt = Attempt {
            inner: self,
            request: &request,
            source: &source,
            template,
            guest,
            shape,
            network,
            machine_id,
            hold: Some(hold),
            deadline,
            working: Some(self.activity.work()),
            timings: Timings::default(),
            since,
        };
        attempt.lap(Phase::Reserve);
        let span = tracing::info_span!("create", sandbox = %request.sandbox);
        let result = attempt.run().instrument(span).await;
        self.sandboxes.creating().remove(&request.sandbox);
        let (record, reason) = result?;
        let created = Created {
            start_path: record.start_path,
            reason,
            timings: attempt.timings,
            shape,
            started_at: record.started_at,
        };
        tracing::info!(sandbox = %request.sandbox, path = created.start_path.name(), reason = created.reason,
            timing = created.timings.server_timing(since.elapsed()), "created");
        Ok(created)
    }

    /// What a create's wish for a network comes to on this node.
    fn attachment(&self, wanted: &Wanted) -> Result<Option<Attachment>, Error> {
        match (wanted, &self.allocator.networks) {
            (Wanted::None, _) | (Wanted::Usual(_), None) => Ok(None),
            (Wanted::Usual(attachment) | Wanted::Required(attachment), Some(_)) => {
                Ok(Some(attachment.clone()))
            }
            (Wanted::Required(_), None) => {
                Err(Error::NoNetwork { what: "the node".to_owned(), reason: self.no_network.clone() })
            }
        }
    }

    /// Whether a snapshot can be restored here as `request` wants it; with its network.
    fn fits(
        &self,
        snapshot: &Snapshot,
        request: &Create,
        network: Option<Attachment>,
    ) -> Result<Option<Attachment>, Error> {
        let manifest = &snapshot.manifest;
        let differences = manifest.identity.differences(&self.identities.here(&manifest.identity));
        if !differences.is_empty() {
            return Err(Error::Incompatible {
                snapshot: manifest.id.to_string(),
                fields: differences.join(", "),
            });
        }
        let fixed = |field, asked: u64, has: u64| {
            Err(Error::Fixed { field, asked: asked.to_string(), has: has.to_string() })
        };
        if let Some(asked) = request.vcpus.filter(|asked| *asked != manifest.identity.vcpus) {
            return fixed("cpuCount", asked.into(), manifest.identity.vcpus.into());
        }
        if let Some(MemoryMib(asked)) = request.memory_mib
            && asked != manifest.identity.memory_mib
        {
            return fixed("memoryMB", asked.into(), manifest.identity.memory_mib.into());
        }
        match (self.identities.has_network(&manifest.identity), network) {
            (true, None) => Err(Error::Fixed {
                field: "network",
                asked: "none".to_owned(),
                has: "a network, which can be denied everything".to_owned(),
            }),
            (true, network) => Ok(network),
            (false, _) if matches!(request.network, Wanted::Required(_)) => Err(Error::NoNetwork {
                what: format!("snapshot {}", manifest.id),
                reason: Some("it was taken of a sandbox without one".to_owned()),
            }),
            (false, _) => Ok(None),
        }
    }

    /// Holds what the machine needs, until a sandbox has it or the create has failed.
    fn reserve(self: &Arc<Self>, request: &Create, shape: Shape) -> Result<Hold, Error> {
        if self.hurry.is_cancelled() {
            return Err(Error::Stopping);
        }
        self.check_disk()?;
        let mut creating = self.sandboxes.creating();
        if creating.contains(&request.sandbox) || self.sandboxes.running().contains_key(&request.sandbox) {
            return Err(Error::Exists(request.sandbox.to_string()));
        }
        self.capacity.check(shape)?;
        let hold = self.make_room(Amount::machine(shape))?;
        creating.insert(request.sandbox.clone());
        Ok(hold)
    }
}

impl Attempt<'_> {
    async fn run(&mut self) -> Result<(SandboxRecord, String), Error> {
        let (started, reason) = self.start().await?;
        let span = self.begin(Phase::Commit);
        let committed = self.commit(started).instrument(span).await?;
        self.lap(Phase::Commit);
        Ok((committed, reason))
    }

    async fn start(&mut self) -> Result<(Started, String), Error> {
        let insisted = self.request.start_path;
        let template = match self.source {
            StartSource::Template(template) => template,
            StartSource::Snapshot(from) => return self.start_from(from).await,
        };
        if insisted == Some(StartPath::Cold) {
            return Ok((self.boot_template(template).await?, "cold: asked for".to_owned()));
        }
        let reason = match self.inner.pool_for(template, self.shape, self.network.is_some()) {
            Ok(pool) => {
                let mut reason = "clone: asked for".to_owned();
                if insisted != Some(StartPath::Clone) {
                    if let Some(started) = self.warm(&pool).await {
                        return Ok((started, "warm".to_owned()));
                    }
                    reason = "clone: no warm slot".to_owned();
                }
                if insisted == Some(StartPath::Warm) {
                    let reason = pool.refusal().unwrap_or_else(|| "no warm slot".to_owned());
                    return Err(Error::Path { path: "warm", reason });
                }
                match self.clone(&pool).await {
                    Ok((started, true)) => return Ok((started, reason)),
                    Ok((started, false)) => return Ok((started, format!("{reason}; no VMM waited"))),
                    Err(error) => chain(&error),
                }
            }
            Err(reason) => reason,
        };
        if let Some(path @ (StartPath::Clone | StartPath::Warm)) = insisted {
            return Err(Error::Path { path: path.name(), reason });
        }
        if self.inner.hurry.is_cancelled() {
            return Err(Error::Stopping);
        }
        tracing::warn!(sandbox = %self.request.sandbox, reason, "no clone");
        let started = self.boot_template(template).await?;
        if self.inner.options.auto_bake {
            self.inner.bake_later(Template::clone(template), self.shape, self.network.is_some());
        }
        Ok((started, format!("cold: {reason}")))
    }

    /// Starts from what a sandbox was.
    async fn start_from(&mut self, from: &FromSnapshot) -> Result<(Started, String), Error> {
        let FromSnapshot { image, way, who } = from;
        let only =
            |reason: &str, path: StartPath| Err(Error::Path { path: path.name(), reason: reason.to_owned() });
        let (id, insisted) = (&image.manifest.id, self.request.start_path);
        match way {
            Way::Boot => {
                if let Some(path @ (StartPath::Clone | StartPath::Warm)) = insisted {
                    return only("a snapshot without memory is booted from its disk", path);
                }
                let reason = match who {
                    Who::Itself(paused) => {
                        format!("cold: resumed from its disk, generation {}", paused.record.generation)
                    }
                    Who::Another(_) => format!("cold: the disk of snapshot {id}"),
                };
                Ok((self.boot_disk(image).await?, reason))
            }
            Way::Restore => {
                if let Some(path @ (StartPath::Cold | StartPath::Warm)) = insisted {
                    return only("a snapshot of a sandbox is restored into a fresh VMM", path);
                }
                let (started, _) = self.clone(&Arc::new(Pool::new(Arc::clone(image), 0))).await?;
                let reason = match who {
                    Who::Itself(paused) => format!("clone: resumed, generation {}", paused.record.generation),
                    Who::Another(_) => format!("clone: snapshot {id}"),
                };
                Ok((started, reason))
            }
        }
    }
}
