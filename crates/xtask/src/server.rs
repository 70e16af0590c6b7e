//! `up`, `down`, `demo`: a server of the working tree, with its data under `.cache/`.
//!
//! ```text
//! .cache/data.xfs        a file system that can clone files, mounted on .cache/data while a server is up
//! .cache/data/run/       server.json (where it is), server-build (which binary it is of), imported-* (which guest it has)
//! .cache/server.log      what the server says
//! ```

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::guest::{self, Guest};
use crate::packages::{self, as_root};
use crate::{Result, build_binary, cache, files as fs, is_prebuilt, output, run, say, spawn};

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
    if is_prebuilt() {
        return Ok(Built { binary: binary(), guest: guest::ensure()? });
    }
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
    Built { binary: binary(), guest: Guest { kernel, initrd, rootfs } }
}

fn binary() -> PathBuf {
    crate::root().join("target/release/kelvin")
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

pub struct Server {
    pid: String,
    url: String,
}

/// The server of `data` that `run/server.json` names, when it is alive.
fn running(data: &Path) -> Option<Server> {
    let text = fs::read_to_string(data.join("run/server.json")).ok()?;
    let field = |name: &str| {
        let rest = text.split_once(&format!("\"{name}\":"))?.1;
        Some(rest.trim_start_matches('"').split(['"', ',', '}']).next()?.to_owned())
    };
    let (pid, url) = (field("pid")?, field("url")?);
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    String::from_utf8_lossy(&line).contains("serve").then_some(Server { pid, url })
}

/// What `run/server-build` holds for a server of `binary` that runs as `pid`. Digests, not times: a build that changes
/// nothing leaves a server alone.
fn build_stamp(binary: &Path, pid: &str) -> Result<String> {
    Ok(format!("{pid} {}", crate::stamps::digest(&[&fs::read(binary)?])))
}

/// Starts the server, or takes the one that runs when it is of this build. It has this guest then, too.
fn start(built: &Built) -> Result<Server> {
    let data = data_dir();
    let mut listen = "127.0.0.1:0".to_owned();
    if let Some(server) = running(&data) {
        let stamp = fs::read_to_string(data.join("run/server-build")).unwrap_or_default();
        if stamp == build_stamp(&built.binary, &server.pid)? {
            import(built, "base", &built.guest.rootfs, "512", &data)?;
            return Ok(server);
        }
        say(&format!(
            "the server (pid {}) is of another build: starting it again, its sandboxes keep running",
            server.pid
        ));
        // Where its clients look for it.
        listen = server.url.trim_start_matches("http://").trim_end_matches('/').to_owned();
        stop(&server)?;
    }
    mount(&built.binary, &data)?;
    import(built, "base", &built.guest.rootfs, "512", &data)?;
    start_at(&built.binary, &data, &listen, &cache().join("server.log"))
}

/// Makes `data` a directory that can clone files.
pub fn mount(binary: &Path, data: &Path) -> Result<()> {
    let mut setup = kelvin(binary);
    setup.args(["setup", "--size-gib", "48", "--data-dir"]).arg(data);
    run(setup.stdout(std::io::stderr()))?;
    fs::create_dir_all(data.join("run"))?;
    Ok(())
}

/// Unmounts it again.
pub fn unmount(binary: &Path, data: &Path) -> Result<()> {
    run(kelvin(binary).args(["setup", "--unmount", "--data-dir"]).arg(data).stdout(Stdio::null()))
}

/// Starts a server of `binary` for `data`, which has none, and waits until it answers.
pub fn start_at(binary: &Path, data: &Path, listen: &str, log: &Path) -> Result<Server> {
    let _ = fs::remove_file(data.join("run/server.json"));
    let file = fs::create(log)?;
    let same = file.try_clone().map_err(|error| format!("sharing {}: {error}", log.display()))?;
    // Its own session: it outlives this command and its terminal.
    let mut serve = as_root("setsid");
    serve
        .arg(binary)
        // Never the machine's own uplink: what runs here is for trying and measuring.
        .args(["serve", "--listen", listen, "--uplink", "none", "--data-dir"])
        .arg(data)
        .stdin(Stdio::null())
        .stdout(same)
        .stderr(file);
    let mut child = spawn(&mut serve)?;
    let started = Instant::now();
    loop {
        if let Some(server) = running(data) {
            fs::write(data.join("run/server-build"), build_stamp(binary, &server.pid)?)?;
            return Ok(server);
        }
        if let Some(status) = child.try_wait().map_err(|error| format!("waiting for the server: {error}"))? {
            return Err(format!("the server ended ({status}):\n{}", fs::read_to_string(log)?).into());
        }
        if started.elapsed() > START {
            return Err(format!("the server is not up after {START:?}, see {}", log.display()).into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Ends `server`; its sandboxes keep running.
pub fn stop(server: &Server) -> Result<()> {
    end(server, "TERM")
}

/// The same without a word: as a crash.
pub fn kill(server: &Server) -> Result<()> {
    end(server, "KILL")
}

fn end(server: &Server, signal: &str) -> Result<()> {
    packages::signal(signal, &server.pid)?;
    let started = Instant::now();
    while !has_ended(&server.pid) {
        if started.elapsed() > START {
            return Err(format!("the server (pid {}) does not end", server.pid).into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn api_key(data: &Path) -> Result<String> {
    Ok(output(as_root("cat").arg(data.join("api-key")))?.trim().to_owned())
}

/// A client command of `binary` against the `server` of `data`.
pub fn client_of(binary: &Path, server: &Server, data: &Path) -> Result<Command> {
    let mut command = Command::new(binary);
    command.env("KELVIN_API_URL", &server.url).env("KELVIN_API_KEY", api_key(data)?);
    Ok(command)
}

/// A client command against `server`.
fn client(built: &Built, server: &Server) -> Result<Command> {
    client_of(&built.binary, server, &data_dir())
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
    println!("export KELVIN_API_KEY='{}'", api_key(&data_dir())?);
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
    is_zombie && fs::list(format!("/proc/{pid}/task")).map_or(0, |tasks| tasks.len()) <= 1
}

/// `cargo xtask down`.
pub fn down() -> Result<()> {
    down_at(&data_dir())
}

/// The same of the server of `data`.
fn down_at(data: &Path) -> Result<()> {
    let binary = binary();
    if let Some(server) = running(data) {
        let mut kill = client_of(&binary, &server, data)?;
        run(kill.args(["sandbox", "kill", "--all", "--project", "*"]).stdout(Stdio::null()))?;
        stop(&server)?;
    }
    if binary.exists() { unmount(&binary, data) } else { Ok(()) }
}

/// Runs `work` on a server of which nothing is left afterwards: its data are on a file system of their own, called `name` below
/// `.cache/`. What a run that was killed has left is removed first.
pub fn with_server_once(
    built: &Built,
    name: &str,
    work: impl FnOnce(&Server, &Path) -> Result<()>,
) -> Result<()> {
    let data = cache().join(name);
    let lock = fs::create(data.with_extension("lock"))?;
    lock.try_lock().map_err(|_| format!("another {name} runs in this tree"))?;
    let clear = || -> Result<()> {
        down_at(&data)?;
        // The file system, which `kelvin setup` has made beside the directory, and what it was mounted on.
        run(as_root("rm").arg("-rf").arg("--one-file-system").arg(data.with_extension("xfs")).arg(&data))
    };
    clear()?;
    let done = (|| {
        mount(&built.binary, &data)?;
        import(built, "base", &built.guest.rootfs, "512", &data)?;
        let log = data.with_extension("log");
        let server = start_at(&built.binary, &data, "127.0.0.1:0", &log)?;
        let mut bake = client_of(&built.binary, &server, &data)?;
        run(bake.args(["template", "bake", "base"]).stdout(std::io::stderr()))?;
        work(&server, &data)
    })();
    done.and(clear())
}

/// A client command of `binary` as root, with the key of the server of `data`.
pub fn root_client_of(binary: &Path, server: &Server, data: &Path) -> Command {
    let mut command = as_root("env");
    command.arg(format!("KELVIN_API_URL={}", server.url)).arg(binary);
    command.arg("--api-key-file").arg(data.join("api-key"));
    command
}

/// Where the data of the server are that [`up`] starts.
pub fn own_data() -> PathBuf {
    data_dir()
}

/// Runs `work` on a server, which is stopped afterwards when it was started here.
pub fn with_server(work: impl FnOnce(&Built, &Server) -> Result<()>) -> Result<()> {
    let was_up = running(&data_dir()).is_some();
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
    with_server(runs)
}

/// A run of each kind.
fn runs(built: &Built, server: &Server) -> Result<()> {
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
}

/// Where [`steps`] leaves the id of the sandbox that it paused last.
pub const PAUSED: &str = "steps-paused";

/// What every release has to pass, see `roots`: the demo's runs; a pause and a resume, over which a process lives on; what
/// the guest's kernel loads on demand. Ends with the sandbox paused and the server stopped.
pub fn steps() -> Result<()> {
    let built = prepare()?;
    let server = start(&built)?;
    let done = (|| {
        bake(&built, &server, "base")?;
        runs(&built, &server)?;
        let ask = |words: &[&str]| {
            Ok::<_, Box<dyn std::error::Error>>(
                output(client(&built, &server)?.args(words))?.trim().to_owned(),
            )
        };
        let id = ask(&["sandbox", "create", "--timeout", "3600"])?;
        let shell = |script: &str| ask(&["sandbox", "exec", &id, "--", "sh", "-c", script]);
        let process = shell("sleep 3600 >/dev/null 2>&1 & echo $!")?;
        shell("echo kept >note")?;
        for script in ON_DEMAND {
            say(&format!("in the guest: {script}"));
            shell(script)?;
        }
        run(client(&built, &server)?.args(["sandbox", "pause", &id]).stdout(Stdio::null()))?;
        run(client(&built, &server)?.args(["sandbox", "resume", &id]).stdout(Stdio::null()))?;
        let found = shell(&format!("cat note /proc/{process}/comm"))?;
        if found != "kept\nsleep" {
            return Err(
                format!("after a pause and a resume: expected kept and sleep, found {found:?}").into()
            );
        }
        run(client(&built, &server)?.args(["sandbox", "pause", &id]).stdout(Stdio::null()))?;
        fs::write(cache().join(PAUSED), id)?;
        Ok(())
    })();
    if done.is_err() {
        return done.and(down());
    }
    stop(&server)?;
    unmount(&built.binary, &data_dir())
}

/// Each uses a module of the guest's kernel that was not loaded before.
const ON_DEMAND: [&str; 4] = [
    "cd /tmp && mkdir -p a b c d && sudo mount -t overlay overlay -o lowerdir=a,upperdir=b,workdir=c d && sudo umount d",
    "sudo ip link add kelvin0 type bridge && sudo ip link add kelvin1 type veth peer name kelvin2 && \
     sudo ip tuntap add dev kelvin3 mode tun && sudo ip link delete kelvin0",
    "exec 3<>/dev/fuse && test -w /dev/net/tun && sudo modprobe nf_tables && sudo modprobe xt_MASQUERADE",
    "truncate -s 1M /tmp/loop && device=$(sudo losetup --find --show /tmp/loop) && sudo losetup -d $device",
];
