//! A case: what is there, what is asked, what goes wrong at which step, and what is asked beside it.

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use kelvin_vmm::testing::FakeDriver;
use serde_json::{Value, json};

use crate::Random;
use crate::check::{self, Violation};
use crate::client::{Ask, Book, Client, Sent, Who};
use crate::faults::{Faults, Hit, Plan, Scripted, What};
use crate::world::{self, Broken, Life, Settings, World, live};

/// How long a sandbox lives that is not to end by itself, in seconds: longer than any case.
const LONG: u64 = 80_000;
/// How long one lives that is, in seconds.
pub const SHORT: u64 = 20;
/// Lives of a daemon in one case.
const LIVES: u32 = 5;
/// How long a request may take, whatever goes wrong.
pub const ANSWERED: Duration = Duration::from_secs(400);

/// What is tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum Scenario {
    CreateClone,
    CreateWarm,
    CreateCold,
    CreateFromSnapshot,
    CreateEvicting,
    PauseClone,
    PauseBooted,
    PauseDisk,
    ResumeMemory,
    ResumeDisk,
    ConnectPaused,
    WakeByTraffic,
    SnapshotRunning,
    SnapshotPaused,
    ForkRunning,
    ForkPaused,
    KillRunning,
    KillPaused,
    SetTimeout,
    EndAtDeadline,
    PauseAtDeadline,
    Bake,
    DeleteSnapshot,
    AdoptStopped,
    AdoptKilled,
}

impl Scenario {
    /// All of them.
    pub const ALL: [Self; 25] = [
        Self::CreateClone,
        Self::CreateWarm,
        Self::CreateCold,
        Self::CreateFromSnapshot,
        Self::CreateEvicting,
        Self::PauseClone,
        Self::PauseBooted,
        Self::PauseDisk,
        Self::ResumeMemory,
        Self::ResumeDisk,
        Self::ConnectPaused,
        Self::WakeByTraffic,
        Self::SnapshotRunning,
        Self::SnapshotPaused,
        Self::ForkRunning,
        Self::ForkPaused,
        Self::KillRunning,
        Self::KillPaused,
        Self::SetTimeout,
        Self::EndAtDeadline,
        Self::PauseAtDeadline,
        Self::Bake,
        Self::DeleteSnapshot,
        Self::AdoptStopped,
        Self::AdoptKilled,
    ];

    /// Whether the start of a daemon is tested, and not a request.
    pub fn is_start(self) -> bool {
        matches!(self, Self::AdoptStopped | Self::AdoptKilled)
    }

    fn settings(self) -> Settings {
        match self {
            Self::CreateWarm => Settings { warm: 1, memory: 8192 },
            // Room for one machine beside the one that waits, and a VMM: the warm one has to go.
            Self::CreateEvicting => Settings { warm: 1, memory: 2 * (world::MEMORY + 48) + 60 },
            _ => Settings { warm: 0, memory: 8192 },
        }
    }
}

/// What is asked beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Beside {
    Nothing,
    Kill,
    Pause,
    Resume,
    Connect,
    SetTimeout,
    Snapshot,
    Fork,
    Look,
    /// The same project creates another.
    Create,
    /// Another project does.
    Neighbour,
}

impl Beside {
    const ALL: [Self; 14] = [
        Self::Nothing,
        Self::Nothing,
        Self::Nothing,
        Self::Kill,
        Self::Pause,
        Self::Resume,
        Self::Connect,
        Self::SetTimeout,
        Self::Snapshot,
        Self::Fork,
        Self::Look,
        Self::Create,
        Self::Neighbour,
        Self::Neighbour,
    ];
}

/// Whether and how the daemon is started again afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Again {
    No,
    Stopped,
    Killed,
}

/// One case.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// What it follows from.
    pub seed: u64,
    /// What is tested.
    pub scenario: Scenario,
    /// What goes wrong.
    pub plan: Plan,
    /// What is asked beside it.
    pub beside: Beside,
    /// What comes afterwards.
    pub again: Again,
}

/// Steps that each scenario has when all goes well.
pub type Steps = Vec<u32>;

impl Case {
    /// The case of `seed`: consecutive seeds go through every fault at every step of every scenario.
    pub fn of(seed: u64, steps: &[u32]) -> Self {
        let each = |index: usize| u64::from(steps[index]) * What::ALL.len() as u64;
        let all: u64 = (0..Scenario::ALL.len()).map(each).sum();
        // Spread: a short run has something of everything.
        let mut at = (seed % all) * spread(all) % all;
        let mut index = 0;
        while at >= each(index) {
            at -= each(index);
            index += 1;
        }
        let faults = What::ALL.len() as u64;
        let what = What::ALL[usize::try_from(at % faults).unwrap_or_default()];
        let step = u32::try_from(at / faults).unwrap_or_default();
        let mut random = Random::new(seed);
        let beside = random.of(&Beside::ALL);
        let mut plan = Plan {
            what,
            at: step + 1,
            beside_at: u32::try_from(random.below(u64::from(steps[index]) + 2)).unwrap_or_default(),
            jitter: random.below(2) == 0,
            seed: random.draw(),
            jump: 0,
        };
        let again = random.of(&[Again::No, Again::No, Again::Stopped, Again::Killed]);
        plan.jump = random.of(&[0, 0, 1, -1]);
        Self { seed, scenario: Scenario::ALL[index], plan, beside, again }
    }

    /// The same when nothing goes wrong, to count its steps.
    pub fn plain(scenario: Scenario) -> Self {
        let plan = Plan { what: What::Nothing, at: 0, beside_at: u32::MAX, jitter: false, seed: 0, jump: 0 };
        Self { seed: 0, scenario, plan, beside: Beside::Nothing, again: Again::No }
    }
}

/// A number that has no divisor in common with `all`, about its golden section.
fn spread(all: u64) -> u64 {
    let divisor = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    (all * 618 / 1000..).find(|number| divisor(*number, all) == 1).unwrap_or(1)
}

/// What a case begins with.
#[derive(Debug, Clone, Default)]
pub struct Scene {
    /// The sandbox that it is about.
    pub subject: String,
    /// Another project's.
    pub bystander: String,
    /// A snapshot that is kept.
    pub snapshot: String,
    /// What callers of the subject must show.
    pub token: String,
    /// Requests that it took.
    pub asked: usize,
}

/// How a case went.
#[derive(Debug)]
pub struct Report {
    /// What should not have been.
    pub violations: Vec<Violation>,
    /// Where the fault happened.
    pub hit: Option<Hit>,
    /// Steps that were counted.
    pub steps: u32,
    /// What tells one run from another.
    pub trace: u64,
    /// The steps, when they were written down.
    pub log: Vec<String>,
    /// What was asked, in the order in which it was sent.
    pub book: Vec<Arc<Sent>>,
    /// What the case began with.
    pub scene: Scene,
}

fn new_sandbox(template: &str, path: Option<&str>, timeout: u64, more: Value) -> Ask {
    let mut body = json!({ "templateID": template, "timeout": timeout });
    if let Some(path) = path {
        body["startPath"] = path.into();
    }
    if let (Value::Object(body), Value::Object(more)) = (&mut body, more) {
        body.extend(more);
    }
    Ask::post("/sandboxes", "", body)
}

async fn must(client: &Client, who: Who, ask: Ask) -> Result<Value, Broken> {
    let what = format!("{} {}", ask.method, ask.route);
    let answer = client.ask(who, ask).await;
    if answer.is_good() {
        return Ok(answer.body.clone());
    }
    Err(format!("setting the scene: {what} answered {} {}", answer.status, answer.body).into())
}

fn id(body: &Value) -> String {
    body["sandboxID"].as_str().unwrap_or_default().to_owned()
}

fn short(seconds: u64) -> Value {
    json!({ "timeout": seconds })
}

/// Makes what a scenario begins with.
async fn set(life: &Life, scenario: Scenario) -> Result<Scene, Broken> {
    let client = &life.client;
    let mut scene = Scene::default();
    if scenario != Scenario::CreateEvicting {
        let bystander = new_sandbox("base", None, LONG, json!({}));
        scene.bystander = id(&must(client, Who::Green, bystander).await?);
    }
    let (path, timeout, more) = match scenario {
        Scenario::CreateClone
        | Scenario::CreateWarm
        | Scenario::CreateCold
        | Scenario::CreateEvicting
        | Scenario::Bake => {
            life.settle().await;
            return Ok(scene);
        }
        Scenario::PauseBooted => ("cold", LONG, json!({})),
        Scenario::EndAtDeadline => ("clone", SHORT, json!({})),
        Scenario::PauseAtDeadline => ("clone", SHORT, json!({ "autoPause": true })),
        Scenario::WakeByTraffic => {
            ("clone", LONG, json!({ "autoPause": true, "autoResume": { "enabled": true } }))
        }
        _ => ("clone", LONG, json!({})),
    };
    let made = must(client, Who::Blue, new_sandbox("base", Some(path), timeout, more)).await?;
    scene.subject = id(&made);
    scene.token = made["envdAccessToken"].as_str().unwrap_or_default().to_owned();
    let subject = scene.subject.clone();
    let pause = || Ask::post("/sandboxes/{}/pause", &subject, json!({}));
    match scenario {
        Scenario::ResumeMemory
        | Scenario::ResumeDisk
        | Scenario::ConnectPaused
        | Scenario::WakeByTraffic
        | Scenario::SnapshotPaused
        | Scenario::ForkPaused
        | Scenario::KillPaused => drop(must(client, Who::Blue, pause()).await?),
        Scenario::CreateFromSnapshot | Scenario::DeleteSnapshot => {
            let ask = Ask::post("/sandboxes/{}/snapshots", &subject, json!({ "name": "kept" }));
            let kept = must(client, Who::Blue, ask).await?;
            scene.snapshot = kept["snapshotID"].as_str().unwrap_or_default().to_owned();
        }
        Scenario::AdoptStopped | Scenario::AdoptKilled => {
            // One that was resumed, one that was forked from it, one that is paused.
            must(client, Who::Blue, pause()).await?;
            let ask = Ask::post("/sandboxes/{}/resume", &subject, short(LONG));
            must(client, Who::Blue, ask).await?;
            must(client, Who::Blue, Ask::post("/sandboxes/{}/fork", &subject, short(LONG))).await?;
            let third = must(client, Who::Blue, new_sandbox("base", Some("clone"), LONG, json!({}))).await?;
            must(client, Who::Blue, Ask::post("/sandboxes/{}/pause", &id(&third), json!({}))).await?;
        }
        _ => {}
    }
    life.settle().await;
    Ok(scene)
}

/// The request that a scenario tests.
pub fn request(scenario: Scenario, scene: &Scene) -> Option<(Who, Ask)> {
    let subject = scene.subject.as_str();
    let ask = match scenario {
        Scenario::CreateClone => new_sandbox("base", Some("clone"), LONG, json!({})),
        Scenario::CreateWarm | Scenario::CreateEvicting => new_sandbox("base", None, LONG, json!({})),
        Scenario::CreateCold => new_sandbox("base", Some("cold"), LONG, json!({})),
        Scenario::CreateFromSnapshot => new_sandbox("kept", None, LONG, json!({})),
        Scenario::PauseClone | Scenario::PauseBooted => Ask::post("/sandboxes/{}/pause", subject, json!({})),
        Scenario::PauseDisk => Ask::post("/sandboxes/{}/pause", subject, json!({ "memory": false })),
        Scenario::ResumeMemory => Ask::post("/sandboxes/{}/resume", subject, short(LONG)),
        Scenario::ResumeDisk => {
            Ask::post("/sandboxes/{}/resume", subject, json!({ "timeout": LONG, "memory": false }))
        }
        Scenario::ConnectPaused => Ask::post("/sandboxes/{}/connect", subject, short(LONG)),
        Scenario::WakeByTraffic => {
            let mut ask = Ask::new(Method::GET, "/metrics", subject);
            ask.headers = vec![
                ("e2b-sandbox-id", subject.to_owned()),
                ("e2b-sandbox-port", "49983".to_owned()),
                ("x-access-token", scene.token.clone()),
            ];
            ask
        }
        Scenario::SnapshotRunning | Scenario::SnapshotPaused => {
            Ask::post("/sandboxes/{}/snapshots", subject, json!({ "name": "new" }))
        }
        Scenario::ForkRunning | Scenario::ForkPaused => {
            Ask::post("/sandboxes/{}/fork", subject, json!({ "timeout": LONG, "count": 2 }))
        }
        Scenario::KillRunning | Scenario::KillPaused => Ask::new(Method::DELETE, "/sandboxes/{}", subject),
        Scenario::SetTimeout => Ask::post("/sandboxes/{}/timeout", subject, short(LONG)),
        Scenario::Bake => {
            return Some((
                Who::Admin,
                Ask::post("/templates/{}/bake", "base", json!({ "memoryMB": 2 * world::MEMORY })),
            ));
        }
        Scenario::DeleteSnapshot => Ask::new(Method::DELETE, "/snapshots/{}", &scene.snapshot),
        Scenario::EndAtDeadline
        | Scenario::PauseAtDeadline
        | Scenario::AdoptStopped
        | Scenario::AdoptKilled => return None,
    };
    Some((Who::Blue, ask))
}

/// The request beside it.
pub fn beside(beside: Beside, scene: &Scene) -> Option<(Who, Ask)> {
    let subject = match scene.subject.as_str() {
        "" => scene.bystander.as_str(),
        subject => subject,
    };
    let who = if scene.subject.is_empty() { Who::Green } else { Who::Blue };
    let needs_one = !matches!(beside, Beside::Nothing | Beside::Create | Beside::Neighbour);
    if needs_one && subject.is_empty() {
        return None;
    }
    let ask = match beside {
        Beside::Nothing => return None,
        Beside::Kill => Ask::new(Method::DELETE, "/sandboxes/{}", subject),
        Beside::Pause => Ask::post("/sandboxes/{}/pause", subject, json!({})),
        Beside::Resume => Ask::post("/sandboxes/{}/resume", subject, short(LONG)),
        Beside::Connect => Ask::post("/sandboxes/{}/connect", subject, short(LONG)),
        Beside::SetTimeout => Ask::post("/sandboxes/{}/timeout", subject, short(LONG)),
        Beside::Snapshot => Ask::post("/sandboxes/{}/snapshots", subject, json!({})),
        Beside::Fork => Ask::post("/sandboxes/{}/fork", subject, short(LONG)),
        Beside::Look => Ask::new(Method::GET, "/sandboxes/{}", subject),
        Beside::Create => return Some((Who::Blue, new_sandbox("base", None, LONG, json!({})))),
        Beside::Neighbour => {
            return Some((Who::Green, new_sandbox("base", Some("clone"), LONG, json!({}))));
        }
    };
    Some((who, ask))
}

/// How a life ended.
enum Ended {
    /// Everything was looked at, and nothing is left to do.
    Done,
    /// There is to be another.
    Again,
}

/// What all lives of a case have in common.
#[derive(Clone)]
struct Course {
    case: Case,
    faults: Arc<Faults>,
    driver: Arc<FakeDriver>,
    facts: check::Facts,
}

/// How long the node may take to try again what it could not release.
const REAPED: Duration = Duration::from_secs(65);
/// How long a pause that nobody has asked for may take, whatever is slow or silent in it.
const SLOWEST: Duration = Duration::from_secs(120);
/// How long it is waited for rest where there is no room for everything that is wanted.
const CROWDED: Duration = Duration::from_secs(200);

/// Waits until a life has come to rest.
async fn settle(life: &Life, course: &Course, otherwise: &str) {
    if course.case.scenario == Scenario::CreateEvicting {
        // The warm machine that had to go is wanted again, and there is no room for it.
        life.settle_within(CROWDED).await;
    } else if !life.settle().await {
        course.facts.violate("settle", otherwise.to_owned());
    }
    if course.facts.is_hosts() {
        tokio::time::sleep(REAPED).await;
    } else if course.case.scenario == Scenario::PauseAtDeadline && course.faults.hit().is_some() {
        // No request is under way, and nothing tells that a sandbox is being paused.
        tokio::time::sleep(SLOWEST).await;
    }
}

/// Stops a daemon, in time.
async fn stop(life: &Life, course: &Course) {
    if tokio::time::timeout(ANSWERED, life.server.stop()).await.is_err() {
        course.facts.violate("stop", format!("it does not stop within {ANSWERED:?}"));
    }
}

/// The first life: the scene is set, the request is sent, and what goes wrong goes wrong.
async fn first(life: Life, course: Course) -> Result<Ended, Broken> {
    let Course { case, faults, .. } = &course;
    let scene = set(&life, case.scenario).await?;
    let scene = Scene { asked: life.client.book().all().len(), ..scene };
    course.facts.set_scene(scene.clone());
    match case.scenario {
        Scenario::AdoptStopped => {
            stop(&life, &course).await;
            return Ok(Ended::Again);
        }
        Scenario::AdoptKilled => return Ok(Ended::Again),
        _ => {}
    }
    faults.arm();
    let mut asking = tokio::task::JoinSet::new();
    if let Some((who, ask)) = request(case.scenario, &scene) {
        let (client, faults) = (life.client.clone(), Arc::clone(faults));
        asking.spawn(async move {
            client.ask_until(who, ask, faults.hang_up.notified()).await;
        });
    } else {
        asking.spawn(tokio::time::sleep(Duration::from_secs(SHORT + 1)));
    }
    if let Some((who, ask)) = beside(case.beside, &scene) {
        let (client, faults) = (life.client.clone(), Arc::clone(faults));
        asking.spawn(async move {
            // When the step is never reached, after everything else.
            let _ = tokio::time::timeout(Duration::from_secs(SHORT), faults.beside.notified()).await;
            client.ask(who, ask).await;
        });
    }
    let answered = async { while asking.join_next().await.is_some() {} };
    let answered = tokio::select! {
        biased;
        answered = tokio::time::timeout(ANSWERED, answered) => answered,
        () = faults.stop.notified() => {
            stop(&life, &course).await;
            faults.disarm();
            return Ok(Ended::Again);
        }
    };
    if answered.is_err() {
        course.facts.violate("unanswered", format!("a request was not answered within {ANSWERED:?}"));
    }
    settle(&life, &course, "it does not come to rest").await;
    faults.disarm();
    check::all(&life, &course.driver, &course.facts).await;
    match case.again {
        Again::No => {
            last(&life, &course).await;
            Ok(Ended::Done)
        }
        Again::Stopped => {
            stop(&life, &course).await;
            Ok(Ended::Again)
        }
        Again::Killed => Ok(Ended::Again),
    }
}

/// A later life: what the last one has left is there.
async fn later(life: Life, course: Course) -> Result<Ended, Broken> {
    settle(&life, &course, "it does not come to rest after its start").await;
    course.faults.disarm();
    check::all(&life, &course.driver, &course.facts).await;
    check::probe(&life, &course.facts).await;
    check::rest(&life, &course.driver, &course.facts).await;
    last(&life, &course).await;
    Ok(Ended::Done)
}

/// Ends everything that is there, and sees that nothing is left.
async fn last(life: &Life, course: &Course) {
    check::end_all(life, &course.facts).await;
    if !life.settle().await {
        course.facts.violate("settle", "it does not come to rest when everything has ended".to_owned());
    }
    check::rest(life, &course.driver, &course.facts).await;
    check::nothing(life, &course.facts).await;
    stop(life, course).await;
}

/// Runs a case. `log`: whether every step is written down.
///
/// # Errors
/// When the scene cannot be set, or a daemon does not start although nothing goes wrong.
pub fn run(world: &World, case: Case, log: bool) -> Result<Report, Broken> {
    kelvin_api::id::testing::seed(Some(case.seed ^ 0x5eed));
    let faults = Faults::new(case.plan, log);
    let driver = Arc::new(FakeDriver::new(Scripted(Arc::clone(&faults))));
    faults.of(&driver);
    let book = Book::default();
    let facts = check::Facts::new(case, &faults, &book, world);
    let mut done = false;
    for number in 1..=LIVES {
        let (keys, options) = (Arc::clone(&world.keys), world.options(case.scenario.settings()));
        let course =
            Course { case, faults: Arc::clone(&faults), driver: Arc::clone(&driver), facts: facts.clone() };
        let (book, faults_here) = (book.clone(), Arc::clone(&faults));
        let outcome = live(&faults, async move {
            faults_here.note(|| format!("life {number}"));
            if number == 2 && case.scenario.is_start() {
                faults_here.arm();
            }
            let driver = Arc::clone(&course.driver);
            let opened = world::open(options, driver, &faults_here, keys, book, number).await;
            let life = match opened {
                Ok(life) => life,
                // A start that fails is tried again, as systemd does.
                Err(error) if faults_here.hit().is_some() && number < LIVES => {
                    faults_here.note(|| format!("not started: {error}"));
                    return Ok(Ended::Again);
                }
                Err(error) => return Err(format!("the daemon does not start: {error}").into()),
            };
            let living = async {
                if number == 1 {
                    first(life.clone(), course).await
                } else {
                    later(life.clone(), course).await
                }
            };
            living.await
        })?;
        match outcome {
            Some(Ok(Ended::Done)) => {
                done = true;
                break;
            }
            Some(Err(error)) => {
                driver.kill_all();
                return Err(error);
            }
            Some(Ok(Ended::Again)) => {}
            None => facts.killed(),
        }
    }
    if !done {
        facts.violate("lives", format!("{LIVES} lives were not enough"));
    }
    check::after(world, &driver, &facts);
    driver.kill_all();
    let (hit, steps, trace) = (faults.hit(), faults.count(), faults.trace());
    let (book, scene) = (book.all(), facts.scene());
    Ok(Report { violations: facts.violations(), hit, steps, trace, log: faults.log(), book, scene })
}
