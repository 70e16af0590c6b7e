//! `kelvin template build`, `builds`, `logs`, `cancel`.
//!
//! What a build says goes to standard error as it comes: lines in a pipe, above a spinner on a terminal. Standard output has
//! what was built. A build that this program is told to leave is cancelled.

mod context;

use std::io::{IsTerminal as _, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use comfy_table::Table;
use indicatif::ProgressBar;
use kelvin_api::build::{
    BuildInfo, BuildLogEntry, BuildReason, BuildStatus, NewTemplate, StartBuild, TemplateStep,
    TemplateWithBuilds,
};
use kelvin_api::sandbox::LogLevel;
use kelvin_client::Client;

use crate::args::{BuildArgs, Output, StepKind};
use crate::exec::told_to_end;
use crate::output::{Failed, ago, line, print, spinner, table};
use context::Context;

/// How often a build is looked at.
const EACH: Duration = Duration::from_millis(250);

/// What is copied by a step, beside it.
type Step = (TemplateStep, Option<Context>);

fn bad(text: String, remedy: &str) -> Failed {
    Failed::new(text, remedy)
}

fn step(kind: StepKind, text: &str) -> Result<Step, Failed> {
    let of = |kind: &str, args: &[&str]| TemplateStep {
        kind: kind.to_owned(),
        args: args.iter().map(ToString::to_string).collect(),
        ..TemplateStep::default()
    };
    Ok(match kind {
        StepKind::Run => (of("RUN", &[text]), None),
        StepKind::Workdir => (of("WORKDIR", &[text]), None),
        StepKind::User => (of("USER", &[text]), None),
        StepKind::Env => {
            let (key, value) = text
                .split_once('=')
                .ok_or_else(|| bad(format!("--env {text:?} is no KEY=VALUE"), "for example --env PORT=80"))?;
            (of("ENV", &[key, value]), None)
        }
        StepKind::Copy => {
            // The last one: a file's name may have colons, a path in a guest rarely does.
            let (from, to) =
                text.rsplit_once(':').filter(|(from, to)| !from.is_empty() && !to.is_empty()).ok_or_else(
                    || bad(format!("--copy {text:?} is no SRC:DEST"), "for example --copy ./app:/srv/app"),
                )?;
            let context = Context::read(Path::new(from), to)?;
            let step =
                TemplateStep { files_hash: Some(context.hash.clone()), ..of("COPY", &[&context.name, to]) };
            (step, Some(context))
        }
    })
}

fn absolute(path: &Path) -> Result<String, Failed> {
    let path = path.canonicalize().or_else(|_| std::path::absolute(path));
    path.map_err(|error| Failed::other(&error))?
        .into_os_string()
        .into_string()
        .map_err(|path| bad(format!("{} is not UTF-8", path.display()), "give it another name"))
}

/// Lines of a build as they come: above a spinner on a terminal, alone elsewhere; on standard error.
struct Shown {
    bar: ProgressBar,
    is_terminal: bool,
    lines: usize,
}

impl Shown {
    fn new(what: &str) -> Self {
        Self { bar: spinner(what), is_terminal: std::io::stderr().is_terminal(), lines: 0 }
    }

    fn say(&self, text: &str) {
        if self.is_terminal {
            self.bar.println(text);
        } else {
            let _ = writeln!(std::io::stderr().lock(), "{text}");
        }
    }

    fn add(&mut self, entries: &[BuildLogEntry]) {
        self.lines += entries.len();
        for entry in entries.iter().filter(|entry| entry.level > LogLevel::Debug) {
            self.say(&plain(entry));
        }
    }
}

/// A line as it is shown. The server has taken out what a terminal obeys; an older one may not have.
fn plain(entry: &BuildLogEntry) -> String {
    let message: String =
        entry.message.chars().filter(|letter| *letter == '\t' || !letter.is_control()).collect();
    match &entry.step {
        Some(step) => format!("[{step}] {message}"),
        None => message,
    }
}

/// Builds a template: asks, uploads, starts, and follows it to its end.
pub async fn build(client: &Client, output: Output, args: BuildArgs) -> Result<ExitCode, Failed> {
    let steps = args.steps.0.iter().map(|(kind, text)| step(*kind, text)).collect::<Result<Vec<_>, _>>()?;
    let path = |path: Option<&std::path::PathBuf>| path.map(|path| absolute(path)).transpose();
    let start = StartBuild {
        from_image: args.from.image.clone(),
        from_template: args.from.from_template.clone(),
        from_layout: path(args.from.layout.as_ref())?,
        from_archive: path(args.from.archive.as_ref())?,
        force: args.no_cache.then_some(true),
        steps: steps.iter().map(|(step, _)| step.clone()).collect(),
        start_cmd: args.start,
        ready_cmd: args.ready,
        ..StartBuild::default()
    };
    let wanted = NewTemplate {
        name: Some(args.name),
        cpu_count: args.cpus,
        memory_mb: args.memory,
        disk_size_mb: args.disk,
        ..NewTemplate::default()
    };
    let asked = client.request_build(&wanted).await?;
    let (template, build) = (asked.template_id, asked.build_id);
    let mut shown = Shown::new(&format!("building {template}"));
    let ended = tokio::select! {
        ended = async {
            upload(client, &template, &shown, steps, args.no_cache).await?;
            client.start_build(&template, &build, &start).await?;
            follow(client, &template, &build, &mut shown).await
        } => ended,
        signal = told_to_end() => {
            let cancelled = client.cancel_build(&template, &build).await;
            shown.bar.finish_and_clear();
            let code = u8::try_from(128 + signal).unwrap_or(u8::MAX);
            return match cancelled {
                Ok(()) => Err(bad(format!("the build {build} was cancelled"), "run it again").with_code(code)),
                Err(error) => Err(Failed::from(error).with_code(code)),
            };
        }
    };
    shown.bar.finish_and_clear();
    let info = match ended {
        Ok(info) => info,
        Err(failed) => {
            // What was not started is not left to wait for its end.
            let _ = client.cancel_build(&template, &build).await;
            return Err(failed);
        }
    };
    match (info.status, &info.reason) {
        (BuildStatus::Ready, _) => {
            match output {
                Output::Json => line(&serde_json::to_string_pretty(&info).unwrap_or_default()),
                Output::Table => line(&template),
            }
            Ok(ExitCode::SUCCESS)
        }
        (_, Some(reason)) => Err(of_reason(reason, &start)),
        _ => Err(bad(format!("the build {build} failed"), "`kelvin template logs` shows what it said")),
    }
}

/// A build's failure: the step as it was given, why, and the last that it said.
fn of_reason(reason: &BuildReason, start: &StartBuild) -> Failed {
    let number = reason.step.as_deref().and_then(|step| step.parse::<usize>().ok());
    let step = number.and_then(|number| start.steps.get(number.checked_sub(1)?));
    let mut text = match (number, step) {
        (Some(number), Some(step)) => {
            format!("step {number} ({} {}): {}", step.kind, step.args.join(" "), reason.message)
        }
        _ => reason.message.clone(),
    };
    for entry in &reason.log_entries {
        text.push_str("\n    ");
        text.push_str(&plain(entry));
    }
    Failed::new(text, reason.remediation.as_deref().unwrap_or("mend the step, and build again"))
}

async fn upload(
    client: &Client,
    template: &str,
    shown: &Shown,
    steps: Vec<Step>,
    force: bool,
) -> Result<(), Failed> {
    for context in steps.into_iter().filter_map(|(_, context)| context) {
        let link = client.files_link(template, &context.hash).await?;
        if link.present && !force {
            shown.say(&format!("{} was uploaded before", context.name));
            continue;
        }
        shown.say(&format!("uploading {}", context.name));
        let (pieces, packing) = context.pack();
        let uploaded = client.upload_files(&link.url, pieces).await;
        // Why a tar was not whole is said before what came of that.
        let refused = match packing.await.map_err(|error| Failed::other(&error))? {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                return Err(bad(format!("packing files: {error}"), "name files that can be read"));
            }
            _ => uploaded,
        };
        refused?;
    }
    Ok(())
}

/// Shows what a build says until it has ended, and all of it.
async fn follow(
    client: &Client,
    template: &str,
    build: &str,
    shown: &mut Shown,
) -> Result<BuildInfo, Failed> {
    loop {
        let info = client.build_status(template, build, shown.lines).await?;
        shown.add(&info.log_entries);
        if info.log_entries.is_empty() {
            if info.status.is_over() {
                return Ok(info);
            }
            tokio::time::sleep(EACH).await;
        }
    }
}

/// `kelvin template logs`.
pub async fn logs(
    client: &Client,
    output: Output,
    build: &str,
    is_followed: bool,
) -> Result<ExitCode, Failed> {
    let template = client.find_build(build).await?.template_id;
    let mut lines = 0;
    let mut all = Vec::new();
    loop {
        let info = client.build_status(&template, build, lines).await?;
        lines += info.log_entries.len();
        match output {
            Output::Json => all.extend(info.log_entries.iter().cloned()),
            Output::Table => info.log_entries.iter().for_each(|entry| line(&plain(entry))),
        }
        if info.log_entries.is_empty() {
            if !is_followed || info.status.is_over() {
                break;
            }
            tokio::time::sleep(EACH).await;
        }
    }
    if output == Output::Json {
        line(&serde_json::to_string_pretty(&all).unwrap_or_default());
    }
    Ok(ExitCode::SUCCESS)
}

/// `kelvin template cancel`.
pub async fn cancel(client: &Client, build: &str) -> Result<ExitCode, Failed> {
    let template = client.find_build(build).await?.template_id;
    client.cancel_build(&template, build).await?;
    Ok(ExitCode::SUCCESS)
}

/// `kelvin template builds`.
pub async fn builds(client: &Client, output: Output, name: &str) -> Result<ExitCode, Failed> {
    print(output, &client.template(name).await?, builds_table);
    Ok(ExitCode::SUCCESS)
}

fn builds_table(template: &TemplateWithBuilds) -> Table {
    let mut table = table(&["build", "status", "asked for", "took", "cpu", "memory", "disk"]);
    for build in &template.builds {
        let took = build.finished_at.map(|end| end.duration_since(build.created_at).as_secs());
        table.add_row([
            build.build_id.clone(),
            build.status.name().to_owned(),
            ago(build.created_at),
            took.map(|seconds| format!("{seconds}s")).unwrap_or_default(),
            build.cpu_count.to_string(),
            format!("{} MiB", build.memory_mb),
            build.disk_size_mb.map(|mib| format!("{mib} MiB")).unwrap_or_default(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_become_the_steps_that_the_sdks_send() {
        let made = |kind, text: &str| step(kind, text).unwrap().0;
        assert_eq!(
            (made(StepKind::Run, "a b").kind, made(StepKind::Run, "a b").args),
            ("RUN".into(), vec!["a b".to_owned()])
        );
        assert_eq!(made(StepKind::Env, "K=V=W").args, ["K", "V=W"]);
        let file = tempfile::tempdir().unwrap();
        std::fs::write(file.path().join("app.py"), "1").unwrap();
        let text = format!("{}/app.py:/srv/", file.path().display());
        let (copy, context) = step(StepKind::Copy, &text).unwrap();
        assert_eq!(
            (copy.kind.as_str(), &copy.args[..]),
            ("COPY", &["app.py".to_owned(), "/srv/".to_owned()][..])
        );
        assert_eq!(copy.files_hash, context.map(|context| context.hash));
        for (kind, text) in [
            (StepKind::Env, "K"),
            (StepKind::Copy, "a"),
            (StepKind::Copy, ":b"),
            (StepKind::Copy, "a:"),
            (StepKind::Copy, "/nothing/of/that/name:/a"),
        ] {
            assert!(step(kind, text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_failure_names_the_step_as_it_was_given_and_what_it_said() {
        let start = StartBuild {
            steps: vec![step(StepKind::User, "app").unwrap().0, step(StepKind::Run, "make all").unwrap().0],
            ..StartBuild::default()
        };
        let entry = BuildLogEntry {
            timestamp: jiff::Timestamp::UNIX_EPOCH,
            message: "no rule\x1b[31m".to_owned(),
            level: LogLevel::Error,
            step: Some("2".to_owned()),
        };
        let reason = |step: &str| BuildReason {
            message: "exit 2".to_owned(),
            step: Some(step.to_owned()),
            log_entries: vec![entry.clone()],
            error_code: None,
            remediation: Some("mend it".to_owned()),
        };
        let shown = format!("{:?}", of_reason(&reason("2"), &start));
        assert!(
            shown.contains("step 2 (RUN make all): exit 2\\n    [2] no rule[31m")
                && shown.contains("mend it"),
            "{shown}"
        );
        for odd in ["base", "0", "3"] {
            let shown = format!("{:?}", of_reason(&reason(odd), &start));
            assert!(shown.contains("\"exit 2\\n"), "{shown}");
        }
    }
}
