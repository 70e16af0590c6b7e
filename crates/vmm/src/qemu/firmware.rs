//! The firmware of `microvm`: qboot, which starts a kernel that QEMU was given without option ROMs.
//!
//! QEMU asks for `bios-microvm.bin` unless a firmware is named. Debian 12 makes that name a link to `qboot.rom`; Debian 13
//! has SeaBIOS there, which finds nothing to boot without option ROMs. So qboot is named where it would not be taken by
//! itself, and only there: what is named is part of the layout, and with it of every snapshot's identity.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::program::{PROGRAM, unusable};
use crate::Error;

const QBOOT: &str = "qboot.rom";
/// Source: QEMU, `hw/i386/microvm.c`, of a machine with ACPI.
const DEFAULT: &str = "bios-microvm.bin";

/// What was found.
#[derive(Debug, PartialEq, Eq)]
pub struct Firmware {
    /// The file.
    pub path: PathBuf,
    /// Whether QEMU takes the same by itself.
    pub is_default: bool,
}

impl Firmware {
    /// The arguments that make QEMU use it.
    pub fn arguments(&self) -> &'static [&'static str] {
        if self.is_default { &[] } else { &["-bios", QBOOT] }
    }
}

/// Looks where the installed QEMU looks.
///
/// # Errors
/// `Unusable` when there is no qboot, or when QEMU does not say where it looks.
pub fn find() -> Result<Firmware, Error> {
    find_in(&listed()?)
}

/// The directories in which the installed QEMU looks for firmware and that are there, absolute and without links.
///
/// # Errors
/// `Unusable` when QEMU does not say where it looks.
pub fn directories() -> Result<Vec<PathBuf>, Error> {
    let there = listed()?.into_iter().filter_map(|path| path.canonicalize().ok());
    Ok(there.filter(|path| path.is_dir()).collect())
}

fn listed() -> Result<Vec<PathBuf>, Error> {
    let output = Command::new(PROGRAM)
        .args(["-L", "help"])
        .output()
        .map_err(|error| unusable(format!("asking for its firmware directories: {error}")))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().filter(|line| line.starts_with('/')).map(Into::into).collect())
}

fn find_in(directories: &[PathBuf]) -> Result<Firmware, Error> {
    let first =
        |name: &str| directories.iter().map(|directory| directory.join(name)).find(|path| path.is_file());
    let Some(path) = first(QBOOT) else {
        let looked: Vec<_> = directories.iter().map(|path| path.display().to_string()).collect();
        return Err(unusable(format!(
            "its firmware {QBOOT} is in none of {}; install the package qemu-system-data",
            if looked.is_empty() { "no directory at all".to_owned() } else { looked.join(", ") }
        )));
    };
    let is_default = match first(DEFAULT) {
        Some(default) => {
            same(&path, &default).map_err(|source| Error::Io { what: "reading QEMU's firmware", source })?
        }
        None => false,
    };
    Ok(Firmware { path, is_default })
}

fn same(one: &Path, other: &Path) -> io::Result<bool> {
    Ok(std::fs::read(one)? == std::fs::read(other)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Debian 12 and 13 have, and what is broken.
    #[test]
    fn qboot_is_named_where_another_firmware_would_be_taken() {
        let top = tempfile::tempdir().unwrap();
        let [qemu, seabios] = ["qemu", "seabios"].map(|name| top.path().join(name));
        let directories = [qemu.clone(), seabios.clone()];
        for directory in &directories {
            std::fs::create_dir(directory).unwrap();
        }
        std::fs::write(seabios.join(DEFAULT), "SeaBIOS").unwrap();
        let refused = find_in(&directories).unwrap_err().to_string();
        assert!(refused.contains("qemu-system-data") && refused.contains("seabios"), "{refused}");

        std::fs::write(qemu.join(QBOOT), "qboot").unwrap();
        let named = find_in(&directories).unwrap();
        assert_eq!(named.path, qemu.join(QBOOT));
        assert_eq!(named.arguments(), ["-bios", QBOOT], "Debian 13");

        std::os::unix::fs::symlink(QBOOT, qemu.join(DEFAULT)).unwrap();
        assert!(find_in(&directories).unwrap().arguments().is_empty(), "Debian 12");

        std::fs::remove_file(seabios.join(DEFAULT)).unwrap();
        std::fs::remove_file(qemu.join(DEFAULT)).unwrap();
        assert_eq!(find_in(&directories).unwrap().arguments(), ["-bios", QBOOT], "no default at all");
    }
}
