//! Builds of templates over the fake driver: what goes wrong at each of their steps, what comes beside them, and what is left.
//!
//! A case: the template `web` is there, built before. It is built anew, and at one step something goes wrong: the step fails, is
//! slow, the VMM ends, the guest falls silent or powers off, the daemon is killed or stopped; or somebody cancels, builds the
//! same name, or creates a sandbox of it. Then nothing may be held that nobody has, and `web` is the old one or the new one.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use kelvin_api::account::Project;
use kelvin_api::error::{ErrorCode, Failure, chain};
use kelvin_api::id::{BuildId, FilesHash, SandboxId, TemplateName, VmId};
use kelvin_api::network::Wanted;
use kelvin_api::sandbox::{EnvVars, Lifecycle};
use kelvin_api::units::MemoryMib;
use kelvin_harness::faults::{Faults, Plan, Scripted, Time, What};
use kelvin_harness::world::{Broken, MEMORY, Settings, World, live, names};
use kelvin_host::clock::Clock;
use kelvin_node::options::Options;
use kelvin_node::{BaseImage, BaseImages, ImageConfig, ImageSource, Node, Told};
use kelvin_node_api::{
    Base, Build, BuildEvent, BuildFailure, BuildFrom, BuildStep, Built, Create, Instruction, NodeService,
};
use kelvin_store::Store;
use kelvin_store::image::Template;
use kelvin_vmm::testing::{Call, Exec, FakeDriver, Script, Step};

/// Memory that a VMM is counted with beside its guest's, in MiB.
const OVERHEAD: u64 = 48;
/// How long everything may take to come to rest, and a build to be answered.
const SETTLE: Duration = Duration::from_secs(1200);

/// Images that are nothing but their reference.
struct Images {
    made: AtomicU32,
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

    async fn make(&self, target: &Path, _: u64, told: &Told) -> Result<(), Failure> {
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
            _ => Err(Failure::new(ErrorCode::InvalidImage, "no registry's", "name one")),
        }
    }
}

/// Faults, and commands that do what their text says: `fail` ends with 3, `write` leaves itself on the disk.
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
            what if what.contains("; fail") || what.starts_with("run fail") || what.contains("from=fail") => {
                Exec { code: 3, output: "\u{1b}[31mfirst line\nno such thing\n".to_owned(), writes: false }
            }
            what if what.starts_with("read") => Exec { output: "said before\n".into(), ..Exec::default() },
            _ => Exec { code: 0, output: "done\n".to_owned(), writes },
        }
    }
}

/// What all lives of a case have in common.
#[derive(Clone)]
struct Ground {
    faults: Arc<Faults>,
    driver: Arc<FakeDriver>,
    images: Arc<Images>,
    done: Arc<Mutex<Vec<String>>>,
    options: Options,
}

impl Ground {
    fn new(world: &World, plan: Plan) -> Self {
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
    fn live<T, F>(&self, work: impl FnOnce(Self, Node) -> F + Send + 'static) -> Option<T>
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
    fn commands(&self) -> Vec<String> {
        std::mem::take(&mut *self.done.lock().unwrap())
    }
}

/// What is not warming up.
fn builds_own(commands: &[String]) -> Vec<&str> {
    let warm = |text: &&str| text.contains("true") || text.contains("python3");
    commands.iter().map(String::as_str).filter(|text| !warm(text)).collect()
}

async fn settle(node: &Node) -> bool {
    let settled = async {
        while !node.is_settled() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(SETTLE, settled).await.is_ok()
}

fn step(instruction: Instruction, shown: &str) -> BuildStep {
    BuildStep { instruction, force: false, shown: shown.to_owned() }
}

fn run(command: &str) -> BuildStep {
    step(Instruction::Run { command: command.to_owned(), user: None }, &format!("RUN {command}"))
}

fn hash() -> FilesHash {
    "ab".repeat(32).parse().unwrap()
}

fn copy(from: &str) -> BuildStep {
    let (files, from, to) = (hash(), from.to_owned(), "/app".to_owned());
    step(Instruction::Copy { files, from, to, owner: None, mode: Some(0o640) }, "COPY . /app")
}

fn web() -> TemplateName {
    "web".parse().unwrap()
}

/// One of each kind of step.
fn request(last: &str) -> Build {
    Build {
        build: BuildId::random(),
        template: web(),
        project: Project::default(),
        from: BuildFrom::Image { reference: "python:3.12".to_owned(), credentials: None },
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
        vcpus: None,
        memory_mib: Some(MemoryMib(MEMORY)),
        disk_mib: None,
        deadline: Duration::from_secs(3600),
    }
}

async fn upload(node: &Node) -> Result<(), Failure> {
    let parts = ["an ", "archive"].map(|part| Ok(Bytes::from_static(part.as_bytes())));
    let content = futures::stream::iter(parts).boxed();
    NodeService::put_files(node, &Project::default(), &hash(), content).await
}

/// Builds, and reads what is told.
async fn build(node: &Node, request: Build) -> (Result<Built, BuildFailure>, Vec<BuildEvent>) {
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

fn create(node: &Node, template: TemplateName) -> impl Future<Output = Result<SandboxId, Failure>> + Send {
    let (node, sandbox) = (node.clone(), SandboxId::random());
    async move {
        let request = Create {
            sandbox: sandbox.clone(),
            project: Project::default(),
            base: Base::Template(template),
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
async fn check(ground: &Ground, node: &Node) -> Vec<String> {
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

/// What is on the disk of `web`, and it.
fn web_disk(root: &Path) -> Option<(Template, String)> {
    let store = Store::open(root, false).unwrap();
    let template = store.template(&web()).ok()?;
    let text = std::fs::read_to_string(store.rootfs(&template.image)).unwrap();
    Some((template, text))
}

/// Puts a world back to how a case begins.
fn reset(world: &World) {
    assert!(world.reset().unwrap(), "the base's snapshot stays");
    let root = world.root();
    let store = Store::open(root, false).unwrap();
    let base = store.template(&"base".parse().unwrap()).unwrap();
    let _ = std::fs::remove_file(root.join("templates/web.json"));
    for place in ["layers", "uploads", "images"] {
        for name in names(&root.join(place)).into_iter().filter(|name| *name != base.image) {
            std::fs::remove_dir_all(root.join(place).join(name)).unwrap();
        }
    }
}

fn plain() -> Plan {
    Plan { what: What::Nothing, at: 0, beside_at: u32::MAX, jitter: false, seed: 0, jump: 0 }
}

#[test]
fn what_has_not_changed_is_not_done_again() {
    let world = World::make().unwrap();
    let ground = Ground::new(&world, plain());
    ground.live(|ground, node| async move {
        settle(&node).await;
        upload(&node).await.unwrap();
        assert!(NodeService::has_files(&node, &Project::default(), &hash()).await.unwrap());
        ground.commands();
        let (built, events) = build(&node, request("write last")).await;
        let built = built.unwrap();
        assert_eq!((built.cached_steps, built.template.template_id.as_str()), (0, "web"));
        let commands = ground.commands();
        let commands = builds_own(&commands);
        let (template, disk) = web_disk(&ground.options.data_dir).unwrap();
        assert_eq!((template.user.as_deref(), template.workdir.as_deref()), (Some("app"), Some("/app")));
        assert_eq!(template.env["PATH"], "/app/bin:/image/bin");
        for part in [
            "image python:3.12",
            "run export PATH='/image/bin'; write one",
            "mkdir {\"path\":\"/app\"}",
            "from=%2E&to=%2Fapp&owner=user&mode=640&workdir=%2Fapp 10",
            "run export PATH='/app/bin:/image/bin'; write last",
            r#"files path=%2Fetc%2Fkelvin%2Fimage%2Ejson&username=root {"env":{"PATH":"/app/bin:/image/bin"},"workdir":"/app","user":"app"}"#,
        ] {
            assert!(disk.contains(part), "{part:?} is not in {disk}");
        }
        // The service is started in the machine that is saved, and asked.
        assert!(commands.iter().any(|text| text.contains("kelvin-start.log") && text.ends_with("serve")));
        assert!(commands.iter().any(|text| text.ends_with("curl localhost")));
        let shown: Vec<(Option<u32>, &str)> =
            events.iter().map(|event| (event.step, event.message.as_str())).collect();
        assert!(shown.contains(&(Some(0), "RUN write one")) && shown.contains(&(Some(0), "done")), "{shown:?}");
        settle(&node).await;
        assert_eq!(check(&ground, &node).await, Vec::<String>::new());

        // Nothing has changed: no machine runs.
        ground.commands();
        let before = ground.faults.count();
        let (again, _) = build(&node, request("write last")).await;
        assert_eq!(again.unwrap().cached_steps, 6);
        assert_eq!(web_disk(&ground.options.data_dir).unwrap().0.image, template.image);
        settle(&node).await;
        let commands = ground.commands();
        assert_eq!(builds_own(&commands), Vec::<&str>::new());
        assert_eq!(ground.images.made.load(Ordering::Relaxed), 1);
        assert_eq!(ground.faults.count(), before);

        // The last line has changed: one step is done.
        let (changed, _) = build(&node, request("write another")).await;
        assert_eq!(changed.unwrap().cached_steps, 5);
        let commands = ground.commands();
        let runs = builds_own(&commands).into_iter().filter(|text| text.contains("write")).count();
        assert_eq!(runs, 1, "{commands:?}");
        // Another ready command is another snapshot of the same disk.
        let other = Build { ready: Some("curl other".to_owned()), ..request("write another") };
        let (other, _) = build(&node, other).await;
        assert_eq!(other.unwrap().cached_steps, 6);
        assert!(ground.commands().iter().any(|text| text.ends_with("curl other")));
        // A sandbox of it is a clone.
        settle(&node).await;
        create(&node, web()).await.unwrap();
        settle(&node).await;
        assert_eq!(check(&ground, &node).await, Vec::<String>::new());

        // Forced: all is done.
        let forced = Build { force: true, ..request("write another") };
        assert_eq!(build(&node, forced).await.0.unwrap().cached_steps, 0);
        let mut last = request("write another");
        last.steps[3].force = true;
        assert_eq!(build(&node, last).await.0.unwrap().cached_steps, 3);
        // Gone: no create finds it, and what was made of it stays.
        NodeService::remove_template(&node, &web()).await.unwrap();
        let gone = NodeService::remove_template(&node, &web()).await.unwrap_err();
        assert_eq!(gone.error_code, ErrorCode::TemplateNotFound);
        assert!(create(&node, web()).await.is_err());
        settle(&node).await;
        assert_eq!(check(&ground, &node).await, Vec::<String>::new());
        assert_eq!(node.live().len(), 1);
        let garbage = NodeService::collect(&node, false).await.unwrap();
        assert!(!garbage.images.is_empty() && garbage.guests.is_empty(), "{garbage:?}");
        assert_eq!(check(&ground, &node).await, Vec::<String>::new());
        node.stop().await;
    });
    ground.driver.kill_all();
}

#[test]
fn a_build_on_a_template_goes_on_where_that_has_ended() {
    let world = World::make().unwrap();
    let ground = Ground::new(&world, plain());
    ground.live(|ground, node| async move {
        settle(&node).await;
        upload(&node).await.unwrap();
        build(&node, request("write last")).await.0.unwrap();
        let on = |steps: Vec<BuildStep>| Build {
            template: "next".parse().unwrap(),
            from: BuildFrom::Template(web()),
            steps,
            start: None,
            ready: None,
            ..request("")
        };
        build(&node, on(vec![run("write more")])).await.0.unwrap();
        let store = Store::open(&ground.options.data_dir, false).unwrap();
        let next = store.template(&"next".parse().unwrap()).unwrap();
        let disk = std::fs::read_to_string(store.rootfs(&next.image)).unwrap();
        assert!(disk.contains("write last") && disk.contains("write more"), "{disk}");
        assert_eq!((next.user.as_deref(), &next.service), (Some("app"), &None));
        // Without a step it is the same image under another name, and no machine of the builder's runs.
        ground.commands();
        build(&node, on(Vec::new())).await.0.unwrap();
        let same = store.template(&"next".parse().unwrap()).unwrap();
        assert_eq!(same.image, web_disk(&ground.options.data_dir).unwrap().0.image);
        let commands = ground.commands();
        assert_eq!(builds_own(&commands), Vec::<&str>::new());
        settle(&node).await;
        assert_eq!(check(&ground, &node).await, Vec::<String>::new());
        node.stop().await;
    });
    ground.driver.kill_all();
}

#[test]
fn a_build_that_fails_names_its_step_and_leaves_the_template() {
    let world = World::make().unwrap();
    let ground = Ground::new(&world, plain());
    ground.live(|ground, node| async move {
        settle(&node).await;
        let missing = build(&node, request("write last")).await.0.unwrap_err();
        assert_eq!((missing.step, missing.failure.error_code), (Some(3), ErrorCode::FilesMissing));
        upload(&node).await.unwrap();
        build(&node, request("write old")).await.0.unwrap();
        let old = web_disk(&ground.options.data_dir).unwrap();
        let with = |at: usize, step: BuildStep| {
            let mut request = request("write new");
            request.steps[at] = step;
            request
        };
        let workdir = step(Instruction::Workdir(String::new()), "WORKDIR");
        let absent = BuildFrom::Image { reference: "absent".to_owned(), credentials: None };
        let unknown = BuildFrom::Template("nothing".parse().unwrap());
        let cases = [
            (with(0, run("fail")), Some(0), ErrorCode::BuildStepFailed, "RUN fail failed with exit code 3"),
            (with(5, run("fail")), Some(5), ErrorCode::BuildStepFailed, "RUN fail failed with exit code 3"),
            (with(3, copy("fail")), Some(3), ErrorCode::BuildStepFailed, "COPY . /app failed"),
            (with(2, workdir), Some(2), ErrorCode::InvalidStep, "WORKDIR has no path"),
            (Build { from: absent, ..request("x") }, None, ErrorCode::ImageNotFound, "no such image"),
            (
                Build { from: unknown, ..request("x") },
                None,
                ErrorCode::TemplateNotFound,
                "no template nothing",
            ),
            (
                Build { start: Some(" ".into()), ..request("x") },
                None,
                ErrorCode::InvalidStep,
                "start command",
            ),
            (
                Build { start: Some("fail".into()), ..request("x") },
                None,
                ErrorCode::BuildStepFailed,
                "the start command ended before it was ready, with exit code 3",
            ),
            (
                Build { ready: Some("fail".into()), ..request("x") },
                None,
                ErrorCode::BuildStepFailed,
                "not ready within 300 s",
            ),
            (
                Build { memory_mib: Some(MemoryMib(1)), ..request("x") },
                None,
                ErrorCode::InvalidShape,
                "memoryMB",
            ),
            (
                Build { memory_mib: Some(MemoryMib(8140)), ..request("x") },
                None,
                ErrorCode::CapacityExhausted,
                "no room",
            ),
            (
                Build { deadline: Duration::ZERO, ..request("x") },
                None,
                ErrorCode::BuildDeadline,
                "longer than 0 s",
            ),
        ];
        for (request, step, code, text) in cases {
            let failed = build(&node, request).await.0.unwrap_err();
            let failure = &failed.failure;
            assert_eq!((failed.step, failure.error_code), (step, code), "{failed:?}");
            assert!(failure.message.contains(text), "{failure:?}");
            if text.contains("exit code 3") && step.is_some() {
                assert_eq!(failure.cause.as_deref(), Some("first line\nno such thing"), "{failure:?}");
            } else if step.is_none() && code == ErrorCode::BuildStepFailed {
                assert_eq!(failure.cause.as_deref(), Some("said before"), "{failure:?}");
            }
            settle(&node).await;
            assert_eq!(check(&ground, &node).await, Vec::<String>::new());
            assert_eq!(web_disk(&ground.options.data_dir).unwrap(), old);
        }
        // A step that failed has left those before it cached.
        ground.commands();
        build(&node, with(5, run("write mended"))).await.0.unwrap();
        let commands = ground.commands();
        assert_eq!(builds_own(&commands).iter().filter(|text| text.contains("write")).count(), 1);
        // Without a ready command: one that ends well is ready.
        build(&node, Build { ready: None, ..request("write mended") }).await.0.unwrap();
        node.stop().await;
    });
    ground.driver.kill_all();
}

/// What comes beside the build that a case is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meanwhile {
    Nothing,
    Cancel,
    Supersede,
    Create,
    Collect,
}

/// Does a case; what should not have been.
fn case(world: &World, plan: Plan, meanwhile: Meanwhile) -> (Vec<String>, u32) {
    let ground = Ground::new(world, plan);
    let lived = ground.live(move |ground, node| async move {
        settle(&node).await;
        upload(&node).await.unwrap();
        build(&node, request("write old")).await.0.unwrap();
        settle(&node).await;
        ground.faults.arm();
        let wanted = Build { force: plan.seed % 2 == 0, ..request("write new") };
        let id = wanted.build.clone();
        let beside = async {
            if meanwhile == Meanwhile::Nothing {
                return Vec::new();
            }
            let _ = tokio::time::timeout(SETTLE, ground.faults.beside.notified()).await;
            match meanwhile {
                Meanwhile::Nothing => {}
                Meanwhile::Cancel => {
                    if let Err(failure) = NodeService::cancel_build(&node, &id).await
                        && failure.error_code != ErrorCode::BuildNotFound
                    {
                        return vec![format!("cancelling: {failure:?}")];
                    }
                }
                Meanwhile::Supersede => {
                    let (built, _) = build(&node, request("write newest")).await;
                    if let Err(failure) = built {
                        return vec![format!("the later one: {failure:?}")];
                    }
                }
                Meanwhile::Create => {
                    let made = create(&node, web()).await;
                    if let Err(failure) = made {
                        return vec![format!("creating: {failure:?}")];
                    }
                }
                Meanwhile::Collect => {
                    if let Err(failure) = NodeService::collect(&node, false).await {
                        return vec![format!("collecting: {failure:?}")];
                    }
                }
            }
            Vec::new()
        };
        let stopping = async {
            ground.faults.stop.notified().await;
            node.stop().await;
        };
        let both = async { tokio::join!(build(&node, wanted), beside) };
        let stopped = tokio::select! {
            biased;
            answered = tokio::time::timeout(SETTLE, both) => Some(answered),
            () = stopping => None,
        };
        ground.faults.disarm();
        let mut wrong = Vec::new();
        let mut expected = vec!["write old", "write new"];
        match stopped {
            None => return (vec![], expected, true),
            Some(Err(_)) => wrong.push("no answer".to_owned()),
            Some(Ok(((built, _), beside))) => {
                wrong.extend(beside);
                let code = built.as_ref().err().map(|failed| failed.failure.error_code);
                match (meanwhile, code) {
                    (Meanwhile::Supersede, None | Some(ErrorCode::BuildSuperseded)) => {
                        expected = vec!["write newest"];
                    }
                    (_, None) => expected = vec!["write new"],
                    (Meanwhile::Cancel, Some(ErrorCode::BuildCancelled)) => expected = vec!["write old"],
                    (_, Some(_)) if plan.what != What::Nothing => expected = vec!["write old"],
                    (_, Some(code)) => wrong.push(format!("it failed: {code}")),
                }
            }
        }
        if !settle(&node).await {
            wrong.push("it does not come to rest".to_owned());
        }
        // What could not be released is tried again.
        tokio::time::sleep(Duration::from_secs(65)).await;
        settle(&node).await;
        wrong.extend(check(&ground, &node).await);
        for live in node.live() {
            NodeService::kill(&node, &live.sandbox).await.unwrap();
        }
        settle(&node).await;
        node.stop().await;
        (wrong, expected, false)
    });
    let (mut wrong, expected, again) = lived.unwrap_or((Vec::new(), vec!["write old", "write new"], true));
    let template = |wrong: &mut Vec<String>, expected: &[&str]| match web_disk(world.root()) {
        Some((_, disk)) if expected.iter().any(|text| disk.lines().any(|line| line.ends_with(text))) => {}
        other => wrong.push(format!("web is {other:?}, not {expected:?}")),
    };
    template(&mut wrong, &expected);
    if again {
        let after = ground.live(|ground, node| async move {
            ground.faults.disarm();
            settle(&node).await;
            let mut wrong = check(&ground, &node).await;
            // It goes on from what is cached.
            if let Err(failed) = build(&node, request("write new")).await.0 {
                wrong.push(format!("after a restart: {failed:?}"));
            }
            settle(&node).await;
            wrong.extend(check(&ground, &node).await);
            node.stop().await;
            wrong
        });
        wrong.extend(after.unwrap_or_else(|| vec!["killed again".to_owned()]));
        template(&mut wrong, &["write new"]);
    }
    if !ground.driver.machines().is_empty() {
        wrong.push(format!("after the end: {:?}", ground.driver.machines()));
    }
    ground.driver.kill_all();
    (wrong, ground.faults.count())
}

/// Steps of a build at which nothing goes wrong. Every other one is made with everything forced: those have more.
fn steps(world: &World, seed: u64) -> u32 {
    let (wrong, steps) = case(world, Plan { seed, ..plain() }, Meanwhile::Nothing);
    assert_eq!(wrong, Vec::<String>::new());
    reset(world);
    assert!(steps > 30, "{steps}");
    steps
}

#[test]
fn whatever_goes_wrong_at_any_step_nothing_is_held_and_the_template_is_old_or_new() {
    let world = World::make().unwrap();
    let (mut cases, mut wrong) = (0, BTreeMap::new());
    for seed in 0..2 {
        let count = steps(&world, seed);
        for at in 1..=count {
            for what in [
                What::Fail,
                What::Kill,
                What::Stop,
                What::Crash,
                What::Silence,
                What::PowerOff,
                What::Slow(70),
            ] {
                let plan = Plan { what, at, seed, ..plain() };
                let (violations, _) = case(&world, plan, Meanwhile::Nothing);
                cases += 1;
                if !violations.is_empty() {
                    wrong.insert(format!("{what:?} at {at} of {count}, seed {seed}"), violations);
                }
                reset(&world);
            }
        }
    }
    println!("{cases} cases");
    assert!(wrong.is_empty(), "{} wrong: {wrong:#?}", wrong.len());
}

#[test]
fn whatever_comes_beside_it_at_any_step_the_later_wins_and_nothing_is_held() {
    let world = World::make().unwrap();
    let (mut cases, mut wrong) = (0, BTreeMap::new());
    for seed in 0..2 {
        let count = steps(&world, seed);
        for beside_at in 0..=count {
            for meanwhile in [Meanwhile::Cancel, Meanwhile::Supersede, Meanwhile::Create, Meanwhile::Collect]
            {
                let plan = Plan { beside_at, seed, jitter: true, ..plain() };
                let (violations, _) = case(&world, plan, meanwhile);
                cases += 1;
                if !violations.is_empty() {
                    wrong.insert(format!("{meanwhile:?} at {beside_at} of {count}, seed {seed}"), violations);
                }
                reset(&world);
            }
        }
    }
    println!("{cases} cases");
    assert!(wrong.is_empty(), "{} wrong: {wrong:#?}", wrong.len());
}
