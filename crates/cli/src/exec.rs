//! Running commands: `kelvin run` and `kelvin sandbox exec`.

use std::process::ExitCode;
use std::time::Duration;

use kelvin_api::sandbox::NewSandbox;
use kelvin_client::agent::{Agent, Command, Process, Told};
use kelvin_client::{Client, Error};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::args::{MachineArgs, ProcessArgs, RunArgs};
use crate::output::{Failed, waterfall};

/// A command was ended at its deadline. Source: timeout(1).
const DEADLINE: u8 = 124;
/// Interrupted from the keyboard. Source: 128 + SIGINT.
const INTERRUPTED: u8 = 130;
/// What a sandbox of `kelvin run` may live longer than its command: if this program dies, the server ends
/// it.
const MARGIN_S: u64 = 60;
/// How much longer than the deadline the agent may take to tell the end of a command.
const LATE: Duration = Duration::from_secs(5);

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
    let created = client.create(&new_sandbox(&args.machine, args.timeout + MARGIN_S), None).await?;
    let sandbox = created.sandbox;
    if args.timing {
        waterfall(sandbox.start_reason.as_deref().unwrap_or_default(), &sandbox.phases);
    }
    let agent =
        client.agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), args.process.user.clone())?;
    let deadline = Duration::from_secs(args.timeout);
    let command = command(&args.process, &args.command, Some(deadline));
    let result = tokio::select! {
        result = async {
            let process = agent.start(&command).await?;
            follow(&agent, process, args.process.interactive, Some(deadline)).await
        } => result,
        _ = tokio::signal::ctrl_c() => Ok(ExitCode::from(INTERRUPTED)),
    };
    let killed = client.kill(&sandbox.sandbox_id).await;
    let code = result.or_else(deadline_code)?;
    killed?;
    Ok(code)
}

/// A deadline that passed is an exit code, not a failure.
pub fn deadline_code(error: Error) -> Result<ExitCode, Error> {
    match &error {
        Error::Agent(inner) if inner.code == kelvin_client::agent::DEADLINE_EXCEEDED => {
            Ok(ExitCode::from(DEADLINE))
        }
        _ => Err(error),
    }
}

/// Copies what a process tells to our own output, and our input to it, until it ends.
pub async fn follow(
    agent: &Agent,
    mut process: Process,
    interactive: bool,
    deadline: Option<Duration>,
) -> Result<ExitCode, Error> {
    let local = |source| Error::Local { what: "writing the output".to_owned(), source };
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    let mut feeder = None;
    let late = async {
        match deadline {
            Some(deadline) => tokio::time::sleep(deadline + LATE).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(late);
    let code = loop {
        let told = tokio::select! {
            told = process.next() => told?,
            () = &mut late => break ExitCode::from(DEADLINE),
        };
        match told {
            Some(Told::Started { pid }) if interactive => {
                feeder = Some(tokio::spawn(feed(agent.clone(), pid)))
            }
            Some(Told::Started { .. }) => {}
            // Flushed each time: a command's output is followed by people.
            Some(Told::Stdout(bytes)) => {
                stdout.write_all(&bytes).await.map_err(local)?;
                stdout.flush().await.map_err(local)?;
            }
            Some(Told::Stderr(bytes)) => {
                stderr.write_all(&bytes).await.map_err(local)?;
                stderr.flush().await.map_err(local)?;
            }
            Some(Told::Ended { exit_code, status }) => break exit_code_of(exit_code, &status),
            None => return Err(Error::Reply("the stream ended before the command".into())),
        }
    };
    if let Some(feeder) = feeder {
        feeder.abort();
    }
    Ok(code)
}

fn exit_code_of(exit_code: i32, status: &str) -> ExitCode {
    let signal = status.strip_prefix("signal: ").and_then(|number| number.parse::<u8>().ok());
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
