//! `kelvin setup`: a data directory whose file system can clone files.

use kelvin_host::datadir;

use crate::args::{SetupArgs, data_dir};
use crate::output::{Failed, line};

/// Changes the kernel's settings that cost every start of a machine something, until the next boot.
fn tune() -> Result<(), Failed> {
    let mut failed = Vec::new();
    for setting in kelvin_host::kvm::settings() {
        match (setting.cost, setting.tune()) {
            (None, _) => line(&format!("{}: {}, nothing to do", setting.name, setting.found)),
            (Some(_), Ok(())) => line(&format!("{}: changed, it was {}", setting.name, setting.found)),
            (Some(_), Err(error)) => failed.push(format!("{}: {error}", setting.name)),
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Failed::new(failed.join("; "), "run as root, before the first machine starts"))
}

/// Makes it, or unmounts it.
pub fn run(args: &SetupArgs) -> Result<(), Failed> {
    let directory = data_dir(args.data_dir.as_ref());
    let failed = |error: datadir::Error| {
        Failed::new(
            kelvin_api::error::chain(&error),
            "run as root; the packages xfsprogs and mount have to be installed",
        )
    };
    if args.tune {
        return tune();
    }
    if args.unmount {
        datadir::unmount_loop(&directory).map_err(failed)?;
        line(&format!("{} is not mounted", directory.display()));
        return Ok(());
    }
    if directory.is_dir() && datadir::can_reflink(&directory).unwrap_or(false) {
        line(&format!("{} can clone files already: nothing to do", directory.display()));
        return Ok(());
    }
    datadir::mount_loop(&directory, args.size_gib << 30).map_err(failed)?;
    line(&format!(
        "{} is an XFS with reflink, kept in {} (sparse, at most {} GiB); run `kelvin setup` again after a reboot",
        directory.display(),
        datadir::backing_file(&directory).display(),
        args.size_gib
    ));
    Ok(())
}
