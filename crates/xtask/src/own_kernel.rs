//! A kernel of our own for guests: the distribution's sources, with `guest/kernel/config`.
//!
//! ```text
//! kernel/vmlinuz     an ELF program, unpacked and stripped: nothing is between a VMM and it
//! kernel/modules/    `order` and `devname`, both empty: everything is built in
//! kernel/image/      RELEASE/: from which `modprobe` knows what is built in
//! kernel/source      the package that it was made of, and its version, for the package's copyright
//! kernel/key         what it was made of
//! kernel.build/      while it is made: the sources; `of` says of what and since which boot of this machine
//! ```
//!
//! The same files as a distribution's kernel has ([`crate::kernel`]), made once for each key as those are. The key is over
//! everything that goes in: package of the sources, configuration, versions of the tools, and [`RECIPE`]; the same key gives the
//! same bytes, on any machine. A build that was ended goes on where it was, in the same checkout: what it has compiled is
//! whole, or has no `.cmd` file and is compiled again; that holds as long as the machine runs, which is why the boot is noted.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::kernel::{download, find, make_once};
use crate::packages::{ensure_all, files_to_download, with_lists};
use crate::stamps::digest;
use crate::{Result, cache, cores, files as fs, output, root, run, say};

/// The distribution's sources of its kernel, a meta package.
const SOURCES: &str = "linux-source";
/// What compiles them. Their versions are part of the key.
const TOOLS: &[&str] =
    &["bc", "binutils", "bison", "flex", "gcc", "libc6-dev", "libelf-dev", "make", "perl", "tar", "xz-utils"];
/// How it is made. A change of what this module does makes everything anew by another number.
const RECIPE: u64 = 1;
/// Of the sources, what no build of ours reads: it is half of their files. Patterns of tar, below their directory, in which
/// `*` goes into directories. Every `Kconfig` stays, of whatever processor.
const NOT_READ: [&str; 5] = [
    "arch/[achilmnoprs]*/*.[chS]",
    "arch/[achilmnoprs]*/*.dts",
    "arch/[achilmnoprs]*/*.dtsi",
    "Documentation/[a-z]*",
    "drivers/gpu/drm/*/*.[ch]",
];
/// What a kernel says of where and when it was made: the same everywhere.
const SAYS: [(&str, &str); 5] = [
    ("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 2026"),
    ("KBUILD_BUILD_USER", "kelvin"),
    ("KBUILD_BUILD_HOST", "kelvin"),
    ("KBUILD_BUILD_VERSION", "1"),
    // Set, so that nothing is added for the repository that it lies in.
    ("LOCALVERSION", ""),
];
/// In what is made.
const VMLINUZ: &str = "vmlinuz";

/// The configuration, in the tree.
pub fn config_path() -> PathBuf {
    root().join("guest/kernel/config")
}

/// `cargo xtask kernel`: makes it, without having guests use it, and prints where it is.
pub fn command() -> Result<()> {
    let done = ensure(&cache().join("own-kernel"))?;
    println!("{}", done.join(VMLINUZ).display());
    Ok(())
}

/// Makes `directory/kernel`, when it is missing or out of date: when the configuration or a tool is another, or apt has
/// another version of the sources.
///
/// # Errors
/// When a package cannot be had, the configuration asks for what these sources do not have, or a compiler fails.
pub fn ensure(directory: &Path) -> Result<PathBuf> {
    ensure_all(TOOLS)?;
    let config = said(&fs::read_to_string(config_path())?);
    let asked = digest(&[&RECIPE.to_le_bytes(), b"own", config.as_bytes(), tools()?.as_bytes()]);
    let found = with_lists(|| {
        let package = package_of(&output(Command::new("apt-cache").args(["depends", SOURCES]))?)?;
        let files = files_to_download(&[&package])?;
        Ok((package, files))
    });
    let (package, files) = match found {
        Ok((package, files)) => (package, Ok(files)),
        Err(error) => (String::new(), Err(error)),
    };
    make_once(directory, &asked, files, |work, key| {
        let build = directory.join("kernel.build");
        unpack(&build, &package, key)?;
        let sources = build.join("src");
        compile(&sources, &config)?;
        take(&sources, work)?;
        fs::copy(build.join("source"), work.join("source"))?;
        Ok(fs::remove_dir_all(&build)?)
    })
}

/// The lines of a configuration that say something: what is for people makes no other kernel.
fn said(config: &str) -> String {
    let lines = config.lines().filter(|line| line.starts_with("CONFIG_") || off(line).is_some());
    lines.map(|line| format!("{line}\n")).collect()
}

/// The versions of what compiles, a line each.
fn tools() -> Result<String> {
    let packages = output(
        Command::new("dpkg-query").args(["-W", "-f", "${Package} ${Architecture} ${Version}\n"]).args(TOOLS),
    )?;
    let mut lines: Vec<&str> = packages.lines().collect();
    lines.sort_unstable();
    // `gcc` is a package that names another; and PATH may have one of nobody's package.
    let compiler = output(Command::new("gcc").arg("--version"))?;
    let linker = output(Command::new("ld").arg("--version"))?;
    for said in [&compiler, &linker] {
        lines.extend(said.lines().next());
    }
    Ok(lines.join("\n"))
}

/// The package that the meta package of the sources names, in what `apt-cache depends` prints.
fn package_of(depends: &str) -> Result<String> {
    let named = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    let mut named = named.filter(|name| name.starts_with("linux-source-"));
    named.next().map(str::to_owned).ok_or_else(|| {
        format!("apt knows no sources of a kernel; does `apt-cache policy {SOURCES}` have a candidate?")
            .into()
    })
}

/// Makes `build/src` the sources of `package`, unless it is that of the same `key` already.
fn unpack(build: &Path, package: &str, key: &str) -> Result<()> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let of = format!("{key}{boot}");
    if fs::read_to_string(build.join("of")).is_ok_and(|found| found == of) {
        say("the guest's kernel: going on with what a former build has compiled");
        return Ok(());
    }
    let _ = fs::remove_dir_all(build);
    fs::create_dir_all(build)?;
    say(&format!("fetching {package}"));
    let archives = download(build, &[package])?;
    let [archive] = &archives[..] else {
        return Err(format!("apt downloaded {} packages as {package}", archives.len()).into());
    };
    let version = output(Command::new("dpkg-deb").arg("-f").arg(archive).arg("Version"))?;
    fs::write(build.join("source"), format!("{package} {version}"))?;
    say("unpacking the sources of the guest's kernel");
    let tree = build.join("deb");
    run(Command::new("dpkg-deb").arg("-x").arg(archive).arg(&tree))?;
    let packed = find(&tree.join("usr/src"), "")?;
    let named = packed.iter().find_map(|path| {
        let top = fs::name(path).ok()?.split_once(".tar.")?.0;
        top.starts_with("linux-source-").then_some((path, top))
    });
    let (packed, top) = named.ok_or_else(|| format!("{package} has no archive in usr/src"))?;
    let sources = build.join("src");
    fs::create_dir_all(&sources)?;
    let mut tar = Command::new("tar");
    tar.arg("--extract").arg("--file").arg(packed).arg("--directory").arg(&sources);
    tar.args(["--strip-components=1", "--anchored", "--wildcards", "--wildcards-match-slash"]);
    tar.args(NOT_READ.map(|pattern| format!("--exclude={top}/{pattern}")));
    // Ranges of letters are those of ASCII.
    run(tar.env("LC_ALL", "C").stdout(std::io::stderr()))?;
    fs::remove_dir_all(&tree)?;
    fs::remove_file(archive)?;
    // Last: what has it is whole.
    Ok(fs::write(build.join("of"), of)?)
}

/// `make` in `sources`, told nothing by whoever runs this program.
fn make(sources: &Path) -> Command {
    let mut make = Command::new("make");
    // Told nothing by whoever runs this: the same key gives the same bytes.
    make.current_dir(sources).env_clear();
    for name in ["PATH", "TMPDIR"] {
        if let Some(value) = std::env::var_os(name) {
            make.env(name, value);
        }
    }
    make.envs(SAYS).env("LC_ALL", "C").env("ARCH", "x86_64");
    make.stdout(std::io::stderr());
    make
}

/// Compiles `sources` with `config`, which must be honoured to the letter.
fn compile(sources: &Path, config: &str) -> Result<()> {
    let given = sources.join("kelvin.config");
    fs::write(&given, config)?;
    run(make(sources).args(["--silent", "allnoconfig"]).env("KCONFIG_ALLCONFIG", &given))?;
    let lost = lost(config, &fs::read_to_string(sources.join(".config"))?);
    if !lost.is_empty() {
        return Err(format!(
            "with these sources guest/kernel/config does not become what it says: {}",
            lost.join(", ")
        )
        .into());
    }
    let processors = cores::cores()?.len();
    say(&format!("compiling the guest's kernel (some minutes on {processors} processors, once)"));
    run(make(sources).args(["--silent", &format!("--jobs={processors}"), "vmlinux"]))
}

/// The lines of `config` that do not hold in `made`: `CONFIG_NAME=value`, and `# CONFIG_NAME is not set`.
fn lost(config: &str, made: &str) -> Vec<String> {
    let made: Vec<&str> = made.lines().collect();
    let holds = |line: &str| match off(line) {
        Some(name) => {
            !made.iter().any(|found| found.strip_prefix(name).is_some_and(|rest| rest.starts_with('=')))
        }
        None => made.contains(&line),
    };
    config.lines().filter(|line| !holds(line)).map(str::to_owned).collect()
}

/// The option that a line of a configuration says is off.
fn off(line: &str) -> Option<&str> {
    line.strip_prefix("# ")?.strip_suffix(" is not set").filter(|name| name.starts_with("CONFIG_"))
}

/// Takes what was compiled out of `sources` into `work`.
fn take(sources: &Path, work: &Path) -> Result<()> {
    let kernel = work.join(VMLINUZ);
    run(Command::new("strip").arg("--strip-all").arg("-o").arg(&kernel).arg(sources.join("vmlinux")))?;
    fs::set_permissions(&kernel, fs::Permissions::from_mode(0o644))?;
    let release = fs::read_to_string(sources.join("include/config/kernel.release"))?;
    let image = work.join("image").join(release.trim());
    // `depmod` wants the tree of a root directory.
    let tree = work.join("tree");
    let listed = tree.join("lib/modules").join(release.trim());
    fs::create_dir_all(&listed)?;
    // Wherever this machine's kmod looks.
    fs::symlink(".", tree.join("usr"))?;
    for name in ["modules.builtin", "modules.builtin.modinfo"] {
        fs::copy(sources.join(name), listed.join(name))?;
    }
    fs::write(listed.join("modules.order"), "")?;
    run(Command::new("depmod").arg("-b").arg(&tree).arg(release.trim()))?;
    fs::create_dir_all(work.join("image"))?;
    fs::rename(&listed, &image)?;
    fs::remove_dir_all(&tree)?;
    crate::kernel::same_times(&image)?;
    let modules = work.join("modules");
    fs::create_dir_all(&modules)?;
    fs::write(modules.join("order"), "")?;
    Ok(fs::write(modules.join("devname"), "")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who needs what. `=y` where nothing else stands.
    const PROMISED: &[(&str, &[&str])] = &[
        (
            "every driver: its devices are found by their addresses in ACPI",
            &["VIRTIO_MMIO", "ACPI", "PCI", "TTY"],
        ),
        (
            "a machine without ACPI: they stand in the kernel's command line",
            &["VIRTIO_MMIO_CMDLINE_DEVICES", "X86_MPPARSE"],
        ),
        ("QEMU's driver: an ELF program is entered directly; `lpj` counts on 250 Hz", &["PVH", "HZ_250"]),
        ("a guest under KVM: its clock and its locks", &["KVM_GUEST", "PARAVIRT", "PARAVIRT_SPINLOCKS"]),
        (
            "the root disk",
            &["VIRTIO_BLK", "EXT4_FS", "EXT4_FS_POSIX_ACL", "EXT4_FS_SECURITY", "CRYPTO_CRC32C_INTEL"],
        ),
        (
            "the agent's channels: ports on QEMU, vsock on Firecracker",
            &["VIRTIO_CONSOLE", "VSOCKETS", "VIRTIO_VSOCKETS"],
        ),
        ("how a guest has ended is read from its console", &["SERIAL_8250_CONSOLE", "PRINTK", "MAGIC_SYSRQ"]),
        ("the network of a sandbox", &["VIRTIO_NET", "INET", "IPV6", "UNIX", "PACKET", "IP_MULTIPLE_TABLES"]),
        ("random numbers after a restore", &["HW_RANDOM_VIRTIO", "VMGENID"]),
        ("what is free goes back to the host", &["VIRTIO_BALLOON", "PAGE_REPORTING"]),
        ("the initial RAM disk with the agent", &["BLK_DEV_INITRD", "DEVTMPFS", "PROC_FS", "SYSFS", "TMPFS"]),
        (
            "the agent's control groups, and Docker's",
            &[
                "CGROUPS",
                "MEMCG",
                "CGROUP_PIDS",
                "CFS_BANDWIDTH",
                "CPUSETS",
                "BLK_CGROUP",
                "CGROUP_BPF",
                "CGROUP_FREEZER",
            ],
        ),
        (
            "rootless containers, browsers",
            &["UTS_NS", "IPC_NS", "USER_NS", "PID_NS", "NET_NS", "SECCOMP", "SECCOMP_FILTER"],
        ),
        ("watches: of E2B's SDKs, of editors", &["INOTIFY_USER", "FANOTIFY"]),
        (
            "interpreters and servers",
            &["FUTEX", "EPOLL", "EVENTFD", "TIMERFD", "SIGNALFD", "AIO", "IO_URING", "POSIX_MQUEUE"],
        ),
        (
            "debuggers, and what shows processes",
            &["CROSS_MEMORY_ATTACH", "KCMP", "PERF_EVENTS", "TASK_IO_ACCOUNTING"],
        ),
        ("programs that keep themselves in", &["SECURITY_LANDLOCK", "SECURITY_YAMA", "BPF_SYSCALL", "KEYS"]),
        (
            "programs of 32 bits; images of other processors",
            &["IA32_EMULATION", "BINFMT_MISC", "BINFMT_SCRIPT"],
        ),
        (
            "images in files: Docker, snaps, archives",
            &["OVERLAY_FS", "BLK_DEV_LOOP", "SQUASHFS", "EROFS_FS", "ISO9660_FS", "VFAT_FS"],
        ),
        ("buckets that are mounted", &["FUSE_FS"]),
        ("VPNs", &["TUN", "WIREGUARD"]),
        (
            "networks of containers",
            &["BRIDGE", "BRIDGE_NETFILTER", "VETH", "DUMMY", "MACVLAN", "IPVLAN", "VXLAN"],
        ),
        (
            "Docker's rules, by nftables",
            &[
                "NF_TABLES",
                "NF_TABLES_INET",
                "NFT_CT",
                "NFT_NAT",
                "NFT_MASQ",
                "NFT_REDIR",
                "NFT_REJECT",
                "NFT_FIB_INET",
                "NFT_LIMIT",
                "NFT_LOG",
            ],
        ),
        (
            "Docker's rules, by iptables in front of nftables",
            &[
                "NFT_COMPAT",
                "NF_CONNTRACK",
                "NF_CT_NETLINK",
                "NF_NAT",
                "NETFILTER_XT_MATCH_ADDRTYPE",
                "NETFILTER_XT_MATCH_COMMENT",
                "NETFILTER_XT_MATCH_CONNTRACK",
                "NETFILTER_XT_MATCH_MULTIPORT",
                "NETFILTER_XT_NAT",
                "NETFILTER_XT_MARK",
                "NETFILTER_XT_TARGET_MASQUERADE",
                "NETFILTER_XT_TARGET_REDIRECT",
                "NETFILTER_XT_TARGET_LOG",
                "IP_NF_TARGET_REJECT",
                "IP6_NF_TARGET_REJECT",
            ],
        ),
        (
            "the older iptables",
            &["IP_NF_IPTABLES", "IP_NF_FILTER", "IP_NF_NAT", "IP_NF_MANGLE", "IP6_NF_IPTABLES", "IP6_NF_NAT"],
        ),
    ];

    /// What the build must not have by itself either.
    const ABSENT: [&str; 5] =
        ["MODULES", "FW_LOADER", "VIRTIO_PCI", "DEBUG_INFO", "TRANSPARENT_HUGEPAGE_ALWAYS"];

    #[test]
    fn the_configuration_has_what_is_promised() {
        let config = fs::read_to_string(config_path()).unwrap();
        let set: Vec<(&str, &str)> =
            config.lines().filter_map(|line| line.strip_prefix("CONFIG_")?.split_once('=')).collect();
        let value = |name: &str| set.iter().find(|(found, _)| *found == name).map(|(_, value)| *value);
        for (who, options) in PROMISED {
            for option in *options {
                assert_eq!(value(option), Some("y"), "{option}, for {who}");
            }
        }
        for option in ABSENT {
            let line = format!("# CONFIG_{option} is not set");
            assert!(config.lines().any(|found| found == line), "{line}");
        }
        for (number, (name, value)) in set.iter().enumerate() {
            assert_ne!(*value, "m", "{name}: there are no modules");
            assert!(!set[..number].iter().any(|(other, _)| other == name), "{name} is there twice");
        }
    }

    #[test]
    fn what_a_configuration_says_to_people_makes_no_other_kernel() {
        assert_eq!(
            said("# text\n\nCONFIG_A=y\n# CONFIG_B is not set\n#CONFIG_C=y\n# it is not set\n"),
            "CONFIG_A=y\n# CONFIG_B is not set\n"
        );
    }

    /// What is asked for and not made is an error, not a guest without it.
    #[test]
    fn what_the_sources_do_not_have_is_named() {
        let made = "#\n# x\n#\nCONFIG_A=y\nCONFIG_NR=64\n# CONFIG_C is not set\nCONFIG_D=y\n";
        assert!(
            lost("CONFIG_A=y\nCONFIG_NR=64\n# CONFIG_C is not set\n# CONFIG_E is not set\n", made).is_empty()
        );
        assert_eq!(
            lost("CONFIG_A=y\nCONFIG_B=y\nCONFIG_NR=6\n# CONFIG_D is not set\n# CONFIG_N is not set\n", made),
            ["CONFIG_B=y", "CONFIG_NR=6", "# CONFIG_D is not set"]
        );
    }

    #[test]
    fn the_sources_are_found_behind_their_meta_package() {
        assert_eq!(package_of("linux-source\n  Depends: linux-source-6.1\n").unwrap(), "linux-source-6.1");
        let error = package_of("linux-source\n  Depends: other\n").unwrap_err().to_string();
        assert!(error.contains("apt-cache policy linux-source"), "{error}");
    }

    /// Paths of the sources that a build reads are none of those that are left packed.
    #[test]
    fn what_is_left_packed_is_not_read() {
        let is_left = |path: &str| {
            NOT_READ.iter().any(|pattern| {
                let mut script = Command::new("sh");
                script.args(["-c", "case $1 in $2 | $2/*) ;; *) exit 1 ;; esac", "sh", path, pattern]);
                crate::outcome(script.env("LC_ALL", "C")).is_ok_and(|done| done.status.success())
            })
        };
        for path in [
            "arch/x86/Kconfig",
            "arch/x86/kernel/setup.c",
            "arch/Kconfig",
            "arch/arm/crypto/Kconfig",
            "Documentation/Kconfig",
            "tools/arch/s390/include/uapi/asm/ptrace.h",
            "drivers/gpu/drm/Kconfig",
            "drivers/gpu/drm/i915/Kconfig",
        ] {
            assert!(!is_left(path), "{path}");
        }
        for path in [
            "arch/arm64/kernel/setup.c",
            "arch/arm/boot/dts/a/b.dtsi",
            "arch/sparc/lib/memcpy.S",
            "drivers/gpu/drm/i915/i915_drv.c",
            "Documentation/admin-guide",
        ] {
            assert!(is_left(path), "{path}");
        }
    }
}
