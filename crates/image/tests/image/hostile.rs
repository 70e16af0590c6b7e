//! Images made to do harm: each is refused with a name, or contained.

use std::path::Path;

use kelvin_image::{Error, Limits, Refusal, Source};

use crate::fixture::{
    Ext4, GZIP, Header, INDEX, Image, Layer, MANIFEST, PLAIN, Place, Tar, digest, gzip, index, put_blob,
};

/// Low enough to be reached soon.
fn limits() -> Limits {
    Limits {
        entries: 1000,
        uncompressed_bytes: 8 << 20,
        depth: 30,
        layer_bytes: 4 << 20,
        layers: 4,
        memory_bytes: 4 << 20,
        ..Limits::default()
    }
}

fn one(tar: Tar) -> Vec<Layer> {
    vec![Layer::gzip(&tar.end())]
}

fn header(fields: &[(usize, &[u8])]) -> Tar {
    let mut header = Header::new(b"x", b'0', 0);
    for (at, bytes) in fields {
        header.put(*at, bytes);
    }
    Tar::default().raw(&header, b"")
}

type Fits = fn(&Refusal) -> bool;
/// Writes a layout.
type Prepare = Box<dyn Fn(&Path)>;

fn limit(why: &Refusal) -> bool {
    matches!(why, Refusal::Limit { .. })
}
fn name(why: &Refusal) -> bool {
    matches!(why, Refusal::Name { .. })
}
fn link(why: &Refusal) -> bool {
    matches!(why, Refusal::Link { .. })
}
fn tar(why: &Refusal) -> bool {
    matches!(why, Refusal::Tar(_))
}
fn entry(why: &Refusal) -> bool {
    matches!(why, Refusal::Entry { .. })
}

/// Layers whose archive is refused.
fn archives() -> Vec<(&'static str, Vec<Layer>, Fits)> {
    let deep = "d/".repeat(40);
    let many = (0..1100).fold(Tar::default(), |tar, n| tar.file(&format!("f{n}"), b""));
    // 900 entries, each a directory that takes a block.
    let directories = (0..900).fold(Tar::default(), |tar, n| tar.directory(&format!("d{n}")));
    let extensions = (0..1100).fold(Tar::default(), |tar, _| tar.pax(&[("comment", b"x")]));
    let long_name = Tar::default().raw(&Header::new(b"././@LongLink", b'L', 2 << 20), &vec![b'a'; 2 << 20]);
    let pax_bomb = Tar::default().raw(&Header::new(b"pax", b'x', 2 << 20), &vec![b'a'; 2 << 20]);
    let chain = (0..60).fold(Tar::default(), |tar, n| tar.symlink(&format!("l{n}"), &format!("l{}", n + 1)));
    let mut cut = Tar::default().file("x", &[1; 4096]).0;
    cut.truncate(2000);
    let mut bad_sum = Tar::default().file("x", b"").0;
    bad_sum[148] ^= 1;
    let sparse = |size: &[u8], map: &[u8]| {
        Tar::default().pax(&[("GNU.sparse.size", size), ("GNU.sparse.map", map)]).file("x", b"data")
    };
    let turns = (0..300).fold(Tar::default().directory("big"), |tar, n| tar.file(&format!("big/{n}"), b""));
    let turns = (0..690).fold(turns, |tar, _| tar.file(".wh.big", b""));
    vec![
        ("a name that leaves", one(Tar::default().file("../../etc/passwd", b"x")), name),
        ("a name that leaves later", one(Tar::default().file("a/../../x", b"x")), name),
        ("a hard link that leaves", one(Tar::default().hard_link("x", "../../etc/passwd")), name),
        ("a hard link to nothing here", one(Tar::default().hard_link("x", "/etc/shadow")), link),
        ("hard links in a circle", one(Tar::default().hard_link("a", "b").hard_link("b", "a")), link),
        ("a hard link to itself", one(Tar::default().hard_link("a", "a")), link),
        ("a hard link to a directory", one(Tar::default().directory("d").hard_link("x", "d")), link),
        (
            "symlinks in a circle, walked",
            one(Tar::default().symlink("a", "b").symlink("b", "a").file("a/x", b"")),
            link,
        ),
        ("a long chain of symlinks, walked", one(chain.file("l0/x", b"")), link),
        ("a file as a directory", one(Tar::default().file("f", b"").file("f/x", b"")), entry),
        ("a root that is a link", one(Tar::default().symlink("./", "/etc")), entry),
        (
            "a device of no machine",
            one(Tar::default().device("x", b'3', b"\x80\0\0\0\0\0\xff\xff", b"0000001")),
            entry,
        ),
        ("a whiteout of nothing", one(Tar::default().file("d/.wh.", b"")), name),
        ("a whiteout of the parent", one(Tar::default().file("d/.wh...", b"")), name),
        ("an entry of no type", one(Tar::default().raw(&Header::new(b"x", b'Q', 0), b"")), entry),
        ("more entries than allowed", one(many), limit),
        ("more directories than memory", one(directories), limit),
        ("headers without entries", one(extensions), limit),
        ("whiteouts of a large directory again and again", one(turns), limit),
        ("too deep", one(Tar::default().file(&deep, b"")), limit),
        ("deeper through a link", one(Tar::default().symlink("l", &"d/".repeat(35)).file("l/x", b"")), limit),
        ("a name with a zero byte", one(Tar::default().pax(&[("path", b"a\0b")]).file("x", b"")), name),
        ("a name of 300 bytes", one(Tar::default().pax(&[("path", &[b'n'; 300])]).file("x", b"")), name),
        ("a path of 5000 bytes", one(Tar::default().pax(&[("path", &[b'/'; 5000])]).file("x", b"")), limit),
        ("a name that is not UTF-8", one(Tar::default().pax(&[("path", b"a\xff")]).file("x", b"")), name),
        ("a long name without an end", one(long_name), limit),
        ("an extended header without an end", one(pax_bomb), limit),
        (
            "an extended header that lies",
            one(Tar::default().raw(&Header::new(b"p", b'x', 9), b"99 path=a")),
            tar,
        ),
        ("a negative size", one(header(&[(124, &[0xff; 12])])), tar),
        ("a size that is no number", one(header(&[(124, b"00000000zzz")])), tar),
        ("a file of 8 EiB", one(header(&[(124, b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff")])), limit),
        ("an owner of 64 bits", one(header(&[(108, b"\x80\0\0\x7f\xff\xff\xff\xff")])), entry),
        ("a negative owner", one(header(&[(108, &[0xff; 8])])), tar),
        ("a sparse file with segments that overlap", one(sparse(b"100", b"0,3,1,1")), entry),
        ("a sparse file with a segment behind its end", one(sparse(b"100", b"99,4")), entry),
        (
            "a sparse file that overflows",
            one(sparse(b"100", b"9223372036854775807,9223372036854775807")),
            entry,
        ),
        ("a sparse file of 9 EiB", one(sparse(b"9000000000000000000", b"0,4")), limit),
        (
            "attributes of 1 MiB",
            one(Tar::default().pax(&[("SCHILY.xattr.user.a", &[1; 1 << 19])]).file("x", b"")),
            limit,
        ),
        ("a header with a wrong sum", vec![Layer::plain(bad_sum)], tar),
        ("an archive that is cut short", vec![Layer::plain(cut)], tar),
        ("something that is no archive", vec![Layer::plain(vec![b'x'; 2048])], tar),
        ("a zip bomb", vec![Layer::gzip(&vec![0; 16 << 20])], limit),
        ("a zip bomb as a file", one(Tar::default().file("x", &vec![1; 9 << 20])), limit),
    ]
}

async fn refusal(case: &str, place: &Place, directory: &Path) -> Refusal {
    let failed = place.make_of(&Source::Layout(directory.to_owned()), "x.ext4").await;
    match failed {
        Err(Error::Refused { why, part }) => {
            assert!(!part.is_empty());
            why
        }
        other => panic!("{case}: {other:?}"),
    }
}

#[tokio::test]
async fn archives_that_do_harm_are_refused() {
    let cases = archives();
    assert!(cases.len() >= 25);
    for (case, layers, fits) in cases {
        let place = Place::limited(limits());
        let layout = tempfile::tempdir().unwrap();
        Image::new(layers).layout(layout.path());
        let why = refusal(case, &place, layout.path()).await;
        assert!(fits(&why), "{case}: {why}");
        assert!(place.left().is_empty(), "{case}");
    }
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "a table")]
async fn what_can_be_contained_is_contained() {
    let place = Place::limited(Limits { uncompressed_bytes: 32 << 20, ..limits() });
    let canary = place.path("canary");
    std::fs::write(&canary, "outside").unwrap();
    let outside = canary.to_str().unwrap().to_owned();
    let up = "../".repeat(20);
    let huge = Tar::default()
        .pax(&[("GNU.sparse.size", b"10737418240"), ("GNU.sparse.map", b"")])
        .file("zeros", b"");
    for (case, tar, check) in [
        (
            "links out of the root, written through",
            Tar::default()
                .symlink("abs", place.directory.path().to_str().unwrap())
                .symlink("up", &up)
                .file("abs/canary", b"inside")
                .file("up/escaped", b"inside")
                .file("/absolute", b"inside"),
            Box::new({
                let outside = outside.clone();
                move |made: &Ext4| {
                    assert_eq!(made.text(&outside), "inside");
                    assert_eq!(
                        (made.text("/escaped").as_str(), made.text("/absolute").as_str()),
                        ("inside", "inside")
                    );
                }
            }) as Box<dyn Fn(&Ext4)>,
        ),
        (
            "a link whose name is then a file",
            Tar::default().symlink("x", &outside).file("x", b"inside"),
            Box::new(|made: &Ext4| assert_eq!(made.text("/x"), "inside")),
        ),
        (
            "a hard link to a link out of the root",
            Tar::default()
                .symlink("s", &outside)
                .hard_link("h", "s")
                .file("s/../ignored".trim_start_matches("s/../"), b""),
            Box::new({
                let outside = outside.clone();
                move |made: &Ext4| assert_eq!(made.target("/h"), outside)
            }),
        ),
        (
            "10 GiB of zeros as a sparse file",
            huge,
            Box::new(|made: &Ext4| {
                let zeros = made.inode("/zeros");
                assert_eq!((zeros.size, zeros.blocks), (10 << 30, 0));
            }),
        ),
        (
            "16 MiB of zeros in the archive",
            Tar::default().file("zeros", &vec![0; 16 << 20]),
            Box::new(|made: &Ext4| assert_eq!(made.inode("/zeros").blocks, 0)),
        ),
        (
            "devices and setuid, which are the guest's",
            Tar::default()
                .device("sda", b'4', b"0000010", b"0000000")
                .device("kmem", b'3', b"0000001", b"0000002"),
            Box::new(|made: &Ext4| assert_eq!(made.inode("/sda").dev_numbers(), Some((8, 0)))),
        ),
        (
            "a directory in place of the link it came through",
            Tar::default().directory("real").symlink("l", "real").directory("l").file("l/x", b""),
            Box::new(|made: &Ext4| assert!(made.has("/l/x") && !made.has("/real/x"))),
        ),
        (
            "the file system's own directory",
            Tar::default().file("lost+found/x", b"").file("y", b""),
            Box::new(|made: &Ext4| assert_eq!(made.paths(), ["/y"])),
        ),
        (
            "times before the epoch and far away",
            Tar::default()
                .pax(&[("mtime", b"-99999999999")])
                .file("old", b"")
                .pax(&[("mtime", b"9999999999999")])
                .file("new", b""),
            Box::new(|made: &Ext4| assert!(made.has("/old") && made.has("/new"))),
        ),
        (
            "attributes of other systems",
            Tar::default()
                .pax(&[("SCHILY.xattr.com.apple.x", b"1"), ("SCHILY.xattr.user.y", b"2")])
                .file("x", b""),
            Box::new(|made: &Ext4| assert_eq!(made.xattr("/x", "user.y").unwrap(), b"2")),
        ),
    ] {
        let made = place.make(one(tar)).await.unwrap_or_else(|error| panic!("{case}: {error}"));
        check(&made);
        assert_eq!(std::fs::read_to_string(&canary).unwrap(), "outside", "{case}");
    }
    assert!(!Path::new("/escaped").exists() && !Path::new("/absolute").exists());
}

/// A layout with one thing wrong in its documents.
#[expect(clippy::too_many_lines, reason = "a table")]
fn documents() -> Vec<(&'static str, Prepare, Fits)> {
    let good = || Image::new(vec![Layer::gzip(&Tar::default().file("x", b"x").end())]);
    let layer = move |change: fn(&mut Layer)| {
        Box::new(move |directory: &Path| {
            let mut image = good();
            change(&mut image.layers[0]);
            Image::new(image.layers).layout(directory);
        }) as Prepare
    };
    let configured = |change: fn(String) -> String| {
        Box::new(move |directory: &Path| {
            let image = good();
            let config = change(image.config);
            Image::with_config(image.layers, config).layout(directory);
        }) as Prepare
    };
    let indexed = |change: fn(&Path, String) -> String| {
        Box::new(move |directory: &Path| {
            let image = good();
            image.layout(directory);
            let index = change(directory, image.index());
            std::fs::write(directory.join("index.json"), index).unwrap();
        }) as Prepare
    };
    fn media(why: &Refusal) -> bool {
        matches!(why, Refusal::MediaType(_))
    }
    fn json(why: &Refusal) -> bool {
        matches!(why, Refusal::Json(_))
    }
    fn a_digest(why: &Refusal) -> bool {
        matches!(why, Refusal::Digest { .. })
    }
    fn a_size(why: &Refusal) -> bool {
        matches!(why, Refusal::Size { .. })
    }
    vec![
        ("a wrong digest of the archive", layer(|it| it.diff_id = digest(b"other")), a_digest),
        (
            "a wrong digest of the blob",
            layer(|it| {
                let last = it.blob.len() - 5;
                it.blob[last] ^= 1
            }),
            |why| matches!(why, Refusal::Digest { .. } | Refusal::Compression(_)),
        ),
        (
            "a blob with more behind it",
            layer(|it| {
                it.blob.extend(gzip(b"x"));
                it.size = it.blob.len() as i64
            }),
            a_digest,
        ),
        ("a wrong size", layer(|it| it.size += 1), a_size),
        (
            "a truncated blob",
            layer(|it| {
                it.blob.truncate(20);
                it.digest = digest(&it.blob);
                it.size = 20
            }),
            |why| matches!(why, Refusal::Compression(_)),
        ),
        ("a negative size", layer(|it| it.size = -1), json),
        ("a layer of 5 MiB", layer(|it| it.size = 5 << 20), limit),
        (
            "sha512",
            layer(|it| it.digest = it.digest.replace("sha256:", "sha512:")),
            |why| matches!(why, Refusal::Algorithm(said) if said.contains("sha512")),
        ),
        ("a digest that leaves", layer(|it| it.digest = "sha256:../../leaves".to_owned()), |why| {
            matches!(why, Refusal::Algorithm(_))
        }),
        ("an encrypted layer", layer(|it| it.media_type += "+encrypted"), media),
        (
            "a foreign layer",
            layer(|it| it.media_type = it.media_type.replace("layer", "layer.nondistributable")),
            media,
        ),
        ("a layer of no type", layer(|it| it.media_type = "text/plain".to_owned()), media),
        (
            "xz",
            layer(|it| *it = Layer::of(b"\xfd7zXZ\0xxxxxxxx".to_vec(), GZIP, b"")),
            |why| matches!(why, Refusal::Compression(said) if said.contains("xz")),
        ),
        (
            "five layers",
            Box::new(|directory: &Path| {
                Image::new(vec![Layer::plain(Tar::default().end()); 5]).layout(directory);
            }),
            limit,
        ),
        ("a configuration of 9 MiB", configured(|config| format!("{config}{}", " ".repeat(9 << 20))), limit),
        (
            "a configuration with a field twice",
            configured(|config| config.replacen('{', r#"{"os":"linux","#, 1)),
            json,
        ),
        (
            "another platform",
            configured(|config| config.replace("amd64", "arm64")),
            |why| matches!(why, Refusal::Platform(other) if other == "linux/arm64"),
        ),
        (
            "a configuration with fewer layers",
            configured(|config| {
                let ids = config.find("\"diff_ids\"").unwrap();
                format!("{}\"diff_ids\":[]}}}}", &config[..ids])
            }),
            |why| matches!(why, Refusal::Ambiguous(_)),
        ),
        ("a manifest of 5 MiB", indexed(|_, index| format!("{index}{}", " ".repeat(5 << 20))), limit),
        (
            "10,000 entries of an index",
            indexed(|_, _| {
                let id = digest(b"x");
                index(&vec![(id.as_str(), 1, MANIFEST); 10_000])
            }),
            limit,
        ),
        (
            "a deeply nested document",
            indexed(|_, _| format!(r#"{{"manifests":{}"#, "[".repeat(1 << 20))),
            json,
        ),
        (
            "an index in an index in an index …",
            indexed(|directory, mut inner| {
                for _ in 0..5 {
                    let id = digest(inner.as_bytes());
                    put_blob(directory, inner.as_bytes(), &id);
                    inner = index(&[(&id, inner.len(), INDEX)]);
                }
                inner
            }),
            limit,
        ),
        (
            "an index that leads to itself by a false name",
            indexed(|directory, _| {
                let id = digest(b"a name");
                let own = index(&[(&id, 0, INDEX)]);
                let own = index(&[(&id, own.len(), INDEX)]);
                put_blob(directory, own.as_bytes(), &id);
                own
            }),
            |why| matches!(why, Refusal::Digest { .. } | Refusal::Size { .. } | Refusal::Loop),
        ),
        (
            "an index and a manifest at once",
            indexed(|_, index| index.replacen('{', r#"{"layers":[],"#, 1)),
            |why| matches!(why, Refusal::Ambiguous(_)),
        ),
        ("a document of another type", indexed(|_, index| index.replacen(INDEX, MANIFEST, 1)), media),
        (
            "a blob that is a link out of the layout",
            Box::new(move |directory: &Path| {
                let image = good();
                image.layout(directory);
                let blob = directory.join("blobs/sha256").join(&image.layers[0].digest[7..]);
                std::fs::remove_file(&blob).unwrap();
                std::os::unix::fs::symlink("/dev/null", &blob).unwrap();
            }),
            name,
        ),
        (
            "a blob that is a pipe",
            Box::new(move |directory: &Path| {
                let image = good();
                image.layout(directory);
                let blob = directory.join("blobs/sha256").join(&image.layers[0].digest[7..]);
                std::fs::remove_file(&blob).unwrap();
                let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
                rustix::fs::mknodat(rustix::fs::CWD, &blob, rustix::fs::FileType::Fifo, mode, 0).unwrap();
            }),
            name,
        ),
        ("an empty directory", Box::new(|_: &Path| ()), json),
    ]
}

#[tokio::test]
async fn documents_that_do_harm_are_refused() {
    for (case, prepare, fits) in documents() {
        let place = Place::limited(limits());
        let layout = tempfile::tempdir().unwrap();
        prepare(layout.path());
        let why = refusal(case, &place, layout.path()).await;
        assert!(fits(&why), "{case}: {why}");
        assert!(place.left().is_empty(), "{case}");
    }
}

#[tokio::test]
async fn media_types_that_lie_about_the_compression_do_not_matter() {
    let archive = Tar::default().file("x", b"x").end();
    let zstd = ruzstd::encoding::compress_to_vec(&archive[..], ruzstd::encoding::CompressionLevel::Fastest);
    for (blob, kind) in [(gzip(&archive), PLAIN), (archive.clone(), GZIP), (zstd, GZIP)] {
        let made = Place::limited(limits()).make(vec![Layer::of(blob, kind, &archive)]).await.unwrap();
        assert_eq!(made.text("/x"), "x");
    }
}

#[tokio::test]
async fn archives_of_docker_that_do_harm_are_refused() {
    let image = Image::new(vec![Layer::plain(Tar::default().file("x", b"x").end())]);
    let saved = |manifest: &str| {
        Tar::default()
            .file("c.json", image.config.as_bytes())
            .file("l.tar", &image.layers[0].blob)
            .symlink("circle", "circle")
            .symlink("out", "/etc/passwd")
            .file("manifest.json", manifest.as_bytes())
            .end()
    };
    let one =
        |config: &str, layer: &str| saved(&format!(r#"[{{"Config":"{config}","Layers":["{layer}"]}}]"#));
    let mut cut = one("c.json", "l.tar");
    cut.truncate(3000);
    for (case, bytes, fits) in [
        (
            "two images",
            saved(r#"[{"Config":"a","Layers":[]},{"Config":"b","Layers":[]}]"#),
            (|why| matches!(why, Refusal::Ambiguous(_))) as Fits,
        ),
        ("a layer that leaves", one("c.json", "../../etc/passwd"), name),
        ("a layer that is a link out", one("c.json", "out"), |why| matches!(why, Refusal::Json(_))),
        ("a layer that is a link to itself", one("c.json", "circle"), link),
        ("a configuration that is missing", one("d.json", "l.tar"), |why| matches!(why, Refusal::Json(_))),
        ("gzip as a whole", gzip(&one("c.json", "l.tar")), |why| matches!(why, Refusal::Compression(_))),
        ("cut short", cut, tar),
        ("nothing of an image", Tar::default().file("x", b"").end(), |why| matches!(why, Refusal::Json(_))),
    ] {
        let place = Place::limited(limits());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        match place.make_of(&Source::Archive(file.path().to_owned()), "x.ext4").await {
            Err(Error::Refused { why, .. }) => assert!(fits(&why), "{case}: {why}"),
            other => panic!("{case}: {other:?}"),
        }
        assert!(place.left().is_empty(), "{case}");
    }
    let place = Place::new();
    let missing = place.images.resolve(&Source::Archive("/no/such/file".into()), &|_| ()).await;
    assert!(matches!(missing, Err(Error::NotFound { .. })));
    let directory = place.images.resolve(&Source::Archive("/tmp".into()), &|_| ()).await;
    assert!(matches!(directory, Err(Error::NotFound { .. })));
}
