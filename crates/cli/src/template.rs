//! `kelvin template …`.
//!
//! An import is the server's. Into a data directory that has none it is done here, under the lock that a server would
//! have: nobody writes behind a server.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use kelvin_api::id::TemplateName;
use kelvin_api::import::{ImportProgress, ImportStage, ImportTemplate};
use kelvin_api::sandbox::BakeTemplate;
use kelvin_api::units::MemoryMib;
use kelvin_client::Client;
use kelvin_store::Store;
use kelvin_store::import::{Import, Links};

use crate::args::{Connection, Output, TemplateCommand, data_dir};
use crate::lock::{DataDirLock, Owner};
use crate::output::{Failed, Steps, line, print, spinner};
use crate::{build, config, lock, versions};

/// Runs one of the commands.
pub async fn dispatch(
    connection: &Connection,
    output: Output,
    command: TemplateCommand,
) -> Result<ExitCode, Failed> {
    match command {
        TemplateCommand::List => {
            print(output, &config::client(connection)?.templates().await?, versions::list)
        }
        TemplateCommand::Info { name } => {
            print(output, &config::client(connection)?.template(&name).await?, versions::info)
        }
        TemplateCommand::Tag { name, tags, remove } => {
            let client = config::client(connection)?;
            match remove {
                false => client.add_tags(&name, &tags).await?,
                true if name.contains(':') => {
                    let todo = "name the template alone: `kelvin template tag web v1 --remove`";
                    let text = format!("--remove takes tags from a template, not from {name}");
                    return Err(Failed::new(text, todo));
                }
                true => client.remove_tags(&name, &tags).await?,
            }
        }
        TemplateCommand::Build(args) => {
            return build::build(&config::client(connection)?, output, *args).await;
        }
        TemplateCommand::Builds { name } => {
            return build::builds(&config::client(connection)?, output, &name).await;
        }
        TemplateCommand::Logs { build: id, follow } => {
            return build::logs(&config::client(connection)?, output, &id, follow).await;
        }
        TemplateCommand::Cancel { build: id } => {
            return build::cancel(&config::client(connection)?, &id).await;
        }
        TemplateCommand::Delete { name } => config::client(connection)?.delete_template(&name).await?,
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
        TemplateCommand::Import { name, rootfs, kernel, initrd, cpus, memory_mib, data_dir } => {
            let name = name.parse().map_err(|error: kelvin_api::id::ParseIdError| {
                Failed::new(error.to_string(), "choose another name")
            })?;
            let files = Files { name, rootfs, kernel, initrd, cpus, memory_mib };
            // Who names a server means it, whatever KELVIN_DATA_DIR says.
            let image = match data_dir.filter(|_| connection.api_url.is_none()) {
                None => files.ask(&config::client(connection)?).await?,
                Some(data_dir) => match lock::take_or_ask(&data_dir).await? {
                    Owner::Us(alone) => files.import(data_dir, alone).await?,
                    Owner::Server(url) => files.ask(&config::client_of(&url, &data_dir)?).await?,
                },
            };
            line(&image);
        }
        TemplateCommand::Adopt { snapshot, data_dir: directory } => {
            let directory = data_dir(directory.as_ref());
            let Owner::Us(alone) = lock::take_or_ask(&directory).await? else {
                return Err(Failed::new(
                    format!("a server uses {}", directory.display()),
                    "stop it: a snapshot is adopted without one",
                ));
            };
            let adopted = tokio::task::spawn_blocking(move || {
                let _alone = alone;
                Store::open(&directory, false)?.adopt_snapshot(&snapshot)
            })
            .await;
            let adopted = adopted.map_err(|error| Failed::other(&error))?.map_err(of_store)?;
            line(&adopted.manifest.id.to_string());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What is to be imported.
struct Files {
    name: TemplateName,
    rootfs: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
    cpus: u32,
    memory_mib: u32,
}

/// The file at `path` as a server on this machine knows it: the server follows no link.
fn absolute(path: &Path) -> Result<String, Failed> {
    // A server elsewhere has files that are not here.
    let path = path.canonicalize().or_else(|_| std::path::absolute(path));
    path.map_err(|error| Failed::other(&error))?
        .into_os_string()
        .into_string()
        .map_err(|path| Failed::new(format!("{} is not UTF-8", path.display()), "give the file another name"))
}

impl Files {
    /// Has a server import them; the digest of the image.
    async fn ask(&self, client: &Client) -> Result<String, Failed> {
        let request = ImportTemplate {
            rootfs: absolute(&self.rootfs)?,
            kernel: absolute(&self.kernel)?,
            initrd: absolute(&self.initrd)?,
            cpu_count: Some(self.cpus),
            memory_mb: Some(self.memory_mib.into()),
        };
        let mut steps = Steps::new(&format!("importing {}", self.name));
        let imported =
            client.import(self.name.as_str(), &request, |progress| show(&mut steps, progress)).await;
        steps.finish();
        match imported {
            Ok(template) => Ok(template.build_id),
            Err(error @ kelvin_client::Error::Unreachable { .. }) => Err(Failed::new(
                kelvin_api::error::chain(&error),
                "start it with `kelvin serve`, name another with --api-url, or, when there is none, its data directory with \
                 --data-dir",
            )),
            Err(error) => Err(error.into()),
        }
    }

    /// Imports them into a data directory that nobody else uses; the digest of the image.
    async fn import(self, data_dir: PathBuf, alone: DataDirLock) -> Result<String, Failed> {
        let mut steps = Steps::new(&format!("importing {}", self.name));
        let imported = tokio::task::spawn_blocking(move || {
            let _alone = alone;
            let store = Store::open(&data_dir, false)?;
            let import = Import {
                name: self.name,
                rootfs: &self.rootfs,
                kernel: &self.kernel,
                initrd: &self.initrd,
                links: Links::Follow,
                vcpus: self.cpus,
                memory_mib: MemoryMib(self.memory_mib),
            };
            let imported = store.import(&import, &mut |progress| show(&mut steps, progress));
            steps.finish();
            imported
        })
        .await;
        Ok(imported.map_err(|error| Failed::other(&error))?.map_err(of_store)?.image)
    }
}

fn show(steps: &mut Steps, progress: ImportProgress) {
    let step = match progress.stage {
        ImportStage::Copying => "copying",
        ImportStage::Hashing => "hashing",
        ImportStage::Publishing => "publishing",
    };
    steps.at(step, progress.done_bytes, progress.total_bytes);
}

fn of_store(error: kelvin_store::Error) -> Failed {
    let failure = kelvin_api::error::Failure::from(error);
    let cause = failure.cause.map(|cause| format!(": {cause}")).unwrap_or_default();
    Failed::new(format!("{}{cause}", failure.message), &failure.remediation)
}
