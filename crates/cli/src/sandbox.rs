//! `kelvin sandbox …`.

use std::process::ExitCode;
use std::time::Duration;

use kelvin_api::envd::process::ProcessInfo;
use kelvin_api::event::{Event, Happened};
use kelvin_api::id::SandboxId;
use kelvin_api::sandbox::{AutoResume, ForkSandbox, SandboxState};
use kelvin_client::agent::Told;
use kelvin_client::{Client, Error};
use serde::Serialize;

use crate::args::{Output, SandboxCommand};
use crate::exec::{OnLeaving, agent, command, follow, new_sandbox, not_run, not_started};
use crate::output::{Failed, detail_table, line, print, sandbox_table, table};
use crate::{copy, network, snapshot};

fn parse(id: &str) -> Result<SandboxId, Failed> {
    id.parse().map_err(|error: kelvin_api::id::ParseIdError| {
        Failed::new(error.to_string(), "`kelvin sandbox list` shows the ids")
    })
}

/// Runs one of the commands.
pub async fn dispatch(client: &Client, output: Output, command: SandboxCommand) -> Result<ExitCode, Failed> {
    match command {
        SandboxCommand::Create { machine, timeout, lifecycle, metadata, env, idempotency_key } => {
            let mut body = new_sandbox(&machine, timeout);
            body.auto_pause = lifecycle.auto_pause.then_some(true);
            body.auto_resume = lifecycle.auto_resume.then_some(AutoResume { enabled: true });
            body.metadata = Some(metadata.into_iter().collect())
                .filter(|map: &std::collections::BTreeMap<_, _>| !map.is_empty());
            body.env_vars = Some(env.into_iter().collect())
                .filter(|map: &std::collections::BTreeMap<_, _>| !map.is_empty());
            let created = client.create(&body, idempotency_key.as_deref()).await?;
            match output {
                Output::Json => print(output, &created.sandbox, |_| table(&[])),
                // Only the id: `id=$(kelvin sandbox create)`.
                Output::Table => line(created.sandbox.sandbox_id.as_str()),
            }
        }
        SandboxCommand::List { metadata, project } => {
            let found = of_project(client, project.as_deref()).list_all(&metadata).await?;
            print(output, &found, sandbox_table);
        }
        SandboxCommand::Info { id } => {
            let mut detail = client.sandbox(&id).await?;
            // For programs that speak to the agent, not for the screen.
            detail.envd_access_token = detail.envd_access_token.filter(|_| output == Output::Json);
            detail.traffic_access_token = detail.traffic_access_token.filter(|_| output == Output::Json);
            print(output, &detail, detail_table);
        }
        SandboxCommand::Exec { id, process, timeout, detach, attach, command: words } => {
            return exec(client, &id, &process, timeout, detach, attach, &words).await;
        }
        SandboxCommand::Ps { id } => {
            let rows: Vec<Ps> =
                agent(client, &id, None).await?.processes().await?.into_iter().map(Ps::from).collect();
            print(output, &rows, ps_table);
        }
        SandboxCommand::Kill { ids, all, running, project } => {
            return kill(&of_project(client, project.as_deref()), ids, all, running).await;
        }
        SandboxCommand::Pause { ids, disk_only } => {
            return Ok(snapshot::pause(client, &ids, disk_only).await);
        }
        SandboxCommand::Resume { ids, timeout } => return Ok(snapshot::resume(client, &ids, timeout).await),
        SandboxCommand::Fork { id, count, timeout, metadata, env } => {
            let filled = |pairs: Vec<(String, String)>| {
                Some(pairs.into_iter().collect())
                    .filter(|map: &std::collections::BTreeMap<_, _>| !map.is_empty())
            };
            let body = ForkSandbox {
                timeout: Some(timeout),
                count: Some(count),
                metadata: filled(metadata),
                env_vars: filled(env),
            };
            return snapshot::fork(client, output, &id, &body).await;
        }
        SandboxCommand::Tree => snapshot::tree(client, output).await?,
        SandboxCommand::Promote { id } => {
            client.promote(&id).await?.iter().for_each(|ended| line(ended));
        }
        SandboxCommand::Snapshot { id, name } => {
            snapshot::take(client, output, &id, name.as_deref()).await?;
        }
        SandboxCommand::Timeout { id, seconds } => client.set_timeout(&parse(&id)?, seconds).await?,
        SandboxCommand::Network { id, egress, open } => {
            network::show_or_set(client, output, &id, egress, open).await?;
        }
        SandboxCommand::Forward { id, ports, listen } => {
            network::forward(client, &id, &ports, listen).await?;
        }
        SandboxCommand::Proxy { id, port } => network::proxy(client, &id, port).await?,
        SandboxCommand::Logs { id } => {
            let logs = client.logs(&id).await?;
            match output {
                Output::Json => print(output, &logs, |_| table(&[])),
                Output::Table => logs.log_entries.iter().for_each(|entry| line(&entry.message)),
            }
        }
        SandboxCommand::Cp { source, target, user } => copy::run(client, &source, &target, user).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn exec(
    client: &Client,
    id: &str,
    process: &crate::args::ProcessArgs,
    timeout: Option<u64>,
    detach: bool,
    attach: Option<u32>,
    words: &[String],
) -> Result<ExitCode, Failed> {
    let agent = agent(client, id, process.user.clone()).await.map_err(not_run)?;
    let deadline = timeout.map(Duration::from_secs);
    let (mut started, on_leaving) = match attach {
        // It was there before, and can be attached to again.
        Some(pid) => (agent.attach(pid).await.map_err(not_run)?, OnLeaving::Leave),
        None => {
            let started = agent.start(&command(process, words, deadline)).await.map_err(not_started)?;
            (started, OnLeaving::End)
        }
    };
    if detach {
        if let Some(Told::Started { pid }) = started.next().await.map_err(not_started)? {
            line(&pid.to_string());
        }
        return Ok(ExitCode::SUCCESS);
    }
    follow(&agent, started, process.interactive, deadline, on_leaving).await
}

fn of_project(client: &Client, project: Option<&str>) -> Client {
    project.map_or_else(|| client.clone(), |project| client.of_project(project))
}

async fn kill(client: &Client, ids: Vec<String>, all: bool, only_running: bool) -> Result<ExitCode, Failed> {
    let ids = if all {
        let found = client.list_all(&[]).await?.into_iter();
        let meant = found.filter(|sandbox| !only_running || sandbox.state == SandboxState::Running);
        meant.map(|sandbox| sandbox.sandbox_id).collect()
    } else {
        ids.iter().map(|id| parse(id)).collect::<Result<Vec<_>, _>>()?
    };
    let mut code = ExitCode::SUCCESS;
    for id in ids {
        match client.kill(&id).await {
            Ok(()) => line(id.as_str()),
            // Ended by itself between the list and here.
            Err(Error::Refused(refused)) if all && refused.code == 404 => {}
            Err(error) => {
                Failed::from(error).print();
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

#[derive(Debug, Serialize)]
struct Ps {
    pid: u32,
    command: String,
    cwd: Option<String>,
    tag: Option<String>,
}

impl From<ProcessInfo> for Ps {
    fn from(info: ProcessInfo) -> Self {
        let config = info.config.into_option().unwrap_or_default();
        let words: Vec<String> = std::iter::once(config.cmd).chain(config.args).collect();
        Self { pid: info.pid, command: words.join(" "), cwd: config.cwd, tag: info.tag }
    }
}

/// `kelvin events`.
pub async fn events(
    client: &Client,
    output: Output,
    after: i64,
    sandbox: Option<&str>,
    limit: usize,
) -> Result<ExitCode, Failed> {
    let found = client.events(after, sandbox, limit).await?;
    print(output, &found, event_table);
    if let Some(last) = found.last().filter(|_| found.len() == limit) {
        eprintln!("there may be more: --after {}", last.id);
    }
    Ok(ExitCode::SUCCESS)
}

fn event_table(events: &Vec<Event>) -> comfy_table::Table {
    let mut shown = table(&["number", "when", "project", "sandbox", "template", "what", "details"]);
    for event in events {
        let details = match &event.what {
            Happened::Created { start_path, parent: None } => start_path.name().to_owned(),
            Happened::Created { start_path, parent: Some(parent) } => {
                format!("{}, forked from {parent}", start_path.name())
            }
            Happened::DeadlineSet { end_at } => end_at.to_string(),
            Happened::Ended { reason } => reason.clone(),
            Happened::Paused | Happened::Resumed | Happened::NetworkSet => String::new(),
        };
        shown.add_row([
            event.id.to_string(),
            event.at.to_string(),
            event.project.to_string(),
            event.sandbox.to_string(),
            event.template.clone(),
            event.what.kind().to_owned(),
            details,
        ]);
    }
    shown
}

fn ps_table(rows: &Vec<Ps>) -> comfy_table::Table {
    let mut table = table(&["pid", "command"]);
    for row in rows {
        table.add_row([row.pid.to_string(), row.command.clone()]);
    }
    table
}
