//! Arguments of `kelvin template build`.

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Args, Command, FromArgMatches};

/// As Docker has it: clap would write the context before the name.
const USAGE: &str = "kelvin template build [OPTIONS] <NAME> \
     <CONTEXT|--file <FILE>|--image <REF>|--from-template <NAME>|--layout <DIR>|--archive <FILE>>";

#[derive(Debug, Args)]
#[command(override_usage = USAGE)]
#[command(group = ArgGroup::new("source").required(true).multiple(true).args(SOURCES))]
pub struct BuildArgs {
    /// What the template is called, with an optional `:tag` that names what is built once that has succeeded; `default` without
    /// one. Other versions of it stay.
    pub name: String,
    #[command(flatten)]
    pub dockerfile: DockerfileArgs,
    #[command(flatten)]
    pub from: FromArgs,
    #[command(flatten)]
    pub steps: StepArgs,
    /// Command that runs in every machine of the template, from before its snapshot is taken; the Dockerfile's otherwise. An
    /// empty one is none.
    #[arg(long, value_name = "CMD")]
    pub start: Option<String>,
    /// Command that is tried until it exits with 0; then the snapshot is taken. The Dockerfile's otherwise.
    #[arg(long, value_name = "CMD")]
    pub ready: Option<String>,
    /// Kernel of its machines, an ELF program or a bzImage, a file on the server's machine [default: that of what it begins
    /// with]; needs the server's own key. What its machine needs has to be built in: docs/images.md has the list.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// vCPUs of its machines.
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,
    /// Memory of its machines, in MiB.
    #[arg(long, alias = "memory", value_name = "MIB")]
    pub memory_mib: Option<u64>,
    /// Size of its disk, in MiB, with what is on it.
    #[arg(long, alias = "disk", value_name = "MIB")]
    pub disk_mib: Option<u64>,
    /// Run every step, and upload every file, whatever is cached.
    #[arg(long)]
    pub no_cache: bool,
}

/// What a build is made of: one of these is given.
const SOURCES: [&str; 6] = ["image", "from_template", "layout", "archive", "dockerfile", "context"];
/// What a Dockerfile says itself.
const OF_DOCKERFILE: [&str; 9] =
    ["image", "from_template", "layout", "archive", "run", "copy", "env", "workdir", "user"];

/// A Dockerfile, and what decides about it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
#[group(multiple = true, conflicts_with_all = OF_DOCKERFILE)]
pub struct DockerfileArgs {
    /// Build a Dockerfile: the directory that its COPY and ADD take files from [default: `.`, with --file].
    pub context: Option<PathBuf>,
    /// Build this Dockerfile [default: CONTEXT/Dockerfile].
    #[arg(long = "file", short = 'f', value_name = "FILE")]
    pub dockerfile: Option<PathBuf>,
    /// Build this stage of the Dockerfile, by its name or number [default: the last one].
    #[arg(long, value_name = "STAGE")]
    pub target: Option<String>,
    /// Value of an ARG of the Dockerfile; without one, that of the environment. No secrets: the build's log has it.
    #[arg(long = "build-arg", value_name = "NAME[=VALUE]", value_parser = NonEmptyStringValueParser::new())]
    pub build_args: Vec<String>,
}

impl DockerfileArgs {
    /// Whether it is a Dockerfile that is to be built.
    pub fn is_given(&self) -> bool {
        self.context.is_some() || self.dockerfile.is_some()
    }
}

/// What a build begins with.
#[derive(Debug, Args)]
#[group(multiple = false)]
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

    #[test]
    fn a_dockerfile_is_built_by_its_name_or_its_context() {
        let path = |text: &str| Some(PathBuf::from(text));
        let args = parse(&["web", "."]).unwrap().dockerfile;
        assert_eq!((args.context.clone(), args.dockerfile.clone()), (path("."), None));
        assert!(args.is_given());
        let args = parse(&["web", "-f", "x/Dockerfile"]).unwrap().dockerfile;
        assert!(args.is_given() && args.context.is_none() && args.dockerfile == path("x/Dockerfile"));
        let text = [
            "web",
            "--file=D",
            "--target",
            "run",
            "--build-arg",
            "A=1",
            "app",
            "--build-arg=B",
            "--start",
            "s",
        ];
        let args = parse(&text).unwrap();
        assert_eq!(args.start.as_deref(), Some("s"));
        assert_eq!(
            args.dockerfile,
            DockerfileArgs {
                context: path("app"),
                dockerfile: path("D"),
                target: Some("run".to_owned()),
                build_args: vec!["A=1".to_owned(), "B".to_owned()]
            }
        );
        assert!(!parse(&["web", "--image", "a"]).unwrap().dockerfile.is_given());
    }

    #[test]
    fn a_dockerfile_goes_with_nothing_that_it_says_itself() {
        for source in [&["."][..], &["-f", "D"]] {
            for option in OF_DOCKERFILE {
                let option = format!("--{}=x:y=z", option.replace('_', "-"));
                let text = [&["web", option.as_str()], source].concat();
                let error = parse(&text).unwrap_err();
                assert_eq!(error.kind(), clap::error::ErrorKind::ArgumentConflict, "{text:?}");
            }
        }
        for option in ["--target=x", "--build-arg=A=1"] {
            let error = parse(&["web", option]).unwrap_err();
            assert_eq!(error.kind(), clap::error::ErrorKind::MissingRequiredArgument, "{option}");
            assert!(parse(&["web", option, "--image", "a"]).is_err(), "{option}");
        }
        assert!(parse(&["web", ".", "--build-arg", ""]).is_err());
    }
}
