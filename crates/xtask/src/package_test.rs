//! `cargo xtask test-package`: the package in machines that have booted, with systemd.
//!
//! ```text
//! .cache/package/<suite>/{vmlinuz,initrd,root.ext4}   a Debian with what the package depends on; made once
//! .cache/package/<suite>/out/                         shared with its machine: packages in, `result` and log out
//! ```
//!
//! QEMU emulates a processor with SVM, so that the machine has KVM and its own machines are not emulated twice. Each
//! machine writes to a temporary copy of its disk and has one processor, since more of them hang now and then
//! (`docs/decisions/0016-an-emulated-machine-with-kvm.md`). Two machines run side by side, each on a core of its own, as
//! the KVM host does; each tells what it did in one piece, when it has ended.
//!
//! Who writes: one run at a time. Everything is made under another name and renamed: what has its name is whole.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cores::cores;
use crate::packages::{self, as_root, debian_sources, feed};
use crate::stamps::{digest, is_fresh};
use crate::{Result, files as fs, package, root, run as run_command, say, shared};

/// The releases, by age: a package is for the one that it was built on and for those after it.
const SUITES: [&str; 2] = ["bookworm", "trixie"];
/// What a machine has beside the package's dependencies.
const PACKAGES: &str = "apt,bash-completion,dbus,initramfs-tools,kmod,linux-image-amd64,nftables,systemd,\
    systemd-sysv,udev";
const DISK_GIB: u64 = 6;
const MEMORY_MIB: &str = "2048";
/// How long a machine may take for everything.
const SECONDS: u64 = 600;
/// Options of its server: nothing is made before it is asked for, on the one emulated processor that there is.
const OPTIONS: &str =
    "--no-auto-bake --waiting-vmms 0 --warm-max 0 --slots 1 --uplink none --boot-deadline 300";

fn directory() -> PathBuf {
    shared().join("package")
}

/// Makes the packages, and tries them in the machines that `wanted` names, or in all that can have them.
pub fn run(wanted: &[String]) -> Result<()> {
    if let Some(unknown) = wanted.iter().find(|name| !SUITES.contains(&name.as_str())) {
        return Err(format!("no machine {unknown:?}: there are {}", SUITES.join(" and ")).into());
    }
    let built = package::stage()?;
    packages::ensure_all(&["busybox-static"])?;
    let directory = directory();
    fs::create_dir_all(directory.join("debs"))?;
    let lock = fs::create(directory.join("lock"))?;
    lock.try_lock().map_err(|_| "another test-package of this user runs")?;
    // Not among those that are given to people: there cargo-deb keeps one.
    let first = package::deb(&built, "1", &directory.join("debs"), &["--fast"])?;
    let second = package::deb(&built, "2", &directory.join("debs"), &["--fast"])?;
    let template = template(&directory)?;
    let here = packages::codename()?;
    let oldest = SUITES.iter().position(|suite| *suite == here);
    let mut machines = Vec::new();
    for (age, suite) in SUITES.iter().enumerate() {
        if !wanted.is_empty() && !wanted.iter().any(|name| name == suite) {
            continue;
        }
        if oldest.is_some_and(|oldest| age < oldest) {
            println!("skipped: {suite} (a package that is built on {here} needs its libraries)");
            continue;
        }
        machines.push(Machine::make(&directory, suite, &first, &second, &template)?);
    }
    let cores = cores()?;
    std::thread::scope(|scope| {
        let tried: Vec<_> = machines
            .iter()
            .zip(cores.iter().cycle())
            .map(|(machine, core)| {
                let tried = scope.spawn(|| machine.try_package(core).map_err(|error| error.to_string()));
                (machine.suite, tried)
            })
            .collect();
        // All of them are waited for, also when one has failed; and each that has failed is named.
        let failed = tried.into_iter().filter_map(|(suite, tried)| match tried.join() {
            Ok(tried) => tried.err(),
            Err(_) => Some(format!("{suite}: its thread panicked")),
        });
        let failed: Vec<String> = failed.collect();
        if failed.is_empty() { Ok(()) } else { Err(failed.join("\n").into()) }
    })
}

/// One Debian.
struct Machine {
    suite: &'static str,
    directory: PathBuf,
    out: PathBuf,
}

impl Machine {
    /// Makes it, when it is missing or out of date, and lays out what it is given.
    fn make(
        directory: &Path,
        suite: &'static str,
        first: &Path,
        second: &Path,
        template: &Path,
    ) -> Result<Self> {
        let directory = directory.join(suite);
        fs::create_dir_all(&directory)?;
        make_root(&directory, suite, &dependencies(first)?)?;
        let out = directory.join("out");
        run_command(as_root("rm").arg("-rf").arg(&out))?;
        fs::create_dir(&out)?;
        for (from, name) in [
            (first, "first.deb"),
            (second, "second.deb"),
            (template, "rootfs.ext4"),
            (&root().join("packaging/test/run"), "run"),
        ] {
            fs::copy(from, out.join(name))?;
        }
        fs::write(out.join("options"), OPTIONS)?;
        Ok(Self { suite, directory, out })
    }

    /// Boots it on `core` and reads what it found.
    fn try_package(&self, core: &str) -> Result<()> {
        say(&format!("booting {} on core {core}", self.suite));
        let file = |name: &str| self.directory.join(name);
        let log = fs::create(file("log"))?;
        let share = format!("local,path={},mount_tag=out,security_model=none", self.out.display());
        // Each ends with the one before: a run that is killed leaves no machine.
        let with_parent = ["--pdeathsig", "KILL", "--"];
        let mut qemu = Command::new("setpriv");
        qemu.args(with_parent)
            .args(["taskset", "--cpu-list", core])
            .args(["timeout", &SECONDS.to_string(), "setpriv"])
            .args(with_parent)
            .args(["qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,+svm"])
            .args(["-smp", "1", "-m", MEMORY_MIB, "-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-serial", "stdio", "-no-reboot", "-kernel"])
            .arg(file("vmlinuz"))
            .arg("-initrd")
            .arg(file("initrd"))
            .args(["-append", "root=/dev/vda rw console=ttyS0 panic=-1 quiet loglevel=3 mitigations=off nokaslr clocksource=tsc tsc=reliable net.ifnames=0"])
            .arg("-drive")
            .arg(format!("if=virtio,format=raw,cache=unsafe,snapshot=on,file={}", file("root.ext4").display()))
            .args(["-device", "virtio-rng-pci", "-virtfs", &share])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let status = qemu.status().map_err(|error| format!("{qemu:?}: {error}"))?;
        let said = fs::read(file("log"))?;
        let said = String::from_utf8_lossy(&said);
        let result = fs::read_to_string(self.out.join("result")).unwrap_or_default();
        let steps: Vec<&str> =
            said.lines().map(str::trim_end).filter(|line| line.contains(" ms  ")).collect();
        let told: String = steps.iter().map(|line| format!("{}: {line}\n", self.suite)).collect();
        eprint!("{told}");
        if result.trim() == "ok" {
            return Ok(());
        }
        let end = said.lines().rev().take(60).collect::<Vec<_>>();
        let end = end.into_iter().rev().collect::<Vec<_>>().join("\n");
        let why = match (result.trim(), status.code()) {
            // Source: timeout(1).
            ("", Some(124)) => format!("not through within {SECONDS} s"),
            ("", code) => format!("the machine ended ({code:?}) without a result"),
            (told, _) => told.to_owned(),
        };
        Err(format!("{}: {why}\n{end}\nthe whole log: {}", self.suite, file("log").display()).into())
    }
}

/// What the package depends on, as apt's names, the first of alternatives; the machine has no network to get it from.
fn dependencies(package: &Path) -> Result<String> {
    let fields = crate::output(Command::new("dpkg-deb").arg("-f").arg(package).arg("Depends"))?;
    let names = fields.split(',').filter_map(|one| one.split(['|', '(']).next()).map(str::trim);
    Ok(names.collect::<Vec<_>>().join(","))
}

/// A Debian that boots, in `directory`.
fn make_root(directory: &Path, suite: &str, depends: &str) -> Result<()> {
    let hook = root().join("packaging/test/customize.sh");
    let unit = root().join("packaging/test/kelvin-test.service");
    let key = digest(&[&fs::read(&hook)?, &fs::read(unit)?, depends.as_bytes(), PACKAGES.as_bytes()]);
    let (stamp, done) = (directory.join("key"), directory.join("root.ext4"));
    if done.exists() && is_fresh(&stamp, &key) {
        return Ok(());
    }
    say(&format!("building a {suite} that boots (some minutes, once)"));
    let _ = fs::remove_file(&stamp);
    let (tree, fresh) = (directory.join("tree"), directory.join("root.ext4.new"));
    run_command(as_root("rm").args(["-rf", "--one-file-system"]).arg(&tree))?;
    let mut bootstrap = as_root("mmdebstrap");
    bootstrap
        .args(["--quiet", "--variant=minbase", "--format=directory"])
        .arg(format!("--include={PACKAGES},{depends}"))
        .arg(format!("--customize-hook={}", hook.display()))
        .arg(suite)
        .arg(&tree)
        .arg("-")
        .stdout(std::io::stderr());
    feed(&mut bootstrap, &sources(suite)?)?;
    let boot = tree.join("boot");
    for (prefix, name) in [("vmlinuz-", "vmlinuz"), ("initrd.img-", "initrd")] {
        let found = fs::list(&boot)?
            .into_iter()
            .find(|path| path.file_name().is_some_and(|found| found.to_string_lossy().starts_with(prefix)));
        let found = found.ok_or_else(|| format!("{suite} has no {prefix} in /boot"))?;
        run_command(as_root("install").args(["-m", "0644"]).arg(found).arg(directory.join(name)))?;
    }
    let _ = fs::remove_file(&fresh);
    fs::create_sparse(&fresh, DISK_GIB << 30)?;
    run_command(as_root("mke2fs").args(["-q", "-F", "-t", "ext4", "-m", "0", "-d"]).arg(&tree).arg(&fresh))?;
    run_command(as_root("rm").args(["-rf", "--one-file-system"]).arg(&tree))?;
    fs::rename(fresh, done)?;
    Ok(fs::write(stamp, key)?)
}

/// The line of a `sources.list` for `suite`, from where this machine's own release comes.
fn sources(suite: &str) -> Result<String> {
    let release = packages::codename()?;
    let known = debian_sources()?;
    let own = known.lines().find_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
        ["deb", from, found, "main"] if found == release => Some(from.to_owned()),
        _ => None,
    });
    let from = own.ok_or_else(|| format!("apt has no source of {release} main"))?;
    Ok(format!("deb {from} {suite} main\n"))
}

/// A template that is read and booted quickly: busybox and a user. What `kelvin-build-template` makes is what the demo and
/// every end-to-end test run.
fn template(directory: &Path) -> Result<PathBuf> {
    let done = directory.join("template.ext4");
    let tree = directory.join("template");
    run_command(as_root("rm").arg("-rf").arg(&tree))?;
    for name in ["bin", "dev", "etc", "home/user", "proc", "root", "run", "sys", "tmp"] {
        fs::create_dir_all(tree.join(name))?;
    }
    fs::copy("/bin/busybox", tree.join("bin/busybox"))?;
    for name in ["sh", "cat", "mv", "sleep", "echo", "true"] {
        fs::symlink("busybox", tree.join("bin").join(name))?;
    }
    fs::write(
        tree.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    )?;
    fs::write(tree.join("etc/group"), "root:x:0:\nuser:x:1000:\n")?;
    for file in ["hostname", "machine-id", "hosts"] {
        fs::symlink(format!("/run/kelvin/{file}"), tree.join("etc").join(file))?;
    }
    fs::set_permissions(tree.join("home/user"), fs::Permissions::from_mode(0o777))?;
    fs::set_permissions(tree.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    let fresh = directory.join("template.ext4.new");
    let _ = fs::remove_file(&fresh);
    fs::create_sparse(&fresh, 32 << 20)?;
    run_command(
        as_root("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-m", "0", "-b", "4096", "-E", "root_owner=0:0", "-d"])
            .arg(&tree)
            .arg(&fresh),
    )?;
    fs::rename(fresh, &done)?;
    Ok(done)
}
