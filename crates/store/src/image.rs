//! Images (root file systems), guests (kernel and initial RAM disk) and templates that join them.

use std::fs;
use std::path::PathBuf;

use kelvin_api::id::TemplateName;
use kelvin_api::units::Shape;
use serde::{Deserialize, Serialize};

use crate::hash::FileDigest;
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

    pub(crate) fn template_path(&self, name: &TemplateName) -> PathBuf {
        self.root.join("templates").join(format!("{name}.json"))
    }

    /// What the file system says of a template's file: it changes when the template is imported again.
    ///
    /// # Errors
    /// `Missing` when there is none, `Io` when that is not known.
    pub fn template_stamp(&self, name: &TemplateName) -> Result<TemplateStamp, Error> {
        use std::os::unix::fs::MetadataExt;
        let path = self.template_path(name);
        let found = fs::metadata(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::Missing { kind: "template", name: name.to_string() },
            _ => io_error("reading", &path)(error),
        })?;
        Ok(TemplateStamp { inode: found.ino(), mtime: (found.mtime(), found.mtime_nsec()) })
    }

    /// The template called `name`.
    ///
    /// # Errors
    /// `Missing` when there is none, `Manifest` when it does not parse.
    pub fn template(&self, name: &TemplateName) -> Result<Template, Error> {
        match read_json(&self.template_path(name)) {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Err(Error::Missing { kind: "template", name: name.to_string() })
            }
            other => other,
        }
    }

    /// Every template, by name. One that does not parse is reported and left out.
    ///
    /// # Errors
    /// `Io` when the directory cannot be listed.
    pub fn templates(&self) -> Result<Vec<Template>, Error> {
        let mut found: Vec<Template> = names::<String>(&self.root.join("templates"))?
            .iter()
            .filter_map(|file| file.strip_suffix(".json")?.parse().ok())
            .filter_map(|name| match self.template(&name) {
                Ok(template) => Some(template),
                Err(error) => {
                    tracing::error!(error = kelvin_api::error::chain(&error), "template left out");
                    None
                }
            })
            .collect();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }
}
