//! `up`, `down`, `demo`, `bench`: a server of the working tree, with its data under `.cache/`.
//!
//! ```text
//! .cache/data.xfs        a file system that can clone files, mounted on .cache/data while a server is up
//! .cache/data/run/       server.json (where it is), imported (which guest it has)
//! .cache/server.log      what the server says
//! ```

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::guest::{self, Guest};
use crate::packages::{self, as_root};
use crate::{Result, build_binary, cache, output, run, say};

/// The template that runs cells, and what its machines have, in MiB.
const INTERPRETER: &str = "code-interpreter";
const INTERPRETER_MEMORY_MIB: &str = "1024";

const START: Duration = Duration::from_secs(120);

/// What everything below needs.
pub struct Built {
    pub binary: PathBuf,
    pub guest: Guest,
}

/// Installs, builds and makes what is missing.
pub fn prepare() -> Result<Built> {
    packages::ensure()?;
    // Beside each other: the end of each build keeps one processor busy, an image the network.
    let (guest, binary) = std::thread::scope(|scope| {
        let guest = scope.spawn(|| guest::ensure().map_err(|error| error.to_string()));
        let binary = build_binary();
        (guest.join(), binary)
    });
    Ok(Built { binary: binary?, guest: guest.map_err(|_| "making the guest panicked")?? })
}

/// What [`prepare`] has made before, on a machine that cannot.
pub fn built() -> Built {
    let [(_, kernel), (_, initrd), (_, rootfs), _] = guest::files();
    Built { binary: crate::root().join("target/release/kelvin"), guest: Guest { kernel, initrd, rootfs } }
}

fn data_dir() -> PathBuf {
    cache().join("data")
}

/// A command of the built binary, as root where that is needed.
pub fn kelvin(binary: &Path) -> Command {
    as_root(&binary.to_string_lossy())
}

/// Imports the image `rootfs` as template `name` into `data_dir`, unless that very image and guest are there.
fn import(built: &Built, name: &str, rootfs: &Path, memory_mib: &str, data_dir: &Path) -> Result<()> {
    let mut key = String::new();
    for file in [rootfs, &built.guest.kernel, &built.guest.initrd] {
        let found = fs::metadata(file)?;
        key.push_str(&format!(
            "{} {} {} {}\n",
            file.display(),
            found.len(),
            found.mtime(),
            found.mtime_nsec()
        ));
    }
    let stamp = data_dir.join("run").join(format!("imported-{name}"));
    if fs::read_to_string(&stamp).is_ok_and(|text| text == key) {
        return Ok(());
    }
    let mut import = kelvin(&built.binary);
    import.args(["template", "import", name, "--memory-mib", memory_mib, "--data-dir"]).arg(data_dir);
    import.arg("--rootfs").arg(rootfs);
    import.arg("--kernel").arg(&built.guest.kernel).arg("--initrd").arg(&built.guest.initrd);
    run(import.stdout(Stdio::null()))?;
    fs::write(stamp, key)?;
    Ok(())
}

struct Server {
    pid: String,
    url: String,
}

/// The server that `run/server.json` names, when it is alive.
fn running() -> Option<Server> {
    let text = fs::read_to_string(data_dir().join("run/server.json")).ok()?;
    let field = |name: &str| {
        let rest = text.split_once(&format!("\"{name}\":"))?.1;
        Some(rest.trim_start_matches('"').split(['"', ',', '}']).next()?.to_owned())
    };
    let (pid, url) = (field("pid")?, field("url")?);
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    String::from_utf8_lossy(&line).contains("serve").then_some(Server { pid, url })
}

fn start(built: &Built) -> Result<Server> {
    if let Some(server) = running() {
        return Ok(server);
    }
    let data = data_dir();
    let mut setup = kelvin(&built.binary);
    setup.args(["setup", "--size-gib", "48", "--data-dir"]).arg(&data);
    run(setup.stdout(std::io::stderr()))?;
    fs::create_dir_all(data.join("run"))?;
    import(built, "base", &built.guest.rootfs, "512", &data)?;
    let _ = fs::remove_file(data.join("run/server.json"));
    let log = cache().join("server.log");
    let file = fs::File::create(&log)?;
    // Its own session: it outlives this command and its terminal.
    let mut child = as_root("setsid")
        .arg(&built.binary)
        // Never the machine's own uplink: what runs here is for trying and measuring.
        .args(["serve", "--listen", "127.0.0.1:0", "--uplink", "none", "--data-dir"])
        .arg(&data)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()?;
    let started = Instant::now();
    loop {
        if let Some(server) = running() {
            return Ok(server);
        }
        if let Some(status) = child.try_wait()? {
            return Err(format!("the server ended ({status}):\n{}", fs::read_to_string(&log)?).into());
        }
        if started.elapsed() > START {
            return Err(format!("the server is not up after {START:?}, see {}", log.display()).into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn api_key() -> Result<String> {
    Ok(output(as_root("cat").arg(data_dir().join("api-key")))?.trim().to_owned())
}

/// A client command against `server`.
fn client(built: &Built, server: &Server) -> Result<Command> {
    let mut command = Command::new(&built.binary);
    command.env("KELVIN_API_URL", &server.url).env("KELVIN_API_KEY", api_key()?);
    Ok(command)
}

fn bake(built: &Built, server: &Server, name: &str) -> Result<()> {
    say(&format!("baking template {name}, when it is missing"));
    run(client(built, server)?.args(["template", "bake", name]).stdout(std::io::stderr()))
}

/// `cargo xtask up [code-interpreter]`.
pub fn up(templates: &[String]) -> Result<()> {
    let built = prepare()?;
    let server = start(&built)?;
    bake(&built, &server, "base")?;
    for name in templates {
        if name != "code-interpreter" {
            return Err(format!(
                "no template {name:?}: there are base, which is always there, and code-interpreter"
            )
            .into());
        }
        let image = guest::ensure_interpreter()?;
        // The second is the one that E2B's client asks for. One image, one snapshot.
        for name in [INTERPRETER, "code-interpreter-v1"] {
            import(&built, name, &image, INTERPRETER_MEMORY_MIB, &data_dir())?;
        }
        bake(&built, &server, INTERPRETER)?;
    }
    let directory = built.binary.parent().unwrap_or(Path::new("/")).display().to_string();
    println!("export KELVIN_API_URL='{}'", server.url);
    println!("export KELVIN_API_KEY='{}'", api_key()?);
    println!("export KELVIN_DATA_DIR='{}'", data_dir().display());
    println!("export PATH='{directory}':\"$PATH\"");
    Ok(())
}

/// Whether a process is gone, or a zombie: a server that `demo` started is a child of this program. A leader is a
/// zombie before its last thread, which holds the same files, is gone.
fn has_ended(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The second field is a name in parentheses that may hold anything; the third is the state.
    let is_zombie = stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']));
    is_zombie && fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count) <= 1
}

/// `cargo xtask down`.
pub fn down() -> Result<()> {
    let binary = crate::root().join("target/release/kelvin");
    if let Some(server) = running() {
        let mut kill = Command::new(&binary);
        kill.args(["sandbox", "kill", "--all", "--project", "*"])
            .env("KELVIN_API_URL", &server.url)
            .env("KELVIN_API_KEY", api_key()?);
        run(kill.stdout(Stdio::null()))?;
        run(as_root("kill").arg(&server.pid))?;
        let started = Instant::now();
        while !has_ended(&server.pid) {
            if started.elapsed() > START {
                return Err(format!("the server (pid {}) does not end", server.pid).into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    if binary.exists() {
        run(kelvin(&binary)
            .args(["setup", "--unmount", "--data-dir"])
            .arg(data_dir())
            .stdout(Stdio::null()))?;
    }
    Ok(())
}

/// Runs `work` on a server, which is stopped afterwards when it was started here.
fn with_server(work: impl FnOnce(&Built, &Server) -> Result<()>) -> Result<()> {
    let was_up = running().is_some();
    let built = prepare()?;
    let server = start(&built)?;
    let result = bake(&built, &server, "base").and_then(|()| work(&built, &server));
    let stopped = if was_up { Ok(()) } else { down() };
    result.and(stopped)
}

/// Waits until a machine is warm.
fn warm_one(built: &Built, server: &Server) -> Result<()> {
    run(client(built, server)?.args(["pool", "set", "base", "--min", "1"]).stdout(Stdio::null()))?;
    let started = Instant::now();
    while output(client(built, server)?.args(["--output", "json", "node"]))?.contains("\"warm\": 0") {
        if started.elapsed() > START {
            return Err("no machine is warm, see .cache/server.log".into());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// `cargo xtask demo`.
pub fn demo() -> Result<()> {
    with_server(|built, server| {
        for (path, words) in [
            ("cold", "booted"),
            ("clone", "restored from a snapshot"),
            ("warm", "restored before it was asked for"),
        ] {
            if path == "warm" {
                warm_one(built, server)?;
            }
            eprintln!("\n$ kelvin run --path {path} -- python3 -c 'print(2 ** 10)'      # {words}");
            let mut command = client(built, server)?;
            command.args(["run", "--timing", "--path", path, "--", "python3", "-c", "print(2 ** 10)"]);
            let printed = output(&mut command)?;
            print!("{printed}");
            if printed != "1024\n" {
                return Err(format!("expected 1024, the microVM printed {printed:?}").into());
            }
        }
        eprintln!();
        run(client(built, server)?.args(["pool", "set", "base", "--min", "0"]).stdout(Stdio::null()))
    })
}

/// `cargo xtask bench ARGS`.
pub fn bench(arguments: &[String]) -> Result<()> {
    with_server(|built, server| {
        let mut command = as_root("env");
        command
            .arg(format!("KELVIN_API_URL={}", server.url))
            .arg(&built.binary)
            .arg("--api-key-file")
            .arg(data_dir().join("api-key"))
            .args(["bench", "create"])
            .args(arguments);
        run(&mut command)
    })
}
