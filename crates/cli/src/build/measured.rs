//! `kelvin bench build`: its builds are those of `kelvin template build`, unwatched.

use std::cell::Cell;
use std::process::ExitCode;

use kelvin_api::build::BuildLogEntry;
use kelvin_bench::build::{Args, Builder, NotBuilt, Order};
use kelvin_client::Client;

use super::build_unwatched;
use crate::args::{BuildArgs, DockerfileArgs, FromArgs, Output, StepArgs};
use crate::exec::told_to_end;
use crate::output::{Failed, print};

/// Builds by a server.
struct Measured<'a>(&'a Client);

impl Builder for Measured<'_> {
    async fn build(&self, order: Order) -> Result<Vec<BuildLogEntry>, NotBuilt> {
        let Order { template, directory, base, cpus, memory_mib } = order;
        let dockerfile = DockerfileArgs {
            context: Some(directory),
            build_args: vec![format!("BASE={base}")],
            ..DockerfileArgs::default()
        };
        let args = BuildArgs {
            name: template,
            dockerfile,
            from: FromArgs { image: None, from_template: None, layout: None, archive: None },
            steps: StepArgs::default(),
            start: None,
            ready: None,
            cpus: Some(cpus),
            memory_mib: Some(memory_mib),
            disk_mib: None,
            kernel: None,
            no_cache: false,
        };
        build_unwatched(self.0, args).await.map_err(|failed| NotBuilt(failed.message().to_owned()))
    }
}

/// `kelvin bench build`. A signal ends it once what it made is removed.
pub async fn bench(client: &Client, output: Output, args: &Args) -> Result<ExitCode, Failed> {
    let told = Cell::new(None);
    let stopped = async { told.set(Some(told_to_end().await)) };
    let measured = kelvin_bench::build::run(client, args, &Measured(client), stopped).await;
    let report = measured.map_err(|error| {
        let code = told.get().and_then(|signal| u8::try_from(128 + signal).ok());
        Failed::other(&error).with_code(code.unwrap_or(1))
    })?;
    print(output, &report, |report| report.table());
    Ok(ExitCode::SUCCESS)
}
