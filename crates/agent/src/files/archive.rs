//! A tar, plain or gzip, read as it comes and given to `copy.rs` entry by entry.
//!
//! Whoever has made it may be hostile: what is kept in memory of one entry (long names, extensions) is bounded by
//! [`HEAD`], the number of entries by [`ENTRIES`], what is written by the disk. Names of GNU's and of pax's form are read, and
//! of the latter times and sizes. Devices and FIFOs are refused wherever they are; sparse files become plain ones, in the old
//! form, and are refused in pax's.

use std::cell::Cell;
use std::io::{self, Cursor, Read};
use std::path::Path;
use std::rc::Rc;

use flate2::read::MultiGzDecoder;
use kelvin_api::image::Unpacked;
use rustix::fs::Timespec;
use tar::EntryType;

use super::copy::{Copier, Entry, Error, Kind, Name, Wanted, shown};

/// Entries of one archive.
const ENTRIES: usize = 500_000;
/// What may be read between the content of one entry and of the next, in bytes: it is kept in memory.
const HEAD: u64 = 1 << 20;
/// What a gzip begins with. Source: RFC 1952, 2.3.1.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// Unpacks the archive `stream` as `wanted` says, below `root`.
///
/// # Errors
/// Any of [`Error`]; what was unpacked before stays.
pub(super) fn unpack(stream: impl Read, wanted: &Wanted, root: &Path) -> Result<Unpacked, Error> {
    unpack_most(stream, wanted, root, ENTRIES)
}

fn unpack_most(mut stream: impl Read, wanted: &Wanted, root: &Path, most: usize) -> Result<Unpacked, Error> {
    let mut magic = Vec::new();
    (&mut stream).take(GZIP.len() as u64).read_to_end(&mut magic).map_err(Error::Torn)?;
    let is_gzip = magic == GZIP;
    let whole = Cursor::new(magic).chain(stream);
    let content: Box<dyn Read + '_> =
        if is_gzip { Box::new(MultiGzDecoder::new(whole)) } else { Box::new(whole) };
    let left = Rc::new(Cell::new(HEAD));
    let mut archive = tar::Archive::new(Metered { content, left: Rc::clone(&left) });
    let mut copier = Copier::new(wanted, root)?;
    let mut count = 0;
    for entry in archive.entries().map_err(Error::Torn)? {
        let mut entry = entry.map_err(Error::Torn)?;
        count += 1;
        if count > most {
            return Err(Error::Entries(most));
        }
        // Read to its end, or stepped over by whoever reads the next.
        left.set(u64::MAX);
        let unread = if copy(&mut entry, &mut copier)? { 0 } else { stored(&entry).map_err(Error::Torn)? };
        left.set(HEAD.saturating_add(unread));
    }
    // To the end of the body: there is the checksum of a gzip.
    left.set(u64::MAX);
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(Error::Torn)?;
    copier.finish()
}

/// What an entry takes in the archive, in bytes.
fn stored(entry: &tar::Entry<'_, impl Read>) -> io::Result<u64> {
    let is_sparse = entry.header().entry_type().is_gnu_sparse();
    if is_sparse { entry.header().entry_size() } else { Ok(entry.size()) }
}

/// Copies `entry` when it is meant. Whether its content was read to its end.
fn copy(entry: &mut tar::Entry<'_, impl Read>, copier: &mut Copier<'_>) -> Result<bool, Error> {
    let of = entry.header().entry_type();
    // Of the whole archive; git writes its commit there.
    if of == EntryType::XGlobalHeader {
        return Ok(false);
    }
    let raw = entry.path_bytes().into_owned();
    let refused = |why| Error::Refused { name: shown(&raw), why };
    let mut modified = None;
    if let Some(extensions) = entry.pax_extensions().map_err(Error::Torn)? {
        for extension in extensions {
            let extension = extension.map_err(Error::Torn)?;
            if extension.key_bytes().starts_with(b"GNU.sparse.") {
                return Err(refused("is a sparse file in pax's form"));
            }
            if extension.key_bytes() == b"mtime" {
                modified = extension.value().ok().and_then(time);
            }
        }
    }
    let target = |name: Option<std::borrow::Cow<'_, [u8]>>| {
        name.map(std::borrow::Cow::into_owned).ok_or_else(|| refused("is a link to nothing"))
    };
    let kind = match of {
        // As archives had directories before they had a type.
        EntryType::Regular | EntryType::Continuous if raw.ends_with(b"/") => Kind::Directory,
        EntryType::Directory => Kind::Directory,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
        EntryType::Symlink => Kind::Link(target(entry.link_name_bytes())?),
        EntryType::Link => Kind::HardLink(target(entry.link_name_bytes())?),
        EntryType::Char | EntryType::Block | EntryType::Fifo => {
            return Err(refused("is a device or a FIFO"));
        }
        _ => return Err(refused("is of a kind that is not known")),
    };
    let name = Name::new(&raw).map_err(refused)?;
    let mode = match kind {
        // Of a link nobody asks for it.
        Kind::Link(_) | Kind::HardLink(_) => 0,
        Kind::Directory | Kind::File => entry.header().mode().map_err(Error::Torn)? & 0o7777,
    };
    let modified = modified.unwrap_or_else(|| {
        let seconds = entry.header().mtime().ok().and_then(|seconds| i64::try_from(seconds).ok());
        Timespec { tv_sec: seconds.unwrap_or(0), tv_nsec: 0 }
    });
    let size = entry.size();
    copier.take(&mut Entry { name, kind, mode, modified, size, content: entry })
}

/// A time as pax writes it: seconds, with a fraction. Source: pax(1), "pax Extended Header Keyword/Value Pairs".
fn time(text: &str) -> Option<Timespec> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = seconds.parse().ok()?;
    let digits: String = fraction.chars().take(9).collect();
    let nanos = if digits.is_empty() { 0 } else { format!("{digits:0<9}").parse().ok()? };
    // Before 1970 it counts backwards: whole seconds are enough.
    Some(Timespec { tv_sec: seconds, tv_nsec: if text.starts_with('-') { 0 } else { nanos } })
}

/// A stream that fails once more is read than is `left`.
struct Metered<R> {
    content: R,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.left.get();
        if left == 0 {
            let text = format!("what stands before an entry takes more than {HEAD} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let count = self.content.read(&mut buffer[..most])?;
        if left != u64::MAX {
            self.left.set(left - count as u64);
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::path::PathBuf;

    use super::super::copy::Source;
    use super::*;

    /// A root directory, and beside it what nothing may touch.
    struct Ground(PathBuf);

    impl Ground {
        fn new(name: &str) -> Self {
            let top = std::env::temp_dir().join(format!("kelvin-unpack-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&top);
            fs::create_dir_all(top.join("root")).unwrap();
            fs::write(top.join("outside"), "outside").unwrap();
            Self(top)
        }

        fn path(&self, path: &str) -> PathBuf {
            self.0.join("root").join(path)
        }

        fn read(&self, path: &str) -> String {
            fs::read_to_string(self.path(path)).unwrap_or_else(|error| format!("{error}"))
        }

        fn copy(&self, archive: &[u8], from: &str, to: &str) -> Result<Unpacked, Error> {
            self.copy_with(archive, from, to, None)
        }

        fn copy_with(
            &self,
            archive: &[u8],
            from: &str,
            to: &str,
            mode: Option<u32>,
        ) -> Result<Unpacked, Error> {
            let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
            let is_directory = to.ends_with('/');
            let to = crate::entries::clean(Path::new(to));
            let wanted = Wanted { from: Source::new(from).unwrap(), to, is_directory, owner, mode };
            let done = unpack_most(archive, &wanted, &self.0.join("root"), 100);
            assert_eq!(fs::read_to_string(self.0.join("outside")).unwrap(), "outside");
            assert_eq!(fs::read_dir(&self.0).unwrap().count(), 2, "something was written outside");
            done
        }
    }

    impl Drop for Ground {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// Makes archives that no honest program makes.
    #[derive(Default)]
    struct Tar(Vec<u8>);

    impl Tar {
        fn add(mut self, kind: EntryType, name: &str, link: &str, mode: u32, content: &[u8]) -> Self {
            let mut header = tar::Header::new_gnu();
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
            header.set_entry_type(kind);
            header.set_mode(mode);
            header.set_mtime(1_600_000_000);
            header.set_size(content.len() as u64);
            header.set_uid(12345);
            header.set_gid(12345);
            header.set_cksum();
            self.0.extend_from_slice(header.as_bytes());
            self.0.extend_from_slice(content);
            self.0.resize(self.0.len().next_multiple_of(512), 0);
            self
        }

        fn file(self, name: &str, content: &str) -> Self {
            self.add(EntryType::Regular, name, "", 0o644, content.as_bytes())
        }

        fn directory(self, name: &str, mode: u32) -> Self {
            self.add(EntryType::Directory, name, "", mode, b"")
        }

        fn link(self, name: &str, to: &str) -> Self {
            self.add(EntryType::Symlink, name, to, 0o777, b"")
        }

        fn hard_link(self, name: &str, to: &str) -> Self {
            self.add(EntryType::Link, name, to, 0o644, b"")
        }

        fn end(mut self) -> Vec<u8> {
            self.0.resize(self.0.len() + 1024, 0);
            self.0
        }
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(bytes).unwrap();
        packed.finish().unwrap()
    }

    #[test]
    fn a_file_goes_to_the_destination_or_into_it() {
        let ground = Ground::new("file");
        let tar = Tar::default().file("other", "no").file("src/a.txt", "text").end();
        let one = Unpacked { files: 1, bytes: 4 };
        assert_eq!(ground.copy(&tar, "src/a.txt", "/new/b.txt").unwrap(), one);
        assert_eq!(ground.copy(&gzip(&tar), "src/a.txt", "/dir/").unwrap(), one);
        fs::create_dir(ground.path("there")).unwrap();
        assert_eq!(ground.copy(&tar, "./src/a.txt", "/there").unwrap(), one);
        symlink("/there", ground.path("led")).unwrap();
        fs::write(ground.path("there/a.txt"), "longer than what replaces it").unwrap();
        assert_eq!(ground.copy(&tar, "src/a.txt", "/led").unwrap(), one, "below the root, not the machine's");
        for path in ["new/b.txt", "dir/a.txt", "there/a.txt"] {
            assert_eq!(ground.read(path), "text", "{path}");
        }
        assert!(!ground.path("other").exists() && !ground.path("new/other").exists());
        let made = fs::metadata(ground.path("new/b.txt")).unwrap();
        assert_eq!((made.mtime(), made.mode() & 0o7777), (1_600_000_000, 0o644));
        assert_eq!(made.uid(), rustix::process::geteuid().as_raw(), "not the archive's owner");
        assert_eq!(fs::metadata(ground.path("new")).unwrap().mode() & 0o7777, 0o755);
        assert!(matches!(ground.copy(&tar, "src/none", "/x"), Err(Error::Nothing(_))));
    }

    #[test]
    fn the_content_of_a_directory_is_merged() {
        let ground = Ground::new("directory");
        fs::create_dir_all(ground.path("app/lib")).unwrap();
        fs::set_permissions(ground.path("app/lib"), fs::Permissions::from_mode(0o711)).unwrap();
        fs::write(ground.path("app/lib/old"), "old").unwrap();
        fs::write(ground.path("app/lib/new"), "replaced").unwrap();
        let tar = Tar::default()
            .directory("src/", 0o700)
            .directory("src/lib/", 0o700)
            .file("src/lib/new", "new")
            .file("src/deep/er/x", "x")
            .directory("src/deep/", 0o750)
            .link("src/l", "lib/new")
            .hard_link("src/h", "src/lib/new")
            .add(EntryType::Regular, "src/su", "", 0o4755, b"s")
            .end();
        assert_eq!(ground.copy(&tar, "src", "/app").unwrap(), Unpacked { files: 5, bytes: 5 });
        assert_eq!((ground.read("app/lib/old"), ground.read("app/lib/new")), ("old".into(), "new".into()));
        let mode = |path: &str| fs::symlink_metadata(ground.path(path)).unwrap().mode() & 0o7777;
        assert_eq!(mode("app/lib"), 0o711, "it was there");
        assert_eq!((mode("app/deep"), mode("app/deep/er"), mode("app/su")), (0o750, 0o755, 0o4755));
        assert_eq!(fs::read_link(ground.path("app/l")).unwrap(), Path::new("lib/new"));
        let inode = |path: &str| fs::metadata(ground.path(path)).unwrap().ino();
        assert_eq!(inode("app/h"), inode("app/lib/new"));
        // A destination that is made for it is as the source; with a mode all of it has that.
        ground.copy(&tar, "src", "/fresh/app").unwrap();
        assert_eq!((mode("fresh"), mode("fresh/app"), mode("fresh/app/lib")), (0o755, 0o700, 0o700));
        ground.copy_with(&tar, "src/", "/set", Some(0o750)).unwrap();
        assert_eq!((mode("set"), mode("set/lib"), mode("set/su")), (0o750, 0o750, 0o750));
        // The whole context, which may be empty.
        ground.copy(&tar, ".", "/all").unwrap();
        assert_eq!(ground.read("all/src/deep/er/x"), "x");
        assert_eq!(ground.copy(&Tar::default().end(), ".", "/none").unwrap(), Unpacked::default());
        assert!(ground.path("none").is_dir());
    }

    #[test]
    fn several_files_need_a_directory() {
        let ground = Ground::new("several");
        let tar = Tar::default().file("a.txt", "a").file("b.md", "b").file("c.txt", "c").end();
        // What a pattern matches more than once is in a directory, whether or not the request ends it with a slash.
        let files = |list: &str| list.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let listed = |path: &str| {
            let names = fs::read_dir(ground.path(path)).unwrap().map(|entry| entry.unwrap().file_name());
            let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(ground.copy(&tar, "*.txt", "/deep/one").unwrap().files, 2);
        assert_eq!((listed("deep"), listed("deep/one")), (files("one"), files("a.txt c.txt")));
        assert_eq!((ground.read("deep/one/a.txt"), ground.read("deep/one/c.txt")), ("a".into(), "c".into()));
        let mixed = Tar::default().file("f/a", "a").link("f/l", "a").directory("f/s/", 0o700).end();
        assert_eq!(ground.copy(&mixed, "f/*", "/two").unwrap().files, 2);
        assert_eq!(listed("two"), files("a l"));
        // What has names that stand in the way of that is left alone, and names may be as long as they can be.
        for name in ["long.kelvin-first", ".kelvin-copy-0"] {
            fs::write(ground.path(name), name).unwrap();
        }
        let (long, linked) = ("n".repeat(255), Tar::default().file("a", "a").hard_link("h", "a"));
        let linked = linked.directory("s/", 0o700).end();
        for to in ["long", &long] {
            assert_eq!(ground.copy(&linked, "*", &format!("/{to}")).unwrap().files, 2);
            assert_eq!(listed(to), files("a h"));
            let inode = |name: &str| fs::metadata(ground.path(to).join(name)).unwrap().ino();
            assert_eq!(inode("a"), inode("h"), "by its former place");
            assert_eq!(
                fs::metadata(ground.path(to)).unwrap().mode() & 0o7777,
                0o755,
                "not of what it contains"
            );
        }
        for name in ["long.kelvin-first", ".kelvin-copy-0"] {
            assert_eq!(ground.read(name), name);
            fs::remove_file(ground.path(name)).unwrap();
        }
        // Without a pattern it is one source, and an archive in which that is two things is none.
        let both = Tar::default().file("x", "x").file("x/y", "y").end();
        let several = ground.copy(&both, "x", "/three").unwrap_err();
        assert!(matches!(&several, Error::Several { first, .. } if first == "x"), "{several}");
        assert_eq!(ground.copy(&tar, "*.txt", "/many/").unwrap().files, 2);
        assert_eq!((ground.read("many/a.txt"), ground.read("many/c.txt")), ("a".into(), "c".into()));
        assert!(!ground.path("many/b.md").exists());
        assert_eq!(ground.copy(&tar, "*.md", "/single").unwrap().files, 1);
        assert_eq!(ground.read("single"), "b");
        // A file where a directory is wanted, and the other way round.
        fs::create_dir_all(ground.path("d/a.txt")).unwrap();
        assert!(matches!(ground.copy(&tar, "a.txt", "/d"), Err(Error::At { .. })));
        let tree = Tar::default().file("t/x/y", "y").end();
        fs::create_dir_all(ground.path("e")).unwrap();
        fs::write(ground.path("e/x"), "").unwrap();
        assert!(matches!(ground.copy(&tree, "t", "/e"), Err(Error::At { .. })));
    }

    #[test]
    fn hostile_archives_are_refused_and_reach_nothing_outside() {
        let ground = Ground::new("hostile");
        let outside = ground.0.join("outside").display().to_string();
        let top = ground.0.display().to_string();
        let refused = |tar: Tar| {
            let done = ground.copy(&tar.end(), ".", "/to");
            assert!(matches!(done, Err(Error::Refused { .. })), "{done:?}");
        };
        refused(Tar::default().file("../outside", "x"));
        refused(Tar::default().file("a/../../../outside", "x"));
        refused(Tar::default().file(&outside, "x"));
        refused(Tar::default().hard_link("h", &outside));
        refused(Tar::default().hard_link("h", "../../outside"));
        refused(Tar::default().hard_link("h", "none"));
        for kind in [EntryType::Char, EntryType::Block, EntryType::Fifo, EntryType::new(b'V')] {
            refused(Tar::default().add(kind, "node", "", 0o666, b""));
        }
        // What was there is not the archive's to give a second name.
        fs::create_dir_all(ground.path("to")).unwrap();
        fs::write(ground.path("to/secret"), "").unwrap();
        refused(Tar::default().hard_link("h", "secret"));
        // Through its own links: below the destination, or nowhere.
        let through = Tar::default().link("l", &top).file("l/outside", "x").end();
        assert!(matches!(ground.copy(&through, ".", "/to"), Err(Error::At { .. })));
        let through = Tar::default().link("up", "../../..").file("up/outside", "x").end();
        ground.copy(&through, ".", "/to").unwrap();
        assert_eq!(ground.read("to/outside"), "x");
        let through = Tar::default().link("f", &outside).file("f", "x").end();
        ground.copy(&through, ".", "/to").unwrap();
        assert_eq!(ground.read("to/f"), "x", "the link is replaced, not followed");
        let through = Tar::default().link("s", &outside).hard_link("h2", "s").end();
        assert!(matches!(ground.copy(&through, ".", "/to"), Err(Error::Refused { .. })));
        // A link to itself is no reason to lose it.
        let same = Tar::default().file("x", "x").hard_link("x", "x").end();
        ground.copy(&same, ".", "/to").unwrap();
        assert_eq!(ground.read("to/x"), "x");
    }

    #[test]
    fn what_is_torn_or_too_much_is_told() {
        let ground = Ground::new("torn");
        let torn = |bytes: &[u8]| {
            let done = ground.copy(bytes, ".", "/to");
            assert!(matches!(done, Err(Error::Torn(_))), "{done:?}");
        };
        let tar = Tar::default().file("a", &"x".repeat(3000)).end();
        torn(&tar[..700]);
        torn(&tar[..1024]);
        torn(b"this is no archive");
        torn(&[7; 1024]);
        let packed = gzip(&tar);
        torn(&packed[..packed.len() - 4]);
        let mut wrong = packed.clone();
        let checksum = wrong.len() - 6;
        wrong[checksum] ^= 1;
        torn(&wrong);
        // A name that would fill the memory.
        let long = vec![b'n'; 2 << 20];
        torn(&Tar::default().add(EntryType::GNULongName, "././@LongLink", "", 0, &long).file("a", "").end());
        torn(&Tar::default().add(EntryType::XHeader, "x", "", 0, &long).file("a", "").end());
        // What is stepped over may be longer than that.
        let skipped = Tar::default().file("a", &"x".repeat(3 << 20)).file("b", "b").end();
        assert_eq!(ground.copy(&skipped, "b", "/b").unwrap().files, 1);
        let many = (0..101).fold(Tar::default(), |tar, n| tar.file(&format!("f{n}"), ""));
        assert!(matches!(ground.copy(&many.end(), ".", "/to"), Err(Error::Entries(100))));
        // More than any disk has.
        let mut huge = tar::Header::new_gnu();
        huge.set_path("huge").unwrap();
        huge.set_size(1 << 60);
        huge.set_mode(0o644);
        huge.set_cksum();
        match ground.copy(huge.as_bytes(), ".", "/to") {
            Err(Error::At { source, .. }) => assert_eq!(source.raw_os_error(), Some(libc::ENOSPC)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn long_names_and_times_of_both_forms_are_read() {
        let ground = Ground::new("names");
        let long = format!("{}/name", "d".repeat(150));
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o600);
        header.set_size(3);
        builder.append_data(&mut header, &long, &b"gnu"[..]).unwrap();
        let mut pax = tar::Header::new_ustar();
        pax.set_mode(0o600);
        pax.set_size(3);
        let pairs = [("path", format!("p/{long}")), ("mtime", "1600000001.25".to_owned())];
        builder.append_pax_extensions(pairs.iter().map(|(key, value)| (*key, value.as_bytes()))).unwrap();
        builder.append_data(&mut pax, "short", &b"pax"[..]).unwrap();
        builder.append_pax_extensions([("comment", &b"of git"[..])]).unwrap();
        let mut link = tar::Header::new_gnu();
        link.set_entry_type(EntryType::Symlink);
        link.set_size(0);
        builder.append_link(&mut link, "l", "t/".repeat(100)).unwrap();
        let tar = builder.into_inner().unwrap();
        assert_eq!(ground.copy(&tar, ".", "/to").unwrap(), Unpacked { files: 3, bytes: 6 });
        assert_eq!(ground.read(&format!("to/{long}")), "gnu");
        let made = fs::metadata(ground.path(&format!("to/p/{long}"))).unwrap();
        assert_eq!((made.mtime(), made.mtime_nsec()), (1_600_000_001, 250_000_000));
        assert_eq!(fs::read_link(ground.path("to/l")).unwrap(), Path::new(&"t/".repeat(100)));
        let sparse = [("GNU.sparse.major", &b"1"[..])];
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_pax_extensions(sparse).unwrap();
        builder.append_data(&mut header, "s", &b"gnu"[..]).unwrap();
        let done = ground.copy(&builder.into_inner().unwrap(), ".", "/to");
        assert!(matches!(done, Err(Error::Refused { .. })), "{done:?}");
        assert_eq!(time("-1.5").map(|time| (time.tv_sec, time.tv_nsec)), Some((-1, 0)));
        assert!(time("").is_none() && time("x").is_none());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_end(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..1500)) {
            let ground = Ground::new("any");
            let _ = ground.copy(&bytes, ".", "/to");
        }
    }
}
