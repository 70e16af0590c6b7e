//! Clones of what was built beside clones of another template, one of each in turns.

use kelvin_client::Client;
use kelvin_client::agent::Command;

use super::error::Error;
use super::report::Clones;
use crate::create::{self, Path};
use crate::settle;

fn args(template: &str) -> create::Args {
    create::Args {
        path: Path::Clone,
        n: 1,
        concurrency: 1,
        memory_mib: None,
        no_network: false,
        template: template.to_owned(),
        baseline: false,
    }
}

/// Measures `n` of `built` and `n` of `beside`, whose snapshot is made when it is missing.
pub(super) async fn run(client: &Client, built: &str, beside: &str, n: u32) -> Result<Clones, Error> {
    client.bake(beside, &kelvin_api::sandbox::BakeTemplate::default()).await?;
    let mut clones = Clones::default();
    for round in 0..n {
        for turn in 0..2 {
            let is_built = (round + turn) % 2 == 0;
            let template = if is_built { built } else { beside };
            settle(client).await?;
            let (sandbox, took) = create::create(client.clone(), args(template)).await?;
            let first = create::first_command(client.clone(), sandbox, took).await?;
            let of = if is_built { &mut clones.built } else { &mut clones.beside };
            of.create.push(took);
            of.first.push(first);
        }
    }
    Ok(clones)
}

/// What a clone of `template` answers on its port 8080, from within.
pub(super) async fn page(client: &Client, template: &str) -> Result<String, Error> {
    let (sandbox, _) = create::create(client.clone(), args(template)).await?;
    let agent = client.agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), None)?;
    let command = Command {
        program: "curl".to_owned(),
        args: ["-s", "http://127.0.0.1:8080/"].map(str::to_owned).to_vec(),
        ..Command::default()
    };
    let asked = agent.run(&command, 64 << 10).await;
    client.kill(&sandbox.sandbox_id).await?;
    let (code, output, _) = asked?;
    if code == 0 {
        return Ok(String::from_utf8_lossy(&output).into_owned());
    }
    Err(create::Error::Command(code).into())
}
