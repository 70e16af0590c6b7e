//! `cargo xtask bench`: the benches on a server of the working tree.

use crate::server::{self, own_data, root_client_of};
use crate::{Result, files as fs, layout, packages, run as run_command, say};

/// What builds are compared with.
const BESIDE: &[&str] = &["skopeo", "umoci"];

/// `cargo xtask bench ARGS`, `cargo xtask bench build ARGS`.
pub fn run(arguments: &[String]) -> Result<()> {
    match arguments.split_first() {
        Some((first, rest)) if first == "build" => build(rest),
        _ => create(arguments),
    }
}

fn create(arguments: &[String]) -> Result<()> {
    server::with_server(|built, server| {
        let mut command = root_client_of(&built.binary, server, &own_data());
        run_command(command.args(["bench", "create"]).args(arguments))
    })
}

/// The bench of builds. Builds fill caches that nothing clears for one project: the whole server is its own, and goes with it.
fn build(arguments: &[String]) -> Result<()> {
    let built = server::prepare()?;
    // Without them the bench says what it has not measured, and why.
    if let Err(error) = packages::ensure_all(BESIDE) {
        say(&format!("without {}: {error}", BESIDE.join(" and ")));
    }
    let base = layout::ensure(&built.guest.rootfs)?;
    server::with_server_once(&built, "bench-build", |server, data| {
        let mut command = root_client_of(&built.binary, server, data);
        command.args(["bench", "build", "--base"]).arg(&base);
        // On the file system that the node's own files are on.
        let scratch = data.join("bench");
        fs::create_dir_all(&scratch)?;
        run_command(command.arg("--directory").arg(scratch).args(arguments))
    })
}
