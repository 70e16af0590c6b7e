//! `kelvin snapshot …`, and the commands of `kelvin sandbox` that freeze, thaw and copy.

use std::collections::BTreeMap;
use std::process::ExitCode;

use kelvin_api::id::SandboxId;
use kelvin_api::sandbox::{
    Capture, FileState, ForkResult, ForkSandbox, PauseSandbox, SandboxDetail, SnapshotInfo,
    SnapshotVerification,
};
use kelvin_client::Client;
use serde::Serialize;

use crate::args::{Output, SnapshotCommand};
use crate::output::{Failed, ago, line, print, state_name, table};

/// Runs one of the commands of `kelvin snapshot`.
pub async fn dispatch(client: &Client, output: Output, command: SnapshotCommand) -> Result<ExitCode, Failed> {
    match command {
        SnapshotCommand::List => print(output, &client.snapshots().await?, snapshot_table),
        SnapshotCommand::Verify { names, all } => return verify(client, output, names, all).await,
        SnapshotCommand::Delete { name, cascade } => client.delete_snapshot(&name, cascade).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// `kelvin snapshot verify`. One that cannot be verified does not keep the others from their turn.
async fn verify(
    client: &Client,
    output: Output,
    mut names: Vec<String>,
    all: bool,
) -> Result<ExitCode, Failed> {
    if all {
        names = client.snapshots().await?.into_iter().map(|snapshot| snapshot.snapshot_id).collect();
    }
    let (mut verified, mut code) = (Vec::new(), ExitCode::SUCCESS);
    for name in names {
        match client.verify_snapshot(&name).await {
            Ok(one) => verified.push(one),
            Err(error) => {
                Failed::from(error).print();
                code = ExitCode::FAILURE;
            }
        }
    }
    if verified.iter().any(|snapshot| !snapshot.intact) {
        code = ExitCode::FAILURE;
    }
    print(output, &verified, verification_table);
    Ok(code)
}

fn verification_table(verified: &Vec<SnapshotVerification>) -> comfy_table::Table {
    let mut table = table(&["id", "file", "size", "result", "detail"]);
    for snapshot in verified {
        for file in &snapshot.files {
            let result = match file.state {
                FileState::Intact => "intact",
                FileState::NotDigested => "not digested yet",
                FileState::Damaged => "damaged",
                FileState::Unreadable => "unreadable",
                FileState::Unsealed => "touched",
            };
            table.add_row([
                snapshot.snapshot_id.clone(),
                file.file.clone(),
                format!("{} MiB", file.bytes.div_ceil(1 << 20)),
                result.to_owned(),
                file.detail.clone().unwrap_or_default(),
            ]);
        }
    }
    table
}

fn snapshot_table(snapshots: &Vec<SnapshotInfo>) -> comfy_table::Table {
    let mut table = table(&["id", "name", "sandbox", "template", "memory", "parent", "taken", "unusable"]);
    for snapshot in snapshots {
        table.add_row([
            snapshot.snapshot_id.clone(),
            snapshot.names.join(","),
            snapshot.sandbox_id.to_string(),
            snapshot.template_id.clone(),
            format!("{} MiB", snapshot.memory_mb),
            snapshot.parent_id.clone().unwrap_or_default(),
            ago(snapshot.created_at),
            snapshot.unusable.clone().unwrap_or_default(),
        ]);
    }
    table
}

/// What a pause, a snapshot or a fork cost, for people.
fn said(capture: &Capture) {
    let pages = capture.dirty_pages.map(|pages| format!(", {pages} pages written")).unwrap_or_default();
    let frozen =
        if capture.quiesced { "" } else { ", its file system was not frozen: its agent did not answer" };
    eprintln!("stood still for {:.1} ms{pages}{frozen}", capture.paused_ms);
}

/// Runs `work` for each of `ids`; one that fails does not keep the others from their turn.
async fn each(ids: &[String], work: impl AsyncFn(&str) -> Result<(), Failed>) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for id in ids {
        match work(id).await {
            Ok(()) => line(id),
            Err(failed) => {
                failed.print();
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}

/// `kelvin sandbox pause`.
pub async fn pause(client: &Client, ids: &[String], disk_only: bool) -> ExitCode {
    let body = PauseSandbox { memory: disk_only.then_some(false), ..PauseSandbox::default() };
    each(ids, async |id| {
        said(&client.pause_as(id, &body).await?);
        Ok(())
    })
    .await
}

/// `kelvin sandbox resume`.
pub async fn resume(client: &Client, ids: &[String], timeout: u64) -> ExitCode {
    each(ids, async |id| {
        client.resume(id, timeout).await?;
        Ok(())
    })
    .await
}

/// `kelvin sandbox snapshot`.
pub async fn take(client: &Client, output: Output, id: &str, name: Option<&str>) -> Result<(), Failed> {
    let (info, capture) = client.snapshot(id, name).await?;
    said(&capture);
    match output {
        Output::Json => print(output, &info, |_| table(&[])),
        Output::Table => line(&info.snapshot_id),
    }
    Ok(())
}

#[derive(Serialize)]
struct Forked {
    capture: Capture,
    children: Vec<ForkResult>,
}

/// `kelvin sandbox fork`.
pub async fn fork(client: &Client, output: Output, id: &str, body: &ForkSandbox) -> Result<ExitCode, Failed> {
    let (children, capture) = client.fork(id, body).await?;
    said(&capture);
    let failed: Vec<_> = children.iter().filter_map(|child| child.error.clone()).collect();
    match output {
        Output::Json => print(output, &Forked { capture, children }, |_| table(&[])),
        Output::Table => {
            for child in children.iter().filter_map(|child| child.sandbox.as_ref()) {
                line(child.sandbox_id.as_str());
            }
        }
    }
    for error in &failed {
        Failed::from(kelvin_client::Error::Refused(error.clone())).print();
    }
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `kelvin sandbox tree`.
pub async fn tree(client: &Client, output: Output) -> Result<(), Failed> {
    let all = client.list_all(&[]).await?;
    if output == Output::Json {
        print(output, &all, |_| table(&[]));
        return Ok(());
    }
    let mut children: BTreeMap<Option<&SandboxId>, Vec<&SandboxDetail>> = BTreeMap::new();
    for sandbox in &all {
        // Whose source has ended stands at the top.
        let parent = sandbox.parent_id.as_ref().filter(|id| all.iter().any(|other| other.sandbox_id == **id));
        children.entry(parent).or_default().push(sandbox);
    }
    let mut open: Vec<(&SandboxDetail, String, String)> = Vec::new();
    let roots = children.get(&None).into_iter().flatten();
    open.extend(roots.rev().map(|root| (*root, String::new(), String::new())));
    while let Some((sandbox, here, below)) = open.pop() {
        let lost = match &sandbox.parent_id {
            Some(parent) if here.is_empty() => format!(", forked from {parent}, which has ended"),
            _ => String::new(),
        };
        line(&format!(
            "{here}{}  {}  {}{lost}",
            sandbox.sandbox_id,
            state_name(sandbox.state),
            sandbox.template_id
        ));
        let below_it = children.get(&Some(&sandbox.sandbox_id)).cloned().unwrap_or_default();
        let last = below_it.len().saturating_sub(1);
        for (index, child) in below_it.into_iter().enumerate().rev() {
            let (branch, rest) = if index == last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            open.push((child, format!("{below}{branch}"), format!("{below}{rest}")));
        }
    }
    Ok(())
}
