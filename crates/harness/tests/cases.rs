//! Thousands of cases: see the documentation of the crate.
//!
//! `KELVIN_SEED=N` runs the one case of a seed and prints its steps; `KELVIN_CASES=N` as many as that, from
//! `KELVIN_FIRST` on.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

use kelvin_harness::case::{Case, Scenario, Steps};
use kelvin_harness::course::{Report, run};
use kelvin_harness::known::KNOWN;
use kelvin_harness::world::{Broken, World};

/// Cases of a run of the suite.
const CASES: u64 = 20_000;
/// Violations of one rule and scenario that are printed.
const SHOWN: usize = 2;
/// Every so many cases one is run twice.
const TWICE: u64 = 100;

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Steps of each scenario when all goes well.
fn measure(world: &mut World) -> Result<Steps, Broken> {
    let mut steps = Steps::new();
    for scenario in Scenario::ALL {
        let report = run(world, Case::plain(scenario), false)?;
        if !report.violations.is_empty() {
            eprintln!("{scenario:?}, when nothing goes wrong: {:#?}", report.violations);
        }
        ready(world)?;
        steps.push(report.steps.max(1));
    }
    Ok(steps)
}

/// Brings the world back to the beginning of a case, in a new directory when the last one has left something.
fn ready(world: &mut World) -> Result<(), Broken> {
    if !world.reset()? {
        *world = World::make()?;
    }
    Ok(())
}

#[derive(Default)]
struct Tally {
    cases: u64,
    hits: u64,
    /// By number in [`KNOWN`].
    known: BTreeMap<usize, u64>,
    /// By rule and scenario.
    unknown: BTreeMap<(&'static str, String), (u64, Vec<String>)>,
    broken: Vec<String>,
    slowest: (f64, u64),
}

impl Tally {
    fn add(&mut self, case: &Case, report: &Report) {
        self.cases += 1;
        self.hits += u64::from(report.hit.is_some());
        let at = report.hit.as_ref().map_or_else(|| "nowhere".to_owned(), |hit| hit.place.to_string());
        for violation in &report.violations {
            if let Some(known) = KNOWN.iter().position(|known| (known.is)(case, violation)) {
                *self.known.entry(known).or_default() += 1;
                continue;
            }
            let key = (violation.rule, format!("{:?}", case.scenario));
            let (count, shown) = self.unknown.entry(key).or_default();
            *count += 1;
            if shown.len() < SHOWN {
                shown.push(format!(
                    "KELVIN_SEED={} ({:?} at {at}, beside {:?}, again {:?}): {}",
                    case.seed, case.plan.what, case.beside, case.again, violation.text
                ));
            }
        }
    }

    fn merge(&mut self, other: Self) {
        self.cases += other.cases;
        self.hits += other.hits;
        for (known, count) in other.known {
            *self.known.entry(known).or_default() += count;
        }
        for (key, (count, shown)) in other.unknown {
            let entry = self.unknown.entry(key).or_default();
            entry.0 += count;
            entry.1.extend(shown);
            entry.1.truncate(SHOWN);
        }
        self.broken.extend(other.broken);
        if other.slowest.0 > self.slowest.0 {
            self.slowest = other.slowest;
        }
    }
}

fn work(seeds: impl Iterator<Item = u64>, steps: &Steps) -> Result<Tally, Broken> {
    let mut world = World::make()?;
    let mut tally = Tally::default();
    for seed in seeds {
        ready(&mut world)?;
        let case = Case::of(seed, steps);
        let began = Instant::now();
        match run(&world, case, false) {
            Ok(report) => {
                tally.add(&case, &report);
                if seed % TWICE == 0 {
                    ready(&mut world)?;
                    let again = run(&world, case, false)?;
                    if again.trace != report.trace {
                        tally.broken.push(format!("KELVIN_SEED={seed} does not repeat"));
                    }
                }
            }
            Err(error) => tally.broken.push(format!("KELVIN_SEED={seed} {:?}: {error}", case.scenario)),
        }
        let took = began.elapsed().as_secs_f64();
        if took > tally.slowest.0 {
            tally.slowest = (took, seed);
        }
    }
    Ok(tally)
}

fn one(seed: u64) -> Result<bool, Broken> {
    let mut world = World::make()?;
    let steps = measure(&mut world)?;
    let case = Case::of(seed, &steps);
    println!("{case:#?}");
    let report = run(&world, case, true)?;
    for line in &report.log {
        println!("{line}");
    }
    println!("{:#?}", report.violations);
    Ok(report.violations.is_empty())
}

fn many() -> Result<bool, Broken> {
    let (first, cases) = (variable("KELVIN_FIRST").unwrap_or(0), variable("KELVIN_CASES").unwrap_or(CASES));
    let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let began = Instant::now();
    let steps = measure(&mut World::make()?)?;
    let steps = &steps;
    let mut tally = Tally::default();
    std::thread::scope(|scope| -> Result<(), Broken> {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let seeds = (first..first + cases).filter(move |seed| seed % threads == thread);
                scope.spawn(move || work(seeds, steps))
            })
            .collect();
        for worker in workers {
            tally.merge(worker.join().map_err(|_| "a thread panicked")??);
        }
        Ok(())
    })?;
    let took = began.elapsed().as_secs_f64();
    println!(
        "harness: {} cases (seeds {first} to {}), {} faults happened, {took:.1} s; slowest {:.0} ms (KELVIN_SEED={})",
        tally.cases,
        first + cases - 1,
        tally.hits,
        tally.slowest.0 * 1e3,
        tally.slowest.1
    );
    for (known, count) in &tally.known {
        println!("known fault {}: {}: {count} cases", KNOWN[*known].number, KNOWN[*known].what);
    }
    let mut good = true;
    for ((rule, scenario), (count, shown)) in &tally.unknown {
        good = false;
        println!("VIOLATION of {rule} in {scenario}: {count} cases");
        for line in shown {
            println!("    {line}");
        }
    }
    for line in tally.broken.iter().take(20) {
        good = false;
        println!("BROKEN {line}");
    }
    // Only a whole run says that one is gone.
    let stale = (0..KNOWN.len()).filter(|known| cases >= CASES && !tally.known.contains_key(known));
    for known in stale {
        good = false;
        println!(
            "known fault {} is mended: take it out of known.rs: {}",
            KNOWN[known].number, KNOWN[known].what
        );
    }
    Ok(good)
}

fn main() -> ExitCode {
    // As the test runner of Rust: what is not asked for is not run.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        println!("cases: test");
        return ExitCode::SUCCESS;
    }
    let outcome = match variable("KELVIN_SEED") {
        Some(seed) => one(seed),
        None => many(),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("harness: {error}");
            ExitCode::FAILURE
        }
    }
}
