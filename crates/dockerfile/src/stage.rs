//! What a stage's instructions come to, one after the other.

use std::collections::BTreeMap;

use crate::command;
use crate::copy;
use crate::error::Fault;
use crate::expand::{Lookup, MOST_VALUE, Scope};
use crate::instruction::{Form, Health, Instruction, Located};
use crate::lines::{HereDoc, MOST_BYTES};
use crate::paths::clean;
use crate::plan::{Action, Config, Copy, CopyFrom, Healthcheck, ImageConfig, Source};
use crate::text::Text;

/// What PATH is where an image does not say.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The most variables, values of ARG, ports and volumes of a stage: each is looked for among all of them.
const MOST: usize = 4096;
/// Values that every build may be given without an ARG.
const PREDEFINED: [&str; 10] = [
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "FTP_PROXY",
    "ftp_proxy",
    "NO_PROXY",
    "no_proxy",
    "ALL_PROXY",
    "all_proxy",
];

/// Values of ARG from outside of the stage.
pub(crate) struct Args<'a> {
    /// `--build-arg`.
    pub given: &'a BTreeMap<String, String>,
    /// Those before the first FROM, and of the platform.
    pub global: &'a BTreeMap<String, String>,
}

/// A stage after some of its instructions.
#[derive(Debug, Clone, Default)]
pub(crate) struct State {
    /// The image's, as far as they are known, and those of ENV.
    env: Vec<(String, Text)>,
    /// Whether every variable of the image is known.
    complete: bool,
    args: Vec<(String, Option<Text>)>,
    /// Absolute; none when it is not known.
    workdir: Option<String>,
    /// Whether CMD was in this stage: then ENTRYPOINT leaves it.
    own_cmd: bool,
    pub config: Config,
}

impl Scope for State {
    fn get(&self, name: &str) -> Lookup<'_> {
        if let Some((_, text)) = self.env.iter().find(|(known, _)| known == name) {
            return text.literal().map_or(Lookup::Unknown, Lookup::Set);
        }
        if let Some((_, Some(text))) = self.args.iter().find(|(known, _)| known == name) {
            return text.literal().map_or(Lookup::Unknown, Lookup::Set);
        }
        // `$1` and `$?` are no variables that an image could have.
        let is_name = name.starts_with(|letter: char| letter.is_alphabetic() || letter == '_');
        if self.complete || !is_name { Lookup::Unset } else { Lookup::Unknown }
    }
}

impl State {
    /// The begin of a stage without an image.
    pub fn scratch() -> Self {
        Self::of(&ImageConfig::default())
    }

    /// The begin of a stage of an image, which is known.
    pub fn of(image: &ImageConfig) -> Self {
        let mut env: Vec<(String, Text)> =
            image.env.iter().map(|(name, value)| (name.clone(), Text::of(value.as_str()))).collect();
        if !env.iter().any(|(name, _)| name == "PATH") {
            env.push(("PATH".to_owned(), Text::of(PATH)));
        }
        let config = Config {
            entrypoint: Some(image.entrypoint.clone()),
            cmd: Some(image.cmd.clone()),
            shell: (!image.shell.is_empty()).then(|| image.shell.clone()),
            ..Config::default()
        };
        Self {
            env,
            complete: true,
            workdir: Some(clean(&format!("/{}", image.workdir))),
            config,
            ..Self::default()
        }
    }

    /// The begin of a stage of this one.
    pub fn derived(&self) -> Self {
        Self { args: Vec::new(), own_cmd: false, ..self.clone() }
    }

    /// Values that need no ARG.
    pub fn predefine(&mut self, given: &BTreeMap<String, String>) {
        let values = PREDEFINED.iter().filter_map(|name| Some((*name, given.get(*name)?)));
        self.args.extend(values.map(|(name, value)| (name.to_owned(), Some(Text::of(value.as_str())))));
    }

    fn text(&self, word: &str, escape: char) -> Result<Text, Fault> {
        Ok(Text::read(word, escape)?.expand(self, MOST_VALUE)?)
    }

    /// A text that has to be known before the build.
    fn known(&self, word: &str, escape: char) -> Result<String, Fault> {
        literal(self.text(word, escape)?)
    }

    fn shell(&self) -> Vec<String> {
        self.config.shell.clone().unwrap_or_else(|| command::SHELL.map(str::to_owned).to_vec())
    }

    /// What `located` does; nothing when it only says something. `stage` finds the stage that COPY --from names.
    pub fn step(
        &mut self,
        located: &Located,
        escape: char,
        args: &Args<'_>,
        stage: &mut dyn FnMut(&str) -> Result<usize, Fault>,
    ) -> Result<Option<Action>, Fault> {
        match &located.instruction {
            Instruction::Refused(unsupported) => return Err(unsupported.clone().into()),
            Instruction::From { .. } => return Err(Fault::syntax("FROM begins another stage")),
            Instruction::Env(pairs) => return self.env(pairs, escape).map(Some),
            Instruction::Run { form, heredocs } => return self.run(form, heredocs).map(Some),
            Instruction::Workdir(path) => return self.workdir(path, escape).map(Some),
            Instruction::User(user) => {
                let user = self.text(user, escape)?;
                if user.literal() == Some("") {
                    return Err(Fault::syntax("USER is empty"));
                }
                return Ok(Some(Action::User(user)));
            }
            Instruction::Copy(copy) => {
                let from = copy.from.as_deref().map(stage).transpose()?;
                return self.copy(copy, from, escape).map(|copy| Some(Action::Copy(copy)));
            }
            Instruction::Arg(pairs) => self.arg(pairs, escape, args)?,
            Instruction::Label(pairs) => {
                for (name, value) in pairs {
                    let value = self.text(value, escape)?;
                    self.config.labels.insert(self.known(name, escape)?, value);
                }
            }
            Instruction::Maintainer(name) => {
                self.config.labels.insert("maintainer".to_owned(), Text::of(name.as_str()));
            }
            Instruction::Shell(shell) => self.config.shell = Some(shell.clone()),
            Instruction::Entrypoint(form) => {
                self.config.entrypoint = Some(self.command(form));
                if !self.own_cmd {
                    self.config.cmd = Some(Vec::new());
                }
            }
            Instruction::Cmd(form) => {
                self.config.cmd = Some(self.command(form));
                self.own_cmd = true;
            }
            Instruction::Expose(ports) => self.expose(ports, escape)?,
            Instruction::Volume(paths) => {
                for path in paths {
                    let path = self.known(path, escape)?;
                    add(&mut self.config.volumes, path)?;
                }
            }
            Instruction::StopSignal(signal) => {
                self.config.stop_signal = Some(stop_signal(self.known(signal, escape)?)?);
            }
            Instruction::Healthcheck(health) => self.config.healthcheck = Some(self.health(health.as_ref())),
        }
        Ok(None)
    }

    fn env(&mut self, pairs: &[(String, String)], escape: char) -> Result<Action, Fault> {
        let mut made = Vec::new();
        for (name, value) in pairs {
            let name = self.known(name, escape)?;
            if name.is_empty() || name.contains(['=', '\0']) {
                return Err(Fault::syntax("ENV has a name of a variable before its value"));
            }
            made.push((name, self.text(value, escape)?));
        }
        for (name, value) in &made {
            match self.env.iter_mut().find(|(known, _)| known == name) {
                Some((_, old)) => old.clone_from(value),
                None => self.env.push((name.clone(), value.clone())),
            }
            if self.env.len() > MOST {
                return Err(too_many("the stage in variables"));
            }
        }
        Ok(Action::Env(made))
    }

    fn arg(
        &mut self,
        pairs: &[(String, Option<String>)],
        escape: char,
        args: &Args<'_>,
    ) -> Result<(), Fault> {
        let mut made = Vec::new();
        for (name, default) in pairs {
            let name = self.known(name, escape)?;
            let value = match (args.given.get(&name), default) {
                (Some(given), _) => Some(Text::of(given.as_str())),
                (None, Some(default)) => Some(self.text(default, escape)?),
                (None, None) => args.global.get(&name).map(|value| Text::of(value.as_str())),
            };
            made.push((name, value));
        }
        for (name, value) in made {
            match self.args.iter_mut().find(|(known, _)| *known == name) {
                Some((_, old)) => *old = value,
                None => self.args.push((name, value)),
            }
            if self.args.len() > MOST {
                return Err(too_many("the stage in build arguments"));
            }
        }
        Ok(())
    }

    fn command(&self, form: &Form) -> Vec<String> {
        match form {
            Form::Shell(text) if text.is_empty() => Vec::new(),
            _ => command::argv(form, &self.shell()),
        }
    }

    fn run(&self, form: &Form, heredocs: &[HereDoc]) -> Result<Action, Fault> {
        let argv = match (form, heredocs) {
            (Form::Exec(_), _) | (_, []) => command::argv(form, &self.shell()),
            (Form::Shell(text), [only, ..]) => match is_document(text) {
                // It is the script.
                true if only.content.trim_start_matches('\t').starts_with("#!") => {
                    command::script(only.text())
                }
                true => command::argv(&Form::Shell(only.text()), &self.shell()),
                // The shell reads it.
                false => {
                    let documents =
                        heredocs.iter().map(|heredoc| format!("\n{}{}", heredoc.content, heredoc.name));
                    command::argv(&Form::Shell(text.clone() + &documents.collect::<String>()), &self.shell())
                }
            },
        };
        if argv.iter().any(|word| word.len() > command::MOST_ARGUMENT) {
            return Err(Fault::TooLarge {
                what: "the command in bytes",
                limit: command::MOST_ARGUMENT as u64,
            });
        }
        if argv.iter().any(|word| word.contains('\0')) {
            return Err(Fault::syntax("a command has no zero bytes"));
        }
        let values = self.args.iter().filter_map(|(name, value)| Some((name, value.as_ref()?)));
        let values = values.filter(|(name, _)| !self.env.iter().any(|(known, _)| known == *name));
        Ok(Action::Run {
            argv,
            variables: values.map(|(name, value)| (name.clone(), value.clone())).collect(),
        })
    }

    fn workdir(&mut self, path: &str, escape: char) -> Result<Action, Fault> {
        let path = self.text(path, escape)?;
        let Some(literal) = path.literal() else {
            self.workdir = None;
            return Ok(Action::Workdir(path));
        };
        if literal.is_empty() {
            return Err(Fault::syntax("WORKDIR is empty"));
        }
        let joined = self.joined(literal);
        self.workdir = joined.starts_with('/').then(|| joined.clone());
        Ok(Action::Workdir(Text::of(joined)))
    }

    /// `path` from the working directory on, when that is known.
    fn joined(&self, path: &str) -> String {
        match &self.workdir {
            Some(workdir) if !path.starts_with('/') => clean(&format!("{workdir}/{path}")),
            _ => clean(path),
        }
    }

    fn copy(&self, written: &copy::Copy, from: Option<usize>, escape: char) -> Result<Copy, Fault> {
        let mut sources = Vec::new();
        for source in &written.sources {
            sources.push(match source {
                copy::Source::Path(path) => match self.known(path, escape)? {
                    path if path.is_empty() => return Err(Fault::syntax("a source is empty")),
                    path => Source::Path(path),
                },
                copy::Source::HereDoc(heredoc) => self.inline(heredoc, escape)?,
            });
        }
        let to = self.destination(self.text(&written.to, escape)?)?;
        if sources.len() > 1 && to.literal().is_some() && !to.ends_with("/") {
            return Err(Fault::syntax("the destination of more than one source ends in `/`"));
        }
        let owner = match &written.owner {
            Some(owner) => self.text(owner, escape)?,
            None => Text::of("0:0"),
        };
        let mode = match &written.mode {
            Some(mode) => Some(octal(&self.known(mode, escape)?)?),
            None => None,
        };
        let from = from.map_or(CopyFrom::Context, CopyFrom::Stage);
        Ok(Copy { from, sources, to, owner, mode, unpack: written.unpack })
    }

    fn inline(&self, heredoc: &HereDoc, escape: char) -> Result<Source, Fault> {
        let name = heredoc.name.clone();
        if name.contains(['/', '\0']) || name == "." || name == ".." {
            return Err(Fault::syntax(format!("{name} is no name of a file")));
        }
        let mut content = heredoc.text();
        if heredoc.expand {
            content = literal(Text::read_document(&content, escape)?.expand(self, MOST_BYTES)?)?;
        }
        Ok(Source::Inline { name, content })
    }

    fn destination(&self, to: Text) -> Result<Text, Fault> {
        let Some(path) = to.literal() else { return Ok(to) };
        if path.is_empty() {
            return Err(Fault::syntax("the destination is empty"));
        }
        let is_directory =
            path.ends_with('/') || [".", ".."].contains(&path.rsplit('/').next().unwrap_or_default());
        let mut joined = self.joined(path);
        if is_directory && !joined.ends_with('/') {
            joined.push('/');
        }
        Ok(Text::of(joined))
    }

    fn expose(&mut self, ports: &[String], escape: char) -> Result<(), Fault> {
        for word in ports {
            let known = self.known(word, escape)?;
            for port in known.split_whitespace() {
                add(&mut self.config.exposed, exposed(port)?)?;
            }
        }
        Ok(())
    }

    fn health(&self, health: Option<&Health>) -> Healthcheck {
        match health {
            None => Healthcheck::Disabled,
            Some(health) => Healthcheck::Command {
                argv: command::argv(&health.command, &self.shell()),
                interval: health.interval,
                timeout: health.timeout,
                start_period: health.start_period,
                retries: health.retries,
            },
        }
    }
}

fn literal(text: Text) -> Result<String, Fault> {
    match (text.literal(), text.variable()) {
        (Some(literal), _) => Ok(literal.to_owned()),
        (None, variable) => Err(Fault::UnknownVariable { name: variable.unwrap_or_default().to_owned() }),
    }
}

/// Whether a command is nothing but a here-document.
fn is_document(text: &str) -> bool {
    let (first, rest) = crate::words::keyword(text);
    rest.is_empty() && first.trim_start_matches(|letter: char| letter.is_ascii_digit()).starts_with("<<")
}

fn add(list: &mut Vec<String>, item: String) -> Result<(), Fault> {
    if !list.contains(&item) {
        if list.len() == MOST {
            return Err(too_many("the stage in ports or volumes"));
        }
        list.push(item);
    }
    Ok(())
}

fn too_many(what: &'static str) -> Fault {
    Fault::TooLarge { what, limit: MOST as u64 }
}

/// `8080`, `8080/udp`, `8000-8010/tcp`.
fn exposed(port: &str) -> Result<String, Fault> {
    let wrong = || Fault::syntax(format!("{port} is no port: 8080, 8080/udp or 8000-8010"));
    let (range, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    let number = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(wrong);
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let (first, last) = (number(first)?, number(last)?);
    if !["tcp", "udp", "sctp"].contains(&protocol.as_str()) || first > last {
        return Err(wrong());
    }
    Ok(if first == last { format!("{first}/{protocol}") } else { format!("{first}-{last}/{protocol}") })
}

/// A number, or a name with or without `SIG`.
fn stop_signal(signal: String) -> Result<String, Fault> {
    let is_number = signal.parse::<u8>().is_ok_and(|number| (1..=64).contains(&number));
    let name = signal.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let is_name = name.starts_with(|letter: char| letter.is_ascii_uppercase())
        && name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '+' || letter == '-');
    if !is_number && !is_name {
        return Err(Fault::syntax(format!("{signal} is no signal")));
    }
    Ok(signal)
}

fn octal(mode: &str) -> Result<u32, Fault> {
    if mode.starts_with(|letter: char| letter.is_ascii_alphabetic() || "+=-".contains(letter)) {
        return Err(Fault::unsupported(format!("--chmod={mode}"), "Write the mode in octal: --chmod=755."));
    }
    let digits =
        !mode.is_empty() && mode.len() <= 5 && mode.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
    let mode = u32::from_str_radix(mode, 8).ok().filter(|mode| digits && *mode <= 0o7777);
    mode.ok_or_else(|| Fault::syntax("--chmod is a mode in octal: --chmod=755"))
}
