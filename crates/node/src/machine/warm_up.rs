//! The first commands in a guest, so that what they touch is there for the next, and its rest after them.
//!
//! Nothing is written; a crash leaves nothing.

use std::time::Duration;

use kelvin_api::guest::Request;
use kelvin_api::id::Token;
use kelvin_api::sandbox::EnvVars;
use kelvin_vmm::MachineSpec;
use kelvin_vmm::control::Control;

use crate::error::Error;
use crate::machine::processes::{Command, Failed, Processes};

const WARM_UP_LIMIT: Duration = Duration::from_secs(120);
const QUIESCE_LIMIT: Duration = Duration::from_secs(60);

/// Flushes the guest and waits until its agent's HTTP port is at rest.
pub async fn quiesce(control: &mut Control) -> Result<(), Error> {
    let deadline = tokio::time::Instant::now() + QUIESCE_LIMIT;
    while !control.call("quiesce", &Request::Quiesce, QUIESCE_LIMIT).await?.http_waiting {
        if tokio::time::Instant::now() > deadline {
            return Err(kelvin_vmm::Error::Deadline {
                what: "quiescing",
                after: QUIESCE_LIMIT,
                detail: "the agent's HTTP port did not come to rest".to_owned(),
            }
            .into());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// Runs `commands` in the guest, one after the other. A guest that has no shell, or no user for them, has nothing to be warmed up.
pub async fn warm_up(processes: &Processes, commands: &[&str]) -> Result<(), Error> {
    let env = EnvVars::new();
    let work = async {
        for text in commands {
            match processes.run(&Command { text, argv: None, user: None, cwd: None, env: &env }, 0).await {
                Ok((exit, _)) => tracing::debug!(text, %exit, "warmed up"),
                Err(Failed::Refused(why)) => tracing::info!(text, why, "not warmed up"),
                Err(Failed::Broken(error)) => return Err(error),
            }
        }
        Ok(())
    };
    let limited = tokio::time::timeout(WARM_UP_LIMIT, work).await;
    limited.unwrap_or_else(|elapsed| Err(processes.silent(elapsed.into())))
}

/// The same over a connection of its own, which is closed then.
pub async fn warm_up_once(
    http: kelvin_vmm::stream::GuestStream,
    spec: &MachineSpec,
    commands: &[&str],
    token: Option<&Token>,
) -> Result<(), Error> {
    let processes = Processes::over(http, &spec.vm, token);
    let result = warm_up(&processes, commands).await;
    processes.close().await;
    result
}
