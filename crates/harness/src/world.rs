//! Where cases happen: a data directory in memory with one template, and the lives of the daemons on it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http::Method;
use kelvin_api::error::chain;
use kelvin_api::units::MemoryMib;
use kelvin_control::{ApiKey, BuildOptions};
use kelvin_host::accel::Accelerator;
use kelvin_host::clock::Clock;
use kelvin_host::testing::{Virtual, keep_databases, remove_databases, restore_databases};
use kelvin_node::Node;
use kelvin_node::options::{Options, Rule};
use kelvin_server::Server;
use kelvin_store::Store;
use kelvin_store::import::{Import, Links};
use kelvin_vmm::testing::FakeDriver;
use serde_json::json;
use tempfile::TempDir;

use crate::client::{Ask, BLUES, Book, Client, Keys, Who};
use crate::faults::{Faults, Plan, Scripted, Time, What};

/// Memory of a machine, in MiB.
pub const MEMORY: u32 = 128;
/// How long everything may take to come to rest.
const SETTLE: Duration = Duration::from_secs(600);
/// How often it is looked whether it has; virtual time costs nothing.
const LOOK: Duration = Duration::from_millis(100);
/// How long the audit log and the control plane may be behind what they follow.
const BEHIND: Duration = Duration::from_millis(300);

/// What went wrong in a test itself.
pub type Broken = Box<dyn std::error::Error + Send + Sync>;

/// A data directory with a template that is baked, and API keys.
pub struct World {
    /// Removed with this.
    _directory: TempDir,
    bakes: BTreeSet<String>,
    /// Everybody's keys.
    pub keys: Arc<Keys>,
    options: Options,
}

/// How a node of a case is set.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Warm machines that are wanted.
    pub warm: u32,
    /// Memory of the node, in MiB.
    pub memory: u32,
}

/// One life of a daemon.
#[derive(Clone)]
pub struct Life {
    /// The node, to be looked at.
    pub node: Node,
    /// The whole.
    pub server: Server,
    /// Who asks it.
    pub client: Client,
}

fn memory_file_system() -> PathBuf {
    let shm = PathBuf::from("/dev/shm");
    if shm.is_dir() { shm } else { std::env::temp_dir() }
}

/// Names in a directory.
pub fn names(directory: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Runs `life` on a reactor of its own, whose time is virtual, until it ends or `faults` kill it. What it has not done
/// by then is dropped where it stands.
pub fn live<T: Send + 'static>(
    faults: &Arc<Faults>,
    life: impl Future<Output = T> + Send + 'static,
) -> Result<Option<T>, Broken> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build()?;
    let _virtual = Virtual::enter(Scripted(Arc::clone(faults)));
    let watched = Arc::clone(faults);
    let outcome = runtime.block_on(async move {
        watched.begin_life();
        let began = tokio::time::Instant::now();
        // On a task: what it writes is seen as what others write.
        let living = tokio::spawn(life);
        let outcome = tokio::select! {
            biased;
            () = watched.dead.notified() => None,
            ended = living => Some(ended),
        };
        watched.end_life(began.elapsed());
        outcome
    });
    drop(runtime);
    Ok(outcome.transpose()?)
}

impl World {
    /// Makes one.
    ///
    /// # Errors
    /// As the file system and the server give them.
    pub fn make() -> Result<Self, Broken> {
        kelvin_api::id::testing::seed(Some(0));
        let directory = tempfile::Builder::new().prefix("kelvin-harness-").tempdir_in(memory_file_system())?;
        let root = directory.path().canonicalize()?;
        let store = Store::open(&root, true)?;
        let file = root.join("file");
        // What a guest finds on its disk: nothing yet.
        std::fs::write(&file, "")?;
        let kernel = root.join("file-kernel");
        std::fs::write(&kernel, kelvin_store::kernel::SMALLEST)?;
        let import = Import {
            name: "base".parse()?,
            rootfs: &file,
            kernel: &kernel,
            initrd: &file,
            links: Links::Follow,
            vcpus: 1,
            memory_mib: MemoryMib(MEMORY),
        };
        store.import(&import, &mut |_| ())?;
        std::fs::remove_file(&file)?;
        std::fs::remove_file(&kernel)?;
        let options = Options {
            accelerator: Accelerator::Tcg,
            vcpus: 64,
            max_vcpus_each: 4,
            disk_floor_mib: 0,
            waiting_vmms: 1,
            concurrent_restores: 1,
            first_user: None,
            network: None,
            warm: Rule { min: 0, max: 0, max_age_s: 1800 },
            auto_bake: false,
            ..Options::for_host(root.clone())
        };
        let mut world = Self { _directory: directory, bakes: BTreeSet::new(), keys: Arc::default(), options };
        let nothing =
            Plan { what: What::Nothing, at: 0, beside_at: u32::MAX, jitter: false, seed: 0, jump: 0 };
        let faults = Faults::new(nothing, false);
        let driver = Arc::new(FakeDriver::new(Scripted(Arc::clone(&faults))));
        let options = world.options(Settings { warm: 0, memory: 8192 });
        let own = std::fs::read_to_string(root.join("api-key")).unwrap_or_default();
        let keys = live(&Arc::clone(&faults), async move {
            let own = Arc::new([own, String::new(), String::new()]);
            let life = open(options, driver, &faults, own, Book::default(), 0).await?;
            let own = std::fs::read_to_string(life.node.data_dir().join("api-key"))?.trim().to_owned();
            let keys = Arc::new([own.clone(), String::new(), String::new()]);
            let client = Client::new(&life.server, keys, Book::default(), faults, 0);
            let mut made = vec![own];
            for (who, limit) in [(Who::Blue, Some(BLUES)), (Who::Green, None)] {
                let body = json!({ "name": "k", "project": who.project(), "maxSandboxes": limit });
                let answer = client.ask(Who::Admin, Ask::post("/api-keys", "", body)).await;
                made.push(answer.text("key"));
            }
            let baked = client.ask(Who::Admin, Ask::post("/templates/{}/bake", "base", json!({}))).await;
            if !baked.is_good() {
                return Err(format!("no bake: {}", baked.body).into());
            }
            life.server.stop().await;
            Ok::<_, Broken>(made)
        })?;
        let keys = keys.ok_or("it died")??;
        world.keys = Arc::new(keys.try_into().map_err(|_| "keys are missing")?);
        world.bakes = names(&root.join("snapshots"));
        keep_databases(&root)?;
        Ok(world)
    }

    /// The data directory.
    pub fn root(&self) -> &Path {
        &self.options.data_dir
    }

    /// Snapshots of the template.
    pub fn bakes(&self) -> &BTreeSet<String> {
        &self.bakes
    }

    /// Options of a node in this directory.
    pub fn options(&self, settings: Settings) -> Options {
        Options {
            memory: MemoryMib(settings.memory),
            warm: Rule { min: settings.warm, max: settings.warm, max_age_s: 1800 },
            warm_memory: MemoryMib(settings.memory),
            ..self.options.clone()
        }
    }

    /// Puts everything back to how a case begins; whether that could be done, or the template's snapshot is gone. On the
    /// thread on which it was made.
    ///
    /// # Errors
    /// As the file system and the databases give them.
    pub fn reset(&self) -> Result<bool, Broken> {
        let root = self.root();
        restore_databases(root)?;
        let _ = std::fs::remove_file(root.join("pools.json"));
        for place in ["snapshots", "sandboxes", "staging"] {
            let place = root.join(place);
            for left in names(&place).difference(&self.bakes) {
                std::fs::remove_dir_all(place.join(left))?;
            }
        }
        Ok(names(&root.join("snapshots")) == self.bakes)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        remove_databases(self.root());
    }
}

/// Opens a daemon: as `kelvin serve` does, but for its listeners.
///
/// # Errors
/// As node and control plane give them.
pub async fn open(
    options: Options,
    driver: Arc<FakeDriver>,
    faults: &Arc<Faults>,
    keys: Arc<Keys>,
    book: Book,
    life: u32,
) -> Result<Life, Broken> {
    let options = Options { clock: Some(Clock::of(Arc::new(Time::of(faults)?))), ..options };
    let node = Node::open(options, driver).await.map_err(|error| chain(&error))?;
    let key = ApiKey::open(&node.data_dir().join("api-key"))?;
    let server = Server::open(node.clone(), key, None, BuildOptions::default())
        .await
        .map_err(|error| chain(&error))?;
    let client = Client::new(&server, keys, book, Arc::clone(faults), life);
    Ok(Life { node, server, client })
}

impl Life {
    /// Waits until nothing is being prepared, torn down or followed any more; whether it came to that within `limit`.
    pub async fn settle_within(&self, limit: Duration) -> bool {
        let settled = async {
            loop {
                if self.node.is_settled() {
                    return;
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        let settled = tokio::time::timeout(limit, settled).await.is_ok();
        tokio::time::sleep(BEHIND).await;
        settled
    }

    /// The same, for as long as it may take when something went wrong.
    pub async fn settle(&self) -> bool {
        self.settle_within(SETTLE).await
    }

    /// Deletes `what` as its owner.
    pub async fn delete(&self, who: Who, route: &'static str, what: &str) -> u16 {
        self.client.ask(who, Ask::new(Method::DELETE, route, what)).await.status
    }
}
