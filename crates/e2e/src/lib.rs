//! What the end-to-end tests stand on: real servers of the built binary, each with a data directory of
//! its own on a file system that can clone files.
//!
//! `cargo xtask test` makes the ground and names it in `KELVIN_E2E_DIR` and `KELVIN_E2E_BINARY`; without
//! it the tests say `skipped: ...`. A server that is stopped has to have left nothing; one whose test
//! failed is cleared away. Each test has a network namespace of its own; [`world`] gives it an internet.

pub mod golden;
pub mod promises;
pub mod soak;
pub mod world;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use hyper_util::client::legacy::connect::HttpConnector;
use kelvin_api::id::Token;
use kelvin_api::sandbox::{BakeTemplate, NewSandbox, NodeInfo, Sandbox};
use kelvin_client::Client;
use kelvin_client::agent::{self, Agent};
use kelvin_host::process::{proportional_kib, working_in};
use kelvin_powercut::Block;

/// How long anything may take on a busy machine before a test fails.
pub const LIMIT: Duration = Duration::from_secs(120);

/// Where the tests run.
pub struct Ground {
    binary: PathBuf,
    directory: PathBuf,
    found: Instant,
}

/// Says how long the test took: the test program itself does not.
impl Drop for Ground {
    fn drop(&mut self) {
        let thread = std::thread::current();
        println!("{} took {:.1} s", thread.name().unwrap_or("a test"), self.found.elapsed().as_secs_f64());
    }
}

/// Has every panic of a test appended to `path` too: `cargo xtask test` ends with them, whatever was printed since.
fn write_down_panics(path: PathBuf) {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let name = std::thread::current().name().unwrap_or("?").to_owned();
            if let Ok(mut file) = fs::File::options().create(true).append(true).open(&path) {
                let _ = std::io::Write::write_all(&mut file, format!("{name}: {panic}\n").as_bytes());
            }
            usual(panic);
        }));
    });
}

impl Ground {
    /// The ground that `cargo xtask test` made, or a line that says why there is none.
    pub fn find() -> Option<Self> {
        let variable = |name| std::env::var_os(name).map(PathBuf::from);
        match (variable("KELVIN_E2E_BINARY"), variable("KELVIN_E2E_DIR")) {
            (Some(binary), Some(directory)) => {
                write_down_panics(directory.join("failures"));
                // Slots, sockets and packets of a test stay in a namespace that ends with its thread. Runtimes of
                // tests have no other thread that would open a socket.
                if rustix::process::geteuid().is_root() {
                    kelvin_host::net::ns::unshare().expect("a network namespace");
                    ip("link set lo up");
                }
                Some(Self { binary, directory, found: Instant::now() })
            }
            _ => {
                println!("skipped: no ground for end-to-end tests, `cargo xtask test` makes it");
                None
            }
        }
    }

    /// The same where sandboxes can have networks, or a line that says why they cannot.
    pub async fn with_networks() -> Option<Self> {
        let ground = Self::find()?;
        match kelvin_host::net::check().await {
            Ok(()) => Some(ground),
            Err(error) => {
                println!("skipped: {error}");
                None
            }
        }
    }

    /// Starts a server called `name` with template `base` (256 MiB) imported; [`Ground::baked`] one that is baked, too.
    pub async fn server(&self, name: &str, args: &[&str]) -> Server {
        self.server_as(None, name, args).await
    }

    /// The same as another user, without rights.
    pub async fn server_as(&self, user: Option<u32>, name: &str, args: &[&str]) -> Server {
        let data_dir = self.directory.join(name);
        fs::create_dir(&data_dir).expect("a fresh data directory");
        self.server_in(user, data_dir, None, args).await
    }

    /// The same on a file system of its own, `size_mib` large.
    pub async fn server_on(&self, size_mib: u32, name: &str, args: &[&str]) -> Server {
        let data_dir = self.directory.join(name);
        fs::create_dir(&data_dir).expect("a fresh data directory");
        let image = self.directory.join(format!("{name}.xfs"));
        fs::File::create(&image).and_then(|file| file.set_len(u64::from(size_mib) << 20)).expect("an image");
        make_xfs(&image);
        mount_loop(&image, &data_dir);
        self.server_in(None, data_dir, Some(image), args).await
    }

    /// The same on a disk, `size_mib` large, whose power can fail; or a line that says why there is no such disk.
    pub async fn server_on_block(&self, size_mib: u32, name: &str, args: &[&str]) -> Option<Server> {
        let (data_dir, device) = (self.directory.join(name), self.directory.join(format!("{name}.device")));
        fs::create_dir(&device).expect("a fresh directory");
        // Of a test that was killed.
        let _ = fs::remove_file(data_dir.with_extension("survives"));
        let bytes = u64::from(size_mib) << 20;
        let Some(block) = Block::mount(&device, bytes).expect("a device") else {
            fs::remove_dir(&device).expect("it is empty");
            println!("skipped: no /dev/fuse");
            return None;
        };
        fs::create_dir(&data_dir).expect("a fresh data directory");
        let image = block.image();
        make_xfs(&image);
        mount_loop(&image, &data_dir);
        let mut server = self.prepared(None, data_dir, None);
        server.block = Some((block, bytes));
        server.begin(args).await;
        Some(server)
    }

    async fn server_in(
        &self,
        user: Option<u32>,
        data_dir: PathBuf,
        image: Option<PathBuf>,
        args: &[&str],
    ) -> Server {
        if user.is_some() {
            std::os::unix::fs::chown(&data_dir, user, user).expect("it can be given away");
        }
        let mut server = self.prepared(user, data_dir, image);
        server.begin(args).await;
        server
    }

    fn prepared(&self, user: Option<u32>, data_dir: PathBuf, image: Option<PathBuf>) -> Server {
        Server {
            binary: self.binary.clone(),
            user,
            data_dir,
            image,
            block: None,
            guest: self.directory.join("guest"),
            process: None,
            url: String::new(),
            stopped: false,
            descriptors: None,
            umask: None,
        }
    }

    /// The guest's files.
    pub fn guest(&self, name: &str) -> PathBuf {
        self.directory.join("guest").join(name)
    }
}

fn run(program: &str, words: &[&std::ffi::OsStr]) {
    let status = Command::new(program).args(words).stdout(Stdio::null()).status().expect("it starts");
    assert!(status.success(), "{program}: {status}");
}

fn make_xfs(image: &Path) {
    run("mkfs.xfs", &["-q".as_ref(), "-m".as_ref(), "reflink=1".as_ref(), image.as_ref()]);
}

fn mount_loop(image: &Path, directory: &Path) {
    run("mount", &["-o".as_ref(), "loop".as_ref(), image.as_ref(), directory.as_ref()]);
}

/// Runs `ip` with these words, in this thread's namespace.
pub fn ip(words: &str) {
    let output = Command::new("ip").args(words.split_whitespace()).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Links of slots in this thread's namespace.
pub fn slot_links() -> Vec<String> {
    let output = Command::new("ip").args(["-o", "link"]).output().expect("iproute2 is installed");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1))
        .filter(|name| name.starts_with("kv"))
        .map(str::to_owned)
        .collect()
}

/// A server under test.
pub struct Server {
    binary: PathBuf,
    user: Option<u32>,
    data_dir: PathBuf,
    /// The file system that is mounted on the data directory, when it has one of its own.
    image: Option<PathBuf>,
    /// The device that this is on, when its power can fail, and its size.
    block: Option<(Block, u64)>,
    guest: PathBuf,
    process: Option<Child>,
    url: String,
    stopped: bool,
    /// How many descriptors it may have from its next start on, when not as many as this process.
    pub descriptors: Option<u64>,
    /// What it is started under, when not under the umask of this process: octal digits.
    pub umask: Option<&'static str>,
}

impl Server {
    /// The binary, as the server's user.
    fn command(&self) -> Command {
        let Some(user) = self.user else {
            return Command::new(&self.binary);
        };
        let mut command = Command::new("setpriv");
        command.arg(format!("--reuid={user}")).arg(format!("--regid={user}"));
        command
            .args(["--clear-groups", "--inh-caps=-all", "--"])
            .arg(&self.binary)
            .env("HOME", "/nonexistent");
        command
    }

    /// Imports the base image under `name` with another kernel or agent.
    pub fn import(&self, name: &str, kernel: &Path, initrd: &Path) {
        self.import_image(name, "rootfs.ext4", "256", kernel, initrd);
    }

    /// Imports the code interpreter's image as its template.
    pub fn import_interpreter(&self) {
        let (kernel, initrd) = (self.guest.join("vmlinuz"), self.guest.join("initrd"));
        // The second is the one that E2B's client asks for. One image, one snapshot.
        for name in ["code-interpreter", "code-interpreter-v1"] {
            self.import_image(name, "code-interpreter.ext4", "1024", &kernel, &initrd);
        }
    }

    fn import_image(&self, name: &str, image: &str, memory_mib: &str, kernel: &Path, initrd: &Path) {
        let rootfs = self.guest.join(image);
        let status = self
            .command()
            .args(["template", "import", name, "--memory-mib", memory_mib, "--data-dir"])
            .arg(&self.data_dir)
            .arg("--rootfs")
            .arg(rootfs)
            .arg("--kernel")
            .arg(kernel)
            .arg("--initrd")
            .arg(initrd)
            .stdout(Stdio::null())
            .status()
            .expect("kelvin starts");
        assert!(status.success(), "template import: {status}");
    }

    /// What a server would be started with.
    fn serve(&self, args: &[&str]) -> Command {
        let mut before = Vec::new();
        before.extend(self.descriptors.map(|most| format!("ulimit -n {most}")));
        before.extend(self.umask.map(|mask| format!("umask {mask}")));
        let mut command = self.command();
        if !before.is_empty() {
            // By a shell: this process could lower its own limit and not raise it again, and its threads share a umask.
            before.push("exec \"$@\"".to_owned());
            let mut limited = Command::new("sh");
            limited.args(["-c", &before.join(" && "), "sh"]);
            limited.arg(command.get_program()).args(command.get_args());
            command = limited;
        }
        command.args(["serve", "--data-dir"]).arg(&self.data_dir).args(defaults(args)).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    fn import_base(&self) {
        self.import("base", &self.guest.join("vmlinuz"), &self.guest.join("initrd"));
    }

    /// With template `base`, for the first time.
    async fn begin(&mut self, args: &[&str]) {
        self.import_base();
        self.start(args).await;
    }

    /// Starts a server that is to refuse, beside none; what it says.
    pub fn refuses(&self, args: &[&str]) -> String {
        let output = self.serve(args).stderr(Stdio::piped()).output().expect("kelvin starts");
        assert!(!output.status.success(), "it did not refuse");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Starts the process and does not wait for it.
    pub fn launch(&mut self, args: &[&str]) {
        let _ = fs::remove_file(self.announcement());
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.data_dir.join("server.log"))
            .expect("a log");
        self.process = Some(self.serve(args).stderr(log).spawn().expect("kelvin starts"));
    }

    fn announcement(&self) -> PathBuf {
        self.data_dir.join("run/server.json")
    }

    /// Whether it has said where it is.
    pub fn is_announced(&self) -> bool {
        self.announcement().exists()
    }

    /// Starts the process and waits until it says where it is.
    pub async fn start(&mut self, args: &[&str]) {
        self.launch(args);
        let started = Instant::now();
        let text = loop {
            if let Ok(text) = fs::read_to_string(self.announcement()) {
                break text;
            }
            let ended = self.process.as_mut().expect("it runs").try_wait().expect("a child");
            assert!(ended.is_none(), "the server ended:\n{}", self.log());
            assert!(started.elapsed() < LIMIT, "the server is not up:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        let value: serde_json::Value = serde_json::from_str(&text).expect("an announcement");
        self.url = value["url"].as_str().expect("a URL").to_owned();
    }

    /// What the server has said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.data_dir.join("server.log")).unwrap_or_default()
    }

    /// Its URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Its data directory.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("it runs").id()
    }

    /// Its API key.
    pub fn key(&self) -> String {
        fs::read_to_string(self.data_dir.join("api-key")).expect("a key").trim().to_owned()
    }

    /// A client.
    pub fn client(&self) -> Client {
        Client::new(&self.url, Token::from_secret(self.key())).expect("a URL")
    }

    /// A command of the CLI that speaks to this server.
    pub fn cli(&self, args: &[&str]) -> Command {
        let mut command = self.command();
        command
            .args(args)
            .env("KELVIN_API_URL", &self.url)
            .env("KELVIN_API_KEY", self.key())
            .env("KELVIN_DATA_DIR", &self.data_dir)
            .env("HOME", "/nonexistent")
            .stdin(Stdio::null());
        command
    }

    /// Bakes template `base`, with `waiting` VMMs.
    pub async fn bake(&self, waiting: u32) -> String {
        let request = BakeTemplate { waiting_vmms: Some(waiting), ..BakeTemplate::default() };
        let id = self.client().bake("base", &request).await.unwrap_or_else(|error| {
            panic!("bake: {error}\n{}", self.log());
        });
        self.settle().await;
        id
    }

    /// Waits until the node has nothing left to do.
    pub async fn settle(&self) -> NodeInfo {
        self.node_when("settled", |node| node.settled).await
    }

    /// Waits until the node is as `wanted`.
    pub async fn node_when(&self, what: &str, wanted: impl Fn(&NodeInfo) -> bool) -> NodeInfo {
        let started = Instant::now();
        loop {
            let node = self.client().node().await.expect("the node answers");
            if wanted(&node) {
                return node;
            }
            assert!(started.elapsed() < LIMIT, "not {what}: {node:?}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Kills the server as the kernel would.
    pub fn kill_9(&mut self) {
        let mut child = self.process.take().expect("it runs");
        child.kill().expect("it can be killed");
        child.wait().expect("it can be waited for");
    }

    /// The device that it is on, see [`Ground::server_on_block`].
    pub fn block(&self) -> &Block {
        &self.block.as_ref().expect("a device whose power can fail").0
    }

    /// The power fails, and is there again: nothing runs any more, and the disk is what survived. Of the blocks that were not
    /// flushed those do that `survives` picks.
    pub async fn power_fails(&mut self, survives: impl Fn(u64) -> bool) {
        self.block().power_fails(survives).expect("what survives can be written");
        let running: Vec<i32> = self.vmms().into_iter().chain(self.helpers()).collect();
        self.kill_9();
        for pid in running.into_iter().filter_map(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        // It is busy until the last of them is gone.
        let started = Instant::now();
        while let Err(error) = rustix::mount::unmount(&self.data_dir, rustix::mount::UnmountFlags::empty()) {
            assert!(started.elapsed() < LIMIT, "the disk stays mounted: {error}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let (block, bytes) = self.block.take().expect("it was there");
        drop(block);
        let block = Block::mount(&self.data_dir.with_extension("device"), bytes).expect("a device");
        let block = block.expect("there was FUSE");
        mount_loop(&block.image(), &self.data_dir);
        self.block = Some((block, bytes));
    }

    /// Waits until the server has ended by itself; how.
    pub async fn wait_for_death(&mut self) -> ExitStatus {
        let started = Instant::now();
        // Kept until it is dead: what a failed test leaves is killed on drop.
        let status = loop {
            if let Some(status) = self.process.as_mut().expect("it runs").try_wait().expect("a child") {
                break status;
            }
            assert!(started.elapsed() < LIMIT, "the server still runs\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        self.process = None;
        status
    }

    /// Sends SIGTERM and waits for the end, which is no failure.
    pub async fn terminate(&mut self) {
        let pid = i32::try_from(self.pid()).ok().and_then(rustix::process::Pid::from_raw).expect("a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it can be told");
        let status = self.wait_for_death().await;
        assert!(status.success(), "it did not stop by itself: {status}\n{}", self.log());
    }

    /// VMMs of this server, by pid.
    pub fn vmms(&self) -> BTreeSet<i32> {
        working_in(&self.data_dir)
    }

    /// The machine whose VMM a process is.
    pub fn machine_of(&self, pid: i32) -> String {
        let text = fs::read(format!("/proc/{pid}/environ")).expect("it runs");
        let text = String::from_utf8_lossy(&text).into_owned();
        let marker = format!("{}=kelvin-", kelvin_host::process::MARKER);
        let name = text.split('\0').find_map(|word| word.strip_prefix(&marker));
        name.expect("a machine's VMM").to_owned()
    }

    /// The egress process of this server.
    pub fn helpers(&self) -> BTreeSet<i32> {
        working_in(&self.data_dir.join("run"))
    }

    /// Directories of machines.
    pub fn machines(&self) -> Vec<PathBuf> {
        fs::read_dir(self.data_dir.join("sandboxes"))
            .expect("a directory")
            .flatten()
            .map(|entry| entry.path())
            .collect()
    }

    /// Kills every sandbox, stops the server, and checks that nothing is left of it.
    pub async fn stop(mut self) {
        let client = self.client();
        for sandbox in client.of_project("*").list_all(&[]).await.expect("a list") {
            client.kill(&sandbox.sandbox_id).await.expect("a kill");
        }
        self.terminate().await;
        assert_eq!(self.vmms(), BTreeSet::new(), "VMMs are left\n{}", self.log());
        assert_eq!(self.helpers(), BTreeSet::new(), "a helper is left\n{}", self.log());
        assert_eq!(self.machines(), Vec::<PathBuf>::new(), "directories are left\n{}", self.log());
        assert_eq!(slot_links(), Vec::<String>::new(), "links are left\n{}", self.log());
        if rustix::process::geteuid().is_root() {
            let tables = kelvin_host::net::nft::run("list tables").expect("rules");
            assert!(!tables.contains("kelvin"), "rules are left: {tables}");
        }
        let staged = fs::read_dir(self.data_dir.join("staging")).expect("a directory").count();
        assert_eq!(staged, 0, "staging is not empty");
        self.stopped = true;
        self.clear().expect("the data directory can be removed");
    }

    fn clear(&mut self) -> std::io::Result<()> {
        if self.block.is_some() {
            rustix::mount::unmount(&self.data_dir, rustix::mount::UnmountFlags::empty())?;
            self.block = None;
            fs::remove_dir(self.data_dir.with_extension("device"))?;
            fs::remove_file(self.data_dir.with_extension("survives"))?;
        }
        if let Some(image) = self.image.take() {
            let status = Command::new("umount").arg(&self.data_dir).status()?;
            if !status.success() {
                return Err(std::io::Error::other(format!("umount: {status}")));
            }
            fs::remove_file(image)?;
        }
        fs::remove_dir_all(&self.data_dir)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.stopped {
            return;
        }
        // The test failed: show what the server said, leave nothing.
        if let Some(mut child) = self.process.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for pid in self.vmms().into_iter().chain(self.helpers()) {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        let log = self.log();
        let tail: Vec<&str> = log.lines().rev().take(40).collect();
        eprintln!("--- the server's last words\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        // A file system is busy until its last process is gone.
        let started = Instant::now();
        while self.clear().is_err() && started.elapsed() < Duration::from_secs(5) {}
    }
}

/// What every server is told, unless a test tells it something else.
fn defaults(args: &[&str]) -> Vec<&'static str> {
    [("--listen", "127.0.0.1:0"), ("--uplink", "none"), ("--slots", "4"), ("--warm-max", "0")]
        .into_iter()
        .filter(|(name, _)| !args.contains(name))
        .flat_map(|(name, value)| [name, value])
        .collect()
}

/// The body of an ordinary create.
pub fn new_sandbox() -> NewSandbox {
    NewSandbox { template_id: "base".to_owned(), timeout: Some(600), ..NewSandbox::default() }
}

/// The agent of a sandbox that was just created.
pub fn agent_of(client: &Client, sandbox: &Sandbox) -> Agent {
    client.agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), None).expect("a URL")
}

/// A shell command.
pub fn shell(script: &str) -> agent::Command {
    agent::Command {
        program: "/bin/bash".to_owned(),
        args: vec!["-c".to_owned(), script.to_owned()],
        ..agent::Command::default()
    }
}

/// A process that counts, says so, and holds a token that it made: `COUNT TOKEN` in `/tmp/state` and on its standard
/// output, twenty times a second.
pub const COUNTER: &str = "import os, time\ntoken = os.urandom(16).hex()\nn = 0\nwhile True:\n    n += 1\n    open('/tmp/state.new', 'w').write(f'{n} {token}')\n    os.replace('/tmp/state.new', '/tmp/state')\n    print(n, token, flush=True)\n    time.sleep(0.05)\n";

/// Starts [`COUNTER`] and waits until it has counted; its process id.
pub async fn start_counter(agent: &Agent) -> u32 {
    let command = agent::Command {
        program: "python3".to_owned(),
        args: ["-c", COUNTER].map(str::to_owned).to_vec(),
        ..agent::Command::default()
    };
    let mut process = agent.start(&command).await.expect("it starts");
    let mut pid = 0;
    loop {
        match process.next().await.expect("a stream").expect("output") {
            agent::Told::Started { pid: started } => pid = started,
            agent::Told::Stdout(_) => return pid,
            other => panic!("the counter: {other:?}"),
        }
    }
}

/// What these processes take, in MiB: pages that n of them share count 1/n.
pub fn proportional_mib(pids: BTreeSet<i32>) -> u64 {
    pids.into_iter().map(proportional_kib).sum::<u64>() / 1024
}

/// Runs a shell command and returns its standard output; it has to succeed.
pub async fn sh(agent: &Agent, script: &str) -> String {
    let (code, stdout, stderr) = agent.run(&shell(script), 1 << 20).await.expect("the command runs");
    assert_eq!(code, 0, "{script}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).expect("text")
}

/// A client of HTTP/1.1 that knows nothing of the API, for requests as others would make them.
fn http() -> hyper_util::client::legacy::Client<HttpConnector, Whole> {
    hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new()).build_http()
}

type Whole = http_body_util::combinators::UnsyncBoxBody<bytes::Bytes, std::io::Error>;

/// Sends a request to the server as it is.
pub async fn send(
    server: &Server,
    method: &http::Method,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<bytes::Bytes>,
) -> http::Response<hyper::body::Incoming> {
    let mut request = http::Request::builder().method(method).uri(format!("{}{path}", server.url()));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let body = http_body_util::Full::new(body.into()).map_err(|never| match never {}).boxed_unsync();
    http().request(request.body(body).expect("a request")).await.expect("a reply")
}

/// The same; status and text of the reply.
pub async fn ask(
    server: &Server,
    method: &http::Method,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<bytes::Bytes>,
) -> (http::StatusCode, String) {
    let response = send(server, method, path, headers, body).await;
    let status = response.status();
    let bytes = match response.into_body().collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => panic!("{method} {path}: {status}, and then {error}"),
    };
    (status, String::from_utf8_lossy(&bytes).into_owned())
}

/// Uploads `bytes` zeroes as a stream of chunks.
pub async fn upload_zeroes(
    server: &Server,
    headers: &[(&str, &str)],
    path: &str,
    bytes: u64,
) -> http::StatusCode {
    const CHUNK: usize = 256 << 10;
    let chunk = bytes::Bytes::from(vec![0; CHUNK]);
    let frames = (0..bytes / CHUNK as u64).map(move |_| Ok(hyper::body::Frame::data(chunk.clone())));
    let body = http_body_util::StreamBody::new(futures::stream::iter(frames)).boxed_unsync();
    let mut request = http::Request::builder().method("POST").uri(format!("{}{path}", server.url()));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.header("content-type", "application/octet-stream").body(body);
    http().request(request.expect("a request")).await.expect("a reply").status()
}

/// Memory that a process has resident, in MiB.
pub fn resident_mib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") >> 10
}
