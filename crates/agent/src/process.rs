//! `process.Process`: processes that outlive their clients, with output in bounded memory.
//!
//! ```text
//! pipe -> pump -> hub -> a bounded queue per attached client (a slow one slows the process: a pipe)
//!                  └---> nobody attached: a backlog of the last 1 MiB, given to whoever attaches next
//! ```
//!
//! A process is known from its start until its end was read; nothing is written to disk. A crash of the
//! agent leaves the processes to init and loses the streams.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use connectrpc::{
    ConnectError, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use futures::StreamExt;
use futures::stream;
use kelvin_api::envd::process::__buffa::oneof::{
    process_event::{Event, data_event::Output},
    process_input::Input,
    process_selector::Selector,
    stream_input_request::Event as InputEvent,
};
use kelvin_api::envd::process::{
    CloseStdinRequest, CloseStdinResponse, ConnectRequest, ConnectResponse, ListRequest, ListResponse,
    Process, ProcessConfig, ProcessEvent, ProcessInfo, ProcessInput, ProcessSelector, SendInputRequest,
    SendInputResponse, SendSignalRequest, SendSignalResponse, StartRequest, StartResponse,
    StreamInputRequest, StreamInputResponse, UpdateRequest, UpdateResponse, process_event,
};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, watch};

use crate::state::State;
use crate::users::User;

/// Output kept while nobody is attached, in bytes.
const BACKLOG: usize = 1 << 20;
/// Chunks on their way to one client.
const QUEUE: usize = 8;
/// The size of one chunk, in bytes.
const CHUNK: usize = 32 << 10;
/// How long a process may take to obey SIGTERM at its deadline.
const GRACE: Duration = Duration::from_secs(1);
/// Processes at one time that were started here.
const MAX_PROCESSES: usize = 4096;

#[derive(Debug, Clone)]
enum Chunk {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    End { exit_code: i32, exited: bool, status: String, error: Option<String> },
}

impl Chunk {
    fn size(&self) -> usize {
        match self {
            Self::Stdout(bytes) | Self::Stderr(bytes) => bytes.len(),
            Self::End { .. } => 0,
        }
    }

    fn event(self) -> ProcessEvent {
        let event = match self {
            Self::Stdout(bytes) => data(Output::Stdout(bytes)),
            Self::Stderr(bytes) => data(Output::Stderr(bytes)),
            Self::End { exit_code, exited, status, error } => Event::End(Box::new(process_event::EndEvent {
                exit_code,
                exited,
                status,
                error,
                ..Default::default()
            })),
        };
        ProcessEvent { event: Some(event), ..Default::default() }
    }
}

fn data(output: Output) -> Event {
    Event::Data(Box::new(process_event::DataEvent { output: Some(output), ..Default::default() }))
}

#[derive(Debug, Default)]
struct HubState {
    clients: Vec<mpsc::Sender<Chunk>>,
    backlog: VecDeque<Chunk>,
    backlog_bytes: usize,
}

/// How long the end of a process is kept for a client that comes back for it.
const UNSEEN_END: Duration = Duration::from_secs(300);

/// Spreads the output of one process over its clients.
#[derive(Debug, Default)]
struct Hub {
    state: Mutex<HubState>,
    attached: tokio::sync::Notify,
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, HubState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new client; what nobody has seen comes first.
    fn attach(&self) -> (Vec<Chunk>, mpsc::Receiver<Chunk>) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let mut state = self.lock();
        state.clients.push(sender);
        state.backlog_bytes = 0;
        self.attached.notify_one();
        (state.backlog.drain(..).collect(), receiver)
    }

    /// Waits until somebody has taken the backlog.
    async fn collected(&self) {
        while !self.lock().backlog.is_empty() {
            self.attached.notified().await;
        }
    }

    /// Delivers to every client, waiting for the slow ones; keeps it when there is none.
    async fn push(&self, chunk: Chunk) {
        let clients = self.lock().clients.clone();
        let mut delivered = false;
        for client in clients {
            delivered |= client.send(chunk.clone()).await.is_ok();
        }
        let mut state = self.lock();
        state.clients.retain(|client| !client.is_closed());
        if !delivered {
            state.backlog_bytes += chunk.size();
            state.backlog.push_back(chunk);
            while state.backlog_bytes > BACKLOG {
                let Some(dropped) = state.backlog.pop_front() else {
                    break;
                };
                state.backlog_bytes -= dropped.size();
            }
        }
    }
}

/// One process that was started here.
#[derive(Debug)]
struct Entry {
    pid: u32,
    config: ProcessConfig,
    tag: Option<String>,
    hub: Hub,
    stdin: tokio::sync::Mutex<Option<pipe::Sender>>,
    ended: watch::Sender<bool>,
}

impl Entry {
    fn signal(&self, signal: Signal) -> io::Result<()> {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::NotFound)?;
        kill_process_group(pid, signal).map_err(io::Error::from)
    }
}

type Table = Arc<Mutex<HashMap<u32, Arc<Entry>>>>;

/// The service.
pub struct Processes {
    state: Arc<State>,
    table: Table,
}

impl Processes {
    pub fn new(state: Arc<State>) -> Self {
        Self { state, table: Table::default() }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<u32, Arc<Entry>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, selector: &ProcessSelector) -> Result<Arc<Entry>, ConnectError> {
        let table = self.table();
        match &selector.selector {
            Some(Selector::Pid(pid)) => table
                .get(pid)
                .cloned()
                .ok_or_else(|| ConnectError::not_found(format!("process with pid {pid} not found"))),
            Some(Selector::Tag(tag)) => table
                .values()
                .find(|entry| entry.tag.as_ref() == Some(tag))
                .cloned()
                .ok_or_else(|| ConnectError::not_found(format!("process with tag {tag} not found"))),
            None => Err(ConnectError::invalid_argument("the selector needs a pid or a tag")),
        }
    }

    fn spawn(
        &self,
        request: StartRequest,
        user: &User,
        deadline: Option<std::time::Instant>,
    ) -> Result<Arc<Entry>, ConnectError> {
        if request.pty.is_set() {
            return Err(ConnectError::unimplemented("PTYs come with a later version of the agent"));
        }
        if self.table().len() >= MAX_PROCESSES {
            return Err(ConnectError::resource_exhausted(format!("{MAX_PROCESSES} processes run already")));
        }
        let config = request.process.into_option().unwrap_or_default();
        if config.cmd.is_empty() {
            return Err(ConnectError::invalid_argument("process.cmd is empty"));
        }
        let settings = self.state.settings().clone();
        let cwd = match (config.cwd.as_deref().filter(|cwd| !cwd.is_empty()), &settings.default_workdir) {
            (Some(cwd), _) => user.resolve(cwd),
            (None, Some(workdir)) => user.resolve(workdir),
            (None, None) => user.home.clone(),
        };
        if !cwd.is_dir() {
            return Err(ConnectError::invalid_argument(format!("cwd '{}' does not exist", cwd.display())));
        }
        let internal = |error: io::Error| ConnectError::internal(format!("making pipes: {error}"));
        let (stdout, stdout_child) = output_pipe().map_err(internal)?;
        let (stderr, stderr_child) = output_pipe().map_err(internal)?;
        let (stdin, stdin_child) = if request.stdin.unwrap_or(true) {
            let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
                .map_err(|error| internal(error.into()))?;
            nonblocking(&writer).map_err(internal)?;
            (Some(pipe::Sender::from_owned_fd(writer).map_err(internal)?), Stdio::from(reader))
        } else {
            (None, Stdio::null())
        };
        let mut command = tokio::process::Command::new(&config.cmd);
        command
            .args(&config.args)
            .current_dir(&cwd)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LANG", "C.UTF-8")
            .env("HOME", &user.home)
            .env("USER", &user.name)
            .env("LOGNAME", &user.name)
            .env("SHELL", &user.shell)
            .envs(settings.environment())
            .envs(config.envs.iter())
            .stdin(stdin_child)
            .stdout(stdout_child)
            .stderr(stderr_child);
        become_user(&mut command, user);
        let mut child = command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => ConnectError::not_found(format!("command '{}' not found", config.cmd)),
            io::ErrorKind::PermissionDenied => {
                ConnectError::permission_denied(format!("command '{}' cannot be executed", config.cmd))
            }
            _ => ConnectError::internal(format!("starting '{}': {error}", config.cmd)),
        })?;
        // The child has its ends now; while these stay open here, no pipe ever ends.
        drop(command);
        let pid = child.id().ok_or_else(|| ConnectError::internal("the process has no pid"))?;
        let (ended, _) = watch::channel(false);
        let entry = Arc::new(Entry {
            pid,
            config,
            tag: request.tag,
            hub: Hub::default(),
            stdin: tokio::sync::Mutex::new(stdin),
            ended,
        });
        self.table().insert(pid, Arc::clone(&entry));
        if let Some(deadline) = deadline {
            tokio::spawn(end_at(deadline.into(), Arc::clone(&entry)));
        }
        let (exited, exited_receiver) = watch::channel(false);
        let out = tokio::spawn(pump(stdout, Chunk::Stdout, Arc::clone(&entry), exited_receiver.clone()));
        let err = tokio::spawn(pump(stderr, Chunk::Stderr, Arc::clone(&entry), exited_receiver));
        let table = Arc::clone(&self.table);
        let supervised = Arc::clone(&entry);
        tokio::spawn(async move {
            let status = child.wait().await;
            exited.send_replace(true);
            let _ = tokio::join!(out, err);
            supervised.ended.send_replace(true);
            supervised.hub.push(end_of(status)).await;
            // Nobody saw the end: keep it for a client that was cut off.
            let _ = tokio::time::timeout(UNSEEN_END, supervised.hub.collected()).await;
            let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
            // The pid may have been given to another process meanwhile.
            if table.get(&supervised.pid).is_some_and(|known| Arc::ptr_eq(known, &supervised)) {
                table.remove(&supervised.pid);
            }
        });
        Ok(entry)
    }
}

fn output_pipe() -> io::Result<(pipe::Receiver, Stdio)> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    nonblocking(&reader)?;
    Ok((pipe::Receiver::from_owned_fd(reader)?, Stdio::from(writer)))
}

fn nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd.as_fd())?;
    Ok(rustix::fs::fcntl_setfl(fd.as_fd(), flags | rustix::fs::OFlags::NONBLOCK)?)
}

/// Makes the child lead a session of its own and drop to `user`.
#[allow(unsafe_code)]
fn become_user(command: &mut tokio::process::Command, user: &User) {
    let (uid, gid, groups) = (user.uid, user.gid, user.groups.clone());
    // SAFETY: between fork and exec only async-signal-safe system calls are made, on memory that was
    // allocated before.
    unsafe {
        command.pre_exec(move || {
            let check = |result: libc::c_int| {
                if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
            };
            check(libc::setsid())?;
            libc::umask(0o022);
            // The agent is spared by the OOM killer; what it starts is not.
            let score = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            if score >= 0 {
                libc::write(score, c"0".as_ptr().cast(), 1);
                libc::close(score);
            }
            check(libc::setgroups(groups.len(), groups.as_ptr()))?;
            check(libc::setgid(gid))?;
            check(libc::setuid(uid))
        });
    }
}

/// Copies a pipe to the hub until it ends, or until it is empty after the process has exited: a
/// grandchild in the background may hold it open for ever.
async fn pump(
    pipe: pipe::Receiver,
    wrap: fn(Vec<u8>) -> Chunk,
    entry: Arc<Entry>,
    mut exited: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match pipe.try_read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => entry.hub.push(wrap(buffer[..count].to_vec())).await,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if *exited.borrow_and_update() {
                    return;
                }
                tokio::select! {
                    ready = pipe.readable() => if ready.is_err() { return },
                    changed = exited.changed() => if changed.is_err() { return },
                }
            }
            Err(_) => return,
        }
    }
}

fn end_of(status: io::Result<ExitStatus>) -> Chunk {
    match status {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => Chunk::End {
                exit_code: code,
                exited: true,
                status: format!("exit status {code}"),
                error: None,
            },
            (None, signal) => {
                let number = signal.unwrap_or(0);
                let text = format!("signal: {number}");
                Chunk::End { exit_code: -1, exited: false, status: text.clone(), error: Some(text) }
            }
        },
        Err(error) => Chunk::End {
            exit_code: -1,
            exited: false,
            status: "unknown".to_owned(),
            error: Some(error.to_string()),
        },
    }
}

/// Ends `entry`'s process group at `deadline`: politely, then not.
async fn end_at(deadline: tokio::time::Instant, entry: Arc<Entry>) {
    let mut ended = entry.ended.subscribe();
    let mut over = async || {
        let _ = ended.wait_for(|ended| *ended).await;
    };
    if tokio::time::timeout_at(deadline, over()).await.is_ok() {
        return;
    }
    let _ = entry.signal(Signal::TERM);
    if tokio::time::timeout(GRACE, over()).await.is_err() {
        let _ = entry.signal(Signal::KILL);
    }
}

/// The events of one client: start, what it missed, what comes, and keepalives in between.
fn events(
    entry: &Entry,
    keepalive: Option<Duration>,
) -> impl futures::Stream<Item = ProcessEvent> + Send + use<> {
    let start = ProcessEvent {
        event: Some(Event::Start(Box::new(process_event::StartEvent {
            pid: entry.pid,
            ..Default::default()
        }))),
        ..Default::default()
    };
    let (missed, receiver) = entry.hub.attach();
    let over = missed.iter().any(|chunk| matches!(chunk, Chunk::End { .. }));
    let first = stream::iter([start].into_iter().chain(missed.into_iter().map(Chunk::event)));
    let rest = stream::unfold((receiver, over), move |(mut receiver, over)| async move {
        if over {
            return None;
        }
        let next = match keepalive {
            Some(interval) => tokio::time::timeout(interval, receiver.recv()).await,
            None => Ok(receiver.recv().await),
        };
        match next {
            Ok(Some(chunk)) => {
                let last = matches!(chunk, Chunk::End { .. });
                Some((chunk.event(), (receiver, last)))
            }
            Ok(None) => None,
            Err(_elapsed) => {
                let event = Event::Keepalive(Box::default());
                Some((ProcessEvent { event: Some(event), ..Default::default() }, (receiver, false)))
            }
        }
    });
    first.chain(rest)
}

fn keepalive(ctx: &RequestContext) -> Option<Duration> {
    let seconds: u64 = ctx.header("keepalive-ping-interval")?.to_str().ok()?.parse().ok()?;
    (seconds > 0).then(|| Duration::from_secs(seconds))
}

async fn feed(entry: &Entry, input: ProcessInput) -> Result<(), ConnectError> {
    match input.input {
        Some(Input::Stdin(bytes)) => {
            let mut stdin = entry.stdin.lock().await;
            let pipe =
                stdin.as_mut().ok_or_else(|| ConnectError::failed_precondition("stdin is not open"))?;
            pipe.write_all(&bytes)
                .await
                .map_err(|error| ConnectError::failed_precondition(format!("writing to stdin: {error}")))
        }
        Some(Input::Pty(_)) => Err(ConnectError::failed_precondition("the process has no PTY")),
        None => Err(ConnectError::invalid_argument("the input is empty")),
    }
}

#[allow(refining_impl_trait)] // a service names its reply types
impl Process for Processes {
    async fn list(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, ListRequest>,
    ) -> ServiceResult<ListResponse> {
        let mut processes: Vec<_> = self
            .table()
            .values()
            .filter(|entry| !*entry.ended.borrow())
            .map(|entry| ProcessInfo {
                config: entry.config.clone().into(),
                pid: entry.pid,
                tag: entry.tag.clone(),
                ..Default::default()
            })
            .collect();
        processes.sort_by_key(|process| process.pid);
        Response::ok(ListResponse { processes, ..Default::default() })
    }

    async fn start(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, StartRequest>,
    ) -> ServiceResult<ServiceStream<StartResponse>> {
        let user = self.state.user_of(ctx.headers())?;
        let entry = self.spawn(request.to_owned_message(), &user, ctx.deadline())?;
        Response::stream_ok(
            events(&entry, keepalive(&ctx))
                .map(|event| Ok(StartResponse { event: event.into(), ..Default::default() })),
        )
    }

    async fn connect(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, ConnectRequest>,
    ) -> ServiceResult<ServiceStream<ConnectResponse>> {
        let entry = self.find(&request.to_owned_message().process)?;
        Response::stream_ok(
            events(&entry, keepalive(&ctx))
                .map(|event| Ok(ConnectResponse { event: event.into(), ..Default::default() })),
        )
    }

    async fn update(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, UpdateRequest>,
    ) -> ServiceResult<UpdateResponse> {
        self.find(&request.to_owned_message().process)?;
        Err(ConnectError::failed_precondition("the process has no PTY"))
    }

    async fn stream_input(
        &self,
        _: RequestContext,
        mut requests: InboundStream<StreamInputRequest>,
    ) -> ServiceResult<StreamInputResponse> {
        let mut target = None;
        while let Some(request) = requests.next().await {
            match request?.to_owned_message().event {
                Some(InputEvent::Start(start)) => target = Some(self.find(&start.process)?),
                Some(InputEvent::Data(data)) => {
                    let entry: &Arc<Entry> = target
                        .as_ref()
                        .ok_or_else(|| ConnectError::invalid_argument("data came before the start event"))?;
                    feed(entry, data.input.into_option().unwrap_or_default()).await?;
                }
                Some(InputEvent::Keepalive(_)) | None => {}
            }
        }
        Response::ok(StreamInputResponse::default())
    }

    async fn send_input(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, SendInputRequest>,
    ) -> ServiceResult<SendInputResponse> {
        let request = request.to_owned_message();
        let entry = self.find(&request.process)?;
        feed(&entry, request.input.into_option().unwrap_or_default()).await?;
        Response::ok(SendInputResponse::default())
    }

    async fn send_signal(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, SendSignalRequest>,
    ) -> ServiceResult<SendSignalResponse> {
        let request = request.to_owned_message();
        let entry = self.find(&request.process)?;
        let signal = match request.signal.to_i32() {
            9 => Signal::KILL,
            15 => Signal::TERM,
            other => {
                return Err(ConnectError::invalid_argument(format!("signal {other} is not supported")));
            }
        };
        match entry.signal(signal) {
            Ok(()) => Response::ok(SendSignalResponse::default()),
            Err(error) => Err(ConnectError::not_found(format!("signalling {}: {error}", entry.pid))),
        }
    }

    async fn close_stdin(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, CloseStdinRequest>,
    ) -> ServiceResult<CloseStdinResponse> {
        let entry = self.find(&request.to_owned_message().process)?;
        entry.stdin.lock().await.take();
        Response::ok(CloseStdinResponse::default())
    }
}
