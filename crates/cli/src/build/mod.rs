//! `kelvin template build`, `builds`, `logs`, `cancel`.
//!
//! What a build says goes to standard error as it comes: lines in a pipe, above a spinner on a terminal. Standard output has
//! what was built. A build that this program is told to leave is cancelled.

mod context;
mod dockerfile;
mod files;
pub mod measured;
mod step;

use std::collections::HashSet;
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use comfy_table::Table;
use indicatif::ProgressBar;
use kelvin_api::build::{
    BuildInfo, BuildLogEntry, BuildReason, BuildStatus, NewTemplate, StartBuild, TemplateWithBuilds,
};
use kelvin_api::sandbox::LogLevel;
use kelvin_client::Client;

use crate::args::{BuildArgs, Output};
use crate::exec::told_to_end;
use crate::output::{Failed, ago, line, print, spinner, table};
use step::Step;

/// What a step's first line begins with when it was done before.
const CACHED: &str = "cached: ";
/// How often a build is looked at.
const EACH: Duration = Duration::from_millis(250);

fn bad(text: String, remedy: &str) -> Failed {
    Failed::new(text, remedy)
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
    /// They are kept instead, and nothing is written.
    kept: Option<Vec<BuildLogEntry>>,
    lines: usize,
    /// Kind and label of each step, of a Dockerfile: a server tells of it as the command that it has become.
    steps: Vec<Option<(String, String)>>,
    /// The step that lines are of.
    now: usize,
}

impl Shown {
    fn new(what: &str, steps: &[Step]) -> Self {
        let named = |step: &Step| step.line.map(|_| (format!("{} ", step.step.kind), step.label()));
        let steps = steps.iter().map(named).collect();
        let is_terminal = std::io::stderr().is_terminal();
        Self { bar: spinner(what), is_terminal, kept: None, lines: 0, steps, now: 0 }
    }

    /// Of a build that nobody watches.
    fn kept() -> Self {
        let (bar, kept) = (ProgressBar::hidden(), Some(Vec::new()));
        Self { bar, is_terminal: false, kept, lines: 0, steps: Vec::new(), now: 0 }
    }

    fn say(&self, text: &str) {
        if self.kept.is_some() {
            return;
        }
        if self.is_terminal {
            self.bar.println(text);
        } else {
            let _ = writeln!(std::io::stderr().lock(), "{text}");
        }
    }

    fn add(&mut self, entries: &[BuildLogEntry]) {
        self.lines += entries.len();
        if let Some(kept) = &mut self.kept {
            kept.extend_from_slice(entries);
            return;
        }
        for entry in entries {
            let text = self.text(entry);
            if entry.level > LogLevel::Debug {
                self.say(&text);
            }
        }
    }

    /// A line as it is shown: the first of a step, which says what it is, says it as the Dockerfile does.
    fn text(&mut self, entry: &BuildLogEntry) -> String {
        let number = entry.step.as_deref().and_then(|step| step.parse::<usize>().ok());
        let Some(number) = number.filter(|number| *number != self.now) else { return plain(entry) };
        self.now = number;
        let Some(Some((kind, label))) = number.checked_sub(1).and_then(|at| self.steps.get(at)) else {
            return plain(entry);
        };
        let (cached, said) = match entry.message.strip_prefix(CACHED) {
            Some(said) => (CACHED, said),
            None => ("", entry.message.as_str()),
        };
        if !said.starts_with(kind.as_str()) {
            return plain(entry);
        }
        plain(&BuildLogEntry { message: format!("{cached}{label}"), ..entry.clone() })
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

/// What is asked for, and its steps.
fn request(args: &BuildArgs) -> Result<(StartBuild, Vec<Step>), Failed> {
    let path = |path: Option<&PathBuf>| path.map(|path| absolute(path)).transpose();
    let mut start = StartBuild {
        from_image: args.from.image.clone(),
        from_template: args.from.from_template.clone(),
        from_layout: path(args.from.layout.as_ref())?,
        from_archive: path(args.from.archive.as_ref())?,
        force: args.no_cache.then_some(true),
        start_cmd: args.start.clone(),
        ready_cmd: args.ready.clone(),
        kernel: path(args.kernel.as_ref())?,
        ..StartBuild::default()
    };
    let steps = if args.dockerfile.is_given() {
        let built = dockerfile::read(&args.dockerfile, &|name| std::env::var_os(name))?;
        for warning in &built.warnings {
            let _ = writeln!(std::io::stderr().lock(), "warning: {warning}");
        }
        start.start_cmd = start.start_cmd.or(built.start);
        start.ready_cmd = start.ready_cmd.or(built.ready);
        let mut steps = Vec::new();
        for mut stage in built.stages {
            stage.from.steps = stage.steps.iter().map(|step| step.step.clone()).collect();
            steps.append(&mut stage.steps);
            start.stages.push(stage.from);
        }
        // The target is the build itself.
        if let Some(target) = start.stages.pop() {
            start.from_image = target.from_image;
            start.from_stage = target.from_stage;
            start.scratch = target.scratch;
            start.steps = target.steps;
        }
        steps
    } else {
        let steps = args.steps.0.iter().map(|(kind, text)| Step::of_option(*kind, text));
        let steps = steps.collect::<Result<Vec<_>, _>>()?;
        start.steps = steps.iter().map(|step| step.step.clone()).collect();
        steps
    };
    Ok((start, steps))
}

fn wanted(args: &BuildArgs) -> NewTemplate {
    NewTemplate {
        name: Some(args.name.clone()),
        cpu_count: args.cpus,
        memory_mb: args.memory_mib,
        disk_size_mb: args.disk_mib,
        ..NewTemplate::default()
    }
}

/// Uploads what a build copies, starts it, and follows it to its end.
async fn run(
    client: &Client,
    (template, build): (&str, &str),
    shown: &mut Shown,
    (start, steps): (StartBuild, Vec<Step>),
    force: bool,
) -> Result<BuildInfo, Failed> {
    upload(client, template, shown, steps, force).await?;
    client.start_build(template, build, &start).await?;
    follow(client, template, build, shown).await
}

/// What has ended, when it has ended well. `labels`: what the steps are called.
fn ready(info: BuildInfo, labels: &[String]) -> Result<BuildInfo, Failed> {
    match (info.status, &info.reason) {
        (BuildStatus::Ready, _) => Ok(info),
        (_, Some(reason)) => Err(of_reason(reason, labels)),
        _ => {
            let text = format!("the build {} failed", info.build_id);
            Err(bad(text, "`kelvin template logs` shows what it said"))
        }
    }
}

/// Builds a template: asks, uploads, starts, and follows it to its end.
pub async fn build(client: &Client, output: Output, args: BuildArgs) -> Result<ExitCode, Failed> {
    let (start, steps) = request(&args)?;
    let asked = client.request_build(&wanted(&args)).await?;
    let (template, build) = (asked.template_id, asked.build_id);
    let mut shown = Shown::new(&format!("building {template}"), &steps);
    let labels: Vec<String> = steps.iter().map(Step::label).collect();
    let ended = tokio::select! {
        ended = run(client, (&template, &build), &mut shown, (start, steps), args.no_cache) => ended,
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
    let info = ready(info, &labels)?;
    match output {
        Output::Json => line(&serde_json::to_string_pretty(&info).unwrap_or_default()),
        Output::Table => line(&template),
    }
    Ok(ExitCode::SUCCESS)
}

/// The same without a word, and without an end by a signal; what the build has said.
async fn build_unwatched(client: &Client, args: BuildArgs) -> Result<Vec<BuildLogEntry>, Failed> {
    let (start, steps) = request(&args)?;
    let asked = client.request_build(&wanted(&args)).await?;
    let labels: Vec<String> = steps.iter().map(Step::label).collect();
    let mut shown = Shown::kept();
    let names = (asked.template_id.as_str(), asked.build_id.as_str());
    let info = run(client, names, &mut shown, (start, steps), args.no_cache).await?;
    ready(info, &labels)?;
    Ok(shown.kept.unwrap_or_default())
}

/// A build's failure: the step as it was given, why, and the last that it said. `labels`: what the steps are called.
fn of_reason(reason: &BuildReason, labels: &[String]) -> Failed {
    let number = reason.step.as_deref().and_then(|step| step.parse::<usize>().ok());
    let label = number.and_then(|number| labels.get(number.checked_sub(1)?));
    let mut text = match (number, label) {
        (Some(number), Some(label)) => format!("step {number} ({label}): {}", reason.message),
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
    // Steps may copy the same.
    let mut done = HashSet::new();
    for files in steps.into_iter().filter_map(|step| step.files) {
        if !done.insert(files.hash().to_owned()) {
            continue;
        }
        let name = files.name();
        let link = client.files_link(template, files.hash()).await?;
        if link.present && !force {
            shown.say(&format!("{name} was uploaded before"));
            continue;
        }
        shown.say(&format!("uploading {name}"));
        let (pieces, packing) = files.pack();
        let uploaded = client.upload_files(&link.url, pieces).await;
        // Why a tar was not whole is said before what came of that.
        match packing.await.map_err(|error| Failed::other(&error))? {
            Some(failed) => return Err(failed),
            None => uploaded?,
        }
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
    use crate::args::StepKind;

    #[test]
    fn the_first_line_of_a_dockerfiles_step_says_where_it_stands() {
        let mut step = Step::of_option(StepKind::Run, "exec /bin/sh -c 'make all'").unwrap();
        (step.line, step.shown) = (Some(4), "RUN make all".to_owned());
        let other = Step::of_option(StepKind::Run, "true").unwrap();
        let mut shown = Shown::new("", &[step, other]);
        let mut text = |step: Option<&str>, message: &str| {
            shown.text(&BuildLogEntry {
                timestamp: jiff::Timestamp::UNIX_EPOCH,
                message: message.to_owned(),
                level: LogLevel::Info,
                step: step.map(str::to_owned),
            })
        };
        assert_eq!(text(None, "RUN a"), "RUN a");
        assert_eq!(text(Some("1"), "cached: RUN exec /bin/sh…"), "[1] cached: line 4: RUN make all");
        // What it says itself stays.
        assert_eq!(text(Some("1"), "RUN exec /bin/sh…"), "[1] RUN exec /bin/sh…");
        assert_eq!(text(Some("2"), "RUN true"), "[2] RUN true");
        assert_eq!(text(Some("1"), "out of space"), "[1] out of space");
        assert_eq!(text(Some("3"), "RUN true"), "[3] RUN true");
        assert_eq!(text(Some("base"), "pulled"), "[base] pulled");
    }

    #[test]
    fn a_failure_names_the_step_as_it_was_given_and_what_it_said() {
        let labels: Vec<String> = [(StepKind::User, "app"), (StepKind::Run, "make all")]
            .map(|(kind, text)| Step::of_option(kind, text).unwrap().label())
            .into();
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
        let shown = format!("{:?}", of_reason(&reason("2"), &labels));
        assert!(
            shown.contains("step 2 (RUN make all): exit 2\\n    [2] no rule[31m")
                && shown.contains("mend it"),
            "{shown}"
        );
        for odd in ["base", "0", "3"] {
            let shown = format!("{:?}", of_reason(&reason(odd), &labels));
            assert!(shown.contains("\"exit 2\\n"), "{shown}");
        }
    }
}
