//! `process.Process`: processes that outlive their clients, with output in bounded memory.
//!
//! ```text
//! pipe or PTY -> pump -> hub -> a bounded queue per attached client (a slow one slows the process: a pipe)
//!                  └---> nobody attached: a backlog of the last 1 MiB, given to whoever attaches next
//! ```
//!
//! A process is known from its start until its end was read; nothing is written to disk. A crash of the
//! agent leaves the processes to init and loses the streams.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
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
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitIdStatus, kill_process_group};
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};

use crate::groups::Place;
use crate::port::watched;
use crate::pty;
use crate::spawn::{self, Child, Program};
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
/// How soon the kernel ends a command when memory is out: before what the image runs. Source: envd.
const OOM_SCORE: i16 = 100;
/// More than a terminal holds of what was written to it, in bytes.
const TERMINAL: u64 = 128 << 10;
/// Pipes of commands that have ended, held open by what they left running.
const MAX_LEFT_OPEN: usize = 4096;
/// How many of those there are.
static LEFT_OPEN: AtomicUsize = AtomicUsize::new(0);

#[derive(Debug, Clone)]
enum Chunk {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    Pty(Vec<u8>),
    End { exit_code: i32, exited: bool, status: String, error: Option<String> },
}

impl Chunk {
    fn size(&self) -> usize {
        match self {
            Self::Stdout(bytes) | Self::Stderr(bytes) | Self::Pty(bytes) => bytes.len(),
            Self::End { .. } => 0,
        }
    }

    fn event(self) -> ProcessEvent {
        let event = match self {
            Self::Stdout(bytes) => data(Output::Stdout(bytes)),
            Self::Stderr(bytes) => data(Output::Stderr(bytes)),
            Self::Pty(bytes) => data(Output::Pty(bytes)),
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
    /// Where input goes; `None` when the process takes none, or no more.
    stdin: tokio::sync::Mutex<Option<End>>,
    /// The terminal, when it has one: the same file as `stdin`.
    pty: Option<End>,
    ended: watch::Sender<bool>,
}

impl Entry {
    fn signal(&self, signal: Signal) -> io::Result<()> {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::NotFound)?;
        kill_process_group(pid, signal).map_err(io::Error::from)
    }
}

/// Our end of a pipe or a terminal.
type End = Arc<AsyncFd<OwnedFd>>;

type Table = Arc<Mutex<HashMap<u32, Arc<Entry>>>>;

/// The service. A cheap handle.
#[derive(Clone)]
pub struct Processes {
    state: Arc<State>,
    table: Table,
    root: Arc<Place>,
    user: Arc<Place>,
}

impl Processes {
    pub fn new(state: Arc<State>) -> Self {
        Self { state, table: Table::default(), root: Arc::new(Place::root()), user: Arc::new(Place::user()) }
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

    /// Starts what is asked for, to its end even when whoever asked has gone away.
    async fn start_process(
        &self,
        request: StartRequest,
        user: User,
        deadline: Option<std::time::Instant>,
    ) -> Result<Arc<Entry>, ConnectError> {
        let processes = self.clone();
        tokio::spawn(async move { processes.spawn(request, &user, deadline).await })
            .await
            .map_err(|error| ConnectError::internal(format!("starting a process: {error}")))?
    }

    async fn spawn(
        &self,
        request: StartRequest,
        user: &User,
        deadline: Option<std::time::Instant>,
    ) -> Result<Arc<Entry>, ConnectError> {
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
        let internal = |error: io::Error| ConnectError::internal(format!("making pipes: {error}"));
        let pty = match request.pty.as_option() {
            Some(pty) => Some(pty::size(pty).map_err(ConnectError::invalid_argument)?),
            None => None,
        };
        let streams = match pty {
            Some(size) => Streams::terminal(size, user),
            None => Streams::pipes(request.stdin.unwrap_or(true), user),
        }
        .map_err(internal)?;
        let usual = [
            ("PATH", spawn::PATH),
            ("LANG", "C.UTF-8"),
            ("HOME", &user.home.to_string_lossy()),
            ("USER", &user.name),
            ("LOGNAME", &user.name),
            ("SHELL", &user.shell),
        ];
        let mut env: BTreeMap<String, String> =
            usual.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        env.extend(pty.map(|_| ("TERM".to_owned(), "xterm-256color".to_owned())));
        env.extend(settings.environment());
        env.extend(config.envs.iter().map(|(name, value)| (name.clone(), value.clone())));
        let program = Program {
            name: OsStr::new(&config.cmd),
            args: &config.args,
            env,
            cwd: &cwd,
            user,
            streams: streams.child.each_ref().map(AsFd::as_fd),
            terminal: pty.is_some(),
            place: if user.uid == 0 { &self.root } else { &self.user },
            oom_score: OOM_SCORE,
        };
        let started = spawn::start(&program).await;
        let child = started.map_err(|error| not_started(&config.cmd, &cwd, &error))?;
        // The child has its ends now; while these stay open here, no pipe ever ends.
        drop(streams.child);
        let pid = child.pid();
        let (ended, _) = watch::channel(false);
        let entry = Arc::new(Entry {
            pid,
            config,
            tag: request.tag,
            hub: Hub::default(),
            stdin: tokio::sync::Mutex::new(streams.input),
            pty: pty.and_then(|_| streams.outputs.first().map(|(end, _)| Arc::clone(end))),
            ended,
        });
        self.table().insert(pid, Arc::clone(&entry));
        if let Some(deadline) = deadline {
            tokio::spawn(end_at(deadline.into(), Arc::clone(&entry)));
        }
        let (exited, exited_receiver) = watch::channel(false);
        let pumps: Vec<_> = streams
            .outputs
            .into_iter()
            .map(|(end, wrap)| tokio::spawn(pump(end, wrap, Arc::clone(&entry), exited_receiver.clone())))
            .collect();
        tokio::spawn(supervise(child, exited, pumps, entry.clone(), Arc::clone(&self.table)));
        Ok(entry)
    }
}

/// Waits for the end of a process, tells it, and forgets it when everybody knows.
async fn supervise(
    child: Child,
    exited: watch::Sender<bool>,
    pumps: Vec<tokio::task::JoinHandle<()>>,
    entry: Arc<Entry>,
    table: Table,
) {
    let status = child.wait().await;
    exited.send_replace(true);
    futures::future::join_all(pumps).await;
    entry.ended.send_replace(true);
    entry.hub.push(end_of(status)).await;
    // Nobody saw the end: keep it for a client that was cut off.
    let _ = tokio::time::timeout(UNSEEN_END, entry.hub.collected()).await;
    let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
    // The pid may have been given to another process meanwhile.
    if table.get(&entry.pid).is_some_and(|known| Arc::ptr_eq(known, &entry)) {
        table.remove(&entry.pid);
    }
}

/// What the caller is told of a process that was not started.
fn not_started(command: &str, cwd: &Path, error: &spawn::Error) -> ConnectError {
    let cwd = cwd.display();
    match error {
        spawn::Error::Nul(_) => ConnectError::invalid_argument(error.to_string()),
        spawn::Error::Cwd(source) => match source.kind() {
            io::ErrorKind::NotFound => ConnectError::invalid_argument(format!("cwd '{cwd}' does not exist")),
            io::ErrorKind::NotADirectory => {
                ConnectError::invalid_argument(format!("cwd '{cwd}' is not a directory"))
            }
            io::ErrorKind::PermissionDenied => {
                ConnectError::permission_denied(format!("cwd '{cwd}' may not be entered by the user"))
            }
            _ => crate::fault::typed(source, format!("cwd '{cwd}': {source}")),
        },
        spawn::Error::Exec(source) => match source.kind() {
            io::ErrorKind::NotFound => ConnectError::not_found(format!("command '{command}' not found")),
            io::ErrorKind::PermissionDenied => {
                ConnectError::permission_denied(format!("command '{command}' cannot be executed"))
            }
            io::ErrorKind::ArgumentListTooLong => {
                let text = format!(
                    "the arguments and the environment of '{command}' are longer than the kernel takes"
                );
                ConnectError::invalid_argument(text)
            }
            _ => crate::fault::typed(source, format!("executing '{command}': {source}")),
        },
        spawn::Error::Fork(source) => ConnectError::resource_exhausted(format!(
            "no room for another process ({source}): the sandbox runs as many as it may, or its memory is used up"
        )),
        spawn::Error::Stuck => ConnectError::deadline_exceeded(format!("'{command}' in '{cwd}': {error}")),
        spawn::Error::Step(what, source) => {
            ConnectError::internal(format!("starting '{command}': {what}: {source}"))
        }
    }
}

/// What a process reads and writes, and our ends of it.
struct Streams {
    child: [OwnedFd; 3],
    input: Option<End>,
    outputs: Vec<(End, Wrap)>,
}

type Wrap = fn(Vec<u8>) -> Chunk;

impl Streams {
    /// Pipes of `user`'s own: who is given one may open it again, by `/dev/stdout`.
    fn pipes(with_stdin: bool, user: &User) -> io::Result<Self> {
        let pipe = || {
            let ends = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
            std::os::unix::fs::fchown(&ends.0, Some(user.uid), Some(user.gid))?;
            Ok::<_, io::Error>(ends)
        };
        let (stdout, stdout_child) = pipe()?;
        let (stderr, stderr_child) = pipe()?;
        let (input, stdin_child) = if with_stdin {
            let (reader, writer) = pipe()?;
            (Some(end(writer)?), reader)
        } else {
            (None, File::open("/dev/null")?.into())
        };
        Ok(Self {
            child: [stdin_child, stdout_child, stderr_child],
            input,
            outputs: vec![(end(stdout)?, Chunk::Stdout), (end(stderr)?, Chunk::Stderr)],
        })
    }

    fn terminal(size: rustix::termios::Winsize, user: &User) -> io::Result<Self> {
        let (ours, theirs) = pty::open(size, user)?;
        let ours = end(ours)?;
        Ok(Self {
            child: [theirs.try_clone()?, theirs.try_clone()?, theirs],
            input: Some(Arc::clone(&ours)),
            outputs: vec![(ours, Chunk::Pty)],
        })
    }
}

fn end(fd: OwnedFd) -> io::Result<End> {
    let flags = rustix::fs::fcntl_getfl(fd.as_fd())?;
    rustix::fs::fcntl_setfl(fd.as_fd(), flags | rustix::fs::OFlags::NONBLOCK)?;
    Ok(Arc::new(watched(fd)?))
}

/// Copies a pipe or a terminal to the hub until it ends, or until what was in it when the process exited is read: what
/// it left running may hold the other end open, and write to it, for ever. That is read on, so that it does not die of
/// a pipe without a reader, and nobody is told of it. A terminal hangs up with its process.
async fn pump(end: End, wrap: Wrap, entry: Arc<Entry>, mut exited: watch::Receiver<bool>) {
    let mut buffer = vec![0; CHUNK];
    // What is left to be read, in bytes; none while the process runs.
    let mut left: Option<u64> = None;
    while left != Some(0) {
        // One that writes without end, and to nobody, must not keep the others waiting.
        tokio::task::coop::consume_budget().await;
        if left.is_none() && *exited.borrow_and_update() {
            left = Some(match entry.pty {
                None => rustix::io::ioctl_fionread(end.get_ref()).unwrap_or(0),
                // It tells of a part of what a terminal holds only.
                Some(_) => TERMINAL,
            });
            continue;
        }
        let most = left.map_or(CHUNK, |left| CHUNK.min(usize::try_from(left).unwrap_or(CHUNK)));
        match rustix::io::read(end.get_ref(), &mut buffer[..most]) {
            Ok(0) => return,
            Ok(count) => {
                left = left.map(|left| left - count as u64);
                entry.hub.push(wrap(buffer[..count].to_vec())).await;
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if left.is_some() => break,
            Err(Errno::AGAIN) => {
                tokio::select! {
                    // Cleared before the next read: what arrives after it makes it ready again.
                    ready = end.readable() => match ready {
                        Ok(mut ready) => ready.clear_ready(),
                        Err(_) => return,
                    },
                    changed = exited.changed() => if changed.is_err() { return },
                }
            }
            // EIO: nobody has the terminal open any more.
            Err(_) => return,
        }
    }
    if entry.pty.is_none() {
        tokio::spawn(read_on(end));
    }
}

/// Reads what nobody is told of, until the last writer has gone.
async fn read_on(end: End) {
    if LEFT_OPEN.fetch_add(1, Ordering::Relaxed) < MAX_LEFT_OPEN {
        // Small: there may be many.
        let mut buffer = [0; 4096];
        loop {
            tokio::task::coop::consume_budget().await;
            match rustix::io::read(end.get_ref(), &mut buffer) {
                Ok(1..) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => match end.readable().await {
                    Ok(mut ready) => ready.clear_ready(),
                    Err(_) => break,
                },
                Ok(0) | Err(_) => break,
            }
        }
    }
    LEFT_OPEN.fetch_sub(1, Ordering::Relaxed);
}

async fn write(end: &End, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = end.writable().await?;
        match ready.try_io(|end| rustix::io::write(end.get_ref(), bytes).map_err(io::Error::from)) {
            Ok(written) => bytes = &bytes[written?..],
            Err(_would_block) => {}
        }
    }
    Ok(())
}

fn end_of(status: io::Result<WaitIdStatus>) -> Chunk {
    match status {
        Ok(status) => match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => {
                let status = format!("exit status {code}");
                let error = (code != 0).then(|| status.clone());
                Chunk::End { exit_code: code, exited: true, status, error }
            }
            (None, signal) => {
                let text = kelvin_api::signal::status(signal.unwrap_or(0), status.dumped());
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

/// `events` until `deadline`, and then the error that says so: whoever set it is told of it and not of the signal that
/// the process got.
fn until<T: Send + 'static>(
    deadline: Option<std::time::Instant>,
    events: impl futures::Stream<Item = Result<T, ConnectError>> + Send + 'static,
) -> impl futures::Stream<Item = Result<T, ConnectError>> + Send {
    stream::unfold(Some(Box::pin(events)), move |events| async move {
        let mut events = events?;
        let next = match deadline {
            Some(deadline) => tokio::time::timeout_at(deadline.into(), events.next()).await,
            None => Ok(events.next().await),
        };
        match next {
            Ok(next) => next.map(|event| (event, Some(events))),
            Err(_elapsed) => {
                Some((Err(ConnectError::deadline_exceeded("the deadline of the call has passed")), None))
            }
        }
    })
}

/// How often a stream that is silent says that it lives.
pub fn keepalive(ctx: &RequestContext) -> Option<Duration> {
    let seconds: u64 = ctx.header("keepalive-ping-interval")?.to_str().ok()?.parse().ok()?;
    (seconds > 0).then(|| Duration::from_secs(seconds))
}

async fn feed(entry: &Entry, input: ProcessInput) -> Result<(), ConnectError> {
    let bytes = match (input.input, &entry.pty) {
        (Some(Input::Stdin(bytes)), None) | (Some(Input::Pty(bytes)), Some(_)) => bytes,
        (Some(Input::Stdin(_)), Some(_)) => {
            return Err(ConnectError::failed_precondition("the process has a PTY: send the input as pty"));
        }
        (Some(Input::Pty(_)), None) => {
            return Err(ConnectError::failed_precondition("the process has no PTY"));
        }
        (None, _) => return Err(ConnectError::invalid_argument("the input is empty")),
    };
    // Held while it is written: two inputs never mix.
    let stdin = entry.stdin.lock().await;
    let end = stdin.as_ref().ok_or_else(|| ConnectError::failed_precondition("stdin is not open"))?;
    let mut ended = entry.ended.subscribe();
    let written = tokio::select! {
        written = write(end, &bytes) => written,
        // Whatever holds the other end by now, it is not the process.
        _ = ended.wait_for(|ended| *ended) => Err(io::ErrorKind::BrokenPipe.into()),
    };
    written.map_err(|error| ConnectError::failed_precondition(format!("writing to stdin: {error}")))
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
        let entry = self.start_process(request.to_owned_message(), user, ctx.deadline()).await?;
        let events = events(&entry, keepalive(&ctx))
            .map(|event| Ok(StartResponse { event: event.into(), ..Default::default() }));
        Response::stream_ok(until(ctx.deadline(), events))
    }

    async fn connect(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, ConnectRequest>,
    ) -> ServiceResult<ServiceStream<ConnectResponse>> {
        let entry = self.find(&request.to_owned_message().process)?;
        let events = events(&entry, keepalive(&ctx))
            .map(|event| Ok(ConnectResponse { event: event.into(), ..Default::default() }));
        Response::stream_ok(until(ctx.deadline(), events))
    }

    async fn update(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, UpdateRequest>,
    ) -> ServiceResult<UpdateResponse> {
        let request = request.to_owned_message();
        let entry = self.find(&request.process)?;
        let end =
            entry.pty.as_ref().ok_or_else(|| ConnectError::failed_precondition("the process has no PTY"))?;
        if let Some(wanted) = request.pty.as_option() {
            let size = pty::size(wanted).map_err(ConnectError::invalid_argument)?;
            pty::resize(end.get_ref(), size)
                .map_err(|error| ConnectError::failed_precondition(format!("resizing: {error}")))?;
        }
        Response::ok(UpdateResponse::default())
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
        if entry.pty.is_some() {
            return Err(ConnectError::failed_precondition(
                "a PTY cannot be closed: send the byte 4 (Ctrl-D)",
            ));
        }
        entry.stdin.lock().await.take();
        Response::ok(CloseStdinResponse::default())
    }
}
