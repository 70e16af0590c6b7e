//! The QEMU that is installed: where it lies and which version it is. Nothing is written.

use std::path::{Path, PathBuf};

use crate::Error;

pub(super) const PROGRAM: &str = "qemu-system-x86_64";

/// The build of the installed QEMU, as in identities.
///
/// # Errors
/// `Unusable` when it is missing or older than 7.2.
pub fn build() -> Result<String, Error> {
    look().map(|(_, build)| build)
}

pub(super) fn unusable(reason: String) -> Error {
    Error::Unusable { program: PROGRAM.to_owned(), reason }
}

pub(super) fn look() -> Result<((u32, u32), String), Error> {
    let output = std::process::Command::new(PROGRAM)
        .arg("--version")
        .output()
        .map_err(|error| unusable(format!("{error}; install the package qemu-system-x86")))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let (version, package) = version(&text).ok_or_else(|| unusable(format!("no version in {text:?}")))?;
    if version < (7, 2) {
        return Err(unusable(format!("version {}.{} is older than 7.2", version.0, version.1)));
    }
    Ok((version, package))
}

/// QEMU in the search path, absolute.
pub(super) fn find_program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&path).map(|directory| directory.join(PROGRAM));
    found.into_iter().find(|path| path.is_file())?.canonicalize().ok()
}

/// The directory of the modules of `program`, which is in `<prefix>/bin`, as distributions place them: Debian and Ubuntu,
/// Fedora, Arch.
pub(super) fn find_modules(program: &Path) -> Option<PathBuf> {
    let prefix = program.parent()?.parent()?;
    let named = ["lib/x86_64-linux-gnu/qemu", "lib64/qemu", "lib/qemu"].map(|name| prefix.join(name));
    named.into_iter().find(|path| path.is_dir())
}

/// `(major, minor)` and the whole version with the package's. Example of the text:
/// `QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)`.
fn version(text: &str) -> Option<((u32, u32), String)> {
    let line = text.lines().next()?;
    let (_, rest) = line.split_once("version ")?;
    let mut numbers = rest.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    Some(((numbers.next()?.ok()?, numbers.next()?.ok()?), rest.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_qemu_prints() {
        let (version, build) =
            version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright\n").unwrap();
        assert_eq!(version, (7, 2));
        assert_eq!(build, "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)");
        assert!(super::version("not qemu").is_none());
    }
}
