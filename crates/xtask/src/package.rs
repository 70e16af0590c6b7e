//! `cargo xtask package`: a Debian package of everything that a machine needs to run Kelvin.
//!
//! ```text
//! target/package/     what is made for it: manual pages, completions, the guest, changelog, copyright
//! target/debian/      the package; what lies where in it is in crates/cli/Cargo.toml
//! packaging/          unit, configuration, maintainer scripts
//! ```
//!
//! The image of a template is not in it: half a gigabyte that apt has anyway. `kelvin-build-template` makes it on the
//! machine that runs it, with the recipes and the script that make it here.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::packages;
use crate::server::{self, Built};
use crate::{Result, busybox, cargo, files as fs, output, root, run, say, shared};

/// The version of cargo-deb that makes the package.
const CARGO_DEB: &str = "3.8.0";
/// Where shells look for completions of what packages install.
const COMPLETIONS: [(&str, &str); 3] = [("bash", "kelvin"), ("zsh", "_kelvin"), ("fish", "kelvin.fish")];

/// Builds everything and makes the package; its path.
pub fn package() -> Result<PathBuf> {
    let built = stage()?;
    let package = deb(&built, "1", &root().join("target/debian"), &[])?;
    say(&format!("{} KiB", fs::metadata(&package)?.len() >> 10));
    println!("{}", package.display());
    Ok(package)
}

/// Builds what goes into the package and lays it out.
pub fn stage() -> Result<Built> {
    packages::ensure_all(&["binutils", "dpkg-dev"])?;
    let built = server::prepare()?;
    let stage = root().join("target/package");
    let _ = fs::remove_dir_all(&stage);
    for directory in ["man", "completions", "guest"] {
        fs::create_dir_all(stage.join(directory))?;
    }
    run(Command::new(&built.binary).arg("man").arg(stage.join("man")))?;
    for (shell, name) in COMPLETIONS {
        let script = output(Command::new(&built.binary).args(["completion", shell]))?;
        fs::write(stage.join("completions").join(name), script)?;
    }
    fs::copy(&built.guest.kernel, stage.join("guest/vmlinuz"))?;
    fs::copy(&built.guest.initrd, stage.join("guest/initrd"))?;
    // What the image's `modprobe` finds; one file, whose tree no pattern of assets has to follow.
    let modules = built.guest.kernel.with_file_name("image");
    if modules.is_dir() {
        let archive = stage.join("guest/modules.tar");
        run(Command::new("tar")
            .arg("-C")
            .arg(&modules)
            .args(["--owner=0", "--group=0", "--sort=name", "-cf"])
            .arg(&archive)
            .arg("."))?;
    }
    let kernel = Kernel::of(&built.guest.kernel)?;
    let copyright = fs::read_to_string(root().join("packaging/copyright"))?;
    let busybox = busybox::source()?;
    let (source, version) = busybox.split_once(' ').ok_or("the guest's busybox names no source")?;
    let copyright = [
        ("@KERNEL@", kernel.said().as_str()),
        ("@VERSION@", &kernel.version),
        ("@BUSYBOX@", source),
        ("@BUSYBOX_VERSION@", version),
    ]
    .iter()
    .fold(copyright, |text, (name, value)| text.replace(name, value));
    fs::write(stage.join("copyright"), copyright)?;
    Ok(built)
}

/// Makes the package of what is staged in `directory`, with `revision` as Debian's part of the version; its path.
pub fn deb(built: &Built, revision: &str, directory: &Path, options: &[&str]) -> Result<PathBuf> {
    let stage = root().join("target/package");
    let version = format!("{}-{revision}", version(&built.binary)?);
    // Said of the commit, not of the time of the build: the same commit gives the same package.
    let date = Command::new("git")
        .current_dir(root())
        .args(["-c", "safe.directory=*", "log", "-1", "--format=%aD"])
        .output()
        .ok()
        .filter(|told| told.status.success())
        .map(|told| String::from_utf8_lossy(&told.stdout).trim().to_owned());
    // A tree without its history, or a machine without git.
    let date =
        date.filter(|date| !date.is_empty()).unwrap_or_else(|| "Thu, 01 Jan 2026 00:00:00 +0000".to_owned());
    fs::write(
        stage.join("changelog"),
        format!(
            "kelvin ({version}) unstable; urgency=medium\n\n  * See the history of the repository.\n\n -- {}  {}\n",
            field("maintainer")?,
            date
        ),
    )?;
    let package = directory.join(format!("kelvin_{version}_amd64.deb"));
    let mut make = Command::new(cargo_deb()?);
    make.current_dir(root())
        .args([
            "deb",
            "--quiet",
            "--no-build",
            "--strip",
            "--package",
            "kelvin-cli",
            "--deb-version",
            &version,
        ])
        .args(options)
        .arg("--output")
        .arg(&package);
    run(make.stdout(std::io::stderr()))?;
    Ok(package)
}

/// The version that the binary says it has.
fn version(binary: &Path) -> Result<String> {
    let said = output(Command::new(binary).arg("--version"))?;
    Ok(said.split_whitespace().nth(1).ok_or("kelvin --version says none")?.to_owned())
}

/// A field of cargo-deb's part of the manifest.
fn field(name: &str) -> Result<String> {
    let manifest = fs::read_to_string(root().join("crates/cli/Cargo.toml"))?;
    let value = manifest.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_prefix("= \""));
    let value = value.and_then(|rest| rest.strip_suffix('"'));
    Ok(value.ok_or_else(|| format!("crates/cli/Cargo.toml has no {name}"))?.to_owned())
}

fn cargo_deb() -> Result<PathBuf> {
    // By its version: another checkout may have another.
    let tools = shared().join(format!("tools/cargo-deb-{CARGO_DEB}"));
    let binary = tools.join("bin/cargo-deb");
    if !binary.exists() {
        say("installing cargo-deb (once)");
        let mut install = cargo();
        install
            .args(["install", "cargo-deb", "--locked", "--debug", "--version", CARGO_DEB, "--root"])
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            .arg(&tools);
        run(&mut install)?;
    }
    Ok(binary)
}

/// Which of Debian's kernels a file is, or of which sources: its licence wants that its source can be found.
struct Kernel {
    package: String,
    version: String,
}

impl Kernel {
    /// What was noted beside a kernel of our own; the name that another has of itself. Source: Linux,
    /// Documentation/arch/x86/boot.rst, `kernel_version`.
    fn of(path: &Path) -> Result<Self> {
        let source = path.with_file_name("source");
        if source.exists() {
            let noted = fs::read_to_string(&source)?;
            let (package, version) =
                noted.trim().split_once(' ').ok_or("the guest's kernel names no source")?;
            return Ok(Self { package: package.to_owned(), version: version.to_owned() });
        }
        let bytes = fs::read(path)?;
        let odd = || format!("{} is no kernel of Debian's", path.display());
        let at = bytes.get(0x20e..0x210).map(|field| usize::from(field[0]) | usize::from(field[1]) << 8);
        let text =
            at.and_then(|at| bytes.get(at + 0x200..)).and_then(|rest| rest.split(|byte| *byte == 0).next());
        let text = String::from_utf8_lossy(text.ok_or_else(odd)?).into_owned();
        Self::parse(&text).ok_or_else(|| odd().into())
    }

    /// As the package's copyright has it, after "The guest's kernel".
    fn said(&self) -> String {
        if self.package.starts_with("linux-source-") {
            let package = &self.package;
            return format!(
                "is built of {package} with Kelvin's guest/kernel/config, which it tells as /proc/config.gz."
            );
        }
        format!(
            "and the modules in its initial RAM disk are those of Debian's package {}, unchanged.",
            self.package
        )
    }

    fn parse(text: &str) -> Option<Self> {
        let release = text.split_whitespace().next()?;
        let version = text.split_once(" Debian ")?.1.split_whitespace().next()?;
        Some(Self { package: format!("linux-image-{release}"), version: version.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_names_its_package() {
        let said =
            "6.1.0-56-cloud-amd64 (kernel@example.org) #1 SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-11-16)";
        let kernel = Kernel::parse(said).unwrap();
        assert_eq!(kernel.package, "linux-image-6.1.0-56-cloud-amd64");
        assert_eq!(kernel.version, "6.1.192-2");
        assert!(kernel.said().contains("package linux-image-6.1.0-56-cloud-amd64, unchanged"));
        let own = Kernel { package: "linux-source-6.1".to_owned(), version: "6.1.192-2".to_owned() };
        assert!(own.said().contains("built of linux-source-6.1 with"), "{}", own.said());
        assert!(Kernel::parse("6.1.0 (somebody@example.org) #1 SMP").is_none());
    }

    #[test]
    fn the_maintainer_is_in_the_manifest() {
        assert!(field("maintainer").unwrap().contains('@'));
        assert!(field("no-such-field").is_err());
    }
}
