//! Texts with variables in them: what they come to.
//!
//! Source: BuildKit, `frontend/dockerfile/shell/lex.go`, whose rules these follow.

use std::marker::PhantomData;

use crate::pattern::{self, Token};
use crate::text::{Apply, Error, Part, Text};

/// The longest value, in bytes: `ENV a=$a$a` doubles with every line.
pub(crate) const MOST_VALUE: usize = 64 << 10;
/// What one substitution's pattern may cost, in letters of the value times parts of the pattern; once more times letters where
/// it may begin anywhere.
const MOST_WORK: usize = 1 << 24;

/// What is known of a variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lookup<'a> {
    Set(&'a str),
    Unset,
    /// The image may have it, or its value depends on such a one.
    Unknown,
}

/// Variables.
pub(crate) trait Scope {
    fn get(&self, name: &str) -> Lookup<'_>;
}

/// Every variable is known.
struct Known<'v, F>(F, PhantomData<&'v str>);

impl<'v, F: Fn(&str) -> Option<&'v str>> Scope for Known<'v, F> {
    fn get(&self, name: &str) -> Lookup<'_> {
        (self.0)(name).map_or(Lookup::Unset, Lookup::Set)
    }
}

impl Text {
    /// What it comes to when all variables are known: `get` gives their values.
    ///
    /// # Errors
    /// `Required` of `${x:?word}`, `Pattern`, and `TooLong` of more than 64 KiB.
    pub fn resolve<'v>(&self, get: impl Fn(&str) -> Option<&'v str>) -> Result<String, Error> {
        let text = self.expand(&Known(get, PhantomData), MOST_VALUE)?;
        Ok(text.literal().unwrap_or_default().to_owned())
    }

    /// It with every variable replaced that `scope` knows, of `most` bytes at most.
    pub(crate) fn expand(&self, scope: &dyn Scope, most: usize) -> Result<Self, Error> {
        let mut text = Self::default();
        for part in &self.0 {
            match part {
                Part::Literal(literal) => text.push(literal),
                Part::Variable { name, apply } => text.append(variable(name, apply, scope, most)?),
            }
            if text.length() > most {
                return Err(Error::TooLong(most));
            }
        }
        Ok(text)
    }

    fn length(&self) -> usize {
        let lengths = self.0.iter().map(|part| match part {
            Part::Literal(literal) => literal.len(),
            Part::Variable { name, apply } => name.len() + apply.words().map(Self::length).sum::<usize>(),
        });
        lengths.sum()
    }
}

impl Apply {
    fn words(&self) -> impl Iterator<Item = &Text> {
        let (one, two) = match self {
            Self::Plain => (None, None),
            Self::Default { word, .. }
            | Self::Alternative { word, .. }
            | Self::Require { word, .. }
            | Self::TrimStart { word }
            | Self::TrimEnd { word } => (Some(word), None),
            Self::Replace { pattern, with, .. } => (Some(pattern), Some(with)),
        };
        one.into_iter().chain(two)
    }

    /// It with its words expanded.
    fn expand(&self, scope: &dyn Scope, most: usize) -> Result<Self, Error> {
        let of = |word: &Text| word.expand(scope, most);
        Ok(match self {
            Self::Plain => Self::Plain,
            Self::Default { word, or_empty } => Self::Default { word: of(word)?, or_empty: *or_empty },
            Self::Alternative { word, or_empty } => {
                Self::Alternative { word: of(word)?, or_empty: *or_empty }
            }
            Self::Require { word, or_empty } => Self::Require { word: of(word)?, or_empty: *or_empty },
            Self::TrimStart { word } => Self::TrimStart { word: of(word)? },
            Self::TrimEnd { word } => Self::TrimEnd { word: of(word)? },
            Self::Replace { pattern, with, all } => {
                Self::Replace { pattern: of(pattern)?, with: of(with)?, all: *all }
            }
        })
    }
}

fn variable(name: &str, apply: &Apply, scope: &dyn Scope, most: usize) -> Result<Text, Error> {
    let value = match scope.get(name) {
        Lookup::Set(value) => Some(value),
        Lookup::Unset => None,
        Lookup::Unknown => {
            let part = Part::Variable { name: name.to_owned(), apply: apply.expand(scope, most)? };
            return Ok(Text(vec![part]));
        }
    };
    let word = |word: &Text| {
        let word = word.expand(scope, most)?;
        word.literal().map(str::to_owned).ok_or_else(|| Error::Unknown(name.to_owned()))
    };
    let there = |or_empty: bool| value.filter(|value| !(or_empty && value.is_empty()));
    Ok(match apply {
        Apply::Plain => Text::of(value.unwrap_or_default()),
        Apply::Default { word, or_empty } => match there(*or_empty) {
            Some(value) => Text::of(value),
            None => word.expand(scope, most)?,
        },
        Apply::Alternative { word, or_empty } => match there(*or_empty) {
            Some(_) => word.expand(scope, most)?,
            None => Text::default(),
        },
        Apply::Require { word: message, or_empty } => match there(*or_empty) {
            Some(value) => Text::of(value),
            None => {
                let mut message = word(message)?;
                if message.is_empty() {
                    message =
                        format!("is not allowed to be {}", if value.is_none() { "unset" } else { "empty" });
                }
                return Err(Error::Required { name: name.to_owned(), message });
            }
        },
        Apply::TrimStart { word: pattern } => {
            Text::of(trim_start(value.unwrap_or_default(), &word(pattern)?)?)
        }
        Apply::TrimEnd { word: pattern } => Text::of(trim_end(value.unwrap_or_default(), &word(pattern)?)?),
        Apply::Replace { pattern, with, all } => {
            let (pattern, with) = (word(pattern)?, word(with)?);
            Text::of(replace(value.unwrap_or_default(), &pattern, &with, *all, most)?)
        }
    })
}

/// A pattern that is matched against `letters` letters, `times` times.
fn tokens(pattern: &str, letters: usize, times: usize) -> Result<Vec<Token>, Error> {
    let mut tokens = pattern::of_shell(pattern).ok_or_else(|| Error::Pattern(pattern.to_owned()))?;
    tokens.dedup_by(|one, other| *one == Token::All && *other == Token::All);
    match tokens.len().saturating_mul(letters).saturating_mul(times) {
        work if work > MOST_WORK => Err(Error::TooMuchWork),
        _ => Ok(tokens),
    }
}

/// How many of `letters` match from the first one on: the fewest, or the most.
fn begin(tokens: &[Token], letters: &[char], longest: bool) -> Option<usize> {
    let ends = pattern::ends(tokens, letters);
    if longest { ends.iter().rposition(|end| *end) } else { ends.iter().position(|end| *end) }
}

fn trim_start(value: &str, word: &str) -> Result<String, Error> {
    let (pattern, longest) = word.strip_prefix('#').map_or((word, false), |pattern| (pattern, true));
    let letters: Vec<char> = value.chars().collect();
    let dropped = begin(&tokens(pattern, letters.len(), 1)?, &letters, longest).unwrap_or(0);
    Ok(letters[dropped..].iter().collect())
}

fn trim_end(value: &str, word: &str) -> Result<String, Error> {
    let (pattern, longest) = word.strip_prefix('%').map_or((word, false), |pattern| (pattern, true));
    // The same from the other end.
    let letters: Vec<char> = value.chars().rev().collect();
    let mut tokens = tokens(pattern, letters.len(), 1)?;
    tokens.reverse();
    let dropped = begin(&tokens, &letters, longest).unwrap_or(0);
    Ok(letters[dropped..].iter().rev().collect())
}

fn replace(value: &str, pattern: &str, with: &str, all: bool, most: usize) -> Result<String, Error> {
    let letters: Vec<char> = value.chars().collect();
    let tokens = tokens(pattern, letters.len(), letters.len())?;
    let mut made = String::new();
    let (mut at, mut done, mut end) = (0, false, None);
    while at <= letters.len() {
        let found = if done { None } else { begin(&tokens, &letters[at..], true) };
        // An empty match right after another one is none, as in Go.
        if let Some(length) = found.filter(|length| *length > 0 || end != Some(at)) {
            made.push_str(with);
            done = !all;
            if length > 0 {
                at += length;
                end = Some(at);
                continue;
            }
        }
        made.extend(letters.get(at));
        at += 1;
        if made.len() > most {
            return Err(Error::TooLong(most));
        }
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(word: &str) -> Result<String, Error> {
        Text::read(word, '\\')?.resolve(|name| match name {
            "x" => Some("foobarfoo"),
            "path" => Some("/usr/local/bin.tar.gz"),
            "empty" => Some(""),
            "ü" => Some("umlaut"),
            _ => None,
        })
    }

    #[test]
    fn words_come_to_what_docker_makes_of_them() {
        let cases = [
            ("$x", "foobarfoo"),
            ("${x}y", "foobarfooy"),
            ("$x_", ""),
            ("\\$x", "$x"),
            ("'$x'", "$x"),
            ("\"$x\"", "foobarfoo"),
            ("\"\\$x\"", "$x"),
            ("\"a\\b\"", "a\\b"),
            ("a\\b", "ab"),
            ("'a\\b'", "a\\b"),
            ("a' 'b\" \"c", "a b c"),
            ("$", "$"),
            ("$ x", "$ x"),
            ("$$x", "x"),
            ("$1x", "x"),
            ("$ü", "umlaut"),
            ("${none:-d}", "d"),
            ("${none-d}", "d"),
            ("${empty:-d}", "d"),
            ("${empty-d}", ""),
            ("${x:-d}", "foobarfoo"),
            ("${none:+d}", ""),
            ("${empty:+d}", ""),
            ("${empty+d}", "d"),
            ("${x:+a ${none:-b} c}", "a b c"),
            ("${none:-'}'}", "}"),
            ("${none:-\\}}", "}"),
            ("${x:?no}", "foobarfoo"),
            ("${empty?no}", ""),
            ("${x#f*o}", "obarfoo"),
            ("${x##f*o}", ""),
            ("${x%f*o}", "foobar"),
            ("${x%%f*o}", ""),
            ("${x#none}", "foobarfoo"),
            ("${x#???}", "barfoo"),
            ("${path##*/}", "bin.tar.gz"),
            ("${path%.gz}", "/usr/local/bin.tar"),
            ("${path%%.*}", "/usr/local/bin"),
            ("${x/foo/y}", "ybarfoo"),
            ("${x//foo/y}", "ybary"),
            ("${x//o*r/-}", "f-foo"),
            ("${path//\\//-}", "-usr-local-bin.tar.gz"),
            ("${x/none/y}", "foobarfoo"),
            ("${x//[/y}", "foobarfoo"),
            ("${x/foo/}", "barfoo"),
        ];
        for (word, expected) in cases {
            assert_eq!(of(word).as_deref(), Ok(expected), "{word}");
        }
    }

    #[test]
    fn what_docker_refuses_is_refused() {
        let name = |name: &str| name.to_owned();
        let cases = [
            ("${", Error::Unclosed('}')),
            ("${x", Error::Unclosed('}')),
            ("${x:", Error::Unclosed('}')),
            ("${x:-y", Error::Unclosed('}')),
            ("${}", Error::BadSubstitution),
            ("${:x}", Error::BadSubstitution),
            ("${{x}}", Error::BadSubstitution),
            ("'x", Error::Unclosed('\'')),
            ("\"x", Error::Unclosed('"')),
            ("${x^^}", Error::Modifier { name: name("x"), modifier: name("^") }),
            ("${x:2:3}", Error::Modifier { name: name("x"), modifier: name(":2") }),
            ("${#x}", Error::Modifier { name: name("#"), modifier: name("x") }),
            ("${x/y}", Error::Unclosed('/')),
            ("${none:?say so}", Error::Required { name: name("none"), message: name("say so") }),
            (
                "${empty:?}",
                Error::Required { name: name("empty"), message: name("is not allowed to be empty") },
            ),
            ("${x#\\a}", Error::Pattern(name("\\a"))),
        ];
        for (word, error) in cases {
            assert_eq!(of(word), Err(error), "{word}");
        }
        assert_eq!(of(&"${x:+".repeat(40)), Err(Error::TooDeep));
        assert_eq!(of(&"$x".repeat(10_000)), Err(Error::TooLong(MOST_VALUE)));
    }

    /// A scope of an image that nobody has looked at.
    struct Half;

    impl Scope for Half {
        fn get(&self, name: &str) -> Lookup<'_> {
            match name {
                "known" => Lookup::Set("k"),
                "none" => Lookup::Unset,
                _ => Lookup::Unknown,
            }
        }
    }

    #[test]
    fn what_is_not_known_stays_for_later() {
        let expand = |word: &str| Text::read(word, '\\').unwrap().expand(&Half, MOST_VALUE);
        let text = expand("/app:$PATH:${HOME:-$known}$none").unwrap();
        assert_eq!((text.literal(), text.variable()), (None, Some("PATH")));
        let later = |name: &str| (name == "PATH").then_some("/bin");
        assert_eq!(text.resolve(later).unwrap(), "/app:/bin:k");
        assert_eq!(expand("${none:-$PATH}").unwrap(), expand("$PATH").unwrap());
        assert_eq!(expand("${known#$PATH}"), Err(Error::Unknown("known".to_owned())));
        // It goes from part to part as JSON.
        let json = serde_json::to_string(&text).unwrap();
        assert_eq!(serde_json::from_str::<Text>(&json).unwrap(), text);
    }
}
