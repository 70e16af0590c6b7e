//! Which VMM runs the machines: Firecracker where there is KVM and a binary, QEMU everywhere else.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kelvin_host::accel::Accelerator;
use kelvin_vmm::Driver;
use kelvin_vmm::firecracker::{self, Firecracker, Setup, config};
use kelvin_vmm::qemu::Qemu;

use crate::args::{VmmArg, VmmArgs};
use crate::output::Failed;

/// Firecracker's binary: the one that is named, or the first in the search path.
pub fn find_firecracker(named: Option<&Path>) -> Option<PathBuf> {
    if let Some(path) = named {
        return Some(path.to_owned());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join("firecracker")).find(|found| found.is_file())
}

fn options(args: &VmmArgs) -> config::Options {
    config::Options {
        huge_pages: args.huge_pages,
        cpu_template: args.cpu_template.clone(),
        disk_bytes_per_s: args.sandbox_disk_bandwidth.map(|mib| u64::from(mib.get()) << 20),
        disk_ops_per_s: args.sandbox_disk_iops,
        clock_goes_on: args.clock_goes_on,
    }
}

/// Which one it is, and why.
pub fn choose(args: &VmmArgs, accelerator: Accelerator) -> Result<Option<PathBuf>, Failed> {
    let found = find_firecracker(args.firecracker.as_deref());
    let usable = || accelerator == Accelerator::Kvm && rustix::process::geteuid().is_root();
    match (args.vmm, found) {
        (VmmArg::Qemu, _) => Ok(None),
        (VmmArg::Auto, Some(binary)) if usable() => match firecracker::look_at(&binary) {
            Ok(_) => Ok(Some(binary)),
            Err(error) => {
                tracing::warn!(error = kelvin_api::error::chain(&error), "QEMU is used instead");
                Ok(None)
            }
        },
        (VmmArg::Auto, _) => Ok(None),
        (VmmArg::Firecracker, None) => Err(Failed::new(
            "there is no Firecracker".to_owned(),
            "name its binary with --firecracker or KELVIN_FIRECRACKER; it is in no package registry",
        )),
        (VmmArg::Firecracker, Some(_)) if accelerator != Accelerator::Kvm => Err(Failed::new(
            format!("Firecracker needs KVM: {}", kelvin_host::accel::detect().reason),
            "use a host with hardware virtualisation, or --vmm qemu",
        )),
        (VmmArg::Firecracker, Some(binary)) => Ok(Some(binary)),
    }
}

/// Which of the options that only Firecracker has was given.
fn firecracker_only(args: &VmmArgs) -> Option<&'static str> {
    [
        ("--huge-pages", args.huge_pages != config::HugePages::None),
        ("--cpu-template", args.cpu_template.is_some()),
        ("--sandbox-disk-bandwidth", args.sandbox_disk_bandwidth.is_some()),
        ("--sandbox-disk-iops", args.sandbox_disk_iops.is_some()),
        ("--clock-goes-on", args.clock_goes_on),
    ]
    .into_iter()
    .find_map(|(name, used)| used.then_some(name))
}

/// Opens the driver that is chosen.
pub fn open(args: &VmmArgs, data_dir: &Path, accelerator: Accelerator) -> Result<Arc<dyn Driver>, Failed> {
    let failed = |error: kelvin_vmm::Error| Failed::other(&error);
    let launcher = std::env::current_exe().map_err(|error| Failed::other(&error))?;
    kelvin_host::process::adopt_orphans().map_err(|error| Failed::other(&error))?;
    let Some(binary) = choose(args, accelerator)? else {
        if let Some(name) = firecracker_only(args) {
            return Err(Failed::new(
                format!("{name} is Firecracker's, and the machines here run in QEMU"),
                "leave it out, or use --vmm firecracker",
            ));
        }
        return Ok(Arc::new(Qemu::open(data_dir, accelerator, launcher).map_err(failed)?));
    };
    let setup = Setup { binary, launcher, options: options(args) };
    Ok(Arc::new(Firecracker::open(data_dir, setup).map_err(failed)?))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        vmm: VmmArgs,
    }

    fn args(words: &[&str]) -> VmmArgs {
        let line = [&["kelvin"], words].concat();
        Line::try_parse_from(line).unwrap().vmm
    }

    #[test]
    fn what_cannot_be_is_refused_and_not_passed_over() {
        let emulated = |words: &[&str]| choose(&args(words), Accelerator::Tcg);
        assert!(emulated(&["--vmm", "firecracker", "--firecracker", "/bin/true"]).is_err());
        assert_eq!(emulated(&["--vmm", "auto", "--firecracker", "/bin/true"]).ok(), Some(None));
        // It runs, but is none.
        let kvm = choose(&args(&["--vmm", "auto", "--firecracker", "/bin/true"]), Accelerator::Kvm);
        assert_eq!(kvm.ok(), Some(None));
        let data_dir = tempfile::tempdir().unwrap();
        for option in [
            &["--cpu-template", "T2"] as &[&str],
            &["--huge-pages", "transparent"],
            &["--sandbox-disk-bandwidth", "10"],
            &["--sandbox-disk-iops", "100"],
            &["--clock-goes-on"],
        ] {
            let given = args(&[&["--vmm", "qemu"], option].concat());
            assert_eq!(firecracker_only(&given), Some(option[0]));
            assert!(open(&given, data_dir.path(), Accelerator::Tcg).is_err());
        }
        assert_eq!(firecracker_only(&args(&["--vmm", "qemu"])), None);
    }
}
