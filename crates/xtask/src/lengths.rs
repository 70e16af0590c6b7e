//! A source file of more than [`MOST`] lines says near its top why it is long.

use std::path::Path;

use crate::{Result, files as fs, root};

/// Lines that a file may have without a reason.
const MOST: usize = 600;
/// Lines in which the reason stands, and what it begins with.
const TOP: usize = 30;
const REASON: &str = "Long because";

/// Files from before this was looked at. Not more; who splits one, or says why it is long, takes it out here.
const LEFT: &[&str] = &[];

/// What is wrong with the file at `path`, whose content is `text`.
fn refused(path: &str, text: &str, left: &[&str]) -> Option<String> {
    let lines = text.lines().count();
    let is_fine = lines <= MOST || text.lines().take(TOP).any(|line| line.contains(REASON));
    match (is_fine, left.contains(&path)) {
        (true, false) | (false, true) => None,
        (false, false) => Some(format!(
            "{path} has {lines} lines: split it, or say in its first {TOP} why not (\"{REASON} ...\")"
        )),
        (true, true) => Some(format!("{path} is fine: take it out of crates/xtask/src/lengths.rs")),
    }
}

fn look(directory: &Path, wrong: &mut Vec<String>) -> Result<()> {
    for path in fs::list(directory)? {
        if path.is_dir() {
            look(&path, wrong)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let shown = path.strip_prefix(root()).unwrap_or(&path).display().to_string();
            wrong.extend(refused(&shown, &fs::read_to_string(&path)?, LEFT));
        }
    }
    Ok(())
}

/// What is wrong with the files of all crates.
pub fn check() -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    look(&root().join("crates"), &mut wrong)?;
    let gone = LEFT.iter().filter(|path| !root().join(path).exists());
    wrong.extend(gone.map(|path| format!("{path} is gone: take it out of crates/xtask/src/lengths.rs")));
    Ok(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_file_says_why_at_its_top() {
        let long = "x\n".repeat(MOST + 1);
        assert!(refused("a.rs", &"x\n".repeat(MOST), &[]).is_none());
        assert!(refused("a.rs", &long, &[]).is_some_and(|text| text.contains("601 lines")));
        assert!(refused("a.rs", &format!("//! A table.\n//! {REASON} it is one.\n{long}"), &[]).is_none());
        assert!(refused("a.rs", &format!("{long}// {REASON} nobody reads on.\n"), &[]).is_some());
        // What was there is known, until it is short.
        assert!(refused("a.rs", &long, &["a.rs"]).is_none());
        assert!(refused("a.rs", "x\n", &["a.rs"]).is_some());
    }
}
