//! Instructions: each line as what it is, its words not expanded yet.
//!
//! What Docker has and this builder has not is kept as [`Instruction::Refused`]: it matters in a stage that is built.

use std::time::Duration;

use crate::copy::{self, Copy};
use crate::error::{Error, Fault, Unsupported, shortened};
use crate::flags::Flags;
use crate::lines::{HereDoc, Line, Lines};
use crate::words;

/// Instructions, as Docker writes them.
const NAMES: [&str; 18] = [
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];
/// How a cache mount is to be replaced.
const NO_MOUNT: &str = "Leave --mount away: every step's result is kept as a layer of the disk, so that what it made is \
    there when nothing before it changed. Files of the context come in by COPY; a secret has no place in a template.";

/// A line and what it is.
#[derive(Debug)]
pub(crate) struct Located {
    pub line: u32,
    pub text: String,
    pub instruction: Instruction,
}

impl Located {
    /// A fault of this instruction.
    pub fn fault(&self, fault: Fault) -> Error {
        fault.at(self.line, &self.text)
    }

    /// As it is shown.
    pub fn shown(&self) -> String {
        shortened(&self.text)
    }
}

/// A command in the shell form or in the exec form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Form {
    Shell(String),
    Exec(Vec<String>),
}

/// HEALTHCHECK: nothing where it is NONE.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Health {
    pub command: Form,
    pub interval: Option<Duration>,
    pub timeout: Option<Duration>,
    pub start_period: Option<Duration>,
    pub retries: Option<u32>,
}

#[derive(Debug)]
pub(crate) enum Instruction {
    From { image: String, platform: Option<String>, name: Option<String> },
    Arg(Vec<(String, Option<String>)>),
    Env(Vec<(String, String)>),
    Label(Vec<(String, String)>),
    Maintainer(String),
    Run { form: Form, heredocs: Vec<HereDoc> },
    Copy(Copy),
    Workdir(String),
    User(String),
    Shell(Vec<String>),
    Entrypoint(Form),
    Cmd(Form),
    Expose(Vec<String>),
    Volume(Vec<String>),
    StopSignal(String),
    Healthcheck(Option<Health>),
    Refused(Unsupported),
}

/// What every line is.
pub(crate) fn read(lines: Lines) -> Result<Vec<Located>, Error> {
    let escape = lines.escape;
    let located = lines.lines.into_iter().map(|line| {
        let instruction = match instruction(&line, escape) {
            Ok(instruction) => instruction,
            Err(Fault::Unsupported(unsupported)) => Instruction::Refused(unsupported),
            Err(fault) => return Err(fault.at(line.line, &line.text)),
        };
        Ok(Located { line: line.line, text: line.text, instruction })
    });
    located.collect()
}

fn instruction(line: &Line, escape: char) -> Result<Instruction, Fault> {
    let (written, rest) = words::keyword(&line.text);
    let keyword = written.to_ascii_uppercase();
    if !NAMES.contains(&keyword.as_str()) {
        return Err(Fault::UnknownInstruction { name: written.to_owned(), nearest: nearest(&keyword) });
    }
    if keyword == "ONBUILD" {
        return Err(Fault::unsupported(
            "ONBUILD",
            "Write the instruction into the Dockerfile that begins with this image.",
        ));
    }
    let (flags, rest) = words::flags(rest)?;
    let mut flags = Flags::new(flags)?;
    let instruction = match keyword.as_str() {
        "FROM" => from(rest, &mut flags)?,
        "ARG" => arg(rest, escape)?,
        "ENV" => Instruction::Env(words::pairs(rest, &keyword, escape)?),
        "LABEL" => Instruction::Label(words::pairs(rest, &keyword, escape)?),
        "MAINTAINER" => Instruction::Maintainer(one(rest, &keyword)?),
        "RUN" => run(rest, &line.heredocs, &mut flags)?,
        "COPY" | "ADD" => Instruction::Copy(copy::read(&keyword, rest, &line.heredocs, &mut flags, escape)?),
        "WORKDIR" => Instruction::Workdir(one(rest, &keyword)?),
        "USER" => Instruction::User(one(rest, &keyword)?),
        "STOPSIGNAL" => Instruction::StopSignal(one(rest, &keyword)?),
        "SHELL" => match words::json(rest)? {
            Some(shell) if !shell.is_empty() => Instruction::Shell(shell),
            _ => return Err(Fault::syntax("SHELL is a JSON array: SHELL [\"/bin/bash\", \"-c\"]")),
        },
        "ENTRYPOINT" => Instruction::Entrypoint(form(rest)?),
        "CMD" => Instruction::Cmd(form(rest)?),
        "EXPOSE" => Instruction::Expose(some(words::plain(rest), &keyword)?),
        "VOLUME" => {
            Instruction::Volume(some(words::json(rest)?.unwrap_or_else(|| words::plain(rest)), &keyword)?)
        }
        _ => Instruction::Healthcheck(health(rest, &mut flags)?),
    };
    flags.finish(&keyword)?;
    Ok(instruction)
}

/// The name that is nearest to `written`, when it is near.
fn nearest(written: &str) -> Option<&'static str> {
    if written.len() > 24 {
        return None;
    }
    let distances = NAMES.into_iter().map(|name| (distance(written.as_bytes(), name.as_bytes()), name));
    distances.min().filter(|(distance, name)| *distance <= 2 && *distance < name.len()).map(|(_, name)| name)
}

/// How many letters have to be inserted, removed or replaced.
fn distance(one: &[u8], other: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (at, letter) in one.iter().enumerate() {
        let mut corner = std::mem::replace(&mut row[0], at + 1);
        for (to, wanted) in other.iter().enumerate() {
            let replaced = corner + usize::from(letter != wanted);
            corner = row[to + 1];
            row[to + 1] = replaced.min(corner + 1).min(row[to] + 1);
        }
    }
    row[other.len()]
}

fn one(rest: &str, keyword: &str) -> Result<String, Fault> {
    if rest.is_empty() {
        return Err(Fault::syntax(format!("{keyword} has exactly one argument")));
    }
    Ok(rest.to_owned())
}

fn some(found: Vec<String>, keyword: &str) -> Result<Vec<String>, Fault> {
    if found.is_empty() || found.iter().any(String::is_empty) {
        return Err(Fault::syntax(format!("{keyword} has at least one argument, and none that is empty")));
    }
    Ok(found)
}

pub(crate) fn form(rest: &str) -> Result<Form, Fault> {
    Ok(match words::json(rest)? {
        Some(words) => Form::Exec(words),
        None => Form::Shell(rest.to_owned()),
    })
}

fn from(rest: &str, flags: &mut Flags) -> Result<Instruction, Fault> {
    let platform = flags.take("platform")?;
    let found = words::plain(rest);
    let (image, name) = match &found[..] {
        [image] => (image, None),
        [image, keyword, name] if keyword.eq_ignore_ascii_case("as") => (image, Some(stage_name(name)?)),
        _ => return Err(Fault::syntax("FROM is `FROM image` or `FROM image AS name`")),
    };
    Ok(Instruction::From { image: image.clone(), platform, name })
}

fn stage_name(name: &str) -> Result<String, Fault> {
    let name = name.to_ascii_lowercase();
    let fine = name.starts_with(|letter: char| letter.is_ascii_lowercase())
        && name
            .chars()
            .all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || "-_.".contains(letter));
    if !fine {
        let what = format!("{name} is no name of a stage: a letter, then letters, digits, `-`, `_` and `.`");
        return Err(Fault::syntax(what));
    }
    if name == "scratch" || name == "context" {
        return Err(Fault::syntax(format!("no stage may have the name {name}")));
    }
    Ok(name)
}

fn arg(rest: &str, escape: char) -> Result<Instruction, Fault> {
    let found = some(words::split(rest, escape), "ARG")?;
    let parted = found.iter().map(|word| match word.split_once('=') {
        Some(("", _)) => Err(Fault::syntax("ARG has a name before `=`")),
        Some((name, value)) => Ok((name.to_owned(), Some(value.to_owned()))),
        None => Ok((word.clone(), None)),
    });
    Ok(Instruction::Arg(parted.collect::<Result<_, _>>()?))
}

fn run(rest: &str, heredocs: &[HereDoc], flags: &mut Flags) -> Result<Instruction, Fault> {
    if let Some(mount) = flags.take("mount")? {
        return Err(Fault::unsupported(format!("--mount={mount}"), NO_MOUNT));
    }
    match flags.take("network")?.as_deref() {
        None | Some("default") => {}
        Some(other) => {
            let instead =
                "Leave --network away: a build's network is the builder's own, with its rules of egress.";
            return Err(Fault::unsupported(format!("--network={other}"), instead));
        }
    }
    match flags.take("security")?.as_deref() {
        None | Some("sandbox") => {}
        Some(other) => {
            let instead = "Leave --security away: a step has a machine of its own, and is its superuser.";
            return Err(Fault::unsupported(format!("--security={other}"), instead));
        }
    }
    if let Some(device) = flags.take("device")? {
        return Err(Fault::unsupported(
            format!("--device={device}"),
            "Leave --device away: a build's machine has none.",
        ));
    }
    let form = form(rest)?;
    match &form {
        Form::Exec(words) if words.first().is_none_or(String::is_empty) => {
            return Err(Fault::syntax("RUN has a command"));
        }
        Form::Shell(command) if command.is_empty() => return Err(Fault::syntax("RUN has a command")),
        _ => {}
    }
    Ok(Instruction::Run { form, heredocs: heredocs.to_vec() })
}

fn health(rest: &str, flags: &mut Flags) -> Result<Option<Health>, Fault> {
    let (kind, command) = words::keyword(rest);
    let mut time = |name: &str| flags.take(name)?.map(|value| duration(name, &value)).transpose();
    let (interval, timeout, start_period) = (time("interval")?, time("timeout")?, time("start-period")?);
    time("start-interval")?;
    let retries = match flags.take("retries")? {
        None => None,
        Some(value) => match value.parse() {
            Ok(retries) => Some(retries),
            Err(_) => return Err(Fault::syntax("--retries is a number that is not negative")),
        },
    };
    match kind.to_ascii_uppercase().as_str() {
        "NONE" if command.is_empty() => Ok(None),
        "CMD" => {
            let command = form(command)?;
            if matches!(&command, Form::Shell(text) if text.is_empty()) || command == Form::Exec(Vec::new()) {
                return Err(Fault::syntax("HEALTHCHECK CMD has a command"));
            }
            Ok(Some(Health { command, interval, timeout, start_period, retries }))
        }
        _ => Err(Fault::syntax("HEALTHCHECK is `HEALTHCHECK CMD command` or `HEALTHCHECK NONE`")),
    }
}

/// `1m30s`, `500ms`: Go's `time.ParseDuration`, of what is not negative.
fn duration(name: &str, text: &str) -> Result<Duration, Fault> {
    let wrong = || Fault::syntax(format!("--{name} is a time like 30s or 1m30s"));
    let mut seconds = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let number = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.').ok_or_else(wrong)?;
        let unit = rest[number..].find(|letter: char| letter.is_ascii_digit() || letter == '.');
        let unit = unit.map_or(rest.len(), |unit| number + unit);
        let amount: f64 = rest[..number].parse().map_err(|_| wrong())?;
        seconds += amount
            * match &rest[number..unit] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" => 1e-6,
                "ns" => 1e-9,
                _ => return Err(wrong()),
            };
        rest = &rest[unit..];
    }
    if text.is_empty() {
        return Err(wrong());
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_nearly_right_is_suggested() {
        for (written, name) in
            [("RUM", "RUN"), ("FORM", "FROM"), ("ENTRYPONT", "ENTRYPOINT"), ("COYP", "COPY")]
        {
            assert_eq!(nearest(written), Some(name), "{written}");
        }
        assert_eq!(nearest("APT-GET"), None);
    }

    #[test]
    fn times_are_read_as_in_go() {
        let of = |text: &str| duration("interval", text).ok();
        assert_eq!(of("1m30s"), Some(Duration::from_secs(90)));
        assert_eq!(of("1.5s"), Some(Duration::from_millis(1500)));
        for bad in ["", "30", "-1s", "1x", "s", "1e400h", "1..5s"] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }
}
