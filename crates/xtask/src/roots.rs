//! Roots of other releases beside this machine's, made by mmdebstrap and entered with namespaces.
//!
//! ```text
//! .cache/roots/NAME/tree        the root as mmdebstrap made it; `key` says of what
//! .cache/roots/NAME/upper       what was written into it since; `--fresh` begins without
//! .cache/roots/NAME/{cache,target}   what `.cache` and `target` are in there
//! ```
//!
//! `cargo xtask in-root RELEASE -- CMD` has a minimal system: what mmdebstrap's variant `apt` has, the C linker that the Rust
//! toolchain needs, this machine's toolchain, network, certificates and proxies. [`other_release`] has what Kelvin needs
//! at run time instead, and runs what was built here.
//!
//! A command has its own mounts and processes: what it leaves running ends with it, what it mounted is gone. Who writes:
//! one run at a time for each root; the kernel unlocks when it dies.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::packages::{self, as_root, codename, debian_sources, feed};
use crate::server::{self, PAUSED};
use crate::{Result, files as fs, output, root, run, say, shared};

/// The releases that there can be roots of.
const RELEASES: [&str; 2] = ["bookworm", "trixie"];
/// What the Rust toolchain needs of a system: a linker, and what it links.
const LINKER: &[&str] = &["gcc", "libc6-dev"];
/// What [`packages::NEEDED`] has for compiling only.
const COMPILING: &[&str] = &["g++", "gcc", "libc6-dev", "python3-venv"];

/// One root.
struct Root {
    directory: PathBuf,
    /// The release's name.
    release: String,
    /// Whether what was built here is used in there, instead of what is built there.
    is_prebuilt: bool,
}

impl Root {
    /// Makes the tree, when it is missing or has other packages.
    fn ensure(name: &str, release: &str, packages: &[&str], is_prebuilt: bool) -> Result<Self> {
        packages::ensure_all(&["mmdebstrap", "mount", "util-linux"])?;
        let directory = shared().join("roots").join(name);
        let root = Self { directory, release: release.to_owned(), is_prebuilt };
        fs::create_dir_all(&root.directory)?;
        let apt = output(Command::new("dpkg-query").args(["-W", "-f", "${Version}", "apt"]))?;
        let sources = sources(release)?;
        let key = format!("{release}\n{}\napt {apt}\n{sources}", packages.join(" "));
        let stamp = root.directory.join("key");
        if fs::read_to_string(&stamp).is_ok_and(|text| text == key) {
            return Ok(root);
        }
        say(&format!("making a root of {release} (once)"));
        root.forget()?;
        let fresh = root.directory.join("tree.new");
        let mut bootstrap = as_root("mmdebstrap");
        bootstrap
            .args(["--quiet", "--variant=apt", "--format=directory", "--skip=output/dev"])
            .args(["--aptopt=APT::Install-Recommends false"])
            .arg(format!("--include={}", packages.join(",")))
            .args([release.as_ref(), fresh.as_os_str(), "-".as_ref()])
            .stdout(std::io::stderr());
        feed(&mut bootstrap, &sources)?;
        run(as_root("mv").arg(&fresh).arg(root.directory.join("tree")))?;
        fs::write(stamp, key)?;
        Ok(root)
    }

    /// Removes everything of it.
    fn forget(&self) -> Result<()> {
        run(as_root("rm").args(["-rf", "--one-file-system"]).arg(&self.directory))?;
        Ok(fs::create_dir_all(&self.directory)?)
    }

    /// Removes what was written into it since it was made.
    fn refresh(&self) -> Result<()> {
        let written = ["upper", "work", "cache", "target"].map(|name| self.directory.join(name));
        run(as_root("rm").args(["-rf", "--one-file-system"]).args(written))
    }

    /// Runs `command` in it, in the directory of this tree, and returns its exit code.
    fn enter(&self, command: &[String]) -> Result<u8> {
        let lock = fs::create(self.directory.join("lock"))?;
        lock.try_lock().map_err(|_| format!("another command runs in {}", self.directory.display()))?;
        for name in ["upper", "work", "cache", "target", "merged", "host"] {
            fs::create_dir_all(self.directory.join(name))?;
        }
        for name in ["target", ".cache"] {
            fs::create_dir_all(root().join(name))?;
        }
        fs::write(self.directory.join("host/apt.conf"), apt_configuration()?)?;
        let home = |variable: &str, name: &str| {
            std::env::var_os(variable).map(PathBuf::from).unwrap_or_else(|| user_home().join(name))
        };
        let cargo_home = home("CARGO_HOME", ".cargo");
        let target = if self.is_prebuilt { root().join("target") } else { self.directory.join("target") };
        let mut enter = as_root("unshare");
        enter.args([
            "--mount",
            "--propagation",
            "private",
            "--pid",
            "--fork",
            "--kill-child=KILL",
            "sh",
            "-euc",
            ENTER,
            "sh",
        ]);
        enter
            .arg(&self.directory)
            .arg(root())
            .arg(target)
            .arg(&cargo_home)
            .arg(home("RUSTUP_HOME", ".rustup"))
            .arg(format!(
                "{}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                cargo_home.display()
            ))
            .arg(if self.is_prebuilt { "ro" } else { "rw" })
            .args(command)
            .env_remove("CARGO_TARGET_DIR");
        if self.is_prebuilt {
            enter.env("KELVIN_PREBUILT", "1");
        }
        say(&format!("on {}: {}", self.release, command.join(" ")));
        let status = crate::spawn(&mut enter)?
            .wait()
            .map_err(|error| format!("waiting for a command in {}: {error}", self.directory.display()))?;
        let code =
            status.code().ok_or_else(|| format!("{command:?} on {} ended with {status}", self.release))?;
        Ok(u8::try_from(code).unwrap_or(u8::MAX))
    }

    /// Runs `command` in it, which has to succeed.
    fn run(&self, command: &[&str]) -> Result<()> {
        let words: Vec<String> = command.iter().map(|&word| word.to_owned()).collect();
        match self.enter(&words)? {
            0 => Ok(()),
            code => Err(format!("on {}: {} ended with {code}", self.release, command.join(" ")).into()),
        }
    }
}

/// The arguments: the root's directory, this tree, its `target`, cargo's and rustup's directories, `PATH`, how `target` is
/// mounted, the command.
///
/// This machine's certificates stand where its environment says that they are, and beside them as sources: the package
/// `ca-certificates` makes the file anew when it is installed.
const ENTER: &str = r#"
own=$1 tree=$2 target=$3 cargo=$4 rustup=$5 path=$6 how=$7; shift 7
merged=$own/merged
over() {
  mount -t overlay overlay -o "lowerdir=$own/tree,upperdir=$1/upper,workdir=$1/work" "$merged"
}
# What is an overlay itself, as in a container or in one of these roots, takes no layer that is written. A root that compiles writes
# more than fits into memory.
over "$own" 2>/dev/null || {
  [ "$how" = ro ] || over "$own" || {
    echo "$own cannot be written below a root: XDG_CACHE_HOME has to name a directory on ext4 or XFS" >&2
    exit 1
  }
  mount -t tmpfs -o mode=755 tmpfs "$own/work"
  mkdir "$own/work/upper" "$own/work/work"
  over "$own/work"
}
mount --rbind /dev "$merged/dev"
mount --rbind /sys "$merged/sys"
mount -t proc proc "$merged/proc"
mount -t tmpfs -o mode=755 tmpfs "$merged/run"
for file in resolv.conf hosts pip.conf; do
  [ ! -e "/etc/$file" ] || cat "/etc/$file" >"$merged/etc/$file"
done
cat "$own/host/apt.conf" >"$merged/etc/apt/apt.conf.d/99host"
mkdir -p "$merged/etc/ssl/certs" "$merged/usr/local/share/ca-certificates"
for file in /usr/local/share/ca-certificates/*.crt; do
  [ ! -e "$file" ] || cat "$file" >"$merged$file"
done
[ ! -e /etc/ssl/certs/ca-certificates.crt ] || [ -e "$merged/usr/sbin/update-ca-certificates" ] ||
  cat /etc/ssl/certs/ca-certificates.crt >"$merged/etc/ssl/certs/ca-certificates.crt"
bind() {
  [ -d "$1" ] || return 0
  mkdir -p "$merged$2"
  mount --bind "$1" "$merged$2"
}
bind "$tree" "$tree"
bind "$own/cache" "$tree/.cache"
bind "$target" "$tree/target"
[ "$how" = rw ] || mount -o remount,bind,ro "$merged$tree/target"
bind "$cargo" "$cargo"
bind "$rustup" "$rustup"
export PATH="$path"
exec chroot "$merged" sh -c 'cd "$1" && shift && exec "$@"' sh "$tree" "$@"
"#;

fn user_home() -> PathBuf {
    std::env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from)
}

/// This machine's settings of how apt fetches, without what names a secret.
fn apt_configuration() -> Result<String> {
    let all = output(Command::new("apt-config").arg("dump"))?;
    let kept = ["Acquire::http::Proxy", "Acquire::https::Proxy", "Acquire::Check-", "Acquire::Retries"];
    let lines = all.lines().filter(|line| kept.iter().any(|name| line.starts_with(name)));
    Ok(lines.map(|line| format!("{line}\n")).collect())
}

/// Lines of a `sources.list` for `release`: this machine's, with the release's name for its own.
fn sources(release: &str) -> Result<String> {
    let lines = of_release(&debian_sources()?, &codename()?, release);
    if lines.is_empty() { Err(format!("no source of apt names {}", codename()?).into()) } else { Ok(lines) }
}

fn of_release(sources: &str, own: &str, release: &str) -> String {
    let mut found = String::new();
    for line in sources.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [kind, from, suite, rest @ ..] = &words[..] else { continue };
        // bookworm, bookworm-updates; apt says bookworm-security for what it was given so.
        if let Some(more) = suite.strip_prefix(own) {
            found.push_str(&format!("{kind} {from} {release}{more} {}\n", rest.join(" ")));
        }
    }
    found
}

/// `cargo xtask in-root [--fresh] RELEASE -- CMD`.
pub fn in_root(arguments: &[String]) -> Result<u8> {
    let (fresh, rest) = match arguments {
        [first, rest @ ..] if first == "--fresh" => (true, rest),
        rest => (false, rest),
    };
    let [release, rest @ ..] = rest else {
        return Err(format!("which release? cargo xtask in-root {} -- CMD", RELEASES.join("|")).into());
    };
    if !RELEASES.contains(&release.as_str()) {
        return Err(format!("unknown release {release:?}: {}", RELEASES.join(" or ")).into());
    }
    let command = rest.strip_prefix(&["--".to_owned()]).unwrap_or(rest);
    if command.is_empty() {
        return Err(format!("which command? cargo xtask in-root {release} -- CMD").into());
    }
    let found = Root::ensure(release, release, LINKER, false)?;
    if fresh {
        found.refresh()?;
    }
    found.enter(command)
}

/// A step of the tests: with the QEMU, kernel and user space of Debian 13, what was built on 12 passes `programs` (tests of
/// the driver) and [`server::steps`]; and what that QEMU has saved, this machine's refuses, and says why.
pub fn other_release(programs: &[String]) -> Result<()> {
    let (own, other) = ("bookworm", "trixie");
    if codename()? != own {
        println!(
            "skipped: what is built here does not run on an older release; the tests on {own} try {other}"
        );
        return Ok(());
    }
    let needed: Vec<&str> =
        packages::NEEDED.iter().copied().filter(|name| !COMPILING.contains(name)).collect();
    let needed = [&needed[..], &["debian-archive-keyring", "xz-utils"]].concat();
    let found = Root::ensure("other", other, &needed, true)?;
    let xtask =
        std::env::current_exe().map_err(|error| format!("asking for this program's path: {error}"))?;
    let xtask = xtask.display().to_string();
    found.run(&[&xtask, "guest"])?;
    for program in programs {
        found.run(&[program, "--test-threads=1", "--nocapture"])?;
    }
    // A run that was killed may have left a server's records.
    let data = found.directory.join("cache/data");
    run(as_root("rm")
        .arg("-f")
        .args([data.with_extension("xfs"), found.directory.join("cache").join(PAUSED)]))?;
    found.run(&[&xtask, "steps"])?;
    let id = fs::read_to_string(found.directory.join("cache").join(PAUSED))?;
    let binary = root().join("target/release/kelvin");
    server::mount(&binary, &data)?;
    let refused = refused(&binary, &data, id.trim(), &found.directory.join("server.log"));
    refused.and(server::unmount(&binary, &data))
}

/// What paused with the other release's QEMU cannot go on with this machine's; it is said which fields differ.
fn refused(binary: &Path, data: &Path, id: &str, log: &Path) -> Result<()> {
    let server = server::start_at(binary, data, "127.0.0.1:0", log)?;
    let tried = (|| {
        let mut resume = server::client_of(binary, &server, data)?;
        let resumed = crate::outcome(resume.args(["sandbox", "resume", id]))?;
        let said = String::from_utf8_lossy(&resumed.stderr).into_owned();
        say(&format!("resumed with another QEMU: {}", said.trim()));
        let mut kill = server::client_of(binary, &server, data)?;
        run(kill.args(["sandbox", "kill", id]).stdout(std::process::Stdio::null()))?;
        if resumed.status.success() || !said.contains("vmm_build") {
            return Err(format!(
                "a sandbox that another QEMU paused was to be refused for its vmm_build, but: {}, {said:?}",
                resumed.status
            )
            .into());
        }
        Ok(())
    })();
    let stopped = server::stop(&server);
    tried.and(stopped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_of_another_release_come_from_the_same_places() {
        let own = "deb http://a.example/debian bookworm main\ndeb http://a.example/debian bookworm-updates main\n\
                   deb http://b.example/security bookworm-security main non-free";
        assert_eq!(
            of_release(own, "bookworm", "trixie"),
            "deb http://a.example/debian trixie main\ndeb http://a.example/debian trixie-updates main\n\
             deb http://b.example/security trixie-security main non-free\n"
        );
        assert_eq!(of_release(own, "noble", "trixie"), "");
    }
}
