//! What a command needs of this machine, looked at before anything is compiled or installed.
//!
//! Facts are gathered by [`Facts::gather`], which changes nothing; [`problems`] is pure: facts in, problems out. All are
//! told at once. What stops is what would fail later, after minutes; what Kelvin works without is a warning that says what
//! is lost.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::distribution::{Distribution, Support};
use crate::{Result, cache, files as fs, is_prebuilt, outcome, packages, root, say, shared};

/// Set to go on, on a machine that is not supported.
const ANY_HOST: &str = "KELVIN_ANY_HOST";

/// What has to be free where `.cache` and `target` are before anything is built, in MiB, measured on Debian 12 and 13 and
/// rounded up; what is there of it already is counted in. Each is what the command writes, not what it leaves: images are
/// made under another name.
const DISK_MIB: [(&str, u64); 7] = [
    ("demo", 4 << 10),
    ("up", 4 << 10),
    ("bench", 4 << 10),
    ("build", 4 << 10),
    ("kernel", 2 << 10),
    ("soak", 12 << 10),
    ("test", 12 << 10),
];
/// To compile and to run a machine of 512 MiB, in MiB.
const MEMORY_MIB: u64 = 1536;
/// What compiling and machines have without waiting for each other, in MiB.
const COMFORT_MIB: u64 = 4096;
/// What the programs of Debian are called that install the others.
const PROGRAMS: [&str; 3] = ["apt-get", "apt-cache", "dpkg-query"];

/// What was found of a way to be root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rights {
    /// This is root.
    Root,
    /// `sudo` asks for nothing.
    Sudo,
    /// Why there is none.
    None(String),
}

/// A part of the running kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Feature {
    /// File systems in files.
    Loop,
    /// Files that can be cloned.
    Xfs,
    /// A network for each machine.
    Namespaces,
    /// Its link.
    Tun,
    /// Its rules.
    Nftables,
}

impl Feature {
    /// What it is, what is lost without it, what to do.
    fn words(self) -> (&'static str, &'static str, &'static str) {
        let network = "sandboxes have no network; `--no-network` works";
        match self {
            Self::Loop => (
                "loop devices",
                "the data directory cannot be made",
                "modprobe loop; a container needs /dev/loop-control and the right to mount",
            ),
            Self::Xfs => (
                "the file system XFS",
                "every disk is copied instead of cloned",
                "modprobe xfs, or keep the tree on an XFS or Btrfs",
            ),
            Self::Namespaces => ("network namespaces", network, "a kernel with CONFIG_NET_NS"),
            Self::Tun => ("/dev/net/tun", network, "modprobe tun; a container needs the device"),
            Self::Nftables => ("nftables", network, "modprobe nf_tables"),
        }
    }
}

/// What is known of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// As Rust names it.
    pub architecture: String,
    /// The distribution, or why it is not known.
    pub distribution: std::result::Result<Distribution, String>,
    /// Whether [`ANY_HOST`] is set.
    pub any_host: bool,
    /// A way to be root.
    pub rights: Rights,
    /// Those of [`PROGRAMS`] that are not there.
    pub missing_programs: Vec<&'static str>,
    /// What the kernel does not have.
    pub missing_features: Vec<Feature>,
    /// Where files are made, what is free there and what is there already of what a command makes, in MiB.
    pub disk: (PathBuf, u64, u64),
    /// What can be had without swapping, in MiB.
    pub memory_mib: u64,
    /// `1.95.0`, as the compiler says, or why it does not.
    pub compiler: std::result::Result<String, String>,
    /// What the workspace asks for.
    pub wanted_compiler: String,
    /// The version of a QEMU that is installed.
    pub qemu: Option<String>,
}

/// Something that a command needs and has not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Whether the command cannot work.
    pub stops: bool,
    /// What was looked at, what was found, what to do.
    pub text: String,
}

/// What is wrong with `facts` for `command`.
pub fn problems(command: &str, facts: &Facts) -> Vec<Problem> {
    let mut found = Vec::new();
    let mut add = |stops: bool, what: &str, is: &str, remedy: &str| {
        found.push(Problem { stops, text: format!("{what}: {is}; {remedy}") });
    };
    if facts.architecture != "x86_64" {
        let is = format!("{}, but the guests are x86_64", facts.architecture);
        add(true, "processor", &is, "use an x86_64 machine");
    }
    let another = format!("use Debian 12 or 13, or set {ANY_HOST}=1 and see how far it comes");
    let has_qemu = facts.qemu.as_deref().and_then(numbers).is_some_and(|version| version >= vec![7, 2]);
    match &facts.distribution {
        Err(why) => add(!facts.any_host, "distribution", why, &another),
        Ok(here) => match here.support() {
            Support::Tested => {}
            Support::Untested => {
                add(
                    false,
                    "distribution",
                    &format!("{here} should work and is not tested"),
                    "tell us how it went",
                );
            }
            Support::OldQemu if has_qemu => {
                add(
                    false,
                    "distribution",
                    &format!("{here} should work with this newer QEMU and is not tested"),
                    "tell us",
                );
            }
            Support::OldQemu => {
                let is = format!("{here} has QEMU 6.2, and Kelvin needs 7.2 or newer");
                let remedy = format!(
                    "use Ubuntu 24.04, put a newer qemu-system-x86_64 into PATH, or set {ANY_HOST}=1"
                );
                add(!facts.any_host, "distribution", &is, &remedy);
            }
            Support::Unknown => {
                let is =
                    format!("{here}; supported are Debian 12 and 13, Ubuntu 24.04 and 26.04 should work");
                add(!facts.any_host, "distribution", &is, &another);
            }
        },
    }
    if let Rights::None(why) = &facts.rights {
        add(true, "rights", why, "run as root, or let sudo run commands without a password");
    }
    if !facts.missing_programs.is_empty() {
        let is = format!("{} not found in PATH", facts.missing_programs.join(", "));
        add(true, "programs", &is, "they install what is missing: the packages apt and dpkg have them");
    }
    for feature in &facts.missing_features {
        let (what, lost, remedy) = feature.words();
        add(*feature == Feature::Loop, what, &format!("not in this kernel: {lost}"), remedy);
    }
    let (place, free, there) = &facts.disk;
    let needed = DISK_MIB.iter().find(|(name, _)| *name == command).map_or(0, |(_, mib)| *mib);
    if free + there < needed {
        let is = format!(
            "{free} MiB free in {}, {command} writes about {needed} MiB ({there} MiB of that are there)",
            place.display()
        );
        add(
            true,
            "disk",
            &is,
            "free some, or move the tree: `cargo clean` and removing .cache give back what is old",
        );
    }
    if facts.memory_mib < MEMORY_MIB {
        let is = format!("{} MiB available, at least {MEMORY_MIB} are needed", facts.memory_mib);
        add(true, "memory", &is, "end something, or add some");
    } else if facts.memory_mib < COMFORT_MIB {
        let is = format!("{} MiB available: few machines at a time", facts.memory_mib);
        add(false, "memory", &is, &format!("{COMFORT_MIB} MiB are comfortable"));
    }
    match &facts.compiler {
        Err(why) => add(true, "Rust compiler", why, "install the Rust toolchain"),
        Ok(version) if numbers(version) < numbers(&facts.wanted_compiler) => {
            let is = format!("rustc {version}, and {} or newer is needed", facts.wanted_compiler);
            add(true, "Rust compiler", &is, "rustup update");
        }
        Ok(_) => {}
    }
    found
}

/// The numbers that a version begins with.
fn numbers(version: &str) -> Option<Vec<u32>> {
    let first = version.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
    first.split('.').map(|number| number.parse().ok()).collect()
}

/// Looks at this machine for `command`, and tells everything that is wrong. Only for commands that build or run something,
/// and where they are built: what runs elsewhere with what was built is checked there by what it does.
pub fn check(command: &str) -> Result<()> {
    if is_prebuilt() || !DISK_MIB.iter().any(|(name, _)| *name == command) {
        return Ok(());
    }
    let found = problems(command, &Facts::gather()?);
    for problem in found.iter().filter(|problem| !problem.stops) {
        say(&format!("warning: {}", problem.text));
    }
    let stops: Vec<_> = found.iter().filter(|problem| problem.stops).map(|problem| &*problem.text).collect();
    if stops.is_empty() {
        return Ok(());
    }
    Err(format!("this machine cannot run `cargo xtask {command}`:\n  - {}", stops.join("\n  - ")).into())
}

impl Facts {
    /// Looks, and changes nothing.
    fn gather() -> Result<Self> {
        let manifest = fs::read_to_string(root().join("Cargo.toml"))?;
        let wanted = manifest.lines().find_map(|line| line.strip_prefix("rust-version = "));
        Ok(Self {
            architecture: std::env::consts::ARCH.to_owned(),
            distribution: Distribution::here().map_err(|error| error.to_string()),
            any_host: std::env::var_os(ANY_HOST).is_some(),
            rights: rights(),
            missing_programs: PROGRAMS.into_iter().filter(|program| !in_path(program)).collect(),
            missing_features: missing_features(),
            disk: disk()?,
            memory_mib: memory_mib()?,
            compiler: compiler(),
            wanted_compiler: wanted.unwrap_or_default().trim_matches('"').to_owned(),
            qemu: qemu(),
        })
    }
}

fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

fn rights() -> Rights {
    if packages::is_root() {
        return Rights::Root;
    }
    if !in_path("sudo") {
        return Rights::None("this is not root, and there is no sudo".to_owned());
    }
    // `-n`: never a question.
    match outcome(Command::new("sudo").args(["-n", "true"]).stdin(Stdio::null())) {
        Ok(output) if output.status.success() => Rights::Sudo,
        Ok(output) => {
            Rights::None(format!("this is not root, and {}", String::from_utf8_lossy(&output.stderr).trim()))
        }
        Err(error) => Rights::None(format!("this is not root, and {error}")),
    }
}

fn missing_features() -> Vec<Feature> {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let file_systems = text("/proc/filesystems");
    let all = [
        (Feature::Loop, Path::new("/dev/loop-control").exists() || has_module("loop")),
        (Feature::Xfs, file_systems.lines().any(|line| line.trim() == "xfs") || has_module("xfs")),
        (Feature::Namespaces, Path::new("/proc/self/ns/net").exists()),
        (Feature::Tun, Path::new("/dev/net/tun").exists() || has_module("tun")),
        (Feature::Nftables, netfilter_listens(&text("/proc/net/netlink")) || has_module("nf_tables")),
    ];
    all.into_iter().filter(|(_, there)| !there).map(|(feature, _)| feature).collect()
}

/// Whether the running kernel has a module that can be loaded, or has it built in.
fn has_module(name: &str) -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let directory = Path::new("/lib/modules").join(release.trim());
    ["modules.dep", "modules.builtin"].iter().any(|file| {
        let text = fs::read_to_string(directory.join(file)).unwrap_or_default();
        text.lines().any(|line| {
            let path = line.split(':').next().unwrap_or_default();
            let file = path.rsplit('/').next().unwrap_or_default();
            file.split(".ko").next().is_some_and(|found| found.replace('-', "_") == name)
        })
    })
}

/// Whether the kernel has its end of the protocol of nftables open, in the text of `/proc/net/netlink`: 12, with port 0.
/// Source: netlink(7).
fn netfilter_listens(text: &str) -> bool {
    text.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        matches!(words[..], [_, "12", "0", ..])
    })
}

/// Where files are made, what is free there and what is there, in MiB.
fn disk() -> Result<(PathBuf, u64, u64)> {
    // Programs of coreutils: the standard library cannot ask.
    let free = crate::output(Command::new("df").args(["--output=avail", "-BM"]).arg(root()))?;
    let free = free.lines().nth(1).unwrap_or_default().trim().trim_end_matches('M').parse()?;
    let there: Vec<PathBuf> =
        [cache(), shared(), root().join("target")].into_iter().filter(|path| path.exists()).collect();
    let mut mib = 0;
    if !there.is_empty() {
        // Its status does not count: files may go away while it looks, and some may be root's alone.
        let used = Command::new("du").args(["-sxm"]).args(&there).output();
        let used = used.map_err(|error| format!("du: {error}"))?;
        let used = String::from_utf8_lossy(&used.stdout).into_owned();
        mib = used.lines().filter_map(|line| line.split_whitespace().next()?.parse::<u64>().ok()).sum();
    }
    Ok((root(), free, mib))
}

fn memory_mib() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 = line.and_then(|rest| rest.split_whitespace().next()).unwrap_or_default().parse()?;
    Ok(kib >> 10)
}

fn compiler() -> std::result::Result<String, String> {
    let program = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = outcome(Command::new(program).arg("--version")).map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match text.strip_prefix("rustc ").and_then(|rest| rest.split_whitespace().next()) {
        Some(version) => Ok(version.to_owned()),
        None => {
            Err(format!("`rustc --version` says {text:?}{}", String::from_utf8_lossy(&output.stderr).trim()))
        }
    }
}

fn qemu() -> Option<String> {
    if !in_path("qemu-system-x86_64") {
        return None;
    }
    let output = outcome(Command::new("qemu-system-x86_64").arg("--version")).ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Some(text.split_once("version ")?.1.split_whitespace().next()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(id: &str, version: &str) -> std::result::Result<Distribution, String> {
        Ok(Distribution { id: id.to_owned(), version: version.to_owned(), codename: "name".to_owned() })
    }

    fn good() -> Facts {
        Facts {
            architecture: "x86_64".to_owned(),
            distribution: release("debian", "13"),
            any_host: false,
            rights: Rights::Root,
            missing_programs: Vec::new(),
            missing_features: Vec::new(),
            disk: ("/tree".into(), 40 << 10, 0),
            memory_mib: 8192,
            compiler: Ok("1.95.0".to_owned()),
            wanted_compiler: "1.95".to_owned(),
            qemu: None,
        }
    }

    /// A change of what is good, and what is to be said: `!` for what stops, words of the text.
    type Case = (fn(&mut Facts), &'static [&'static str]);

    #[test]
    #[allow(clippy::too_many_lines, reason = "a table of cases")]
    fn what_is_wrong_is_told_with_what_to_do() {
        let cases: &[Case] = &[
            (|_| {}, &[]),
            (|facts| facts.distribution = release("debian", "12"), &[]),
            (|facts| facts.architecture = "aarch64".into(), &["! processor: aarch64"]),
            (
                |facts| facts.distribution = release("ubuntu", "24.04"),
                &["distribution: ubuntu 24.04 should work"],
            ),
            (
                |facts| facts.distribution = release("ubuntu", "26.04"),
                &["distribution: ubuntu 26.04 should work"],
            ),
            (
                |facts| facts.distribution = release("ubuntu", "22.04"),
                &["! distribution: ubuntu 22.04 has QEMU 6.2"],
            ),
            (
                |facts| {
                    facts.distribution = release("ubuntu", "22.04");
                    facts.qemu = Some("9.2.1".to_owned());
                },
                &["distribution: ubuntu 22.04 should work with this newer QEMU"],
            ),
            (
                |facts| {
                    facts.distribution = release("ubuntu", "22.04");
                    facts.qemu = Some("6.2.0".to_owned());
                },
                &["! distribution: ubuntu 22.04 has QEMU 6.2"],
            ),
            (
                |facts| facts.distribution = release("fedora", "44"),
                &["! distribution: fedora 44; supported are Debian 12"],
            ),
            (|facts| facts.distribution = Err("no file".into()), &["! distribution: no file"]),
            (
                |facts| {
                    facts.distribution = release("fedora", "44");
                    facts.any_host = true;
                },
                &["distribution: fedora 44"],
            ),
            (|facts| facts.rights = Rights::Sudo, &[]),
            (|facts| facts.rights = Rights::None("no sudo".into()), &["! rights: no sudo; run as root"]),
            (|facts| facts.missing_programs = vec!["apt-get"], &["! programs: apt-get not found"]),
            (
                |facts| facts.missing_features = vec![Feature::Xfs],
                &["the file system XFS: not in this kernel: every disk"],
            ),
            (|facts| facts.missing_features = vec![Feature::Loop], &["! loop devices"]),
            (
                |facts| facts.missing_features = vec![Feature::Tun],
                &["/dev/net/tun: not in this kernel: sandboxes"],
            ),
            (|facts| facts.missing_features = vec![Feature::Nftables], &["nftables: not in this kernel"]),
            (|facts| facts.missing_features = vec![Feature::Namespaces], &["network namespaces"]),
            (|facts| facts.disk.1 = 3 << 10, &["! disk: 3072 MiB free in /tree, demo writes about"]),
            (|facts| facts.disk = ("/tree".into(), 2 << 10, 3 << 10), &[]),
            (|facts| facts.memory_mib = 1024, &["! memory: 1024 MiB available"]),
            (|facts| facts.memory_mib = 2048, &["memory: 2048 MiB available: few"]),
            (
                |facts| facts.compiler = Ok("1.94.1".into()),
                &["! Rust compiler: rustc 1.94.1, and 1.95 or newer"],
            ),
            (|facts| facts.compiler = Ok("1.101.0-nightly".into()), &[]),
            (|facts| facts.compiler = Err("cannot run rustc".into()), &["! Rust compiler: cannot run rustc"]),
            // Everything at once.
            (
                |facts| {
                    facts.rights = Rights::None("no sudo".into());
                    facts.memory_mib = 1;
                    facts.disk.1 = 0;
                },
                &["! rights", "! disk", "! memory"],
            ),
        ];
        for (change, expected) in cases {
            let mut facts = good();
            change(&mut facts);
            let found = problems("demo", &facts);
            let texts: Vec<_> = found
                .iter()
                .map(|found| format!("{}{}", if found.stops { "! " } else { "" }, found.text))
                .collect();
            assert_eq!(texts.len(), expected.len(), "{facts:?}: {texts:?}");
            for (text, expected) in texts.iter().zip(*expected) {
                assert!(text.starts_with(expected), "{text:?} does not begin with {expected:?}");
            }
            for text in texts {
                assert!(text.contains("; "), "{text:?} says nothing of what to do");
            }
        }
    }

    #[test]
    fn each_command_has_its_own_need_of_the_disk() {
        let facts = Facts { disk: ("/tree".into(), 7 << 10, 0), ..good() };
        assert!(problems("demo", &facts).is_empty());
        assert_eq!(problems("test", &facts).len(), 1);
    }

    #[test]
    fn netfilter_is_seen_in_what_the_kernel_lists() {
        let text = "sk               Eth Pid        Groups\n0000000000000000 0   0          00000000\n\
                    0000000000000000 12  0          00000000\n";
        assert!(netfilter_listens(text));
        assert!(!netfilter_listens(&text.replace(" 12  0 ", " 12  77 ")));
        assert!(!netfilter_listens(
            "sk               Eth Pid        Groups\n0000000000000000 0   0          00000000\n"
        ));
    }

    /// This machine runs the tests, so nothing stops it.
    #[test]
    fn this_machine_is_looked_at() {
        let facts = Facts::gather().unwrap();
        assert!(facts.memory_mib > 0 && facts.disk.1 > 0, "{facts:?}");
        assert!(facts.missing_programs.is_empty() && facts.compiler.is_ok(), "{facts:?}");
    }
}
