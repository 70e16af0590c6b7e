//! Digests of snapshots: taken after the publication of those that are kept, and compared when somebody asks.
//!
//! ```text
//! published ──step, step, …──> digests.json complete          (a crash: goes on behind the last chunks that it notes)
//!     each step one chunk; the seal is checked before the first and after the last
//! verify_all: chunk by chunk against the digests, a verdict for each file
//! export: digested to the end, verified, and only then given out
//! ```
//!
//! Hashing gigabytes is not for the path of a snapshot, so that what is kept has a seal at once and digests a while later:
//! what a disk spoils before that is not seen. Who writes: `digests.json`, the task of the node that digests, and an export.
//! A bake is published with its digests in its manifest, and has no `digests.json`.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::hash::{Chunks, FileDigest};
use crate::snapshot::{Snapshot, files};
use crate::{Error, io_error, read_json, write_json};

/// The file with the digests.
const DIGESTS: &str = "digests.json";
/// Chunks between two notes of how far it is: 256 MiB.
const NOTE_EVERY: u32 = 64;
/// Chunks of one file that a verdict names.
const NAMED: usize = 16;

/// What is known of one file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Part {
    /// Of its first chunks.
    chunks: Vec<String>,
    /// When all of it was digested.
    whole: Option<FileDigest>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Digests {
    #[serde(default)]
    memory: Part,
    #[serde(default)]
    state: Part,
    #[serde(default)]
    disk: Part,
}

impl Digests {
    fn part_mut(&mut self, name: &str) -> &mut Part {
        match name {
            "memory" => &mut self.memory,
            "state" => &mut self.state,
            _ => &mut self.disk,
        }
    }

    fn read(path: &Path) -> Result<Self, Error> {
        match read_json(path) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            other => other,
        }
    }
}

/// What became of one file since it was digested.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Every chunk is what it was.
    Intact,
    /// It has no digest yet: only its seal was checked.
    NotDigested,
    /// These chunks (of 4 MiB, the first of them) have another content.
    Damaged {
        /// Their numbers, from 0; the first sixteen.
        chunks: Vec<u64>,
        /// How many there are.
        count: u64,
    },
    /// It has another length.
    Resized {
        /// In bytes, now.
        bytes: u64,
        /// When it was digested.
        expected: u64,
    },
    /// It is not there, or the disk does not give it.
    Unreadable(String),
    /// Its content is what it was, or has no digest; but it was touched, and a resume refuses it.
    Unsealed(String),
}

impl Verdict {
    /// What is wrong; none when nothing is known to be.
    pub fn difference(&self) -> Option<String> {
        match self {
            Self::Intact | Self::NotDigested => None,
            Self::Damaged { chunks, count } => {
                let list = chunks.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
                let more = if *count > chunks.len() as u64 { ", …" } else { "" };
                Some(format!("chunk {list}{more} has another content ({count} of 4 MiB)"))
            }
            Self::Resized { bytes, expected } => Some(format!("it has {bytes} bytes instead of {expected}")),
            Self::Unreadable(why) => Some(format!("it cannot be read: {why}")),
            Self::Unsealed(why) => Some(why.clone()),
        }
    }
}

/// One file of a snapshot and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileVerdict {
    /// `memory`, `state` or `disk`.
    pub file: &'static str,
    /// Its length in bytes, now.
    pub bytes: u64,
    /// What became of it.
    pub verdict: Verdict,
}

/// Compares the file at `path` with `digest`.
pub(crate) fn compare(path: &Path, digest: &FileDigest) -> io::Result<Verdict> {
    let mut file = Chunks::open(path)?;
    if file.bytes != digest.bytes {
        return Ok(Verdict::Resized { bytes: file.bytes, expected: digest.bytes });
    }
    let (mut chunks, mut count) = (Vec::new(), 0);
    for (index, expected) in (0..file.count()).zip(&digest.chunks) {
        if file.digest(index)? != *expected {
            count += 1;
            if chunks.len() < NAMED {
                chunks.push(index);
            }
        }
    }
    Ok(if count == 0 { Verdict::Intact } else { Verdict::Damaged { chunks, count } })
}

/// A digesting under way.
#[derive(Debug)]
pub struct Digesting {
    snapshot: Snapshot,
    path: PathBuf,
    known: Digests,
    /// Files that are still to be done; the last is the one under way.
    left: Vec<&'static str>,
    open: Option<Chunks>,
    /// Steps since it was noted how far it is.
    unnoted: u32,
}

impl Digesting {
    /// Begins, or goes on where the last one was cut short. `None` when `snapshot` has its digests.
    ///
    /// # Errors
    /// `Seal` when a file was touched since it was published: its digest would be that of something else. `Io`, `Manifest`.
    pub fn of(snapshot: &Snapshot) -> Result<Option<Self>, Error> {
        let path = snapshot.directory.join(DIGESTS);
        let mut known = Digests::read(&path)?;
        let there = files(snapshot.manifest.mode);
        let is_done = |name: &str, digest: Option<&FileDigest>, known: &mut Digests| {
            digest.is_some() || known.part_mut(name).whole.is_some() || !there.contains(&name)
        };
        let mut left: Vec<&'static str> = Vec::new();
        for (name, digest) in snapshot.manifest.digests() {
            if !is_done(name, digest, &mut known) {
                left.push(name);
            }
        }
        if left.is_empty() {
            return Ok(None);
        }
        snapshot.check_seal()?;
        left.reverse();
        Ok(Some(Self { snapshot: snapshot.clone(), path, known, left, open: None, unnoted: 0 }))
    }

    /// Digests one chunk that holds something, and the holes before it; whether that was the last one of all.
    ///
    /// # Errors
    /// `Seal` when a file was touched meanwhile, and then it gets no digest; `Io`.
    pub fn step(&mut self) -> Result<bool, Error> {
        let Some(name) = self.left.last().copied() else { return Ok(true) };
        let file = self.snapshot.file(name);
        let mut chunks = match self.open.take() {
            Some(chunks) => chunks,
            None => Chunks::open(&file).map_err(io_error("reading", &file))?,
        };
        let part = self.known.part_mut(name);
        let mut done = part.chunks.len() as u64;
        let mut is_read = false;
        while done < chunks.count() && !is_read {
            is_read = !chunks.is_hole(done);
            part.chunks.push(chunks.digest(done).map_err(io_error("reading", &file))?);
            done += 1;
        }
        if done < chunks.count() {
            self.open = Some(chunks);
            self.unnoted += 1;
            if self.unnoted == NOTE_EVERY {
                self.unnoted = 0;
                write_json(&self.path, &self.known)?;
            }
            return Ok(false);
        }
        // What was digested is what was sealed.
        self.snapshot.check_seal()?;
        let part = self.known.part_mut(name);
        part.whole = Some(FileDigest::of(chunks.bytes, std::mem::take(&mut part.chunks)));
        self.left.pop();
        write_json(&self.path, &self.known)?;
        Ok(self.left.is_empty())
    }
}

impl Snapshot {
    /// Hashes every file whose digest is in the manifest: for start-up. See [`Snapshot::verify_all`] for the others.
    ///
    /// # Errors
    /// `Seal` with the file's name and the chunk that differs; `Io` when a file cannot be read.
    pub fn verify(&self) -> Result<(), Error> {
        for (name, digest) in self.manifest.digests() {
            let Some(digest) = digest else { continue };
            let found = compare(&self.file(name), digest).map_err(io_error("reading", &self.file(name)))?;
            if let Some(difference) = found.difference() {
                return Err(Error::Seal { snapshot: self.manifest.id.to_string(), file: name, difference });
            }
        }
        Ok(())
    }

    /// The digest of each of its files, where there is one by now.
    fn digests(&self) -> Result<Vec<(&'static str, Option<FileDigest>)>, Error> {
        let mut later = Digests::read(&self.directory.join(DIGESTS))?;
        let there = files(self.manifest.mode);
        let all = self.manifest.digests().into_iter().filter(|(name, _)| there.contains(name));
        Ok(all
            .map(|(name, first)| (name, first.cloned().or_else(|| later.part_mut(name).whole.take())))
            .collect())
    }

    /// Hashes every file and compares it with its digest and its seal. Reads everything; changes nothing.
    ///
    /// # Errors
    /// `Io` and `Manifest` when the digests cannot be read; what is wrong with a file is its verdict.
    pub fn verify_all(&self) -> Result<Vec<FileVerdict>, Error> {
        let judge = |(file, digest): (&'static str, Option<FileDigest>)| {
            let path = self.file(file);
            let compared = match &digest {
                Some(digest) => compare(&path, digest),
                None => Ok(Verdict::NotDigested),
            };
            let verdict = match compared.unwrap_or_else(|error| Verdict::Unreadable(error.to_string())) {
                verdict @ (Verdict::Intact | Verdict::NotDigested) => {
                    self.seal_difference(file).map_or(verdict, Verdict::Unsealed)
                }
                damaged => damaged,
            };
            let bytes = std::fs::metadata(&path).map_or(0, |found| found.len());
            FileVerdict { file, bytes, verdict }
        };
        Ok(self.digests()?.into_iter().map(judge).collect())
    }

    /// What leaves this node: every file has a digest, and is what it was when that was taken. An export begins here and
    /// takes nothing else. Digests what has no digest yet; reads everything.
    ///
    /// # Errors
    /// `Seal` with the first file that is not what it was; `Io`, `Manifest`.
    pub fn export(&self) -> Result<Verified, Error> {
        if let Some(mut digesting) = Digesting::of(self)? {
            while !digesting.step()? {}
        }
        for FileVerdict { file, verdict, .. } in self.verify_all()? {
            if let Some(difference) = verdict.difference() {
                return Err(Error::Seal { snapshot: self.manifest.id.to_string(), file, difference });
            }
        }
        let mut verified = Verified { files: Vec::new() };
        for (name, digest) in self.digests()? {
            let digest = digest.ok_or_else(|| Error::Missing { kind: "digest", name: name.to_owned() })?;
            verified.files.push((name, self.file(name), digest));
        }
        Ok(verified)
    }
}

/// A snapshot whose content was just compared with its digests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Name, path and digest of each file.
    pub files: Vec<(&'static str, PathBuf, FileDigest)>,
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileExt, PermissionsExt};

    use super::*;
    use crate::Store;
    use crate::hash::{CHUNK_BYTES, digest_file};
    use crate::snapshot::tests_support::publish_with;
    use crate::snapshot::{Durability, FILES};

    /// A kept snapshot whose memory has five chunks and a bit.
    fn kept() -> (tempfile::TempDir, Snapshot) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), true).unwrap();
        let snapshot = publish_with(&store, Durability::Durable, |name, path| {
            let file = fs::File::create(path).unwrap();
            file.write_all_at(name.as_bytes(), 0).unwrap();
            if name == "memory" {
                file.set_len(5 * CHUNK_BYTES + 100).unwrap();
                file.write_all_at(b"far", 3 * CHUNK_BYTES + 7).unwrap();
            }
        });
        (dir, snapshot)
    }

    fn verdicts(snapshot: &Snapshot) -> Vec<Verdict> {
        snapshot.verify_all().unwrap().into_iter().map(|file| file.verdict).collect()
    }

    fn finish(snapshot: &Snapshot) -> u32 {
        let mut digesting = Digesting::of(snapshot).unwrap().expect("something to do");
        let mut steps = 1;
        while !digesting.step().unwrap() {
            steps += 1;
        }
        steps
    }

    /// What a disk does: the content changes, and no time of the file.
    fn rot(snapshot: &mut Snapshot, name: &str, offset: u64) {
        let path = snapshot.file(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::File::options().write(true).open(&path).unwrap().write_all_at(b"!", offset).unwrap();
        snapshot.seal_anew();
    }

    #[test]
    fn what_is_kept_is_digested_later_and_a_chunk_that_rots_is_named() {
        let (_dir, mut snapshot) = kept();
        assert_eq!(verdicts(&snapshot), [Verdict::NotDigested, Verdict::NotDigested, Verdict::NotDigested]);
        assert_eq!(
            finish(&snapshot),
            5,
            "three chunks of memory that hold something, one of state, one of disk"
        );
        assert!(Digesting::of(&snapshot).unwrap().is_none(), "once");
        assert_eq!(verdicts(&snapshot), [Verdict::Intact, Verdict::Intact, Verdict::Intact]);
        for (name, digest) in snapshot.digests().unwrap() {
            assert_eq!(digest, Some(digest_file(&snapshot.file(name)).unwrap()), "{name}");
        }
        rot(&mut snapshot, "memory", 3 * CHUNK_BYTES + 8);
        rot(&mut snapshot, "memory", 5 * CHUNK_BYTES + 8);
        rot(&mut snapshot, "disk", 0);
        snapshot.check_seal().expect("the seal does not see it");
        let damaged =
            |chunks: &[u64]| Verdict::Damaged { chunks: chunks.to_vec(), count: chunks.len() as u64 };
        assert_eq!(verdicts(&snapshot), [damaged(&[3, 5]), Verdict::Intact, damaged(&[0])]);
        let error = snapshot.export().unwrap_err();
        assert!(matches!(&error, Error::Seal { file: "memory", .. }), "{error}");
        assert!(error.to_string().contains("chunk 3, 5"), "{error}");
    }

    #[test]
    fn digesting_goes_on_where_it_was_cut_short() {
        let (_dir, snapshot) = kept();
        let mut digesting = Digesting::of(&snapshot).unwrap().unwrap();
        for _ in 0..2 {
            assert!(!digesting.step().unwrap());
        }
        // What has noted nothing begins anew; what has goes on.
        assert!(!digesting.path.exists());
        write_json(&digesting.path, &digesting.known).unwrap();
        drop(digesting);
        assert_eq!(finish(&snapshot), 3);
        assert_eq!(verdicts(&snapshot), [Verdict::Intact, Verdict::Intact, Verdict::Intact]);
        assert_eq!(snapshot.export().unwrap().files.len(), FILES.len());
    }

    #[test]
    fn what_was_touched_gets_no_digest_and_is_not_exported() {
        let (_dir, snapshot) = kept();
        let mut digesting = Digesting::of(&snapshot).unwrap().unwrap();
        digesting.step().unwrap();
        let path = snapshot.file("memory");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let error = loop {
            match digesting.step() {
                Ok(is_over) => assert!(!is_over),
                Err(error) => break error,
            }
        };
        assert!(matches!(&error, Error::Seal { file: "memory", .. }), "{error}");
        assert!(matches!(Digesting::of(&snapshot).unwrap_err(), Error::Seal { .. }));
        assert!(matches!(snapshot.export().unwrap_err(), Error::Seal { .. }));
        assert!(matches!(&verdicts(&snapshot)[..], [Verdict::Unsealed(_), Verdict::NotDigested, _]));
        fs::remove_file(&path).unwrap();
        assert!(matches!(&verdicts(&snapshot)[..], [Verdict::Unsealed(_), ..]));
    }
}
