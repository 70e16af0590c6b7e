//! `kelvin template …`.

use std::process::ExitCode;

use kelvin_api::sandbox::BakeTemplate;
use kelvin_api::units::MemoryMib;
use kelvin_store::Store;
use kelvin_store::image::Import;

use crate::args::{Connection, Output, TemplateCommand, data_dir};
use crate::config;
use crate::output::{Failed, line, print, spinner, template_table};

/// Runs one of the commands.
pub async fn dispatch(
    connection: &Connection,
    output: Output,
    command: TemplateCommand,
) -> Result<ExitCode, Failed> {
    match command {
        TemplateCommand::List => {
            print(output, &config::client(connection)?.templates().await?, template_table)
        }
        TemplateCommand::Bake { name, memory_mib, cpus, waiting, no_network } => {
            let client = config::client(connection)?;
            let bar = spinner(&format!("baking {name}"));
            let network = no_network.then_some(false);
            let request =
                BakeTemplate { cpu_count: cpus, memory_mb: memory_mib, waiting_vmms: waiting, network };
            let baked = client.bake(&name, &request).await;
            bar.finish_and_clear();
            line(&baked?);
        }
        TemplateCommand::Import { name, rootfs, kernel, initrd, cpus, memory_mib, data_dir: directory } => {
            let name = name.parse().map_err(|error: kelvin_api::id::ParseIdError| {
                Failed::new(error.to_string(), "choose another name")
            })?;
            let bar = spinner(&format!("importing {name}"));
            let directory = data_dir(directory.as_ref());
            let imported = tokio::task::spawn_blocking(move || {
                let store = Store::open(&directory, false)?;
                store.import(&Import {
                    name,
                    rootfs: &rootfs,
                    kernel: &kernel,
                    initrd: &initrd,
                    vcpus: cpus,
                    memory_mib: MemoryMib(memory_mib),
                })
            })
            .await;
            bar.finish_and_clear();
            let template = imported.map_err(|error| Failed::other(&error))?.map_err(of_store)?;
            line(&template.image);
        }
        TemplateCommand::Adopt { snapshot, data_dir: directory } => {
            let directory = data_dir(directory.as_ref());
            let adopted = tokio::task::spawn_blocking(move || {
                Store::open(&directory, false)?.adopt_snapshot(&snapshot)
            })
            .await;
            let adopted = adopted.map_err(|error| Failed::other(&error))?.map_err(of_store)?;
            line(&adopted.manifest.id.to_string());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn of_store(error: kelvin_store::Error) -> Failed {
    let failure = kelvin_api::error::Failure::from(error);
    let cause = failure.cause.map(|cause| format!(": {cause}")).unwrap_or_default();
    Failed::new(format!("{}{cause}", failure.message), &failure.remediation)
}
