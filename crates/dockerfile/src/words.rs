//! The words of an instruction: quotes and escapes are kept, `text` reads them.
//!
//! Source: BuildKit, `frontend/dockerfile/parser/line_parsers.go` and `split_command.go`, whose rules these follow.

use crate::error::Fault;

/// What may stand between words of an instruction, besides the end of a line.
pub(crate) const SPACES: [char; 5] = ['\t', '\u{b}', '\u{c}', '\r', ' '];

/// `--name` or `--name=value`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Flag {
    pub name: String,
    pub value: Option<String>,
}

/// The first word of `line`, and the rest of it without spaces around it.
pub(crate) fn keyword(line: &str) -> (&str, &str) {
    let line = line.trim();
    match line.find(SPACES) {
        Some(at) => (&line[..at], line[at..].trim()),
        None => (line, ""),
    }
}

/// Words that spaces part: quotes keep spaces in a word, and stay in it.
pub(crate) fn split(rest: &str, escape: char) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut began = false;
    let mut quote: Option<char> = None;
    let mut letters = rest.chars().peekable();
    while let Some(letter) = letters.next() {
        if quote.is_none() && letter.is_whitespace() {
            if began || !word.is_empty() {
                words.push(std::mem::take(&mut word));
            }
            began = false;
            continue;
        }
        if letter == escape && quote != Some('\'') {
            // One at the end escapes nothing.
            if let Some(next) = letters.next() {
                word.push(letter);
                word.push(next);
            }
            continue;
        }
        match quote {
            Some(open) if open == letter => quote = None,
            None if letter == '\'' || letter == '"' => {
                quote = Some(letter);
                began = true;
            }
            _ => {}
        }
        word.push(letter);
    }
    if began || !word.is_empty() {
        words.push(word);
    }
    words
}

/// Words that spaces part, whatever quotes there are.
pub(crate) fn plain(rest: &str) -> Vec<String> {
    rest.split(|letter: char| SPACES.contains(&letter) || letter == '\n')
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

/// The flags that `rest` begins with, and what comes after them.
pub(crate) fn flags(rest: &str) -> Result<(Vec<Flag>, &str), Fault> {
    let mut found: Vec<Flag> = Vec::new();
    let mut rest = rest.trim_start();
    while rest.starts_with("--") {
        let (word, length) = flag_word(rest);
        rest = rest[length..].trim_start();
        if word == "--" {
            break;
        }
        let flag = &word[2..];
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        found.push(Flag { name: name.to_owned(), value });
    }
    Ok((found, rest))
}

/// One flag without its quotes and escapes, and how many bytes it takes.
fn flag_word(rest: &str) -> (String, usize) {
    let mut word = String::new();
    let mut quote: Option<char> = None;
    let mut letters = rest.char_indices();
    while let Some((at, letter)) = letters.next() {
        if quote.is_none() && letter.is_whitespace() {
            return (word, at);
        }
        match letter {
            '\\' if quote != Some('\'') => word.extend(letters.next().map(|(_, next)| next)),
            '\'' | '"' if quote == Some(letter) => quote = None,
            '\'' | '"' if quote.is_none() => quote = Some(letter),
            _ => word.push(letter),
        }
    }
    (word, rest.len())
}

/// The texts of a JSON array; none when `rest` is not one, for then it is in the shell form.
pub(crate) fn json(rest: &str) -> Result<Option<Vec<String>>, Fault> {
    let rest = rest.trim_start();
    if !rest.starts_with('[') {
        return Ok(None);
    }
    let Ok(values) = serde_json::from_str::<Vec<serde_json::Value>>(rest) else { return Ok(None) };
    let texts: Option<Vec<String>> = values.iter().map(|value| value.as_str().map(str::to_owned)).collect();
    texts
        .map(Some)
        .ok_or_else(|| Fault::syntax("an array of the exec form has texts alone, in double quotes"))
}

/// `name=value …`, or the old `name value`.
pub(crate) fn pairs(rest: &str, keyword: &str, escape: char) -> Result<Vec<(String, String)>, Fault> {
    let words = split(rest, escape);
    let Some(first) = words.first() else {
        return Err(Fault::syntax(format!("{keyword} has at least one argument")));
    };
    if !first.contains('=') {
        let Some((name, value)) = rest.split_once(SPACES) else {
            return Err(Fault::syntax(format!("{keyword} has a name and a value")));
        };
        return Ok(vec![(name.to_owned(), value.trim_start_matches(SPACES).to_owned())]);
    }
    let parted = words.iter().map(|word| match word.split_once('=') {
        Some(("", _)) => Err(Fault::syntax(format!("{keyword} has a name before `=`"))),
        Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
        None => Err(Fault::syntax(format!(
            "{word} has no `=`: {keyword} has name=value, in quotes where it has spaces"
        ))),
    });
    parted.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_keep_words_together() {
        let cases: &[(&str, &[&str])] = &[
            ("a b  c", &["a", "b", "c"]),
            ("a=\"x y\" b", &["a=\"x y\"", "b"]),
            ("a='x \\' b", &["a='x \\'", "b"]),
            ("a\\ b c", &["a\\ b", "c"]),
            ("\"\" x", &["\"\"", "x"]),
            ("x\\", &["x"]),
            ("\"open x", &["\"open x"]),
        ];
        for (text, words) in cases {
            assert_eq!(split(text, '\\'), *words, "{text}");
        }
    }

    #[test]
    fn flags_end_at_the_first_word_without_dashes() {
        let (found, rest) = flags("--from=a --link  --chown=\"x y\" src --not dst").unwrap();
        let names: Vec<_> = found.iter().map(|flag| (flag.name.as_str(), flag.value.as_deref())).collect();
        assert_eq!(names, [("from", Some("a")), ("link", None), ("chown", Some("x y"))]);
        assert_eq!(rest, "src --not dst");
        assert_eq!(flags("-- --x").unwrap().1, "--x");
    }

    #[test]
    fn only_arrays_of_texts_are_the_exec_form() {
        assert_eq!(json("[\"a\", \"b\"]").unwrap(), Some(vec!["a".to_owned(), "b".to_owned()]));
        assert_eq!(json("[ -f x ] && y").unwrap(), None);
        assert_eq!(json("['a']").unwrap(), None);
        assert!(json("[\"a\", 1]").is_err());
        assert_eq!(json("[]").unwrap(), Some(Vec::new()));
    }
}
