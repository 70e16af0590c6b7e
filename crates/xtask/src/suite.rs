//! `cargo xtask test`: everything, in the order in which it is cheap to fail.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::base::{TOGETHER, cargo_test};
use crate::ground::{Ground, alone};
use crate::server::{self, Built};
use crate::times::{self, Times};
use crate::{Result, cache, cargo, deps, docs, files as fs, is_inside, run as run_command, say, shared};

/// The version of cargo-deny that the suite runs.
const DENY: &str = "0.20.2";

fn step(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let (started, before) = (Instant::now(), processors());
    say(&format!("== {name}"));
    work().map_err(|error| format!("{name}: {error}"))?;
    // What is not busy is time that another test could have.
    let busy = before.zip(processors()).map_or_else(String::new, |(before, now)| {
        let (busy, all) = (now.0.saturating_sub(before.0), now.1.saturating_sub(before.1));
        format!(", processors {} % busy", 100 * busy / all.max(1))
    });
    say(&format!("== {name}: ok, {:.1} s{busy}", started.elapsed().as_secs_f64()));
    Ok(())
}

/// Ticks in which this machine's processors worked, and all. Source: proc_stat(5).
fn processors() -> Option<(u64, u64)> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    let words = text.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
    // Up to `steal`; guests are in `user`.
    let ticks: Vec<u64> = words.take(8).map_while(|word| word.parse().ok()).collect();
    let idle = ticks.get(3)? + ticks.get(4)?;
    let all = ticks.iter().sum::<u64>();
    Some((all - idle, all))
}

fn cargo_step(arguments: &[&str]) -> Result<()> {
    run_command(cargo().args(arguments))
}

/// Licences and sources. The advisory database is on a host that this project does not reach: said, not
/// passed over.
fn deny() -> Result<()> {
    // By its version: another checkout may have another.
    let tools = shared().join(format!("tools/cargo-deny-{DENY}"));
    let binary = tools.join("bin/cargo-deny");
    if !binary.exists() {
        say("installing cargo-deny (once)");
        let mut install = cargo();
        install
            // It looks at a few hundred packages: to optimise it takes longer than to run it ever will.
            .args(["install", "cargo-deny", "--locked", "--debug", "--version", DENY, "--root"])
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            .arg(&tools);
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

/// What a Firecracker has to pass beside the conformance suite, by parts of the tests' names: lifecycle, pause and
/// resume, snapshots, fork, warm pool, network, crashes, input, and its own.
const FIRECRACKER: [&str; 23] = [
    "commands_run",
    "deadlines_end",
    "sandboxes_end",
    "bad_input",
    "fifty_pauses",
    "at_its_deadline",
    "what_cannot",
    "snapshots_have",
    "a_daemon_that_dies",
    "eight_children",
    "a_hundred_forks",
    "fifty_claims",
    "a_claim_is_exact",
    "demand_fills",
    "by_default_the_internet",
    "domains_hold",
    "limits_of_a_sandbox",
    "traffic_outlives",
    "a_slot_that_is_used_again",
    "sandboxes_outlive",
    "a_create_that_dies",
    "what_breaks_out",
    "firecracker",
];

/// Whether Firecracker can run here, or why it cannot.
fn firecracker() -> std::result::Result<(), &'static str> {
    if std::env::var_os("KELVIN_FIRECRACKER").is_none() {
        return Err("no firecracker: KELVIN_FIRECRACKER names none");
    }
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    if !flags.split_whitespace().any(|flag| flag == "svm" || flag == "vmx") {
        return Err(
            "no KVM for firecracker: `cargo xtask kvm-host -- cargo xtask test --driver firecracker` has it",
        );
    }
    Ok(())
}

/// `cargo xtask test --driver firecracker [NAME...]`.
fn run_firecracker(filter: &[String], times: &mut Times) -> Result<()> {
    if let Err(why) = firecracker() {
        println!("skipped: {why}");
        return Ok(());
    }
    let built = if is_inside() { server::built() } else { server::prepare()? };
    let all: Vec<String> = FIRECRACKER.iter().map(|name| (*name).to_owned()).collect();
    if filter.is_empty() {
        step("driver conformance", || run_tests("firecracker", &[ONE_AT_A_TIME], &[], times))?;
    }
    let filter = if filter.is_empty() { &all } else { filter };
    step("end to end", || end_to_end(&built, filter, "firecracker", times))
}

/// The tests of whole servers, in `crates/e2e`.
const END_TO_END: &str = "suite";
/// Those of the drivers, in `crates/vmm`.
const DRIVERS: [&str; 2] = ["firecracker", "qemu"];
/// What QEMU has to pass on KVM beside the conformance suite.
const QEMU_ON_KVM: [&str; 2] = ["qemu_runs_on_kvm", "what_breaks_out"];

/// `cargo xtask test --driver qemu [NAME...]` in the emulated KVM host: what the accelerator changes. Outside it is the usual
/// run.
fn run_qemu(filter: &[String], times: &mut Times) -> Result<()> {
    if !is_inside() {
        return run_here(filter, times);
    }
    let own = QEMU_ON_KVM.map(str::to_owned);
    if filter.is_empty() {
        step("driver conformance", || run_tests("qemu", &[ONE_AT_A_TIME], &[], times))?;
    }
    let filter = if filter.is_empty() { &own } else { filter };
    step("end to end", || end_to_end(&server::built(), filter, "qemu", times))
}

/// Where [`build`] leaves what it has built: a line for each program and its tests.
fn built_tests() -> PathBuf {
    cache().join("kvm-host/tests")
}

/// What the end-to-end tests need beside the server.
fn prepare_tests() -> Result<()> {
    // A client that is not ours, and what an image is made of.
    crate::packages::ensure_all(&["busybox-static", "curl"])?;
    crate::sdk::ensure()?;
    crate::guest::ensure_interpreter()?;
    Ok(())
}

/// Builds everything that tests run, for a machine on which that would take hours.
pub fn build() -> Result<()> {
    server::prepare()?;
    prepare_tests()?;
    crate::prototype::ensure()?;
    fs::create_dir_all(cache().join("kvm-host"))?;
    Ok(fs::write(built_tests(), programs(&[&[END_TO_END], &DRIVERS[..]].concat())?.join("\n"))?)
}

/// Builds the programs of tests called `targets`, and returns their paths.
fn programs(targets: &[&str]) -> Result<Vec<String>> {
    let mut command = cargo_test(&TOGETHER);
    command.args(["--no-run", "--message-format=json"]);
    command.args(targets.iter().flat_map(|target| ["--test", target]));
    let said = crate::output(&mut command)?;
    let tests = said.lines().filter(|line| line.contains("\"kind\":[\"test\"]"));
    // A field among what else cargo says of a program that it has built.
    let field = |line: &str| Some(line.split_once("\"executable\":\"")?.1.split('"').next()?.to_owned());
    Ok(tests.filter_map(field).collect())
}

/// Runs tests of the program `target`, as its `arguments` say. In the emulated KVM host cargo would look for minutes
/// whether anything has to be built.
fn run_tests(
    target: &str,
    arguments: &[&str],
    environment: &[(&str, &OsStr)],
    times: &mut Times,
) -> Result<()> {
    let mut tests = if is_inside() {
        let built = fs::read_to_string(built_tests())?;
        let is_it = |program: &&str| {
            let name = Path::new(program).file_name().unwrap_or_default().to_string_lossy();
            name.rsplit_once('-').is_some_and(|(name, _hash)| name == target)
        };
        Command::new(built.lines().find(is_it).ok_or_else(|| format!("{target} was not built"))?)
    } else {
        let mut tests = cargo_test(&TOGETHER);
        tests.args(["--test", target, "--"]);
        tests
    };
    tests.arg("--nocapture").args(arguments).envs(environment.iter().copied());
    let threads =
        arguments.iter().find_map(|argument| argument.strip_prefix("--test-threads=")?.parse().ok());
    times.run(&mut tests, threads.unwrap_or_else(times::threads))
}

/// One test after the other: whatever measures, measures nothing but itself.
const ONE_AT_A_TIME: &str = "--test-threads=1";
/// As many at once as there are processors that a test may need whole.
const TWO_AT_A_TIME: &str = "--test-threads=2";

/// End-to-end tests that run alone, by parts of their names: they measure, or take every processor for themselves
/// already. `crates/e2e/src/promises.rs` refuses to measure in a test that is not among them.
const ALONE: [&str; 13] = [
    // Speed, rates and delays.
    "clones_are_as_fast",
    "a_bursty_load",
    "limits_of_a_sandbox",
    "by_default_the_internet",
    "a_slot_that_is_used_again",
    "a_thousand_slots",
    "firecracker_runs_three",
    "silent_guests_delay",
    // As many machines at once as fit.
    "a_hundred_forks",
    "fifty_claims",
    "fifty_clients",
    "two_hundred_machines",
    "soak_leaves",
];

/// Runs what the end-to-end tests named by `filter` are, all of them when it is empty. The servers use `vmm`, whatever else
/// could be used here.
fn end_to_end(built: &Built, filter: &[String], vmm: &str, times: &mut Times) -> Result<()> {
    let before = times.begun;
    on_ground(built, vmm, &[], |environment| {
        let mut arguments = vec![ONE_AT_A_TIME];
        arguments.extend(filter.iter().map(String::as_str));
        run_tests(END_TO_END, &arguments, environment, times)
    })?;
    if times.begun == before { Err(format!("no test ran: {}", filter.join(", ")).into()) } else { Ok(()) }
}

/// Names of all end-to-end tests, from their sources: `e2e::MODULE::NAME`.
fn end_to_end_names() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for file in fs::list(crate::root().join("crates/e2e/tests/suite/e2e"))? {
        let text = fs::read_to_string(&file)?;
        let module = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        names.extend(docs::tests(&text).map(|name| format!("e2e::{module}::{name}")));
    }
    Ok(names)
}

/// Whether each word of `filter` is in the name of a test, before anything is built for none.
fn check_filter(filter: &[String]) -> Result<()> {
    let names = end_to_end_names()?;
    match filter.iter().find(|word| !names.iter().any(|name| name.contains(word.as_str()))) {
        None => Ok(()),
        Some(word) => Err(format!(
            "no end-to-end test has {word:?} in its name; {ALL_END_TO_END} are all of them, their names are in \
             crates/e2e/tests/suite/e2e"
        )
        .into()),
    }
}

/// All end-to-end tests on QEMU: those that measure alone, the others two at a time.
fn all_end_to_end(built: &Built, times: &mut Times) -> Result<()> {
    on_ground(built, "qemu", &[], |environment| {
        let beside: [(&str, &OsStr); 1] = [("KELVIN_E2E_BESIDE", OsStr::new("1"))];
        let beside = [environment, &beside].concat();
        let mut arguments = vec![TWO_AT_A_TIME];
        arguments.extend(ALONE.iter().flat_map(|name| ["--skip", name]));
        step("end to end, two at a time", || run_tests(END_TO_END, &arguments, &beside, times))?;
        let arguments: Vec<&str> = [ONE_AT_A_TIME].iter().chain(&ALONE).copied().collect();
        step("end to end, alone", || run_tests(END_TO_END, &arguments, environment, times))
    })
}

/// Runs `tests` with a ground of their own and the environment that names it, with `more` in it.
fn on_ground(
    built: &Built,
    vmm: &str,
    more: &[(&str, &OsStr)],
    tests: impl FnOnce(&[(&str, &OsStr)]) -> Result<()>,
) -> Result<()> {
    let _alone = alone()?;
    let ground = Ground::make(built)?;
    let sdks = crate::sdk::ensure()?;
    let (prototype, prototype_initrd) = (crate::prototype::program(), crate::prototype::initrd());
    let environment: [(&str, &OsStr); 11] = [
        ("KELVIN_VMM", OsStr::new(vmm)),
        ("KELVIN_E2E_BINARY", built.binary.as_os_str()),
        ("KELVIN_E2E_DIR", ground.directory.as_os_str()),
        ("KELVIN_E2E_PYTHON", sdks.python.as_os_str()),
        ("KELVIN_E2E_PYTHON_OLD", sdks.python_old.as_os_str()),
        ("KELVIN_E2E_AGENTS", sdks.agents.as_os_str()),
        ("KELVIN_E2E_CLI", sdks.cli.as_os_str()),
        ("KELVIN_E2E_NODE", sdks.node.as_os_str()),
        ("KELVIN_E2E_JAVASCRIPT", sdks.javascript.as_os_str()),
        ("KELVIN_E2E_PROTOTYPE", prototype.as_os_str()),
        ("KELVIN_E2E_PROTOTYPE_INITRD", prototype_initrd.as_os_str()),
    ];
    let failures = ground.directory.join("failures");
    let _ = fs::remove_file(&failures);
    let result = tests(&[&environment, more].concat()).map_err(|error| {
        // What failed is far up by now.
        format!("{error}\n{}", fs::read_to_string(&failures).unwrap_or_default()).into()
    });
    let cleared = ground.clear();
    result.and(cleared)
}

/// Name of the soak among the end-to-end tests.
const SOAK: &str = "soak_leaves_everything_as_it_was";

/// Minutes, and the seed when one is given.
fn soak_options(arguments: &[String]) -> Result<(u64, Option<u64>)> {
    let usage = "usage: cargo xtask soak --minutes N [--seed S]";
    let (mut minutes, mut seed) = (None, None);
    let mut rest = arguments.iter();
    while let Some(name) = rest.next() {
        let wanted = match name.as_str() {
            "--minutes" => &mut minutes,
            "--seed" => &mut seed,
            other => return Err(format!("unknown option {other:?}; {usage}").into()),
        };
        let value = rest.next().and_then(|text| text.parse::<u64>().ok());
        *wanted = Some(value.ok_or_else(|| format!("{name} takes a number; {usage}"))?);
    }
    match minutes {
        Some(0) => Err(format!("--minutes 0 shows nothing; {usage}").into()),
        Some(minutes) => Ok((minutes, seed)),
        None => Err(usage.into()),
    }
}

/// `cargo xtask soak --minutes N [--seed S]`: the suite's soak, longer and from another seed.
pub fn soak(arguments: &[String]) -> Result<()> {
    let (minutes, seed) = soak_options(arguments)?;
    // Printed by the soak, so that it can be run again.
    let otherwise = || std::time::UNIX_EPOCH.elapsed().map_or(1, |now| now.as_secs());
    let (seconds, seed) = ((minutes * 60).to_string(), seed.unwrap_or_else(otherwise).to_string());
    let built = server::prepare()?;
    prepare_tests()?;
    let more: [(&str, &OsStr); 2] =
        [("KELVIN_SOAK_SECONDS", OsStr::new(&seconds)), ("KELVIN_SOAK_SEED", OsStr::new(&seed))];
    step("soak", || {
        on_ground(&built, "qemu", &more, |environment| {
            run_tests(END_TO_END, &[ONE_AT_A_TIME, SOAK], environment, &mut Times::default())
        })
    })
}

/// `cargo xtask other-release`: what was built here, with the QEMU, kernel and user space of another release.
pub fn run_other_release() -> Result<()> {
    server::prepare()?;
    let programs = programs(&["qemu"])?;
    step("another release", || crate::roots::other_release(&programs))
}

/// Writes the OpenAPI document that is in the repository, from the routes.
pub fn write_openapi() -> Result<()> {
    let test = "openapi::tests::the_document_in_the_repository_is_the_one_that_is_served";
    run_command(cargo_test(&TOGETHER).args(["--lib", "--", "--exact", test]).env("KELVIN_WRITE_OPENAPI", "1"))
}

/// What names all end-to-end tests, as the whole suite runs them.
const ALL_END_TO_END: &str = "end-to-end";

/// Everything; with arguments only the end-to-end tests whose names contain one of them, or [`ALL_END_TO_END`].
pub fn run(filter: &[String]) -> Result<()> {
    let mut times = Times::default();
    let result = match filter {
        [option, driver, rest @ ..] if option == "--driver" => match driver.as_str() {
            "firecracker" => check_filter(rest).and_then(|()| run_firecracker(rest, &mut times)),
            "qemu" => run_qemu(rest, &mut times),
            other => Err(format!("unknown driver {other:?}: qemu or firecracker").into()),
        },
        filter => run_here(filter, &mut times),
    };
    // Of a run that failed, what was told until then.
    let kept = times.keep(filter.is_empty() && result.is_ok());
    result.and(kept)
}

fn run_here(filter: &[String], times: &mut Times) -> Result<()> {
    if filter == [ALL_END_TO_END] {
        return all_end_to_end(&server::prepare()?, times);
    }
    if !filter.is_empty() {
        check_filter(filter)?;
        let built = server::prepare()?;
        return step("end to end", || end_to_end(&built, filter, "qemu", times));
    }
    step("format", || cargo_step(&["fmt", "--all", "--check"]))?;
    step("dependencies", deps::check)?;
    step("documents", docs::check)?;
    crate::packages::ensure()?;
    beside(
        // Reads the tree, or installs itself; the compiler is busy with another.
        || step("licences", deny),
        || step("lints", lints),
    )?;
    let built = server::prepare()?;
    beside(
        // Downloads more than it computes.
        prepare_tests,
        || step("unit tests and driver conformance", || unit_tests(times)),
    )?;
    // Fuzzing takes its seconds whatever runs beside it; the other release's tests run one at a time.
    let programs = programs(&["qemu"])?;
    beside(
        || step("another release", || crate::roots::other_release(&programs)),
        || step("fuzz", || crate::fuzz::run(&[])),
    )?;
    all_end_to_end(&built, times)?;
    step("package", || crate::package_test::run(&[]))?;
    run_firecracker(&[], times)
}

/// Runs both and waits for both, also when one fails: its children would go on without this.
fn beside(other: impl FnOnce() -> Result<()> + Send, work: impl FnOnce() -> Result<()>) -> Result<()> {
    std::thread::scope(|scope| {
        let other = scope.spawn(|| other().map_err(|error| error.to_string()));
        let result = work();
        match (result, other.join()) {
            (Ok(()), Ok(other)) => Ok(other?),
            (Err(error), Ok(Err(other))) => Err(format!("{error}\n{other}").into()),
            (Err(error), _) => Err(error),
            (Ok(()), Err(_)) => Err("what ran beside it panicked".into()),
        }
    })
}

/// Of the profile that everything is built with: build scripts and macros of dependencies are compiled once.
fn lints() -> Result<()> {
    // Apart from the harness, which would have everything looked at with a virtual host in it.
    let lint = |which: &[&str]| {
        let arguments = [&["clippy", "--release", "--all-targets"], which, &["--", "-D", "warnings"]];
        cargo_step(&arguments.concat())
    };
    lint(&["--workspace", "--exclude", "kelvin-harness"])?;
    lint(&["--package", "kelvin-harness", "--package", "kelvin-node-api"])
}

fn unit_tests(times: &mut Times) -> Result<()> {
    let mut run = |selection: &[&str], arguments: &[&str]| {
        times.run(cargo_test(selection).args(arguments), times::threads())
    };
    // All programs at once, also those that the end-to-end tests are.
    run(&TOGETHER, &["--", "--skip", "e2e::"])?;
    run(&["--release", "--package", "kelvin-agent"], &[])?;
    // Says how many cases, of which seeds, and how long. With what it asks of the seam to the node: the wire.
    run(&["--release", "--package", "kelvin-harness", "--package", "kelvin-node-api"], &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_test_that_is_named_here_is_there() {
        let names = end_to_end_names().unwrap();
        assert!(names.len() > 50, "{names:?}");
        for part in ALONE.iter().chain(&FIRECRACKER).chain(&QEMU_ON_KVM).chain(&[SOAK]) {
            assert!(names.iter().any(|name| name.contains(part)), "no test has {part} in its name");
        }
    }

    #[test]
    fn every_crate_is_compiled_quickly_for_tests() {
        let text = fs::read_to_string(crate::root().join(crate::base::QUICKLY[1])).unwrap();
        for directory in fs::list(crate::root().join("crates")).unwrap() {
            let name = directory.file_name().unwrap().to_string_lossy().into_owned();
            assert!(
                text.contains(&format!("[profile.release.package.kelvin-{name}]\nopt-level = 0\n")),
                "{name} is missing there"
            );
        }
    }

    #[test]
    fn a_filter_that_matches_nothing_is_refused() {
        let filter = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            check_filter(&words).map_err(|error| error.to_string())
        };
        assert_eq!(filter(&[]), Ok(()));
        assert_eq!(filter(&["soak", "e2e::speed"]), Ok(()));
        assert!(filter(&["soak", "nonsense"]).is_err_and(|error| error.contains("\"nonsense\"")));
    }

    #[test]
    fn a_soak_is_told_how_long_and_from_where() {
        let options = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            soak_options(&words).map_err(|error| error.to_string())
        };
        assert_eq!(options(&["--minutes", "2"]), Ok((2, None)));
        assert_eq!(options(&["--seed", "7", "--minutes", "30"]), Ok((30, Some(7))));
        for wrong in [
            &[][..],
            &["--minutes"],
            &["--minutes", "x"],
            &["--minutes", "0"],
            &["--seed", "1"],
            &["--hours", "1"],
        ] {
            assert!(options(wrong).is_err_and(|error| error.contains("usage")), "{wrong:?}");
        }
    }
}
