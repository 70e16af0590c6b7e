//! How a case goes: one life of the daemon after the other, each looked at when nothing is under way.

use std::sync::Arc;
use std::time::Duration;

use kelvin_vmm::testing::FakeDriver;

use crate::case::{Again, Case, SHORT, Scenario, Scene, beside, request, set};
use crate::check::{self, Violation};
use crate::client::{Book, Sent};
use crate::faults::{Faults, Hit, Scripted};
use crate::world::{self, Broken, Life, World, live};

/// Lives of a daemon in one case.
const LIVES: u32 = 5;
/// How long a request may take, whatever goes wrong.
pub const ANSWERED: Duration = Duration::from_secs(400);

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
