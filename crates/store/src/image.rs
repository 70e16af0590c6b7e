//! Images (root file systems), guests (kernel and initial RAM disk) and templates that join them.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use kelvin_api::id::{BuildId, TemplateName, TemplateVersion};
use kelvin_api::sandbox::EnvVars;
use kelvin_api::units::Shape;
use serde::{Deserialize, Serialize};

use crate::hash::{FileDigest, sha256};
use crate::{Error, Store, io_error, names, read_json};

/// The root file system's name in an image.
pub const ROOTFS: &str = "rootfs.ext4";
/// The kernel's name in a guest.
pub const KERNEL: &str = "vmlinuz";
/// The initial RAM disk's name in a guest.
pub const INITRD: &str = "initrd";

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ImageManifest {
    pub rootfs: FileDigest,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct GuestManifest {
    pub kernel: FileDigest,
    pub initrd: FileDigest,
}

/// What a template is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// Its name.
    pub name: TemplateName,
    /// Digest of its image.
    pub image: String,
    /// Digest of its guest.
    pub guest: String,
    /// Digest of the guest's kernel.
    pub kernel: String,
    /// Digest of the guest's initial RAM disk.
    pub initrd: String,
    /// The shape of machines that ask for no other.
    pub shape: Shape,
    /// What processes have in their environment that say nothing else.
    #[serde(default, skip_serializing_if = "EnvVars::is_empty")]
    pub env: EnvVars,
    /// Where processes begin that say nothing else; the user's home when it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// Whose processes are that say nothing else; `user` when it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// What runs in its machines when their snapshot is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Service>,
    /// Where it comes from, when it was built and not imported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub built: Option<BuiltFrom>,
    /// The build that this version of it is of; none of what was imported, or built when one version of a name was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build: Option<BuildId>,
}

/// What runs in a template's machines when their snapshot is taken: a command that stays, one that tells when it can be used, or
/// both.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Started as the template's user, for a shell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<String>,
    /// Tried until it exits with 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<String>,
}

impl Service {
    /// It, when anything runs.
    pub fn of(start: Option<String>, ready: Option<String>) -> Option<Self> {
        (start.is_some() || ready.is_some()).then_some(Self { start, ready })
    }

    /// Digest of both texts: a snapshot with another service is another snapshot.
    pub fn digest(&self) -> String {
        // Field order is the struct's: the text is canonical.
        sha256(serde_json::to_string(self).unwrap_or_default().as_bytes())
    }
}

/// What a template was built of, and what its image says that nothing here acts on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BuiltFrom {
    /// Digest of the image that it began with, when it began with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_digest: Option<String>,
    /// When.
    pub at: jiff::Timestamp,
    /// The image's own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// The same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// The same, as `80/tcp`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exposed_ports: Vec<String>,
    /// The same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
}

impl Template {
    /// One without anything that only a build gives.
    pub fn plain(name: TemplateName, image: String, guest: Guest, shape: Shape) -> Self {
        let Guest { digest: guest, kernel, initrd } = guest;
        let (env, workdir, user, service, built) = (EnvVars::new(), None, None, None, None);
        Self { name, image, guest, kernel, initrd, shape, env, workdir, user, service, built, build: None }
    }

    /// Which version of which template it is.
    pub fn version(&self) -> TemplateVersion {
        TemplateVersion { name: self.name.clone(), build: self.build.clone() }
    }

    /// The guest that its machines run.
    pub fn guest(&self) -> Guest {
        Guest { digest: self.guest.clone(), kernel: self.kernel.clone(), initrd: self.initrd.clone() }
    }
}

/// A guest, by digests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// Of both files.
    pub digest: String,
    /// Of the kernel.
    pub kernel: String,
    /// Of the initial RAM disk.
    pub initrd: String,
}

impl Guest {
    /// The guest of these two files, by their digests.
    pub fn of(kernel: String, initrd: String) -> Self {
        Self { digest: sha256(format!("{kernel} {initrd}").as_bytes()), kernel, initrd }
    }
}

/// Tells one import of a template from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TemplateStamp {
    inode: u64,
    mtime: (i64, i64),
}

impl TemplateStamp {
    /// When it was imported.
    pub fn imported(&self) -> jiff::Timestamp {
        let (seconds, ns) = self.mtime;
        jiff::Timestamp::new(seconds, i32::try_from(ns).unwrap_or(0)).unwrap_or_default()
    }
}

impl Store {
    /// Path of an image's root file system.
    pub fn rootfs(&self, image: &str) -> PathBuf {
        self.root.join("images").join(image).join(ROOTFS)
    }

    /// Path of a guest's directory.
    pub fn guest(&self, guest: &str) -> PathBuf {
        self.root.join("guests").join(guest)
    }

    /// Path of a version's file: `<name>.json`, or `<name>@<build>.json`.
    pub(crate) fn template_path(&self, version: &TemplateVersion) -> PathBuf {
        self.root.join("templates").join(format!("{version}.json"))
    }

    /// Bytes of an image: its size, and what of it is on the disk, with blocks that it shares.
    ///
    /// # Errors
    /// `Io` when that is not known.
    pub fn image_bytes(&self, image: &str) -> Result<(u64, u64), Error> {
        let path = self.rootfs(image);
        let found = fs::metadata(&path).map_err(io_error("reading", &path))?;
        Ok((found.len(), on_disk(&found)))
    }

    /// What the file system says of a template's file: it changes when the template is imported again.
    ///
    /// # Errors
    /// `Missing` when there is none, `Io` when that is not known.
    pub fn template_stamp(&self, version: &TemplateVersion) -> Result<TemplateStamp, Error> {
        use std::os::unix::fs::MetadataExt;
        let path = self.template_path(version);
        let found = fs::metadata(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::Missing { kind: "template", name: version.to_string() },
            _ => io_error("reading", &path)(error),
        })?;
        Ok(TemplateStamp { inode: found.ino(), mtime: (found.mtime(), found.mtime_nsec()) })
    }

    /// Whether there is a version of `name`.
    ///
    /// # Errors
    /// `Io` when the directory cannot be listed.
    pub fn has_template(&self, name: &TemplateName) -> Result<bool, Error> {
        let found = names::<String>(&self.root.join("templates"))?;
        Ok(found.iter().filter_map(|file| version_of(file)).any(|version| version.name == *name))
    }

    /// A version of a template.
    ///
    /// # Errors
    /// `Missing` when there is none, `Manifest` when it does not parse.
    pub fn template(&self, version: &TemplateVersion) -> Result<Template, Error> {
        match read_json(&self.template_path(version)) {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Err(Error::Missing { kind: "template", name: version.to_string() })
            }
            other => other,
        }
    }

    /// Removes a version of a template; no power failure brings it back. What was made of it stays, its image and guest until a
    /// collection finds that nothing needs them.
    ///
    /// # Errors
    /// `Missing` when there is none, `Io`.
    pub fn remove_template(&self, version: &TemplateVersion) -> Result<(), Error> {
        let path = self.template_path(version);
        fs::remove_file(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::Missing { kind: "template", name: version.to_string() },
            _ => io_error("removing", &path)(error),
        })?;
        crate::sync_parent(&path).map_err(io_error("syncing", &path))
    }

    /// Every version of every template, by name. One that does not parse is reported and left out.
    ///
    /// # Errors
    /// `Io` when the directory cannot be listed.
    pub fn templates(&self) -> Result<Vec<Template>, Error> {
        let mut found: Vec<Template> = names::<String>(&self.root.join("templates"))?
            .iter()
            .filter_map(|file| version_of(file))
            .filter_map(|version| match self.template(&version) {
                Ok(template) => Some(template),
                Err(error) => {
                    tracing::error!(error = kelvin_api::error::chain(&error), "template left out");
                    None
                }
            })
            .collect();
        found.sort_by_cached_key(Template::version);
        Ok(found)
    }
}

/// The version whose file this is.
pub(crate) fn version_of(file: &str) -> Option<TemplateVersion> {
    file.strip_suffix(".json")?.parse().ok()
}

/// Bytes that a file has on the disk.
pub(crate) fn on_disk(found: &fs::Metadata) -> u64 {
    // Source: stat(2), `st_blocks`: 512 bytes each, whatever the file system's are.
    std::os::unix::fs::MetadataExt::blocks(found) * 512
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every form that files of templates ever had, the newest last. They are never changed.
    const FORMS: [&str; 3] = [
        include_str!("../tests/templates/0.json"),
        include_str!("../tests/templates/1.json"),
        include_str!("../tests/templates/2.json"),
    ];

    #[test]
    fn every_form_is_read_and_one_without_a_build_is_written_as_before() {
        let read: Vec<Template> =
            FORMS.iter().map(|text| serde_json::from_str(text).expect("a template")).collect();
        assert_eq!(
            read[0],
            Template::plain("base".parse().unwrap(), "i".into(), read[0].guest(), read[0].shape)
        );
        // Byte for byte: a release before this one reads what an import writes.
        for (text, template) in FORMS.iter().zip(&read) {
            assert_eq!(serde_json::to_string_pretty(template).unwrap() + "\n", *text);
        }
        assert_eq!(read[1].version().to_string(), "web");
        assert_eq!(read[2].version().to_string(), "web@6f1c0a52-9d3e-4b7a-a1f0-0c2d4e6f8a9b");
        let newest = &read[2];
        assert_eq!(newest.service, Service::of(Some("serve".into()), Some("curl -f localhost".into())));
        assert_eq!(newest.env["PATH"], "/app/bin:/bin");
        assert!(serde_json::from_str::<Template>(&FORMS[1].replacen("\"user\"", "\"owner\"", 1)).is_err());
    }

    #[test]
    fn a_service_is_told_from_another() {
        let one = |start: &str, ready: &str| {
            let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            Service::of(some(start), some(ready)).map(|service| service.digest())
        };
        assert_eq!(one("", ""), None);
        let all = [one("a", ""), one("", "a"), one("a", "a"), one("b", "")];
        let different: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(different.len(), all.len());
    }
}
