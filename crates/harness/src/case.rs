//! A case: what is there, what is asked, what goes wrong at which step, and what is asked beside it.

use http::Method;
use serde_json::{Value, json};

use crate::Random;
use crate::client::{Ask, Client, Who};
use crate::faults::{Plan, What};
use crate::world::{self, Broken, Life, Settings};

/// How long a sandbox lives that is not to end by itself, in seconds: longer than any case.
const LONG: u64 = 80_000;
/// How long one lives that is, in seconds.
pub const SHORT: u64 = 20;

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

    /// What its world is like.
    pub fn settings(self) -> Settings {
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
///
/// # Errors
/// When a request is refused.
pub async fn set(life: &Life, scenario: Scenario) -> Result<Scene, Broken> {
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
