//! The agent of one sandbox, through the server: processes and files.

use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use connectrpc::ConnectError;
use connectrpc::client::{BoxFuture, CallOptions, ClientBody, ClientConfig, ClientTransport, ServerStream};
use futures::TryStreamExt;
use http::{Method, Request, Response, Uri, header};
use http_body_util::{BodyExt, BodyStream, StreamBody};
use hyper::body::{Frame, Incoming};
use kelvin_api::envd::process::__buffa::oneof::process_event::{Event, data_event::Output};
use kelvin_api::envd::process::__buffa::oneof::process_input::Input;
use kelvin_api::envd::process::__buffa::oneof::process_selector::Selector;
use kelvin_api::envd::process::__buffa::view::{ConnectResponseView, StartResponseView};
use kelvin_api::envd::process::{
    CloseStdinRequest, ConnectRequest, ListRequest, ProcessClient, ProcessConfig, ProcessEvent, ProcessInfo,
    ProcessInput, ProcessSelector, SendInputRequest, SendSignalRequest, Signal, StartRequest,
};
use kelvin_api::id::{SandboxId, Token};
use kelvin_api::sandbox::EnvVars;
use kelvin_api::{AGENT_PORT, PORT_HEADER, SANDBOX_HEADER};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{Body, Client, Error, Http, whole};

const CHUNK: usize = 256 << 10;

/// Sends generated clients' requests through the shared pool.
#[derive(Debug, Clone)]
struct Transport(Http);

impl ClientTransport for Transport {
    type ResponseBody = Incoming;
    type Error = hyper_util::client::legacy::Error;

    fn send(
        &self,
        request: Request<ClientBody>,
    ) -> BoxFuture<'static, Result<Response<Incoming>, Self::Error>> {
        Box::pin(self.0.request(request.map(|body| body.map_err(std::io::Error::other).boxed_unsync())))
    }
}

/// A process to start.
#[derive(Debug, Clone, Default)]
pub struct Command {
    /// Program, by name or path.
    pub program: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Environment beside the sandbox's.
    pub env: EnvVars,
    /// Working directory instead of the home directory.
    pub cwd: Option<String>,
    /// Whether its standard input is a pipe to be fed; otherwise it is empty.
    pub stdin: bool,
    /// When the agent ends it: SIGTERM, then SIGKILL.
    pub deadline: Option<Duration>,
}

/// What a process tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// It runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// Bytes of its standard output.
    Stdout(Vec<u8>),
    /// Bytes of its standard error.
    Stderr(Vec<u8>),
    /// It has ended.
    Ended {
        /// Its exit code; -1 when a signal ended it.
        exit_code: i32,
        /// How, in words.
        status: String,
    },
}

enum Stream {
    Start(ServerStream<Incoming, StartResponseView<'static>>),
    Connect(ServerStream<Incoming, ConnectResponseView<'static>>),
}

/// The output of a process. Dropping it leaves the process running.
pub struct Process(Stream);

impl Process {
    /// The next thing that it tells; `None` when the stream is over.
    ///
    /// # Errors
    /// `Agent` with `deadline_exceeded` when its time was over.
    pub async fn next(&mut self) -> Result<Option<Told>, Error> {
        loop {
            let event: Option<ProcessEvent> = match &mut self.0 {
                Stream::Start(stream) => stream
                    .message()
                    .await
                    .map_err(failed)?
                    .map(|message| message.to_owned_message().event.into_option().unwrap_or_default()),
                Stream::Connect(stream) => stream
                    .message()
                    .await
                    .map_err(failed)?
                    .map(|message| message.to_owned_message().event.into_option().unwrap_or_default()),
            };
            let Some(event) = event else { return Ok(None) };
            match event.event {
                Some(Event::Start(start)) => return Ok(Some(Told::Started { pid: start.pid })),
                Some(Event::Data(data)) => match data.output {
                    Some(Output::Stdout(bytes) | Output::Pty(bytes)) => return Ok(Some(Told::Stdout(bytes))),
                    Some(Output::Stderr(bytes)) => return Ok(Some(Told::Stderr(bytes))),
                    None => {}
                },
                Some(Event::End(end)) => {
                    return Ok(Some(Told::Ended { exit_code: end.exit_code, status: end.status }));
                }
                Some(Event::Keepalive(_)) | None => {}
            }
        }
    }
}

fn failed(error: ConnectError) -> Error {
    Error::Agent(Box::new(error))
}

/// The agent of one sandbox.
#[derive(Clone)]
pub struct Agent {
    client: Client,
    sandbox: SandboxId,
    token: Option<Token>,
    user: Option<String>,
    processes: ProcessClient<Transport>,
}

impl Client {
    /// The agent of `sandbox`. `user` is who processes run as and files belong to, instead of the default.
    ///
    /// # Errors
    /// `Url` when the server's URL cannot be used.
    pub fn agent(
        &self,
        sandbox: &SandboxId,
        token: Option<Token>,
        user: Option<String>,
    ) -> Result<Agent, Error> {
        let bad = |reason: String| Error::Url { url: self.base.clone(), reason };
        let uri: Uri = self.base.parse().map_err(|error: http::uri::InvalidUri| bad(error.to_string()))?;
        let mut config = ClientConfig::new(uri)
            .with_default_header(SANDBOX_HEADER, sandbox.as_str())
            .with_default_header(PORT_HEADER, AGENT_PORT.to_string());
        if let Some(token) = &token {
            config = config.with_default_header("x-access-token", token.expose());
        }
        if let Some(user) = &user {
            let pair = base64::engine::general_purpose::STANDARD.encode(format!("{user}:"));
            config = config.with_default_header("authorization", format!("Basic {pair}"));
        }
        let processes = ProcessClient::new(Transport(self.http.clone()), config);
        Ok(Agent { client: self.clone(), sandbox: sandbox.clone(), token, user, processes })
    }
}

fn by_pid(pid: u32) -> ProcessSelector {
    ProcessSelector { selector: Some(Selector::Pid(pid)), ..Default::default() }
}

impl Agent {
    /// Starts a process; its output comes from the result.
    ///
    /// # Errors
    /// `Agent` when it cannot be started.
    pub async fn start(&self, command: &Command) -> Result<Process, Error> {
        let process = ProcessConfig {
            cmd: command.program.clone(),
            args: command.args.clone(),
            envs: command.env.clone().into_iter().collect(),
            cwd: command.cwd.clone(),
            ..Default::default()
        };
        let request =
            StartRequest { process: process.into(), stdin: Some(command.stdin), ..Default::default() };
        let mut options = CallOptions::default();
        if let Some(deadline) = command.deadline {
            options = options.with_timeout(deadline);
        }
        let stream = self.processes.start_with_options(request, options).await.map_err(failed)?;
        Ok(Process(Stream::Start(stream)))
    }

    /// Attaches to a process that runs.
    ///
    /// # Errors
    /// `Agent` with `not_found` when there is none.
    pub async fn attach(&self, pid: u32) -> Result<Process, Error> {
        let request = ConnectRequest { process: by_pid(pid).into(), ..Default::default() };
        Ok(Process(Stream::Connect(self.processes.connect(request).await.map_err(failed)?)))
    }

    /// The processes that were started through the agent.
    ///
    /// # Errors
    /// `Agent`.
    pub async fn processes(&self) -> Result<Vec<ProcessInfo>, Error> {
        Ok(self.processes.list(ListRequest::default()).await.map_err(failed)?.into_owned().processes)
    }

    /// Writes to a process's standard input.
    ///
    /// # Errors
    /// `Agent` when it has none.
    pub async fn feed(&self, pid: u32, bytes: Vec<u8>) -> Result<(), Error> {
        let input = ProcessInput { input: Some(Input::Stdin(bytes)), ..Default::default() };
        let request =
            SendInputRequest { process: by_pid(pid).into(), input: input.into(), ..Default::default() };
        self.processes.send_input(request).await.map_err(failed).map(drop)
    }

    /// Ends a process's standard input.
    ///
    /// # Errors
    /// `Agent` when there is no such process.
    pub async fn end_input(&self, pid: u32) -> Result<(), Error> {
        let request = CloseStdinRequest { process: by_pid(pid).into(), ..Default::default() };
        self.processes.close_stdin(request).await.map_err(failed).map(drop)
    }

    /// Sends SIGTERM, or SIGKILL, to a process and its group.
    ///
    /// # Errors
    /// `Agent` when there is no such process.
    pub async fn signal(&self, pid: u32, kill: bool) -> Result<(), Error> {
        let signal = if kill { Signal::SIGNAL_SIGKILL } else { Signal::SIGNAL_SIGTERM };
        let request =
            SendSignalRequest { process: by_pid(pid).into(), signal: signal.into(), ..Default::default() };
        self.processes.send_signal(request).await.map_err(failed).map(drop)
    }

    /// Starts a process, waits for its end and returns exit code, standard output and standard error, of
    /// which at most `limit` bytes each are kept.
    ///
    /// # Errors
    /// As [`Agent::start`] and [`Process::next`].
    pub async fn run(&self, command: &Command, limit: usize) -> Result<(i32, Vec<u8>, Vec<u8>), Error> {
        let mut process = self.start(command).await?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        while let Some(told) = process.next().await? {
            match told {
                Told::Started { .. } => {}
                Told::Stdout(bytes) => stdout.extend(bytes.iter().take(limit.saturating_sub(stdout.len()))),
                Told::Stderr(bytes) => stderr.extend(bytes.iter().take(limit.saturating_sub(stderr.len()))),
                Told::Ended { exit_code, .. } => return Ok((exit_code, stdout, stderr)),
            }
        }
        Err(Error::Reply("the stream ended before the process".into()))
    }

    /// Sends a plain request to the agent, for example `GET /metrics`.
    ///
    /// # Errors
    /// `Unreachable`, or `Refused` with the agent's reason.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        kind: &str,
        body: Body,
    ) -> Result<Response<Incoming>, Error> {
        let mut builder = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.client.base))
            .header(SANDBOX_HEADER, self.sandbox.as_str())
            .header(PORT_HEADER, AGENT_PORT);
        if let Some(token) = &self.token {
            builder = builder.header("x-access-token", token.expose());
        }
        if !kind.is_empty() {
            builder = builder.header(header::CONTENT_TYPE, kind);
        }
        let request = builder.body(body).map_err(|error| Error::Reply(error.into()))?;
        let response = self.client.send(request).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let bytes = http_body_util::Limited::new(response.into_body(), 1 << 20)
            .collect()
            .await
            .map_err(Error::Reply)?;
        let message = serde_json::from_slice::<serde_json::Value>(&bytes.to_bytes())
            .ok()
            .and_then(|body| body["message"].as_str().map(str::to_owned))
            .unwrap_or_else(|| format!("the agent replied {status}"));
        Err(Error::Refused(kelvin_api::error::ApiError {
            code: status.as_u16(),
            message,
            error_code: None,
            cause: None,
            remediation: None,
        }))
    }

    fn files(&self, path: &str) -> String {
        use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode as encode};
        let mut query = format!("/files?path={}", encode(path, NON_ALPHANUMERIC));
        if let Some(user) = &self.user {
            query.push_str(&format!("&username={}", encode(user, NON_ALPHANUMERIC)));
        }
        query
    }

    /// Copies a file of the sandbox to `target`, in bounded memory. `progress` is told the bytes so far and
    /// the size. Returns how many there were.
    ///
    /// # Errors
    /// `Refused` with the agent's reason, `Reply` when the stream was cut, `Local` when `target` fails.
    pub async fn download(
        &self,
        path: &str,
        target: &mut (impl AsyncWrite + Unpin),
        mut progress: impl FnMut(u64, Option<u64>),
    ) -> Result<u64, Error> {
        let local = |source| Error::Local { what: "writing the download".to_owned(), source };
        let response = self.send(Method::GET, &self.files(path), "", whole(Bytes::new())).await?;
        let size = response
            .headers()
            .get(header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok()?.parse().ok());
        let mut body = BodyStream::new(response.into_body());
        let mut done = 0;
        while let Some(frame) = body.try_next().await.map_err(|error| Error::Reply(error.into()))? {
            if let Ok(data) = frame.into_data() {
                target.write_all(&data).await.map_err(local)?;
                done += data.len() as u64;
                progress(done, size);
            }
        }
        target.flush().await.map_err(local)?;
        Ok(done)
    }

    /// Copies `source` to a file of the sandbox, in bounded memory. `progress` is told the bytes so far.
    ///
    /// # Errors
    /// `Refused` with the agent's reason.
    pub async fn upload(
        &self,
        path: &str,
        source: impl AsyncRead + Send + Unpin + 'static,
        progress: impl FnMut(u64) + Send + 'static,
    ) -> Result<(), Error> {
        let state = (source, progress, 0_u64);
        let chunks = futures::stream::try_unfold(state, |(mut source, mut progress, done)| async move {
            let mut buffer = vec![0; CHUNK];
            let count = source.read(&mut buffer).await?;
            if count == 0 {
                return Ok::<_, std::io::Error>(None);
            }
            buffer.truncate(count);
            let done = done + count as u64;
            progress(done);
            Ok(Some((Frame::data(Bytes::from(buffer)), (source, progress, done))))
        });
        let body = StreamBody::new(chunks).boxed_unsync();
        self.send(Method::POST, &self.files(path), "application/octet-stream", body).await.map(drop)
    }
}

/// Why an agent refused.
pub use connectrpc::ErrorCode;

/// The code of an error that means that a deadline has passed.
pub const DEADLINE_EXCEEDED: connectrpc::ErrorCode = connectrpc::ErrorCode::DeadlineExceeded;
