//! Makes what a machine boots: kernel, initial RAM disk with the agent, root file system.
//!
//! ```text
//! .cache/guest/kernel/   vmlinuz and the modules, from the distribution's kernel for virtual machines, or a kernel of our own
//! .cache/guest/busybox/  a static shell, for images that have none
//! .cache/guest/initrd    newc archive: modules in load order, the agent as /init, busybox
//! .cache/guest/*.ext4    the images, each made again when its recipe under guest/ or the kernel changes
//! ```
//!
//! Everything is made under another name and renamed: what has its name is whole.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::distribution::Distribution;
use crate::kernel::{self, Wanted};
use crate::packages::{as_root, codename, debian_sources, feed};
use crate::stamps::{EPOCH, digest, is_fresh};
use crate::{
    Result, busybox, cache, cargo, files as fs, is_prebuilt, output, own_kernel, root, run, say, shared,
};

/// Sizes of the images' disks: about 0.5 and 1 GiB of files, the rest is free.
const BASE_MIB: u64 = 2560;
const INTERPRETER_MIB: u64 = 3584;
const UUID: &str = "6b656c76-696e-4000-8000-000000000001";

/// The variable that says which kernel guests have: `own` or `distribution`.
const KERNEL: &str = "KELVIN_GUEST_KERNEL";
/// Which one they have where it is not set.
const DEFAULT_KERNEL: Kernel = Kernel::Distribution;

/// Which kernel guests have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Ours, see [`own_kernel`].
    Own,
    /// The distribution's for virtual machines, see [`kernel`].
    Distribution,
}

impl Kernel {
    /// The one that `said` names, the value of the variable.
    fn parse(said: Option<&str>) -> Result<Self> {
        match said {
            None | Some("") => Ok(DEFAULT_KERNEL),
            Some("own") => Ok(Self::Own),
            Some("distribution") => Ok(Self::Distribution),
            Some(other) => Err(format!("{KERNEL}={other}: it is own or distribution").into()),
        }
    }

    /// The one that is asked for.
    pub fn asked() -> Result<Self> {
        Self::parse(std::env::var(KERNEL).ok().as_deref())
    }
}

/// Paths of a whole guest.
pub struct Guest {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub rootfs: PathBuf,
}

/// What servers of the tests are given, by the names that they look for.
pub fn files() -> [(&'static str, PathBuf); 4] {
    let directory = cache().join("guest");
    [
        ("vmlinuz", directory.join("kernel/vmlinuz")),
        ("initrd", directory.join("initrd")),
        ("rootfs.ext4", directory.join("base.ext4")),
        ("code-interpreter.ext4", directory.join("code-interpreter.ext4")),
    ]
}

/// Makes what is missing or out of date.
pub fn ensure() -> Result<Guest> {
    let directory = cache().join("guest");
    fs::create_dir_all(&directory)?;
    let kernel = match Kernel::asked()? {
        Kernel::Own => own_kernel::ensure(&directory)?,
        Kernel::Distribution => {
            let list = |name: &str| fs::read_to_string(root().join("guest/base").join(name));
            let (loaded, on_demand) = (list("modules")?, list("modules-on-demand")?);
            let package = Distribution::here()?.family().guest_kernel();
            kernel::ensure(&directory, Wanted { package, loaded: &loaded, on_demand: &on_demand })?
        }
    };
    let agent = build_agent()?;
    let busybox = busybox::ensure(&directory)?;
    let initrd = ensure_initrd(&directory, &kernel, &agent, &busybox)?;
    let rootfs = ensure_image(&directory, "base", &["base"], BASE_MIB)?;
    Ok(Guest { kernel: kernel.join("vmlinuz"), initrd, rootfs })
}

/// Makes the image of the code interpreter, when it is missing or out of date.
pub fn ensure_interpreter() -> Result<PathBuf> {
    ensure_image(&cache().join("guest"), "code-interpreter", &["base", "code-interpreter"], INTERPRETER_MIB)
}

/// Builds the agent: static, small. One target directory with everything else.
fn build_agent() -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let built = root().join("target").join(TARGET).join("agent/kelvin-agent");
    if is_prebuilt() {
        return Ok(built);
    }
    say("building the guest's agent");
    let mut command = cargo();
    command.args(["build", "--package", "kelvin-agent", "--profile", "agent", "--target", TARGET]).env(
        "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
        "-C target-feature=+crt-static -C relocation-model=static",
    );
    run(command.stdout(std::io::stderr()))?;
    Ok(built)
}

fn ensure_initrd(directory: &Path, kernel: &Path, agent: &Path, busybox: &Path) -> Result<PathBuf> {
    let done = directory.join("initrd");
    let mut archive = Newc::default();
    for name in ["dev", "proc", "sys", "modules", "newroot"] {
        archive.add(name, 0o040_755, &[]);
    }
    // The kernel opens the console for PID 1 before anything is mounted.
    archive.node("dev/console", 0o020_600, (5, 1), &[]);
    add_modules(&mut archive, kernel)?;
    archive.add("modules/release", 0o100_644, release(kernel)?.as_bytes());
    archive.add("init", 0o100_755, &fs::read(agent)?);
    archive.add("busybox", 0o100_755, &fs::read(busybox)?);
    write_if_changed(&done, &archive.finish())?;
    Ok(done)
}

/// The release of `kernel`, as it says itself: a guest with another kernel and this RAM disk loads none of its modules.
fn release(kernel: &Path) -> Result<String> {
    let trees = fs::list(kernel.join("image"))?;
    let [tree] = &trees[..] else {
        return Err(format!("{} has the modules of {} kernels", kernel.display(), trees.len()).into());
    };
    Ok(fs::name(tree)?.to_owned())
}

/// Adds the modules of `kernel`, the order in which they are loaded, and the device nodes that load others.
pub fn add_modules(archive: &mut Newc, kernel: &Path) -> Result<()> {
    for path in fs::list(kernel.join("modules"))? {
        archive.add(&format!("modules/{}", fs::name(&path)?), 0o100_644, &fs::read(&path)?);
    }
    Ok(())
}

/// Writes `bytes` to `path`, unless they are there: what depends on its time stays up to date.
pub fn write_if_changed(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let fresh = path.with_extension("new");
    fs::write(&fresh, bytes)?;
    fs::rename(&fresh, path)?;
    Ok(())
}

/// A cpio archive in the kernel's format. Source: Linux, Documentation/driver-api/early-userspace/buffer-format.
#[derive(Default)]
pub struct Newc {
    bytes: Vec<u8>,
    inode: u32,
}

impl Newc {
    /// Adds a file or directory.
    pub fn add(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.node(name, mode, (0, 0), data);
    }

    /// Adds anything; `device` is a device node's number.
    pub fn node(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.inode += 1;
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            u32::try_from(data.len()).unwrap_or(u32::MAX),
            0,
            0,
            device.0,
            device.1,
            u32::try_from(name.len() + 1).unwrap_or(u32::MAX),
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

/// What gives an image the modules of `kernel` that are loaded on demand: `modprobe`, and with it the guest's kernel, finds
/// them when it runs that kernel. Another kernel says that its own directory is not there.
fn modules_hook(kernel: &Path) -> String {
    let from = crate::quoted(&kernel.join("image").display().to_string());
    let copy = format!("cp -r --preserve=mode,timestamps {from}/. \"$1/usr/lib/modules/\"");
    format!("--customize-hook=mkdir -p \"$1/usr/lib/modules\" && {copy}")
}

/// Makes the image `name` of the recipes, each on top of those before it.
fn ensure_image(directory: &Path, name: &str, recipes: &[&str], mib: u64) -> Result<PathBuf> {
    let (mut packages, mut wheels, mut parts) = (Vec::new(), Vec::new(), vec![mib.to_le_bytes().to_vec()]);
    let release = codename()?;
    let kernel = directory.join("kernel");
    parts.extend([release.clone().into_bytes(), fs::read(kernel.join("key"))?]);
    for recipe in recipes {
        let recipe = root().join("guest").join(recipe);
        for file in fs::list(&recipe)? {
            // The modules are the kernel's.
            if !fs::name(&file)?.starts_with("modules") {
                parts.push(fs::read(&file)?);
            }
        }
        packages.extend(fs::read_to_string(recipe.join("packages"))?.lines().map(str::to_owned));
        let hook = recipe.join("customize.sh");
        wheels.push((hook, recipe.join("wheels")));
    }
    let done = directory.join(format!("{name}.ext4"));
    let key = digest(&parts.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let stamp = directory.join(format!("{name}.key"));
    if done.exists() && is_fresh(&stamp, &key) {
        return Ok(done);
    }
    let images = shared().join("images");
    let kept = images.join(format!("{name}-{key}.ext4"));
    if kept.exists() && copy(&kept, &done).is_ok() {
        fs::write(stamp, key)?;
        return Ok(done);
    }
    say(&format!("building the image {name} (some minutes)"));
    let tree = directory.join(format!("{name}.new"));
    run(as_root("rm").arg("-rf").arg(&tree))?;
    let sources = debian_sources()?;
    let mut hooks = Vec::new();
    for (hook, wheels) in wheels {
        hooks.push(if wheels.exists() {
            // A shell's line instead of a program's path: the root directory, then the wheels.
            format!("'{}' \"$1\" '{}'", hook.display(), crate::sdk::wheels(name, &wheels)?.display())
        } else {
            hook.display().to_string()
        });
    }
    let mut bootstrap = as_root("mmdebstrap");
    bootstrap
        .args(["--quiet", "--variant=minbase", "--format=directory"])
        .arg(format!("--include={}", packages.join(",")))
        .args(hooks.iter().map(|hook| format!("--customize-hook={hook}")))
        .arg(modules_hook(&kernel))
        .arg(release)
        .arg(&tree)
        .arg("-")
        .env("SOURCE_DATE_EPOCH", EPOCH)
        .stdout(std::io::stderr());
    feed(&mut bootstrap, &sources)?;
    let fresh = directory.join(format!("{name}.ext4.new"));
    let _ = fs::remove_file(&fresh);
    fs::create_sparse(&fresh, mib << 20)?;
    let mut mkfs = as_root("mke2fs");
    mkfs.args([
        "-q", "-F", "-t", "ext4", "-L", "kelvin", "-m", "0", "-b", "4096", "-J", "size=16", "-U", UUID,
    ])
    // Nothing is left to be initialised in the background of every machine.
    .args(["-E", &format!("lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0,hash_seed={UUID}")])
    .arg("-d")
    .arg(&tree)
    .arg(&fresh)
    .env("SOURCE_DATE_EPOCH", EPOCH)
    .env("E2FSPROGS_FAKE_TIME", EPOCH);
    run(&mut mkfs)?;
    run(as_root("rm").arg("-rf").arg(&tree))?;
    fs::rename(&fresh, &done)?;
    fs::write(stamp, key)?;
    // For other checkouts; what cannot be kept is built again there.
    if let Err(error) =
        fs::create_dir_all(&images).map_err(Into::into).and_then(|()| keep(&images, name, &done, &kept))
    {
        say(&format!("the image {name} is not kept for other checkouts: {error}"));
    }
    Ok(done)
}

/// Images of one name that are kept: of the checkouts that one works on.
const KEPT: usize = 3;

/// Keeps the image `done` as `kept`, and the newest others of its name.
fn keep(images: &Path, name: &str, done: &Path, kept: &Path) -> Result<()> {
    copy(done, kept)?;
    let mut others: Vec<(std::time::SystemTime, PathBuf)> = Vec::new();
    for path in fs::list(images)? {
        let is_it = fs::name(&path)?
            .strip_prefix(name)
            .is_some_and(|rest| rest.starts_with('-') && rest.ends_with(".ext4"));
        if is_it {
            others.push((fs::metadata(&path)?.modified()?, path));
        }
    }
    others.sort();
    for (_, path) in others.iter().rev().skip(KEPT) {
        fs::remove_file(path)?;
    }
    Ok(())
}

/// Another name for the image `from`, where the file system has it; else a copy. Whole or not there.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let fresh = to.with_extension(format!("{}.new", std::process::id()));
    let _ = fs::remove_file(&fresh);
    // Not on one file system: said by nobody, it is the usual thing in a container.
    if fs::hard_link(from, &fresh).is_err() {
        output(
            Command::new("cp")
                .args(["--sparse=always", "--reflink=auto", "--preserve=timestamps"])
                .arg(from)
                .arg(&fresh),
        )?;
    }
    Ok(fs::rename(&fresh, to)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_asked_for_by_name() {
        assert_eq!(Kernel::parse(None).unwrap(), DEFAULT_KERNEL);
        assert_eq!(Kernel::parse(Some("")).unwrap(), DEFAULT_KERNEL);
        assert_eq!(Kernel::parse(Some("own")).unwrap(), Kernel::Own);
        assert_eq!(Kernel::parse(Some("distribution")).unwrap(), Kernel::Distribution);
        let error = Kernel::parse(Some("debian")).unwrap_err().to_string();
        assert!(error.contains("KELVIN_GUEST_KERNEL=debian: it is own or distribution"), "{error}");
    }
}
