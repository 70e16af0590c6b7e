//! `kelvin`: the server and its command line.
//!
//! Exit codes of `run` and `sandbox exec`, as in docker's and timeout's documentation: that of the command; 124 when its
//! deadline passed, 125 when Kelvin could not run it (no server, a wrong key, no such sandbox), 126 when it cannot be
//! executed, 127 when there is no such command, 128 + n when signal n ended it or this program. Of everything else: 0, 1
//! for a failure, 2 for wrong usage.

mod args;
mod build;
mod config;
mod copy;
mod doctor;
mod exec;
mod key;
mod lock;
mod network;
mod notify;
mod output;
mod sandbox;
mod serve;
mod setup;
mod snapshot;
mod template;
mod versions;
mod vmm;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{BenchCommand, Cli, Command, PoolCommand};
use kelvin_api::sandbox::SetPool;
use output::Failed;

async fn dispatch(cli: Cli) -> Result<ExitCode, Failed> {
    let Cli { connection, output, command } = cli;
    let client = || config::client(&connection);
    match command {
        Command::Serve(args) => serve::run(*args).await.map(|()| ExitCode::SUCCESS),
        Command::Run(args) => exec::run(&client()?, args).await,
        Command::Sandbox { command } => sandbox::dispatch(&client()?, output, command).await,
        Command::Snapshot { command } => snapshot::dispatch(&client()?, output, command).await,
        Command::Pool { command: PoolCommand::List } => {
            output::print(output, &client()?.pools().await?, output::pool_table);
            Ok(ExitCode::SUCCESS)
        }
        Command::Pool { command: PoolCommand::Set { template, min, max, max_age } } => {
            client()?.set_pool(&template, &SetPool { min, max, max_age_s: max_age }).await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Key { command } => key::dispatch(&client()?, output, command).await,
        Command::Project { command } => key::project(&client()?, output, command).await,
        Command::Events { sandbox, after, limit } => {
            sandbox::events(&client()?, output, after, sandbox.as_deref(), limit).await
        }
        Command::Audit { limit } => {
            output::print(output, &client()?.audit(limit).await?, key::audit_table);
            Ok(ExitCode::SUCCESS)
        }
        Command::Template { command } => template::dispatch(&connection, output, command).await,
        Command::Node => {
            output::print(output, &client()?.node().await?, output::node_table);
            Ok(ExitCode::SUCCESS)
        }
        Command::Gc { dry_run } => {
            output::print(output, &client()?.collect(dry_run).await?, output::garbage_table);
            Ok(ExitCode::SUCCESS)
        }
        Command::Doctor(args) => doctor::run(&connection, output, &args).await,
        Command::Setup(args) => setup::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Bench { command: BenchCommand::Build(args) } => {
            build::measured::bench(&client()?, output, &args).await
        }
        Command::Bench { command: BenchCommand::Create(args) } => {
            let report =
                kelvin_bench::create::run(&client()?, &args).await.map_err(|error| Failed::other(&error))?;
            output::print(output, &report, |report| report.table());
            Ok(ExitCode::SUCCESS)
        }
        Command::Bench { command: BenchCommand::Fork(args) } => {
            let report =
                kelvin_bench::fork::run(&client()?, &args).await.map_err(|error| Failed::other(&error))?;
            output::print(output, &report, |report| report.table());
            Ok(ExitCode::SUCCESS)
        }
        Command::Bench { command: BenchCommand::Pause(args) } => {
            let report =
                kelvin_bench::pause::run(&client()?, &args).await.map_err(|error| Failed::other(&error))?;
            output::print(output, &report, |report| report.table());
            Ok(ExitCode::SUCCESS)
        }
        Command::Bench { command: BenchCommand::Pool(args) } => {
            let report =
                kelvin_bench::load::run(&client()?, &args).await.map_err(|error| Failed::other(&error))?;
            output::print(output, &report, |report| report.table());
            Ok(ExitCode::SUCCESS)
        }
        Command::Bench { command: BenchCommand::Sdk(args) } => {
            let report =
                kelvin_bench::sdk::run(&client()?, &args).await.map_err(|error| Failed::other(&error))?;
            output::print(output, &report, |report| report.table());
            Ok(ExitCode::SUCCESS)
        }
        Command::Bench { command: BenchCommand::Slots(args) } => {
            kelvin_host::descriptors::raise().map_err(|error| Failed::other(&error))?;
            let report = kelvin_bench::slots::run(args).await.map_err(|error| Failed::other(&error))?;
            output::print(output, &report, |report| report.table());
            Ok(ExitCode::SUCCESS)
        }
        // Handled before there is a runtime.
        Command::Egress { .. } | Command::Jail => Ok(ExitCode::FAILURE),
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "kelvin", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::Man { directory } => clap_mangen::generate_to(Cli::command(), &directory)
            .map(|()| ExitCode::SUCCESS)
            .map_err(|error| {
                Failed::new(
                    format!("writing manual pages to {}: {error}", directory.display()),
                    "name a directory that is there and can be written",
                )
            }),
    }
}

/// `kelvin egress`: serves until it is killed.
fn egress(options: &str) -> ExitCode {
    serve::start_log();
    let run = || -> std::io::Result<()> { kelvin_egress::run(serde_json::from_str(options)?) };
    if let Err(error) = run() {
        tracing::error!(%error, "egress");
    }
    ExitCode::FAILURE
}

/// `kelvin jail`: becomes the parent of a VMM, for as long as its caller needs.
fn jail() -> ExitCode {
    match kelvin_host::jail::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kelvin: {error}");
            ExitCode::FAILURE
        }
    }
}

fn main() -> ExitCode {
    // Before anything else is set up: each start of a VMM waits for it.
    if std::env::args_os().skip(1).eq(["jail"]) {
        return jail();
    }
    // A reader that goes away (`kelvin ... | head`) ends this program like any other.
    let cli = Cli::parse();
    if let Command::Egress { options, .. } = &cli.command {
        return egress(options);
    }
    // A client waits for one server: one thread does it, without waking up others for each step.
    let mut builder = match &cli.command {
        Command::Serve(_) => tokio::runtime::Builder::new_multi_thread(),
        _ => tokio::runtime::Builder::new_current_thread(),
    };
    let runtime = match builder.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("kelvin: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(dispatch(cli));
    // A read of standard input cannot be cancelled: do not wait for it.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(failed) => {
            failed.print();
            failed.code()
        }
    }
}
