use std::io::Read as _;

use super::*;

/// A context with `dockerfile` in it and some files.
fn context(dockerfile: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
    write("Dockerfile", dockerfile);
    write("app.py", "print(1)\n");
    write("notes.md", "");
    write(".dockerignore", "*.md\nDockerfile\n");
    directory
}

fn of(directory: &tempfile::TempDir, options: DockerfileArgs) -> Result<Built, Failed> {
    let args = DockerfileArgs { context: Some(directory.path().to_owned()), ..options };
    read(&args, &|name| (name == "SET").then(|| OsString::from("from outside")))
}

fn built(dockerfile: &str) -> Built {
    of(&context(dockerfile), DockerfileArgs::default()).unwrap()
}

/// Kind and arguments of each step, and its line.
fn steps(built: &Built) -> Vec<(u32, String)> {
    let text = |step: &Step| format!("{} {}", step.step.kind, step.step.args.join("|"));
    all(built).map(|step| (step.line.unwrap(), text(step))).collect()
}

/// The steps of all stages, as they are counted.
fn all(built: &Built) -> impl Iterator<Item = &Step> {
    built.stages.iter().flat_map(|stage| &stage.steps)
}

/// The image that the first stage begins with.
fn image(built: &Built) -> &str {
    built.stages[0].from.from_image.as_deref().unwrap()
}

fn expect(built: &Built, steps_are: &[(u32, &str)]) {
    let found = steps(built);
    let found: Vec<(u32, &str)> = found.iter().map(|(line, text)| (*line, text.as_str())).collect();
    assert_eq!(found, steps_are);
}

/// What is printed.
fn refused(dockerfile: &str) -> String {
    format!("{:?}", of(&context(dockerfile), DockerfileArgs::default()).unwrap_err())
}

#[test]
fn a_dockerfile_becomes_the_steps_of_a_request() {
    let built = built(
        "FROM python:3.12\n\
         LABEL a=b\n\
         ENV PATH=/app/bin:$PATH A='$x'\n\
         WORKDIR /app\n\
         COPY --chown=app:staff --chmod=0750 app.py main.py\n\
         COPY . /all/\n\
         USER 1000:1000\n\
         RUN pip install flask\n\
         RUN [\"python\", \"it's\"]\n\
         EXPOSE 80\n\
         HEALTHCHECK --interval=5s CMD curl -f localhost\n\
         CMD [\"python\", \"app.py\"]\n",
    );
    assert_eq!((image(&built), built.stages.len()), ("python:3.12", 1));
    expect(
        &built,
        &[
            (1, "USER root"),
            (3, "ENV PATH|/app/bin:${PATH}|A|\\$x"),
            (4, "WORKDIR /app"),
            (5, "COPY app.py|/app/main.py|app:staff|750"),
            (6, "COPY .|/all/|0:0|"),
            (7, "USER 1000:1000"),
            (8, "RUN exec /bin/sh -c 'pip install flask'"),
            (9, "RUN exec python 'it'\\''s'"),
        ],
    );
    assert_eq!(built.start.as_deref(), Some("exec python app.py"));
    assert_eq!(built.ready.as_deref(), Some("curl -f localhost"));
    assert_eq!(built.warnings, ["not kept with the template: LABEL, EXPOSE, HEALTHCHECK's options"]);
    assert_eq!(built.stages[0].steps[6].label(), "line 8: RUN pip install flask");
    for step in all(&built) {
        assert_eq!(step.step.files_hash.as_deref(), step.files.as_ref().map(Files::hash));
        assert_eq!(step.files.is_some(), step.step.kind == "COPY");
    }
}

#[test]
fn docker_begins_as_root_at_the_root() {
    let begins = |dockerfile: &str, is: &[&str]| {
        let found = steps(&built(dockerfile));
        let found: Vec<&str> =
            found.iter().filter(|(line, _)| *line == 1).map(|(_, text)| text.as_str()).collect();
        assert_eq!(found, is, "{dockerfile}");
    };
    begins("FROM a\n", &["USER root", "WORKDIR /"]);
    begins("FROM a\nRUN b\nUSER c\nWORKDIR /d\n", &["USER root", "WORKDIR /"]);
    begins("FROM a\nENV x=y\nUSER b\nRUN c\n", &["WORKDIR /"]);
    begins("FROM a\nWORKDIR /b\nUSER c\n", &["USER root"]);
    begins("FROM a\nWORKDIR b\n", &["USER root", "WORKDIR /"]);
    begins("FROM a\nWORKDIR $B\n", &["USER root", "WORKDIR /"]);
    begins("FROM a\nUSER b\nWORKDIR /c\nRUN d\n", &[]);
}

#[test]
fn a_stage_goes_on_from_the_stages_below_it() {
    let text = "FROM debian AS base\n\
                USER a\n\
                WORKDIR /w\n\
                FROM base AS tools\n\
                RUN tools\n\
                FROM base AS run\n\
                WORKDIR x\n\
                RUN run\n";
    let built = built(text);
    expect(&built, &[(2, "USER a"), (3, "WORKDIR /w"), (7, "WORKDIR /w/x"), (8, "RUN exec /bin/sh -c run")]);
    assert_eq!(image(&built), "debian");
    assert_eq!(built.stages[1].from, TemplateStage { from_stage: Some(0), ..TemplateStage::default() });
    let target = |target: &str| DockerfileArgs { target: Some(target.to_owned()), ..Default::default() };
    let tools = of(&context(text), target("tools")).unwrap();
    expect(&tools, &[(2, "USER a"), (3, "WORKDIR /w"), (5, "RUN exec /bin/sh -c tools")]);
    let none = format!("{:?}", of(&context(text), target("nothing")).unwrap_err());
    assert!(none.contains("there is no stage nothing"), "{none}");
}

#[test]
fn stages_copy_from_each_other_and_begin_with_nothing() {
    let built = built(
        "FROM golang AS build\n\
         WORKDIR /src\n\
         COPY app.py .\n\
         RUN make\n\
         FROM node AS unneeded\n\
         RUN npm\n\
         FROM scratch\n\
         COPY --from=build --chown=1:2 --chmod=0755 /src/a /src/b* /bin/\n\
         COPY --from=alpine:3 /etc/ssl /etc/ssl\n\
         CMD [\"/bin/a\"]\n",
    );
    let none = TemplateStage::default;
    let begins: Vec<&TemplateStage> = built.stages.iter().map(|stage| &stage.from).collect();
    let named = |image: &str| TemplateStage { from_image: Some(image.to_owned()), ..none() };
    let is = [named("golang"), named("alpine:3"), TemplateStage { scratch: Some(true), ..none() }];
    assert_eq!(begins, is.iter().collect::<Vec<_>>());
    expect(
        &built,
        &[
            (1, "USER root"),
            (2, "WORKDIR /src"),
            (3, "COPY .|/src/|0:0|"),
            (4, "RUN exec /bin/sh -c make"),
            (7, "USER root"),
            (7, "WORKDIR /"),
            (8, "COPY /src/a|/bin/|1:2|755"),
            (8, "COPY /src/b*|/bin/|1:2|755"),
            (9, "COPY /etc/ssl|/etc/ssl|0:0|"),
        ],
    );
    let from: Vec<Option<u32>> = all(&built).map(|step| step.step.from_stage).collect();
    assert_eq!(from[6..], [Some(0), Some(0), Some(1)]);
    assert!(from[..6].iter().all(Option::is_none));
    assert_eq!(built.start.as_deref(), Some("exec /bin/a"));
}

#[test]
fn build_arguments_are_given_or_the_environments() {
    let directory = context("ARG V=1\nFROM a:$V\nARG SET\nARG UNSET=default\nENV s=$SET u=$UNSET\n");
    let args = |given: &[&str]| DockerfileArgs {
        build_args: given.iter().map(ToString::to_string).collect(),
        ..Default::default()
    };
    let built = of(&directory, args(&["V=2", "SET", "UNSET", "OTHER=a=b"])).unwrap();
    assert_eq!(image(&built), "a:2");
    assert_eq!(all(&built).last().unwrap().step.args, ["s", "from outside", "u", "default"]);
    assert_eq!(
        built.warnings,
        ["the environment has no UNSET for --build-arg UNSET", "no ARG asks for the build argument OTHER"]
    );
    assert!(of(&directory, args(&["=x"])).is_err());
}

#[test]
fn what_is_not_built_is_refused_with_its_line_and_what_to_do() {
    for (dockerfile, says, todo) in [
        ("FROM a\nRUN --mount=type=cache,target=/x b\n", "line 2: ", "remediation: Some("),
        ("FROM a\nUSER $NAME\n", "line 2: a variable of the image", "Write the value"),
        ("FROM a\n\nUSER a b\n", "line 3: ", "remediation: Some("),
        ("FROM a\nCOPY --chown=:staff . /\n", "line 2: the user \\\":staff\\\" is not", "Name a user"),
        ("FROM a\nCOPY notes.md /\n", "line 2: notes.md matches no file", ".dockerignore"),
        ("FROM a\nCOPY ../x /\n", "line 2: ", "remediation: Some("),
        ("RUN a\n", "line 1: ", "Correct the line."),
        ("", "the Dockerfile has no FROM", "Correct the line."),
    ] {
        let said = refused(dockerfile);
        assert!(said.contains(says) && said.contains(todo) && said.contains("code: 1"), "{said}");
    }
    let many = format!("FROM a\nUSER b\nWORKDIR /\n{}", "ENV a=b\n".repeat(MOST_STEPS - 2));
    assert_eq!(all(&built(&many)).count(), MOST_STEPS);
    let said = refused(&format!("{many}RUN c\n"));
    assert!(said.contains("line 1002: the Dockerfile in steps has more than 1000"), "{said}");
}

#[test]
fn the_dockerfile_may_be_elsewhere_and_has_to_be_there() {
    let directory = context("FROM a\n");
    let other = directory.path().join("Other");
    std::fs::write(&other, "FROM b\n").unwrap();
    let named = |path: &Path| DockerfileArgs { dockerfile: Some(path.to_owned()), ..Default::default() };
    assert_eq!(image(&of(&directory, named(&other)).unwrap()), "b");
    assert!(of(&directory, named(&directory.path().join("None"))).is_err());
    assert!(of(&directory, named(directory.path())).is_err());
    for bytes in [&b"FROM a\xff\n"[..], &vec![b'#'; 2 << 20]] {
        std::fs::write(&other, bytes).unwrap();
        let said = format!("{:?}", of(&directory, named(&other)).unwrap_err());
        assert!(said.contains("UTF-8") || said.contains("1 MiB"), "{said}");
    }
}

#[tokio::test]
async fn an_upload_has_what_is_copied() {
    let directory = context("FROM a\nCOPY . /srv/\n");
    let copied = || {
        let built = of(&directory, DockerfileArgs::default()).unwrap();
        built.stages.into_iter().flat_map(|stage| stage.steps).find_map(|step| step.files).unwrap()
    };
    assert_eq!(copied().name(), "what `COPY . /srv/` copies");
    let (mut pieces, packing) = copied().pack();
    let mut bytes = Vec::new();
    while let Some(piece) = pieces.recv().await {
        bytes.extend(piece.unwrap());
    }
    assert!(packing.await.unwrap().is_none());
    let mut found = Vec::new();
    for entry in tar::Archive::new(&bytes[..]).entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        found.push((entry.path().unwrap().display().to_string(), text));
    }
    let file = |name: &str, text: &str| (name.to_owned(), text.to_owned());
    assert_eq!(found, [file(".dockerignore", "*.md\nDockerfile\n"), file("app.py", "print(1)\n")]);

    // A file that is not any more what was hashed breaks the upload off.
    let files = copied();
    std::fs::write(directory.path().join("app.py"), "print(2)\n").unwrap();
    let (mut pieces, packing) = files.pack();
    let mut is_cut = false;
    while let Some(piece) = pieces.recv().await {
        is_cut |= piece.is_err();
    }
    let failed = format!("{:?}", packing.await.unwrap().unwrap());
    assert!(is_cut && failed.contains("line 2: ") && failed.contains("it has changed"), "{failed}");
}
