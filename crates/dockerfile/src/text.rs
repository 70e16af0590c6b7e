//! Texts with variables in them: how they are read.
//!
//! A text is read once and evaluated (`expand`) as far as the variables are known: those of an image whose configuration
//! nobody has looked at stay in it, and whoever runs the step resolves them.
//!
//! Source: BuildKit, `frontend/dockerfile/shell/lex.go`, whose rules these follow.

use std::iter::Peekable;
use std::str::Chars;

use serde::{Deserialize, Serialize};

/// How deep `${a:-${b:-…}}` may go.
const MOST_DEPTH: u32 = 32;

/// Literal parts and variables.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Text(pub(crate) Vec<Part>);

/// A part of a [`Text`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// As it is.
    Literal(String),
    /// A variable.
    Variable {
        /// Its name.
        name: String,
        /// What is made of its value.
        apply: Apply,
    },
}

/// What is made of a variable's value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Apply {
    /// `$x`, `${x}`: nothing.
    Plain,
    /// `${x-word}`, `${x:-word}`: the word when it is not set.
    Default {
        /// The word.
        word: Text,
        /// Whether an empty value counts as none.
        or_empty: bool,
    },
    /// `${x+word}`, `${x:+word}`: the word when it is set, otherwise nothing.
    Alternative {
        /// The word.
        word: Text,
        /// Whether an empty value counts as none.
        or_empty: bool,
    },
    /// `${x?word}`, `${x:?word}`: an error when it is not set.
    Require {
        /// What the error says.
        word: Text,
        /// Whether an empty value counts as none.
        or_empty: bool,
    },
    /// `${x#pattern}`, `${x##pattern}`: without its begin.
    TrimStart {
        /// What is dropped; for the longest, a `#` stands before it.
        word: Text,
    },
    /// `${x%pattern}`, `${x%%pattern}`: without its end.
    TrimEnd {
        /// What is dropped; for the longest, a `%` stands before it.
        word: Text,
    },
    /// `${x/pattern/with}`, `${x//pattern/with}`.
    Replace {
        /// What is replaced.
        pattern: Text,
        /// By what.
        with: Text,
        /// Wherever it is, or once.
        all: bool,
    },
}

/// Why a text cannot be read or evaluated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// `${`, `${}`, `${:x}`.
    #[error("bad substitution: a variable's name goes after ${{")]
    BadSubstitution,
    /// A quote, a brace or a slash is missing.
    #[error("a {0} is missing at the end")]
    Unclosed(char),
    /// `${x^^}`.
    #[error("${{{name}{modifier}…}} has a modifier that Docker does not have, either")]
    Modifier {
        /// The variable.
        name: String,
        /// What comes after it.
        modifier: String,
    },
    /// `${x:?word}`.
    #[error("{name}: {message}")]
    Required {
        /// The variable.
        name: String,
        /// The word.
        message: String,
    },
    /// A pattern of `${x#pattern}`.
    #[error("{0} is not a valid pattern of a substitution")]
    Pattern(String),
    /// Its modifier depends on a variable of the image.
    #[error("the modifier of {0} depends on a variable of the image, whose variables are not known here")]
    Unknown(String),
    /// Substitutions within substitutions.
    #[error("substitutions go deeper than {}", MOST_DEPTH)]
    TooDeep,
    /// A pattern and a value.
    #[error("a substitution's pattern and value are too long together")]
    TooMuchWork,
    /// The value.
    #[error("a value is longer than {0} bytes")]
    TooLong(usize),
}

impl Text {
    /// A text without variables.
    pub fn of(literal: impl Into<String>) -> Self {
        let mut text = Self::default();
        text.push(&literal.into());
        text
    }

    /// Its parts, in order.
    pub fn parts(&self) -> &[Part] {
        &self.0
    }

    /// It, when no variable is left in it.
    pub fn literal(&self) -> Option<&str> {
        match &self.0[..] {
            [] => Some(""),
            [Part::Literal(text)] => Some(text),
            _ => None,
        }
    }

    /// The first variable that is left in it.
    pub fn variable(&self) -> Option<&str> {
        self.0.iter().find_map(|part| match part {
            Part::Variable { name, .. } => Some(name.as_str()),
            Part::Literal(_) => None,
        })
    }

    /// Adds a literal part. Two of them are one.
    pub(crate) fn push(&mut self, literal: &str) {
        if literal.is_empty() {
            return;
        }
        match self.0.last_mut() {
            Some(Part::Literal(last)) => last.push_str(literal),
            _ => self.0.push(Part::Literal(literal.to_owned())),
        }
    }

    pub(crate) fn push_part(&mut self, part: Part) {
        match part {
            Part::Literal(literal) => self.push(&literal),
            variable @ Part::Variable { .. } => self.0.push(variable),
        }
    }

    pub(crate) fn append(&mut self, other: Self) {
        other.0.into_iter().for_each(|part| self.push_part(part));
    }

    /// Whether it ends with `end` for certain.
    pub(crate) fn ends_with(&self, end: &str) -> bool {
        matches!(self.0.last(), Some(Part::Literal(last)) if last.ends_with(end))
    }

    /// Reads `word` with its quotes and escapes.
    pub(crate) fn read(word: &str, escape: char) -> Result<Self, Error> {
        Reader { letters: word.chars().peekable(), escape, quotes: true, raw: false, depth: 0 }
            .until(None, false)
    }

    /// Reads the content of a here-document, where quotes are letters.
    pub(crate) fn read_document(content: &str, escape: char) -> Result<Self, Error> {
        Reader { letters: content.chars().peekable(), escape, quotes: false, raw: false, depth: 0 }
            .until(None, false)
    }
}

struct Reader<'a> {
    letters: Peekable<Chars<'a>>,
    escape: char,
    /// Whether quotes quote.
    quotes: bool,
    /// Whether escapes stay: in patterns, which have escapes of their own.
    raw: bool,
    depth: u32,
}

impl Reader<'_> {
    fn until(&mut self, stop: Option<char>, raw: bool) -> Result<Text, Error> {
        if self.depth >= MOST_DEPTH {
            return Err(Error::TooDeep);
        }
        self.depth += 1;
        let before = std::mem::replace(&mut self.raw, raw);
        let text = self.parts(stop);
        self.raw = before;
        self.depth -= 1;
        text
    }

    fn parts(&mut self, stop: Option<char>) -> Result<Text, Error> {
        let mut text = Text::default();
        while let Some(letter) = self.letters.peek().copied() {
            if stop == Some(letter) {
                self.letters.next();
                return Ok(text);
            }
            match letter {
                '\'' if self.quotes => self.single(&mut text)?,
                '"' if self.quotes => self.double(&mut text)?,
                '$' => self.dollar(&mut text)?,
                _ => {
                    self.letters.next();
                    self.letter(letter, &mut text);
                }
            }
        }
        match stop {
            Some(stop) => Err(Error::Unclosed(stop)),
            None => Ok(text),
        }
    }

    /// A letter that is not special, or an escape and what it escapes.
    fn letter(&mut self, letter: char, text: &mut Text) {
        let mut buffer = [0; 4];
        if letter != self.escape {
            return text.push(letter.encode_utf8(&mut buffer));
        }
        if self.raw {
            text.push(letter.encode_utf8(&mut buffer));
        }
        if let Some(next) = self.letters.next() {
            text.push(next.encode_utf8(&mut buffer));
        }
    }

    fn single(&mut self, text: &mut Text) -> Result<(), Error> {
        self.letters.next();
        let mut buffer = [0; 4];
        loop {
            match self.letters.next() {
                None => return Err(Error::Unclosed('\'')),
                Some('\'') => return Ok(()),
                Some(letter) => text.push(letter.encode_utf8(&mut buffer)),
            }
        }
    }

    fn double(&mut self, text: &mut Text) -> Result<(), Error> {
        self.letters.next();
        let mut buffer = [0; 4];
        loop {
            match self.letters.peek().copied() {
                None => return Err(Error::Unclosed('"')),
                Some('"') => {
                    self.letters.next();
                    return Ok(());
                }
                Some('$') => self.dollar(text)?,
                Some(mut letter) => {
                    self.letters.next();
                    if letter == self.escape {
                        if self.raw {
                            text.push(letter.encode_utf8(&mut buffer));
                        }
                        match self.letters.peek().copied() {
                            // One at the end of the word escapes nothing.
                            None => continue,
                            Some(next) if next == '"' || next == '$' || next == self.escape => {
                                self.letters.next();
                                letter = next;
                            }
                            Some(_) => {}
                        }
                    }
                    text.push(letter.encode_utf8(&mut buffer));
                }
            }
        }
    }

    fn dollar(&mut self, text: &mut Text) -> Result<(), Error> {
        self.letters.next();
        if self.letters.peek() != Some(&'{') {
            let name = self.name();
            if name.is_empty() {
                text.push("$");
            } else {
                text.push_part(Part::Variable { name, apply: Apply::Plain });
            }
            return Ok(());
        }
        self.letters.next();
        match self.letters.peek() {
            None => return Err(Error::Unclosed('}')),
            Some('{' | '}' | ':') => return Err(Error::BadSubstitution),
            Some(_) => {}
        }
        let name = self.name();
        let apply = self.apply(&name)?;
        text.push_part(Part::Variable { name, apply });
        Ok(())
    }

    /// What comes after a name in braces, up to the brace.
    fn apply(&mut self, name: &str) -> Result<Apply, Error> {
        let wrong = |modifier: String| Error::Modifier { name: name.to_owned(), modifier };
        let Some(mut modifier) = self.letters.next() else { return Err(Error::Unclosed('}')) };
        let mut shown = modifier.to_string();
        let or_empty = modifier == ':';
        if or_empty {
            let Some(next) = self.letters.next() else { return Err(Error::Unclosed('}')) };
            modifier = next;
            shown.push(next);
        }
        match modifier {
            '}' if !or_empty => Ok(Apply::Plain),
            '-' => Ok(Apply::Default { word: self.until(Some('}'), false)?, or_empty }),
            '+' => Ok(Apply::Alternative { word: self.until(Some('}'), false)?, or_empty }),
            '?' => Ok(Apply::Require { word: self.until(Some('}'), false)?, or_empty }),
            '#' => Ok(Apply::TrimStart { word: self.until(Some('}'), true)? }),
            '%' => Ok(Apply::TrimEnd { word: self.until(Some('}'), true)? }),
            '/' if !or_empty => {
                let all = self.letters.next_if_eq(&'/').is_some();
                let pattern = self.until(Some('/'), true)?;
                Ok(Apply::Replace { pattern, with: self.until(Some('}'), true)?, all })
            }
            _ => Err(wrong(shown)),
        }
    }

    /// A name, the digits of a positional parameter, or one special parameter.
    fn name(&mut self) -> String {
        let mut name = String::new();
        while let Some(letter) = self.letters.peek().copied() {
            if name.is_empty() && letter.is_numeric() {
                while let Some(digit) = self.letters.next_if(|letter| letter.is_numeric()) {
                    name.push(digit);
                }
                return name;
            }
            if name.is_empty() && "@*#?-$!".contains(letter) {
                self.letters.next();
                return letter.to_string();
            }
            if !letter.is_alphanumeric() && letter != '_' {
                break;
            }
            name.push(letter);
            self.letters.next();
        }
        name
    }
}
