//! Every path that a document names exists.

use std::path::{Path, PathBuf};

use crate::{Result, files as fs, root, say};

/// Directories whose paths are looked for in the text.
const TOPS: [&str; 8] = ["crates/", "docs/", "proto/", "guest/", "packaging/", ".ci/", "openapi/", ".cargo/"];

fn documents() -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for name in ["README.md", "ARCHITECTURE.md", "SPEC.md"] {
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
    if missing.is_empty() {
        say(&format!("{count} paths in the documents exist"));
        return Ok(());
    }
    Err(missing.join("\n").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_paths_are_found() {
        let text =
            "See [the spec](SPEC.md#x), `crates/node/src/create.rs`. Not [web](https://x) or crates/*/src.";
        assert_eq!(paths(text), ["SPEC.md", "crates/node/src/create.rs"]);
    }
}
