//! Lines: directives, comments, continuation lines and here-documents, before anybody looks at what an instruction means.
//!
//! Source: BuildKit, `frontend/dockerfile/parser/parser.go`, whose rules these follow.

use crate::error::{Error, Fault};
use crate::words;

/// The largest Dockerfile, in bytes.
pub(crate) const MOST_BYTES: usize = 1 << 20;
/// The most instructions of one.
const MOST_INSTRUCTIONS: usize = 4096;
/// Front ends whose language this is, by the end of their image's name.
const FRONT_ENDS: [&str; 2] = ["docker/dockerfile", "docker/dockerfile-upstream"];

/// A Dockerfile, line by line.
#[derive(Debug)]
pub(crate) struct Lines {
    pub escape: char,
    pub lines: Vec<Line>,
}

/// One instruction: its lines are joined.
#[derive(Debug)]
pub(crate) struct Line {
    /// Where it begins, counted from 1.
    pub line: u32,
    pub text: String,
    pub heredocs: Vec<HereDoc>,
}

/// A document that stands in the Dockerfile, after the instruction that has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HereDoc {
    /// What ends it.
    pub name: String,
    /// Whether its variables are expanded where the builder writes it: its name had no quotes.
    pub expand: bool,
    /// Whether tabs at the begin of a line are dropped: `<<-`.
    pub strip: bool,
    /// As it stands, each line with its end.
    pub content: String,
}

impl HereDoc {
    /// What it says, without the tabs that `<<-` drops.
    pub fn text(&self) -> String {
        if !self.strip {
            return self.content.clone();
        }
        self.content.split_inclusive('\n').map(|line| line.trim_start_matches('\t')).collect()
    }
}

/// Directives come before everything else.
struct Directives {
    open: bool,
    seen: Vec<String>,
    escape: char,
}

impl Directives {
    /// Reads a comment that may be a directive. `comment` begins with `#`.
    fn read(&mut self, comment: &str) -> Result<(), Fault> {
        if !self.open {
            return Ok(());
        }
        self.open = false;
        let Some((name, value)) = comment[1..].split_once('=') else { return Ok(()) };
        let (name, value) = (name.trim().to_ascii_lowercase(), value.trim());
        if !["syntax", "escape", "check"].contains(&name.as_str()) || value.is_empty() {
            return Ok(());
        }
        self.open = true;
        if self.seen.contains(&name) {
            return Err(Fault::syntax(format!("the directive {name} is there twice")));
        }
        match (name.as_str(), value) {
            ("escape", "\\") => self.escape = '\\',
            ("escape", "`") => self.escape = '`',
            ("escape", _) => return Err(Fault::syntax("the directive escape is ` or \\")),
            ("syntax", front_end) => known_front_end(front_end)?,
            _ => {}
        }
        self.seen.push(name);
        Ok(())
    }
}

/// Another front end has another language.
fn known_front_end(image: &str) -> Result<(), Fault> {
    let name = image.split('@').next().unwrap_or_default();
    let name = match name.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => name,
        _ => name,
    };
    if FRONT_ENDS.iter().any(|known| name == *known || name.ends_with(&format!("/{known}"))) {
        return Ok(());
    }
    Err(Fault::unsupported(
        format!("the front end {image}"),
        "Use Docker's language: # syntax=docker/dockerfile:1, or no such line.",
    ))
}

/// Whether the line goes on: it ends in one escape, with nothing but spaces after it. Two are one that is meant.
fn continued(line: &str, escape: char) -> Option<&str> {
    let before = line.trim_end_matches([' ', '\t']).strip_suffix(escape)?;
    (!before.ends_with(escape)).then_some(before)
}

/// Parts `text` into instructions.
pub(crate) fn read(text: &str) -> Result<Lines, Error> {
    if text.len() > MOST_BYTES {
        return Err(Fault::TooLarge { what: "the Dockerfile in bytes", limit: MOST_BYTES as u64 }.at(0, ""));
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let all: Vec<&str> = text.split('\n').map(|line| line.strip_suffix('\r').unwrap_or(line)).collect();
    let mut directives = Directives { open: true, seen: Vec::new(), escape: '\\' };
    let mut lines: Vec<Line> = Vec::new();
    let mut next = 0;
    while let Some(first) = all.get(next) {
        let line = u32::try_from(next + 1).unwrap_or(u32::MAX);
        next += 1;
        let first = first.trim_start();
        if first.starts_with('#') {
            directives.read(first).map_err(|fault| fault.at(line, first))?;
            continue;
        }
        directives.open = false;
        if first.is_empty() {
            continue;
        }
        let text = joined(first, &all, &mut next, directives.escape);
        if text.trim().is_empty() {
            continue;
        }
        if lines.len() == MOST_INSTRUCTIONS {
            let limit = MOST_INSTRUCTIONS as u64;
            return Err(Fault::TooLarge { what: "the Dockerfile in instructions", limit }.at(line, &text));
        }
        let mut heredocs = heredocs(&text, directives.escape);
        for heredoc in &mut heredocs {
            fill(heredoc, &all, &mut next).map_err(|fault| fault.at(line, &text))?;
        }
        lines.push(Line { line, text, heredocs });
    }
    Ok(Lines { escape: directives.escape, lines })
}

/// `first` and the lines that go on with it. Comments and empty lines among them are dropped.
fn joined(first: &str, all: &[&str], next: &mut usize, escape: char) -> String {
    let Some(begin) = continued(first, escape) else { return first.to_owned() };
    let mut text = begin.to_owned();
    while let Some(line) = all.get(*next) {
        *next += 1;
        let bare = line.trim_start();
        if bare.is_empty() || bare.starts_with('#') {
            continue;
        }
        match continued(line, escape) {
            Some(more) => text.push_str(more),
            None => {
                text.push_str(line);
                break;
            }
        }
    }
    text
}

/// The here-documents that an instruction announces.
fn heredocs(text: &str, escape: char) -> Vec<HereDoc> {
    let (keyword, rest) = words::keyword(text);
    let takes = ["RUN", "COPY", "ADD"].iter().any(|name| keyword.eq_ignore_ascii_case(name));
    if !takes || !rest.contains("<<") {
        return Vec::new();
    }
    let Ok((_, rest)) = words::flags(rest) else { return Vec::new() };
    if !matches!(words::json(rest), Ok(None)) {
        return Vec::new();
    }
    words::split(rest, escape).iter().filter_map(|word| heredoc(word, escape)).collect()
}

/// `<<NAME`, `<<-NAME`, `3<<"NAME"`: a document without its content.
pub(crate) fn heredoc(word: &str, escape: char) -> Option<HereDoc> {
    let rest = word.trim_start_matches(|letter: char| letter.is_ascii_digit()).strip_prefix("<<")?;
    let (strip, rest) = rest.strip_prefix('-').map_or((false, rest), |rest| (true, rest));
    if rest.is_empty() || rest.contains('<') {
        return None;
    }
    let quoted = |letter: char| letter == '\'' || letter == '"' || letter == escape;
    let name: String = rest.chars().filter(|letter| !quoted(*letter)).collect();
    (!name.is_empty()).then(|| HereDoc {
        expand: !rest.contains(quoted),
        name,
        strip,
        content: String::new(),
    })
}

/// Reads a document's lines up to its name.
fn fill(heredoc: &mut HereDoc, all: &[&str], next: &mut usize) -> Result<(), Fault> {
    while let Some(line) = all.get(*next) {
        *next += 1;
        let end = if heredoc.strip { line.trim_start_matches('\t') } else { line };
        if end == heredoc.name {
            return Ok(());
        }
        heredoc.content.push_str(line);
        heredoc.content.push('\n');
    }
    Err(Fault::syntax(format!("the here-document has no end: no line is {}", heredoc.name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(text: &str) -> Vec<(u32, String)> {
        read(text).unwrap().lines.into_iter().map(|line| (line.line, line.text)).collect()
    }

    #[test]
    fn lines_are_joined_and_counted() {
        let text = "\u{feff}# syntax=docker/dockerfile:1\r\n\nFROM a\r\nRUN x \\\n  # no\n\n  y \\ \n z\nRUN echo \\\\\n USER b";
        let found = texts(text);
        let expected = [(3, "FROM a"), (4, "RUN x   y  z"), (9, "RUN echo \\\\"), (10, "USER b")];
        assert_eq!(found, expected.map(|(line, text)| (line, text.to_owned())));
    }

    #[test]
    fn directives_come_first_and_once() {
        assert_eq!(read("# escape=`\nFROM a").unwrap().escape, '`');
        // After a comment, an empty line or an instruction it is a comment.
        for late in ["# hello\n# escape=`\nFROM a", "\n# escape=`\nFROM a", "FROM a\n# escape=`"] {
            assert_eq!(read(late).unwrap().escape, '\\', "{late}");
        }
        assert_eq!(read("# escape=`\n# escape=`\nFROM a").unwrap_err().line, 2);
        assert_eq!(read("#escape=x\nFROM a").unwrap_err().line, 1);
        assert!(read("# syntax=example.com/other:1\nFROM a").is_err());
        assert!(read("# syntax=mirror:5000/docker/dockerfile:1.7@sha256:00\nFROM a").is_ok());
    }

    #[test]
    fn here_documents_are_read_to_their_end() {
        let found = read("RUN <<A cat <<-'B'\nx\n# kept\nA\n\ty\n\tB\nUSER z").unwrap();
        let [run, user] = &found.lines[..] else { panic!("two lines") };
        assert_eq!((user.line, user.text.as_str()), (7, "USER z"));
        assert_eq!(run.heredocs[0].text(), "x\n# kept\n");
        assert!(run.heredocs[0].expand && !run.heredocs[1].expand);
        assert_eq!((run.heredocs[1].text().as_str(), run.heredocs[1].name.as_str()), ("y\n", "B"));
        assert_eq!(read("FROM a\nRUN <<A\nx").unwrap_err().line, 2);
        // Neither an exec form nor a shift is one.
        assert!(
            read("RUN [\"cat\", \"<<A\"]\nRUN echo $((1<<2))\nENV a=<<b")
                .unwrap()
                .lines
                .iter()
                .all(|line| line.heredocs.is_empty())
        );
    }
}
