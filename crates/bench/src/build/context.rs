//! What a cold build is made of: the Dockerfile of the figures and the packages that it installs, new in every round.
//!
//! Who writes: [`Context::make`], into a directory that goes with the run.

use std::fs;
use std::io;
use std::path::Path;

use super::fixtures::{self, Deb, Wheel, apt_repository, noise};

/// The Dockerfile, and what its template serves.
const DOCKERFILE: &str = include_str!("Dockerfile");
const SERVER: &str = include_str!("server.py");
/// Steps of it.
pub(super) const STEPS: usize = 20;
/// What its last step writes, as it is and as a change has it.
const FIRST: &str = "first";

/// Bytes of what the packages have, beside their programs.
const DEB_BYTES: usize = 32 << 20;
const WHEEL_BYTES: usize = 8 << 20;

fn file(path: &str, bytes: impl Into<Vec<u8>>, mode: u32) -> fixtures::Content {
    (path.to_owned(), bytes.into(), mode)
}

/// Makes the context in `directory`, which is empty. Another `seed`: another content of everything that is copied, so that no
/// upload and no layer of before is of use. Bytes of it.
pub(super) fn make(directory: &Path, seed: u64) -> Result<u64, fixtures::Error> {
    let failed = |error: io::Error| fixtures::Error::Io("context".to_owned(), error);
    let tool = [file("usr/bin/bench-tool", "#!/bin/sh\necho \"the step has written $1\"\n", 0o755)];
    let data = [
        file("usr/share/bench/data", noise(seed, DEB_BYTES), 0o644),
        file("usr/share/bench/round", seed.to_string(), 0o644),
    ];
    let postinst =
        Some("#!/bin/sh\nset -e\nsha256sum /usr/share/bench/data > /usr/share/bench/data.sha256\n");
    apt_repository(
        &directory.join("apt"),
        &[
            Deb { name: "bench-tool", depends: &["bench-data"], files: &tool, postinst: None },
            Deb { name: "bench-data", depends: &[], files: &data, postinst },
        ],
    )?;
    let wheels = directory.join("wheels");
    fs::create_dir_all(&wheels).map_err(failed)?;
    let words = [
        file(
            "bench_words/__init__.py",
            "from bench_text import TEXT\n\ndef greet():\n    return TEXT\n",
            0o644,
        ),
        file("bench_words/data", noise(seed ^ 0xffff, WHEEL_BYTES), 0o644),
    ];
    let text = [file("bench_text.py", format!("TEXT = 'hello of {seed}'\n"), 0o644)];
    Wheel { name: "bench_words", requires: &["bench_text"], files: &words }.make(&wheels)?;
    Wheel { name: "bench_text", requires: &[], files: &text }.make(&wheels)?;
    fs::write(directory.join("requirements.txt"), "bench_words\n").map_err(failed)?;
    fs::create_dir_all(directory.join("app")).map_err(failed)?;
    fs::write(directory.join("app/server.py"), SERVER).map_err(failed)?;
    fs::write(directory.join("Dockerfile"), DOCKERFILE).map_err(failed)?;
    Ok((DEB_BYTES + WHEEL_BYTES) as u64)
}

/// Changes the last line of the Dockerfile in `directory`, so that its step writes `word`.
pub(super) fn change_last_line(directory: &Path, word: &str) -> io::Result<()> {
    let (before, last) = DOCKERFILE.trim_end().rsplit_once('\n').unwrap_or_default();
    fs::write(directory.join("Dockerfile"), format!("{before}\n{}\n", last.replace(FIRST, word)))
}

/// What a machine of the template answers whose last step has written `word`.
pub(super) fn page(seed: u64, word: &str) -> String {
    format!("hello of {seed}, the step has written {word}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(text: &str) -> Vec<&str> {
        let kinds = ["RUN ", "COPY ", "ADD ", "ENV ", "WORKDIR ", "USER "];
        text.lines().filter(|line| kinds.iter().any(|kind| line.starts_with(kind))).collect()
    }

    #[test]
    fn the_last_line_of_twenty_is_the_one_that_changes() {
        assert_eq!(steps(DOCKERFILE).len(), STEPS);
        let directory = tempfile::tempdir().unwrap();
        change_last_line(directory.path(), "other").unwrap();
        let changed = fs::read_to_string(directory.path().join("Dockerfile")).unwrap();
        assert_eq!(changed.lines().count(), DOCKERFILE.lines().count());
        let differ: Vec<_> = changed.lines().zip(DOCKERFILE.lines()).filter(|(a, b)| a != b).collect();
        assert_eq!(differ, [("RUN bench-tool other > data/last", "RUN bench-tool first > data/last")]);
        assert_eq!(steps(&changed).last(), changed.lines().last().as_ref());
    }

    #[test]
    fn every_copy_of_the_dockerfile_has_its_files_and_they_are_new_each_time() {
        let directory = tempfile::tempdir().unwrap();
        let read = |seed: u64| {
            let place = directory.path().join(seed.to_string());
            fs::create_dir(&place).unwrap();
            match make(&place, seed) {
                Err(fixtures::Error::Io(_, error)) if error.kind() == io::ErrorKind::NotFound => return None,
                made => assert!(made.unwrap() > 0),
            }
            for line in steps(DOCKERFILE).iter().filter_map(|line| line.strip_prefix("COPY ")) {
                assert!(place.join(line.split(' ').next().unwrap()).exists(), "{line}");
            }
            Some(fs::read(place.join("apt/Packages")).unwrap())
        };
        let (Some(one), Some(two)) = (read(1), read(3)) else {
            println!("skipped: no dpkg-deb");
            return;
        };
        assert_ne!(one, two);
    }
}
