//! Installs Debian packages that are missing.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::{Result, output, run, say};

/// What building the guest and running Kelvin need beyond the Rust toolchain.
const NEEDED: &[&str] = &[
    "debian-archive-keyring",
    "e2fsprogs",
    "g++",
    "gcc",
    "iproute2",
    "kmod",
    "libc6-dev",
    "libnftables1",
    "mmdebstrap",
    "mount",
    "python3-venv",
    "qemu-system-x86",
    "util-linux",
    "xfsprogs",
];

/// A command run as root: through sudo where that is needed.
pub fn as_root(program: &str) -> Command {
    let root =
        std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
    if root {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

fn missing<'a>(needed: &[&'a str]) -> Vec<&'a str> {
    needed
        .iter()
        .copied()
        .filter(|package| {
            !Command::new("dpkg-query")
                .args(["-W", "-f", "${db:Status-Status}", package])
                .stderr(Stdio::null())
                .output()
                .is_ok_and(|output| output.stdout == b"installed")
        })
        .collect()
}

/// Installs what is missing.
pub fn ensure() -> Result<()> {
    ensure_all(NEEDED)
}

/// Installs what is missing of `needed`.
pub fn ensure_all(needed: &[&str]) -> Result<()> {
    let missing = missing(needed);
    if missing.is_empty() {
        return Ok(());
    }
    say(&format!("installing {}", missing.join(" ")));
    update()?;
    let mut install = as_root("apt-get");
    install.args(["install", "-y", "-q", "--no-install-recommends"]).args(missing);
    run(install.env("DEBIAN_FRONTEND", "noninteractive").stdout(std::io::stderr()))
}

/// Brings apt's lists up to date.
pub fn update() -> Result<()> {
    run(as_root("apt-get").args(["-q", "update"]).stdout(std::io::stderr()))
}

/// Does what asks apt for a package; once more with new lists when it fails, since they may name a version that is no longer
/// there.
pub fn with_lists(ask: impl Fn() -> Result<()>) -> Result<()> {
    // Without lists apt knows no package at all.
    debian_sources()?;
    if ask().is_ok() {
        return Ok(());
    }
    update()?;
    ask()
}

/// This machine's Debian sources as lines of a `sources.list`, so that no registry's name stands here.
pub fn debian_sources() -> Result<String> {
    let list = || -> Result<String> {
        let mut lines: Vec<String> = output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "deb $(REPO_URI) $(RELEASE) $(COMPONENT)",
            "Identifier: Packages",
            "Origin: Debian",
            "Architecture: amd64",
        ]))?
        .lines()
        .map(str::to_owned)
        .collect();
        lines.sort();
        lines.dedup();
        Ok(lines.join("\n"))
    };
    let lines = list()?;
    if !lines.is_empty() {
        return Ok(lines);
    }
    // The lists were never fetched.
    update()?;
    let lines = list()?;
    if lines.is_empty() { Err("apt knows no Debian source".into()) } else { Ok(lines) }
}

/// The name of this machine's release of Debian.
pub fn codename() -> Result<String> {
    let release = std::fs::read_to_string("/etc/os-release")?;
    let name = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(name.ok_or("/etc/os-release names no suite")?.to_owned())
}

/// Runs `command` with `text` as its standard input.
pub fn feed(command: &mut Command, text: &str) -> Result<()> {
    let mut child = command.stdin(Stdio::piped()).spawn().map_err(|error| format!("{command:?}: {error}"))?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(text.as_bytes())?;
    }
    let status = child.wait()?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}").into()) }
}
