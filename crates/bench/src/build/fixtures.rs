//! Packages that are made on the spot: what installs them is real, and nothing is fetched.
//!
//! ```text
//! Debian   files ──dpkg-deb──> .deb ──> a flat repository with its index, for `deb [trusted=yes] file:DIR ./`
//! Python   files ──zip──> a wheel, for `pip install --no-index --find-links DIR`
//! Node     files ──tar, gzip──> what `npm pack` makes, for `npm install --offline FILE` or to be unpacked into `node_modules`
//! ```
//!
//! Who writes: whoever calls, below the directory that he names.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use flate2::Compression;
use flate2::write::GzEncoder;
use kelvin_api::digest::sha256;
use sha2::{Digest as _, Sha256};

/// Why there is no package.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be written.
    #[error("making the package {0}")]
    Io(String, #[source] io::Error),
    /// The program that makes them failed.
    #[error("dpkg-deb failed for {0}: {1}")]
    Deb(String, String),
}

/// A file of a package: its path from the root of the package, its content, and its permissions.
pub type Content = (String, Vec<u8>, u32);

/// `length` bytes that cannot be compressed, the same for the same `seed`.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        // Source: Marsaglia, "Xorshift RNGs", the generator of 64 bits.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A Debian package of any architecture.
#[derive(Debug)]
pub struct Deb<'a> {
    /// Its name.
    pub name: &'a str,
    /// Names of the packages that it needs.
    pub depends: &'a [&'a str],
    /// What it installs.
    pub files: &'a [Content],
    /// A shell script that runs when it has been unpacked.
    pub postinst: Option<&'a str>,
}

impl Deb<'_> {
    fn control(&self) -> String {
        let mut text = format!(
            "Package: {}\nVersion: 1.0\nArchitecture: all\nMaintainer: Kelvin <nobody@localhost>\n",
            self.name
        );
        if !self.depends.is_empty() {
            text.push_str(&format!("Depends: {}\n", self.depends.join(", ")));
        }
        text.push_str("Description: a fixture\n");
        text
    }

    /// Makes it in `directory`; what the repository's index says of it.
    fn make(&self, directory: &Path) -> Result<String, Error> {
        let failed = |error| Error::Io(self.name.to_owned(), error);
        let file = format!("{}_1.0_all.deb", self.name);
        let target = directory.join(&file);
        let tree = tempfile::tempdir_in(directory).map_err(failed)?;
        // What is installed is everybody's to read.
        fs::set_permissions(tree.path(), fs::Permissions::from_mode(0o755)).map_err(failed)?;
        let control = [("DEBIAN/control".to_owned(), self.control().into_bytes(), 0o644)];
        let script = self.postinst.map(|text| ("DEBIAN/postinst".to_owned(), text.into(), 0o755));
        for (path, bytes, mode) in self.files.iter().chain(&control).chain(script.as_ref()) {
            put(&tree.path().join(path), bytes, *mode).map_err(failed)?;
        }
        let mut build = Command::new("dpkg-deb");
        build.args(["--root-owner-group", "-Zgzip", "-z1", "--build"]).arg(tree.path()).arg(&target);
        let done = build.output().map_err(failed)?;
        if !done.status.success() {
            return Err(Error::Deb(self.name.to_owned(), String::from_utf8_lossy(&done.stderr).into_owned()));
        }
        let bytes = fs::read(&target).map_err(failed)?;
        Ok(format!(
            "{}Filename: ./{file}\nSize: {}\nSHA256: {}\n",
            self.control(),
            bytes.len(),
            sha256(&bytes)
        ))
    }
}

fn put(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(path, bytes)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Makes a repository of `packages` of the directory `directory`, which is made.
///
/// Source: Debian's wiki, "DebianRepository/Format", "Flat Repository Format".
///
/// # Errors
/// `Io`, `Deb`.
pub fn apt_repository(directory: &Path, packages: &[Deb<'_>]) -> Result<(), Error> {
    let failed = |error| Error::Io("index".to_owned(), error);
    fs::create_dir_all(directory).map_err(failed)?;
    let index = packages.iter().map(|package| package.make(directory)).collect::<Result<Vec<_>, _>>()?;
    fs::write(directory.join("Packages"), index.join("\n")).map_err(failed)
}

/// A Python package of any platform.
#[derive(Debug)]
pub struct Wheel<'a> {
    /// Its name, with `_` between words.
    pub name: &'a str,
    /// Names of the packages that it needs.
    pub requires: &'a [&'a str],
    /// What it installs, from the root of the site's packages.
    pub files: &'a [Content],
}

impl Wheel<'_> {
    /// Makes it in `directory`, which is there.
    ///
    /// Source: PyPA specifications, "Binary distribution format".
    ///
    /// # Errors
    /// `Io`.
    pub fn make(&self, directory: &Path) -> Result<PathBuf, Error> {
        let information = format!("{}-1.0.dist-info", self.name);
        let mut metadata = format!("Metadata-Version: 2.1\nName: {}\nVersion: 1.0\n", self.name);
        for name in self.requires {
            metadata.push_str(&format!("Requires-Dist: {name}\n"));
        }
        let wheel = "Wheel-Version: 1.0\nGenerator: kelvin\nRoot-Is-Purelib: true\nTag: py3-none-any\n";
        let mut files = self.files.to_vec();
        files.push((format!("{information}/METADATA"), metadata.into_bytes(), 0o644));
        files.push((format!("{information}/WHEEL"), wheel.into(), 0o644));
        let mut record = String::new();
        for (path, bytes, _) in &files {
            let digest = URL_SAFE_NO_PAD.encode(Sha256::digest(bytes));
            record.push_str(&format!("{path},sha256={digest},{}\n", bytes.len()));
        }
        record.push_str(&format!("{information}/RECORD,,\n"));
        files.push((format!("{information}/RECORD"), record.into_bytes(), 0o644));
        let target = directory.join(format!("{}-1.0-py3-none-any.whl", self.name));
        let packed = zip(&files).and_then(|bytes| fs::write(&target, bytes));
        packed.map_err(|error| Error::Io(self.name.to_owned(), error))?;
        Ok(target)
    }
}

/// A zip archive, nothing of it compressed.
///
/// Source: PKWARE, APPNOTE.TXT, 4.3.7, 4.3.12 and 4.3.16.
fn zip(files: &[Content]) -> io::Result<Vec<u8>> {
    /// 1980-01-01, the first day that there is.
    const DAY: u16 = (1 << 5) | 1;
    let too_large = |_| io::Error::other("more than fits into a zip archive");
    let (mut archive, mut directory) = (Vec::new(), Vec::new());
    for (path, bytes, mode) in files {
        let mut sum = flate2::Crc::new();
        sum.update(bytes);
        let offset = u32::try_from(archive.len()).map_err(too_large)?;
        let size = u32::try_from(bytes.len()).map_err(too_large)?;
        let name = u16::try_from(path.len()).map_err(|_| io::Error::other("a name that is too long"))?;
        // Version that is needed, flags, method, time, day; sum, sizes; lengths of name and of what is beside it.
        let mut common = Vec::new();
        for value in [20, 0, 0, 0, DAY] {
            common.extend_from_slice(&value.to_le_bytes());
        }
        for value in [sum.sum(), size, size] {
            common.extend_from_slice(&value.to_le_bytes());
        }
        for value in [name, 0] {
            common.extend_from_slice(&value.to_le_bytes());
        }
        archive.extend_from_slice(b"PK\x03\x04");
        archive.extend_from_slice(&common);
        archive.extend_from_slice(path.as_bytes());
        archive.extend_from_slice(bytes);
        // Made by Unix; length of a comment, number of the disk, attributes within; the mode.
        directory.extend_from_slice(b"PK\x01\x02\x14\x03");
        directory.extend_from_slice(&common);
        directory.extend_from_slice(&[0; 6]);
        directory.extend_from_slice(&((0o100_000 | mode) << 16).to_le_bytes());
        directory.extend_from_slice(&offset.to_le_bytes());
        directory.extend_from_slice(path.as_bytes());
    }
    let count = u16::try_from(files.len()).map_err(|_| io::Error::other("too many files"))?;
    let begin = u32::try_from(archive.len()).map_err(too_large)?;
    let length = u32::try_from(directory.len()).map_err(too_large)?;
    archive.extend_from_slice(&directory);
    archive.extend_from_slice(b"PK\x05\x06\0\0\0\0");
    for value in [count, count] {
        archive.extend_from_slice(&value.to_le_bytes());
    }
    for value in [length, begin] {
        archive.extend_from_slice(&value.to_le_bytes());
    }
    archive.extend_from_slice(&[0, 0]);
    Ok(archive)
}

/// Makes a package of Node in `directory`, as `npm pack` would: `files` and `package.json`.
///
/// # Errors
/// `Io`.
pub fn npm_package(directory: &Path, name: &str, files: &[Content]) -> Result<PathBuf, Error> {
    let failed = |error| Error::Io(name.to_owned(), error);
    let target = directory.join(format!("{name}-1.0.0.tgz"));
    let about = serde_json::json!({ "name": name, "version": "1.0.0", "main": "index.js" });
    let about = [("package.json".to_owned(), about.to_string().into_bytes(), 0o644)];
    let file = File::create(&target).map_err(failed)?;
    let mut archive = tar::Builder::new(GzEncoder::new(file, Compression::fast()));
    for (path, bytes, mode) in about.iter().chain(files) {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(*mode);
        archive.append_data(&mut header, format!("package/{path}"), &bytes[..]).map_err(failed)?;
    }
    archive.into_inner().and_then(GzEncoder::finish).and_then(|mut file| file.flush()).map_err(failed)?;
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> Content {
        (path.to_owned(), text.into(), 0o644)
    }

    /// What `program` prints.
    fn output(program: &str, args: &[&str]) -> String {
        let done = Command::new(program).args(args).output().unwrap();
        assert!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    }

    #[test]
    fn noise_is_of_its_seed_and_is_not_compressed() {
        assert_eq!(noise(4, 1001), noise(4, 1001));
        assert_ne!(noise(4, 1001), noise(6, 1001));
        let mut packed = GzEncoder::new(Vec::new(), Compression::best());
        packed.write_all(&noise(1, 100_000)).unwrap();
        assert!(packed.finish().unwrap().len() > 99_000);
    }

    #[test]
    fn a_wheel_is_what_pythons_own_tools_read() {
        let directory = tempfile::tempdir().unwrap();
        let files = [file("greeting/__init__.py", "TEXT = 'hello'\n"), file("greeting/data", "1")];
        let path = Wheel { name: "greeting", requires: &["words"], files: &files }.make(directory.path());
        let path = path.unwrap();
        let script = "import sys, zipfile; archive = zipfile.ZipFile(sys.argv[1]); assert archive.testzip() is None; \
                      print(*archive.namelist()); print(archive.read('greeting-1.0.dist-info/METADATA').decode()); \
                      sys.path.insert(0, sys.argv[1]); import greeting; print(greeting.TEXT)";
        let said = output("python3", &["-c", script, path.to_str().unwrap()]);
        assert!(
            said.starts_with("greeting/__init__.py greeting/data greeting-1.0.dist-info/METADATA"),
            "{said}"
        );
        assert!(said.contains("Requires-Dist: words") && said.ends_with("hello\n"), "{said}");
    }

    #[test]
    fn packages_are_what_apt_reads() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("apt");
        let script = [("usr/bin/hello".to_owned(), b"#!/bin/sh\necho hello\n".to_vec(), 0o755)];
        let data = [file("usr/share/hello/data", "1")];
        let packages = [
            Deb {
                name: "hello",
                depends: &["hello-data"],
                files: &script,
                postinst: Some("#!/bin/sh\ntrue\n"),
            },
            Deb { name: "hello-data", depends: &[], files: &data, postinst: None },
        ];
        match apt_repository(&place, &packages) {
            Err(Error::Io(_, error)) if error.kind() == io::ErrorKind::NotFound => {
                println!("skipped: no dpkg-deb");
                return;
            }
            made => made.unwrap(),
        }
        let deb = place.join("hello_1.0_all.deb");
        let listed = output("dpkg-deb", &["--contents", deb.to_str().unwrap()]);
        assert!(listed.contains("-rwxr-xr-x root/root") && listed.contains("./usr/bin/hello"), "{listed}");
        assert_eq!(output("dpkg-deb", &["--field", deb.to_str().unwrap(), "Depends"]), "hello-data\n");
        let index = fs::read_to_string(place.join("Packages")).unwrap();
        let sum = sha256(&fs::read(&deb).unwrap());
        assert!(index.contains("Filename: ./hello_1.0_all.deb\n") && index.contains(&sum), "{index}");
        assert_eq!(index.split("\n\n").count(), 2);
        // Nothing else is left.
        assert_eq!(fs::read_dir(&place).unwrap().count(), 3);
    }

    #[test]
    fn a_package_of_node_is_what_tar_reads() {
        let directory = tempfile::tempdir().unwrap();
        let path = npm_package(directory.path(), "greeting", &[file("index.js", "1")]).unwrap();
        let listed = output("tar", &["-tzf", path.to_str().unwrap()]);
        assert_eq!(listed, "package/package.json\npackage/index.js\n");
    }
}
