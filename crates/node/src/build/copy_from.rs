//! COPY from a stage: its disk runs in a machine of its own, whose guest packs the files, and another guest unpacks them.
//!
//! ```text
//! guest of the stage: tar ──stdout──> a bounded queue ──body──> POST /unpack: guest of the step
//! ```
//!
//! Nothing of it is on the host's disk. Both guests are hostile: what is in the archive is the unpacking guest's to judge. What
//! fails says on which side. Dropped in the middle, both machines can only be ended.

use std::convert::Infallible;

use bytes::Bytes;
use futures::StreamExt as _;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use kelvin_api::error::Failure;
use kelvin_api::sandbox::EnvVars;
use tokio::sync::mpsc;

use crate::error::Error;
use crate::machine::agent::Body;
use crate::machine::processes::{Command, Failed, Processes, Told, keep_last};

/// Portions between the guests: each is what a process has written at once.
const QUEUE: usize = 4;
/// What is told of an archive that cannot be made, in bytes.
const SAID: usize = 2 << 10;
/// Packs `$2`, `$3` when that is a directory or leads to one, below `$1`. The agent has brought a busybox where there is no shell.
/// A link is followed when it is what is asked for, and no other one.
const PACK: &str = r#"d=$1 n=$2 m=$3
shift 3
b=/usr/local/lib/kelvin/busybox
[ -x "$b" ] || b=
cd "$d" || exit 1
[ -d "./$n" ] && exec $b tar -cf - "$@" "$m"
exec $b tar -chf - "./$n""#;
/// What of a machine is no file of its disk.
const NOT_ON_DISK: [&str; 4] = ["--exclude=./proc", "--exclude=./sys", "--exclude=./dev", "--exclude=./run"];

/// What is copied, of a stage's disk.
#[derive(Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The directory that is packed from, absolute.
    directory: String,
    /// What of it is packed: a name, or `.` for all.
    name: String,
    /// What of the archive is copied.
    pub from: String,
}

impl Wanted {
    /// Of a path from the root of the disk, or of a pattern.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn of(path: &str) -> Result<Self, String> {
        if path.is_empty() {
            return Err("the source is empty".to_owned());
        }
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
        if parts.contains(&"..") {
            return Err(format!("the source {path:?} has '..' in it"));
        }
        let is_pattern = |part: &&str| part.contains(['*', '?', '[', '{', '\\']);
        let above = |count: usize| format!("/{}", parts[..count].join("/"));
        let dot = || ".".to_owned();
        Ok(match (parts.iter().position(is_pattern), parts.split_last()) {
            (Some(at), _) => Self { directory: above(at), name: dot(), from: parts[at..].join("/") },
            (None, None) => Self { directory: above(0), name: dot(), from: dot() },
            (None, Some((name, above_it))) => {
                let name = (*name).to_owned();
                Self { directory: above(above_it.len()), from: name.clone(), name }
            }
        })
    }

    /// What packs it, to its standard output.
    fn argv(&self) -> Vec<String> {
        let members = if self.name == "." { ".".to_owned() } else { format!("./{}/.", self.name) };
        let words = ["/bin/sh", "-c", PACK, "sh", &self.directory, &self.name, &members];
        let is_root = self.directory == "/" && self.name == ".";
        let left_out = NOT_ON_DISK.iter().filter(|_| is_root);
        words.iter().chain(left_out).map(ToString::to_string).collect()
    }
}

/// Says of a failure that it is of the machine of stage `stage`.
pub fn of_stage(stage: usize, error: Error) -> Error {
    let failure = Failure::from(error);
    let message = format!("reading stage {stage}: {}", failure.message);
    Error::Build(Box::new(Failure { message, ..failure }))
}

/// An archive on its way out of a guest.
pub struct Packing<'a> {
    source: &'a Processes,
    argv: Vec<String>,
    sender: mpsc::Sender<Bytes>,
}

/// An archive of what is `wanted` from the guest of `source`, and what has to run for it to come.
pub fn pack<'a>(source: &'a Processes, wanted: &Wanted) -> (Packing<'a>, Body) {
    let (sender, portions) = mpsc::channel::<Bytes>(QUEUE);
    // An empty portion is its end: without that it is not whole.
    let whole = futures::stream::try_unfold(portions, |mut portions| async move {
        match portions.recv().await {
            None => Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof)),
            Some(portion) if portion.is_empty() => Ok(None),
            Some(portion) => Ok(Some((Frame::data(portion), portions))),
        }
    });
    let packing = Packing { source, argv: wanted.argv(), sender };
    (packing, StreamBody::new(whole.boxed()).boxed_unsync())
}

/// Why an archive is not whole.
pub enum NotPacked {
    /// It cannot be made; what was said of that.
    Refused(String),
    /// The machine, or its agent.
    Broken(Error),
}

impl Packing<'_> {
    /// Packs, and then waits for ever: who unpacks says when all is done.
    pub async fn run(self) -> Result<Infallible, NotPacked> {
        let env = EnvVars::new();
        let command =
            Command { text: "", argv: Some(&self.argv), user: Some("root"), cwd: Some("/"), env: &env };
        let failed = |failed| match failed {
            Failed::Refused(why) => NotPacked::Refused(why),
            Failed::Broken(error) => NotPacked::Broken(error),
        };
        let (mut process, mut said) = (self.source.start(&command).await.map_err(failed)?, Vec::new());
        loop {
            let portion = match process.next().await.map_err(failed)? {
                Told::Output(bytes) if bytes.is_empty() => continue,
                Told::Output(bytes) => Bytes::from(bytes),
                Told::Errors(bytes) => {
                    keep_last(&mut said, &bytes, SAID);
                    continue;
                }
                Told::Ended(exit) if exit.is_good() => Bytes::new(),
                Told::Ended(exit) => {
                    let said = String::from_utf8_lossy(&said);
                    let said = crate::machine::text::plain(said.trim().replace('\n', " ").as_bytes());
                    return Err(NotPacked::Refused(format!("{exit}: {said}")));
                }
            };
            let is_last = portion.is_empty();
            if self.sender.send(portion).await.is_err() || is_last {
                // Nobody reads any more, or it is whole.
                return std::future::pending().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command as Process;

    use super::*;

    fn of(path: &str) -> (String, String, String) {
        let Wanted { directory, name, from } = Wanted::of(path).unwrap();
        (directory, name, from)
    }

    #[test]
    fn a_path_of_a_stage_is_packed_from_what_is_above_it() {
        for (path, directory, name, from) in [
            ("/out/app", "/out", "app", "app"),
            ("out//./app/", "/out", "app", "app"),
            ("/app", "/", "app", "app"),
            ("/", "/", ".", "."),
            (".", "/", ".", "."),
            ("/out/*.so", "/out", ".", "*.so"),
            ("/a/b?/c", "/a", ".", "b?/c"),
            ("*", "/", ".", "*"),
        ] {
            assert_eq!(of(path), (directory.to_owned(), name.to_owned(), from.to_owned()), "{path}");
        }
        for path in ["", "..", "/a/../b"] {
            Wanted::of(path).unwrap_err();
        }
        assert!(Wanted::of("/").unwrap().argv().contains(&"--exclude=./proc".to_owned()));
        assert!(!Wanted::of("/a").unwrap().argv().iter().any(|word| word.contains("exclude")));
    }

    /// The names of an archive of `name` in `directory`, made as a guest makes it.
    fn packed(directory: &std::path::Path, name: &str) -> Option<Vec<String>> {
        let wanted = Wanted {
            directory: directory.to_str().unwrap().to_owned(),
            name: name.to_owned(),
            from: String::new(),
        };
        let argv = wanted.argv();
        let output = Process::new(&argv[0]).args(&argv[1..]).output().unwrap();
        if !output.status.success() {
            return None;
        }
        let archive = directory.with_extension("tar");
        std::fs::write(&archive, &output.stdout).unwrap();
        let listed = Process::new("tar").arg("-tvf").arg(&archive).output().unwrap();
        let text = String::from_utf8(listed.stdout).unwrap();
        let name = |line: &str| line.split_whitespace().skip(5).collect::<Vec<_>>().join(" ");
        let mut names: Vec<String> = text.lines().map(name).collect();
        names.sort();
        Some(names)
    }

    #[test]
    fn links_are_followed_where_they_are_what_is_asked_for() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().join("root");
        std::fs::create_dir_all(root.join("dir/below")).unwrap();
        std::fs::write(root.join("-file"), "x").unwrap();
        for (to, link) in
            [("dir", "to-dir"), ("-file", "to-file"), ("../-file", "dir/inside"), ("no", "broken")]
        {
            std::os::unix::fs::symlink(to, root.join(link)).unwrap();
        }
        let inside = ["below/", "inside -> ../-file"];
        for name in ["dir", "to-dir"] {
            let names = packed(&root, name).unwrap();
            let of = |part: &str| names.iter().any(|found| *found == format!("./{name}/./{part}"));
            assert!(inside.iter().all(|part| of(part)) && names.len() == 3, "{names:?}");
        }
        assert_eq!(packed(&root, "-file").unwrap(), ["./-file"]);
        assert_eq!(packed(&root, "to-file").unwrap(), ["./to-file"]);
        assert_eq!(packed(&root, ".").unwrap().len(), 8);
        assert_eq!([packed(&root, "absent"), packed(&root, "broken")], [None, None]);
    }
}
