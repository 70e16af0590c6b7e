//! Which files of a context a source means: a path, or a pattern of paths as Go's `filepath.Match` has them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::Fault;
use crate::paths::clean;
use crate::pattern;

/// The paths below `root`, which is canonical, that `source` means, relative to it and in the order of their names. That of a
/// source that is no pattern is there whether its file is or not.
///
/// # Errors
/// `Outside` of a source, or of a directory in which a pattern would look, that is not below `root`. `Pattern`. `TooLarge` of
/// more than `most` paths.
pub(crate) fn find(root: &Path, source: &str, most: u64) -> Result<Vec<PathBuf>, Fault> {
    let outside = || Fault::Outside { source_path: source.to_owned() };
    let cleaned = clean(source.trim_start_matches('/'));
    if cleaned == ".." || cleaned.starts_with("../") {
        return Err(outside());
    }
    if cleaned == "." {
        return Ok(vec![PathBuf::new()]);
    }
    let mut found = vec![PathBuf::new()];
    for component in cleaned.split('/') {
        if !pattern::is_pattern(component) {
            found.iter_mut().for_each(|path| path.push(component));
            continue;
        }
        let Some(tokens) = pattern::of_component(component) else {
            return Err(Fault::Pattern { pattern: source.to_owned() });
        };
        let mut next = Vec::new();
        for directory in &found {
            for name in names(root, directory, &outside)? {
                if pattern::matches(&tokens, &name.to_string_lossy()) {
                    next.push(directory.join(name));
                }
                if next.len() as u64 > most {
                    return Err(Fault::TooLarge { what: "a pattern in files", limit: most });
                }
            }
        }
        found = next;
    }
    Ok(found)
}

/// The names in a directory, in order; none where there is no directory.
fn names(root: &Path, directory: &Path, outside: &dyn Fn() -> Fault) -> Result<Vec<PathBuf>, Fault> {
    let path = root.join(directory);
    let real = match fs::canonicalize(&path) {
        Ok(real) => real,
        Err(error) if is_missing(&error) => return Ok(Vec::new()),
        Err(error) => return Err(Fault::io(path)(error)),
    };
    if !real.starts_with(root) {
        return Err(outside());
    }
    if !real.is_dir() {
        return Ok(Vec::new());
    }
    list(&real)
}

/// The names in a directory, in order.
pub(crate) fn list(directory: &Path) -> Result<Vec<PathBuf>, Fault> {
    let entries = fs::read_dir(directory).map_err(Fault::io(directory))?;
    let names: io::Result<Vec<PathBuf>> =
        entries.map(|entry| Ok(PathBuf::from(entry?.file_name()))).collect();
    let mut names = names.map_err(Fault::io(directory))?;
    names.sort();
    Ok(names)
}

/// Whether a path leads to nothing.
pub(crate) fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}
