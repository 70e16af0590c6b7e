//! A kernel of the distribution, with the modules that are wanted of it, from its packages.
//!
//! ```text
//! kernel/vmlinuz
//! kernel/modules/     plain modules for an initial RAM disk, `order`: their names as they are to be loaded,
//!                     `devname`: device nodes that load a module when they are opened
//! kernel/image/       RELEASE/: the tree for `modprobe` in a root file system: all of those and what is loaded on demand
//! kernel/key          what it was made of
//! ```
//!
//! Made once for all checkouts: `kernels/DIGEST-OF-KEY/` of the shared cache is a copy, and `DIGEST-OF-KEY.lock` is locked while
//! one makes it.
//!
//! Distributions differ in where modules are (`lib/modules`, `usr/lib/modules`), in which package (Ubuntu's kernel has
//! them in another one) and in how they are packed. All are unpacked here: the agent's init loads plain modules, and
//! under emulation a guest would unpack for longer than it loads.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::packages::{ensure_all, files_to_download, with_lists};
use crate::stamps::{EPOCH, digest};
use crate::{Result, files as fs, output, run, say, shared};

/// What is wanted of a kernel: lists of modules, a line each. `?name` is taken where the kernel has it; text after `#` is
/// for people. What the kernel has built in is there.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The meta package.
    pub package: &'a str,
    /// Loaded by an initial RAM disk, in this order.
    pub loaded: &'a str,
    /// What `modprobe` finds beside those.
    pub on_demand: &'a str,
}

/// A way in which modules are packed: extension, program, package.
const PACKED: [(&str, &[&str], &str); 3] = [
    ("xz", &["xz", "--decompress", "--quiet"], "xz-utils"),
    ("zst", &["zstd", "--decompress", "--rm", "--quiet"], "zstd"),
    ("gz", &["gzip", "--decompress", "--quiet"], "gzip"),
];

/// What the result looks like; another number makes everything anew.
const FORMAT: u64 = 1;

/// Makes `directory/kernel`, when it is missing or out of date: when other modules are wanted, or when apt has another
/// version of its packages.
pub fn ensure(directory: &Path, wanted: Wanted<'_>) -> Result<PathBuf> {
    let asked = digest(&[
        &FORMAT.to_le_bytes(),
        wanted.package.as_bytes(),
        wanted.loaded.as_bytes(),
        wanted.on_demand.as_bytes(),
    ]);
    let (names, files) = match with_lists(|| resolve(wanted.package)) {
        Ok((names, files)) => (names, Ok(files)),
        Err(error) => (Vec::new(), Err(error)),
    };
    make_once(directory, &asked, files, |work, _| {
        say(&format!("fetching {}", wanted.package));
        let archives = download(work, &names)?;
        let tree = unpack(work, &archives)?;
        make(work, &tree, wanted, &names.join(", "))?;
        Ok(fs::remove_dir_all(&tree)?)
    })
}

/// Makes `directory/kernel` by `make`, unless it is there or another checkout has made the same: its key is `asked`, which is
/// over what is wanted, and the `files` of the packages that it is made of. `make` is told an empty directory to make it in,
/// and the key; nobody makes the same meanwhile.
pub fn make_once(
    directory: &Path,
    asked: &str,
    files: Result<Vec<String>>,
    make: impl FnOnce(&Path, &str) -> Result<()>,
) -> Result<PathBuf> {
    let done = directory.join("kernel");
    let old = fs::read_to_string(done.join("key")).unwrap_or_default();
    let files = match files {
        Ok(files) => files,
        // Without a network what is there is as good as it was.
        Err(error) if old.lines().next() == Some(asked) => {
            say(&format!("the guest's kernel stays as it is: {error}"));
            return Ok(done);
        }
        Err(error) => return Err(error),
    };
    let key = format!("{asked}\n{}\n", files.join("\n"));
    if old == key {
        return Ok(done);
    }
    let kept = shared().join("kernels").join(digest(&[key.as_bytes()]));
    let _alone = alone(&kept);
    // Another command of this checkout may have made it meanwhile.
    if fs::read_to_string(done.join("key")).is_ok_and(|found| found == key) {
        return Ok(done);
    }
    fs::create_dir_all(directory)?;
    let work = directory.join("kernel.new");
    let _ = fs::remove_dir_all(&work);
    // Of another checkout: the key is over everything that goes in.
    if fs::read_to_string(kept.join("key")).is_ok_and(|found| found == key) && copy(&kept, &work).is_ok() {
        let _ = fs::remove_dir_all(&done);
        fs::rename(&work, &done)?;
        return Ok(done);
    }
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(&work)?;
    make(&work, &key)?;
    fs::write(work.join("key"), key)?;
    let _ = fs::remove_dir_all(&done);
    fs::rename(&work, &done)?;
    if let Err(error) = share(&done, &kept) {
        say(&format!("the kernel is not kept for other checkouts: {error}"));
    }
    Ok(done)
}

/// Waits until nobody else makes `kept`; the kernel unlocks when its maker dies. Where no lock can be made nothing is kept
/// for others either.
fn alone(kept: &Path) -> Option<fs::File> {
    fs::create_dir_all(kept.parent()?).ok()?;
    let lock = fs::create(kept.with_extension("lock")).ok()?;
    if let Err(fs::TryLockError::WouldBlock) = lock.try_lock() {
        say("waiting: another checkout makes the same kernel");
        lock.lock().ok()?;
    }
    Some(lock)
}

/// Downloads `packages` into `directory`; their files.
pub fn download(directory: &Path, packages: &[impl AsRef<std::ffi::OsStr>]) -> Result<Vec<PathBuf>> {
    // apt drops its privileges for a download; the directory has to let it in.
    fs::set_permissions(directory, fs::Permissions::from_mode(0o777))?;
    with_lists(|| {
        let mut download = Command::new("apt-get");
        download.args(["-q", "download"]).args(packages).current_dir(directory);
        run(download.stdout(std::io::stderr()))
    })?;
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
    let files = fs::list(directory)?.into_iter();
    Ok(files.filter(|path| path.extension().is_some_and(|end| end == "deb")).collect())
}

/// Keeps the kernel `done` as `kept`, under another name until it is whole: two checkouts may make the same.
fn share(done: &Path, kept: &Path) -> Result<()> {
    let fresh = kept.with_extension(format!("{}.new", std::process::id()));
    fs::create_dir_all(kept.parent().unwrap_or(kept))?;
    copy(done, &fresh)?;
    let _ = fs::remove_dir_all(kept);
    match fs::rename(&fresh, kept) {
        // Another was quicker with the same.
        Err(_) if kept.is_dir() => Ok(fs::remove_dir_all(&fresh)?),
        renamed => Ok(renamed?),
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    output(Command::new("cp").args(["-a", "--reflink=auto"]).arg(from).arg(to)).map(drop)
}

/// The packages that the kernel of `meta` consists of: their names; their files, which name the version, with digests.
fn resolve(meta: &str) -> Result<(Vec<String>, Vec<String>)> {
    let mut found: Vec<String> = Vec::new();
    let mut ask = vec![meta.to_owned()];
    while let Some(package) = ask.pop() {
        let depends = output(Command::new("apt-cache").args(["depends", "--important", &package]))?;
        for name in parts_of_a_kernel(&depends) {
            if name != meta && !found.contains(&name) {
                found.push(name.clone());
                ask.push(name);
            }
        }
    }
    if found.is_empty() {
        return Err(format!(
            "apt knows no kernel package that {meta} depends on; does `apt-cache policy {meta}` \
                            have a candidate?"
        )
        .into());
    }
    found.sort();
    let files = files_to_download(&found)?;
    Ok((found, files))
}

/// Among what `apt-cache depends` prints, the packages that have a kernel or its modules.
fn parts_of_a_kernel(depends: &str) -> Vec<String> {
    let names = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    names
        .filter(|name| name.starts_with("linux-image-") || name.starts_with("linux-modules-"))
        .map(str::to_owned)
        .collect()
}

/// Unpacks `archives` in `work`, and the modules in them. The tree has its modules in `lib/modules`, whatever the
/// packages and this machine's kmod think.
fn unpack(work: &Path, archives: &[PathBuf]) -> Result<PathBuf> {
    let tree = work.join("tree");
    for archive in archives {
        run(Command::new("dpkg-deb").arg("-x").arg(archive).arg(&tree))?;
        fs::remove_file(archive)?;
    }
    let (lib, usr) = (tree.join("lib/modules"), tree.join("usr"));
    if !lib.is_dir() && usr.join("lib/modules").is_dir() {
        fs::create_dir_all(tree.join("lib"))?;
        fs::rename(usr.join("lib/modules"), &lib)?;
    }
    let _ = fs::remove_dir_all(&usr);
    fs::symlink(".", &usr)?;
    for (extension, program, package) in PACKED {
        let packed = find(&tree, &format!(".ko.{extension}"))?;
        if packed.is_empty() {
            continue;
        }
        ensure_all(&[package])?;
        for some in packed.chunks(500) {
            run(Command::new(program[0]).args(&program[1..]).args(some))?;
        }
    }
    Ok(tree)
}

/// The files under `directory` whose names end in `end`; links are not followed.
pub fn find(directory: &Path, end: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for path in fs::list(&directory)? {
            if path.is_symlink() {
                continue;
            } else if path.is_dir() {
                directories.push(path);
            } else if fs::name(&path)?.ends_with(end) {
                found.push(path);
            }
        }
    }
    Ok(found)
}

/// Takes what is wanted out of `tree`; `packages` are the names of those that it comes from.
fn make(work: &Path, tree: &Path, wanted: Wanted<'_>, packages: &str) -> Result<()> {
    let all = tree.join("lib/modules");
    let releases = fs::list(&all).unwrap_or_default();
    let [release] = &releases[..] else {
        return Err(format!(
            "looked for the modules of one kernel in lib/modules and usr/lib/modules of {packages}: found {}",
            if releases.is_empty() { contents(tree) } else { format!("{releases:?}") }
        )
        .into());
    };
    let release = fs::name(release)?;
    let images = [format!("boot/vmlinuz-{release}"), format!("lib/modules/{release}/vmlinuz")];
    let image = images.iter().map(|name| tree.join(name)).find(|path| path.is_file()).ok_or_else(|| {
        format!("looked for the kernel as {} in {packages}: found {}", images.join(" and "), contents(tree))
    })?;
    fs::copy(image, work.join("vmlinuz"))?;
    run(Command::new("depmod").arg("-b").arg(tree).arg(release))?;
    let loaded = order(tree, release, wanted.loaded, packages)?;
    let soft = fs::read_to_string(tree.join("lib/modules").join(release).join("modules.softdep"))?;
    for (name, _) in names(wanted.loaded) {
        for needed in wanted_before(&soft, name) {
            // What nothing provides here would be a file system that does not mount, in every machine.
            order(tree, release, needed, packages)
                .map_err(|error| format!("{name} wants {needed} first: {error}"))?;
        }
    }
    fs::create_dir_all(work.join("modules"))?;
    let mut names = Vec::new();
    for path in &loaded {
        let name = fs::name(path)?;
        fs::copy(path, work.join("modules").join(name))?;
        names.push(name.to_owned());
    }
    fs::write(work.join("modules/order"), names.join("\n"))?;
    let mut kept = order(tree, release, wanted.on_demand, packages)?;
    kept.extend(loaded);
    let image = work.join("image");
    keep(tree, &image, release, &kept)?;
    // Of what can be loaded on demand, what is loaded by opening a device that is not there yet.
    let devices = fs::read_to_string(image.join("lib/modules").join(release).join("modules.devname"))?;
    fs::write(work.join("modules/devname"), devices)?;
    let made = image.join("lib/modules").join(release);
    fs::rename(made, image.join(release))?;
    fs::remove_dir_all(image.join("lib"))?;
    fs::remove_file(image.join("usr"))?;
    Ok(())
}

/// The files of the modules in `list` and of what they need, each after what it needs.
fn order(tree: &Path, release: &str, list: &str, packages: &str) -> Result<Vec<PathBuf>> {
    let mut order: Vec<PathBuf> = Vec::new();
    for (name, is_optional) in names(list) {
        // Nothing of this machine's own configuration.
        let shown =
            crate::outcome(Command::new("modprobe").args(["-C", "/dev/null", "-d"]).arg(tree).args([
                "-S",
                release,
                "--show-depends",
                name,
            ]))?;
        if !shown.status.success() {
            if is_optional {
                continue;
            }
            return Err(format!(
                "the kernel {release} of {packages} has no module {name}, built in or not: {}",
                String::from_utf8_lossy(&shown.stderr).trim()
            )
            .into());
        }
        for path in insertions(&String::from_utf8(shown.stdout)?) {
            if !order.contains(&path) {
                order.push(path);
            }
        }
    }
    Ok(order)
}

/// Names in a list of modules, and whether a kernel may lack them.
fn names(list: &str) -> impl Iterator<Item = (&str, bool)> {
    list.lines().filter_map(|line| {
        let name = line.split('#').next().unwrap_or_default().trim();
        match name.strip_prefix('?') {
            _ if name.is_empty() => None,
            Some(name) => Some((name, true)),
            None => Some((name, false)),
        }
    })
}

/// The files in what `modprobe --show-depends` prints: "insmod FILE OPTIONS"; "builtin NAME" needs nothing.
fn insertions(shown: &str) -> Vec<PathBuf> {
    let lines = shown.lines().filter_map(|line| line.strip_prefix("insmod "));
    lines.filter_map(|rest| rest.split_whitespace().next()).map(PathBuf::from).collect()
}

/// What the module `name` wants to be there before it, of the text of `modules.softdep`. Source: modprobe.d(5).
fn wanted_before<'a>(soft: &'a str, name: &str) -> Vec<&'a str> {
    let mut found = Vec::new();
    for line in soft.lines() {
        let mut words = line.split_whitespace();
        if words.next() == Some("softdep")
            && words.next().is_some_and(|of| of.replace('-', "_") == name.replace('-', "_"))
        {
            let before = words.skip_while(|&word| word != "pre:").skip(1).take_while(|&word| word != "post:");
            found.extend(before);
        }
    }
    found
}

/// Makes `image` a tree in which `modprobe` finds `modules`, which are files of `tree`.
fn keep(tree: &Path, image: &Path, release: &str, modules: &[PathBuf]) -> Result<()> {
    let from = tree.join("lib/modules").join(release);
    let to = image.join("lib/modules").join(release);
    fs::create_dir_all(&to)?;
    fs::symlink(".", image.join("usr"))?;
    for path in modules {
        // Some kmods print the path with `usr` in it: the same, through the link.
        let inside = path
            .strip_prefix(&from)
            .or_else(|_| path.strip_prefix(tree.join("usr/lib/modules").join(release)))
            .map_err(|_| format!("modprobe named {}, which is not in {}", path.display(), from.display()))?;
        let copy = to.join(inside);
        fs::create_dir_all(copy.parent().unwrap_or(&to))?;
        fs::copy(path, copy)?;
    }
    // What is built in is no error to ask for.
    for name in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        if from.join(name).exists() {
            fs::copy(from.join(name), to.join(name))?;
        }
    }
    run(Command::new("depmod").arg("-b").arg(image).arg(release))?;
    same_times(&to)
}

/// Gives every file below `directory` the same time and mode: the same files give the same image.
pub fn same_times(directory: &Path) -> Result<()> {
    let epoch = SystemTime::UNIX_EPOCH + Duration::from_secs(EPOCH.parse()?);
    for path in find(directory, "")? {
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
        fs::set_modified(&path, epoch)?;
    }
    Ok(())
}

/// What is in `directory`, for an error.
fn contents(directory: &Path) -> String {
    let names = |path: &Path| fs::list(path).unwrap_or_default();
    let mut found: Vec<String> = Vec::new();
    for path in names(directory).into_iter().filter(|path| !path.is_symlink()) {
        let below = names(&path);
        let shown = if below.is_empty() { vec![path] } else { below };
        found.extend(
            shown.iter().filter_map(|path| Some(path.strip_prefix(directory).ok()?.display().to_string())),
        );
    }
    if found.is_empty() { "nothing".to_owned() } else { found.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_have_comments_and_what_may_be_missing() {
        let list = "virtio_blk\n\n?crc32c_intel   # not in every kernel\n# nothing\next4\n";
        let found: Vec<_> = names(list).collect();
        assert_eq!(found, [("virtio_blk", false), ("crc32c_intel", true), ("ext4", false)]);
    }

    #[test]
    fn what_modprobe_prints_is_read() {
        let shown = "builtin crc32c_generic\ninsmod /t/lib/modules/6/kernel/dummy.ko numdummies=0 \n\
                     insmod /t/lib/modules/6/kernel/a.ko \n";
        let read = insertions(shown);
        assert_eq!(
            read,
            [Path::new("/t/lib/modules/6/kernel/dummy.ko"), Path::new("/t/lib/modules/6/kernel/a.ko")]
        );
    }

    /// A kernel may have a module by another name, or built in; what nothing provides is an error.
    #[test]
    fn what_a_module_wants_before_it_is_read() {
        let soft =
            "# text\nsoftdep ext4 pre: crc32c\nsoftdep xfs pre: a b post: c\nsoftdep nf-tables post: d\n";
        assert_eq!(wanted_before(soft, "ext4"), ["crc32c"]);
        assert_eq!(wanted_before(soft, "xfs"), ["a", "b"]);
        assert!(wanted_before(soft, "nf_tables").is_empty());
    }

    /// Debian's kernel is one package; Ubuntu's has its modules in another.
    #[test]
    fn the_parts_of_a_kernel_are_found() {
        let debian = "linux-image-cloud-amd64\n  Depends: linux-image-6.12.118+deb13-cloud-amd64\n";
        assert_eq!(parts_of_a_kernel(debian), ["linux-image-6.12.118+deb13-cloud-amd64"]);
        let ubuntu = "linux-image-6.8.0-31-generic\n  Depends: kmod\n |Depends: linux-base\n  \
                      Depends: linux-modules-6.8.0-31-generic\n  Conflicts: linux-image-unsigned\n";
        assert_eq!(parts_of_a_kernel(ubuntu), ["linux-modules-6.8.0-31-generic"]);
    }

    /// A package that is laid out in another way is told from one that lacks something.
    #[test]
    fn what_is_missing_is_named_with_what_is_there() {
        let top = std::env::temp_dir().join(format!("kelvin-kernel-{}", std::process::id()));
        let tree = top.join("tree");
        fs::create_dir_all(tree.join("boot")).unwrap();
        fs::write(tree.join("boot/config-6"), "").unwrap();
        let wanted = Wanted { package: "meta", loaded: "ext4", on_demand: "" };
        let error = make(&top, &tree, wanted, "linux-image-6").unwrap_err().to_string();
        assert!(
            error.contains("usr/lib/modules of linux-image-6") && error.contains("boot/config-6"),
            "{error}"
        );
        fs::create_dir_all(tree.join("lib/modules/6")).unwrap();
        let error = make(&top, &tree, wanted, "linux-image-6").unwrap_err().to_string();
        assert!(error.contains("boot/vmlinuz-6") && error.contains("lib/modules/6"), "{error}");
        fs::remove_dir_all(&top).unwrap();
    }
}
