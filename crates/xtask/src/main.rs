//! `cargo xtask`: everything a developer, a newcomer or CI types.
//!
//! Only the standard library: this is compiled before anything else. What it installs comes from the
//! package managers of the machine; what is expensive is cached under `.cache/`.

mod base;
mod bench;
mod busybox;
mod circles;
mod cores;
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
mod layout;
mod lengths;
mod mutate;
mod own_kernel;
mod package;
mod package_test;
mod packages;
mod preflight;
mod prototype;
mod roots;
mod sdk;
mod server;
mod stamps;
mod suite;
mod times;

use std::process::ExitCode;
use std::time::Instant;

// Every module has these from here.
use base::{
    Result, build_binary, cache, cargo, is_inside, is_prebuilt, outcome, output, quoted, root, run, say,
    shared, shown, spawn,
};

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
  bench build [ARGS...]
            run `kelvin bench build`: installs skopeo and umoci, makes the image that is built on, and removes the server and
            all of its data afterwards
  build     the binary, the guest's agent and the base image
  kernel    a kernel of our own for guests, of the distribution's sources; KELVIN_GUEST_KERNEL=own has
            every other command use it
  package   a Debian package: target/debian/kelvin_<version>_amd64.deb
  test-package
            install, upgrade, remove and purge it in booted machines with Debian 12 and 13
  deps      check the dependencies between the crates, and for circles of files inside them";

fn dispatch(arguments: &[String]) -> Result<ExitCode> {
    let rest = arguments.get(1..).unwrap_or_default();
    let command = arguments.first().map(String::as_str);
    preflight::check(command.unwrap_or_default())?;
    match command {
        Some("demo") => server::demo(),
        Some("test") => suite::run(rest),
        Some("up") => server::up(rest),
        Some("down") => server::down(),
        Some("bench") => bench::run(rest),
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
        Some("kernel") => own_kernel::command(),
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
