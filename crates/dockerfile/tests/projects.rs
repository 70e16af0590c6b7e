//! Dockerfiles as people write them, whole.

#![allow(clippy::unwrap_used)]

use kelvin_dockerfile::{Action, CopyFrom, Dockerfile, ImageConfig, Options, Plan, Source, StageFrom, seam};
use kelvin_node_api::Instruction;

fn plan(text: &str, options: &Options) -> Plan {
    Dockerfile::parse(text).and_then(|file| file.plan(options)).unwrap_or_else(|error| panic!("{error}"))
}

/// `name <- begin: lines of its steps`, for each stage.
fn outline(plan: &Plan) -> Vec<String> {
    let stages = plan.stages.iter().map(|stage| {
        let from = match &stage.from {
            StageFrom::Image(reference) => reference.clone(),
            StageFrom::Stage(place) => format!("#{place}"),
            StageFrom::Scratch => "scratch".to_owned(),
        };
        let lines: Vec<String> = stage.steps.iter().map(|step| step.line.to_string()).collect();
        format!("{} <- {from}: {}", stage.name.as_deref().unwrap_or("-"), lines.join(" "))
    });
    stages.collect()
}

#[test]
fn a_python_service_of_three_stages() {
    let text = include_str!("projects/python/Dockerfile");
    let image = ImageConfig {
        env: vec![("PATH".to_owned(), "/usr/local/bin:/usr/bin".to_owned())],
        cmd: vec!["python3".to_owned()],
        ..ImageConfig::default()
    };
    let options = Options { images: [("python:3.12-slim".to_owned(), image)].into(), ..Options::default() };
    let plan = plan(text, &options);
    // `test` is not needed; `builder` and the last stage begin with `base`.
    assert_eq!(
        outline(&plan),
        ["base <- python:3.12-slim: 4", "builder <- #0: 10 15 16 17", "- <- #0: 25 26 27 28 29 30 35"]
    );
    assert_eq!(plan.waves(), [vec![0], vec![1], vec![2]]);
    assert_eq!(
        plan.start.as_deref(),
        Some("exec ./entrypoint.sh gunicorn -b 0.0.0.0:8000 'app:create_app()'")
    );
    let ready = plan.ready.unwrap();
    assert!(ready.starts_with("python -c \"import") && ready.ends_with("/health')\""), "{ready}");
    let steps = &plan.stages[2].steps;
    let Action::Env(pairs) = &steps[2].action else { panic!("{:?}", steps[2]) };
    assert_eq!(pairs[0].1.literal(), Some("/venv/bin:/usr/local/bin:/usr/bin"));
    assert_eq!((steps[2].shown.as_str(), steps[3].shown.as_str()), ("ENV PATH", "WORKDIR /app"));
    let Action::Copy(copy) = &steps[5].action else { panic!("{:?}", steps[5]) };
    let script = "#!/bin/sh\nset -eu\nexec \"$@\"\n".to_owned();
    assert_eq!(copy.sources, [Source::Inline { name: "ENTRY".to_owned(), content: script }]);
    assert_eq!((copy.to.literal(), copy.mode), (Some("/app/entrypoint.sh"), Some(0o755)));
    let Action::Run { argv, variables } = &steps[0].action else { panic!("{:?}", steps[0]) };
    assert_eq!((variables[0].0.as_str(), variables[0].1.literal()), ("APP_UID", Some("10001")));
    assert_eq!(argv[2], "useradd --uid \"${APP_UID}\" --create-home app");
    let Action::Run { argv, .. } = &plan.stages[1].steps[0].action else { panic!("{:?}", plan.stages[1]) };
    assert!(argv[2].contains("build-essential") && !argv[2].contains('#'));
    // The same step for a node of today.
    assert_eq!(
        seam::instruction(&steps[0].action),
        Some(Instruction::Run {
            command: "[ -n \"${APP_UID+x}\" ] || APP_UID=10001; export APP_UID; \
                exec /bin/sh -c 'useradd --uid \"${APP_UID}\" --create-home app'"
                .to_owned(),
            user: None,
            argv: None
        })
    );
}

#[test]
fn a_node_app_of_three_stages() {
    let plan = plan(include_str!("projects/node/Dockerfile"), &Options::default());
    assert_eq!(
        outline(&plan),
        [
            "deps <- node:20-alpine: 2 3 4",
            "builder <- node:20-alpine: 7 8 9 10 11",
            "runner <- node:20-alpine: 14 15 16 21 22 23 25"
        ]
    );
    assert_eq!(plan.images(), ["node:20-alpine"]);
    assert_eq!(plan.stages[2].needs, [0, 1]);
    // The image's own ENTRYPOINT comes before CMD.
    let start = plan.start_of(&["docker-entrypoint.sh".to_owned()], &["node".to_owned()]);
    assert_eq!(start.as_deref(), Some("exec docker-entrypoint.sh /bin/sh -c 'node server.js --port $PORT'"));
    let Action::Run { argv, .. } = &plan.stages[2].steps[2].action else { panic!("{:?}", plan.stages[2]) };
    assert!(argv[2].starts_with("set -e\naddgroup") && argv[2].ends_with("nextjs\n"));
    let Action::Copy(copy) = &plan.stages[2].steps[3].action else { panic!("{:?}", plan.stages[2]) };
    assert_eq!(
        (copy.from, copy.owner.literal(), copy.to.literal()),
        (CopyFrom::Stage(1), Some("nextjs:nodejs"), Some("/app/"))
    );
    assert_eq!(seam::instruction(&plan.stages[2].steps[3].action), None);
}

#[test]
fn a_go_program_in_an_empty_image() {
    let options = Options { args: [("VERSION".to_owned(), "1.0".to_owned())].into(), ..Options::default() };
    let plan = plan(include_str!("projects/go/Dockerfile"), &options);
    assert_eq!(
        outline(&plan),
        [
            "- <- gcr.io/distroless/static:nonroot: ",
            "build <- golang:1.22: 8 9 10 11 12",
            "- <- scratch: 18 19 20"
        ]
    );
    assert_eq!(plan.waves(), [vec![0, 1], vec![2]]);
    assert_eq!((plan.start.as_deref(), plan.ready), (Some("exec /app"), None));
    let Action::Run { variables, .. } = &plan.stages[1].steps[4].action else {
        panic!("{:?}", plan.stages[1])
    };
    let values: Vec<_> =
        variables.iter().map(|(name, value)| (name.as_str(), value.literal().unwrap())).collect();
    assert_eq!(values, [("TARGETOS", "linux"), ("TARGETARCH", "amd64"), ("VERSION", "1.0")]);
    assert_eq!(plan.config.labels.len(), 2);
    assert_eq!(plan.config.stop_signal.as_deref(), Some("SIGTERM"));
}
