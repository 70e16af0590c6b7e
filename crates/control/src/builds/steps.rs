//! Steps of a build as a request has them: checked, all of them, before anything is started.

use kelvin_api::build::{MOST_STEPS, StartBuild, TemplateStep, is_owner};
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::FilesHash;
use kelvin_node_api::{BuildStep, Instruction};

/// Characters of a step as it is shown.
const SHOWN: usize = 200;
/// Of a mode: permissions, set-user-id, set-group-id and sticky.
const MODES: u32 = 0o7777;

/// Why a step is none, and what to do.
struct Bad(String, &'static str);

type Checked<T> = Result<T, Bad>;

fn bad<T>(text: impl Into<String>, remedy: &'static str) -> Checked<T> {
    Err(Bad(text.into(), remedy))
}

/// A text that a command or a path may be.
fn text<'a>(what: &str, text: &'a str) -> Checked<&'a str> {
    if text.is_empty() || text.contains('\0') {
        return bad(format!("its {what} is empty, or has a NUL byte"), "give it one");
    }
    Ok(text)
}

/// `user`, `user:group`, or their ids.
fn owner(text: &str) -> Checked<&str> {
    if !is_owner(text) {
        return bad(format!("{:?} is no user", short(text)), "name a user, or user:group, or their ids");
    }
    Ok(text)
}

/// What of the uploaded files is copied.
fn source(text: &str) -> Checked<&str> {
    if text.contains("://") {
        return bad("URLs are not fetched", "fetch it in a RUN step, with curl");
    }
    let is_inside =
        !text.starts_with('/') && !text.contains('\0') && !text.split('/').any(|part| part == "..");
    match text {
        "" => bad("its source is empty", "name a path in the context, `.` for all of it"),
        _ if !is_inside => {
            bad("its source is not inside of the context", "name a relative path without `..`")
        }
        _ => Ok(text),
    }
}

/// What of a stage's disk is copied.
fn path_of_stage(text: &str) -> Checked<&str> {
    if text.is_empty() || text.contains('\0') || text.split('/').any(|part| part == "..") {
        return bad(
            "its source is empty, or has a NUL byte or `..`",
            "name a path from the root of the stage's disk",
        );
    }
    Ok(text)
}

fn copy(args: &[String], step: &TemplateStep) -> Checked<Instruction> {
    let (from, to, rest) = match args {
        [from, to, rest @ ..] if rest.len() <= 2 => (from, to, rest),
        _ => {
            return bad("it has a source and a destination, an owner and a mode", "give it 2 to 4 arguments");
        }
    };
    let given = |at: usize| rest.get(at).map(String::as_str).filter(|text| !text.is_empty());
    let mode = match given(1) {
        None => None,
        Some(text) => {
            let mode = u32::from_str_radix(text.trim_start_matches("0o"), 8).ok();
            let Some(mode) = mode.filter(|mode| *mode <= MODES) else {
                return bad(format!("{:?} is no mode", short(text)), "give it in octal, for example 0755");
            };
            Some(mode)
        }
    };
    let owner = given(0).map(owner).transpose()?.map(str::to_owned);
    if let Some(stage) = step.from_stage {
        if step.files_hash.is_some() {
            return bad("it has fromStage and filesHash", "copy from one of them");
        }
        let (from, to) = (path_of_stage(from)?.to_owned(), text("destination", to)?.to_owned());
        return Ok(Instruction::CopyFrom { stage, from, to, owner, mode });
    }
    let Some(files) = &step.files_hash else {
        return bad("it has no filesHash", "upload the files, and say what they are called");
    };
    let Ok(files) = files.parse::<FilesHash>() else {
        return bad("its filesHash is none", "make it of 64 hexadecimal digits in lower case");
    };
    Ok(Instruction::Copy {
        files,
        from: source(from)?.to_owned(),
        to: text("destination", to)?.to_owned(),
        owner,
        mode,
    })
}

fn variables(args: &[String]) -> Checked<Instruction> {
    if args.is_empty() || args.len() % 2 == 1 {
        return bad("it has names and values in turn", "give each variable a value");
    }
    let mut variables = Vec::new();
    for pair in args.chunks_exact(2) {
        let (name, value) = (&pair[0], &pair[1]);
        let is_name = !name.is_empty() && name.len() <= 1024 && !name.contains(['=', '\0']);
        if !is_name || value.contains('\0') {
            let text = format!("{:?} cannot be an environment variable", short(name));
            return bad(text, "names are not empty and have no '='; neither they nor values have a NUL byte");
        }
        variables.push((name.clone(), value.clone()));
    }
    Ok(Instruction::Env(variables))
}

/// A program and its arguments.
fn run(args: &[String], argv: &[String], user: Option<&str>) -> Checked<Instruction> {
    if args.len() > 2 || args.first().is_some_and(|command| !command.is_empty()) {
        return bad("it has a command and argv", "leave the command empty");
    }
    if argv.first().is_none_or(String::is_empty) || argv.iter().any(|word| word.contains('\0')) {
        return bad("its argv has no program, or a NUL byte", "name a program, and its arguments");
    }
    let user = user.map(owner).transpose()?.map(str::to_owned);
    Ok(Instruction::Run { command: String::new(), user, argv: Some(argv.to_vec()) })
}

fn instruction(step: &TemplateStep) -> Checked<Instruction> {
    let given = |at: usize| step.args.get(at).map(String::as_str).filter(|text| !text.is_empty());
    let kind = step.kind.to_ascii_uppercase();
    if step.from_stage.is_some() && kind != "COPY" {
        return bad("it has fromStage", "that is for COPY");
    }
    match (kind.as_str(), &step.args[..]) {
        ("COPY" | "ADD", args) if step.argv.is_none() => copy(args, step),
        ("RUN", args) if step.argv.is_some() => run(args, step.argv.as_deref().unwrap_or_default(), given(1)),
        _ if step.argv.is_some() => bad("it has argv", "that is for RUN"),
        ("RUN", [command] | [command, _]) => Ok(Instruction::Run {
            command: text("command", command)?.to_owned(),
            user: given(1).map(owner).transpose()?.map(str::to_owned),
            argv: None,
        }),
        ("RUN", _) => bad("it has a command and a user", "give it 1 or 2 arguments"),
        ("ENV", args) => variables(args),
        ("WORKDIR", [path]) => Ok(Instruction::Workdir(text("path", path)?.to_owned())),
        ("USER", [user]) => Ok(Instruction::User(owner(user)?.to_owned())),
        ("WORKDIR" | "USER", _) => bad("it has one argument", "give it one"),
        _ => bad("there is no such instruction", "use COPY, ADD, RUN, ENV, WORKDIR or USER"),
    }
}

/// The beginning of a text, in one line.
fn short(text: &str) -> String {
    let one_line = text.chars().map(|letter| if letter.is_control() { ' ' } else { letter });
    let mut shown: String = one_line.take(SHOWN).collect();
    if text.chars().count() > SHOWN {
        shown.push('…');
    }
    shown
}

/// A step as people know it: `RUN pip install flask`.
fn shown(step: &TemplateStep) -> String {
    let args: Vec<&str> = match step.kind.to_ascii_uppercase().as_str() {
        "COPY" | "ADD" => step.args.iter().take(2).map(String::as_str).collect(),
        "RUN" if step.argv.is_some() => step.argv.iter().flatten().map(String::as_str).collect(),
        "RUN" => step.args.iter().take(1).map(String::as_str).collect(),
        // Values may be secrets.
        "ENV" => step.args.iter().step_by(2).map(String::as_str).collect(),
        _ => step.args.iter().map(String::as_str).collect(),
    };
    let stage = step.from_stage.map(|stage| format!("--from={stage} ")).unwrap_or_default();
    short(&format!("{} {stage}{}", step.kind, args.join(" ")))
}

/// The steps of each stage of a build, its own last. A failure names the step by its number, from 1 on and through all stages, as
/// E2B's clients count them, and its stage, when there are several.
///
/// # Errors
/// `InvalidStep` for the first that is none.
pub(super) fn all_steps(body: &StartBuild) -> Result<Vec<Vec<BuildStep>>, Failure> {
    let stages: Vec<&[TemplateStep]> =
        body.stages.iter().map(|stage| &stage.steps[..]).chain([&body.steps[..]]).collect();
    let count: usize = stages.iter().map(|steps| steps.len()).sum();
    if count > MOST_STEPS {
        let text = format!("a build has at most {MOST_STEPS} steps, this one has {count}");
        return Err(Failure::new(ErrorCode::InvalidStep, text, "join commands with &&"));
    }
    let (mut all, mut first) = (Vec::new(), 1);
    for (stage, given) in stages.iter().enumerate() {
        let place = |at: usize| match stages.len() {
            1 => format!("step {}", first + at),
            _ => format!("stage {stage}, step {}", first + at),
        };
        let one = |(at, step): (usize, &TemplateStep)| {
            let made = match step.from_stage.and_then(|from| usize::try_from(from).ok()) {
                Some(from) if from >= stage => {
                    bad(format!("stage {from} is no earlier one"), "stages are counted from 0")
                }
                _ => instruction(step),
            };
            match made {
                Ok(instruction) => {
                    Ok(BuildStep { instruction, force: step.force == Some(true), shown: shown(step) })
                }
                Err(Bad(text, remedy)) => {
                    let text = format!("{} ({}): {text}", place(at), shown(step));
                    Err(Failure::new(ErrorCode::InvalidStep, text, remedy))
                }
            }
        };
        all.push(given.iter().enumerate().map(one).collect::<Result<Vec<_>, _>>()?);
        first += given.len();
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use kelvin_api::build::TemplateStage;

    use super::*;

    fn steps(steps: &[TemplateStep]) -> Result<Vec<BuildStep>, Failure> {
        all_steps(&StartBuild { steps: steps.to_vec(), ..StartBuild::default() }).map(|mut all| all.remove(0))
    }

    fn step(kind: &str, args: &[&str]) -> TemplateStep {
        TemplateStep {
            kind: kind.into(),
            args: args.iter().map(ToString::to_string).collect(),
            files_hash: Some("ab".repeat(32)),
            ..TemplateStep::default()
        }
    }

    #[test]
    fn steps_are_what_the_sdks_send() {
        let sent = [
            step("COPY", &["app", "/srv/", "", ""]),
            step("COPY", &["app.py", "app.py", "app:staff", "0755"]),
            step("RUN", &["pip install flask", "root"]),
            step("RUN", &["true"]),
            step("ENV", &["A", "1", "SECRET", ""]),
            step("WORKDIR", &["/srv"]),
            TemplateStep { force: Some(true), ..step("USER", &["app"]) },
        ];
        let made = steps(&sent).unwrap();
        let shown: Vec<&str> = made.iter().map(|step| step.shown.as_str()).collect();
        assert_eq!(
            shown,
            [
                "COPY app /srv/",
                "COPY app.py app.py",
                "RUN pip install flask",
                "RUN true",
                "ENV A SECRET",
                "WORKDIR /srv",
                "USER app"
            ]
        );
        let files: FilesHash = "ab".repeat(32).parse().unwrap();
        assert_eq!(
            made[1].instruction,
            Instruction::Copy {
                files,
                from: "app.py".into(),
                to: "app.py".into(),
                owner: Some("app:staff".into()),
                mode: Some(0o755)
            }
        );
        assert_eq!(
            made[2].instruction,
            Instruction::Run { command: "pip install flask".into(), user: Some("root".into()), argv: None }
        );
        assert_eq!(
            made[4].instruction,
            Instruction::Env(vec![("A".into(), "1".into()), ("SECRET".into(), String::new())])
        );
        assert!(made[6].force && !made[5].force);
    }

    #[test]
    fn what_is_no_step_is_refused_with_its_number() {
        for wrong in [
            step("COPY", &["a"]),
            step("COPY", &["a", "b", "", "", ""]),
            step("COPY", &["../a", "b"]),
            step("COPY", &["a/../../b", "b"]),
            step("COPY", &["/etc/passwd", "b"]),
            step("COPY", &["", "b"]),
            step("COPY", &["a", ""]),
            step("COPY", &["a", "b", "x y"]),
            step("COPY", &["a", "b", "a:b:c"]),
            step("COPY", &["a", "b", "", "999"]),
            step("COPY", &["a", "b", "", "17777"]),
            step("ADD", &["https://example.org/a.tar", "b"]),
            TemplateStep { files_hash: None, ..step("COPY", &["a", "b"]) },
            TemplateStep { files_hash: Some("../x".into()), ..step("COPY", &["a", "b"]) },
            step("RUN", &[]),
            step("RUN", &[""]),
            step("RUN", &["a\0b"]),
            step("RUN", &["a", "-u"]),
            step("RUN", &["a", "b", "c"]),
            TemplateStep { argv: Some(vec!["a".into()]), ..step("RUN", &["a"]) },
            TemplateStep { argv: Some(vec![]), ..step("RUN", &[]) },
            TemplateStep { argv: Some(vec!["a".into(), "\0".into()]), ..step("RUN", &[]) },
            TemplateStep { argv: Some(vec!["a".into()]), ..step("USER", &["a"]) },
            // There is no stage before it.
            TemplateStep { from_stage: Some(0), files_hash: None, ..step("COPY", &["/a", "b"]) },
            step("ENV", &[]),
            step("ENV", &["A"]),
            step("ENV", &["A=B", "c"]),
            step("ENV", &["", "c"]),
            step("WORKDIR", &[]),
            step("WORKDIR", &[""]),
            step("USER", &["a", "b"]),
            step("USER", &["root; true"]),
            step("EXPOSE", &["80"]),
            step("", &[]),
        ] {
            let failure = steps(&[step("RUN", &["true"]), wrong.clone()]).unwrap_err();
            assert_eq!(failure.error_code, ErrorCode::InvalidStep, "{wrong:?}");
            assert!(failure.message.starts_with("step 2 ("), "{failure:?}");
            assert!(!failure.remediation.is_empty());
        }
        let many = vec![step("RUN", &["true"]); MOST_STEPS + 1];
        assert_eq!(steps(&many).unwrap_err().error_code, ErrorCode::InvalidStep);
        assert_eq!(shown(&step("RUN", &["a\nb\x1b"])), "RUN a b ");
    }

    #[test]
    fn stages_are_copied_from_by_later_ones() {
        let from = |stage, path: &str| TemplateStep {
            from_stage: Some(stage),
            files_hash: None,
            ..step("COPY", &[path, "/b", "app", "0644"])
        };
        let of = |first: Vec<TemplateStep>, last: Vec<TemplateStep>| {
            let stage = TemplateStage { steps: first, ..TemplateStage::default() };
            all_steps(&StartBuild { stages: vec![stage], steps: last, ..StartBuild::default() })
        };
        let exec = TemplateStep { argv: Some(vec!["/a".into(), "-b".into()]), ..step("RUN", &["", "root"]) };
        let made = of(vec![exec], vec![from(0, "/out/*.so")]).unwrap();
        assert_eq!(
            [made[0][0].shown.as_str(), &made[1][0].shown],
            ["RUN /a -b", "COPY --from=0 /out/*.so /b"]
        );
        let argv = Some(vec!["/a".to_owned(), "-b".to_owned()]);
        let run = Instruction::Run { command: String::new(), user: Some("root".into()), argv };
        assert_eq!(made[0][0].instruction, run);
        let (owner, mode) = (Some("app".to_owned()), Some(0o644));
        let copy = Instruction::CopyFrom { stage: 0, from: "/out/*.so".into(), to: "/b".into(), owner, mode };
        assert_eq!(made[1][0].instruction, copy);
        let files_hash = Some("ab".repeat(32));
        for wrong in [
            from(1, "/a"),
            from(u32::MAX, "/a"),
            from(0, "../a"),
            from(0, ""),
            TemplateStep { files_hash, ..from(0, "/a") },
            TemplateStep { kind: "ADD".into(), ..from(0, "/a") },
        ] {
            let failure = of(vec![step("RUN", &["a"])], vec![step("RUN", &["a"]), wrong]).unwrap_err();
            assert!(failure.message.starts_with("stage 1, step 3 ("), "{failure:?}");
        }
        let many = of(vec![step("RUN", &["a"]); MOST_STEPS], vec![step("RUN", &["a"])]);
        assert_eq!(many.unwrap_err().error_code, ErrorCode::InvalidStep);
    }
}
