//! What the image says of its processes: `/etc/kelvin/image.json`, which the builder has written.
//!
//! Read when the agent starts, before each snapshot and, where there was none, at the activation. Nothing is written. Root
//! in the guest may have made anything of it: what is not root's alone, or odd, is ignored as a whole, with a line on the
//! console.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use kelvin_api::image::{DEFAULTS, ImageDefaults, MAX_DEFAULTS};

use crate::guest_file::read_owned;

/// Which file it is, and of when.
type Stamp = [i64; 7];

fn stamp(found: &Metadata) -> Stamp {
    [
        found.dev().cast_signed(),
        found.ino().cast_signed(),
        found.len().cast_signed(),
        found.mtime(),
        found.mtime_nsec(),
        found.ctime(),
        found.ctime_nsec(),
    ]
}

/// The file, as it was seen last.
#[derive(Debug)]
pub struct Defaults {
    path: PathBuf,
    /// The user id that it has to belong to.
    owner: u32,
    /// `None` before the first look; inside, `None` for no file.
    seen: Option<Option<Stamp>>,
}

impl Default for Defaults {
    fn default() -> Self {
        Self { path: PathBuf::from(DEFAULTS), owner: 0, seen: None }
    }
}

impl Defaults {
    /// What it says, when it is another than at the last look; nothing of what is odd.
    pub fn look(&mut self) -> Option<ImageDefaults> {
        let found = fs::symlink_metadata(&self.path).ok().map(|found| stamp(&found));
        if self.seen == Some(found) {
            return None;
        }
        self.seen = Some(found);
        if found.is_none() {
            return Some(ImageDefaults::default());
        }
        let read = read_owned(&self.path, MAX_DEFAULTS, self.owner)
            .map_err(|error| error.to_string())
            .and_then(|bytes| ImageDefaults::parse(&bytes).map_err(|error| error.to_string()));
        Some(read.unwrap_or_else(|error| {
            eprintln!("agent: {} is ignored: {error}", self.path.display());
            ImageDefaults::default()
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn it_is_read_when_it_has_changed_and_ignored_when_it_is_odd() {
        let path = std::env::temp_dir().join(format!("kelvin-image-{}.json", std::process::id()));
        let _ = fs::remove_file(&path);
        let owner = rustix::process::geteuid().as_raw();
        let mut defaults = Defaults { path: path.clone(), owner, seen: None };
        assert_eq!(defaults.look(), Some(ImageDefaults::default()));
        assert_eq!(defaults.look(), None, "there is still none");
        let write = |text: &str, mode| {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        };
        write(r#"{"workdir":"/app","user":"app"}"#, 0o644);
        let said = defaults.look().unwrap();
        assert_eq!((said.workdir.as_deref(), said.user.as_deref()), (Some("/app"), Some("app")));
        assert_eq!(defaults.look(), None);
        // A file that anybody may have written, one that is too long, one that is a link: as none.
        write(r#"{"workdir":"/app","user":"app"}"#, 0o666);
        assert_eq!(defaults.look(), Some(ImageDefaults::default()));
        write(&" ".repeat(MAX_DEFAULTS + 1), 0o644);
        assert_eq!(defaults.look(), Some(ImageDefaults::default()));
        write(r#"{"workdir":"/app","user":"app"}"#, 0o644);
        assert_ne!(defaults.look(), Some(ImageDefaults::default()));
        let elsewhere = path.with_extension("elsewhere");
        fs::rename(&path, &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        assert_eq!(defaults.look(), Some(ImageDefaults::default()));
        fs::remove_file(&elsewhere).unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(defaults.look(), Some(ImageDefaults::default()));
    }
}
