//! The QEMU that emulates a KVM host.
//!
//! This machine's own for one processor. For more, `.cache/kvm-host/qemu/`: a newer package of Debian's and what it needs,
//! unpacked and not installed, run by their own dynamic linker; made under another name and renamed, so that what has its
//! name is whole.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::packages::{self, as_root, debian_sources, feed};
use crate::{Result, files as fs, run, say};

/// Debian's release, and the newer packages for it: QEMU 10.2 or later. Before that, two processors of an emulated KVM
/// host stand still for ever within a minute of Firecracker; with it they last for some minutes.
const SUITES: [&str; 2] = ["trixie", "trixie-backports"];

/// The words that the command of a QEMU begins with, for a host with that many processors.
pub fn words(directory: &Path, processors: u32) -> Result<Vec<OsString>> {
    if processors == 1 { Ok(vec!["qemu-system-x86_64".into()]) } else { Ok(newer(&ensure(directory)?)) }
}

/// Unpacks the newer one in `directory` when it is not there.
fn ensure(directory: &Path) -> Result<PathBuf> {
    let done = directory.join("qemu");
    if !done.exists() {
        say(&format!("fetching QEMU from {}", SUITES[1]));
        let fresh = directory.join("qemu.new");
        run(as_root("rm").args(["-rf", "--one-file-system"]).arg(&fresh))?;
        let mut unpack = as_root("mmdebstrap");
        unpack
            .args(["--quiet", "--variant=extract", "--include=qemu-system-x86"])
            .args(["--aptopt=APT::Install-Recommends false", "--skip=output/dev"])
            .arg(format!("--aptopt=APT::Default-Release \"{}\"", SUITES[1]))
            .args([SUITES[0].as_ref(), fresh.as_os_str(), "-".as_ref()]);
        feed(&mut unpack, &sources()?)?;
        fs::rename(&fresh, &done)?;
    }
    Ok(done)
}

/// Its dynamic linker, its libraries, itself, its firmware.
fn newer(tree: &Path) -> Vec<OsString> {
    let libraries = tree.join("usr/lib/x86_64-linux-gnu");
    vec![
        libraries.join("ld-linux-x86-64.so.2").into(),
        "--library-path".into(),
        libraries.into(),
        tree.join("usr/bin/qemu-system-x86_64").into(),
        "-L".into(),
        tree.join("usr/share/qemu").into(),
        "-L".into(),
        tree.join("usr/share/seabios").into(),
    ]
}

/// Lines of a `sources.list` for [`SUITES`], from where this machine's own release comes.
fn sources() -> Result<String> {
    let release = packages::codename()?;
    let known = debian_sources()?;
    let own = known.lines().find_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
        ["deb", from, suite, "main"] if suite == release => Some(from.to_owned()),
        _ => None,
    });
    let from = own.ok_or_else(|| format!("apt has no source of {release} main"))?;
    Ok(SUITES.map(|suite| format!("deb {from} {suite} main\n")).concat())
}
