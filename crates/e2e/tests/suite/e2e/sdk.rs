//! The official SDKs, unmodified, against a server of ours: two environment variables and a key.

use std::path::{Path, PathBuf};
use std::process::Command;

use kelvin_e2e::{Ground, Server, world};

/// Runs a program of an SDK's tests; what it prints is shown.
pub(super) fn passes(server: &Server, program: &mut Command) {
    let status = program
        .env("E2B_API_URL", server.url())
        .env("E2B_SANDBOX_URL", server.url())
        .env("E2B_API_KEY", server.key())
        .env_remove("E2B_DOMAIN")
        .env_remove("E2B_DEBUG")
        .status()
        .expect("it starts");
    // Not the whole command: it has the key.
    assert!(status.success(), "{:?}: {status}", program.get_program());
}

/// The table of what is compatible: what the run wrote is what the documents have.
fn table_is_kept(written: &Path, name: &str) {
    let kept = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(name);
    let (now, before) = (std::fs::read_to_string(written).expect("a table"), std::fs::read_to_string(&kept));
    assert!(
        before.is_ok_and(|before| before == now),
        "docs/{name} is out of date: copy {}",
        written.display()
    );
}

/// A program that the suite installed, or a line that says that it is not there.
pub(super) fn tool(variable: &str) -> Option<PathBuf> {
    let found = std::env::var_os(variable).map(PathBuf::from);
    if found.is_none() {
        println!("skipped: no {variable}, `cargo xtask test` installs the SDKs");
    }
    found
}

fn scripts(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("sdk").join(name)
}

pub(super) fn pytest(python: &PathBuf, files: &[&str]) -> Command {
    let mut command = Command::new(python);
    command.args(["-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=short"]);
    command.args(files.iter().map(|file| scripts("python").join(file))).env("PYTHONDONTWRITEBYTECODE", "1");
    command
}

async fn baked(ground: &Ground, name: &str) -> Server {
    ground.baked(name, &[], 2).await
}

#[tokio::test]
async fn the_newest_python_sdk_works_unmodified() {
    let Some(ground) = Ground::with_networks().await else { return };
    let Some(python) = tool("KELVIN_E2E_PYTHON") else { return };
    let server = baked(&ground, "sdk-python").await;
    let table = ground.guest("e2b-python.md");
    let mut tests = pytest(&python, &["test_sync.py", "test_async.py"]);
    passes(&server, tests.env("KELVIN_E2E_TABLE", &table));
    table_is_kept(&table, "e2b-python.md");
    server.stop().await;
}

#[tokio::test]
async fn an_older_python_sdk_works_unmodified() {
    let Some(ground) = Ground::with_networks().await else { return };
    let Some(python) = tool("KELVIN_E2E_PYTHON_OLD") else { return };
    let server = baked(&ground, "sdk-python-old").await;
    let table = ground.guest("e2b-python-2.45.md");
    let mut tests = pytest(&python, &["test_sync.py", "test_async.py"]);
    passes(&server, tests.env("KELVIN_E2E_TABLE", &table));
    table_is_kept(&table, "e2b-python-2.45.md");
    server.stop().await;
}

#[tokio::test]
async fn the_javascript_sdk_works_unmodified() {
    let Some(ground) = Ground::with_networks().await else { return };
    let (Some(node), Some(modules)) = (tool("KELVIN_E2E_NODE"), tool("KELVIN_E2E_JAVASCRIPT")) else {
        return;
    };
    let server = baked(&ground, "sdk-js").await;
    // Modules are looked for beside the file that imports them.
    let script = modules.join("sdk.test.mjs");
    std::fs::copy(scripts("js").join("sdk.test.mjs"), &script).expect("a copy");
    passes(&server, Command::new(node).arg("--test").arg(script));
    server.stop().await;
}

#[tokio::test]
async fn the_command_line_client_works_unmodified() {
    let Some(ground) = Ground::with_networks().await else { return };
    let (Some(python), Some(_), Some(_)) =
        (tool("KELVIN_E2E_PYTHON"), tool("KELVIN_E2E_NODE"), tool("KELVIN_E2E_CLI"))
    else {
        return;
    };
    let server = baked(&ground, "sdk-cli").await;
    passes(&server, &mut pytest(&python, &["test_cli.py"]));
    server.stop().await;
}

#[tokio::test]
async fn the_python_sdk_finds_everything_by_name_and_over_tls() {
    let Some(ground) = Ground::with_networks().await else { return };
    let Some(python) = tool("KELVIN_E2E_PYTHON") else { return };
    if !rustix::process::geteuid().is_root() {
        println!("skipped: not root, a resolver of its own needs a mount namespace");
        return;
    }
    let (own, chain, key) = world::authority(&["*.sandboxes.test", "sandboxes.test"]);
    let directory = ground.guest("authority");
    std::fs::create_dir_all(&directory).expect("a directory");
    let file = |name: &str, text: &str| {
        let path = directory.join(name);
        std::fs::write(&path, text).expect("written");
        path.display().to_string()
    };
    let (own, chain, key) = (file("own.pem", &own), file("chain.pem", &chain), file("key.pem", &key));
    let resolver = file("resolv.conf", "nameserver 127.0.0.1\n");
    let tls = ["--tls-listen", "127.0.0.1:8444", "--tls-cert", &chain, "--tls-key", &key];
    let args: Vec<&str> = ["--domain", "sandboxes.test:8444"].into_iter().chain(tls).collect();
    let server = ground.baked("by-name", &args, 1).await;
    world::everything_is_here();
    // A resolver for this program alone.
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"", &resolver]);
    command.arg(&python).args(["-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=short"]);
    command.arg(scripts("python").join("test_domain.py")).env("PYTHONDONTWRITEBYTECODE", "1");
    let status = command
        .env("E2B_DOMAIN", "sandboxes.test:8444")
        .env("E2B_API_KEY", server.key())
        .env("SSL_CERT_FILE", own)
        .env_remove("E2B_API_URL")
        .env_remove("E2B_SANDBOX_URL")
        .status()
        .expect("it starts");
    assert!(status.success(), "{status}");
    server.stop().await;
}

/// What the documents show runs as it stands there.
#[tokio::test]
async fn the_examples_run() {
    let Some(ground) = Ground::with_networks().await else { return };
    let Some(python) = tool("KELVIN_E2E_PYTHON") else { return };
    let (Some(node), Some(modules)) = (tool("KELVIN_E2E_NODE"), tool("KELVIN_E2E_JAVASCRIPT")) else {
        return;
    };
    let server = baked(&ground, "examples").await;
    let examples = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    for name in ["python_sdk.py", "tool_use.py"] {
        passes(&server, Command::new(&python).arg(examples.join(name)));
    }
    let script = modules.join("example.mjs");
    std::fs::copy(examples.join("javascript_sdk.mjs"), &script).expect("a copy");
    passes(&server, Command::new(node).arg(script));
    let bench =
        server.cli(&["bench", "sdk", "-n", "3", "--python"]).arg(&python).output().expect("kelvin runs");
    let text = String::from_utf8_lossy(&bench.stdout).into_owned();
    assert!(bench.status.success() && text.contains("SDK: create to first command"), "{bench:?}");
    server.stop().await;
}

/// Fifty clients of one process, each with a sandbox of its own: nothing fails and nothing is left.
#[tokio::test]
async fn fifty_clients_at_once() {
    let Some(ground) = Ground::with_networks().await else { return };
    let Some(python) = tool("KELVIN_E2E_PYTHON") else { return };
    let server = baked(&ground, "fifty").await;
    passes(&server, Command::new(python).arg(scripts("python").join("fifty_clients.py")));
    let info = server.settle().await;
    assert_eq!((info.sandboxes, info.paused), (0, 0), "nothing is left");
    server.stop().await;
}
