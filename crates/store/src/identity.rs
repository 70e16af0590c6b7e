//! Identity: everything that must be equal for a restore to be correct.
//!
//! One struct, one digest, computed here and nowhere else. Manifests store the fields beside the digest,
//! so that a mismatch can name what differs.

use serde::{Deserialize, Serialize};

use crate::hash::sha256;

/// The format of snapshots this program writes; others are not restored.
pub const SNAPSHOT_FORMAT: u32 = 1;

/// The fields of an identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Digest of the image's root file system.
    pub image: String,
    /// Digest of the guest's kernel.
    pub guest_kernel: String,
    /// Digest of the initial RAM disk: the agent and the modules.
    pub agent: String,
    /// `qemu` or `firecracker`.
    pub vmm: String,
    /// Version and digest of the VMM's binary.
    pub vmm_build: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The host's processor and its microcode.
    pub host_cpu: String,
    /// The host kernel's release: it is below the VMM.
    pub host_kernel: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory, in MiB.
    pub memory_mib: u32,
    /// Disk size, in MiB.
    pub disk_mib: u32,
    /// Digest of the device layout: the VMM's arguments without names and paths.
    pub devices: String,
    /// [`SNAPSHOT_FORMAT`].
    pub snapshot_format: u32,
    /// Digest of what runs in the machine beside what the image has by itself, when something does: see
    /// [`crate::image::Service`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
}

impl Identity {
    /// The digest over all fields.
    pub fn digest(&self) -> String {
        // Field order is the struct's: the text is canonical.
        sha256(serde_json::to_string(self).unwrap_or_default().as_bytes())
    }

    /// Names of the fields in which `self` and `other` differ, in declaration order.
    pub fn differences(&self, other: &Self) -> Vec<&'static str> {
        let mut fields = Vec::new();
        macro_rules! compare {
            ($($field:ident),*) => {$(
                if self.$field != other.$field {
                    fields.push(stringify!($field));
                }
            )*};
        }
        compare!(
            image,
            guest_kernel,
            agent,
            vmm,
            vmm_build,
            accelerator,
            host_cpu,
            host_kernel,
            vcpus,
            memory_mib,
            disk_mib,
            devices,
            snapshot_format,
            service
        );
        fields
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Identity {
        Identity {
            image: "i".into(),
            guest_kernel: "k".into(),
            agent: "a".into(),
            vmm: "qemu".into(),
            vmm_build: "7.2".into(),
            accelerator: "tcg".into(),
            host_cpu: "c".into(),
            host_kernel: "6".into(),
            vcpus: 1,
            memory_mib: 256,
            disk_mib: 1024,
            devices: "d".into(),
            snapshot_format: SNAPSHOT_FORMAT,
            service: Some("s".into()),
        }
    }

    /// Digests are in manifests: without a service they are what they were before there were any.
    #[test]
    fn one_without_a_service_has_the_digest_that_it_always_had() {
        let text = r#"{"image":"i","guest_kernel":"k","agent":"a","vmm":"qemu","vmm_build":"7.2","accelerator":"tcg","host_cpu":"c","host_kernel":"6","vcpus":1,"memory_mib":256,"disk_mib":1024,"devices":"d","snapshot_format":1}"#;
        let plain = Identity { service: None, ..example() };
        assert_eq!(plain.digest(), sha256(text.as_bytes()));
        assert_ne!(plain.digest(), example().digest());
        assert_eq!(serde_json::from_str::<Identity>(text).unwrap(), plain);
    }

    #[test]
    fn every_field_counts_and_is_named() {
        let base = example();
        let text = serde_json::to_value(&base).unwrap();
        for (name, value) in text.as_object().unwrap() {
            let mut changed = text.clone();
            changed[name] = match value {
                serde_json::Value::Number(number) => (number.as_u64().unwrap() + 1).into(),
                _ => "other".into(),
            };
            let changed: Identity = serde_json::from_value(changed).unwrap();
            assert_ne!(changed.digest(), base.digest(), "{name}");
            assert_eq!(changed.differences(&base), [name.as_str()]);
        }
        assert!(base.differences(&base).is_empty());
    }
}
