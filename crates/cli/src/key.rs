//! `kelvin key …` and `kelvin audit`.

use std::process::ExitCode;

use comfy_table::Table;
use kelvin_api::account::{ApiKeyInfo, AuditEntry, NewApiKey};
use kelvin_client::Client;

use crate::args::{KeyCommand, Output};
use crate::output::{Failed, ago, line, print, table};

/// Runs one of the commands.
pub async fn dispatch(client: &Client, output: Output, command: KeyCommand) -> Result<ExitCode, Failed> {
    match command {
        KeyCommand::Create { name, project, max_sandboxes, requests_per_second } => {
            let project = project
                .parse()
                .map_err(|error: &str| Failed::new(error.to_owned(), "for example --project team-1"))?;
            let wanted = NewApiKey { name, project, max_sandboxes, requests_per_second };
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
