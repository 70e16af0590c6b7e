//! Dependencies between the crates point down only: an edge that is not in this table fails the build. So does
//! a circle of files inside a crate (`circles`), unless it was there before they were looked for, and a file that is long
//! without a reason (`lengths`).

use std::cmp::Ordering;
use std::collections::BTreeSet;

use crate::circles::{self, Circle};
use crate::{Result, files as fs, lengths, root, say};

/// Who may use whom. The picture is in ARCHITECTURE.md; tests may use more.
const ALLOWED: &[(&str, &[&str])] = &[
    ("api", &[]),
    ("host", &["api"]),
    ("store", &["host", "api"]),
    ("vmm", &["host", "api"]),
    ("agent", &["api"]),
    // Pure: it reads a Dockerfile and a directory.
    ("dockerfile", &["node-api", "api"]),
    ("egress", &["api"]),
    ("image", &["api"]),
    ("node-api", &["api"]),
    ("node", &["node-api", "egress", "image", "vmm", "store", "host", "api"]),
    // `host` for its one SQLite thread and its clock; never `node`.
    ("control", &["node-api", "host", "api"]),
    ("fuzz", &["api", "egress", "host", "node-api", "store", "vmm"]),
    ("gateway", &["node-api", "api"]),
    ("server", &["gateway", "control", "node", "api"]),
    // Of tests alone: nothing depends on it.
    ("harness", &["server", "control", "node", "node-api", "vmm", "store", "host", "api"]),
    ("client", &["api"]),
    // `host` and `image`: it measures slots, and pulls, as a node has them.
    ("bench", &["client", "image", "host", "api"]),
    // `host` for namespaces: the tests bring their own internet; `powercut` for a disk whose power fails.
    ("e2e", &["client", "host", "powercut", "api"]),
    (
        "cli",
        &[
            "server",
            "gateway",
            "control",
            "node",
            "egress",
            "client",
            "bench",
            "dockerfile",
            "vmm",
            "store",
            "host",
            "api",
        ],
    ),
    // A disk for tests.
    ("powercut", &[]),
    ("xtask", &[]),
];

/// Crates that have circles of files from before these were refused, and how many of their files are in one. Not more; who
/// takes one out takes it out here.
const CIRCLES_LEFT: &[(&str, usize)] = &[];

/// What is wrong with the `circles` of the crate `name`.
fn refused(name: &str, circles: &[Circle], left: &[(&str, usize)]) -> Vec<String> {
    let left = left.iter().find(|(known, _)| *known == name).map_or(0, |(_, files)| *files);
    let files: usize = circles.iter().map(|circle| circle.files).sum();
    match files.cmp(&left) {
        Ordering::Equal => Vec::new(),
        Ordering::Greater => circles.iter().map(|circle| circle.shown.clone()).collect(),
        Ordering::Less => {
            vec![format!(
                "{name} has {files} files in circles, {left} in the table of crates/xtask/src/deps.rs"
            )]
        }
    }
}

/// Names after `kelvin-` in the `[dependencies]` of a manifest.
fn edges(manifest: &str) -> BTreeSet<String> {
    let mut inside = false;
    let mut found = BTreeSet::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            inside = line == "[dependencies]";
        } else if inside && let Some(rest) = line.strip_prefix("kelvin-") {
            found.insert(rest.split(['.', ' ', '=']).next().unwrap_or_default().to_owned());
        }
    }
    found
}

/// Checks every crate.
pub fn check() -> Result<()> {
    let mut wrong = Vec::new();
    let (mut crates, mut left) = (0, 0);
    for path in fs::list(root().join("crates"))? {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        let manifest = fs::read_to_string(path.join("Cargo.toml"))?;
        let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| *known == name) else {
            wrong.push(format!("{name} is not in the table of crates/xtask/src/deps.rs"));
            continue;
        };
        crates += 1;
        let circles = circles::of_crate(&path)?;
        left += circles.len();
        wrong.extend(refused(name, &circles, CIRCLES_LEFT));
        // What is shipped would have a virtual host in it.
        if name != "harness"
            && manifest.lines().any(|line| line.starts_with("kelvin-") && line.contains("\"testing\""))
        {
            wrong.push(format!("{name} must not ask for the feature `testing`"));
        }
        for used in edges(&manifest) {
            if !allowed.contains(&used.as_str()) {
                wrong.push(format!("{name} must not depend on {used}"));
            }
        }
    }
    wrong.extend(lengths::check()?);
    if wrong.is_empty() {
        say(&format!(
            "{crates} crates, every dependency points down; {left} circles of files are left, and none is new"
        ));
        return Ok(());
    }
    Err(wrong.join("\n").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_dependencies_count() {
        let manifest = "[dependencies]\nkelvin-api.workspace = true\nserde = \"1\"\n\n[dev-dependencies]\nkelvin-store.workspace = true\n";
        assert_eq!(edges(manifest), BTreeSet::from(["api".to_owned()]));
    }

    #[test]
    fn circles_are_refused_unless_they_were_there() {
        let circle = || vec![Circle { files: 3, shown: "a -> b -> c -> a".to_owned() }];
        assert_eq!(refused("node", &circle(), &[]), ["a -> b -> c -> a"]);
        assert_eq!(refused("node", &circle(), &[("node", 2)]), ["a -> b -> c -> a"]);
        assert!(refused("node", &circle(), &[("node", 3)]).is_empty());
        // One that is gone does not come back unseen.
        assert_eq!(refused("node", &[], &[("node", 3)]).len(), 1);
    }
}
