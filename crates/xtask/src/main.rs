//! `cargo xtask`: everything a developer, a newcomer or CI types.
//!
//! Only the standard library: this is compiled before anything else. What it installs comes from the
//! package managers of the machine; what is expensive is cached under `.cache/`.

mod circles;
mod deps;
mod distribution;
mod docs;
mod emulator;
mod files;
mod former;
mod fuzz;
mod ground;
mod guest;
mod kernel;
mod kvm_host;
mod mutate;
mod package;
mod package_test;
mod packages;
mod preflight;
mod prototype;
mod roots;
mod sdk;
mod server;
mod suite;
mod times;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

/// Errors here end the run and are read by a person.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const USAGE: &str = "usage: cargo xtask <command>

  demo      install what is missing, build, bake, run code in a microVM, print the waterfall
  test      everything CI runs: format, lints, licences, unit and end-to-end tests
  test end-to-end | NAME...
            of these the end-to-end tests, all or those with a NAME in theirs
  up [code-interpreter]
            start a server in the background, with the templates: eval \"$(cargo xtask up)\"
  kvm-host -- CMD
            run a command in an emulated machine that has KVM: Firecracker works there
  other-release
            of the tests, those with Debian 13's QEMU, kernel and user space
  former-release [COMMIT...]
            sandboxes that builds of former commits have left, under this one; each is built once
  fuzz [--hours N] [--seed N] [TARGET...]
            the fuzz targets, for 10 s each
  mutate    whether the harness notices what is taken out of a copy: some minutes
  soak --minutes N [--seed S]
            clients, crashes and restarts at random against one server; afterwards all is as before
  openapi   write openapi/kelvin.json anew
  down      stop it and everything that it owns
  in-root [--fresh] RELEASE -- CMD
            run a command on a minimal Debian of that release (bookworm, trixie), with this tree and this toolchain
  bench     build and bake, then run `kelvin bench create` with the given arguments on a server of its own
  build     the binary, the guest's agent and the base image
  package   a Debian package: target/debian/kelvin_<version>_amd64.deb
  test-package
            install, upgrade, remove and purge it in booted machines with Debian 12 and 13
  deps      check the dependencies between the crates";

/// The top of the working tree.
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).unwrap_or(manifest).to_owned()
}

/// The git-ignored directory for whatever is expensive to make.
pub fn cache() -> PathBuf {
    root().join(".cache")
}

/// The directory for what is expensive to make and the same for every checkout of this user: everything in it has a key over
/// all that goes in, and is made again when it is missing.
pub fn shared() -> PathBuf {
    let named = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")));
    base.map_or_else(cache, |base| base.join("kelvin"))
}

/// Why `command` could not be started, with the program's name: "No such file or directory" alone names nothing.
fn not_started(command: &Command, error: &std::io::Error) -> String {
    let program = command.get_program().to_string_lossy();
    let directory =
        command.get_current_dir().map(|path| format!(" in {}", path.display())).unwrap_or_default();
    let missing = error.kind() == std::io::ErrorKind::NotFound;
    let hint = if missing { ": there is no such program, or no such directory to run it in" } else { "" };
    format!("cannot run {program}{hint} ({error}); the command was {}{directory}", shown(command))
}

/// The words of `command`, as a person would look for them; without its environment, which may hold a key.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| kvm_host::quoted_if_needed(&word.to_string_lossy())).collect::<Vec<_>>().join(" ")
}

/// Runs `command`, its output going where ours goes.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().map_err(|error| not_started(command, &error))?;
    if status.success() { Ok(()) } else { Err(format!("{}: {status}", shown(command)).into()) }
}

/// Starts `command`.
pub fn spawn(command: &mut Command) -> Result<std::process::Child> {
    Ok(command.spawn().map_err(|error| not_started(command, &error))?)
}

/// Runs `command` and returns what it printed and how it ended, whatever that is.
pub fn outcome(command: &mut Command) -> Result<std::process::Output> {
    Ok(command.output().map_err(|error| not_started(command, &error))?)
}

/// Runs `command` and returns what it printed; its errors go where ours go.
pub fn output(command: &mut Command) -> Result<String> {
    let output = outcome(command.stderr(std::process::Stdio::inherit()))?;
    if output.status.success() {
        Ok(String::from_utf8(output.stdout)?)
    } else {
        Err(format!("{}: {}", shown(command), output.status).into())
    }
}

/// Says what is going on, on standard error: `up` prints a script on standard output.
pub fn say(text: &str) {
    eprintln!("xtask: {text}");
}

/// Whether everything that is compiled is there already, made elsewhere: in the emulated KVM host and in roots of other
/// releases.
pub fn is_prebuilt() -> bool {
    kvm_host::is_inside() || std::env::var_os("KELVIN_PREBUILT").is_some()
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    // What cargo told this program of itself: build scripts (of `ring`) look at it, and all above them would be built
    // anew for each way in which cargo is called.
    for (name, _) in std::env::vars_os() {
        let told = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"];
        if name.to_str().is_some_and(|name| told.iter().any(|told| name.starts_with(told))) {
            command.env_remove(&name);
        }
    }
    command
}

/// Builds the `kelvin` binary and returns its path.
pub fn build_binary() -> Result<PathBuf> {
    say("building kelvin");
    let mut command = cargo();
    command.args(["build", "--release", "--package", "kelvin-cli"]);
    run(command.stdout(std::io::stderr()))?;
    Ok(root().join("target/release/kelvin"))
}

fn dispatch(arguments: &[String]) -> Result<ExitCode> {
    let rest = arguments.get(1..).unwrap_or_default();
    let command = arguments.first().map(String::as_str);
    preflight::check(command.unwrap_or_default())?;
    match command {
        Some("demo") => server::demo(),
        Some("test") => suite::run(rest),
        Some("up") => server::up(rest),
        Some("down") => server::down(),
        Some("bench") => server::bench(rest),
        Some("kvm-host") => {
            let command = rest.strip_prefix(&["--".to_owned()]).unwrap_or(rest);
            return kvm_host::run_in(command).map(ExitCode::from);
        }
        Some("in-root") => return roots::in_root(rest).map(ExitCode::from),
        Some("other-release") => suite::run_other_release(),
        // What `roots` runs in a root of another release, with what was built here.
        Some("guest") => guest::ensure().map(drop),
        Some("steps") => server::steps(),
        Some("former-release") => former::check(rest),
        Some("fuzz") => fuzz::run(rest),
        Some("mutate") => mutate::run(),
        Some("soak") => suite::soak(rest),
        Some("openapi") => suite::write_openapi(),
        Some("build") => server::prepare().map(drop),
        Some("package") => package::package().map(drop),
        Some("test-package") => package_test::run(rest),
        Some("deps") => deps::check(),
        _ => Err(USAGE.into()),
    }?;
    Ok(ExitCode::SUCCESS)
}

fn main() -> ExitCode {
    let started = Instant::now();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&arguments) {
        Ok(code) => {
            say(&format!("{} done in {:.1} s", arguments.join(" "), started.elapsed().as_secs_f64()));
            code
        }
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let mut command = Command::new("no-such-program-of-kelvin");
        command.arg("x");
        for error in [
            run(&mut command).unwrap_err(),
            outcome(&mut command).unwrap_err(),
            spawn(&mut command).map(drop).unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(
                text.contains("cannot run no-such-program-of-kelvin: there is no such program"),
                "{text}"
            );
        }
    }
}
