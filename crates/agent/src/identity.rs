//! The files that say who the machine is: host name, machine-id, hosts, boot-id.
//!
//! ```text
//! /etc/hostname ──link──> /run/kelvin/hostname    memory, mapped: an activation copies bytes and makes no system call
//! ```
//!
//! Every one of them may have been changed by others since: root in the guest truncates, replaces and removes what it
//! likes. So before each snapshot they are looked at ([`Identity::check`]): what is as it was left is written by the
//! next activation as before; what was edited is the user's. Edits of `/etc/hosts` and `/etc/hostname` are kept on the
//! disk, so that they survive a pause without memory; a copy of the machine keeps them too, with its own name in the
//! place of its source's. A machine-id is never shared: a copy gets its own, whatever its source had made of the file.
//! What is odd (a FIFO, a directory, nothing) is replaced. A file that shrinks under its mapping between look and write
//! raises SIGBUS, which is caught, and is then written by path. Nothing here fails an activation but the kernel's refusal
//! of the host name: what cannot be written is told on the console.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::guest_file;

/// Where they are in memory; `/etc` has links to them, so that activation writes memory and not the disk.
const RUN: &str = "/run/kelvin";
/// What was edited here, and who the machine was then: on the disk, for a boot that follows.
const EDITED: &str = "/var/lib/kelvin/edited";
/// `/etc/hosts` up to the machine's own name.
const HOSTS: &[u8] = b"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 ";
/// What the machine's own line in `/etc/hosts` begins with.
const OWN_ADDRESS: &str = "127.0.1.1";
/// Where the kernel shows its boot-id.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Room for each file, in bytes: one page.
const ROOM: usize = 4096;
/// The most that an edited file may have to be understood, in bytes.
const MOST: usize = 256 << 10;
/// The longest host name. Source: hostname(7).
const LONGEST_NAME: usize = 64;

/// Pages whose files may shrink under them, for the handler of SIGBUS.
static PAGES: [AtomicUsize; 4] = [const { AtomicUsize::new(0) }; 4];
/// Whether one did.
static SHRANK: AtomicBool = AtomicBool::new(false);

/// Puts memory in the place of a page whose file has shrunk, so that the write in progress ends.
#[allow(unsafe_code)]
extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid struct; what is called is async-signal-safe.
    unsafe {
        let page = (*info).si_addr() as usize & !(ROOM - 1);
        if PAGES.iter().any(|known| known.load(Ordering::Relaxed) == page) && page != 0 {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            libc::mmap(page as *mut libc::c_void, ROOM, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            SHRANK.store(true, Ordering::Relaxed);
        } else {
            libc::signal(signal, libc::SIG_DFL);
        }
    }
}

#[allow(unsafe_code)]
fn catch_sigbus() -> io::Result<()> {
    // SAFETY: all zeros are valid; the handler has the form that SA_SIGINFO asks for.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A file in memory, mapped before the snapshot: to write it is to copy bytes, with no system call and no kernel code
/// that an emulator would have to translate first (6 to 13 ms for one `write`, measured).
struct Mapped {
    path: PathBuf,
    file: File,
    bytes: *mut u8,
    content: Vec<u8>,
    slot: usize,
    /// Which file it is: device and inode.
    place: (u64, u64),
    /// Whether the file has shrunk under the mapping, which is of nothing since.
    lost: bool,
}

// SAFETY: the mapping belongs to this struct alone and lives as long as it.
#[allow(unsafe_code)]
unsafe impl Send for Mapped {}

impl Mapped {
    /// Makes the file anew, with `content` in it. `slot`: its place in [`PAGES`].
    #[allow(unsafe_code)]
    fn create(name: &str, slot: usize, content: &[u8]) -> io::Result<Self> {
        let path = Path::new(RUN).join(name);
        make_way(&path)?;
        let file = File::options().create_new(true).read(true).write(true).mode(0o644).open(&path)?;
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        file.set_len(content.len() as u64)?;
        // SAFETY: a new mapping at an address of the kernel's choice; a page that its file takes away is dealt with by
        // the handler of SIGBUS.
        let bytes = unsafe {
            mmap(std::ptr::null_mut(), ROOM, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)?
        };
        PAGES[slot].store(bytes as usize, Ordering::Relaxed);
        let place = file.metadata().map(|found| (found.dev(), found.ino()))?;
        let mut made =
            Self { path, file, bytes: bytes.cast(), content: content.to_vec(), slot, place, lost: false };
        // Touched now: the page is there, writable, before the snapshot.
        made.set(content)?;
        Ok(made)
    }

    /// Replaces the content. Only a length that differs from the last one costs a system call.
    #[allow(unsafe_code)]
    fn set(&mut self, content: &[u8]) -> io::Result<()> {
        if content.is_empty() || content.len() > ROOM {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "an identity file has 1 to 4096 bytes"));
        }
        if content.len() != self.content.len() {
            self.file.set_len(content.len() as u64)?;
        }
        // SAFETY: the mapping has `ROOM` bytes, which `content` fits into; nobody else in this process uses it.
        unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), self.bytes, content.len()) };
        self.lost |= SHRANK.swap(false, Ordering::Relaxed);
        if self.lost {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file has shrunk"));
        }
        self.content.clear();
        self.content.extend_from_slice(content);
        Ok(())
    }

    /// The same by path, whatever has become of the file: it is made anew.
    fn replace(&mut self, content: &[u8]) -> io::Result<()> {
        let name = self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        *self = Self::create(&name, self.slot, content)?;
        Ok(())
    }

    /// [`Mapped::set`], and [`Mapped::replace`] when that does not do.
    fn write(&mut self, content: &[u8]) -> io::Result<()> {
        match self.set(content) {
            Err(_) => self.replace(content),
            done => done,
        }
    }

    /// What is at its path, when that is this very file.
    fn here(&self) -> Option<fs::Metadata> {
        fs::symlink_metadata(&self.path).ok().filter(|found| (found.dev(), found.ino()) == self.place)
    }

    /// Whether this very file is at its path, with what was written into it. One system call: its bytes are compared
    /// where they are mapped.
    #[allow(unsafe_code)]
    fn is_as_left(&mut self) -> bool {
        if self.lost || self.here().is_none_or(|found| found.len() != self.content.len() as u64) {
            return false;
        }
        let mut held = vec![0; self.content.len()];
        // SAFETY: as in `set`; what others write meanwhile is bytes, whichever.
        unsafe { std::ptr::copy_nonoverlapping(self.bytes, held.as_mut_ptr(), held.len()) };
        self.lost |= SHRANK.swap(false, Ordering::Relaxed);
        !self.lost && held == self.content
    }

    /// What is at its path: whether that is this very file, and its content when it can be read.
    fn found(&self) -> (bool, io::Result<Vec<u8>>) {
        (self.here().is_some() && !self.lost, guest_file::read(&self.path, MOST))
    }
}

impl Drop for Mapped {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // The slot may be the next one's already.
        let _ =
            PAGES[self.slot].compare_exchange(self.bytes as usize, 0, Ordering::Relaxed, Ordering::Relaxed);
        // SAFETY: the mapping is ours, and nothing points into it any more.
        let _ = unsafe { munmap(self.bytes.cast(), ROOM) };
    }
}

/// Clears `path` for a file of ours: nothing is there, and its directory is one.
fn make_way(path: &Path) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        let is_one = fs::symlink_metadata(directory).is_ok_and(|found| found.is_dir());
        if !is_one {
            let _ = fs::remove_file(directory);
            fs::create_dir_all(directory)?;
            fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
        }
    }
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Replaces the file at `path` by one with `content`; whose it was and who may do what stays.
fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let former = fs::symlink_metadata(path).ok().filter(fs::Metadata::is_file);
    let fresh = path.with_extension("kelvin-new");
    make_way(&fresh)?;
    let written = (|| {
        fs::write(&fresh, content)?;
        let mode = former.as_ref().map_or(0o644, |found| found.mode() & 0o7777);
        if let Some(found) = &former {
            std::os::unix::fs::chown(&fresh, Some(found.uid()), Some(found.gid()))?;
        }
        fs::set_permissions(&fresh, fs::Permissions::from_mode(mode))?;
        fs::rename(&fresh, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&fresh);
    }
    written
}

/// One file of `/etc`.
struct Entry {
    path: PathBuf,
    memory: Mapped,
    /// Whether `/etc` leads to our memory, and that is as we left it.
    own: bool,
}

impl Entry {
    fn create(name: &str, slot: usize, content: &[u8]) -> io::Result<Self> {
        let memory = Mapped::create(name, slot, content)?;
        let path = Path::new("/etc").join(name);
        let own = leads_to(&path, &memory.path);
        Ok(Self { path, memory, own })
    }

    /// Looks whether it is as it was left. The user's content, when it was edited in memory.
    fn check(&mut self) -> Option<Vec<u8>> {
        self.own = false;
        if !leads_to(&self.path, &self.memory.path) {
            return None;
        }
        if self.memory.is_as_left() {
            self.own = true;
            return None;
        }
        let content = self.memory.content.clone();
        match self.memory.found() {
            (true, Ok(found)) if found == content => self.own = true,
            (_, Ok(found)) if found != content => return Some(found),
            // Gone, or odd, or another file with the same in it.
            _ => self.own = told(&self.path, self.memory.replace(&content)),
        }
        None
    }

    /// Writes what is ours.
    fn set(&mut self, content: &[u8]) {
        // Of one that was edited nobody knows how long its file is.
        let written = if self.own { self.memory.write(content) } else { self.memory.replace(content) };
        told(&self.path, written);
    }

    /// Puts the link back.
    fn link(&mut self) {
        let made =
            make_way(&self.path).and_then(|()| std::os::unix::fs::symlink(&self.memory.path, &self.path));
        self.own = told(&self.path, made);
    }
}

/// Puts an edit that an agent before this one has not seen on the disk. Whether the file is the user's.
fn rescue(name: &str, ours: &[u8]) -> bool {
    let (path, memory) = (Path::new("/etc").join(name), Path::new(RUN).join(name));
    if !leads_to(&path, &memory) {
        return fs::symlink_metadata(&path).is_ok_and(|found| found.is_file());
    }
    match guest_file::read(&memory, MOST) {
        Ok(found) if found != ours => told(&path, write_whole(&path, &found)),
        _ => false,
    }
}

fn leads_to(path: &Path, target: &Path) -> bool {
    fs::read_link(path).is_ok_and(|found| found == target)
}

/// Says what did not work, where an operator looks for it.
fn told(path: &Path, result: io::Result<()>) -> bool {
    if let Err(error) = &result {
        eprintln!("agent: {}: {error}", path.display());
    }
    result.is_ok()
}

/// What the disk remembers of edits.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Edited {
    /// Who the machine was when they were seen.
    name: String,
    machine_id: String,
    /// Whether each of these is the user's.
    hosts: bool,
    hostname: bool,
}

impl Edited {
    fn parse(text: &str) -> Self {
        let mut edited = Self::default();
        for line in text.lines() {
            match line.split_once(' ') {
                Some(("name", name)) => edited.name = name.to_owned(),
                Some(("machine-id", id)) => edited.machine_id = id.to_owned(),
                Some(("edited", "hosts")) => edited.hosts = true,
                Some(("edited", "hostname")) => edited.hostname = true,
                _ => {}
            }
        }
        edited
    }

    fn text(&self) -> String {
        let mut text = format!("name {}\nmachine-id {}\n", self.name, self.machine_id);
        for (name, edited) in [("hosts", self.hosts), ("hostname", self.hostname)] {
            if edited {
                text.push_str(&format!("edited {name}\n"));
            }
        }
        text
    }
}

/// `text`, an edited `/etc/hosts`, with `name` where `former` stood on the machine's own line; the same when there is no
/// such line: then its owner wants none.
fn renamed(text: &str, former: &str, name: &str) -> String {
    let mut result = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let is_own = line.split_whitespace().next() == Some(OWN_ADDRESS);
        if is_own && !former.is_empty() && line.split_whitespace().any(|word| word == former) {
            let body = line.strip_suffix('\n').unwrap_or(line);
            let words: Vec<&str> =
                body.split_whitespace().map(|word| if word == former { name } else { word }).collect();
            result.push_str(&words.join(" "));
            result.push_str(&line[body.len()..]);
        } else {
            result.push_str(line);
        }
    }
    result
}

/// The host name that an edited `/etc/hostname` says, when it says one.
fn stated(text: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(text).ok()?;
    let name = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'))?;
    let fits = name.len() <= LONGEST_NAME
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.');
    fits.then(|| name.to_owned())
}

/// All of them.
pub struct Identity {
    hostname: Entry,
    machine_id: Entry,
    hosts: Entry,
    boot_id: Mapped,
    edited: Edited,
    /// Who the machine is by the last activation.
    name: String,
    id: [u8; 33],
}

impl Identity {
    /// Makes the files. `former`: who the machine is, when an agent before this one was told.
    ///
    /// # Errors
    /// When one cannot be made in memory.
    pub fn open(former: Option<(&str, [u8; 16], [u8; 16])>) -> io::Result<Self> {
        catch_sigbus()?;
        fs::create_dir_all(RUN)?;
        let edited = guest_file::read(Path::new(EDITED), ROOM).unwrap_or_default();
        let edited = Edited::parse(&String::from_utf8_lossy(&edited));
        let (name, id, boot) = former
            .map_or((String::new(), [b'\n'; 33], [b'\n'; 37]), |(name, id, boot)| {
                (name.to_owned(), hex(id), uuid(boot))
            });
        let line = if name.is_empty() { vec![b'\n'; 21] } else { format!("{name}\n").into_bytes() };
        let mut edited = edited;
        if former.is_some() {
            edited.hosts |= rescue("hosts", &[HOSTS, &line].concat());
            edited.hostname |= rescue("hostname", &line);
            (edited.name, edited.machine_id) =
                (name.clone(), String::from_utf8_lossy(id.trim_ascii_end()).into_owned());
        }
        let boot_id = Mapped::create("boot-id", 3, &boot)?;
        let made = Self {
            hostname: Entry::create("hostname", 0, &line)?,
            machine_id: Entry::create("machine-id", 1, &id)?,
            hosts: Entry::create("hosts", 2, &[HOSTS, &line].concat())?,
            boot_id,
            edited,
            name,
            id,
        };
        match former {
            None => made.show_boot_id()?,
            // Root may have covered it since: no reason to let nobody in.
            Some(_) => {
                told(Path::new(BOOT_ID), made.show_boot_id());
            }
        }
        Ok(made)
    }

    /// The kernel's own boot-id is made once for each boot, and a snapshot has one boot.
    fn show_boot_id(&self) -> io::Result<()> {
        let (shown, ours) = (fs::metadata(BOOT_ID)?, fs::metadata(&self.boot_id.path)?);
        if (shown.dev(), shown.ino()) != (ours.dev(), ours.ino()) {
            rustix::mount::mount_bind(&self.boot_id.path, BOOT_ID)?;
        }
        Ok(())
    }

    /// Becomes `name`, with `machine_id` and `boot_id`.
    ///
    /// # Errors
    /// When the kernel refuses the host name.
    pub fn set(&mut self, name: &str, machine_id: [u8; 16], boot_id: [u8; 16]) -> io::Result<()> {
        let id = hex(machine_id);
        let line = [name.as_bytes(), b"\n"].concat();
        if told(Path::new(BOOT_ID), self.boot_id.set(&uuid(boot_id))) {
        } else if told(Path::new(BOOT_ID), self.boot_id.replace(&uuid(boot_id))) {
            told(Path::new(BOOT_ID), self.show_boot_id());
        }
        let mut kernels = name.to_owned();
        self.hostname.set(&line);
        if !self.hostname.own
            && self.edited.hostname
            && let Some(name) =
                guest_file::read(&self.hostname.path, ROOM).ok().and_then(|text| stated(&text))
        {
            kernels = name;
        }
        rustix::system::sethostname(kernels.as_bytes())?;
        self.hosts.set(&[HOSTS, &line].concat());
        if !self.hosts.own && self.edited.hosts {
            self.rename_in_hosts(&kernels);
        }
        self.machine_id.set(&id);
        if !self.machine_id.own {
            self.give_machine_id(&id);
        }
        (self.name, self.id) = (kernels, id);
        Ok(())
    }

    fn rename_in_hosts(&mut self, name: &str) {
        let former = if self.name.is_empty() { self.edited.name.clone() } else { self.name.clone() };
        let Ok(text) = guest_file::read(&self.hosts.path, MOST).map(String::from_utf8) else { return };
        let Ok(text) = text else { return };
        let fresh = renamed(&text, &former, name);
        if fresh != text {
            told(&self.hosts.path, write_whole(&self.hosts.path, fresh.as_bytes()));
        }
    }

    /// A machine-id in a file that is not ours any more.
    fn give_machine_id(&mut self, id: &[u8; 33]) {
        let path = self.machine_id.path.clone();
        let is_file = fs::symlink_metadata(&path).is_ok_and(|found| found.is_file());
        let is_mine = self.edited.machine_id.as_bytes() == id.trim_ascii_end();
        match is_file {
            // Booted again as who it was: what its owner wrote there stays.
            true if is_mine => {}
            true => {
                told(&path, write_whole(&path, id));
            }
            false => self.machine_id.link(),
        }
    }

    /// Looks at all files, before the machine is saved: what was edited is put on the disk, what is odd is replaced.
    pub fn check(&mut self) {
        let mut edited = self.edited.clone();
        for (entry, is) in [(&mut self.hosts, &mut edited.hosts), (&mut self.hostname, &mut edited.hostname)]
        {
            let was_own = entry.own;
            if let Some(content) = entry.check() {
                // In the place of the link: a file on the disk, the user's from now on.
                *is |= told(&entry.path, write_whole(&entry.path, &content));
            } else if was_own && !entry.own {
                // Its owner has put something else there.
                *is = true;
            } else if entry.own {
                *is = false;
            }
        }
        // An edited machine-id stays what it is until this becomes another machine.
        self.machine_id.check();
        if !self.boot_id.is_as_left() {
            let content = self.boot_id.content.clone();
            told(Path::new(BOOT_ID), self.boot_id.replace(&content));
        }
        told(Path::new(BOOT_ID), self.show_boot_id());
        let own_id = self.machine_id.own || leads_to(&self.machine_id.path, &self.machine_id.memory.path);
        if edited.hosts || edited.hostname || !own_id {
            edited.name.clone_from(&self.name);
            edited.machine_id = String::from_utf8_lossy(self.id.trim_ascii_end()).into_owned();
        } else {
            edited = Edited::default();
        }
        if edited != self.edited {
            let path = Path::new(EDITED);
            let written = match edited == Edited::default() {
                true => make_way(path),
                false => make_way(path).and_then(|()| fs::write(path, edited.text())),
            };
            told(path, written);
            self.edited = edited;
        }
    }
}

fn hex(bytes: [u8; 16]) -> [u8; 33] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = [b'\n'; 33];
    for (pair, byte) in text.chunks_exact_mut(2).zip(bytes) {
        pair.copy_from_slice(&[DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
    }
    text
}

/// A random UUID as the kernel writes one, with the end of its line. Source: RFC 9562, 5.4.
fn uuid(mut bytes: [u8; 16]) -> [u8; 37] {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let digits = hex(bytes);
    let mut text = [b'-'; 37];
    for (to, from) in [(0..8, 0..8), (9..13, 8..12), (14..18, 12..16), (19..23, 16..20), (24..36, 20..32)] {
        text[to].copy_from_slice(&digits[from]);
    }
    text[36] = b'\n';
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_id_is_a_random_uuid() {
        let bytes = std::array::from_fn(|index| index as u8 * 17);
        assert_eq!(&uuid(bytes), b"00112233-4455-4677-8899-aabbccddeeff\n");
    }

    #[test]
    fn a_machine_id_is_a_line_of_hexadecimal() {
        let mut bytes = [0; 16];
        (bytes[0], bytes[15]) = (0xab, 0x01);
        assert_eq!(&hex(bytes), b"ab000000000000000000000000000001\n");
    }

    #[test]
    fn a_copy_has_its_own_name_in_hosts_that_were_edited() {
        let text = "127.0.0.1 localhost\n127.0.1.1 old alias\n10.0.0.1 db old\n";
        assert_eq!(
            renamed(text, "old", "new"),
            "127.0.0.1 localhost\n127.0.1.1 new alias\n10.0.0.1 db old\n"
        );
        assert_eq!(renamed("10.0.0.1 db", "old", "new"), "10.0.0.1 db", "its owner wants no such line");
        assert_eq!(renamed("127.0.1.1 x\n", "", "new"), "127.0.1.1 x\n");
    }

    #[test]
    fn a_host_name_is_read_from_what_people_write() {
        assert_eq!(stated(b"# mine\n\n build-1 \n").as_deref(), Some("build-1"));
        for text in ["", "\n", "two words", "\u{e9}", &"x".repeat(65)] {
            assert_eq!(stated(text.as_bytes()), None, "{text:?}");
        }
        assert_eq!(stated(&[0xff]), None);
    }

    #[test]
    fn edits_are_remembered() {
        let edited = Edited { name: "i1".into(), machine_id: "ab".into(), hosts: true, hostname: false };
        assert_eq!(Edited::parse(&edited.text()), edited);
        assert_eq!(Edited::parse("nonsense\nedited\n"), Edited::default());
    }

    #[test]
    fn a_page_that_its_file_takes_away_is_caught() {
        catch_sigbus().unwrap();
        let path = std::env::temp_dir().join(format!("kelvin-identity-{}", std::process::id()));
        let file = File::options().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
        file.set_len(4).unwrap();
        // SAFETY: as in `create`.
        #[allow(unsafe_code)]
        let bytes = unsafe {
            mmap(std::ptr::null_mut(), ROOM, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)
        };
        let bytes = bytes.unwrap();
        PAGES[0].store(bytes as usize, Ordering::Relaxed);
        let place = file.metadata().map(|found| (found.dev(), found.ino())).unwrap();
        let content = b"abc\n".to_vec();
        let mut mapped =
            Mapped { path: path.clone(), file, bytes: bytes.cast(), content, slot: 0, place, lost: false };
        mapped.set(b"abd\n").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"abd\n");
        assert!(mapped.is_as_left());
        fs::write(&path, "abX\n").unwrap();
        assert!(!mapped.is_as_left(), "others have written");
        mapped.set(b"abd\n").unwrap();
        assert!(mapped.is_as_left());
        File::options().append(true).open(&path).unwrap().set_len(9).unwrap();
        assert!(!mapped.is_as_left(), "it has grown");
        File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
        assert_eq!(mapped.set(b"abe\n").unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        fs::write(&path, "abd\n").unwrap();
        assert!(!mapped.is_as_left() && !mapped.found().0, "it was lost in between");
        fs::remove_file(&path).unwrap();
    }
}
