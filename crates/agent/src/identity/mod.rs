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

mod edited;
mod mapped;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use self::edited::{Edited, renamed, stated};
use self::mapped::{MOST, Mapped, ROOM, RUN, catch_sigbus};
use crate::guest_file;
use crate::place::{make_way, write_whole};

/// What was edited here, and who the machine was then: on the disk, for a boot that follows.
pub const EDITED: &str = "/var/lib/kelvin/edited";
/// `/etc/hosts` up to the machine's own name.
const HOSTS: &[u8] = b"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 ";
/// Where the kernel shows its boot-id.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

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
}
