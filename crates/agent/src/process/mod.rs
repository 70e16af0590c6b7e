//! `process.Process`: processes that outlive their clients, with output in bounded memory.
//!
//! ```text
//! pipe or PTY -> pump -> hub -> a bounded queue per attached client (a slow one slows the process: a pipe)
//!                  └---> nobody attached: a backlog of the last 1 MiB, given to whoever attaches next
//! ```
//!
//! A process is known from its start until its end was read; nothing is written to disk. A crash of the
//! agent leaves the processes to init and loses the streams.

mod entry;
mod output;
mod streams;

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use connectrpc::{
    ConnectError, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use futures::{StreamExt, stream};
use kelvin_api::envd::process::__buffa::oneof::{
    process_selector::Selector, stream_input_request::Event as InputEvent,
};
use kelvin_api::envd::process::{
    CloseStdinRequest, CloseStdinResponse, ConnectRequest, ConnectResponse, ListRequest, ListResponse,
    Process, ProcessInfo, ProcessSelector, SendInputRequest, SendInputResponse, SendSignalRequest,
    SendSignalResponse, StartRequest, StartResponse, StreamInputRequest, StreamInputResponse, UpdateRequest,
    UpdateResponse,
};
use rustix::process::Signal;
use tokio::sync::watch;

use self::entry::{Entry, end_at, events, feed, pump};
use self::output::{Hub, end_of};
use self::streams::Streams;
use crate::groups::Place;
use crate::pty;
use crate::shell;
use crate::spawn::{self, Child, Program};
use crate::state::{Settings, State};
use crate::users::User;

/// Processes at one time that were started here.
const MAX_PROCESSES: usize = 4096;
/// How soon the kernel ends a command when memory is out: before what the image runs. Source: envd.
const OOM_SCORE: i16 = 100;

/// How long the end of a process is kept for a client that comes back for it.
const UNSEEN_END: Duration = Duration::from_secs(300);

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
        let directories = directories(config.cwd.as_deref(), &settings, user);
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
        let asked = config.envs.iter().map(|(name, value)| (name.clone(), value.clone()));
        let env = environment(&settings, user, pty.is_some(), asked);
        let mut program = Program {
            name: OsStr::new(&config.cmd),
            args: &config.args,
            env,
            cwd: &directories[0],
            user,
            streams: streams.child.each_ref().map(AsFd::as_fd),
            terminal: pty.is_some(),
            place: if user.uid == 0 { &self.root } else { &self.user },
            oom_score: OOM_SCORE,
        };
        let mut started = spawn::start(&program).await;
        for cwd in &directories[1..] {
            let Err(spawn::Error::Cwd(error)) = &started else { break };
            if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) {
                break;
            }
            say_once(program.cwd, error, cwd);
            program.cwd = cwd;
            started = spawn::start(&program).await;
        }
        let child = started.map_err(|error| not_started(&config.cmd, program.cwd, &error))?;
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

/// Where a process may be started, the best first: where it is asked to be, and nowhere else; or where it is by default, and
/// when that is not there, at home.
fn directories(asked: Option<&str>, settings: &Settings, user: &User) -> Vec<PathBuf> {
    if let Some(asked) = asked.filter(|cwd| !cwd.is_empty()) {
        return vec![user.resolve(asked)];
    }
    let workdir = settings.workdir().map(|workdir| user.resolve(workdir));
    workdir.into_iter().chain([user.home.clone(), PathBuf::from("/")]).collect()
}

/// Says, once, that processes are not started in `cwd`.
fn say_once(cwd: &Path, error: &io::Error, instead: &Path) {
    static SAID: AtomicBool = AtomicBool::new(false);
    if !SAID.swap(true, Ordering::Relaxed) {
        eprintln!("agent: cwd {} of processes: {error}; {} instead", cwd.display(), instead.display());
    }
}

/// The environment of a process of `user`; what is `asked` for wins.
fn environment(
    settings: &Settings,
    user: &User,
    terminal: bool,
    asked: impl Iterator<Item = (String, String)>,
) -> BTreeMap<String, String> {
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
    if terminal {
        env.insert("TERM".to_owned(), "xterm-256color".to_owned());
    }
    env.extend(settings.environment());
    env.extend(asked);
    let path = env.get("PATH").filter(|path| *path != spawn::PATH).cloned();
    env.extend(path.map(|path| (shell::PATH_VARIABLE.to_owned(), path)));
    env
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

#[cfg(test)]
mod tests {
    use kelvin_api::image::ImageDefaults;

    use super::*;

    #[test]
    fn only_a_default_directory_has_another_in_its_place() {
        let home = PathBuf::from("/home/user");
        let user = User { home: home.clone(), ..User::root() };
        let mut settings = Settings::default();
        let of = |asked, settings: &Settings| directories(asked, settings, &user);
        assert_eq!(of(None, &settings), [home.clone(), "/".into()]);
        settings.image = ImageDefaults {
            workdir: Some("/app".to_owned()),
            env: [("HOME".to_owned(), "/h".to_owned()), ("PATH".to_owned(), "/opt".to_owned())].into(),
            user: None,
        };
        assert_eq!(of(None, &settings), [PathBuf::from("/app"), home.clone(), "/".into()]);
        assert_eq!(of(Some(""), &settings).len(), 3);
        assert_eq!(of(Some("x"), &settings), [home.join("x")]);
        let of = |settings: &Settings, asked: &[(&str, &str)]| {
            let asked = asked.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            environment(settings, &user, true, asked)
        };
        let env = of(&settings, &[("A", "asked")]);
        let value = |name: &str| env.get(name).map(String::as_str);
        assert_eq!((value("PATH"), value("HOME"), value("USER")), (Some("/opt"), Some("/h"), Some("root")));
        assert_eq!((value("TERM"), value("A")), (Some("xterm-256color"), Some("asked")));
        assert_eq!(value("KELVIN_PATH"), Some("/opt"), "for login shells");
        assert!(!of(&Settings::default(), &[]).contains_key("KELVIN_PATH"), "an image that says nothing");
        assert_eq!(of(&settings, &[("PATH", "/own")])["KELVIN_PATH"], "/own");
    }
}
