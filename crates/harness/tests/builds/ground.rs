//! What builds are tested on: a world, guests that do what a command's text says, images that are nothing but their name, and what
//! must hold whenever nothing is under way.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use kelvin_api::account::Project;
use kelvin_api::error::{ErrorCode, Failure, chain};
use kelvin_api::id::{BuildId, FilesHash, SandboxId, TemplateName, TemplateVersion, VmId};
use kelvin_api::network::Wanted;
use kelvin_api::sandbox::{EnvVars, Lifecycle};
use kelvin_api::units::MemoryMib;
use kelvin_harness::faults::{Faults, Plan, Scripted, Time, What};
use kelvin_harness::world::{Broken, MEMORY, Settings, World, live, names};
use kelvin_host::clock::Clock;
use kelvin_node::options::Options;
use kelvin_node::{BaseImage, BaseImages, DiskSize, ImageConfig, ImageSource, Node, Told};
use kelvin_node_api::{
    Base, Build, BuildEvent, BuildFailure, BuildFrom, BuildStage, BuildStep, Built, Create, Instruction,
    NodeService, RegistryReach,
};
use kelvin_store::Store;
use kelvin_store::image::Template;
use kelvin_vmm::testing::{Call, Exec, FakeDriver, Script, Step};

/// Memory that a VMM is counted with beside its guest's, in MiB.
pub const OVERHEAD: u64 = 48;
/// How long everything may take to come to rest, and a build to be answered.
pub const SETTLE: Duration = Duration::from_secs(1200);

/// Images that are nothing but their reference.
pub struct Images {
    /// How many were made.
    pub made: AtomicU32,
}

struct Image(String, Arc<Images>);

#[async_trait]
impl BaseImage for Image {
    fn key(&self) -> String {
        self.0.clone()
    }

    fn config(&self) -> ImageConfig {
        ImageConfig { env: vec![("PATH".to_owned(), "/image/bin".to_owned())], ..ImageConfig::default() }
    }

    async fn make(&self, target: &Path, _: DiskSize, told: &Told) -> Result<(), Failure> {
        told("unpacking");
        let (target, text) = (target.to_owned(), format!("image {}\n", self.0));
        let failed = |error: &dyn std::fmt::Display| Failure::new(ErrorCode::StoreIo, error.to_string(), "");
        let made = kelvin_host::blocking::spawn(move || std::fs::write(target, text)).await;
        made.map_err(|error| failed(&error))?.map_err(|error| failed(&error))?;
        self.1.made.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Handed out as it is, so that images can count.
struct Handle(Arc<Images>);

#[async_trait]
impl BaseImages for Handle {
    async fn resolve(&self, source: ImageSource<'_>, told: &Told) -> Result<Arc<dyn BaseImage>, Failure> {
        told("resolving");
        // A step, as a registry's answer is.
        let asked = kelvin_host::blocking::spawn(|| ()).await;
        asked.map_err(|error| Failure::new(ErrorCode::RegistryUnavailable, error.to_string(), "again"))?;
        match source {
            ImageSource::Registry { reference: "absent", .. } => {
                Err(Failure::new(ErrorCode::ImageNotFound, "no such image", "name another"))
            }
            ImageSource::Registry { reference, .. } => {
                Ok(Arc::new(Image(reference.to_owned(), Arc::clone(&self.0))))
            }
            ImageSource::Scratch => Ok(Arc::new(Image("scratch".to_owned(), Arc::clone(&self.0)))),
            _ => Err(Failure::new(ErrorCode::InvalidImage, "no registry's", "name one")),
        }
    }
}

/// Faults, and commands that do what their text says: `fail` ends with 3, `write` leaves itself on the disk, `hang` never ends.
struct Guests {
    faults: Scripted,
    done: Arc<Mutex<Vec<String>>>,
}

impl Script for Guests {
    fn step(&self, call: Call, vm: &VmId) -> Step {
        self.faults.step(call, vm)
    }

    fn exec(&self, what: &str, _: &VmId) -> Exec {
        self.done.lock().unwrap().push(what.to_owned());
        let writes =
            ["run write", "; write", "unpack", "files", "mkdir"].iter().any(|word| what.contains(word));
        match what {
            // Who listens, asked for by a service without a ready command.
            what if what.contains("/proc/net/tcp") => {
                Exec { output: "00000000:0016".into(), ..Exec::default() }
            }
            what if what.contains("; fail")
                || what.starts_with("run fail")
                || what.starts_with("run ./fail")
                || what.contains("from=fail") =>
            {
                let output = "\u{1b}[31mfirst line\nno such thing\n".to_owned();
                Exec { code: 3, output, ..Exec::default() }
            }
            what if what.starts_with("read") => Exec { output: "said before\n".into(), ..Exec::default() },
            what => Exec {
                output: "done\n".to_owned(),
                writes,
                hangs: what.contains("; hang"),
                ..Exec::default()
            },
        }
    }
}

/// What all lives of a case have in common.
#[derive(Clone)]
pub struct Ground {
    pub faults: Arc<Faults>,
    pub driver: Arc<FakeDriver>,
    pub images: Arc<Images>,
    done: Arc<Mutex<Vec<String>>>,
    pub options: Options,
}

impl Ground {
    pub fn new(world: &World, plan: Plan) -> Self {
        kelvin_api::id::testing::seed(Some(plan.seed ^ 0x5eed));
        let (faults, done) = (Faults::new(plan, false), Arc::<Mutex<Vec<String>>>::default());
        let guests = Guests { faults: Scripted(Arc::clone(&faults)), done: Arc::clone(&done) };
        let driver = Arc::new(FakeDriver::new(guests));
        faults.of(&driver);
        let images = Arc::new(Images { made: AtomicU32::new(0) });
        let options = Options { waiting_vmms: 1, ..world.options(Settings { warm: 0, memory: 8192 }) };
        Self { faults, driver, images, done, options }
    }

    async fn open(&self) -> Result<Node, Broken> {
        let clock = Some(Clock::of(Arc::new(Time::of(&self.faults)?)));
        let options = Options { clock, ..self.options.clone() };
        let images = Arc::new(Handle(Arc::clone(&self.images)));
        Ok(Node::open_with(options, self.driver.clone(), images).await.map_err(|error| chain(&error))?)
    }

    /// A life, until it ends or is killed.
    pub fn live<T, F>(&self, work: impl FnOnce(Self, Node) -> F + Send + 'static) -> Option<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send,
    {
        let ground = self.clone();
        let lived = live(&self.faults, async move {
            let node = ground.open().await?;
            Ok::<_, Broken>(work(ground, node).await)
        });
        lived.unwrap().map(Result::unwrap)
    }

    /// What guests were told to do since the last look.
    pub fn commands(&self) -> Vec<String> {
        std::mem::take(&mut *self.done.lock().unwrap())
    }
}

/// What is not warming up.
pub fn builds_own(commands: &[String]) -> Vec<&str> {
    let warm = |text: &&str| text.contains("true") || text.contains("python3");
    commands.iter().map(String::as_str).filter(|text| !warm(text)).collect()
}

pub async fn settle(node: &Node) -> bool {
    let settled = async {
        while !node.is_settled() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(SETTLE, settled).await.is_ok()
}

pub fn step(instruction: Instruction, shown: &str) -> BuildStep {
    BuildStep { instruction, force: false, shown: shown.to_owned() }
}

pub fn run(command: &str) -> BuildStep {
    step(Instruction::Run { command: command.to_owned(), user: None, argv: None }, &format!("RUN {command}"))
}

pub fn hash() -> FilesHash {
    "ab".repeat(32).parse().unwrap()
}

pub fn copy(from: &str) -> BuildStep {
    let (files, from, to) = (hash(), from.to_owned(), "/app".to_owned());
    step(Instruction::Copy { files, from, to, owner: None, mode: Some(0o640) }, "COPY . /app")
}

pub fn web() -> TemplateName {
    "web".parse().unwrap()
}

/// A build that begins with an image of a registry.
pub fn of_image(reference: &str) -> BuildFrom {
    let reference = reference.to_owned();
    BuildFrom::Image { reference, credentials: None, reach: RegistryReach::Public }
}

/// One of each kind of step.
pub fn request(last: &str) -> Build {
    Build {
        build: BuildId::random(),
        template: web(),
        project: Project::default(),
        stages: Vec::new(),
        from: of_image("python:3.12"),
        steps: vec![
            run("write one"),
            step(Instruction::Env(vec![("PATH".to_owned(), "/app/bin:$PATH".to_owned())]), "ENV PATH"),
            step(Instruction::Workdir("/app".to_owned()), "WORKDIR /app"),
            copy("."),
            step(Instruction::User("app".to_owned()), "USER app"),
            run(last),
        ],
        force: false,
        start: Some("serve".to_owned()),
        ready: Some("curl localhost".to_owned()),
        kernel: None,
        vcpus: None,
        memory_mib: Some(MemoryMib(MEMORY)),
        disk_mib: None,
        min_free_mib: None,
        deadline: Duration::from_secs(3600),
    }
}

pub fn copy_from(stage: u32, from: &str) -> BuildStep {
    let (from, to) = (from.to_owned(), "/app".to_owned());
    step(Instruction::CopyFrom { stage, from, to, owner: None, mode: None }, "COPY --from /app")
}

/// A stage, and a build that copies from it.
pub fn staged(last: &str) -> Build {
    let stage = BuildStage { from: BuildFrom::Scratch, steps: vec![run("write lib")] };
    Build { stages: vec![stage], steps: vec![copy_from(0, "/out"), run(last)], ..request(last) }
}

pub async fn upload(node: &Node) -> Result<(), Failure> {
    let parts = ["an ", "archive"].map(|part| Ok(Bytes::from_static(part.as_bytes())));
    let content = futures::stream::iter(parts).boxed();
    NodeService::put_files(node, &Project::default(), &hash(), content).await
}

/// Builds, and reads what is told.
pub async fn build(node: &Node, request: Build) -> (Result<Built, BuildFailure>, Vec<BuildEvent>) {
    let (told, mut events) = tokio::sync::mpsc::channel(4);
    let reading = async {
        let mut all = Vec::new();
        while let Some(event) = events.recv().await {
            all.push(event);
        }
        all
    };
    tokio::join!(NodeService::build(node, request, told), reading)
}

/// Creates a sandbox of the newest version of a template.
pub fn create(
    node: &Node,
    template: TemplateName,
) -> impl Future<Output = Result<SandboxId, Failure>> + Send {
    let newest = newest(node.data_dir(), &template).map(|found| found.version());
    create_of(node, Base::Template(newest.unwrap_or(template.into())))
}

/// Creates a sandbox of this.
pub fn create_of(node: &Node, base: Base) -> impl Future<Output = Result<SandboxId, Failure>> + Send {
    let (node, sandbox) = (node.clone(), SandboxId::random());
    async move {
        let request = Create {
            sandbox: sandbox.clone(),
            project: Project::default(),
            base,
            vcpus: None,
            memory_mib: None,
            env_vars: EnvVars::new(),
            access_token: None,
            ends_at: node.clock().wall() + jiff::SignedDuration::from_hours(20),
            start_path: None,
            probe_tcp: false,
            network: Wanted::None,
            lifecycle: Lifecycle::default(),
            timeout: Duration::from_secs(72_000),
        };
        NodeService::create(&node, request).await.map(|_| sandbox)
    }
}

/// What must hold whenever nothing is under way.
pub async fn check(ground: &Ground, node: &Node) -> Vec<String> {
    let mut wrong = ground.driver.violations();
    let mut expect = |holds: bool, text: String| {
        if !holds {
            wrong.push(text);
        }
    };
    let (machines, root) = (ground.driver.machines(), ground.options.data_dir.clone());
    let Ok(info) = node.info().await else { return vec!["the node does not say what runs".to_owned()] };
    let (waiting, sandboxes) = (u64::from(info.waiting_vmms), node.live().len() as u64);
    let memory = waiting * OVERHEAD + sandboxes * (u64::from(MEMORY) + OVERHEAD);
    expect(
        machines.len() as u64 == waiting + sandboxes,
        format!("{} machines, {waiting} wait, {sandboxes} sandboxes", machines.len()),
    );
    expect(
        info.memory_reserved_mb == memory,
        format!("{} MiB are held, not {memory}", info.memory_reserved_mb),
    );
    expect(u64::from(info.vcpus_reserved) == sandboxes, format!("{} vCPUs are held", info.vcpus_reserved));
    let entries = u64::from(info.ledger_entries);
    expect(
        entries == 2 * machines.len() as u64,
        format!("{entries} entries for {} machines", machines.len()),
    );
    expect(names(&root.join("sandboxes")).len() == machines.len(), "directories are left".to_owned());
    expect(names(&root.join("staging")).is_empty(), format!("staged: {:?}", names(&root.join("staging"))));
    for layer in names(&root.join("layers")) {
        let path = root.join("layers").join(&layer);
        let text = std::fs::read_to_string(path.join("disk")).unwrap_or_default();
        expect(
            text.starts_with("image ") && path.join("layer.json").exists(),
            format!("layer {layer}: {text}"),
        );
    }
    wrong
}

/// The version of a template that was made last.
pub fn newest(root: &Path, name: &TemplateName) -> Option<Template> {
    let store = Store::open(root, false).unwrap();
    let made = |template: &Template| {
        let at = template.built.as_ref().map(|built| built.at);
        (at, store.template_stamp(&template.version()).unwrap().imported(), template.version())
    };
    let all = store.templates().unwrap().into_iter().filter(|template| template.name == *name);
    all.max_by_key(made)
}

/// The versions of `web`.
pub fn versions(root: &Path) -> Vec<TemplateVersion> {
    let all = Store::open(root, false).unwrap().templates().unwrap();
    all.iter().map(Template::version).filter(|version| version.name == web()).collect()
}

/// What is on the disk of the newest version of `web`, and it.
pub fn web_disk(root: &Path) -> Option<(Template, String)> {
    let store = Store::open(root, false).unwrap();
    let template = newest(root, &web())?;
    let text = std::fs::read_to_string(store.rootfs(&template.image)).unwrap();
    Some((template, text))
}

/// Puts a world back to how a case begins.
pub fn reset(world: &World) {
    assert!(world.reset().unwrap(), "the base's snapshot stays");
    let root = world.root();
    let store = Store::open(root, false).unwrap();
    let base = store.template(&"base".parse().unwrap()).unwrap();
    for version in versions(root) {
        store.remove_template(&version).unwrap();
    }
    for place in ["layers", "uploads", "images"] {
        for name in names(&root.join(place)).into_iter().filter(|name| *name != base.image) {
            std::fs::remove_dir_all(root.join(place).join(name)).unwrap();
        }
    }
}

pub fn plain() -> Plan {
    Plan { what: What::Nothing, at: 0, beside_at: u32::MAX, jitter: false, seed: 0, jump: 0 }
}
