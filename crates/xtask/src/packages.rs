//! Installs packages of the distribution that are missing.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::distribution::Distribution;
use crate::{Result, files as fs, outcome, output, run, say, shown, spawn};

/// What building the guest and running Kelvin need beyond the Rust toolchain, and the keyring of the distribution.
pub const NEEDED: &[&str] = &[
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

/// Whether this process is root.
pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0)
}

/// Sends the signal `name` (`TERM`, `KILL`) to the process `pid`, with rights that may be more than ours. The shell's own
/// `kill`: a minimal system has no program of that name.
pub fn signal(name: &str, pid: &str) -> Result<()> {
    run(as_root("sh").args(["-c", "kill -s \"$1\" \"$2\"", "sh", name, pid]))
}

/// A command run as root: through sudo where that is needed.
pub fn as_root(program: &str) -> Command {
    if is_root() {
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
            let mut ask = Command::new("dpkg-query");
            ask.args(["-W", "-f", "${db:Status-Status}", package]);
            !outcome(&mut ask).is_ok_and(|output| output.stdout == b"installed")
        })
        .collect()
}

/// Installs what is missing.
pub fn ensure() -> Result<()> {
    let keyring = Distribution::here()?.family().keyring();
    ensure_all(&[NEEDED, &[keyring]].concat())
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
pub fn with_lists<T>(ask: impl Fn() -> Result<T>) -> Result<T> {
    // Without lists apt knows no package at all.
    debian_sources()?;
    if let Ok(answer) = ask() {
        return Ok(answer);
    }
    update()?;
    ask()
}

/// The files of `packages` that apt would download: name, which has the version, and digest of each; in order.
pub fn files_to_download(packages: &[impl AsRef<std::ffi::OsStr>]) -> Result<Vec<String>> {
    // 'URI' NAME SIZE DIGEST
    let uris = output(Command::new("apt-get").args(["-q", "download", "--print-uris"]).args(packages))?;
    let mut files: Vec<String> = uris
        .lines()
        .filter(|line| line.starts_with('\''))
        .filter_map(|line| {
            let mut words = line.split_whitespace().skip(1);
            Some(format!("{} {}", words.next()?, words.nth(1)?))
        })
        .collect();
    files.sort();
    if files.len() == packages.len() {
        return Ok(files);
    }
    let names: Vec<_> = packages.iter().map(|name| name.as_ref().to_string_lossy()).collect();
    Err(format!(
        "apt says where to get {} of the {} packages {}",
        files.len(),
        packages.len(),
        names.join(", ")
    )
    .into())
}

/// This machine's sources of its distribution as lines of a `sources.list`, so that no registry's name stands here.
pub fn debian_sources() -> Result<String> {
    let origin = Distribution::here()?.family().origin();
    let list = || -> Result<String> {
        let mut lines: Vec<String> = output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "deb $(REPO_URI) $(RELEASE) $(COMPONENT)",
            "Identifier: Packages",
            &format!("Origin: {origin}"),
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
    if lines.is_empty() {
        Err(format!("apt knows no source of {origin}: see /etc/apt/sources.list.d").into())
    } else {
        Ok(lines)
    }
}

/// The name of this machine's release.
pub fn codename() -> Result<String> {
    let name = Distribution::here()?.codename;
    if name.is_empty() { Err("/etc/os-release has no VERSION_CODENAME".into()) } else { Ok(name) }
}

/// Runs `command` with `text` as its standard input.
pub fn feed(command: &mut Command, text: &str) -> Result<()> {
    let mut child = spawn(command.stdin(Stdio::piped()))?;
    // What ends without reading its input says why itself.
    let fed = child.stdin.take().map_or(Ok(()), |mut input| input.write_all(text.as_bytes()));
    let status = child.wait().map_err(|error| format!("waiting for {}: {error}", shown(command)))?;
    if status.success()
        && let Err(error) = fed
    {
        return Err(format!("writing to {}: {error}", shown(command)).into());
    }
    if status.success() { Ok(()) } else { Err(format!("{}: {status}", shown(command)).into()) }
}
