//! What is in an image is in the file.

use kelvin_image::{Error, Source};

use crate::fixture::{CONFIG, Ext4, Header, Image, Layer, Place, Tar, digest, noise};

/// A header of which some fields are set.
fn with(name: &str, kind: u8, size: u64, fields: &[(usize, &[u8])]) -> Header {
    let mut header = Header::new(name.as_bytes(), kind, size);
    for (at, bytes) in fields {
        header.put(*at, bytes);
    }
    header
}

fn rich() -> Vec<Layer> {
    let long = format!("{}/{}", "d".repeat(120), "n".repeat(200));
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let first = Tar::default()
        .directory("./")
        .directory("./etc/")
        .file("./etc/passwd", b"root:x:0:0::/root:/bin/sh\n")
        .raw(&with("bin/su", b'0', 2, &[(100, b"0004755"), (108, b"0000144"), (116, b"0000145")]), b"su")
        .pax(&[("SCHILY.xattr.security.capability", &capability), ("SCHILY.xattr.user.long", &[7; 300])])
        .file("bin/ping", b"ping")
        .pax(&[("path", long.as_bytes()), ("uid", b"3000000000"), ("mtime", b"1600000000.25")])
        .file("short", b"long name")
        .symlink("lib", "usr/lib")
        .symlink("far", &"x/".repeat(49))
        .device("dev/null", b'3', b"0000001", b"0000003")
        .device("dev/vda", b'4', b"0000376", b"0001000")
        .raw(&Header::new(b"run/pipe", b'6', 0), b"")
        .file("a", b"one file")
        .hard_link("b", "./a")
        .directory("gone")
        .file("gone/x", b"")
        .directory("opaque")
        .file("opaque/old", b"")
        .directory("opaque/kept/")
        .file("opaque/kept/old", b"");
    let second = Tar::default()
        .file("lib/new.so", b"through a link of the layer below")
        .hard_link("c", "/a")
        .file("b", b"another file now")
        .file(".wh.gone", b"")
        .file(".wh.never", b"")
        .file("opaque/before", b"")
        .file("opaque/.wh..wh..opq", b"")
        .file("opaque/after", b"")
        .file("opaque/kept/new", b"")
        .file(".wh..wh.plnk/x", b"")
        .file("empty", b"");
    vec![Layer::gzip(&first.end()), Layer::plain(second.end())]
}

fn check_rich(made: &Ext4) {
    assert_eq!(made.text("/etc/passwd"), "root:x:0:0::/root:/bin/sh\n");
    let su = made.inode("/bin/su");
    assert_eq!((su.mode & 0o7777, su.uid, su.gid, su.mtime), (0o4755, 100, 101, 1_700_000_000));
    assert_eq!(made.xattr("/bin/ping", "security.capability").unwrap()[5], 4);
    assert_eq!(made.xattr("/bin/ping", "user.long").unwrap(), [7; 300]);
    let long = format!("/{}/{}", "d".repeat(120), "n".repeat(200));
    let inode = made.inode(&long);
    assert_eq!((inode.uid, inode.mtime), (3_000_000_000, 1_600_000_000));
    assert_eq!(mkext4::spec::Inode::timestamp(inode.mtime, inode.mtime_extra).1, 250_000_000);
    assert_eq!((made.target("/lib").as_str(), made.target("/far")), ("usr/lib", "x/".repeat(49)));
    assert_eq!(made.inode("/dev/null").dev_numbers(), Some((1, 3)));
    assert_eq!(made.inode("/dev/vda").dev_numbers(), Some((254, 512)));
    assert_eq!(made.inode("/run/pipe").mode >> 12, 1);
    // A link of an earlier layer is followed inside the root.
    assert_eq!(made.text("/usr/lib/new.so"), "through a link of the layer below");
    // `b` is another file now, `c` a second name of what it was.
    assert_eq!((made.text("/a"), made.text("/b")), ("one file".to_owned(), "another file now".to_owned()));
    assert_eq!(made.ino("/a"), made.ino("/c"));
    assert_eq!(made.inode("/a").links_count, 2);
    for gone in ["/gone", "/opaque/old", "/opaque/kept/old", "/.wh.gone", "/.wh..wh.plnk"] {
        assert!(!made.has(gone), "{gone}");
    }
    for kept in ["/opaque/before", "/opaque/after", "/opaque/kept/new", "/empty"] {
        assert!(made.has(kept), "{kept}");
    }
}

#[tokio::test]
async fn a_layout_becomes_a_file_system() {
    let place = Place::new();
    let image = Image::new(rich());
    std::fs::create_dir(place.path("layout")).unwrap();
    image.layout(&place.path("layout"));
    let lines = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let log = std::sync::Arc::clone(&lines);
    let told = move |line: &str| log.lock().unwrap().push(line.to_owned());
    let found = place.images.resolve(&Source::Layout(place.path("layout")), &told).await.unwrap();
    assert_eq!(found.digest(), image.digest());
    assert_eq!((found.config().workdir.as_str(), found.config().user.as_str()), ("/app", "app"));
    let made = place.images.make(&found, &place.path("a.ext4"), None, &told).await.unwrap();
    check_rich(&Ext4::open(&place.path("a.ext4")));
    assert_eq!(std::fs::metadata(place.path("a.ext4")).unwrap().len(), made.bytes);
    assert!(made.used_bytes < made.bytes - (200 << 20), "{made:?}");
    assert!(lines.lock().unwrap().iter().any(|line| line.contains("layer 2 of 2")));
    // The same again is the same, byte for byte, and of the size that is asked for.
    let again = place.images.make(&found, &place.path("b.ext4"), Some(made.bytes), &told).await.unwrap();
    assert_eq!(again, made);
    assert!(std::fs::read(place.path("a.ext4")).unwrap() == std::fs::read(place.path("b.ext4")).unwrap());
    // A target that is there stays as it is.
    let there = place.images.make(&found, &place.path("layout"), None, &told).await;
    assert!(matches!(there, Err(Error::Io { .. })));
    assert_eq!(place.left(), ["a.ext4", "b.ext4", "layout"]);
}

#[tokio::test]
async fn scratch_is_an_empty_file_system() {
    let place = Place::new();
    let (found, _) = place.make_of(&Source::Scratch, "scratch.ext4").await.unwrap();
    assert_eq!((found.digest(), found.config()), ("", &kelvin_image::Config::default()));
    let made = Ext4::open(&place.path("scratch.ext4"));
    assert!(made.paths().iter().all(|path| path == "/lost+found"), "{:?}", made.paths());
}

#[tokio::test]
async fn what_docker_saves_becomes_the_same() {
    let place = Place::new();
    let mut layers = rich();
    let last = layers[1].clone();
    layers.push(last);
    let image = Image::new(layers);
    std::fs::write(place.path("saved.tar"), image.saved()).unwrap();
    let (found, _) = place.make_of(&Source::Archive(place.path("saved.tar")), "saved.ext4").await.unwrap();
    check_rich(&Ext4::open(&place.path("saved.ext4")));
    assert_eq!(found.digest(), digest(image.config.as_bytes()));
    // The same image in a layout in an archive, as later versions write it, has the same key.
    let mut tar = Tar::default().file("./index.json", image.index().as_bytes());
    let documents = [image.config.as_bytes(), image.manifest.as_bytes()];
    for blob in documents.into_iter().chain(image.layers.iter().map(|layer| &layer.blob[..])) {
        tar = tar.file(&format!("blobs/sha256/{}", &digest(blob)[7..]), blob);
    }
    std::fs::write(place.path("layout.tar"), tar.end()).unwrap();
    let (same, _) = place.make_of(&Source::Archive(place.path("layout.tar")), "layout.ext4").await.unwrap();
    assert_eq!((same.key(), same.digest()), (found.key(), image.digest().as_str()));
    assert_ne!(Image::new(Vec::new()).digest(), same.digest());
}

#[tokio::test]
async fn sparse_files_in_all_formats_are_the_same_file() {
    let data = [b"head".repeat(1024), b"tail".repeat(1024)].concat();
    let (offset, real) = (1 << 20, 1 << 30);
    let mut old = Header::new(b"old", b'S', 8192);
    for (at, number) in [(386, 0), (398, 4096), (410, offset), (422, 4096), (483, real)] {
        old.put(at, format!("{number:011o}").as_bytes());
    }
    old.put(257, b"ustar  \0");
    let map = format!("2\n0\n4096\n{offset}\n4096\n");
    let mut mapped = map.clone().into_bytes();
    mapped.resize(512, 0);
    mapped.extend(&data);
    let real = real.to_string();
    let comma = format!("0,4096,{offset},4096");
    let at = offset.to_string();
    let tar = Tar::default()
        .raw(&old, &data)
        .pax(&[
            ("GNU.sparse.size", real.as_bytes()),
            ("GNU.sparse.numblocks", b"2"),
            ("GNU.sparse.offset", b"0"),
            ("GNU.sparse.numbytes", b"4096"),
            ("GNU.sparse.offset", at.as_bytes()),
            ("GNU.sparse.numbytes", b"4096"),
        ])
        .file("pax00", &data)
        .pax(&[
            ("GNU.sparse.size", real.as_bytes()),
            ("GNU.sparse.name", b"pax01"),
            ("GNU.sparse.map", comma.as_bytes()),
        ])
        .file("GNUSparseFile.0/pax01", &data)
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"pax10"),
            ("GNU.sparse.realsize", real.as_bytes()),
        ])
        .file("GNUSparseFile.0/pax10", &mapped);
    let place = Place::new();
    let made = place.make(vec![Layer::gzip(&tar.end())]).await.unwrap();
    assert_eq!(made.paths(), ["/old", "/pax00", "/pax01", "/pax10"]);
    for path in made.paths() {
        let inode = made.inode(&path);
        assert_eq!(inode.size, 1 << 30, "{path}");
        // Two chunks of 64 KiB, in sectors of 512 bytes.
        assert_eq!(inode.blocks, 256, "{path}");
        let mut buffer = vec![0; 8192];
        made.0
            .read_file_at(&inode, &made.0.extents(made.ino(&path).unwrap(), &inode).unwrap(), 0, &mut buffer)
            .unwrap();
        assert!(buffer[..4096] == data[..4096] && buffer[4096..].iter().all(|byte| *byte == 0));
        made.0
            .read_file_at(
                &inode,
                &made.0.extents(made.ino(&path).unwrap(), &inode).unwrap(),
                offset,
                &mut buffer,
            )
            .unwrap();
        assert!(buffer[..4096] == data[4096..], "{path}");
    }
}

#[tokio::test]
async fn a_disk_has_the_size_that_is_asked_for_or_is_refused() {
    let place = Place::new();
    let noise = noise(20 << 20);
    let image = Image::new(vec![Layer::gzip(&Tar::default().file("noise", &noise).end())]);
    std::fs::create_dir(place.path("layout")).unwrap();
    image.layout(&place.path("layout"));
    let found = place.images.resolve(&Source::Layout(place.path("layout")), &|_| ()).await.unwrap();
    let make = async |bytes| place.images.make(&found, &place.path("x.ext4"), bytes, &|_| ()).await;
    let small = make(Some(24 << 20)).await.unwrap_err();
    let Error::TooSmall { needed_bytes, disk_bytes } = small else { panic!("{small:?}") };
    assert_eq!(disk_bytes, 24 << 20);
    assert_eq!(place.left(), ["layout"]);
    // What is said to be needed is enough, and a large disk costs what is on it.
    for bytes in [needed_bytes.next_multiple_of(4096), 64 << 30] {
        let made = make(Some(bytes)).await.unwrap();
        assert_eq!(made.bytes, bytes);
        let file = Ext4::open(&place.path("x.ext4"));
        assert!(file.read("/noise") == noise);
        std::fs::remove_file(place.path("x.ext4")).unwrap();
    }
    assert!(make(Some(2 << 40)).await.is_err());
}

#[tokio::test]
async fn many_names_in_one_directory_are_found() {
    let mut tar = Tar::default().directory("many");
    for number in 0..5000 {
        tar = tar.file(&format!("many/a file with the number {number}"), format!("{number}").as_bytes());
    }
    let place = Place::new();
    let made = place.make(vec![Layer::gzip(&tar.end())]).await.unwrap();
    assert_eq!(made.paths().len(), 5001);
    assert_eq!(made.text("/many/a file with the number 4321"), "4321");
}

#[tokio::test]
async fn an_image_without_layers_is_an_empty_root() {
    let place = Place::new();
    let made = place.make(Vec::new()).await.unwrap();
    assert!(made.paths().is_empty());
    assert_eq!(made.inode("/").mode & 0o7777, 0o755);
    let empty = Layer::plain(Vec::new());
    assert!(place.make(vec![empty, Layer::gzip(&Tar::default().end())]).await.unwrap().paths().is_empty());
    assert!(CONFIG.contains("PATH"));
}

#[test]
fn who_goes_away_leaves_nothing() {
    let place = Place::new();
    let noise = noise(8 << 20);
    let image = Image::new(vec![Layer::gzip(&Tar::default().file("noise", &noise).end())]);
    std::fs::create_dir(place.path("layout")).unwrap();
    image.layout(&place.path("layout"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let found = place.images.resolve(&Source::Layout(place.path("layout")), &|_| ()).await.unwrap();
        let (said, mut heard) = tokio::sync::mpsc::unbounded_channel();
        let (images, target) = (place.images.clone(), place.path("x.ext4"));
        let task = tokio::spawn(async move {
            let told = move |line: &str| drop(said.send(line.to_owned()));
            images.make(&found, &target, None, &told).await
        });
        // It has begun, and has 8 MiB before it.
        heard.recv().await.unwrap();
        task.abort();
        assert!(task.await.is_err_and(|error| error.is_cancelled()));
    });
    // This waits for the thread that blocks.
    drop(runtime);
    assert_eq!(place.left(), ["layout"]);
}
