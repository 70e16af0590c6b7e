//! `cargo xtask kvm-host -- CMD`: a machine with a real `/dev/kvm`, on any machine.
//!
//! QEMU emulates an AMD processor with SVM in software, so that KVM and everything that needs it (Firecracker, its
//! snapshots, cgroup v2, XFS) works where there is no hardware virtualisation; 10 to 20 times slower than metal, so
//! it proves behaviour and ratios, never times. The host sees this machine's files read-only, with memory on top,
//! and has two places that are real:
//!
//! ```text
//! .cache/kvm-host/{kernel/,initrd}   Debian's kernel and modules, and an archive of init with busybox
//! .cache/kvm-host/qemu/              a newer emulator, for more than one processor
//! .cache/kvm-host/disk               an XFS with the guest's files, mounted on .cache/e2e there; writes are forgotten
//! .cache/kvm-host/out                shared: what the command writes to $KELVIN_OUT, and its exit code
//! ```
//!
//! Who writes: one run at a time, the kernel unlocks when it dies. A run that was killed leaves nothing that the next
//! one does not make anew.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cores::cores;
use crate::distribution::Distribution;
use crate::guest::{Newc, write_if_changed};
use crate::kernel::{self, Wanted};
use crate::packages::{self, as_root};
use crate::{Result, cache, emulator, files as fs, guest, quoted, root, run, say};

const DISK_GIB: u64 = 64;
const MEMORY_MIB: &str = "10240";
/// Processors, unless `KELVIN_KVM_HOST_PROCESSORS` says otherwise.
///
/// One, on one core of this machine: hours of Firecracker went through. On two, guests hang or the host does after some
/// minutes, for reasons that are not proven: `docs/decisions/0016-an-emulated-machine-with-kvm.md`.
const PROCESSORS: u32 = 1;
/// How long a command may take, unless `KELVIN_KVM_HOST_SECONDS` says otherwise.
const SECONDS: u64 = 7200;
/// Variables that the command sees as they are here.
const KEPT: [&str; 9] = [
    "CARGO_HOME",
    "CARGO_TARGET_DIR",
    "HOME",
    "LANG",
    "PATH",
    "RUSTUP_HOME",
    "RUSTUP_TOOLCHAIN",
    "RUST_BACKTRACE",
    "TERM",
];

fn directory() -> PathBuf {
    cache().join("kvm-host")
}

fn ensure_initrd(kernel: &Path) -> Result<PathBuf> {
    let mut archive = Newc::default();
    for name in ["bin", "dev", "proc", "sys", "modules", "lower", "rw", "newroot"] {
        archive.add(name, 0o040_755, &[]);
    }
    archive.node("dev/console", 0o020_600, (5, 1), &[]);
    archive.add("bin/busybox", 0o100_755, &fs::read("/bin/busybox")?);
    archive.add("init", 0o100_755, &fs::read(root().join("guest/kvm-host/init"))?);
    guest::add_modules(&mut archive, kernel)?;
    let done = directory().join("initrd");
    write_if_changed(&done, &archive.finish())?;
    Ok(done)
}

/// The disk that every run begins with: an XFS that has the guest's files, because to copy them takes the host minutes.
fn ensure_disk(directory: &Path) -> Result<PathBuf> {
    let done = directory.join("disk");
    let mut key = String::new();
    let mut files = Vec::new();
    for (name, path) in guest::files() {
        if let Ok(found) = fs::metadata(&path) {
            key.push_str(&format!("{name} {} {} {}\n", found.len(), found.mtime(), found.mtime_nsec()));
            files.push((name, path));
        }
    }
    let stamp = directory.join("disk.key");
    if done.exists() && fs::read_to_string(&stamp).is_ok_and(|text| text == key) {
        return Ok(done);
    }
    say("making the KVM host's disk");
    let (fresh, mounted) = (directory.join("disk.new"), directory.join("mounted"));
    let _ = fs::remove_file(&fresh);
    fs::create_sparse(&fresh, DISK_GIB << 30)?;
    run(as_root("mkfs.xfs").args(["-q", "-f", "-m", "reflink=1"]).arg(&fresh))?;
    fs::create_dir_all(&mounted)?;
    run(as_root("mount").args(["-o", "loop"]).arg(&fresh).arg(&mounted))?;
    let copied = (|| {
        run(as_root("mkdir").arg(mounted.join("guest")))?;
        for (name, path) in files {
            run(as_root("cp")
                .args(["--sparse=always", "--preserve=timestamps"])
                .arg(path)
                .arg(mounted.join("guest").join(name)))?;
        }
        Ok(())
    })();
    let unmounted = run(as_root("umount").arg(&mounted));
    copied.and(unmounted)?;
    fs::rename(fresh, &done)?;
    fs::write(stamp, key)?;
    Ok(done)
}

/// The script of one run: the environment, the disk, the command, its exit code.
fn script(command: &[String]) -> Result<String> {
    let mut lines = vec!["export KELVIN_OUT=/mnt KELVIN_KVM_HOST=1".to_owned()];
    for (name, value) in std::env::vars() {
        if KEPT.contains(&name.as_str()) || name.starts_with("KELVIN_") {
            lines.push(format!("export {name}={}", quoted(&value)));
        }
    }
    let here =
        std::env::current_dir().map_err(|error| format!("asking for the current directory: {error}"))?;
    let ground = quoted(&cache().join("e2e").display().to_string());
    lines.push(format!("mkdir -p {ground} && mount -o noatime /dev/vda {ground}"));
    lines.push(format!("cd {}", quoted(&here.display().to_string())));
    let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
    // A child: this shell stays to reap and to tell how it ended. Behind a pipe: what draws on a terminal would fill logs.
    lines.push("set -o pipefail".to_owned());
    lines.push(format!("{} </dev/null 2>&1 | cat", words.join(" ")));
    lines.push("code=$?; cd /; echo $code >/mnt/exit-code; sync".to_owned());
    lines.push("echo o >/proc/sysrq-trigger; while :; do :; done".to_owned());
    Ok(lines.join("\n") + "\n")
}

/// Boots the host, runs `command` in it and returns its exit code.
pub fn run_in(command: &[String]) -> Result<u8> {
    if command.is_empty() {
        return Err("which command? cargo xtask kvm-host -- CMD".into());
    }
    packages::ensure_all(&["busybox-static"])?;
    // Here it takes minutes, in there hours.
    crate::suite::build()?;
    let directory = directory();
    fs::create_dir_all(&directory)?;
    let lock = fs::create(directory.join("lock"))?;
    lock.try_lock().map_err(|_| "another kvm-host runs in this tree")?;
    let wanted = fs::read_to_string(root().join("guest/kvm-host/modules"))?;
    let package = Distribution::here()?.family().host_kernel();
    let kernel = kernel::ensure(&directory, Wanted { package, loaded: &wanted, on_demand: "" })?;
    let initrd = ensure_initrd(&kernel)?;
    let disk = ensure_disk(&directory)?;
    let processors = number("KELVIN_KVM_HOST_PROCESSORS", PROCESSORS)?;
    let emulator = emulator::words(&directory, processors)?;
    let out = directory.join("out");
    let _ = fs::remove_dir_all(&out);
    fs::create_dir(&out)?;
    fs::write(out.join("init"), script(command)?)?;
    say("booting the KVM host");
    boot(&emulator, processors, &kernel, &initrd, &disk, &out)?;
    let code =
        fs::read_to_string(out.join("exit-code")).map_err(|_| "the host ended without an exit code")?;
    say(&format!(
        "the command in the KVM host ended with {}; its files are in {}",
        code.trim(),
        out.display()
    ));
    Ok(code.trim().parse()?)
}

/// The number that the environment has as `name`, or another.
fn number<N: std::str::FromStr>(name: &str, otherwise: N) -> Result<N> {
    match std::env::var(name) {
        Ok(text) => text.parse().map_err(|_| format!("{name}={text:?} is no number").into()),
        Err(_) => Ok(otherwise),
    }
}

fn boot(
    emulator: &[OsString],
    processors: u32,
    kernel: &Path,
    initrd: &Path,
    disk: &Path,
    out: &Path,
) -> Result<()> {
    let seconds = number("KELVIN_KVM_HOST_SECONDS", SECONDS)?;
    let share = |tag: &str, path: &Path, rest: &str| {
        format!("local,path={},mount_tag={tag},security_model=none,multidevs=remap{rest}", path.display())
    };
    // Each ends with the one before: a run that is killed leaves no host.
    let with_parent = ["--pdeathsig", "KILL", "--"];
    let mut qemu = Command::new("setpriv");
    qemu.args(with_parent);
    if processors == 1 {
        qemu.args(["taskset", "--cpu-list", &cores()?[0]]);
    }
    let accelerator = "tcg,thread=multi,tb-size=1024";
    // A processor that never comes back from its guest ends the run after two minutes, not at its time limit.
    let watchdog = "softlockup_panic=1 watchdog_thresh=60";
    // With two processors the kernel would not trust it, and take a clock of the emulator's that costs a lock to read.
    let clock = "clocksource=tsc tsc=reliable";
    let append = format!(
        "console=ttyS0 reboot=t panic=-1 quiet loglevel=3 mitigations=off nokaslr {watchdog} {clock}"
    );
    qemu.args(["timeout", &seconds.to_string(), "setpriv"])
        .args(with_parent)
        .args(emulator)
        .args(["-M", "q35", "-accel", accelerator, "-cpu", "max,+svm"])
        .args(["-smp", &processors.to_string(), "-m", MEMORY_MIB])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-serial", "stdio", "-no-reboot", "-kernel"])
        .arg(kernel.join("vmlinuz"))
        .arg("-initrd")
        .arg(initrd)
        .args(["-virtfs", &share("root", Path::new("/"), ",readonly=on")])
        .args(["-virtfs", &share("out", out, "")])
        .args(["-drive", &format!("if=virtio,format=raw,cache=unsafe,snapshot=on,file={}", disk.display())])
        .args(["-append", &append])
        .stdin(Stdio::null());
    let ended =
        crate::spawn(&mut qemu)?.wait().map_err(|error| format!("waiting for the emulator: {error}"))?;
    match ended.code() {
        Some(0) => Ok(()),
        // Source: timeout(1).
        Some(124) => {
            Err(format!("the KVM host was stopped after {seconds} s; KELVIN_KVM_HOST_SECONDS gives more")
                .into())
        }
        code => Err(format!("the KVM host ended with {code:?}").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_command_as_they_are() {
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
        let text = script(&["echo".into(), "a b".into()]).unwrap();
        assert!(text.contains("\n'echo' 'a b' </dev/null 2>&1 | cat\n"), "{text}");
    }
}
