//! What a root file system of any image needs to be a sandbox's, brought by init where it is missing.
//!
//! ```text
//! directories   /etc /home /root /tmp /var/tmp /var/log
//! identity      /etc/hostname, hosts, machine-id: links to memory; /etc/resolv.conf
//! accounts      `user` with a home: lines of /etc/group, /etc/shadow and, last, /etc/passwd
//! a shell       no /bin/sh: busybox from the initial RAM disk, and a link `sh` to it, in /usr/local/lib/kelvin
//! login shells  where something else was brought, or a build has said what processes get: a file in /etc/profile.d that
//!               keeps the PATH that the image says
//! ```
//!
//! What the image has is never replaced. Each boot looks: where nothing is missing, nothing is written. [`BEGUN`] is there
//! from before the first thing that is brought until after the last, then it is [`STAMP`]. In an image that has that, or the
//! links, a file that is empty is what its owner wants. A disk that is full or read-only is told on the console and stops
//! nothing. A crash leaves files `*.kelvin-new` that the next boot replaces, and an account without its line in /etc/passwd:
//! with [`BEGUN`] there that boot completes all of it.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Read, Seek};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use kelvin_api::image::DEFAULTS;

use crate::guest_file;
use crate::identity::EDITED;
use crate::network::GATEWAY;
use crate::place::{make_way, write_as, write_whole};
use crate::shell;
use crate::users;

/// Says that something was brought here.
const STAMP: &str = "/var/lib/kelvin/furnished";
/// Says that something is being brought, and not all of it may be there.
const BEGUN: &str = "/var/lib/kelvin/furnishing";
/// Where the identity of a machine is in memory.
const MEMORY: &str = "/run/kelvin";
/// The most that is read of a file, in bytes.
const MOST: usize = 1 << 20;
/// The user of processes for which nobody names one.
const USER: &str = "user";
/// The id that it has where that is free.
const FIRST_ID: u32 = 1000;

const DIRECTORIES: [(&str, u32); 6] = [
    ("/etc", 0o755),
    ("/home", 0o755),
    ("/root", 0o700),
    ("/tmp", 0o1777),
    ("/var/tmp", 0o1777),
    ("/var/log", 0o755),
];

/// Brings what is missing in the root file system at `root`. `busybox`: a static one, when there is one.
pub fn furnish(root: &Path, busybox: Option<File>) {
    let mut image = Image { root, is_begun: false, is_known: false, brought: Vec::new(), failed: Vec::new() };
    let was_furnished = image.at(STAMP).exists();
    image.is_begun = image.at(BEGUN).exists();
    image.is_known = !image.is_begun && (was_furnished || image.has_identity());
    image.directories();
    image.identity();
    // Before the account: its shell may be this one.
    image.step("a shell", |image| image.shell(busybox));
    image.step("the account", Image::account);
    if !image.brought.is_empty() || image.is_begun || was_furnished || image.at(DEFAULTS).exists() {
        image.step(shell::PROFILE, Image::profile);
    }
    if image.is_begun {
        image.step("a stamp", |image| fs::rename(image.at(BEGUN), image.at(STAMP)));
        image.tell_what_is_missing();
    }
    for (what, lines) in [("brought", &image.brought), ("could not be brought", &image.failed)] {
        if !lines.is_empty() {
            eprintln!("init: {what}: {}", lines.join(", "));
        }
    }
}

struct Image<'a> {
    root: &'a Path,
    /// [`BEGUN`] is there.
    is_begun: bool,
    /// An agent has run here before: what is empty was emptied.
    is_known: bool,
    brought: Vec<String>,
    failed: Vec<String>,
}

/// What is at a path.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    /// A link to nothing.
    Dangling,
    Empty,
    Something,
}

impl Image<'_> {
    /// `path`, which is absolute, in the image.
    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn step(&mut self, what: &str, work: impl FnOnce(&mut Self) -> io::Result<()>) {
        if let Err(error) = work(self) {
            self.failed.push(format!("{what} ({error})"));
        }
    }

    /// Whether its identity is in memory, or was edited: an agent has run here, or it is an image of the house.
    fn has_identity(&self) -> bool {
        let id = Path::new(MEMORY).join("machine-id");
        fs::read_link(self.at("/etc/machine-id")).is_ok_and(|found| found == id) || self.at(EDITED).exists()
    }

    /// Before anything is brought.
    fn begin(&mut self) -> io::Result<()> {
        if !self.is_begun && !self.is_known {
            make_dirs(&self.at("/var/lib/kelvin"))?;
            write_whole(&self.at(BEGUN), b"")?;
            self.is_begun = true;
        }
        Ok(())
    }

    fn found(&self, path: &str) -> io::Result<Found> {
        let path = self.at(path);
        let own = match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
            own => own?,
        };
        if own.is_symlink() && !path.exists() {
            return Ok(Found::Dangling);
        }
        Ok(if own.is_file() && own.len() == 0 { Found::Empty } else { Found::Something })
    }

    fn directories(&mut self) {
        for (path, mode) in DIRECTORIES {
            self.step(path, |image| {
                if image.found(path)? == Found::Nothing {
                    image.begin()?;
                    let at = image.at(path);
                    make_dirs(&at)?;
                    fs::set_permissions(&at, Permissions::from_mode(mode))?;
                    image.brought.push(path.to_owned());
                }
                Ok(())
            });
        }
    }

    /// Activation writes who the machine is into memory: a clone of a machine without these links writes its disk for it.
    fn identity(&mut self) {
        // Somebody has edited them: `identity` knows what is whose.
        if !self.at(EDITED).exists() {
            for name in ["hostname", "hosts", "machine-id"] {
                let path = format!("/etc/{name}");
                self.step(&path, |image| image.link(&path, &Path::new(MEMORY).join(name)));
            }
        }
        self.step("/etc/resolv.conf", |image| {
            if image.is_missing("/etc/resolv.conf")? {
                image.begin()?;
                write_as(&image.at("/etc/resolv.conf"), format!("nameserver {GATEWAY}\n").as_bytes(), 0o644)?;
                image.brought.push("/etc/resolv.conf".to_owned());
            }
            Ok(())
        });
    }

    /// Whether a file has to be brought: images have empty ones where their runtime mounts others.
    fn is_missing(&self, path: &str) -> io::Result<bool> {
        Ok(match self.found(path)? {
            Found::Nothing | Found::Dangling => true,
            Found::Empty => !self.is_known,
            Found::Something => false,
        })
    }

    fn link(&mut self, path: &str, target: &Path) -> io::Result<()> {
        let at = self.at(path);
        // Ours leads nowhere until the agent runs.
        if fs::read_link(&at).is_ok_and(|found| found == target) {
            return Ok(());
        }
        // Source: machine-id(5).
        let is_unset = || guest_file::read(&at, 64).is_ok_and(|text| text.trim_ascii() == b"uninitialized");
        if !(self.is_missing(path)? || path == "/etc/machine-id" && is_unset()) {
            return Ok(());
        }
        self.begin()?;
        replace_by_link(&at, target)?;
        self.brought.push(path.to_owned());
        Ok(())
    }

    fn shell(&mut self, busybox: Option<File>) -> io::Result<()> {
        let (program, link) = (format!("{}/busybox", shell::DIRECTORY), self.at(shell::BROUGHT));
        if self.at("/bin/sh").exists() || (self.at(&program).exists() && link.is_symlink()) {
            return Ok(());
        }
        let Some(mut busybox) = busybox else {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the initial RAM disk has no busybox"));
        };
        self.begin()?;
        let mut content = Vec::new();
        busybox.rewind()?;
        busybox.read_to_end(&mut content)?;
        make_dirs(&self.at(shell::DIRECTORY))?;
        write_as(&self.at(&program), &content, 0o755)?;
        replace_by_link(&link, Path::new("busybox"))?;
        self.brought.push("busybox as the shell".to_owned());
        Ok(())
    }

    fn read(&self, path: &str) -> io::Result<Option<String>> {
        match guest_file::read(&self.at(path), MOST) {
            Ok(bytes) => String::from_utf8(bytes)
                .map(Some)
                .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("{path} is not UTF-8"))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io::Error::new(error.kind(), format!("{path}: {error}"))),
        }
    }

    /// Makes the account, when there is none of that name; its line in `/etc/passwd` last.
    fn account(&mut self) -> io::Result<()> {
        let passwd = self.read("/etc/passwd")?;
        let text = passwd.as_deref().unwrap_or_default();
        if let Some(fields) = fields_of(text, USER) {
            let home = fields.get(5).copied().unwrap_or_default();
            if let (Some(uid), Some(gid)) = (number(&fields, 2), number(&fields, 3))
                && home.starts_with("/home/")
            {
                return self.home(home, uid, gid);
            }
            return Ok(());
        }
        self.begin()?;
        let group = self.read("/etc/group")?;
        let shell = ["/bin/bash", "/bin/sh"].into_iter().find(|shell| self.at(shell).exists());
        let accounts =
            Accounts::new(text, group.as_deref().unwrap_or_default(), shell.unwrap_or(shell::BROUGHT))
                .ok_or_else(|| io::Error::new(io::ErrorKind::QuotaExceeded, "no id is free"))?;
        if let Some(text) = &accounts.group {
            write_as(&self.at("/etc/group"), text.as_bytes(), 0o644)?;
        }
        let shadow = self.read("/etc/shadow")?;
        let shadow = shadow.as_deref().unwrap_or_default();
        if fields_of(shadow, USER).is_none() {
            let root = if shadow.is_empty() { "root:*:::::::\n" } else { "" };
            let text = format!("{root}{}{USER}:!:::::::\n", ended(shadow));
            write_as(&self.at("/etc/shadow"), text.as_bytes(), 0o640)?;
        }
        self.home(&format!("/home/{USER}"), accounts.uid, accounts.gid)?;
        // As in the images of the house: an image that has sudo has it to be used.
        let sudoer = format!("/etc/sudoers.d/{USER}");
        if self.at("/etc/sudoers.d").is_dir() && !self.at(&sudoer).exists() {
            let line = format!("{USER} ALL=(ALL:ALL) NOPASSWD: ALL\n");
            write_as(&self.at(&sudoer), line.as_bytes(), 0o440)?;
        }
        write_whole(&self.at("/etc/passwd"), accounts.passwd.as_bytes())?;
        self.brought.push(format!("the user {USER} ({})", accounts.uid));
        Ok(())
    }

    /// Makes the home directory, whole or not at all.
    fn home(&mut self, path: &str, uid: u32, gid: u32) -> io::Result<()> {
        if self.found(path)? != Found::Nothing {
            return Ok(());
        }
        self.begin()?;
        let fresh = self.at(path).with_extension("kelvin-new");
        make_way(&fresh)?;
        make_dirs(&fresh)?;
        chown(&fresh, Some(uid), Some(gid))?;
        fs::rename(&fresh, self.at(path))?;
        self.brought.push(path.to_owned());
        Ok(())
    }

    /// Clients start login shells, whose profile begins with a `PATH` of its own.
    fn profile(&mut self) -> io::Result<()> {
        if self.at("/etc/profile.d").is_dir() && self.found(shell::PROFILE)? == Found::Nothing {
            write_as(&self.at(shell::PROFILE), shell::PROFILE_TEXT.as_bytes(), 0o644)?;
            self.brought.push(shell::PROFILE.to_owned());
        }
        Ok(())
    }

    /// What people miss in such an image, and that nobody brings.
    fn tell_what_is_missing(&self) {
        let missing: Vec<&str> = [
            ("/bin/bash", "bash"),
            ("/usr/bin/sudo", "sudo"),
            ("/etc/ssl/certs", "certificates of authorities (for TLS)"),
        ]
        .into_iter()
        .filter(|(path, _)| !self.at(path).exists())
        .map(|(_, name)| name)
        .collect();
        if !missing.is_empty() {
            eprintln!("init: the image has no {}", missing.join(", no "));
        }
    }
}

/// `path` and its parents, for everybody to enter.
fn make_dirs(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(path)
}

fn replace_by_link(path: &Path, target: &Path) -> io::Result<()> {
    let fresh = path.with_extension("kelvin-new");
    make_way(&fresh)?;
    symlink(target, &fresh)?;
    fs::rename(&fresh, path)
}

/// The files of accounts with one more.
struct Accounts {
    uid: u32,
    gid: u32,
    passwd: String,
    /// None when the group is there.
    group: Option<String>,
}

impl Accounts {
    /// `passwd` and `group`: what is there, empty for nothing. None when no id is free.
    fn new(passwd: &str, group: &str, shell: &str) -> Option<Self> {
        let ids = |text: &str| -> BTreeSet<u32> {
            text.lines().filter_map(|line| users::id(line.split(':').nth(2)?)).collect()
        };
        let (users, groups) = (ids(passwd), ids(group));
        let free = |id: &u32| !users.contains(id) && !groups.contains(id);
        let own = fields_of(group, USER).and_then(|fields| number(&fields, 2));
        let uid = own
            .filter(|gid| *gid >= FIRST_ID && !users.contains(gid))
            .or_else(|| (FIRST_ID..60_000).find(free))?;
        let gid = own.unwrap_or(uid);
        let root = if passwd.is_empty() { format!("root:x:0:0:root:/root:{shell}\n") } else { String::new() };
        let line = format!("{USER}:x:{uid}:{gid}::/home/{USER}:{shell}\n");
        let roots = if group.is_empty() { "root:x:0:\n" } else { "" };
        Some(Self {
            uid,
            gid,
            passwd: format!("{root}{}{line}", ended(passwd)),
            group: own.is_none().then(|| format!("{roots}{}{USER}:x:{gid}:\n", ended(group))),
        })
    }
}

/// `text` with the end of its last line.
fn ended(text: &str) -> String {
    let end = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    format!("{text}{end}")
}

/// The fields of the line that is about `name`.
fn fields_of<'a>(text: &'a str, name: &str) -> Option<Vec<&'a str>> {
    text.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| fields[0] == name)
}

fn number(fields: &[&str], index: usize) -> Option<u32> {
    users::id(fields.get(index)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    struct Root(PathBuf);

    impl Root {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("kelvin-furnish-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn read(&self, path: &str) -> String {
            fs::read_to_string(self.0.join(path)).unwrap()
        }

        fn mode(&self, path: &str) -> u32 {
            fs::metadata(self.0.join(path)).unwrap().mode() & 0o7777
        }

        /// Every path, with what tells whether it was touched.
        fn all(&self) -> Vec<(PathBuf, u64, i64, i64)> {
            let (mut found, mut left) = (Vec::new(), vec![self.0.clone()]);
            while let Some(path) = left.pop() {
                let own = fs::symlink_metadata(&path).unwrap();
                if own.is_dir() {
                    left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
                }
                found.push((path, own.ino(), own.mtime(), own.mtime_nsec()));
            }
            found.sort();
            found
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn busybox() -> Option<File> {
        use std::io::Write;
        let memory = rustix::fs::memfd_create("busybox", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(memory);
        file.write_all(b"#!/bin/true\n").unwrap();
        Some(file)
    }

    fn is_root() -> bool {
        let is_root = rustix::process::geteuid().is_root();
        if !is_root {
            println!("skipped: not root, a home cannot be given away");
        }
        is_root
    }

    #[test]
    fn an_empty_image_gets_all_of_it_once() {
        if !is_root() {
            return;
        }
        let root = Root::new("empty");
        furnish(&root.0, busybox());
        assert_eq!(
            root.read("etc/passwd"),
            format!("root:x:0:0:root:/root:{0}\nuser:x:1000:1000::/home/user:{0}\n", shell::BROUGHT)
        );
        assert_eq!(root.read("etc/group"), "root:x:0:\nuser:x:1000:\n");
        assert_eq!(root.read("etc/shadow"), "root:*:::::::\nuser:!:::::::\n");
        assert_eq!(root.read("etc/resolv.conf"), "nameserver 169.254.0.22\n");
        assert_eq!((root.mode("tmp"), root.mode("etc/shadow"), root.mode("root")), (0o1777, 0o640, 0o700));
        assert_eq!(root.read("usr/local/lib/kelvin/sh"), "#!/bin/true\n");
        assert_eq!(root.mode("usr/local/lib/kelvin/busybox"), 0o755);
        let home = fs::metadata(root.0.join("home/user")).unwrap();
        assert_eq!((home.uid(), home.gid(), home.mode() & 0o777), (1000, 1000, 0o755));
        assert_eq!(fs::read_link(root.0.join("etc/hosts")).unwrap(), Path::new("/run/kelvin/hosts"));
        let all = root.all();
        furnish(&root.0, busybox());
        assert_eq!(root.all(), all, "the second boot writes nothing");
        // What its owner has emptied since stays so.
        fs::write(root.0.join("etc/resolv.conf"), "").unwrap();
        furnish(&root.0, None);
        assert_eq!(root.read("etc/resolv.conf"), "");
    }

    #[test]
    fn what_an_image_has_is_never_replaced() {
        if !is_root() {
            return;
        }
        let root = Root::new("debian");
        let passwd = "root:x:0:0:root:/root:/bin/bash\nnode:x:1000:1000::/home/node:/bin/sh";
        root.write("etc/passwd", passwd);
        root.write("etc/group", "root:x:0:\nnode:x:1000:\nx:x:1001:\n");
        root.write("etc/shadow", "root:*:19000:0:99999:7:::\n");
        root.write("etc/hosts", "10.0.0.1 db\n");
        root.write("etc/hostname", "");
        root.write("etc/machine-id", "uninitialized\n");
        root.write("bin/sh", "");
        root.write("bin/bash", "");
        root.write("etc/sudoers.d/README", "");
        root.write("etc/profile.d/x.sh", "");
        symlink("../run/systemd/resolve/stub-resolv.conf", root.0.join("etc/resolv.conf")).unwrap();
        fs::create_dir_all(root.0.join("tmp")).unwrap();
        fs::set_permissions(root.0.join("tmp"), Permissions::from_mode(0o700)).unwrap();
        furnish(&root.0, None);
        assert_eq!(root.read("etc/passwd"), format!("{passwd}\nuser:x:1002:1002::/home/user:/bin/bash\n"));
        assert_eq!(root.read("etc/group"), "root:x:0:\nnode:x:1000:\nx:x:1001:\nuser:x:1002:\n");
        assert_eq!(root.read("etc/shadow"), "root:*:19000:0:99999:7:::\nuser:!:::::::\n");
        assert_eq!(root.read("etc/hosts"), "10.0.0.1 db\n");
        assert_eq!(root.mode("tmp"), 0o700);
        assert_eq!(root.read("etc/resolv.conf"), "nameserver 169.254.0.22\n", "its link led nowhere");
        for name in ["hostname", "machine-id"] {
            let link = fs::read_link(root.0.join("etc").join(name)).unwrap();
            assert_eq!(link, Path::new("/run/kelvin").join(name));
        }
        assert_eq!(root.mode("etc/sudoers.d/user"), 0o440);
        assert_eq!(root.read(&shell::PROFILE[1..]), shell::PROFILE_TEXT);
        assert!(!root.0.join("usr/local/lib/kelvin").exists(), "it has a shell");
    }

    #[test]
    fn an_image_of_the_house_is_left_as_it_is() {
        let root = Root::new("base");
        root.write("etc/passwd", "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000::/home/user:/bin/bash\n");
        root.write("etc/group", "root:x:0:\nuser:x:1000:\n");
        root.write("etc/resolv.conf", "nameserver 169.254.0.22\n");
        root.write("bin/sh", "");
        root.write("etc/profile.d/x.sh", "");
        for path in ["home/user", "root", "tmp", "var/tmp", "var/log"] {
            fs::create_dir_all(root.0.join(path)).unwrap();
        }
        for name in ["hostname", "hosts", "machine-id"] {
            symlink(Path::new("/run/kelvin").join(name), root.0.join("etc").join(name)).unwrap();
        }
        let all = root.all();
        furnish(&root.0, busybox());
        assert_eq!(root.all(), all);
        // What its owner has emptied stays so, without a stamp too.
        root.write("etc/resolv.conf", "");
        let all = root.all();
        furnish(&root.0, busybox());
        assert_eq!(root.all(), all);
        // A build on it says what processes get: the profile is all that it needs for that.
        root.write(&DEFAULTS[1..], "{}");
        let count = root.all().len();
        furnish(&root.0, busybox());
        assert_eq!(
            (root.all().len(), root.read(&shell::PROFILE[1..])),
            (count + 1, shell::PROFILE_TEXT.into())
        );
    }

    #[test]
    fn what_was_begun_is_brought_whole_by_the_next_boot() {
        if !is_root() {
            return;
        }
        let root = Root::new("begun");
        for path in ["etc/profile.d/x.sh", "etc/resolv.conf", "bin/sh"] {
            root.write(path, "");
        }
        // What an init before had in its way, and would have waited for.
        let fifo = root.0.join("etc/passwd.kelvin-new");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        // Killed after the account, before the rest.
        let mut killed = Image {
            root: &root.0,
            is_begun: false,
            is_known: false,
            brought: Vec::new(),
            failed: Vec::new(),
        };
        killed.directories();
        killed.link("/etc/machine-id", Path::new("/run/kelvin/machine-id")).unwrap();
        killed.account().unwrap();
        assert!(!root.0.join(&STAMP[1..]).exists());
        furnish(&root.0, None);
        assert_eq!(
            root.read("etc/resolv.conf"),
            "nameserver 169.254.0.22\n",
            "empty by the image, not by anybody"
        );
        assert_eq!(root.read(&shell::PROFILE[1..]), shell::PROFILE_TEXT);
        assert!(root.0.join(&STAMP[1..]).exists() && !root.0.join(&BEGUN[1..]).exists());
        let all = root.all();
        furnish(&root.0, None);
        assert_eq!(root.all(), all);
    }

    #[test]
    fn an_id_is_free_in_both_files_and_a_group_of_that_name_is_used() {
        let of = |passwd: &str, group: &str| {
            let made = Accounts::new(passwd, group, "/bin/sh").unwrap();
            (made.uid, made.gid, made.group.is_none())
        };
        assert_eq!(of("", ""), (1000, 1000, false));
        assert_eq!(of("a:x:1000:1000::/:\n", "b:x:1001:\n"), (1002, 1002, false));
        assert_eq!(of("", "user:x:1005:\n"), (1005, 1005, true));
        assert_eq!(of("a:x:1005:1::/:\n", "user:x:1005:\n"), (1000, 1005, true));
        assert_eq!(of("", "user:x:50:\n"), (1000, 50, true), "a group of the system's");
        let (odd_passwd, odd_group) = ("::\nx\n:x:1000\n", "user\n");
        assert_eq!(of(odd_passwd, odd_group), (1001, 1001, false));
        // -1 would mean root's to chown.
        assert_eq!(of("", "user:x:4294967295:\n"), (1000, 1000, false));
        let all: String = (FIRST_ID..60_000).map(|id| format!("a:x:{id}:\n")).collect();
        assert!(Accounts::new(&all, "", "/bin/sh").is_none(), "no account shares an id");
    }
}
