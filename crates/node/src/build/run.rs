//! One step in the builder's machine, through its agent. Dropped in the middle, the machine can only be ended.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use bytes::Bytes;
use futures::StreamExt as _;
use http::header::CONTENT_TYPE;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::image::{DEFAULTS, UNPACK, USER_HEADER, Unpacked};
use kelvin_node_api::{BuildStep, Instruction};
use kelvin_store::uploads::Files;
use serde::Deserialize;

use crate::build::copy_from::{NotPacked, Wanted, of_stage, pack};
use crate::build::log::Log;
use crate::build::plan::BuildState;
use crate::error::Error;
use crate::machine::agent::Body;
use crate::machine::processes::{Command, Exit, Failed, Processes, Told, whole};

/// What is read of a reply of the agent, in bytes.
const REPLY: usize = 64 << 10;
/// What is sent of an upload at once, in bytes.
const PORTION: usize = 256 << 10;

/// A step as it is done.
pub struct Doing<'a> {
    /// It.
    pub step: &'a BuildStep,
    /// What was set before it.
    pub before: &'a BuildState,
    /// What is set after it.
    pub after: &'a BuildState,
    /// What it copies, when that was uploaded.
    pub files: Option<&'a Files>,
    /// What it copies from, when that is a stage.
    pub source: Option<Source<'a>>,
}

/// A machine that has the disk of a stage.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// The stage's number.
    pub stage: usize,
    /// The way to its agent.
    pub processes: &'a Processes,
}

fn step_failed(message: String, cause: Option<String>) -> Error {
    let failure = Failure::new(ErrorCode::BuildStepFailed, message, "see the build's log; change the step");
    Error::Build(Box::new(Failure { cause, ..failure }))
}

impl Doing<'_> {
    /// Does it.
    ///
    /// # Errors
    /// `Build` with `BuildStepFailed` when it ends badly, `Agent` when the guest does not answer.
    pub async fn run(&self, processes: &Processes, log: &mut Log) -> Result<(), Error> {
        match &self.step.instruction {
            Instruction::Run { command, user, argv } => {
                let user = user.as_deref().filter(|user| !user.is_empty()).unwrap_or(self.before.user());
                let (cwd, env) = (self.before.cwd(), &self.before.env);
                let command = Command { text: command, argv: argv.as_deref(), user: Some(user), cwd, env };
                self.command(processes, &command, log).await
            }
            Instruction::Copy { from, to, owner, mode, .. } => {
                let Some(files) = self.files else {
                    return Err(step_failed("the upload is gone".to_owned(), None));
                };
                let uri = self.unpack(from, to, owner.as_deref(), *mode);
                self.copy(processes, uri, archive(&files.archive())?, log).await
            }
            Instruction::CopyFrom { from, to, owner, mode, .. } => {
                let Some(source) = self.source else {
                    return Err(step_failed("the stage is gone".to_owned(), None));
                };
                let wanted = Wanted::of(from).map_err(|why| step_failed(why, None))?;
                let uri = self.unpack(&wanted.from, to, owner.as_deref(), *mode);
                let (packing, body) = pack(source.processes, &wanted);
                let not_packed = tokio::select! {
                    biased;
                    Err(failed) = packing.run() => failed,
                    done = self.copy(processes, uri, body, log) => return done,
                };
                Err(match not_packed {
                    NotPacked::Broken(error) => of_stage(source.stage, error),
                    NotPacked::Refused(why) => {
                        let text = format!(
                            "{} failed: {from} of stage {} cannot be read",
                            self.shown(),
                            source.stage
                        );
                        step_failed(text, Some(why))
                    }
                })
            }
            Instruction::Workdir(_) => self.make_directory(processes).await,
            Instruction::Env(_) | Instruction::User(_) => Ok(()),
        }
    }

    async fn command(
        &self,
        processes: &Processes,
        command: &Command<'_>,
        log: &mut Log,
    ) -> Result<(), Error> {
        let not_run = |failed| match failed {
            Failed::Broken(error) => error,
            // The words of E2B's builder: programs look for them.
            Failed::Refused(why) => {
                let what = command.argv.map_or_else(|| command.text.to_owned(), |argv| argv.join(" "));
                step_failed(
                    format!("failed to run command '{}': command failed: {why}", bounded(&what)),
                    None,
                )
            }
        };
        let mut process = processes.start(command).await.map_err(not_run)?;
        let exit: Exit = loop {
            match process.next().await.map_err(not_run)? {
                Told::Output(bytes) | Told::Errors(bytes) => log.output(&bytes).await,
                Told::Ended(exit) => break exit,
            }
        };
        log.end().await;
        if exit.is_good() {
            return Ok(());
        }
        Err(step_failed(format!("{} failed with {exit}", self.shown()), log.last_lines()))
    }

    /// The step in one line, bounded.
    fn shown(&self) -> String {
        let text = bounded(&self.step.shown);
        if text.is_empty() { "the step".to_owned() } else { text }
    }

    /// Where an archive is sent that is unpacked as the step says.
    fn unpack(&self, from: &str, to: &str, owner: Option<&str>, mode: Option<u32>) -> String {
        let owner = owner.filter(|owner| !owner.is_empty()).unwrap_or(self.before.user());
        let mode = mode.map(|mode| format!("{mode:o}"));
        let mut query = vec![("from", from), ("to", to), ("owner", owner)];
        query.extend(mode.as_deref().map(|mode| ("mode", mode)));
        query.extend(self.before.cwd().map(|cwd| ("workdir", cwd)));
        uri(UNPACK, &query)
    }

    /// Streams an archive into the guest, which unpacks it.
    async fn copy(
        &self,
        processes: &Processes,
        uri: String,
        content: Body,
        log: &mut Log,
    ) -> Result<(), Error> {
        let request =
            Request::post(uri).header(CONTENT_TYPE, "application/x-tar").body(content).map_err(asking)?;
        let (status, reply) = answer(processes, processes.send(request).await?).await?;
        if status != StatusCode::OK {
            return Err(step_failed(format!("{} failed", self.shown()), Some(message(status, &reply))));
        }
        if let Ok(Unpacked { files, bytes }) = serde_json::from_slice(&reply) {
            log.note(&format!("{files} files, {bytes} bytes")).await;
        }
        Ok(())
    }

    /// Makes the working directory, whose parents are new with it, as the step's user's.
    async fn make_directory(&self, processes: &Processes) -> Result<(), Error> {
        let Some(path) = &self.after.workdir else { return Ok(()) };
        let request = Request::post("http://agent/filesystem.Filesystem/MakeDir")
            .header(CONTENT_TYPE, "application/json")
            .header("connect-protocol-version", "1")
            .header(USER_HEADER, self.before.user())
            .body(whole(serde_json::json!({ "path": path }).to_string()))
            .map_err(asking)?;
        let (status, reply) = answer(processes, processes.send(request).await?).await?;
        // There already is fine. Source: Connect protocol, "Error end-stream"; `already_exists` is 409.
        if status.is_success() || status == StatusCode::CONFLICT {
            return Ok(());
        }
        Err(step_failed(format!("{} failed", self.shown()), Some(message(status, &reply))))
    }
}

/// `text` in one line that is not long.
fn bounded(text: &str) -> String {
    let text = crate::machine::text::plain(text.replace('\n', " ").as_bytes());
    match text.char_indices().nth(200) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

/// Tells the agent of the image's machines what their processes have.
///
/// # Errors
/// `Agent` when it does not take that.
pub async fn write_defaults(processes: &Processes, state: &BuildState) -> Result<(), Error> {
    let defaults = state
        .defaults()
        .encode()
        .map_err(|error| step_failed(format!("{DEFAULTS} would not be read: {error}"), None))?;
    let request = Request::post(uri("/files", &[("path", DEFAULTS), ("username", "root")]))
        .header(CONTENT_TYPE, "application/octet-stream")
        .body(whole(defaults))
        .map_err(asking)?;
    let (status, reply) = answer(processes, processes.send(request).await?).await?;
    match status.is_success() {
        true => Ok(()),
        false => Err(step_failed(format!("{DEFAULTS} cannot be written"), Some(message(status, &reply)))),
    }
}

fn asking(error: http::Error) -> Error {
    Error::Io { what: "asking the agent", source: std::io::Error::other(error) }
}

fn uri(path: &str, query: &[(&str, &str)]) -> String {
    let encode = |text| percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC);
    let pairs: Vec<String> = query.iter().map(|(name, value)| format!("{name}={}", encode(value))).collect();
    format!("http://agent{path}?{}", pairs.join("&"))
}

async fn answer(
    processes: &Processes,
    reply: http::Response<Incoming>,
) -> Result<(StatusCode, Bytes), Error> {
    let status = reply.status();
    let body = Limited::new(reply.into_body(), REPLY).collect().await;
    Ok((status, body.map_err(|error| processes.silent(error))?.to_bytes()))
}

/// What the agent says of a refusal, bounded.
fn message(status: StatusCode, reply: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Refusal {
        message: String,
    }
    let text = serde_json::from_slice(reply).map_or_else(
        |_| format!("the agent replied {status}"),
        |Refusal { message }| crate::machine::text::plain(message.replace('\n', " ").as_bytes()),
    );
    text.chars().take(1000).collect()
}

/// The content of an upload, a portion at a time.
fn archive(path: &Path) -> Result<Body, Error> {
    let file = File::open(path).map_err(|source| Error::Io { what: "opening an upload", source })?;
    let portions = futures::stream::try_unfold(file, |mut file| async move {
        let read = kelvin_host::blocking::spawn(move || {
            let mut portion = vec![0; PORTION];
            let length = file.read(&mut portion)?;
            portion.truncate(length);
            std::io::Result::Ok((portion, file))
        });
        let (portion, file) = read.await.map_err(std::io::Error::other)??;
        Ok::<_, std::io::Error>((!portion.is_empty()).then(|| (Frame::data(Bytes::from(portion)), file)))
    });
    Ok(StreamBody::new(portions.boxed()).boxed_unsync())
}
