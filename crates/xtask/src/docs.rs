//! Every path that a document names exists, and every test that SPEC.md names.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::{Result, files as fs, root, say};

/// Directories whose paths are looked for in the text.
const TOPS: [&str; 8] = ["crates/", "docs/", "proto/", "guest/", "packaging/", ".ci/", "openapi/", ".cargo/"];

fn documents() -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for name in ["README.md", "ARCHITECTURE.md", "SPEC.md", "CONTRIBUTING.md"] {
        found.push(root().join(name));
    }
    for directory in ["docs", "docs/decisions"] {
        found.extend(fs::list(root().join(directory))?);
    }
    found.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    Ok(found)
}

/// Targets of links, and words that begin like a path of this tree.
fn paths(text: &str) -> Vec<String> {
    let mut found: Vec<String> = text
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split([')', '#']).next())
        .filter(|target| !target.is_empty() && !target.contains("://"))
        .map(str::to_owned)
        .collect();
    found.extend(
        text.split(|c: char| c.is_whitespace() || "`()[],;\"'".contains(c))
            .map(|word| word.trim_end_matches(['.', ':']))
            .filter(|word| TOPS.iter().any(|top| word.starts_with(top)))
            .filter(|word| !word.contains(['*', '<', '{', '…']))
            .map(str::to_owned),
    );
    found
}

/// Names of the tests in the Rust source `text`.
pub fn tests(text: &str) -> impl Iterator<Item = &str> {
    let marks = ["#[test]", "#[tokio::test"].into_iter().flat_map(|mark| text.split(mark).skip(1));
    marks.filter_map(|rest| {
        let name = rest.split_once("fn ")?.1;
        name.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next()
    })
}

/// What the sources have: names of tests, and all words.
#[derive(Default)]
struct Sources {
    tests: BTreeSet<String>,
    words: BTreeSet<String>,
}

impl Sources {
    fn read(directory: &Path) -> Result<Self> {
        let mut found = Self::default();
        let mut directories = vec![directory.to_owned()];
        while let Some(directory) = directories.pop() {
            for path in fs::list(directory)? {
                let extension = path.extension().and_then(|extension| extension.to_str());
                if path.is_dir() {
                    directories.push(path);
                } else if let Some(extension @ ("rs" | "py")) = extension {
                    found.add(extension, &fs::read_to_string(&path)?);
                }
            }
        }
        Ok(found)
    }

    fn add(&mut self, extension: &str, text: &str) {
        if extension == "rs" {
            self.tests.extend(tests(text).map(str::to_owned));
            // The database's suite is a function for each promise, which a macro makes a test of each implementation.
            let promises = text.split("async fn ").skip(1).filter_map(|rest| rest.split_once("(subject: "));
            self.tests
                .extend(promises.map(|(name, _)| name).filter(|name| !name.contains('(')).map(str::to_owned));
        } else {
            let names = text.split("def test_").skip(1).filter_map(|rest| rest.split('(').next());
            self.tests.extend(names.map(|name| format!("test_{name}")));
        }
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        self.words.extend(words.filter(|word| word.contains('_')).map(str::to_owned));
    }

    /// What `spec` names and nobody has: in the last column of a table each name is a test's; elsewhere what is as long as
    /// one is at least something in the sources.
    fn missing(&self, spec: &str) -> Vec<String> {
        let mut missing = Vec::new();
        for line in spec.lines() {
            let shown = line.starts_with('|').then(|| line.trim_end_matches([' ', '|']));
            let shown =
                shown.and_then(|line| line.rsplit_once(" | ")).map_or(line.len(), |(before, _)| before.len());
            for (at, name) in names(line) {
                let is_known = if at > shown {
                    self.tests.contains(name)
                } else {
                    self.words.contains(name) || name.matches('_').count() < 3
                };
                if !is_known {
                    missing.push(name.to_owned());
                }
            }
        }
        missing
    }
}

/// Words like `this_one` in backticks, and where in `line` they are.
fn names(line: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut at = 0;
    line.split('`').enumerate().filter_map(move |(index, word)| {
        let from = at;
        at += word.len() + 1;
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        (index % 2 == 1 && word.contains('_') && word.bytes().all(plain)).then_some((from, word))
    })
}

/// Checks all documents.
pub fn check() -> Result<()> {
    let mut missing = Vec::new();
    let mut count = 0;
    for document in documents()? {
        let text = fs::read_to_string(&document)?;
        let directory = document.parent().unwrap_or(Path::new("."));
        for path in paths(&text) {
            count += 1;
            if !directory.join(&path).exists() && !root().join(&path).exists() {
                missing.push(format!("{} names {path}, which does not exist", document.display()));
            }
        }
    }
    let sources = Sources::read(&root().join("crates"))?;
    let spec = fs::read_to_string(root().join("SPEC.md"))?;
    let gone = sources.missing(&spec).into_iter();
    missing.extend(gone.map(|name| format!("SPEC.md names {name}, and no test has that name")));
    if missing.is_empty() {
        let tests = sources.tests.len();
        say(&format!("{count} paths in the documents exist, and the tests that SPEC.md names, of {tests}"));
        return Ok(());
    }
    Err(missing.join("\n").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_paths_are_found() {
        let text = "See [the spec](SPEC.md#x), `crates/node/src/start/create.rs`. Not [web](https://x) or crates/*/src.";
        assert_eq!(paths(text), ["SPEC.md", "crates/node/src/start/create.rs"]);
    }

    #[test]
    fn tests_that_a_document_names_are_there() {
        let mut sources = Sources::default();
        sources.add(
            "rs",
            "#[test]\nfn one_holds() {}\n#[tokio::test(flavor = \"x\")]\n#[ignore]\nasync fn two_hold() {}",
        );
        sources.add(
            "rs",
            "async fn four_is(a: u8) {}\npub(crate) async fn four_hold(subject: &impl Subject) {}",
        );
        sources.add("py", "def test_three():\n    a_code_of_errors");
        assert_eq!(
            sources.tests.iter().collect::<Vec<_>>(),
            ["four_hold", "one_holds", "test_three", "two_hold"]
        );
        let spec = "| a `no_test` is | `one_holds`, `two_hold`; unit tests in `a/b.rs` |\n| b | `test_three` |\n\
            A `a_code_of_errors`.";
        assert!(sources.missing(spec).is_empty());
        assert_eq!(sources.missing("| a | `one_held` |"), ["one_held"]);
        assert_eq!(sources.missing("`one_that_was_renamed` prints"), ["one_that_was_renamed"]);
    }
}
