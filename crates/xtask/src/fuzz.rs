//! `cargo xtask fuzz`: every parser of bytes from somebody who may lie, with any bytes; `crates/fuzz` has the targets.
//!
//! What a run finds worth keeping lies under `.cache/fuzz/TARGET`, and the next one goes on from there; it begins with what is
//! in `crates/fuzz/seeds/TARGET`. An input that breaks something is kept as `.cache/fuzz/TARGET-crash-...`.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Result, cache, cargo, files as fs, root, say};

/// How long each target runs unless it is said, in seconds.
const SHORT_S: u64 = 10;
/// The longest input, in bytes: the largest message whose length is not bounded by its own field.
const MAX_LENGTH: u32 = 8192;
/// What libFuzzer is compiled for.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
const USAGE: &str = "usage: cargo xtask fuzz [--seconds N | --hours N] [--seed N] [TARGET...]

  --seconds N  each target runs so long [default: 10]
  --hours N    all of them together take so long, as many at one time as there are processors
  --seed N     begin like the run that printed it; with the same .cache/fuzz it tries the same inputs";

/// Coverage for libFuzzer, from a compiler that is not a nightly one. Source: what `cargo fuzz --sanitizer none` passes.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";

/// How long the targets run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Time {
    Seconds(u64),
    Hours(u64),
}

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    time: Time,
    seed: Option<u32>,
    targets: Vec<String>,
}

fn asked(arguments: &[String]) -> Result<Asked> {
    let mut asked = Asked { time: Time::Seconds(SHORT_S), seed: None, targets: Vec::new() };
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut number = || -> Result<u64> {
            let value = rest.next().and_then(|value| value.parse().ok()).filter(|value| *value > 0);
            value.ok_or_else(|| format!("{argument} needs a positive number\n{USAGE}").into())
        };
        match argument.as_str() {
            "--seconds" => asked.time = Time::Seconds(number()?),
            "--hours" => asked.time = Time::Hours(number()?),
            "--seed" => asked.seed = Some(u32::try_from(number()?)?),
            option if option.starts_with('-') => {
                return Err(format!("unknown option {option}\n{USAGE}").into());
            }
            target => asked.targets.push(target.to_owned()),
        }
    }
    Ok(asked)
}

/// The programs of a manifest, in its order.
fn programs(manifest: &str) -> Vec<String> {
    let mut lines = manifest.lines();
    let mut found = Vec::new();
    while let Some(line) = lines.next() {
        if line == "[[bin]]"
            && let Some(name) = lines.next().and_then(|line| line.strip_prefix("name = "))
        {
            found.push(name.trim_matches('"').to_owned());
        }
    }
    found
}

/// How long each of `targets` runs, `at_once` at one time, in seconds.
fn each(time: Time, targets: usize, at_once: usize) -> u64 {
    match time {
        Time::Seconds(seconds) => seconds,
        Time::Hours(hours) => {
            let rounds = targets.div_ceil(at_once.max(1)).max(1);
            (hours * 3600 / u64::try_from(rounds).unwrap_or(u64::MAX)).max(1)
        }
    }
}

fn build(directory: &Path) -> Result<()> {
    crate::run(
        cargo()
            .args(["build", "--package", "kelvin-fuzz", "--bins", "--target", TRIPLE])
            .env("RUSTFLAGS", COVERAGE)
            // With the checks of a debug build, and quick.
            .env("CARGO_PROFILE_DEV_OPT_LEVEL", "1")
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            .env("CARGO_TARGET_DIR", directory.join("target")),
    )
}

/// Runs one target; what it says of itself.
fn run_one(directory: &Path, name: &str, seconds: u64, seed: u32) -> Result<String> {
    let corpus = directory.join(name);
    fs::create_dir_all(&corpus)?;
    let program = directory.join("target").join(TRIPLE).join("debug").join(name);
    let mut fuzz = Command::new(&program);
    fuzz.current_dir(directory)
        .args([
            format!("-max_total_time={seconds}"),
            format!("-seed={seed}"),
            format!("-max_len={MAX_LENGTH}"),
        ])
        .args(["-rss_limit_mb=512", "-malloc_limit_mb=64", "-timeout=5"])
        .args(["-verbosity=0", "-print_final_stats=1", &format!("-artifact_prefix={name}-")])
        .arg(&corpus);
    let seeds = root().join("crates/fuzz/seeds").join(name);
    if seeds.is_dir() {
        fuzz.arg(seeds);
    }
    let run = crate::outcome(&mut fuzz)?;
    let said = String::from_utf8_lossy(&run.stderr);
    if !run.status.success() {
        let again = format!("{} {}/{name}-...", program.display(), directory.display());
        return Err(format!(
            "{name} found something with --seed {seed}; the input is in {}, once more: {again}\n{said}",
            directory.display()
        )
        .into());
    }
    let figure = |name: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix("stat::")?.strip_prefix(name));
        line.unwrap_or_default().trim_start_matches(':').trim().to_owned()
    };
    Ok(format!("{} inputs, {} MiB at the most", figure("number_of_executed_units"), figure("peak_rss_mb")))
}

/// `cargo xtask fuzz`.
pub fn run(arguments: &[String]) -> Result<()> {
    let asked = asked(arguments)?;
    let known = programs(&fs::read_to_string(root().join("crates/fuzz/Cargo.toml"))?);
    if let Some(other) = asked.targets.iter().find(|target| !known.contains(target)) {
        return Err(format!("there is no target {other:?}, but {}\n{USAGE}", known.join(", ")).into());
    }
    let targets = if asked.targets.is_empty() { known } else { asked.targets };
    let seed = match asked.seed {
        Some(seed) => seed,
        // Zero would be another one each time.
        None => SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos().max(1),
    };
    let directory: PathBuf = cache().join("fuzz");
    fs::create_dir_all(&directory)?;
    build(&directory)?;
    let at_once = std::thread::available_parallelism().map_or(1, usize::from);
    let seconds = each(asked.time, targets.len(), at_once);
    say(&format!("{} targets, {seconds} s each, {at_once} at one time, --seed {seed}", targets.len()));
    let waiting = Mutex::new(VecDeque::from(targets));
    let broken = Mutex::new(Vec::new());
    let work = || {
        while let Some(name) = waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front() {
            match run_one(&directory, &name, seconds, seed) {
                Ok(figures) => say(&format!("{name}: {figures}")),
                Err(error) => {
                    broken.lock().unwrap_or_else(PoisonError::into_inner).push(error.to_string());
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(work);
        }
    });
    let broken = broken.into_inner().unwrap_or_else(PoisonError::into_inner);
    if broken.is_empty() { Ok(()) } else { Err(broken.join("\n").into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn what_is_asked_for_is_understood_or_refused() {
        let wanted = Asked { time: Time::Hours(3), seed: Some(7), targets: words("qmp") };
        assert_eq!(asked(&words("--hours 3 qmp --seed 7")).unwrap(), wanted);
        assert_eq!(asked(&[]).unwrap().time, Time::Seconds(SHORT_S));
        for wrong in ["--hours", "--hours 0", "--seed x", "--minutes 3"] {
            assert!(asked(&words(wrong)).is_err(), "{wrong}");
        }
    }

    #[test]
    fn hours_are_shared_by_all() {
        assert_eq!(each(Time::Hours(1), 10, 2), 720);
        assert_eq!(each(Time::Hours(1), 1, 2), 3600);
        assert_eq!(each(Time::Seconds(10), 10, 2), 10);
    }

    #[test]
    fn every_target_is_found() {
        let here = root().join("crates/fuzz");
        let known = programs(&fs::read_to_string(here.join("Cargo.toml")).unwrap());
        let sources = fs::list(here.join("src")).unwrap();
        assert_eq!(known.len() + 1, sources.len(), "a program for each file but lib.rs: {known:?}");
        for seeds in fs::list(here.join("seeds")).unwrap() {
            let name = fs::name(&seeds).unwrap().to_owned();
            assert!(known.contains(&name), "{name} has seeds and is no target");
        }
    }
}
