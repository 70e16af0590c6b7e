//! Imports of templates into a node that runs.
//!
//! One of a name at a time, on a task of its own to its end. Who writes: the store, the template last, by one rename. What is made
//! of the template that was there before stays what it was: creates and bakes that are under way have read it.

use std::sync::Arc;

use kelvin_api::id::TemplateVersion;
use kelvin_api::units::{DiskMib, Shape};
use kelvin_node_api::{Import, ImportTold};
use kelvin_store::import::Links;

use crate::Node;
use crate::error::Error;
use crate::inspect::Known;

impl Node {
    /// Makes a template of files on this machine; creates find it when this returns. `told` hears how far it is.
    ///
    /// # Errors
    /// `Importing` when another import of the name is under way, `Shape` when no machine of it could run here, `Exhausted`
    /// when the disk is too full, `Store` for the files. Then the template is what it was.
    pub async fn import(&self, request: Import, told: ImportTold) -> Result<Known, Error> {
        let inner = Arc::clone(&self.inner);
        if inner.stop.is_cancelled() {
            return Err(Error::Stopping);
        }
        let (vcpus, memory_mib) = (request.vcpus, request.memory_mib);
        inner.capacity.check(Shape { vcpus, memory_mib, disk_mib: DiskMib(0) })?;
        inner.ensure_disk().await?;
        let alone = inner.templates.begin_import(&request.template.clone().into())?;
        let version = TemplateVersion::from(request.template.clone());
        let node = self.clone();
        self.run("importing", async move {
            let _alone = alone;
            let store = inner.store.clone();
            let imported = kelvin_host::blocking::spawn(move || {
                let import = kelvin_store::import::Import {
                    name: request.template,
                    rootfs: &request.rootfs,
                    kernel: &request.kernel,
                    initrd: &request.initrd,
                    links: Links::Refuse,
                    vcpus: request.vcpus,
                    memory_mib: request.memory_mib,
                };
                store.import(&import, &mut |progress| {
                    told.send_replace(Some(progress));
                })
            });
            let imported = imported
                .await
                .map_err(|error| Error::Io { what: "importing", source: std::io::Error::other(error) })??;
            tracing::info!(template = %imported.name, image = imported.image, "imported");
            // Read anew: from here on it is known.
            let all = node.templates().await?;
            // Nothing waits any more for what had the name before.
            node.inner.settle_pools(&version.name).await;
            let known = all.into_iter().find(|known| known.template.version() == version);
            let missing = || kelvin_store::Error::Missing { kind: "template", name: version.to_string() };
            Ok(known.ok_or_else(missing)?)
        })
        .await
    }
}
