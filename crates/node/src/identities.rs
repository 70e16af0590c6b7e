//! What machines are to this host: which snapshot is exactly right for a machine that is asked for.

use std::sync::Arc;

use kelvin_api::units::{DiskMib, MemoryMib, Shape};
use kelvin_store::identity::{Identity, SNAPSHOT_FORMAT};
use kelvin_store::image::{Service, Template};
use kelvin_vmm::Driver;

/// What of an identity is the host's.
pub struct Identities {
    driver: Arc<dyn Driver>,
    /// Digests of the device layout, without a network and with one; vCPUs and memory are fields of their own.
    devices: [String; 2],
    host_cpu: String,
    host_kernel: String,
}

impl Identities {
    /// Those of machines that `driver` runs here.
    pub fn new(driver: Arc<dyn Driver>) -> Self {
        let same = Shape { vcpus: 1, memory_mib: MemoryMib(1), disk_mib: DiskMib(1) };
        let devices = [false, true]
            .map(|network| kelvin_store::hash::sha256(driver.layout(same, network).join("\0").as_bytes()));
        let (host_cpu, host_kernel) = kelvin_host::cpu::here();
        Self { driver, devices, host_cpu, host_kernel }
    }

    /// The digest of the devices of machines with a network, or without one.
    pub fn devices(&self, network: bool) -> String {
        self.devices[usize::from(network)].clone()
    }

    /// What `identity` would be on this node: the fields that are the host's are this host's.
    pub fn here(&self, identity: &Identity) -> Identity {
        let network = self.has_network(identity);
        Identity {
            vmm: self.driver.kind().to_owned(),
            vmm_build: self.driver.build().to_owned(),
            accelerator: self.driver.accelerator().to_string(),
            host_cpu: self.host_cpu.clone(),
            host_kernel: self.host_kernel.clone(),
            devices: self.devices(network),
            snapshot_format: SNAPSHOT_FORMAT,
            ..identity.clone()
        }
    }

    /// The identity of a machine of `template` in `shape` on this node.
    pub fn of_template(&self, template: &Template, shape: Shape, network: bool) -> Identity {
        Identity {
            image: template.image.clone(),
            guest_kernel: template.kernel.clone(),
            agent: template.initrd.clone(),
            vmm: self.driver.kind().to_owned(),
            vmm_build: self.driver.build().to_owned(),
            accelerator: self.driver.accelerator().to_string(),
            host_cpu: self.host_cpu.clone(),
            host_kernel: self.host_kernel.clone(),
            vcpus: shape.vcpus,
            memory_mib: shape.memory_mib.0,
            disk_mib: shape.disk_mib.0,
            devices: self.devices(network),
            snapshot_format: SNAPSHOT_FORMAT,
            service: template.service.as_ref().map(Service::digest),
        }
    }

    /// Whether machines of `identity` have a network.
    pub fn has_network(&self, identity: &Identity) -> bool {
        identity.devices == self.devices[1]
    }
}
