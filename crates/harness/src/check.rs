//! What must hold whenever nothing is under way, and what each violation is called.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kelvin_api::sandbox::SandboxState;
use kelvin_store::snapshot::{Manifest, Origin};
use kelvin_vmm::testing::{Call, FakeDriver};
use serde_json::{Value, json};

use crate::case::{Again, Beside, Case, SHORT, Scenario, Scene};
use crate::client::{Ask, BLUES, Book, Outcome, Sent, Who};
use crate::faults::{Faults, Place, What};
use crate::world::{Life, World, names};

/// How long a kill may take, and another project's clone, whatever a guest does.
const PROMPT: Duration = Duration::from_secs(1);
/// Memory that a VMM is counted with beside its guest's, in MiB.
const OVERHEAD: u64 = 48;

/// Something that should not have been.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which rule.
    pub rule: &'static str,
    /// What was seen.
    pub text: String,
}

/// What is known of a case beside what the server says.
#[derive(Clone)]
pub struct Facts {
    case: Case,
    faults: Arc<Faults>,
    book: Book,
    bakes: Arc<BTreeSet<String>>,
    root: PathBuf,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    scene: Scene,
    violations: Vec<Violation>,
    deaths: u32,
    /// Answers that were looked at.
    looked: usize,
    /// The audit log had these when the scene was set.
    ended: bool,
}

impl Facts {
    /// What is known when `case` begins.
    pub fn new(case: Case, faults: &Arc<Faults>, book: &Book, world: &World) -> Self {
        Self {
            case,
            faults: Arc::clone(faults),
            book: book.clone(),
            bakes: Arc::new(world.bakes().clone()),
            root: world.root().to_owned(),
            state: Arc::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what the case is about.
    pub fn set_scene(&self, scene: Scene) {
        self.state().scene = scene;
    }

    /// What the case is about.
    pub fn scene(&self) -> Scene {
        self.state().scene.clone()
    }

    /// A daemon was killed.
    pub fn killed(&self) {
        self.state().deaths += 1;
    }

    /// Notes a violation, once.
    pub fn violate(&self, rule: &'static str, text: String) {
        self.faults.note(|| format!("VIOLATION {rule}: {text}"));
        let violation = Violation { rule, text };
        let mut state = self.state();
        if !state.violations.contains(&violation) {
            state.violations.push(violation);
        }
    }

    /// All that were noted.
    pub fn violations(&self) -> Vec<Violation> {
        self.state().violations.clone()
    }

    fn expect(&self, holds: bool, rule: &'static str, text: impl FnOnce() -> String) {
        if !holds {
            self.violate(rule, text());
        }
    }

    /// Whether the machine of `sandbox` may have ended, by what was done to it.
    fn may_have_ended(&self, sandbox: &str) -> bool {
        let Some(hit) = self.faults.hit() else { return false };
        if hit.name.as_deref() != Some(sandbox) {
            return false;
        }
        match (self.case.plan.what, hit.place) {
            (What::Crash | What::PowerOff, Place::Driver(_)) => true,
            // Its VMM does not start its vCPUs again, or lets nobody in.
            (What::Fail, Place::Driver(call)) => matches!(call, Call::Resume | Call::Adopt | Call::Control),
            _ => false,
        }
    }

    /// Whether what goes wrong is a guest's doing.
    fn is_guests(&self) -> bool {
        let by_guest = |place| matches!(place, Place::Driver(call) if call.is_guests());
        matches!(self.case.plan.what, What::Silence | What::Slow(_))
            && self.faults.hit().is_some_and(|hit| by_guest(hit.place))
    }

    /// Whether the host failed: its disk, or one of its databases.
    pub fn is_hosts(&self) -> bool {
        matches!(self.case.plan.what, What::Fail | What::Crash)
            && self.faults.hit().is_some_and(|hit| !matches!(hit.place, Place::Driver(_)))
    }

    /// Requests of others than the harness's own looks.
    fn sent(&self) -> Vec<Arc<Sent>> {
        self.book.all()
    }

    /// Sandboxes that were made, with whose they are.
    fn made(&self) -> BTreeMap<String, Who> {
        let mut made = BTreeMap::new();
        for sent in self.sent() {
            let Some(answer) = sent.answer().filter(|answer| answer.is_good()) else { continue };
            match sent.action.as_str() {
                "POST /sandboxes" => drop(made.insert(answer.text("sandboxID"), sent.who)),
                "POST /sandboxes/{id}/fork" => {
                    for child in answer.body.as_array().into_iter().flatten() {
                        if let Some(id) = child["sandbox"]["sandboxID"].as_str() {
                            made.insert(id.to_owned(), sent.who);
                        }
                    }
                }
                _ => {}
            }
        }
        made
    }

    /// Whether somebody has asked for the end of `sandbox`.
    fn is_to_end(&self, sandbox: &str) -> bool {
        self.sent().iter().any(|sent| sent.action == "DELETE /sandboxes/{id}" && sent.target == sandbox)
    }

    fn has_deadline(&self, sandbox: &str) -> bool {
        self.case.scenario == Scenario::EndAtDeadline && self.state().scene.subject == sandbox
    }
}

/// Looks at everything. Nothing is under way.
pub async fn all(life: &Life, driver: &Arc<FakeDriver>, facts: &Facts) {
    for violation in driver.violations() {
        facts.violate("one life", violation);
    }
    let shown = listed(life, facts).await;
    rest(life, driver, facts).await;
    existence(life, facts);
    answers(facts);
    let kept = owners(life, facts).await;
    audit(life, facts, &shown, &kept).await;
}

/// Looks at what is there of machines and files.
pub async fn rest(life: &Life, driver: &Arc<FakeDriver>, facts: &Facts) {
    machines(life, driver, facts).await;
    files(life, facts).await;
}

/// What each project is shown, as (state, parent) by id.
type Shown = BTreeMap<String, (Who, String, String)>;

/// The control plane and the node know the same sandboxes, and each project is shown its own.
async fn listed(life: &Life, facts: &Facts) -> Shown {
    let made = facts.made();
    let mut shown = Shown::new();
    for who in Who::ALL {
        let rows = life.client.get(who, "/v2/sandboxes?limit=100").await;
        for row in rows.as_array().into_iter().flatten() {
            let id = row["sandboxID"].as_str().unwrap_or_default().to_owned();
            facts.expect(made.get(&id).is_none_or(|owner| *owner == who), "owner", || {
                format!("sandbox {id} is shown to {who:?}")
            });
            let text = |field: &str| row[field].as_str().unwrap_or_default().to_owned();
            shown.insert(id, (who, text("state"), text("parentID")));
        }
    }
    let on_node: BTreeMap<String, &str> = life
        .node
        .live()
        .into_iter()
        .map(|live| {
            let state = if live.state == SandboxState::Paused { "paused" } else { "running" };
            (live.sandbox.to_string(), state)
        })
        .collect();
    for (id, state) in &on_node {
        match shown.get(id) {
            None => facts.violate("listed", format!("sandbox {id} is {state} on the node, and not listed")),
            Some((_, told, _)) => facts.expect(told == state, "listed", || {
                format!("sandbox {id} is {state} on the node, and listed as {told}")
            }),
        }
    }
    for id in shown.keys() {
        facts.expect(on_node.contains_key(id), "listed", || {
            format!("sandbox {id} is listed, and not on the node")
        });
    }
    let blues = shown.values().filter(|(who, state, _)| *who == Who::Blue && state == "running").count();
    facts.expect(blues <= BLUES, "quota", || format!("{blues} sandboxes of {BLUES} run"));
    shown
}

/// Each sandbox that runs has one machine, and every machine is somebody's; what is held is what they have.
async fn machines(life: &Life, driver: &Arc<FakeDriver>, facts: &Facts) {
    let machines = driver.machines();
    let mut running = BTreeSet::new();
    let (mut memory, mut vcpus) = (0, 0);
    for live in life.node.live() {
        if live.state == SandboxState::Paused {
            continue;
        }
        let id = live.sandbox.to_string();
        memory += u64::from(live.shape.memory_mib.0) + OVERHEAD;
        vcpus += live.shape.vcpus;
        let own = machines.iter().filter(|machine| machine.name.as_ref() == Some(&id)).count();
        facts.expect(own == 1, "machine", || format!("sandbox {id} runs in {own} machines"));
        running.insert(id);
    }
    let Ok(info) = life.node.info().await else {
        return facts.violate("node", "it does not say what runs".to_owned());
    };
    let (waiting, warm) = (u64::from(info.waiting_vmms), u64::from(info.warm));
    let wanted = running.len() as u64 + waiting + warm;
    facts.expect(machines.len() as u64 == wanted, "machine", || {
        format!(
            "{} machines for {} sandboxes, {waiting} VMMs that wait and {warm} warm ones",
            machines.len(),
            running.len()
        )
    });
    memory += waiting * OVERHEAD + warm * (u64::from(crate::world::MEMORY) + OVERHEAD);
    vcpus += info.warm;
    facts.expect((info.memory_reserved_mb, info.vcpus_reserved) == (memory, vcpus), "capacity", || {
        format!(
            "{} MiB and {} vCPUs are held, {memory} and {vcpus} are used",
            info.memory_reserved_mb, info.vcpus_reserved
        )
    });
    let entries = u64::from(info.ledger_entries);
    facts.expect(entries == 2 * machines.len() as u64, "ledger", || {
        format!("{entries} entries for {} machines", machines.len())
    });
    let directories = names(&facts.root.join("sandboxes"));
    let vms: BTreeSet<String> = machines.iter().map(|machine| machine.vm.to_string()).collect();
    facts.expect(directories == vms, "directory", || format!("{directories:?} for the machines {vms:?}"));
}

/// Snapshots are there for as long as somebody needs them, and nothing else is.
async fn files(life: &Life, facts: &Facts) {
    let staging = names(&facts.root.join("staging"));
    facts.expect(staging.is_empty(), "staging", || format!("{staging:?}"));
    let live: BTreeMap<String, SandboxState> =
        life.node.live().into_iter().map(|live| (live.sandbox.to_string(), live.state)).collect();
    let kept: BTreeSet<String> = match life.node.snapshots().await {
        Ok(kept) => kept.into_iter().map(|info| info.snapshot_id).collect(),
        Err(error) => return facts.violate("node", error.to_string()),
    };
    let directory = facts.root.join("snapshots");
    let mut paused = BTreeSet::new();
    for name in names(&directory) {
        let manifest: Manifest = match kelvin_store::read_json(&directory.join(&name).join("manifest.json")) {
            Ok(manifest) => manifest,
            Err(error) => {
                facts.violate("snapshot", format!("{name}: {error}"));
                continue;
            }
        };
        let needed = match &manifest.origin {
            Origin::Bake => true,
            Origin::Kept { .. } => kept.contains(&name),
            Origin::Pause { sandbox, .. } => {
                if live.get(sandbox.as_str()) == Some(&SandboxState::Paused) {
                    paused.insert(sandbox.to_string());
                }
                // Children that were forked of it while it was paused run from it too.
                live.contains_key(sandbox.as_str())
                    || live.values().any(|state| *state == SandboxState::Running)
            }
            // Of any child that runs.
            Origin::Fork { .. } => live.values().any(|state| *state == SandboxState::Running),
        };
        facts.expect(needed, "snapshot", || format!("{:?} is left", manifest.origin));
    }
    for (id, state) in &live {
        facts.expect(*state != SandboxState::Paused || paused.contains(id), "image", || {
            format!("sandbox {id} is paused, and what it is frozen in is gone")
        });
    }
}

/// What was made is there until it is to end.
fn existence(life: &Life, facts: &Facts) {
    let live: BTreeSet<String> = life.node.live().into_iter().map(|live| live.sandbox.to_string()).collect();
    for id in facts.made().keys() {
        let gone = !live.contains(id);
        if gone && !facts.is_to_end(id) && !facts.may_have_ended(id) && !facts.has_deadline(id) {
            facts.violate("lost", format!("sandbox {id} is gone, and nobody has ended it"));
        }
    }
    let subject = facts.state().scene.subject.clone();
    let late = facts.faults.now() > Duration::from_secs(2 * SHORT) && live.contains(&subject);
    if facts.case.scenario == Scenario::EndAtDeadline && late {
        let extended = [Beside::Connect, Beside::Resume, Beside::SetTimeout, Beside::Pause];
        facts.expect(extended.contains(&facts.case.beside), "deadline", || {
            format!("sandbox {subject} lives on after its time")
        });
    }
}

/// Each request had an answer, and one that can be explained.
fn answers(facts: &Facts) {
    let (made, sent) = (facts.made(), facts.sent());
    let from = std::mem::replace(&mut facts.state().looked, sent.len());
    let hit = facts.faults.hit();
    for (index, sent) in sent.iter().enumerate().skip(from) {
        let Some(answer) = sent.answer() else { continue };
        let shown = format!("#{index} {} by {:?}: {} {}", sent.action, sent.who, answer.status, answer.body);
        let is_subject = made.contains_key(&sent.target);
        if answer.status == 404 && is_subject {
            let explained = facts.is_to_end(&sent.target)
                || facts.may_have_ended(&sent.target)
                || facts.has_deadline(&sent.target);
            facts.expect(explained, "not found", || shown.clone());
        }
        let by_driver = hit.as_ref().is_some_and(|hit| matches!(hit.place, Place::Driver(_)));
        let is_odd = facts.is_hosts()
            || by_driver && matches!(facts.case.plan.what, What::Fail | What::Crash | What::PowerOff)
            || hit.is_some() && facts.case.plan.what == What::Stop;
        facts.expect(answer.status != 500 || is_odd, "internal", || shown.clone());
        facts.expect(answer.status != 0, "unanswered", || shown.clone());
        let plain = facts.case.beside == Beside::Nothing && hit.is_none();
        facts.expect(!plain || answer.is_good() || answer.status == 404, "refused", || shown.clone());
        if sent.action == "DELETE /sandboxes/{id}" {
            facts.expect(matches!(answer.status, 204 | 404) || is_odd, "kill", || shown.clone());
            if facts.is_guests() {
                facts.expect(answer.took <= PROMPT, "slow kill", || format!("{:?}: {shown}", answer.took));
            }
        }
        if sent.action == "POST /sandboxes" && sent.who == Who::Green && answer.is_good() && facts.is_guests()
        {
            let id = answer.text("sandboxID");
            let others = hit.as_ref().is_some_and(|hit| hit.name.as_ref() != Some(&id));
            facts.expect(!others || answer.took <= PROMPT, "slow neighbour", || {
                format!("{:?}: {shown}", answer.took)
            });
        }
    }
}

/// Each snapshot that is kept is shown to whom its sandbox belongs, and to nobody else. By id, its sandbox.
async fn owners(life: &Life, facts: &Facts) -> BTreeMap<String, String> {
    let made = facts.made();
    let mut kept = BTreeMap::new();
    for info in life.node.snapshots().await.unwrap_or_default() {
        kept.insert(info.snapshot_id, info.sandbox_id.to_string());
    }
    let mut found: BTreeMap<String, Vec<Who>> = BTreeMap::new();
    for who in Who::ALL {
        let rows = life.client.get(who, "/snapshots").await;
        for row in rows.as_array().into_iter().flatten() {
            let id = row["snapshotID"].as_str().unwrap_or_default().to_owned();
            found.entry(id).or_default().push(who);
        }
    }
    for (id, sandbox) in &kept {
        let Some(owner) = made.get(sandbox) else { continue };
        let shown = found.get(id).cloned().unwrap_or_default();
        facts.expect(shown == [*owner], "owner", || {
            format!("a snapshot of {owner:?}'s sandbox {sandbox} is shown to {shown:?}")
        });
    }
    kept
}

const RESUME: &str = "POST /sandboxes/{id}/resume";
/// Resumes what is paused too.
const CONNECT: &str = "POST /sandboxes/{id}/connect";
/// The same for traffic, which is not written down.
const VISIT: &str = "GET /metrics";

/// How many effects can be seen that only requests like `sent`, which were not answered, can have had.
fn effects(facts: &Facts, sent: &Sent, shown: &Shown, kept: &BTreeMap<String, String>) -> usize {
    let made = facts.made();
    let all = facts.sent();
    let done = |action: &str| {
        all.iter()
            .filter(|other| other.action == action && other.target == sent.target)
            .filter(|other| other.answer().is_some_and(|answer| answer.is_good()))
            .count()
    };
    let state = shown.get(&sent.target).map(|(_, state, _)| state.as_str());
    match sent.action.as_str() {
        "POST /sandboxes" => {
            let is_one = |(id, (who, _, parent)): &(&String, &(Who, String, String))| {
                *who == sent.who && parent.is_empty() && !made.contains_key(*id)
            };
            shown.iter().filter(is_one).count()
        }
        // One request may make many.
        "POST /sandboxes/{id}/fork" => usize::from(
            shown.iter().any(|(id, (_, _, parent))| *parent == sent.target && !made.contains_key(id)),
        ),
        "POST /sandboxes/{id}/snapshots" => {
            let there = kept.values().filter(|sandbox| **sandbox == sent.target).count();
            there.saturating_sub(done(&sent.action))
        }
        // Of two that want the same of one sandbox, one has done it.
        "POST /sandboxes/{id}/pause" => usize::from(
            state == Some("paused")
                && done(&sent.action) == 0
                && facts.case.scenario != Scenario::PauseAtDeadline,
        ),
        // Of a resume and a connect that were not answered one has done it: which, nobody can tell.
        RESUME | CONNECT => usize::from(
            state == Some("running")
                && done("POST /sandboxes/{id}/pause") > 0
                && done(RESUME) + done(CONNECT) == 0
                && !all.iter().any(|other| other.target == sent.target && other.action == VISIT),
        ),
        "DELETE /sandboxes/{id}" => usize::from(
            state.is_none()
                && made.contains_key(&sent.target)
                && !facts.may_have_ended(&sent.target)
                && !facts.has_deadline(&sent.target)
                && done(&sent.action) == 0,
        ),
        _ => 0,
    }
}

/// Who changed what is written down, whatever became of the client.
async fn audit(life: &Life, facts: &Facts, shown: &Shown, kept: &BTreeMap<String, String>) {
    if facts.state().ended {
        return;
    }
    let rows = life.client.get(Who::Admin, "/audit?limit=1000").await;
    let mut written: BTreeMap<(String, String), usize> = BTreeMap::new();
    for row in rows.as_array().into_iter().flatten() {
        let text = |field: &str| row[field].as_str().unwrap_or_default().to_owned();
        *written.entry((text("project"), text("action"))).or_default() += 1;
    }
    let mut wanted: BTreeMap<(String, String), usize> = BTreeMap::new();
    // Requests that were not answered, by who asked for what of what.
    let mut open: BTreeMap<(Who, String, String), (usize, Arc<Sent>)> = BTreeMap::new();
    for sent in facts.sent() {
        if sent.action.starts_with("GET ") {
            continue;
        }
        match sent.outcome {
            Outcome::Answered(_) => {
                *wanted.entry((sent.who.project().to_owned(), sent.action.clone())).or_default() += 1;
            }
            Outcome::HungUp | Outcome::Open => {
                let same = (sent.who, sent.action.clone(), sent.target.clone());
                open.entry(same).or_insert((0, sent)).0 += 1;
            }
        }
    }
    let mut resumed_by_either: BTreeMap<Who, usize> = BTreeMap::new();
    for (count, sent) in open.values() {
        let seen = (*count).min(effects(facts, sent, shown, kept));
        let beside = |action: &str| open.contains_key(&(sent.who, action.to_owned(), sent.target.clone()));
        if [RESUME, CONNECT].contains(&&*sent.action) && beside(RESUME) && beside(CONNECT) {
            // Seen from both.
            if sent.action == RESUME {
                *resumed_by_either.entry(sent.who).or_default() += seen;
            }
            continue;
        }
        *wanted.entry((sent.who.project().to_owned(), sent.action.clone())).or_default() += seen;
    }
    let total = |counts: &BTreeMap<(String, String), usize>, who: Who| -> usize {
        let of = |action: &str| counts.get(&(who.project().to_owned(), action.to_owned())).copied();
        of(RESUME).unwrap_or_default() + of(CONNECT).unwrap_or_default()
    };
    for (who, seen) in resumed_by_either {
        let (count, there) =
            (seen + total(&wanted, who), total(&written, who) + usize::from(facts.is_hosts()));
        facts.expect(there >= count, "audit", || {
            format!("{count} resumes and connects of {who:?} were done and {there} written down")
        });
    }
    for ((project, action), count) in wanted {
        let action = action.replace("/templates/{id}", "/templates/{name}");
        let there = written.get(&(project.clone(), action.clone())).copied().unwrap_or_default();
        // What cannot be written is not: then nothing was changed either.
        let there = there + usize::from(facts.is_hosts());
        facts.expect(there >= count, "audit", || {
            format!("{action} of {project} was done {count} times and written down {there} times")
        });
    }
}

/// What goes on after a restart can be paused, and comes back.
pub async fn probe(life: &Life, facts: &Facts) {
    let silent = facts.case.plan.what == What::Silence && facts.faults.hit().is_some();
    for (id, owner) in facts.made() {
        let running =
            |state| life.node.live().iter().any(|live| live.sandbox.as_str() == id && live.state == state);
        if running(SandboxState::Running) {
            let answer = life.client.ask(owner, Ask::post("/sandboxes/{}/pause", &id, json!({}))).await;
            // A guest that has powered off may be seen to only now.
            facts.expect(answer.is_good() || facts.may_have_ended(&id), "probe", || {
                format!("pausing {id}: {} {}", answer.status, answer.body)
            });
        }
        if running(SandboxState::Paused) {
            let ask = Ask::post("/sandboxes/{}/resume", &id, json!({ "timeout": 80_000 }));
            let answer = life.client.ask(owner, ask).await;
            // As many as may run do.
            facts.expect(answer.is_good() || answer.status == 429 || silent, "probe", || {
                format!("resuming {id}: {} {}", answer.status, answer.body)
            });
        }
    }
    life.settle().await;
}

/// Ends every sandbox and every snapshot, each by its owner; what is nobody's by whoever may.
pub async fn end_all(life: &Life, facts: &Facts) {
    let made = facts.made();
    let mut any = false;
    for live in life.node.live() {
        let id = live.sandbox.to_string();
        let owner = made.get(&id).copied().unwrap_or(Who::Admin);
        let status = life.delete(owner, "/sandboxes/{}", &id).await;
        facts.expect(matches!(status, 204 | 404), "end", || format!("deleting sandbox {id}: {status}"));
        any = true;
    }
    if any {
        // A snapshot is not deleted while a machine of it runs.
        life.settle().await;
    }
    for info in life.node.snapshots().await.unwrap_or_default() {
        let owner = made.get(info.sandbox_id.as_str()).copied().unwrap_or(Who::Blue);
        let status = life.delete(owner, "/snapshots/{}?cascade=true", &info.snapshot_id).await;
        facts.expect(matches!(status, 204 | 404), "end", || {
            format!("deleting {}: {status}", info.snapshot_id)
        });
    }
    facts.state().ended = true;
}

/// Nothing is left but what the node keeps ready.
pub async fn nothing(life: &Life, facts: &Facts) {
    let live = life.node.live();
    facts.expect(live.is_empty(), "left", || format!("{live:?}"));
    let snapshots = names(&facts.root.join("snapshots"));
    let more = if facts.case.scenario == Scenario::Bake { 1 } else { 0 };
    let left = snapshots.difference(&facts.bakes).count();
    facts.expect(left <= more, "left", || format!("{left} snapshots"));
    let rows = life.client.get(Who::Admin, "/v2/sandboxes?project=*").await;
    facts.expect(rows == Value::Array(Vec::new()), "left", || format!("{rows}"));
}

/// What is left when the last daemon has stopped.
pub fn after(_world: &World, driver: &Arc<FakeDriver>, facts: &Facts) {
    let machines = driver.machines();
    facts.expect(machines.is_empty(), "left", || format!("machines after the end: {machines:?}"));
    for place in ["sandboxes", "staging"] {
        let left = names(&facts.root.join(place));
        facts.expect(left.is_empty(), "left", || format!("{place} after the end: {left:?}"));
    }
    let _ = (facts.case.again, Again::No);
}
