//! Archives and images made by hand, so that they can be wrong; and a reader of what becomes of them.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use kelvin_api::digest::sha256;
use kelvin_image::{Error, Images, Limits, Made, Options, Resolved, Source};
use mkext4::reader::Fs;

pub const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// `sha256:…` of `bytes`.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", sha256(bytes))
}

/// `length` bytes that cannot be compressed, the same each time. Source: Marsaglia, "Xorshift RNGs".
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = std::iter::repeat_with(next).take(length.div_ceil(8)).flatten().collect();
    bytes.truncate(length);
    bytes
}

/// A header of a tar archive, before its sum.
#[derive(Clone)]
pub struct Header(pub [u8; 512]);

impl Header {
    pub fn new(name: &[u8], kind: u8, size: u64) -> Self {
        let mut header = Self([0; 512]);
        header.put(0, &name[..name.len().min(100)]);
        header.put(100, if kind == b'5' { b"0000755" } else { b"0000644" });
        header.put(108, b"0000000").put(116, b"0000000");
        header.put(124, format!("{size:011o}").as_bytes());
        header.put(136, format!("{:011o}", 1_700_000_000).as_bytes());
        header.put(257, b"ustar\x0000");
        header.0[156] = kind;
        header
    }

    pub fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn summed(&self) -> [u8; 512] {
        let mut block = self.0;
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }
}

/// An archive.
#[derive(Default, Clone)]
pub struct Tar(pub Vec<u8>);

impl Tar {
    pub fn raw(mut self, header: &Header, content: &[u8]) -> Self {
        self.0.extend(header.summed());
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn file(self, name: &str, content: &[u8]) -> Self {
        let header = Header::new(name.as_bytes(), b'0', content.len() as u64);
        self.raw(&header, content)
    }

    pub fn directory(self, name: &str) -> Self {
        self.raw(&Header::new(name.as_bytes(), b'5', 0), b"")
    }

    fn link(self, name: &str, to: &str, kind: u8) -> Self {
        let mut header = Header::new(name.as_bytes(), kind, 0);
        header.put(157, to.as_bytes());
        self.raw(&header, b"")
    }

    pub fn symlink(self, name: &str, to: &str) -> Self {
        self.link(name, to, b'2')
    }

    pub fn hard_link(self, name: &str, to: &str) -> Self {
        self.link(name, to, b'1')
    }

    pub fn device(self, name: &str, kind: u8, major: &[u8], minor: &[u8]) -> Self {
        let mut header = Header::new(name.as_bytes(), kind, 0);
        header.put(329, major).put(337, minor);
        self.raw(&header, b"")
    }

    /// Records for the next entry.
    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut text = Vec::new();
        for (key, value) in records {
            let bare = key.len() + value.len() + 3;
            let mut length = bare + 1;
            while length != bare + length.to_string().len() {
                length = bare + length.to_string().len();
            }
            text.extend(format!("{length} {key}=").bytes());
            text.extend(*value);
            text.push(b'\n');
        }
        let header = Header::new(b"pax", b'x', text.len() as u64);
        self.raw(&header, &text)
    }

    /// With the blocks at its end.
    pub fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A layer as a manifest tells of it.
#[derive(Clone)]
pub struct Layer {
    pub blob: Vec<u8>,
    pub media_type: String,
    pub diff_id: String,
    pub digest: String,
    pub size: i64,
}

impl Layer {
    pub fn of(blob: Vec<u8>, media_type: &str, tar: &[u8]) -> Self {
        let (digest_of, size) = (digest(&blob), blob.len() as i64);
        Self { media_type: media_type.to_owned(), diff_id: digest(tar), digest: digest_of, size, blob }
    }

    pub fn plain(tar: Vec<u8>) -> Self {
        Self::of(tar.clone(), PLAIN, &tar)
    }

    pub fn gzip(tar: &[u8]) -> Self {
        Self::of(gzip(tar), GZIP, tar)
    }
}

/// An image: its documents and its layers.
#[derive(Clone)]
pub struct Image {
    pub config: String,
    pub manifest: String,
    pub layers: Vec<Layer>,
}

pub const CONFIG: &str = r#""Env":["A=1","PATH=/bin"],"WorkingDir":"/app","User":"app","Cmd":["sh"]"#;

impl Image {
    pub fn new(layers: Vec<Layer>) -> Self {
        let ids: Vec<_> = layers.iter().map(|layer| format!("\"{}\"", layer.diff_id)).collect();
        let config = format!(
            r#"{{"os":"linux","architecture":"amd64","config":{{{CONFIG}}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
            ids.join(",")
        );
        Self::with_config(layers, config)
    }

    pub fn with_config(layers: Vec<Layer>, config: String) -> Self {
        let entries: Vec<_> = layers
            .iter()
            .map(|layer| {
                let Layer { media_type, digest, size, .. } = layer;
                format!(r#"{{"mediaType":"{media_type}","digest":"{digest}","size":{size}}}"#)
            })
            .collect();
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":{}}},"layers":[{}]}}"#,
            digest(config.as_bytes()),
            config.len(),
            entries.join(",")
        );
        Self { config, manifest, layers }
    }

    pub fn digest(&self) -> String {
        digest(self.manifest.as_bytes())
    }

    pub fn index(&self) -> String {
        index(&[(&self.digest(), self.manifest.len(), MANIFEST)])
    }

    /// Writes it as a layout into `directory`.
    pub fn layout(&self, directory: &Path) {
        put_blob(directory, self.config.as_bytes(), &digest(self.config.as_bytes()));
        put_blob(directory, self.manifest.as_bytes(), &self.digest());
        for layer in &self.layers {
            put_blob(directory, &layer.blob, &layer.digest);
        }
        std::fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        std::fs::write(directory.join("index.json"), self.index()).unwrap();
    }

    /// As `docker save` has written it up to version 24.
    pub fn saved(&self) -> Vec<u8> {
        let config = format!("{}.json", sha256(self.config.as_bytes()));
        let mut tar = Tar::default();
        let mut names = Vec::new();
        for (at, layer) in self.layers.iter().enumerate() {
            let name = format!("{at}/layer.tar");
            // The second of two equal layers is a link.
            let same = self.layers[..at].iter().position(|other| other.digest == layer.digest);
            tar = match same {
                Some(first) => tar.symlink(&name, &format!("../{first}/layer.tar")),
                None => tar.file(&name, &layer.blob),
            };
            names.push(format!("\"{name}\""));
        }
        let manifest =
            format!(r#"[{{"Config":"{config}","RepoTags":["x:y"],"Layers":[{}]}}]"#, names.join(","));
        tar.file(&config, self.config.as_bytes()).file("manifest.json", manifest.as_bytes()).end()
    }
}

pub fn index(entries: &[(&str, usize, &str)]) -> String {
    let entries: Vec<_> = entries
        .iter()
        .map(|(digest, size, kind)| format!(r#"{{"mediaType":"{kind}","digest":"{digest}","size":{size}}}"#))
        .collect();
    format!(r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{}]}}"#, entries.join(","))
}

pub fn put_blob(directory: &Path, bytes: &[u8], digest: &str) {
    let blobs = directory.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    if let Some(hex) = digest.strip_prefix("sha256:") {
        std::fs::write(blobs.join(hex), bytes).unwrap();
    }
}

/// A directory, and [`Images`] in it.
pub struct Place {
    pub directory: tempfile::TempDir,
    pub images: Images,
}

impl Place {
    pub fn new() -> Self {
        Self::with(Options::default())
    }

    pub fn limited(limits: Limits) -> Self {
        Self::with(Options { limits, ..Options::default() })
    }

    pub fn with(options: Options) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let images = Images::open(directory.path().join("cache"), options).unwrap();
        Self { directory, images }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Makes `target` of what is in the layout `source`.
    pub async fn make_of(&self, source: &Source, target: &str) -> Result<(Resolved, Made), Error> {
        let image = self.images.resolve(source, &|_| ()).await?;
        let made = self.images.make(&image, &self.path(target), None, &|_| ()).await?;
        Ok((image, made))
    }

    /// Makes an ext4 file of `layers`, through a layout.
    pub async fn make(&self, layers: Vec<Layer>) -> Result<Ext4, Error> {
        let layout = tempfile::tempdir_in(self.directory.path()).unwrap();
        Image::new(layers).layout(layout.path());
        let target = format!("{}.ext4", layout.path().file_name().unwrap().to_str().unwrap());
        self.make_of(&Source::Layout(layout.path().to_owned()), &target).await?;
        Ok(Ext4::open(&self.path(&target)))
    }

    /// What is in the directory beside the cache.
    pub fn left(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<_> = names
            .map(|it| it.unwrap().file_name().into_string().unwrap())
            .filter(|it| it != "cache")
            .collect();
        names.sort();
        names
    }
}

/// A file system that was made.
pub struct Ext4(pub Fs<File>);

impl Ext4 {
    /// Opens it, after two programs have looked at it.
    pub fn open(path: &Path) -> Self {
        check(path);
        let fs = Fs::open(File::open(path).unwrap()).unwrap();
        let issues = fs.verify().unwrap();
        assert!(issues.is_empty(), "{issues:?}");
        Self(fs)
    }

    pub fn ino(&self, path: &str) -> Option<u32> {
        self.0.resolve(path).ok()
    }

    pub fn has(&self, path: &str) -> bool {
        self.ino(path).is_some()
    }

    pub fn inode(&self, path: &str) -> mkext4::spec::Inode {
        self.0.inode(self.ino(path).unwrap_or_else(|| panic!("{path} is missing"))).unwrap()
    }

    pub fn read(&self, path: &str) -> Vec<u8> {
        self.0.read_file(self.ino(path).unwrap_or_else(|| panic!("{path} is missing"))).unwrap()
    }

    pub fn text(&self, path: &str) -> String {
        String::from_utf8(self.read(path)).unwrap()
    }

    pub fn target(&self, path: &str) -> String {
        String::from_utf8(self.0.symlink_target(self.ino(path).unwrap()).unwrap()).unwrap()
    }

    pub fn xattr(&self, path: &str, name: &str) -> Option<Vec<u8>> {
        let all = self.0.xattrs(self.ino(path).unwrap()).unwrap();
        all.into_iter().find(|it| it.full_name().as_deref() == Some(name.as_bytes())).map(|it| it.value)
    }

    /// All paths, without the file system's own.
    pub fn paths(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut left = vec![(String::new(), 2)];
        while let Some((path, ino)) = left.pop() {
            for entry in self.0.read_dir(ino).unwrap() {
                let name = String::from_utf8(entry.name.clone()).unwrap();
                if matches!(name.as_str(), "." | ".." | "lost+found") {
                    continue;
                }
                let path = format!("{path}/{name}");
                if entry.file_type == 2 {
                    left.push((path.clone(), entry.inode));
                }
                found.push(path);
            }
        }
        found.sort();
        found
    }
}

/// `e2fsck -fn`, where there is one.
pub fn check(path: &Path) {
    let output = ["e2fsck", "/usr/sbin/e2fsck", "/sbin/e2fsck"]
        .iter()
        .find_map(|program| Command::new(program).arg("-fn").arg(path).output().ok());
    match output {
        Some(output) => assert!(
            output.status.success(),
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ),
        None => println!("skipped: no e2fsck"),
    }
}
