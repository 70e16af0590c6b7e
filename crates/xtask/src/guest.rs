//! Makes what a machine boots: kernel, initial RAM disk with the agent, root file system.
//!
//! ```text
//! .cache/guest/kernel/   vmlinuz and the modules, from Debian's cloud kernel package
//! .cache/guest/initrd    newc archive: modules in load order, the agent as /init
//! .cache/guest/*.ext4    the images, each made again when its recipe under guest/ changes
//! ```
//!
//! Everything is made under another name and renamed: what has its name is whole.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::packages::{as_root, codename, debian_sources, feed, with_lists};
use crate::{Result, cache, cargo, output, root, run, say};

/// Sizes of the images' disks: about 0.5 and 1 GiB of files, the rest is free.
const BASE_MIB: u64 = 2560;
const INTERPRETER_MIB: u64 = 3584;
/// So that the same files give the same image.
const EPOCH: &str = "1767225600";
const UUID: &str = "6b656c76-696e-4000-8000-000000000001";

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
    let wanted = fs::read_to_string(root().join("guest/base/modules"))?;
    let kernel = ensure_kernel(&directory, "linux-image-cloud-amd64", &wanted)?;
    let agent = build_agent()?;
    let initrd = ensure_initrd(&directory, &kernel, &agent)?;
    let rootfs = ensure_image(&directory, "base", &["base"], BASE_MIB)?;
    Ok(Guest { kernel: kernel.join("vmlinuz"), initrd, rootfs })
}

/// Makes the image of the code interpreter, when it is missing or out of date.
pub fn ensure_interpreter() -> Result<PathBuf> {
    ensure_image(&cache().join("guest"), "code-interpreter", &["base", "code-interpreter"], INTERPRETER_MIB)
}

/// Whether `stamp` holds `key`; the thing beside it is then up to date.
pub fn is_fresh(stamp: &Path, key: &str) -> bool {
    fs::read_to_string(stamp).is_ok_and(|text| text == key)
}

/// A short digest of `parts`, for stamps.
pub fn digest(parts: &[&[u8]]) -> String {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// The kernel of Debian's meta package `package` in `directory/kernel`, with the modules in `wanted`, a line each, and
/// what they need.
pub fn ensure_kernel(directory: &Path, package: &str, wanted: &str) -> Result<PathBuf> {
    let done = directory.join("kernel");
    let key = digest(&[wanted.as_bytes()]);
    if is_fresh(&done.join("key"), &key) {
        return Ok(done);
    }
    say(&format!("fetching {package}"));
    let work = directory.join("kernel.new");
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(work.join("modules"))?;
    // apt drops its privileges for a download; the directory has to let it in.
    fs::set_permissions(&work, fs::Permissions::from_mode(0o777))?;
    with_lists(|| download_kernel(&work, package))?;
    let archive = fs::read_dir(&work)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or("apt downloaded nothing")?;
    let tree = work.join("tree");
    run(Command::new("dpkg").arg("-x").arg(&archive).arg(&tree))?;
    let release = fs::read_dir(tree.join("lib/modules"))?
        .flatten()
        .next()
        .and_then(|entry| entry.file_name().into_string().ok())
        .ok_or("the package has no modules")?;
    run(Command::new("depmod").arg("-b").arg(&tree).arg(&release))?;
    let mut order: Vec<String> = Vec::new();
    for module in wanted.lines() {
        let shown = Command::new("modprobe")
            .arg("-d")
            .arg(&tree)
            .args(["-S", &release, "--show-depends", module])
            .output()?;
        if !shown.status.success() {
            return Err(
                format!("modprobe {module}: {}", String::from_utf8_lossy(&shown.stderr).trim()).into()
            );
        }
        for line in String::from_utf8(shown.stdout)?.lines() {
            // "builtin x" needs nothing.
            // Options of this machine's own configuration follow.
            let path = line.strip_prefix("insmod ").and_then(|rest| rest.split_whitespace().next());
            let Some(path) = path else {
                continue;
            };
            let name = Path::new(path).file_name().and_then(|name| name.to_str()).ok_or("odd module name")?;
            if !order.iter().any(|known| known == name) {
                fs::copy(path, work.join("modules").join(name))?;
                order.push(name.to_owned());
            }
        }
    }
    fs::write(work.join("modules/order"), order.join("\n"))?;
    fs::copy(tree.join(format!("boot/vmlinuz-{release}")), work.join("vmlinuz"))?;
    fs::remove_dir_all(&tree)?;
    fs::remove_file(&archive)?;
    fs::write(work.join("key"), key)?;
    let _ = fs::remove_dir_all(&done);
    fs::rename(&work, &done)?;
    Ok(done)
}

/// Downloads the package of the kernel that the meta package names.
fn download_kernel(directory: &Path, meta: &str) -> Result<()> {
    let package = output(Command::new("apt-cache").args(["depends", meta]))?
        .lines()
        .find_map(|line| {
            line.trim()
                .strip_prefix("Depends: ")
                .filter(|name| name.starts_with("linux-image"))
                .map(str::to_owned)
        })
        .ok_or_else(|| format!("apt knows no {meta}"))?;
    run(Command::new("apt-get")
        .args(["-q", "download", &package])
        .current_dir(directory)
        .stdout(std::io::stderr()))
}

/// Builds the agent: static, small. One target directory with everything else.
fn build_agent() -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    say("building the guest's agent");
    let mut command = cargo();
    command.args(["build", "--package", "kelvin-agent", "--profile", "agent", "--target", TARGET]).env(
        "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
        "-C target-feature=+crt-static -C relocation-model=static",
    );
    run(command.stdout(std::io::stderr()))?;
    Ok(root().join("target").join(TARGET).join("agent/kelvin-agent"))
}

fn ensure_initrd(directory: &Path, kernel: &Path, agent: &Path) -> Result<PathBuf> {
    let done = directory.join("initrd");
    let mut archive = Newc::default();
    for name in ["dev", "proc", "sys", "modules", "newroot"] {
        archive.add(name, 0o040_755, &[]);
    }
    // The kernel opens the console for PID 1 before anything is mounted.
    archive.node("dev/console", 0o020_600, (5, 1), &[]);
    add_modules(&mut archive, kernel)?;
    archive.add("init", 0o100_755, &fs::read(agent)?);
    write_if_changed(&done, &archive.finish())?;
    Ok(done)
}

/// Adds the modules of `kernel`, and the order in which they are loaded.
pub fn add_modules(archive: &mut Newc, kernel: &Path) -> Result<()> {
    let mut modules: Vec<_> =
        fs::read_dir(kernel.join("modules"))?.flatten().map(|entry| entry.path()).collect();
    modules.sort();
    for path in modules {
        let name = path.file_name().and_then(|name| name.to_str()).ok_or("odd module name")?.to_owned();
        archive.add(&format!("modules/{name}"), 0o100_644, &fs::read(&path)?);
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

/// Makes the image `name` of the recipes, each on top of those before it.
fn ensure_image(directory: &Path, name: &str, recipes: &[&str], mib: u64) -> Result<PathBuf> {
    let (mut packages, mut wheels, mut parts) = (Vec::new(), Vec::new(), vec![mib.to_le_bytes().to_vec()]);
    for recipe in recipes {
        let recipe = root().join("guest").join(recipe);
        let mut files: Vec<_> = fs::read_dir(&recipe)?.flatten().map(|entry| entry.path()).collect();
        files.sort();
        // The modules are the kernel's.
        for file in files.iter().filter(|file| file.file_name().is_some_and(|name| name != "modules")) {
            parts.push(fs::read(file)?);
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
        .arg(codename()?)
        .arg(&tree)
        .arg("-")
        .env("SOURCE_DATE_EPOCH", EPOCH)
        .stdout(std::io::stderr());
    feed(&mut bootstrap, &sources)?;
    let fresh = directory.join(format!("{name}.ext4.new"));
    let _ = fs::remove_file(&fresh);
    fs::File::create(&fresh)?.set_len(mib << 20)?;
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
    Ok(done)
}
