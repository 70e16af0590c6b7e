//! What goes wrong at each step of a build, and what comes beside it.

use std::collections::BTreeMap;
use std::time::Duration;

use kelvin_api::error::ErrorCode;
use kelvin_api::id::BuildId;
use kelvin_harness::faults::{Plan, What};
use kelvin_harness::world::World;
use kelvin_node::Node;
use kelvin_node_api::{Build, NodeService};

use crate::ground::{
    Ground, SETTLE, build, check, create, plain, request, reset, settle, staged, upload, web, web_disk,
};

/// What comes beside the build that a case is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meanwhile {
    Nothing,
    Cancel,
    Supersede,
    Create,
    Collect,
}

/// Does what comes beside the build `id`, when its step has come; what should not have been.
async fn beside(ground: &Ground, node: &Node, meanwhile: Meanwhile, id: &BuildId) -> Vec<String> {
    if meanwhile == Meanwhile::Nothing {
        return Vec::new();
    }
    let _ = tokio::time::timeout(SETTLE, ground.faults.beside.notified()).await;
    let failure = match meanwhile {
        Meanwhile::Nothing => None,
        // It may be over.
        Meanwhile::Cancel => {
            let cancelled = NodeService::cancel_build(node, id).await;
            cancelled.err().filter(|failure| failure.error_code != ErrorCode::BuildNotFound)
        }
        Meanwhile::Supersede => {
            let (built, _) = build(node, request("write newest")).await;
            built.err().map(|failed| failed.failure)
        }
        Meanwhile::Create => create(node, web()).await.err(),
        Meanwhile::Collect => NodeService::collect(node, false).await.err(),
    };
    failure.map(|failure| format!("{meanwhile:?}: {failure:?}")).into_iter().collect()
}

/// What is built, by its last step.
type Asked = fn(&str) -> Build;

/// The life after one that was cut short; what should not have been.
fn next_life(ground: &Ground, request: Asked) -> Vec<String> {
    let after = ground.live(move |ground, node| async move {
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
    after.unwrap_or_else(|| vec!["killed again".to_owned()])
}

/// Does a case; what should not have been.
fn case(world: &World, plan: Plan, meanwhile: Meanwhile) -> (Vec<String>, u32) {
    case_of(world, plan, meanwhile, request)
}

fn case_of(world: &World, plan: Plan, meanwhile: Meanwhile, request: Asked) -> (Vec<String>, u32) {
    let ground = Ground::new(world, plan);
    let lived = ground.live(move |ground, node| async move {
        settle(&node).await;
        upload(&node).await.unwrap();
        build(&node, request("write old")).await.0.unwrap();
        settle(&node).await;
        ground.faults.arm();
        let wanted = Build { force: plan.seed.is_multiple_of(2), ..request("write new") };
        let id = wanted.build.clone();
        let beside = beside(&ground, &node, meanwhile, &id);
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
        wrong.extend(next_life(&ground, request));
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

/// Two machines run while one copies from the other. Every kind comes at every third or fourth step.
#[test]
fn whatever_goes_wrong_with_a_stage_nothing_is_held_and_the_template_is_old_or_new() {
    let world = World::make().unwrap();
    let (mut cases, mut wrong) = (0, BTreeMap::new());
    // Everything is forced.
    let seed = 0;
    let (violations, count) = case_of(&world, Plan { seed, ..plain() }, Meanwhile::Nothing, staged);
    assert_eq!(violations, Vec::<String>::new());
    reset(&world);
    assert!(count > 30, "{count}");
    let all =
        [What::Fail, What::Kill, What::Crash, What::Silence, What::Stop, What::PowerOff, What::Slow(70)];
    for at in 1..=count {
        let turn = at as usize;
        for what in [all[turn % all.len()], all[(turn + 3) % all.len()]] {
            let (violations, _) =
                case_of(&world, Plan { what, at, seed, ..plain() }, Meanwhile::Nothing, staged);
            cases += 1;
            if !violations.is_empty() {
                wrong.insert(format!("{what:?} at {at} of {count}"), violations);
            }
            reset(&world);
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
