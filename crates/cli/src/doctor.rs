//! `kelvin doctor`: every prerequisite, whether it is there, and how to get it.

use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use kelvin_host::{accel, datadir, net};
use kelvin_store::identity::{Identity, SNAPSHOT_FORMAT};
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use crate::args::{Connection, DoctorArgs, Output, data_dir};
use crate::config;
use crate::output::{Failed, print, table};
use crate::vmm;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    /// It is there.
    Ok,
    /// It works without, worse.
    Warning,
    /// It does not work.
    Failed,
}

#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    found: String,
    remedy: Option<String>,
}

fn check(name: &'static str, verdict: Verdict, found: impl Into<String>, remedy: &str) -> Check {
    let remedy = (verdict != Verdict::Ok).then(|| remedy.to_owned());
    Check { name, verdict, found: found.into(), remedy }
}

/// How long a program may take to say its version.
const ANSWER: Duration = Duration::from_secs(10);

/// Asks the program `name` for its version with the argument `version`. It reads nothing, and is ended when it does not
/// answer.
async fn program(name: &'static str, version: &str, package: &str, missing: Verdict) -> Check {
    let mut command = tokio::process::Command::new(name);
    command.arg(version).stdin(Stdio::null()).kill_on_drop(true);
    let install = format!("apt-get install {package}");
    match tokio::time::timeout(ANSWER, command.output()).await {
        Ok(Ok(output)) => {
            let text = if output.stdout.is_empty() { &output.stderr } else { &output.stdout };
            let text = String::from_utf8_lossy(text);
            let line = text.lines().next().unwrap_or_default();
            if output.status.success() {
                check(name, Verdict::Ok, line, "")
            } else {
                let found = format!("`{name} {version}` ended with {}: {line}", output.status);
                check(name, missing, found, &format!("{install} --reinstall"))
            }
        }
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => {
            check(name, missing, "not found in PATH", &install)
        }
        Ok(Err(error)) => check(name, missing, error.to_string(), &install),
        Err(_) => {
            let found = format!("`{name} {version}` says nothing for {} s", ANSWER.as_secs());
            check(name, missing, found, &format!("see what `command -v {name}` is; {install} --reinstall"))
        }
    }
}

/// QEMU: that it answers, that its version is one that can be used, the firmware that machines boot with.
async fn qemu() -> Vec<Check> {
    let answers = program("qemu-system-x86_64", "--version", "qemu-system-x86", Verdict::Failed).await;
    if answers.verdict != Verdict::Ok {
        return vec![answers];
    }
    let version = match kelvin_vmm::qemu::build() {
        Ok(_) => answers,
        Err(error) => check(
            "qemu-system-x86_64",
            Verdict::Failed,
            kelvin_api::error::chain(&error),
            "QEMU 7.2 or newer: Debian 12 and Ubuntu 24.04 have it, Ubuntu 22.04 has 6.2",
        ),
    };
    let firmware = match kelvin_vmm::qemu::firmware() {
        Ok(found) => check("QEMU's firmware", Verdict::Ok, found, ""),
        Err(error) => check(
            "QEMU's firmware",
            Verdict::Failed,
            kelvin_api::error::chain(&error),
            "apt-get install qemu-system-data",
        ),
    };
    vec![version, firmware]
}

/// Which release this is, from the text of `os-release`. `has_qemu`: whether its QEMU can be used.
fn release(text: &str, has_qemu: bool) -> Check {
    const NAME: &str = "distribution";
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.unwrap_or_default().trim_matches(['"', '\''])
    };
    let (id, version) = (field("ID"), field("VERSION_ID"));
    let found = format!("{id} {version}");
    match (id, version) {
        ("debian", "12" | "13") => check(NAME, Verdict::Ok, found, ""),
        ("ubuntu", "22.04") if !has_qemu => check(
            NAME,
            Verdict::Failed,
            format!("{found}, whose QEMU is 6.2"),
            "Ubuntu 24.04 or newer, or a QEMU of 7.2 or newer in PATH",
        ),
        ("ubuntu", "22.04" | "24.04" | "26.04") => check(
            NAME,
            Verdict::Warning,
            format!("{found} should work, and is not tested"),
            "apt-get install qemu-system-x86 libnftables1 xfsprogs; Debian 12 and 13 are tested",
        ),
        _ => check(NAME, Verdict::Warning, format!("{found} is not known"), "Debian 12 and 13 are tested"),
    }
}

/// Ubuntu's restriction of user namespaces, which people look for when something of theirs does not start. `restricted`:
/// the text of `kernel.apparmor_restrict_unprivileged_userns`.
fn user_namespaces(restricted: Option<&str>) -> Option<Check> {
    let is_on = restricted?.trim() == "1";
    is_on.then(|| {
        check(
            "user namespaces",
            Verdict::Ok,
            "restricted by AppArmor: Kelvin uses none, leave it as it is",
            "",
        )
    })
}

/// How many descriptors a server that is started from here may have; a service has its unit's limit. `most`: the hard limit,
/// none when there is none.
fn descriptors(most: Option<u64>) -> Check {
    const NAME: &str = "file descriptors";
    let machines = most.unwrap_or(u64::MAX) / 2 / kelvin_host::descriptors::MACHINE;
    let found = match most {
        None => "no limit".to_owned(),
        Some(most) => format!("{most} (hard limit), half of them for about {machines} machines"),
    };
    let verdict = if machines < 200 { Verdict::Warning } else { Verdict::Ok };
    check(
        NAME,
        verdict,
        found,
        "raise it: LimitNOFILE= of the unit, /etc/security/limits.conf, or ulimit -Hn as root",
    )
}

/// Whether `/dev/kvm` is there and refused: the group `kvm` has it on Debian and Ubuntu.
fn kvm_rights(opened: &std::io::Result<std::fs::File>) -> Option<Check> {
    match opened {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Some(check(
            "/dev/kvm",
            Verdict::Warning,
            "not yours to open: machines are emulated",
            "run the server as root, or join the group: usermod -aG kvm $USER, then log in again",
        )),
        _ => None,
    }
}

fn data_directory(directory: &Path) -> Vec<Check> {
    if !directory.is_dir() {
        let remedy = format!("kelvin setup --data-dir {}", directory.display());
        return vec![check(
            "data directory",
            Verdict::Warning,
            format!("{} does not exist", directory.display()),
            &remedy,
        )];
    }
    let mut checks = match datadir::can_reflink(directory) {
        Ok(true) => {
            vec![check("data directory", Verdict::Ok, format!("{} can clone files", directory.display()), "")]
        }
        Ok(false) => vec![check(
            "data directory",
            Verdict::Warning,
            format!("{} cannot clone files: every disk is copied", directory.display()),
            "stop the server, move the directory away and run `kelvin setup`",
        )],
        Err(error) => vec![check(
            "data directory",
            Verdict::Failed,
            format!("{}: {error}", directory.display()),
            "make it writable, or run as its owner",
        )],
    };
    if let Ok(space) = rustix::fs::statvfs(directory) {
        let free = (space.f_bavail * space.f_frsize) >> 20;
        let verdict = if free < 4096 { Verdict::Warning } else { Verdict::Ok };
        checks.push(check(
            "free disk",
            verdict,
            format!("{free} MiB"),
            "free some space; `kelvin gc` removes what nothing needs",
        ));
    }
    checks
}

async fn host() -> Vec<Check> {
    let found = accel::detect();
    let verdict = if found.accelerator == accel::Accelerator::Kvm { Verdict::Ok } else { Verdict::Warning };
    let root = rustix::process::geteuid().is_root();
    let memory = rustix::system::sysinfo().totalram >> 20;
    let qemu = qemu().await;
    let has_qemu = qemu.iter().all(|check| check.verdict == Verdict::Ok);
    let os_release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let restricted = std::fs::read_to_string("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").ok();
    let mut checks = vec![
        release(&os_release, has_qemu),
        check(
            "accelerator",
            verdict,
            format!("{}: {}", found.accelerator, found.reason),
            "use a host with hardware virtualisation; emulation works, about 10 times slower",
        ),
        check(
            "privileges",
            if root { Verdict::Ok } else { Verdict::Warning },
            if root { "root: every VMM gets a user of its own" } else { "not root: VMMs run as you" },
            "run the server as root, so that VMMs are separated from each other",
        ),
        check(
            "memory",
            if memory < 2048 { Verdict::Warning } else { Verdict::Ok },
            format!("{memory} MiB"),
            "2 GiB or more",
        ),
    ];
    checks.push(descriptors(getrlimit(Resource::Nofile).maximum));
    checks.extend(kvm_rights(&std::fs::File::options().read(true).write(true).open("/dev/kvm")));
    checks.extend(user_namespaces(restricted.as_deref()));
    checks.extend(qemu);
    checks.push(program("setsid", "--version", "util-linux", Verdict::Failed).await);
    checks.push(program("setpriv", "--version", "util-linux", Verdict::Failed).await);
    checks.push(program("mount", "--version", "mount", Verdict::Warning).await);
    checks.push(program("mkfs.xfs", "-V", "xfsprogs", Verdict::Warning).await);
    checks
}

/// Firecracker: the binary, its version, what the kernel costs it. Without KVM it is not looked for.
fn firecracker(named: Option<&Path>, has_kvm: bool) -> Vec<Check> {
    const NAME: &str = "firecracker";
    if !has_kvm {
        return vec![check(NAME, Verdict::Ok, "not used: there is no KVM, machines run in QEMU", "")];
    }
    let mut checks = vec![match vmm::find_firecracker(named) {
        None => check(
            NAME,
            Verdict::Warning,
            "none in PATH: machines run in QEMU",
            "name its binary with --firecracker or KELVIN_FIRECRACKER; it is in no package registry",
        ),
        Some(binary) => match kelvin_vmm::firecracker::look_at(&binary) {
            Ok(version) => check(NAME, Verdict::Ok, format!("{} is version {version}", binary.display()), ""),
            Err(error) => check(
                NAME,
                Verdict::Failed,
                kelvin_api::error::chain(&error),
                "name a Firecracker of 1.16.1 or newer, or serve with --vmm qemu",
            ),
        },
    }];
    if let Err(reason) = kelvin_host::cgroup::check() {
        let remedy = "boot with systemd.unified_cgroup_hierarchy=1; without it VMMs have no limits";
        checks.push(check("control groups", Verdict::Warning, reason, remedy));
    }
    checks.extend(kelvin_host::kvm::settings().into_iter().map(|setting| match setting.cost {
        None => check(setting.name, Verdict::Ok, setting.found, ""),
        Some(cost) => check(
            setting.name,
            Verdict::Warning,
            format!("{}: {cost}", setting.found),
            "kelvin setup --tune changes it until the next boot",
        ),
    }));
    checks
}

/// Which of the snapshots that are stored this host cannot restore, and why.
fn snapshots(directory: &Path, named: Option<&Path>, has_kvm: bool) -> Option<Check> {
    const NAME: &str = "snapshots";
    if !directory.join("snapshots").is_dir() {
        return None;
    }
    let store = kelvin_store::Store::open(directory, false).ok()?;
    let stored = store.snapshots().ok()?;
    let (host_cpu, host_kernel) = kelvin_host::cpu::here();
    let firecracker = vmm::find_firecracker(named).filter(|_| has_kvm);
    let firecracker = firecracker.and_then(|binary| kelvin_vmm::firecracker::build_at(&binary).ok());
    let qemu = kelvin_vmm::qemu::build().ok();
    let accelerator = accel::detect().accelerator.to_string();
    let mut unfit: Vec<String> = Vec::new();
    for snapshot in stored.iter().filter(|snapshot| snapshot.manifest.mode.is_full()) {
        let identity = &snapshot.manifest.identity;
        // As a server with the VMM that the snapshot wants would compare it.
        let build = if identity.vmm == "firecracker" { &firecracker } else { &qemu };
        let here = Identity {
            vmm_build: build.clone().unwrap_or_default(),
            accelerator: accelerator.clone(),
            host_cpu: host_cpu.clone(),
            host_kernel: host_kernel.clone(),
            snapshot_format: SNAPSHOT_FORMAT,
            ..identity.clone()
        };
        let differences = identity.differences(&here);
        if !differences.is_empty() {
            unfit.push(format!("{} differs in {}", snapshot.manifest.id, differences.join(", ")));
        }
    }
    let count = stored.len();
    Some(if unfit.is_empty() {
        check(NAME, Verdict::Ok, format!("{count} stored, none that this host could not restore"), "")
    } else {
        let shown = unfit.iter().take(3).cloned().collect::<Vec<_>>().join("; ");
        check(
            NAME,
            Verdict::Warning,
            format!("{} of {count} do not fit this host: {shown}", unfit.len()),
            "templates are baked anew; what is paused waits for a host like its own; `kelvin gc` removes the rest",
        )
    })
}

/// Slots are tried, not guessed; and where they would lead to.
async fn network() -> Check {
    const NAME: &str = "network";
    if let Err(error) = net::check().await {
        let remedy =
            "run the server as root, with /dev/net/tun and libnftables1; sandboxes without a network work";
        return check(NAME, Verdict::Warning, kelvin_api::error::chain(&error), remedy);
    }
    if let Ok(Some(chain)) = net::foreign_drop().await {
        return check(
            NAME,
            Verdict::Warning,
            format!(
                "slots can be built, but the chain {chain} drops what is forwarded: sandboxes will not reach the internet"
            ),
            "accept what comes from and goes to links that begin with kv there; with Docker: \
             iptables -I DOCKER-USER -i kv+ -j ACCEPT; iptables -I DOCKER-USER -o kv+ -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
        );
    }
    match net::default_uplink().await {
        Ok(Some(uplink)) => check(NAME, Verdict::Ok, format!("slots can be built, uplink {uplink}"), ""),
        Ok(None) => check(
            NAME,
            Verdict::Warning,
            "slots can be built, but there is no default route: sandboxes reach nothing outside",
            "name the link with `kelvin serve --uplink`",
        ),
        Err(error) => {
            check(NAME, Verdict::Warning, error.to_string(), "name the link with `kelvin serve --uplink`")
        }
    }
}

async fn server(connection: &Connection) -> Check {
    let client = match config::client(connection) {
        Ok(client) => client,
        Err(_) => {
            return check(
                "server",
                Verdict::Warning,
                "no API key",
                "start one with `kelvin serve`; set KELVIN_API_KEY",
            );
        }
    };
    match client.node().await {
        Ok(node) => {
            check("server", Verdict::Ok, format!("{} answers, version {}", client.url(), node.version), "")
        }
        Err(error) => check(
            "server",
            Verdict::Warning,
            kelvin_api::error::chain(&error),
            "start one with `kelvin serve`",
        ),
    }
}

/// Records of sandboxes that another release wrote, or that are damaged.
fn records(directory: &Path) -> Option<Check> {
    const NAME: &str = "records";
    if !directory.join("ledger.db").is_file() {
        return None;
    }
    Some(match kelvin_node::check_records(directory) {
        Ok((count, unreadable)) if unreadable.is_empty() => {
            check(NAME, Verdict::Ok, format!("{count} of sandboxes, all of them are understood"), "")
        }
        Ok((count, unreadable)) => check(
            NAME,
            Verdict::Warning,
            format!("{} of {count} cannot be read: {}", unreadable.len(), unreadable.join("; ")),
            "their sandboxes are kept as they are: start the release that wrote them, or kill them",
        ),
        Err(error) => check(
            NAME,
            Verdict::Failed,
            kelvin_api::error::chain(&error),
            "start the release that wrote the ledger, as root",
        ),
    })
}

/// Prints all checks; the exit code is 1 when one has failed.
pub async fn run(connection: &Connection, output: Output, args: &DoctorArgs) -> Result<ExitCode, Failed> {
    let has_kvm = accel::detect().accelerator == accel::Accelerator::Kvm;
    let named = args.firecracker.as_deref();
    let directory = data_dir(args.data_dir.as_ref());
    let mut checks = host().await;
    checks.extend(firecracker(named, has_kvm));
    checks.push(network().await);
    checks.extend(data_directory(&directory));
    checks.extend(snapshots(&directory, named, has_kvm));
    checks.extend(records(&directory));
    checks.push(server(connection).await);
    print(output, &checks, |checks| {
        let mut table = table(&["check", "verdict", "found", "remedy"]);
        for check in checks {
            let verdict = match check.verdict {
                Verdict::Ok => "ok",
                Verdict::Warning => "warning",
                Verdict::Failed => "FAILED",
            };
            table.add_row([check.name, verdict, &check.found, check.remedy.as_deref().unwrap_or_default()]);
        }
        table
    });
    let failed = checks.iter().any(|check| check.verdict == Verdict::Failed);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_have_verdicts() {
        for (id, version, has_qemu, verdict) in [
            ("debian", "12", true, Verdict::Ok),
            ("debian", "\"13\"", true, Verdict::Ok),
            ("ubuntu", "\"22.04\"", false, Verdict::Failed),
            ("ubuntu", "\"22.04\"", true, Verdict::Warning),
            ("ubuntu", "\"24.04\"", true, Verdict::Warning),
            ("ubuntu", "\"26.04\"", true, Verdict::Warning),
            ("fedora", "44", true, Verdict::Warning),
        ] {
            let found = release(&format!("NAME=x\nVERSION_ID={version}\nID={id}\n"), has_qemu);
            assert_eq!(found.verdict, verdict, "{found:?}");
            assert_eq!(found.remedy.is_some(), verdict != Verdict::Ok, "{found:?}");
        }
    }

    #[test]
    fn few_descriptors_are_told() {
        for (most, verdict) in
            [(None, Verdict::Ok), (Some(1 << 20), Verdict::Ok), (Some(4096), Verdict::Warning)]
        {
            assert_eq!(descriptors(most).verdict, verdict, "{most:?}");
        }
    }

    #[test]
    fn what_ubuntu_restricts_is_told() {
        assert_eq!(user_namespaces(Some("1\n")).map(|check| check.verdict), Some(Verdict::Ok));
        assert!(user_namespaces(Some("0\n")).is_none() && user_namespaces(None).is_none());
        let denied = kvm_rights(&Err(std::io::ErrorKind::PermissionDenied.into())).unwrap();
        assert!(denied.remedy.unwrap().contains("usermod -aG kvm"));
        assert!(kvm_rights(&Err(std::io::ErrorKind::NotFound.into())).is_none());
    }

    #[tokio::test]
    async fn programs_are_told_apart() {
        let missing = program("no-such-program-of-kelvin", "--version", "pkg", Verdict::Failed).await;
        assert_eq!((missing.verdict, missing.found.as_str()), (Verdict::Failed, "not found in PATH"));
        assert_eq!(missing.remedy.as_deref(), Some("apt-get install pkg"));
        // Ends at once with an error: it is there, and of no use.
        let broken = program("false", "--version-of-kelvin", "pkg", Verdict::Warning).await;
        assert_eq!(broken.verdict, Verdict::Warning, "{broken:?}");
        // Reads its standard input, which is empty, instead of waiting for somebody to type.
        assert_eq!(program("cat", "-", "pkg", Verdict::Failed).await.verdict, Verdict::Ok);
    }
}
