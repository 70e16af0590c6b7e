//! Commands in a guest, over one connection to its agent: what a bake warms up and starts, and what a build runs.
//!
//! Nothing is written; a crash leaves nothing. Absent on purpose: commands of people, which go through the gateway as they are.

use std::sync::Arc;

use bytes::Bytes;
use connectrpc::client::{CallOptions, ClientConfig, ServerStream};
use connectrpc::{ConnectError, ErrorCode};
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use kelvin_api::envd::process::__buffa::oneof::process_event::{Event as ProcessEvent, data_event::Output};
use kelvin_api::envd::process::__buffa::view::StartResponseView;
use kelvin_api::envd::process::{ProcessClient, ProcessConfig, StartRequest};
use kelvin_api::id::{Token, VmId};
use kelvin_api::image::USER_HEADER;
use kelvin_api::sandbox::EnvVars;
use kelvin_vmm::stream::GuestStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::error::Error;
use crate::machine::agent::{Agent, Body};

/// What runs commands: the agent takes another shell in an image without it. Source: E2B's SDK, `Commands.run`.
const SHELL: &str = "/bin/bash";

/// What a shell is given to run `text` with the variables `env`.
fn words(text: &str, env: &EnvVars) -> Vec<String> {
    let text = match env.get("PATH") {
        // A login shell sets it anew, to what /etc/profile says, whatever it was given.
        Some(path) => format!("export PATH='{}'; {text}", path.replace('\'', r"'\''")),
        None => text.to_owned(),
    };
    vec!["-l".to_owned(), "-c".to_owned(), text]
}

/// Whose processes are of which nothing else is said. Source: `crates/agent`, as envd.
pub const USER: &str = "user";

/// A command, for a shell unless it has `argv`.
#[derive(Debug, Clone, Copy)]
pub struct Command<'a> {
    /// It.
    pub text: &'a str,
    /// A program and its arguments, in place of the text: started as they are.
    pub argv: Option<&'a [String]>,
    /// As whom; the agent's default user when it is left out.
    pub user: Option<&'a str>,
    /// Where; that user's home when it is left out.
    pub cwd: Option<&'a str>,
    /// With which variables, beside the agent's.
    pub env: &'a EnvVars,
}

/// What a process tells.
#[derive(Debug)]
pub enum Told {
    /// What it has written.
    Output(Vec<u8>),
    /// The same, to its standard error.
    Errors(Vec<u8>),
    /// It has ended.
    Ended(Exit),
}

/// How a process has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Its code; none when a signal has ended it.
    pub code: Option<i32>,
    /// In the agent's words.
    pub status: String,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.code {
            Some(code) => write!(f, "exit code {code}"),
            None => {
                write!(f, "{}", self.status.chars().filter(|c| !c.is_control()).take(80).collect::<String>())
            }
        }
    }
}

impl Exit {
    /// Whether all went well.
    pub fn is_good(&self) -> bool {
        self.code == Some(0)
    }
}

/// Why a command does not run.
#[derive(Debug)]
pub enum Failed {
    /// There is no such user or directory, or no shell.
    Refused(String),
    /// The agent does not answer, or answers nonsense.
    Broken(Error),
}

/// A process that was started. Dropping it leaves it running.
pub struct Process {
    stream: ServerStream<Incoming, StartResponseView<'static>>,
    vm: VmId,
    /// What it has told already.
    first: Option<Told>,
}

/// Sends generated clients' requests over a guest's connection.
#[derive(Clone)]
struct Transport(Arc<Agent>);

async fn send(agent: &Agent, request: Request<Body>) -> std::io::Result<Response<Incoming>> {
    let gone = || std::future::ready(Err("the guest's connection broke".into()));
    agent.send(request, gone).await.map_err(std::io::Error::other)
}

impl connectrpc::client::ClientTransport for Transport {
    type ResponseBody = Incoming;
    type Error = std::io::Error;

    fn send(
        &self,
        request: Request<connectrpc::client::ClientBody>,
    ) -> connectrpc::client::BoxFuture<'static, Result<Response<Self::ResponseBody>, Self::Error>> {
        let agent = Arc::clone(&self.0);
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            let bytes = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
            send(&agent, Request::from_parts(parts, whole(bytes))).await
        })
    }
}

/// A body that is there.
pub fn whole(bytes: impl Into<Bytes>) -> Body {
    Full::<Bytes>::from(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// One connection to a guest's agent.
pub struct Processes {
    agent: Arc<Agent>,
    client: ProcessClient<Transport>,
    token: Option<Token>,
    vm: VmId,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Drop for Processes {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Processes {
    /// Over a connection to the guest of `vm` on which nothing was sent yet. `token`: what its agent asks for.
    pub fn over(http: GuestStream, vm: &VmId, token: Option<&Token>) -> Self {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let agent = Arc::new(Agent::over(http, tasks.clone(), stop.clone()));
        let mut config = ClientConfig::new(http::Uri::from_static("http://agent"));
        if let Some(token) = token {
            config = config.with_default_header("x-access-token", token.expose());
        }
        let client = ProcessClient::new(Transport(Arc::clone(&agent)), config);
        Self { agent, client, token: token.cloned(), vm: vm.clone(), tasks, stop }
    }

    /// Hangs up; what was started runs on.
    pub async fn close(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Starts `command`.
    ///
    /// # Errors
    /// See [`Failed`].
    pub async fn start(&self, command: &Command<'_>) -> Result<Process, Failed> {
        let (cmd, args) = match command.argv.and_then(<[String]>::split_first) {
            Some((program, args)) => (program.clone(), args.to_vec()),
            None => (SHELL.to_owned(), words(command.text, command.env)),
        };
        let process = ProcessConfig {
            cmd,
            args,
            envs: command.env.clone().into_iter().collect(),
            cwd: command.cwd.map(str::to_owned),
            ..Default::default()
        };
        let request = StartRequest { process: process.into(), stdin: Some(false), ..Default::default() };
        let mut options = CallOptions::default();
        if let Some(user) = command.user {
            options = options.with_header(USER_HEADER, user);
        }
        let begin = async {
            let stream = self.client.start_with_options(request, options).await?;
            let mut process = Process { stream, vm: self.vm.clone(), first: None };
            // That it could not be started comes in place of its first event.
            process.first = process.read(true).await?;
            Ok(process)
        };
        begin.await.map_err(|error| failed(&self.vm, error))
    }

    /// Runs `command` to its end and keeps the last `most` bytes of its output.
    ///
    /// # Errors
    /// See [`Failed`].
    pub async fn run(&self, command: &Command<'_>, most: usize) -> Result<(Exit, Vec<u8>), Failed> {
        let mut process = self.start(command).await?;
        let mut output = Vec::new();
        loop {
            match process.next().await? {
                Told::Output(bytes) | Told::Errors(bytes) => keep_last(&mut output, &bytes, most),
                Told::Ended(exit) => return Ok((exit, output)),
            }
        }
    }

    /// That the agent does not answer, and why.
    pub fn silent(&self, source: Box<dyn std::error::Error + Send + Sync>) -> Error {
        silent(&self.vm, source)
    }

    /// Sends a plain request to the agent.
    ///
    /// # Errors
    /// `Agent` when it does not answer.
    pub async fn send(&self, mut request: Request<Body>) -> Result<Response<Incoming>, Error> {
        if let Some(token) = self.token.as_ref().and_then(|token| token.expose().parse().ok()) {
            request.headers_mut().insert("x-access-token", token);
        }
        send(&self.agent, request).await.map_err(|error| silent(&self.vm, error.into()))
    }
}

impl Process {
    /// The next thing that it tells. Cancel-safe.
    ///
    /// # Errors
    /// See [`Failed`].
    pub async fn next(&mut self) -> Result<Told, Failed> {
        if let Some(told) = self.first.take() {
            return Ok(told);
        }
        match self.read(false).await {
            Ok(Some(told)) => Ok(told),
            Ok(None) => {
                let cut = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
                Err(Failed::Broken(silent(&self.vm, cut.into())))
            }
            Err(error) => Err(failed(&self.vm, error)),
        }
    }

    /// What comes next of its stream. `begun`: that it runs is enough.
    async fn read(&mut self, begun: bool) -> Result<Option<Told>, ConnectError> {
        while let Some(message) = self.stream.message().await? {
            match message.to_owned_message().event.into_option().and_then(|event| event.event) {
                Some(ProcessEvent::Start(_)) if begun => return Ok(None),
                Some(ProcessEvent::Data(data)) => match data.output {
                    Some(Output::Stdout(bytes) | Output::Pty(bytes)) => {
                        return Ok(Some(Told::Output(bytes)));
                    }
                    Some(Output::Stderr(bytes)) => return Ok(Some(Told::Errors(bytes))),
                    None => {}
                },
                Some(ProcessEvent::End(end)) => {
                    let code = end.exited.then_some(end.exit_code);
                    return Ok(Some(Told::Ended(Exit { code, status: end.status })));
                }
                Some(ProcessEvent::Start(_) | ProcessEvent::Keepalive(_)) | None => {}
            }
        }
        Ok(None)
    }
}

/// Appends `bytes` to `output`, of which the last `most` are kept.
pub fn keep_last(output: &mut Vec<u8>, bytes: &[u8], most: usize) {
    output.extend_from_slice(&bytes[bytes.len().saturating_sub(most)..]);
    output.drain(..output.len().saturating_sub(most));
}

fn silent(vm: &VmId, source: Box<dyn std::error::Error + Send + Sync>) -> Error {
    Error::Agent { sandbox: vm.to_string(), source }
}

/// What the agent has said, bounded: a guest may say anything.
fn said(error: &ConnectError) -> String {
    let text = error.message.as_deref().unwrap_or("the agent does not start it");
    // With the code before it, as E2B's builder says it and its SDK's users read it.
    let text = format!("{}: {text}", error.code.as_str());
    text.chars().filter(|c| !c.is_control()).take(300).collect()
}

fn failed(vm: &VmId, error: ConnectError) -> Failed {
    match error.code {
        ErrorCode::NotFound
        | ErrorCode::InvalidArgument
        | ErrorCode::PermissionDenied
        | ErrorCode::Unauthenticated => Failed::Refused(said(&error)),
        _ => Failed::Broken(silent(vm, error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_shell_keeps_the_path_that_it_is_given() {
        let env = EnvVars::from([("PATH".to_owned(), "/it's:/bin".to_owned())]);
        assert_eq!(words("make", &env), ["-l", "-c", r"export PATH='/it'\''s:/bin'; make"]);
        assert_eq!(words("make", &EnvVars::new()), ["-l", "-c", "make"]);
    }

    #[test]
    fn the_last_of_an_output_is_kept() {
        let mut output = Vec::new();
        for (bytes, kept) in [("abc", "abc"), ("de", "bcde"), ("0123456789", "6789"), ("", "6789")] {
            keep_last(&mut output, bytes.as_bytes(), 4);
            assert_eq!(output, kept.as_bytes());
        }
    }
}
