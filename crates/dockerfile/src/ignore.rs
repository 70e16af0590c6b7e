//! `.dockerignore`: what of a context is not there.
//!
//! Source: `github.com/moby/patternmatcher` and its `ignorefile`, whose rules these follow: the last line that matches a path or
//! one of its parents decides.

use crate::paths::clean;
use crate::pattern::{self, Token};

/// The largest `.dockerignore`, in bytes.
pub(crate) const MOST_BYTES: u64 = 1 << 20;

/// Lines of a `.dockerignore`.
#[derive(Debug, Default)]
pub(crate) struct Ignore {
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    /// `!`: what matches is there again.
    back: bool,
    /// The components that it begins with and that are no patterns.
    begin: Vec<String>,
    tokens: Vec<Token>,
}

impl Ignore {
    /// Reads one. The error is the line's number and the pattern that is not valid.
    pub fn read(text: &str) -> Result<Self, (u32, String)> {
        let mut rules = Vec::new();
        for (line, number) in text.strip_prefix('\u{feff}').unwrap_or(text).lines().zip(1_u32..) {
            let pattern = line.trim();
            if line.starts_with('#') || pattern.is_empty() {
                continue;
            }
            let (back, pattern) = match pattern.strip_prefix('!') {
                Some(pattern) => (true, pattern.trim()),
                None => (false, pattern),
            };
            let wrong = || (number, line.to_owned());
            if pattern.is_empty() {
                return Err(wrong());
            }
            let cleaned = clean(pattern);
            let cleaned = cleaned.strip_prefix('/').filter(|rest| !rest.is_empty()).unwrap_or(&cleaned);
            let begin = cleaned.split('/').take_while(|component| !pattern::is_pattern(component));
            let begin = begin.map(str::to_owned).collect();
            rules.push(Rule { back, begin, tokens: pattern::of_ignore(cleaned).ok_or_else(wrong)? });
        }
        Ok(Self { rules })
    }

    /// Whether something in `directory`, which is left out, may be there again.
    pub fn may_keep_in(&self, directory: &str) -> bool {
        self.rules.iter().filter(|rule| rule.back).any(|rule| {
            let mut both = rule.begin.iter().zip(directory.split('/'));
            both.all(|(one, other)| one == other)
        })
    }

    /// Whether the file at `path`, relative to the context, is left out.
    pub fn has(&self, path: &str) -> bool {
        let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
        let parents: Vec<&str> = ends.map(|end| &path[..end]).collect();
        let mut left_out = false;
        for rule in &self.rules {
            if rule.back == left_out && parents.iter().any(|path| pattern::matches(&rule.tokens, path)) {
                left_out = !rule.back;
            }
        }
        left_out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_left_out_as_by_docker() {
        let cases = [
            ("*", "a/b", true),
            ("a", "a/b/c", true),
            ("a/", "a/b", true),
            ("/a", "a", true),
            ("./a", "a", true),
            ("a", "b/a", false),
            ("*/a", "b/a", true),
            ("*/a", "c/b/a", false),
            ("**/a", "c/b/a", true),
            ("**/a", "a", true),
            ("**/a", "xa", false),
            ("**a", "xa", true),
            ("**", "x/y", true),
            ("a/**", "a", false),
            ("a/**", "a/b/c", true),
            ("a/**/b", "a/b", true),
            ("a/**/b", "a/x/y/b", true),
            ("a/**/b", "a/x/yb", false),
            ("**/*.go", "x/y.go", true),
            ("**/*.go", "y.go", true),
            ("**/*.go", "y.gox", false),
            ("*.md\n!README.md", "README.md", false),
            ("*.md\n!README.md", "a.md", true),
            ("!README.md\n*.md", "README.md", true),
            ("*\n!src\nsrc/*.log", "src/a.c", false),
            ("*\n!src\nsrc/*.log", "src/a.log", true),
            ("*\n! src/keep ", "src/keep/x", false),
            ("# no\n #x\n\n  y  ", "y", true),
            ("# no", "# no", false),
            ("a?c", "abc", true),
            ("a?c", "a/c", false),
            ("[ab]x", "bx", true),
            ("a\\*", "a*", true),
            ("a\\*", "ab", false),
            ("a.c", "abc", false),
            ("x/../a", "a", true),
            ("..", "a", false),
            (".", "a", false),
        ];
        for (text, path, expected) in cases {
            assert_eq!(Ignore::read(text).unwrap().has(path), expected, "{text:?} {path}");
        }
    }

    #[test]
    fn a_directory_is_looked_into_when_something_may_be_kept() {
        let ignore = Ignore::read("*\n!a/b/c\n!d/*/e").unwrap();
        for (directory, expected) in
            [("a", true), ("a/b", true), ("a/x", false), ("d/x/y", true), ("x", false)]
        {
            assert_eq!(ignore.may_keep_in(directory), expected, "{directory}");
        }
        assert!(!Ignore::read("*").unwrap().may_keep_in("a"));
        assert!(Ignore::read("*\n!**/x").unwrap().may_keep_in("a/b"));
    }

    #[test]
    fn a_pattern_that_is_none_has_its_line() {
        assert_eq!(Ignore::read("a\n\n[x\n").unwrap_err(), (3, "[x".to_owned()));
        assert_eq!(Ignore::read("!").unwrap_err().0, 1);
    }
}
