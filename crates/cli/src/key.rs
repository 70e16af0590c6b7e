//! `kelvin key …`, `kelvin project …` and `kelvin audit`.

use std::process::ExitCode;

use comfy_table::Table;
use kelvin_api::account::{ApiKeyInfo, AuditEntry, Limits, NewApiKey, Project, ProjectInfo};
use kelvin_client::Client;

use crate::args::{KeyCommand, Output, ProjectCommand};
use crate::output::{Failed, ago, line, print, table};

/// Runs one of the commands.
pub async fn dispatch(client: &Client, output: Output, command: KeyCommand) -> Result<ExitCode, Failed> {
    match command {
        KeyCommand::Create { name, project, max_sandboxes, limits, requests_per_second } => {
            let wanted = NewApiKey {
                name,
                project: parse_project(&project)?,
                max_sandboxes,
                requests_per_second,
                max_creating: limits.max_creating,
                max_paused: limits.max_paused,
                max_snapshots: limits.max_snapshots,
                max_disk_mib: limits.max_disk_mib,
            };
            let made = client.create_key(&wanted).await?;
            match output {
                Output::Json => print(output, &made, |_| table(&[])),
                Output::Table => {
                    line(&made.key);
                    eprintln!(
                        "key {} of project {}; it is not shown again. Use it: export KELVIN_API_KEY=…",
                        made.info.id, made.info.project
                    );
                }
            }
        }
        KeyCommand::List => print(output, &client.keys().await?, key_table),
        KeyCommand::Revoke { id } => client.revoke_key(&id).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs one of the commands of `kelvin project`.
pub async fn project(client: &Client, output: Output, command: ProjectCommand) -> Result<ExitCode, Failed> {
    match command {
        ProjectCommand::List => print(output, &client.projects().await?, project_table),
        ProjectCommand::Limit { name, max_sandboxes, limits } => {
            let wanted = Limits {
                max_sandboxes,
                max_creating: limits.max_creating,
                max_paused: limits.max_paused,
                max_snapshots: limits.max_snapshots,
                max_disk_mib: limits.max_disk_mib,
            };
            let set = client.limit_project(&parse_project(&name)?, &wanted).await?;
            print(output, &vec![set], project_table);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn parse_project(text: &str) -> Result<Project, Failed> {
    text.parse().map_err(|error: &str| Failed::new(error.to_owned(), "for example team-1"))
}

fn project_table(projects: &Vec<ProjectInfo>) -> Table {
    let mut table = table(&["project", "sandboxes", "being made", "paused", "snapshots", "MiB of disk"]);
    for ProjectInfo { name, limits, used } in projects {
        let of = |used: u64, limit: Option<u64>| match limit {
            Some(limit) => format!("{used} of {limit}"),
            None => used.to_string(),
        };
        let small = |used: u32, limit: Option<u32>| of(used.into(), limit.map(u64::from));
        table.add_row([
            name.to_string(),
            small(used.sandboxes, limits.max_sandboxes),
            small(used.creating, limits.max_creating),
            small(used.paused, limits.max_paused),
            small(used.snapshots, limits.max_snapshots),
            of(used.disk_mib, limits.max_disk_mib),
        ]);
    }
    table
}

fn limit(value: Option<u32>) -> String {
    value.map_or_else(|| "none".to_owned(), |value| value.to_string())
}

fn key_table(keys: &Vec<ApiKeyInfo>) -> Table {
    let mut table = table(&["id", "name", "project", "key", "sandboxes", "requests/s", "made", "used"]);
    for key in keys {
        let mask = &key.mask;
        table.add_row([
            key.id.clone(),
            key.name.clone(),
            key.project.to_string(),
            format!("{}{}…{}", mask.prefix, mask.masked_value_prefix, mask.masked_value_suffix),
            limit(key.max_sandboxes),
            limit(key.requests_per_second),
            ago(key.created_at),
            key.last_used.map_or_else(|| "never".to_owned(), ago),
        ]);
    }
    table
}

/// The audit log.
pub fn audit_table(entries: &Vec<AuditEntry>) -> Table {
    let mut table = table(&["when", "project", "key", "action", "about", "status"]);
    for entry in entries {
        table.add_row([
            entry.at.to_string(),
            entry.project.clone(),
            entry.key_id.clone(),
            entry.action.clone(),
            entry.target.clone(),
            entry.status.to_string(),
        ]);
    }
    table
}
