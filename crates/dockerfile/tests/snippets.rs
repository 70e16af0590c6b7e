//! Snippets of Dockerfiles: what they come to, and on which line they are refused.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fmt::Write as _;

use kelvin_dockerfile::{
    Action, CopyFrom, Dockerfile, Error, ImageConfig, Options, Part, Plan, Source, StageFrom, Step, Text,
};
use proptest::prelude::*;

fn options() -> Options {
    let args =
        [("given", "g"), ("HTTP_PROXY", "http://p")].map(|(name, value)| (name.to_owned(), value.to_owned()));
    let known = ImageConfig {
        env: vec![("PATH".to_owned(), "/bin".to_owned()), ("LANG".to_owned(), "C".to_owned())],
        workdir: "/home".to_owned(),
        entrypoint: vec!["entry".to_owned()],
        cmd: vec!["cmd".to_owned()],
        shell: Vec::new(),
    };
    Options { target: None, args: args.into(), images: BTreeMap::from([("known".to_owned(), known)]) }
}

fn plan_of(text: &str) -> Result<Plan, Error> {
    Dockerfile::parse(text)?.plan(&options())
}

fn shown(text: &Text) -> String {
    let parts = text.parts().iter().map(|part| match part {
        Part::Literal(literal) => literal.clone(),
        Part::Variable { name, .. } => format!("<{name}>"),
    });
    parts.collect()
}

fn step(step: &Step) -> String {
    match &step.action {
        Action::Env(pairs) => pairs.iter().fold("env".to_owned(), |mut made, (name, value)| {
            let _ = write!(made, " {name}={}", shown(value));
            made
        }),
        Action::Workdir(path) => format!("workdir {}", shown(path)),
        Action::User(user) => format!("user {}", shown(user)),
        Action::Run { argv, variables } => {
            let values: Vec<String> =
                variables.iter().map(|(name, value)| format!("{name}={}", shown(value))).collect();
            // What every RUN of these has.
            let values: Vec<_> = values.into_iter().filter(|value| value != "HTTP_PROXY=http://p").collect();
            let argv = argv.join("|").replace("/bin/sh|-c|", "$ ");
            if values.is_empty() { format!("run {argv}") } else { format!("run {} {argv}", values.join(",")) }
        }
        Action::Copy(copy) => {
            let sources: Vec<String> = copy
                .sources
                .iter()
                .map(|source| match source {
                    Source::Path(path) => path.clone(),
                    Source::Inline { name, content } => format!("{name}={content:?}"),
                })
                .collect();
            let verb = if copy.unpack { "add" } else { "copy" };
            let from = match copy.from {
                CopyFrom::Context => String::new(),
                CopyFrom::Stage(stage) => format!("{stage}:"),
            };
            let mode = copy.mode.map(|mode| format!(" {mode:o}")).unwrap_or_default();
            format!("{verb} {from}{} -> {} {}{mode}", sources.join(","), shown(&copy.to), shown(&copy.owner))
        }
    }
}

/// The steps of the target, one a line.
fn steps(plan: &Plan) -> String {
    plan.stages[plan.target].steps.iter().map(step).collect::<Vec<_>>().join("\n")
}

/// After `FROM known`: the steps.
const GOOD: &[(&str, &str)] = &[
    // RUN.
    ("RUN echo hi", "run $ echo hi"),
    ("run   echo  'a  b' ", "run $ echo  'a  b'"),
    ("RUN a && \\\n    b", "run $ a &&     b"),
    ("RUN a \\\n# comment\n\n b", "run $ a  b"),
    ("RUN [\"a\", \"$x\", \"it's\"]", "run a|$x|it's"),
    ("RUN [a, b]", "run $ [a, b]"),
    ("RUN ['a']", "run $ ['a']"),
    ("RUN --network=default --security=sandbox a", "run $ a"),
    ("RUN <<EOF\na\nb\nEOF", "run $ a\nb\n"),
    ("RUN <<-EOF\n\ta\n\tEOF", "run $ a\n"),
    ("RUN <<'EOF'\necho $x\nEOF", "run $ echo $x\n"),
    ("RUN cat <<A >x <<B\n1\nA\n2\nB\nUSER u", "run $ cat <<A >x <<B\n1\nA\n2\nB\nuser u"),
    ("RUN python3 <<EOF\nprint(1)\nEOF", "run $ python3 <<EOF\nprint(1)\nEOF"),
    ("RUN echo $((1<<2))", "run $ echo $((1<<2))"),
    ("SHELL [\"/bin/bash\", \"-eu\", \"-c\"]\nRUN a\nRUN [\"b\"]", "run /bin/bash|-eu|-c|a\nrun b"),
    // ARG.
    ("ARG a=1\nRUN x", "run a=1 $ x"),
    ("ARG a\nRUN x", "run $ x"),
    ("ARG given\nRUN x", "run given=g $ x"),
    ("ARG given=default\nRUN x", "run given=g $ x"),
    ("RUN x\nARG a=1", "run $ x"),
    ("ARG a=1 b=\"2 3\"\nENV c=$a$b", "env c=12 3"),
    ("ARG a=1\nENV a=2\nRUN x$a", "env a=2\nrun $ x$a"),
    ("ARG LANG=no\nENV x=$LANG", "env x=C"),
    ("ARG a=1\nARG b=${a}2\nUSER $b", "user 12"),
    (
        "ARG TARGETARCH\nARG TARGETPLATFORM\nENV a=$TARGETARCH b=$TARGETPLATFORM c=$TARGETOS",
        "env a=amd64 b=linux/amd64 c=",
    ),
    // ENV.
    ("ENV a=1 b='2 3' c=\"4 5\" d=6\\ 7", "env a=1 b=2 3 c=4 5 d=6 7"),
    ("ENV a some  value", "env a=some  value"),
    ("ENV a \"x y\"", "env a=x y"),
    ("ENV PATH=/app:$PATH", "env PATH=/app:/bin"),
    ("ENV a=hello\nENV a=bye b=$a\nENV c=$a", "env a=hello\nenv a=bye b=hello\nenv c=bye"),
    ("ENV a=\\$b c='$b'", "env a=$b c=$b"),
    ("ENV a=${none:-d} b=${LANG:+x} c=${LANG#C}", "env a=d b=x c="),
    ("ENV v=1.2.3\nENV m=${v%%.*} r=${v//./-}", "env v=1.2.3\nenv m=1 r=1-2-3"),
    ("ENV k=n\nENV $k=v", "env k=n\nenv n=v"),
    ("ENV a=", "env a="),
    ("ENV a=b=c", "env a=b=c"),
    // WORKDIR and USER.
    ("WORKDIR /a\nWORKDIR b\nWORKDIR ../c/", "workdir /a\nworkdir /a/b\nworkdir /a/c"),
    ("WORKDIR x", "workdir /home/x"),
    ("ENV d=/srv\nWORKDIR $d/app", "env d=/srv\nworkdir /srv/app"),
    ("WORKDIR /a b", "workdir /a b"),
    ("USER app:staff", "user app:staff"),
    ("ENV u=me\nUSER ${u}", "env u=me\nuser me"),
    // COPY and ADD.
    ("COPY a /b", "copy a -> /b 0:0"),
    ("COPY a .", "copy a -> /home/ 0:0"),
    ("COPY a ./", "copy a -> /home/ 0:0"),
    ("COPY a b/..", "copy a -> /home/ 0:0"),
    ("COPY a b", "copy a -> /home/b 0:0"),
    ("COPY a /", "copy a -> / 0:0"),
    ("COPY a b /c/", "copy a,b -> /c/ 0:0"),
    ("WORKDIR /w\nCOPY *.txt x/", "workdir /w\ncopy *.txt -> /w/x/ 0:0"),
    ("COPY [\"a b\", \"c/\"]", "copy a b -> /home/c/ 0:0"),
    ("COPY --chown=app:app --chmod=0755 a /b", "copy a -> /b app:app 755"),
    ("ENV u=me\nCOPY --chown=$u a /b", "env u=me\ncopy a -> /b me"),
    ("USER app\nCOPY --link a /b", "user app\ncopy a -> /b 0:0"),
    ("ENV s=src\nCOPY $s/a ${s}/", "env s=src\ncopy src/a -> /home/src/ 0:0"),
    ("COPY <<EOF /etc/x\na $LANG\nEOF", "copy EOF=\"a C\\n\" -> /etc/x 0:0"),
    ("COPY <<'EOF' /etc/x\na $LANG \"b\"\nEOF", "copy EOF=\"a $LANG \\\"b\\\"\\n\" -> /etc/x 0:0"),
    ("COPY <<a f <<-b /d/\n'$LANG'\na\n\tx\nb", "copy a=\"'C'\\n\",f,b=\"x\\n\" -> /d/ 0:0"),
    ("COPY <<EOF /x\nEOF", "copy EOF=\"\" -> /x 0:0"),
    ("ADD a.tar.gz /x/", "add a.tar.gz -> /x/ 0:0"),
    ("ADD --unpack=false a.tar /x/", "copy a.tar -> /x/ 0:0"),
    ("COPY --from=other /x /y", "copy 0:/x -> /y 0:0"),
    // What does nothing in the machine.
    ("LABEL a=b\nEXPOSE 80\nVOLUME /v\nSTOPSIGNAL SIGINT\nMAINTAINER me\nCMD x\nHEALTHCHECK NONE", ""),
    ("  # comment\n\t RUN a", "run $ a"),
];

#[test]
fn good_snippets_come_to_their_steps() {
    assert!(GOOD.len() >= 60);
    for (body, expected) in GOOD {
        let plan =
            plan_of(&format!("FROM known\n{body}\n")).unwrap_or_else(|error| panic!("{body}: {error}"));
        assert_eq!(steps(&plan), *expected, "{body}");
        // Windows' ends of lines are the same.
        let other = plan_of(&format!("FROM known\n{body}\n").replace('\n', "\r\n"));
        assert_eq!(steps(&other.unwrap()), *expected, "{body}");
    }
}

/// A whole Dockerfile, the line of its error, and a part of what that says.
const BAD: &[(&str, u32, &str)] = &[
    ("", 0, "no FROM"),
    ("# FROM a", 0, "no FROM"),
    ("RUN a\nFROM b", 1, "before the first FROM"),
    ("ARG a\nENV b=c\nFROM b", 2, "before the first FROM"),
    ("FROM", 1, "FROM image"),
    ("FROM a b", 1, "FROM image"),
    ("FROM a AS 1x", 1, "name of a stage"),
    ("FROM a AS scratch", 1, "scratch"),
    ("FROM a AS x\nFROM b AS X", 2, "another stage"),
    ("FROM $none", 1, "no image"),
    ("FROM --platform=linux/arm64 a", 1, "linux/arm64"),
    ("ARG p=windows/amd64\nFROM --platform=$p a", 2, "windows/amd64"),
    ("FROM --platform a", 1, "--platform has a value"),
    ("FROM --x=y a", 1, "no flag --x"),
    ("FROM a\n\nRUM b", 3, "perhaps RUN"),
    ("FROM a\nRUN x && \\\n y\napt-get install", 4, "no instruction apt-get"),
    ("FROM a\nRUN", 2, "has a command"),
    ("FROM a\nRUN []", 2, "has a command"),
    ("FROM a\nRUN [\"a\", 1]", 2, "texts alone"),
    ("FROM a\nRUN --mount=type=cache,target=/x y", 2, "--mount=type=cache,target=/x is not supported"),
    ("FROM a\nRUN --mount=type=secret,id=x y", 2, "--mount=type=secret"),
    ("FROM a\nRUN --mount=type=bind,target=. y", 2, "--mount=type=bind"),
    ("FROM a\nRUN --network=none y", 2, "--network=none is not supported"),
    ("FROM a\nRUN --network=host y", 2, "--network=host"),
    ("FROM a\nRUN --security=insecure y", 2, "--security=insecure"),
    ("FROM a\nRUN --wrong y", 2, "no flag --wrong"),
    ("FROM a\nRUN <<EOF\nx", 2, "no line is EOF"),
    ("FROM a\nENV", 2, "at least one argument"),
    ("FROM a\nENV x", 2, "a name and a value"),
    ("FROM a\nENV x=1 y", 2, "y has no `=`"),
    ("FROM a\nENV =1", 2, "a name before `=`"),
    ("FROM a\nENV x='1", 2, "a ' is missing"),
    ("FROM a\nENV x=${y", 2, "a } is missing"),
    ("FROM a\nENV x=${}", 2, "bad substitution"),
    ("FROM a\nENV y=1\nENV x=${y^^}", 3, "${y^"),
    ("FROM scratch\nENV x=\"${y:?is needed}\"", 2, "y: is needed"),
    ("FROM a\nARG", 2, "at least one argument"),
    ("FROM a\nARG =x", 2, "a name before `=`"),
    ("FROM a\nCOPY", 2, "at least one source"),
    ("FROM a\nCOPY x", 2, "at least one source"),
    ("FROM a\nCOPY x y /z", 2, "ends in `/`"),
    ("FROM a\nCOPY --from=9 x /y", 2, "no stage 9"),
    ("FROM a\nCOPY --from=0 x /y", 2, "needs itself"),
    ("FROM a AS x\nCOPY --from=y 1 /1\nFROM b AS y\nCOPY --from=x 2 /2\nFROM x", 4, "needs itself"),
    ("FROM a AS x\nCOPY --from=y 1 /1\nFROM x AS y\nFROM x", 3, "needs itself"),
    ("FROM a\nCOPY --from=$x a /y", 2, "a variable in --from"),
    ("FROM a\nCOPY --chmod=u+x a /y", 2, "--chmod=u+x is not supported"),
    ("FROM a\nCOPY --chmod=999 a /y", 2, "in octal"),
    ("FROM a\nCOPY --parents a /y", 2, "--parents"),
    ("FROM a\nCOPY --exclude=*.o a /y", 2, "--exclude=*.o"),
    ("FROM a\nCOPY --chown=a --chown=b a /y", 2, "--chown is there twice"),
    ("FROM a\nCOPY https://example.com/x /y", 2, "URL https://example.com/x"),
    ("FROM a\nCOPY $HOME/x /y", 2, "HOME may be a variable of the image"),
    ("FROM a\nCOPY <<EOF /y\n$HOME\nEOF", 2, "HOME may be"),
    ("FROM a\nCOPY <<EOF\nx\nEOF", 2, "at least one source"),
    ("FROM a\nCOPY <<../e /x/\n../e", 2, "no name of a file"),
    ("FROM a\nADD https://example.com/x.tar.gz /y", 2, "ADD of the URL"),
    ("FROM a\nADD https://example.com/x.git#main /y", 2, "ADD of the repository"),
    ("FROM a\nADD git@example.com:x.git /y", 2, "ADD of the repository"),
    ("FROM a\nADD --checksum=sha256:00 x /y", 2, "--checksum"),
    ("FROM a\nWORKDIR", 2, "exactly one argument"),
    ("FROM scratch\nWORKDIR $none", 2, "WORKDIR is empty"),
    ("FROM scratch\nUSER $none", 2, "USER is empty"),
    ("FROM a\nSHELL /bin/bash -c", 2, "JSON array"),
    ("FROM a\nEXPOSE 80/http", 2, "80/http is no port"),
    ("FROM a\nEXPOSE 90000", 2, "no port"),
    ("FROM a\nEXPOSE", 2, "at least one argument"),
    ("FROM a\nSTOPSIGNAL 99", 2, "no signal"),
    ("FROM a\nHEALTHCHECK curl x", 2, "HEALTHCHECK CMD"),
    ("FROM a\nHEALTHCHECK --interval=5 CMD x", 2, "--interval is a time"),
    ("FROM a\nHEALTHCHECK --retries=-1 CMD x", 2, "--retries"),
    ("FROM a\nONBUILD RUN x", 2, "ONBUILD is not supported"),
    ("FROM a\nVOLUME []", 2, "at least one argument"),
    ("# syntax=example.com/lang\nFROM a", 1, "example.com/lang"),
    ("# escape=x\nFROM a", 1, "escape"),
];

#[test]
fn bad_snippets_are_refused_with_their_line() {
    assert!(BAD.len() >= 40);
    for (text, line, says) in BAD {
        let error = plan_of(text).map(|plan| steps(&plan)).expect_err(text);
        assert_eq!(error.line, *line, "{text}: {error}");
        assert!(error.to_string().contains(says), "{text}: {error}");
        let failure = error.failure();
        assert!(!failure.remediation.is_empty() && !failure.message.is_empty());
        if *line > 0 {
            let instruction = text.lines().nth(*line as usize - 1).unwrap();
            assert!(instruction.starts_with(&error.instruction), "{text}: {error}");
        }
    }
}

#[test]
fn growth_is_bounded() {
    let doubling = format!("FROM scratch\nENV a=xxxxxxxx\n{}", "ENV a=$a$a\n".repeat(40));
    assert!(plan_of(&doubling).unwrap_err().to_string().contains("longer than"));
    let deferred = format!("FROM a\n{}", "ENV a=$b$b\nENV b=$a$a\n".repeat(1000));
    assert!(plan_of(&deferred).is_ok());
    for (text, what) in [
        ("#".repeat((1 << 20) + 1), "bytes"),
        ("FROM a\n".repeat(129), "stages"),
        (format!("FROM a\n{}", "USER b\n".repeat(4096)), "instructions"),
        (format!("FROM a\nRUN {}", "x".repeat(140_000)), "bytes"),
        (format!("FROM a\nENV {}", (0..5000).map(|at| format!("a{at}=1 ")).collect::<String>()), "variables"),
        (
            format!("FROM a\nARG {}", (0..5000).map(|at| format!("a{at} ")).collect::<String>()),
            "build arguments",
        ),
        (format!("FROM a\nVOLUME {}", (0..5000).map(|at| format!("/{at} ")).collect::<String>()), "volumes"),
        (format!("FROM a\nRUN {}", (0..100).map(|at| format!("--a{at} ")).collect::<String>()), "flags"),
        (format!("FROM scratch\nENV a={}\nENV b=${{a//*a*b/}}", "a".repeat(5000)), "too long together"),
    ] {
        assert!(plan_of(&text).unwrap_err().to_string().contains(what), "{what}");
    }
    // A chain of stages is walked to its end.
    let chain: String = (0..127)
        .map(|at| {
            format!("FROM {} AS s{}\n", if at == 0 { "a".to_owned() } else { format!("s{}", at - 1) }, at)
        })
        .collect();
    assert_eq!(plan_of(&chain).unwrap().stages.len(), 127);
}

#[test]
fn only_what_the_target_needs_is_planned() {
    let text = "ARG v=3\nARG base=img:$v\n\
        FROM $base AS build\nRUN make\n\
        FROM other AS unused\nRUN --mount=type=cache,target=/x make\n\
        FROM build AS test\nRUN test\n\
        FROM scratch\nCOPY --from=build /out /\nCOPY --from=busybox:1 /bin/sh /sh\nCOPY --from=2 /r /\n";
    let file = Dockerfile::parse(text).unwrap();
    let plan = file.plan(&Options::default()).unwrap();
    let names: Vec<_> =
        plan.stages.iter().map(|stage| (stage.name.as_deref(), stage.needs.clone())).collect();
    let expected = [(Some("build"), vec![]), (None, vec![]), (Some("test"), vec![0]), (None, vec![0, 1, 2])];
    assert_eq!(names, expected);
    assert_eq!(plan.stages[0].from, StageFrom::Image("img:3".to_owned()));
    assert_eq!((plan.target, plan.images()), (3, vec!["img:3", "busybox:1"]));
    assert_eq!(plan.waves(), [vec![0, 1], vec![2], vec![3]]);
    let at = |target: &str| file.plan(&Options { target: Some(target.to_owned()), ..Options::default() });
    assert_eq!(at("BUILD").unwrap().stages.len(), 1);
    assert_eq!(at("2").unwrap().stages.len(), 2);
    assert_eq!(at("unused").unwrap_err().line, 6);
    assert_eq!(at("none").unwrap_err().line, 0);
}

#[test]
fn variables_of_an_unknown_image_stay_variables() {
    let plan = plan_of(
        "FROM a\nENV PATH=/app:$PATH x=${HOME:-/}\nENV y=$PATH z=1\nWORKDIR $HOME/w\nWORKDIR v\n\
         COPY a b\nRUN c\nCOPY a $z",
    )
    .unwrap();
    let expected = "env PATH=/app:<PATH> x=<HOME>\nenv y=<PATH> z=1\nworkdir <HOME>/w\nworkdir v\n\
        copy a -> b 0:0\nrun $ c\ncopy a -> 1 0:0";
    assert_eq!(steps(&plan), expected);
    // What a stage knows goes on into those that begin with it; an ARG does not.
    let plan =
        plan_of("FROM scratch AS a\nENV x=1\nARG y=2\nWORKDIR /d\nUSER u\nFROM a\nENV z=$x$y\nCOPY f g")
            .unwrap();
    assert_eq!(steps(&plan), "env z=1\ncopy f -> /d/g 0:0");
}

#[test]
fn commands_are_put_together_as_by_docker() {
    let start = |text: &str| plan_of(text).unwrap().start;
    let cases = [
        ("FROM known", Some("exec entry cmd")),
        ("FROM known\nCMD [\"a\", \"b c\"]", Some("exec entry a 'b c'")),
        ("FROM known\nENTRYPOINT [\"x\"]", Some("exec x")),
        ("FROM known\nCMD [\"a\"]\nENTRYPOINT [\"x\"]", Some("exec x a")),
        ("FROM known\nENTRYPOINT []", None),
        ("FROM scratch", None),
        ("FROM scratch\nCMD python3 -m x $PORT", Some("exec /bin/sh -c 'python3 -m x $PORT'")),
        ("FROM scratch\nSHELL [\"/bin/bash\", \"-c\"]\nCMD a", Some("exec /bin/bash -c a")),
        ("FROM scratch\nENTRYPOINT serve\nCMD [\"-v\"]", Some("exec /bin/sh -c serve -v")),
        ("FROM scratch AS a\nCMD [\"a\"]\nFROM a\nENTRYPOINT [\"x\"]", Some("exec x")),
        ("FROM scratch AS a\nENTRYPOINT [\"x\"]\nFROM a\nCMD [\"a\"]", Some("exec x a")),
        ("FROM a\nCMD [\"a\"]", Some("exec a")),
    ];
    for (text, expected) in cases {
        assert_eq!(start(text).as_deref(), expected, "{text}");
    }
    // What the image says comes in when it is known.
    let plan = plan_of("FROM a\nCMD [\"a\"]").unwrap();
    assert_eq!(
        plan.start_of(&["docker-entrypoint.sh".to_owned()], &[]).as_deref(),
        Some("exec docker-entrypoint.sh a")
    );
    let ready = |text: &str| plan_of(&format!("FROM a\n{text}")).unwrap().ready;
    assert_eq!(
        ready("HEALTHCHECK --interval=5s CMD curl -f localhost || exit 1").as_deref(),
        Some("curl -f localhost || exit 1")
    );
    assert_eq!(ready("HEALTHCHECK CMD [\"a\", \"b c\"]").as_deref(), Some("exec a 'b c'"));
    assert_eq!(ready("HEALTHCHECK CMD a\nHEALTHCHECK NONE"), None);
    assert_eq!(ready("RUN a"), None);
}

#[test]
fn what_an_image_says_about_itself_is_kept() {
    let plan = plan_of(
        "FROM a\nLABEL a=1 \"b c\"=\"2 3\"\nMAINTAINER me <m@e>\nEXPOSE 80 53/UDP 8000-8002\nEXPOSE 80\n\
         VOLUME [\"/a b\"]\nVOLUME /c /d\nSTOPSIGNAL SIGINT\nHEALTHCHECK --retries=2 --timeout=1m CMD x",
    )
    .unwrap();
    let labels: Vec<_> =
        plan.config.labels.iter().map(|(name, value)| format!("{name}={}", shown(value))).collect();
    assert_eq!(labels, ["a=1", "b c=2 3", "maintainer=me <m@e>"]);
    assert_eq!(plan.config.exposed, ["80/tcp", "53/udp", "8000-8002/tcp"]);
    assert_eq!(plan.config.volumes, ["/a b", "/c", "/d"]);
    assert_eq!(plan.config.stop_signal.as_deref(), Some("SIGINT"));
    assert_eq!(plan.warnings, ["no ARG asks for the build argument given"]);
    // A plan goes from part to part.
    let json = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), plan);
}

fn words() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        Just("FROM a AS b\n"),
        Just("RUN "),
        Just("COPY "),
        Just("ADD "),
        Just("ENV "),
        Just("ARG "),
        Just("--from=b "),
        Just("WORKDIR "),
        Just("HEALTHCHECK CMD "),
        Just("SHELL "),
        Just("<<EOF "),
        Just("EOF\n"),
        Just("\\\n"),
        Just("\n"),
        Just("["),
        Just("\"x\""),
        Just("]"),
        Just("$x"),
        Just("${x"),
        Just(":-"),
        Just("//"),
        Just("}"),
        Just("'"),
        Just("*"),
        Just("# escape=`\n"),
        Just("a=b "),
        Just("/"),
        Just(".. "),
        Just("é"),
        Just("\0"),
        Just("\t"),
        Just("--chmod=7"),
    ];
    prop::collection::vec(word, 0..60).prop_map(|words| words.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_makes_the_parser_panic(text in any::<String>()) {
        let _ = plan_of(&format!("FROM a\n{text}"));
        let _ = plan_of(&text);
    }

    #[test]
    fn no_mix_of_words_makes_the_parser_panic(text in words()) {
        if let Err(error) = plan_of(&format!("FROM scratch\n{text}")) {
            prop_assert!(error.line as usize <= text.lines().count() + 1);
        }
        let _ = plan_of(&text);
    }
}
