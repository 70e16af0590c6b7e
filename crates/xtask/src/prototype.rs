//! The prototype that Firecracker's figures are measured against, and its guest.
//!
//! Both are optional and no part of this repository: whoever has them puts `firecracker_clone.py` and `guest-initrd.sh`
//! into `.cache/prototypes/`. `.cache/kvm-host/prototype/` is what the second makes. Made under another name and renamed:
//! what has its name is whole.

use std::path::PathBuf;
use std::process::Command;

use crate::guest::Kernel;
use crate::packages;
use crate::stamps::{digest, is_fresh};
use crate::{Result, cache, files as fs, run, say};

/// The program.
pub fn program() -> PathBuf {
    cache().join("prototypes/firecracker_clone.py")
}

/// Its guest's initial RAM disk: for the kernel that our guests have.
pub fn initrd() -> PathBuf {
    cache().join("kvm-host/prototype/initrd.gz")
}

/// Makes its guest, when it is missing or out of date. After our own guest.
pub fn ensure() -> Result<()> {
    let recipe = cache().join("prototypes/guest-initrd.sh");
    if !program().exists() || !recipe.exists() {
        return Ok(());
    }
    if Kernel::asked()? == Kernel::Own {
        say("no prototype: its guest has the modules of the distribution's kernel, and guests have ours");
        return Ok(());
    }
    let kernel = fs::read(cache().join("guest/kernel/vmlinuz"))?;
    let key = digest(&[&kernel, &fs::read(&recipe)?]);
    let done = cache().join("kvm-host/prototype");
    if is_fresh(&done.join("key"), &key) {
        return Ok(());
    }
    packages::ensure_all(&["busybox-static", "cpio"])?;
    say("building the prototype's guest");
    let fresh = cache().join("kvm-host/prototype.new");
    for directory in [&fresh, &done] {
        let _ = fs::remove_dir_all(directory);
    }
    // It asks apt for a kernel.
    packages::with_lists(|| run(Command::new("bash").arg(&recipe).arg(&fresh).stdout(std::io::stderr())))?;
    // It boots with our kernel, which Firecracker 1.16 wants unpacked: the modules have to be that kernel's.
    if fs::read(fresh.join("vmlinuz"))? != kernel {
        say(
            "no prototype: apt has another kernel now than the guest's; without .cache/guest both are the same",
        );
        fs::remove_dir_all(&fresh)?;
        return Ok(());
    }
    fs::write(fresh.join("key"), key)?;
    Ok(fs::rename(fresh, done)?)
}
