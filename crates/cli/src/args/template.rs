//! Arguments of `kelvin template build`.

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

#[derive(Debug, Args)]
pub struct BuildArgs {
    /// What the template is called, with an optional `:tag`; one of that name is replaced once the build has succeeded.
    pub name: String,
    #[command(flatten)]
    pub from: FromArgs,
    #[command(flatten)]
    pub steps: StepArgs,
    /// Command that runs in every machine of the template, from before its snapshot is taken.
    #[arg(long, value_name = "CMD")]
    pub start: Option<String>,
    /// Command that is tried until it exits with 0; then the snapshot is taken.
    #[arg(long, value_name = "CMD")]
    pub ready: Option<String>,
    /// vCPUs of its machines.
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,
    /// Memory of its machines, in MiB.
    #[arg(long, value_name = "MIB")]
    pub memory: Option<u64>,
    /// Size of its disk, in MiB, with what is on it.
    #[arg(long, value_name = "MIB")]
    pub disk: Option<u64>,
    /// Run every step, and upload every file, whatever is cached.
    #[arg(long)]
    pub no_cache: bool,
}

/// What a build begins with.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct FromArgs {
    /// An image of a registry: `python:3.12`, `host:5000/team/app@sha256:…`.
    #[arg(long, value_name = "REF")]
    pub image: Option<String>,
    /// A template.
    #[arg(long, value_name = "NAME")]
    pub from_template: Option<String>,
    /// An OCI image layout, a directory on the server's machine; needs the server's own key.
    #[arg(long, value_name = "DIR")]
    pub layout: Option<PathBuf>,
    /// What `docker save` has written, a file on the server's machine; needs the server's own key.
    #[arg(long, value_name = "FILE")]
    pub archive: Option<PathBuf>,
}

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepKind {
    Run,
    Copy,
    Env,
    Workdir,
    User,
}

impl StepKind {
    const ALL: [Self; 5] = [Self::Run, Self::Copy, Self::Env, Self::Workdir, Self::User];

    fn option(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Copy => "copy",
            Self::Env => "env",
            Self::Workdir => "workdir",
            Self::User => "user",
        }
    }

    fn help(self) -> (&'static str, &'static str) {
        match self {
            Self::Run => {
                ("CMD", "Run a command; this and the next four in the order in which they are given")
            }
            Self::Copy => ("SRC:DEST", "Copy a file, or what is in a directory, of this machine"),
            Self::Env => ("KEY=VALUE", "Set a variable, for the steps after it and for every process"),
            Self::Workdir => ("DIR", "Set the working directory, and make it"),
            Self::User => ("USER", "Set the user"),
        }
    }
}

/// The steps, in the order in which they were given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepArgs(pub Vec<(StepKind, String)>);

impl FromArgMatches for StepArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut found = Vec::new();
        for kind in StepKind::ALL {
            let places = matches.indices_of(kind.option()).into_iter().flatten();
            let values = matches.get_many::<String>(kind.option()).into_iter().flatten();
            found.extend(places.zip(values).map(|(place, value)| (place, kind, value.clone())));
        }
        found.sort_by_key(|(place, ..)| *place);
        Ok(Self(found.into_iter().map(|(_, kind, value)| (kind, value)).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for StepArgs {
    fn augment_args(command: Command) -> Command {
        StepKind::ALL.into_iter().fold(command, |command, kind| {
            let (value, help) = kind.help();
            command.arg(
                Arg::new(kind.option())
                    .long(kind.option())
                    .action(ArgAction::Append)
                    .value_parser(NonEmptyStringValueParser::new())
                    .value_name(value)
                    .help(help),
            )
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command as Kelvin, TemplateCommand};

    fn parse(text: &[&str]) -> Result<BuildArgs, clap::Error> {
        let cli = Cli::try_parse_from(["kelvin", "template", "build"].iter().chain(text))?;
        let Kelvin::Template { command: TemplateCommand::Build(args) } = cli.command else { panic!() };
        Ok(*args)
    }

    #[test]
    fn steps_stay_in_the_order_in_which_they_are_given() {
        let args = parse(&[
            "web",
            "--run",
            "a",
            "--image",
            "debian",
            "--copy",
            "x:/y",
            "--run=b",
            "--env",
            "K=V",
            "--user",
            "app",
            "--run",
            "c",
            "--workdir",
            "/srv",
            "--no-cache",
        ])
        .unwrap();
        let steps: Vec<_> = args.steps.0.iter().map(|(kind, text)| (*kind, text.as_str())).collect();
        assert_eq!(
            steps,
            [
                (StepKind::Run, "a"),
                (StepKind::Copy, "x:/y"),
                (StepKind::Run, "b"),
                (StepKind::Env, "K=V"),
                (StepKind::User, "app"),
                (StepKind::Run, "c"),
                (StepKind::Workdir, "/srv")
            ]
        );
        assert!(args.no_cache && args.from.image.as_deref() == Some("debian"));
        assert!(parse(&["web", "--image", "a"]).unwrap().steps.0.is_empty());
    }

    #[test]
    fn a_build_begins_with_one_thing() {
        assert!(parse(&["web"]).is_err());
        assert!(parse(&["web", "--image", "a", "--layout", "b"]).is_err());
        assert!(parse(&["web", "--image", "a", "--run", ""]).is_err());
        assert!(parse(&["web", "--archive", "a"]).is_ok());
    }
}
