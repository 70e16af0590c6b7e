//! The shell for images that have none: busybox, static, from the distribution's package. It goes into the initial RAM disk.
//!
//! ```text
//! busybox/busybox    the program
//! busybox/source     the source package and its version, for the package's copyright
//! busybox/key        what it was made of
//! ```
//!
//! Made once for all checkouts: `busybox/DIGEST-OF-KEY/` of the shared cache is a copy. Not installed: a host that has the
//! package `busybox` would lose it.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::packages::{files_to_download, with_lists};
use crate::stamps::digest;
use crate::{Result, cache, files as fs, output, run, say, shared};

const PACKAGE: &str = "busybox-static";
/// Where a release of the distribution has it.
const PLACES: [&str; 2] = ["usr/bin/busybox", "bin/busybox"];
const FILES: [&str; 2] = ["busybox", "source"];

/// Makes `directory/busybox`, when it is missing or apt has another version; the program's path.
pub fn ensure(directory: &Path) -> Result<PathBuf> {
    let done = directory.join("busybox");
    let old = fs::read_to_string(done.join("key")).unwrap_or_default();
    let files = match with_lists(|| files_to_download(&[PACKAGE])) {
        Ok(files) => files,
        // Without a network what is there is as good as it was.
        Err(error) if !old.is_empty() => {
            say(&format!("the guest's busybox stays as it is: {error}"));
            return Ok(done.join("busybox"));
        }
        Err(error) => return Err(error),
    };
    let key = format!("{}\n", files.join("\n"));
    if old == key {
        return Ok(done.join("busybox"));
    }
    let work = directory.join("busybox.new");
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(&work)?;
    let kept = shared().join("busybox").join(digest(&[key.as_bytes()]));
    if !fs::read_to_string(kept.join("key")).is_ok_and(|found| found == key) || copy(&kept, &work).is_err() {
        download(&work)?;
        if let Err(error) = fs::create_dir_all(&kept)
            .map_err(Into::into)
            .and_then(|()| copy(&work, &kept))
            .and_then(|()| Ok(fs::write(kept.join("key"), &key)?))
        {
            say(&format!("busybox is not kept for other checkouts: {error}"));
        }
    }
    fs::write(work.join("key"), key)?;
    let _ = fs::remove_dir_all(&done);
    fs::rename(&work, &done)?;
    Ok(done.join("busybox"))
}

/// The source package of what [`ensure`] has made, and its version: `busybox 1:1.35.0-4`.
pub fn source() -> Result<String> {
    Ok(fs::read_to_string(cache().join("guest/busybox/source"))?.trim().to_owned())
}

/// Each under another name until it is whole: two checkouts may make the same.
fn copy(from: &Path, to: &Path) -> Result<()> {
    for name in FILES {
        let fresh = to.join(format!("{name}.{}.new", std::process::id()));
        fs::copy(from.join(name), &fresh)?;
        fs::rename(fresh, to.join(name))?;
    }
    Ok(())
}

fn download(work: &Path) -> Result<()> {
    say(&format!("fetching {PACKAGE}"));
    // apt drops its privileges for a download; the directory has to let it in.
    fs::set_permissions(work, fs::Permissions::from_mode(0o777))?;
    with_lists(|| {
        let mut download = Command::new("apt-get");
        download.args(["-q", "download", PACKAGE]).current_dir(work);
        run(download.stdout(std::io::stderr()))
    })?;
    fs::set_permissions(work, fs::Permissions::from_mode(0o755))?;
    let archives: Vec<_> =
        fs::list(work)?.into_iter().filter(|path| path.extension().is_some_and(|end| end == "deb")).collect();
    let [archive] = &archives[..] else {
        return Err(format!("apt downloaded {} packages as {PACKAGE}", archives.len()).into());
    };
    let field = |name: &str| output(Command::new("dpkg-deb").arg("-f").arg(archive).arg(name));
    fs::write(work.join("source"), source_of(&field("Source")?, &field("Version")?))?;
    let tree = work.join("tree");
    run(Command::new("dpkg-deb").arg("-x").arg(archive).arg(&tree))?;
    let program =
        PLACES.iter().map(|place| tree.join(place)).find(|path| path.is_file() && !path.is_symlink());
    let program = program.ok_or_else(|| format!("{PACKAGE} has neither of {}", PLACES.join(", ")))?;
    fs::copy(program, work.join("busybox"))?;
    fs::remove_dir_all(&tree)?;
    Ok(fs::remove_file(archive)?)
}

/// Name and version of the source package. Source: deb-control(5), `Source`: left out where it is the package's own name,
/// the version where it is the package's.
fn source_of(source: &str, version: &str) -> String {
    let source = source.trim();
    let (name, own) = source.split_once(' ').unwrap_or((source, ""));
    let own = own.trim_matches(['(', ')']);
    let name = if name.is_empty() { PACKAGE } else { name };
    format!("{name} {}\n", if own.is_empty() { version.trim() } else { own })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_of_a_package_is_named() {
        assert_eq!(
            source_of("busybox (1:1.35.0-4+deb12u1)\n", "1:1.35.0-4+b1\n"),
            "busybox 1:1.35.0-4+deb12u1\n"
        );
        assert_eq!(source_of("busybox\n", "1:1.37.0-6\n"), "busybox 1:1.37.0-6\n");
        assert_eq!(source_of("\n", "1\n"), "busybox-static 1\n");
    }
}
