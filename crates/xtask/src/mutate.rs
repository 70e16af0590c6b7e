//! `cargo xtask mutate`: whether the harness notices when something is left out.
//!
//! In a copy of this tree under `.cache/mutate`, lines that something rests on are put behind a switch; the copy is built
//! once, and the harness has to pass as it is, and to fail with each of them switched off. Not part of the suite.
//!
//! The copy has a target directory of its own: for cargo it is the same workspace, and what is built of it would be taken
//! for this tree's. Both are removed at the end; a run that is killed leaves them to the next one.

use std::path::{Path, PathBuf};

use crate::{Result, cache, cargo, files as fs, outcome, root, say};

/// Cases that are run with each.
const CASES: &str = "600";
/// The variable that says which line is switched off.
const WITHOUT: &str = "KELVIN_WITHOUT";
/// What all lines that are switched can call; it is added to the copy.
const SWITCH: &str = r#"
/// Whether a line is switched off.
pub fn is_without(number: u32) -> bool {
    static WITHOUT: std::sync::OnceLock<Option<u32>> = std::sync::OnceLock::new();
    *WITHOUT.get_or_init(|| std::env::var("KELVIN_WITHOUT").ok()?.parse().ok()) == Some(number)
}
"#;

/// Something that is taken out.
struct Mutation {
    /// What is missing then.
    name: &'static str,
    /// In which file.
    file: &'static str,
    /// What stands there, once.
    from: &'static str,
    /// What stands there instead; `OFF` is whether it is switched off.
    to: &'static str,
}

const MUTATIONS: &[Mutation] = &[
    Mutation {
        name: "the release of capacity that was held",
        file: "crates/node/src/capacity.rs",
        from: "        self.capacity.books().release(self.amount);\n",
        to: "        if !OFF {\n            self.capacity.books().release(self.amount);\n        }\n",
    },
    Mutation {
        name: "the ledger's row of a machine's directory",
        file: "crates/node/src/machine/resources.rs",
        from: "        resources.push(Resource::Directory { path: spec.absolute() });\n",
        to: "        if !OFF {\n            resources.push(Resource::Directory { path: spec.absolute() });\n        }\n",
    },
    Mutation {
        name: "the row that says whose a snapshot is",
        file: "crates/control/src/database/sqlite/catalog.rs",
        from: "                    return Ok(Some(exceeded));\n                }\n",
        to: "                    return Ok(Some(exceeded));\n                }\n                if OFF {\n                    return Ok(None);\n                }\n",
    },
    Mutation {
        name: "the deadline of a guest's answer",
        file: "crates/vmm/src/control.rs",
        from: "        match tokio::time::timeout(limit, self.answer(asked.0)).await {",
        to: "        let waits = if OFF { Duration::from_secs(5_000) } else { limit };\n        match tokio::time::timeout(waits, self.answer(asked.0)).await {",
    },
    Mutation {
        name: "the entry of the audit log before a change",
        file: "crates/control/src/audit.rs",
        from: "        let id = database.note(self.entry.clone()).await.map_err(database_failed)?;\n        self.state().id = Some(id);\n",
        to: "        if !OFF {\n            let id = database.note(self.entry.clone()).await.map_err(database_failed)?;\n            self.state().id = Some(id);\n        }\n",
    },
];

/// The copy: what is in the repository, and what was changed since. Removed when it is dropped.
struct Tree(PathBuf);

impl Drop for Tree {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            say(&format!("{} is left: {error}", self.0.display()));
        }
    }
}

fn copy(to: &Path) -> Result<Tree> {
    // Of a run that was killed.
    let _ = fs::remove_dir_all(to);
    let tree = Tree(to.to_owned());
    fs::create_dir_all(to)?;
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
    Ok(tree)
}

/// Puts all mutations behind their switches.
fn mutate(tree: &Path) -> Result<()> {
    let library = tree.join("crates/host/src/lib.rs");
    let whole = fs::read_to_string(&library)?;
    fs::write(&library, whole + SWITCH)?;
    for (number, Mutation { file, from, to, .. }) in MUTATIONS.iter().enumerate() {
        let path = tree.join(file);
        let whole = fs::read_to_string(&path)?;
        if whole.matches(from).count() != 1 {
            let text = "does not have this once, crates/xtask/src/mutate.rs has to follow it";
            return Err(format!("{file} {text}:\n{from}").into());
        }
        let to = to.replace("OFF", &format!("kelvin_host::is_without({number})"));
        fs::write(&path, whole.replacen(from, &to, 1))?;
    }
    Ok(())
}

/// The harness of the copy, quick to build: nothing is kept of it.
fn harness(tree: &Path) -> std::process::Command {
    let mut command = cargo();
    command.current_dir(tree).env("CARGO_TARGET_DIR", tree.join("target"));
    command
        .env("CARGO_PROFILE_DEV_OPT_LEVEL", "0")
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .env("CARGO_INCREMENTAL", "0");
    command.env("KELVIN_CASES", CASES).env_remove(WITHOUT);
    command.args(["test", "--package", "kelvin-harness", "--test", "cases"]);
    command
}

/// `cargo xtask mutate`.
pub fn run() -> Result<()> {
    let tree = copy(&cache().join("mutate"))?;
    mutate(&tree.0)?;
    let built = outcome(harness(&tree.0).arg("--no-run"))?;
    if !built.status.success() {
        return Err(format!("the copy cannot be built:\n{}", String::from_utf8_lossy(&built.stderr)).into());
    }
    let whole = outcome(&mut harness(&tree.0))?;
    if !whole.status.success() {
        let said = String::from_utf8_lossy(&whole.stdout);
        return Err(format!("the harness fails when nothing is taken out:\n{said}").into());
    }
    let mut unnoticed = Vec::new();
    for (number, Mutation { name, .. }) in MUTATIONS.iter().enumerate() {
        let ended = outcome(harness(&tree.0).env(WITHOUT, number.to_string()))?;
        let said = String::from_utf8_lossy(&ended.stdout);
        let told: Vec<_> = said
            .lines()
            .filter(|line| line.starts_with("VIOLATION") || line.starts_with("BROKEN"))
            .take(4)
            .collect();
        // Only what it says counts: it may fail for want of memory, too.
        if ended.status.success() || told.is_empty() {
            unnoticed.push(*name);
            continue;
        }
        say(&format!("without {name}, the harness fails:"));
        for line in told {
            say(&format!("    {line}"));
        }
    }
    if unnoticed.is_empty() {
        Ok(())
    } else {
        Err(format!("not noticed: without {}", unnoticed.join("; ")).into())
    }
}
