//! `cargo xtask test`: everything, in the order in which it is cheap to fail.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::server::{self, Built, kelvin};
use crate::{Result, cache, cargo, deps, docs, run as run_command, say};

/// The version of cargo-deny that the suite runs.
const DENY: &str = "0.20.2";

fn step(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let started = Instant::now();
    say(&format!("== {name}"));
    work().map_err(|error| format!("{name}: {error}"))?;
    say(&format!("== {name}: ok, {:.1} s", started.elapsed().as_secs_f64()));
    Ok(())
}

fn cargo_step(arguments: &[&str]) -> Result<()> {
    run_command(cargo().args(arguments))
}

/// Licences and sources. The advisory database is on a host that this project does not reach: said, not
/// passed over.
fn deny() -> Result<()> {
    let binary = cache().join("tools/bin/cargo-deny");
    if !binary.exists() {
        say("installing cargo-deny (once)");
        let mut install = cargo();
        install
            .args(["install", "cargo-deny", "--locked", "--version", DENY, "--root"])
            .arg(cache().join("tools"));
        run_command(&mut install)?;
    }
    println!("skipped: cargo deny advisories (the advisory database is in no package registry)");
    run_command(Command::new(binary).current_dir(crate::root()).args([
        "--offline",
        "check",
        "bans",
        "licenses",
        "sources",
    ]))
}

/// A file system that can clone files, with the guest on it, for the servers of the tests.
struct Ground {
    binary: PathBuf,
    directory: PathBuf,
}

impl Ground {
    fn make(built: &Built) -> Result<Self> {
        let directory = cache().join("e2e");
        let ground = Self { binary: built.binary.clone(), directory };
        run_command(
            kelvin(&ground.binary)
                .args(["setup", "--size-gib", "48", "--data-dir"])
                .arg(&ground.directory)
                .stdout(Stdio::null()),
        )?;
        // What a run that was killed has left.
        for left in leftovers(&ground.directory) {
            if let Some(pid) = left.strip_prefix("process ") {
                run_command(crate::packages::as_root("kill").args(["-9", pid]))?;
            }
        }
        for entry in fs::read_dir(&ground.directory)? {
            let path = entry?.path();
            if path.is_dir() {
                fs::remove_dir_all(&path)?;
            }
        }
        // Once onto the same file system: every server's import is a reflink then.
        let guest = ground.directory.join("guest");
        fs::create_dir_all(&guest)?;
        for (from, to) in [
            (&built.guest.kernel, "vmlinuz"),
            (&built.guest.initrd, "initrd"),
            (&built.guest.rootfs, "rootfs.ext4"),
            (&crate::guest::ensure_interpreter()?, "code-interpreter.ext4"),
        ] {
            run_command(
                Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(from).arg(guest.join(to)),
            )?;
        }
        Ok(ground)
    }

    fn clear(&self) -> Result<()> {
        let left = leftovers(&self.directory);
        run_command(
            kelvin(&self.binary)
                .args(["setup", "--unmount", "--data-dir"])
                .arg(&self.directory)
                .stdout(Stdio::null()),
        )?;
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("the tests have left behind: {}", left.join(", ")).into())
        }
    }
}

/// Processes that work in `directory`, and directories of servers.
fn leftovers(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_process = name.to_str().is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
        if is_process && fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(directory)) {
            found.push(format!("process {}", name.to_string_lossy()));
        }
    }
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.path().is_dir() && entry.file_name() != "guest" {
            found.push(entry.path().display().to_string());
        }
    }
    found
}

/// One run at a time: it counts what its servers leave behind, and measures. The kernel unlocks it when a run dies.
fn alone() -> Result<fs::File> {
    let lock = fs::File::create(cache().join("e2e.lock"))?;
    if let Err(error) = lock.try_lock() {
        let fs::TryLockError::WouldBlock = error else { return Err(error.into()) };
        say("waiting: another run of the tests is on its way in this tree");
        lock.lock()?;
    }
    Ok(lock)
}

fn end_to_end(built: &Built, filter: &[String]) -> Result<()> {
    let _alone = alone()?;
    let ground = Ground::make(built)?;
    let sdks = crate::sdk::ensure()?;
    let mut tests = cargo();
    tests
        .args(["test", "--release", "--package", "kelvin-e2e", "--no-fail-fast"])
        .arg("--")
        // Two processors: tests that measure would measure each other.
        .args(["--test-threads=1", "--nocapture"])
        .args(filter)
        .env("KELVIN_E2E_BINARY", &built.binary)
        .env("KELVIN_E2E_DIR", &ground.directory)
        .env("KELVIN_E2E_PYTHON", sdks.python)
        .env("KELVIN_E2E_PYTHON_OLD", sdks.python_old)
        .env("KELVIN_E2E_NODE", sdks.node)
        .env("KELVIN_E2E_JAVASCRIPT", sdks.javascript);
    let result = run_command(&mut tests);
    let cleared = ground.clear();
    result.and(cleared)
}

/// How long each fuzz target runs, in seconds; what it finds is kept, and the next run goes on from there.
const FUZZ_S: u32 = 10;

/// Coverage for libFuzzer, from a compiler that is not a nightly one. Source: what `cargo fuzz --sanitizer none` passes.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";

/// The parsers of bytes from the other side, with any bytes: no panic, bounded memory, no input that takes long.
pub fn fuzz() -> Result<()> {
    let target = "x86_64-unknown-linux-gnu";
    let directory = cache().join("fuzz");
    run_command(
        cargo()
            .args(["build", "--package", "kelvin-fuzz", "--target", target])
            .env("RUSTFLAGS", COVERAGE)
            // With the checks of a debug build, and quick.
            .env("CARGO_PROFILE_DEV_OPT_LEVEL", "1")
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            .env("CARGO_TARGET_DIR", directory.join("target")),
    )?;
    for name in ["agent_bytes", "host_bytes"] {
        let corpus = directory.join(name);
        fs::create_dir_all(&corpus)?;
        let run = Command::new(directory.join("target").join(target).join("debug").join(name))
            .current_dir(&directory)
            .arg(format!("-max_total_time={FUZZ_S}"))
            .args(["-rss_limit_mb=512", "-malloc_limit_mb=64", "-timeout=5", "-max_len=8192"])
            .args(["-verbosity=0", "-print_final_stats=1"])
            .arg(&corpus)
            .output()?;
        let said = String::from_utf8_lossy(&run.stderr);
        if !run.status.success() {
            return Err(format!("{name} found something, it is in {}:\n{said}", directory.display()).into());
        }
        for line in said.lines().filter(|line| line.contains("executed_units") || line.contains("peak_rss")) {
            say(&format!("{name}: {line}"));
        }
    }
    Ok(())
}

/// Writes the OpenAPI document that is in the repository, from the routes.
pub fn write_openapi() -> Result<()> {
    let test = "openapi::tests::the_document_in_the_repository_is_the_one_that_is_served";
    run_command(
        cargo()
            .args(["test", "--release", "--package", "kelvin-control", "--", "--exact", test])
            .env("KELVIN_WRITE_OPENAPI", "1"),
    )
}

/// Everything; with arguments only the end-to-end tests whose names contain one of them.
pub fn run(filter: &[String]) -> Result<()> {
    if !filter.is_empty() {
        let built = server::prepare()?;
        return step("end to end", || end_to_end(&built, filter));
    }
    step("format", || cargo_step(&["fmt", "--all", "--check"]))?;
    step("dependencies", deps::check)?;
    step("documents", docs::check)?;
    crate::packages::ensure()?;
    step("lints", || cargo_step(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    step("licences", deny)?;
    let built = server::prepare()?;
    step("unit tests and driver conformance", || {
        cargo_step(&[
            "test",
            "--release",
            "--workspace",
            "--exclude",
            "kelvin-e2e",
            "--exclude",
            "kelvin-fuzz",
        ])
    })?;
    step("fuzz", fuzz)?;
    step("end to end", || end_to_end(&built, &[]))
}
