//! What every module here uses: where things are, how programs are run, what is said.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Errors here end the run and are read by a person.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

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
    words.map(|word| quoted_if_needed(&word.to_string_lossy())).collect::<Vec<_>>().join(" ")
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
    is_inside() || std::env::var_os("KELVIN_PREBUILT").is_some()
}

/// Cargo, in the tree.
pub fn cargo() -> Command {
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

/// What is compiled together, so that the server, its tests and what they measure are one build: cargo compiles a library anew,
/// and all above it, for each set of features that those who are built with it ask for. Without those that bring features of
/// their own: the agent, the harness with its virtual host and time, and the fuzz targets.
pub const TOGETHER: [&str; 8] = [
    "--release",
    "--workspace",
    "--exclude",
    "kelvin-fuzz",
    "--exclude",
    "kelvin-agent",
    "--exclude",
    "kelvin-harness",
];

/// How tests are compiled: what is ours without optimisation, since that takes a fifth of the time on two processors, and what is
/// not ours as it is in the program. What tests measure is the program, which is never built with this
/// (`docs/decisions/0043-tests-are-compiled-quickly.md`).
pub const QUICKLY: [&str; 2] = ["--config", ".cargo/tests.toml"];

/// `cargo test` of what `selection` is, as the suite compiles it.
pub fn cargo_test(selection: &[&str]) -> Command {
    let mut command = cargo();
    command.arg("test").args(QUICKLY).args(selection);
    command
}

/// Builds the `kelvin` binary and returns its path.
pub fn build_binary() -> Result<PathBuf> {
    say("building kelvin");
    let mut command = cargo();
    // With what only tests depend on only when there is one of them to build; an example is the smallest.
    command.arg("build").args(TOGETHER).args(["--bin", "kelvin", "--example", "run_command"]);
    run(command.stdout(std::io::stderr()))?;
    Ok(root().join("target/release/kelvin"))
}

/// `text` as one word of a shell's.
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The same, only where a shell would not take it as it is.
pub fn quoted_if_needed(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text.to_owned() } else { quoted(text) }
}

/// Whether this runs inside of the emulated KVM host (`kvm_host`).
pub fn is_inside() -> bool {
    std::env::var_os("KELVIN_KVM_HOST").is_some()
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
