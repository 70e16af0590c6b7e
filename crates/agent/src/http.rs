//! HTTP/2 on the guest's HTTP port: envd's services and its plain endpoints.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use connectrpc::{ConnectRpcService, Router};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use kelvin_api::sandbox::EnvVars;
use kelvin_api::{guest, image};
use serde::Deserialize;
use tower::Service;

use crate::control::{Channel, Control};
use crate::filesystem::Files;
use crate::metrics::{self, CpuMeter};
use crate::process::Processes;
use crate::reply::{Body, empty, error, json};
use crate::state::State;
use crate::{files, hooks, port, services, tunnel, vsock};

/// The largest JSON body that is read whole.
const MAX_JSON: usize = 1 << 20;

/// Descriptors that a process may have at the most. Source: `fs.nr_open` of Linux.
pub const DESCRIPTORS: u64 = 1 << 20;

/// Threads for what may wait for a disk, or for a file system whose server is dead. Made when they are needed.
const BLOCKING: usize = 64;

/// What may be on its way in one stream, and in all of them, in bytes: all tunnels together, whose servers do not read,
/// leave a third for everything else.
const STREAM_WINDOW: u32 = 128 << 10;
const CONNECTION_WINDOW: u32 = 24 << 20;
const _: () = assert!(tunnel::CONNECTIONS * STREAM_WINDOW as usize <= CONNECTION_WINDOW as usize * 2 / 3);

struct Agent {
    state: Arc<State>,
    rpc: ConnectRpcService,
    meter: CpuMeter,
}

/// Runs the agent until the machine ends.
///
/// # Errors
/// When one of the two ways in is missing or the runtime cannot be made; init starts the agent again.
pub fn run() -> io::Result<()> {
    // Each watch, pipe and terminal is a descriptor; what is started here has the usual limit again.
    let _ = rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit { current: Some(DESCRIPTORS), maximum: Some(DESCRIPTORS) },
    );
    // Init is spared by the kernel; the agent asks for the same.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let state = Arc::new(State::default());
    let control = Control::open(Arc::clone(&state), Channel::open()?)?;
    let again = control.is_another();
    // Before the host hears of it: who asks for the console finds it there.
    crate::init::tell_stages();
    std::thread::Builder::new().name("control".to_owned()).spawn(move || control.run())?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(BLOCKING).build()?;
    runtime.block_on(serve(state, again))
}

/// A conversation with the host.
trait Io: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}
impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Io for T {}

/// The HTTP port, of the kind that this machine has.
enum Listener {
    Port(port::Listener),
    Vsock(vsock::Listener),
}

impl Listener {
    fn new(state: Arc<State>) -> io::Result<Self> {
        match port::open(guest::HTTP_PORT, true) {
            Ok(file) => port::Listener::new(file, state).map(Self::Port),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                vsock::Listener::new(guest::HTTP_VSOCK, state).map(Self::Vsock)
            }
            Err(error) => Err(error),
        }
    }

    async fn accept(&mut self) -> io::Result<Box<dyn Io>> {
        Ok(match self {
            Self::Port(port) => Box::new(port.accept().await?),
            Self::Vsock(socket) => Box::new(socket.accept().await?),
        })
    }

    /// Looks after the connections of the conversation that is served; ends when the host begins another.
    async fn watch(&mut self) -> io::Result<()> {
        match self {
            // There is one, and nobody else can come.
            Self::Port(_) => std::future::pending().await,
            Self::Vsock(socket) => socket.watch().await,
        }
    }

    /// A port has one conversation after the other, a socket has a connection for each.
    async fn dismiss(&mut self) -> io::Result<()> {
        match self {
            Self::Port(port) => port.dismiss().await,
            Self::Vsock(_) => Ok(()),
        }
    }

    async fn end(&mut self) -> io::Result<()> {
        match self {
            Self::Port(port) => port.end().await,
            Self::Vsock(_) => Ok(()),
        }
    }
}

async fn serve(state: Arc<State>, again: bool) -> io::Result<()> {
    let router = Router::new()
        .add_service(Arc::new(Processes::new(Arc::clone(&state))))
        .add_service(Arc::new(Files::new(Arc::clone(&state))));
    let agent = Arc::new(Agent {
        state: Arc::clone(&state),
        rpc: ConnectRpcService::new(router),
        meter: CpuMeter::default(),
    });
    let mut listener = Listener::new(state)?;
    if again {
        // The host is in the middle of a conversation with an agent that is no more.
        listener.dismiss().await?;
    }
    services::start(again);
    let hooks = Arc::clone(&agent.state);
    tokio::spawn(async move {
        loop {
            hooks.restored.notified().await;
            hooks::run(&hooks).await;
        }
    });
    loop {
        let stream = listener.accept().await?;
        let agent = Arc::clone(&agent);
        let state = Arc::clone(&agent.state);
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(64 << 10)
            .max_send_buf_size(256 << 10)
            .max_concurrent_streams(1024)
            .max_header_list_size(64 << 10)
            .serve_connection(
                TokioIo::new(stream),
                service_fn(move |request| {
                    let agent = Arc::clone(&agent);
                    async move { Ok::<_, Infallible>(agent.answer(request).await) }
                }),
            );
        let broke_off = tokio::select! {
            _ = connection => true,
            // The machine was restored: the host that spoke here is another machine's.
            () = state.hang_up.notified() => false,
            another = listener.watch() => {
                another?;
                false
            }
        };
        if broke_off {
            listener.end().await?;
        }
    }
}

impl Agent {
    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path();
        if path == "/health" {
            return empty(StatusCode::NO_CONTENT);
        }
        if !self.state.admits(request.headers()) {
            // A signed URL carries its own permission; a token that is wrong is not helped by one.
            if path != "/files" || request.headers().contains_key("x-access-token") {
                return unauthorized(path);
            }
            if let Err(reply) = files::admits(&self.state, &request) {
                return *reply;
            }
        }
        match (request.method(), path) {
            (&Method::CONNECT, _) => tunnel::open(request).await,
            (&Method::GET, "/metrics") => match metrics::read(&self.meter) {
                Ok(metrics) => json(StatusCode::OK, &metrics),
                Err(problem) => error(StatusCode::INTERNAL_SERVER_ERROR, &problem.to_string()),
            },
            (&Method::GET, "/envs") => json(StatusCode::OK, &self.state.settings().environment()),
            (&Method::POST, "/init") => self.init(request).await,
            (&Method::GET, "/files") => files::download(&self.state, &request).await,
            (&Method::POST, "/files") => files::upload(&self.state, request).await,
            (&Method::POST, "/files/compose") => files::compose(&self.state, request).await,
            // Internal, as `/init`: a builder's.
            (&Method::POST, image::UNPACK) => files::unpack(request).await,
            (_, "/metrics" | "/envs" | "/init" | "/files" | "/files/compose" | image::UNPACK) => {
                error(StatusCode::METHOD_NOT_ALLOWED, "the method is not allowed here")
            }
            _ => {
                let mut rpc = self.rpc.clone();
                match rpc.call(request).await {
                    Ok(reply) => reply.map(|body| body.map_err(io::Error::other).boxed_unsync()),
                    Err(never) => match never {},
                }
            }
        }
    }

    /// `POST /init`. Internal: the gateway does not let it through. Fields that belong to other parts of
    /// E2B's host are refused, not ignored.
    async fn init(&self, request: Request<Incoming>) -> Response<Body> {
        let body = match Limited::new(request.into_body(), MAX_JSON).collect().await {
            Ok(body) => body.to_bytes(),
            Err(problem) => return error(StatusCode::BAD_REQUEST, &problem.to_string()),
        };
        let init: Init = match serde_json::from_slice(if body.is_empty() { b"{}" } else { &body }) {
            Ok(init) => init,
            Err(problem) => return error(StatusCode::BAD_REQUEST, &problem.to_string()),
        };
        if let Some(text) = &init.timestamp
            && let Err(problem) = set_clock(text)
        {
            return error(StatusCode::BAD_REQUEST, &format!("timestamp: {problem}"));
        }
        let mut settings = self.state.settings();
        if let Some(env_vars) = init.env_vars {
            settings.env_vars.extend(env_vars);
        }
        if let Some(token) = init.access_token {
            settings.access_token = token;
        }
        settings.default_user = init.default_user.or(settings.default_user.take());
        settings.default_workdir = init.default_workdir.or(settings.default_workdir.take());
        empty(StatusCode::NO_CONTENT)
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Init {
    env_vars: Option<EnvVars>,
    access_token: Option<String>,
    timestamp: Option<String>,
    default_user: Option<String>,
    default_workdir: Option<String>,
}

fn set_clock(text: &str) -> Result<(), String> {
    use rustix::time::{ClockId, Timespec, clock_settime};
    let time: SystemTime = text.parse::<jiff::Timestamp>().map_err(|error| error.to_string())?.into();
    let since = time.duration_since(SystemTime::UNIX_EPOCH).map_err(|error| error.to_string())?;
    let seconds = i64::try_from(since.as_secs()).map_err(|error| error.to_string())?;
    clock_settime(ClockId::Realtime, Timespec { tv_sec: seconds, tv_nsec: i64::from(since.subsec_nanos()) })
        .map_err(|error| error.to_string())
}

fn unauthorized(path: &str) -> Response<Body> {
    let text = "the access token is missing or wrong";
    // Services have a package, and so a dot; envd's plain endpoints have none.
    if path.contains('.') {
        return json(
            StatusCode::UNAUTHORIZED,
            &serde_json::json!({ "code": "unauthenticated", "message": text }),
        );
    }
    error(StatusCode::UNAUTHORIZED, text)
}
