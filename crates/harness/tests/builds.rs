//! Builds of templates over the fake driver: what goes wrong at each of their steps, what comes beside them, and what is left.
//!
//! A case: the template `web` is there, built before. It is built anew, and at one step something goes wrong: the step fails, is
//! slow, the VMM ends, the guest falls silent or powers off, the daemon is killed or stopped; or somebody cancels, builds the
//! same name, or creates a sandbox of it. Then nothing may be held that nobody has, and `web` is the old one or the new one.

#![allow(clippy::unwrap_used)]

#[path = "builds/ground.rs"]
mod ground;
#[path = "builds/steps.rs"]
mod steps;

use std::sync::atomic::Ordering;
use std::time::Duration;

use kelvin_api::account::Project;
use kelvin_api::error::ErrorCode;
use kelvin_api::id::{BuildId, SnapshotId, TemplateVersion};
use kelvin_api::sandbox::PauseMode;
use kelvin_api::units::MemoryMib;
use kelvin_harness::world::{World, names};
use kelvin_node::Node;
use kelvin_node_api::{Base, Build, BuildFrom, BuildStage, BuildStep, Instruction, NodeService};
use kelvin_store::Store;

use crate::ground::{
    Ground, build, builds_own, check, copy, copy_from, create, create_of, hash, newest, of_image, plain,
    request, run, settle, staged, step, upload, versions, web, web_disk,
};

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
        let all = versions(&ground.options.data_dir);
        assert_eq!(all.len(), 6, "one for each build");
        for version in all {
            NodeService::remove_template(&node, &version).await.unwrap();
            let gone = NodeService::remove_template(&node, &version).await.unwrap_err();
            assert_eq!(gone.error_code, ErrorCode::TemplateNotFound);
        }
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
fn a_stage_is_done_when_something_is_copied_from_it() {
    let world = World::make().unwrap();
    let ground = Ground::new(&world, plain());
    ground.live(|ground, node| async move {
        settle(&node).await;
        ground.commands();
        let unneeded = BuildStage { from: BuildFrom::Scratch, steps: vec![run("write unneeded")] };
        let request = |last: &str| {
            let mut request = staged(last);
            request.stages.push(unneeded.clone());
            request
        };
        let (built, events) = build(&node, request("write last")).await;
        let built = built.unwrap();
        assert_eq!((built.cached_steps, built.from_digest), (0, None));
        let (_, disk) = web_disk(&ground.options.data_dir).unwrap();
        assert!(
            disk.starts_with("image python:3.12\n")
                && disk.contains("\nunpack from=out&to=%2Fapp&owner=user&"),
            "{disk}"
        );
        assert!(
            disk.contains(" 5\n") && disk.contains("write last") && !disk.contains("write lib"),
            "{disk}"
        );
        let commands = ground.commands();
        let all = builds_own(&commands).join("\n");
        assert!(
            all.contains("write lib") && all.contains("run ./out/.") && !all.contains("unneeded"),
            "{all}"
        );
        // Steps are counted through all stages.
        let step_of =
            |text: &str| events.iter().find(|event| event.message == text).and_then(|event| event.step);
        assert_eq!([step_of("RUN write lib"), step_of("COPY --from /app")], [Some(0), Some(2)]);
        settle(&node).await;
        assert_eq!(check(&ground, &node).await, Vec::<String>::new());

        // Nothing has changed, or the last line: the stage is not needed, and its machine does not run.
        assert_eq!(build(&node, request("write last")).await.0.unwrap().cached_steps, 3);
        assert_eq!(build(&node, request("write another")).await.0.unwrap().cached_steps, 2);
        let commands = ground.commands();
        let all = builds_own(&commands).join("\n");
        assert!(all.contains("write another") && !all.contains("./out") && !all.contains("lib"), "{all}");
        // Another path of the same stage: its disk is cached.
        let mut other = request("write another");
        other.steps[0] = copy_from(0, "/other");
        assert_eq!(build(&node, other).await.0.unwrap().cached_steps, 1);
        assert!(!ground.commands().iter().any(|text| text.contains("lib")));
        // Forced in the stage: what copies from it is done, too.
        let mut forced = request("write another");
        forced.stages[0].steps[0].force = true;
        assert_eq!(build(&node, forced).await.0.unwrap().cached_steps, 0);
        // A stage goes on with another one's disk.
        let mut on = request("write more");
        (on.from, on.steps) = (BuildFrom::Stage(0), vec![run("write more")]);
        build(&node, on).await.0.unwrap();
        let (_, disk) = web_disk(&ground.options.data_dir).unwrap();
        assert!(
            disk.starts_with("image scratch\n")
                && disk.contains("write lib\n")
                && disk.contains("write more\n"),
            "{disk}"
        );
        settle(&node).await;
        assert_eq!(check(&ground, &node).await, Vec::<String>::new());

        // Who fails is told apart.
        for (from, message) in [
            ("/fail", "COPY --from /app failed: /fail of stage 0 cannot be read"),
            ("/x/fail*", "COPY --from /app failed"),
        ] {
            let mut wrong = request("write another");
            wrong.steps[0] = copy_from(0, from);
            let failed = build(&node, wrong).await.0.unwrap_err();
            assert_eq!((failed.step, failed.failure.message.as_str()), (Some(2), message), "{failed:?}");
            assert!(failed.failure.cause.is_some_and(|cause| !cause.is_empty()));
            settle(&node).await;
            assert_eq!(check(&ground, &node).await, Vec::<String>::new());
        }
        let mut later = request("write another");
        later.steps[0] = copy_from(2, "/out");
        let failed = build(&node, later).await.0.unwrap_err();
        assert_eq!((failed.step, failed.failure.error_code), (Some(2), ErrorCode::InvalidStep));
        node.stop().await;
    });
    ground.driver.kill_all();
}

/// The kernel of its machines is the file that a build names; what is none is refused before anything runs.
#[test]
fn a_build_with_a_kernel_of_its_own_has_another_guest() {
    let world = World::make().unwrap();
    let ground = Ground::new(&world, plain());
    ground.live(|ground, node| async move {
        settle(&node).await;
        upload(&node).await.unwrap();
        build(&node, request("write last")).await.0.unwrap();
        settle(&node).await;
        let (before, _) = web_disk(&ground.options.data_dir).unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let path = elsewhere.path().join("kernel");
        let with = || Build { kernel: Some(path.clone()), ..request("write last") };
        std::fs::write(&path, "no kernel").unwrap();
        ground.commands();
        let refused = build(&node, with()).await.0.unwrap_err();
        assert_eq!(refused.failure.error_code, ErrorCode::InvalidFile, "{refused:?}");
        settle(&node).await;
        assert_eq!(builds_own(&ground.commands()), Vec::<&str>::new());
        assert_eq!(web_disk(&ground.options.data_dir).unwrap().0, before);

        std::fs::write(&path, [kelvin_store::kernel::SMALLEST, b"own"].concat()).unwrap();
        build(&node, with()).await.0.unwrap();
        let (after, _) = web_disk(&ground.options.data_dir).unwrap();
        assert!(after.kernel != before.kernel && after.guest != before.guest, "{after:?}");
        assert_eq!(after.initrd, before.initrd, "the agent stays");
        settle(&node).await;
        create(&node, web()).await.unwrap();
        settle(&node).await;
        // A collection finds who needs it.
        let garbage = NodeService::collect(&node, false).await.unwrap();
        assert!(!garbage.guests.contains(&after.guest), "{garbage:?}");
        assert_eq!(check(&ground, &node).await, Vec::<String>::new());
    });
}

/// As one whose shell has a profile that waits.
#[test]
fn a_service_that_does_not_even_begin_has_the_same_deadline() {
    let world = World::make().unwrap();
    let ground = Ground::new(&world, plain());
    ground.live(|ground, node| async move {
        settle(&node).await;
        let hangs =
            Build { start: Some("hang".into()), ready: None, steps: vec![run("write last")], ..request("") };
        let failed = build(&node, hangs).await.0.unwrap_err();
        assert_eq!(
            (failed.step, failed.failure.error_code),
            (None, ErrorCode::BuildStepFailed),
            "{failed:?}"
        );
        assert!(failed.failure.message.contains("not ready within 300 s"), "{failed:?}");
        assert_eq!(failed.failure.cause.as_deref(), Some("said before"));
        settle(&node).await;
        assert_eq!(check(&ground, &node).await, Vec::<String>::new());
        node.stop().await;
    });
    ground.driver.kill_all();
}

#[test]
fn another_project_finds_nothing_of_it() {
    let world = World::make().unwrap();
    let ground = Ground::new(&world, plain());
    ground.live(|ground, node| async move {
        settle(&node).await;
        let of = |project: &str| Build {
            project: project.parse().unwrap(),
            steps: vec![run("write key"), run("write last")],
            ..request("")
        };
        for project in ["a", "b"] {
            ground.commands();
            assert_eq!(build(&node, of(project)).await.0.unwrap().cached_steps, 0);
            let commands = ground.commands();
            let runs = builds_own(&commands).into_iter().filter(|text| text.contains("write key")).count();
            assert_eq!(runs, 1, "{project}: {commands:?}");
        }
        assert_eq!(ground.images.made.load(Ordering::Relaxed), 2);
        assert_eq!(build(&node, of("a")).await.0.unwrap().cached_steps, 2);
        settle(&node).await;
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
            from: BuildFrom::Template(newest(&ground.options.data_dir, &web()).unwrap().version()),
            steps,
            start: None,
            ready: None,
            ..request("")
        };
        build(&node, on(vec![run("write more")])).await.0.unwrap();
        let store = Store::open(&ground.options.data_dir, false).unwrap();
        let root = &ground.options.data_dir;
        let next = newest(root, &"next".parse().unwrap()).unwrap();
        let disk = std::fs::read_to_string(store.rootfs(&next.image)).unwrap();
        assert!(disk.contains("write last") && disk.contains("write more"), "{disk}");
        assert_eq!((next.user.as_deref(), &next.service), (Some("app"), &None));
        // Without a step it is the same image under another name, and no machine of the builder's runs.
        ground.commands();
        build(&node, on(Vec::new())).await.0.unwrap();
        let same = newest(root, &"next".parse().unwrap()).unwrap();
        assert_eq!(same.image, web_disk(root).unwrap().0.image);
        let commands = ground.commands();
        assert_eq!(builds_own(&commands), Vec::<&str>::new());
        settle(&node).await;
        assert_eq!(check(&ground, &node).await, Vec::<String>::new());
        node.stop().await;
    });
    ground.driver.kill_all();
}

/// VMMs that wait for a version.
async fn waiting(node: &Node, version: &TemplateVersion) -> u32 {
    let all = NodeService::templates(node).await.unwrap();
    let build = version.build.as_ref().map(BuildId::as_str);
    let found = all.iter().find(|template| Some(template.build_id.as_str()) == build);
    found.unwrap().snapshots.iter().map(|snapshot| snapshot.waiting_vmms).sum()
}

#[test]
fn versions_stand_beside_each_other_until_each_is_removed() {
    let world = World::make().unwrap();
    let ground = Ground::new(&world, plain());
    ground.live(|ground, node| async move {
        settle(&node).await;
        upload(&node).await.unwrap();
        let mut made = Vec::new();
        for last in ["write old", "write new"] {
            let request = request(last);
            let version = TemplateVersion::of(web(), request.build.clone());
            let built = build(&node, request).await.0.unwrap().template;
            assert_eq!(
                (built.build_id.as_str(), built.versions.len()),
                (version.build.as_ref().unwrap().as_str(), 1)
            );
            made.push((version, built.versions[0].clone()));
            // Virtual time: of versions of one instant none is the newer one.
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let [(old, was), (new, is)] = &made[..] else { panic!() };
        assert!(was.image != is.image && was.image_bytes > 0 && was.memory_disk_bytes.is_some(), "{made:?}");
        settle(&node).await;
        // Machines wait for the newest, until another is chosen; creates of both find them.
        assert!(waiting(&node, old).await == 0 && waiting(&node, new).await > 0);
        NodeService::prefer_template(&node, old).await.unwrap();
        settle(&node).await;
        assert!(waiting(&node, old).await > 0 && waiting(&node, new).await == 0);
        let of_old = create_of(&node, Base::Template(old.clone())).await.unwrap();
        let of_new = create_of(&node, Base::Template(new.clone())).await.unwrap();
        settle(&node).await;
        assert_eq!(check(&ground, &node).await, Vec::<String>::new());
        // The old one is removed: its sandbox goes on, a snapshot of that starts, machines wait for the other.
        let kept = SnapshotId::random();
        NodeService::snapshot(&node, &of_old, kept.clone(), None, PauseMode::Full).await.unwrap();
        NodeService::remove_template(&node, old).await.unwrap();
        assert!(create_of(&node, Base::Template(old.clone())).await.is_err());
        assert_eq!(NodeService::source(&node, &old.to_string()).await.unwrap(), None);
        settle(&node).await;
        assert!(waiting(&node, new).await > 0);
        NodeService::collect(&node, false).await.unwrap();
        let images = || names(&ground.options.data_dir.join("images"));
        assert!(images().contains(&was.image));
        NodeService::kill(&node, &of_old).await.unwrap();
        settle(&node).await;
        NodeService::collect(&node, false).await.unwrap();
        let child = create_of(&node, Base::Snapshot(kept.clone())).await.unwrap();
        settle(&node).await;
        assert_eq!(check(&ground, &node).await, Vec::<String>::new());
        // With the last that needs it, its image goes; the other's stays.
        NodeService::kill(&node, &child).await.unwrap();
        settle(&node).await;
        NodeService::remove_snapshot(&node, &kept, false).await.unwrap();
        NodeService::collect(&node, false).await.unwrap();
        assert!(!images().contains(&was.image) && images().contains(&is.image));
        assert_eq!(node.live().iter().map(|live| live.sandbox.clone()).collect::<Vec<_>>(), [of_new]);
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
        let absent = of_image("absent");
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
