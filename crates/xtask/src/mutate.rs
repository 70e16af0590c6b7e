//! `cargo xtask mutate`: whether the harness notices when something is left out.
//!
//! In a copy of this tree under `.cache/mutate`, one line after the other is taken out, each that something rests on,
//! and the harness has to fail; it has to pass when nothing is. Not part of the suite: it builds the server again for
//! each. A run that is killed leaves the copy, which the next one makes anew.

use std::path::{Path, PathBuf};

use crate::{Result, cache, cargo, files as fs, outcome, root, say};

/// Cases that are run with each.
const CASES: &str = "4000";

/// Something that is taken out.
struct Mutation {
    /// What is missing then.
    name: &'static str,
    /// In which file.
    file: &'static str,
    /// What stands there, once.
    from: &'static str,
    /// What stands there instead.
    to: &'static str,
}

const MUTATIONS: &[Mutation] = &[
    Mutation {
        name: "the release of what a failed create held",
        file: "crates/node/src/create.rs",
        from: "                self.capacity().release(amount);\n                Err(error)\n",
        to: "                Err(error)\n",
    },
    Mutation {
        name: "the ledger's row of a machine's directory",
        file: "crates/node/src/home.rs",
        from: "        resources.push(Resource::Directory { path: spec.absolute() });\n",
        to: "",
    },
    Mutation {
        name: "the row that says whose a snapshot is",
        file: "crates/control/src/database/catalog.rs",
        from: "VALUES (?1, ?2, ?3, ?4, ?5, ?6, 'taking')",
        to: "SELECT ?1, ?2, ?3, ?4, ?5, ?6, 'taking' WHERE 0",
    },
    Mutation {
        name: "the deadline of a guest's answer",
        file: "crates/vmm/src/control.rs",
        from: "match tokio::time::timeout(limit, self.answer(asked.0)).await {",
        to: "match Ok::<_, ()>(self.answer(asked.0).await) {",
    },
];

/// The copy: what is in the repository, and what was changed since.
fn copy(to: &Path) -> Result<()> {
    let _ = fs::remove_dir_all(to);
    let listed = crate::output(std::process::Command::new("git").current_dir(root()).args([
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
    ]))?;
    for name in listed.lines() {
        let (from, to) = (root().join(name), to.join(name));
        // Deleted, and not committed yet.
        if !from.is_file() {
            continue;
        }
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(&from, &to)?;
    }
    Ok(())
}

/// Whether the harness of the copy passes, and what it says.
fn passes(copy: &Path) -> Result<(bool, String)> {
    let mut build = cargo();
    // With what is built already: only the copy's own packages are built again.
    build.current_dir(copy).env("CARGO_TARGET_DIR", root().join("target"));
    build.args(["test", "--release", "--package", "kelvin-harness", "--test", "cases", "--no-run"]);
    let built = outcome(&mut build)?;
    if !built.status.success() {
        return Err(format!("the copy cannot be built:\n{}", String::from_utf8_lossy(&built.stderr)).into());
    }
    let mut run = cargo();
    run.current_dir(copy).env("CARGO_TARGET_DIR", root().join("target")).env("KELVIN_CASES", CASES);
    run.args(["test", "--release", "--package", "kelvin-harness", "--test", "cases"]);
    let run = outcome(&mut run)?;
    Ok((run.status.success(), String::from_utf8_lossy(&run.stdout).into_owned()))
}

/// `cargo xtask mutate`.
pub fn run() -> Result<()> {
    let tree: PathBuf = cache().join("mutate");
    copy(&tree)?;
    let (good, said) = passes(&tree)?;
    if !good {
        return Err(format!("the harness fails when nothing is taken out:\n{said}").into());
    }
    let mut unnoticed = Vec::new();
    for Mutation { name, file, from, to } in MUTATIONS {
        let path = tree.join(file);
        let whole = fs::read_to_string(&path)?;
        if whole.matches(from).count() != 1 {
            return Err(format!(
                "{file} does not have this once, crates/xtask/src/mutate.rs has to follow it:\n{from}"
            )
            .into());
        }
        fs::write(&path, whole.replacen(from, to, 1))?;
        let (good, said) = passes(&tree)?;
        fs::write(&path, &whole)?;
        if good {
            unnoticed.push(*name);
            continue;
        }
        let told = said.lines().filter(|line| line.starts_with("VIOLATION") || line.starts_with("BROKEN"));
        say(&format!("without {name}, the harness fails:"));
        for line in told.take(4) {
            say(&format!("    {line}"));
        }
    }
    fs::remove_dir_all(&tree)?;
    if unnoticed.is_empty() {
        Ok(())
    } else {
        Err(format!("not noticed: without {}", unnoticed.join("; ")).into())
    }
}
