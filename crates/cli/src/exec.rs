//! Running commands: `kelvin run` and `kelvin sandbox exec`.

use std::process::ExitCode;
use std::time::Duration;

use kelvin_api::boot::BootStages;
use kelvin_api::phase::Phase;
use kelvin_api::sandbox::NewSandbox;
use kelvin_client::agent::{Agent, Command, Process, Told};
use kelvin_client::{Client, Error};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::args::{MachineArgs, ProcessArgs, RunArgs};
use crate::output::{Failed, boot_stages, waterfall};

/// A command was ended at its deadline. Source: timeout(1).
const DEADLINE: u8 = 124;
/// What a sandbox of `kelvin run` may live longer than its command: if this program dies, the server ends
/// it.
const MARGIN_S: u64 = 60;
/// How much longer than the deadline the agent may take to tell the end of a command.
const LATE: Duration = Duration::from_secs(5);

/// The agent of the sandbox `id`.
pub async fn agent(client: &Client, id: &str, user: Option<String>) -> Result<Agent, Error> {
    let detail = client.sandbox(id).await?;
    client.agent(&detail.sandbox_id, detail.envd_access_token, user)
}

/// The body of a create.
pub fn new_sandbox(machine: &MachineArgs, timeout: u64) -> NewSandbox {
    NewSandbox {
        template_id: machine.template.clone(),
        timeout: Some(timeout),
        cpu_count: machine.cpus,
        memory_mb: machine.memory_mib,
        start_path: machine.path.map(Into::into),
        network: crate::network::of(machine),
        allow_internet_access: machine.egress.no_internet.then_some(false),
        ..NewSandbox::default()
    }
}

/// A command as the agent takes it.
pub fn command(process: &ProcessArgs, words: &[String], deadline: Option<Duration>) -> Command {
    Command {
        program: words.first().cloned().unwrap_or_default(),
        args: words.get(1..).unwrap_or_default().to_vec(),
        env: process.env.iter().cloned().collect(),
        cwd: process.cwd.clone(),
        stdin: process.interactive,
        deadline,
    }
}

/// `kelvin run`.
pub async fn run(client: &Client, args: RunArgs) -> Result<ExitCode, Failed> {
    let created = client.create(&new_sandbox(&args.machine, args.timeout + MARGIN_S), None).await;
    let sandbox = created.map_err(not_run)?.sandbox;
    if args.timing {
        waterfall(sandbox.start_reason.as_deref().unwrap_or_default(), &sandbox.phases);
    }
    let agent = client
        .agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), args.process.user.clone())
        .map_err(not_run)?;
    let deadline = Duration::from_secs(args.timeout);
    let command = command(&args.process, &args.command, Some(deadline));
    let result = async {
        if args.timing
            && sandbox.phases.contains_key(&Phase::Boot)
            && let Ok(Ok(logs)) = tokio::time::timeout(LATE, client.logs(sandbox.sandbox_id.as_str())).await
        {
            boot_stages(BootStages::find(logs.log_entries.iter().map(|entry| entry.message.as_str())));
        }
        let process = agent.start(&command).await.map_err(not_started)?;
        follow(&agent, process, args.process.interactive, Some(deadline), OnLeaving::End).await
    };
    let result = tokio::select! {
        result = result => result,
        // The sandbox is ended with whatever runs in it.
        signal = told_to_end() => Ok(ended_by(signal)),
    };
    let killed = client.kill(&sandbox.sandbox_id).await;
    let code = result?;
    killed.map_err(not_run)?;
    Ok(code)
}

/// Kelvin could not run the command. Source: docker-run(1), "Exit Status".
const NOT_RUN: u8 = 125;
/// The command cannot be executed.
const NOT_EXECUTABLE: u8 = 126;
/// There is no such command.
const NO_COMMAND: u8 = 127;

/// Something failed before there was a command.
pub fn not_run(error: Error) -> Failed {
    Failed::from(error).with_code(NOT_RUN)
}

/// The command was not started, or its time was over.
pub fn not_started(error: Error) -> Failed {
    use kelvin_client::agent::ErrorCode;
    let code = match &error {
        Error::Agent(inner) if inner.code == ErrorCode::NotFound => NO_COMMAND,
        Error::Agent(inner) if inner.code == ErrorCode::PermissionDenied => NOT_EXECUTABLE,
        Error::Agent(inner) if inner.code == ErrorCode::DeadlineExceeded => DEADLINE,
        _ => NOT_RUN,
    };
    Failed::from(error).with_code(code)
}

fn ended_by(signal: i32) -> ExitCode {
    ExitCode::from(u8::try_from(128 + signal).unwrap_or(u8::MAX))
}

/// Waits until this program is told to end; by which signal. Signals that it was started to ignore (`nohup`, a job of a
/// script in the background) stay ignored.
pub async fn told_to_end() -> i32 {
    use tokio::signal::unix::{SignalKind, signal};
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")?.trim().get(8..));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask, 16).ok()).unwrap_or(0);
    let wait = |kind: SignalKind| async move {
        let number = kind.as_raw_value();
        // To listen to a signal is to stop ignoring it.
        let listened = if ignored & (1 << (number - 1)) == 0 { signal(kind).ok() } else { None };
        match listened {
            Some(mut signal) => {
                signal.recv().await;
            }
            None => std::future::pending().await,
        }
        number
    };
    tokio::select! {
        signal = wait(SignalKind::interrupt()) => signal,
        signal = wait(SignalKind::terminate()) => signal,
        signal = wait(SignalKind::hangup()) => signal,
    }
}

/// What becomes of a process when this program is told to end, or nobody reads its output any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnLeaving {
    /// It is ended: SIGTERM, then SIGKILL.
    End,
    /// It goes on: it was there before.
    Leave,
}

/// How long a process may take to obey SIGTERM, and SIGKILL, when this program ends.
const GRACE: Duration = Duration::from_secs(2);
/// A reader has gone away. Source: 128 + SIGPIPE.
const CLOSED: i32 = 13;

/// Copies what a process tells to our own output, and our input to it, until it ends.
pub async fn follow(
    agent: &Agent,
    mut process: Process,
    interactive: bool,
    deadline: Option<Duration>,
    on_leaving: OnLeaving,
) -> Result<ExitCode, Failed> {
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    let mut feeder = None;
    let late = async {
        match deadline {
            Some(deadline) => tokio::time::sleep(deadline + LATE).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(late);
    let (ending, unread) = (told_to_end(), kelvin_host::process::nobody_reads_stdout());
    tokio::pin!(ending, unread);
    let mut pid = None;
    let code = loop {
        let told = tokio::select! {
            told = process.next() => told.or_else(|error| match &error {
                Error::Agent(inner) if inner.code == kelvin_client::agent::DEADLINE_EXCEEDED => Ok(None),
                // The stream begins with it, or with why it was not started.
                _ if pid.is_none() && on_leaving == OnLeaving::End => Err(not_started(error)),
                _ => Err(not_run(error)),
            }),
            () = &mut late => Ok(None),
            signal = &mut ending => break leave(agent, process, pid, on_leaving, signal).await,
            () = &mut unread => break leave(agent, process, pid, on_leaving, CLOSED).await,
        };
        let (bytes, to_stdout) = match told? {
            Some(Told::Started { pid: started }) => {
                pid = Some(started);
                if interactive {
                    feeder = Some(tokio::spawn(feed(agent.clone(), started)));
                }
                continue;
            }
            Some(Told::Stdout(bytes)) => (bytes, true),
            Some(Told::Stderr(bytes)) => (bytes, false),
            Some(Told::Ended { exit_code, status }) => break exit_code_of(exit_code, &status),
            None if deadline.is_some() => break ExitCode::from(DEADLINE),
            None => {
                let error = Error::Reply("the stream ended before the command".into());
                return Err(not_run(error));
            }
        };
        // Flushed each time: a command's output is followed by people.
        let writing = async {
            if to_stdout {
                stdout.write_all(&bytes).await?;
                stdout.flush().await
            } else {
                stderr.write_all(&bytes).await?;
                stderr.flush().await
            }
        };
        // A reader that does not read must not keep signals and deadlines off.
        let written = tokio::select! {
            written = writing => written,
            () = &mut late => break ExitCode::from(DEADLINE),
            signal = &mut ending => break leave(agent, process, pid, on_leaving, signal).await,
            () = &mut unread => break leave(agent, process, pid, on_leaving, CLOSED).await,
        };
        match written {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                break leave(agent, process, pid, on_leaving, CLOSED).await;
            }
            Err(source) => {
                leave(agent, process, pid, on_leaving, CLOSED).await;
                return Err(not_run(Error::Local { what: "writing the output".to_owned(), source }));
            }
        }
    };
    if let Some(feeder) = feeder {
        feeder.abort();
    }
    Ok(code)
}

/// Ends the process, or leaves it, because this program was told `signal`.
async fn leave(
    agent: &Agent,
    mut process: Process,
    pid: Option<u32>,
    on_leaving: OnLeaving,
    signal: i32,
) -> ExitCode {
    if let (OnLeaving::End, Some(pid)) = (on_leaving, pid) {
        for kill in [false, true] {
            let ended = async {
                let _ = agent.signal(pid, kill).await;
                while !matches!(process.next().await, Ok(None | Some(Told::Ended { .. })) | Err(_)) {}
            };
            if tokio::time::timeout(GRACE, ended).await.is_ok() {
                break;
            }
        }
    }
    ended_by(signal)
}

fn exit_code_of(exit_code: i32, status: &str) -> ExitCode {
    let signal = kelvin_api::signal::of_status(status).and_then(|number| u8::try_from(number).ok());
    match (signal, u8::try_from(exit_code)) {
        (Some(signal), _) => ExitCode::from(signal.saturating_add(128)),
        (None, Ok(code)) => ExitCode::from(code),
        (None, Err(_)) => ExitCode::FAILURE,
    }
}

async fn feed(agent: Agent, pid: u32) {
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; 32 << 10];
    loop {
        match stdin.read(&mut buffer).await {
            Ok(0) | Err(_) => {
                let _ = agent.end_input(pid).await;
                return;
            }
            Ok(count) => {
                // The process may have ended or closed its input: then nobody wants the rest.
                if agent.feed(pid, buffer[..count].to_vec()).await.is_err() {
                    return;
                }
            }
        }
    }
}
