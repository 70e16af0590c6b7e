//! A server under test: started, spoken to, killed, and cleared away.
//!
//! Writes: its data directory. A test that is killed leaves it, and its processes; the next `cargo xtask test` clears it away.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use kelvin_api::id::Token;
use kelvin_api::sandbox::{BakeTemplate, NodeInfo};
use kelvin_client::Client;
use kelvin_host::process::working_in;
use kelvin_powercut::Block;

use crate::links::slot_links;

/// How long anything may take on a busy machine before a test fails.
pub const LIMIT: Duration = Duration::from_secs(120);

/// A server under test.
pub struct Server {
    pub(crate) binary: PathBuf,
    pub(crate) user: Option<u32>,
    pub(crate) data_dir: PathBuf,
    /// The file system that is mounted on the data directory, when it has one of its own.
    pub(crate) image: Option<PathBuf>,
    /// The device that this is on, when its power can fail, and its size.
    pub(crate) block: Option<(Block, u64)>,
    pub(crate) guest: PathBuf,
    pub(crate) process: Option<Child>,
    pub(crate) url: String,
    pub(crate) stopped: bool,
    /// How many descriptors it may have from its next start on, when not as many as this process.
    pub descriptors: Option<u64>,
    /// What it is started under, when not under the umask of this process: octal digits.
    pub umask: Option<&'static str>,
}

impl Server {
    /// The binary, as the server's user.
    pub(crate) fn command(&self) -> Command {
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

    pub(crate) fn import_base(&self) {
        self.import("base", &self.guest.join("vmlinuz"), &self.guest.join("initrd"));
    }

    /// With template `base`, for the first time.
    pub(crate) async fn begin(&mut self, args: &[&str]) {
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

    /// The device that it is on, see [`crate::Ground::server_on_block`].
    pub fn block(&self) -> &Block {
        &self.block.as_ref().expect("a device whose power can fail").0
    }

    /// The power fails, and is there again: nothing runs any more, and the disk is what survived. Of the blocks that were not
    /// flushed those do that `survives` picks.
    pub async fn power_fails(&mut self, survives: impl Fn(u64) -> bool) {
        self.block().power_fails(survives).expect("what survives can be written");
        let image = self.block().image().canonicalize().expect("the device's own file");
        assert!(is_a_loop(&image), "no loop device has {}", image.display());
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
        // A copy of the mount is in each namespace of mounts that another program has made meanwhile, and a file system is
        // mounted as itself once only. Nothing tells when the last copy goes.
        while is_a_loop(&image) {
            assert!(started.elapsed() < LIMIT, "the disk stays mounted elsewhere");
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

fn run(program: &str, words: &[&std::ffi::OsStr]) {
    let status = Command::new(program).args(words).stdout(Stdio::null()).status().expect("it starts");
    assert!(status.success(), "{program}: {status}");
}

/// Makes a file system that can clone files.
pub(crate) fn make_xfs(image: &Path) {
    run("mkfs.xfs", &["-q".as_ref(), "-m".as_ref(), "reflink=1".as_ref(), image.as_ref()]);
}

/// Whether a loop device has the file `image`, where losetup(8) finds it.
fn is_a_loop(image: &Path) -> bool {
    let devices = fs::read_dir("/sys/block").expect("sysfs").flatten();
    devices
        .filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok())
        .any(|of| Path::new(of.trim_end()) == image)
}

/// Mounts a file.
pub(crate) fn mount_loop(image: &Path, directory: &Path) {
    run("mount", &["-o".as_ref(), "loop".as_ref(), image.as_ref(), directory.as_ref()]);
}
