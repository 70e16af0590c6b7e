//! The files of a COPY: which, in what order, under which hash, and what is refused.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use kelvin_api::error::ErrorCode;
use kelvin_dockerfile::{Action, Context, Dockerfile, Error, Limits, Options, Upload, seam};
use kelvin_node_api::Instruction;
use tempfile::TempDir;

/// A directory with files.
fn context(files: &[(&str, &str)]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (path, content) in files {
        write(directory.path(), path, content.as_bytes());
    }
    directory
}

fn write(directory: &Path, path: &str, content: &[u8]) {
    let path = directory.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, content).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
}

fn uploads_within(directory: &Path, instruction: &str, limits: Limits) -> Result<Vec<Upload>, Error> {
    let plan = Dockerfile::parse(&format!("FROM scratch\n{instruction}\n"))?.plan(&Options::default())?;
    Context::open(directory, None, limits)?.uploads(&plan.stages[0].steps[0])
}

fn uploads(directory: &Path, instruction: &str) -> Result<Vec<Upload>, Error> {
    uploads_within(directory, instruction, Limits::default())
}

fn written(upload: &Upload) -> Vec<u8> {
    let mut bytes = Vec::new();
    upload.write(&mut bytes).unwrap();
    bytes
}

/// What is in a tar: `path` and its content, `path/` for a directory, `path -> target` for a link.
fn entries(upload: &Upload) -> Vec<String> {
    let bytes = written(upload);
    let mut archive = tar::Archive::new(&bytes[..]);
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let header = entry.header();
        assert_eq!(
            (header.uid().unwrap(), header.gid().unwrap(), header.mtime().unwrap()),
            (0, 0, 315_619_200)
        );
        let path = entry.path().unwrap().display().to_string();
        match entry.header().entry_type() {
            tar::EntryType::Directory => format!("{}/", path.trim_end_matches('/')),
            tar::EntryType::Symlink => format!("{path} -> {}", entry.link_name().unwrap().unwrap().display()),
            _ => {
                let mut content = String::new();
                entry.read_to_string(&mut content).unwrap();
                format!("{path}={content}")
            }
        }
    });
    entries.collect()
}

/// The only upload of an instruction: what of it is copied, and what is in it.
fn copied(directory: &Path, instruction: &str) -> (String, Vec<String>) {
    let uploads = uploads(directory, instruction).unwrap_or_else(|error| panic!("{instruction}: {error}"));
    let [upload] = &uploads[..] else { panic!("{instruction}: {uploads:?}") };
    (upload.from.clone(), entries(upload))
}

fn refused(directory: &Path, instruction: &str) -> (ErrorCode, String) {
    let error = uploads(directory, instruction).expect_err(instruction);
    assert_eq!((error.line, error.instruction.as_str()), (2, instruction.lines().next().unwrap()), "{error}");
    (error.code(), error.to_string())
}

#[test]
fn sources_become_what_the_destination_gets() {
    let directory =
        context(&[("a", "1"), ("b", "2"), ("d/x", "3"), ("d/e/y", "4"), ("d2/x", "5"), (".h", "6")]);
    let at = directory.path();
    fs::create_dir(at.join("empty")).unwrap();
    symlink("x", at.join("d/link")).unwrap();
    symlink("/etc/none", at.join("d/gone")).unwrap();
    symlink("d", at.join("alias")).unwrap();
    let cases: &[(&str, &str, &[&str])] = &[
        ("COPY a /x", "a", &["a=1"]),
        ("COPY a /x/", ".", &["a=1"]),
        ("COPY /a /x", "a", &["a=1"]),
        ("COPY ./d/../a /x", "a", &["a=1"]),
        ("COPY a b /x/", ".", &["a=1", "b=2"]),
        ("COPY d /x", ".", &["e/", "e/y=4", "gone -> /etc/none", "link -> x", "x=3"]),
        ("COPY d/ d2 /x/", ".", &["e/", "e/y=4", "gone -> /etc/none", "link -> x", "x=5"]),
        ("COPY d/link /x/", ".", &["link=3"]),
        ("COPY alias/e/y /x/", ".", &["y=4"]),
        ("COPY alias/e /x/", ".", &["y=4"]),
        ("COPY empty /x/", ".", &["./"]),
        ("COPY [ab] /x/", ".", &["a=1", "b=2"]),
        ("COPY d?/x /x", "x", &["x=5"]),
        ("COPY */e/* /x/", ".", &["y=4"]),
        ("COPY .* /x/", ".", &[".h=6"]),
        ("COPY b* a* /x/", ".", &["a=1", "b=2", "e/", "e/y=4", "gone -> /etc/none", "link -> x", "x=3"]),
        ("COPY <<f a /x/\nhi\nf", ".", &["a=1", "f=hi\n"]),
        ("COPY <<f /x\nhi\nf", "f", &["f=hi\n"]),
    ];
    for (instruction, from, expected) in cases {
        let (name, found) = copied(at, instruction);
        assert_eq!((name.as_str(), &found[..]), (*from, &expected.map_to_owned()[..]), "{instruction}");
    }
    // The last source of a name is the one that is there.
    assert_eq!(copied(at, "COPY d2/x d/x /y/").1, ["x=3"]);
    assert_eq!(copied(at, "COPY . /y").1.len(), 13);
}

trait MapToOwned {
    fn map_to_owned(&self) -> Vec<String>;
}

impl MapToOwned for &[&str] {
    fn map_to_owned(&self) -> Vec<String> {
        self.iter().map(|text| (*text).to_owned()).collect()
    }
}

#[test]
fn nothing_from_outside_is_copied() {
    let outside = context(&[("secret", "s"), ("inside/a", "1"), ("inside/d/x", "2")]);
    let at = outside.path().join("inside");
    symlink("../secret", at.join("up")).unwrap();
    symlink("..", at.join("parent")).unwrap();
    symlink("/etc/passwd", at.join("absolute")).unwrap();
    for source in [
        "../secret",
        "/../secret",
        "d/../../secret",
        "up",
        "parent",
        "parent/secret",
        "parent/*",
        "absolute",
        "u*",
    ] {
        let (code, message) = refused(&at, &format!("COPY {source} /x/"));
        assert_eq!(code, ErrorCode::FilesRefused, "{source}: {message}");
        assert!(message.contains("leaves the context"), "{message}");
    }
    // In a directory they are links, and stay so.
    let (_, found) = copied(&at, "COPY . /x/");
    assert_eq!(found, ["a=1", "absolute -> /etc/passwd", "d/", "d/x=2", "parent -> ..", "up -> ../secret"]);
}

#[test]
fn what_matches_nothing_or_too_much_is_refused() {
    let directory = context(&[
        ("a", "1"),
        ("b", "2"),
        ("d/x", "3"),
        ("d2/x/y", "4"),
        (".dockerignore", "b\nsecret/**\n"),
    ]);
    let at = directory.path();
    write(at, "secret/key", b"k");
    fs::write(at.join("x.bz2"), b"BZh91AY&SY").unwrap();
    for source in ["none", "*.none", "b", "[b]", "secret/key", "a/b", "d/*/z"] {
        assert_eq!(refused(at, &format!("COPY {source} /x/")).0, ErrorCode::FilesMissing, "{source}");
    }
    assert!(refused(at, "COPY [ /x/").1.contains("not a valid pattern"));
    assert!(refused(at, "COPY d* /x").1.contains("ends in `/`"));
    assert!(refused(at, "COPY d d2 /x/").1.contains("x: one source has a directory"));
    assert!(refused(at, "ADD x.bz2 /x/").1.contains("bzip2 is not supported"));
    assert_eq!(copied(at, "COPY x.bz2 /x").0, "x.bz2");
    rustix::fs::mkfifoat(rustix::fs::CWD, at.join("d/pipe"), rustix::fs::Mode::RUSR).unwrap();
    assert!(refused(at, "COPY d/pipe /x/").1.contains("d/pipe: it is a socket"));
    assert!(refused(at, "COPY d /x/").1.contains("d/pipe: it is a socket"));
}

#[test]
fn limits_hold() {
    let directory = context(&[("a", "12345"), ("b", "12345"), ("d/e/f/g", "1")]);
    let at = directory.path();
    let limits = Limits { entries: 7, bytes: 11, depth: 3 };
    assert!(uploads_within(at, "COPY . /x/", limits).is_ok());
    for limits in
        [Limits { entries: 5, ..limits }, Limits { bytes: 10, ..limits }, Limits { depth: 2, ..limits }]
    {
        let error = uploads_within(at, "COPY . /x/", limits).unwrap_err();
        assert!(error.to_string().contains("has more than"), "{error}");
    }
    let error = uploads_within(at, "COPY * /x/", Limits { entries: 2, ..limits }).unwrap_err();
    assert!(error.to_string().contains("a pattern in files"), "{error}");
}

#[test]
fn dockerignore_leaves_out_and_brings_back() {
    let directory = context(&[
        (".dockerignore", "# all but\n*\n!src\nsrc/**/*.log\n!deep/a/keep\n"),
        ("src/a.c", "1"),
        ("src/x/b.log", "2"),
        ("deep/a/keep", "3"),
        ("deep/a/drop", "4"),
        ("README", "5"),
    ]);
    let at = directory.path();
    // Directories on the way to what is kept are there, too.
    let kept = ["deep/", "deep/a/", "deep/a/keep=3", "src/", "src/a.c=1", "src/x/"];
    assert_eq!(copied(at, "COPY . /x/").1, kept);
    assert_eq!(copied(at, "COPY deep /x/").1, ["a/", "a/keep=3"]);
    assert_eq!(copied(at, "COPY * /x/").1, ["a/", "a/keep=3", "a.c=1", "x/"]);
    assert_eq!(refused(at, "COPY README /x/").0, ErrorCode::FilesMissing);
    // A Dockerfile's own takes its place.
    write(at, "other.Dockerfile.dockerignore", b"src\ndeep\n*ignore\n");
    let context = Context::open(at, Some(&at.join("other.Dockerfile")), Limits::default()).unwrap();
    let plan = Dockerfile::parse("FROM scratch\nCOPY . /x/").unwrap().plan(&Options::default()).unwrap();
    let uploads = context.uploads(&plan.stages[0].steps[0]).unwrap();
    assert_eq!(entries(&uploads[0]), ["README=5"]);
    write(at, ".dockerignore", b"\n[\n");
    let error = Context::open(at, None, Limits::default()).unwrap_err();
    assert_eq!((error.line, error.instruction.as_str()), (2, ".dockerignore"));
}

#[test]
fn add_unpacks_archives_and_nothing_else() {
    let directory = context(&[("a", "1"), ("b", "2")]);
    let at = directory.path();
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(1);
    builder.append_data(&mut header, "in/x", &b"9"[..]).unwrap();
    let tar = builder.into_inner().unwrap();
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(&tar).unwrap();
    let gzip = gzip.finish().unwrap();
    write(at, "t.tgz", &gzip);
    write(at, "t.tar", &tar);
    // In the order in which they are named: what is later lies above.
    let found = uploads(at, "ADD a t.tgz b t.tar /x/").unwrap();
    let kinds: Vec<_> = found.iter().map(|upload| (upload.is_archive(), upload.from.as_str())).collect();
    assert_eq!(kinds, [(false, "."), (true, "."), (false, "."), (true, ".")]);
    assert_eq!((written(&found[1]), written(&found[3])), (gzip, tar));
    assert_ne!(found[1].hash, found[3].hash);
    assert_eq!(uploads(at, "ADD t.tgz /x").unwrap().len(), 1);
    assert_eq!(copied(at, "ADD a /x"), ("a".to_owned(), vec!["a=1".to_owned()]));
    let whole = uploads(at, "COPY t.tar /x").unwrap();
    assert_eq!((whole[0].is_archive(), whole[0].from.as_str()), (false, "t.tar"));
}

/// The hash of `COPY . /x/`.
fn hash(directory: &Path) -> String {
    uploads(directory, "COPY . /x/").unwrap()[0].hash.to_string()
}

#[test]
fn the_hash_is_of_what_is_copied() {
    let files = [("a", "1"), ("d/b", "2")];
    let one = context(&files);
    let same = context(&files);
    let at = one.path();
    // Times do not count.
    fs::File::open(at.join("a")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    let first = hash(at);
    assert_eq!(first, hash(same.path()));
    let tar = |at: &Path| written(&uploads(at, "COPY . /x/").unwrap()[0]);
    assert_eq!(tar(at), tar(same.path()));
    let mut hashes = BTreeMap::from([(first.clone(), "as it was")]);
    let mut add = |what: &'static str| {
        let hash = hash(at);
        assert_eq!(hashes.insert(hash, what), None, "{what}");
    };
    fs::set_permissions(at.join("a"), fs::Permissions::from_mode(0o755)).unwrap();
    add("an executable");
    fs::write(at.join("a"), "3").unwrap();
    add("another content");
    fs::rename(at.join("a"), at.join("c")).unwrap();
    add("another name");
    fs::create_dir(at.join("e")).unwrap();
    add("a directory");
    symlink("c", at.join("f")).unwrap();
    add("a link");
    fs::remove_file(at.join("f")).unwrap();
    symlink("d", at.join("f")).unwrap();
    add("another target");
    fs::remove_file(at.join("f")).unwrap();
    fs::remove_dir(at.join("e")).unwrap();
    fs::rename(at.join("c"), at.join("a")).unwrap();
    write(at, "a", b"1");
    assert_eq!(hash(at), first);
}

#[test]
fn what_changes_after_its_hash_is_not_sent() {
    let directory = context(&[("a", "12345")]);
    let at = directory.path();
    for content in ["1234", "123456", "54321"] {
        write(at, "a", b"12345");
        let upload = uploads(at, "COPY a /x").unwrap().remove(0);
        write(at, "a", content.as_bytes());
        let sent = upload.write(&mut Vec::new());
        // What was added behind it is not looked at: the archive is what was hashed.
        assert_eq!(sent.is_ok(), content == "123456", "{content}");
    }
    let upload = uploads(at, "COPY a /x").unwrap().remove(0);
    fs::remove_file(at.join("a")).unwrap();
    symlink("/etc/passwd", at.join("a")).unwrap();
    assert!(upload.write(&mut Vec::new()).is_err());
}

#[test]
fn long_names_and_odd_ones_are_kept() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(200));
    for path in [long.as_str(), "a b/ü", "n\nl", "-x", "[y]"] {
        write(at, path, b"1");
    }
    symlink(PathBuf::from("t".repeat(300)), at.join("link")).unwrap();
    let found = copied(at, "COPY . /x/").1;
    for expected in [
        format!("{long}=1"),
        "a b/ü=1".into(),
        "n\nl=1".into(),
        "-x=1".into(),
        format!("link -> {}", "t".repeat(300)),
    ] {
        assert!(found.contains(&expected), "{expected}");
    }
    assert_eq!(copied(at, "COPY [\"a b/ü\", \"/x/\"]").1, ["ü=1"]);
    // A pattern's own letters are escaped, in the exec form twice: Docker's words have escapes, too.
    assert_eq!(copied(at, "COPY '\\[y]' /x/").1, ["[y]=1"]);
}

#[test]
fn an_upload_is_a_copy_for_a_node() {
    let directory = context(&[("a", "1")]);
    let plan = Dockerfile::parse("FROM b\nCOPY --chmod=600 a /x").unwrap().plan(&Options::default()).unwrap();
    let step = &plan.stages[0].steps[0];
    let uploads = Context::open(directory.path(), None, Limits::default()).unwrap().uploads(step).unwrap();
    let Action::Copy(copy) = &step.action else { panic!("{step:?}") };
    let expected = Instruction::Copy {
        files: uploads[0].hash.clone(),
        from: "a".to_owned(),
        to: "/x".to_owned(),
        owner: Some("0:0".to_owned()),
        mode: Some(0o600),
    };
    assert_eq!(seam::copy(copy, &uploads[0]), Some(expected));
}

#[test]
fn a_stage_is_steps_for_a_node() {
    let directory = context(&[("a", "1"), (".dockerignore", "")]);
    let context = Context::open(directory.path(), None, Limits::default()).unwrap();
    let steps = |body: &str| {
        let plan = Dockerfile::parse(&format!("FROM b\n{body}")).unwrap().plan(&Options::default()).unwrap();
        seam::steps(&plan.stages[plan.target], &context)
    };
    let asked = steps("ENV k=secret\nCOPY a /x\nRUN y\nUSER u").unwrap();
    let shown: Vec<_> = asked.iter().map(|one| (one.step.shown.as_str(), one.upload.is_some())).collect();
    assert_eq!(shown, [("ENV k", false), ("COPY a /x", true), ("RUN y", false), ("USER u", false)]);
    let copied = steps("COPY --from=c --chown=app /x /y* /z/").unwrap();
    let of = |from: &str| Instruction::CopyFrom {
        stage: 0,
        from: from.to_owned(),
        to: "/z/".to_owned(),
        owner: Some("app".to_owned()),
        mode: None,
    };
    let copied: Vec<_> = copied.into_iter().map(|one| one.step.instruction).collect();
    assert_eq!(copied, [of("/x"), of("/y*")]);
    for (body, says) in [
        ("RUN a\nUSER $NAME", "a variable of the image"),
        ("RUN a\nCOPY a $HOME/", "a variable of the image"),
        ("RUN a\nCOPY none /x", "matches no file"),
    ] {
        let error = steps(body).unwrap_err();
        assert_eq!(error.line, 3, "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
}
